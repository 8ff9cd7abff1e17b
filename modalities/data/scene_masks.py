"""The annotation of a scene: which files hold class numbers, and what the declared classes mean for them.

Shapes: H x W pixels as the image stands upright.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from modalities.data.image_decode import opened, orientation, upright
from nepa_core.basics import UserError, some

IGNORED = 255
"""The target of a pixel that no loss and no metric counts."""
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF", "WEBP")
"""Formats that do, or may, change a class number into another."""
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".avif", ".webp")
SHRUNK = {"L;2": 85, "L;4": 17}  # PIL spreads 2 and 4 bits of grey over 0 to 255, by this factor
_LARGEST_LABEL = 2**53  # of whole numbers in floating point, those that are exact
INVERTED = ("1;I", "L;I", "L;2I", "L;4I", "1;IR", "L;IR", "L;2IR", "L;4IR")  # ... and turns these upside down

Labels = np.ndarray[Any, Any]


class Numbering(NamedTuple):
    """How an annotation numbers the classes.

    Attributes:
        classes: their number C.
        first: the stored value of class 0; the others follow it.
        ignored: stored values that become IGNORED; 255 always does.
    """

    classes: int
    first: int
    ignored: tuple[int, ...]


class Mask(NamedTuple):
    """A decoded annotation: integers [H, W], upright, and the orientation that its own tag named (1: none)."""

    labels: Labels
    turn: int


def read_mask(stored: bytes, name: str, max_pixels: int) -> Mask:
    """The class numbers that an encoded annotation holds, exactly; of a palette image its indices, not its colours.

    Modes 1, L, P, I;16, I and F (whole numbers) are read. Everything else is refused: a lossy format, several
    channels or pages, fractions, and greys that are stored inverted or on a scale of their own.

    Raises:
        UserError: it is refused, `name` in front.
        Exception: of many kinds, where it is no image, a damaged one, or one too large.
    """
    image = opened(stored, max_pixels)
    if (image.format or "") in LOSSY or "jpeg" in str(image.info.get("compression", "")):
        raise UserError(f"{name}: a {image.format} file may have changed class numbers; save annotations as PNG")
    if getattr(image, "n_frames", 1) > 1:
        raise UserError(f"{name}: the annotation has {getattr(image, 'n_frames', 1)} pages or frames; keep one")
    decoder, raw, largest = _storage(image)
    if raw in INVERTED:
        raise UserError(f"{name}: the annotation is stored inverted (0 is white); save it as a PNG of class numbers")
    if decoder.startswith("ppm") and largest not in (None, 255, 65535):
        raise UserError(f"{name}: the annotation is on a scale of 0 to {largest}; save it as a PNG of class numbers")
    stored_turn = orientation(image)
    image.load()
    turn, labels = orientation(image), np.asarray(image)  # loading turns a TIFF, and finds the tag of a PNG
    if labels.ndim != 2:
        raise UserError(
            f"{name}: the annotation is in mode {image.mode}, which has several channels; {_one_channel(labels)}"
        )
    if labels.dtype.kind == "f":
        wrong = labels[(labels != np.round(labels)) | (np.abs(labels) > _LARGEST_LABEL)]
        if wrong.size:
            example = "infinity" if np.isinf(wrong[0]) else wrong[0]
            raise UserError(f"{name}: the annotation holds {example}, no class number; save whole numbers")
        labels = labels.astype(np.int64)
    labels = labels.astype(np.uint8) if labels.dtype == bool else labels // SHRUNK.get(raw, 1)
    return Mask(_upright(labels, turn), stored_turn if turn == 1 else turn)


def _one_channel(pixels: Labels) -> str:
    """How pixels [H, W, k] that are no class numbers become some, in words."""
    colours = pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., :1]
    if (colours == colours[..., :1]).all():
        return "its colours are all grey: save the first channel alone, `Image.open(FILE).getchannel(0).save(FILE)`"
    kinds, counts = np.unique(colours.reshape(-1, colours.shape[-1]), axis=0, return_counts=True)
    usual = ", ".join(str(tuple(kinds[place].tolist())) for place in (-counts).argsort(kind="stable")[:2])
    return (
        f"its colours ({len(kinds):,}, such as {usual}) name the classes: save the number of each colour's class "
        "instead, in a PNG of one channel (mode L), `Image.fromarray(NUMBERS.astype('uint8')).save(FILE)`"
    )


def _storage(image: Image.Image) -> tuple[str, str, int | None]:
    """PIL's decoder, its name for the stored layout and, of a PGM, the value that stands for white."""
    if not (tiles := getattr(image, "tile", None)):
        return "", "", None
    decoder, *_, settings = tiles[0]
    settings = settings if isinstance(settings, tuple) else (settings,)
    raw = settings[0] if settings and isinstance(settings[0], str) else ""
    largest = settings[1] if decoder.startswith("ppm") and len(settings) > 1 else None
    return decoder, raw, largest


