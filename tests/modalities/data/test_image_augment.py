"""Decoding, fitting and augmentation, held against PIL, torchvision and timm."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from modalities.data.image_augment import CentreCrop, ErasedBox, RandAugment, erase
from modalities.data.image_decode import decode
from modalities.data.images import open_images
from modalities.image import Images
from nepa_core.contract import check_modality
from nepa_core.runtime.config import override
from recipes import vision
from recipes.configs import FinetuneConfig
from tests.pictures import encoded, open_folder, picture, pixels, write_tree

MEAN = (0.485, 0.456, 0.406)


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """A picture without detail, which JPEG keeps."""
    return picture(seed, 3, 3).resize((width, height), Image.Resampling.BICUBIC)


def adapter(**changes: Any) -> Images:
    settings: dict[str, Any] = {"source": "digits", "size": (8, 8), "patch": (2, 4), "channels": 1}
    return Images(**(settings | {"mean": (0.3,), "std": (0.4,)} | changes))


# ---- decoding


@pytest.mark.parametrize(
    "settings",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"quality": 20}],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_decoded_to_the_pixels_of_pil(settings: dict[str, Any], channels: int) -> None:
    stored = encoded(smooth(0, 61, 35), "jpeg", **settings)
    expected = Image.open(io.BytesIO(stored)).convert("L" if channels == 1 else "RGB")
    assert torch.equal(decode(stored, channels), pil_to_tensor(expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours_is_decoded_to_the_pixels_of_pil(mode: str) -> None:
    stored = encoded(smooth(1, 24, 30).convert(mode), "jpeg")
    assert (decode(stored, 3).int() - pixels(Image.open(io.BytesIO(stored))).int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_in_exif_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    image = smooth(2, 40, 24)
    stored = encoded(image, kind, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert (upright.width > upright.height) == (orientation < 5)
    assert torch.equal(decode(stored, 3), pixels(upright))


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_damaged_exif_block_does_not_cost_the_image(kind: str) -> None:
    image = smooth(3, 16, 16)
    plain, stored = encoded(image, kind), encoded(image, kind, exif=b"Exif\0\0MM\0\x2a\0\0\xff\xff\0\x01\x01\x12junk")
    assert torch.equal(decode(stored, 3), decode(plain, 3))


@pytest.mark.parametrize("error", [RuntimeError("Unsupported color conversion request"), AttributeError("no operator")])
def test_a_jpeg_that_torchvision_refuses_is_left_to_pil(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise error

    stored = encoded(smooth(4, 16, 16), "jpeg")
    expected = decode(stored, 3)
    monkeypatch.setattr("modalities.data.image_decode.decode_as_stored", refuse)
    assert torch.equal(decode(stored, 3), expected)


def test_a_colour_png_of_16_bits_is_brought_to_8() -> None:
    """PIL keeps the high byte of each channel; of one channel alone it would clip, so that is refused (test_image)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    values = [0x1234, 0xABCD, 0xFFFF]
    row = b"\0" + struct.pack(">3H", *values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    stored = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert decode(stored, 3).flatten().tolist() == [value >> 8 for value in values]


# ---- the centre crop


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.875])
@pytest.mark.parametrize(("width", "height"), [(500, 333), (120, 163), (64, 64), (1, 1)])
def test_the_centre_crop_is_torchvisions_and_timms(ratio: float, width: int, height: int) -> None:
    image = picture(0, width, height)
    found = CentreCrop((64, 64), ratio)(pixels(image))
    resize = v2.Resize(int(64 / ratio), interpolation=v2.InterpolationMode.BICUBIC)
    assert torch.equal(found, pixels(v2.Compose([resize, v2.CenterCrop(64)])(image)))
    timms = transforms_imagenet_eval(64, crop_pct=ratio, interpolation="bicubic", normalize=False)
    assert torch.equal(found, timms(image))


