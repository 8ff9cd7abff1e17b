"""Video: clips cut into tubelets, patches of several frames.

Shapes: B clips, T frames, C channels, H x W pixels; tubelets of f frames, p x q pixels each; N = steps * rows * columns
= (T / f) * (H / p) * (W / q) tokens, P = C * f * p * q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from modalities.data.image_augment import augmentation
from modalities.data.image_decode import Channels
from modalities.data.labelled import folds_of
from modalities.data.video import (
    KIND,
    SUFFIXES,
    ClipForm,
    Clips,
    Label,
    SourceName,
    open_files,
    open_source,
    open_video,
)
from modalities.image import channel_statistics, cubify, patch_centres, uncubify
from modalities.orders import Ordered
from nepa_core.basics import Batch, number_of
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens, mosaic


class Video(Ordered, Modality):
    """Clips of one length and size; a token holds the standardised pixels of one tubelet.

    Attributes:
        source, root, fold: where videos come from, and which fold is held out, see `modalities.data.video.open_source`.
        label: of the embedded digits, "class" or "direction".
        frames: in a clip. A shorter video's last frame is repeated, and that is said.
        rate: frames a second to which videos are brought, by their time stamps; null is that of each file. Folders of
            frames have no clock, and are taken as they are.
        stride: a clip takes every so many of these frames.
        clips: of each held-out video, evenly spread over it; predictions of fine-tuned networks are averaged over them.
        random_start: training clips begin anywhere, else in the middle; probes and baselines read the middle.
        size: (height, width) in pixels, to which every frame is brought.
        patch: (frames, height, width) of a tubelet; it divides frames and size.
        channels, mean, std, crop_ratio: as of `modalities.image.Images`.
        augment: of training clips, the same for all frames: "crop" (random size and place)
            or "crop_flip"; not for classes such as left and right.
        patch_order, order_seed: the order of tubelets, see `modalities.orders`; "raster" ends a step before the next.
    """

    token_name: ClassVar[str] = "tubelet"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    built_in: ClassVar[str] = "digits"

    source: SourceName
    frames: PositiveInt
    size: tuple[PositiveInt, PositiveInt]
    patch: tuple[PositiveInt, PositiveInt, PositiveInt]
    channels: Channels
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    root: str | None = None
    label: Label = "class"
    rate: PositiveFloat | None = None
    stride: PositiveInt = 1
    clips: PositiveInt = 1
    augment: Literal["none", "crop", "crop_flip"] = "none"
    crop_ratio: float = Field(default=1.0, ge=0.01, le=1)
    random_start: bool = True
    fold: str | None = Field(default=None, exclude_if=lambda fold: fold is None)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, side, cut in zip(("frames", "size", "size"), (self.frames, *self.size), self.patch, strict=True):
            if side % cut:
                near = f"{f'{side // cut * cut} and ' if side >= cut else ''}{(side // cut + 1) * cut}"
                raise ValueError(
                    f"data.patch={list(self.patch)}: {cut} does not divide {side} of data.{key}; the nearest that it "
                    f"divides: {near}"
                )
        if self.source == "folder" and self.root is None:
            raise ValueError("data.source=folder needs data.root=DIR, the folder (or CSV file) with the videos")
        if self.fold is not None and self.source != "folder":
            raise ValueError("data.fold is for data.source=folder")
        if self.source == "folder" and self.label != "class":
            raise ValueError("data.label=direction is for data.source=digits; those of files are in folders or a CSV")
        for key, values in {"mean": self.mean, "std": self.std}.items():
            if len(values) != self.channels:
                raise ValueError(f"data.{key} has {number_of(len(values), 'number')} for data.channels={self.channels}")
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """(steps, rows, columns) of tubelets."""
        (f, p, q), (height, width) = self.patch, self.size
        return self.frames // f, height // p, width // q

    @property
    def form(self) -> ClipForm:
        """What a clip is."""
        return ClipForm(self.frames, self.rate, self.stride, self.channels)

    def dataset(self, split: str) -> Clips:
        train = split == "train"
        clips = self.clips if not train else None if self.random_start else 1
        return open_video(
            self.source,
            split,
            form=self.form,
            size=self.size,
            crop_ratio=self.crop_ratio,
            augment=augmentation(self.augment, self.size, self.mean) if train else None,
            root=self.root,
            label=self.label,
            clips=clips,
            fold=self.fold,
        )

    def folds(self) -> tuple[str, ...]:
        return folds_of(self.root, KIND) if self.source == "folder" and self.root is not None else ()

    def tokenize(self, batch: Batch) -> Tokens:
        """Tubelets of batch["video"] uint8 [B, T, C, H, W], standardised: values [B, N, P] float32.

        Coordinates are (time, y, x), each from -1 to 1 over the clip.
        """
        video: Tensor = batch["video"]
        mean, std = channel_statistics(self.mean, self.std, video.device)
        pixels = ((video / 255 - mean) / std).transpose(1, 2)
        return Tokens(values=cubify(pixels, self.patch), coords=patch_centres(*self.grid))

    def held_out_as(self) -> str:
        """ "clips: 2 of each video, predictions averaged; 8 frames at ..."."""
        height, width = (int(side / self.crop_ratio) for side in self.size)
        several = "the middle one of each video" if self.clips == 1 else f"{self.clips} of each video, averaged"
        at = "its own frame rate" if self.rate is None else f"{self.rate:g} frames a second"
        return (
            f"clips: {several}, {self.frames} frames {f'{self.stride} apart ' if self.stride > 1 else ''}at {at}; "
            f"scaled to cover {height} x {width}, centre crop {self.size[0]} x {self.size[1]}"
        )

    def classes(self) -> tuple[str, ...] | None:
        return open_source(self.source, "train", root=self.root, label=self.label).classes

    def token_dim(self) -> int:
        return self.channels * math.prod(self.patch)

    def order(self, tokens: Tokens) -> Tensor | None:
        return self.ordered(tokens, self.grid)

    def plain(self) -> Video:
        return self.model_copy(update={"augment": "none", "random_start": False})

    def files(self, paths: Sequence[str]) -> Clips:
        """Video files, or folders of frames, by name: the middle clip of each.

        Raises:
            UnreadableSample: from the data set, on access to a file of which no frame can be read.
        """
        return open_files(paths, self.form, self.size, self.crop_ratio)

    def describe(self, tokens: Tokens) -> Sketch:
        """The first frame of every step, side by side; of one frame in four, where a tubelet has four."""
        frames = self._frames(tokens)[:, :: self.patch[0]]
        return Sketch.of_slices(frames[..., 0] if self.channels == 1 else frames, self.grid)

    def decode(self, tokens: Tokens) -> Signal:
        """All frames, side by side in lines."""
        levels = (255 * self._frames(tokens)).round().to(torch.uint8)
        return Signal("picture", mosaic(levels).permute(0, 3, 1, 2))

    def _frames(self, tokens: Tokens) -> Tensor:
        """Pixels between 0 and 1, [B, T, H, W, C]."""
        size = (self.frames, *self.size)
        video = uncubify(tokens.canonical(tokens.values), size, self.patch).transpose(1, 2)
        mean, std = channel_statistics(self.mean, self.std, video.device)
        return (video * std + mean).clamp(0, 1).permute(0, 1, 3, 4, 2)
