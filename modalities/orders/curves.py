"""Paths over a grid: every static patch order as a function of the grid's sizes.

A grid has 1, 2 or 3 axes and N cells, numbered in raster order (the last axis runs fastest). An order is a permutation
[N] int64 of these numbers: the cell that is read at each place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nepa_core.basics import UserError

Grid = tuple[int, ...]


def cells(grid: Grid) -> Tensor:
    """Coordinates of all cells in raster order, [N, A] int64."""
    return torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"), -1).flatten(0, -2)


def raster(grid: Grid) -> Tensor:
    """Row by row, each from the left."""
    return torch.arange(math.prod(grid))


def column(grid: Grid) -> Tensor:
    """Column by column, each from the top: the first axis runs fastest."""
    return _sorted(*cells(grid).flip(1).unbind(1))


def reverse(grid: Grid) -> Tensor:
    """Raster backwards."""
    return raster(grid).flip(0)


def rising(grid: Grid) -> Tensor:
    """Raster with the first axis backwards: the last row first, which in a spectrogram holds the lowest bands."""
    return torch.arange(math.prod(grid)).reshape(grid).flip(0).flatten()


def snake(grid: Grid) -> Tensor:
    """Row by row, every second one from the right: unit steps on any grid."""
    cell = cells(grid)
    line, keys = torch.zeros(len(cell), dtype=torch.int64), []
    for axis, side in enumerate(grid):
        along = torch.where(line % 2 == 0, cell[:, axis], side - 1 - cell[:, axis])
        keys.append(along)
        line = line * side + along
    return _sorted(*keys)


def diagonal(grid: Grid) -> Tensor:
    """By the sum of the coordinates; cells of one sum in raster order."""
    return _sorted(cells(grid).sum(1))


def zigzag(grid: Grid) -> Tensor:
    """By the sum of the coordinates, every second sum in raster order backwards, as JPEG orders its frequencies."""
    cell = cells(grid)
    line, place = cell.sum(1), torch.arange(len(cell))
    return _sorted(line, torch.where(line % 2 == 0, -place, place))


def morton(grid: Grid) -> Tensor:
    """Z-order: by the bits of the coordinates, interleaved, the last axis lowest."""
    return _sorted(_interleaved(cells(grid).unbind(1), _bits(grid)))


def spiral_in(grid: Grid) -> Tensor:
    """Rings from the outside inward, clockwise from the top left: unit steps. On one axis: both ends, then inward.

    Raises:
        UserError: the grid has three axes.
    """
    if len(grid) > 2:
        raise UserError("patch_order=spiral_in and spiral_out are for grids of 1 or 2 axes; centre_out goes on 3")
    cell = cells(grid)
    last = torch.tensor(grid) - 1
    ring = torch.minimum(cell, last - cell).amin(1)
    if len(grid) == 1:
        return _sorted(ring)
    (row, column), (below, right) = (cell - ring[:, None]).unbind(1), (last - 2 * ring[:, None]).unbind(1)
    along = torch.where(
        row == 0,
        column,
        torch.where(
            column == right,
            right + row,
            torch.where(row == below, 2 * right + below - column, 2 * (right + below) - row),
        ),
    )
    return _sorted(ring, along)


def spiral_out(grid: Grid) -> Tensor:
    """`spiral_in` backwards."""
    return spiral_in(grid).flip(0)


def centre_out(grid: Grid) -> Tensor:
    """By distance from the centre of the grid; cells at one distance in raster order."""
    return _sorted((2 * cells(grid) - torch.tensor(grid) + 1).square().sum(1))


def strided(grid: Grid) -> Tensor:
    """Coarse to fine: first the cells of the widest stride, a power of two, then what each halving adds, as rasters."""
    cell = cells(grid)
    fine = sum(((cell % 2**bit).amax(1) > 0).long() for bit in range(1, _bits(grid) + 1))
    return _sorted(fine) if isinstance(fine, Tensor) else raster(grid)


def blocks(grid: Grid) -> Tensor:
    """Blocks in raster order, raster within each; a block's side is about the root of the grid's on every axis."""
    cell = cells(grid)
    side = torch.tensor([max(1, round(math.sqrt(side))) for side in grid])
    return _sorted(*(cell // side).unbind(1))


def seeded_random(grid: Grid, seed: int) -> Tensor:
    """One fixed permutation drawn from `seed`; the global generator is left alone."""
    return torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(seed))


def hilbert(grid: Grid) -> Tensor:
    """A Hilbert curve from the first cell.

    On a rectangle of any size consecutive cells share an edge. On a square whose side is a power of two it is the
    classical curve: every aligned square of side 2^k is left only when all of its cells have been visited. On three
    axes it is the curve of the enclosing cube whose side is a power of two, without the cells beyond the grid: unit
    steps on such cubes, jumps over what is left out elsewhere (Skilling, "Programming the Hilbert curve", 2004).
    """
    if len(grid) == 1:
        return raster(grid)
    if len(grid) > 2:
        return _sorted(_hilbert_index(list(cells(grid).unbind(1)), max(_bits(grid), 1)))
    rows, columns = grid
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


def _hilbert_index(axes: list[Tensor], bits: int) -> Tensor:
    """The place of every cell on the curve through a cube of side 2^bits: undo each level's turn, then Gray code."""
    first = axes[0]
    for bit in reversed(range(1, bits)):
        low = 2**bit - 1
        for axis, value in enumerate(axes):
            far = (value >> bit) & 1 == 1
            swap = torch.where(far, 0, (first ^ value) & low)
            axes[axis] = value ^ swap  # of axis 0 with itself: nothing
            first = torch.where(far, first ^ low, first ^ swap)
            axes[0] = first
    for axis in range(1, len(axes)):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    turn = torch.zeros_like(first)
    for bit in range(1, bits):
        turn = turn ^ torch.where((axes[-1] >> bit) & 1 == 1, 2**bit - 1, 0)
    return _interleaved([value ^ turn for value in axes], bits)


def _interleaved(axes: Sequence[Tensor], bits: int) -> Tensor:
    """The bits of all axes in one number, those of the last axis lowest."""
    code = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for value in axes:
            code = code << 1 | (value >> bit) & 1
    return code


def _bits(grid: Grid) -> int:
    """Bits of the largest coordinate."""
    return (max(grid) - 1).bit_length()


def _sorted(*keys: Tensor) -> Tensor:
    """The cells by their first key [N], ties by the next, at last by raster."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order
