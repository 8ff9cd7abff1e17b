"""Resized images as one file of pixels a split, see `modalities.data.image_arrays`.

Every process writes its rows into a draft that has room for all. Where images could not be read, the last ones are
moved into their places, so that the file has no gaps; doing that twice changes nothing, and so a command that was
interrupted at any point goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modalities.data.image_arrays import Shape, array_head, write_beside
from modalities.data.image_augment import CentreCrop
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.modality import Modality, first_readable
from nepa_core.runtime.checkpoint import disk_errors, read_json, write_whole


class Part(NamedTuple):
    """Rows `first` to `last` of a split: a shard, or a stretch of an array. `name` begins the names of its files."""

    split: str
    name: str
    number: int
    first: int
    last: int

    @property
    def shard(self) -> str:
        """Its file where the images are JPEG."""
        return f"{self.name}-{self.number:06d}.tar"

    @property
    def done(self) -> str:
        """The file that says that its rows stand in the array, and which could be read."""
        return f"{self.name}-{self.number:06d}.json"


def make_room(data: Modality, side: int, drafts: Path, counts: dict[str, int]) -> None:
    """A draft for every split that has none, as large as it will be: a disk that is too small is found here.

    Args:
        drafts: the folder of unfinished files. counts: images by the name of the file.
    """
    for name, count in counts.items():
        draft = drafts / f"{name}.npy"
        if draft.exists():
            continue
        shape = (count, side, side, channels_of(data))
        with disk_errors(draft):
            try:
                with draft.open("wb") as stream:
                    head = array_head(shape)
                    stream.write(head)
                    stream.flush()
                    os.posix_fallocate(stream.fileno(), 0, len(head) + _bytes(shape))
            except BaseException:
                draft.unlink(missing_ok=True)
                raise


def channels_of(data: Modality) -> int:
    """C of the first stored image that can be read.

    Raises:
        UserError: none can be.
    """
    return len(first_readable(data.stored("train"), "no training image")["image"])


def write_rows(data: Modality, side: int, drafts: Path, part: Part) -> None:
    """Write the images of a part, each scaled to cover a square of `side` pixels and cropped to it at the centre."""
    images: Any = data.stored(part.split)
    fitted = CentreCrop((side, side))
    rows, labels, names, unreadable = list[int](), list[int](), list[str](), list[str]()
    draft = drafts / f"{part.name}.npy"
    with disk_errors(draft), draft.open("r+b", buffering=0) as stream:
        offset = len(array_head((1, side, side, 1)))
        for row in range(part.first, part.last):
            try:
                sample = images[row]
                pixels = fitted(sample["image"]).permute(1, 2, 0).contiguous().numpy()
            except UnreadableSample as error:
                unreadable.append(str(error))
                continue
            _write_at(stream.fileno(), pixels.tobytes(), offset + row * pixels.nbytes)
            rows.append(row)
            labels.append(int(sample.get("label", -1)))
            names.append(images.name(row))
        os.fsync(stream.fileno())
        known = {"rows": rows, "labels": labels, "names": names, "unreadable": unreadable}
        write_whole(drafts / part.done, json.dumps(known))


def deliver(drafts: Path, out: Path, name: str, parts: Sequence[Part], classes: Sequence[str], shape: Shape) -> None:
    """Move a finished file to where it is looked for, what stands beside it first.

    Args:
        shape: of the draft as it was made, rows of unreadable images and all.

    Raises:
        UserError: no image of the split could be read.
    """
    file, draft = out / f"{name}.npy", drafts / f"{name}.npy"
    found = [read_json(drafts / part.done) for part in parts]
    known = (zip(each["rows"], each["labels"], each["names"], strict=True) for each in found)
    images = {row: (label, name) for part in known for row, label, name in part}
    count = len(images)
    if not count:
        raise UserError(f"{name}: no image can be read; the first: {found[0]['unreadable'][0]}")
    gaps = [row for row in range(count) if row not in images]
    moved = dict(zip(gaps, sorted(row for row in images if row >= count), strict=True))
    with disk_errors(draft):
        if draft.stat().st_size > len(array_head(shape)) + _bytes((count, *shape[1:])):
            _close_gaps(draft, moved, (count, *shape[1:]))
        labels, names = zip(*(images[moved.get(row, row)] for row in range(count)), strict=True)
        write_beside(file.with_suffix(".npz"), labels, names, classes)
        draft.rename(file)


def _close_gaps(draft: Path, moved: dict[int, int], shape: Shape) -> None:
    head, size = array_head(shape), _bytes(shape) // shape[0]
    with draft.open("r+b", buffering=0) as stream:
        handle = stream.fileno()
        for gap, row in moved.items():
            _write_at(handle, os.pread(handle, size, len(head) + row * size), len(head) + gap * size)
        _write_at(handle, head, 0)
        os.fsync(handle)
        os.ftruncate(handle, len(head) + _bytes(shape))
        os.fsync(handle)


def _write_at(handle: int, content: bytes, place: int) -> None:
    while content:
        written = os.pwrite(handle, content, place)
        content, place = content[written:], place + written


def _bytes(shape: Shape) -> int:
    count, height, width, channels = shape
    return count * height * width * channels
