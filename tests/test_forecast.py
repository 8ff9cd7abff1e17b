"""Forecasting: the ridge, its baselines, and the task through the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modalities.timeseries import TimeSeries, Windows
from nepa_core.basics import Batch, UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.forecast import Options
from recipes.forecasters import (
    DLinear,
    Moments,
    best_ridge,
    chosen,
    fit_ridge,
    in_series_units,
    raw_features,
    repeat_last,
    score,
    short,
    train,
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
    assert in_series_units(data, batch, out).shape == batch["future"].shape


WORDS = ("horizons=[4,8]", "finetune=[4]", "steps=3", "fit_samples=200")


def pretrained(folder: Path, seed: int = 0) -> str:
    assert main(["pretrain", "tests.test_forecast:recipe", f"out={folder}", f"train.seed={seed}"]) == 0
    return str(folder)


def table(run: str, name: str = "forecast.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / name).read_text())
    return found


def test_forecast_writes_every_row_and_finds_finished_ones_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrained(tmp_path / "run")
    assert main(["forecast", run, *WORDS]) == 0
    found = table(run)
    names = ["frozen", "frozen, random weights", "linear on the raw window", "persistence"]
    trained = ["fine-tuned", "fine-tuned, random weights", "DLinear"]
    assert [row["name"] for row in found["horizons"]["4"]] == names + trained
    assert [row["name"] for row in found["horizons"]["8"]] == names
    assert found["windows"] == {"4": 4 * 77, "8": 4 * 73}
    said = capsys.readouterr()
    assert "persistence" in said.out
    assert "every test window;" in said.out
    assert "11/11  horizon 4, DLinear: MSE" in said.err
    assert "(kept)" not in said.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "forecast").rglob("*")}
    assert main(["forecast", run, *WORDS]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert table(run)["horizons"] == found["horizons"]
    assert capsys.readouterr().err.count("(kept)") == 11
    assert main(["forecast", run, *WORDS[:3], "fit_samples=100"]) == 0
    assert capsys.readouterr().err.count("(kept)") == 2, "persistence is fitted on nothing"
    assert table(run)["horizons"]["4"][:3] != found["horizons"]["4"][:3]
    tuned = next((tmp_path / "run" / "forecast").glob("4_fine-tuned_[0-9a-f]*"))
    assert main(["bench", str(tuned)]) == 2
    assert "is a run of `nepa forecast`" in capsys.readouterr().err


def with_gaps() -> PretrainConfig:
    changes = {"data.source": "file", "data.root": "series.csv", "data.parts": (60, 20, 40), "data.stride": 1}
    return override(recipe(), changes)


def test_the_foot_counts_the_test_windows_that_gaps_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = walk()
    values[100, 1] = math.nan
    write_csv(tmp_path, values)
    assert main(["pretrain", "tests.test_forecast:with_gaps", "out=run"]) == 0
    capsys.readouterr()
    assert main(["forecast", "run", "horizons=4", "fit_samples=50"]) == 0
    assert "test windows without the gaps of missing values (4: 70 scored, 4 left out)" in capsys.readouterr().out
    assert (table("run")["windows"], table("run")["left_out"]) == ({"4": 70}, {"4": 4})
    values[80:, 1] = values[83::4, 0] = math.nan
    write_csv(tmp_path, values)
    assert main(["forecast", "run", "horizons=4"]) == 2
    assert "no window of the test part has 4 steps to forecast without a missing value" in capsys.readouterr().err


def test_a_stopped_forecast_goes_on_with_the_next_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls, words = pretrained(tmp_path / "run"), 0, ("horizons=[4,8]", "fit_samples=200")

    def counted(*given: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return best_ridge(*given)

    monkeypatch.setattr("recipes.forecast.best_ridge", counted)
    assert main(["forecast", run, *words]) == 130
    assert not (tmp_path / "run" / "forecast.json").exists()
    assert main(["forecast", run, *words]) == 0
    assert calls == 7, "two of the six ridges were there, one was begun"
    monkeypatch.undo()
    whole = pretrained(tmp_path / "whole")
    assert main(["forecast", whole, *words]) == 0
    assert table(run)["horizons"] == table(whole)["horizons"]


def test_runs_with_other_seeds_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (pretrained(tmp_path / str(seed), seed) for seed in (0, 1))
    assert main(["forecast", one, *WORDS, f"also=[{two}]"]) == 0
    assert "Mean ± standard deviation over seeds 0, 1." in capsys.readouterr().out
    both = table(one, "forecast_seeds.json")
    for number, row in enumerate(both["horizons"]["4"]):
        values = [table(run)["horizons"]["4"][number]["mse"] for run in (one, two)]
        assert row["mse"]["values"] == values
        assert row["mse"]["mean"] == pytest.approx(sum(values) / 2)
        same = row["name"] in ("linear on the raw window", "persistence")
        assert (values[0] == values[1]) == same, "everything else draws from the seed"
    assert main(["forecast", one, f"also=[{one}]"]) == 2
    assert "stands twice" in capsys.readouterr().err
    narrow = str(tmp_path / "narrow")
    assert main(["pretrain", "tests.test_forecast:recipe", f"out={narrow}", "data.patch=8", "train.seed=1"]) == 0
    capsys.readouterr()
    assert main(["forecast", one, f"also=[{narrow}]"]) == 2
    assert f"{narrow} differs from {one} in data.patch, not in train.seed alone" in capsys.readouterr().err


def test_ridge_and_networks_are_fitted_on_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe()
    assert isinstance(config.data, TimeSeries)
    every = config.data.forecasts("train", 4)
    some = chosen(config.data, "train", 4, 40)
    picked = {tuple(some[place]["series"].flatten().tolist()) for place in range(40)}
    assert len(picked) == 40
    seen: set[tuple[float, ...]] = set()
    batches = Windows.__getitems__

    def watched(self: Windows, indices: list[int]) -> Batch:
        batch = batches(self, indices)
        if self.starts[0] == every.starts[0]:
            seen.update(tuple(row.flatten().tolist()) for row in batch["series"])
        return batch

    monkeypatch.setattr(Windows, "__getitems__", watched)
    best_ridge(config.data, raw_features, 4, 40, CPU)
    assert seen == picked
    seen.clear()
    arm = short(config, None, "dlinear", 4, steps=3, samples=40)
    train(arm, Run(tmp_path / "dlinear"), World(0, 1, CPU), show=False)
    assert seen == picked


def test_the_embedded_series_can_be_forecast_at_the_default_horizons() -> None:
    data = demo().data
    assert isinstance(data, TimeSeries)
    for split in ("train", "validation", "test"):
        assert len(data.forecasts(split, max(Options().horizons)))


def test_what_forecast_cannot_do_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recipe().data
    assert isinstance(data, TimeSeries)
    with pytest.raises(UserError, match=r"81 steps after data.window=16 do not fit in the 80 rows of the test part"):
        data.forecasts("test", 81)
    with pytest.raises(UserError, match=r"data.parts=\[400, 0, 80\] leaves no validation rows"):
        data.model_copy(update={"parts": (400, 0, 80)}).forecasts("validation", 4)
    assert main(["pretrain", "tests.tiny:recipe", f"out={tmp_path / 'run'}"]) == 0
    assert main(["forecast", str(tmp_path / "run")]) == 2
    assert "forecast is for series" in capsys.readouterr().err
    assert main(["forecast", str(tmp_path / "run"), "model.depth=3"]) == 2
    assert main(["forecast", "tests.tiny:recipe"]) == 2
