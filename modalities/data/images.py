"""Images as samples: decoded on access or all at once, brought to one size, augmented.

Shapes: n samples, C channels, H x W pixels. Every data set is map-style and gives
{"image": uint8 [C, H, W], "label": int64 scalar}. Where images come from: `modalities.data.image_sources`; what is
done to them: `modalities.data.image_augment`; how bytes become pixels: `modalities.data.image_decode`. `DecodedImages`
turns a source into samples on access, `MemoryImages` holds them decoded. Every data set has `fingerprint()` and
`contents()`, see `modalities.data.listing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modalities.data.device_decode import EncodedImages
from modalities.data.drawn_images import Drawing, DrawnImages
from modalities.data.hub import one_line
from modalities.data.image_arrays import PixelFile
from modalities.data.image_augment import Augment, CentreCrop, ErasedBox, Interpolation, Transform, augmentation
from modalities.data.image_decode import LARGEST_IMAGE, Channels, Pixels, decode
from modalities.data.image_sources import Arrays, Files, Noise, Rows, Size, Source, SourceName, open_source
from modalities.data.listing import IN_PLACE, OPENING, Contents, Derived, Paths, fingerprint
from nepa_core.basics import Batch, UnreadableSample, cores
from nepa_core.samples import some_rows

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
    max_pixels: int = LARGEST_IMAGE,
    augment_on: Literal["cpu", "device"] = "cpu",
    encoded: bool = False,
) -> Dataset[Batch]:
    """The images of a split, scaled (bicubic, antialiased) to cover `size`, then cropped to it at the centre.

    What has been listed, read or decoded is kept, so opening the same split again costs nothing.

    Args:
        source, root: see `modalities.data.image_sources.open_source`.
        split: "train" or "test".
        size: (height, width) in pixels.
        channels: 1 converts to greyscale, 3 to RGB.
        augment: what is done to the training split instead of fitting: "crop", "crop_flip" or "randaugment", see
            `modalities.data.image_augment.augmentation`. Drawn from torch's global generator.
        interpolation: of those random crops.
        crop_ratio: the share of the scaled image's sides that the centre crop keeps: it is scaled to cover
            `size` / `crop_ratio` (timm's crop_pct).
        squash: it is scaled to exactly `size` / `crop_ratio`, and so loses its own shape.
        erase: probability that a training sample names a rectangle to erase, under the key "erase", see
            `modalities.data.image_augment.ErasedBox`.
        mean: of each channel between 0 and 1, with which RandAugment fills corners; default mid-grey.
        in_memory: decode everything at once, at `size`. Random crops are then taken out of the centre crops.
        limit: at most this many training images, drawn by a permutation that never changes.
        max_pixels: of a stored image; a larger one is unreadable, and only its header has been read.
        augment_on: "device" leaves what `augment` names to whoever reads the batch, see `drawn_images`.
        encoded: training images are left encoded, too, see `device_decode`; `augment` is not "none" then.

    Raises:
        UserError: the data can't be found, or can't be read as one of the layouts.
        UnreadableSample: from the data set, on access to an image that can't be decoded.
    """
    stored = open_source(source, split, root=root, size=size)
    train = split == "train"
    limit = limit if train else None
    later = train and augment != "none" and (encoded or augment_on == "device")
    filling = mean or (0.5,) * channels
    transform = augmentation(augment, size, filling, interpolation) if train and not later else None
    box = ErasedBox(erase, size) if train and erase else None
    fitted = CentreCrop(size, crop_ratio, squash=squash)
    if in_memory:
        images: MemoryImages | DecodedImages = _in_memory(stored, size, channels, limit, crop_ratio, squash, max_pixels)
    else:
        rows = some_rows(len(stored.labels), limit)
        images = DecodedImages(stored, rows, size, channels, transform or fitted, None if later else box, max_pixels)
    if later:
        one_size = in_memory or getattr(stored, "one_size", None) is not None
        drawing = Drawing(augment, size, filling)
        if encoded:
            return EncodedImages(images, drawing, box)
        return DrawnImages(images, drawing, one_size=one_size, size=size, interpolation=interpolation, erase=box)
    if isinstance(images, DecodedImages) or (transform is None and box is None):
        return images
    return AugmentedImages(images, transform, box)


def open_files(
    paths: Sequence[str],
    *,
    size: Size,
    channels: Channels,
    crop_ratio: float = 1.0,
    squash: bool = False,
    max_pixels: int = LARGEST_IMAGE,
) -> Dataset[Batch]:
    """Image files by name, scaled and cropped as `open_images` does it; their label is -1, for none is known."""
    fitted = CentreCrop(size, crop_ratio, squash=squash)
    files = Files(Paths.of(paths), torch.full((len(paths),), -1), None)
    return DecodedImages(files, torch.arange(len(paths)), size, channels, fitted, None, max_pixels)


class DecodedImages(Dataset[Batch]):
    """Images decoded on access.

    Args:
        source: the undecoded images.
        rows: [n] int64, the row of the source behind each sample.
        transform: from uint8 [C, h, w] as stored to uint8 [C, H, W]; None fits the image to `size`.
        erase: draws the rectangle that the sample carries under "erase".
        max_pixels: of an image as it is stored.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        size: Size,
        channels: Channels,
        transform: Transform | None = None,
        erase: Callable[[], Tensor] | None = None,
        max_pixels: int = LARGEST_IMAGE,
    ) -> None:
        self.source, self.rows, self.labels = source, rows, source.labels[rows]
        self.size, self.channels, self.max_pixels = size, channels, max_pixels
        self.transform, self.erase = transform or CentreCrop(size), erase

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        pixels = self.transform(self.decoded(index))
        return _with_box({"image": pixels, "label": self.labels[index]}, self.erase)

    def every_label(self) -> Tensor:
        """[S] int64."""
        return self.labels

    def name(self, index: int) -> str:
        """What a message calls that image: its file, or where it lies."""
        return self.source.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        """See `modalities.data.listing.fingerprint`."""
        names, rows = self.source.relative_names(), self.rows.tolist()
        labels = None if isinstance(self.source, Files) else self.labels.numpy()  # of files the folder says it
        known = fingerprint((names[row] for row in rows), self.source.sizes()[rows], labels)
        return f"{known}; {self.source.content()}" if isinstance(self.source, PixelFile) else known

    def contents(self) -> Contents | None:
        """See `modalities.data.listing.Contents`; None of noise, which is made on access."""
        if isinstance(self.source, Noise):
            return None
        opening = IN_PLACE if isinstance(self.source, Arrays | Rows | PixelFile) else OPENING
        return Contents(self.source.sizes()[self.rows.numpy()], self._stored, self.name, opening)

    def raw(self, index: int) -> bytes | Pixels:
        """That image undecoded: an encoded file, or pixels [H, W] or [H, W, 3]; may raise anything."""
        return self.source.read(int(self.rows[index]))

    def _stored(self, index: int) -> bytes:
        stored = self.raw(index)
        return stored if isinstance(stored, bytes) else stored.tobytes()

    def pixels(self, indices: list[int]) -> Tensor:
        """Images of one size as they are stored, uint8 [n, C, h, w]; may raise UnreadableSample, as `decoded` does."""
        if not isinstance(self.source, PixelFile) or self.source.shape[3] != self.channels:
            return torch.stack([self.decoded(index) for index in indices])
        try:
            found = self.source.rows(self.rows[indices].tolist())
        except (OSError, ValueError) as error:
            raise UnreadableSample(f"{self.source.path}: {one_line(error)}") from error
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def decoded(self, index: int) -> Tensor:
        """That image as it is stored, uint8 [C, h, w].

        Raises:
            UnreadableSample: it can't be decoded.
        """
        row = int(self.rows[index])
        try:
            return decode(self.source.read(row), self.channels, self.max_pixels)
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            raise UnreadableSample(f"{self.source.name(row)}: {one_line(error)}") from error


