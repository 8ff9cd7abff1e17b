"""What belongs to a data set: one rule for every modality, what it passes over, and what two splits share.

A file is listed where it is a regular file, has one of the wanted suffixes in any case, and neither it nor a folder
above it (below the folder that the user named) is hidden or made by an operating system. Links are followed, but
for one to a folder that is listed anyway or lies above. Everything else is counted and said in one line.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nepa_core.basics import UserError, cores, number_of

SYSTEM = frozenset(
    [
        "@eadir",
        "__macosx",
        "__pycache__",
        "#recycle",
        "$recycle.bin",
        "lost+found",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    ]
)
"""Names, in small letters, that an operating system or a disk station leaves in folders of data."""
LARGEST_FILE = 2**29
"""Bytes of a file or of a member of an archive that is read whole; PIL's largest image needs half of it."""
READ_BUDGET = 2**30  # bytes that `shared_content` reads at most
SAMPLED = 2**16  # bytes at a place of `content_sample`
OPENING = 2**16  # bytes that could be read in the time that it takes to open a file
IN_PLACE = 2**10  # ... to find a row of what is open already, or in memory

Integers = np.ndarray[Any, np.dtype[np.int64]]


# ------------------------------------------------------------------------------------------------- what is said


_said: set[str] = set()
_TURNS = frozenset(map(chr, (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def say(line: str) -> None:
    """Say something about the data on stderr: once, by the first process of a run, never by a loader's worker."""
    if line in _said or multiprocessing.parent_process() is not None or os.environ.get("RANK", "0") != "0":
        return
    _said.add(line)
    print(line, file=sys.stderr)


def say_left_aside(where: str | Path, held_out: Sequence[str]) -> None:
    """Say which of several held-out splits is read, the first, and that the rest are not."""
    if len(held_out) > 1:
        say(f"{where}: {held_out[0]} is held out, and {' and '.join(held_out[1:])} left aside")


def printable(name: str) -> str:
    """A name from data as a message, a page or a JSON file can hold it: the rest of its characters are escaped.

    Bytes that are no UTF-8 become `\\xe9`, line breaks, escape sequences and other control characters likewise.
    """
    if name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape" if _from_files(name) else "backslashreplace")
    shown = text.decode("utf-8", "backslashreplace")
    return "".join(each.encode("unicode_escape").decode() if _controls(each) else each for each in shown)


def _controls(character: str) -> bool:
    """Control characters, line and paragraph separators, and marks that turn the direction of writing."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in _TURNS


def _from_files(name: str) -> bool:
    """Whether the surrogates in a name, if any, stand for the bytes of a file's name."""
    return all("\udc80" <= each <= "\udcff" for each in name if "\ud800" <= each <= "\udfff")


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort by it and 2 comes before 10; the name itself decides between `1` and `01`."""
    parts = re.split(r"([0-9]+)", name)
    return (*(int(part) if place % 2 else part for place, part in enumerate(parts)), name)


@dataclass
class Passed:
    """What a listing passed over: for each reason the number, and the first name in order of the alphabet."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count `name` under `reason`, words that fit behind a number, such as "hidden"."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first[reason] = min(self.first.get(reason, name), name)

    def merge(self, other: Passed) -> None:
        """Add what another listing passed over."""
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)

    def total(self) -> int:
        """How much was passed over."""
        return sum(self.counts.values())

    def line(self, where: str) -> str | None:
        """`where: passed over 3 files or folders: 2 with the suffix .heic (such as a.heic), ...`; None for nothing."""
        if not self.counts:
            return None
        most = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        told = [f"{self.counts[each]:,} {each} (such as {printable(self.first[each])})" for each in most[:6]]
        if rest := most[6:]:
            told.append(f"{sum(self.counts[each] for each in rest):,} for {len(rest)} other reasons")
        return (
            f"{where}: passed over {number_of(self.total(), 'file or folder', 'files or folders')}: {', '.join(told)}"
        )


# ---------------------------------------------------------------------------------------------------- the rule


HIDDEN = "hidden or made by a system"
ODD = "no regular files"
BROKEN = "links that lead nowhere"
AGAIN = "links to a folder that is listed anyway, or lies above"
CLOSED = "folders that can't be read"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the data."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_hidden_path(path: str) -> bool:
    """The same for a relative path, such as a member of an archive; `./` and `../` hide nothing."""
    return any(is_hidden(part) for part in path.split("/") if part not in (".", ".."))


def data_folder(root: str, holds: str = "the data") -> Path:
    """The folder that `data.root` names, `~` resolved.

    Args:
        holds: what the refusal says that it should hold.

    Raises:
        UserError: there is no such folder.
    """
    path = os.path.expanduser(root)
    if not os.path.isdir(path):
        shown = printable(root if len(root) <= 80 else root[:77] + "...")
        what = "is a file and no folder" if os.path.isfile(path) else "there is no such folder"
        raise UserError(f"data.root={shown}: {what}; give the one that holds {holds}")
    return Path(path)


class Listed(NamedTuple):
    """Files below a folder, sorted as text, and what was passed over.

    Attributes:
        paths: names of files as the system gives them; bytes that are no UTF-8 are surrogates (`os.fsencode`).
    """

    paths: list[str]
    passed: Passed


def subfolders(folder: str | Path, passed: Passed | None = None) -> list[str]:
    """Names of the folders right in this one that the rule allows, sorted as text: the classes, for a tree of them.

    What else lies there is counted in `passed`.
    """
    passed = Passed() if passed is None else passed
    names = []
    for entry in _entries(os.fspath(folder), passed):
        if is_hidden(entry.name):
            passed.add(HIDDEN, entry.name)
        elif _is_dir(entry):
            names.append(entry.name)
        else:
            passed.add(f"beside the folders of {os.path.basename(os.fspath(folder))}", entry.name)
    return sorted(names)


def list_files(folder: str | Path, suffixes: Collection[str], *, within: str | Path | None = None) -> Listed:
    """The files at any depth of a folder that the rule allows.

    Args:
        suffixes: in small letters, with the dot.
        within: the folder whose listing this is a part of, such as that of a split for one of its classes: links to
            it are not followed. Default: `folder`.
    """
    return list_groups(within or folder, [folder], suffixes)[0]


def list_groups(within: str | Path, folders: Sequence[str | Path], suffixes: Collection[str]) -> list[Listed]:
    """`list_files` for several folders of one listing, such as the classes of a split.

    A folder that several of them reach is listed once: where it lies, or under the first link to it.
    """
    wanted = tuple(suffixes)
    found = [Listed([], Passed()) for _ in folders]
    seen = _lying_above(within, own=not any(os.fspath(folder) == os.fspath(within) for folder in folders))
    links: list[tuple[str, Listed]] = []
    for folder, listed in zip(folders, found, strict=True):
        place = os.fspath(folder)
        if os.path.islink(place):
            links.append((place, listed))
        else:
            _walk(place, wanted, listed, seen, links)
    for place, listed in links:  # grows while links lead to further ones
        _walk(place, wanted, listed, seen, links, link=True)
    for listed in found:
        listed.paths.sort()
    return found


def _walk(
    top: str,
    wanted: tuple[str, ...],
    listed: Listed,
    seen: set[tuple[int, int]],
    links: list[tuple[str, Listed]],
    *,
    link: bool = False,
) -> None:
    """Add the files below `top`. Links to folders are put off: what lies here itself comes first."""
    paths, passed = listed
    stack = [top]
    while stack:
        folder = stack.pop()
        try:
            identity = os.stat(folder)
        except OSError:
            passed.add(BROKEN if link else CLOSED, folder)
            continue
        key = (identity.st_dev, identity.st_ino)
        if key in seen:
            passed.add(AGAIN, folder)
            continue
        seen.add(key)
        for entry in _entries(folder, passed):
            name = entry.name
            if is_hidden(name):
                passed.add(HIDDEN, entry.path)
            elif entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
            elif _is_dir(entry):
                links.append((entry.path, listed))
            elif not name.lower().endswith(wanted):
                passed.add(_suffix_reason(name), entry.path)
            elif entry.is_file(follow_symlinks=False) or _is_file(entry):
                paths.append(entry.path)
            else:
                passed.add(BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else ODD, entry.path)


def _suffix_reason(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return f"with the suffix {printable(suffix[:16])}" if suffix else "without a suffix"


def _entries(folder: str, passed: Passed) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        passed.add(CLOSED, folder)
        return []


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _lying_above(folder: str | Path, *, own: bool) -> set[tuple[int, int]]:
    """Device and number of the folders above this one and, with `own`, of this one."""
    real = Path(os.path.realpath(folder))
    found = set()
    for each in (*real.parents, *([real] if own else [])):
        try:
            identity = os.stat(each)
        except OSError:
            continue
        found.add((identity.st_dev, identity.st_ino))
    return found


def read_whole(path: str, most: int = LARGEST_FILE) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: it is a pipe, a device or the like, which might never end, or holds more than `most` bytes.
        OSError: it can't be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait here
    with open(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("no regular file")
        check_size(facts.st_size, most)
        content = file.read(facts.st_size or 2**16)  # what lies in /proc does not give its size, and may be endless
        if content is None:
            raise OSError(errno.EAGAIN, "nothing to read there")
        return content


def check_size(size: int, most: int = LARGEST_FILE) -> None:
    """Raises ValueError where something of `size` bytes is too much to be read whole."""
    if size > most:
        raise ValueError(f"{size:,} bytes, more than the {most:,} that are read of one sample")


# ---------------------------------------------------------------------- what a data set is, and what two of them share


class Contents(NamedTuple):
    """The stored bytes of the samples of a data set: what its optional method `contents()` gives.

    Attributes:
        sizes: [n] int64, the number of stored bytes of each sample; equal bytes have equal sizes.
        read: the stored bytes of a sample (or any digest of them); may raise anything.
        name: what a message calls it.
        opening: what a read costs beside its bytes, in bytes: OPENING or IN_PLACE.
    """

    sizes: Integers
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    opening: int = OPENING


@dataclass(frozen=True)
class Shared:
    """Held-out samples whose stored bytes are also those of a training sample.

    Attributes:
        count: of them, of `held_out`; at least so many where the splits were too large to compare everything.
        names: (held-out, training), of the first few.
    """

    count: int
    held_out: int
    complete: bool
    names: list[tuple[str, str]]

    def line(self) -> str | None:
        """One line that says it, or None where nothing is shared."""
        if not self.count:
            return None
        test, train = self.names[0]
        such = f"such as {test}, which is listed in both" if test == train else f"such as {test} and {train}"
        return (
            f"leak: {'' if self.complete else 'at least '}{self.count:,} of {self.held_out:,} held-out samples are "
            f"training samples, too, byte for byte, {such}; scores on them say nothing: remove them from one of the "
            "splits"
        )


def shared_content(train: Contents, test: Contents, budget: int = READ_BUDGET) -> Shared:
    """Count the held-out samples that are training samples, too, by a hash of the stored bytes.

    Only samples that have the size of one on the other side are read, and no more than `budget` bytes (a second or
    two): of larger splits a fixed choice of samples is compared. Samples that can't be read are no leak.
    """
    count, complete, pairs = 0, True, list[tuple[str, str]]()
    held_out: dict[int, list[int]] = {}
    for row in np.random.default_rng(0).permutation(len(test.sizes)).tolist():
        held_out.setdefault(int(test.sizes[row]), []).append(row)
    by_size = np.argsort(train.sizes, kind="stable")
    ordered = train.sizes[by_size]
    with ThreadPoolExecutor(min(16, 4 * cores())) as pool:
        for size, held in held_out.items():
            first, last = np.searchsorted(ordered, [size, size + 1])
            if size <= 0:  # nothing is no content
                continue
            cost = size + max(train.opening, test.opening)
            most = budget // cost if last > first else 0
            rivals = by_size[first:last][: max(most - len(held), most // 2)].tolist()
            chosen = held[: most - len(rivals)]
            complete &= len(rivals) == last - first and (not rivals or len(chosen) == len(held))
            budget -= (len(rivals) + len(chosen)) * cost
            known = dict(zip(pool.map(_digest(train), rivals), rivals, strict=True))
            known.pop(None, None)
            for row, digest in zip(chosen, pool.map(_digest(test), chosen), strict=True):
                if digest in known:
                    count += 1
                    pairs = sorted([*pairs, (printable(test.name(row)), printable(train.name(known[digest])))])[:6]
    return Shared(count, len(test.sizes), complete, pairs)


def _digest(contents: Contents) -> Callable[[int], bytes | None]:
    def digest(row: int) -> bytes | None:
        try:
            return hashlib.blake2b(contents.read(row), digest_size=16).digest()
        except Exception:  # whatever is wrong with it is found and named when it is read as a sample
            return None

    return digest


def fingerprint(names: Iterable[str], sizes: Integers, labels: np.ndarray[Any, Any] | None = None) -> str:
    """What a data set's optional method `fingerprint()` gives: a text that changes where its list of samples does.

    Args:
        names: of the samples in their order, relative to the root of the data, so that data may move.
        sizes: [n] int64, their stored bytes.
        labels: [n, ...], where names do not say them.

    Returns:
        Number of samples, number of bytes, and a hash of all names, sizes and labels in order.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    digest.update(np.ascontiguousarray(sizes, dtype="<i8").tobytes())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).tobytes())
    return f"{len(sizes)} samples, {int(sizes.sum())} bytes, {digest.hexdigest()}"


def content_sample(file: Path) -> str:
    """A hash of the first, the middle and the last `SAMPLED` bytes of a file: cheap, and the same after a copy.

    What was edited elsewhere in a larger file is not seen.
    """
    digest, size = hashlib.blake2b(digest_size=8), file.stat().st_size
    with file.open("rb") as stream:
        for start in (0, (size - SAMPLED) // 2, size - SAMPLED):
            stream.seek(max(start, 0))
            digest.update(stream.read(SAMPLED))
    return digest.hexdigest()


class Paths(NamedTuple):
    """Names of files. An Arrow array of bytes: a list of strings would be copied into every worker, and a name need not
    be text.

    Attributes:
        base: the folder that names are relative to where they say what the data set is.
    """

    stored: pa.Array
    base: str

    @classmethod
    def of(cls, paths: Iterable[str], base: str = "") -> Paths:
        """Of paths as the system gives them."""
        return cls(pa.array([os.fsencode(path) for path in paths], pa.large_binary()), base)

    def at(self, row: int) -> str:
        """A path as the system gives it."""
        return os.fsdecode(self.stored[row].as_py())

    def relative(self) -> list[str]:
        """Every path below the base."""
        start = len(self.base) + 1 if self.base else 0
        return [os.fsdecode(path)[start:] for path in self.stored.to_pylist()]

    def sizes(self) -> Integers:
        """See `file_sizes`."""
        return file_sizes([os.fsdecode(path) for path in self.stored.to_pylist()])


class Derived:
    """What is said of a data set whose samples are made of those of another, `stored`, one of each."""

    stored: Any

    def __len__(self) -> int:
        return len(self.stored)

    def name(self, index: int) -> str:
        """What a message calls that sample."""
        return str(self.stored.name(index))

    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return str(self.stored.fingerprint())

    def contents(self) -> Contents | None:
        """See `Contents`."""
        contents: Contents | None = self.stored.contents()
        return contents

    def every_label(self) -> Any:
        """A tensor [S], without reading a sample; None where `stored` has no labels."""
        return getattr(self.stored, "every_label", lambda: None)()


def file_sizes(paths: Sequence[str]) -> Integers:
    """Bytes of each file, [n] int64; -1 where there is none. Many at once, as a network's disk answers slowly."""
    parts = [paths[start : start + 4096] for start in range(0, len(paths), 4096)]
    with ThreadPoolExecutor(min(32, max(1, len(parts)))) as pool:
        return np.array([size for part in pool.map(_sizes, parts) for size in part], dtype=np.int64)


def _sizes(paths: Sequence[str]) -> list[int]:
    found = []
    for path in paths:
        try:
            found.append(os.stat(path).st_size)
        except OSError:
            found.append(-1)
    return found


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/nepa/data`, `~/.cache` where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nepa" / "data"


def anew(file: Path) -> str:
    """What to do about a file that is damaged, as a command: of what was fetched, it will be again."""
    fetched = file.absolute().is_relative_to(cache_folder().absolute())
    return f"delete {file}, and the same command fetches it again" if fetched else "copy it again"
