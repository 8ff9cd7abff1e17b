"""A marked point process whose law is known, with sequences of it and what follows given the past.

The kinds of events go round a circle, forwards or backwards: that is the label, and each kind is as frequent either
way. A step is the usual one with probability `USUAL`, else to one of the others or none. The logarithm of the time to
the next event is normal, with a mean for every pair of the last kind and the one before it. A number is normal around
a level of the kind, and missing with a probability.

Shapes: S sequences, B of a batch, N events, K = 5 kinds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = 5
USUAL = 0.7
SPREAD = 0.4  # of the logarithm of a gap
NUMBER_SPREAD, OBSERVED = 0.5, 0.8
COUNT = {"train": 2000, "test": 1000}
LONGEST, SHORTEST = 32, 24


class Sequences(NamedTuple):
    """Kinds [S, N] int64, logarithms of gaps [S, N], numbers [S, N] (NaN where missing), lengths [S], labels [S]."""

    kinds: Tensor
    gaps: Tensor
    numbers: Tensor
    lengths: Tensor
    labels: Tensor


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def law() -> tuple[Tensor, Tensor, Tensor]:
    """Transitions [2, K, K] by class, mean log gaps [K, K] by the last kind and the one before it, levels [K]."""
    draw = torch.Generator().manual_seed(7)
    steps = torch.full((2, KINDS, KINDS), (1 - USUAL) / (KINDS - 1))
    each = torch.arange(KINDS)
    steps[0, each, (each + 1) % KINDS] = USUAL
    steps[1, each, (each - 1) % KINDS] = USUAL
    return steps, torch.randn(KINDS, KINDS, generator=draw), torch.linspace(-1.5, 1.5, KINDS)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def sequences(split: str) -> Sequences:
    """The embedded sequences of a split, from a seed of its own."""
    draw = torch.Generator().manual_seed(100 if split == "train" else 200)
    steps, _, levels = law()
    count = COUNT[split]
    labels = torch.randint(2, (count,), generator=draw)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw)
    kinds = torch.randint(KINDS, (count, LONGEST), generator=draw)
    for place in range(1, LONGEST):
        kinds[:, place] = torch.multinomial(steps[labels, kinds[:, place - 1]], 1, generator=draw)[:, 0]
    gaps = mean_gaps(kinds) + SPREAD * torch.randn(kinds.shape, generator=draw)
    numbers = levels[kinds] + NUMBER_SPREAD * torch.randn(kinds.shape, generator=draw)
    numbers[torch.rand(kinds.shape, generator=draw) >= OBSERVED] = torch.nan
    return Sequences(kinds, gaps, numbers, lengths, labels)


def mean_gaps(kinds: Tensor) -> Tensor:
    """The mean log gap before each event, given those before: [B, N] -> [B, N]; 0 where fewer than two are known."""
    gaps_of = law()[1].to(kinds.device)
    found = torch.zeros(kinds.shape, device=kinds.device)
    found[:, 2:] = gaps_of[kinds[:, 1:-1], kinds[:, :-2]]
    return found


def next_kinds(kinds: Tensor) -> Tensor:
    """The probability of each kind at every place given the events before it: [B, N] -> [B, N, K].

    The class is not known: its probability follows from the steps that were seen.
    """
    steps = law()[0].to(kinds.device)
    seen = steps[:, kinds[:, :-1], kinds[:, 1:]].log().cumsum(-1)  # [2, B, N - 1]
    before = torch.cat((torch.zeros_like(seen[..., :1]), seen[..., :-1]), -1)
    following = (before.softmax(0)[..., None] * steps[:, kinds[:, :-1]]).sum(0)
    first = torch.full_like(following[:, :1], 1 / KINDS)
    return torch.cat((first, following), 1)
