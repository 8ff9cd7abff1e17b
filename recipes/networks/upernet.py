"""UPerNet (Xiao et al. 2018, arXiv 1807.10221) on a Transformer that has one resolution, as BEiT and MAE use it.

Shapes: B samples, D width of the network, r x c tokens, K channels of the head, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from nepa_core.basics import FROZEN

POOLS = (1, 2, 3, 6)
"""Sides of the pooled maps of the pyramid."""


class UPerNetConfig(BaseModel):
    """The head.

    Attributes:
        levels: blocks, counted from 0, after which the four feature maps are taken, from fine to coarse. The last is
            the network's last block, whose output goes through the final norm.
        channels: K of the pyramid.
        dropout: share of the channels dropped before a classifier, in training.
        auxiliary_channels: K of the FCN head on the third level, whose loss is added with `auxiliary_weight`.
    """

    model_config = FROZEN

    levels: tuple[int, int, int, int]
    channels: PositiveInt
    dropout: float = Field(ge=0, lt=1)
    auxiliary_channels: PositiveInt
    auxiliary_weight: float = Field(ge=0)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest level, a feature pyramid over all four, one classifier on their concatenation.

    BatchNorm follows every convolution. Its running statistics are buffers: a checkpoint holds them, an average of
    the weights does not (see `recipes.training.segmentation`).

    Args:
        dim: D. classes: C.
    """

    def __init__(self, config: UPerNetConfig, dim: int, classes: int) -> None:
        super().__init__()
        width = config.channels
        self.rescale = nn.ModuleList(
            [
                nn.Sequential(_double(dim), nn.BatchNorm2d(dim), nn.GELU(), _double(dim)),
                _double(dim),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pooled = nn.ModuleList(_convolution(dim, width, 1) for _ in POOLS)
        self.pyramid = _convolution(dim + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(_convolution(dim, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_convolution(width, width, 3) for _ in range(3))
        self.fuse = _convolution(4 * width, width, 3)
        self.classifier = _classifier(width, classes, config.dropout)
        self.auxiliary = nn.Sequential(
            _convolution(dim, config.auxiliary_channels, 3),
            _classifier(config.auxiliary_channels, classes, config.dropout),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps [B, D, r, c], from fine to coarse -> logits [B, C, 4 r, 4 c]."""
        levels = [rescale(x) for rescale, x in zip(self.rescale, maps, strict=True)]
        top = self._pool(levels[3])
        merged = [top]  # from coarse to fine
        for level, lateral in zip(reversed(levels[:3]), reversed(self.lateral), strict=True):
            x = lateral(level)
            merged.append(x + resize(merged[-1], x))
        finest = [smooth(x) for smooth, x in zip(self.smooth, reversed(merged[1:]), strict=True)]
        fused = torch.cat([resize(x, finest[0]) for x in (*finest, top)], dim=1)
        logits: Tensor = self.classifier(self.fuse(fused))
        return logits

    def auxiliary_logits(self, maps: Sequence[Tensor]) -> Tensor:
        """Of the FCN head on the third map: [B, C, r, c]. Used in training only."""
        logits: Tensor = self.auxiliary(maps[2])
        return logits

    def _pool(self, x: Tensor) -> Tensor:
        pools = [resize(f(F.adaptive_avg_pool2d(x, side)), x) for f, side in zip(self.pooled, POOLS, strict=True)]
        out: Tensor = self.pyramid(torch.cat([x, *pools], dim=1))
        return out


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another map."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _double(dim: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _classifier(inputs: int, classes: int, dropout: float) -> nn.Sequential:
    linear = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout), linear)
