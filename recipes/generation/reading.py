"""What is read before anything is generated: samples of a split, and which of their tokens are given.

Shapes: B samples of a batch, S of all, N tokens, P numbers in a raw token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.basics import UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.runtime.data import plain_batches
from nepa_core.tokens import Tokens
from recipes.statistics.held_out import NUMBER, Numbered, clusters_of, is_chained

BYTES = 2**29
"""Most that the raw tokens of the samples of a split may take."""
_CPU = torch.device("cpu")


class Samples(NamedTuple):
    """Samples of a split, in memory.

    Attributes:
        parts: in the order of prediction, on the CPU. given: which tokens are, bool [B, N] of each part; padding too.
        numbers: [S] int64, in the split. clusters: [S], see `clusters_of`. chained: see `is_chained`.
        whole: how many the split has.
    """

    parts: list[Tokens]
    given: list[Tensor]
    numbers: Tensor
    clusters: Tensor
    chained: bool
    whole: int

    @property
    def longest(self) -> int:
        """N, of the longest part."""
        return max(part.values.shape[1] for part in self.parts)

    def one(self, index: int) -> tuple[Tokens, Tensor]:
        """A sample [1, N, P], and what of it is given [1, N]."""
        for part, given in zip(self.parts, self.given, strict=True):
            if index < len(part.values):
                row = torch.tensor([index])
                return part.rows(row), given[row]
            index -= len(part.values)
        raise IndexError(index)


class Kept(NamedTuple):
    """What of a sample is given.

    Attributes:
        keep: a share of its tokens below 1, or so many, first in the order of prediction.
        region: the rest, where it is that: rows and columns [y0, x0, y1, x1] of the tokens' grid, from 0, the second
            ones excluded; [x0, x1] of tokens in one row, or [s0, y0, x0, s1, y1, x1] where there are slices, too.
    """

    keep: float = 0.5
    region: tuple[int, ...] | None = None


def read_samples(data: Modality, split: str, most: int, batch: int, kept: Kept, *, bos: bool, seed: int) -> Samples:
    """At most so many samples, drawn from the whole split, and no more than fit into half a gibibyte.

    Those of which nothing is to be made are left out.

    Raises:
        UserError: that is all of them; none can be read; or the region is not on the grid.
    """
    source = data.samples_of(split)
    batches = plain_batches(
        Numbered(source), batch=batch, device=_CPU, limit=most, seed=seed, tokenize=data.tokenize,
        of="training" if split == "train" else "held-out",
    )  # fmt: skip
    parts, given, numbers, size = list[Tokens](), list[Tensor](), list[Tensor](), 0
    for each in batches:
        number = each.pop(NUMBER)
        tokens, known = arranged(data, data.tokenize(each), kept, bos=bos)
        rows = (~known).any(1).nonzero()[:, 0]
        if not len(rows):
            continue
        size += 4 * tokens.values[rows].numel()
        if parts and size > BYTES:
            break
        parts.append(tokens.rows(rows))
        given.append(known[rows])
        numbers.append(number[rows])
    if not parts:
        raise UserError(f"keep={kept.keep} leaves nothing of any {split} sample to make: keep less")
    found = torch.cat(numbers)
    return Samples(parts, given, found, clusters_of(source, found), is_chained(source), len(cast(Sized, source)))


def arranged(data: Modality, tokens: Tokens, kept: Kept, *, bos: bool) -> tuple[Tokens, Tensor]:
    """Tokens in the order of prediction, with a region behind the rest, and which are given [B, N]; padding is.

    Args:
        tokens: in canonical order.
    """
    if kept.region is not None:
        return _around(data, tokens, _region(kept.region, data.describe(tokens).grid))
    tokens, count = tokens.reordered(data.order(tokens)), tokens.values.shape[1]
    if kept.keep >= count:
        raise UserError(
            f"keep={kept.keep} leaves nothing of the {count} tokens of a sequence to make: give fewer, or a share "
            "below 1"
        )
    real = tokens.real.cpu()
    wanted = (kept.keep * real.sum(1, keepdim=True)).floor() if isinstance(kept.keep, float) else kept.keep
    least = torch.as_tensor(wanted).clamp(min=0 if bos else 1)
    return tokens, ~real | (real.cumsum(1) <= least)


def _around(data: Modality, tokens: Tokens, made: Tensor) -> tuple[Tokens, Tensor]:
    """Those of the region [N] after the others, each in the order that the sample has; padding last."""
    samples, count = tokens.values.shape[:2]
    order = data.order(tokens)
    each = (torch.arange(count) if order is None else order.cpu()).expand(samples, count)
    later = torch.where(tokens.real.cpu().gather(1, each), made[each].long(), 2)
    each = each.gather(1, later.argsort(dim=1, stable=True))
    read = tokens.reordered(each)
    return read, ~made[each] | ~read.real.cpu()


def _region(region: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Which tokens lie in it, bool [N] in canonical order.

    Raises:
        UserError: it is not on the grid, or empty.
    """
    rows, columns = grid[-2:]
    if len(region) == 2 and len(grid) == 2 and rows == 1:
        region = (0, region[0], 1, region[1])
    first, end = region[: len(region) // 2], region[len(region) // 2 :]
    if len(first) != len(grid) or not all(0 <= a < b <= side for a, b, side in zip(first, end, grid, strict=True)):
        wanted = f"[y0,x0,y1,x1] with y up to {rows} and x up to {columns}" if rows > 1 else f"[x0,x1] up to {columns}"
        lie = f"{rows} rows and {columns} columns"
        if len(grid) == 3:
            wanted = f"[s0,y0,x0,s1,y1,x1] with s up to {grid[0]}, y up to {rows} and x up to {columns}"
            lie = f"{grid[0]} slices of {lie}"
        raise UserError(
            f"region={list(region)}: the tokens lie on {lie}; give {wanted}, from 0, the second beyond the first"
        )
    found = torch.zeros(grid, dtype=torch.bool)
    found[tuple(map(slice, first, end))] = True
    return found.flatten()


def check_region(data: Modality, model: NEPA) -> None:
    """Whether a network can make any part of a sample from the rest.

    Raises:
        UserError: it was trained on one order, or is not told which token comes next.
    """
    if not data.draws_order() or model.config.predict_position == "off":
        raise UserError(
            "region= needs a network that was trained on orders of each sample's own and is told where the next token "
            "lies: train one with data.patch_order=random_per_sample model.predict_position=rotate (docs/orders.md), "
            "or give keep="
        )


def scored(tokens: Tokens, *, bos: bool) -> Tensor:
    """The tokens that a network predicts from true ones, bool [B, N] in the order of prediction."""
    real = tokens.real.cpu()
    return real & F.pad(real[:, :-1], (1, 0), value=bos)


def untold(tokens: Tokens, model: NEPA) -> Tokens:
    """The same for a linear model, which is told positions of orders of each sample's own if the network is."""
    own = tokens.order is not None and tokens.order.ndim == 2
    return replace(tokens, order=None) if own and model.config.predict_position == "off" else tokens


def signals(parts: Iterable[Tokens], longest: int) -> Tensor:
    """Samples as vectors [S, longest * P]: raw tokens in canonical order, padding 0."""
    found = [F.pad(each.canonical(each.values * each.real[..., None]), _behind(each, longest)) for each in parts]
    return torch.cat(found).flatten(1)


def _behind(tokens: Tokens, longest: int) -> tuple[int, int, int, int]:
    return (0, 0, 0, longest - tokens.values.shape[1])
