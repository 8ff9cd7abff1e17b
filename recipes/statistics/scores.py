"""How good samples of what was to be predicted are, against the truth.

Scores are of single items, so that `nepa_core.verdict.intervals.over_samples` makes the intervals: over items, or over
clusters of those that depend on each other, and of differences between rivals, which are paired.

Shapes: S samples drawn for one truth, M items, P numbers in one, K quantiles. All are floating tensors on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BYTES = 2**26  # most of the distances of samples that are held at once


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """The energy score of samples [S, M, P] of truths [M, P], over the root of P: [M] float64, lower is better.

    (E|X - y| - 1/2 E|X - X'|) / sqrt(P). Its expectation is lowest where samples have the law of the truth (Gneiting
    and Raftery 2007, section 4.3, with beta = 1). Only pairs of different samples count, so that it has no bias for any
    S of 2 or more. The root makes figures of different P compare: samples of the true law, standard normal, have 0.56
    for P = 1 and 0.71 for many.

    Raises:
        ValueError: there is one sample.
    """
    count, items, size = samples.shape
    _several(count)
    found = torch.empty(items, dtype=torch.float64)
    step = max(1, _BYTES // (8 * count * (count + size)))
    for rows in torch.arange(items).split(step):
        drawn, true = samples[:, rows].double().transpose(0, 1), truth[rows].double()  # [m, S, P], [m, P]
        apart = _distances(drawn, drawn).sum((1, 2)) / (count * (count - 1))
        found[rows] = _distances(drawn, true[:, None]).mean((1, 2)) - apart / 2
    return found / math.sqrt(size)


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """The continuous ranked probability score of each number: [S, ...] and [...] -> [...] float64, in its units.

    E|X - y| - 1/2 E|X - X'| (Gneiting and Raftery 2007, eq. 21) with pairs of different samples alone: "fair" (Ferro
    2014), without bias for any S, while the score of the samples' own step function favours too little spread.

    Raises:
        ValueError: there is one sample.
    """
    count = len(samples)
    _several(count)
    apart = (samples.double() - truth.double()).sort(0).values
    weight = (2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1) / (count * (count - 1))
    score: Tensor = apart.abs().mean(0) - torch.tensordot(weight, apart, dims=1)
    return score


def quantiles(samples: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of samples [S, ...] at levels [K] between 0 and 1: [K, ...] float64.

    The k-th of S sorted samples is that of level k / (S + 1), since another draw of the same law lies below it with
    that chance, and between two levels they are interpolated (type 6 of Hyndman and Fan 1996). Levels beyond the first
    and the last are theirs.
    """
    ordered, count = samples.double().sort(0).values, len(samples)
    place = (levels.double() * (count + 1) - 1).clamp(0, count - 1)
    below = place.floor().long()
    share = (place - below).view(-1, *[1] * (samples.ndim - 1))
    found: Tensor = ordered[below].lerp(ordered[(below + 1).clamp(max=count - 1)], share)
    return found


def pinball(quantiles: Tensor, levels: Tensor, truth: Tensor) -> Tensor:
    """The pinball loss of quantiles [K, ...] at levels [K] against [...]: [K, ...] float64, in the units of the truth.

    max(level (y - q), (level - 1) (y - q)). Twice its mean over evenly spaced levels is about the CRPS.
    """
    apart = truth.double() - quantiles.double()
    level = levels.double().view(-1, *[1] * truth.ndim)
    return torch.maximum(level * apart, (level - 1) * apart)


def coverage(samples: Tensor, truth: Tensor, level: float) -> Tensor:
    """1 where the truth lies in the central interval of the samples, else 0: [S, ...] and [...] -> [...] float64.

    The interval lies between the `quantiles` of (1 - level) / 2 and (1 + level) / 2. So samples of the true law cover
    `level` of the truths for any S that has such quantiles, not for many alone: exactly where (1 - level) / 2 times
    S + 1 is whole, and nearly elsewhere.

    Raises:
        ValueError: there are too few samples for them; 90 % need 19.
    """
    tail = (1 - level) / 2
    if tail * (len(samples) + 1) < 1 - 1e-9:
        raise ValueError(
            f"{len(samples)} samples have no central interval of {level:.0%}; draw {math.ceil(1 / tail - 1e-6) - 1}"
        )
    ends = quantiles(samples, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return (ends[0].le(truth) & ends[1].ge(truth)).double()


def _several(count: int) -> None:
    if count < 2:
        raise ValueError("a score of samples needs two of them or more: their own spread is a part of it")


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Without the rounding of products, in which small ones would drown."""
    found: Tensor = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return found
