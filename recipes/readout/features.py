"""Features for probing: read from a network without augmentation, computed once and kept on disk.

`features/KEY/` holds one .npy file for each array (the pooled features of a layer, labels, masks) and
`features.json`, which names what the arrays were computed from and the SHA-256 of each. It is written last, and a
file that it does not confirm is computed again, so nothing half-written is believed. KEY is the digest of all
that the features depend on: weights, network, attention, adapter, split, choice of samples, and the first samples
themselves. Delete the folder to get the space back.

Arrays are written batch by batch and read through memory maps: no more than a batch is held. Under torchrun every
rank computes its share of the batches and the main process joins them, in the order that one process would give.

Where every token has a class of its own (`Modality.token_targets`), a row holds single tokens: PER_SAMPLE of each
sample, drawn from those with a class.

Shapes: S samples (or single tokens), B samples in a batch, T places, N tokens, D width of a feature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UserError, file_digest
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.pooling import Row, read_rows
from nepa_core.runtime.checkpoint import disk_errors, read_json, write_whole
from nepa_core.runtime.config import import_path
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import autocast_dtype
from nepa_core.runtime.meter import Meter
from nepa_core.tokens import Tokens
from recipes.configs import PretrainConfig
from recipes.networks.backbones import TIMM, VIEW, Backbone, Viewed, check_rows, function_backbone, timm_backbone
from recipes.statistics.held_out import NUMBER, Numbered, draw_seed

RAW = "raw tokens"
RAW_WIDTH = 4096
"""Raw samples of more numbers than this are projected to as many, at random: a linear read-out of 150,528 pixels
would take longer than all layers together."""
PER_SAMPLE = 16
"""Tokens that are read of a sample whose tokens have classes: those of one sample are much alike."""
FIRST = 32
"""Samples whose tokens and labels are part of the key, so that edited data or an edited adapter is noticed."""


class Reader(NamedTuple):
    """What turns tokens into features: a network, or nothing (the raw tokens).

    Attributes:
        key: what the features depend on beside the data; plain values.
        names: the arrays that `read` can give.
        read: tokens in the order of prediction, names of arrays -> name -> [B, ...]. Attentive rows are tokens
            [B, T, D], in float16, with their "mask" [B, T]; rows of single tokens are [B, N, D] float32 in canonical
            order; all others are vectors [B, D] float32.
        backbone: another network, which `read` gives the batch itself.
    """

    key: dict[str, Any]
    names: tuple[str, ...]
    read: Callable[[Any, Collection[str]], dict[str, Tensor]]
    backbone: Backbone | None = None


class Source(NamedTuple):
    """Which samples: a split, and how many of it, drawn at random by a seed that is always the same.

    A split other than "train" that is read whole keeps its order.
    """

    config: PretrainConfig
    split: str
    limit: int


Features = dict[str, np.ndarray]
"""Name of an array -> memory map [S, ...]; the labels [S], or numbers [S, K], are under "labels", and the numbers of
the samples in their data set, int64 [S], under "sample"."""

BOOKS = ("labels", "sample")
"""Arrays that every reader has beside its own; an array is never computed without them."""


class Kept(NamedTuple):
    """The features of a split, one for each reader, and the samples that could not be read: how many, which and why.

    Those kept by an earlier version have the number alone.
    """

    features: list[Features]
    unreadable: int
    messages: list[str]


def network_reader(config: PretrainConfig, model: NEPA, rows: Sequence[Row], *, causal: bool) -> Reader:
    """Reads the hidden states of a network.

    Pooled rows stay float32: of a collapsed network, whose features differ in the fourth digit, half precision
    would read less than there is.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.train.precision, device)
    named = {row.name(config.model.depth): row for row in rows}

    def read(tokens: Tokens, names: Collection[str]) -> dict[str, Tensor]:
        wanted = {name: row for name, row in named.items() if name in names}
        read, mask, _ = read_rows(model, tokens, tuple(wanted.values()), causal=causal, dtype=dtype)
        found = dict(zip(wanted, read, strict=True))
        return found | ({"mask": mask} if "mask" in names else {})

    key = {
        "weights": weights_digest(model),
        "model": config.model.model_dump(mode="json"),
        "causal": causal,
        "dtype": str(dtype or torch.float32),
    }
    masked = ("mask",) if any(row.pooling == "attentive" for row in rows) else ()
    return Reader(key, (*named, *masked), read)


