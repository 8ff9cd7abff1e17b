"""How large a difference will so many seeds show? Said before they are trained, from the spread of random weights.

Random weights are measured under every variant with every seed anyway, and cost no pre-training. They have a spread
over seeds and over test samples, and with it the tests of `recipes.statistics.significance` are simulated: tables of
normal noise, all variants equally noisy, through `contrasts` and `beside_samples`, at the level of Holm's first step
for the whole family and at the look's share of it. A difference counts as seen where that first step, which asks most,
sees it. More seeds are counted as if declared in the same look.

Another sample of seeds and of test samples is drawn in every simulation, as the tests have it. What a test sample adds
has two parts: `lasting`, the same with every seed, so that more seeds don't make it smaller, and `passing`. The share
of the lasting part is what hides a small difference however many seeds there are.

In tables drawn apart from this, 78 to 83 % of the differences that are said to be seen in 80 % are
(tests/recipes/statistics/test_power.py). The spread itself is an estimate, of three seeds and two orders a poor one.

Fine-tuning is left out. Random weights are fine-tuned with attention both ways in the vision presets, where they know
of no order: on the digits they spread six times less over seeds (0.5 points) than what was trained (3.0), where
those of the probe are alike (1.6 and 1.8).

Shapes: K seeds, S test samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from nepa_core.verdict.intervals import over_samples
from recipes.statistics.significance import (
    LEAST_SEEDS,
    UNCORRECTED,
    Contrast,
    Correction,
    Credits,
    beside_samples,
    contrasts,
    error_of,
    first_step,
    hundredths,
    noise_of_variants,
)

SEE = 0.02
"""The difference that seeds are counted for: 2 points."""

POWER = 0.8
"""How often a difference must be seen to be counted as one that is."""

MOST_SEEDS = 1000
"""More are not counted."""

_LEAST_DF = 2  # of a spread that says anything, as in the tests
_DRAWS = 1000  # differences simulated: the least one seen is known to about 3 %


class Samples(NamedTuple):
    """Variance of the difference of two variants over test samples, a mean over pairs.

    Attributes:
        lasting: whatever the seeds. passing: what a single seed adds to it. df: degrees of freedom.
    """

    lasting: float
    passing: float
    df: float


class Outlook(NamedTuple):
    """What so many seeds will show.

    Attributes:
        seeds, variants: that are compared.
        spread: standard deviation over seeds of a variant, without what all have in common at a seed. None, as all
            that follows, where it is not known.
        sees: the least difference that the seeds show in `POWER` of the cases; None of too few to be tested.
        needs: the least number of seeds that show `SEE`; None of more than `MOST_SEEDS`.
        at_best: the least difference that any number of seeds shows on these test samples; None where it is not known
            what each adds, so that only the seeds count.
    """

    seeds: int
    variants: int
    spread: float | None = None
    sees: float | None = None
    needs: int | None = None
    at_best: float | None = None


def outlook(
    groups: Mapping[str, Sequence[float]], *, correction: Correction = UNCORRECTED, credits: Credits | None = None
) -> Outlook:
    """What the seeds of a comparison will show of all its variants with each other.

    Args:
        groups: variant -> a value of random weights for each seed, in the order of the seeds; two variants or more.
        correction: of the tests to come. credits: of random weights, where they are known.
    """
    table = np.array(list(groups.values()))
    variants, seeds = table.shape
    unknown = Outlook(seeds, variants)
    if (variants - 1) * (seeds - 1) < _LEAST_DF or not np.ptp(table, axis=0).any():
        return unknown
    spread = math.sqrt(noise_of_variants(table.tolist()).mean())
    samples = None if credits is None else samples_of(credits)
    level = first_step(math.comb(variants, 2), correction)

    def least(count: int) -> float:
        return least_seen(spread, variants=variants, seeds=count, level=level, samples=samples)

    sees = least(seeds) if seeds >= LEAST_SEEDS else None
    at_best = None if samples is None else _limit(samples, level)
    hidden = at_best is not None and at_best > SEE
    return Outlook(seeds, variants, spread, sees, None if hidden else _fewest(least), at_best)


def samples_of(credits: Credits) -> Samples | None:
    """What test samples add to the differences of random weights; None of fewer than two clusters or two seeds."""
    lasting, passing, df = [], [], 0.0
    for a, b in combinations(credits.of, 2):
        apart = (credits.of[a] - credits.of[b]).double()  # [K, S]
        mean, seeds = apart.mean(0), len(apart)
        every = [over_samples(each, credits.clusters, chained=credits.chained) for each in (mean, *(apart - mean))]
        if seeds < 2 or every[0].half is None:
            return None
        of_mean, *of_seeds = (error_of(each) ** 2 for each in every)
        passing.append(sum(of_seeds) / (seeds - 1))
        lasting.append(of_mean - passing[-1] / seeds)
        df = every[0].df
    return Samples(max(float(np.mean(lasting)), 0.0), float(np.mean(passing)), df)


@cache
def least_seen(spread: float, *, variants: int, seeds: int, level: float, samples: Samples | None = None) -> float:
    """The least true difference of two variants that is called real in `POWER` of the cases, simulated.

    Args:
        spread: standard deviation over seeds of each variant. level: that p must be below.
    """
    draw = np.random.default_rng(0)
    pairs = [(str(place), str(place + 1)) for place in range(0, variants - 1, 2)]
    alone, both = list[Contrast](), list[Contrast]()
    for _ in range(-(-_DRAWS // len(pairs))):
        table = spread * draw.normal(size=(variants, seeds))
        alone += contrasts({str(place): row for place, row in enumerate(table.tolist())}, pairs)
    means = np.array([each.mean for each in alone])
    needed = _widths(alone, level)
    if samples is not None:
        means += math.sqrt(samples.lasting) * draw.normal(size=len(means))
        variance = samples.lasting + samples.passing / seeds
        both = [beside_samples(each, variance, samples.df) for each in alone]
        needed = np.maximum(needed, _widths(both, level))
    return float(np.quantile(needed - means, POWER))


def _widths(found: Sequence[Contrast], level: float) -> np.ndarray:
    """`Contrast.half_width` of all."""
    error, df = (np.array([getattr(each, key) for each in found]) for key in ("error", "df"))
    widths: np.ndarray = student_t.isf(level / 2, df) * error
    return widths


def _limit(samples: Samples, level: float) -> float:
    """`least_seen` of seeds without end."""
    return float(student_t.isf(level / 2, samples.df) + norm.ppf(POWER)) * math.sqrt(samples.lasting)


def _fewest(least: Callable[[int], float]) -> int | None:
    """The least number of seeds with which `SEE` is seen; None of more than `MOST_SEEDS`."""
    low, high = LEAST_SEEDS - 1, LEAST_SEEDS
    while least(high) > SEE:
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if least(middle) <= SEE else (middle, high)
    return high


def sentence(found: Outlook, *, noun: str, of: str) -> str:
    """It in plain words, one line.

    Args:
        noun: what differs, in the plural, such as "orders". of: what is measured, such as "the probe".
    """
    given = "one seed" if found.seeds == 1 else f"{found.seeds} seeds"
    see = f"{100 * SEE:.0f} points"
    if found.spread is None and (found.variants - 1) * (found.seeds - 1) < _LEAST_DF:
        return (
            f"With {given} of {found.variants} {noun} the spread over seeds is not known, nor how many seeds would see "
            f"{see}: give three or more."
        )
    if found.spread is None:
        alike = f"Random weights do the same in {of} under all {noun}"
        return f"{alike}, so their spread doesn't tell how many seeds would see {see}."
    if found.sees is None:
        sees = f"{given} see no difference between {noun} in {of}, for fewer than three are not tested"
    else:
        size, often = hundredths(found.sees, found.sees), f"{100 * POWER:.0f} %"
        sees = f"{given} see a difference of {size} points or more between two {noun} in {of} ({often} of the time)"
    return f"{sees}; {_wanted(found, see)}. From the spread of random weights; that of trained networks may be another."


def _wanted(found: Outlook, see: str) -> str:
    """How many seeds see 2 points, or why none do."""
    if found.needs is not None:
        return f"{see} {'take' if found.needs <= found.seeds else 'would take'} about {found.needs} seeds"
    if found.at_best is not None and found.at_best > SEE:
        best = hundredths(found.at_best, found.at_best)
        return (
            f"{see} are hidden by the test samples however many seeds there are: {best} is the least that can be seen"
        )
    return f"{see} would take more than {MOST_SEEDS} seeds"
