"""nepa resize: smaller images in shards, complete and the same however often it was interrupted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.data.image_sources import open_source
from nepa_core.basics import UserError
from recipes.cli import main
from recipes.training import resizing as resize
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
