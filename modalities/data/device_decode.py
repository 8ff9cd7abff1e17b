"""JPEG decoded on the device, a batch at once: nvJPEG by `torchvision.io.decode_jpeg`.

Loader processes read files and look at their heads. What nvJPEG can't take (PNG and other formats, CMYK), or takes one
by one (progressive JPEG), they decode themselves and send as PPM; what it refuses all the same the main process
decodes. Both are counted and said. On a CPU the same code runs through torchvision's own decoder, for the tests.

Shapes: B images, h x w pixels as they stand upright, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.device_augment import augmented
from modalities.data.drawn_images import AUGMENT, Drawing, records
from modalities.data.hub import one_line
from modalities.data.image_augment import Interpolation
from modalities.data.image_decode import Pixels, decode, opened, orientation, upright
from modalities.data.listing import Derived, say
from nepa_core.basics import Batch, UnreadableSample, UserError

ENCODED = "encoded"
"""Key of an image that is still to be decoded: the bytes of a JPEG, or a PPM."""
JPEG = b"\xff\xd8"


def check_cuda() -> None:
    """Whether there is a GPU to decode on.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "data.decode_on=gpu decodes by nvJPEG on a CUDA device, and there is none here; leave it out, or give "
            "data.decode_on=cpu"
        )


class EncodedImages(Derived, Dataset[Batch]):
    """{ENCODED, AUGMENT, "label"}, and "erase" where that is asked for: what is done to an image is drawn by its head.

    Args:
        stored: a `DecodedImages`. erase: draws the rectangle that the sample carries.
    """

    def __init__(self, stored: Any, drawing: Drawing, erase: Callable[[], Tensor] | None) -> None:
        self.stored, self.drawing, self.erase = stored, drawing, erase
        self.raw: Callable[[int], bytes | Pixels] = stored.raw

    def decoded(self, index: int) -> Tensor:
        """See `DecodedImages.decoded`."""
        found: Tensor = self.stored.decoded(index)
        return found

    def __getitem__(self, index: int) -> Batch:
        try:
            stored = self.raw(index)
            head = opened(stored, self.stored.max_pixels) if isinstance(stored, bytes) else None
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            raise UnreadableSample(f"{self.name(index)}: {one_line(error)}") from error
        if head is not None and head.format == "JPEG" and head.mode in ("RGB", "L") and "progressive" not in head.info:
            turn, (width, height) = orientation(head), head.size
            drawn = self.drawing(*((width, height) if turn >= 5 else (height, width)))
            drawn["turn"] = turn
        else:
            pixels = self.decoded(index)
            drawn, stored = self.drawing(*pixels.shape[-2:]), as_ppm(pixels)
        sample = {ENCODED: stored, AUGMENT: drawn.tobytes(), "label": self.stored.labels[index]}
        return sample if self.erase is None else sample | {"erase": self.erase()}


def still_to_do(batch: Batch, size: tuple[int, int], mean: Sequence[float], interpolation: Interpolation) -> Tensor:
    """The images of a batch, decoded where they are not, cropped and changed as its AUGMENT says: uint8 [B, C, H, W].

    Where one can't be decoded, float32 with NaN in its place, so that it is counted as unreadable and named.

    Raises:
        UserError: images are encoded, and there is no GPU. Whoever trains looks at a first batch before anything else.
    """
    drawn = records(batch)
    if ENCODED not in batch:
        return augmented(batch["image"], drawn, size, mean, interpolation)
    check_cuda()
    device = batch["label"].device
    found = decoded(batch[ENCODED], drawn["turn"], device)
    blank = torch.zeros((3, 1, 1), dtype=torch.uint8, device=device)
    torn = [place for place, each in enumerate(found) if each is None]
    boxes = drawn.copy()
    boxes["box"][torn] = (0, 0, 1, 1)
    images = augmented([blank if each is None else each for each in found], boxes, size, mean, interpolation)
    if torn:
        images = images.float()
        images[torn] = torch.nan
    return images


def as_ppm(pixels: Tensor) -> bytes:
    """Pixels, uint8 [3, h, w], as the format that has nothing to decode."""
    height, width = pixels.shape[-2:]
    return b"P6 %d %d 255\n" % (width, height) + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()


def decoded(encoded: Sequence[bytes], turns: np.ndarray[Any, Any], device: torch.device) -> list[Tensor | None]:
    """Images on the device, uint8 [3, h, w] each, upright; None where one can't be decoded.

    Args:
        turns: [B] integers, the orientation that EXIF names of each, see `image_decode.upright`.

    Raises:
        UserError: torchvision was built without nvJPEG.
    """
    found: list[Tensor | None] = [None if each.startswith(JPEG) else _of_ppm(each, device) for each in encoded]
    places = [place for place, each in enumerate(found) if each is None]
    files = [torch.frombuffer(bytearray(encoded[place]), dtype=torch.uint8) for place in places]
    fallen = len(encoded) - len(places)
    for place, pixels in zip(places, _jpegs(files, device), strict=True):
        if pixels is None:
            fallen += 1
            pixels = _on_the_cpu(encoded[place], device)  # upright already
            found[place] = pixels
        else:
            found[place] = upright(pixels, int(turns[place]))
    COUNTED.add(len(encoded), fallen)
    return found


def _of_ppm(stored: bytes, device: torch.device) -> Tensor:
    head, _, content = stored.partition(b"\n")
    width, height = map(int, head.split()[1:3])
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, width, 3)
    return pixels.to(device, non_blocking=True).permute(2, 0, 1)


def _jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """All at once; where one is refused, which costs the whole batch, one by one."""
    from torchvision.io import ImageReadMode, decode_jpeg  # as slow to import as torch

    if not files:
        return []
    try:
        return list(decode_jpeg(files, ImageReadMode.RGB, device))
    except RuntimeError as error:
        if "not compiled with nvJPEG" in str(error):
            raise UserError(
                "data.decode_on=gpu: this torchvision was built without nvJPEG; install its CUDA build, or give "
                "data.decode_on=cpu"
            ) from error
        return [None] if len(files) == 1 else [pixels for file in files for pixels in _jpegs([file], device)]


def _on_the_cpu(stored: bytes, device: torch.device) -> Tensor | None:
    try:
        return decode(stored, 3).to(device)
    except Exception:  # its tokens will be NaN, and so it is counted as unreadable and named
        return None


class Counted:
    """How many images went through the decoder of the CPU: said at 1, 10, 100 and so on of them."""

    def __init__(self) -> None:
        self.seen = self.fallen = 0

    def add(self, seen: int, fallen: int) -> None:
        before = len(str(self.fallen)) if self.fallen else 0
        self.seen, self.fallen = self.seen + seen, self.fallen + fallen
        if self.fallen and len(str(self.fallen)) > before:
            say(
                f"data.decode_on=gpu: {self.fallen:,} of {self.seen:,} images so far were decoded on the CPU (no JPEG, "
                "CMYK, progressive, or refused by nvJPEG)"
            )


COUNTED = Counted()
"""Of this process."""
