"""What the scripts of declared protocols share: their words, and figures that are kept one by one as they are found."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nepa_core.basics import UserError
from recipes.report.provenance import provenance
from recipes.report.summaries import MadeWith


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """`python -m benchmarks.NAME run|table` with --data, --out and --workers."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("build") / name.replace("_", "-")
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="of run: folder of all data")
    parser.add_argument("--out", type=Path, default=out, help=f"default {out}")
    parser.add_argument("--workers", type=int, help="processes at once; default one a core, or one a GPU")
    return parser


def some_of(parser: argparse.ArgumentParser, option: str, words: str, known: Sequence[str]) -> list[str]:
    """The names between the commas; one that is not known ends the program."""
    names = words.split(",")
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
    """What was measured so far."""
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return kept


def keep(file: Path, more: dict[str, Any]) -> None:
    """Write what was found beside what was kept."""
    file.write_text(json.dumps(read_kept(file) | more, indent=1) + "\n")
