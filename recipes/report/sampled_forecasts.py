"""What `nepa forecast samples=` prints, and its page: how good sampled futures are, and fans of a few.

A score is of one test window, so differences are paired and intervals are over stretches of time, as those of point
forecasts (`recipes.report.forecast`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from recipes.report.forecast import beside, grid, plus_minus, signed
from recipes.report.page import Answer, Figure, Heading, Part, Report, Table, Words
from recipes.report.plots import Fan, fan_plot, line_plot
from recipes.report.summaries import SampledRow, SampledSummary, ScoreDifference

NEPA_FLOW, RANDOM_FLOW = "NEPA, flow head", "random weights, flow head"
COLUMNS = {
    "CRPS": "crps",
    "pinball .1": "pinball_10",
    ".5": "pinball_50",
    ".9": "pinball_90",
    "in 50 %": "coverage_50",
    "in 90 %": "coverage_90",
}


class Drawn(Protocol):
    """`recipes.generation.futures.Scores`, as far as it is drawn."""

    @property
    def steps(self) -> Tensor: ...
    @property
    def fans(self) -> Tensor: ...
    @property
    def seen(self) -> Tensor: ...
    @property
    def truth(self) -> Tensor: ...


def cell(row: SampledRow, key: str) -> str:
    """A figure with half of its interval; shares in per cent."""
    figures: Mapping[str, Any] = row
    mean, half = figures[key], row["half"][key]
    if not key.startswith("coverage"):
        return plus_minus(mean, half)
    return f"{100 * mean:.0f}" + ("" if half is None else f" ± {100 * half:.0f}") + " %"


def table_of(summary: SampledSummary, horizon: str) -> list[list[str]]:
    """A head and a row of cells for each forecaster."""
    rows = [[row["name"], *(cell(row, key) for key in COLUMNS.values())] for row in summary["horizons"][horizon]]
    return [[f"{horizon} steps ahead", *COLUMNS], *rows]


def best_rival(differences: Sequence[ScoreDifference]) -> ScoreDifference:
    """Random weights apart, the one with the lowest CRPS."""
    return min((each for each in differences if each["rival"] != RANDOM_FLOW), key=lambda each: each["crps"])


def verdict(summary: SampledSummary) -> list[str]:
    """A sentence a horizon: the samples beside random weights and the best rival, and what else beats them."""
    lines = []
    for horizon, differences in summary["differences"].items():
        best = best_rival(differences)
        random = next(each for each in differences if each["rival"] == RANDOM_FLOW)
        also = [
            each["rival"]
            for each in differences
            if each not in (best, random) and each["half"] is not None and each["mean"] < -each["half"]
        ]
        more = f"; {' and '.join(also)} beat{'' if len(also) > 1 else 's'} them, too" if also else ""
        lines.append(
            f"{horizon} steps ahead samples of the pre-trained network {beside(random, 'random weights', 'CRPS')}, and "
            f"{beside(best, best['rival'], 'CRPS')}, the best rival{more}."
        )
    return [f"VERDICT  {lines[0]}", *lines[1:]]


def foot(summary: SampledSummary) -> list[str]:
    """What the figures are of."""
    counts = "; ".join(
        f"{horizon}: {count:,} of {summary['whole'][horizon]:,}, {summary['stretches'][horizon]} stretches"
        for horizon, count in summary["windows"].items()
    )
    seasons = {
        horizon: row["season"] for horizon, rows in summary["horizons"].items() for row in rows if "season" in row
    }
    repeated = ", ".join(f"{horizon}: {season}" for horizon, season in seasons.items())
    several = len(summary["runs"]) > 1
    seeds = f"Seed{'s' if several else ''} {', '.join(map(str, summary['seed']))}"
    return [
        f"CRPS and pinball loss (quantiles .1, .5, .9) of z-scored values, lower is better; shares of values within "
        f"central intervals. {summary['samples']} samples of each test window that was drawn ({counts}).",
        f"± is half of the 95 % interval over stretches of time as long as look-back and horizon"
        f"{', and over seeds' if several else ', for this pre-training alone'}; each horizon is judged by itself.",
        f"The network was trained on the {summary['places']} places of a look-back of {summary['look_back']} steps; "
        f"those behind it are new to it, not to the flow head ({summary['flow_steps']} steps). Residuals are of "
        f"validation windows. Season in steps: {repeated}. {seeds}.",
    ]


def report(folder: Path, summary: SampledSummary, drawn: Mapping[str, Mapping[str, Drawn]]) -> Report:
    """fan_H.png and steps_H.png of every horizon H. drawn: horizon -> row -> scores of the first run."""
    said = []
    for horizon in summary["horizons"]:
        head, *rows = table_of(summary, horizon)
        cells = {(row[0], column): value for row in rows for column, value in zip(head[1:], row[1:], strict=True)}
        said += [*grid(head[0], [row[0] for row in rows], head[1:], cells), ""]
    apart = {
        (f"{each['rival']} - NEPA", horizon): signed(each)
        for horizon, differences in summary["differences"].items()
        for each in differences
    }
    said += [*foot(summary), ""]
    said += [
        *grid("CRPS, rival - NEPA", list(dict.fromkeys(name for name, _ in apart)), [*summary["horizons"]], apart),
        "",
    ]
    said += verdict(summary)

    def parts() -> Iterator[Part]:
        first, *rest = verdict(summary)
        yield Answer(first)
        yield Words([*rest, *foot(summary)])
        for horizon, rows in drawn.items():
            best = best_rival(summary["differences"][horizon])["rival"]
            yield Heading(f"{horizon} steps ahead", f"h{horizon}")
            yield Table(table_of(summary, horizon))
            fans = {
                name: [
                    Fan(*each)
                    for each in zip(rows[name].seen, rows[name].truth, rows[name].fans.unbind(1), strict=True)
                ]
                for name in (NEPA_FLOW, best)
            }
            yield Figure(
                f"fan_{horizon}.png",
                "Some of the test windows, their first channel, z-scored: median, central intervals of 50 and 90 %, "
                f"and what came. Beside them the best rival, {best}.",
                fan_plot(fans),
            )
            steps = {name: (range(1, len(each.steps) + 1), each.steps.tolist()) for name, each in rows.items()}
            plot = line_plot(steps, x="steps ahead", y="CRPS", from_zero=True)
            yield Figure(f"steps_{horizon}.png", "CRPS at every step ahead, the mean over windows.", plot)

    return Report(f"Sampled forecasts of {folder.resolve().name}", "\n".join(said) + "\n", summary["made_with"], parts)
