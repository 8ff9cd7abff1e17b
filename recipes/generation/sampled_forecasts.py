"""The table of `nepa forecast samples=`: its rows, kept in the run, and what they say of each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from nepa_core.basics import UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.rollout import check_generates
from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.distributed import World
from nepa_core.runtime.meter import say_progress
from nepa_core.runtime.run import Run
from nepa_core.verdict.intervals import over_both
from recipes.configs import PretrainConfig
from recipes.generation.decoders import DecoderConfig, fit_flow, new_flow
from recipes.generation.futures import (
    FIGURES,
    HEAD_LR,
    SOLVER_STEPS,
    Layout,
    Point,
    Sampler,
    Scores,
    best_season,
    layout_of,
    pairs_of,
    repeat_season,
    rolled_out,
    scores_of,
    with_residuals,
)
from recipes.readout.features import weights_digest
from recipes.readout.forecasters import check_windows, chosen, fitted_ridges, predict_by, raw_features, series_digest
from recipes.readout.forecasting import ForecastOptions, Row
from recipes.report.forecast import significant, stretches
from recipes.report.provenance import provenance
from recipes.report.sampled_forecasts import NEPA_FLOW, RANDOM_FLOW
from recipes.report.summaries import SampledFigures, SampledRow, SampledSummary, ScoreDifference
from recipes.training.starting import build_model

SAMPLED = 1
"""A part of every row's key, to be raised where the same settings come to give other figures."""

SCORES_FILE = "scores.npz"


class Kept(NamedTuple):
    """A finished row: its name, its folder in the run, and its figures."""

    name: str
    folder: str
    figures: SampledFigures


def sample_forecasts(
    config: PretrainConfig, model: NEPA, run: Run, options: ForecastOptions, ranks: World, *, show: bool = False
) -> dict[str, list[Kept]]:
    """The rows of every horizon; finished ones are found again in RUN/forecast/. The main process does all of it.

    Raises:
        UserError: the adapter offers no forecasts, a horizon does not fit in a split or in the network, or this network
            or these tokens can't be continued in time.
    """
    check_generates(causal=config.objective.causal, shift=config.objective.shift)
    if options.finetune:
        raise UserError(
            "finetune= trains point forecasts, and samples= reads the frozen network: leave one of them out"
        )
    data, horizons = config.data.plain(), sorted(set(options.horizons))
    windows = {horizon: check_windows(data, horizon) for horizon in horizons}
    layout, series = layout_of(data, windows[horizons[0]]["validation"]), series_digest(windows[horizons[0]])
    check_fits(model, layout, options, horizons[-1])
    if not ranks.is_main:
        return {}
    found: dict[str, list[Kept]] = {str(horizon): [] for horizon in horizons}
    rows = table_rows(config, data, series, layout, model, options, horizons, ranks.device)
    for number, row in enumerate(rows, 1):
        place, start = Run(run.path / "forecast" / row.folder), time.perf_counter()
        kept = place.summary_of(SampledFigures)
        figures = kept or row.measure(place)
        if show:
            took = "kept" if kept else f"{time.perf_counter() - start:.0f} s"
            said = f"CRPS {significant(figures['crps'], 4)} ({took})"
            say_progress(f"{number}/{len(rows)}  horizon {row.horizon}, {row.name}: {said}")
        found[str(row.horizon)].append(Kept(row.name, f"forecast/{row.folder}", figures))
    return found


def check_fits(model: NEPA, layout: Layout, options: ForecastOptions, horizon: int) -> None:
    """Whether the network has vectors for the places of the longest horizon, and the season lies in a look-back."""
    learned, needed = model.config.learned_positions, layout.tokens + layout.places(horizon)
    if 0 < learned < needed:
        raise UserError(
            f"samples= reads {needed} places for {horizon} steps ahead, and model.learned_positions={learned} holds a "
            "vector for no more: shorten horizons, or pre-train with learned_positions=0"
        )
    if options.season is not None and options.season > layout.steps:
        raise UserError(f"season={options.season} is longer than the look-back of {layout.steps} steps")


