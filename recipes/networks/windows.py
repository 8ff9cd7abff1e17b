"""Classes of the pixels of whole images of any size, from a network that reads windows.

Shapes: H x W pixels of an image as stored, h x w of a window, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor

from modalities.data.scenes import padded, scaled_image
from nepa_core.basics import FROZEN

WindowLogits = Callable[[Tensor, Tensor | None], Tensor]
"""(windows uint8 [B, 3, h, w], real [B, 2] int64 or None) -> logits [B, C, h, w] float32; see `CroppedScenes`."""


class EvaluationConfig(BaseModel):
    """How held-out images are segmented.

    Attributes:
        mode: "slide" takes windows of the training crop and averages their logits where they overlap; "whole" reads
            an image at once.
        stride: (down, right) from window to window, in pixels.
        scales: factors on `data.short_side`; probabilities are averaged over them. (1.0,) is single-scale testing,
            0.5 to 1.75 in steps of 0.25 the field's multi-scale testing.
        flip: average with the mirrored image, at every scale.
        windows: most windows that go through the network at once.
        images: held-out images behind each line of metrics while training, drawn once; the summary is of all.
        pictures: held-out images that the report shows.
    """

    model_config = FROZEN

    mode: Literal["slide", "whole"]
    stride: tuple[PositiveInt, PositiveInt]
    scales: tuple[PositiveFloat, ...]
    flip: bool
    windows: PositiveInt
    images: PositiveInt
    pictures: PositiveInt


def predict(
    image: Tensor,
    logits_of: WindowLogits,
    settings: EvaluationConfig,
    *,
    short_side: int,
    window: tuple[int, int],
    patch: tuple[int, int],
) -> Tensor:
    """The most probable class of every pixel.

    Args:
        image: uint8 [3, H, W], as stored.
        short_side: pixels of the shorter side at scale 1.
        window: (h, w) of mode "slide". patch: a multiple of it is what mode "whole" pads to.

    Returns:
        int64 [H, W].
    """
    total = torch.zeros((), device=image.device)
    for scale in settings.scales:
        scaled = scaled_image(image, short_side, scale)
        for flipped in (False, True) if settings.flip else (False,):
            shown = scaled.flip(-1) if flipped else scaled
            if settings.mode == "slide":
                logits = slide(shown, logits_of, window=window, stride=settings.stride, at_once=settings.windows)
            else:
                logits = whole(shown, logits_of, patch=patch)
            logits = logits.flip(-1) if flipped else logits
            full = F.interpolate(logits[None], image.shape[-2:], mode="bilinear", align_corners=False)[0]
            total = total + full.softmax(0)
    return total.argmax(0)


def whole(image: Tensor, logits_of: WindowLogits, *, patch: tuple[int, int]) -> Tensor:
    """Logits [C, H, W] of an image uint8 [3, H, W] read at once; the last patches are filled up with black."""
    height, width = image.shape[-2:]
    filled = (-(-height // patch[0]) * patch[0], -(-width // patch[1]) * patch[1])
    return logits_of(padded(image, filled)[None], None)[0, :, :height, :width]


def slide(
    image: Tensor, logits_of: WindowLogits, *, window: tuple[int, int], stride: tuple[int, int], at_once: int
) -> Tensor:
    """Mean logits [C, H, W] of the windows over an image uint8 [3, H, W]; a smaller image is padded to one window."""
    height, width = image.shape[-2:]
    filled = padded(image, window)
    size = (filled.shape[-2], filled.shape[-1])
    rows, columns = (window_starts(*each) for each in zip(size, window, stride, strict=True))
    places = [(top, left) for top in rows for left in columns]
    real = None
    if size != (height, width):
        real = torch.tensor([[min(height, window[0]), min(width, window[1])]], device=image.device)
    total, count = torch.zeros((), device=image.device), image.new_zeros(size, dtype=torch.float32)
    for start in range(0, len(places), at_once):
        chunk = places[start : start + at_once]
        shown = torch.stack([filled[:, top : top + window[0], left : left + window[1]] for top, left in chunk])
        logits = logits_of(shown, None if real is None else real.expand(len(chunk), 2))
        if total.ndim == 0:
            total = logits.new_zeros(logits.shape[1], *size)
        for (top, left), each in zip(chunk, logits, strict=True):
            total[:, top : top + window[0], left : left + window[1]] += each
            count[top : top + window[0], left : left + window[1]] += 1
    return (total / count)[:, :height, :width]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` pixels, `stride` apart; the last one is drawn back to end with them.

    A length of at most one window has one start, 0.
    """
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
