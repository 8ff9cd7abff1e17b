"""From stored bytes to pixels: what may be opened at all, how large, and which way up.

Shapes: C channels, h x w pixels as the image stands upright.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from modalities.data.listing import check_size

Channels = Literal[1, 3]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Of image files, in small letters."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is decoded, whatever the suffix says; others of PIL's would run a program (EPS) or fetch a file."""
LARGEST_IMAGE = 89_478_485
"""Pixels of the largest image that is decoded by default: PIL's MAX_IMAGE_PIXELS."""
ORIENTATION = 0x112  # the tag of EXIF
RGB = 3  # torchvision.io.ImageReadMode.RGB

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit here refuses
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning, r"PIL\.")  # some of ImageNet's; none needs turning


def opened(stored: bytes, max_pixels: int = LARGEST_IMAGE) -> Image.Image:
    """An image whose header has been read, and nothing else.

    Raises:
        ValueError: it is none of FORMATS, or has more than `max_pixels` pixels.
        Exception: of many kinds, where the header is damaged.
    """
    check_size(len(stored))
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL would refuse from twice its own limit on
    try:
        image: Image.Image = Image.open(io.BytesIO(stored), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more pixels than data.max_pixels={max_pixels} allows") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width:,} x {height:,} pixels, more than data.max_pixels={max_pixels} allows")
    return image


def orientation(image: Image.Image) -> int:
    """The orientation that its EXIF block names, or its XMP block where that does not: 1 to 8, 1 is upright.

    A damaged block names none.
    """
    with suppress(Exception):
        found = image.getexif().get(ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def decode(stored: bytes | Pixels, channels: Channels, max_pixels: int = LARGEST_IMAGE) -> Tensor:
    """Pixels, uint8 [C, h, w], of an encoded file or of pixels [h, w] or [h, w, 3].

    A JPEG goes through torchvision to RGB: with a crop, 1.4 times as fast as through PIL, and the same pixels (up to 2
    levels off where the colours are subsampled in height alone). The rest goes through PIL. The orientation (see
    `orientation`) is applied: the image stands as its author saw it, and as the `datasets` library decodes it. Alpha
    is dropped. Of an animation or a file of several pages the first picture is taken.

    Raises:
        Exception: of many kinds, where there is no image, one of more than 8 bits a channel, or one of more than
            `max_pixels` pixels, of which the header alone is read.
    """
    if isinstance(stored, np.ndarray):
        if stored.ndim == (3 if channels == 3 else 2):  # nothing to convert: a copy at most, which is the caller's
            pixels = torch.from_numpy(stored if stored.flags.owndata and stored.flags.writeable else stored.copy())
            return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
        return _convert(Image.fromarray(stored), channels)
    image = opened(stored, max_pixels)
    if channels == 3 and image.format in ("JPEG", "MPO"):
        turn = orientation(image)  # torchvision's own would miss an EXIF block behind another one
        with suppress(RuntimeError, AttributeError):  # PIL knows more kinds of JPEG, and more about what is wrong
            return upright(decode_as_stored(stored), turn)
    image.load()
    with suppress(Exception):  # the pixels are there, whatever is wrong with the EXIF block
        ImageOps.exif_transpose(image, in_place=True)
    return _convert(image, channels)


def decode_as_stored(stored: bytes) -> Tensor:
    """Pixels, uint8 [3, h, w], of a JPEG, PNG, GIF or WebP by torchvision's operator, the orientation not applied.

    The operator, as the function around it warns from torchvision 0.29 on that torchcodec's is to take its place.

    Raises:
        RuntimeError: it can't be decoded.
        AttributeError: of a torchvision that has the operator no more.
    """
    import torchvision.io  # noqa: F401  registers the operator; as slow to import as torch

    encoded = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    pixels: Tensor = torch.ops.image.decode_image(encoded, RGB, False)
    return pixels


def upright(pixels: Tensor, turn: int) -> Tensor:
    """Turn [..., H, W] as EXIF's orientation `turn` says."""
    if turn >= 5:
        pixels = pixels.transpose(-1, -2)
    flips = [axis for axis, turns in ((-2, (3, 4, 7, 8)), (-1, (2, 3, 6, 7))) if turn in turns]
    return pixels.flip(flips) if flips else pixels.contiguous()


def _convert(image: Image.Image, channels: Channels) -> Tensor:
    from torchvision.transforms.v2.functional import pil_to_tensor

    if image.mode.startswith(("I", "F")):  # PIL would clip at 255 without a word
        raise ValueError(f"more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:  # going straight to RGB, PIL warns on the screen
        image = image.convert("RGBA")
    pixels: Tensor = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    return pixels
