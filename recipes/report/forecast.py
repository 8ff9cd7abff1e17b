"""What `nepa forecast` prints: the table, the differences to what needs no pre-training, and the verdict.

A difference is that of the squared errors of the same test windows. Windows overlap, and what happens at one time
happens to all channels, so an interval is over stretches of time (`nepa_core.verdict.intervals`).

Shapes: W test windows, K seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Final, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch
from nepa_core.verdict.drawing import spans_of
from nepa_core.verdict.intervals import Interval, over_both
from recipes.report.summaries import ErrorDifference, ForecastSummary, ScoreDifference
from recipes.statistics.significance import spread

ERRORS: Final = ("mse", "mae")
LINEAR, PERSISTENCE, DLINEAR = "linear on the raw window", "persistence", "DLinear"
UNTRAINED = {"frozen": "frozen, random weights", "fine-tuned": "fine-tuned, random weights"}
"""Rows with pre-trained weights, and the same rows without."""

Differences = Mapping[str, Sequence[ErrorDifference]]
"""Horizon -> `paired_differences`."""


def stretches(windows: Dataset[Batch]) -> Tensor:
    """The stretch of time that each window starts in, all channels together: [W] int64, numbers from 0.

    Stretches are equal, and at least as long as a look-back with its horizon, so that windows share values with those
    of their own stretch and the next alone, which `intervals.over_samples(chained=True)` counts in. Windows whose data
    set has no `spans()` are taken to begin one step apart.
    """
    if (spans := spans_of(windows)) is not None:
        after, length = spans.first - spans.first.min(), int((spans.end - spans.first).max())
    else:
        first = windows[0]
        after, length = torch.arange(len(cast(Sized, windows))), len(first["series"]) + len(first["future"])
    span = int(after.max()) + 1
    return after * max(1, span // length) // span


def paired_differences(errors: Mapping[str, Tensor], clusters: Tensor) -> list[ErrorDifference]:
    """Rival minus pre-trained, in MSE, for every pair that is there: above 0 the pre-trained row is better.

    Args:
        errors: name of a row -> squared errors [K, W]. clusters: [W], see `stretches`.
    """
    found = []
    for row, untrained in UNTRAINED.items():
        rivals = [rival for rival in (untrained, LINEAR, PERSISTENCE, DLINEAR) if row in errors and rival in errors]
        for rival in rivals:
            apart = over_both(errors[rival].double() - errors[row].double(), clusters, chained=True)
            mse = float(errors[rival].double().mean())
            found.append(ErrorDifference(row=row, rival=rival, mse=mse, mean=apart.mean, half=apart.half, df=apart.df))
    return found


def render(summaries: Sequence[ForecastSummary], apart: Differences) -> str:
    """The table as text, of one run, or mean ± standard deviation over several; and what it says.

    Args:
        apart: over all of these runs.
    """
    first = summaries[0]
    horizons = list(first["horizons"])
    names = list(dict.fromkeys(row["name"] for rows in first["horizons"].values() for row in rows))
    cells = {
        (row["name"], horizon): " / ".join(cell(figures(summaries, horizon, number, key)) for key in ERRORS)
        for horizon, rows in first["horizons"].items()
        for number, row in enumerate(rows)
    }
    pairs = {
        (f"{each['rival']} - {each['row']}", horizon): signed(each) for horizon in horizons for each in apart[horizon]
    }
    chosen = [f"{h}: {row['readout']}" for h, rows in first["horizons"].items() for row in rows[:1]]
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    foot = [
        f"z-scored values, look-back {first['look_back']}, {_scored(first)}; fitted on at most "
        f"{first['fit_samples']} training windows, networks for {first['finetune_steps']} steps.",
        f"Mean ± standard deviation over seeds {seeds}." if len(summaries) > 1 else f"Seed {seeds}.",
        f"Frozen read-out chosen on validation data (seed {first['seed']}): {'; '.join(chosen)}.",
    ]
    return "\n".join(
        [
            *grid("MSE / MAE", names, horizons, cells),
            "",
            *foot,
            "",
            *grid("MSE, rival - row", list(dict.fromkeys(name for name, _ in pairs)), horizons, pairs),
            "",
            *verdict(summaries, apart),
        ]
    )


def grid(corner: str, names: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], str]) -> list[str]:
    """Lines of a table whose cells are found by row and column."""
    width, column = max(map(len, (corner, *names))), max(map(len, (*cells.values(), *columns)))
    lines = [f"{corner:<{width}}" + "".join(f"  {each:>{column}}" for each in columns)]
    rows = (f"{name:<{width}}" + "".join(f"  {cells.get((name, c), ''):>{column}}" for c in columns) for name in names)
    return [*lines, *(row.rstrip() for row in rows)]


def verdict(summaries: Sequence[ForecastSummary], apart: Differences) -> list[str]:
    """Sentences: pre-trained weights beside random ones and beside the best baseline, and what the intervals cover."""
    lines = []
    for row, untrained in UNTRAINED.items():
        for horizon, pairs in apart.items():
            of_row = {each["rival"]: each for each in pairs if each["row"] == row}
            if not of_row:
                continue
            best = min((each for rival, each in of_row.items() if rival != untrained), key=lambda each: each["mse"])
            lines.append(
                f"{horizon} steps ahead {row} pre-trained weights {beside(of_row[untrained], 'random weights')}, and "
                f"{beside(best, best['rival'])}, the best baseline."
            )
    return [f"VERDICT  {lines[0]}", *lines[1:], covers(summaries)]


def covers(summaries: Sequence[ForecastSummary]) -> str:
    """What the intervals say and what they don't."""
    first = summaries[0]
    counts = ", ".join(f"{horizon}: {count}" for horizon, count in first["stretches"].items())
    over = "the test windows alone; another pre-training may differ"
    if len(summaries) > 1:
        over = f"seeds and test windows together ({len(summaries)} seeds)"
    return (
        f"Intervals (95 %) are over {over}. Windows overlap, so they count by stretches of time as long as look-back "
        f"and horizon, all channels together ({counts}). Each horizon is judged by itself."
    )


