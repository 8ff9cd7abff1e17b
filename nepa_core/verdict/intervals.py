"""95 % intervals of a mean over held-out samples, and over seeds together with them.

Samples that are not independent (windows of one series, frames of one clip) form clusters, and what is uncertain is
the sum of a cluster: rows alone would make intervals far too narrow. Values are shares or differences of shares, one
a sample; give paired differences (model minus rival on the same sample) for a margin.

Shapes: S samples, K seeds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean and the half-width of its 95 % interval; None where there is too little to know it.

    Attributes:
        df: degrees of freedom of the t distribution behind it, 0 where there are none.
    """

    mean: float
    half: float | None
    df: float = 0.0

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.half is not None and self.mean > self.half

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.half is not None and -self.mean > self.half


CHAINED = 1.5
"""What the variance between stretches of a series is multiplied by, see `over_samples`."""


def over_samples(values: Tensor, clusters: Tensor | None = None, *, chained: bool = False) -> Interval:
    """The mean over samples and its interval, from the spread between clusters.

    The linearised (cluster-robust) variance of a ratio, sum of squared cluster residuals times C / (C - 1), with the t
    distribution of C - 1 degrees of freedom: for few clusters it covers where a bootstrap of as many falls short.

    Args:
        values: [S]. clusters: [S] int64, equal for samples that depend on each other; None: each is its own.
        chained: clusters are stretches of a series, as long as a sample at least, and samples that overlap lie in
            two of them. Where windows share values in proportion to their overlap, two thirds of the variance of
            their mean show between stretches and one third between neighbours, so what is seen is multiplied by 1.5.
    """
    variance, count = _sample_variance(values, clusters, chained)
    return Interval(float(values.double().mean()), _half(variance, count - 1), max(count - 1.0, 0.0))


def over_both(values: Tensor, clusters: Tensor | None = None, *, chained: bool = False) -> Interval:
    """The mean over seeds and samples, as if both were drawn anew: another training, on other samples.

    Crossed random effects, as in studies of several readers and cases: the variance between the seeds' means plus
    that between the clusters' (the interaction is counted in both, so intervals err on the wide side), with
    Satterthwaite's degrees of freedom; never narrower than over seeds alone, for where seeds matter most
    Satterthwaite's interval covers but 92 to 94 % with three of them. So it covers 95 % or more, with three seeds and
    with five. A bootstrap over seeds and samples covers too little with either, as
    tests/nepa_core/verdict/test_intervals.py shows.

    Args:
        values: [K, S], the same samples for every seed. One seed gives `over_samples`.
        clusters, chained: see `over_samples`.
    """
    if len(values) == 1:
        return over_samples(values[0], clusters, chained=chained)
    values = values.double()
    seeds = float(values.mean(1).var()) / len(values)
    samples, count = _sample_variance(values.mean(0), clusters, chained)
    total = seeds + samples
    if count < 2:
        return Interval(float(values.mean()), None)
    if total == 0:
        return Interval(float(values.mean()), 0.0, count - 1.0)
    df = total**2 / (seeds**2 / (len(values) - 1) + samples**2 / (count - 1))
    both, alone = _half(total, df), _half(seeds, len(values) - 1)
    half = None if both is None or alone is None else max(both, alone)
    return Interval(float(values.mean()), half, df)


def _sample_variance(values: Tensor, clusters: Tensor | None, chained: bool) -> tuple[float, int]:
    """Variance of the mean of [S] values, and the number of clusters."""
    apart = values.double() - values.double().mean()
    if clusters is None:
        sums = apart
    else:
        names = {name: number for number, name in enumerate(sorted(set(clusters.tolist())))}
        number = torch.tensor([names[name] for name in clusters.tolist()])
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, number, apart)
    count = len(sums)
    more = CHAINED if chained else 1.0
    return more * float(sums.square().sum()) * count / max(count - 1, 1) / len(values) ** 2, count


def _half(variance: float, df: float) -> float | None:
    if df < 1:
        return None
    from scipy.special import stdtrit  # a quarter of a second to import, for a verdict alone

    return float(stdtrit(df, 0.975)) * math.sqrt(variance)
