"""Volumes as samples: three-dimensional arrays, read, brought to one size.

Shapes: n samples, C channels, D x H x W voxels. Every data set is map-style and gives {"volume": float32 [C, D, H, W]}
and, where there are labels, "label", an int64 scalar (a class), a bool [C]
(several) or a float32 scalar (a number to predict).

A .npy file holds [D, H, W], or [C, D, H, W]. NIfTI files (.nii, .nii.gz) are read by nibabel, scaled as their header
says, and turned to (foot to head, front to back, right to left of the patient), whatever the scanner stored; a fourth
axis is that of channels. Nothing is unpickled.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.hub import one_line
from modalities.data.labelled import SPLITS, Kind, LabelledSource, of_split, read_layout
from modalities.data.listing import Contents, file_sizes, fingerprint, printable, read_whole, say
from nepa_core.basics import Batch, UnreadableSample, UserError, needs

SourceName = Literal["shapes", "folder"]
Fit = Literal["crop", "scale"]
Size = tuple[int, int, int]
"""(D, H, W) in voxels."""

NIFTI = (".nii", ".nii.gz")
SUFFIXES = (".npy", *NIFTI)
KIND = Kind("volume", "volume file", SUFFIXES)
_LOOKED_AT = 48  # volumes of a split whose size is read when it is opened

SHAPES = ("ellipsoid", "torus", "box")
SHAPES_SIDE, SHAPES_NOISE = 16, 0.25
SHAPES_COUNT = {"train": 3000, "test": 600}


class Source(LabelledSource, Protocol):
    """Labels and volumes."""

    def read(self, row: int) -> Tensor:
        """A volume as it is stored, float32 [D, H, W] or [C, D, H, W]; may raise anything."""


class Volumes(Dataset[Batch]):
    """Volumes of one size and so many channels."""

    def __init__(self, source: Source, size: Size, channels: int, fit: Fit) -> None:
        self.source, self.size, self.channels, self.fit = source, size, channels, fit

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        try:
            volume = sound(self.source.read(index), self.channels)
        except Exception as error:  # NumPy, gzip and nibabel have a dozen kinds for a damaged file
            raise UnreadableSample(f"{self.source.name(index)}: {one_line(error)}") from error
        volume = scaled(volume, self.size) if self.fit == "scale" else cropped(volume, self.size)
        labels = self.source.labels
        return {"volume": volume} | ({} if labels is None else {"label": labels[index]})

    def name(self, index: int) -> str:
        """What a message calls that volume: its file, or where it lies."""
        return self.source.name(index)

    def fingerprint(self) -> str:
        """Changes where other files are listed, or one of another size or label."""
        if not isinstance(self.source, Files):
            return f"{len(self)} samples"
        paths = self.source.paths.tolist()
        top = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        labels = None if self.source.labels is None else self.source.labels.numpy()
        return fingerprint((os.path.relpath(path, top) for path in paths), file_sizes(paths), labels)

    def contents(self) -> Contents | None:
        """The stored bytes of every volume; None where there are none."""
        if not isinstance(self.source, Files):
            return None
        paths = self.source.paths.tolist()
        return Contents(file_sizes(paths), lambda index: read_whole(paths[index]), self.name)


def open_volumes(
    source: SourceName,
    split: str,
    *,
    size: Size,
    channels: int = 1,
    fit: Fit = "scale",
    root: str | None = None,
    fold: str | None = None,
) -> Volumes:
    """The volumes of a split.

    Args:
        source, root, fold: see `open_source`.
        split: "train" or "test".
        fit: how a volume is brought to `size`: "scale", see `scaled`, or "crop", see `cropped`.

    Raises:
        UserError: the data can't be found, are in none of the layouts, or nibabel is not installed.
        UnreadableSample: from the data set, on access to a volume that can't be read, or has too many axes or too few,
            other channels, NaN or infinity, or one value alone.
    """
    stored = open_source(source, split, root=root, fold=fold)
    if isinstance(stored, Files):
        _say_unequal(root or "", split, stored, size, fit)
    return Volumes(stored, size, channels, fit)


def open_files(paths: Sequence[str], size: Size, channels: int, fit: Fit) -> Volumes:
    """Volume files by name, without labels."""
    _check_reader(paths)
    return Volumes(Files(np.array(list(paths)), None, None), size, channels, fit)


def sound(volume: Tensor, channels: int) -> Tensor:
    """float32 [C, D, H, W] of what is stored.

    Raises:
        ValueError: it has too many axes or too few, other channels, an axis without voxels, NaN or infinity, or one
            value alone.
    """
    if volume.ndim not in (3, 4):
        raise ValueError(
            f"has {volume.ndim} axes, {list(volume.shape)}, and a volume 3, or 4 with channels; stack its slices into "
            "one, or read pictures by a recipe for images"
        )
    volume = volume[None] if volume.ndim == 3 else volume
    if len(volume) != channels:
        raise ValueError(
            f"has {len(volume)} channels where data.channels={channels}; set that to {len(volume)}, if all have"
        )
    if not volume.numel():
        raise ValueError(f"holds no voxel: {list(volume.shape)}")
    if not volume.isfinite().all():
        raise ValueError("holds NaN or infinity; fill such voxels")
    if volume.amin() == volume.amax():
        raise ValueError("holds one value alone, which says nothing; remove it")
    return volume


def scaled(volume: Tensor, size: Size) -> Tensor:
    """[C, d, h, w] to [C, D, H, W]: axes that shrink by the mean of their parts, those that grow trilinearly."""
    here = volume.shape[1:]
    if tuple(here) == size:
        return volume
    depth, height, width = (min(side, wanted) for side, wanted in zip(here, size, strict=True))
    lower = F.adaptive_avg_pool3d(volume[None], (depth, height, width))
    return F.interpolate(lower, size, mode="trilinear", align_corners=False)[0]


def cropped(volume: Tensor, size: Size) -> Tensor:
    """[C, d, h, w] to [C, D, H, W]: the middle of longer axes; shorter ones are padded with the lowest value."""
    for axis, wanted in enumerate(size, 1):
        volume = volume.narrow(axis, max((volume.shape[axis] - wanted) // 2, 0), min(wanted, volume.shape[axis]))
    pads: list[int] = []
    for axis, wanted in reversed([*enumerate(size, 1)]):  # the last axis comes first there
        gap = wanted - volume.shape[axis]
        pads += [gap // 2, gap - gap // 2]
    return F.pad(volume, pads, value=float(volume.amin()))


# --------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, eq=False)
class Files:
    """Volume files. Paths are a NumPy array: a list of strings would be copied into every worker."""

    paths: np.ndarray[Any, Any]
    labels: Tensor | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> Tensor:
        return read_volume(str(self.paths[row]))

    def name(self, row: int) -> str:
        return printable(str(self.paths[row]))


@dataclass(frozen=True, eq=False)
class Shapes:
    """Ellipsoids, tori and boxes of any size and turn under noise, [n, D, H, W] float32."""

    volumes: Tensor
    labels: Tensor
    classes: tuple[str, ...] = SHAPES

    def __len__(self) -> int:
        return len(self.volumes)

    def read(self, row: int) -> Tensor:
        return self.volumes[row]

    def name(self, row: int) -> str:
        return f"shape:{row}"


def open_source(source: SourceName, split: str, *, root: str | None = None, fold: str | None = None) -> Source:
    """Where the volumes of a split come from; what has been opened once is kept.

    Args:
        source: "shapes" (3,000 of 16 x 16 x 16 voxels, 600 held out) or "folder".
        split: "train" or "test" (held out).
        root: a folder or a CSV file, see `modalities.data.labelled.read_layout`.
        fold: of these, see `modalities.data.labelled.folds_of`, to hold out.

    Raises:
        UserError: there is no such data, it is in none of the layouts, or nibabel is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    if source == "shapes":
        return _shapes(split)
    if root is None:
        raise UserError("data.source=folder needs data.root=DIR, the folder (or CSV file) with the volumes")
    return _open_folder(root, split, fold)


