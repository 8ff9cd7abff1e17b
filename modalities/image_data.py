"""Where images come from: scikit-learn's digits, a folder on disk, or noise.

Shapes: n samples, C channels, H x W pixels. Every data set is map-style and gives
{"image": uint8 [C, H, W], "label": int64 scalar}. A source (second half of the file) knows labels and
undecoded images; `DecodedImages` turns one into samples on access, `MemoryImages` holds them decoded.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from nepa_core.basics import Batch, UnreadableSample, UserError

SourceName = Literal["digits", "noise", "folder"]
Augment = Literal["none", "crop", "crop_flip"]
Channels = Literal[1, 3]
Size = tuple[int, int]
"""(height, width) in pixels."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
"""What a split may be called on disk; the first name found is taken. ImageNet's `test` has no labels."""

NOISE_COUNT = 4096
NOISE_CLASSES = 10
SHARE = 256  # images that a process decodes at a time
WORTH_A_PROCESS = 2000  # images that repay the start of one


def open_images(
    source: SourceName,
    split: str,
    *,
    size: Size,
    channels: Channels,
    root: str | None = None,
    augment: Augment = "none",
    in_memory: bool = False,
    limit: int | None = None,
) -> Dataset[Batch]:
    """The images of a split, scaled (bicubic, antialiased) to cover `size`, then cropped to it at the centre.

    What has been listed, read or decoded is kept, so opening the same split again costs nothing.

    Args:
        source: "digits" (1,797 of 8 x 8, the last 500 held out, their values 0 to 16 spread over 0 to 255),
            "noise" (4,096 of any size, for speed tests and dry runs), or "folder".
        split: "train" or "test".
        size: (height, width) in pixels.
        channels: 1 converts to greyscale, 3 to RGB.
        root: the folder. It holds class folders (`train/<class>/*` and `val/<class>/*`), or parquet files in
            the layout of Hugging Face (`train-*.parquet`; read whole into memory, still encoded), or
            torchvision's copy of CIFAR-10. The held-out split may be called val, validation or test.
        augment: what is done to the training split: "crop" is RandomResizedCrop(size), "crop_flip" adds a
            horizontal flip. Drawn from torch's global generator.
        in_memory: decode everything at once, at `size`. Random crops are then taken out of the centre crops.
        limit: at most this many training images, drawn by a permutation that never changes.

    Raises:
        UserError: the folder is missing, or can't be read as one of these layouts.
        UnreadableSample: from the data set, on access to an image that can't be decoded.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    stored = _open_source(source, split, root, size)
    limit = limit if split == "train" else None
    transform = None if augment == "none" or split == "test" else _augmentation(augment, size)
    if not in_memory:
        return DecodedImages(stored, _subset(len(stored.labels), limit), size, channels, transform)
    memory = _in_memory(stored, size, channels, limit)
    return memory if transform is None else AugmentedImages(memory, transform)


def open_files(paths: Sequence[str], *, size: Size, channels: Channels) -> Dataset[Batch]:
    """Image files by name, fitted to `size` as `open_images` fits them; their label is -1, for none is known."""
    files = Files(pa.array(paths, pa.string()), torch.full((len(paths),), -1))
    return DecodedImages(files, torch.arange(len(paths)), size, channels)


def _open_source(source: SourceName, split: str, root: str | None, size: Size) -> Source:
    match source:
        case "digits":
            return _open_digits(split)
        case "noise":
            return _open_noise(split, size)
        case "folder":
            if root is None:
                raise UserError("data.source=folder needs data.root=DIR, the folder that holds the images")
            return _open_folder(root, split)


class DecodedImages(Dataset[Batch]):
    """Images decoded on access.

    Args:
        source: the undecoded images.
        rows: [n] int64, the row of the source behind each sample.
        transform: from uint8 [C, h, w] as stored to uint8 [C, H, W]; None fits the image to `size`.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        size: Size,
        channels: Channels,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source = source
        self.rows = rows
        self.labels = source.labels[rows]
        self.size = size
        self.channels = channels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        image = self._decode(int(self.rows[index]))
        if self.transform is None:
            pixels = pil_to_tensor(_fit(image, self.size))
        else:
            pixels = self.transform(pil_to_tensor(image))
        return {"image": pixels, "label": self.labels[index]}

    def _decode(self, row: int) -> Image.Image:
        try:
            return _convert(self.source.read(row), "L" if self.channels == 1 else "RGB")
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            unknown = isinstance(error, UnidentifiedImageError)
            cause = "not an image of a known format" if unknown else _one_line(error)
            raise UnreadableSample(f"{self.source.name(row)}: {cause}") from error


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

    def __init__(self, images: MemoryImages, transform: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        sample = self.images[index]
        return {**sample, "image": self.transform(sample["image"])}


def _augmentation(augment: Augment, size: Size) -> Callable[[Tensor], Tensor]:
    crop: Callable[[Tensor], Tensor] = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)
    return crop if augment == "crop" else v2.Compose([crop, v2.RandomHorizontalFlip()])


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Decode, and convert to "L" or "RGB"; an alpha channel is dropped."""
    if image.mode.startswith(("I", "F")):  # PIL would clip at 255 without a word
        raise ValueError(f"more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:  # going straight to RGB, PIL warns on the screen
        image = image.convert("RGBA")
    return image.convert(mode)


def _fit(image: Image.Image, size: Size) -> Image.Image:
    """Scale to cover `size` and crop at the centre; for a square, torchvision's Resize and CenterCrop."""
    height, width = size
    if image.size == (width, height):
        return image
    cover = [
        max(height, int(width * image.height / image.width)),
        max(width, int(height * image.width / image.height)),
    ]
    fitted: Image.Image = center_crop(resize(image, cover, interpolation=v2.InterpolationMode.BICUBIC), [height, width])
    return fitted


