"""One command at a time writes in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nepa_core.basics import UserError
from nepa_core.runtime import leases
from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.distributed import World
from nepa_core.runtime.leases import Holder, Lease, LostLock
from nepa_core.runtime.run import Run

# ------------------------------------------------------------------------------------------------------ nothing left

_BEGUN = ("config.json", "metrics.jsonl", "timing.jsonl", "checkpoints")
"""What a run has written before its first checkpoint; none of it is worth keeping without one."""


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """A run that is begun within the block, in this folder or below, is gone again where the block ends in an error.

    Only that is removed: files of `_BEGUN` that were not there before, in a folder without a checkpoint and without
    any other file, and folders that are new and empty. The caller holds the lock of the folder.
    """
    before = _inside(folder)
    try:
        yield
    except LostLock:  # what is there is another's
        raise
    except Exception:
        for place in sorted(each for each in _inside(folder) - before if each.is_dir() and not each.is_symlink())[::-1]:
            take_back(place, before)
            with suppress(OSError):  # it holds something
                place.rmdir()
        take_back(folder, before)
        raise


def _inside(folder: Path) -> set[Path]:
    return {Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)}


def take_back(folder: Path, before: Container[Path] = ()) -> None:
    """Remove the files of a run that has begun and has no checkpoint; nothing where anything else lies beside them.

    Args:
        before: paths that are not the caller's to remove.
    """
    with suppress(OSError):
        found = [path for path in folder.iterdir() if path.name != ".lock"]
        if any(path.name not in _BEGUN or path in before or (path.is_dir() and any(path.iterdir())) for path in found):
            return
        for path in found:
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


# ------------------------------------------------------------------------------------------------------- two at once

_HELD: set[int] = set()  # descriptors of the locks of this process
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # what a file system without them says
_TRIES = 100  # to make a folder that others remove
_WAIT = 0.2  # seconds between looks at a lock that another process has


def _let_go() -> None:
    """In a process forked from this one, such as a loader: the lock is the parent's, and must end with it."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(file: Path, *, patient: bool = False, keep: bool = True, trains: bool = True) -> Iterator[bool]:
    """Whether this process could take a lock, which it then has in the block; the kernel frees it when it ends.

    The file says who has it, to people, to `holder` and to other machines (`nepa_core.runtime.leases`).

    Args:
        patient: wait until it can be taken.
        keep: leave the file where it is.
        trains: see `Holder`.

    Raises:
        UserError: the file can't be written.
    """
    with disk_errors(file.parent):
        while (taken := _taken(file, trains=trains)) is None and patient:
            time.sleep(_WAIT)
    if taken is None:
        yield False
        return
    descriptor = taken.descriptor
    _HELD.add(descriptor)
    try:
        yield True
    finally:
        if descriptor in _HELD:  # not in a process forked from this one
            _HELD.discard(descriptor)
            taken.lease.end()
            with suppress(OSError):
                if taken.lease.is_ours():
                    if keep:
                        os.ftruncate(descriptor, 0)
                    else:
                        file.unlink(missing_ok=True)
            _free(descriptor, taken.kernel)


class _Taken(NamedTuple):
    """A lock: the open file, the lease on it, and whether the kernel has locked it, too."""

    descriptor: int
    lease: Lease
    kernel: bool


def _taken(file: Path, *, trains: bool) -> _Taken | None:
    """A lock, or None where another process has it, or may have."""
    failed = 0
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError as error:  # who had it before has just removed the folder that it made
            failed += 1
            if failed == _TRIES:  # or no folder can be made here, as in /proc
                raise NotADirectoryError(errno.ENOTDIR, "No folder can be made there", file) from error
            time.sleep(0.001)
            continue
        kernel, lease, current = False, None, False
        try:
            kernel = _locked_by_kernel(descriptor)
            current = _is_at(file, descriptor)
            if current:
                content = json.dumps(leases.this_process(descriptor, trains=trains)._asdict()).encode()
                lease = leases.take(file, descriptor, content, kernel=kernel)
        except BlockingIOError:
            return None
        finally:
            if lease is None:
                _free(descriptor, kernel)
        if lease is not None:
            return _Taken(descriptor, lease, kernel)
        if current:
            return None
        # who had it before has removed the file: this lock keeps nobody out


def _locked_by_kernel(descriptor: int) -> bool:
    """Lock a file, or say that its file system has no locks; raises BlockingIOError where another has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether an open file still lies there."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _free(descriptor: int, kernel: bool) -> None:
    if kernel:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it with a process that was just forked
    os.close(descriptor)


def holder(file: Path) -> Holder | None:
    """Who has a lock, as far as its file says it."""
    try:
        return leases.read_holder(file.read_bytes()) if file.is_file() else None
    except OSError:
        return None


@contextmanager
def holding(folder: Path, *, trains: bool, lock: Path | None = None) -> Iterator[None]:
    """Be the only one who writes in a folder within the block; who only reads needs no lock.

    For a task that takes seconds to minutes another one waits, with a line that says for whom; for training it does
    not. What was made for the lock alone is gone afterwards, and after an error what `nothing_left` removes.

    Args:
        trains: this process may take hours.
        lock: where the lock lies; FOLDER/.lock, that of `recipes.comparison.engine`.

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
                    with nothing_left(folder):
                        yield
                    return
            other, doubtful = holder(file), leases.is_doubtful(file)
            if other is not None and other.trains and not doubtful:
                raise UserError(
                    f"{folder} is in use by {other}: wait for it or stop it, or name another folder with out=DIR"
                )
            if other is not None and not told:
                why = f" or is lost: {leases.LOST:.0f} seconds will tell" if doubtful else ""
                print(f"waiting for {other}, which writes in {folder}{why}", file=sys.stderr)
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


@contextmanager
def at_work(run: Run, ranks: World, *, trains: bool, goes_on: bool = False) -> Iterator[None]:
    """Be the only command that writes in a run's folder, see `nepa_core.runtime.locks.holding`; the main process is.

    Args:
        trains: this is training; where that is finished it is only shown, which needs no lock.
        goes_on: also where it is finished.
    """
    refused: set[str] = set()
    with ExitStack() as stack:
        try:
            if ranks.is_main and (goes_on or not (trains and run.summary() is not None)):
                stack.enter_context(holding(run.path, trains=trains))
        except UserError as error:
            refused.add(str(error))
        for line in ranks.union(refused):  # on every rank, and none goes on before
            raise UserError(line)
        yield
