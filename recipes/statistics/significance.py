"""Which differences between variants are real? Intervals and paired tests over seeds, and over test samples with them.

Shapes: K seeds, S test samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from scipy.stats import t as student_t
from torch import Tensor

from nepa_core.verdict.intervals import Interval, over_both, over_samples

LEVEL = 0.05
"""Differences with a corrected p below this are called real."""

FAMILIES = "Every measure is a family of its own, corrected alone: the more measures, the more are found by chance."
"""What is not corrected for."""

LEAST_SEEDS = 3
"""With fewer seeds no difference is tested: two have one degree of freedom."""


class Correction(NamedTuple):
    """What the tests of a family are corrected for beside their own number.

    Attributes:
        tests: that ever belonged to the family, where these are more than are made now; the others count as p = 1.
        share: of the level, that this look at the data may spend.
    """

    tests: int = 0
    share: float = 1.0


UNCORRECTED = Correction()
"""One look at a family that is whole."""


class Credits(NamedTuple):
    """What every test sample adds to a measure.

    Attributes:
        of: variant -> [K, S] float32, whose means over S are its values. clusters: [S] int64, equal for samples that
            depend on each other, or None. chained: clusters are stretches of a series (`over_samples`).
    """

    of: Mapping[str, Tensor]
    clusters: Tensor | None = None
    chained: bool = False


class Spread(TypedDict):
    """Values over seeds with mean, standard deviation and half-widths of 95 % intervals of the mean."""

    values: list[float]
    mean: float
    std: float
    ci95: float | None  # t-interval over seeds alone; None of one seed, of whose spread nothing is known
    both: NotRequired[float]  # over seeds and test samples together (`over_both`), of one seed over samples alone


def spread(
    values: Sequence[float], credits: Tensor | None = None, clusters: Tensor | None = None, *, chained: bool = False
) -> Spread:
    """The spread of values over seeds.

    Args:
        credits: [K, S], what the test samples add: only with them is there `both`. clusters, chained: of `Credits`.
    """
    count = len(values)
    std = statistics.stdev(values) if count > 1 else 0.0
    ci95 = float(student_t.ppf(0.975, count - 1)) * std / math.sqrt(count) if count > 1 else None
    found: Spread = {"values": list(values), "mean": statistics.fmean(values), "std": std, "ci95": ci95}
    if credits is not None and (half := over_both(credits, clusters, chained=chained).half) is not None:
        found["both"] = half
    return found


def interval_of(found: Spread) -> float | None:
    """Half-width of the widest interval that `spread` knows, or None."""
    return found.get("both", found["ci95"])


class Contrast(NamedTuple):
    """Mean difference of two variants over seeds, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    df: float

    @property
    def p(self) -> float:
        """Two-sided."""
        return float(2 * student_t.sf(abs(self.mean) / self.error, self.df)) if self.error else 1.0

    def half_width(self, level: float) -> float:
        """Of the t-interval that is missed with chance `level`; a larger difference has a smaller p."""
        return float(student_t.isf(level / 2, self.df)) * self.error


class Difference(NamedTuple):
    """Variant `better` against `worse`, paired over seeds.

    Attributes:
        mean: mean over seeds of the difference, never negative.
        ci95: half-width of its 95 % t-interval over seeds alone, not corrected for the number of comparisons.
        p: two-sided, over seeds alone, see `contrasts`. p_holm: corrected by Holm for all differences of the family,
            and for looks (`Correction`).
        needed: the least mean that would have been real were no other one of the family: p under the level at the
            first step of Holm's correction.
        both: half-width of the 95 % interval over seeds and test samples together, never below `ci95`; None where
            nothing is known of single samples. p_both: of that interval, corrected as `p_holm`.
    """

    better: str
    worse: str
    mean: float
    ci95: float
    p: float
    p_holm: float
    needed: float
    both: float | None = None
    p_both: float | None = None

    @property
    def p_corrected(self) -> float:
        """The larger of both: below the level where the difference is real."""
        return self.p_holm if self.p_both is None else max(self.p_holm, self.p_both)

    @property
    def half(self) -> float:
        """Half-width of the widest interval that is known, not corrected."""
        return self.ci95 if self.both is None else self.both

    @property
    def real(self) -> bool:
        """Beyond the noise of seeds, and with an interval over seeds and samples, at the same level, without 0."""
        return self.p_corrected < LEVEL


