import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from einops import rearrange
from PIL import Image
from pydantic import ValidationError
from torch import nn
from torch.utils.data import default_collate
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from modalities.data.images import AugmentedImages, DecodedImages, MemoryImages, open_images
from modalities.image import Images, patchify
from nepa_core.basics import UnreadableSample, UserError
from tests.pictures import encoded, open_folder, picture, pixels, write_parquet, write_tree


def adapter(**changes: Any) -> Images:
    settings: dict[str, Any] = {
        "source": "noise",
        "size": (8, 12),
        "patch": (4, 3),
        "channels": 3,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    return Images(**(settings | changes))


# ---- tokens


def test_patches_through_a_linear_map_are_the_strided_convolution() -> None:
    data = adapter()
    batch = {"image": torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8)}
    conv = nn.Conv2d(3, 16, kernel_size=data.patch, stride=data.patch)
    linear = data.embedder(16)
    assert isinstance(linear, nn.Linear)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    normalised = v2.functional.normalize(batch["image"] / 255, list(data.mean), list(data.std))
    expected = rearrange(conv(normalised), "b d h w -> b (h w) d")
    torch.testing.assert_close(linear(data.tokenize(batch).values), expected)
    torch.testing.assert_close(linear(patchify(normalised, data.patch)), expected)


def test_tokenize_takes_pixels_of_0_to_255_as_stored_or_mixed() -> None:
    pixels = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    stored, mixed = (adapter().tokenize({"image": each}).values for each in (pixels, pixels.float()))
    assert torch.equal(stored, mixed)
    with pytest.raises(TypeError, match="uint8"):
        adapter().tokenize({"image": pixels.double()})


def test_coordinates_are_patch_centres_between_minus_one_and_one() -> None:
    data = adapter()
    tokens = data.tokenize(default_collate([data.dataset("train")[0]]))
    y, x = torch.tensor([-0.5, 0.5]), torch.tensor([-0.75, -0.25, 0.25, 0.75])
    torch.testing.assert_close(tokens.coords, torch.stack([y.repeat_interleave(4), x.repeat(2)], dim=1))
    assert tokens.mask is None


def test_what_tokens_share_is_made_once_and_serves_training_after_inference() -> None:
    data = adapter(size=(20, 21), patch=(5, 7))
    batch = {"image": torch.zeros(1, 3, 20, 21, dtype=torch.uint8)}
    with torch.inference_mode():
        first = data.tokenize(batch)
    tokens = data.tokenize(batch)
    assert tokens.coords is first.coords
    weight = torch.ones(2, requires_grad=True)
    (tokens.coords @ weight).sum().backward()
    assert weight.grad is not None


def test_the_patch_order_is_that_of_the_grid() -> None:
    batch = {"image": torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)}
    assert adapter().read(batch).order is None
    data = adapter(patch_order="random", order_seed=3)
    tokens = data.read(batch)
    assert tokens.order is not None
    assert data.grid == (2, 4)
    assert torch.equal(tokens.order.sort().values, torch.arange(8))
    assert not torch.equal(tokens.order, adapter(patch_order="random", order_seed=4).read(batch).order)
    assert torch.equal(tokens.values, data.tokenize(batch).values[:, tokens.order])


def test_token_size_needs_no_data() -> None:
    assert adapter(source="folder", root="/nowhere").token_dim() == 3 * 4 * 3