def _upright(labels: Labels, turn: int) -> Labels:
    if turn == 1:
        return labels
    return upright(torch.from_numpy(labels.astype(np.int64)), turn).numpy()


def image_turn(stored: bytes, max_pixels: int) -> int:
    """The orientation that the tag of an encoded image names; 1 where it has none."""
    image = opened(stored, max_pixels)
    if image.format == "PNG":
        image.load()  # its EXIF block may come behind the pixels
    return orientation(image)


# ------------------------------------------------------------------------------- do the declared classes occur at all


@dataclass
class Census:
    """What annotations hold.

    Attributes:
        pixels: [256] of each stored value from 0 to 255. masks: how many annotations were read, of `total`.
    """

    total: int
    masks: int = 0
    pixels: Labels = field(default_factory=lambda: np.zeros(256, dtype=np.int64))

    def add(self, labels: Labels) -> None:
        inside = labels[(labels >= 0) & (labels <= IGNORED)]
        self.pixels += np.bincount(inside.ravel().astype(np.int64), minlength=256)[:256]
        self.masks += 1

    def absent(self, numbering: Numbering) -> list[int]:
        """The stored values of the declared classes that never occur."""
        declared = range(numbering.first, numbering.first + numbering.classes)
        return [value for value in declared if not self.pixels[value]]

    def undeclared(self, numbering: Numbering) -> int:
        """Pixels of 255, unless that is declared to be ignored."""
        return 0 if IGNORED in numbering.ignored else int(self.pixels[IGNORED])


ENOUGH = 32  # annotations that tell the usual data set from one with a class stored as 255
MOST = 2000  # that are read of one that is not usual


def take_census(total: int, read: Callable[[int], Labels], numbering: Numbering, order: Iterable[int]) -> Census:
    """Read annotations until it is clear whether every declared class occurs; a second for most data sets.

    Args:
        read: the labels of an annotation; may raise anything, which is left to whoever reads it as a sample.
        order: of reading, spread over the split.
    """
    census = Census(total)
    for tried, row in enumerate(order, 1):
        try:
            census.add(read(row))
        except Exception:
            continue
        absent = census.absent(numbering)
        odd = census.undeclared(numbering) or len(absent) >= numbering.classes - 1
        if not absent or (tried >= ENOUGH and not odd) or tried >= MOST:
            break
    return census


def judge_census(census: Census, numbering: Numbering, where: str) -> str | None:
    """A line worth saying about the classes that never occur, or None.

    Raises:
        UserError: all annotations were read, a declared class is in none of them, and 255, which nobody declared to
            be ignored, covers pixels: most likely 255 is that class.
    """
    absent, share = census.absent(numbering), census.undeclared(numbering) / max(int(census.pixels.sum()), 1)
    if not census.masks or not absent:
        return None
    left_out = int(census.pixels[list(numbering.ignored)].sum())
    if census.masks == census.total and not share and 0 < left_out == int(census.pixels.sum()):
        raise UserError(
            f"{where}: none of the {census.masks:,} annotations holds a class, only what data.ignored_labels leaves "
            f"out; classes are stored as {absent[0]} to {absent[-1]}, see data.first_label and data.class_count"
        )
    shown = some([str(value) for value in absent])
    told = f"{where}: of the {numbering.classes} declared classes, what is stored as {shown} never occurs"
    if share:
        line = (
            f"{told} in {census.masks:,} annotations, while 255, which no loss and no metric counts, covers "
            f"{share:.2%} of their pixels: store the class as its number, or give data.ignored_labels with 255 in it "
            "if those pixels are to be left out"
        )
        if census.masks < min(census.total, MOST):
            return line
        raise UserError(line)
    if len(absent) == numbering.classes - 1:
        return f"{told} in {census.masks:,} annotations: with one class there is nothing to tell apart"
    return None
