"""What nepa finetune folds= shows: every fold's figures, their mean and their spread."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from nepa_core.runtime.run import Run
from recipes.networks.goals import AVERAGED, FIGURES
from recipes.report.finetune import start_of
from recipes.report.page import Answer, Links, Part, Report, Table, Words
from recipes.report.summaries import FoldSpread, FoldsSummary
from recipes.report.tables import text_table

PREFIX = "fold-"
"""Of the folders of folds."""

HOW = (
    "The spread is the sample standard deviation over folds. It is no standard error: any two folds share training "
    "samples."
)


def folder_of(run: Run, fold: str) -> Run:
    """The run of a fold, RUN/fold-NAME."""
    return Run(run.path / f"{PREFIX}{re.sub(r'[^a-zA-Z0-9_.-]+', '_', fold)}")


class _Column(NamedTuple):
    """A figure over folds, and how its values are written: one number of digits for all."""

    title: str
    form: str
    figure: FoldSpread

    @property
    def values(self) -> list[str]:
        """Of every fold."""
        return [format(value, self.form) for value in self.figure["values"]]

    @property
    def mean(self) -> str:
        return format(self.figure["mean"], self.form)

    @property
    def spread(self) -> str:
        """Without a sign."""
        return format(self.figure["std"], self.form.removeprefix("+"))


def _figure(title: str, form: str, figure: FoldSpread) -> _Column:
    if form.endswith("g"):  # significant digits: those of the largest, in decimals
        digits, largest = int(form[1:-1]), max(map(abs, figure["values"]))
        form = f".{max(digits - 1 - math.floor(math.log10(largest)), 0) if largest > 0 else digits}f"
    return _Column(title, form, figure)


def _margin(name: str, figure: FoldSpread, metric: str) -> _Column:
    if metric == "r2":
        return _Column(f"R2 over {name}", "+.3f", figure)
    points: FoldSpread = {
        "values": [100 * value for value in figure["values"]],
        "mean": 100 * figure["mean"],
        "std": 100 * figure["std"],
    }
    return _Column(f"points over {name}", "+.2f", points)


def _margins(summary: FoldsSummary) -> list[_Column]:
    return [_margin(name, figure, summary.get("metric", "")) for name, figure in summary["margins"].items()]


def rows(summary: FoldsSummary) -> list[list[str]]:
    """Head, a row a fold, mean and spread."""
    columns: list[_Column] = []
    for shown in FIGURES:
        for key, title in ((shown.key, shown.title), (AVERAGED[shown.key], f"{shown.title}, averaged weights")):
            if key in summary["figures"]:
                columns.append(_figure(title, shown.form, summary["figures"][key]))
    columns += _margins(summary)
    lines = [["fold", "samples", *(each.title for each in columns)]]
    for fold, count, *values in zip(
        summary["folds"], summary["samples"], *(each.values for each in columns), strict=True
    ):
        lines.append([fold, f"{count:,}", *values])
    lines.append(["mean", "", *(each.mean for each in columns)])
    lines.append(["spread", "", *(each.spread for each in columns)])
    return lines


def answer(summary: FoldsSummary) -> str:
    """The first figure of the goal over folds, of the averaged weights where there are any."""
    shown = next(each for each in FIGURES if each.key in summary["figures"])
    averaged = AVERAGED[shown.key]
    of = ", averaged weights" if averaged in summary["figures"] else ""
    found = _figure(shown.title, shown.form, summary["figures"].get(averaged, summary["figures"][shown.key]))
    line = f"{found.title}{of}: {found.mean} ± {found.spread} over {len(summary['folds'])} folds, mean and spread"
    return f"{line}{''.join(f'; {each.mean} ± {each.spread} {each.title}' for each in _margins(summary))}."


def report(run: Run, summary: FoldsSummary) -> Report:
    """The mean, a table of all folds, and the way to the report of each."""
    lost = summary["unreadable_held_out"]
    unread = [f"{lost} held-out samples could not be read and were skipped; each fold names its own."] if lost else []
    start = f"Every fold started from {start_of(summary['init'])}."
    said = "\n".join([text_table(rows(summary)), "", start, *unread, HOW, "", answer(summary)])

    def parts() -> Iterator[Part]:
        yield Answer(answer(summary))
        yield Table(rows(summary))
        yield Words([start, *unread, HOW])
        pages = {fold: folder_of(run, fold).report / "index.html" for fold in summary["folds"]}
        yield Links([(f"fold {fold}", f"../{page.relative_to(run.path)}") for fold, page in pages.items()])

    return Report(f"Fine-tuning over folds: {run.path.name}", said, summary["made_with"], parts, "card.txt")
