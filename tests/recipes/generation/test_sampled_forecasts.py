"""Sampled forecasts: series whose law is known, how steps lie in tokens, and the task through the command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from modalities.timeseries import TimeSeries
from nepa_core.basics import Batch, UserError
from nepa_core.flow import FlowConfig
from nepa_core.model import NEPA
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes.cli import main
from recipes.generation import futures
from recipes.generation.decoders import DecoderConfig, fit_flow, new_flow
from recipes.generation.futures import (
    FIGURES,
    HEAD_LR,
    Sampler,
    Scores,
    best_season,
    layout_of,
    pairs_of,
    read_on,
    repeat_season,
    rolled_out,
    scores_of,
    with_residuals,
)
from recipes.generation.sampled_forecasts import sample_forecasts
from recipes.readout.forecasters import chosen, repeat_last
from recipes.readout.forecasting import ForecastOptions
from recipes.report.sampled_forecasts import verdict
from recipes.report.summaries import SampledSummary, ScoreDifference
from recipes.training.starting import build_model
from tests import tiny
from tests.modalities.test_timeseries import adapter, walk, write_csv
from tests.recipes.readout.test_forecast import recipe as tiny_recipe
from tests.summaries import check_summary
from tests.tiny import CPU


def network(data: TimeSeries, **changes: Any) -> NEPA:
    torch.manual_seed(0)
    config = PredictorConfig.model_validate(tiny.recipe().model.model_dump() | {"layer_scale": 1.0, **changes})
    return NEPA(config, data.embedder(config.dim)).eval()


def figures(scores: Scores) -> dict[str, float]:
    return dict(zip(FIGURES, scores.windows.mean(1).tolist(), strict=True))


def continued(data: TimeSeries, horizon: int, *, samples: int, steps: int, **changes: Any) -> Sampler:
    model, layout = network(data, **changes), layout_of(data, data.forecasts("validation", horizon))
    pairs = pairs_of(model, data, layout, horizon, 10_000, CPU, causal=True)
    config = DecoderConfig(flow=FlowConfig(width=64), steps=steps, lr=HEAD_LR)
    head = fit_flow(new_flow(pairs, config), pairs, config, CPU).eval().requires_grad_(False)
    return rolled_out(model, head, data, layout, horizon, samples, causal=True)


# ------------------------------------------------------------------------------------------- tokens and steps


@pytest.mark.parametrize("channels", ["independent", "mixing"])
@pytest.mark.parametrize("normalise", ["none", "window"])
def test_tokens_behind_a_look_back_are_those_of_the_true_future(tmp_path: Path, channels: str, normalise: Any) -> None:
    data = adapter(write_csv(tmp_path, walk()), channels=channels, normalise=normalise)
    layout = layout_of(data, data.forecasts("validation", 6))
    assert (layout.patch, layout.steps, layout.tokens, layout.places(6), layout.places(7)) == (3, 12, 4, 2, 3)
    batch = data.forecasts("train", 6).__getitems__([0, 7, 20])
    tokens = read_on(data, layout, batch, batch["future"])
    long = {"series": torch.cat((batch["series"], batch["future"]), 1)}
    whole = data.model_copy(update={"window": 18, "normalise": "none"}).tokenize(long)
    assert torch.equal(tokens.coords, whole.coords)
    mean, std = data.window_scale(batch)
    own = layout.laid((long["series"] - mean) / std)
    assert torch.allclose(tokens.values, own, atol=1e-5)
    assert torch.equal(tokens.values[:, :4], data.tokenize(batch).values), (
        "the look-back as it is read without a future"
    )
    assert torch.allclose(layout.steps_of(own[:, 4:]), (batch["future"] - mean) / std)


class OneChannelATokens(TimeSeries):
    """Each token holds one channel; the second coordinate says which."""

    def tokenize(self, batch: Batch) -> Tokens:
        values = rearrange(
            (batch["series"] - self.scale(batch)[0]) / self.scale(batch)[1], "b (n p) c -> b (n c) p", p=3
        )
        return Tokens(values, torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0)))

    def token_dim(self) -> int:
        return self.patch


class ChannelFirst(TimeSeries):
    """The steps of the first channel, then those of the second."""

    def tokenize(self, batch: Batch) -> Tokens:
        return Tokens(rearrange(batch["series"], "b (n p) c -> b n (c p)", p=3), torch.arange(0.0, 12, 3)[:, None])


class Squared(TimeSeries):
    """Tokens from which no sign comes back."""

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return Tokens(tokens.values.square(), tokens.coords)


@pytest.mark.parametrize("kind", [OneChannelATokens, ChannelFirst])
def test_other_adapters_are_continued_as_they_lay_out_their_tokens(tmp_path: Path, kind: type[TimeSeries]) -> None:
    data = kind.model_validate(adapter(write_csv(tmp_path, walk())).model_dump())
    layout = layout_of(data, data.forecasts("validation", 4))
    batch = data.forecasts("train", 6).__getitems__([0, 7])
    tokens = read_on(data, layout, batch, batch["future"])
    if kind is OneChannelATokens:
        assert layout.places(4) == 4
        assert tokens.coords.tolist() == torch.cartesian_prod(torch.arange(6.0), torch.arange(2.0)).tolist()
        assert torch.equal(tokens.values[:, 8], batch["future"][:, :3, 0])
    else:
        assert tokens.coords[:, 0].tolist() == [0, 3, 6, 9, 12, 15]
        assert torch.equal(tokens.values[:, 4, 3:], batch["future"][:, :3, 1])
    sampler = continued(data, 4, samples=3, steps=2)
    assert sampler(batch | {"future": batch["future"][:, :4]}, torch.zeros(2)).shape == (3, 2, 4, 2)


def test_tokens_that_do_not_give_the_series_back_are_refused(tmp_path: Path) -> None:
    data = Squared.model_validate(adapter(write_csv(tmp_path, walk())).model_dump())
    with pytest.raises(UserError, match=r"^samples= continues tokens that hold .*; those of Squared don't"):
        layout_of(data, data.forecasts("validation", 4))


def test_the_head_learns_the_future_alone_and_a_flat_look_back_teaches_it_nothing(tmp_path: Path) -> None:
    values = walk()
    values[:14] = values[0]
    data = adapter(write_csv(tmp_path, values), normalise="window", channels="independent")
    model, layout = network(data), layout_of(data, data.forecasts("validation", 6))
    pairs = pairs_of(model, data, layout, 6, 10_000, CPU, causal=True)
    windows = data.forecasts("train", 6)
    batch = windows.__getitems__(list(range(len(windows))))
    mean, std = data.scale(batch)
    own = (batch["future"] - mean) / std
    flat = (own.abs() > 100).flatten(1).any(1)
    assert 0 < int(flat.sum()) < 10
    assert sorted(pairs.coords.unique().tolist()) == [4, 5], "places behind the look-back"
    assert len(pairs.values) >= 2 * int((~flat).sum())
    assert float(pairs.values.abs().max()) <= 100
    whole = {"series": torch.cat((batch["series"], batch["future"]), 1)[~flat]}
    tokens = Tokens(layout.laid((whole["series"] - mean[~flat]) / std[~flat]), torch.arange(6.0)[:, None])
    with torch.no_grad():
        wanted = model(tokens, causal=True).predictions[:, 4:6]
    nearest = torch.cdist(wanted.flatten(0, 1), pairs.prediction, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert float(nearest.max()) < 1e-4, "from the place before each"


# ------------------------------------------------------------------------------------------ series of known law


def periodic(rows: int = 700, period: int = 12) -> np.ndarray:
    """The same numbers over and over."""
    once = np.random.default_rng(0).normal(size=(period, 1))
    return np.tile(once, (rows // period + 1, 1))[:rows]


def regression(rows: int, factor: float = 0.8) -> np.ndarray:
    """x[t] = factor x[t - 1] + e[t], with unit variance."""
    noise, found = np.random.default_rng(1).normal(size=rows) * math.sqrt(1 - factor**2), np.zeros((rows, 1))
    for step in range(1, rows):
        found[step] = factor * found[step - 1] + noise[step]
    return found


@pytest.mark.slow
def test_a_series_that_repeats_itself_is_known_to_the_season_and_soon_to_the_flow(tmp_path: Path) -> None:
    data = adapter(write_csv(tmp_path, periodic()), window=24, patch=6, parts=(400, 150, 150))
    season = best_season(data, 10, 24, CPU)
    assert season in (12, 24)
    windows = chosen(data, "test", 10, 40)
    for point, most in ((lambda batch: repeat_season(batch, season), 1e-6), (partial(repeat_last, data), 9.0)):
        scores = scores_of(data, windows, with_residuals(data, point, 10, 100, 20, CPU), 20, CPU)
        assert scores.windows.shape == (6, 40)
        assert figures(scores)["crps"] < most
    assert figures(scores)["crps"] > 0.4, "the last value says little of what follows"
    found = figures(scores_of(data, windows, continued(data, 10, samples=20, steps=250), 20, CPU))
    assert found["crps"] < 0.1
    assert found["pinball_50"] < 0.1


def test_residuals_of_a_right_model_cover_what_they_should(tmp_path: Path) -> None:
    """The best forecast of an autoregression of the first order is a power of its last value."""
    data = adapter(write_csv(tmp_path, regression(9000)), parts=(1000, 4000, 4000))
    powers = 0.8 ** torch.arange(1.0, 7)

    def best(batch: Batch) -> Tensor:
        return batch["series"][:, -1:] * powers[None, :, None]

    windows = chosen(data, "test", 6, 1500)
    scores = scores_of(data, windows, with_residuals(data, best, 6, 2000, 99, CPU), 99, CPU)
    found = figures(scores)
    assert found["coverage_50"] == pytest.approx(0.5, abs=0.03)
    assert found["coverage_90"] == pytest.approx(0.9, abs=0.02)
    spread = (1 - 0.8 ** (2 * torch.arange(1.0, 7))).sqrt()  # of the error so many steps ahead
    assert scores.steps.tolist() == pytest.approx((spread / math.sqrt(math.pi)).tolist(), rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("normalise", ["none", "window"])
def test_a_flow_on_random_features_samples_an_autoregression(tmp_path: Path, normalise: Any) -> None:
    """Within 12 % of the best CRPS that there is, and intervals that cover; the last patch of the horizon is cut."""
    data = adapter(
        write_csv(tmp_path, regression(9000)), window=32, patch=4, parts=(5000, 1000, 3000), normalise=normalise
    )
    sampler = continued(data, 6, samples=100, steps=2500, dim=32, mlp_dim=64)
    scores = scores_of(data, chosen(data, "test", 6, 400), sampler, 100, CPU)
    spread = (1 - 0.8 ** (2 * torch.arange(1.0, 7))).sqrt()
    assert figures(scores)["crps"] < 1.12 * float(spread.mean()) / math.sqrt(math.pi)
    assert figures(scores)["coverage_50"] == pytest.approx(0.5, abs=0.06)
    assert figures(scores)["coverage_90"] == pytest.approx(0.9, abs=0.04)


def test_residuals_are_of_the_same_channel_and_in_units_of_the_look_back(tmp_path: Path) -> None:
    """One channel is forecast without error, and in windows normalised one by one errors grow with the window."""
    values = np.concatenate((periodic(400, 4), walk(400, 1)), 1)
    data = adapter(write_csv(tmp_path, values), channels="independent", normalise="window", parts=(200, 100, 100))
    point = partial(repeat_season, season=4)
    sampler = with_residuals(data, point, 5, 1000, 8, CPU)
    batch = data.forecasts("test", 5).__getitems__([0, 1])
    apart = sampler(batch, torch.tensor([0, 1])) - point(batch)
    assert float(apart[:, 0].abs().max()) < 1e-5
    assert float(apart[:, 1].abs().min()) > 1e-5
    larger = batch | {"series": 3 * batch["series"], "future": 3 * batch["future"]}
    again = with_residuals(data, point, 5, 1000, 8, CPU)(larger, torch.tensor([0, 1])) - point(larger)
    assert torch.allclose(again[:, 1], 3 * apart[:, 1], rtol=1e-4)


def test_a_missing_step_repeats_the_one_before() -> None:
    batch = {"series": torch.tensor([[[1.0], [2.0], [3.0], [0.0]]]), "future": torch.zeros(1, 5, 1)}
    batch["observed"] = torch.tensor([[[True], [True], [True], [False]]])
    assert repeat_season(batch, 2).flatten().tolist() == [3, 3, 3, 3, 3]
    assert repeat_season(batch, 3).flatten().tolist() == [2, 3, 3, 2, 3]
    assert repeat_season(batch, 1).flatten().tolist() == [3] * 5


@pytest.mark.parametrize("bos", [True, False])
def test_missing_tokens_of_a_look_back_are_made_and_what_stands_there_is_not_read(tmp_path: Path, bos: bool) -> None:
    values = walk()
    values[30, 0] = math.nan
    data = adapter(write_csv(tmp_path, values))
    batch = {name: value[:2] for name, value in data.forecasts("test", 4).__getitems__([0, 9]).items()}
    batch["observed"][0, 9:] = False
    found = [
        continued(data, 4, samples=5, steps=3, bos=bos)(batch | {"series": batch["series"] + other}, torch.zeros(2))
        for other in (0.0, 100.0 * ~batch["observed"])
    ]
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_scores_are_the_same_however_many_windows_are_sampled_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = adapter(write_csv(tmp_path, walk()))
    windows = chosen(data, "test", 4, 20)

    def around(batch: Batch, _: Tensor) -> Tensor:
        return repeat_last(data, batch) + torch.linspace(-1, 1, 19)[:, None, None, None]

    whole = scores_of(data, windows, around, 19, CPU)
    monkeypatch.setattr(futures, "_ROLLED", 19)
    single = scores_of(data, windows, around, 19, CPU)
    assert all(torch.allclose(*pair) for pair in zip(whole, single, strict=True))
    batch = windows.__getitems__([0, 1, 2])
    assert torch.equal(whole.truth, batch["future"][..., 0])
    assert torch.equal(whole.seen, batch["series"][..., 0])
    assert torch.allclose(whole.fans[2], repeat_last(data, batch)[..., 0])
    assert whole.fans.shape == (5, 3, 4)


# ------------------------------------------------------------------------------------------------ the command

WORDS = ("horizons=4", "samples=19", "test_windows=30", "flow_steps=3", "fit_samples=200")
ROWS = [
    "NEPA, flow head",
    "random weights, flow head",
    "linear, residuals",
    "seasonal naive, residuals",
    "persistence, residuals",
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs of the tiny series."""
    runs = [str(tmp_path_factory.mktemp("runs") / seed) for seed in "01"]
    for seed, run in enumerate(runs):
        tiny.training(override(tiny_recipe(), {"train.seed": seed}), Path(run), evaluate=lambda _: {})
    return runs


