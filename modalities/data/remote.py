"""Data at an address, s3://, hf:// or http(s)://: fetched once into a folder on this machine, and read there.

Shards are indexed before the first step and read at random in every epoch, so that each is needed whole. A file in the
folder has been fetched whole: it gets its name when all its bytes are there. Several processes fetch different files,
and none twice. Where the listing of the address (names, sizes, and the server's mark for each content) is another one
than before, everything goes into a new folder, so that who reads the old one goes on reading it.

Nothing that is fetched is run, and an address that a file names rather than the user is fetched only when the user says
so (`nepa_core.runtime.trust`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple
from uuid import uuid4

from modalities.data.hub import one_line
from modalities.data.image_shards import CLASS_NAMES
from modalities.data.listing import cache_folder, printable, say
from nepa_core.basics import UserError, needs
from nepa_core.runtime import trust
from nepa_core.runtime.checkpoint import read_json
from nepa_core.runtime.locks import locked

PACKAGES = {"http": ("aiohttp",), "https": ("aiohttp",), "s3": ("s3fs",), "hf": ("huggingface_hub",)}
"""Beginning of an address -> what fsspec needs for it."""
SHARDS = (".tar", ".parquet", CLASS_NAMES)
"""How the names of files end that are fetched of a folder."""
AT_ONCE = 8  # files of one process
MOST = 10**6  # addresses that braces may stand for
_WAIT = 0.2  # seconds between looks at a file that another process fetches
SILENCE = 60  # seconds without a byte after which a web server is given up
MARKS = ("ETag", "etag", "Content-MD5", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "created")
_ANY = tuple(errno.errorcode)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class File(NamedTuple):
    """A file at an address.

    Attributes:
        name: below the address, with slashes.
        size: in bytes. mark: changes where the content does, as far as the server says.
    """

    name: str
    url: str
    size: int
    mark: str


def at_hand(root: str) -> str:
    """What `data.root` names, on this machine: itself, or of an address the copy, fetched where it is missing.

    Args:
        root: an address of one file, of a folder (its shards and `SHARDS` right there or one folder below are
            fetched), or of several files with {000..127}, {train,val} or, where the server lists, *.

    Returns:
        The file, or the folder with the files as they lie below the folder that they have in common.

    Raises:
        UserError: the address can't be had, says no size, holds no shards or is named by a file alone; a package is
            missing; or the disk is full.
    """
    return _fetched(root) if is_address(root) else root


def is_address(root: str) -> bool:
    """Whether it is no path."""
    return trust.ADDRESS.match(root) is not None


@lru_cache(maxsize=16)
def _fetched(root: str) -> str:
    title = f"data.root={printable(root)}"
    trust.check_address(root)
    scheme = root.partition("://")[0].lower()
    if scheme not in PACKAGES:
        raise UserError(f"{title}: an address begins with s3://, hf://, http:// or https://; copy it here, and name it")
    if re.match(r"\w+://[^/]*@", root) and scheme != "hf":
        raise UserError(f"{title.partition('://')[0]}://...: no password in an address: it would be kept in the run")
    needs(title, "fsspec", "braceexpand", extra="remote")
    needs(title, *PACKAGES[scheme], extra="remote" if scheme.startswith("http") else None)
    place = cache_folder() / f"{_slug(root)}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    try:
        system = _system(scheme)
        base, files = _listed(system, root)
    except UserError as error:
        raise UserError(f"{title}: {error}") from error
    except Exception as error:  # every system has its own kinds: no network, no such name, no access
        cause = one_line(error.__cause__ or error if isinstance(error, FileNotFoundError) else error)
        if (kept := _complete(place)) is not None:
            say(f"{title} can't be had ({cause}): its copy in {place} is read")
            return kept
        raise UserError(
            f"{title}: can't be had ({cause}); check the address, your access and the network; of a server that lists "
            "no folders give the files, as in .../train-{000..127}.tar"
        ) from error
    folder = place / _version(files)
    _fetch_all(system, files, folder, title)
    kept = str(folder / files[0].name if base is None else folder)
    with _disk(title, *_ANY):
        record = {"path": kept, "files": {each.name: each.size for each in files}, "folder": str(folder)}
        _record(place / "complete.json", json.dumps(record) + "\n")
    return kept


def _record(file: Path, text: str) -> None:
    """Write it whole or not at all; other processes may write the same at once, so each has a draft of its own."""
    draft = file.with_name(f".writing-{uuid4().hex}")
    try:
        with draft.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _slug(root: str) -> str:
    """A part of a folder's name that no command takes for an option."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", root)[-60:].strip("-.")