class MemoryImages(Derived, Dataset[Batch]):
    """Decoded images, uint8 [n, C, H, W].

    Args:
        unreadable: the index of a damaged one -> its message.
        stored: what they were decoded from.
    """

    def __init__(self, images: Tensor, labels: Tensor, unreadable: dict[int, str], stored: DecodedImages) -> None:
        self.images, self.labels, self.unreadable, self.stored = images, labels, unreadable, stored

    def __getitem__(self, index: int) -> Batch:
        self._check([index])
        return {"image": self.images[index], "label": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once; raises UnreadableSample for the first damaged image in it."""
        return {"image": self.pixels(indices), "label": self.labels.index_select(0, torch.as_tensor(indices))}

    def pixels(self, indices: list[int]) -> Tensor:
        """See `DecodedImages.pixels`; at the size that they were decoded to."""
        self._check(indices)
        return self.images.index_select(0, torch.as_tensor(indices))

    def decoded(self, index: int) -> Tensor:
        """See `DecodedImages.decoded`."""
        found: Tensor = self.stored.decoded(index)
        return found

    def _check(self, indices: list[int]) -> None:
        for index in indices:
            if index in self.unreadable:
                raise UnreadableSample(self.unreadable[index])


class AugmentedImages(Derived, Dataset[Batch]):
    """Images in memory, each transformed on access (and so without `__getitems__`)."""

    def __init__(
        self, images: MemoryImages, transform: Transform | None, erase: Callable[[], Tensor] | None = None
    ) -> None:
        self.images = self.stored = images
        self.transform, self.erase = transform, erase

    def __getitem__(self, index: int) -> Batch:
        sample = self.images[index]
        if self.transform is not None:
            sample["image"] = self.transform(sample["image"])
        return _with_box(sample, self.erase)


def _with_box(sample: Batch, erase: Callable[[], Tensor] | None) -> Batch:
    return sample if erase is None else sample | {"erase": erase()}


@lru_cache(maxsize=4)  # both splits of two data sets
def _in_memory(
    stored: Source, size: Size, channels: Channels, limit: int | None, crop_ratio: float, squash: bool, max_pixels: int
) -> MemoryImages:
    """Decode everything, in several processes where there is enough to do.

    Not in threads: with small images the interpreter's lock makes two threads slower than one.
    """
    rows, fitted = some_rows(len(stored.labels), limit), CentreCrop(size, crop_ratio, squash=squash)
    lazy = DecodedImages(stored, rows, size, channels, fitted, None, max_pixels)
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
    return MemoryImages(images, lazy.labels, unreadable, lazy)


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
