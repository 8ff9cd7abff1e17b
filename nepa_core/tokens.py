"""What one batch of data is: token sequences, how they are drawn, where samples come from, what an image was before.

Shapes: B samples, N tokens, P numbers in a raw token, A coordinate axes (1, 2 or 3), S samples of a split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Where samples come from, of a data set that cuts several from one recording (`Modality.dataset`).

    Attributes:
        cluster: [S] int64, equal for samples that depend on each other, such as those of one clip or of one stretch
            of a series: intervals are made from the spread between clusters.
        chained: clusters are stretches of a series, so that samples of neighbours overlap, too.
        track: [S] int64. first, end: [S] int64. Samples of one track overlap where their [first, end) do.
        views: samples of one cluster show one thing under one label, such as clips of one video: held-out figures of
            networks trained on labels are of the mean of what is predicted of them.
    """

    cluster: Tensor
    track: Tensor
    first: Tensor
    end: Tensor
    chained: bool = False
    views: bool = False


LARGEST_VALUE = 1e15
"""Of a number in a token: the square of a larger one, times a width, is beyond float32, so that a norm gives NaN."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences.

    Attributes:
        values: [B, N, P] float32, the content of each token. Nothing positional belongs here:
            the targets of the objective are made from `values` alone.
        coords: [N, A] when all samples share them, else [B, N, A]; float32, in any unit. One unit is the
            wavelength of the fastest rotary angle. Leave shared coordinates on the CPU: their rotary
            table is then found in a cache instead of being made anew each step.
        mask: [B, N] bool, True for a real token, or None when every token is real.
        order: [N] or [B, N] int64, the canonical index of the token at each place, or None while
            the tokens stand in canonical order. Set by `reordered`.
        part: [N] or [B, N] int64, from which of several kinds of data each token is, or None where there is one. The
            network adds a learned vector to its input for it (`model.parts`), never to a target.
    """

    values: Tensor
    coords: Tensor
    mask: Tensor | None = None
    order: Tensor | None = None
    part: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The mask, all True where there is none: [B, N] bool on the device of the values."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.values.shape[:2], dtype=torch.bool, device=self.values.device)

    def real_count(self) -> Tensor | int:
        """Tokens of the batch that are real; a scalar on their device where there is a mask."""
        return self.values.shape[0] * self.values.shape[1] if self.mask is None else self.mask.sum()

    def finite(self) -> Tensor:
        """[B] bool on their device: samples without NaN, infinity or numbers beyond `LARGEST_VALUE`."""
        sound = (self.values.abs() <= LARGEST_VALUE).flatten(1).all(1)
        return sound if self.coords.ndim == 2 else sound & self.coords.isfinite().flatten(1).all(1).to(sound.device)

    def rows(self, index: Tensor) -> Tokens:
        """These samples, [n] int64, in this order; one may come several times."""
        return replace(
            self,
            values=self.values[index],
            coords=self.coords if self.coords.ndim == 2 else self.coords[index],
            mask=None if self.mask is None else self.mask[index],
            order=self.order if self.order is None or self.order.ndim == 1 else self.order[index],
            part=self.part if self.part is None or self.part.ndim == 1 else self.part[index],
        )

    def reordered(self, order: Tensor | None) -> Tokens:
        """Apply one permutation to values, coordinates, mask and parts together.

        Args:
            order: [N] or [B, N] int64; place t of the result holds token `order[t]`. None changes nothing.
        """
        if order is None:
            return self
        if self.order is not None:
            raise ValueError("these tokens have been reordered already; an order is applied once")
        return Tokens(
            values=_take(self.values, order),
            coords=_take_coords(self.coords, order),
            mask=None if self.mask is None else _take(self.mask, order),
            order=order,
            part=None if self.part is None else _take_shared(self.part, order),
        )

    def canonical(self, features: Tensor) -> Tensor:
        """Bring per-token features [B, N, ...] back from this order to the canonical one."""
        if self.order is None:
            return features
        return _take(features, torch.argsort(self.order, dim=-1))

    def to(self, device: torch.device) -> Tokens:
        """Move to a device; shared coordinates stay where they are (see `coords`)."""
        shared = self.coords.ndim == 2
        return replace(
            self,
            values=self.values.to(device, non_blocking=True),
            coords=self.coords if shared else self.coords.to(device, non_blocking=True),
            mask=None if self.mask is None else self.mask.to(device, non_blocking=True),
            order=None if self.order is None else self.order.to(device, non_blocking=True),
            part=None if self.part is None else self.part.to(device, non_blocking=True),
        )


