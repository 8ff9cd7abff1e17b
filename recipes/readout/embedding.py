"""Features of many samples, written as they come.

The samples are cut into parts of whole batches, which the processes share out. A part is written whole, to
`.writing_FILE/` beside the file, and the main process joins them in the order of the samples. So the result depends
neither on the number of processes nor on where an earlier command stopped: what is there is not read again.

Shapes: B samples, N tokens, D width, R rows of the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence, Sized
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.listing import list_files, printable, say
from nepa_core.basics import FROZEN, Batch, UserError
from nepa_core.modality import Modality
from nepa_core.pooling import Row
from nepa_core.runtime.checkpoint import disk_errors, read_json, write_whole
from nepa_core.runtime.config import import_path, listed, shown
from nepa_core.runtime.data import NothingRead, plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import fingerprint_of
from nepa_core.runtime.load import Network, Read
from nepa_core.runtime.meter import Meter
from recipes.readout.columns import (
    SUFFIXES,
    Array,
    column_of,
    file_of,
    is_part,
    join,
    note_of,
    rows_of,
    shapes,
    table_of,
    write_part,
)
from recipes.readout.features import weights_digest
from recipes.report.provenance import provenance
from recipes.statistics.held_out import NUMBER, Numbered

PART_SAMPLES, PART_BYTES = 1024, 2**26
"""Most samples of a part, and most that its features take, of more than one batch: what a kill costs, and memory."""
RARE = 0.99
"""Rows beyond this quantile of the training samples are counted."""


def _layers(value: Any) -> Any:
    return [int(each) if str(each).isdecimal() else each for each in listed(value)]


class EmbedOptions(BaseModel):
    """Options of `nepa embed`."""

    model_config = FROZEN

    out: str | None = Field(
        default=None,
        description="the file to write, x.parquet, x.npy or x.safetensors, or a folder for it; default RUN/embed",
    )
    format: Literal["parquet", "npy", "safetensors"] | None = Field(
        default=None, description="of the file in a folder; default parquet"
    )
    split: Literal["train", "test"] = Field(default="test", description="the split whose samples are read")
    files: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default=(), description="files to read instead, a.png,b.png, or folders of them"
    )
    layer: Annotated[tuple[int | str, ...], BeforeValidator(_layers)] = Field(
        default=("final",), description="embedding, the number of a block, final, best, or several", min_length=1
    )
    pooling: Literal["auto", "mean", "last", "bos", "none"] = Field(
        default="auto",
        description="how tokens become one vector; none: a row for each token; auto: the mean, with best the probe's",
    )
    surprise: bool | Literal["tokens"] = Field(
        default=False, description="true: how badly each sample is predicted; tokens: each token, too"
    )
    usual: Literal["train", "test"] = Field(
        default="train", description="the split that surprise_quantile compares with; test: samples not trained on"
    )
    calibrate: int = Field(
        default=1000, ge=0, description="how many of them, drawn from the whole split; 0: no such column"
    )

    @model_validator(mode="after")
    def _tokens_have_rows(self) -> EmbedOptions:
        if self.surprise == "tokens" and self.pooling != "none":
            raise ValueError("surprise=tokens gives a row for each token: add pooling=none")
        if len(set(self.layer)) < len(self.layer):
            raise ValueError(f"layer={','.join(map(str, self.layer))} names one twice")
        return self


def out_file(target: str, options: EmbedOptions) -> Path:
    """The file to write.

    Raises:
        UserError: its suffix is no format, or not the one that is asked for.
    """
    given = Path(target) / "embed" if options.out is None else Path(options.out)
    wanted = None if options.format is None else f".{options.format}"
    if options.out is not None and given.suffix in SUFFIXES and not given.is_dir():
        if wanted not in (None, given.suffix):
            raise UserError(f"out={given} and format={options.format} differ: leave format= out")
        return given
    if options.out is not None and given.suffix and wanted is None and not given.is_dir():
        raise UserError(
            f"out={given}: no table ends in {given.suffix}; give {', '.join(SUFFIXES)}, or format= a folder"
        )
    return given / f"{'files' if options.files else options.split}{wanted or SUFFIXES[0]}"


def embed(net: Network, options: EmbedOptions, file: Path, ranks: World, *, workers: int, show: bool) -> dict[str, Any]:
    """Write the features of samples to `file`, and what they are to `file`.json; what is finished is only read.

    Args:
        file: of `out_file`. workers: processes that load data. show: progress on the screen.

    Returns:
        What the JSON file holds (empty on the other ranks), with `finished`: whether it was there before.

    Raises:
        UserError: there is no such layer, pooling or file; `file` was made with other settings; nothing can be read; or
            the disk is full.
    """
    if options.surprise:
        net.check_surprise()
    rows = net.rows(cast(Any, options.layer), None if options.pooling == "none" else options.pooling)
    samples = chosen_samples(net.data, options)
    task = Task(net, rows, samples, options, file, _part_size(net, rows, samples, options))
    settings = _settings(task)
    if (record := _before(task, settings)) is not None:
        return record | {"finished": True} if ranks.is_main else {}
    ranks.barrier()  # all have looked before one of them writes
    if ranks.is_main:
        with disk_errors(file):
            task.store.mkdir(parents=True, exist_ok=True)
            write_whole(task.store / "settings.json", json.dumps(settings, indent=2) + "\n")
    ranks.barrier()
    try:
        usual = _calibration(task, ranks, workers) if options.surprise and options.calibrate else None
        with disk_errors(file):
            _compute(task, usual, ranks, workers, show=show)
        ranks.barrier()
        return _finish(task, settings, usual) | {"finished": False} if ranks.is_main else {}
    except Exception:
        if ranks.is_main and not any(task.store.glob("*.parquet")):  # nothing to go on from
            shutil.rmtree(task.store, ignore_errors=True)
        raise


class Task(NamedTuple):
    """What is to be written.

    Attributes:
        rows: what is read, one for each of `options.layer`. size: samples of a part.
    """

    net: Network
    rows: list[Row]
    samples: Dataset[Batch]
    options: EmbedOptions
    file: Path
    size: int

    @property
    def store(self) -> Path:
        return self.file.with_name(f".writing_{self.file.name}")

    @property
    def parts(self) -> list[Path]:
        count = -(-len(cast(Sized, self.samples)) // self.size)
        return [self.store / f"{number:08d}.parquet" for number in range(count)]

    @property
    def names(self) -> list[str]:
        """Of the columns of features."""
        return [each if isinstance(each, str) else f"layer_{each}" for each in self.options.layer]

    @property
    def main(self) -> str | None:
        """The column whose npy file has the name of the table."""
        return self.names[0] if len(self.names) == 1 else None

    @property
    def files(self) -> list[str]:
        """All that the table may consist of."""
        columns = ["sample", *([] if self.options.files else ["label"]), *self.names]
        columns += ["token"] if self.options.pooling == "none" else []
        if self.options.surprise:
            columns += ["surprise", *(["surprise_quantile"] if self.options.calibrate else [])]
            columns += ["surprise_token"] if self.options.surprise == "tokens" else []
        found = [file_of(self.file.name, column, text=False, main=self.main) for column in columns]
        return list(dict.fromkeys([*found, file_of(self.file.name, "name", text=True, main=self.main)]))


def chosen_samples(data: Modality, options: EmbedOptions) -> Dataset[Batch]:
    """The samples of a split, or those of files and of the files in folders.

    Raises:
        UserError: a file is not there, a folder holds none, or the adapter reads no files.
    """
    if not options.files:
        return data.samples_of(options.split)
    paths: list[str] = []
    for name in options.files:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            if not data.offers("files"):
                return data.files(())  # which refuses, before the folder is searched
            found, passed = list_files(path, data.suffixes)
            if not found:
                raise UserError(f"files={printable(name)}: no file there ends in {' '.join(data.suffixes)}")
            if (line := passed.line(printable(name))) is not None:
                say(line)
            paths += found
        elif not os.path.exists(path):
            raise UserError(f"files={printable(name)}: there is no such file or folder")
        else:
            paths.append(path)
    return data.files(paths)


def _part_size(net: Network, rows: Sequence[Row], samples: Dataset[Batch], options: EmbedOptions) -> int:
    """Samples of a part: whole batches, as many as the limits allow, or one."""
    tokens = 1
    if options.pooling == "none":
        first = next(plain_batches(samples, batch=1, device=torch.device("cpu"), tokenize=net.data.tokenize))
        tokens = net.data.tokenize(first).values.shape[1]
    each = 4 * net.model.config.dim * len(rows) * tokens
    return max(min(PART_SAMPLES, PART_BYTES // each) // net.reading.batch, 1) * net.reading.batch


def _settings(task: Task) -> dict[str, Any]:
    """What the table depends on."""
    net, options = task.net, task.options
    named = hashlib.sha256("\0".join(options.files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return {
        "layer": list(options.layer),
        "pooling": options.pooling,
        "samples": f"files {named}" if options.files else options.split,
        "of": fingerprint_of(task.samples),
        "adapter": import_path(type(net.data)),
        "data": net.data.model_dump(mode="json"),
        "surprise": options.surprise,
        "calibrate": f"{options.calibrate} of {options.usual}" if options.surprise else "",
        "causal": net.causal,
        "read": [row.name(net.model.config.depth) for row in task.rows],
        "batch": net.reading.batch,
        "part": task.size,
        "weights": weights_digest(net.model),
    }


def record_file(file: Path) -> Path:
    """Where it says what a table holds."""
    return file.with_name(f"{file.name}.json")


def _before(task: Task, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier command finished, or None: there is nothing, or something to go on with.

    Raises:
        UserError: that is of other settings, or a file is there that is not of this table.
    """
    file, store = task.file, task.store
    record, begun, joined = map(_read, (record_file(file), store / "settings.json", store / "record.json"))
    if os.path.lexists(record_file(file)) and not isinstance((record or {}).get("settings"), dict):
        raise UserError(f"{record_file(file)} is there and not of `nepa embed`: name another file with out=")
    own = [name for each in (record, joined) if each for name in each.get("files", [file.name])]
    there = [name for name in own if os.path.lexists(file.with_name(name))]
    it = "it" if there == [file.name] else f"the files that {record_file(file)} lists"
    for saved, fix in (((record or {}).get("settings") if there else None, it), (begun, str(store))):
        if saved and (changed := [key for key in settings if saved.get(key) != settings[key]]):
            told = ", ".join(f"{key} {shown(saved.get(key))} -> {shown(settings[key])}" for key in changed[:2])
            raise UserError(
                f"{file} was made with other settings ({told}): name another file with out=, or remove {fix}"
            )
    if record and len(there) == len(own):
        return record
    if foreign := [name for name in task.files if name not in own and os.path.lexists(file.with_name(name))]:
        raise UserError(f"{file.with_name(foreign[0])} is there and not of `nepa embed`: name another file with out=")
    return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _calibration(task: Task, ranks: World, workers: int) -> Array:
    """The surprise of samples of the split `usual`, a fixed draw, sorted; every rank has all of them.

    Raises:
        UserError: there are none.
    """
    net, found = task.net, list[Tensor]()
    try:
        batches = plain_batches(
            net.data.samples_of(task.options.usual),
            batch=net.reading.batch,
            device=ranks.device,
            workers=workers,
            limit=task.options.calibrate,
            seed=0,
            rank=ranks.rank,
            ranks=ranks.size,
            tokenize=net.data.tokenize,
            of="training" if task.options.usual == "train" else "held-out",
        )
        for batch in batches:
            found.append(_surprise_of(net.read(batch, (), surprise=True)))
    except UserError as error:
        raise UserError(
            f"surprise_quantile compares with usual={task.options.usual}, and {error}; calibrate=0 leaves it out"
        ) from error
    usual: Array = torch.cat(ranks.in_order(found)).sort().values.numpy()
    if np.isnan(usual).all():
        raise UserError(
            f"surprise_quantile compares with usual={task.options.usual}, where nothing is predicted; calibrate=0 "
            "leaves it out"
        )
    return usual[~np.isnan(usual)]


