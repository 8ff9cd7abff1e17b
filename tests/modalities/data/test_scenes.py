"""Scenes: layouts on disk, labels, augmentation, tokens of any grid, and the errors a folder can cause."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import default_collate

from modalities.data import scenes as scene_data
from modalities.data.scenes import IGNORED, Augmentation, augmented, distorted, fitted_size, open_pairs, scaled
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.contract import check_modality
from tests.tiny_scenes import scene, scenes, write_scenes


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("ade"))


def encoded(array: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def stored(root: Path, **changes: Any) -> Any:
    return scenes(root, **changes).whole("train")


def replace_annotation(tree: Path, root: Path, image: Image.Image) -> str:
    """A copy of the tree in which the second annotation is another; returns the name of its image."""
    shutil.copytree(tree, root)
    image.save(root / "annotations/training/ADE_0001.png")
    return str(root / "images/training/ADE_0001.jpg")


# ---- samples


@pytest.mark.parametrize(("order", "lowest"), [("raster", 1.0), ("hilbert", 0.5), ("random_per_sample", 0.5)])
def test_the_adapter_keeps_the_contract(tree: Path, order: str, lowest: float) -> None:
    """At a scale below 1 crops are padded and tokens masked."""
    check_modality(scenes(tree, patch_order=order, scales=(lowest, 2.0)))


def test_stored_labels_become_classes_and_the_rest_is_ignored(tree: Path) -> None:
    data = stored(tree)
    assert len(data) == 8
    for index in range(4):
        image, labels = scene(index, data[index]["target"].shape)
        assert torch.equal(data[index]["target"], torch.from_numpy(np.where(labels == 0, IGNORED, labels - 1)))
        assert (data[index]["image"] - torch.from_numpy(image).permute(2, 0, 1).float()).abs().mean() < 16  # of JPEG
        assert data[index]["image"].dtype == data[index]["target"].dtype == torch.uint8


def test_classes_that_begin_at_zero_under_a_high_void(tmp_path: Path) -> None:
    """CamVid's numbering and split names; a palette image means its indices, and 255 is always ignored."""
    root = write_scenes(tmp_path, splits=("train", "val"))
    labels = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)
    indexed = Image.fromarray(labels, mode="P")
    indexed.putpalette([7] * 768)
    indexed.save(root / "annotations/train/ADE_0000.png")
    Image.new("L", (3, 2)).save(root / "images/train/ADE_0000.jpg")
    sample = stored(root, first_label=0, ignored_labels=(3,))[0]
    assert sample["target"].tolist() == [[0, 1, 2], [IGNORED, IGNORED, 0]]
    assert sample["image"].shape == (3, 2, 3)


def test_the_parent_of_the_unpacked_zip_and_class_names_beside_the_images(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "ADEChallengeData2016")
    assert len(stored(tmp_path)) == 8
    assert scenes(tmp_path).class_names() == ("class 0", "class 1", "class 2")
    head = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    rows = [f"{k}\t0.1\t1\t1\t1\t{name}" for k, name in enumerate(("wall", "building, edifice", "sky"), 1)]
    (root / "objectInfo150.txt").write_text(head + "\n".join(rows) + "\n")
    scene_root = tmp_path.rename(tmp_path.with_name("renamed"))  # what was read of a folder is kept by its name
    assert scenes(scene_root).class_names() == ("wall", "building, edifice", "sky")
    assert scenes(scene_root, class_count=4).class_names()[0] == "class 0"
    assert scenes(scene_root, names=("a", "b", "c")).class_names() == ("a", "b", "c")