def raw_reader(*, attentive: bool, per_token: bool = False) -> Reader:
    """Reads the raw tokens in canonical order, those that are not real as zeros; see `RAW_WIDTH`.

    Args:
        per_token: keep them apart, [B, N, P], instead of one vector for a sample.
    """

    def read(tokens: Tokens, names: Collection[str]) -> dict[str, Tensor]:
        values = tokens.canonical(tokens.values).float()
        mask = None if tokens.mask is None else tokens.canonical(tokens.mask)
        if mask is not None:
            values = torch.where(mask[..., None], values, 0.0)
        found: dict[str, Tensor] = {}
        if RAW in names:
            found[RAW] = values if per_token else project(values.flatten(1), RAW_WIDTH)
        if f"{RAW}, attentive" in names:
            found[f"{RAW}, attentive"] = values
        if "mask" in names:
            found["mask"] = _real(mask, values)
        return found

    key = {"raw": "tokens" if per_token else RAW_WIDTH}
    return Reader(key, (RAW, f"{RAW}, attentive", "mask") if attentive else (RAW,), read)


def backbone_readers(config: PretrainConfig, asked: Sequence[str], *, pretrained: bool, ranks: World) -> list[Reader]:
    """Readers of the networks that `beside=` names, each tried on the first training samples.

    Args:
        pretrained: see `recipes.networks.backbones.timm_backbone`.

    Raises:
        UserError: there is no such network, its weights can't be had, or it gives no features of these samples.
    """
    data, readers = config.data.plain(), []
    samples = data.samples_of("train")
    few = partial(plain_batches, batch=8, limit=8, device=ranks.device, tokenize=data.tokenize)
    dtype = autocast_dtype(config.train.precision, ranks.device)
    for name in asked:
        if name.startswith(TIMM):
            seed = config.train.seed
            backbone = timm_backbone(
                name, samples, next(few(samples)), pretrained=pretrained, seed=seed, device=ranks.device, dtype=dtype
            )
        else:
            backbone = function_backbone(name)
        first = next(few(_viewed(samples, [backbone])))
        labels, per_token = read_labels(data, first)
        wanted = labels.shape[: 1 + per_token]
        with torch.no_grad():
            rows = backbone.rows(first)
        check_rows(name, rows, wanted)
        if backbone.model is None:  # what it gives is all that is seen of its weights; another device may round it
            (weights,) = ranks.union({_tensor_digest(rows)} if ranks.is_main else set())
        else:
            weights = weights_digest(backbone.model)
        read = partial(_read_backbone, data, backbone, list(rows))
        readers.append(Reader(backbone.key | {"weights": weights}, tuple(rows), read, backbone))
    return readers


def _viewed(samples: Dataset[Batch], backbones: Sequence[Backbone]) -> Dataset[Batch]:
    views = {VIEW + each.name: each.view for each in backbones if each.view is not None}
    return Viewed(samples, views) if views else samples


def _read_backbone(
    data: Modality, backbone: Backbone, names: Sequence[str], batch: Batch, wanted: Collection[str]
) -> dict[str, Tensor]:
    labels, per_token = read_labels(data, batch)
    rows = backbone.rows(batch)
    check_rows(backbone.name, rows, labels.shape[: 1 + per_token], names)
    return {name: x for name, x in rows.items() if name in wanted}


def project(x: Tensor, width: int) -> Tensor:
    """[B, D] to [B, width] by a fixed sparse random projection (Li, Hastie & Church 2006) where D is larger."""
    if x.shape[1] <= width:
        return x
    return torch.from_numpy(np.asarray(_projection(x.shape[1], width).transform(x.cpu().numpy()), np.float32))


@lru_cache(maxsize=1)
def _projection(wide: int, width: int) -> Any:
    from sklearn.random_projection import SparseRandomProjection

    return SparseRandomProjection(width, random_state=0).fit(np.zeros((1, wide), np.float32))


