"""Where scenes come from: images in which every pixel has a class, in folders, parquet, `datasets` folders or the hub.

Shapes: H x W pixels of an image as it is stored, h x w of a crop. A source (second half of the file) knows undecoded
pairs of an image and its annotation; `Scenes` in `modalities.scenes` turns them into samples.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.hub import load_hub, one_line
from modalities.data.image_columns import (
    holds_images,
    image_bytes,
    images_of,
    parquet_files,
    parquet_schema,
    read_columns,
    stored_sizes,
)
from modalities.data.image_decode import LARGEST_IMAGE, SUFFIXES, decode
from modalities.data.image_sources import Size
from modalities.data.listing import (
    Contents,
    Derived,
    Integers,
    Paths,
    data_folder,
    file_sizes,
    fingerprint,
    list_files,
    printable,
    read_whole,
    say,
    say_left_aside,
    subfolders,
)
from modalities.data.remote import at_hand
from modalities.data.scene_masks import (
    IGNORED,
    LOSSY_SUFFIXES,
    Mask,
    Numbering,
    image_turn,
    judge_census,
    read_mask,
    take_census,
)
from nepa_core.basics import Batch, UnreadableSample, UserError

SceneSource = Literal["folder", "hub"]
SPLITS = {"train": ("train", "training"), "test": ("val", "validation", "test")}
"""What a split may be called on disk; the first name found is taken. ADE20K's own `test` has no annotations."""
CROP_TRIALS = 10  # of mmsegmentation's RandomCrop
LARGEST_SHARE = 0.75  # its cat_max_ratio


class Augmentation(NamedTuple):
    """Random changes to a training scene, see `augmented`."""

    scales: tuple[float, float]
    distort: bool


class StoredScenes(Dataset[Batch]):
    """Scenes as they are stored: {"image": uint8 [3, H, W], "target": uint8 [H, W]}, every one of its own size.

    Image and annotation are each turned by their own EXIF tag.

    Args:
        max_pixels: of a stored image or annotation; a larger one is unreadable, and only its header has been read.
    """

    def __init__(self, source: Pairs, numbering: Numbering, max_pixels: int = LARGEST_IMAGE) -> None:
        self.source, self.numbering, self.max_pixels = source, numbering, max_pixels
        self._targets, self._known = _tables(numbering)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        image, mask, turn = self._decoded(index)
        height, width = image.shape[-2:]
        if (turn == 1) != (mask.turn == 1):
            turned, other = ("image", "annotation") if mask.turn == 1 else ("annotation", "image")
            raise UserError(
                f"{self.source.name(index)}: the EXIF tag of the {turned} turns it and its {other} has none; the "
                f"annotation is {self.source.annotation(index)}; save both upright, without the tag"
            )
        if mask.labels.shape != (height, width):
            raise UserError(
                f"{self.source.name(index)}: the image has {width} x {height} pixels, its annotation "
                f"{self.source.annotation(index)} {mask.labels.shape[1]} x {mask.labels.shape[0]}; they must agree"
            )
        return {"image": image, "target": self._target(mask.labels, index)}

    def name(self, index: int) -> str:
        """What a message calls that scene."""
        return self.source.name(index)

    def labels(self, index: int) -> np.ndarray:
        """The annotation of a scene as it is stored, integers [H, W]; may raise anything."""
        return read_mask(self.source.read(index)[1], self.source.annotation(index), self.max_pixels).labels

    def fingerprint(self) -> str:
        """See `modalities.data.listing.fingerprint`."""
        return fingerprint(self.source.relative_names(), self.source.sizes(annotations=True))

    def contents(self) -> Contents:
        """See `modalities.data.listing.Contents`: of the images."""
        return Contents(self.source.sizes(), lambda index: self.source.read(index)[0], self.name)

    def _decoded(self, index: int) -> tuple[Tensor, Mask, int]:
        """The image, uint8 [3, H, W], the annotation, and the orientation that the tag of the image names."""
        broken = ""
        try:
            image, annotation = self.source.read(index)
            broken = f"its annotation {self.source.annotation(index)}: "
            mask = read_mask(annotation, self.source.annotation(index), self.max_pixels)
            broken = ""
            return decode(image, 3, self.max_pixels), mask, image_turn(image, self.max_pixels)
        except UserError:
            raise
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            raise UnreadableSample(f"{self.source.name(index)}: {broken}{one_line(error)}") from error

    def _target(self, stored: np.ndarray, index: int) -> Tensor:
        """Stored values to classes, uint8 [H, W]."""
        present = np.unique(stored)
        inside = (present >= 0) & (present <= 255)
        wrong = [*present[~inside], *(value for value in present[inside] if not self._known[value])]
        if wrong:
            count, first, ignored = self.numbering
            raise UserError(
                f"{self.source.annotation(index)}: label {wrong[0]} is outside the {count} classes, stored as {first} "
                f"to {first + count - 1} (ignored: {', '.join(map(str, (*ignored, IGNORED)))}); see data.class_count, "
                "data.first_label and data.ignored_labels"
            )
        return torch.from_numpy(self._targets[stored])


