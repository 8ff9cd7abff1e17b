"""What a patch order is like, whatever is learned from it: how far it steps, how much of the surroundings it has."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 4
"""Places over which locality is measured."""


def order_measures(positions: Tensor) -> dict[str, float]:
    """Measures of one order, from where the token read at each place lies.

    Args:
        positions: [N, A] in the order of reading, real tokens alone; one unit is the distance of two neighbours, as of
            `modalities.order_curves.cells(grid)[order]`.

    Returns:
        step: mean length of a step from a token to the next.
        neighbours_seen: share of a token's neighbours (less than 1.5 away on every axis; 8 on a grid of two axes, fewer
            at its border) that were read before it, a mean over the first half of the places. (Over all places every
            order has about a half: of two neighbours exactly one comes first.)
        lone: share of the tokens after the first that have no neighbour before them.
        locality: mean distance of two tokens at most 4 places apart, divided by that of two tokens drawn at random
            (two different ones of the grid): near 0 for an order that stays together, about 1 for a random one.
    """
    cell = positions.cpu().double()
    if len(cell) < 2:
        return {"step": 0.0, "neighbours_seen": 0.0, "lone": 0.0, "locality": 1.0}
    near = (cell[:, None] - cell).abs().amax(-1) < 1.5  # [N, N], in the order of reading
    near.fill_diagonal_(False)
    seen = near.tril().sum(1)
    half = slice(0, (len(cell) + 1) // 2)
    distance = torch.cdist(cell, cell)
    apart = (torch.arange(len(cell))[:, None] - torch.arange(len(cell))).abs()
    return {
        "step": float((cell[1:] - cell[:-1]).norm(dim=-1).mean()),
        "neighbours_seen": float((seen / near.sum(1).clamp(min=1))[half].mean()),
        "lone": float((seen[1:] == 0).double().mean()),
        "locality": float(distance[(apart > 0) & (apart <= WINDOW)].mean() / distance[apart > 0].mean()),
    }
