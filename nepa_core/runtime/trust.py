"""Whose code is imported, and from what addresses data are fetched.

A run's config.json names its adapter, and perhaps an order, a term, a hook, by import path; importing a module runs it.
Imported without a question are what this program is installed with; what the user types, and what code of theirs
names; and what a config.json names that a command of this user wrote on this machine. That is known by a note outside
the folder, `$XDG_CONFIG_HOME/nepa/made/` (`~/.config` where that is not set) with the SHA-256 of the file: a run may be
moved or copied, and a file that was changed is nobody's. Everything else is refused, with the way to allow it:
`trust=true` on the command line.

An address of data (`https://...`) is asked about in the same way, where a file names it and not the user.

Nothing is imported from inside a run folder, whoever names it, for its files come with the run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import nepa_core
from nepa_core.basics import UserError, file_digest

OURS = ("nepa_core", "modalities", "recipes", "tests")
"""The packages of this program."""

_ROOT = Path(nepa_core.__file__).resolve().parents[1]
_FILE: ContextVar[Path | None] = ContextVar("file", default=None)  # what names the paths that are loaded now


ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""How an address begins that data can be fetched from."""


class Trust(NamedTuple):
    """What this process imports beside its own: `everything`, or these modules, which the user or their code named.

    Attributes:
        addresses: that the user typed. foreign: that a file names which was not made here.
    """

    everything: bool = False
    modules: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()


_given = Trust()


def given() -> Trust:
    """To hand on to another process of the same command."""
    return _given


def take(trust: Trust) -> None:
    """Trust what another process did, or with `Trust(everything=True)` all that any file names."""
    global _given
    _given = trust


@contextmanager
def everything() -> Iterator[None]:
    """Within the block all that any file names is trusted."""
    before = given()
    take(Trust(everything=True))
    try:
        yield
    finally:
        take(before)


def allow(paths: Iterable[str]) -> None:
    """Trust the modules of these import paths from here on, also where a file names them."""
    take(_given._replace(modules=_given.modules | {path.partition(":")[0] for path in paths}))


def addresses_in(*values: Any) -> list[str]:
    """The addresses among some values and, where these are lists or dictionaries, within them."""
    found: list[str] = []
    for value in values:
        if isinstance(value, str) and ADDRESS.match(value):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += addresses_in(*value)
        elif isinstance(value, dict):
            found += addresses_in(*value.values())
    return found


def typed(addresses: Iterable[str]) -> None:
    """The user has named these addresses, which may be fetched from, whatever file names them, too."""
    take(_given._replace(addresses=_given.addresses | set(addresses)))


def seen_in(file: Path, values: Any) -> None:
    """A file holds these values: the addresses among them are its own, unless it was made here."""
    if (found := addresses_in(values)) and not (_given.everything or is_made_here(file)):
        take(_given._replace(foreign=_given.foreign | set(found)))


def check_address(address: str) -> None:
    """Whether something may be fetched from an address.

    Raises:
        UserError: a file names it that was not made here, and the user does not.
    """
    if address in _given.foreign - _given.addresses and not _given.everything:
        raise UserError(
            f"{address}: a file names this address that was not made here by you, and nothing is fetched from there "
            f"unasked: give it yourself (data.root={address}), name other data, or add trust=true"
        )


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Within the block it is this file that names what is loaded, not the user."""
    before = _FILE.set(file)
    try:
        yield
    finally:
        _FILE.reset(before)


def check(path: str) -> None:
    """Whether `package.module:name` may be imported; what no file names, the user does, and it is trusted from here on.

    Raises:
        UserError: a file names it that was not made here, or it lies in a run folder.
    """
    module = path.partition(":")[0]
    if is_ours(module):
        return
    file = _FILE.get()
    if file is None:
        allow([path])
    elif not (_given.everything or module in _given.modules or is_made_here(file)):
        raise UserError(
            f"it names {path}, code that would be run, and this run was not made here by you: look at that code, and "
            "where you trust it give the same command with trust=true"
        )
    _check_place(module, path)


def is_ours(module: str) -> bool:
    """Whether a module is of the packages of this program, those that are installed and no others of their names."""
    top = module.partition(".")[0]
    if top not in OURS:
        return False
    spec = _spec(top)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == _ROOT / top


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # no such package; a module without a spec, such as __main__
        return None


def _check_place(module: str, path: str) -> None:
    """Refuse a module that lies in a run folder, before it or a package around it is imported.

    The current folder is a place to import from unless it is in a run folder itself.
    """
    leave_run_folder()
    if "" not in sys.path and run_around(Path.cwd()) is None:
        sys.path.insert(0, "")
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name in sys.modules:
            continue
        if (spec := _spec(name)) is None:
            around = run_around(Path.cwd())
            if around is None:
                return  # importing it says what is wrong
            raise UserError(_inside(path, around))
        for place in (spec.origin, *(spec.submodule_search_locations or ())):
            if place is not None and (around := run_around(Path(place))) is not None:
                raise UserError(_inside(path, around))


def _inside(path: str, folder: Path) -> str:
    return (
        f"{path}: nothing is imported from inside a run folder, and {folder} is one; keep your code elsewhere, and "
        "give the command from there"
    )


def leave_run_folder() -> None:
    """Where the current folder is a run folder, or inside one, take it off the places to import from."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was deleted
        return
    if run_around(here) is not None:
        sys.path[:] = [place for place in sys.path if place and Path(place) != here]


def run_around(path: Path) -> Path | None:
    """The run folder that a path is or lies in, or None."""
    return next((folder for folder in (path, *path.absolute().parents) if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    file = folder / "config.json"
    try:
        if not file.is_file():
            return False
        if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
            return True
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(saved, dict) and ("adapter" in saved or {"data", "model", "train"} <= saved.keys())


# ------------------------------------------------------------------------------------------------ what was made here


def made_folder() -> Path:
    """Where the notes on what was made here lie."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "nepa" / "made"


def is_made_here(file: Path) -> bool:
    """Whether a command of this user has written this config.json, as it stands."""
    try:
        return (made_folder() / file_digest(file)).is_file()
    except (OSError, RuntimeError):  # there is no home folder
        return False


def remember(file: Path, paths: Iterable[str]) -> None:
    """Note that this user has made a run, where it names code that is not this program's, or addresses.

    A note is a small file, whose name is all that counts; it says which folder and what it names.

    Args:
        paths: import paths and addresses.
    """
    foreign = sorted(path for path in paths if not is_ours(path.partition(":")[0]))
    if not foreign:
        return
    try:
        folder = made_folder()
        note = folder / file_digest(file)
        if not note.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            note.write_text(f"{file.absolute().parent}\n" + "".join(f"{path}\n" for path in foreign))
    except (OSError, RuntimeError) as error:
        print(
            f"That you made {file.parent} can't be noted ({error}): commands that read it will need trust=true.",
            file=sys.stderr,
        )