def test_plain_leaves_augmentation_out() -> None:
    data = adapter(augment="crop")
    assert data.plain() == adapter()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"size": (512, 512), "patch": (14, 14)},
            [r"data.patch=\(14, 14\)", r"data.size=\(512, 512\)", r"\(504, 504\) and \(518, 518\)"],
        ),
        ({"size": (3, 12)}, ["data.patch", r"divides: \(4, 12\)"]),
        ({"source": "folder"}, ["data.root=DIR"]),
        ({"channels": 1}, ["data.mean has 3 numbers for data.channels=1"]),
        ({"std": (0.1,)}, ["data.std has 1 number for data.channels=3"]),
        ({"std": (0.1, 0.0, 0.1)}, ["std.1", "greater than 0"]),
        ({"patch": (0, 1)}, ["patch.0", "greater than 0"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        adapter(**changes)
    for word in words:
        assert caught.match(word)


# ---- sources without files


def test_digits_keep_the_last_500_held_out() -> None:
    train = open_images("digits", "train", size=(8, 8), channels=1, in_memory=True)
    test = open_images("digits", "test", size=(8, 8), channels=1)
    assert isinstance(train, MemoryImages)
    assert isinstance(test, DecodedImages)
    assert (len(train), len(test)) == (1297, 500)
    assert train.images.shape == (1297, 1, 8, 8)
    assert train.images.max() == 255
    assert len(train.images.unique()) == 17
    assert train.labels[:4].tolist() == [0, 1, 2, 3]
    sample = test[0]
    assert (sample["image"].dtype, sample["label"].dtype, sample["label"].ndim) == (torch.uint8, torch.int64, 0)
    big = open_images("digits", "train", size=(16, 16), channels=3)[0]["image"]
    assert big.shape == (3, 16, 16)
    assert torch.equal(big[0], big[2])


def test_noise_is_the_same_every_time_and_differs_between_samples_and_splits() -> None:
    train, again = (open_images("noise", "train", size=(6, 10), channels=3) for _ in range(2))
    test: Any = open_images("noise", "test", size=(6, 10), channels=3)
    assert len(test) == 4096
    assert torch.equal(train[7]["image"], again[7]["image"])
    assert train[7]["image"].shape == (3, 6, 10)
    assert not torch.equal(train[7]["image"], train[8]["image"])
    assert not torch.equal(train[7]["image"], test[7]["image"])
    assert not torch.equal(train[7]["image"][0], train[7]["image"][1])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'valid'"):
        open_images("noise", "valid", size=(4, 4), channels=1)


# ---- class folders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_tree(
        tmp_path,
        {
            "train/cat/b.png": encoded(picture(1)),
            "train/cat/a.png": encoded(picture(0)),
            "train/cat/deeper/c.PNG": encoded(picture(2)),
            "train/cat/notes.txt": b"not an image",
            "train/cat/._a.png": b"a resource fork",
            "train/ant/d.png": encoded(picture(3)),
            "train/.cache/e.png": b"",
            "val/ant/f.png": encoded(picture(4)),
            "val/cat/g.png": encoded(picture(5)),
            "test/h.png": encoded(picture(6)),
        },
    )
    return tmp_path


@pytest.mark.parametrize("in_memory", [False, True])
def test_class_folders_are_labelled_in_alphabetical_order(tree: Path, in_memory: bool) -> None:
    train = open_folder(tree, in_memory=in_memory)
    assert [train[i]["label"].item() for i in range(len(train))] == [0, 1, 1, 1]
    for sample, seed in zip((train[i] for i in range(4)), (3, 0, 1, 2), strict=True):
        assert torch.equal(sample["image"], pixels(picture(seed)))
    held_out = open_folder(tree, "test", in_memory=in_memory)
    assert len(held_out) == 2
    assert torch.equal(held_out[1]["image"], pixels(picture(5)))


def test_class_folders_that_differ_are_listed(tree: Path) -> None:
    (tree / "train/bee").mkdir()
    (tree / "val/dog").mkdir()
    with pytest.raises(UserError, match=r"data.root=.*same class folders.*: train/bee, val/dog$"):
        open_folder(tree)


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/a/x.txt": b"", "val/a/x.txt": b""})
    with pytest.raises(UserError, match=r"no image file in .*train/<class>/"):
        open_folder(tmp_path)


@pytest.mark.parametrize("missing", ["val", "train"])
def test_a_folder_of_no_known_layout_is_refused_with_what_was_looked_for(tmp_path: Path, missing: str) -> None:
    write_tree(tmp_path, {f"{name}/a/b.png": b"" for name in {"train", "val"} - {missing}})
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"data.root=.*train/<class>.*train-\*.parquet.*cifar-10-batches-py"):
            open_folder(tmp_path, split)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"data.root={tmp_path}/nowhere: there is no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.root=DIR"):
        open_images("folder", "train", size=(8, 8), channels=3)


