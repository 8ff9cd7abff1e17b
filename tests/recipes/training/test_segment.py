"""Segmentation: metrics by brute force, windows that cover, what training learns, and how runs begin and end."""

from __future__ import annotations

import html
import math
import shlex
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from modalities.data.scenes import IGNORED
from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.run import Run
from recipes import vision
from recipes.cli import leave, main
from recipes.configs import SegmentConfig
from recipes.networks.windows import EvaluationConfig, predict, slide, whole, window_starts
from recipes.report.segment import palette, render
from recipes.report.summaries import EvaluateSummary, SegmentSummary
from recipes.statistics.segment_metrics import confusion, scores
from recipes.training import segmentation as task
from recipes.training.pretraining import pretrain
from recipes.training.segmentation import Measured, build_segmenter, make_step, measure, pixel_loss, segment
from tests import tiny, tiny_scenes
from tests.nepa_core.runtime.test_distributed import torchrun
from tests.summaries import check_summary
from tests.tiny import CPU, interrupted_at

ALONE = World(0, 1, CPU)
SETTINGS = EvaluationConfig(mode="slide", stride=(8, 8), scales=(1.0,), flip=False, windows=4, images=2, pictures=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scenes.write_scenes(tmp_path_factory.mktemp("scenes"))


def recipe(root: Path, **changes: Any) -> SegmentConfig:
    """The tiny recipe on that folder; a double underscore in a key stands for a dot."""
    keys = {"data.root": str(root), **{name.replace("__", "."): value for name, value in changes.items()}}
    return override(tiny_scenes.recipe(), keys)


# ---- metrics


def brute_force(
    pairs: list[tuple[Tensor, Tensor]], classes: int
) -> tuple[list[float | None], list[float | None], float]:
    """IoU and accuracy of every class and over all pixels, by counting sets of pixels."""
    predicted = [set() for _ in range(classes)]
    true = [set() for _ in range(classes)]
    for image, (prediction, target) in enumerate(pairs):
        for place in np.ndindex(*target.shape):
            if target[place] < classes:
                true[int(target[place])].add((image, place))
                predicted[int(prediction[place])].add((image, place))
    both = [t & p for t, p in zip(true, predicted, strict=True)]
    iou = [len(b) / len(t | p) if t | p else None for b, t, p in zip(both, true, predicted, strict=True)]
    acc = [len(b) / len(t) if t else None for b, t in zip(both, true, strict=True)]
    return iou, acc, sum(map(len, both)) / sum(map(len, true))


def test_scores_are_those_of_sets_of_pixels_however_images_are_grouped() -> None:
    """Of six classes the fifth is predicted but never true and the last is neither."""
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for height, width in ((5, 7), (3, 4), (9, 2), (1, 1)):
        target = torch.randint(0, 4, (height, width), generator=draw, dtype=torch.uint8)
        target[torch.rand(height, width, generator=draw) < 0.2] = IGNORED
        pairs.append((torch.randint(0, 5, (height, width), generator=draw), target))
    counts = [confusion(prediction, target, 6) for prediction, target in pairs]
    found = scores(torch.stack(counts).sum(0))
    iou, acc, aacc = brute_force(pairs, 6)
    assert found.iou == iou
    assert found.acc == acc
    assert found.aacc == aacc
    assert (iou[4], acc[4], iou[5]) == (0.0, None, None)
    assert found.miou == pytest.approx(np.mean(iou[:5]))
    assert found.macc == pytest.approx(np.mean(acc[:4]))
    flat = [torch.cat([pair[k].flatten() for pair in pairs]) for k in (0, 1)]
    assert scores(confusion(*flat, 6)) == found
    assert counts[0].dtype == torch.int64


def test_scores_of_nothing_are_an_error_that_names_the_keys() -> None:
    nothing = confusion(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), IGNORED), 3)
    with pytest.raises(UserError, match=r"data\.ignored_labels"):
        scores(nothing)


# ---- windows


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 7), (10, 3), (1, 1)])
def test_windows_cover_every_pixel_and_stay_inside(length: int, window: int, stride: int) -> None:
    starts = window_starts(length, window, stride)
    covered = {pixel for start in starts for pixel in range(start, start + window)}
    assert covered == set(range(max(length, window)))
    assert starts == sorted(set(starts))
    assert all(b - a <= stride for a, b in pairwise(starts))


