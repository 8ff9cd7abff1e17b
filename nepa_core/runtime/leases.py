"""A lock that other machines see, also where the kernel's locks end at each of them.

The kernel's lock on a file keeps out the processes of its own machine, and of others only where the file system hands
it on: NFS, Lustre and cluster file systems do or don't as they were mounted, and nothing says which. So who has a lock
renews the time of its file, too, every `BEAT` seconds, in a thread. Where the file says that a process of another
machine has it, a rival takes it for lost after looking at it for `LOST` seconds without a change. No clock of one
machine is compared with another's: the rival counts its own seconds, none for a time in which it could not look.

To take a lock is one step for all machines: it is done by who could create FILE-claim, the one thing that every shared
file system does for one process alone. Who was stopped for longer (SIGSTOP, a suspended machine) may wake up without
its lock: `check` reads the file again, and is called before anything of a run is written.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shlex
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from nepa_core.basics import UserError

BEAT = 10.0  # seconds between two signs of life
LOST = 60.0  # seconds without one after which a lock is anybody's
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux


class LostLock(UserError):
    """This process had a lock, was stopped for too long, and another one has it now."""


class Holder(NamedTuple):
    """Who has a lock: a process and its command.

    Attributes:
        trains: it may take hours, so that nobody waits for it.
        reach: kernel and file system: whom the kernel's lock keeps out.
        token: tells this holding from all others.
    """

    pid: int
    host: str
    command: str
    since: str
    trains: bool
    reach: str = ""
    token: str = ""

    def __str__(self) -> str:
        command = self.command if len(self.command) <= 120 else f"{self.command[:117]}..."
        return f"`{command}` (process {self.pid} on {self.host}, since {self.since})"


def this_process(descriptor: int, *, trains: bool) -> Holder:
    """What this process leaves in a lock that it has opened."""
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        command=shlex.join(["nepa", *sys.argv[1:]]),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        trains=trains,
        reach=reach(descriptor),
        token=secrets.token_hex(8),
    )


def reach(descriptor: int) -> str:
    """Equal for two processes if, and as far as is known only if, they have one kernel and one mounted file system."""
    try:
        kernel = _BOOT.read_text().strip()
    except OSError:
        kernel = socket.gethostname()
    return f"{kernel} {os.fstat(descriptor).st_dev}"


def read_holder(content: bytes) -> Holder | None:
    """Who has a lock, as far as its content says it."""
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    return holder if isinstance(holder.command, str) else None


class Lease:
    """A lock that this process has, and renews until `end`.

    Attributes:
        content: what the file holds while it is this process's.
    """

    def __init__(self, file: Path, descriptor: int, content: bytes) -> None:
        self.file, self.content = file, content
        self._descriptor, self._over = descriptor, Event()
        self._thread = Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        _LEASES.append(self)

    def is_ours(self) -> bool:
        """Whether the file still says so; raises OSError where it can't be read."""
        try:
            return _look(self.file).content == self.content
        except FileNotFoundError:
            return False

    def _renew(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # tried again
                if not self.is_ours():
                    return
                os.utime(self._descriptor)

    def end(self) -> None:
        """Renew it no more."""
        _LEASES.remove(self)
        self._over.set()
        self._thread.join()


_LEASES: list[Lease] = []  # of this process
os.register_at_fork(after_in_child=_LEASES.clear)


def check() -> None:
    """Whether all locks that this process has taken are still its own; before anything is written.

    Raises:
        LostLock: another process has one of them.
        OSError: the file of one can't be read.
    """
    for lease in list(_LEASES):
        if not lease.is_ours():
            with suppress(OSError):
                if other := read_holder(_look(lease.file).content):
                    raise LostLock(
                        f"{lease.file.parent}: this process was stopped for so long that {other} has taken it for lost "
                        "and goes on in its place; nothing more is written here: wait for that one"
                    )
            raise LostLock(
                f"{lease.file}: this lock was removed while this process had it; nothing more is written here: give "
                "the same command again"
            )


# ------------------------------------------------------------------------------------------------- taking one


class _Seen(NamedTuple):
    inode: int
    changed: int
    content: bytes


class _Watch(NamedTuple):
    """What a rival has seen of a lock: how long it has not changed, and whether it ever has."""

    seen: _Seen
    looked: float
    quiet: float = 0.0
    alive: bool = False


_WATCHES: dict[Path, _Watch] = {}


def take(file: Path, descriptor: int, content: bytes, *, kernel: bool) -> Lease | None:
    """Take a lock for this machine, or None where another one has it, or may have.

    Args:
        descriptor: the file, opened for writing.
        content: of `Holder`, to be written into it.
        kernel: this process has the kernel's lock on it.

    Raises:
        OSError: it can't be written.
    """
    if not _is_free(file, kernel):
        return None
    claim = file.with_name(f"{file.name}-claim")
    try:
        handle = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        with suppress(FileNotFoundError):
            if _is_lost(claim, kernel):
                claim.unlink()  # the next look takes it
        return None
    try:
        _write(handle, content)
        if not _is_free(file, kernel):
            return None
        _write(descriptor, content)
        os.utime(descriptor)  # what can't be renewed can't be had
        with suppress(FileNotFoundError):  # one of the two is another's: this process was stopped on the way
            if _look(claim).content == content == _look(file).content:
                _WATCHES.pop(file, None)
                return Lease(file, descriptor, content)
        return None
    finally:
        os.close(handle)
        with suppress(FileNotFoundError):
            if _look(claim).content == content:
                claim.unlink()


def is_doubtful(file: Path) -> bool:
    """Whether a lock that could not be taken may be that of a lost machine; `LOST` seconds of trying will say."""
    watch = _WATCHES.get(file)
    with suppress(OSError):
        return watch is not None and not watch.alive and watch.seen.content == _look(file).content
    return False


def _is_free(file: Path, kernel: bool) -> bool:
    try:
        return not _look(file).content or _is_lost(file, kernel)
    except FileNotFoundError:
        return False  # it was removed since it was opened


def _is_lost(file: Path, kernel: bool) -> bool:
    """Whether who wrote a file is dead, or has given no sign of life for `LOST` seconds of watching."""
    seen, now = _look(file), time.monotonic()
    holder = read_holder(seen.content)
    if kernel and holder is not None and holder.reach in ("", _reach_of(file)):
        return True  # it had the kernel's lock until it ended; one of before there were leases had nothing else
    before = _WATCHES.get(file)
    if before is None or before.seen != seen:
        _WATCHES[file] = _Watch(seen, now, alive=before is not None)
        return False
    # A longer time between two looks counts as one beat: this process, or the file system, may have stood still.
    quiet = before.quiet + min(now - before.looked, BEAT)
    _WATCHES[file] = before._replace(looked=now, quiet=quiet)
    return quiet >= LOST


def _reach_of(file: Path) -> str:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return reach(descriptor)
    finally:
        os.close(descriptor)


def _look(file: Path) -> _Seen:
    """A file as it is now: opening it is what makes a network's file system ask its server."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "It is no regular file", file)
        return _Seen(facts.st_ino, facts.st_mtime_ns, os.read(descriptor, 2**16))
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)