@lru_cache(maxsize=2)
def _shapes(split: str) -> Shapes:
    """Volume and place are drawn alike for every class, so that only the form tells it."""
    draw, count = np.random.default_rng(list(SPLITS).index(split)), SHAPES_COUNT[split]
    labels = np.arange(count) % len(SHAPES)
    line = np.arange(SHAPES_SIDE) - (SHAPES_SIDE - 1) / 2
    voxels = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    volumes = np.empty((count, len(voxels)), np.float32)
    for row, label in enumerate(labels):
        turn = _rotation(draw.normal(size=4))
        centre, sides = draw.uniform(-2.5, 2.5, 3), draw.uniform(0.8, 1.25, 3)
        reach = draw.uniform(3.2, 4.2)  # of a ball of the same volume, about
        x, y, z = (((voxels - centre) @ turn) / (reach * sides)).T
        match SHAPES[label]:
            case "ellipsoid":
                inside = x**2 + y**2 + z**2 < 1
            case "torus":
                inside = (np.sqrt(x**2 + y**2) - 1.0) ** 2 + z**2 < 0.46**2
            case _:
                inside = np.abs(np.stack((x, y, z))).max(0) < 0.806
        volumes[row] = draw.uniform(0.7, 1.3) * inside
    volumes += SHAPES_NOISE * draw.standard_normal(volumes.shape, dtype=np.float32)
    side = (SHAPES_SIDE,) * 3
    return Shapes(torch.from_numpy(volumes).unflatten(1, side), torch.as_tensor(labels, dtype=torch.int64))