@lru_cache(maxsize=8)
def check_classes(source: Pairs, numbering: Numbering, max_pixels: int, where: str) -> None:
    """Look at some annotations of a split: does every declared class occur? See `modalities.data.scene_masks`.

    Raises:
        UserError: a class never does, and 255 covers pixels that nobody declared to be ignored.
    """
    scenes = StoredScenes(source, numbering, max_pixels)
    order = np.random.default_rng(0).permutation(len(scenes)).tolist()
    line = judge_census(take_census(len(scenes), scenes.labels, numbering, order), numbering, where)
    if line:
        say(line)


class SceneFiles(Dataset[Batch]):
    """Image files without annotations, in the form of `StoredScenes`: every pixel is IGNORED."""

    def __init__(self, paths: Sequence[str], max_pixels: int = LARGEST_IMAGE) -> None:
        self.paths = tuple(paths)
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        try:
            image = decode(read_whole(self.paths[index]), 3, self.max_pixels)
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            raise UnreadableSample(f"{self.name(index)}: {one_line(error)}") from error
        return {"image": image, "target": torch.full(image.shape[-2:], IGNORED, dtype=torch.uint8)}

    def name(self, index: int) -> str:
        """The path."""
        return printable(self.paths[index])

    def fingerprint(self) -> str:
        """Of their paths."""
        return fingerprint(self.paths, file_sizes(self.paths))

    def contents(self) -> None:
        """None: they are no split."""


class CroppedScenes(Derived, Dataset[Batch]):
    """Scenes of one size: {"image": uint8 [3, h, w], "target": uint8 [h, w]}, and "real" where crops may be padded.

    "real" is int64 [2], the rows and columns of pixels from the top left that are no padding.

    Args:
        crop: (h, w).
        short_side: pixels to which the shorter side of a scene is scaled first.
        augmentation: None scales and crops at the centre.
    """

    def __init__(
        self, scenes: StoredScenes | SceneFiles, crop: Size, short_side: int, augmentation: Augmentation | None = None
    ) -> None:
        self.scenes = self.stored = scenes
        self.crop, self.short_side, self.augmentation = crop, short_side, augmentation
        smallest = 1.0 if augmentation is None else augmentation.scales[0]
        self.may_pad = round(short_side * smallest) < max(crop)

    def __getitem__(self, index: int) -> Batch:
        scene = self.scenes[index]
        image, target = scene["image"], scene["target"]
        if self.augmentation is None:
            image, target = scaled(image, target, self.short_side)
            image, target = _at(image, target, _centre(target, self.crop), self.crop)
        else:
            image, target = augmented(image, target, self.crop, self.short_side, self.augmentation)
        real = torch.tensor(target.shape)
        sample = {"image": padded(image, self.crop), "target": padded(target, self.crop, IGNORED)}
        return sample | {"real": real} if self.may_pad else sample


def augmented(
    image: Tensor, target: Tensor, crop: Size, short_side: int, settings: Augmentation
) -> tuple[Tensor, Tensor]:
    """Random scale, crop, flip and colours, in the order and with the figures of mmsegmentation's ADE20K recipe.

    The scale is uniform in `scales`, times the one that brings the shorter side to `short_side`. Of up to ten
    crops the first is taken in which no class fills more than three quarters of the labelled pixels. Everything is
    drawn from torch's global generator.

    Returns:
        uint8 [3, <=h, <=w] and [<=h, <=w], smaller than the crop where the scaled scene is.
    """
    low, high = settings.scales
    image, target = scaled(image, target, short_side, low + (high - low) * torch.rand(()).item())
    image, target = _at(image, target, _varied_place(target, crop), crop)
    if torch.rand(()).item() < 0.5:
        image, target = image.flip(-1), target.flip(-1)
    return (distorted(image) if settings.distort else image), target