def by_pixel(windows: Tensor, real: Tensor | None) -> Tensor:
    """A stand-in for a network: logits that depend on nothing but the pixel itself."""
    x = windows.float() / 255
    return torch.cat([x, 1 - x[:, :1]], dim=1)


def by_window(windows: Tensor, real: Tensor | None) -> Tensor:
    """Another: every logit depends on the whole window."""
    return by_pixel(windows, real) * windows.float().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("size", [(16, 24), (17, 25), (8, 8), (5, 30), (3, 4)])
@pytest.mark.parametrize("at_once", [1, 5])
def test_windows_are_put_back_where_they_were_taken(size: tuple[int, int], at_once: int) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    found = slide(image, by_pixel, window=(8, 8), stride=(5, 7), at_once=at_once)
    torch.testing.assert_close(found, by_pixel(image[None], None)[0])


def test_one_window_over_the_image_is_the_whole_image() -> None:
    image = torch.randint(0, 256, (3, 12, 20), dtype=torch.uint8)
    found = slide(image, by_window, window=(12, 20), stride=(3, 3), at_once=2)
    assert torch.equal(found, whole(image, by_window, patch=(4, 4)))
    assert not torch.allclose(found, slide(image, by_window, window=(8, 8), stride=(4, 4), at_once=2))


def test_only_an_image_smaller_than_the_window_is_padded_and_says_so() -> None:
    told: list[tuple[tuple[int, ...], Any]] = []

    def logits_of(windows: Tensor, real: Tensor | None) -> Tensor:
        told.append((tuple(windows.shape), None if real is None else real.tolist()))
        return by_pixel(windows, real)

    slide(torch.zeros(3, 6, 20, dtype=torch.uint8), logits_of, window=(8, 8), stride=(8, 8), at_once=4)
    slide(torch.zeros(3, 8, 8, dtype=torch.uint8), logits_of, window=(8, 8), stride=(8, 8), at_once=4)
    assert told == [((3, 3, 8, 8), [[6, 8]] * 3), ((1, 3, 8, 8), None)]
    assert whole(torch.zeros(3, 6, 20, dtype=torch.uint8), logits_of, patch=(4, 4)).shape == (4, 6, 20)
    assert told[-1] == ((1, 3, 8, 20), None)


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_predictions_are_made_at_the_stored_size(mode: str) -> None:
    image = torch.zeros(3, 30, 50, dtype=torch.uint8)
    image[1, :, 25:] = 255
    settings = SETTINGS.model_copy(update={"mode": mode, "scales": (0.5, 1.0), "flip": True})
    found = predict(image, by_pixel, settings, short_side=16, window=(8, 8), patch=(4, 4))
    assert found.shape == (30, 50)
    assert (found[:, 30:] == 1).all()
    assert (found[:, :20] == 3).all()


def test_scales_and_flips_are_averaged_as_probabilities() -> None:
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    seen: list[Tensor] = []

    def logits_of(windows: Tensor, real: Tensor | None) -> Tensor:
        seen.append(windows)
        return by_window(windows, real) * torch.linspace(0, 9, windows.shape[-1])  # left is not right

    settings = SETTINGS.model_copy(update={"mode": "whole", "scales": (0.5, 1.0), "flip": True})
    found = predict(image, logits_of, settings, short_side=16, window=(8, 8), patch=(4, 4))
    assert [tuple(x.shape[-2:]) for x in seen] == [(8, 8), (8, 8), (16, 16), (16, 16)]
    assert torch.equal(seen[3], image[None].flip(-1))
    total = torch.zeros(4, 16, 16)
    for shown, flipped in zip(list(seen), (False, True, False, True), strict=True):
        logits = logits_of(shown, None)
        logits = logits.flip(-1) if flipped else logits
        total += F.interpolate(logits, (16, 16), mode="bilinear")[0].softmax(0)
    assert torch.equal(found, total.argmax(0))


# ---- the loss


def test_the_loss_is_the_mean_over_labelled_pixels() -> None:
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    target[0, :3] = IGNORED
    labelled = (target != IGNORED).sum()
    expected = F.cross_entropy(logits, target, ignore_index=IGNORED)
    torch.testing.assert_close(pixel_loss(logits, target, labelled), expected)
    nothing = torch.full((2, 4, 4), IGNORED)
    assert pixel_loss(logits, nothing, torch.tensor(0)).item() == 0