def _rotation(quaternion: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The turn [3, 3] of a quaternion [4] of any length: of four normal numbers, any turn is as likely."""
    w, x, y, z = quaternion / np.sqrt(np.square(quaternion).sum())
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@lru_cache(maxsize=4)
def _open_folder(root: str, split: str, fold: str | None) -> Files:
    rows, reading = read_layout(root, KIND, fold=fold)
    _check_reader([path for path, *_ in rows])
    found = of_split(root, rows, split, KIND, reading)
    return Files(np.array(found.paths), found.labels, found.classes)


def _check_reader(paths: Sequence[str]) -> None:
    file = next((path for path in paths if path.lower().endswith(NIFTI)), None)
    if file is not None:
        needs(printable(file), "nibabel", extra="volumes")


@lru_cache(maxsize=8)  # a run opens its data many times
def _say_unequal(root: str, split: str, files: Files, size: Size, fit: Fit) -> None:
    """Say how many of a few volumes, evenly spread over the list, are brought to another size, and how."""
    count = len(files)
    rows = range(count) if count <= _LOOKED_AT else [place * count // _LOOKED_AT for place in range(_LOOKED_AT)]
    found, read = [], 0
    for row in rows:
        with suppress(Exception):  # is named when it is read as a sample
            shape = volume_shape(str(files.paths[row]))
            read += 1
            if len(shape) in (3, 4) and shape[-3:] != size:
                found.append(f"{files.name(row)}, {' x '.join(map(str, shape[-3:]))}")
    if found:
        how = "scaled to it" if fit == "scale" else "cropped to its middle, and padded with the lowest value"
        say(
            f"{root}: {len(found)} of {read} volumes of {split} looked at, such as {found[0]}, are not of "
            f"data.size={list(size)}: they are {how} (data.fit)"
        )


# --------------------------------------------------------------------------------------------------------- reading


def volume_shape(path: str) -> tuple[int, ...]:
    """The axes of a stored volume, channels first; only a header is read."""
    if path.lower().endswith(NIFTI):
        return tuple(_nifti(path).shape[::-1])
    return tuple(np.load(path, mmap_mode="r", allow_pickle=False).shape)


def read_volume(path: str) -> Tensor:
    """A stored volume, float32 [D, H, W] or [C, D, H, W].

    Raises:
        ValueError: it is no regular file, or holds no numbers.
        Exception: of many kinds, where it is damaged.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no regular file")
    if path.lower().endswith(NIFTI):
        image = _nifti(path)
        stored = np.asanyarray(image.dataobj)
        stored = stored.transpose(*reversed(range(stored.ndim)))  # (x, y, z, channel) to (channel, z, y, x)
        stored = np.flip(stored, (-2, -1)) if stored.ndim > 1 else stored
    else:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.ndarray):
            raise ValueError("holds several arrays (npz); save each volume as .npy")
    if stored.dtype.kind not in "biuf":
        raise ValueError(f"holds {stored.dtype}, no real numbers")
    return torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32))


def _nifti(path: str) -> Any:
    """A NIfTI file whose axes are turned to (left to right, back to front, foot to head)."""
    import nibabel  # an extra, and half a second to import

    return nibabel.as_closest_canonical(nibabel.load(path))
