"""Forecasting: the ridge, its baselines, and the task through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from modalities.timeseries import TimeSeries
from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from recipes.cli import main
from recipes.forecast import (
    DLinear,
    Moments,
    best_ridge,
    fit_ridge,
    raw_features,
    repeat_last,
    scaled_future,
    score,
)
from recipes.pretrain import PretrainConfig
from recipes.timeseries import demo
from tests import tiny
from tests.test_timeseries import adapter, walk, write_csv
from tests.tiny import CPU


def recipe() -> PretrainConfig:
    """The synthetic series in a network that trains in a blink."""
    small = tiny.recipe()
    data = demo().data.model_copy(
        update={"window": 16, "stride": 16, "channels": "independent", "normalise": "window", "parts": (400, 80, 80)}
    )
    return override(small.model_copy(update={"data": data}), {"train.batch": 16})


def _moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())


def test_the_ridge_finds_a_linear_map_and_its_error_is_the_true_one() -> None:
    draw = torch.Generator().manual_seed(0)
    x, held = (torch.randn(200, 5, generator=draw).double() + 2 for _ in range(2))
    weights, noise = torch.randn(5, 3, generator=draw).double(), torch.randn(200, 3, generator=draw).double()
    noise *= 0.1
    ridge, error = fit_ridge(_moments(x, x @ weights + 1), _moments(held, held @ weights + 1 + noise))
    assert torch.allclose(ridge.weights.double(), weights, atol=0.02)
    true = (held @ weights + 1 + noise - ridge(held.float())).square().mean()
    assert error == pytest.approx(float(true), rel=1e-3)


def test_the_strength_is_chosen_on_the_held_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 25, generator=draw).double(), torch.randn(30, 1, generator=draw).double()
    held, nothing = torch.randn(200, 25, generator=draw).double(), torch.randn(200, 1, generator=draw).double()
    shy, _ = fit_ridge(_moments(x, y), _moments(held, nothing))
    bold, _ = fit_ridge(_moments(x, y), _moments(x, y))
    assert shy.weights.norm() < 0.1 * bold.weights.norm(), "noise is best not predicted"


def test_a_straight_line_is_forecast_and_scored_in_its_own_units(tmp_path: Path) -> None:
    """A window normalised by itself has the same future everywhere on a line: only its way back tells them apart."""
    line = torch.arange(120.0)[:, None].numpy()
    data = adapter(write_csv(tmp_path, line), normalise="window")
    row = best_ridge(data, raw_features, 5, 1000, CPU)
    assert row["mse"] < 1e-2
    persistence = score(data, "test", 5, CPU, lambda batch: repeat_last(data, batch))
    steps = torch.arange(1.0, 6) / line[:60].std()
    assert persistence["mae"] == pytest.approx(float(steps.mean()), rel=1e-3)
    assert persistence["mse"] == pytest.approx(float(steps.square().mean()), rel=1e-3)


def test_persistence_repeats_the_last_value_that_is_there(tmp_path: Path) -> None:
    data = adapter(write_csv(tmp_path, walk()))
    batch = {"series": torch.tensor([[[1.0], [2.0], [0.0]]]), "future": torch.zeros(1, 2, 1)}
    assert repeat_last(data, batch).flatten().tolist() == [0.0, 0.0]
    batch["observed"] = torch.tensor([[[True], [True], [False]]])
    assert repeat_last(data, batch).flatten().tolist() == [2.0, 2.0]


def test_dlinear_is_linear_in_the_window_and_starts_as_its_mean(tmp_path: Path) -> None:
    data = adapter(write_csv(tmp_path, walk()))
    model = DLinear(12, 4)
    batch = data.forecasts("train", 4).__getitems__([0, 9])
    out = model(data, batch, causal=True)
    assert torch.allclose(out, batch["series"].mean(1, keepdim=True).expand_as(out), atol=1e-5)
    nn.init.normal_(model.trend.weight)
    one, two = (model(data, {"series": batch["series"][i : i + 1]}, causal=True) for i in range(2))
    both = model(data, {"series": batch["series"].sum(0, keepdim=True)}, causal=True)
    assert torch.allclose(both, one + two, atol=1e-3)
    assert scaled_future(data, batch).shape == out.shape


def test_forecast_writes_every_row_and_finds_trained_networks_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["pretrain", "tests.test_forecast:recipe", f"out={run}"]) == 0
    words = ["forecast", run, "horizons=[4,8]", "finetune=[4]", "steps=3", "fit_samples=200"]
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "forecast.json").read_text())
    names = ["frozen", "frozen, random weights", "linear on the raw window", "persistence"]
    trained = ["fine-tuned", "fine-tuned, random weights", "DLinear"]
    assert [row["name"] for row in found["horizons"]["4"]] == names + trained
    assert [row["name"] for row in found["horizons"]["8"]] == names
    assert found["windows"] == {"4": 4 * 77, "8": 4 * 73}
    assert "persistence" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "forecast").rglob("*")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "run" / "forecast.json").read_text())["horizons"] == found["horizons"]
    assert main(["bench", f"{run}/forecast/4_predictor"]) == 2
    assert "is a run of `nepa forecast`" in capsys.readouterr().err


def test_what_forecast_cannot_do_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recipe().data
    assert isinstance(data, TimeSeries)
    with pytest.raises(UserError, match=r"81 steps after data.window=16 do not fit in the 80 rows of the test part"):
        data.forecasts("test", 81)
    assert main(["pretrain", "tests.tiny:recipe", f"out={tmp_path / 'run'}"]) == 0
    assert main(["forecast", str(tmp_path / "run")]) == 2
    assert "forecast is for series" in capsys.readouterr().err
    assert main(["forecast", str(tmp_path / "run"), "model.depth=3"]) == 2
    assert main(["forecast", "tests.tiny:recipe"]) == 2
