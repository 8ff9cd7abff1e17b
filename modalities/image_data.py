"""Images as samples: decoded on access or all at once, brought to one size, augmented.

Shapes: n samples, C channels, H x W pixels. Every data set is map-style and gives
{"image": uint8 [C, H, W], "label": int64 scalar}. Where images come from: `modalities.image_sources`; what is done
to them: `modalities.image_augment`. `DecodedImages` turns a source into samples on access, `MemoryImages` holds them
decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from modalities.hub import one_line
from modalities.image_augment import Augment, CentreCrop, ErasedBox, Interpolation, Transform, augmentation
from modalities.image_sources import Files, Pixels, Size, Source, SourceName, open_source
from nepa_core.basics import Batch, UnreadableSample, cores

Channels = Literal[1, 3]

SHARE = 256  # images that a process decodes at a time
WORTH_A_PROCESS = 2000  # images that repay the start of one
JPEG = b"\xff\xd8\xff"


def open_images(
    source: SourceName,
    split: str,
    *,
    size: Size,
    channels: Channels,
    root: str | None = None,
    augment: Augment = "none",
    interpolation: Interpolation = "bicubic",
    crop_ratio: float = 1.0,
    squash: bool = False,
    erase: float = 0.0,
    mean: tuple[float, ...] | None = None,
    in_memory: bool = False,
    limit: int | None = None,
) -> Dataset[Batch]:
    """The images of a split, scaled (bicubic, antialiased) to cover `size`, then cropped to it at the centre.

    What has been listed, read or decoded is kept, so opening the same split again costs nothing.

    Args:
        source, root: see `modalities.image_sources.open_source`.
        split: "train" or "test".
        size: (height, width) in pixels.
        channels: 1 converts to greyscale, 3 to RGB.
        augment: what is done to the training split instead of fitting: "crop", "crop_flip" or "randaugment", see
            `modalities.image_augment.augmentation`. Drawn from torch's global generator.
        interpolation: of those random crops.
        crop_ratio: the share of the scaled image's sides that the centre crop keeps: it is scaled to cover
            `size` / `crop_ratio` (timm's crop_pct).
        squash: it is scaled to exactly `size` / `crop_ratio`, and so loses its own shape.
        erase: probability that a training sample names a rectangle to erase, under the key "erase", see
            `modalities.image_augment.ErasedBox`.
        mean: of each channel between 0 and 1, with which RandAugment fills corners; default mid-grey.
        in_memory: decode everything at once, at `size`. Random crops are then taken out of the centre crops.
        limit: at most this many training images, drawn by a permutation that never changes.

    Raises:
        UserError: the data can't be found, or can't be read as one of the layouts.
        UnreadableSample: from the data set, on access to an image that can't be decoded.
    """
    stored = open_source(source, split, root=root, size=size)
    train = split == "train"
    limit = limit if train else None
    transform = augmentation(augment, size, mean or (0.5,) * channels, interpolation) if train else None
    box = ErasedBox(erase, size) if train and erase else None
    fitted = CentreCrop(size, crop_ratio, squash=squash)
    if not in_memory:
        rows = _subset(len(stored.labels), limit)
        return DecodedImages(stored, rows, size, channels, transform or fitted, box)
    memory = _in_memory(stored, size, channels, limit, crop_ratio, squash)
    return memory if transform is None and box is None else AugmentedImages(memory, transform, box)


def open_files(paths: Sequence[str], *, size: Size, channels: Channels) -> Dataset[Batch]:
    """Image files by name, scaled to cover `size` and cropped; their label is -1, for none is known."""
    files = Files(pa.array(paths, pa.string()), torch.full((len(paths),), -1), None)
    return DecodedImages(files, torch.arange(len(paths)), size, channels, CentreCrop(size, 1.0))


class DecodedImages(Dataset[Batch]):
    """Images decoded on access.

    Args:
        source: the undecoded images.
        rows: [n] int64, the row of the source behind each sample.
        transform: from uint8 [C, h, w] as stored to uint8 [C, H, W]; None fits the image to `size`.
        erase: draws the rectangle that the sample carries under "erase".
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        size: Size,
        channels: Channels,
        transform: Transform | None = None,
        erase: Callable[[], Tensor] | None = None,
    ) -> None:
        self.source = source
        self.rows = rows
        self.labels = source.labels[rows]
        self.size = size
        self.channels = channels
        self.transform = transform or CentreCrop(size)
        self.erase = erase

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        pixels = self.transform(self._decode(int(self.rows[index])))
        return _with_box({"image": pixels, "label": self.labels[index]}, self.erase)

    def name(self, index: int) -> str:
        """What a message calls that image: its file, or where it lies."""
        return self.source.name(int(self.rows[index]))

    def _decode(self, row: int) -> Tensor:
        try:
            return decode(self.source.read(row), self.channels)
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            raise UnreadableSample(f"{self.source.name(row)}: {one_line(error)}") from error


