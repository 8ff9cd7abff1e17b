"""Images, cut into non-overlapping patches.

Shapes: B samples, C channels, H x W pixels, N = rows * columns patches of p x q pixels, P = C * p * q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from einops import rearrange
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.device_decode import ENCODED, still_to_do
from modalities.data.drawn_images import AUGMENT
from modalities.data.image_augment import Augment, Interpolation, erase
from modalities.data.image_decode import LARGEST_IMAGE, SUFFIXES, Channels
from modalities.data.image_sources import SourceName, numbered_classes, open_source
from modalities.data.images import DecodedImages, open_files, open_images
from modalities.orders import Ordered
from nepa_core.basics import Batch, UserError, number_of
from nepa_core.modality import Modality
from nepa_core.tokens import ImageInput, Sketch, Tokens, cached


class Images(Ordered, Modality):
    """Images of one size; a token holds the standardised pixels of one patch.

    Attributes:
        source, root: where they come from, see `modalities.data.image_sources.open_source`.
        channels, augment, interpolation, crop_ratio, squash, erase, in_memory, limit, max_pixels: see
            `modalities.data.images.open_images`.
        size: (height, width) in pixels, to which every image is brought.
        patch: (height, width) of a patch in pixels; it divides the size.
        mean, std: of each channel, pixels being between 0 and 1.
        augment_on: "device" crops, flips and changes training images where the network is, a whole batch at once, with
            the same draws; loader processes then only read, and decode where images are encoded. A crop is left to the
            device where all stored images have one size (arrays of `nepa resize format=array`, `in_memory`).
        decode_on: "gpu" decodes JPEG files of the training split by nvJPEG where the network is, and augments there,
            too; what nvJPEG can't take is decoded by loader processes and counted. Held-out images: on the CPU.
        patch_order, order_seed: the order in which patches are predicted, see `modalities.orders`.
    """

    token_name: ClassVar[str] = "patch"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    built_in: ClassVar[str] = "noise"

    source: SourceName
    size: tuple[PositiveInt, PositiveInt]
    patch: tuple[PositiveInt, PositiveInt]
    channels: Channels
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    root: str | None = None
    augment: Augment = "none"
    interpolation: Interpolation = "bicubic"
    crop_ratio: float = Field(default=1.0, ge=0.01, le=1)
    squash: bool = False
    erase: float = Field(default=0.0, ge=0, le=1)
    augment_on: Literal["cpu", "device"] = Field(default="cpu", exclude_if=lambda where: where == "cpu")
    decode_on: Literal["cpu", "gpu"] = Field(default="cpu", exclude_if=lambda where: where == "cpu")
    in_memory: bool = False
    limit: PositiveInt | None = None
    max_pixels: PositiveInt = LARGEST_IMAGE

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(side % patch for side, patch in zip(self.size, self.patch, strict=True)):
            raise ValueError(
                f"data.patch={self.patch} does not divide data.size={self.size}; "
                f"the nearest sizes that it divides: {_nearest_sizes(self.size, self.patch)}"
            )
        if self.source == "folder" and self.root is None:
            raise ValueError("data.source=folder needs data.root=DIR, the folder that holds the images")
        if self.source == "hub" and self.root is None:
            raise ValueError("data.source=hub needs data.root=OWNER/NAME, the name of a data set on the hub")
        if self.decode_on == "gpu" and (self.channels != 3 or self.in_memory or self.augment == "none"):
            raise ValueError(
                "data.decode_on=gpu is for random crops of colour images that are decoded as they are read: it needs "
                "data.augment=crop, crop_flip or randaugment, data.channels=3 and data.in_memory=false"
            )
        for key, values in {"mean": self.mean, "std": self.std}.items():
            if len(values) != self.channels:
                raise ValueError(f"data.{key} has {number_of(len(values), 'number')} for data.channels={self.channels}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    def dataset(self, split: str) -> Dataset[Batch]:
        return open_images(
            self.source,
            split,
            size=self.size,
            channels=self.channels,
            root=self.root,
            augment=self.augment,
            interpolation=self.interpolation,
            crop_ratio=self.crop_ratio,
            squash=self.squash,
            erase=self.erase,
            mean=self.mean,
            in_memory=self.in_memory,
            limit=self.limit,
            max_pixels=self.max_pixels,
            augment_on=self.augment_on,
            encoded=split == "train" and self.decode_on == "gpu",
        )

    def tokenize(self, batch: Batch) -> Tokens:
        """Patches of batch["image"] [B, C, H, W], standardised: values [B, N, P] float32.

        Pixels are uint8, or float32 of 0 to 255 where images have been erased or mixed. What a training batch says
        that is still to be done to them is done, see `before_mixing`.
        """
        image = self.before_mixing(batch)["image"]
        if image.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f'batch["image"] holds uint8 pixels or float32 ones of 0 to 255, not {image.dtype}')
        mean, std = channel_statistics(self.mean, self.std, image.device)
        return Tokens(values=patchify((image / 255 - mean) / std, self.patch), coords=patch_centres(*self.grid))

    def before_mixing(self, batch: Batch) -> Batch:
        """Do what batch["augment"] says (see `drawn_images`) and fill the rectangles of batch["erase"] [B, 6], once.

        With noise that is N(0, 1) when the pixels have been standardised.
        """
        if AUGMENT in batch:
            image = still_to_do(batch, self.size, self.mean, self.interpolation)
            batch = {name: value for name, value in batch.items() if name not in (AUGMENT, ENCODED)} | {"image": image}
        if "erase" not in batch:
            return batch
        rest = {name: value for name, value in batch.items() if name != "erase"}
        mean, std = channel_statistics(self.mean, self.std, batch["image"].device)
        return rest | {"image": erase(batch["image"].float(), batch["erase"], 255 * mean, 255 * std)}

    def held_out_as(self) -> str:
        """ "pixels: short side 256, centre crop 224", of which a published accuracy is a figure."""
        height, width = (int(side / self.crop_ratio) for side in self.size)
        square = self.size[0] == self.size[1]
        crop = str(self.size[0]) if square else f"{self.size[0]} x {self.size[1]}"
        if self.squash:
            scaled = f"squashed to {height} x {width}"
        else:
            scaled = f"short side {height}" if square else f"scaled to cover {height} x {width}"
        return f"pixels: {scaled}, centre crop {crop}"

    def classes(self) -> tuple[str, ...] | None:
        """The names that the source gives, or the numbers that occur in its training labels.

        Raises:
            UserError: these have a gap, or a held-out image has another.
        """
        train, test = (open_source(self.source, split, root=self.root, size=self.size) for split in ("train", "test"))
        return numbered_classes(train, test, self.root or self.source)

    def token_dim(self) -> int:
        return self.channels * self.patch[0] * self.patch[1]

    def order(self, tokens: Tokens) -> Tensor | None:
        return self.ordered(tokens, self.grid)

    def describe(self, tokens: Tokens) -> Sketch:
        """The images themselves, their standardisation undone."""
        images = unpatchify(tokens.canonical(tokens.values), self.size, self.patch)
        mean, std = channel_statistics(self.mean, self.std, images.device)
        pixels = (images * std + mean).clamp(0, 1)
        return Sketch(pixels[:, 0] if self.channels == 1 else pixels.permute(0, 2, 3, 1), self.grid)

    def plain(self) -> Images:
        return self.model_copy(update={"augment": "none", "augment_on": "cpu", "decode_on": "cpu", "erase": 0.0})

    def files(self, paths: Sequence[str]) -> Dataset[Batch]:
        """Image files by name, brought to this size and these channels as held-out ones are.

        Raises:
            UnreadableSample: from the data set, on access to a file that is no image.
        """
        return open_files(
            paths,
            size=self.size,
            channels=self.channels,
            crop_ratio=self.crop_ratio,
            squash=self.squash,
            max_pixels=self.max_pixels,
        )

    def stored(self, split: str) -> DecodedImages:
        """See `Modality.stored`.

        Raises:
            UserError: `limit` is set.
        """
        if self.limit is not None:
            raise UserError(
                f"data.limit={self.limit}: nepa resize writes every image; leave it out, or give data.limit=null"
            )
        source = open_source(self.source, split, root=self.root, size=self.size)
        rows = torch.arange(len(source.labels))
        return DecodedImages(source, rows, self.size, self.channels, torch.nn.Identity(), None, self.max_pixels)

    def whole_images(
        self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], *, crop_ratio: float, squash: bool
    ) -> Images:
        """See `Modality.whole_images`; from the stored images, grey ones by the mean of the three channels."""
        if self.channels == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        changes = {"size": size, "patch": size, "mean": mean, "std": std, "crop_ratio": crop_ratio, "squash": squash}
        return self.model_copy(update=changes | {"patch_order": "raster", "in_memory": False})

    def image_input(self) -> ImageInput:
        return ImageInput(
            self.size,
            self.patch,
            self.channels,
            self.mean,
            self.std,
            order=self.patch_order,
            crop_ratio=self.crop_ratio,
            squash=self.squash,
        )


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, N, C * p * q] in raster order.

    The order inside a patch is that of a convolution's weight, so `nn.Linear` with the weight
    [D, C, p, q] flattened is the strided convolution with kernel and stride `patch`.
    """
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch[0], q=patch[1])