def _amount(size: int) -> str:
    """A size in bytes as "2.4 MB"."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if size >= each[0]), (1e3, "kB"))
    return f"{size / unit:,.1f} {name}"


def _system(scheme: str) -> Any:
    import fsspec

    if not scheme.startswith("http"):
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    import aiohttp

    patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return fsspec.filesystem(scheme, skip_instance_cache=True, client_kwargs={"timeout": patience})


# ------------------------------------------------------------------------------------------------------ what there is


def _listed(system: Any, root: str) -> tuple[str | None, list[File]]:
    """The address that names are below, None for that of a single file, and the files, sorted by name."""
    from braceexpand import braceexpand

    try:
        given = list(islice(braceexpand(root), MOST + 1))
    except ValueError as error:
        raise UserError("its braces don't match") from error
    if len(given) > MOST:
        raise UserError(f"its braces stand for more than {MOST:,} files")
    base: str | None = None
    if len(given) == 1 and "*" not in root:
        single = system._strip_protocol(root.rstrip("/"))
        if _is_file(system, single, root):
            facts = {single: system.info(single)}
            base = posixpath.dirname(single)
            return None, _files(system, facts, base)
        base = single
        found = system.find(single, maxdepth=2, detail=True)
        facts = {url: each for url, each in found.items() if url.lower().endswith(SHARDS) and _is_shown(url, base)}
        if not facts:
            if "http" in str(system.protocol):
                system.info(single)  # a server that can't be reached lists nothing, too
            raise UserError(
                f"no shard ({', '.join(SHARDS[:2])}) in this folder; of a server that lists none give the files, as in "
                ".../train-{000..127}.tar"
            )
        return base, _files(system, facts, base)
    facts = {}
    for each in given:
        url = system._strip_protocol(each)
        facts |= system.glob(url, detail=True) if "*" in url else {url: {}}
    if not facts:
        raise UserError("no file is called so")
    return (base := posixpath.commonpath([posixpath.dirname(url) for url in facts])), _files(system, facts, base)


def _is_file(system: Any, url: str, root: str) -> bool:
    """Web servers have no folders, but pages that list them: there the name says it."""
    if "http" in str(system.protocol):
        return not root.endswith("/") and bool(re.search(r"\.[A-Za-z]\w{1,7}$", posixpath.basename(url)))
    return bool(system.info(url)["type"] == "file")


def _files(system: Any, facts: dict[str, dict[str, Any]], base: str) -> list[File]:
    """Sizes and marks, asked for where the listing has none."""

    def look(url: str) -> File:
        known = facts[url] if facts[url].get("size") is not None else system.info(url)
        if known.get("size") is None:
            raise UserError(f"{printable(url)}: the server does not say its size")
        name = _below(url, base)
        if not _is_shown(url, base):
            raise UserError(f"{printable(url)}: not the name of a file of data")
        mark = next((str(known[key]) for key in MARKS if known.get(key) is not None), "")
        return File(name, url, int(known["size"]), mark)

    with ThreadPoolExecutor(4 * AT_ONCE) as pool:
        return sorted(pool.map(look, facts))


def _below(url: str, base: str) -> str:
    return url[len(base) :].lstrip("/") if url.startswith(base) else posixpath.basename(url)


def _is_shown(url: str, base: str) -> bool:
    """Whether a file is to be read, and may be written here under its name: none of it is hidden, empty or `..`."""
    return not any(part == "" or part.startswith(".") or "\0" in part for part in _below(url, base).split("/"))


def _version(files: Iterable[File]) -> str:
    listing = json.dumps([(each.name, each.size, each.mark) for each in files])
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _complete(place: Path) -> str | None:
    """The newest copy that was fetched to its end."""
    try:
        record = read_json(place / "complete.json")
        folder = Path(record["folder"])
        whole = all(_is_there(folder / name, size) for name, size in record["files"].items())
        return str(record["path"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ---------------------------------------------------------------------------------------------------------- fetching


def _fetch_all(system: Any, files: list[File], folder: Path, title: str) -> None:
    with _disk(title, *_ANY):
        for place in sorted({(folder / each.name).parent for each in files}):
            place.mkdir(parents=True, exist_ok=True)
        missing = [each for each in files if not _is_there(folder / each.name, each.size)]
        wanted, free = sum(each.size for each in missing), shutil.disk_usage(folder).free
    if not missing:
        return
    if wanted > free:
        raise UserError(
            f"{title}: {_amount(wanted)} are to be fetched, and {folder} has room for {_amount(free)}; free "
            "some space, or name another folder in XDG_CACHE_HOME"
        )
    say(f"{title}: fetching {len(missing):,} of {len(files):,} files, {_amount(wanted)}, into {folder}")
    stop = Event()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for _ in pool.map(lambda each: _fetch(system, each, folder / each.name, title, stop), missing):
            pass
    finally:  # of what is left nothing, after an error or Ctrl-C
        stop.set()
        pool.shutdown(cancel_futures=True)


def _fetch(system: Any, file: File, target: Path, title: str, stop: Event) -> None:
    """Fetch a file, or wait until another process has."""
    while not stop.is_set() and not _is_there(target, file.size):
        with locked(target.with_name(f".{target.name}.lock"), keep=False, trains=False) as mine:
            if mine and not _is_there(target, file.size):
                _fetch_alone(system, file, target, title, stop)
        stop.wait(0 if mine else _WAIT)


def _fetch_alone(system: Any, file: File, target: Path, title: str, stop: Event) -> None:
    draft = target.with_name(f".{target.name}.part")
    try:
        with _disk(title, *_FULL):
            system.get_file(file.url, str(draft), callback=_stopped_by(stop))
            if (size := draft.stat().st_size) != file.size:
                raise ValueError(f"{size:,} bytes came, of {file.size:,}")
            os.replace(draft, target)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{title}: {printable(file.name)} can't be fetched ({one_line(error)}); check your access and the "
            "network, and give the same command again: what is whole stays"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _stopped_by(stop: Event) -> Any:
    from fsspec.callbacks import Callback

    class Stopping(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if stop.is_set():
                raise InterruptedError("stopped")

    return Stopping()


def _is_there(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


@contextmanager
def _disk(title: str, *numbers: int) -> Iterator[None]:
    """Within the block errors of the disk that have these numbers are one line; those of the network may be others."""
    try:
        yield
    except OSError as error:
        if error.errno in numbers:
            raise UserError(
                f"{title}: {cache_folder()} can't be written: {one_line(error)}; free some space, or name another "
                "folder in XDG_CACHE_HOME"
            ) from error
        raise