# ---- parquet


def test_parquet_shards_are_read_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00001-of-2.parquet", [encoded(picture(2)), b"junk"], [7, 5], "img")
    write_parquet(tmp_path / "data/train-00000-of-2.parquet", [encoded(picture(i)) for i in (0, 1)], [9, 8], "img")
    write_parquet(tmp_path / "data/test-00000-of-1.parquet", [encoded(picture(8))], [-1])
    write_parquet(tmp_path / "data/validation-00000-of-1.parquet", [encoded(picture(3)), None], [6, 6])
    train = open_folder(tmp_path)
    assert train.labels.tolist() == [9, 8, 7, 5]
    for index in range(3):
        assert torch.equal(train[index]["image"], pixels(picture(index)))
    with pytest.raises(UnreadableSample, match=r"train-00001-of-2.parquet:1: not an image"):
        train[3]
    held_out = open_folder(tmp_path, "test")
    assert torch.equal(held_out[0]["image"], pixels(picture(3)))
    with pytest.raises(UnreadableSample, match=r"validation-00000-of-1\.parquet:1: the row holds no image"):
        held_out[1]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train-0.parquet": b"PAR1 and then nothing", "test-0.parquet": b""})
    with pytest.raises(UserError, match=r"train-0.parquet: not a readable parquet file \([^\n]*\); copy it again$"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"picture": [b""], "label": [1]},
        {"image": [b""], "label": [1]},
        {"image": [{"bytes": b""}], "target": [1]},
        {"image": [{"bytes": b""}], "label": ["cat"]},
    ],
)
def test_parquet_files_with_other_columns_are_refused(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match=rf"train-0.parquet: needs a column image.*it has {next(iter(columns))}: "):
        open_folder(tmp_path)


# ---- torchvision's CIFAR-10


def test_torchvisions_cifar10_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    contents = {
        "train_list": ("data_batch_1", {"data": stored, "labels": [3, 1]}),
        "test_list": ("test_batch", {"data": stored[:1], "labels": [2]}),
        "meta": ("batches.meta", {"label_names": list("abcd")}),
    }
    for attribute, (name, content) in contents.items():
        raw = pickle.dumps(content)
        write_tree(tmp_path / "cifar-10-batches-py", {name: raw})
        md5 = hashlib.md5(raw).hexdigest()
        entry = {"filename": name, "key": "label_names", "md5": md5} if attribute == "meta" else [[name, md5]]
        monkeypatch.setattr(CIFAR10, attribute, entry)
    sizes = {"size": (32, 32)}
    train, test = open_folder(tmp_path, **sizes), open_folder(tmp_path, "test", **sizes)
    assert (train.labels.tolist(), test.labels.tolist()) == ([3, 1], [2])
    assert train.source.classes == tuple("abcd")
    assert torch.equal(train[1]["image"], torch.from_numpy(stored[1]).view(3, 32, 32))


def test_a_damaged_cifar10_is_refused_without_unpickling_it(tmp_path: Path) -> None:
    write_tree(tmp_path, {"cifar-10-batches-py/data_batch_1": b"cos\nsystem\n(S'false'\ntR."})
    with pytest.raises(UserError, match=r"data.root=.*incomplete or damaged"):
        open_folder(tmp_path)


# ---- decoding