def fitted_size(size: Size, short_side: int, scale: float = 1.0) -> Size:
    """(H, W) scaled so that the shorter side has `short_side` * `scale` pixels (at least 1)."""
    factor = short_side * scale / min(size)
    height, width = (max(round(side * factor), 1) for side in size)
    return height, width


def scaled(image: Tensor, target: Tensor, short_side: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A scene [3, H, W], [H, W] at `fitted_size`: the image bilinear with antialiasing, the target nearest."""
    from torchvision.transforms.v2 import InterpolationMode  # as slow to import as torch
    from torchvision.transforms.v2.functional import resize

    image = scaled_image(image, short_side, scale)
    size = list(image.shape[-2:])
    return image, resize(target[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]


def scaled_image(image: Tensor, short_side: int, scale: float = 1.0) -> Tensor:
    """uint8 [..., H, W] at `fitted_size`, on its device."""
    from torchvision.transforms.v2.functional import resize

    size = fitted_size((image.shape[-2], image.shape[-1]), short_side, scale)
    resized: Tensor = resize(image, list(size), antialias=True)
    return resized


def padded(x: Tensor, size: Size, value: int = 0) -> Tensor:
    """Extend [..., H, W] at the bottom and on the right to at least `size`.

    Images are padded with black: pixels at the mean would be tokens of zeros, which a LayerNorm blows up.
    """
    below, right = (max(side - have, 0) for side, have in zip(size, x.shape[-2:], strict=True))
    return F.pad(x, (0, right, 0, below), value=value) if below or right else x


def distorted(image: Tensor) -> Tensor:
    """Photometric distortion of SSD (Liu et al. 2016, arXiv 1512.02325), without its channel swap, uint8 [3, H, W].

    Each with probability 1/2: brightness + up to 32 of 255, contrast and saturation * 0.5 to 1.5, hue + up to a
    tenth of the circle; contrast comes last in half of the cases.
    """
    from torchvision.transforms.v2.functional import adjust_hue, adjust_saturation

    contrast_last = _coin()
    if _coin():
        image = _linear(image, 1.0, _uniform(-32, 32))
    if not contrast_last and _coin():
        image = _linear(image, _uniform(0.5, 1.5), 0.0)
    if _coin():
        image = adjust_saturation(image, _uniform(0.5, 1.5))
    if _coin():
        image = adjust_hue(image, _uniform(-0.1, 0.1))
    if contrast_last and _coin():
        image = _linear(image, _uniform(0.5, 1.5), 0.0)
    return image


def _linear(image: Tensor, factor: float, shift: float) -> Tensor:
    return (image.float() * factor + shift).round_().clamp_(0, 255).byte()


def _coin() -> bool:
    return torch.rand(()).item() < 0.5


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _varied_place(target: Tensor, crop: Size) -> tuple[int, int]:
    """The top left of a random crop that no class dominates, or the last of ten trials."""
    for _ in range(CROP_TRIALS):
        room = [max(have - side, 0) for have, side in zip(target.shape, crop, strict=True)]
        top, left = (int(torch.randint(spare + 1, ()).item()) for spare in room)
        inside = target[top : top + crop[0], left : left + crop[1]]
        counts = torch.bincount(inside.flatten(), minlength=IGNORED + 1)[:IGNORED]
        if int(counts.max()) < LARGEST_SHARE * int(counts.sum()):
            break
    return top, left


def _centre(target: Tensor, crop: Size) -> tuple[int, int]:
    top, left = (max(have - side, 0) // 2 for have, side in zip(target.shape, crop, strict=True))
    return top, left


def _at(image: Tensor, target: Tensor, place: tuple[int, int], crop: Size) -> tuple[Tensor, Tensor]:
    """The crop at a place, or what there is of it."""
    rows, columns = (slice(start, start + side) for start, side in zip(place, crop, strict=True))
    return image[:, rows, columns], target[rows, columns]


def _tables(numbering: Numbering) -> tuple[np.ndarray, np.ndarray]:
    """Stored value -> target (uint8 [256]) and whether the value may occur (bool [256])."""
    targets, known = np.full(256, IGNORED, dtype=np.uint8), np.zeros(256, dtype=bool)
    classes = np.arange(numbering.classes)
    targets[classes + numbering.first] = classes
    known[classes + numbering.first] = True
    known[[*numbering.ignored, IGNORED]] = True
    return targets, known


class Pairs(Hashable, Protocol):
    """Undecoded images with their annotations."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image and the annotation of a row, both encoded; may raise anything."""

    def name(self, row: int) -> str:
        """What a message calls that row."""

    def annotation(self, row: int) -> str:
        """What a message calls the annotation of that row."""

    def relative_names(self) -> list[str]:
        """The name of each row below the root of the data: it stays when the data move."""

    def sizes(self, *, annotations: bool = False) -> Integers:
        """[n] int64, stored bytes of each image, or of image and annotation together."""


@dataclass(frozen=True, eq=False)
class PairFiles:
    """Image files and annotation files."""

    images: Paths
    annotations: Paths

    def __len__(self) -> int:
        return len(self.images.stored)

    def read(self, row: int) -> tuple[bytes, bytes]:
        return read_whole(self.images.at(row)), read_whole(self.annotations.at(row))

    def name(self, row: int) -> str:
        return printable(self.images.at(row))

    def annotation(self, row: int) -> str:
        return printable(self.annotations.at(row))

    def relative_names(self) -> list[str]:
        return self.images.relative()

    def sizes(self, *, annotations: bool = False) -> Integers:
        return self.images.sizes() + (self.annotations.sizes() if annotations else 0)


@dataclass(frozen=True, eq=False)
class PairRows:
    """Rows of Arrow tables in the layout of Hugging Face: structs of {bytes, path}, images still encoded.

    Attributes:
        files: where they come from. starts: the row at which each of them begins.
    """

    files: list[Path]
    starts: list[int]
    images: pa.ChunkedArray
    annotations: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> tuple[bytes, bytes]:
        return image_bytes(self.images[row].as_py()), image_bytes(self.annotations[row].as_py())

    def name(self, row: int) -> str:
        file = bisect_right(self.starts, row) - 1
        return f"{self.files[file]}:{row - self.starts[file]}"

    def annotation(self, row: int) -> str:
        return self.name(row)

    def relative_names(self) -> list[str]:
        return [os.path.basename(self.name(row)) for row in range(len(self))]

    def sizes(self, *, annotations: bool = False) -> Integers:
        return stored_sizes(self.images) + (stored_sizes(self.annotations) if annotations else 0)


@lru_cache(maxsize=4)
def open_pairs(root: str, split: str, source: SceneSource = "folder") -> Pairs:
    """Tell the layout of a folder by what it holds, and open a split of it; or one of a data set of the hub.

    Layouts: `images/<split>/` beside `annotations/<split>/`, files at any depth that agree but for their suffix
    (ADE20K SceneParsing, CamVid; listed as `modalities.data.listing` says), there or in the one subfolder that has
    both; a
    `datasets` folder as
    `save_to_disk` writes it; parquet files `<split>-*.parquet`, there or in data/, which are read whole into memory,
    still encoded. The last two and the hub's (`owner/name`, see `modalities.data.hub`) with the columns `image` and
    `annotation`.

    Args:
        split: "train" or "test"; as stored SPLITS tells its names.
        source: "folder", or "hub" where `root` is a name there.

    Raises:
        UserError: the folder is missing or has none of the layouts; an image has no annotation.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    if source == "hub":
        return _open_hub(root, split)
    folder = data_folder(at_hand(root), "images and annotations")
    if tree := scene_tree(folder):
        return _open_tree(tree, split)
    saved = next((folder / name for name in SPLITS[split] if (folder / name / "state.json").is_file()), None)
    if saved is not None:
        return _open_saved(saved)
    if parquet := parquet_files(folder, SPLITS[split]):
        return _open_tables(parquet, [_parquet(file) for file in parquet])
    raise UserError(
        f"data.root={root}: looked for images/ with annotations/ (there or one folder below), for a folder that "
        f"datasets' save_to_disk wrote and for <split>-*.parquet (there or in data/), but found no {split} split in "
        f"any of them; it may be called {', '.join(SPLITS[split])}"
    )


def scene_tree(folder: Path) -> Path | None:
    """The folder with images/ and annotations/: this one, or the only one right below it; else None."""
    if _is_tree(folder):
        return folder
    found = [folder / name for name in subfolders(folder) if _is_tree(folder / name)]
    return found[0] if len(found) == 1 else None


def _is_tree(folder: Path) -> bool:
    return all(os.path.isdir(folder / name) for name in ("images", "annotations"))


def _open_tree(tree: Path, split: str) -> PairFiles:
    place = next((name for name in SPLITS[split] if os.path.isdir(tree / "images" / name)), None)
    if place is None:
        raise UserError(f"{tree / 'images'}: no folder {' or '.join(SPLITS[split])}; it holds the {split} split")
    if split == "test":
        say_left_aside(tree, [name for name in SPLITS["test"] if os.path.isdir(tree / "images" / name)])
    images, annotations = (_by_stem(tree / kind / place) for kind in ("images", "annotations"))
    if not images:
        raise UserError(f"{tree / 'images' / place}: no image file in it")
    if alone := sorted(images.keys() - annotations.keys()):
        raise UserError(
            f"{printable(images[alone[0]])}: no annotation {tree / 'annotations' / place / printable(alone[0])}.png "
            f"(images without one: {len(alone)} of {len(images)}); add them or remove the images"
        )
    stems = sorted(images)
    for stem in stems:
        if annotations[stem].lower().endswith(LOSSY_SUFFIXES):
            raise UserError(
                f"{printable(annotations[stem])}: a format that changes class numbers; save annotations as PNG"
            )
    if spare := len(annotations) - len(images):
        first = printable(min(annotations.keys() - images.keys()))
        say(f"{tree / 'annotations' / place}: {spare:,} annotations have no image (such as {first}) and are left out")
    return PairFiles(*(Paths.of((files[stem] for stem in stems), str(tree)) for files in (images, annotations)))


def _by_stem(folder: Path) -> dict[str, str]:
    """Path relative to the folder, without its suffix -> path, of the image files at any depth.

    Raises:
        UserError: two files differ in their suffix alone.
    """
    listed = list_files(folder, SUFFIXES)
    if line := listed.passed.line(str(folder)):
        say(line)
    found: dict[str, str] = {}
    for path in listed.paths:
        stem = os.path.splitext(path[len(str(folder)) + 1 :])[0]
        if stem in found:
            raise UserError(
                f"{printable(path)} and {printable(os.path.basename(found[stem]))} differ in their suffix alone, and "
                "an image has one annotation; remove one, or rename it"
            )
        found[stem] = path
    return found


def _open_saved(folder: Path) -> PairRows:
    """A split that `datasets` saved; its Arrow files are mapped, not read."""
    from datasets import load_from_disk  # seconds to import, for this layout alone

    try:
        table = load_from_disk(str(folder)).data.table
    except Exception as error:  # whatever the library makes of a damaged folder
        raise UserError(f"{folder}: not a readable datasets folder ({one_line(error)}); save it again") from error
    return _open_tables([folder], [_with_columns(table, folder)])


def _open_hub(root: str, split: str) -> PairRows:
    """A split of a data set of the hub; its Arrow files are mapped, not read."""
    stored = load_hub(root)
    name = next((name for name in SPLITS[split] if name in stored), None)
    if name is None:
        raise UserError(
            f"data.source=hub data.root={root}: needs a split {' or '.join(SPLITS[split])}; it has {', '.join(stored)}"
        )
    place = Path(root) / name
    return _open_tables([place], [_with_columns(stored[name].data.table, place)])


def _parquet(file: Path) -> pa.Table:
    schema, _ = parquet_schema(file)
    _check_columns(schema, file)
    return _with_columns(read_columns(file, ["image", "annotation"]), file)


def _check_columns(schema: pa.Schema, file: Path) -> None:
    for name in ("image", "annotation"):
        if name not in schema.names or not holds_images(schema.field(name).type):
            columns = printable(", ".join(f"{field.name}: {field.type}" for field in schema))
            raise UserError(f"{file}: needs columns image and annotation of structs with bytes; it has {columns}")


def _with_columns(table: pa.Table, file: Path) -> pa.Table:
    """The two columns of encoded images, of the same types whatever the file stores them in."""
    _check_columns(table.schema, file)
    return pa.table({name: images_of(table[name], str(file)) for name in ("image", "annotation")})


def _open_tables(files: list[Path], tables: list[pa.Table]) -> PairRows:
    starts = np.cumsum([0] + [len(table) for table in tables[:-1]]).tolist()
    table = pa.concat_tables(tables)
    return PairRows(files, starts, table["image"], table["annotation"])