def _real(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones(like.shape[:2], dtype=torch.bool) if mask is None else mask


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names and the values of all parameters and buffers."""
    return _tensor_digest(model.state_dict())


def _tensor_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_labels(data: Modality, batch: Batch) -> tuple[Tensor, bool]:
    """What a probe predicts, and whether tokens have it: "label" [B] or [B, K], else classes of tokens [B, N] int64.

    Raises:
        UserError: there is neither.
    """
    if "label" in batch:
        return batch["label"], False
    if (target := data.token_targets(batch)) is None:
        parts = " or ".join(f"part={name}" for name in data.part_names())
        raise UserError(
            f"{type(data).__name__} gives no label to probe for; add the key 'label' to its samples"
            + (f", or read a part that has one: {parts}" if parts else "")
        )
    return target.long(), True


def tokens_per_sample(data: Modality) -> int:
    """How many single tokens a probe reads of each sample; 0 where samples have the labels, see `read_labels`."""
    first = next(plain_batches(data.samples_of("train"), batch=1, device=torch.device("cpu"), of="training"))
    labels, per_token = read_labels(data, first)
    return min(PER_SAMPLE, labels.shape[1]) if per_token else 0


def drawn_tokens(labels: Tensor, mask: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """(sample, token) of the tokens to read, at most PER_SAMPLE of each: classes [B, N], below 0 for none.

    mask [B, N], of the real tokens in canonical order, or None.
    """
    counted = (labels >= 0 if mask is None else (labels >= 0) & mask).cpu()
    keys = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    tokens = keys.masked_fill(~counted, 2.0).argsort(1)[:, :PER_SAMPLE]
    samples, places = counted.gather(1, tokens).nonzero(as_tuple=True)
    return samples, tokens[samples, places]


@torch.no_grad()
def kept_features(source: Source, readers: Sequence[Reader], store: Path, ranks: World, *, show: bool = False) -> Kept:
    """The features of a split for each reader: found in `store`, or computed in one pass over the data.

    Args:
        store: the folder that holds the features of a run; all ranks see the same one.
        show: progress on the screen, and what was found.

    Raises:
        UserError: the samples have no label or differ in shape, too few can be read, or the disk is full.
    """
    data = source.config.data.plain()
    samples = data.samples_of(source.split)
    total = min(source.limit, len(cast(Sized, samples)))
    size = min(source.config.train.micro_batch or source.config.train.batch, 256)
    seed = 0 if source.split == "train" else draw_seed(samples, total)
    batches = partial(
        plain_batches,
        batch=size,
        device=ranks.device,
        seed=seed,
        max_unreadable=source.config.train.max_unreadable,
        tokenize=data.tokenize,
        of="training" if source.split == "train" else "held-out",
    )
    first = next(batches(Numbered(samples), limit=min(FIRST, total)))
    labels, per_token = read_labels(data, first)
    of: dict[str, Any] = {
        "adapter": import_path(type(data)),
        "data": data.model_dump(mode="json"),
        "split": source.split,
        "samples": [total, len(cast(Sized, samples))],
        "first": _first_digest(data.read(first), labels),
    }
    of |= {"tokens": [PER_SAMPLE, size]} if per_token else {}  # the draw is one for each batch
    of |= {"draw": seed} if source.split != "train" and seed is not None else {}  # else as it always was
    keys = [of | reader.key for reader in readers]
    folders = [store / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16] for key in keys]
    missing = _missing(folders, readers, ranks)
    found = "all found" if not any(missing) else "computing" if all(missing) else "some found, computing the rest"
    with Meter(-(-total // (size * ranks.size)), enabled=show and ranks.is_main) as meter:
        meter.say(f"features of the {source.split} split, {total:,} samples: {found} in {store}")
        if any(missing):
            unreadable: set[str] = set()
            seen = [each.backbone for each, names in zip(readers, missing, strict=True) if names and each.backbone]
            share = batches(
                Numbered(_viewed(samples, seen)),
                limit=total,
                workers=source.config.train.workers,
                rank=ranks.rank,
                ranks=ranks.size,
                unreadable=unreadable,
            )
            _compute(share, data, readers, folders, missing, ranks, meter)
            _join(folders, keys, missing, ranks, unreadable=ranks.union(unreadable))
    features = [_open(folder, (*reader.names, *BOOKS)) for folder, reader in zip(folders, readers, strict=True)]
    facts = _facts(folders[0])
    return Kept(features, facts.get("unreadable", 0), facts.get("unreadable_messages", []))


def _first_digest(tokens: Tokens, labels: Tensor) -> str:
    parts = {"values": tokens.values, "coords": tokens.coords, "mask": tokens.mask, "order": tokens.order}
    return _tensor_digest({name: value for name, value in (parts | {"labels": labels}).items() if value is not None})


def _missing(folders: Sequence[Path], readers: Sequence[Reader], ranks: World) -> list[list[str]]:
    """Names of the arrays of each reader that are not on the disk undamaged: what the main process sees.

    Two readers of the same weights, as of a network that has not been trained, are one.
    """
    missing: list[list[str]] = []
    for i, (folder, reader) in enumerate(zip(folders, readers, strict=True)):
        names = [*reader.names, *BOOKS] if folder not in folders[:i] else []
        known = _intact(folder, names) if ranks.is_main else set()
        absent = torch.tensor([float(ranks.is_main and name not in known) for name in names], device=ranks.device)
        flags = ranks.sum(absent).tolist()
        lost = [name for name, flag in zip(names, flags, strict=True) if flag]
        missing.append([*(name for name in lost if name not in BOOKS), *(BOOKS if lost else ())])
    return missing


def _intact(folder: Path, names: Collection[str]) -> set[str]:
    """Which of these arrays `features.json` confirms."""
    recorded = _recorded(folder)
    return {
        name
        for name in names
        if name in recorded and (folder / _file(name)).exists() and file_digest(folder / _file(name)) == recorded[name]
    }


def _recorded(folder: Path) -> dict[str, str]:
    """SHA-256 of each array in `features.json`; none where it is missing or damaged."""
    arrays = _facts(folder).get("arrays")
    return arrays if isinstance(arrays, dict) else {}


def _facts(folder: Path) -> dict[str, Any]:
    """What `features.json` says; nothing where it is missing or damaged."""
    try:
        facts = read_json(folder / "features.json")
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _compute(
    batches: Iterator[Batch],
    data: Modality,
    readers: Sequence[Reader],
    folders: Sequence[Path],
    missing: Sequence[Sequence[str]],
    ranks: World,
    meter: Meter,
) -> None:
    """One pass over this rank's share of the data, into one part file for each missing array."""
    with ExitStack() as stack:
        parts = [_Part(folder, ranks.rank) if names else None for folder, names in zip(folders, missing, strict=True)]
        for part in parts:
            if part is not None:
                stack.enter_context(part)
        for done, batch in enumerate(batches, 1):
            tokens = data.read(batch)
            labels, per_token = read_labels(data, batch)
            chosen, numbers = None, batch[NUMBER]
            if per_token:
                mask = None if tokens.mask is None else tokens.canonical(tokens.mask)
                chosen = drawn_tokens(labels, mask, seed=(done - 1) * ranks.size + ranks.rank)
                numbers = numbers[:, None].expand_as(labels)
            for reader, names, part in zip(readers, missing, parts, strict=True):
                if part is not None:
                    arrays = {
                        "labels": labels,
                        "sample": numbers,
                        **reader.read(tokens if reader.backbone is None else batch, names),
                    }
                    part.append(arrays if chosen is None else {name: x[chosen] for name, x in arrays.items()})
            meter.advance(done)


class _Part:
    """What one rank writes of the arrays of one folder: raw values by array, and a JSON file on them.

    It goes to `.writing_*`, which the main process joins and removes.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._files: dict[str, BinaryIO] = {}
        self._kinds: dict[str, tuple[str, list[int]]] = {}
        self._counts: list[int] = []

    def __enter__(self) -> Self:
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def append(self, arrays: dict[str, Tensor]) -> None:
        """Add one batch, [B, ...] each."""
        self._counts.append(len(arrays["labels"]))
        for name, tensor in arrays.items():
            array = tensor.cpu().contiguous().numpy()
            kind = (array.dtype.str, list(array.shape[1:]))
            if self._kinds.setdefault(name, kind) != kind:
                raise UserError(
                    f"{name}: batches of shape {self._kinds[name][1]} and of shape {kind[1]} can't stand in one array; "
                    "pad all samples to one length"
                )
            with disk_errors(self._folder):
                if name not in self._files:
                    self._files[name] = _part_file(self._folder, name, self._rank).open("wb")
                self._files[name].write(array.data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with disk_errors(self._folder):
            for file in self._files.values():
                file.close()
            if kind is None:
                facts = {"counts": self._counts, "kinds": self._kinds}
                _part_file(self._folder, "parts", self._rank).write_text(json.dumps(facts))
            else:
                for name in self._files:
                    _part_file(self._folder, name, self._rank).unlink(missing_ok=True)


def _join(
    folders: Sequence[Path],
    keys: Sequence[dict[str, Any]],
    missing: Sequence[Sequence[str]],
    ranks: World,
    *,
    unreadable: list[str],
) -> None:
    """Make whole arrays of the parts of all ranks, confirm them, and note which samples are left out.

    Raises:
        UserError: arrays found before belong to other samples; they are forgotten.
    """
    ranks.barrier()
    stale = False
    if ranks.is_main:
        for folder, key, names in zip(folders, keys, missing, strict=True):
            if names:
                stale |= not _join_parts(folder, key, names, ranks.size, unreadable)
    if ranks.any(stale):
        raise UserError(
            f"{folders[0].parent}: the samples or labels differ from those of an earlier pass over the same data; the "
            "features kept then are dropped, give the same command again"
        )


def _join_parts(folder: Path, key: dict[str, Any], names: Sequence[str], ranks: int, unreadable: list[str]) -> bool:
    """Join the parts of one folder in the order of one process, and write `features.json`.

    Returns:
        Whether arrays recorded before belong to the same samples; they are forgotten if not.
    """
    with disk_errors(folder):
        facts = [json.loads(_part_file(folder, "parts", rank).read_text()) for rank in range(ranks)]
        order = [
            (rank, count)
            for counts in zip_longest(*(fact["counts"] for fact in facts), fillvalue=0)
            for rank, count in enumerate(counts)
        ]
        recorded, joined = _recorded(folder), {}
        for name in names:
            dtype, shape = next(fact["kinds"][name] for fact in facts if name in fact["kinds"])
            _join_array(folder, name, np.dtype(dtype), shape, order, ranks)
            joined[name] = file_digest(folder / _file(name))
        same = recorded.get("labels", joined["labels"]) == joined["labels"]
        arrays = (recorded if same else {}) | joined
        noted = {"of": key, "arrays": arrays, "unreadable": len(unreadable), "unreadable_messages": unreadable}
        write_whole(folder / "features.json", json.dumps(noted, indent=2) + "\n")
        for rest in folder.glob(".writing_*"):
            rest.unlink()
    return same


def _join_array(
    folder: Path, name: str, dtype: np.dtype[Any], shape: list[int], order: Sequence[tuple[int, int]], ranks: int
) -> None:
    """Write one .npy file from the parts: batches in `order`, as (rank, samples)."""
    whole = folder / f".writing_{_file(name)}"
    each = dtype.itemsize * math.prod(shape)
    with ExitStack() as stack:
        out = stack.enter_context(whole.open("wb"))
        parts = [
            stack.enter_context(path.open("rb")) if path.exists() else None  # a rank may have had no batch
            for path in (_part_file(folder, name, rank) for rank in range(ranks))
        ]
        header = {"descr": dtype.str, "fortran_order": False, "shape": (sum(count for _, count in order), *shape)}
        np.lib.format.write_array_header_1_0(out, header)
        for rank, count in order:
            part = parts[rank]
            if part is not None:
                out.write(part.read(count * each))
        out.flush()
        os.fsync(out.fileno())
    whole.rename(folder / _file(name))
    for rank in range(ranks):
        _part_file(folder, name, rank).unlink(missing_ok=True)


def _open(folder: Path, names: Collection[str]) -> Features:
    return {name: np.load(folder / _file(name), mmap_mode="r") for name in names}


def _file(name: str) -> str:
    """ "layer 2, mean" -> "layer_2_mean.npy"."""
    return name.replace(", ", "_").replace(" ", "_") + ".npy"


def _part_file(folder: Path, name: str, rank: int) -> Path:
    return folder / f".writing_{_file(name)}.{rank}"
