"""NaN, infinity and numbers that float32 can't square: counted as unreadable and named, or refused, in every task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.image import Images, patchify
from modalities.scenes import Scenes
from modalities.timeseries import TimeSeries, Windows
from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.runtime.config import override
from nepa_core.runtime.data import plain_batches, replace_broken
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes.configs import FinetuneConfig, MixConfig, SegmentConfig
from recipes.networks.goals import find_goal
from recipes.presets import short
from recipes.readout.forecasters import best_ridge, chosen, raw_features, repeat_last, score
from recipes.training.finetuning import build_classifier, finetune, make_step, measure
from recipes.training.segmentation import build_segmenter, pictures, segment
from recipes.training.segmentation import make_step as make_segment_step
from recipes.training.segmentation import measure as measure_scenes
from tests import tiny, tiny_scenes
from tests.modalities.test_timeseries import adapter, walk, write_csv
from tests.tiny import CPU

ALONE = World(0, 1, CPU)
NAN = "its tokens hold NaN or infinity"


class Pictures(Modality):
    """Float images of one patch size, two classes; in each split those of `broken` hold NaN."""

    samples: int = 16
    broken: tuple[int, ...] = (3,)

    def dataset(self, split: str) -> Dataset[Batch]:
        draw = torch.Generator().manual_seed(len(split))
        images = 255 * torch.rand(self.samples, 1, 8, 8, generator=draw)
        images[list(self.broken), 0, 2, 5] = torch.nan
        return cast(Dataset[Batch], [{"image": x, "label": torch.tensor(k % 2)} for k, x in enumerate(images)])

    def tokenize(self, batch: Batch) -> Tokens:
        return Tokens(patchify(batch["image"] / 255, (4, 4)), torch.arange(4.0)[:, None] / 4)

    def classes(self) -> tuple[str, ...]:
        return ("even", "odd")


def mixing(**changes: Any) -> FinetuneConfig:
    mix = MixConfig(mixup=0.8, cutmix=1.0)
    config = short(tiny.recipe()).model_copy(update={"data": Pictures(**changes), "mix": mix})
    return override(config, {"train.length.steps": 4, "train.batch": 8, "train.micro_batch": None, "train.evaluate": 4})


def test_a_broken_image_is_replaced_before_it_is_mixed_with_another(tmp_path: Path) -> None:
    config = override(mixing(), {"train.max_unreadable": 0.2})
    summary = finetune(config, Run(tmp_path / "run"), ALONE, show=False)
    assert summary["unreadable_messages"] == [f"sample 3: {NAN}"]
    assert summary["unreadable_held_out_messages"] == [f"sample 3: {NAN}"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["skipped_steps"] for line in lines if "lr" in line} == {0.0}


def test_mixing_without_broken_images_draws_as_before() -> None:
    """The check reads tokens and draws nothing: the mixed batch is that of the same seed without it."""
    data = Images(
        source="digits", size=(8, 8), patch=(2, 2), channels=1, mean=(0.3,), std=(0.4,), augment="crop", erase=1.0
    )
    goal = find_goal(data)
    config = override(mixing(), {"train.batch": 4}).model_copy(update={"data": data})
    model, _ = build_classifier(config, goal)
    seen: list[Tensor] = []
    model.backbone.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    samples = data.dataset("train")
    torch.manual_seed(1)
    batch = {name: torch.stack([samples[k][name] for k in range(4)]) for name in ("image", "label", "erase")}
    step = make_step(config, goal)
    for _ in range(2):
        torch.manual_seed(7)
        out = step(model, dict(batch))
    assert torch.equal(seen[0], seen[1])
    assert out.broken is not None
    assert not out.broken.any()


class BrokenScenes(Scenes):
    """Scenes of the tiny tree; a scene whose first pixel is at its brightest gives NaN."""

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        bad = batch["image"][:, :, :8, :8].eq(255).flatten(1).all(1)
        return replace(tokens, values=torch.where(bad[:, None, None], torch.nan, tokens.values))


def white(root: Path, split: str, name: str) -> Path:
    """Make one image of a tree all white."""
    from PIL import Image

    file = root / "images" / split / name
    with Image.open(file) as image:
        Image.new("RGB", image.size, (255, 255, 255)).save(file, quality=100)
    return file


def test_a_broken_scene_is_counted_named_and_in_no_score(tmp_path: Path) -> None:
    root = tiny_scenes.write_scenes(tmp_path / "scenes")
    held_out, training = (white(root, split, "ADE_0002.jpg") for split in ("validation", "training"))
    data = BrokenScenes(**tiny_scenes.scenes(root).model_dump())
    config: SegmentConfig = tiny_scenes.recipe().model_copy(update={"data": data})
    with pytest.raises(UserError, match=f"1 unreadable held-out sample of 5.*{held_out.name}: {NAN}"):
        measure_scenes(override(config, {"train.max_unreadable": 0.1}), build_segmenter(config)[0], ALONE)
    config = override(config, {"train.max_unreadable": 0.3, "evaluation.pictures": 5})
    summary = segment(config, Run(tmp_path / "run"), ALONE, show=False)
    assert summary["unreadable_held_out_messages"] == [f"{held_out}: {NAN}"]
    assert summary["images"] == 4
    assert summary["unreadable_messages"] == [f"{training}: {NAN}"]
    shown = [each.name for each in pictures(config, build_segmenter(config)[0], CPU)]
    assert shown == [f"ADE_{k:04}.jpg" for k in (0, 1, 3, 4)]


def test_the_step_of_segmentation_trains_on_a_neighbour_instead(tmp_path: Path) -> None:
    root = tiny_scenes.write_scenes(tmp_path / "scenes")
    config = tiny_scenes.recipe().model_copy(update={"data": BrokenScenes(**tiny_scenes.scenes(root).model_dump())})
    model = build_segmenter(config)[0]
    images = torch.randint(0, 200, (4, 3, 16, 24), dtype=torch.uint8)
    images[1] = 255
    target = torch.randint(0, 3, (4, 16, 24), dtype=torch.uint8)
    out = make_segment_step(config)(model, {"image": images, "target": target})
    assert out.broken is not None
    assert out.broken.tolist() == [0, 1, 0, 0]
    assert out.loss.isfinite()


class BrokenSeries(TimeSeries):
    """Held-out windows whose look-back begins in row 100 hold NaN."""

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        bad = batch["series"].flatten(1).eq(batch["series"].flatten(1).amax()).any(1)
        return replace(tokens, values=torch.where(bad[:, None, None], torch.nan, tokens.values))


def test_a_forecast_over_broken_windows_is_refused_by_name(tmp_path: Path) -> None:
    data = BrokenSeries(**adapter(write_csv(tmp_path, walk())).model_dump())
    for run in (
        lambda: score(data, "test", 5, CPU, lambda batch: repeat_last(data, batch)),
        lambda: best_ridge(data, raw_features, 5, 1000, CPU),
    ):
        with pytest.raises(UserError, match=rf"windows can't be forecast; the first is the window of rows .*: {NAN}"):
            run()


def test_a_future_that_is_infinite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = adapter(write_csv(tmp_path, walk()))
    real = Windows.__getitems__

    def broken(self: Windows, indices: list[int]) -> Batch:
        batch = real(self, indices)
        batch["future"][0, 0] = torch.inf
        return batch

    monkeypatch.setattr(Windows, "__getitems__", broken)
    with pytest.raises(UserError, match="what is to be forecast is not finite"):
        score(data, "test", 5, CPU, lambda batch: repeat_last(data, batch))


def test_a_value_that_no_square_can_hold_is_refused_with_its_row(tmp_path: Path) -> None:
    values = walk()
    values[-3, 0] = 1e30
    words = rf"row {len(values) - 1} of column 'a' is more than 1e\+15 standard deviations"
    with pytest.raises(UserError, match=words):
        adapter(write_csv(tmp_path, values)).dataset("train")


def test_windows_are_named_by_their_rows_and_chosen_ones_keep_their_names(tmp_path: Path) -> None:
    data = adapter(write_csv(tmp_path, walk()), channels="independent")
    windows, some = data.forecasts("train", 5), chosen(data, "train", 5, 4)
    first = int(windows.starts[0]) + 1
    assert windows.name(0) == f"the window of rows {first} to {first + data.window + 4} of channel 1"
    assert some.name(2) == windows.name(some.indices[2])


@pytest.mark.parametrize(("value", "said"), [(torch.nan, NAN), (1e20, "its tokens hold numbers beyond 1e+15")])
def test_what_a_norm_turns_into_nan_is_unreadable_like_nan(value: float, said: str) -> None:
    data = Pictures(broken=())
    samples = list(cast(Any, data.dataset("test")))
    samples[4] = samples[4] | {"image": samples[4]["image"] * 0 + value}
    named: set[str] = set()
    batches = plain_batches(
        cast(Dataset[Batch], samples), batch=8, device=CPU, unreadable=named, tokenize=data.tokenize
    )
    assert sum(len(batch["label"]) for batch in batches) == 15
    assert named == {f"sample 4: {said}"}


def test_coordinates_of_one_sample_count_too() -> None:
    coords = torch.zeros(3, 4, 1)
    coords[1, 2] = torch.nan
    assert Tokens(torch.zeros(3, 4, 2), coords).finite().tolist() == [True, False, True]


class Numbers(Pictures):
    """A number to predict, NaN in the samples of `unknown`."""

    broken: tuple[int, ...] = ()
    unknown: tuple[int, ...] = (5,)

    def dataset(self, split: str) -> Dataset[Batch]:
        samples = list(cast(Any, super().dataset(split)))
        for index, sample in enumerate(samples):
            lost = split == "test" and index in self.unknown
            sample["label"] = torch.tensor([torch.nan if lost else sample["image"].mean() / 255])
        return cast(Dataset[Batch], samples)


def test_a_held_out_number_that_is_nan_is_in_no_figure() -> None:
    config = short(tiny.recipe()).model_copy(update={"data": Numbers()})
    model, _ = build_classifier(config, find_goal(config.data))
    left_out: set[str] = set()
    figures = measure(override(config, {"train.max_unreadable": 0.1}), model, ALONE, left_out=left_out)
    assert left_out == {"sample 5: its label is NaN or infinite"}
    assert figures["samples"] == 15
    assert np.isfinite(figures["mse"])


def test_numbers_to_predict_count_where_they_are_trained_on_alone() -> None:
    tokens, label = Tokens(torch.zeros(3, 2, 2), torch.zeros(2, 1)), torch.tensor([0.5, torch.nan, 2.0])
    assert replace_broken(tokens, {"label": label})[2].tolist() == [0, 0, 0]
    _, batch, faults = replace_broken(tokens, {"label": label}, labels=True)
    assert faults.tolist() == [0, 3, 0]
    assert batch["label"].isfinite().all()
