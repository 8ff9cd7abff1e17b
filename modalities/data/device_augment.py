"""Augmentation of a batch of uint8 images on whatever device they lie: what `drawn_images` has drawn is done here.

Crop, scaling and flip are two matrix products for the whole batch, weighted as torch's antialiased resize weighs.
RandAugment's operations follow Pillow's, each on the images that drew it. Crops and operations are within 1 level of
the CPU's. No generator is drawn from, and nothing waits for the device.

Shapes: B images, n of them that drew an operation, C channels, h x w pixels as they come, H x W of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.data.image_augment import Interpolation

Records = np.ndarray[Any, Any]
"""[B] of `drawn_images.RECORD`."""
AT_ONCE = 256  # images whose crops are scaled together, to bound what they take: 0.3 GB of float32 at 256 x 256


def augmented(
    images: Tensor | Sequence[Tensor],
    drawn: Records,
    size: tuple[int, int],
    mean: Sequence[float],
    interpolation: Interpolation,
) -> Tensor:
    """Crop, flip and change images as drawn: uint8 [B, C, h, w] -> uint8 [B, C, H, W].

    Args:
        images: or B of [C, h, w], of several sizes: these are scaled one by one.
        mean: of each channel between 0 and 1, with which RandAugment fills corners. interpolation: of crops.
    """
    with torch.autocast(images[0].device.type, enabled=False), torch.no_grad():
        if not isinstance(images, Tensor):
            crops = [cropped_alone(*each, size, interpolation) for each in zip(images, drawn["box"], strict=True)]
            images = flipped(torch.stack(crops), drawn["flip"])
        elif (drawn["box"] == (0, 0, *images.shape[-2:])).all() and tuple(images.shape[-2:]) == size:
            images = flipped(images, drawn["flip"])
        else:
            parts = [slice(start, start + AT_ONCE) for start in range(0, len(images), AT_ONCE)]
            images = torch.cat([cropped(images[part], drawn[part], size, interpolation) for part in parts])
        fill = [min(255, round(255 * each)) for each in mean]
        for place in range(drawn["ops"].shape[1]):
            images = changed(images, drawn["ops"][:, place], drawn["amounts"][:, place], fill)
    return images


def flipped(images: Tensor, flips: np.ndarray[Any, Any]) -> Tensor:
    """Mirror those images whose number in flips [B] is not 0."""
    which = torch.from_numpy(flips != 0).to(images.device, non_blocking=True)
    return torch.where(which[:, None, None, None], images.flip(-1), images)


def cropped(images: Tensor, drawn: Records, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """The boxes, scaled to `size` (antialiased) and flipped where drawn: uint8 [B, C, H, W]."""
    boxes = torch.from_numpy(drawn["box"].astype(np.float32)).to(images.device, non_blocking=True)
    flips = torch.from_numpy(drawn["flip"] != 0).to(images.device, non_blocking=True)
    top, left, height, width = boxes.T
    down = resize_weights(top, height, size[0], images.shape[-2], interpolation)
    across = resize_weights(left, width, size[1], images.shape[-1], interpolation)
    across = torch.where(flips[:, None, None], across.flip(1), across)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    rows = (pixels @ across[:, None].transpose(-1, -2)).round_().clamp_(0, 255)  # torch's uint8 resize rounds here, too
    return (down[:, None] @ rows).round_().clamp_(0, 255).to(torch.uint8)


def cropped_alone(
    image: Tensor, box: np.ndarray[Any, Any], size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """The box of one image [C, h, w], scaled to `size` (antialiased)."""
    from torchvision.transforms.v2 import InterpolationMode  # as slow to import as torch
    from torchvision.transforms.v2.functional import resized_crop

    mode = InterpolationMode(interpolation)
    cut: Tensor = resized_crop(image, *map(int, box), list(size), mode, antialias=True)
    return cut


def resize_weights(start: Tensor, length: Tensor, out: int, stored: int, interpolation: Interpolation) -> Tensor:
    """What each of `stored` pixels adds to each of `out`, where `length` of them from `start` on are scaled to `out`.

    As torch's upsample_bilinear2d_aa and upsample_bicubic2d_aa (a = -0.5) weigh them.

    Args:
        start, length: [B] float32, whole numbers.

    Returns:
        [B, out, stored] float32; the weights of one pixel add up to 1.
    """
    scale = (length / out)[:, None, None]
    stretch = scale.clamp(min=1.0)
    support = stretch * (2.0 if interpolation == "bicubic" else 1.0)
    centre = scale * (torch.arange(out, device=start.device)[:, None] + 0.5)
    place = torch.arange(stored, device=start.device) - start[:, None, None]
    first = (centre - support + 0.5).floor().clamp(min=0)
    end = torch.minimum((centre + support + 0.5).floor(), length[:, None, None])
    far = ((place - centre + 0.5) / stretch).abs()
    weights = _cubic(far) if interpolation == "bicubic" else (1 - far).clamp(min=0)
    weights = torch.where((place >= first) & (place < end), weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


# -------------------------------------------------------------------------------------------------- RandAugment


def changed(images: Tensor, ops: np.ndarray[Any, Any], amounts: np.ndarray[Any, Any], fill: Sequence[int]) -> Tensor:
    """One operation for each image that drew one: uint8 [B, C, H, W], changed in place.

    Args:
        ops: [B] integers, places in OPERATIONS, -1 for none. amounts: [B] float64. fill: of each channel, for corners.
    """
    device = images.device
    for op in np.unique(ops[ops >= 0]):
        rows = np.flatnonzero(ops == op)
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        amount = torch.from_numpy(amounts[rows].astype(np.float32))
        images[index] = OPERATIONS[op](images[index], amount, fill)
    return images


Operation = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""(images uint8 [n, C, H, W], amounts [n] float32 on the CPU, fill) -> uint8 [n, C, H, W]."""


