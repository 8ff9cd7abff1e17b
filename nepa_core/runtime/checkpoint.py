"""Checkpoints: written whole or not at all, checked before they are believed, and free of pickle.

`checkpoints/step_00000800/` holds one safetensors file for each named group of tensors (model, ema, optimizer,
...) and `state.json` with the step, plain values and the SHA-256 of every file, its own among them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nepa_core.basics import UserError
from nepa_core.basics import file_digest as _digest
from nepa_core.runtime import leases


class Checkpoint(NamedTuple):
    """What was stored: tensors by group, and plain values (JSON); `digest` tells a stored checkpoint from others."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    digest: str = ""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into one line that says the cause; what was written before is untouched."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        way_out = _way_out(number, str(error))
        raise UserError(
            f"{shortened(path)} can't be written: {reason}; {way_out} (what was written before is kept)"
        ) from error


def _way_out(number: int | None, text: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and "No space left" in text):
        return "free some space and give the same command again"
    if number == errno.EFBIG or (number is None and "File too large" in text):
        return "raise the limit on the size of files (ulimit -f) and give the same command again"
    if number in (errno.ENOENT, errno.ESTALE):
        return "another process has removed or moved the folder; give the same command again"
    if number == errno.ENAMETOOLONG:
        return "give a shorter name with out=DIR"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY):
        return "name another folder with out=DIR"
    return "look at the disk and give the same command again"


def shortened(path: Path, most: int = 160) -> str:
    """A path for a message: its end, where it is very long."""
    text = str(path)
    return text if len(text) <= most else f"...{text[-most:]}"


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is none.
        OSError: it can't be read.
        ValueError: it is no regular file (opening a pipe would wait for a writer), is not JSON or UTF-8, or is nested
            deeper than can be followed.
    """
    if file.exists() and not file.is_file():
        raise ValueError("it is no file but a folder" if file.is_dir() else "it is no regular file")
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_whole(file: Path, text: str) -> None:
    """Write a small file whole or not at all: what stood there stays until the new text is on the disk.

    Raises:
        LostLock: this process had a lock, and another one has it now.
    """
    draft = file.with_name(f".writing_{file.name}")
    try:
        draft.write_text(text)
        _sync(draft)
        leases.check()
        draft.rename(file)
    finally:
        draft.unlink(missing_ok=True)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int, stays: int | None = None) -> Path:
    """Write a checkpoint and drop all but this one, the `keep` - 1 before it and that of step `stays`.

    Everything goes to a temporary folder that is renamed when it is complete, so a crash leaves no half of one.
    Checkpoints of later steps go too: they were damaged, or this step would not be computed again.

    Raises:
        UserError: the disk is full or can't be written, or another process has the run now (`LostLock`).
    """
    target = folder / f"step_{checkpoint.step:08d}"
    building = folder / f".writing_{target.name}"
    with disk_errors(target):
        leases.check()
        try:
            for rest in folder.glob(".writing_*"):  # of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
            building.mkdir(parents=True)
            digests = {}
            for name, tensors in checkpoint.tensors.items():
                file = building / f"{name}.safetensors"
                save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, file)
                digests[file.name] = _digest(file)
            record = {"step": checkpoint.step, "files": digests, **checkpoint.state}
            record["sha256"] = _record_digest(record)
            (building / "state.json").write_text(json.dumps(record, indent=2) + "\n")
            _flush(building)
            leases.check()
            if target.exists():  # a damaged one of the same step, or the same step written again
                shutil.rmtree(target)
            building.rename(target)
            _sync(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    stored = _stored(folder)
    place = stored.index(target) + 1
    for other in stored[: max(place - keep, 0)] + stored[place:]:
        if _step(other) == stays and stays < checkpoint.step:
            continue
        shutil.rmtree(other, ignore_errors=True)
    return target


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time, while training goes on; entered once, and left with nothing open.

    Leaving it waits for what is being written, but for a second Ctrl-C, which wants the end at once.

    Args:
        written: called in the caller's thread with the path of each that is complete.
    """

    def __init__(self, written: Callable[[Path], object]) -> None:
        self._written = written
        self._thread: Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    def write(self, save: Callable[[], Path]) -> None:
        """Begin with the next one, after the one before.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self._thread = Thread(target=self._run, args=(save,), name="checkpoint")
        self._thread.start()

    def look(self) -> None:
        """What `wait` does, if there is nothing to wait for."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the last one is on the disk.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert self._path is not None
        self._written(self._path)

    def _run(self, save: Callable[[], Path]) -> None:
        try:
            self._path = save()
        except BaseException as error:  # raised where the caller waits
            self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is None:
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt):
            self._thread.join()  # what stopped the run is said, whatever became of this one


def load_latest(folder: Path, most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint (on the CPU), or None, and a line on each damaged one passed over.

    Args:
        most: the last step that it may be of.
    """
    notes: list[str] = []
    for path in reversed(_stored(folder)):
        if most is not None and _step(path) > most:
            continue
        try:
            return read_checkpoint(path), notes
        except UserError as error:
            notes.append(f"{error}; passing over it")
    return None, notes


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check one checkpoint folder.

    Raises:
        UserError: a file is missing or is not the one that was written.
    """
    try:
        state = read_json(path / "state.json")
        digest = state.pop("sha256")
        if digest != _record_digest(state):
            raise UserError(f"checkpoint {path} is damaged: state.json is not as it was written")
        files = state.pop("files")
        for name, written in files.items():
            if not (path / name).is_file() or _digest(path / name) != written:
                raise UserError(f"checkpoint {path} is damaged: {name} is not as it was written")
        tensors = {Path(name).stem: load_file(path / name) for name in files}
        return Checkpoint(state.pop("step"), tensors, state, digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as `parameter name/key` -> tensor, free of any rank or index."""
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    stored: Mapping[str, Tensor],
    part: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:
    """Put back what `optimizer_tensors` took; the moments go to the parameters' device.

    Args:
        part: name of a parameter, a tensor of its shape -> what of it belongs to this process.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    for path, value in stored.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = part(name, value).to(parameter.device)


def _stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def _step(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