@pytest.mark.parametrize(("width", "height"), [(500, 333), (300, 500), (235, 235)])
def test_the_pixels_of_the_published_figures_are_torchvisions(width: int, height: int, tmp_path: Path) -> None:
    """Base: short side 256, centre crop 224. Large: exactly 235 x 235, which squashes, centre crop 224. Bicubic."""
    image = picture(0, width, height)
    content = encoded(image)
    write_tree(tmp_path, {"train/a/x.png": content, "val/a/x.png": content})
    bicubic = v2.InterpolationMode.BICUBIC
    sizes: dict[str, tuple[FinetuneConfig, int | list[int]]] = {
        "pixels: short side 256, centre crop 224": (vision.base_in1k_finetune(), 256),
        "pixels: squashed to 235 x 235, centre crop 224": (vision.large_in1k_finetune(), [235, 235]),
    }
    for told, (recipe, scaled) in sizes.items():
        assert recipe.data.held_out_as() == told
        for in_memory in (False, True):
            data = override(recipe, {"data.root": str(tmp_path), "data.in_memory": in_memory}).data
            expected = v2.Compose([v2.Resize(scaled, interpolation=bicubic), v2.CenterCrop(224)])(image)
            assert torch.equal(data.plain().dataset("test")[0]["image"], pixels(expected))


def test_the_pixels_are_told_for_any_shape() -> None:
    assert adapter().held_out_as() == "pixels: short side 8, centre crop 8"
    wide = adapter(size=(8, 16), crop_ratio=0.8)
    assert wide.held_out_as() == "pixels: scaled to cover 10 x 20, centre crop 8 x 16"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_random_crop_is_torchvisions_of_that_interpolation(interpolation: str, tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{split}/a/x.png": encoded(picture(0, 90, 70)) for split in ("train", "val")})
    crop = v2.RandomResizedCrop((24, 24), interpolation=v2.InterpolationMode(interpolation))
    images = open_folder(tmp_path, "train", size=(24, 24), augment="crop", interpolation=interpolation)
    torch.manual_seed(3)
    found = images[0]["image"]
    torch.manual_seed(3)
    assert torch.equal(found, crop(pixels(picture(0, 90, 70))))


def test_a_crop_ratio_reaches_every_way_of_reading(tmp_path: Path) -> None:
    """A white frame around a black centre: what the crop leaves out is white."""
    image = np.full((100, 100, 3), 255, dtype=np.uint8)
    image[10:-10, 10:-10] = 0
    content = encoded(Image.fromarray(image))
    write_tree(tmp_path, {"train/a/x.png": content, "val/a/x.png": content})
    settings: dict[str, Any] = {"size": (80, 80), "patch": (8, 8), "channels": 3, "mean": MEAN, "std": MEAN}
    for in_memory in (False, True):
        data = Images(source="folder", root=str(tmp_path), crop_ratio=0.8, in_memory=in_memory, **settings)
        assert data.dataset("test")[0]["image"].max() == 0
        assert data.model_copy(update={"crop_ratio": 1.0}).dataset("test")[0]["image"].max() == 255


# ---- RandAugment


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_randaugment_is_timms(size: tuple[int, int]) -> None:
    _, timms, _ = transforms_imagenet_train(
        size, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=MEAN, separate=True
    )
    ours = RandAugment(size, MEAN)
    image = smooth(5, size[1], size[0])
    changed = 0
    for seed in range(40):
        torch.manual_seed(seed)
        drawn = int(torch.randint(2**32, ()))
        random.seed(drawn)
        np.random.seed(drawn)
        expected = pixels(timms(image))
        torch.manual_seed(seed)
        assert torch.equal(ours(pixels(image)), expected)
        changed += not torch.equal(expected, pixels(image))
    assert changed > 20


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_takes_grey_and_coloured_images(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 12, 16), dtype=torch.uint8)
    augment = RandAugment((12, 16), (0.5,) * channels)
    for _ in range(60):  # each of the 15 operations, with near certainty
        found = augment(image)
        assert (found.shape, found.dtype) == (image.shape, torch.uint8)


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_random_number_comes_from_torchs_generator(in_memory: bool) -> None:
    data = adapter(augment="randaugment", erase=0.5, in_memory=in_memory).dataset("train")
    views = []
    for seed, noise in ((1, 7), (1, 8), (2, 7)):
        torch.manual_seed(seed)
        random.seed(noise)
        np.random.seed(noise)
        views.append(default_collate([data[row] for row in range(16)]))
    assert views[0].keys() == {"image", "label", "erase"}
    assert all(torch.equal(views[0][key], views[1][key]) for key in views[0])
    assert not torch.equal(views[0]["image"], views[2]["image"])
    assert not torch.equal(views[0]["erase"], views[2]["erase"])


