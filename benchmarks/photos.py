"""Pictures of ImageNet's size and weight, made here: what decoding costs does not depend on what they show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)  # width and height of most of ImageNet's images
QUALITY = 94
NOISE = 12.0  # standard deviation of a grey level
CLASSES = 2
TOYS = 40  # images in each split of a dry run


def make_photos(folder: str, images: str) -> dict[str, list[float]]:
    """Write so many training images, and an eighth as many held-out ones, as FOLDER/SPLIT/CLASS/N.jpg, seeded.

    Those that are there stay. Gives their mean size.
    """
    count, sizes = int(images), []
    for split, number_of in {"train": count, "val": max(count // 8, 2 * CLASSES)}.items():
        for number in range(number_of):
            file = Path(folder) / split / f"class{number % CLASSES}" / f"{number:05}.jpg"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(photo(number if split == "train" else count + number))
            sizes.append(file.stat().st_size)
    return {"images": [len(sizes)], "KB an image": [sum(sizes) / len(sizes) / 1000]}


def make_folders(root: Path) -> None:
    """For a dry run: a little CIFAR-10 and a little Tiny ImageNet, as `--data` takes them."""
    for name, side in (("cifar10", 32), ("tiny", 64)):
        for split, first in {"train": 0, "val": TOYS}.items():
            for number in range(first, first + TOYS):
                file = root / name / split / f"class{number % CLASSES}" / f"{number:05}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(photo(number, (side, side)))


def photo(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """A JPEG of smooth colours at three scales under noise: about 111 KB, as those of ImageNet."""
    draw = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3), np.float32)
    for cells, strength in ((4, 0.5), (16, 0.3), (64, 0.2)):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += strength * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    pixels += draw.normal(0, NOISE, pixels.shape[:2])[..., None]
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=QUALITY)
    return file.getvalue()