def two_splits(root: Path, name: str, content: bytes) -> Path:
    write_tree(root, {f"{split}/a/{name}": content for split in ("train", "val")})
    return root


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (9, 7), 200),
        Image.new("1", (9, 7), 1),
        Image.new("LA", (9, 7), (200, 9)),
        Image.new("RGBA", (9, 7), (200, 200, 200, 9)),
        Image.new("RGB", (9, 7), (200, 200, 200)).quantize(4),
        Image.new("RGB", (1, 1), (200, 200, 200)),
        Image.new("RGB", (300, 1), (200, 200, 200)),
        Image.new("CMYK", (9, 7), (0, 0, 0, 55)),
    ],
    ids=lambda image: f"{image.mode}-{image.width}x{image.height}",
)
def test_images_of_every_kind_are_brought_to_size_and_channels(
    tmp_path: Path, image: Image.Image, channels: int
) -> None:
    kind = "jpeg" if image.mode == "CMYK" else "png"
    two_splits(tmp_path, f"x.{kind}", encoded(image, kind))
    for augment in ("none", "crop_flip"):
        found = open_folder(tmp_path, size=(6, 10), channels=channels, augment=augment)[0]["image"]
        assert found.shape == (channels, 6, 10)
        assert found.dtype == torch.uint8
        assert (found.int() - (255 if image.mode == "1" else 200)).abs().max() <= 1