def beside(difference: ErrorDifference | ScoreDifference, rival: str, error: str = "MSE") -> str:
    """Such as "beat random weights (MSE lower by 0.0040 ± 0.0012)"."""
    interval = Interval(difference["mean"], difference["half"], difference["df"])
    by = f"{error} {'lower' if interval.mean >= 0 else 'higher'} by {plus_minus(abs(interval.mean), interval.half)}"
    if interval.half is None:
        return f"can't be judged beside {rival} ({by}, too few stretches of time for an interval)"
    verb = "beat" if interval.above else "are beaten by" if interval.below else "are level with"
    return f"{verb} {rival} ({by})"


def signed(difference: ErrorDifference | ScoreDifference) -> str:
    """With its sign and half-width."""
    return ("+" if difference["mean"] >= 0 else "") + plus_minus(difference["mean"], difference["half"])


def _scored(summary: ForecastSummary) -> str:
    """Which test windows the figures are of; those of independent channels count one by one."""
    lost = {horizon: count for horizon, count in summary["left_out"].items() if count}
    counts = "; ".join(
        f"{horizon}: {summary['windows'][horizon]} scored, {count} left out" for horizon, count in lost.items()
    )
    return f"test windows without the gaps of missing values ({counts})" if lost else "every test window"


# ------------------------------------------------------------------------------------------------------ numbers


def figures(summaries: Sequence[ForecastSummary], horizon: str, row: int, key: Literal["mse", "mae"]) -> list[float]:
    """One figure of every run."""
    return [summary["horizons"][horizon][row][key] for summary in summaries]


def cell(values: Sequence[float]) -> str:
    """An error, or mean ± standard deviation of several."""
    found = spread(values)
    return significant(found["mean"]) + (f" ± {_alike(found['std'], found['mean'])}" if len(values) > 1 else "")


def significant(value: float, digits: int = 3) -> str:
    """ "1.335", "0.437", "0.0124", "7.00e-13": as many decimals as digits, or more where a number is small."""
    if not value or not math.isfinite(value):
        return f"{value:.{digits}f}"
    decimals = _decimals(value, digits)
    return f"{value:.{decimals}f}" if decimals < digits + 4 else f"{value:.{digits - 1}e}"


def _decimals(value: float, digits: int) -> int:
    return max(digits, digits - 1 - math.floor(math.log10(abs(value))))


def _alike(std: float, mean: float) -> str:
    """With the decimals of the mean, or a digit of its own where these would make it zero."""
    decimals = _decimals(mean, 3) if mean and math.isfinite(mean) else 3
    text = f"{std:.{decimals}f}"
    return text if decimals < 7 and (float(text) or not std) else f"{std:.1g}"


def plus_minus(mean: float, half: float | None) -> str:
    """The half-width with two digits, the mean with as many decimals, or those that its first digit needs."""
    if half is None or not half or not math.isfinite(half):
        return significant(mean) + ("" if half is None else f" ± {significant(half)}")
    decimals = max(1 - math.floor(math.log10(half)), -math.floor(math.log10(abs(mean))) if mean else 0, 0)
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}" if decimals < 7 else f"{mean:.1e} ± {half:.1e}"
