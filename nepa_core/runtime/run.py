"""The run folder, and what a run says on the screen while it works."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from nepa_core.basics import UserError, some
from nepa_core.runtime import leases, trust
from nepa_core.runtime.checkpoint import disk_errors, read_json, shortened, write_whole
from nepa_core.runtime.config import (
    Config,
    addresses_of,
    differences,
    imports_of,
    load_config,
    read_saved,
    save_config,
    shown,
)
from nepa_core.runtime.loggers import Listener

FREE_KEYS = (
    "data.changed",
    "train.workers",
    "train.checkpoint",
    "train.keep",
    "train.max_unreadable",
    "train.recompute",
    "train.strategy",
    "train.logger",
    "train.hooks",
)
"""Keys that may change between two sittings of a run: they do not touch what is computed."""

MIDWAY = (
    *FREE_KEYS,
    "optim.lr",
    "optim.weight_decay",
    "optim.clip",
    "optim.schedule",
    "optim.decay_share",
    "train.length.steps",
    "train.length.epochs",
    "train.log",
    "train.evaluate",
    "train.probe",
)
"""Keys that a run takes anew where its own folder is named: they count from the checkpoint on that it goes on from."""

OF_WEIGHTS = (
    "summary",
    "probe",
    "evaluate",
    "forecast",
    "forecast_seeds",
    "forecast_samples",
    "forecast_samples_seeds",
    "generate",
)
"""Files of figures that hold for the weights that they were measured with."""

RECORD = "import.json"
"""The file that `nepa import` leaves in a run: where its weights came from."""

Summary = TypeVar("Summary", bound=Mapping[str, Any])


class Run:
    """A folder: config.json, metrics.jsonl, summary.json, checkpoints/, report/.

    metrics.jsonl holds only what is a function of config and data, so that a resumed run's file equals an
    uninterrupted one's byte for byte; wall-clock figures go to timing.jsonl.

    Attributes:
        listeners: who hears of it, see `nepa_core.runtime.loggers`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Listener] = []
        self.metrics_path = path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def open(self, config: BaseModel, *, write: bool = True, midway: bool = False) -> bool:
        """Create the folder, or check that the run in it has this config.

        A run that has computed nothing yet, as after a mistyped folder, takes the new config. Of several processes all
        check without `write` first; then one, alone, writes. The name of the recipe is no difference.

        Args:
            midway: the user has named this run to go on with, so that keys of `MIDWAY` may differ; of a finished one
                where its length does. Its summary.json then becomes `earlier_summary`, and so do other tasks' figures.

        Returns:
            Whether a run is there that goes on with other settings than it had.

        Raises:
            UserError: the folder holds a run of another recipe or with another config (the differing keys are
                listed), holds something that is no run, or can't be written.
        """
        file, imports, addresses = self.path / "config.json", imports_of(config), addresses_of(config)
        trust.allow(imports)  # the user's own command has imported them
        for address in addresses:
            trust.check_address(address)
        changed: dict[str, tuple[Any, Any]] = {}
        begun = self.metrics_path.exists() or self.checkpoints.exists()
        if file.exists():
            different = differences(load_config(type(config), file), config)
            named = different.pop("recipe", ("", ""))  # a config made in Python has no name
            changed = {key: values for key, values in different.items() if key not in FREE_KEYS}
            longer = any(key.startswith("train.length.") for key in changed)
            midway = midway and (longer or not (self.path / "summary.json").exists())
            if begun and (refused := [key for key in changed if not (midway and key in MIDWAY)]):
                raise UserError(self._refusal(changed, refused, named))
            if not changed and not (midway and different):
                if write:
                    trust.remember(file, [*imports, *addresses])  # of a run of before there were notes
                return False
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise UserError(f"{self.path} exists and is not a run folder; name another one with out=DIR")
        if write:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                if changed and (summary := self.summary()) is not None:
                    self.set_aside(summary.get("steps"))
                save_config(config, file)
            trust.remember(file, [*imports, *addresses])
        return begun and bool(changed)

    def _refusal(self, changed: Mapping[str, tuple[Any, Any]], refused: list[str], named: tuple[str, str]) -> str:
        old, new = named
        if old and new:  # most other keys differ, too
            return f"{self.path} holds a run of {old}; name another folder for {new} with out=DIR"
        listed = ", ".join(f"{key} {shown(a)} -> {shown(b)}" for key, (a, b) in changed.items() if key in refused)
        return (
            f"{self.path} holds a run with another config: {listed}; give it back, or name another folder with out=DIR"
        )

    def set_aside(self, steps: object) -> None:
        """Give the figures of this run names with the step that they are of, before its weights change."""
        for name in OF_WEIGHTS:
            if (figures := self.path / f"{name}.json").exists():
                figures.rename(self.path / f"{name}_{steps}.json")

    def earlier_summary(self, steps: object) -> Path:
        """Where the summary of a run lies that was finished at so many steps and then goes on."""
        return self.path / f"summary_{steps}.json"

    def load_config(self, kind: type[Config]) -> Config:
        return load_config(kind, self.path / "config.json")

    def tell(self, event: str, what: Any) -> None:
        """Let all listeners know."""
        for listener in self.listeners:
            listener(event, copy.deepcopy(what))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self._append(self.metrics_path, record)
        self.tell("log", dict(record))

    def log_timing(self, record: Mapping[str, Any]) -> None:
        """Append one line to timing.jsonl."""
        self._append(self.path / "timing.jsonl", record)

    def _append(self, file: Path, record: Mapping[str, Any]) -> None:
        with disk_errors(file):
            leases.check()
            with file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def metrics_size(self) -> int:
        """Bytes in metrics.jsonl, on the disk for good: what a checkpoint remembers."""
        if not self.metrics_path.exists():
            return 0
        with disk_errors(self.metrics_path), self.metrics_path.open("rb+") as stream:
            os.fsync(stream.fileno())
            return stream.seek(0, os.SEEK_END)

    def truncate_metrics(self, size: int) -> None:
        """Forget the lines after a checkpoint: they are computed again."""
        if not self.metrics_path.exists() and size:
            raise UserError(f"{self.metrics_path} is missing; restore it, or start anew with out=DIR")
        if self.metrics_size() < size:
            raise UserError(f"{self.metrics_path} has lost lines; restore it, or start anew with out=DIR")
        if self.metrics_path.exists():
            os.truncate(self.metrics_path, size)
            self.metrics()  # a damaged line is said now, not after hours of training

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines."""
        if not self.metrics_path.exists():
            return []
        lines: list[dict[str, Any]] = []
        try:
            for line in self._metrics_bytes().splitlines():
                found = json.loads(line)
                if not isinstance(found, dict) or "step" not in found:
                    raise ValueError("it holds no figures of a step")
                lines.append(found)
        except (ValueError, RecursionError) as error:
            where = f"{self.metrics_path}, line {len(lines) + 1},"
            raise UserError(f"{where} is damaged ({error}); restore the file, or start anew with out=DIR") from error
        return lines

    def _metrics_bytes(self) -> bytes:
        if not self.metrics_path.is_file():  # reading a pipe would wait for a writer
            raise UserError(f"{self.metrics_path} is no regular file; restore it, or start anew with out=DIR")
        try:
            return self.metrics_path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.metrics_path} can't be read: {error.strerror}") from error

    def write_summary(self, summary: Mapping[str, Any], name: str = "summary.json") -> None:
        """Write the final numbers, whole or not at all; those of training end the run."""
        file = self.path / name
        with disk_errors(file):
            write_whole(file, json.dumps(summary, indent=2) + "\n")
        if name == "summary.json":
            self.tell("end", str(self.path))

    def summary(self, name: str = "summary.json") -> dict[str, Any] | None:
        """The final numbers, or None while the run is not finished.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / name
        try:
            found = read_json(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{shortened(file)} can't be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}); delete it and give the same command again") from error
        if not isinstance(found, dict):
            raise UserError(f"{file} holds no figures; delete it and give the same command again")
        return found

    def summary_of(self, kind: type[Summary], name: str = "summary.json") -> Summary | None:
        """`summary` as the class (a `TypedDict`) that lists its keys, for the type checker: nothing is looked at."""
        return cast(Summary | None, self.summary(name))


@contextmanager
def reading_back(file: Path) -> Iterator[None]:
    """Within the block values of a JSON file of this program are used; what is missing there becomes one line.

    Raises:
        UserError: the file lacks something, or holds something of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        text, missing = shown(str(error), 120), isinstance(error, KeyError)
        if isinstance(error, ValidationError) and error.errors()[0]["type"] == "missing":
            text, missing = str(error.errors()[0]["loc"][0]), True
        lacks = f"lacks {text}" if missing else f"holds something else than was written ({text})"
        raise UserError(f"{file} {lacks}; delete it and give the same command again") from error


def task_of(run: str) -> str:
    """The task that a run folder is of."""
    return str(read_saved(Path(run) / "config.json").get("task", "pretrain"))


def is_run(target: str) -> bool:
    """A folder with a config.json that is not one of the Hugging Face layout."""
    file = Path(target) / "config.json"
    released = (Path(target) / "model.safetensors").is_file()  # runs keep theirs in checkpoints/
    return file.is_file() and not released and "model_type" not in read_saved(file)


def refuse_holder(target: str) -> None:
    """Raise a `UserError` where a folder is no run but holds some, as those of `folds=` and of comparisons do."""
    inside = sorted(file.parent for file in Path(target).glob("*/config.json") if is_run(str(file.parent)))
    if inside and not is_run(target):
        held = some([each.name for each in inside])
        raise UserError(f"{target} holds the runs {held} and is none itself: name one of them, such as {inside[0]}")


def is_imported(target: str) -> bool:
    """Whether a folder is a run that `nepa import` wrote."""
    return (Path(target) / RECORD).is_file()
