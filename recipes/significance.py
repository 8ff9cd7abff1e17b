"""Which differences between variants are real? Intervals and paired tests over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from scipy.stats import t as student_t
from scipy.stats import ttest_rel

LEVEL = 0.05
"""Differences with a corrected p below this are called real."""

LEAST_SEEDS = 3
"""With fewer seeds no difference is tested: two have one degree of freedom."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values over seeds with mean, standard deviation and the half-width of the 95 % t-interval of the mean.

    Of one value the last is None: nothing is known of its spread.
    """
    count = len(values)
    std = statistics.stdev(values) if count > 1 else 0.0
    ci95 = float(student_t.ppf(0.975, count - 1)) * std / math.sqrt(count) if count > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "std": std, "ci95": ci95}


class Difference(NamedTuple):
    """Variant `better` against `worse`, paired over seeds.

    Attributes:
        mean: mean over seeds of the difference, never negative.
        ci95: half-width of its 95 % t-interval, not corrected for the number of comparisons.
        p: two-sided, of the paired t-test. p_holm: corrected by Holm for all differences of the family.
    """

    better: str
    worse: str
    mean: float
    ci95: float
    p: float
    p_holm: float

    @property
    def real(self) -> bool:
        return self.p_holm < LEVEL


def paired_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t-test; the same seed has the same place in both.

    Where every seed shows the same difference, as accuracies of few samples may, there is no spread to test by, and the
    sign test stands in: 2^(1 - seeds).
    """
    differences = {round(x - y, 12) for x, y in zip(a, b, strict=True)}
    if len(differences) > 1:
        return float(ttest_rel(a, b).pvalue)
    return 1.0 if differences == {0.0} else 2.0 ** (1 - len(a))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false claim among all stays below the level (Holm 1979)."""
    ranked = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(ranked):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def differences(
    groups: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]] | None = None
) -> list[Difference]:
    """The paired tests of a family, the surest first; none with fewer than three seeds.

    Args:
        groups: variant -> a value for each seed, in the order of the seeds.
        pairs: which variants are compared; default: all with all.
    """
    chosen = list(combinations(groups, 2)) if pairs is None else list(pairs)
    if not chosen or min(map(len, groups.values())) < LEAST_SEEDS:
        return []
    p_values = [paired_test(groups[a], groups[b]) for a, b in chosen]
    found = []
    for (a, b), p, p_holm in zip(chosen, p_values, holm(p_values), strict=True):
        apart = spread([x - y for x, y in zip(groups[a], groups[b], strict=True)])
        better, worse = (a, b) if apart["mean"] >= 0 else (b, a)
        found.append(Difference(better, worse, abs(apart["mean"]), apart["ci95"], p, p_holm))
    return sorted(found, key=lambda each: (each.p_holm, each.p, -each.mean))


def verdict(found: Sequence[Difference], *, of: str, noun: str, seeds: int, most: int = 4, brief: bool = False) -> str:
    """One plain sentence on which differences are real.

    Args:
        of: what was measured, such as "probe accuracy". noun: what differs, in the plural, such as "orders".
        most: differences named one by one.
        brief: without what the tests are and without the largest difference, for a sentence after another one.
    """
    if seeds < LEAST_SEEDS:
        given = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"With {given} no difference between {noun} can be told from noise: give three or more."
    if not found:
        return f"There are no two {noun} to compare."
    tested = f"{len(found)} paired comparison{'s' * (len(found) > 1)} over {seeds} seeds, Holm-corrected"
    real = [each for each in found if each.real]
    if not real and brief:
        return f"No difference between {noun} in {of} is larger than the noise."
    if not real:
        largest = max(found, key=lambda each: each.mean)
        return (
            f"No difference between {noun} in {of} is larger than the noise ({tested}); the largest, "
            f"{largest.better} over {largest.worse}, is {points(largest)}, p = {largest.p_holm:.2f}."
        )
    named = "; ".join(f"{each.better} > {each.worse} by {points(each)}, p = {each.p_holm:.2g}" for each in real[:most])
    more = f"; and {len(real) - most} more" if len(real) > most else ""
    rest = len(found) - len(real)
    others = f" The other {rest} difference{'s are' if rest > 1 else ' is'} within the noise." if rest else ""
    return f"In {of}: {named}{more}{'' if brief else f' ({tested})'}.{others}"


def against(found: Sequence[Difference], rival: str, what: str, *, called: str) -> str:
    """Plain sentences on a family in which objectives are tested against one rival: who beats it, who does worse.

    Args:
        rival: one side of every test; `called`: what it is called. what: was measured, such as "probe accuracy".
    """

    def told(each: Difference) -> tuple[str, str]:
        name, sign = (each.better, "+") if each.worse == rival else (each.worse, "-")
        return name, f"{sign}{points(each)}"

    real = [each for each in found if each.real]
    if not real:
        widest = max(found, key=lambda each: each.mean)
        name, by = told(widest)
        most = f"{name} differs most, by {by}, p = {widest.p_holm:.2f} after Holm's correction"
        return f"In {what} no objective differs from {called} by more than the noise; {most}."
    said = []
    for verb, side in (("beats", "worse"), ("does worse than", "better")):
        listed = [told(each) for each in real if getattr(each, side) == rival]
        if len(listed) == 1:
            said.append(f"Pre-training with {listed[0][0]} {verb} {called} in {what} by {listed[0][1]}.")
        elif listed:
            named = ", ".join(f"{name} by {by}" for name, by in listed)
            said.append(f"Pre-training {verb} {called} in {what} with {named}.")
    if rest := len(found) - len(real):
        said.append(f"The other {'difference is' if rest == 1 else f'{rest} differences are'} within the noise.")
    return " ".join(said)


def points(difference: Difference) -> str:
    """ "2.1 ± 0.9 points": of a hundred."""
    return f"{100 * difference.mean:.1f} ± {100 * difference.ci95:.1f} points"
