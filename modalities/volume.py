"""Volumes: three-dimensional arrays cut into cubes.

Shapes: B samples, C channels, D x H x W voxels; cubes of f x p x q voxels; N = slices * rows * columns
= (D / f) * (H / p) * (W / q) tokens, P = C * f * p * q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from modalities.data.labelled import folds_of
from modalities.data.volumes import KIND, SUFFIXES, Fit, SourceName, Volumes, open_files, open_source, open_volumes
from modalities.image import cubify, patch_centres, uncubify
from modalities.orders import Ordered
from nepa_core.basics import Batch, number_of
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens, mosaic

SHOWN = (-2.0, 4.0)
"""Standardised values that are drawn black and white."""


class Volume(Ordered, Modality):
    """Volumes of one size; a token holds the standardised voxels of one cube.

    Attributes:
        source, root, fold: where volumes come from, and which fold is held out, see
            `modalities.data.volumes.open_source`.
        size: (D, H, W) in voxels, to which every volume is brought. fit: how, see `modalities.data.volumes`: "scale"
            changes resolution and shape, "crop" keeps them and cuts the middle out, or pads.
        patch: (f, p, q) of a cube in voxels; it divides the size.
        channels: C. Of files that hold [D, H, W] it is 1.
        mean, std: of each channel over the data set. null takes those of each volume instead, over its channels one by
            one: for scanners without a common scale.
        patch_order, order_seed: the order in which cubes are predicted, see `modalities.orders`.
    """

    token_name: ClassVar[str] = "cube"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    built_in: ClassVar[str] = "shapes"

    source: SourceName
    size: tuple[PositiveInt, PositiveInt, PositiveInt]
    patch: tuple[PositiveInt, PositiveInt, PositiveInt]
    root: str | None = None
    channels: PositiveInt = 1
    fit: Fit = "scale"
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    fold: str | None = Field(default=None, exclude_if=lambda fold: fold is None)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(side % cut for side, cut in zip(self.size, self.patch, strict=True)):
            below = [side // cut * cut for side, cut in zip(self.size, self.patch, strict=True)]
            above = [-(-side // cut) * cut for side, cut in zip(self.size, self.patch, strict=True)]
            near = f"{below} and {above}" if min(below) else f"{above}"
            raise ValueError(
                f"data.patch={list(self.patch)} does not divide data.size={list(self.size)}; the nearest sizes that it "
                f"divides: {near} (volumes of any size are brought to it)"
            )
        if self.source == "folder" and self.root is None:
            raise ValueError("data.source=folder needs data.root=DIR, the folder (or CSV file) with the volumes")
        if self.fold is not None and self.source != "folder":
            raise ValueError("data.fold is for data.source=folder")
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std are given both, or neither: each volume has its own then")
        for key, values in {"mean": self.mean, "std": self.std}.items():
            if values is not None and len(values) != self.channels:
                raise ValueError(f"data.{key} has {number_of(len(values), 'number')} for data.channels={self.channels}")
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """(slices, rows, columns) of cubes."""
        (depth, height, width), (f, p, q) = self.size, self.patch
        return depth // f, height // p, width // q

    def dataset(self, split: str) -> Volumes:
        return open_volumes(
            self.source,
            split,
            size=self.size,
            channels=self.channels,
            fit=self.fit,
            root=self.root,
            fold=self.fold,
        )

    def folds(self) -> tuple[str, ...]:
        return folds_of(self.root, KIND) if self.source == "folder" and self.root is not None else ()

    def tokenize(self, batch: Batch) -> Tokens:
        """Cubes of batch["volume"] float32 [B, C, D, H, W], standardised: values [B, N, P] float32.

        Coordinates are (z, y, x), each from -1 to 1 over the volume.
        """
        volume: Tensor = batch["volume"]
        if self.mean is None or self.std is None:
            mean = volume.mean((2, 3, 4), keepdim=True)
            std = volume.std((2, 3, 4), keepdim=True, correction=0).clamp(min=1e-6)
        else:
            mean, std = (volume.new_tensor(each)[:, None, None, None] for each in (self.mean, self.std))
        return Tokens(values=cubify((volume - mean) / std, self.patch), coords=patch_centres(*self.grid))

    def held_out_as(self) -> str:
        """ "voxels: scaled to 64 x 64 x 64"."""
        size = " x ".join(map(str, self.size))
        return f"voxels: {f'scaled to {size}' if self.fit == 'scale' else f'the middle {size}, padded where shorter'}"

    def classes(self) -> tuple[str, ...] | None:
        return open_source(self.source, "train", root=self.root).classes

    def token_dim(self) -> int:
        return self.channels * math.prod(self.patch)

    def order(self, tokens: Tokens) -> Tensor | None:
        return self.ordered(tokens, self.grid)

    def files(self, paths: Sequence[str]) -> Volumes:
        """Volume files by name.

        Raises:
            UnreadableSample: from the data set, on access to a file that holds no volume.
        """
        return open_files(paths, self.size, self.channels, self.fit)

    def describe(self, tokens: Tokens) -> Sketch:
        """The middle slice of every layer of cubes, side by side; see `SHOWN`."""
        slices = self._slices(tokens)[:, self.patch[0] // 2 :: self.patch[0]]
        return Sketch.of_slices(slices[..., 0] if slices.shape[-1] == 1 else slices, self.grid)

    def decode(self, tokens: Tokens) -> Signal:
        """All slices, side by side in lines."""
        levels = (255 * self._slices(tokens)).round().to(torch.uint8)
        return Signal("picture", mosaic(levels).permute(0, 3, 1, 2))

    def _slices(self, tokens: Tokens) -> Tensor:
        """Between 0 and 1, [B, D, H, W, C]: three channels are colours, others are averaged to one."""
        low, high = SHOWN
        volume = uncubify(tokens.canonical(tokens.values), self.size, self.patch)
        shown = volume if self.channels == 3 else volume.mean(1, keepdim=True)
        return ((shown - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 4, 1)
