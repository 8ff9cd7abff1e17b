"""What is done to a decoded image before it is stacked into a batch: fitting it to size, and augmentation.

Everything here takes and gives uint8 pixels [C, H, W] and draws from torch's global generator, which the loader
seeds for every batch. timm draws from Python's `random` and from NumPy: both are seeded from it first.

Random erasing fills a rectangle with N(0, 1) noise in standardised pixels, which uint8 can't hold (with mean and
std 0.5 a third of it would be clipped). So the worker draws the rectangle and the batch carries it, and
`Images.before_mixing` fills it on the device: a function of the batch, as it must be. Samples are mixed after that,
as in timm and in the released scripts, so a rectangle shines through as the rest of its image does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

Augment = Literal["none", "crop", "crop_flip", "randaugment"]
Interpolation = Literal["bilinear", "bicubic"]
Transform = Callable[[Tensor], Tensor]
"""From uint8 [C, h, w] to uint8 [C, H, W]."""

RANDAUGMENT = "rand-m9-mstd0.5-inc1"
"""timm's name for RandAugment(9, 0.5): two operations of magnitude 9 ± 0.5, each applied with probability 0.5."""


def augmentation(
    augment: Augment, size: tuple[int, int], mean: Sequence[float], interpolation: Interpolation = "bicubic"
) -> Transform | None:
    """The random transform of a training image to `size`, or None for augment="none".

    Args:
        augment: "crop" is RandomResizedCrop (antialiased; 8 to 100 % of the area, sides 3:4 to 4:3), "crop_flip" adds
            a horizontal flip with probability 0.5, "randaugment" adds timm's RandAugment, which is always bicubic.
        mean: of each channel between 0 and 1: what RandAugment fills empty corners with.
        interpolation: of the crop.
    """
    if augment == "none":
        return None
    from torchvision.transforms import v2  # as slow to import as torch

    steps: list[Transform] = [v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode(interpolation))]
    if augment != "crop":
        steps.append(v2.RandomHorizontalFlip())
    if augment == "randaugment":
        steps.append(RandAugment(size, mean))
    return steps[0] if len(steps) == 1 else v2.Compose(steps)


class CentreCrop:
    """Scale (bicubic, antialiased) to cover `size` / `ratio`, then crop `size` at the centre.

    For a square this is torchvision's Resize and CenterCrop on a PIL image, and timm's evaluation with crop_pct.

    Args:
        squash: scale to exactly `size` / `ratio` instead, whatever the image's own shape: timm's crop_mode "squash",
            and what crop_pct comes to in the released scripts.
    """

    def __init__(self, size: tuple[int, int], ratio: float = 1.0, *, squash: bool = False) -> None:
        self.size = size
        self.frame = [int(side / ratio) for side in size]
        self.squash = squash

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

        height, width = self.frame
        h, w = image.shape[-2:]
        if (h, w) == (height, width) == self.size:
            return image
        cover = [max(height, int(width * h / w)), max(width, int(height * w / h))]
        scaled = resize(
            to_pil_image(image), self.frame if self.squash else cover, interpolation=InterpolationMode.BICUBIC
        )
        cropped: Tensor = pil_to_tensor(center_crop(scaled, list(self.size)))
        return cropped


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """timm's posterize, also where it asks to keep 0 bits: black, as in the Pillow it was written for; 13 refuses."""
    return Image.new(image.mode, image.size) if bits < 1 else posterize(image, bits, **settings)


class RandAugment:
    """RandAugment(9, 0.5) as timm makes it for an image of this size, with bicubic interpolation."""

    def __init__(self, size: tuple[int, int], mean: Sequence[float]) -> None:
        from timm.data.auto_augment import rand_augment_transform  # two seconds to import

        self.transform = rand_augment_transform(
            RANDAUGMENT,
            {
                "translate_const": int(min(size) * 0.45),
                "img_mean": tuple(min(255, round(255 * each)) for each in mean),
                "interpolation": Resampling.BICUBIC,
            },
        )
        for op in self.transform.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = partial(_posterize, op.aug_fn)

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        seed_libraries()
        changed: Tensor = pil_to_tensor(self.transform(to_pil_image(image)))
        return changed


class ErasedBox:
    """Draws the rectangle of timm's RandomErasing: 2 to 33 % of the area, sides 0.3 to 1 / 0.3.

    A call gives int64 [6]: top, left, height and width in pixels (height and width 0 with probability
    1 - `probability`), and the (y, x) of a window in the field of noise that `erase` reads.
    """

    def __init__(self, probability: float, size: tuple[int, int]) -> None:
        from timm.data.random_erasing import RandomErasing

        self.size = size
        self.erasing = RandomErasing(probability, mode="const", device="cpu")

    def __call__(self) -> Tensor:
        seed_libraries()
        gone = self.erasing(torch.ones(1, *self.size))[0] == 0
        rows, columns = gone.any(dim=1).nonzero(), gone.any(dim=0).nonzero()
        window = [int(torch.randint(side, ())) for side in self.size]
        if not len(rows):
            return torch.tensor([0, 0, 0, 0, *window])
        return torch.tensor([int(rows[0]), int(columns[0]), len(rows), len(columns), *window])


def erase(images: Tensor, boxes: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
    """Fill the rectangles of `ErasedBox` with noise for every pixel and channel, a function of the arguments alone.

    timm's mode "pixel". The noise of a sample is a window of one fixed field of N(0, 1), four times as large as the
    image, at an offset that its box holds: no generator is drawn from on the device, and nothing waits for it.

    Args:
        images: [B, C, H, W] float. boxes: [B, 6] int64 on the same device.
        mean, std: of the noise, numbers or [C, 1, 1].
    """
    top, left, height, width, noise_y, noise_x = boxes.T[..., None]  # [B, 1] each
    channels, rows, columns = images.shape[1:]
    y, x = torch.arange(rows, device=images.device), torch.arange(columns, device=images.device)
    inside_y, inside_x = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    field = noise_field(channels, rows, columns, images.device)
    noise = field[:, (noise_y + y)[:, :, None], (noise_x + x)[:, None, :]].transpose(0, 1)
    return torch.where(inside, noise * std + mean, images)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # the cache outlives a caller's inference mode
def noise_field(channels: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """N(0, 1), always the same: [channels, 2 * rows, 2 * columns], of which windows are taken at drawn places."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(channels, 2 * rows, 2 * columns, generator=draw).to(device)


def seed_libraries() -> None:
    """Seed Python's `random` and NumPy from torch's global generator."""
    seed = int(torch.randint(2**32, ()))
    random.seed(seed)
    np.random.seed(seed)
