"""The report of `nepa transfer`: the matrix of differences, the probes behind it, the paired tests."""

from __future__ import annotations

from collections.abc import Iterator

from recipes.report.page import Answer, Figure, Heading, Part, Report, Table, Words
from recipes.report.plots import interval_plot
from recipes.report.summaries import TransferSummary
from recipes.report.tables import (
    TESTED,
    difference_table,
    drawn,
    interval_words,
    margin_cell,
    spread_cell,
    text_table,
)
from recipes.statistics.significance import Difference, Spread


def render(summary: TransferSummary) -> str:
    """The matrix, the probes and the answer as text."""
    return "\n".join(
        [text_table(matrix(summary)), "", text_table(probes(summary)), "", *foot(summary), "", *summary["verdict"]]
    )


def matrix(summary: TransferSummary) -> list[list[str]]:
    """A row a way of training together, a column a part: points over the part alone."""
    parts = summary["parts"]
    ways = dict.fromkeys(way for part in parts for way in summary["gains"][part])
    return [
        ["minus alone, in points", *parts],
        *([way, *(_cell(summary, part, way) for part in parts)] for way in ways),
    ]


def _cell(summary: TransferSummary, part: str, way: str) -> str:
    """With the interval of the paired test, or of too few seeds that of the differences alone."""
    for each in (Difference(**each) for each in summary["differences"][part]):
        if way in (name.removesuffix(f" of {part}") for name in (each.better, each.worse)):
            sign = -1 if each.better.endswith("alone") else 1
            return f"{100 * sign * each.mean:+.1f} ± {100 * each.half:.1f}"
    return margin_cell(summary["gains"][part].get(way))


def probes(summary: TransferSummary) -> list[list[str]]:
    """A row a variant, a column a part."""
    parts = summary["parts"]
    names = dict.fromkeys(name for part in parts for name in summary["probes"][part])

    def cell(found: Spread | None) -> str:
        return "" if found is None else spread_cell(found)

    rows = [
        [name, str(summary["steps"][name]), *(cell(summary["probes"][part].get(name)) for part in parts)]
        for name in names
    ]
    random = ["random weights", "0", *(cell(summary["random"][part]) for part in parts)]
    raw = ["raw tokens", "", *(f"{summary['raw'][part]:.3f}" for part in parts)]
    return [["probe", "steps", *parts], *rows, random, raw]


def foot(summary: TransferSummary) -> list[str]:
    """What the numbers are."""
    every = [each for part in summary["parts"] for each in summary["probes"][part].values()]
    metrics = ", ".join(f"{part} {metric}" for part, metric in summary["metrics"].items())
    return [
        f"{interval_words(len(summary['seeds']), every)}, on held-out data: {metrics}. The probe's layer is chosen on "
        "held-back training samples. A point is 0.01.",
        "Same cost: as many steps, of as many samples, as each part alone. Own steps: as many samples of each part as "
        "alone. All have the same network, and tokens of the same form.",
    ]


def report(summary: TransferSummary) -> Report:
    """The answer, the matrix, a picture a part, the paired tests."""
    title = f"Transfer: {summary['recipe']}"
    return Report(title, render(summary), summary["made_with"], lambda: _pages(summary))


def _pages(summary: TransferSummary) -> Iterator[Part]:
    yield Answer(summary["verdict"][0])
    yield Words(summary["verdict"][1:])
    yield Table(matrix(summary))
    yield Table(probes(summary))
    yield Words(foot(summary))
    for part in summary["parts"]:
        found, metric = summary["probes"][part], summary["metrics"][part]
        yield Figure(
            f"{part}.png",
            f"The probe of {part}: {drawn(len(summary['seeds']), list(found.values()))}.",
            interval_plot(
                found,
                x=f"probe of {part}, {metric}",
                reference={"random weights": summary["random"][part]["mean"], "raw tokens": summary["raw"][part]},
                metric=metric,
            ),
        )
    tests = {part: [Difference(**each) for each in found] for part, found in summary["differences"].items()}
    if any(tests.values()):
        yield Heading("Paired tests", "tests")
        yield Words([TESTED])
    for part, found_tests in tests.items():
        if found_tests:
            yield Words([f"{part}:"])
            yield Table(difference_table(found_tests))
