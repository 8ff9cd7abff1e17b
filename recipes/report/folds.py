"""What nepa finetune folds= shows: every fold's figures, their mean and their spread."""

from __future__ import annotations

from collections.abc import Iterator

from nepa_core.runtime.run import Run
from recipes.networks.goals import AVERAGED, FIGURES
from recipes.report.finetune import start_of
from recipes.report.page import Answer, Part, Report, Table, Words
from recipes.report.summaries import FoldSpread, FoldsSummary
from recipes.report.tables import text_table

HOW = (
    "The spread is the sample standard deviation over folds. It is no standard error: any two folds share training "
    "samples. Each fold has a report of its own, in its folder."
)


def rows(summary: FoldsSummary) -> list[list[str]]:
    """Head, a row a fold, mean and spread."""
    columns: list[tuple[str, str, FoldSpread]] = []
    for shown in FIGURES:
        for key, title in ((shown.key, shown.title), (AVERAGED[shown.key], f"{shown.title}, averaged weights")):
            if key in summary["figures"]:
                columns.append((title, shown.form, summary["figures"][key]))
    form = _margin_form(summary)
    columns += [(f"more than {name}", form, margin) for name, margin in summary["margins"].items()]
    lines = [["fold", "samples", *(title for title, _, _ in columns)]]
    for place, (fold, count) in enumerate(zip(summary["folds"], summary["samples"], strict=True)):
        lines.append([fold, f"{count:,}", *(format(each["values"][place], form) for _, form, each in columns)])
    lines.append(["mean", "", *(format(each["mean"], form) for _, form, each in columns)])
    lines.append(["spread", "", *(format(each["std"], form) for _, form, each in columns)])
    return lines


def _margin_form(summary: FoldsSummary) -> str:
    return "+.3f" if summary.get("metric") == "r2" else "+.2%"


def answer(summary: FoldsSummary) -> str:
    """The first figure of the goal over folds, of the averaged weights where there are any."""
    shown = next(each for each in FIGURES if each.key in summary["figures"])
    averaged = AVERAGED[shown.key]
    found = summary["figures"].get(averaged, summary["figures"][shown.key])
    of = ", averaged weights" if averaged in summary["figures"] else ""
    line = f"{shown.title}{of}: {found['mean']:{shown.form}} ± {found['std']:{shown.form}}"
    line += f" over {len(summary['folds'])} folds, mean and spread"
    form = _margin_form(summary)
    for name, margin in summary["margins"].items():
        line += f"; {margin['mean']:{form}} ± {margin['std']:{form[1:]}} beside {name}"
    return f"{line}."


def report(run: Run, summary: FoldsSummary) -> Report:
    """The mean, and a table of all folds."""
    lost = summary["unreadable_held_out"]
    unread = [f"{lost} held-out samples could not be read and were skipped; each fold names its own."] if lost else []
    start = f"Every fold started from {start_of(summary['init'])}."
    said = "\n".join([text_table(rows(summary)), "", start, *unread, HOW, "", answer(summary)])

    def parts() -> Iterator[Part]:
        yield Answer(answer(summary))
        yield Table(rows(summary))
        yield Words([start, *unread, HOW])

    return Report(f"Fine-tuning over folds: {run.path.name}", said, summary["made_with"], parts, "card.txt")