def unpatchify(patches: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, C * p * q] -> [B, C, H, W]."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=size[0] // patch[0], p=patch[0], q=patch[1])


def cubify(volumes: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """Cut volumes, or frames behind each other, [B, C, D, H, W] into cubes [B, N, C * f * p * q] in raster order."""
    f, p, q = cube
    return rearrange(volumes, "b c (d f) (h p) (w q) -> b (d h w) (c f p q)", f=f, p=p, q=q)


def uncubify(cubes: Tensor, size: tuple[int, int, int], cube: tuple[int, int, int]) -> Tensor:
    """The inverse of `cubify`: [B, N, C * f * p * q] -> [B, C, D, H, W], `size` being (D, H, W)."""
    (d, h, w), (f, p, q) = (side // cut for side, cut in zip(size, cube, strict=True)), cube
    return rearrange(cubes, "b (d h w) (c f p q) -> b c (d f) (h p) (w q)", d=d, h=h, w=w, f=f, p=p, q=q)


@cached
def patch_centres(*grid: int) -> Tensor:
    """(y, x), or (z, y, x), of the centres of a grid's cells in raster order, [N, A] float32 on the CPU.

    Every axis spans -1 to 1.
    """
    return torch.cartesian_prod(*((torch.arange(side) + 0.5) / side * 2 - 1 for side in grid))


@cached
def channel_statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std as [C, 1, 1] on the device, sent there once instead of every step."""
    return torch.tensor(mean, device=device)[:, None, None], torch.tensor(std, device=device)[:, None, None]


def _nearest_sizes(size: tuple[int, int], patch: tuple[int, int]) -> str:
    below = tuple(side // cut * cut for side, cut in zip(size, patch, strict=True))
    above = tuple(-(-side // cut) * cut for side, cut in zip(size, patch, strict=True))
    return f"{below} and {above}" if min(below) else f"{above}"