def _surprise_of(read: Read) -> Tensor:
    return cast(Tensor, read.surprise).nanmean(1)


def _compute(task: Task, usual: Array | None, ranks: World, workers: int, *, show: bool) -> None:
    """Write this rank's parts that are not there."""
    net, parts, count = task.net, task.parts, len(cast(Sized, task.samples))
    mine = [number for number in range(ranks.rank, len(parts), ranks.size) if not is_part(parts[number])]
    indices = [index for number in mine for index in range(number * task.size, min((number + 1) * task.size, count))]
    samples, unreadable = Numbered(task.samples), set[str]()
    batches = plain_batches(
        samples,
        batch=net.reading.batch,
        device=ranks.device,
        workers=workers,
        indices=indices,
        unreadable=unreadable,
        tokenize=net.data.tokenize,
    )
    with Meter(-(-len(indices) // net.reading.batch), enabled=show and ranks.is_main, noun="batch") as meter:
        if there := sum(map(is_part, parts)):
            meter.say(f"going on: {there} of {len(parts)} parts are there")
        done = 0
        for number, group in groupby(_as_read(batches), key=lambda batch: int(batch[NUMBER][0]) // task.size):
            tables, read = [], 0
            for batch in group:
                tables.append(table_of(_columns(task, samples, batch, usual)))
                read += len(batch[NUMBER])
                meter.advance(done := done + 1)
            write_part(parts[number], tables, {"samples": read, "unreadable": sorted(unreadable)})
            unreadable.clear()
    for number in mine:
        if not is_part(parts[number]):  # nothing in it can be read
            write_part(parts[number], [], {"samples": 0, "unreadable": sorted(unreadable)})


def _as_read(batches: Iterator[Batch]) -> Iterator[Batch]:
    """What can be read, be it nothing."""
    with suppress(NothingRead):
        yield from batches


def _columns(task: Task, samples: Numbered, batch: Batch, usual: Array | None) -> dict[str, Array | list[str]]:
    """The rows of a batch: one for each sample or, without pooling, for each real token."""
    net, options = task.net, task.options
    read = net.read(batch, task.rows, surprise=bool(options.surprise))
    numbers = batch[NUMBER].cpu()
    per_token = options.pooling == "none"
    of, token = read.mask.nonzero(as_tuple=True) if per_token else (torch.arange(len(numbers)), None)
    at = of if token is None else (of, token)
    columns: dict[str, Array | list[str]] = {
        "name": [printable(samples.name(number)) for number in numbers[of].tolist()],
        "sample": numbers[of].numpy(),
    }
    if token is not None:
        columns["token"] = token.numpy()
    label, target = batch.get("label"), net.data.token_targets(batch) if per_token else None
    if not options.files:  # whose labels nobody knows
        if isinstance(label, Tensor):
            columns["label"] = label.cpu()[of].numpy()
        elif target is not None:
            columns["label"] = target.cpu()[at].numpy()
    if read.surprise is not None:
        surprise = _surprise_of(read)[of].numpy()
        columns["surprise"] = surprise
        if usual is not None:
            share = np.searchsorted(usual, surprise) / len(usual)
            columns["surprise_quantile"] = np.where(np.isnan(surprise), np.nan, share).astype(np.float32)
        if options.surprise == "tokens":
            columns["surprise_token"] = read.surprise[at].numpy()
    return columns | {name: found[at].numpy() for name, found in zip(task.names, read.features, strict=True)}


def _finish(task: Task, settings: dict[str, Any], usual: Array | None) -> dict[str, Any]:
    """Join the parts into the file, write what it is, and remove them."""
    notes = [note_of(part) for part in task.parts]
    unreadable = sorted({message for note in notes for message in note["unreadable"]})
    full = [part for part in task.parts if rows_of(part)]
    if not full:
        shutil.rmtree(task.store)
        raise UserError(f"no sample can be read: {unreadable[0] if unreadable else 'there is none'}")
    record: dict[str, Any] = {
        "run": task.net.source,
        "made_with": provenance(),
        "averaged": task.net.averaged,
        "rows": sum(map(rows_of, full)),
        "samples": sum(note["samples"] for note in notes),
        "columns": shapes(full[0]),
        "unreadable_samples": len(unreadable),
        "unreadable_messages": unreadable,
    }
    if usual is not None:
        points = {str(share): float(np.quantile(usual, share)) for share in (0, 0.5, 0.9, RARE, 1)}
        quantiles = (column_of(part, "surprise_quantile") for part in full)
        above, silent = np.sum([[(each > RARE).sum(), np.isnan(each).sum()] for each in quantiles], 0).tolist()
        of = {"split": task.options.usual, "samples": len(usual), "quantiles": points}
        record["surprise"] = of | {f"rows_above_{RARE}": above, "rows_not_predicted": silent}
    with disk_errors(task.file):
        made = join(full, task.file.name, task.store, task.main)
        record |= {"files": [each.name for each in made], "settings": settings}
        write_whole(task.store / "record.json", json.dumps(record, indent=2) + "\n")  # of what is moved, were it killed
        for each in made:
            each.replace(task.file.with_name(each.name))
        (task.store / "record.json").replace(record_file(task.file))
    shutil.rmtree(task.store, ignore_errors=True)
    return record


def render(record: dict[str, Any], file: Path) -> str:
    """What was written, on the screen."""
    columns = ", ".join(f"{name} {kind}" for name, kind in record["columns"].items())
    lines = ["This table is finished: remove it to make it anew."] if record["finished"] else []
    lines.append(f"{file}: {record['rows']:,} rows of {record['samples']:,} samples: {columns}.")
    if "surprise" in record:
        of = record["surprise"]
        above, train, silent = of[f"rows_above_{RARE}"], of["split"] == "train", of.get("rows_not_predicted", 0)
        share = above / max(record["rows"] - silent, 1)
        lines.append(
            f"Surprise: {above:,} rows ({share:.1%}) above {RARE:.0%} of {of['samples']:,} "
            f"{'training' if train else 'held-out'} samples."
            + (
                " The network has trained on those: new ones surprise more (usual=test compares with some)."
                if train
                else ""
            )
            + (f" {silent:,} more rows have none (NaN): nothing in them is predicted." if silent else "")
        )
    if count := record["unreadable_samples"]:
        more = f"; all are named in {record_file(file)}" if count > 1 else ""
        were = "sample was" if count == 1 else "samples were"
        lines.append(f"{count:,} {were} left out as unreadable: {record['unreadable_messages'][0]}{more}.")
    return "\n".join(lines)
