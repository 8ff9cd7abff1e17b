"""What a patch order is like, whatever is learned from it: how far it steps, how much of the surroundings it has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from statistics import fmean
from typing import TypedDict

import torch
from torch import Tensor

WINDOW = 4
"""Places over which locality is measured."""


class OrderMeasures(TypedDict):
    """What an order is like."""

    step: float  # mean length of a step from a token to the next
    seen: list[float]  # N shares, for the token read at each place: of its neighbours how many were read before it
    neighbours_seen: float  # mean of these shares over the first half of the places
    lone: float  # share of the tokens after the first that have no neighbour before them
    locality: float  # mean distance of tokens a few places apart over that of any two


def order_measures(positions: Tensor) -> OrderMeasures:
    """Measures of one order, from where the token read at each place lies.

    Args:
        positions: [N, A] in the order of reading, real tokens alone; one unit is the distance of two neighbours, as of
            `modalities.orders.curves.cells(grid)[order]`.

    Neighbours are less than 1.5 away on every axis: 8 on a grid of two axes, fewer at its border; of one without any
    the share is 0. Over all places every order has about a half of them, for of two neighbours exactly one comes first.
    Locality is of tokens at most 4 places apart beside two different ones drawn at random: near 0 for an order that
    stays together, about 1 for a random one.
    """
    cell = positions.cpu().double()
    if len(cell) < 2:
        return {"step": 0.0, "seen": [0.0] * len(cell), "neighbours_seen": 0.0, "lone": 0.0, "locality": 1.0}
    near = (cell[:, None] - cell).abs().amax(-1) < 1.5  # [N, N], in the order of reading
    near.fill_diagonal_(False)
    before = near.tril().sum(1)
    seen = before / near.sum(1).clamp(min=1)
    half = slice(0, (len(cell) + 1) // 2)
    distance = torch.cdist(cell, cell)
    apart = (torch.arange(len(cell))[:, None] - torch.arange(len(cell))).abs()
    return {
        "step": float((cell[1:] - cell[:-1]).norm(dim=-1).mean()),
        "seen": seen.tolist(),
        "neighbours_seen": float(seen[half].mean()),
        "lone": float((before[1:] == 0).double().mean()),
        "locality": float(distance[(apart > 0) & (apart <= WINDOW)].mean() / distance[apart > 0].mean()),
    }


def mean_measures(found: Sequence[OrderMeasures]) -> OrderMeasures:
    """Means of `order_measures` over samples; at each place of `seen` over the samples that are so long."""
    places = zip_longest(*(each["seen"] for each in found))
    return {
        "step": fmean(each["step"] for each in found),
        "seen": [fmean(share for share in place if share is not None) for place in places],
        "neighbours_seen": fmean(each["neighbours_seen"] for each in found),
        "lone": fmean(each["lone"] for each in found),
        "locality": fmean(each["locality"] for each in found),
    }