def test_folder_parquet_datasets_and_hub_give_the_same_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_scenes(tmp_path / "tree")
    for file in tree.rglob("*.jpg"):  # lossless, so that the rows below can hold the same pixels
        Image.open(file).save(file.with_suffix(".png"))
        file.unlink()
    arrays = [(sample["image"], sample["target"]) for sample in stored(tree)]
    rows = [
        {"image": encoded(image.permute(1, 2, 0).numpy()), "annotation": encoded((target + 1).numpy())}
        for image, target in arrays  # 255 + 1 is 0 again
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    tables = [
        pa.table({name: pa.array([row[name] for row in part], kind) for name in rows[0]} | {"id": list(range(size))})
        for part, size in ((rows[:3], 3), (rows[3:], 5))
    ]
    (tmp_path / "parquet/data").mkdir(parents=True)
    for k, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"parquet/data/train-{k:05}-of-00002.parquet")
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    saved = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": saved, "validation": saved}).save_to_disk(str(tmp_path / "saved"))
    for root in (tmp_path / "parquet", tmp_path / "saved"):
        data = stored(root)
        assert len(data) == len(arrays)
        for index, (image, target) in enumerate(arrays):
            assert torch.equal(data[index]["image"], image)
            assert torch.equal(data[index]["target"], target)
    hub = datasets.DatasetDict({"train": saved, "validation": saved.select(range(2)), "test": saved.select(range(1))})
    monkeypatch.setattr(scene_data, "load_hub", {"owner/scenes": hub, "owner/bare": {"train": saved}}.__getitem__)
    for split, count in (("train", len(arrays)), ("test", 2)):
        data = scenes("owner/scenes", source="hub").whole(split)
        assert len(data) == count
        assert all(torch.equal(data[index]["target"], arrays[index][1]) for index in range(count))
    assert open_pairs("owner/scenes", "test", "hub").name(1) == "owner/scenes/validation:1"
    with pytest.raises(UserError, match=r"owner/bare: needs a split val or validation or test; it has train$"):
        open_pairs("owner/bare", "test", "hub")
    assert open_pairs(str(tmp_path / "parquet"), "train").name(4).endswith("train-00001-of-00002.parquet:1")


# ---- crops


