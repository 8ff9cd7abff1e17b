"""A small probe while pre-training: what it reads, what it leaves alone, what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nepa_core
from nepa_core.basics import Batch
from nepa_core.runtime.config import override
from nepa_core.runtime.data import epoch_order
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.statistics.ridge import ridge, right_class
from recipes.training import online_probe, pretraining
from recipes.training.pretraining import make_step, pretrain
from recipes.vision import digits
from tests import tiny
from tests.tiny import CPU, Waves, interrupted_at

ALONE = World(0, 1, CPU)


class Numbers(Waves):
    """The mean of a sample in place of its class, and of some samples nothing."""

    def dataset(self, split: str) -> Any:
        return [{**each, "label": each["values"].mean().float()} for each in super().dataset(split)]  # type: ignore[attr-defined]


class Few(Waves):
    """Only the first few samples have a class."""

    def dataset(self, split: str) -> Any:
        samples: Any = super().dataset(split)
        return [{**samples[i], "label": samples[i]["label"] if i < 30 else torch.tensor(-1)} for i in range(48)]


def probed(data: Waves | None = None, **changes: Any) -> PretrainConfig:
    return override(tiny.recipe(), {"train.probe": True, "data": data or Waves(), **changes})


def figures(folder: Path, name: str = "probe_accuracy") -> list[float]:
    return [line[name] for line in Run(folder).metrics() if name in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(probed(), Run(folder), ALONE, show=False)
    return folder


def test_it_is_a_ridge_on_the_features_that_encode_gives(whole: Path) -> None:
    """Of the averaged weights, as the last line has it."""
    net = nepa_core.load(whole)
    splits = [[net.data.dataset(split)[i] for i in range(48)] for split in ("train", "test")]
    order = epoch_order(48, 0, 0).tolist()
    x, x_test = (net.encode([samples[i] for i in order]) for samples in splits)
    y, y_test = (one_hot([samples[i] for i in order]) for samples in splits)
    expected = float(ridge(x, y, x_test, y_test, right_class).mean())
    found = figures(whole)
    assert len(found) == 4, "before the first step, at 5, at 10 and at the end"
    assert found[-1] == pytest.approx(expected, abs=1e-6)


def one_hot(samples: list[Batch]) -> Tensor:
    return torch.nn.functional.one_hot(torch.stack([sample["label"] for sample in samples]), 2).float()


def test_it_changes_nothing_else(whole: Path, tmp_path: Path) -> None:
    pretrain(tiny.recipe(), Run(tmp_path / "without"), ALONE, show=False)
    lines = [{k: v for k, v in line.items() if k != "probe_accuracy"} for line in Run(whole).metrics()]
    assert lines == Run(tmp_path / "without").metrics()
    last = "checkpoints/step_00000012/model.safetensors"
    assert (whole / last).read_bytes() == (tmp_path / "without" / last).read_bytes()
    assert (whole / "report/probe.png").exists()
    assert "Held-out labels read by a small ridge" in (whole / "report/index.html").read_text()
    assert not (tmp_path / "without" / "report/probe.png").exists()


def test_an_interrupted_run_ends_with_the_same_figures(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = probed()
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "make_step", lambda *_: interrupted_at({7}, make_step(config)))
        with pytest.raises(Exception, match="stopped after step 7"):
            pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_its_figure_is_said_at_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tests.tiny:recipe", "train.probe=true", "train.length.steps=5", f"out={tmp_path / 'run'}"]
    assert main(["pretrain", *words]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "probe accuracy" in line]
    found = figures(tmp_path / "run")
    assert said == [f"step {step}: probe accuracy {each:.3f}" for step, each in zip((0, 5), found, strict=True)]


@pytest.mark.slow
def test_numbers_and_samples_without_a_class(tmp_path: Path) -> None:
    pretrain(probed(Numbers()), Run(tmp_path / "numbers"), ALONE, show=False)
    assert max(figures(tmp_path / "numbers", "probe_r2")) <= 1
    pretrain(probed(Few()), Run(tmp_path / "few"), ALONE, show=False)
    assert all(round(30 * each, 6) == round(30 * each) for each in figures(tmp_path / "few")), "shares of 30 samples"


def test_without_labels_it_is_refused_before_training(fails: Callable[..., str]) -> None:
    line = fails("pretrain", "tests.tiny:recipe", "train.probe=true", "data.labelled=false")
    assert line.startswith('train.probe=true reads the key "label" of samples, and 0 of 128 train samples of Waves')
    assert not list(Path().iterdir())
    assert "train.probe=true is of pre-training" in fails("finetune", "tests.tiny:recipe", "train.probe=true")


def test_a_probed_run_is_fine_tuned(whole: Path, tmp_path: Path) -> None:
    words = ["train.length.steps=1", "control=false", f"out={tmp_path / 'tuned'}"]
    assert main(["finetune", str(whole), *words]) == 0


@pytest.mark.slow
def test_it_takes_less_than_two_percent_of_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CPU time; a run of all 800 steps has nine measurements, this one five in half of that."""
    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = time.process_time()
            try:
                return function(*args)
            finally:
                spent[0] += time.process_time() - before

        return call

    monkeypatch.setattr(pretraining, "probe_figure", timed(online_probe.probe_figure))
    monkeypatch.setattr(pretraining, "online_probe", timed(online_probe.online_probe))
    config = override(digits(), {"train.probe": True, "train.length.steps": 400})
    before = time.process_time()
    pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    whole = time.process_time() - before
    print(spent[0], whole, spent[0] / whole)
    assert spent[0] < 0.02 * whole