def test_a_step_weighs_its_loss_with_the_labelled_pixels_and_adds_the_auxiliary_head(root: Path) -> None:
    config = recipe(root, data__scales=(1.0, 2.0))
    batch = torch.utils.data.default_collate([config.data.dataset("train")[k] for k in range(4)])
    losses = {}
    for weight in (0.0, 1.0):
        config = override(config, {"upernet.auxiliary_weight": weight})
        model, _ = build_segmenter(config)
        out = make_step(config)(model, batch)
        losses[weight] = out.loss.item()
        assert out.weight == (batch["target"] != IGNORED).sum()
        assert out.tokens == 4 * 24
    assert losses[0.0] == pytest.approx(math.log(3), rel=0.1)
    assert losses[1.0] == pytest.approx(2 * math.log(3), rel=0.1)


def test_recomputed_blocks_give_the_same_gradients_at_every_level(root: Path) -> None:
    config = recipe(root, model__drop_path=0.5)
    batch = torch.utils.data.default_collate([config.data.dataset("train")[k] for k in range(4)])
    gradients, kept = [], []
    for recompute in (False, True):
        model, _ = build_segmenter(config)
        if recompute:
            model.backbone.predictor.recompute_blocks()
        saved: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = make_step(config)(model, batch).loss
        loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
        kept.append(sum(saved))
    assert kept[1] < 0.9 * kept[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


# ---- runs


def test_squares_of_three_colours_are_learned(root: Path, tmp_path: Path) -> None:
    config = recipe(root, train__length__steps=25, train__evaluate=25, train__batch=8, optim__lr=0.02)
    summary = segment(config, Run(tmp_path / "run"), ALONE, show=False)
    assert summary["mIoU"] > 0.6
    assert summary["mIoU_ema"] > 0.6
    assert summary["images"] == 5


def test_the_command_leaves_a_whole_run_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["segment", "tests.tiny_scenes:recipe", f"data.root={root}", f"out={out}", 'data.names=["a<b","c","d"]']
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "from random weights" in said
    summary = check_summary(out / "summary.json", SegmentSummary)
    assert set(summary) >= {"mIoU", "mAcc", "aAcc", "mIoU_ema", "mAcc_ema", "aAcc_ema", "classes", "images", "steps"}
    assert [row["name"] for row in summary["classes"]] == ["a<b", "c", "d"]
    present = [row["iou"] for row in summary["classes"] if row["iou"] is not None]
    assert summary["mIoU"] == pytest.approx(np.mean(present))
    page = (out / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "a&lt;b" in page
    assert (out / "report/predictions.png").read_bytes().startswith(b"\x89PNG")
    tested = [line for line in Run(out).metrics() if "mIoU" in line]
    assert [line["step"] for line in tested] == [6]
    assert main(words) == 0, "a finished run only shows its result"
    assert capsys.readouterr().out == said
    assert main(["evaluate", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"Held out: mIoU {summary['mIoU_ema']:.2%}")
    assert told[0].endswith(", 5 images, averaged weights.")
    assert told[1].split() == ["class", "IoU"]
    ious = ["does not occur" if row["iou_ema"] is None else f"{row['iou_ema']:.1%}" for row in summary["classes"]]
    assert [line.split(maxsplit=1) for line in told[2:]] == [
        [row["name"], iou] for row, iou in zip(summary["classes"], ious, strict=True)
    ]
    assert main(["evaluate", str(out), "evaluation.scales=[0.75,1.25]", "evaluation.flip=true"]) == 0
    again = check_summary(out / "evaluate.json", EvaluateSummary)
    assert (again["evaluation"]["scales"], again["evaluation"]["flip"]) == ([0.75, 1.25], True)
    assert again["images"] == 5
    capsys.readouterr()
    assert main(["evaluate", str(out), "data.class_count=4", "data.names=null"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_plain_linear_head_and_whole_images_under_causal_attention(root: Path, tmp_path: Path) -> None:
    config = recipe(root, head="linear", causal=True, evaluation__mode="whole", train__ema=None)
    summary = segment(config, Run(tmp_path / "run"), ALONE, show=False)
    assert 0 <= summary["mIoU"] <= 1
    assert "mIoU_ema" not in summary
    assert summary["causal"] is True


@pytest.mark.slow
def test_what_is_not_pre_training_starts_from_the_run_that_init_names(root: Path, tmp_path: Path) -> None:
    start = override(tiny.recipe(), {"model.depth": 4, "train.length.steps": 2})
    start = start.model_copy(update={"data": tiny_scenes.scenes(root)})
    pretrain(start, Run(tmp_path / "pre"), ALONE, show=False)
    stored = load_file(next((tmp_path / "pre/checkpoints").glob("*")) / "ema.safetensors")
    model, new = build_segmenter(recipe(root, init=str(tmp_path / "pre")))
    assert new == []
    for name, value in model.backbone.named_parameters():
        assert torch.equal(value, stored[name]), name
    model, new = build_segmenter(recipe(root, init=str(tmp_path / "pre"), model__qk_norm="affine"))
    assert new == [f"predictor.blocks.{k}.attention.{each}_norm.weight" for k in range(4) for each in "kq"]
    with pytest.raises(UserError, match=r"model\.depth is 2 in the recipe and 4"):
        build_segmenter(recipe(root, init=str(tmp_path / "pre"), model__depth=2, head="linear"))
    tuned, run = recipe(root, init=str(tmp_path / "pre"), freeze_embedder=True), Run(tmp_path / "run")
    summary = segment(tuned, run, ALONE, show=False)
    (said,) = (line for line in render(summary, run).splitlines() if "control" in line)
    assert html.escape(said) in (run.report / "index.html").read_text()
    assert main(shlex.split(said.split("`")[1])[1:]) == 0, "the command for the control can be given as it stands"
    assert "control" not in render(summary, run), "it has run"
    control = Run(tmp_path / "run-control").summary()
    assert control is not None
    assert (control["init"], control["steps"]) == (None, summary["steps"])
    after = load_file(next((tmp_path / "run/checkpoints").glob("*6")) / "model.safetensors")
    moved = [name for name, value in stored.items() if not torch.equal(after[f"backbone.{name}"], value)]
    assert set(stored) - set(moved) == {"embed.weight", "embed.bias"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_with_its_batch_statistics(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(root, model__drop_path=0.2, upernet__dropout=0.2)
    segment(config, Run(tmp_path / "whole"), ALONE, show=False)
    real: Callable[..., Any] = task.make_step
    monkeypatch.setattr(task, "make_step", lambda config: interrupted_at({3}, real(config)))
    with pytest.raises(Interrupted):
        segment(config, Run(tmp_path / "parts"), ALONE, show=False)
    monkeypatch.setattr(task, "make_step", real)
    segment(config, Run(tmp_path / "parts"), ALONE, show=False)
    tensors = [
        load_file(tmp_path / name / "checkpoints/step_00000006/model.safetensors") for name in ("whole", "parts")
    ]
    assert any("running_var" in name for name in tensors[0])
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    summaries = [Run(tmp_path / name).summary() or {} for name in ("whole", "parts")]
    assert summaries[0]["classes"] == summaries[1]["classes"]
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_measuring_leaves_the_mode_alone_and_repeats_itself(root: Path) -> None:
    config = recipe(root)
    model, _ = build_segmenter(config)
    model.train()
    first, second = measure(config, model, ALONE), measure(config, model, ALONE)
    assert model.training
    assert first == second


def test_an_unreadable_held_out_scene_is_left_out_and_counted(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "images/validation/ADE_0001.jpg").write_bytes(b"")
    config = recipe(copy, train__max_unreadable=0.2)
    model, _ = build_segmenter(config)
    found = measure(config, model, ALONE)
    assert (found.images, len(found.unreadable)) == (4, 1)


# ---- several processes


def measured(root: Path, ranks: World) -> Measured:
    """The scores of a network given by its seed, with batch statistics as after training, over five scenes."""
    config = recipe(root, evaluation__flip=True)
    model, _ = build_segmenter(config)
    for name, value in model.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return measure(config, model, ranks)


def rank_main(out: Path, root: Path) -> None:
    """What each of two ranks does: measure; train; and see that the ranks agree on what they would measure then."""
    with world() as ranks:
        found = measured(root, ranks)
        segment(recipe(root), Run(out / "run"), ranks, show=False)
        if ranks.is_main:
            Run(out).write_summary(found.scores._asdict() | {"images": found.images}, "measured.json")


@pytest.mark.distributed
def test_two_processes_count_the_same_to_the_last_digit(root: Path, tmp_path: Path) -> None:
    done = torchrun("tests.recipes.training.test_segment", str(tmp_path), str(root))
    assert done.returncode == 0, done.stderr
    one = measured(root, ALONE)
    assert Run(tmp_path).summary("measured.json") == one.scores._asdict() | {"images": 5}
    assert one.scores.miou not in (0.0, 1.0)
    summary = Run(tmp_path / "run").summary()
    assert summary is not None
    assert summary["images"] == 5
    assert summary["made_with"]["processes"] == 2
    lines = [line for line in Run(tmp_path / "run").metrics() if "mIoU" in line]
    assert [line["step"] for line in lines] == [6]
    stored = load_file(tmp_path / "run/checkpoints/step_00000006/model.safetensors")
    config = recipe(root)
    model, _ = build_segmenter(config)
    model.load_state_dict(stored)  # the statistics that were evaluated are the ones that were stored
    assert measure(config, model, ALONE).scores.miou == summary["mIoU"]


# ---- what a user gets wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upernet__levels": (0, 1, 2, 2)}, "must rise and end with 3"),
        ({"upernet__levels": (0, 1, 2, 4)}, "must rise and end with 3"),
        ({"evaluation__stride": (8, 25)}, "gaps"),
        ({"model__mask_token": True}, "mask_token"),
        ({"model__learned_positions": 24, "evaluation__mode": "whole"}, "learned_positions"),
    ],
)
def test_settings_that_do_not_fit_are_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(root, **changes)


def test_a_micro_batch_of_one_is_too_small_for_batch_norm(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 crops at a time"):
        segment(recipe(root, train__micro_batch=1), Run(tmp_path / "run"), ALONE, show=False)
    segment(recipe(root, train__micro_batch=1, head="linear"), Run(tmp_path / "linear"), ALONE, show=False)


def test_a_frozen_embedder_needs_weights(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random embedder"):
        segment(recipe(root, freeze_embedder=True), Run(tmp_path / "run"), ALONE, show=False)
    assert not (tmp_path / "run").exists()


def test_a_wrong_annotation_ends_the_command_with_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "segment",
        "tests.tiny_scenes:recipe",
        f"data.root={root}",
        "data.class_count=2",
        f"out={tmp_path / 'run'}",
    ]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "label 3 is outside the 2 classes" in said
    assert "ADE_0" in said
    assert main(["segment", "recipes.vision:digits", f"out={tmp_path / 'other'}"]) == 2
    assert "is a recipe of `nepa pretrain`; name a recipe of `nepa segment`" in capsys.readouterr().err


# ---- presets and colours


def test_presets_differ_in_what_they_say() -> None:
    base, large = vision.base_ade20k(), vision.large_ade20k()
    assert (base.data.crop, base.data.grid(base.data.crop)) == ((518, 518), (37, 37))
    assert (base.model.depth, base.upernet.levels) == (12, (3, 5, 7, 11))
    assert (large.model.depth, large.upernet.levels) == (24, (7, 11, 15, 23))
    for preset in (base, large, vision.camvid_segment()):
        assert SegmentConfig.model_validate(preset.model_dump() | {"data": preset.data}) == preset  # fits itself
    assert vision.camvid().model.dim == vision.camvid_segment().model.dim
    with pytest.raises(ValidationError):
        SegmentConfig.model_validate(base.model_dump() | {"data": tiny.Waves()})


def test_every_class_has_a_colour_of_its_own() -> None:
    colours = palette(150).astype(int)
    assert len(np.unique(colours, axis=0)) == 150
    few = np.abs(colours[:12, None] - colours[None, :12]).sum(-1) + 999 * np.eye(12, dtype=int)
    assert few.min() > 60
    assert np.array_equal(palette(12), palette(150)[:12]), "a class has the same colour in every report"
    assert (colours.sum(1) > 60).all(), "black is for pixels without a class"


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
