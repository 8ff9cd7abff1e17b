"""Several short sequences in one row, so that the predictor spends nothing on padding.

A batch [B, T] that is half padding becomes rows [R, L] with fewer rows; attention is then block-diagonal, and the
outputs go back to where their tokens stood. So everything outside the predictor (BOS, coordinates, targets, masks,
the loss) is per sequence as before, and the results are those of the padded batch.

Where a kernel attends within sequences by their lengths (see `attention.has_varlen_kernel`), all of them lie in one
row without a gap; elsewhere rows are as long as the longest sequence, and a dense mask keeps sequences apart.

Shapes: B samples, T places, R rows of L places, S sequences (the samples with any real token).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """The sequences of a single row, one behind the other without a gap.

    Attributes:
        cu_seqlens: [S + 1] int32, where each begins, and where the last ends.
        longest: number of tokens of the longest one.
        lengths: the same as numbers on the host. Compiled code must not look at them: it would be compiled anew for
            every batch.
    """

    cu_seqlens: Tensor
    longest: int
    lengths: tuple[int, ...]


class Packing(NamedTuple):
    """Where the real tokens of a batch lie in packed rows.

    Attributes:
        source: [R, L] int64, the place among the B * T that each place of a row was taken from (0 for none).
        owner: [R, L] int64, the sample that it belongs to, -1 for none.
        target: [B, T] int64, the place among the R * L that each real token went to (any for the others).
        mask: [B, T] bool, True for a real token.
        sequences: what lies in a single flat row; None for rows that need the mask of `allowed`.
    """

    source: Tensor
    owner: Tensor
    target: Tensor
    mask: Tensor
    sequences: Sequences | None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [R, L, D]; places without a token hold some token's content, which nobody looks at."""
        return x.flatten(0, 1).index_select(0, self.source.flatten()).view(*self.source.shape, -1)

    def unpack(self, x: Tensor) -> Tensor:
        """[R, L, D] -> [B, T, D], zero where no token is real."""
        back = x.flatten(0, 1).index_select(0, self.target.flatten()).view(*self.target.shape, -1)
        return torch.where(self.mask[..., None], back, 0.0)

    def allowed(self, *, causal: bool) -> Tensor:
        """Who may look at whom: places of one sequence at each other, [R, 1, L, L] bool."""
        same = self.owner[:, None, :, None] == self.owner[:, None, None, :]
        return same.tril() if causal else same


def pack_rows(mask: Tensor, *, flat: bool = False) -> Packing:
    """Share out the real tokens of mask [B, T] bool among rows as long as the longest sequence.

    The longest come first, each goes to the row in which it leaves the least room. The lengths are read on the host,
    which on CUDA waits for the device once. Tokens missing within a sequence leave no gap.

    Args:
        flat: one row for all, the longest first.
    """
    lengths = mask.sum(1).tolist()
    width = max(1, sum(lengths) if flat else max(lengths))
    order = sorted((sample for sample, length in enumerate(lengths) if length), key=lengths.__getitem__, reverse=True)
    starts, rows = [0] * len(lengths), list[tuple[int, int]]()  # rows: the room left and the number of each, sorted
    for sample in order:
        at = bisect_left(rows, (lengths[sample], 0))
        room, row = rows.pop(at) if at < len(rows) else (width, len(rows))
        starts[sample] = (row + 1) * width - room
        insort(rows, (room - lengths[sample], row))
    places, device = max(1, len(rows)) * width, mask.device
    first = torch.tensor(starts, device=device)
    target = (first[:, None] + mask.cumsum(1) - 1).clamp(min=0)
    # What is not real goes to a place too many: so the number of real tokens need not be known.
    source = torch.full((places + 1,), -1, device=device)
    source.scatter_(0, torch.where(mask, target, places).flatten(), torch.arange(mask.numel(), device=device))
    source = source[:-1].view(-1, width)
    sequences = _sequences([lengths[sample] for sample in order] or [1], device) if flat else None
    return Packing(source.clamp(min=0), source // mask.shape[1], target, mask, sequences)


def _sequences(lengths: list[int], device: torch.device) -> Sequences:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Sequences(ends, max(lengths), tuple(lengths))