def test_the_augmented_digits_keep_the_adapter_contract() -> None:
    check_modality(adapter(augment="randaugment", erase=1.0))


# ---- random erasing


def test_the_erased_rectangle_is_timms() -> None:
    timms, ours = RandomErasing(0.5, mode="pixel", device="cpu"), ErasedBox(0.5, (20, 30))
    untouched = 0
    for seed in range(40):
        torch.manual_seed(seed)
        drawn = int(torch.randint(2**32, ()))
        random.seed(drawn)
        expected = timms(torch.full((3, 20, 30), 100.0)) != 100
        torch.manual_seed(seed)
        box = ours()
        found = erase(torch.full((1, 3, 20, 30), 100.0), box[None])[0] != 100
        assert torch.equal(found, expected)
        untouched += not expected.any()
    assert 10 < untouched < 30


def test_erased_pixels_are_standard_normal_and_a_function_of_the_box() -> None:
    images = torch.zeros(64, 3, 32, 32)
    torch.manual_seed(0)
    boxes = torch.stack([ErasedBox(1.0, (32, 32))() for _ in range(64)])
    state = torch.get_rng_state()
    found = erase(images, boxes)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(erase(images, boxes), found)
    noise = found[found != 0]
    assert noise.mean().abs() < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert len(noise.unique()) > 5000, "samples have noise of their own"
    whole = torch.tensor([[0, 0, 32, 32, 0, 0], [0, 0, 32, 32, 0, 1], [0, 0, 0, 0, 5, 5], [30, 1, 2, 3, 31, 31]])
    full = erase(images[:4], whole)
    assert torch.equal(full[0, :, :, 1:], full[1, :, :, :-1]), "windows of one field"
    assert (full[0, 0] != full[0, 1]).all()
    assert (full[2] == 0).all()
    assert torch.equal((full[3] != 0).nonzero().amin(0), torch.tensor([0, 30, 1]))
    assert (full[3] != 0).sum() == 3 * 2 * 3


def test_erasing_is_for_training_alone_and_after_standardising() -> None:
    data = adapter(erase=1.0)
    assert data.plain() == adapter()
    assert "erase" not in data.dataset("test")[0]
    torch.manual_seed(0)
    batch = default_collate([data.dataset("train")[row] for row in range(200)])
    erased = data.tokenize(batch).values
    plain = data.tokenize({"image": batch["image"]}).values
    changed = erased[erased != plain]
    assert 0.02 < len(changed) / erased.numel() < 1 / 3
    assert changed.min() < -1.5, "below every pixel: black is (0 - 0.3) / 0.4 = -0.75"
    assert "erase" in adapter(erase=1.0, in_memory=True).dataset("train")[0]


def test_randaugment_and_erasing_leave_held_out_images_alone(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{split}/a/x.png": encoded(picture(0)) for split in ("train", "val")})
    images = open_folder(tmp_path, "test", augment="randaugment", erase=1.0)
    assert images[0].keys() == {"image", "label"}
    assert torch.equal(images[0]["image"], pixels(picture(0)))


def test_a_crop_is_taken_before_randaugment() -> None:
    """All the operations work at the final size, as timm has it."""
    images: Any = open_images("noise", "train", size=(8, 12), channels=3, augment="randaugment")
    assert [type(step).__name__ for step in images.transform.transforms] == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "RandAugment",
    ]
    assert to_pil_image(images[0]["image"]).size == (12, 8)


def test_posterize_to_no_bits_is_black() -> None:
    """timm's magnitude noise asks for it now and then, and Pillow 13 refuses."""
    transform = RandAugment((8, 8), (0.5, 0.5, 0.5)).transform
    op = next(op for op in transform.ops if op.name.startswith("Posterize"))
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    assert op.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert op.aug_fn(image, 1).getextrema() == ((128, 128), (0, 0), (0, 0))
