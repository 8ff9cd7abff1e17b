"""Patch orders: the sequence in which the tokens of a grid are predicted.

An order is a permutation of canonical (raster) indices: [N] where all samples share it, [B, N] where each has its own.
The static ones are drawn in `modalities.orders.curves`. One of your own is a function of (tokens, grid) that returns
either form, named by its import path: `data.patch_order=my_orders:by_saliency`; or a permutation in a file,
`data.patch_order=path.npy` (or .txt, numbers apart by white space).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, Field, PrivateAttr
from torch import Tensor

from modalities.orders import curves
from modalities.orders.curves import Grid
from nepa_core.basics import FROZEN, MOST_SEED, UserError, call
from nepa_core.runtime.config import load_object, nearest
from nepa_core.tokens import Tokens, cached

DRAWN = ("random_per_sample", "random_annealed")
"""Orders that draw a permutation for every sample."""

_CURVES: dict[str, Callable[[Grid], Tensor]] = {
    curve.__name__: curve
    for curve in (
        *(curves.raster, curves.column, curves.reverse, curves.rising, curves.snake),
        *(curves.diagonal, curves.zigzag, curves.hilbert, curves.morton),
        *(curves.spiral_in, curves.spiral_out, curves.centre_out, curves.strided, curves.blocks),
    )
}

ORDERS = (*_CURVES, "random", *DRAWN)
"""The names of all built-in orders."""


def known_order(name: str) -> str:
    """The name itself, once it is known to mean something.

    Raises:
        ValueError: no built-in order has that name.
        UserError: a function of the user's does not exist or is none, or a file does not exist.
    """
    if ":" in name:
        if not callable(found := load_object(name)):
            raise UserError(f"patch_order={name} is no function of (tokens, grid) but of type {type(found).__name__}")
    elif _is_file(name):
        if not Path(name).expanduser().is_file():
            raise UserError(f"patch_order={name}: there is no such file here")
    elif name not in ORDERS:
        raise ValueError(f"neither an order's name nor module:function{nearest(name, ORDERS)}")
    return name


PatchOrder = Annotated[str, AfterValidator(known_order)]
"""A name of `ORDERS`, `module:function`, or a .npy or .txt file."""


def file_content(name: str) -> str:
    """12 hexadecimal digits of what an order's file holds; "" for an order that is no file."""
    return hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()[:12] if _is_file(name) else ""


def is_static(name: str) -> bool:
    """Whether `grid_order` gives this order: it is the same for all samples, and known from the grid alone."""
    return ":" not in name and name not in DRAWN


@cached
def grid_order(name: str, grid: Grid, seed: int = 0) -> Tensor:
    """The static order of that name over a grid of 1 to 3 axes, [N] int64 on the CPU: the cell read at each place.

    `seed` matters to "random" only.

    Raises:
        UserError: a file holds no permutation of the grid, or a spiral is asked for on 3 axes.
        ValueError: there is no static order of that name.
    """
    if _is_file(name):
        return _checked(_read(name), f"patch_order={name}", grid)
    if name == "random":
        return curves.seeded_random(grid, seed)
    if name in _CURVES:
        return _CURVES[name](grid)
    raise ValueError(f"there is no static patch order {name!r}{nearest(name, ORDERS)}")


def read_order(
    name: str, seed: int, tokens: Tokens, grid: Grid, progress: float | None = None, cell: Tensor | None = None
) -> Tensor | None:
    """The order of a batch: what an adapter's `order(tokens)` returns.

    Args:
        seed: of "random", and of the evaluation of the orders drawn for each sample.
        tokens: in canonical order, N of them as the raster of `grid`, or where `cell` says.
        progress: share of the run that is done, in training: orders are then drawn from torch's global generator.
            None, in evaluation: "random_annealed" is raster, and "random_per_sample" follows from the content of the
            sample and the seed, so it is the same in any batch.
        cell: [B, N, A] int64, the cell of the grid that each token lies on, several on one or none, for tokens that
            are no grid of their own. Static orders are then those of the cells, and the others see the grid (N,).

    Returns:
        [N] or [B, N] int64, or None for raster. Orders drawn for each sample, and those over cells, put masked tokens
        last: one between two real tokens would cost the pair.

    Raises:
        UserError: an order of the user's is no permutation of the tokens, or its function fails.
    """
    if cell is not None:
        if is_static(name):
            path = inverse(grid_order(name, grid, seed)).to(cell.device)
            order = path[(cell * _strides(grid).to(cell.device)).sum(-1)].argsort(dim=1, stable=True)
            return padding_behind(order, tokens.mask)
        grid = (tokens.values.shape[1],)
    if name == "raster" or (name == "random_annealed" and progress is None):
        return None
    if ":" in name:
        order = call(f"patch_order={name} called with (tokens, grid)", load_object(name), tokens, grid)
        return _checked(order, f"patch_order={name}", grid, len(tokens.values))
    if name not in DRAWN:
        return grid_order(name, grid, seed)
    if progress is None:
        return _padding_last(content_keys(tokens, grid, seed), tokens.mask).argsort(dim=1)
    keys = torch.rand(tokens.values.shape[:2], device=tokens.values.device)
    if name == "random_annealed":
        shuffled = torch.rand(len(keys), 1, device=keys.device) >= progress
        keys = torch.where(shuffled, keys, torch.arange(keys.shape[1], device=keys.device).float())
    return _padding_last(keys, tokens.mask).argsort(dim=1, stable=True)


