"""The run folder, and what a run says on the screen while it works."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nepa_core.basics import UserError
from nepa_core.runtime import trust
from nepa_core.runtime.checkpoint import disk_errors, read_json, shortened, write_whole
from nepa_core.runtime.config import Config, differences, imports_of, load_config, save_config, shown

FREE_KEYS = (
    "data.changed",
    "train.workers",
    "train.checkpoint",
    "train.keep",
    "train.max_unreadable",
    "train.recompute",
)
"""Keys that may change between two sittings of a run: they do not touch what is computed."""


class Run:
    """A folder: config.json, metrics.jsonl, summary.json, checkpoints/, report/.

    metrics.jsonl holds only what is a function of config and data, so that a resumed run's file equals an
    uninterrupted one's byte for byte; wall-clock figures go to timing.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def open(self, config: BaseModel, *, write: bool = True) -> None:
        """Create the folder, or check that the run in it has this config.

        A run that has computed nothing yet, as after a mistyped folder, takes the new config. Of several processes all
        check without `write` first; then one, alone, writes.

        Raises:
            UserError: the folder holds a run of another recipe or with another config (the differing keys are
                listed), holds something that is no run, or can't be written.
        """
        file, imports = self.path / "config.json", imports_of(config)
        trust.allow(imports)  # the user's own command has imported them
        if file.exists():
            saved = load_config(type(config), file)
            changed = {k: v for k, v in differences(saved, config).items() if k not in FREE_KEYS}
            if changed and (self.metrics_path.exists() or self.checkpoints.exists()):
                old, new = changed.get("recipe", ("", ""))
                if old and new:  # most other keys differ, too
                    raise UserError(f"{self.path} holds a run of {old}; name another folder for {new} with out=DIR")
                listed = ", ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in changed.items())
                raise UserError(
                    f"{self.path} holds a run with another config: {listed}; give it back, or name another "
                    "folder with out=DIR"
                )
            if not changed:
                if write:
                    trust.remember(file, imports)  # of a run of before there were notes
                return
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise UserError(f"{self.path} exists and is not a run folder; name another one with out=DIR")
        if not write:
            return
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, file)
        trust.remember(file, imports)

    def load_config(self, kind: type[Config]) -> Config:
        return load_config(kind, self.path / "config.json")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self._append(self.metrics_path, record)

    def log_timing(self, record: Mapping[str, Any]) -> None:
        """Append one line to timing.jsonl."""
        self._append(self.path / "timing.jsonl", record)

    def _append(self, file: Path, record: Mapping[str, Any]) -> None:
        with disk_errors(file), file.open("a") as stream:
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
        """Write the final numbers, whole or not at all."""
        file = self.path / name
        with disk_errors(file):
            write_whole(file, json.dumps(summary, indent=2) + "\n")

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


# ------------------------------------------------------------------------------------------------------- two at once

_HELD: set[int] = set()  # descriptors of the locks of this process
_WAIT = 0.2  # seconds between looks at a lock that another process has


def _let_go() -> None:
    """In a process forked from this one, such as a loader: the lock is the parent's, and must end with it."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


class Holder(NamedTuple):
    """Who has a lock: a process and its command.

    Attributes:
        trains: it may take hours, so that nobody waits for it.
    """

    pid: int
    host: str
    command: str
    since: str
    trains: bool

    def __str__(self) -> str:
        return f"`{shown(self.command, 120)}` (process {self.pid} on {self.host}, since {self.since})"


def this_process(*, trains: bool) -> Holder:
    """What this process leaves in a lock."""
    command = shlex.join(["nepa", *sys.argv[1:]])
    return Holder(os.getpid(), socket.gethostname(), command, time.strftime("%Y-%m-%d %H:%M:%S"), trains)


@contextmanager
def locked(file: Path, *, patient: bool = False, keep: bool = True, trains: bool = True) -> Iterator[bool]:
    """Whether this process could take a lock, which it then has in the block; the kernel frees it when it ends.

    The file says who has it, to people and to `holder`; a file alone is no lock.

    Args:
        patient: wait until it can be taken.
        keep: leave the file where it is.
        trains: see `Holder`.

    Raises:
        UserError: the file can't be written.
    """
    with disk_errors(file):
        while (descriptor := _taken(file)) is None and patient:
            time.sleep(_WAIT)
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(this_process(trains=trains)._asdict()).encode(), 0)
    if descriptor is None:
        yield False
        return
    _HELD.add(descriptor)
    try:
        yield True
    finally:
        if descriptor in _HELD:  # not in a process forked from this one
            _HELD.discard(descriptor)
            if not keep:
                file.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it with a process that was just forked
            os.close(descriptor)


def _taken(file: Path) -> int | None:
    """A descriptor that holds the lock, or None where another one does."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # who had it before has just removed the folder that it made
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who had it before has removed the file: this lock keeps nobody out