def test_crops_have_one_size_and_only_training_is_random(tree: Path) -> None:
    data = scenes(tree)
    for split, settings in (("train", data), ("test", data), ("train", data.plain())):
        batch = default_collate([settings.dataset(split)[k] for k in range(4)])
        assert batch["image"].shape == (4, 3, 16, 24)
        assert batch["target"].shape == (4, 16, 24)
    first, second = (data.dataset("train")[0]["image"] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = data.dataset("train")[0]
    torch.manual_seed(3)
    assert all(torch.equal(value, again[key]) for key, value in data.dataset("train")[0].items())
    assert all(
        torch.equal(value, data.plain().dataset("train")[0][key])
        for key, value in data.plain().dataset("train")[0].items()
    )


def test_image_and_target_go_through_the_same_geometry(tree: Path) -> None:
    """Red, green and blue are the classes: without colour changes the strongest channel must tell the class."""
    data = scenes(tree, distort=False, scales=(1.0, 2.0), crop=(24, 24))
    strongest = torch.tensor([2, 0, 1])  # the channel of each class, see `COLOURS`
    agree = total = 0
    for index in range(8):
        sample = data.dataset("train")[index]
        labelled = sample["target"] != IGNORED
        brightest = sample["image"].float().argmax(0)[labelled]
        agree += int((brightest == strongest[sample["target"][labelled].long()]).sum())
        total += int(labelled.sum())
    assert agree / total > 0.93


def test_the_scale_is_of_the_shorter_side_and_uniform() -> None:
    assert fitted_size((300, 600), 150) == (150, 300)
    assert fitted_size((600, 300), 150, 0.5) == (150, 75)
    image, target = scaled(torch.zeros(3, 9, 6, dtype=torch.uint8), torch.zeros(9, 6, dtype=torch.uint8), 12)
    assert image.shape == (3, 18, 12)
    assert target.shape == (18, 12)


def test_scales_cover_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = scene_data.scaled
    monkeypatch.setattr(
        scene_data,
        "scaled",
        lambda image, target, side, scale: seen.append(scale) or real(image, target, side, scale),
    )
    image, target = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    for _ in range(200):
        augmented(image, target, (4, 4), 8, Augmentation((0.5, 2.0), distort=False))
    assert min(seen) == pytest.approx(0.5, abs=0.05)
    assert max(seen) == pytest.approx(2.0, abs=0.05)
    assert sum(seen) / 200 == pytest.approx(1.25, abs=0.1)


def test_crops_that_one_class_fills_are_drawn_again() -> None:
    """The left three quarters are one class: a blind crop of a quarter would hold nothing else about half the time."""
    target = torch.zeros(32, 64, dtype=torch.uint8)
    target[:, 48:] = 1
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    settings = Augmentation((1.0, 1.0), distort=False)
    crops = [augmented(image, target, (32, 16), 32, settings)[1] for _ in range(60)]
    dominated = sum(int(torch.bincount(crop.flatten().long(), minlength=2).max()) >= 0.75 * 512 for crop in crops)
    assert dominated / 60 < 0.25


def test_ignored_pixels_do_not_count_as_a_class_of_a_crop() -> None:
    target = torch.full((8, 8), IGNORED, dtype=torch.uint8)
    target[0, 0], target[0, 1] = 0, 1
    assert scene_data._varied_place(target, (8, 8)) == (0, 0)  # taken at once: each class has half of what counts
    target[0, 1] = IGNORED
    assert scene_data._varied_place(target, (8, 8)) == (0, 0)  # and this after ten trials, not never


def test_padding_is_black_ignored_and_masked(tree: Path) -> None:
    data = scenes(tree, scales=(0.5, 0.5), distort=False)
    batch = default_collate([data.dataset("train")[k] for k in range(4)])
    tokens = data.read(batch)
    assert tokens.mask is not None
    for k, (rows, columns) in enumerate(batch["real"].tolist()):
        assert min(rows, columns) == 12
        assert (batch["target"][k, rows:] == IGNORED).all()
        assert (batch["target"][k, :, columns:] == IGNORED).all()
        assert (batch["image"][k, :, rows:] == 0).all()
        grid = tokens.mask[k].view(4, 6)
        assert torch.equal(grid, (torch.arange(4) < -(-rows // 4))[:, None] & (torch.arange(6) < -(-columns // 4)))
    assert "real" not in scenes(tree, scales=(1.0, 2.0)).dataset("train")[0]
    assert scenes(tree, scales=(1.0, 2.0)).read(default_collate([scenes(tree).plain().dataset("test")[0]])).mask is None


def test_photometric_distortion_changes_colours_in_range_and_half_of_the_time_each() -> None:
    image = torch.randint(60, 200, (3, 6, 6), dtype=torch.uint8)
    changed = [distorted(image) for _ in range(200)]
    assert all(each.dtype == torch.uint8 and each.shape == image.shape for each in changed)
    unchanged = sum(torch.equal(each, image) for each in changed)
    assert 2 <= unchanged <= 30  # 1/16 of 200 is 12.5
    means = torch.stack([each.float().mean() for each in changed])
    assert means.min() < 0.7 * image.float().mean()
    assert means.max() > 1.2 * image.float().mean()


# ---- tokens


def test_the_grid_follows_the_image_and_the_order_the_grid(tree: Path) -> None:
    data = scenes(tree, patch_order="hilbert")
    image = torch.randint(0, 256, (2, 3, 12, 28), dtype=torch.uint8)
    tokens = data.read({"image": image})
    assert tokens.values.shape == (2, 21, 48)
    assert tokens.order is not None
    assert torch.equal(tokens.order.sort().values, torch.arange(21))
    rows, columns = tokens.order // 7, tokens.order % 7
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all(), "neighbours in the order share an edge of this grid"
    assert torch.equal(tokens.canonical(tokens.values), data.tokenize({"image": image}).values)
    with pytest.raises(ValueError, match="does not divide"):
        data.tokenize({"image": image[:, :, :11]})
    with pytest.raises(TypeError, match="uint8"):
        data.tokenize({"image": image.float()})


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_scenes_are_drawn_as_they_are_in_any_order(tree: Path, order: str) -> None:
    data = scenes(tree, patch_order=order)
    image = torch.randint(0, 256, (2, 3, 12, 28), dtype=torch.uint8)
    sketch = data.describe(data.read({"image": image}))
    assert sketch.grid == (3, 7)
    torch.testing.assert_close(sketch.canvas, image.permute(0, 2, 3, 1) / 255)
    assert torch.equal(data.decode(data.read({"image": image})).data, image)


def test_coordinates_span_the_same_range_more_densely_in_a_larger_image(tree: Path) -> None:
    data = scenes(tree)

    def coords(height: int, width: int) -> Tensor:
        return data.tokenize({"image": torch.zeros(1, 3, height, width, dtype=torch.uint8)}).coords

    assert coords(8, 8).unique().tolist() == [-0.5, 0.5]
    assert coords(16, 8)[:, 0].unique().tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert coords(16, 8)[:, 1].unique().tolist() == [-0.5, 0.5]


# ---- what a user gets wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (16, 22)}, "does not divide"),
        ({"scales": (2.0, 0.5)}, "lower end"),
        ({"names": ("a",)}, "1 names for data.class_count=3"),
        ({"first_label": 253}, "stored as 255"),
        ({"ignored_labels": (2,)}, "2 is a class"),
        ({"class_count": 256}, "less than or equal to 255"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        scenes("x", **changes)


def annotation_of(image: Path) -> Path:
    return Path(str(image).replace("images", "annotations")).with_suffix(".png")


def test_a_label_outside_the_classes_names_file_and_label(tree: Path, tmp_path: Path) -> None:
    labels = np.full((30, 26), 1, dtype=np.uint8)
    labels[3, 4] = 9
    name = replace_annotation(tree, tmp_path / "copy", Image.fromarray(labels))
    with pytest.raises(
        UserError, match=rf"^{annotation_of(name)}: label 9 is outside the 3 classes, stored as 1 to 3"
    ) as caught:
        stored(tmp_path / "copy")[1]
    assert "\n" not in str(caught.value)
    assert stored(tmp_path / "copy")[0]["target"].shape == (24, 32)
    replace_annotation(tree, tmp_path / "deep", Image.fromarray(labels.astype(np.uint16) * 300))
    with pytest.raises(UserError, match="label 300 is outside"):
        stored(tmp_path / "deep")[1]


def test_an_annotation_of_another_size_or_in_colour_is_named(tree: Path, tmp_path: Path) -> None:
    name = replace_annotation(tree, tmp_path / "size", Image.new("L", (25, 30), 1))
    with pytest.raises(
        UserError, match=rf"^{name}: the image has 26 x 30 pixels, its annotation {annotation_of(name)} 25 x 30"
    ):
        stored(tmp_path / "size")[1]
    name = replace_annotation(tree, tmp_path / "colour", Image.new("RGB", (26, 30)))
    with pytest.raises(UserError, match=rf"^{annotation_of(name)}: the annotation is in mode RGB"):
        stored(tmp_path / "colour")[1]


def test_a_damaged_file_is_one_unreadable_sample(tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "copy")
    whole = (root / "images/training/ADE_0002.jpg").read_bytes()
    (root / "images/training/ADE_0002.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "annotations/training/ADE_0003.png").write_bytes(b"not a picture")
    for index in (2, 3):
        with pytest.raises(UnreadableSample, match=f"ADE_000{index}.jpg"):
            stored(root)[index]


def test_an_image_without_annotation_is_named(tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "copy")
    (root / "annotations/training/ADE_0005.png").unlink()
    with pytest.raises(UserError, match=r"training/ADE_0005.jpg: no annotation .*ADE_0005.png .*1 of 8"):
        stored(root)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "looked for images/ with annotations/"),
        (lambda root: [(root / k / "images").mkdir(parents=True) for k in "ab"], "looked for images/"),
        (lambda root: [(root / k).mkdir(parents=True) for k in ("images", "annotations")], "no folder train or"),
        (lambda root: [(root / k / "train").mkdir(parents=True) for k in ("images", "annotations")], "no image file"),
    ],
)
def test_a_wrong_layout_gets_one_line(tmp_path: Path, build: Any, message: str) -> None:
    build(tmp_path / "root")
    with pytest.raises(UserError, match=message) as caught:
        stored(tmp_path / "root")
    assert "\n" not in str(caught.value)


def test_parquet_without_the_columns_lists_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"columns image and annotation .* it has image: binary"):
        stored(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match="not a readable parquet file"):
        stored(tmp_path / ".." / tmp_path.name)


def test_a_patch_has_the_class_of_most_of_its_labelled_pixels() -> None:
    target = torch.full((2, 4, 8), 255, dtype=torch.uint8)
    target[0, 0, :3], target[0, 1, 0] = torch.tensor([2, 2, 1], dtype=torch.uint8), 1  # two and two: the first
    target[0, 0, 4] = 2  # one labelled pixel against fifteen
    target[1, :, :4] = 0
    data = scenes("nowhere", crop=(4, 8))
    assert data.patch_classes(target).tolist() == [[1, 2], [0, -1]]


def test_own_files_are_brought_to_the_crop_as_held_out_scenes_are(tmp_path: Path) -> None:
    data = scenes(write_scenes(tmp_path))
    file = tmp_path / "images/validation/ADE_0001.jpg"
    stored, own = data.dataset("test"), data.files([str(file)])
    assert torch.equal(own[0]["image"], stored[1]["image"])
    assert (own[0]["target"] == 255).all()
    assert torch.equal(data.whole_files([str(file)])[0]["image"], data.whole("test")[1]["image"])