def test_a_transparent_palette_is_read_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = picture(0).quantize(8)
    two_splits(tmp_path, "x.png", encoded(image, transparency=bytes(range(0, 240, 30))))
    assert torch.equal(open_folder(tmp_path)[0]["image"], pixels(image))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("error", "words"), [(ValueError("two\nlines"), "row 0: two lines"), (EOFError(), "row 0: EOFError")]
)
def test_the_cause_is_told_in_one_line(error: Exception, words: str) -> None:
    class Damaged:
        labels = torch.zeros(1, dtype=torch.int64)

        def read(self, row: int) -> Image.Image:
            raise error

        def name(self, row: int) -> str:
            return f"row {row}"

    with pytest.raises(UnreadableSample, match=f"^{words}$"):
        DecodedImages(Damaged(), torch.arange(1), (8, 8), 3)[0]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("cut.jpg", encoded(picture(0, 64, 64), "jpeg")[:-700], "truncated"),
        ("cut.png", encoded(picture(0, 64, 64))[:2000], "truncated"),
        ("empty.png", b"", "not an image"),
        ("words.png", b"<html>404</html>", "not an image"),
        ("deep.png", encoded(Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))), "more than 8 bits"),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_unreadable_images_are_named_with_the_cause(
    tmp_path: Path, name: str, content: bytes, cause: str, in_memory: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    two_splits(tmp_path, name, content)
    write_tree(tmp_path, {"train/a/0.png": encoded(picture(0))})
    images = open_folder(tmp_path, in_memory=in_memory)
    assert torch.equal(images[0]["image"], pixels(picture(0)))
    words = rf"^{tmp_path}/train/a/{name}: [^\n]*{cause}[^\n]*$"
    with pytest.raises(UnreadableSample, match=words):
        images[1]
    if in_memory:
        assert len(images.__getitems__([0])["image"]) == 1
        with pytest.raises(UnreadableSample, match=words):
            images.__getitems__([0, 1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("width", "height"), [(17, 31), (31, 17), (100, 75), (75, 100), (333, 500), (9, 8), (8, 8)])
def test_fitting_is_torchvisions_resize_and_centre_crop(tmp_path: Path, width: int, height: int) -> None:
    image = picture(0, width, height)
    two_splits(tmp_path, "x.png", encoded(image))
    crop = v2.Compose([v2.Resize(8, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(8)])
    assert torch.equal(open_folder(tmp_path)[0]["image"], pixels(crop(image)))


def test_a_rectangle_is_covered_without_distortion(tmp_path: Path) -> None:
    """A wide image in a tall frame: the middle fifth remains, at full height."""
    image = np.zeros((20, 50, 3), dtype=np.uint8)
    image[:, 20:30] = 255
    two_splits(tmp_path, "x.png", encoded(Image.fromarray(image)))
    found = open_folder(tmp_path, size=(40, 20))[0]["image"]
    assert found.shape == (3, 40, 20)
    assert found[:, :, 2:-2].min() == 255


# ---- memory, augmentation, subsets


def test_images_in_memory_are_those_decoded_on_access() -> None:
    state = torch.get_rng_state()
    settings: dict[str, Any] = {"size": (4, 4), "channels": 1}
    memory: Any = open_images("noise", "train", in_memory=True, **settings)  # enough for several processes
    lazy: Any = open_images("noise", "train", **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(memory) == len(lazy)
    chosen = [4095, 0, 2048, 255, 256, 0]
    whole, single = memory.__getitems__(chosen), default_collate([lazy[index] for index in chosen])
    assert whole.keys() == single.keys()
    assert torch.equal(whole["image"], single["image"])
    assert torch.equal(whole["label"], single["label"])
    assert torch.equal(memory[300]["image"], lazy[300]["image"])


def test_a_split_is_decoded_once() -> None:
    settings: dict[str, Any] = {"size": (8, 8), "channels": 1, "in_memory": True}
    plain = open_images("digits", "train", **settings)
    augmented = open_images("digits", "train", augment="crop", **settings)
    assert open_images("digits", "train", **settings) is plain
    assert isinstance(augmented, AugmentedImages)
    assert augmented.images is plain


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmentation_is_drawn_from_torchs_generator_for_training_alone(augment: str, in_memory: bool) -> None:
    settings: dict[str, Any] = {"size": (8, 8), "channels": 1, "in_memory": in_memory}
    train: Any = open_images("digits", "train", augment=augment, **settings)
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(train[0])
    assert torch.equal(views[0]["image"], views[1]["image"])
    assert not torch.equal(views[0]["image"], views[2]["image"])
    assert views[0]["image"].shape == (1, 8, 8)
    assert not hasattr(train, "__getitems__")
    held_out = open_images("digits", "test", augment=augment, **settings)
    assert torch.equal(held_out[0]["image"], open_images("digits", "test", **settings)[0]["image"])


@pytest.mark.parametrize(("augment", "directions"), [("crop", {True}), ("crop_flip", {True, False})])
def test_only_crop_flip_flips(tmp_path: Path, augment: str, directions: set[bool]) -> None:
    rising = Image.linear_gradient("L").rotate(90)
    images = open_folder(two_splits(tmp_path, "x.png", encoded(rising)), augment=augment)
    torch.manual_seed(0)
    views = [images[0]["image"].float() for _ in range(20)]
    assert {bool(view[..., 0].mean() < view[..., -1].mean()) for view in views} == directions


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_limit_takes_the_same_mixed_choice_of_training_images(tmp_path: Path, in_memory: bool) -> None:
    labels = [0] * 50 + [1] * 50
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", [encoded(picture(i)) for i in range(100)], labels)
    limited = open_folder(tmp_path, limit=20, in_memory=in_memory)
    assert len(limited) == 20
    assert set(limited.labels.tolist()) == {0, 1}
    smaller = open_folder(tmp_path, limit=10, in_memory=in_memory)
    assert all(torch.equal(limited[i]["image"], smaller[i]["image"]) for i in range(10))
    assert len(open_folder(tmp_path, limit=1000, in_memory=in_memory)) == 100
    assert len(open_folder(tmp_path, "test", limit=20, in_memory=in_memory)) == 100


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch_order", ["raster", "random", "random_per_sample"])
def test_pictures_come_back_from_their_tokens_bit_for_bit(channels: Any, patch_order: str) -> None:
    """Every one of the 256 levels."""
    data = adapter(channels=channels, mean=(0.41,) * channels, std=(0.27,) * channels, patch_order=patch_order)
    image = torch.randint(0, 256, (20, channels, 8, 12), dtype=torch.uint8)
    kind, pixels, rate = data.decode(data.read({"image": image}))
    assert (kind, rate, pixels.dtype) == ("picture", None, torch.uint8)
    assert torch.equal(pixels, image)


def test_generated_pixels_are_clipped_and_rounded() -> None:
    data = adapter(channels=1, mean=(0.5,), std=(0.5,))
    tokens = data.tokenize({"image": torch.full((1, 1, 8, 12), 100, dtype=torch.uint8)})
    values = tokens.values.clone()
    values[0, 0, :4] = torch.tensor([-9.0, 9.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1])
    assert data.decode(replace(tokens, values=values)).data[0, 0].flatten()[[0, 1, 2, 12]].tolist() == [
        0,
        255,
        100,
        101,
    ]
