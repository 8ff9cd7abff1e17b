"""An embedder that standardises its tokens, and the statistics of training tokens that it does so by.

Shapes: B samples, N tokens, P numbers in a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nepa_core.basics import UnreadableSample, UserError
from nepa_core.modality import Modality
from nepa_core.predictor import init_weights
from nepa_core.tokens import cached

STATISTICS_CLIPS = 1000


class StandardisedLinear(nn.Linear):
    """linear((x - mean) / std); mean and std [P] are buffers, saved with the weights where they are `kept`."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, dim: int, *, kept: bool = True) -> None:
        super().__init__(len(mean), dim)
        self.register_buffer("mean", mean.clone(), persistent=kept)
        self.register_buffer("std", std.clone(), persistent=kept)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, P] -> [B, N, dim]."""
        return super().forward((x - self.mean) / self.std)


@cached
@torch.no_grad()
def token_statistics(data: Modality) -> tuple[Tensor, Tensor]:
    """Mean and std [P] of the real tokens of up to 1,000 training clips.

    A number that hardly varies (a band above what was recorded) counts as a tenth as wide as the numbers are on
    average: dividing by less would make its noise loud.

    Raises:
        UserError: no clip can be read.
    """
    clips: Any = data.dataset("train")
    chosen = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))[:STATISTICS_CLIPS]
    count, total, squares = 0, torch.zeros(data.token_dim()).double(), torch.zeros(data.token_dim()).double()
    unreadable = ""
    for index in chosen.tolist():
        try:
            tokens = data.tokenize(clips.__getitems__([index]))
        except UnreadableSample as error:
            unreadable = unreadable or str(error)
            continue
        rows = tokens.values[tokens.mask].double()
        count += len(rows)
        total += rows.sum(0)
        squares += rows.square().sum(0)
    if not count:
        raise UserError(f"no training clip can be read; the first: {unreadable}")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), std.clamp(min=0.1 * float(std.mean()) + 1e-6).float()
