"""Forecasting: the ridge, its baselines, and the task through the command."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from modalities.timeseries import TimeSeries, Windows
from nepa_core.basics import Batch, UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.readout.forecasters import (
    DLinear,
    Moments,
    _predict,
    best_ridge,
    build,
    chosen,
    fit_ridge,
    fitted_ridges,
    in_series_units,
    make_step,
    raw_features,
    repeat_last,
    score,
    short,
    train,
)
from recipes.readout.forecasting import ForecastOptions as Options
from recipes.report.forecast import cell, paired_differences, significant, stretches, verdict
from recipes.report.summaries import ForecastFigures, ForecastSummary, SeedsSummary
from recipes.timeseries import demo
from tests import tiny
from tests.modalities.test_timeseries import adapter, walk, write_csv
from tests.summaries import check_summary
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


def bursts(rows: int = 1200, columns: int = 1) -> np.ndarray:
    """Waves under noise, flat in 3 % of the rows: as a sensor that stops for a while."""
    draw = np.random.default_rng(0)
    steps = np.arange(rows)[:, None]
    values = 3 * np.sin(steps / np.arange(4, 4 + columns)) + 0.3 * draw.normal(size=(rows, columns))
    values[400:418] = values[400]
    values[700:718] = values[700]
    return values


CASES = [("independent", "window"), ("mixing", "window"), ("mixing", "none"), ("independent", "none")]


@pytest.mark.parametrize("channels", ["independent", "mixing"])
def test_flat_windows_do_not_spoil_the_linear_row(tmp_path: Path, channels: str) -> None:
    """In units of their own deviation they would be all that counts."""
    root = write_csv(tmp_path, bursts(columns=2))
    data = adapter(root, normalise="window", channels=channels, parts=(800, 200, 200))
    windows = data.forecasts("train", 8)
    std = data.scale(windows.__getitems__(list(range(len(windows)))))[1]
    assert 0.005 < float((std < 1e-4).float().mean()) < 0.04
    row = best_ridge(data, raw_features, 8, 20_000, CPU)
    repeated = score(data, "test", 8, CPU, lambda batch: repeat_last(data, batch))
    assert row["mse"] < 0.2 * repeated["mse"]


@pytest.mark.parametrize(("channels", "normalise"), CASES)
def test_the_ridge_is_the_least_squares_fit_of_the_z_scored_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: str, normalise: str
) -> None:
    """Beside one that is solved window by window, whose unknowns are weights and offset in the window's own units."""
    monkeypatch.setattr("recipes.readout.forecasters.STRENGTHS", (1e-8,))
    root = write_csv(tmp_path, bursts(columns=2))
    data = adapter(root, normalise=normalise, channels=channels, parts=(800, 200, 200))
    ridge, validation = fitted_ridges(data, raw_features, 3, 20_000, CPU)["raw"]

    def predicted(batch: Batch) -> torch.Tensor:
        return in_series_units(data, batch, rearrange(ridge(raw_features(data, batch)["raw"]), "b (h c) -> b h c", h=3))

    windows = data.forecasts("train", 3)
    batch = windows.__getitems__(list(range(len(windows))))
    mean, std = data.scale(batch)
    x = torch.cat((raw_features(data, batch)["raw"], torch.ones(len(windows), 1)), 1).double()
    best = 0.0
    for c in range(batch["future"].shape[2]):
        design, y = x * std[:, 0, c, None], (batch["future"] - mean)[..., c].double()
        best += (
            float((design @ torch.linalg.lstsq(design, y, rcond=1e-5, driver="gelsd").solution - y).square().mean())
            / batch["future"].shape[2]
        )
    assert float((predicted(batch) - batch["future"]).square().mean()) == pytest.approx(best, rel=1e-3)
    assert score(data, "validation", 3, CPU, predicted)["mse"] == pytest.approx(validation, rel=1e-3)


