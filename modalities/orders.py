"""Patch orders: the sequence in which the patches of a rectangular grid are predicted.

Every order is a permutation [rows * columns] of canonical (raster) indices, `row * columns + column`.
To add one, write a function of `(rows, columns)` that returns it and name it in `OrderName` and `grid_order`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

OrderName = Literal["raster", "hilbert", "random"]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # autograd can't save a tensor made in inference mode; this one outlives it
def grid_order(name: OrderName, rows: int, columns: int, seed: int = 0) -> Tensor:
    """The order of that name, [rows * columns] int64 on the CPU: which patch is read at each place.

    The tensor is cached and shared: do not write to it. `seed` matters to "random" only.
    """
    match name:
        case "raster":
            return raster(rows, columns)
        case "hilbert":
            return hilbert(rows, columns)
        case "random":
            return seeded_random(rows, columns, seed)
    raise ValueError(f"there is no patch order {name!r}")


def raster(rows: int, columns: int) -> Tensor:
    """Row by row, each from the left."""
    return torch.arange(rows * columns)


def seeded_random(rows: int, columns: int, seed: int) -> Tensor:
    """One fixed permutation drawn from `seed`; the global generator is left alone."""
    return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))


def hilbert(rows: int, columns: int) -> Tensor:
    """A Hilbert curve on a rectangle of any size, from the top left patch.

    Consecutive patches always share an edge. On a square whose side is a power of two it is the classical
    curve: every aligned square of side 2^k is left only when all of its patches have been visited.
    """
    x, y = _curve(max(rows, columns), min(rows, columns)).unbind(1)
    return y * columns + x if columns >= rows else x * columns + y


def _curve(length: int, width: int) -> Tensor:
    """The cells (x, y) of a rectangle from (0, 0) on, by unit steps, [length * width, 2]; length >= width."""
    if length % 2 == 0 or width % 2 == 1:
        return _walk(length, width)
    # An odd length and an even width: `_walk` can't end at the far corner of that length by unit steps,
    # for colours alternate as on a chessboard. The end is free here, so walk an even part of the length
    # and cross the rest, which is about square, along its even width.
    head = (length - width) // 2 * 2 if 2 * length > 3 * width else 0
    rest = _walk(width, length - head).flip(1) + torch.tensor([head, 0])
    return torch.cat([_walk(head, width), rest])


def _walk(length: int, width: int) -> Tensor:
    """The cells from (0, 0) to (length - 1, 0); by unit steps unless length is odd and width even.

    An elongated rectangle is cut into two that are walked one after the other. Any other is walked up one
    half of its near side, along the far side, and back down the other half. Cutting at even numbers keeps
    each part from being the exception.
    """
    if length <= 1 or width <= 1:
        return torch.cartesian_prod(torch.arange(length), torch.arange(width))
    if 2 * length > 3 * width:
        cut = _even_half(length)
        return torch.cat([_walk(cut, width), _walk(length - cut, width) + torch.tensor([cut, 0])])
    rise, half = _even_half(width), length // 2
    up = _walk(rise, half).flip(1)
    along = _walk(length, width - rise) + torch.tensor([0, rise])
    down = torch.tensor([length - 1, rise - 1]) - _walk(rise, length - half).flip(1)
    return torch.cat([up, along, down])


def _even_half(side: int) -> int:
    """Half of a side of at least 2, rounded to an even number (1 for a side of 2)."""
    half = side // 2
    return half + half % 2 if side > 2 else half
