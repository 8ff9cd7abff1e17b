"""Several short sequences in one row, so that the predictor spends nothing on padding.

A batch [B, T] that is half padding becomes rows [R, L] with fewer rows; attention is then block-diagonal, and the
outputs go back to where their tokens stood. So everything outside the predictor (BOS, coordinates, targets, masks,
the loss) is per sequence as before, and the results are those of the padded batch.

Shapes: B samples, T places, R rows of L places, L the longest sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the real tokens of a batch lie in packed rows.

    Attributes:
        source: [R, L] int64, the place among the B * T that each place of a row was taken from (0 for none).
        owner: [R, L] int64, the sample that it belongs to, -1 for none.
        target: [B, T] int64, the place among the R * L that each real token went to (0 for the others).
        mask: [B, T] bool, True for a real token.
    """

    source: Tensor
    owner: Tensor
    target: Tensor
    mask: Tensor

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


def pack_rows(mask: Tensor) -> Packing:
    """Share out the real tokens of mask [B, T] bool among rows as long as the longest sequence.

    The longest come first, each goes to the first row that has room for it. The lengths are read on the host, which
    on CUDA waits for the device once. Tokens missing within a sequence leave no gap.
    """
    lengths = mask.sum(1).tolist()
    width = max(1, *lengths)
    rows, room = [0] * len(lengths), [width] * len(lengths)
    starts = [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        row = next(row for row, left in enumerate(room) if left >= lengths[sample])
        rows[sample], starts[sample] = row, width - room[row]
        room[row] -= lengths[sample]
    count, device = max(rows) + 1, mask.device
    first = torch.tensor([row * width + start for row, start in zip(rows, starts, strict=True)], device=device)
    target = torch.where(mask, first[:, None] + mask.cumsum(1) - 1, 0)
    source = torch.zeros(count * width, dtype=torch.int64, device=device)
    owner = torch.full_like(source, -1)
    taken = mask.flatten().nonzero()[:, 0]
    source[target[mask]] = taken
    owner[target[mask]] = taken // mask.shape[1]
    return Packing(source.view(count, width), owner.view(count, width), target, mask)
