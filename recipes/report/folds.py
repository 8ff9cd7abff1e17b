"""What nepa finetune folds= shows: every fold's figures, their mean and their spread."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from nepa_core.basics import some
from nepa_core.runtime.run import Run
from recipes.networks.goals import AVERAGED, FIGURES
from recipes.report.finetune import start_of
from recipes.report.page import Answer, Links, Part, Report, Table, Words
from recipes.report.summaries import FoldSpread, FoldsSummary
from recipes.report.tables import text_table

FOLD = "fold-"
"""How the folder of a fold begins."""

HOW = (
    "The spread is the sample standard deviation over folds. It is no standard error: any two folds share training "
    "samples."
)


def folder_of(run: Run, fold: str) -> Run:
    """The run of a fold, RUN/fold-NAME."""
    return Run(run.path / (FOLD + re.sub(r"[^\w.-]+", "_", fold)))


class Column(NamedTuple):
    """A figure of every fold, its mean and its spread, all in one unit and with as many digits.

    Attributes:
        title: without the unit, `unit`: "%", "points" or "".
        signed: it is a difference, which its spread is not.
    """

    title: str
    unit: str
    found: FoldSpread
    digits: int
    signed: bool = False

    def mean(self) -> str:
        return self.written(self.found["mean"])

    def spread(self) -> str:
        return f"{self._scaled(self.found['std']):.{self.digits}f}"

    def written(self, value: float) -> str:
        return f"{self._scaled(value):{'+' if self.signed else ''}z.{self.digits}f}"

    def _scaled(self, value: float) -> float:
        return 100 * value if self.unit else value


def columns_of(summary: FoldsSummary) -> list[Column]:
    """The figures of the goal, then how far each fold is ahead of the control and of others."""
    columns = []
    for shown in FIGURES:
        for key, title in ((shown.key, shown.title), (AVERAGED[shown.key], f"{shown.title}, averaged weights")):
            if key in summary["figures"]:
                found, unit = summary["figures"][key], "%" if shown.form.endswith("%") else ""
                columns.append(Column(title, unit, found, _digits(shown.form, found["values"])))
    unit, digits = ("", 3) if summary.get("metric") == "r2" else ("points", 2)
    for name, margin in summary["margins"].items():
        columns.append(Column(f"more than {name}", unit, margin, digits, signed=True))
    return columns


def _digits(form: str, values: list[float]) -> int:
    """Digits behind the point; where the form counts those that tell ("g"), so many of the largest value."""
    count = int(form.strip(".%fg"))
    if not form.endswith("g"):
        return count
    largest = max(map(abs, values))
    return max(count - 1 - math.floor(math.log10(largest)), 0) if 0 < largest < math.inf else count


def rows(summary: FoldsSummary) -> list[list[str]]:
    """Head, a row a fold, mean and spread."""
    columns = columns_of(summary)
    lines = [["fold", "samples", *(f"{each.title}, {each.unit}".removesuffix(", ") for each in columns)]]
    for place, (fold, count) in enumerate(zip(summary["folds"], summary["samples"], strict=True)):
        lines.append([fold, f"{count:,}", *(each.written(each.found["values"][place]) for each in columns)])
    lines.append(["mean", "", *(each.mean() for each in columns)])
    lines.append(["spread", "", *(each.spread() for each in columns)])
    return lines


def answer(summary: FoldsSummary) -> str:
    """The first figure of the goal over folds, of the averaged weights where there are any."""
    first, *others = columns_of(summary)
    if others and others[0].title == f"{first.title}, averaged weights":
        first = others[0]
    line = f"{first.title}: {_within(first)} over {len(summary['folds'])} folds, mean and spread"
    ahead = [f"{_within(each)} beside {each.title.removeprefix('more than ')}" for each in others if each.signed]
    return f"{'; '.join([line, *ahead])}."


def _within(column: Column) -> str:
    """ "83.25 ± 1.20 %"."""
    return f"{column.mean()} ± {column.spread()} {column.unit}".rstrip()


def report(run: Run, summary: FoldsSummary) -> Report:
    """The mean, a table of all folds, and where the report of each lies."""
    lost = summary["unreadable_held_out"]
    notes = [f"{lost} held-out samples could not be read and were skipped; each fold names its own."] if lost else []
    for name, folds in summary.get("lacking", {}).items():
        which = f"folds {some(folds)} have" if len(folds) > 1 else f"fold {folds[0]} has"
        notes.append(f"No margin over {name} is shown, as {which} none.")
    start = f"Every fold started from {start_of(summary['init'])}."
    own = f"Each fold has a report of its own: {folder_of(run, summary['folds'][0]).report / 'index.html'} and so on."
    said = "\n".join([text_table(rows(summary)), "", start, *notes, HOW, own, "", answer(summary)])

    def parts() -> Iterator[Part]:
        yield Answer(answer(summary))
        yield Table(rows(summary))
        pages = {f"fold {fold}": f"../{folder_of(run, fold).path.name}/report/index.html" for fold in summary["folds"]}
        yield Links("The reports of the folds:", pages)
        yield Words([start, *notes, HOW])

    return Report(f"Fine-tuning over folds: {run.path.name}", said, summary["made_with"], parts, "card.txt")
