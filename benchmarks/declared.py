"""What the scripts of declared protocols share: their words, and figures that are kept one by one as they are found."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.parser import Parser
from nepa_core.basics import UserError
from nepa_core.runtime.checkpoint import write_whole
from recipes.report.provenance import provenance
from recipes.report.summaries import MadeWith


def parser_of(name: str, doc: str | None) -> Parser:
    """`python -m benchmarks.NAME run|table` with --data, --out and --workers."""
    parser = Parser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="of run: folder of all data")
    parser.add_argument("--out", type=Path, help=f"of run: folder of all runs; default {_out(name)}")
    parser.add_argument("--workers", type=at_least_one, help="of run: processes at once; default one a core or GPU")
    return parser


def asked_of(
    name: str, parser: Parser, words: Sequence[str], *, kept: Path, table: Sequence[str] = ()
) -> argparse.Namespace:
    """The options, with the default of --out; one that does nothing ends the program, and so does a damaged file.

    Args:
        kept: the file of `keep`. table: options of `table`; all others are of `run`.
    """
    asked = parser.parse_args(words)
    for option, value in vars(asked).items():
        other = "run" if option not in table else "table"
        if value is not None and option != "what" and asked.what != other:
            parser.error(f"--{option} is for {other}, and does nothing for {asked.what}; leave it out")
    asked.out = asked.out or _out(name)
    try:
        read_kept(kept)
    except UserError as error:
        parser.error(str(error))
    return asked


def _out(name: str) -> Path:
    return Path("build") / name.replace("_", "-")


def at_least_one(word: str) -> int:
    """The whole number of a word, for argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError("a whole number from 1 is wanted")
    return int(word)


def some_of(parser: argparse.ArgumentParser, option: str, words: str | None, known: Sequence[str]) -> list[str]:
    """The names between the commas, by default all; one that is not known ends the program."""
    names = list(known) if words is None else words.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--{option}={unknown[0]}: there is no such {option[:-1]}; name some of {', '.join(known)}")
    return names


def folder_of(parser: argparse.ArgumentParser, data: Path | None) -> Path:
    """--data, which must be a folder."""
    if data is None or not data.is_dir():
        parser.error("run needs --data=DIR, a folder that is there")
    return data.resolve()


def measured_and_kept(
    parser: argparse.ArgumentParser, names: Sequence[str], measure: Callable[[str], Any], file: Path
) -> None:
    """Measure by name, and keep each in the file as soon as it is found; a stop or an error is one line."""
    for name in names:
        try:
            found = measure(name)
        except UserError as error:
            parser.error(f"{name}: {error}")
        except KeyboardInterrupt:
            stopped(parser, name)
        keep(file, {name: found})
        print(f"{name}: done", flush=True)


def stopped(parser: argparse.ArgumentParser, name: str) -> NoReturn:
    """One line after a Ctrl-C."""
    parser.exit(130, f"{name}: stopped; the same command goes on from there\n")


def made_with() -> MadeWith:
    """`provenance`, whose command names no folder of this machine: what is kept here is published."""
    made = provenance()
    words = shlex.split(made["command"])
    told = [
        "DIR" if before in ("--data", "--out") else re.sub("^(--data|--out)=.*", r"\1=DIR", word)
        for before, word in zip(["", *words], words, strict=False)
    ]
    return {**made, "command": shlex.join(told)}


def read_kept(file: Path) -> dict[str, Any]:
    """What was measured so far.

    Raises:
        UserError: the file is damaged.
    """
    try:
        kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if not isinstance(kept, dict):
            raise ValueError("it is no dictionary")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): give it back as it was, as by git checkout") from error
    return kept


def keep(file: Path, more: dict[str, Any]) -> None:
    """Write what was found beside what was kept; one process at a time."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the file itself is another one once it is written
        write_whole(file, json.dumps(read_kept(file) | more, indent=1) + "\n")
    finally:
        os.close(folder)
