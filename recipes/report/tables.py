"""Tables of comparisons: means with intervals, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from recipes.report.summaries import PretrainSummary
from recipes.statistics.credits import unpack_credits
from recipes.statistics.held_out import unpack_clusters
from recipes.statistics.significance import LEVEL, Credits, Difference, Spread, interval_of, points, shown_p, spread

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Variant -> what was measured, one a seed. Tables ask by name for keys of `recipes.report.summaries`."""

TESTED = (
    "Differences are paired over seeds, and over test samples where it is known what each adds. The noise of seeds is "
    "that of all variants of a table together, and more where a pair shows more. Real is a difference with both p "
    f"below {LEVEL}: over seeds, and over seeds and test samples together. Both are corrected for looks and, by Holm, "
    "for every test of the table that this folder's variants ever made possible; the intervals are not. Needed: from "
    "how many points on this difference alone would have been real."
)
"""How `difference_table` is to be read."""

_SIDES: Final = ("model", "linear")  # of a run's credits


class Column(NamedTuple):
    """A measure in a table: its key, its head, and how numbers are written."""

    key: str
    title: str
    form: str = ".3f"


def credits_of(rows: Rows, key: str) -> Credits | None:
    """What every test sample adds to one measure; None where a row of before has none, or samples differ."""
    every = [row for seeds in rows.values() for row in seeds]
    if not all(key in row.get("credits", {}) for row in every):
        return None
    clusters = {row.get("clusters", {}).get(key) for row in every}
    found = {name: [unpack_credits(row["credits"][key]) for row in seeds] for name, seeds in rows.items()}
    if len(clusters) > 1 or len({len(each) for seeds in found.values() for each in seeds}) > 1:
        return None
    return Credits({name: torch.stack(seeds) for name, seeds in found.items()}, *unpack_clusters(clusters.pop()))


def spreads(rows: Rows, key: str) -> dict[str, Spread]:
    """The spread of one measure over seeds, and over test samples where they are known, for every variant."""
    found = {}
    for name, seeds in rows.items():
        known = credits_of({name: seeds}, key)
        values = [float(row[key]) for row in seeds]
        found[name] = spread(values) if known is None else _spread(values, known, known.of[name])
    return found


def gain_spreads(rows: Rows, controls: Rows, key: str, control: str) -> dict[str, Spread]:
    """`spreads` of what every variant has over a control of its own; the measure may be called otherwise there."""
    found = {}
    for name, seeds in rows.items():
        values = [float(row[key]) - float(other[control]) for row, other in zip(seeds, controls[name], strict=True)]
        own, theirs = credits_of({name: seeds}, key), credits_of({name: controls[name]}, control)
        if own is None or theirs is None or own.of[name].shape != theirs.of[name].shape:
            found[name] = spread(values)
        else:
            found[name] = _spread(values, own, own.of[name] - theirs.of[name])
    return found


def _spread(values: Sequence[float], known: Credits, credits: Tensor) -> Spread:
    return spread(values, credits, known.clusters, chained=known.chained)


def margin(summaries: Sequence[PretrainSummary]) -> Spread | None:
    """How far pre-trained runs identify beyond the linear baseline, over seeds.

    Args:
        summaries: of the runs, one a seed.

    Returns:
        As `spread`, over seeds and held-out samples together where the summaries hold what single samples add under
        "credits"; None where a run has no such figures.
    """
    if not all("retrieval_top1" in each and "retrieval_top1_linear" in each for each in summaries):
        return None
    values = [each["retrieval_top1"] - each["retrieval_top1_linear"] for each in summaries]
    known = [each.get("credits") for each in summaries]
    if not all(each and each.get("model") and each.get("linear") for each in known):
        return spread(values)
    rows = [
        {"credits": {key: each[key] for key in _SIDES}, "clusters": dict.fromkeys(_SIDES, each.get("clusters"))}
        for each in known
        if each is not None
    ]
    own, linear = (credits_of({"": rows}, key) for key in _SIDES)
    if own is None or linear is None:
        return spread(values)
    return _spread(values, own, own.of[""] - linear.of[""])


def margin_cell(found: Spread | None) -> str:
    """ "+1.3 ± 0.4": points."""
    if found is None:
        return ""
    half = interval_of(found)
    return f"{100 * found['mean']:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def margin_note(margins: Mapping[str, Spread | None]) -> str:
    """What the intervals of `margin` cover."""
    if all(each is not None and "both" in each for each in margins.values()):
        over = "seeds and held-out samples together"
    else:
        over = "seeds alone"
    return f"Points over linear: of identification, beyond the linear baseline, with the 95 % interval over {over}."


def drawn(seeds: int, found: Sequence[Spread] = ()) -> str:
    """What the plots of a comparison show of every variant: the spreads `found`."""
    samples = _samples(found)
    if seeds == 1:
        return f"one seed{' and its 95 % interval over' if samples else ''}{samples}"
    return f"mean and 95 % interval over {seeds} seeds{' and' if samples else ''}{samples}, a dot a seed"


def interval_words(seeds: int, found: Sequence[Spread]) -> str:
    """What "mean ± half" is in the tables, as the beginning of a sentence."""
    samples = _samples(found)
    if seeds == 1:
        return f"One seed, with the 95 % interval over{samples} alone" if samples else "One seed"
    return f"Mean and 95 % interval over {seeds} seeds{f' and{samples} together' if samples else ' alone'}"


def _samples(found: Sequence[Spread]) -> str:
    known = sum("both" in each for each in found)
    return (
        "" if not known else " the test samples" if known == len(found) else " the test samples, where these were kept,"
    )


def groups(rows: Rows, key: str) -> dict[str, list[float]]:
    """One measure: variant -> a value for each seed."""
    return {name: [float(row[key]) for row in seeds] for name, seeds in rows.items()}


def spread_table(rows: Rows, columns: Sequence[Column]) -> list[list[str]]:
    """Head and a row a variant, mean ± half of the 95 % interval (over test samples, too, where they are known)."""
    lines = [["", *(column.title for column in columns)]]
    found = {column.key: spreads(rows, column.key) for column in columns}
    return lines + [[name, *(spread_cell(found[key][name], form) for key, _, form in columns)] for name in rows]


def spread_cell(found: Spread, form: str = ".3f") -> str:
    """ "0.912 ± 0.004": the mean and half of its widest interval, where one is known."""
    half = interval_of(found)
    return f"{found['mean']:{form}}" + ("" if half is None else f" ± {half:{form}}")


def difference_table(found: Sequence[Difference]) -> list[list[str]]:
    """Head and a row a paired test, see `TESTED`."""
    samples = any(each.both is not None for each in found)
    with_samples = ["p, and over samples"] if samples else []
    head = ["", "difference, 95 % interval", "needed", "p", "p, corrected", *with_samples, ""]
    rows = [
        [
            f"{each.better} > {each.worse}",
            points(each),
            f"{100 * each.needed:.1f}",
            shown_p(each.p),
            shown_p(each.p_holm),
            *(["" if each.p_both is None else shown_p(each.p_both)] if samples else []),
            "real" if each.real else "",
        ]
        for each in found
    ]
    return [head, *rows]


def labels_words(labels: int | str) -> str:
    """How many labels a fine-tuning had."""
    return "all labels" if labels == "all" else f"{labels} labels a class"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """As text: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = (
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)