def _subset(count: int, limit: int | None) -> Tensor:
    """The rows to use: all in turn, or the head of a fixed permutation (folders are sorted by class)."""
    if limit is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


@lru_cache(maxsize=4)  # both splits of two data sets
def _in_memory(stored: Source, size: Size, channels: Channels, limit: int | None) -> MemoryImages:
    """Decode everything, in several processes where there is enough to do.

    Not in threads: with small images the interpreter's lock makes two threads slower than one.
    """
    lazy = DecodedImages(stored, _subset(len(stored.labels), limit), size, channels)
    images = torch.zeros(len(lazy), channels, *size, dtype=torch.uint8)
    unreadable: dict[int, str] = {}
    loader = DataLoader(
        DecodedShares(lazy),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=min(_cpus(), len(lazy) // WORTH_A_PROCESS),
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


def _cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Source(Hashable, Protocol):
    """Labels and undecoded images."""

    @property
    def labels(self) -> Tensor:
        """[n] int64."""

    def read(self, row: int) -> Image.Image:
        """The image of a row; may raise anything."""

    def name(self, row: int) -> str:
        """What a message calls that row."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays in memory, uint8 [n, H, W] or [n, H, W, 3]."""

    title: str
    images: Pixels
    labels: Tensor

    def read(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])

    def name(self, row: int) -> str:
        return f"{self.title}:{row}"


@dataclass(frozen=True, eq=False)
class Noise:
    """Random RGB images, made from (seed, row) on access."""

    size: Size
    seed: int
    labels: Tensor

    def read(self, row: int) -> Image.Image:
        height, width = self.size
        noise = np.random.default_rng((self.seed, row)).bytes(height * width * 3)
        return Image.frombytes("RGB", (width, height), noise)

    def name(self, row: int) -> str:
        return f"noise:{row}"


@dataclass(frozen=True, eq=False)
class Files:
    """Image files. Their paths are an Arrow array: a list of strings would be copied into every worker."""

    paths: pa.Array
    labels: Tensor

    def read(self, row: int) -> Image.Image:
        with Image.open(self.name(row)) as image:
            image.load()
            return image

    def name(self, row: int) -> str:
        return str(self.paths[row])


@dataclass(frozen=True, eq=False)
class Parquet:
    """The rows of several parquet files.

    Attributes:
        files: the files, in order.
        starts: the row at which each of them begins.
        images: structs of {bytes, path}, the image still encoded.
    """

    files: list[Path]
    starts: list[int]
    images: pa.ChunkedArray
    labels: Tensor

    def read(self, row: int) -> Image.Image:
        encoded = self.images[row].as_py()
        if encoded is None or encoded["bytes"] is None:
            raise ValueError("the row holds no image bytes")
        return Image.open(io.BytesIO(encoded["bytes"]))

    def name(self, row: int) -> str:
        file = bisect_right(self.starts, row) - 1
        return f"{self.files[file]}:{row - self.starts[file]}"


@lru_cache(maxsize=4)
def _open_digits(split: str) -> Arrays:
    from sklearn.datasets import load_digits  # a second to import, for digits alone

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    part = slice(None, -500) if split == "train" else slice(-500, None)
    return Arrays("digits", images[part], torch.as_tensor(digits.target[part], dtype=torch.int64))


@lru_cache(maxsize=4)
def _open_noise(split: str, size: Size) -> Noise:
    return Noise(size, seed=list(SPLITS).index(split), labels=torch.arange(NOISE_COUNT) % NOISE_CLASSES)


@lru_cache(maxsize=4)
def _open_folder(root: str, split: str) -> Source:
    """Tell the layout of a folder by what it holds, and open a split of it."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.root={root}: there is no such folder; give the one that holds the images")
    if (folder / CIFAR10.base_folder).is_dir():
        return _open_cifar10(folder, split)
    parquet = {each: _parquet_files(folder, each) for each in SPLITS}
    if all(parquet.values()):
        return _open_parquet(parquet[split])
    train, test = (_subfolder(folder, each) for each in SPLITS)
    if train and test:
        return _open_class_folders(train, test, split)
    raise UserError(
        f"data.root={root}: looked for train/<class>/* with val/<class>/*, for train-*.parquet with "
        f"test-*.parquet (there or in data/), and for {CIFAR10.base_folder}/, but found none of them "
        "complete; the held-out split may be called val, validation or test"
    )


def _parquet_files(folder: Path, split: str) -> list[Path]:
    places = [(place, name) for name in SPLITS[split] for place in (folder, folder / "data")]
    found = (sorted(place.glob(f"{name}-*.parquet")) for place, name in places)
    return next((files for files in found if files), [])


def _subfolder(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)


def _open_cifar10(folder: Path, split: str) -> Arrays:
    """torchvision's copy. It is unpickled by torchvision, once the MD5 sums of its files are found right."""
    try:
        data = CIFAR10(folder, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(
            f"data.root={folder}: {CIFAR10.base_folder}/ is incomplete or damaged; download it again"
        ) from error
    return Arrays(f"CIFAR-10 {split}", data.data, torch.tensor(data.targets))


def _open_parquet(files: list[Path]) -> Parquet:
    tables = [_read_parquet(file) for file in files]
    starts = np.cumsum([0] + [len(table) for table in tables[:-1]]).tolist()
    table = pa.concat_tables(tables)
    labels = torch.as_tensor(table["label"].to_numpy().astype(np.int64))
    return Parquet(files, starts, table["image"], labels)


def _read_parquet(file: Path) -> pa.Table:
    """A file's images and labels, as the columns `image` and `label`."""
    try:
        with pq.ParquetFile(file) as stored:
            schema, table = stored.schema_arrow, stored.read(columns=["image", "img", "label"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({_one_line(error)}); copy it again") from error
    if "image" not in table.column_names and "img" in table.column_names:
        table = table.rename_columns({"img": "image"})
    if not _has_images_and_labels(table):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(
            f"{file}: needs a column image (or img) of structs with bytes, and a column label of integers "
            f"without gaps; it has {columns}"
        )
    return table.select(["image", "label"])


def _has_images_and_labels(table: pa.Table) -> bool:
    if not {"image", "label"} <= set(table.column_names):
        return False
    image, label = table["image"].type, table["label"]
    encoded = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    return encoded and pa.types.is_integer(label.type) and not label.null_count


def _open_class_folders(train: Path, test: Path, split: str) -> Files:
    """A tree of class folders; labels number them in the order of their names."""
    classes, held_out = _classes(train), _classes(test)
    if classes != held_out:
        alone = [f"{train.name}/{name}" for name in sorted(set(classes) - set(held_out))]
        alone += [f"{test.name}/{name}" for name in sorted(set(held_out) - set(classes))]
        more = f" and {len(alone) - 6} more" if len(alone) > 6 else ""
        raise UserError(
            f"data.root={train.parent}: both splits need the same class folders; without a counterpart "
            f"in the other: {', '.join(alone[:6])}{more}"
        )
    base = train if split == "train" else test
    files = [_image_files(base / name) for name in classes]
    if not any(files):
        raise UserError(f"data.root={base.parent}: no image file in {base}/<class>/")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(each) for each in files]))
    return Files(pa.array([path for each in files for path in each]), labels)


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _image_files(folder: Path) -> list[str]:
    """Paths at any depth whose suffix is that of an image, sorted; hidden files are left out."""
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(IMG_EXTENSIONS) and file[0] != "."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