def holder(file: Path) -> Holder | None:
    """Who has a lock, as far as its file says it."""
    try:
        return Holder(**read_json(file))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def holding(folder: Path, *, trains: bool, lock: Path | None = None) -> Iterator[None]:
    """Be the only one who writes in a folder within the block; who only reads needs no lock.

    For a task that takes seconds to minutes another one waits, with a line that says for whom; for training it does
    not. What was made for the lock alone is gone afterwards.

    Args:
        trains: this process may take hours.
        lock: where the lock lies; FOLDER/.lock, that of `recipes.compare`.

    Raises:
        UserError: another process trains in the folder, or it can't be written.
    """
    file = lock or folder / ".lock"
    with disk_errors(folder):
        made = [place for place in (file.parent, *file.parent.parents) if not place.exists()]
        no_folder = file.parent.exists() and not file.parent.is_dir()
    if no_folder:  # the task says what is wrong with it
        yield
        return
    told = False
    try:
        while True:
            with locked(file, keep=False, trains=trains) as mine:
                if mine:
                    yield
                    return
            other = holder(file)
            if other is not None and other.trains:
                raise UserError(
                    f"{folder} is in use by {other}: wait for it or stop it, or name another folder with out=DIR"
                )
            if other is not None and not told:
                print(f"waiting for {other}, which writes in {folder}", file=sys.stderr)
                told = True
            time.sleep(_WAIT)
    finally:
        for place in made:
            with suppress(OSError):  # it holds something now
                place.rmdir()


def lock_beside(folder: Path) -> Path:
    """The lock of a folder that must not hold one: it is new, or is given to others."""
    whole = folder.absolute()
    return whole.parent / f".lock_{whole.name}"


class Meter:
    """Progress on the screen: a live bar on a terminal, else a plain line every `interval` seconds."""

    def __init__(self, total: int, *, enabled: bool, interval: float = 15.0, noun: str = "step") -> None:
        self._console = Console(stderr=True)
        self._live = enabled and self._console.is_terminal
        self._plain = enabled and not self._live
        self._interval, self._last = interval, time.monotonic()
        self._total, self._first, self._start = total, 0, time.monotonic()
        self._note, self._noun = "", noun
        self._bar = Progress(
            TextColumn(noun),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("fit", total=total, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def resume(self, step: int) -> None:
        """`step` steps were done in earlier sittings: they don't count for the rate."""
        self._first, self._start = step, time.monotonic()
        self._bar.reset(self._task, completed=step)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._live:
            self._bar.update(self._task, completed=step)
        elif self._plain and time.monotonic() - self._last > self._interval:
            self._last = time.monotonic()
            rate = (step - self._first) / (self._last - self._start)
            left = (self._total - step) / rate if rate else float("nan")
            print(f"{self._noun} {step}/{self._total}  {rate:.1f} a second  {left:.0f} s left", file=sys.stderr)

    def note(self, text: str) -> None:
        """Show the latest figures beside the bar."""
        self._note = text
        if self._live:
            self._bar.update(self._task, note=text)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say what is done instead of steps; its time does not count for the time that is left."""
        began, before = time.monotonic(), self._note
        self.note(f"{before}  {text}".strip())
        try:
            yield
        finally:
            self.note(before)
            self._start += time.monotonic() - began

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._live:
            self._bar.console.print(text, highlight=False)
        elif self._plain:
            print(text, file=sys.stderr)