@pytest.mark.parametrize("network", ["predictor", "dlinear"])
def test_networks_train_on_the_error_that_is_reported(tmp_path: Path, network: Any) -> None:
    changes = {"data.source": "file", "data.root": write_csv(tmp_path, bursts()), "data.parts": (800, 200, 200)}
    config = short(override(recipe(), changes | {"data.stride": 1}), None, network, 4, steps=3, samples=50)
    model = build(config)
    windows = config.data.forecasts("validation", 4)
    loss = make_step(config)(model, windows.__getitems__(list(range(len(windows))))).loss
    measured = score(config.data, "validation", 4, CPU, partial(_predict, config, model))
    assert float(loss.detach()) == pytest.approx(measured["mse"], rel=1e-5)
    assert float(measured["errors"].mean()) == measured["mse"]
    assert measured["errors"].shape == (len(windows),)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.3351, "1.335"),
        (0.43651, "0.437"),
        (0.0123, "0.0123"),
        (7.1e-13, "7.10e-13"),
        (0, "0.000"),
        (3e-3, "0.00300"),
        (3e-5, "3.00e-05"),
    ],
)
def test_small_errors_keep_their_digits(value: float, shown: str) -> None:
    assert significant(value) == shown


def test_a_spread_that_is_not_zero_is_not_printed_as_zero() -> None:
    assert cell([0.437, 0.439]) == "0.438 ± 0.001"
    assert cell([0.437, 0.43702]) == "0.437 ± 1e-05"
    assert cell([2e-13, 4e-13]) == "3.00e-13 ± 1e-13"
    assert cell([0.437]) == "0.437"


