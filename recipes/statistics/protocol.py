"""What a comparison declared before it ran, look by look, and what looking more than once costs.

`protocol.json` in the folder of a comparison holds task, recipe and its looks, each with its date, variants and seeds.
It is written before the first run. The same declaration again, after a stop or out of curiosity, is no new look: it
gives the same figures. Any other one is a further look: more seeds, other variants, some left out, other options of
the measure.

What a look is corrected for:

  looks   Look k may spend 6 / (pi k)^2 of the level: 61 %, 15 %, 7 % and so on, which add up to all of it however many
          looks follow. By the union bound the chance of any false claim in any report stays below the level, whatever
          made somebody look again (alpha spending: Lan and DeMets 1983; with a fixed sequence for looks without end:
          Foster and Stine 2008). Bonferroni over the looks taken so far would not do: the reports before it are out.
  family  Holm within a look, in which every test that the folder's variants ever made possible counts; those that the
          look leaves out count as if they had p = 1.
  seeds   A look uses every seed that all its variants were run with, those that its command leaves out too. So neither
          a bad seed nor a bad variant is dropped without being counted.

tests/recipes/statistics/test_protocol.py simulates three looks at the winner with added seeds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field, ValidationError

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.checkpoint import disk_errors, write_whole
from recipes.statistics.significance import LEVEL, Correction

NAME = "protocol.json"

_FOLDER = re.compile(r"(.+)-seed(\d+)-[0-9a-f]{12}")


class Declared(BaseModel):
    """One look as it was declared.

    Attributes:
        date: of the declaration, YYYY-MM-DD.
        variants: name -> digest of its config, without the seed; "" of runs that were found and are not known by more
            than their folder's name.
        seeds: as they were given.
        measure: digest of what is measured and how; "" where it is not known.
        found: the runs lay there before there was a protocol.
    """

    model_config = FROZEN

    date: str
    variants: dict[str, str]
    seeds: tuple[int, ...] = Field(min_length=1)
    measure: str
    found: bool = False

    def same(self, other: Declared) -> bool:
        """Whether both declare the same, whenever and in whatever order. A measure that is not known may be any."""
        return (
            self.variants == other.variants
            and set(self.seeds) == set(other.seeds)
            and (self.measure == other.measure or "" in (self.measure, other.measure))
        )

    def within(self, other: Declared) -> bool:
        """Whether all of its variants and seeds are among those of the other."""
        return self.variants.items() <= other.variants.items() and set(self.seeds) <= set(other.seeds)


class Protocol(BaseModel):
    """The file."""

    model_config = FROZEN

    task: str
    recipe: str
    looks: tuple[Declared, ...]


class Look(NamedTuple):
    """The look that a report is of.

    Attributes:
        number: from 1. looks: how many were ever declared in the folder.
        seeds: that all variants of the look have: those that it names, then those of earlier looks that it leaves out.
        ever: how many variants were ever declared in the folder.
        notes: sentences on what was added and what was left out; none for a first look alone.
    """

    number: int
    looks: int
    seeds: tuple[int, ...]
    ever: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the level, that this look may spend."""
        return spends(self.number)

    def pairs(self) -> Correction:
        """For tests of all variants with each other."""
        return Correction(self.ever * (self.ever - 1) // 2, self.share)

    def controls(self) -> Correction:
        """For tests of every variant against a control of its own, or against one that is no variant."""
        return Correction(self.ever, self.share)

    def rivals(self) -> Correction:
        """For tests of the variants against one of them."""
        return Correction(self.ever - 1, self.share)

    def told(self) -> str:
        """What the tests are corrected for, in words."""
        return (
            f"for all of the {self.ever} ever declared in this folder and for looking more than once (look "
            f"{self.number} spends {LEVEL * self.share:.2g} of the level {LEVEL})"
        )


def alone(variants: int, seeds: Sequence[int]) -> Look:
    """The first look at a folder of its own."""
    return Look(1, 1, tuple(seeds), variants)


def spends(number: int) -> float:
    """Of the level, for look `number` from 1: 6 / (pi number)^2. All shares add up to 1."""
    return 6 / (math.pi * number) ** 2


def read(out: Path) -> Protocol | None:
    """The protocol of a folder, or None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = out / NAME
    if not file.exists():
        return None
    try:
        return Protocol.model_validate_json(file.read_text())
    except (ValidationError, ValueError) as error:
        raise UserError(
            f"{file} is damaged: restore it, or name another folder with out=DIR; without it looks can't be counted"
        ) from error


Claim = tuple[int, int]
"""Inode and time (ns) of a file of a protocol: every command that declares something writes it anew."""


def write(protocol: Protocol, out: Path) -> Claim:
    """Write it, whole or not at all."""
    with disk_errors(out / NAME):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / NAME, json.dumps(protocol.model_dump(mode="json"), indent=1) + "\n")
        return claimed(out / NAME)


def claimed(file: Path) -> Claim:
    """Tells whether another command has written a file since."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def declare(
    before: Protocol | None, now: Declared, *, task: str, recipe: str, found: Declared | None, measured: bool
) -> tuple[Protocol, int]:
    """The protocol with this declaration, and the number of its look.

    Args:
        found: runs that lie in the folder, where it has no protocol.
        measured: whether any run of the folder is finished; until then nobody can have looked at anything, and what
            was declared is replaced.
    """
    looks = () if before is None or not measured else before.looks
    if before is None and found is not None:
        looks = (found,)
    for place, look in enumerate(looks):
        if look.same(now):
            return Protocol(task=task, recipe=recipe, looks=looks), place + 1
    return Protocol(task=task, recipe=recipe, looks=(*looks, now)), len(looks) + 1