class MemoryImages(Dataset[Batch]):
    """Decoded images, uint8 [n, C, H, W]; `unreadable` maps the index of a damaged one to its message."""

    def __init__(self, images: Tensor, labels: Tensor, unreadable: dict[int, str]) -> None:
        self.images = images
        self.labels = labels
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        self._check([index])
        return {"image": self.images[index], "label": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once; raises UnreadableSample for the first damaged image in it."""
        self._check(indices)
        chosen = torch.as_tensor(indices)
        return {"image": self.images.index_select(0, chosen), "label": self.labels.index_select(0, chosen)}

    def _check(self, indices: list[int]) -> None:
        for index in indices:
            if index in self.unreadable:
                raise UnreadableSample(self.unreadable[index])


class AugmentedImages(Dataset[Batch]):
    """Images in memory, each transformed on access (and so without `__getitems__`)."""

    def __init__(
        self, images: MemoryImages, transform: Transform | None, erase: Callable[[], Tensor] | None = None
    ) -> None:
        self.images = images
        self.transform = transform
        self.erase = erase

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        sample = self.images[index]
        if self.transform is not None:
            sample["image"] = self.transform(sample["image"])
        return _with_box(sample, self.erase)


def _with_box(sample: Batch, erase: Callable[[], Tensor] | None) -> Batch:
    return sample if erase is None else sample | {"erase": erase()}


def decode(stored: bytes | Pixels, channels: Channels) -> Tensor:
    """Pixels, uint8 [C, h, w], of an encoded file or of pixels [h, w] or [h, w, 3].

    A JPEG goes through torchvision to RGB: with a crop, 1.4 times as fast as through PIL, and the same pixels (up to 2
    levels off where the colours are subsampled in height alone). The rest goes through PIL. An EXIF orientation is
    applied: the image stands as its author saw it, and as the `datasets` library decodes it. Alpha is dropped.

    Raises:
        Exception: of many kinds, where there is no image, or one of more than 8 bits a channel.
    """
    if isinstance(stored, np.ndarray):
        return _convert(Image.fromarray(stored), channels)
    if channels == 3 and stored[:3] == JPEG:
        with suppress(RuntimeError):  # PIL knows more kinds of JPEG, and more about what is wrong
            encoded = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
            pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return pixels
    try:
        image: Image.Image = Image.open(io.BytesIO(stored))
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a known format") from error
    image.load()
    with suppress(Exception):  # the pixels are there, whatever is wrong with the EXIF block
        ImageOps.exif_transpose(image, in_place=True)
    return _convert(image, channels)


def _convert(image: Image.Image, channels: Channels) -> Tensor:
    if image.mode.startswith(("I", "F")):  # PIL would clip at 255 without a word
        raise ValueError(f"more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:  # going straight to RGB, PIL warns on the screen
        image = image.convert("RGBA")
    pixels: Tensor = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    return pixels


def _subset(count: int, limit: int | None) -> Tensor:
    """The rows to use: all in turn, or the head of a fixed permutation (folders are sorted by class)."""
    if limit is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


@lru_cache(maxsize=4)  # both splits of two data sets
def _in_memory(
    stored: Source, size: Size, channels: Channels, limit: int | None, crop_ratio: float, squash: bool
) -> MemoryImages:
    """Decode everything, in several processes where there is enough to do.

    Not in threads: with small images the interpreter's lock makes two threads slower than one.
    """
    fitted = CentreCrop(size, crop_ratio, squash=squash)
    lazy = DecodedImages(stored, _subset(len(stored.labels), limit), size, channels, fitted)
    images = torch.zeros(len(lazy), channels, *size, dtype=torch.uint8)
    unreadable: dict[int, str] = {}
    loader = DataLoader(
        DecodedShares(lazy),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=min(cores(), len(lazy) // WORTH_A_PROCESS),
        generator=torch.Generator(),  # a loader draws a seed, which must not come from the global generator
    )
    for share, (pixels, bad) in enumerate(loader):
        images[share * SHARE : (share + 1) * SHARE] = torch.from_numpy(pixels)
        unreadable |= bad
    return MemoryImages(images, lazy.labels, unreadable)


class DecodedShares(Dataset[tuple[Pixels, dict[int, str]]]):
    """Images in shares of SHARE: their pixels uint8 [SHARE, C, H, W] and the messages of the damaged ones.

    NumPy arrays travel between processes through a pipe; tensors would need room in /dev/shm.
    """

    def __init__(self, images: DecodedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return -(-len(self.images) // SHARE)

    def __getitem__(self, share: int) -> tuple[Pixels, dict[int, str]]:
        first = share * SHARE
        count = min(SHARE, len(self.images) - first)
        pixels = np.zeros((count, self.images.channels, *self.images.size), dtype=np.uint8)
        bad: dict[int, str] = {}
        for place in range(count):
            try:
                pixels[place] = self.images[first + place]["image"].numpy()
            except UnreadableSample as error:
                bad[first + place] = str(error)
        return pixels, bad


def _as_is(share: Any) -> Any:
    return share