def inverse(order: Tensor) -> Tensor:
    """The place at which each token is read: order.gather(-1, inverse(order)) counts 0, 1, 2, ...; [N] or [B, N]."""
    return order.argsort(dim=-1)


def padding_behind(order: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The same order with the masked tokens of every sample after the others.

    Args:
        order: [N] or [B, N] int64, or None. mask: [B, N] bool, or None.

    Returns:
        `order` itself where there is no mask, or on the CPU where a shared order moves no masked token (asking a GPU
        would wait for it); else [B, N].
    """
    if order is None or mask is None:
        return order
    each = order.to(mask.device).expand(mask.shape)
    real = mask.gather(1, each)
    asks = order.ndim == 1 and mask.device.type == "cpu" and not torch.compiler.is_exporting()
    if asks and not (real[:, 1:] & ~real[:, :-1]).any():
        return order
    places = torch.arange(mask.shape[1], device=mask.device)
    return each.gather(1, torch.where(real, places, places + len(places)).argsort(dim=1))


class Ordered(BaseModel):
    """What an adapter with a grid inherits beside `Modality`, before it, to take any order.

    Its `order(tokens)` is then one line, `return self.ordered(tokens, grid)`.

    Attributes:
        patch_order: the order in which tokens are predicted: a name of `ORDERS`, `module:function` or a file.
        order_seed: of patch_order="random", and of the evaluation of "random_per_sample".
    """

    model_config = FROZEN

    patch_order: PatchOrder = "raster"
    order_seed: int = Field(default=0, ge=0, lt=MOST_SEED)
    _progress: float | None = PrivateAttr(None)  # set by `at` alone: an adapter as configured is that of evaluation

    def ordered(self, tokens: Tokens, grid: Grid, cell: Tensor | None = None) -> Tensor | None:
        """`read_order` by these settings."""
        return read_order(self.patch_order, self.order_seed, tokens, grid, self._progress, cell)

    def at(self, progress: float) -> Self:
        """See `Modality.at`."""
        if not self.draws_order():
            return self
        copy = self.model_copy()
        copy._progress = progress
        return copy

    def draws_order(self) -> bool:
        """See `Modality.draws_order`."""
        return self.patch_order in DRAWN


def content_keys(tokens: Tokens, grid: Grid, seed: int) -> Tensor:
    """Numbers as good as random that depend on a sample's real values and each token's cell alone: [B, N] int64.

    Neither the other samples nor padding along any axis change them.
    """
    values, device = tokens.values, tokens.values.device
    cell = sum(part << 20 * axis for axis, part in enumerate(curves.cells(grid).unbind(1)))
    assert isinstance(cell, Tensor)
    cell = _scrambled(cell + _scrambled(torch.tensor(seed + 1))).to(device)
    weights = _scrambled(torch.arange(1, values.shape[-1] + 1)).to(device)
    content = _scrambled((values.float().contiguous().view(torch.int32) * weights).sum(-1) + cell)
    if tokens.mask is not None:
        content = torch.where(tokens.mask, content, 0)
    return _scrambled(content.sum(1, keepdim=True) ^ cell)


def _strides(grid: Grid) -> Tensor:
    """Cells from one to the next along every axis, [A]."""
    return torch.tensor([int(np.prod(grid[axis + 1 :])) for axis in range(len(grid))])


def _scrambled(x: Tensor) -> Tensor:
    """Every bit of int64 numbers spread over all others (the finaliser of SplitMix64; products wrap around)."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def _padding_last(keys: Tensor, mask: Tensor | None) -> Tensor:
    """Sort keys [B, N] under which masked tokens come last."""
    if mask is None:
        return keys
    last = torch.inf if keys.is_floating_point() else torch.iinfo(keys.dtype).max
    return keys.masked_fill(~mask, last)


def _is_file(name: str) -> bool:
    return ":" not in name and name.endswith((".npy", ".txt"))


def _read(name: str) -> Tensor:
    path = Path(name).expanduser()
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file: its shape is refused
            found = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
        return torch.as_tensor(found)
    except (OSError, ValueError, TypeError, EOFError, MemoryError, OverflowError) as error:
        raise UserError(f"patch_order={name} can't be read as a list of whole numbers: {error}") from error


def _checked(order: object, name: str, grid: Grid, samples: int | None = None) -> Tensor:
    """A user's order as int64, once it is known to be a permutation.

    Raises:
        UserError: it is none.
    """
    count = int(np.prod(grid))
    wanted = f"[{count}]" if samples is None else f"[{count}] or [{samples}, {count}]"
    if not isinstance(order, Tensor):
        raise UserError(f"{name} gives {type(order).__name__}, not a tensor of whole numbers: make it {wanted}")
    if order.is_floating_point() or order.is_complex():
        kind = str(order.dtype).removeprefix("torch.")
        raise UserError(f"{name} gives numbers of type {kind}, not whole ones: make it {wanted} of int64")
    if order.shape not in ((count,), (samples, count)):
        raise UserError(f"{name} gives the shape {list(order.shape)} on the grid {grid}: make it {wanted}")
    order = order.detach().long()
    if not (order.sort(dim=-1).values == torch.arange(count, device=order.device)).all():
        raise UserError(f"{name} is not a permutation: it must name each of 0 to {count - 1} once")
    return order