def today() -> str:
    """YYYY-MM-DD."""
    return date.today().isoformat()


def found_runs(folders: Sequence[Path], known: Mapping[str, tuple[str, int]], digests: Mapping[str, str]) -> Declared:
    """The runs of a folder without a protocol, as a look.

    Args:
        folders: of the runs. known: name of a folder -> (variant, seed), of those that the command at hand would find.
        digests: variant of the command -> its digest.
    """
    variants, seeds = {}, set()
    for folder in folders:
        told = _FOLDER.fullmatch(folder.name)
        if folder.name in known:
            name, seed = known[folder.name]
            variants[name] = digests[name]
        elif told is not None:
            name, seed = told[1], int(told[2])
            variants.setdefault(name, "")
        else:
            continue
        seeds.add(seed)
    return Declared(date=today(), variants=variants, seeds=tuple(sorted(seeds)), measure="", found=True)


def look_at(protocol: Protocol, number: int, has: Mapping[str, set[int]]) -> Look:
    """What the report of a look may use, and what it must say.

    Args:
        has: variant of the look -> seeds that it has finished runs of, whatever declared them.
    """
    now = protocol.looks[number - 1]
    earlier = protocol.looks[:number]
    declared = {seed for look in earlier for seed in look.seeds}
    of_all = set.intersection(*has.values()) if has else set()
    kept = sorted((declared & of_all) - set(now.seeds))
    seeds = {*now.seeds, *kept}
    ever = {digest or name: name for look in protocol.looks for name, digest in look.variants.items()}
    here = {digest or name for name, digest in now.variants.items()}
    left_out = [name for key, name in ever.items() if key not in here]
    notes = []
    if number > 1:
        first = earlier[:-1]
        notes.append(f"This is look {number}: before it, {'; '.join(map(_told, first))}.")
    if len(protocol.looks) > number:
        notes.append(f"There were further looks: {'; '.join(map(_told, protocol.looks[number:]))}.")
    if left_out:
        notes.append(f"Left out and still counted: {', '.join(left_out)}.")
    if kept:
        notes.append(f"{_seeds(kept)} of an earlier look {_is(kept)} not named now and still counted.")
    some = {name: sorted((own & declared) - seeds) for name, own in has.items()}
    if unequal := {name: own for name, own in some.items() if own}:
        told = "; ".join(f"{name} alone has {_seeds(own).lower()}" for name, own in unequal.items())
        notes.append(f"Not all variants have the same seeds, and what only some have is not used: {told}.")
    if missing := sorted(declared - seeds - {seed for own in some.values() for seed in own}):
        notes.append(f"{_seeds(missing)} of an earlier look {_is(missing)} not finished for these variants.")
    return Look(number, len(protocol.looks), (*now.seeds, *kept), len(ever), tuple(notes))


def _told(look: Declared) -> str:
    when = "runs found on" if look.found else "declared on"
    return f"{', '.join(look.variants)} with {_seeds(look.seeds).lower()} ({when} {look.date})"


def _seeds(seeds: Sequence[int]) -> str:
    return f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _is(seeds: Sequence[int]) -> str:
    return "is" if len(seeds) == 1 else "are"
