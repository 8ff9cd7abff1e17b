"""Clips become tubelets and come back; several clips of a video are one in a figure."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.data import default_collate

from modalities.orders import ORDERS
from modalities.video import Video
from nepa_core.basics import UserError
from nepa_core.contract import check_modality
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.generation.reading import Kept, arranged
from recipes.networks.goals import Classification, Regression
from recipes.presets import short
from recipes.readout.inspecting import chosen_query
from recipes.statistics.maps import token_positions
from recipes.training.finetuning import finetune, held_out_credits, of_views
from recipes.video import moving_digits
from tests.movies import ramp, write_movies, write_video
from tests.tiny import CPU

ALONE = World(0, 1, CPU)


def adapter(**changes: Any) -> Video:
    settings = {"source": "digits", "frames": 8, "size": (16, 16), "patch": (2, 8, 4), "channels": 1}
    return Video(**(settings | {"mean": (0.1,), "std": (0.2,)} | changes))


def test_a_tubelet_holds_its_frames_and_lies_at_its_time_row_and_column() -> None:
    data = adapter()
    batch = {"video": torch.randint(256, (2, 8, 1, 16, 16), dtype=torch.uint8)}
    tokens = data.tokenize(batch)
    assert tokens.values.shape == (2, 4 * 2 * 4, data.token_dim())
    step, row, column = 2, 1, 3
    cut = batch["video"][:, 2 * step : 2 * step + 2, 0, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4]
    torch.testing.assert_close(tokens.values[:, (step * 2 + row) * 4 + column], ((cut / 255 - 0.1) / 0.2).flatten(1))
    assert tokens.coords[(step * 2 + row) * 4 + column].tolist() == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("order", [name for name in ORDERS if not name.startswith("spiral")])
def test_frames_come_back_whatever_the_order(order: str) -> None:
    data = adapter(patch_order=order)
    batch = default_collate([data.dataset("test")[place] for place in range(3)])
    tokens = data.read(batch)
    sketch, signal = data.describe(tokens), data.decode(tokens)
    assert (signal.kind, signal.data.shape) == ("picture", (3, 1, 32, 64))  # two lines of four frames
    for frame in range(8):
        y, x = 16 * (frame // 4), 16 * (frame % 4)
        assert torch.equal(signal.data[:, :, y : y + 16, x : x + 16], batch["video"][:, frame])
    assert sketch.grid == (4, 2, 4)
    torch.testing.assert_close(sketch.canvas[:, :, 16:32], batch["video"][:, 2, 0] / 255, atol=1e-6, rtol=0)


def test_the_adapter_keeps_the_contract(tmp_path: Path) -> None:
    check_modality(adapter(patch=(4, 8, 8), patch_order="hilbert"))
    write_movies(tmp_path)
    folder = {"source": "folder", "root": str(tmp_path), "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    check_modality(adapter(**folder, augment="crop_flip", clips=2, frames=4, patch=(2, 8, 8)))


def test_augmentation_is_the_same_for_all_frames_and_left_out_of_probes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_video(tmp_path / split / "a.mp4", [ramp(4)[3]] * 12)
    data = adapter(source="folder", root=str(tmp_path), augment="crop_flip", frames=4, patch=(2, 8, 8))
    torch.manual_seed(0)
    first, second = (data.dataset("train")[0]["video"] for _ in range(2))
    assert (first.float() - first[:1].float()).abs().max() <= 2  # a still video, so its frames are alike
    assert not torch.equal(first, second)
    plain = data.plain()
    assert torch.equal(plain.dataset("train")[0]["video"], plain.dataset("train")[0]["video"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": (3, 8, 8)}, "3 does not divide 8 of data.frames; the nearest that it divides: 6 and 9"),
        ({"patch": (2, 8, 32)}, "32 does not divide 16 of data.size; the nearest that it divides: 32"),
        ({"source": "folder"}, "data.source=folder needs data.root=DIR"),
        ({"source": "folder", "root": "x", "label": "direction"}, "data.label=direction is for data.source=digits"),
        ({"channels": 3}, "data.mean has 1 number for data.channels=3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        adapter(**changes)


def test_a_mistaken_root_is_one_line(fails: Any) -> None:
    assert "looked for train/<class>/*" in fails("pretrain", "recipes.video:folder", "data.root=.")
    gone = "data.root=nowhere: there is no such folder; give the one that holds videos, or a CSV file that names them"
    with pytest.raises(UserError, match=gone):
        adapter(source="folder", root="nowhere").dataset("train")


def broken(folder: Path, *, all_of_them: bool) -> Path:
    """Of 8 training videos 4 are files: two are broken, or all, and no other video is left."""
    write_movies(folder, 4)
    files = sorted(path for path in (folder / "train").rglob("*.*") if path.suffix in (".mp4", ".avi"))
    files[0].write_bytes(b"")
    for file in files[1:] if all_of_them else files[1:2]:
        file.write_bytes(b"torn" * 100)
    for frames in (folder / "train").glob("*/*/") if all_of_them else ():
        shutil.rmtree(frames)
    return folder


def test_a_check_counts_and_names_what_it_could_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = broken(tmp_path, all_of_them=False)
    assert main(["check", "recipes.video:folder", f"data.root={root}"]) == 0
    said = capsys.readouterr().out
    assert "checks. Samples that can't be read were left out, see below." in said
    assert "8 samples, 6 read: video uint8" in said
    assert "2 of the 8 tried of train can't be read: " in said
    assert "it is empty, 0 bytes" in said
    assert "damaged or no video (Invalid data found when processing input); replace or remove it" in said


def test_where_no_video_can_be_read_the_first_is_named_once_and_plainly(tmp_path: Path, fails: Any) -> None:
    root = broken(tmp_path, all_of_them=True)
    line = fails("check", "recipes.video:folder", f"data.root={root}")
    assert "not one sample of the 4 of dataset('train') can be read; the first: " in line
    assert "it is empty, 0 bytes; replace or remove it" in line
    line = fails("pretrain", "recipes.video:folder", f"data.root={root}", "out=run")
    assert "none of the 4 training samples can be read; one of them: " in line
    assert "Errno" not in line


# ---- several clips of a video


def test_what_is_said_of_clips_is_averaged() -> None:
    goal = Classification(("a", "b"))
    said = torch.tensor([[0, 1, 2.0, -2], [1, 1, -1, 1], [2, 0, 0, 3], [3, 0, 5, 0]]).double()  # number, class, logits
    numbers, truth, outputs = of_views(goal, said, torch.tensor([0, 0, 1, 1]))
    assert numbers.tolist() == [0, 2]
    assert truth.tolist() == [1, 0]
    each = said[:, 2:].float().softmax(1)
    torch.testing.assert_close(outputs.exp(), torch.stack((each[:2].mean(0), each[2:].mean(0))))
    lost = of_views(goal, said[[0, 3]], torch.tensor([0, 0, 1, 1]))  # clips that can't be read
    assert lost[0].tolist() == [0, 3]
    numbers, truth, outputs = of_views(
        Regression(torch.zeros(1), torch.ones(1)),
        torch.tensor([[0, 1.5, 1], [1, 1.5, 3]]).double(),
        torch.tensor([0, 0]),
    )
    assert (truth.tolist(), outputs.tolist()) == ([[1.5]], [[2.0]])


def test_held_out_figures_count_videos_and_not_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_movies(tmp_path / "movies", each=4)
    changes = {"data.source": "folder", "data.root": str(tmp_path / "movies"), "data.frames": 4, "data.clips": 3}
    few = {"model.dim": 16, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 32}
    recipe = override(moving_digits(), {**changes, **few})
    config = override(short(recipe), {"train.length.epochs": None, "train.length.steps": 2, "train.batch": 4})
    run = Run(tmp_path / "run")
    summary = finetune(config, run, ALONE, show=False)
    assert summary["samples"] == 4
    credits = held_out_credits(config, run, ALONE)
    assert credits.numbers.tolist() == [0, 3, 6, 9]
    assert float(credits.shares.mean()) == summary.get("accuracy_ema", summary["accuracy"])
    assert main(["evaluate", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "clips: 3 of each video, averaged, 4 frames at its own frame rate" in said
    assert "4 samples" in said


def test_a_region_may_be_of_some_steps_alone() -> None:
    data = adapter(patch=(2, 8, 8), patch_order="random_per_sample")
    batch = default_collate([data.dataset("test")[place] for place in range(2)])
    tokens, given = arranged(data, data.tokenize(batch), Kept(region=(2, 0, 1, 4, 2, 2)), bos=True)
    made = torch.zeros(4, 2, 2, dtype=torch.bool)
    made[2:4, 0:2, 1:2] = True
    assert torch.equal(tokens.canonical(~given), made.flatten().expand(2, -1))
    with pytest.raises(
        UserError, match=r"the tokens lie on 4 slices of 2 rows .* give \[s0,y0,x0,s1,y1,x1\] with s up"
    ):
        arranged(data, data.tokenize(batch), Kept(region=(0, 0, 1, 1)), bos=True)


def test_a_token_is_asked_by_step_row_and_column() -> None:
    real = torch.ones(32, dtype=torch.bool)
    assert chosen_query((2, 1, 3), (4, 2, 4), real, "x") == (2 * 2 + 1) * 4 + 3
    assert chosen_query((9,), (4, 2, 4), real, "x") == 9
    assert chosen_query(None, (4, 2, 4), real, "x") == (2 * 2 + 1) * 4 + 2
    for wrong in ((4, 0, 0), (1, 1), (32,)):
        with pytest.raises(UserError, match="the tokens lie on 4 slices, 2 rows and 4 columns, counted from 0"):
            chosen_query(wrong, (4, 2, 4), real, "x")


def test_distances_are_those_on_three_axes() -> None:
    data = adapter(patch=(2, 8, 8), patch_order="reverse")
    tokens = data.read(default_collate([data.dataset("test")[0]]))
    positions = token_positions(tokens, data.describe(tokens).grid)
    assert positions[0].tolist() == [3, 1, 1]
    assert float((positions[0] - positions[4]).norm()) == 1  # one step earlier, at the same place