def test_stretches_hold_all_channels_and_are_as_long_as_a_window_with_its_future(tmp_path: Path) -> None:
    values = walk()
    values[100, 1] = math.nan
    for channels, count in (("independent", 2), ("mixing", 1)):
        windows = adapter(write_csv(tmp_path, values), channels=channels).forecasts("test", 4)
        found = stretches(windows)
        assert len(found) == len(windows) < 37 * count
        numbers = torch.arange(len(windows)) if windows.kept is None else windows.kept
        starts = 37  # of which two stretches of 16 and more can be made
        assert found.tolist() == [number // count * 2 // starts for number in numbers.tolist()]


def test_intervals_over_overlapping_windows_cover_what_they_should(tmp_path: Path) -> None:
    """Differences whose errors at every step are noise: the mean over windows is 0, and windows share most steps."""
    windows = adapter(write_csv(tmp_path, walk(800, 1)), parts=(60, 20, 720)).forecasts("test", 24)
    assert isinstance(windows, Windows)
    clusters, draw = stretches(windows), torch.Generator().manual_seed(0)
    hits = {"stretches": 0, "rows": 0}
    for _ in range(400):
        steps = torch.randn(720, generator=draw).double()
        errors = {"frozen": torch.zeros(1, 697).double(), "persistence": steps.unfold(0, 24, 1).mean(1)[None]}
        for name, of in (("stretches", clusters), ("rows", torch.arange(697))):
            (found,) = paired_differences(errors, of)
            hits[name] += abs(found["mean"]) < found["half"]
    assert 0.93 < hits["stretches"] / 400 < 0.99
    assert hits["rows"] / 400 < 0.6


def test_differences_are_paired_and_signed(tmp_path: Path) -> None:
    """Of two rows that differ by a constant the interval is a point, however both vary."""
    draw = torch.Generator().manual_seed(0)
    frozen = torch.rand(2, 60, generator=draw).double()
    errors = {"frozen": frozen, "frozen, random weights": frozen + 0.25, "persistence": frozen.flip(1)}
    random, repeated = paired_differences(errors, torch.arange(60) // 10)
    assert (random["row"], random["rival"]) == ("frozen", "frozen, random weights")
    assert (random["mean"], random["half"]) == (pytest.approx(0.25), pytest.approx(0, abs=1e-9))
    assert repeated["mean"] == pytest.approx(0)
    assert repeated["half"] > 0.03
    assert repeated["mse"] == pytest.approx(float(frozen.mean()))


def difference(rival: str, mean: float, half: float | None, mse: float) -> dict[str, Any]:
    return {"row": "frozen", "rival": rival, "mse": mse, "mean": mean, "half": half, "df": 3.0}


def test_the_verdict_names_the_best_baseline_and_what_the_intervals_cover() -> None:
    pairs = [
        difference("frozen, random weights", 0.0103, 0.0021, 0.4),
        difference("linear on the raw window", -0.00123, 0.00042, 0.38),
        difference("persistence", 0.9, 0.1, 1.3),
    ]
    one: dict[str, Any] = {"stretches": {"96": 6}, "seed": 0}
    text, rest = verdict([one], {"96": pairs})
    assert text == (
        "VERDICT  96 steps ahead frozen pre-trained weights beat random weights (MSE lower by 0.0103 ± 0.0021), and "
        "are beaten by linear on the raw window (MSE higher by 0.00123 ± 0.00042), the best baseline."
    )
    assert "over the test windows alone; another pre-training may differ" in rest
    assert "(96: 6)" in rest
    assert "over seeds and test windows together (2 seeds)" in verdict([one, one], {"96": pairs})[-1]
    pairs[0] = difference("frozen, random weights", 0.0103, 0.011, 0.4)
    assert "are level with random weights (MSE lower by 0.010 ± 0.011)" in verdict([one], {"96": pairs})[0]
    pairs[0] = difference("frozen, random weights", -0.0045, 0.12, 0.4)
    assert "are level with random weights (MSE higher by 0.004 ± 0.120)" in verdict([one], {"96": pairs})[0]
    pairs[0] = difference("frozen, random weights", -3e-13, 1e-13, 0.4)
    assert "are beaten by random weights (MSE higher by 3.0e-13 ± 1.0e-13)" in verdict([one], {"96": pairs})[0]
    pairs[0] = difference("frozen, random weights", -0.0103, None, 0.4)
    assert "can't be judged beside random weights" in verdict([one], {"96": pairs})[0]


WORDS = ("horizons=[4,8]", "finetune=[4]", "steps=3", "fit_samples=200")


def pretrained(folder: Path, seed: int = 0) -> str:
    assert main(["pretrain", "tests.recipes.readout.test_forecast:recipe", f"out={folder}", f"train.seed={seed}"]) == 0
    return str(folder)


def table(run: str, name: str = "forecast.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / name).read_text())
    return found


def test_forecast_writes_every_row_and_finds_finished_ones_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrained(tmp_path / "run")
    assert main(["forecast", run, *WORDS]) == 0
    found = check_summary(Path(run) / "forecast.json", ForecastSummary)
    for row in found["horizons"]["4"]:
        check_summary(Path(run) / row["folder"] / "summary.json", ForecastFigures)
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
    errors = np.load(tmp_path / "run" / found["horizons"]["4"][0]["folder"] / "errors.npy")
    assert errors.shape == (4 * 77,)
    assert errors.mean() == pytest.approx(found["horizons"]["4"][0]["mse"], rel=1e-5)
    rivals = [(each["row"], each["rival"]) for each in found["differences"]["4"]]
    baselines = ["linear on the raw window", "persistence", "DLinear"]
    assert rivals == [(row, f"{row}, random weights") for row in ("frozen",)] + [
        ("frozen", each) for each in baselines
    ] + [("fine-tuned", each) for each in ("fine-tuned, random weights", *baselines)]
    assert "VERDICT  4 steps ahead frozen pre-trained weights " in said.out
    assert "another pre-training may differ" in said.out
    assert main(["forecast", run, *WORDS[:3], "fit_samples=100"]) == 0
    assert capsys.readouterr().err.count("(kept)") == 2, "persistence is fitted on nothing"
    assert table(run)["horizons"]["4"][:3] != found["horizons"]["4"][:3]
    tuned = next((tmp_path / "run" / "forecast").glob("4_fine-tuned_[0-9a-f]*"))
    kept = tmp_path / "run" / found["horizons"]["4"][4]["folder"]
    (kept / "errors.npy").unlink()
    capsys.readouterr()
    assert main(["forecast", run, *WORDS]) == 2
    assert f"delete {kept} and give the same command again" in capsys.readouterr().err
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
    assert main(["pretrain", "tests.recipes.readout.test_forecast:with_gaps", "out=run"]) == 0
    capsys.readouterr()
    assert main(["forecast", "run", "horizons=4", "fit_samples=50"]) == 0
    assert "test windows without the gaps of missing values (4: 70 scored, 4 left out)" in capsys.readouterr().out
    assert (table("run")["windows"], table("run")["left_out"]) == ({"4": 70}, {"4": 4})
    values[80:, 1] = values[83::4, 0] = math.nan
    write_csv(tmp_path, values)
    assert main(["forecast", "run", "horizons=4"]) == 2
    assert "no window of the test part has 4 steps to forecast without a missing value" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_forecast_goes_on_with_the_next_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls, words = pretrained(tmp_path / "run"), 0, ("horizons=[4,8]", "fit_samples=200")

    def counted(*given: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return best_ridge(*given)

    monkeypatch.setattr("recipes.readout.forecasting.best_ridge", counted)
    assert main(["forecast", run, *words]) == 130
    assert not (tmp_path / "run" / "forecast.json").exists()
    assert main(["forecast", run, *words]) == 0
    assert calls == 7, "two of the six ridges were there, one was begun"
    monkeypatch.undo()
    whole = pretrained(tmp_path / "whole")
    assert main(["forecast", whole, *words]) == 0
    assert table(run)["horizons"] == table(whole)["horizons"]


def test_rows_fitted_in_other_units_are_not_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = pretrained(tmp_path / "run"), ("horizons=4", "fit_samples=200")
    with monkeypatch.context() as patch:
        patch.setattr("recipes.readout.forecasting.FITTED", 1)
        assert main(["forecast", run, *words]) == 0
    assert main(["forecast", run, *words]) == 0
    assert "(kept)" not in capsys.readouterr().err


@pytest.mark.slow
def test_runs_with_other_seeds_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (pretrained(tmp_path / str(seed), seed) for seed in (0, 1))
    assert main(["forecast", one, *WORDS, f"also=[{two}]"]) == 0
    said = capsys.readouterr().out
    assert "Mean ± standard deviation over seeds 0, 1." in said
    both = check_summary(Path(one) / "forecast_seeds.json", SeedsSummary)
    alone, together = (each["differences"]["4"][0] for each in (table(one), both))
    assert together["mean"] == pytest.approx((alone["mean"] + table(two)["differences"]["4"][0]["mean"]) / 2)
    assert "over seeds and test windows together (2 seeds)" in said
    for number, row in enumerate(both["horizons"]["4"]):
        values = [table(run)["horizons"]["4"][number]["mse"] for run in (one, two)]
        assert row["mse"]["values"] == values
        assert row["mse"]["mean"] == pytest.approx(sum(values) / 2)
        same = row["name"] in ("linear on the raw window", "persistence")
        assert (values[0] == values[1]) == same, "everything else draws from the seed"
    assert main(["forecast", one, f"also=[{one}]"]) == 2
    assert "stands twice" in capsys.readouterr().err
    narrow = str(tmp_path / "narrow")
    assert (
        main(
            ["pretrain", "tests.recipes.readout.test_forecast:recipe", f"out={narrow}", "data.patch=8", "train.seed=1"]
        )
        == 0
    )
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
        if self.starts[0] == every.starts[0] and self.horizon:  # what is checked before training has no future
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