def table_rows(
    config: PretrainConfig,
    data: Modality,
    series: str,
    layout: Layout,
    model: NEPA,
    options: ForecastOptions,
    horizons: Sequence[int],
    device: torch.device,
) -> list[Row[SampledFigures]]:
    """Horizon by horizon. series: `series_digest`."""
    untrained = build_model(config, predicts=True).to(device).eval()
    about = {
        "sampled": SAMPLED,
        "data": data.model_dump(mode="json", exclude={"root"}),
        "series": series,
        "samples": options.samples,
        "test_windows": options.test_windows,
        "fitted_on": options.fit_samples,
    }
    causal, training = (
        config.objective.causal,
        DecoderConfig(steps=options.flow_steps, lr=HEAD_LR, seed=config.train.seed),
    )
    head = {"training": training.model_dump(), "solver": SOLVER_STEPS}
    held = max(options.fit_samples // 4, 1)

    def measured(horizon: int, make: Callable[[], tuple[Sampler, SampledFigures]]) -> Callable[[Run], SampledFigures]:
        def measure(place: Run) -> SampledFigures:
            sampler, more = make()
            windows = chosen(data, "test", horizon, options.test_windows)
            return leave(place, scores_of(data, windows, sampler, options.samples, device), more)

        return measure

    def continued(name: str, network: NEPA, horizon: int) -> Row[SampledFigures]:
        def make() -> tuple[Sampler, SampledFigures]:
            pairs = pairs_of(network, data, layout, horizon, options.fit_samples, device, causal=causal)
            fitted = fit_flow(new_flow(pairs, training), pairs, training, device).eval().requires_grad_(False)
            return rolled_out(network, fitted, data, layout, horizon, options.samples, causal=causal), {}

        depends = about | head | {"weights": weights_digest(network), "causal": causal}
        return Row(name, horizon, depends, measured(horizon, make))

    def resampled(name: str, horizon: int, make_point: Callable[[int], tuple[Point, SampledFigures]]) -> Row[Any]:
        def make() -> tuple[Sampler, SampledFigures]:
            point, more = make_point(horizon)
            return with_residuals(data, point, horizon, held, options.samples, device), more

        season = {"season": options.season} if name == SEASONAL else {}
        return Row(name, horizon, about | {"row": name} | season, measured(horizon, make))

    def linear(horizon: int) -> tuple[Point, SampledFigures]:
        ((name, (ridge, _)),) = fitted_ridges(data, raw_features, horizon, options.fit_samples, device).items()
        return partial(predict_by, data, raw_features, name, ridge, horizon), {}

    def seasonal(horizon: int) -> tuple[Point, SampledFigures]:
        season = options.season or best_season(data, horizon, layout.steps, device)
        return lambda batch: repeat_season(batch, season), {"season": season}

    def persistent(horizon: int) -> tuple[Point, SampledFigures]:
        return lambda batch: repeat_season(batch, 1), {}

    rivals = {LINEAR: linear, SEASONAL: seasonal, PERSISTENT: persistent}
    return [
        row
        for horizon in horizons
        for row in (
            continued(NEPA_FLOW, model, horizon),
            continued(RANDOM_FLOW, untrained, horizon),
            *(resampled(name, horizon, make) for name, make in rivals.items()),
        )
    ]


LINEAR, SEASONAL, PERSISTENT = "linear, residuals", "seasonal naive, residuals", "persistence, residuals"


def leave(place: Run, scores: Scores, more: SampledFigures) -> SampledFigures:
    """Write the scores of a row to its folder, and their means, which it gives back, to summary.json."""
    with disk_errors(place.path):
        place.path.mkdir(parents=True, exist_ok=True)
        np.savez(place.path / SCORES_FILE, **{name: value.numpy() for name, value in scores._asdict().items()})
    means = dict(zip(FIGURES, scores.windows.double().mean(1).tolist(), strict=True))
    figures = cast(SampledFigures, {**means, **more})
    place.write_summary(figures)
    return figures


def left_scores(place: Run) -> Scores:
    """What `leave` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    file = place.path / SCORES_FILE
    try:
        with np.load(file) as found:
            return Scores(*(torch.from_numpy(found[name]) for name in Scores._fields))
    except (OSError, ValueError, EOFError, KeyError, MemoryError) as error:
        raise UserError(
            f"{file} can't be read ({error}); delete {place.path} and give the same command again"
        ) from error


def summarised(
    config: PretrainConfig,
    runs: Sequence[Run],
    seeds: Sequence[int],
    rows: Sequence[Mapping[str, Sequence[Kept]]],
    options: ForecastOptions,
) -> tuple[SampledSummary, dict[str, dict[str, Scores]]]:
    """What forecast_samples.json holds, of one run or of several together; and the scores of the first run.

    Intervals are over stretches of time (`recipes.report.forecast.stretches`), and over runs where there are several.

    Raises:
        UserError: scores of a row are missing, or are of other windows in one run than in another.
    """
    data = config.data.plain()
    summary: SampledSummary = {
        "horizons": {}, "differences": {}, "stretches": {}, "windows": {}, "whole": {},
        "samples": options.samples, "fit_samples": options.fit_samples, "flow_steps": options.flow_steps,
        "seed": list(seeds), "runs": [str(run.path) for run in runs], "made_with": provenance(),
    }  # fmt: skip
    first: dict[str, dict[str, Scores]] = {}
    for horizon, of_first in rows[0].items():
        windows = chosen(data, "test", int(horizon), options.test_windows)
        clusters = stretches(windows.whole)[windows.indices]
        table, values = list[SampledRow](), dict[str, Tensor]()
        first[horizon] = {}
        for number, row in enumerate(of_first):
            left = [
                left_scores(Run(run.path / each[horizon][number].folder)) for run, each in zip(runs, rows, strict=True)
            ]
            if odd := [
                str(run.path) for run, each in zip(runs, left, strict=True) if each.windows.shape[1] != len(windows)
            ]:
                raise UserError(f"{odd[0]} has scores of other test windows; delete its {row.folder} and start again")
            first[horizon][row.name] = left[0]
            values[row.name] = torch.stack([each.windows.double() for each in left])  # [runs, figures, windows]
            found = [over_both(each, clusters, chained=True) for each in values[row.name].unbind(1)]
            means = {name: each.mean for name, each in zip(FIGURES, found, strict=True)}
            half = {name: each.half for name, each in zip(FIGURES, found, strict=True)}
            table.append(
                cast(SampledRow, {**row.figures, **means, "half": half, "name": row.name, "folder": row.folder})
            )
        own = values[NEPA_FLOW][:, 0]
        differences = []
        for name, each in values.items():
            if name != NEPA_FLOW:
                apart = over_both(each[:, 0] - own, clusters, chained=True)
                crps = float(each[:, 0].mean())
                differences.append(
                    ScoreDifference(rival=name, crps=crps, mean=apart.mean, half=apart.half, df=apart.df)
                )
        summary["horizons"][horizon], summary["differences"][horizon] = table, differences
        summary["stretches"][horizon] = len(clusters.unique())
        summary["windows"][horizon], summary["whole"][horizon] = len(windows), len(cast(Sized, windows.whole))
    layout = layout_of(data, data.forecasts("validation", min(map(int, rows[0]))))
    summary |= {"look_back": layout.steps, "places": layout.tokens}
    return summary, first
