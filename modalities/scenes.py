"""Scenes: images of any size in which every pixel has a class, for segmentation.

Shapes: B samples, H x W pixels as stored, h x w of a crop, N = rows * columns patches of p x q pixels, P = 3 * p * q,
C classes. Targets are class numbers from 0; `IGNORED` (255) marks pixels that don't count.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import torch
from einops import rearrange
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.image_decode import LARGEST_IMAGE, SUFFIXES
from modalities.data.listing import printable
from modalities.data.scene_masks import IGNORED, Numbering
from modalities.data.scenes import (
    Augmentation,
    CroppedScenes,
    SceneFiles,
    SceneSource,
    StoredScenes,
    check_classes,
    open_pairs,
    scene_tree,
)
from modalities.image import channel_statistics, patch_centres, patchify, unpatchify
from modalities.orders import Ordered
from nepa_core.basics import Batch
from nepa_core.modality import Modality
from nepa_core.tokens import ImageInput, Sketch, Tokens


class Scenes(Ordered, Modality):
    """Images with a class for every pixel; a token holds the standardised pixels of one patch.

    `dataset` gives crops of one size, for training and for every task that reads batches; `whole` gives the scenes
    as they are stored, for evaluation. The number of patches follows the image: coordinates are patch centres that
    span -1 to 1 on each axis, as in the released models, so a larger image has denser coordinates, not farther ones.
    From 16 patches in pre-training to 37 in a crop of 518 the spacing shrinks by 2.3; pre-training has already
    varied it by 2 either way (`rope_rescale`).

    Attributes:
        root: the folder, see `modalities.data.scenes.open_pairs`; `ADEChallengeData2016` or the folder it lies in.
        source: "folder", or "hub", where `root` is the name of a data set on the Hugging Face hub.
        crop: (height, width) of a training crop and of an evaluation window, in pixels.
        patch: (height, width) of a patch in pixels; it divides the crop.
        short_side: pixels to which the shorter side of a scene is scaled: scale 1 in training and evaluation.
        mean, std: of each channel, pixels being between 0 and 1.
        class_count: C.
        names: of the classes; None reads `objectInfo150.txt` beside the images, or numbers them.
        first_label: the value of class 0 in an annotation; the others follow it.
        ignored_labels: values in an annotation that count neither in the loss nor in a metric, beside 255.
        scales: range of the random scale in training, a factor on `short_side`.
        distort: photometric distortion in training.
        augment: False gives centre crops at scale 1 also of the training split.
        max_pixels: of a stored image or annotation; a larger one is unreadable, and only its header has been read.
        patch_order, order_seed: the order in which patches are predicted, see `modalities.orders`.
    """

    token_name: ClassVar[str] = "patch"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    root: str
    source: SceneSource = "folder"
    crop: tuple[PositiveInt, PositiveInt]
    patch: tuple[PositiveInt, PositiveInt]
    short_side: PositiveInt
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    class_count: int = Field(gt=0, le=IGNORED)
    names: tuple[str, ...] | None = None
    first_label: int = Field(ge=0)
    ignored_labels: tuple[int, ...]
    scales: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    distort: bool = True
    augment: bool = True
    max_pixels: PositiveInt = LARGEST_IMAGE

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(side % patch for side, patch in zip(self.crop, self.patch, strict=True)):
            raise ValueError(f"data.patch={self.patch} does not divide data.crop={self.crop}")
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"data.scales={self.scales}: the lower end comes first")
        if self.names is not None and len(self.names) != self.class_count:
            raise ValueError(f"data.names has {len(self.names)} names for data.class_count={self.class_count}")
        if self.first_label + self.class_count > IGNORED:
            raise ValueError(f"data.first_label={self.first_label}: the last class would be stored as 255 or more")
        last = self.first_label + self.class_count - 1
        for label in self.ignored_labels:
            if not 0 <= label <= IGNORED or self.first_label <= label <= last:
                raise ValueError(f"data.ignored_labels: {label} is a class or no value from 0 to 255")
        return self

    def dataset(self, split: str) -> Dataset[Batch]:
        """{"image": uint8 [3, h, w], "target": uint8 [h, w]} of a split, cropped; see `CroppedScenes`."""
        random = split == "train" and self.augment
        return CroppedScenes(
            self._stored(split), self.crop, self.short_side, Augmentation(self.scales, self.distort) if random else None
        )

    def whole(self, split: str) -> StoredScenes:
        """{"image": uint8 [3, H, W], "target": uint8 [H, W]} of a split as stored: sizes differ, so one to a batch."""
        return self._stored(split)

    def files(self, paths: Sequence[str]) -> Dataset[Batch]:
        """Image files by name, as `dataset` gives held-out scenes; no pixel has a class.

        Raises:
            UnreadableSample: from the data set, on access to a file that is no image.
        """
        return CroppedScenes(self.whole_files(paths), self.crop, self.short_side)

    def whole_files(self, paths: Sequence[str]) -> SceneFiles:
        """Image files by name, as `whole` gives scenes; no pixel has a class."""
        return SceneFiles(paths, self.max_pixels)

    def image_input(self) -> ImageInput:
        """That of a crop."""
        return ImageInput(self.crop, self.patch, 3, self.mean, self.std, order=self.patch_order)

    def _stored(self, split: str) -> StoredScenes:
        numbering = Numbering(self.class_count, self.first_label, self.ignored_labels)
        source = open_pairs(self.root, split, self.source)
        check_classes(source, numbering, self.max_pixels, f"data.root={self.root}, {split}")
        return StoredScenes(source, numbering, self.max_pixels)

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers in a target."""
        found = self.names or _ade_names(self.root)
        fits = found is not None and len(found) == self.class_count
        return found if found and fits else tuple(f"class {number}" for number in range(self.class_count))

    def classes(self) -> None:
        """None: the classes are those of pixels, not of a "label"; `class_names` has them."""

    def token_targets(self, batch: Batch) -> Tensor:
        """See `patch_classes`."""
        return self.patch_classes(batch["target"])

    def patch_classes(self, target: Tensor) -> Tensor:
        """The class that most labelled pixels of a patch have (the first among equals), -1 where none is labelled.

        target uint8 [B, h, w] -> int64 [B, N].
        """
        rows, columns = self.grid((target.shape[1], target.shape[2]))
        cells = rearrange(target, "b (r p) (c q) -> b (r c) (p q)", r=rows, c=columns).long()
        counts = torch.zeros(*cells.shape[:2], IGNORED + 1, device=target.device)
        counts = counts.scatter_add_(2, cells, torch.ones_like(cells, dtype=counts.dtype))[..., : self.class_count]
        most, classes = counts.max(-1)
        return torch.where(most > 0, classes, -1)

    def tokenize(self, batch: Batch) -> Tokens:
        """Patches of batch["image"], uint8 [B, 3, H, W] of any size that the patch divides: values [B, N, P] float32.

        Where the batch has "real", patches that are all padding are masked.
        """
        image = batch["image"]
        if image.dtype != torch.uint8:
            raise TypeError(f'batch["image"] holds uint8 pixels, not {image.dtype}')
        rows, columns = self.grid((image.shape[2], image.shape[3]))
        mean, std = channel_statistics(self.mean, self.std, image.device)
        values = patchify((image / 255 - mean) / std, self.patch)
        mask = _real_patches(batch["real"], rows, columns, self.patch) if "real" in batch else None
        return Tokens(values=values, coords=patch_centres(rows, columns), mask=mask)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches in an image of this size."""
        if any(side % patch for side, patch in zip(size, self.patch, strict=True)):
            raise ValueError(f"the patch {self.patch} does not divide the image {size}; pad it")
        return size[0] // self.patch[0], size[1] // self.patch[1]

    def token_dim(self) -> int:
        return 3 * self.patch[0] * self.patch[1]

    def order(self, tokens: Tokens) -> Tensor | None:
        if self.patch_order == "raster":
            return None  # the grid is read from numbers, which no graph can be traced through
        return self.ordered(tokens, _grid_of(tokens.coords))

    def describe(self, tokens: Tokens) -> Sketch:
        """The images themselves, their standardisation undone; padding is black."""
        rows, columns = _grid_of(tokens.coords)
        size = (rows * self.patch[0], columns * self.patch[1])
        images = unpatchify(tokens.canonical(tokens.values), size, self.patch)
        mean, std = channel_statistics(self.mean, self.std, images.device)
        return Sketch((images * std + mean).clamp(0, 1).permute(0, 2, 3, 1), (rows, columns))

    def plain(self) -> Scenes:
        return self.model_copy(update={"augment": False})


def _grid_of(coords: Tensor) -> tuple[int, int]:
    """(rows, columns) of patches whose centres these are, [N, 2] or [B, N, 2], in any order."""
    coords = coords if coords.ndim == 2 else coords[0]
    columns = int((coords[:, 0] == coords[0, 0]).sum())  # patches at the height of the first one
    return len(coords) // columns, columns


def _real_patches(real: Tensor, rows: int, columns: int, patch: tuple[int, int]) -> Tensor:
    """[B, N] bool: patches with at least one pixel inside real [B, 2], the rows and columns that are no padding."""
    below = torch.arange(rows, device=real.device) * patch[0] < real[:, :1]
    right = torch.arange(columns, device=real.device) * patch[1] < real[:, 1:]
    return (below[:, :, None] & right[:, None, :]).flatten(1)


@lru_cache(maxsize=4)
def _ade_names(root: str) -> tuple[str, ...] | None:
    """The names in ADE20K's `objectInfo150.txt`: tab-separated, a line of heads, the name in the last column."""
    folder = Path(os.path.expanduser(root))
    tree = scene_tree(folder) if os.path.isdir(folder) else None
    file = None if tree is None else tree / "objectInfo150.txt"
    if file is None or not file.is_file():
        return None
    lines = file.read_bytes().decode("utf-8", "backslashreplace").splitlines()[1:]
    return tuple(printable(line.split("\t")[-1].strip()) for line in lines if line.strip())