@pytest.mark.slow
def test_sampled_forecasts_are_written_and_finished_rows_found_again(
    seeds: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = seeds[0]
    calls = 0

    def counted(*given: Any) -> Scores:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return scores_of(*given)

    monkeypatch.setattr("recipes.generation.sampled_forecasts.scores_of", counted)
    assert main(["forecast", run, *WORDS]) == 130
    assert main(["forecast", run, *WORDS]) == 0
    assert calls == 6, "two of the five rows were there, one was begun"
    said = capsys.readouterr()
    assert said.err.count("(kept)") == 2
    found = check_summary(Path(run) / "forecast_samples.json", SampledSummary)
    assert [[row["name"] for row in rows] for rows in found["horizons"].values()] == [ROWS]
    assert (found["windows"], found["look_back"], found["places"]) == ({"4": 30}, 16, 4)
    assert "VERDICT  4 steps ahead samples of the pre-trained network " in said.out
    assert "the best rival" in said.out
    assert said.out.rstrip().endswith(f"Report: {Path(run) / 'forecast/index.html'}")
    page = (Path(run) / "forecast/index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for row in found["horizons"]["4"]:
        assert 0 <= row["coverage_50"] <= row["coverage_90"] <= 1
        assert set(row["half"]) == set(FIGURES)
        with np.load(Path(run) / row["folder"] / "scores.npz") as left:
            assert float(left["windows"][0].mean()) == pytest.approx(row["crps"], rel=1e-6)
    for each in found["differences"]["4"]:
        own, rival = (next(r for r in found["horizons"]["4"] if r["name"] == name) for name in (ROWS[0], each["rival"]))
        assert each["mean"] == pytest.approx(rival["crps"] - own["crps"], abs=1e-6)
    assert "season" in found["horizons"]["4"][3]
    assert main(["forecast", run, *WORDS[:3], "flow_steps=4", "fit_samples=200", "season=5"]) == 0
    assert capsys.readouterr().err.count("(kept)") == 2, "linear and persistence"
    again = json.loads((Path(run) / "forecast_samples.json").read_text())
    assert again["horizons"]["4"][3]["season"] == 5
    (Path(run) / again["horizons"]["4"][2]["folder"] / "scores.npz").write_bytes(b"torn")
    assert main(["forecast", run, *WORDS]) == 2
    assert "and give the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_several_seeds_stand_in_one_table_of_samples(seeds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = seeds
    shutil.rmtree(Path(one) / "forecast", ignore_errors=True)
    assert main(["forecast", one, *WORDS, f"also={two}"]) == 0
    assert "and over seeds" in capsys.readouterr().out
    both = check_summary(Path(one) / "forecast_samples_seeds.json", SampledSummary)
    each = [json.loads((Path(run) / "forecast_samples.json").read_text()) for run in (one, two)]
    assert (both["seed"], both["runs"]) == ([0, 1], [one, two])
    for number, row in enumerate(both["horizons"]["4"]):
        alone = [found["horizons"]["4"][number]["crps"] for found in each]
        assert row["crps"] == pytest.approx(sum(alone) / 2)
        assert (alone[0] == alone[1]) == (number > 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("samples=5", "samples=5: the central interval of 90 % needs 19 samples or more"),
        ("season=17", "season=17 is longer than the look-back of 16 steps"),
        ("season=1", "season=1"),
        ("test_windows=0", "test_windows=0"),
        ("flow_steps=0", "flow_steps=0"),
        ("finetune=4", "finetune= trains point forecasts"),
    ],
)
def test_what_can_not_be_sampled_is_one_line(
    seeds: list[str], words: str, said: str, fails: Callable[..., str]
) -> None:
    usual = [word for word in WORDS if word.partition("=")[0] != words.partition("=")[0]]
    assert said in fails("forecast", seeds[1], *usual, words)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.patch_order": "reverse"}, "in another order than that of time: pre-train with data.patch_order=raster"),
        ({"objective.causal": False}, "trained with objective.causal=false"),
        ({"objective.shift": False}, "trained with objective.shift=false"),
        ({"model.learned_positions": 4}, "samples= reads 5 places for 4 steps ahead, and model.learned_positions=4"),
    ],
)
def test_a_network_that_says_nothing_of_what_comes_behind_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = override(tiny_recipe(), changes)
    options, run = ForecastOptions(horizons=(4,), samples=19), Run(tmp_path / "run")
    with pytest.raises(UserError, match=said):
        sample_forecasts(config, build_model(config), run, options, World(0, 1, CPU))
    assert not run.path.exists()


def test_a_run_without_a_series_is_refused(tmp_path: Path, fails: Callable[..., str]) -> None:
    tiny.training(tiny.recipe(), tmp_path / "run", evaluate=lambda _: {})
    assert "forecast is for series: Waves has no forecasts" in fails("forecast", str(tmp_path / "run"), "samples=20")


def test_the_headline_names_all_that_beats_the_samples() -> None:
    def apart(rival: str, mean: float) -> ScoreDifference:
        return {"rival": rival, "crps": 0.5 + mean, "mean": mean, "half": 0.1, "df": 3.0}

    rivals = [apart(ROWS[1], 0.3), apart(ROWS[2], -0.3), apart(ROWS[3], -0.2), apart(ROWS[4], 0.2)]
    (line,) = verdict({"differences": {"96": rivals}})
    assert line == (
        "VERDICT  96 steps ahead samples of the pre-trained network beat random weights (CRPS lower by 0.30 ± 0.10), "
        "and are beaten by linear, residuals (CRPS higher by 0.30 ± 0.10), the best rival; seasonal naive, residuals "
        "beats them, too."
    )