def _on(images: Tensor, amounts: Tensor) -> Tensor:
    return amounts.to(images.device, non_blocking=True)[:, None, None, None]


def invert(images: Tensor, _: Tensor, fill: Sequence[int]) -> Tensor:
    return 255 - images


def solarize(images: Tensor, below: Tensor, fill: Sequence[int]) -> Tensor:
    return torch.where(images < _on(images, below), images, 255 - images)


def solarize_add(images: Tensor, add: Tensor, fill: Sequence[int]) -> Tensor:
    brighter = (images.int() + _on(images, add).int()).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def posterize(images: Tensor, bits: Tensor, fill: Sequence[int]) -> Tensor:
    gone = 8 - _on(images, bits).int().clamp(0, 8)
    return (images.int() >> gone << gone).to(torch.uint8)


def auto_contrast(images: Tensor, _: Tensor, fill: Sequence[int]) -> Tensor:
    flat = images.flatten(2)
    low, high = flat.amin(-1, keepdim=True).double(), flat.amax(-1, keepdim=True).double()
    scale = 255 / (high - low)
    levels = torch.arange(256, device=images.device)
    table = (levels * scale - low * scale).clamp(0, 255)
    return _looked_up(images, torch.where(high > low, table, levels))


def equalize(images: Tensor, _: Tensor, fill: Sequence[int]) -> Tensor:
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int64, device=images.device).expand_as(flat))
    levels = torch.arange(256, device=images.device)
    highest = torch.where(counts > 0, levels, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(2, highest)) // 255
    table = (step // 2 + counts.cumsum(-1) - counts) // step.clamp(min=1)
    return _looked_up(images, torch.where(step > 0, table.clamp(0, 255), levels))


def _looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Every level replaced by what stands in its place in table [n, C, 256], rounded down."""
    found = table.to(torch.uint8).expand(*images.shape[:2], 256).gather(2, images.flatten(2).long())
    return found.view(images.shape)


def brightness(images: Tensor, factor: Tensor, fill: Sequence[int]) -> Tensor:
    return _blended(torch.zeros((), device=images.device), images, factor)


def contrast(images: Tensor, factor: Tensor, fill: Sequence[int]) -> Tensor:
    mean = (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blended(mean.float(), images, factor)


def colour(images: Tensor, factor: Tensor, fill: Sequence[int]) -> Tensor:
    return _blended(_grey(images).float(), images, factor)


def sharpness(images: Tensor, factor: Tensor, fill: Sequence[int]) -> Tensor:
    kernel = torch.full((3, 3), 1 / 13, device=images.device)
    kernel[1, 1] = 5 / 13
    channels = images.shape[1]
    smooth = images.float()
    inner = F.conv2d(smooth, kernel.expand(channels, 1, 3, 3), groups=channels)
    smooth[..., 1:-1, 1:-1] = (inner + 0.5).floor_().clamp_(0, 255)
    return _blended(smooth, images, factor)


def _grey(images: Tensor) -> Tensor:
    """[n, 1, H, W] int32, as Pillow converts to "L"."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    grey: Tensor = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def _blended(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """From `other` towards the images, and beyond; rounded down, as Pillow does."""
    mixed = other + _on(images, factor) * (images.float() - other)
    return mixed.clamp_(0, 255).to(torch.uint8)


def shear_x(images: Tensor, amount: Tensor, fill: Sequence[int]) -> Tensor:
    return moved(images, _affine(1.0, amount, 0.0, 0.0, 1.0, 0.0), fill)


def shear_y(images: Tensor, amount: Tensor, fill: Sequence[int]) -> Tensor:
    return moved(images, _affine(1.0, 0.0, 0.0, amount, 1.0, 0.0), fill)


def translate_x(images: Tensor, share: Tensor, fill: Sequence[int]) -> Tensor:
    return moved(images, _affine(1.0, 0.0, share * images.shape[-1], 0.0, 1.0, 0.0), fill)


def translate_y(images: Tensor, share: Tensor, fill: Sequence[int]) -> Tensor:
    return moved(images, _affine(1.0, 0.0, 0.0, 0.0, 1.0, share * images.shape[-2]), fill)


def rotate(images: Tensor, degrees: Tensor, fill: Sequence[int]) -> Tensor:
    y, x = (side / 2 for side in images.shape[-2:])
    angle = -degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    return moved(images, _affine(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), fill)


def _affine(*numbers: Tensor | float) -> Tensor:
    """[n, 6] of Pillow's a to f: pixel (x, y) is taken from (a x + b y + c, d x + e y + f)."""
    count = max(each.numel() for each in numbers if isinstance(each, Tensor))
    return torch.stack([torch.as_tensor(each, dtype=torch.float32).expand(count) for each in numbers], dim=1)


def moved(images: Tensor, affine: Tensor, fill: Sequence[int]) -> Tensor:
    """Images under affine maps [n, 6], bicubic as Pillow has it (a = -1, no antialiasing), `fill` outside them."""
    channels, height, width = images.shape[1:]
    a, b, c, d, e, f = affine.to(images.device, non_blocking=True)[:, :, None, None].unbind(1)
    y, x = torch.arange(height, device=images.device)[:, None] + 0.5, torch.arange(width, device=images.device) + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)
    left, above = (from_x - 0.5).floor(), (from_y - 0.5).floor()
    across, down = _taps(from_x - 0.5 - left), _taps(from_y - 0.5 - above)
    columns = [(left.long() + shift).clamp(0, width - 1) for shift in range(-1, 3)]
    pixels, found = images.flatten(2).float(), torch.zeros((), device=images.device)
    for shift, weight in zip(range(-1, 3), down, strict=True):
        row = (above.long() + shift).clamp(0, height - 1) * width
        for column, beside in zip(columns, across, strict=True):
            place = (row + column).flatten(1)[:, None].expand(-1, channels, -1)
            found = found + (weight * beside)[:, None] * pixels.gather(2, place).view(images.shape)
    corner = torch.tensor(fill, dtype=torch.uint8).to(images.device, non_blocking=True)[:, None, None]
    found = found + 1e-3  # rounded down, as Pillow does, but where float32 has lost the last bit of a whole level
    return torch.where(outside[:, None], corner, found.clamp(0, 255).to(torch.uint8))


def _taps(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the pixels at -1, 0, 1 and 2 for a place t in 0 to 1."""
    return (
        ((-t + 2) * t - 1) * t,
        (t - 2) * t * t + 1,
        ((-t + 1) * t + 1) * t,
        (t - 1) * t * t,
    )


OPERATIONS: tuple[Operation, ...] = (
    *(auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, colour, contrast, brightness),
    *(sharpness, shear_x, shear_y, translate_x, translate_y),
)
"""In the order of timm's `rand-...-inc1`."""