@dataclass(frozen=True, eq=False)
class Sketch:
    """How samples are drawn, and where their tokens lie on the drawing.

    Attributes:
        canvas: pictures between 0 and 1, [B, H, W] grey or [B, H, W, 3] RGB, the first row on top; or with `curves`
            C curves of L points, [B, L, C] in any unit, NaN where there is nothing to draw.
        grid: (rows, columns) of equal cells that cover the canvas; N = rows * columns, and token i in canonical
            order lies in row i // columns and column i % columns. Or (slices, rows, columns), of tokens on three axes
            such as time, row and column: the canvas is then that of `of_slices`.
        curves: the canvas holds curves. Where the grid has C rows, each of them has a row of its own.
    """

    canvas: Tensor
    grid: tuple[int, int] | tuple[int, int, int]
    curves: bool = False

    @classmethod
    def of_slices(cls, slices: Tensor, grid: tuple[int, int, int]) -> Sketch:
        """One picture of S slices [B, S, H, W] or [B, S, H, W, 3], each of rows x columns cells; see `mosaic`."""
        return cls(mosaic(slices), grid)

    @property
    def table(self) -> tuple[int, int]:
        """Rows and columns of cells on the canvas; more than N where the last line of slices is not full."""
        slices, rows, columns = (1, *self.grid) if len(self.grid) == 2 else self.grid
        across = slices_across(slices)
        return -(-slices // across) * rows, across * columns

    def cells(self) -> Tensor:
        """The cell of every token in canonical order, counted along the rows of `table`: [N] int64 on the CPU."""
        slices, rows, columns = (1, *self.grid) if len(self.grid) == 2 else self.grid
        across = slices_across(slices)
        part, row, column = torch.meshgrid(*map(torch.arange, (slices, rows, columns)), indexing="ij")
        return ((part // across * rows + row) * across * columns + part % across * columns + column).flatten()


def slices_across(slices: int) -> int:
    """How many pictures stand in a line, up to four times as many as there are lines, with the fewest gaps."""
    root = math.isqrt(slices - 1) + 1
    fit = [across for across in range(root, slices + 1) if across <= 4 * -(-slices // across)]
    return min(fit, key=lambda across: (-slices % across, -across))


def mosaic(slices: Tensor) -> Tensor:
    """Pictures [B, S, H, W] or [B, S, H, W, C] in lines of `slices_across`, from the left: one picture a sample.

    [B, H * lines, W * across] or the same with C behind; a gap in the last line is black.
    """
    samples, count, height, width, *rest = slices.shape
    across = slices_across(count)
    lines = -(-count // across)
    whole = slices.new_zeros(samples, lines * across, height, width, *rest)
    whole[:, :count] = slices
    table: Tensor = whole.unflatten(1, (lines, across)).transpose(2, 3)
    return table.reshape(samples, lines * height, across * width, *rest)


class Signal(NamedTuple):
    """What samples look or sound like, made from their tokens by `Modality.decode`.

    Attributes:
        kind: what `data` holds.
        data: pictures uint8 [B, C, H, W], C being 1 or 3, the first row on top; sound float32 [B, n], between -1 and
            1; curves float32 [B, L, C], NaN where there is nothing; or symbols int64 [B, n], -1 where there is none.
        rate: points of sound a second, in Hz.
    """

    kind: Literal["picture", "sound", "curves", "symbols"]
    data: Tensor
    rate: int | None = None


class Law(NamedTuple):
    """The distribution of every token given those before it, in raw tokens as they stand: a normal one, or any.

    Attributes:
        mean: [B, N, P] of token t given tokens 0 to t - 1, the first given none.
        covariance: [N, P, P] float64, or [B, N, P, P] where samples differ.
        drawn: (count, generator) -> [count, B, N, P] of a distribution that is not normal; None: it is.
    """

    mean: Tensor
    covariance: Tensor
    drawn: Callable[[int, torch.Generator | None], Tensor] | None = None

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """So many tokens at every place, each after the given ones: [count, B, N, P]."""
        if self.drawn is not None:
            return self.drawn(count, generator)
        noise = torch.randn(count, *self.mean.shape, generator=generator)
        apart: Tensor = torch.linalg.cholesky(self.covariance).to(noise.dtype) @ noise[..., None]
        return self.mean + apart[..., 0]


class ImageInput(NamedTuple):
    """What an image is and what is done to it before a network reads it, in the terms of image processors.

    Attributes:
        size: (height, width) in pixels. patch: (height, width) of a token. channels: C.
        mean, std: [C] of the pixels, these being between 0 and 1.
        order: the name of the order that patches are read in.
        crop_ratio: the share of the scaled image's sides that the centre crop keeps (timm's crop_pct).
        squash: the image is scaled to its target without keeping its own shape.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: str = "raster"
    crop_ratio: float = 1.0
    squash: bool = False


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def cached(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Make tensors once for equal arguments, and outside of inference mode: autograd can't save those made in it.

    They are shared: do not write to them. A graph of any length that is being traced makes its own.
    """
    kept = lru_cache(maxsize=256)(torch.inference_mode(False)(function))

    @wraps(function)
    def found(*args: Arguments.args, **named: Arguments.kwargs) -> Made:
        traced = any(isinstance(each, torch.SymInt) for each in args)
        return (function if traced else kept)(*args, **named)  # type: ignore[arg-type]

    return found


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Index the token axis of x [B, N, ...] with order [N] or [B, N]."""
    order = order.to(x.device)
    if order.ndim == 1:
        return x.index_select(1, order)
    return x[torch.arange(order.shape[0], device=x.device)[:, None], order]


def _take_coords(coords: Tensor, order: Tensor) -> Tensor:
    """The same for coordinates, whose token axis comes first when all samples share them."""
    return _take(coords, order) if coords.ndim == 3 else _of_all(coords, order)


def _take_shared(x: Tensor, order: Tensor) -> Tensor:
    """The same for one number a token, [N] or [B, N]."""
    return _take(x, order) if x.ndim == 2 else _of_all(x, order)


def _of_all(shared: Tensor, order: Tensor) -> Tensor:
    """What all samples share, [N, ...], in the order [N] or [B, N]."""
    if order.ndim == 1:
        return shared[order.to(shared.device)]
    return shared.to(order.device, non_blocking=True)[order]  # where the order is: fetching that would wait for it
