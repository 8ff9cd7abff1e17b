"""Images of one size as one file of pixels, read by their place: nothing is decoded, and nothing is held in memory.

  SPLIT.npy   uint8 [n, H, W, C], C = 1 or 3: what `numpy.load(file, mmap_mode="r")` maps
  SPLIT.npz   beside it, without pickle: "labels" int64 [n]; "names" bytes [n], where each image is from; "classes",
              their names, or none

`nepa resize format=array` writes them. Rows are read by `pread`: loader processes share the pages that the system
keeps, and a disk that fails costs a named image, where a map would cost the process (SIGBUS).

Shapes: n images of H x W pixels with C channels.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.data.hub import one_line
from modalities.data.image_decode import Pixels
from modalities.data.listing import Integers, content_sample, printable
from nepa_core.basics import UserError

Shape = tuple[int, int, int, int]
"""n, H, W, C."""


@dataclass(frozen=True, eq=False)
class PixelFile:
    """A source (`modalities.data.image_sources.Source`) of images in one file.

    Attributes:
        offset: bytes before the first image. origins: bytes [n], where each image is from.
    """

    path: Path
    shape: Shape
    offset: int
    labels: Tensor
    classes: tuple[str, ...] | None
    origins: np.ndarray[Any, Any]

    @property
    def one_size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.shape[1:3]

    def read(self, row: int) -> Pixels:
        pixels: Pixels = self.rows([row])[0]
        return pixels.reshape(self.one_size) if self.shape[3] == 1 else pixels

    def rows(self, rows: Sequence[int]) -> Pixels:
        """Images [len(rows), H, W, C].

        Raises:
            OSError: they can't be read.
            ValueError: the file has become shorter.
        """
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        size, handle = found[:1].nbytes, _handle(str(self.path))
        for pixels, row in zip(found, rows, strict=True):
            if os.preadv(handle, [pixels.data], self.offset + row * size) != size:
                raise ValueError("the file has become shorter since it was opened")
        return found

    def name(self, row: int) -> str:
        return f"{self.path}:{row} ({printable(os.fsdecode(bytes(self.origins[row])))})"

    def relative_names(self) -> list[str]:
        return [f"{self.path.name}:{row}" for row in range(self.shape[0])]

    def sizes(self) -> Integers:
        return np.full(self.shape[0], int(np.prod(self.shape[1:])))

    def content(self) -> str:
        """See `content_sample`: an array edited in place is noticed where it is looked at."""
        return content_sample(self.path)


@lru_cache(maxsize=8)
def _handle(path: str) -> int:
    """An open file, once a process: a forked one shares it, for `pread` moves nothing."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def array_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of pixels of a split that may have these names, if both its files are there."""
    found = (folder / f"{name}.npy" for name in names)
    return next((file for file in found if file.is_file() and file.with_suffix(".npz").is_file()), None)


def open_array(file: Path) -> PixelFile:
    """A split.

    Raises:
        UserError: a file is damaged, cut short or of another kind, or the two don't fit each other.
    """
    shape, offset = _shape_of(file)
    beside = file.with_suffix(".npz")
    try:
        with np.load(beside, allow_pickle=False) as stored:
            labels, origins, classes = (stored[key] for key in ("labels", "names", "classes"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{beside} can't be read ({one_line(error)}); write both files again by nepa resize") from error
    kinds = labels.dtype.kind, origins.dtype.kind, classes.dtype.kind
    if (labels.shape, origins.shape) != (shape[:1], shape[:1]) or kinds not in (("i", "S", "U"), ("i", "S", "f")):
        raise UserError(
            f"{beside} is not of {file.name}: {len(labels)} labels and {len(origins)} names for {shape[0]} images; "
            "write both files again by nepa resize"
        )
    names = tuple(map(str, classes)) or None
    return PixelFile(file, shape, offset, torch.from_numpy(labels.astype(np.int64)), names, origins)


def _shape_of(file: Path) -> tuple[Shape, int]:
    """Shape and offset by the file's head and its size; no pixel is read."""
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(stream)
            offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({one_line(error)}); write it again by nepa resize") from error
    if dtype != np.uint8 or by_column or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise UserError(
            f"{file} holds {dtype} {list(shape)}; images are uint8 [n, height, width, channels] with 1 or 3 channels"
        )
    if size != (wanted := offset + int(np.prod(shape))):
        raise UserError(f"{file} has {size:,} bytes and should have {wanted:,}: cut short or damaged; write it again")
    return (shape[0], shape[1], shape[2], shape[3]), offset


def array_head(shape: Shape) -> bytes:
    """What stands before the pixels: as long for fewer images, so that some may be taken off the end."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return head.getvalue()


def write_beside(file: Path, labels: Sequence[int], origins: Sequence[str], classes: Sequence[str]) -> None:
    """Write `file`, a SPLIT.npz, whole or not at all."""
    draft = file.with_name(f".writing_{file.name}")
    names = np.array([os.fsencode(each) for each in origins], dtype=np.bytes_)
    try:
        with draft.open("wb") as stream:
            np.savez(stream, labels=np.array(labels, np.int64), names=names, classes=np.array(classes))
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(file)
    finally:
        draft.unlink(missing_ok=True)
