"""nepa resize: smaller images in shards, complete and the same however often it was interrupted."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.data import image_arrays
from modalities.data.image_sources import open_source
from nepa_core.basics import UnreadableSample, UserError
from recipes.cli import main
from recipes.training import resizing as resize
from tests.conftest import largest_file
from tests.pictures import encoded, open_folder, picture, write_tree

SMALL = encoded(picture(9, 30, 20), "jpeg")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    gradient = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    files = {f"train/ant/{row}.jpg": encoded(gradient.rotate(row), "jpeg") for row in range(4)}
    files |= {"train/bee/0.png": encoded(gradient), "train/bee/1.jpg": SMALL, "train/bee/2.jpg": b"\xff\xd8\xff torn"}
    files |= {"val/ant/0.jpg": SMALL, "val/bee/0.png": encoded(gradient.transpose(Image.Transpose.ROTATE_90))}
    write_tree(tmp_path / "tree", files)
    return tmp_path / "tree"


def command(tree: Path, out: Path, *more: str) -> int:
    words = [f"data.root={tree}", f"out={out}", "size=24", "images=3", "workers=2", *more]
    return main(["resize", "recipes.vision:base_in1k", *words])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_images_are_scaled_and_keep_label_class_and_order(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert command(tree, out) == 0
    shown = capsys.readouterr()
    assert "1 unreadable images left out" in shown.out
    assert f"left out: {tree}/train/bee/2.jpg: " in shown.err
    names = ["train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"]
    assert sorted(contents(out)) == sorted([*names, "classnames.txt", "resize.json", "unreadable.txt"])
    source: Any = open_source("folder", "train", root=str(out))
    assert source.classes == ("ant", "bee")
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    sizes = [Image.open(io.BytesIO(source.read(row))).size for row in range(6)]
    assert sizes == [(36, 24)] * 5 + [(30, 20)]
    assert source.read(5) == SMALL, "not encoded a second time"
    held_out: Any = open_source("folder", "test", root=str(out))
    assert Image.open(io.BytesIO(held_out.read(1))).size == (24, 36)
    large, small = open_folder(tree, size=(24, 24)), open_folder(out, size=(24, 24))
    for row in range(5):
        assert (large[row]["image"].int() - small[row]["image"].int()).abs().float().mean() < 3


def test_an_interrupted_command_goes_on_with_the_next_shard(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "small"
    assert command(tree, whole) == 0
    write, calls = resize.write_shard, []

    def stopping(*words: Any) -> None:
        calls.append(words[-1].shard)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*words)

    monkeypatch.setattr(resize, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(resize, "write_shard", stopping)
    assert command(tree, out) == 130
    with pytest.raises(UserError, match="found none of them complete"):
        open_source("folder", "train", root=str(out))
    calls += [""] * 9
    assert command(tree, out) == 0
    assert calls[-2:] == ["train-000002.tar", "val-000000.tar"], "what was finished is not written again"
    assert contents(out) == contents(whole)
    assert command(tree, out) == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a finished shard"])
def test_a_command_that_fails_before_its_first_shard_leaves_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    out, write = tmp_path / "new" / "small", resize.write_shard

    def full(data: Any, options: Any, folder: Path, shard: resize.Part) -> None:
        if before == "a finished shard" and shard.number == 0:
            write(data, options, folder, shard)
            return
        (folder / resize.DONE / f".writing_{shard.shard}").write_bytes(b"half of it")
        raise UserError("no space left")

    if before == "an empty folder":
        out.mkdir(parents=True)
    monkeypatch.setattr(resize, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(resize, "write_shard", full)
    assert command(tree, out) == 2
    if before == "a finished shard":
        assert (out / resize.DONE / "train-000000.tar").exists()
        assert (out / "resize.json").exists()
    elif before == "an empty folder":
        assert list(out.iterdir()) == []
    else:
        assert not out.parent.exists()
    monkeypatch.setattr(resize, "write_shard", write)
    assert command(tree, out) == 0


class InThisProcess:
    """A pool without processes."""

    def __init__(self, workers: int, **_: Any) -> None:
        self.map = map

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shutdown(self, **_: Any) -> None:
        pass


def test_other_settings_or_a_foreign_folder_are_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert command(tree, out) == 0
    assert command(tree, out, "quality=80") == 2
    assert "resize.json" in capsys.readouterr().err
    assert json.loads((out / "resize.json").read_text())["quality"] == 90
    assert command(tree, tree) == 2
    assert "holds no resized images" in capsys.readouterr().err
    assert command(tree, tmp_path / "x", "data.limit=3") == 2
    assert "data.limit=3: nepa resize writes every image" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["resize", "tests.tiny:recipe", f"out={tmp_path / 'x'}"]) == 2
    assert "takes a recipe of images" in capsys.readouterr().err


def test_grey_recipes_give_grey_images(tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert main(["resize", "recipes.vision:digits", f"out={out}", "size=6", "quality=95", "workers=1"]) == 0
    found: Any = open_folder(out, "test", channels=1)
    labels: Any = open_source("digits", "test").labels
    assert torch.equal(found.labels, labels)
    stored = Image.open(io.BytesIO(found.source.read(0)))
    assert (stored.mode, stored.size, stored.format) == ("L", (6, 6), "JPEG")
    assert np.asarray(stored).std() > 20


# ------------------------------------------------------------------------------------------------ arrays of pixels


def array_command(tree: Path, out: Path, *more: str) -> int:
    return command(tree, out, "format=array", *more)


def test_an_array_holds_the_pixels_that_a_reader_would_have_fitted(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "array"
    assert array_command(tree, out) == 0
    shown = capsys.readouterr()
    assert "1 unreadable images left out" in shown.out
    assert f"left out: {tree}/train/bee/2.jpg: " in shown.err
    assert sorted(contents(out)) == ["resize.json", "train.npy", "train.npz", "unreadable.txt", "val.npy", "val.npz"]
    mapped = np.load(out / "train.npy", mmap_mode="r")
    assert (mapped.shape, mapped.dtype) == ((6, 24, 24, 3), np.uint8)
    source: Any = open_source("folder", "train", root=str(out))
    assert (source.classes, source.labels.tolist()) == (("ant", "bee"), [0, 0, 0, 0, 1, 1])
    assert source.name(5) == f"{out}/train.npy:5 ({tree}/train/bee/1.jpg)"
    assert (source.read(3) == mapped[3]).all()
    assert (source.rows([5, 0]) == mapped[[5, 0]]).all()
    assert len(pickle.dumps(source)) < 2000, "processes that load get no pixels"
    for split in ("train", "test"):
        stored, array = (open_folder(root, split, size=(24, 24)) for root in (tree, out))
        assert all(torch.equal(stored[row]["image"], array[row]["image"]) for row in range(len(array)))
        smaller = {"size": (16, 16), "crop_ratio": 2 / 3}  # scaled to 24, as they are
        stored, array = (open_folder(root, split, **smaller) for root in (tree, out))
        assert all(torch.equal(stored[row]["image"], array[row]["image"]) for row in range(len(array)))


def test_the_last_images_take_the_places_of_unreadable_ones(tmp_path: Path) -> None:
    torn = {"train/ant/0.jpg", "train/ant/3.jpg", "train/ant/4.jpg"}
    names = [f"{split}/ant/{row}.jpg" for split in ("train", "val") for row in range(6)]
    write_tree(tmp_path / "tree", {name: b"torn" if name in torn else SMALL for name in names})
    assert array_command(tmp_path / "tree", tmp_path / "array") == 0
    source: Any = open_source("folder", "train", root=str(tmp_path / "array"))
    assert [source.name(row).rpartition("/")[2] for row in range(3)] == ["5.jpg)", "1.jpg)", "2.jpg)"]
    assert all((source.read(row) == source.read(0)).all() for row in range(3))
    write_tree(tmp_path / "worse", {name: b"torn" if "train" in name else SMALL for name in names})
    assert array_command(tmp_path / "worse", tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("stop", ["write_rows", "deliver", "between"])
def test_an_interrupted_array_goes_on(stop: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "array"
    assert array_command(tree, whole) == 0
    name = "write_rows" if stop == "write_rows" else "deliver"
    does, calls = getattr(resize, name), []

    def stopping(*words: Any) -> None:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        if stop == "deliver":
            monkeypatch.setattr("recipes.training.resized_arrays.write_beside", interrupted)
        does(*words)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resize, "ProcessPoolExecutor", InThisProcess)
    with monkeypatch.context() as patch:
        patch.setattr(resize, name, stopping)
        assert array_command(tree, out) == 130
    unfinished = "val.npy is missing beside train.npy" if stop == "between" else "found none of them complete"
    with pytest.raises(UserError, match=unfinished):
        open_source("folder", "train", root=str(out))
    monkeypatch.setattr("recipes.training.resized_arrays.write_beside", image_arrays.write_beside)
    assert array_command(tree, out) == 0
    assert contents(out) == contents(whole)
    assert array_command(tree, out) == 0
    assert command(tree, out) == 2, "shards of the same settings are something else"


def test_a_full_disk_costs_the_draft_alone(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(5000):
        assert array_command(tree, tmp_path / "array") == 2
    assert "can't be written: File too large" in capsys.readouterr().err
    assert not (tmp_path / "array").exists()


def test_damaged_arrays_are_one_line(tree: Path, tmp_path: Path) -> None:
    assert array_command(tree, tmp_path / "array") == 0
    train, beside = ((tmp_path / "array" / f"train.{kind}") for kind in ("npy", "npz"))
    pixels, labels = train.read_bytes(), beside.read_bytes()

    def refused(file: Path, content: bytes, said: str) -> None:
        file.write_bytes(content)
        root = f"{tmp_path}/./array{len(list(tmp_path.iterdir()))}{said[:3]}"  # nothing is remembered
        (tmp_path / root).symlink_to(tmp_path / "array")
        with pytest.raises(UserError, match=said):
            open_source("folder", "train", root=root)
        train.write_bytes(pixels)
        beside.write_bytes(labels)

    refused(train, pixels[:-1], "train.npy has 10,495 bytes and should have 10,496")
    refused(train, b"", "train.npy can't be read .*write it again")
    refused(train, image_arrays.array_head((6, 24, 24, 2)) + pixels[128:], r"train.npy holds uint8 \[6, 24, 24, 2\]")
    refused(beside, labels[:-9], "train.npz can't be read")
    refused(beside, (tmp_path / "array/val.npz").read_bytes(), "train.npz is not of train.npy")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["train.npz"], "train.npz is missing beside train.npy: "),
        (["val.npy"], "val.npy is missing beside val.npz: "),
        (["val.npy", "val.npz"], "val.npy is missing beside train.npy: "),
    ],
)
def test_a_missing_file_of_an_array_is_named(tree: Path, tmp_path: Path, lost: list[str], said: str) -> None:
    assert array_command(tree, tmp_path / "array") == 0
    for name in lost:
        (tmp_path / "array" / name).unlink()
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}/array: {said}restore it"):
        open_source("folder", "train", root=str(tmp_path / "array"))


def test_an_array_that_shrinks_or_changes_is_noticed(tree: Path, tmp_path: Path) -> None:
    assert array_command(tree, tmp_path / "array") == 0
    images = open_folder(tmp_path / "array", size=(24, 24))
    before = images.fingerprint()
    file = tmp_path / "array/train.npy"
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    assert images.fingerprint() != before
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    assert images[4]["image"].shape == (3, 24, 24)
    with pytest.raises(UnreadableSample, match=r"train.npy:5 .*the file has become shorter"):
        images[5]