def contrasts(groups: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
    """Paired comparisons that share what is known of the noise: a block design, in which seeds are the blocks.

    In the table of k variants x n seeds what variants and seeds don't explain is noise (`noise_of_variants`). The
    variance of every variant is never taken below the mean of all, nor that of a pair below what its own differences
    show. The mean has (k - 1)(n - 1) degrees of freedom, fewer where the variants' differ (Satterthwaite), and what a
    pair has beyond the mean only the n - 1 of its own. Two variants make the paired t-test.

    Simulated, 4,000 families of each kind: 4, 5 and 10 variants, accuracies in steps of 1/500. A family has a false
    claim in at most

      noise of the variants     rule      3 seeds  5 seeds
      equal                     this one    2.0 %    2.3 %
      one has 3 x the std       this one    3.6 %    3.8 %
      the rival of all has it   this one    5.7 %    5.0 %
      any of these              paired t    4.6 %    6.1 %
      any of these              pooled     22.5 %   22.6 %

    and of differences of 4 std between equally noisy variants it finds, all pairs being tested, 41 to 47 % with 3
    seeds and 91 to 98 % with 5, where paired t-tests find 3 to 20 % and 33 to 88 %. (Pooled: the additive model's
    variance for every pair.) What a first look spends of the level (`recipes.statistics.protocol`) leaves 33 and 89
    to 96 %.

    Args:
        groups: variant -> a value for each seed, two or more; the same seed has the same place in all.
        pairs: which variants are compared.
    """
    noise = dict(zip(groups, noise_of_variants(list(groups.values())), strict=True))
    each = np.array(list(noise.values()))
    own_df = len(next(iter(groups.values()))) - 1
    pooled = each.mean()
    if not pooled:  # all values are the same
        return [Contrast(0.0, 0.0, own_df) for _ in pairs]
    pooled_df = max(own_df, (len(each) - 1) * own_df * pooled**2 / (each**2).mean())
    found = []
    for a, b in pairs:
        apart = np.subtract(groups[a], groups[b])
        variance = max((max(noise[a], pooled) + max(noise[b], pooled)) / 2, apart.var(ddof=1) / 2)
        beyond = 1 - pooled / variance
        df = min(pooled_df, 1 / ((1 - beyond) ** 2 / pooled_df + beyond**2 / own_df))
        found.append(Contrast(float(apart.mean()), math.sqrt(2 * variance / len(apart)), float(df)))
    return found


def noise_of_variants(table: Sequence[Sequence[float]]) -> np.ndarray:
    """Variance over seeds of every variant [k], without what all variants have in common at a seed.

    Their mean is the residual variance of the additive model. Accuracies come in steps (1 / test samples), so they can
    agree by rounding alone: no variance is below that of rounding to the smallest step seen, step^2 / 12.
    """
    values = np.asarray(table, dtype=float)  # [k, n]
    count, seeds = values.shape
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    steps = np.diff(np.unique(values.round(9)))
    least = steps.min() ** 2 / 12 if len(steps) else 0.0
    noise: np.ndarray = np.maximum((residual**2).sum(1) / (seeds - 1) * count / (count - 1), least)
    return noise


def over_samples_too(
    seeds: Contrast, apart: Tensor, clusters: Tensor | None, *, chained: bool = False
) -> Contrast | None:
    """A contrast over seeds and test samples, as if both were drawn anew; None of fewer than two clusters.

    Crossed random effects, as `nepa_core.verdict.intervals.over_both`, with the noise of seeds as `contrasts` has it,
    which is never below the pair's own: variances add up, and degrees of freedom are Satterthwaite's.

    Args:
        apart: [K, S], what the samples add to the difference. clusters, chained: of `Credits`.
    """
    samples = over_samples(apart.double().mean(0), clusters, chained=chained)
    return None if samples.half is None else beside_samples(seeds, error_of(samples) ** 2, samples.df)


def error_of(samples: Interval) -> float:
    """The standard error behind an interval that is known."""
    assert samples.half is not None
    return samples.half / float(student_t.ppf(0.975, samples.df))


def beside_samples(seeds: Contrast, variance: float, df: float) -> Contrast:
    """A contrast over seeds with the variance that its mean has over test samples, of so many degrees of freedom."""
    of_seeds = seeds.error**2
    total = of_seeds + variance
    if not total:
        return seeds
    return Contrast(seeds.mean, math.sqrt(total), total**2 / (of_seeds**2 / seeds.df + variance**2 / df))


def first_step(tests: int, correction: Correction = UNCORRECTED) -> float:
    """What the smallest p of so many tests must be below, in Holm's correction."""
    return LEVEL * correction.share / max(tests, correction.tests)


def holm(p_values: Sequence[float], correction: Correction = UNCORRECTED) -> list[float]:
    """Holm's step-down correction: the chance of any false claim among all stays below the level (Holm 1979).

    With a `correction` also for tests that are not made now, and below this look's share of the level.
    """
    count = max(len(p_values), correction.tests)
    ranked = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(ranked):
        highest = max(highest, min(1.0, (count - rank) * p_values[i] / correction.share))
        corrected[i] = highest
    return corrected


def differences(
    groups: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    correction: Correction = UNCORRECTED,
    credits: Credits | None = None,
) -> list[Difference]:
    """The paired tests of a family, the surest first; none with fewer than three seeds.

    Args:
        groups: variant -> a value for each seed, in the order of the seeds.
        pairs: which variants are compared; default: all with all.
        correction: for what else than these tests.
        credits: of all variants, where they are known; else only the seeds count.
    """
    chosen = list(combinations(groups, 2)) if pairs is None else list(pairs)
    if not chosen or min(map(len, groups.values())) < LEAST_SEEDS:
        return []
    tested = contrasts(groups, chosen)
    both: list[Contrast | None] = [None] * len(chosen)
    if credits is not None:
        both = [
            over_samples_too(each, credits.of[a] - credits.of[b], credits.clusters, chained=credits.chained)
            for (a, b), each in zip(chosen, tested, strict=True)
        ]
    p_both = holm([1.0 if each is None else each.p for each in both], correction)
    level = first_step(len(chosen), correction)
    found = []
    for number, ((a, b), each, p_holm) in enumerate(
        zip(chosen, tested, holm([each.p for each in tested], correction), strict=True)
    ):
        better, worse = (a, b) if each.mean >= 0 else (b, a)
        ci95, needed = each.half_width(0.05), each.half_width(level)
        difference = Difference(better, worse, abs(each.mean), ci95, each.p, p_holm, needed)
        if (with_samples := both[number]) is not None:
            difference = difference._replace(
                both=max(ci95, with_samples.half_width(0.05)),
                p_both=p_both[number],
                needed=max(needed, with_samples.half_width(level)),
            )
        found.append(difference)
    return sorted(found, key=lambda each: (each.p_corrected, each.p, -each.mean))


def gains(
    groups: Mapping[str, Sequence[float]],
    controls: Mapping[str, Sequence[float]],
    *,
    called: str,
    correction: Correction = UNCORRECTED,
    credits: tuple[Credits, Credits] | None = None,
) -> list[Difference]:
    """Every variant against a control of its own, which has its name and `called` in the tests; see `differences`.

    What is tested are the gains, against a variant that gains nothing. (In one table of variants and controls, controls
    that rise and fall together would hide their noise: with 3 x the std of the variants, 13 % of the families have a
    false claim; this way 5.6 % with 3 seeds and 4.7 % with 5.)

    Args:
        credits: of the variants and of their controls.
    """
    none = f"nothing, {called}"
    table = {name: [a - b for a, b in zip(values, controls[name], strict=True)] for name, values in groups.items()}
    known = None
    if credits is not None:
        own, control = credits
        apart = {name: own.of[name] - control.of[name] for name in table}
        known = Credits(apart | {none: 0 * next(iter(apart.values()))}, own.clusters, own.chained)
    found = differences(
        table | {none: [0.0] * len(next(iter(table.values())))},
        [(name, none) for name in table],
        correction=correction,
        credits=known,
    )
    return [
        each._replace(better=f"{each.worse}, {called}") if each.better == none
        else each._replace(worse=f"{each.better}, {called}")
        for each in found
    ]  # fmt: skip


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
    count = len(found)
    tested = f"{count} paired comparisons over {seeds} seeds, Holm-corrected" if count > 1 else f"{seeds} paired seeds"
    real = [each for each in found if each.real]
    if not real:
        none = f"No difference between {noun} in {of} is larger than the noise"
        largest = max(found, key=lambda each: each.mean)
        told = (
            f" ({tested}); the {'largest' if count > 1 else 'only one'}, {largest.better} over {largest.worse}, is "
            f"{points(largest)}, p = {shown_p(largest.p_corrected)}"
        )
        return f"{none}{'' if brief else told}; {unseen(found)}."
    named = "; ".join(
        f"{each.better} > {each.worse} by {points(each)}, p = {shown_p(each.p_corrected)}" for each in real[:most]
    )
    more = f"; and {len(real) - most} more" if len(real) > most else ""
    return f"In {of}: {named}{more}{'' if brief else f' ({tested})'}. {others(found)}"


def against(found: Sequence[Difference], rival: str, what: str, *, called: str) -> str:
    """Plain sentences on a family in which objectives are tested against one rival: who beats it, who does worse.

    Args:
        rival: one side of every test; `called`: what it is called. what: was measured, such as "probe accuracy".
    """

    def name(each: Difference) -> str:
        return each.better if each.worse == rival else each.worse

    real = [each for each in found if each.real]
    if not real:
        widest = max(found, key=lambda each: each.mean)
        side = "above" if widest.worse == rival else "below"
        who = "no objective differs" if len(found) > 1 else f"{name(widest)} does not differ"
        most = f"{name(widest)}, which differs most," if len(found) > 1 else "it"
        corrected = " after Holm's correction" if len(found) > 1 else ""
        return (
            f"In {what} {who} from {called} by more than the noise; {most} is {points(widest)} {side}, "
            f"p = {shown_p(widest.p_corrected)}{corrected}; {unseen(found)}."
        )
    said = []
    for verb, side in (("beats", "worse"), ("does worse than", "better")):
        listed = [each for each in real if getattr(each, side) == rival]
        if len(listed) == 1:
            said.append(f"Pre-training with {name(listed[0])} {verb} {called} in {what} by {points(listed[0])}.")
        elif listed:
            named = ", ".join(f"{name(each)} by {points(each)}" for each in listed)
            said.append(f"Pre-training {verb} {called} in {what} with {named}.")
    return " ".join([*said, others(found)])


def others(found: Sequence[Difference]) -> str:
    """After those that are real: how many are not, and how large a difference had to be."""
    rest = sum(not each.real for each in found)
    if not rest:
        return seen(found)
    counted = "The other difference is" if rest == 1 else f"The other {rest} differences are"
    return f"{counted} within the noise. {seen(found)}"


def least(found: Sequence[Difference]) -> str:
    """ "4.1 points": below it no difference of the family can be the first that is called real."""
    return _needed(min(found, key=lambda each: each.needed))


def unseen(found: Sequence[Difference]) -> str:
    """Where none is real: what may hide in the noise."""
    return f"differences below about {least(found)} can't be seen with {these(found)}"


def seen(found: Sequence[Difference]) -> str:
    """Where some are real: what the surest of them had to be. Holm's later steps ask less of the others."""
    if len(found) == 1:
        return f"With {these(found)} it had to be about {least(found)} to be seen."
    surest = min(found, key=lambda each: (each.p_corrected, each.p))
    needed = _needed(surest)
    had = f"With {these(found)} the surest had to be about {needed} to be seen"
    return f"{had}; once it is, less is asked of the others."


def these(found: Sequence[Difference]) -> str:
    """ "these seeds": what the tests were made on."""
    return "these seeds" if any(each.both is None for each in found) else "these seeds and test samples"


def covers(found: Sequence[Difference], corrected: str) -> str:
    """What the tests of a comparison say and what they don't.

    Args:
        found: any of its families. corrected: what they are corrected for, as
            `recipes.statistics.protocol.Look.told` says it.
    """
    unknown = [each for each in found if each.both is None]
    if found and not unknown:
        real = (
            "Intervals are over seeds and test samples together. Real is a difference that is beyond the noise of the "
            f"seeds and whose interval over seeds and test samples leaves out 0, both at level {LEVEL}, corrected "
            f"{corrected}."
        )
    else:
        some = "Some intervals" if len(unknown) < len(found) else "Intervals"
        real = (
            f"{some} are over seeds alone, and real is a difference beyond their noise: p below {LEVEL}, corrected "
            f"{corrected}. Whether other test samples would show it is not tested there: nothing is known of single "
            "samples in what was measured before they were kept."
        )
    return f"{real} {FAMILIES}"


def _needed(difference: Difference) -> str:
    return f"{hundredths(difference.needed, difference.needed)} points"


def shown_p(p: float) -> str:
    """ "0.055": two significant digits, and as many more as tell it from `LEVEL`."""
    digits = 2
    while p != LEVEL and float(f"{p:.{digits}g}") == LEVEL:
        digits += 1
    return f"{p:.{digits}g}"


def points(difference: Difference) -> str:
    """ "2.1 ± 0.9 points": of a hundred."""
    mean, half = (hundredths(value, difference.half) for value in (difference.mean, difference.half))
    return f"{mean} ± {half} points"


def hundredths(value: float, scale: float) -> str:
    """With a digit behind the point, or with the three that values of a small scale need, as errors of forecasts."""
    return f"{100 * value:.{1 if scale >= 0.001 else 3}f}"
