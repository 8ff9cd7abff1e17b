"""What a patch order is like, whatever is learned from it: how far it steps, how much of the surroundings it has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

WINDOW = 4
"""Places over which locality is measured."""


def order_measures(positions: Tensor) -> dict[str, Any]:
    """Measures of one order, from where the token read at each place lies.

    Args:
        positions: [N, A] in the order of reading, real tokens alone; one unit is the distance of two neighbours, as of
            `modalities.orders.curves.cells(grid)[order]`.

    Returns:
        step: mean length of a step from a token to the next.
        seen: N shares, for the token read at each place: of its neighbours (less than 1.5 away on every axis; 8 on a
            grid of two axes, fewer at its border) how many were read before it; 0 for one without neighbours.
        neighbours_seen: mean of these shares over the first half of the places. (Over all places every order has about
            a half: of two neighbours exactly one comes first.)
        lone: share of the tokens after the first that have no neighbour before them.
        locality: mean distance of two tokens at most 4 places apart, divided by that of two tokens drawn at random
            (two different ones of the grid): near 0 for an order that stays together, about 1 for a random one.
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


def mean_measures(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of `order_measures` over samples; at each place of `seen` over the samples that are so long."""
    means = {name: fmean(each[name] for each in found) for name in found[0] if name != "seen"}
    places = zip_longest(*(each["seen"] for each in found))
    return means | {"seen": [fmean(share for share in place if share is not None) for place in places]}
