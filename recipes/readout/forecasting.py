"""Forecasts of a series from frozen features, beside linear models and persistence."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, cast

import torch
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, field_validator
from torch import Tensor

from nepa_core.basics import FROZEN, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.runtime.config import differences, listed
from nepa_core.runtime.distributed import World
from nepa_core.runtime.meter import say_progress
from nepa_core.runtime.optim import MOST_STEPS
from nepa_core.runtime.run import Run, is_run, refuse_holder
from recipes.configs import PretrainConfig
from recipes.readout.features import weights_digest
from recipes.readout.forecasters import (
    Network,
    Reader,
    Scored,
    best_ridge,
    check_windows,
    form_of,
    leave,
    left_errors,
    network_features,
    raw_features,
    repeat_last,
    score,
    series_digest,
    short,
    train,
)
from recipes.report.forecast import (
    DLINEAR,
    ERRORS,
    LINEAR,
    PERSISTENCE,
    UNTRAINED,
    figures,
    paired_differences,
    significant,
    stretches,
)
from recipes.report.provenance import provenance
from recipes.report.summaries import (
    ErrorDifference,
    ForecastFigures,
    ForecastRow,
    ForecastSummary,
    SeedsRow,
    SeedsSummary,
)
from recipes.statistics.significance import spread
from recipes.training.starting import build_model

FITTED = 2
"""A part of every row's key: 1 was fitted in units of each window and kept no errors of single windows."""

SEED_KEYS = ("recipe", "train.seed", "train.workers", "data.root")
"""Keys in which runs may differ to stand in one table."""


class ForecastOptions(BaseModel):
    """Options of `nepa forecast`."""

    model_config = FROZEN

    horizons: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed)] = Field(
        default=(96, 192, 336, 720), min_length=1, description="steps to forecast"
    )
    finetune: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed)] = Field(
        default=(), description="horizons to train whole networks for, too"
    )
    steps: int = Field(default=800, gt=0, le=MOST_STEPS, description="training steps of each of these networks")
    fit_samples: PositiveInt = Field(
        default=20_000, description="most samples (windows, times channels where independent) each row is fitted on"
    )
    samples: int = Field(
        default=0, ge=0, description="sampled futures of each test window, in place of one: 19 or more"
    )
    test_windows: PositiveInt = Field(default=200, description="test windows that are sampled, drawn at random")
    flow_steps: PositiveInt = Field(default=2000, le=MOST_STEPS, description="training steps of what samples a token")
    season: int | None = Field(
        default=None, ge=2, description="steps that seasonal naive repeats; default: those that validate best"
    )
    also: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default=(), description="runs with other seeds, for mean ± standard deviation"
    )

    @field_validator("samples")
    @classmethod
    def _enough(cls, samples: int) -> int:
        if 0 < samples < 19:
            raise ValueError("the central interval of 90 % needs 19 samples or more")
        return samples


Figures = TypeVar("Figures")


class Row(NamedTuple, Generic[Figures]):
    """One row of the table at one horizon.

    Attributes:
        depends: what its figures depend on, plain values: its key.
        measure: given a folder of its own -> the figures.
    """

    name: str
    horizon: int
    depends: dict[str, Any]
    measure: Callable[[Run], Figures]

    @property
    def folder(self) -> str:
        """Such as "96_fine-tuned_1f3a5b7c9d"."""
        key = hashlib.sha256(json.dumps(self.depends | {"horizon": self.horizon}, sort_keys=True).encode()).hexdigest()
        return f"{self.horizon}_{self.name.replace(',', '').replace(' ', '_')}_{key[:10]}"


def check_runs(targets: Sequence[str]) -> None:
    """Whether all targets are runs of one recipe.

    Raises:
        UserError: one is no run folder, is named twice, or differs in more than its seed.
    """
    for place, target in enumerate(targets):
        if not is_run(target):
            refuse_holder(target)
            raise UserError(f"{target} is not a run folder; pre-train first and name the run")
        if target in targets[:place]:
            raise UserError(f"also: {target} stands twice; name runs with different seeds")
    first, *rest = (Run(Path(target)).load_config(PretrainConfig) for target in targets)
    for target, config in zip(targets[1:], rest, strict=True):
        other = [key for key in differences(first, config) if not key.startswith(SEED_KEYS)]
        if other:
            raise UserError(f"also: {target} differs from {targets[0]} in {', '.join(other)}, not in train.seed alone")


def forecast(
    config: PretrainConfig, model: NEPA, run: Run, options: ForecastOptions, ranks: World, *, show: bool = False
) -> ForecastSummary:
    """All rows of all horizons: what forecast.json holds. Finished rows are found again in RUN/forecast/.

    Args:
        show: a line on the screen for every row.

    Raises:
        UserError: the adapter offers no forecasts, or a horizon does not fit in a split.
    """
    data = config.data.plain()
    horizons = sorted({*options.horizons, *options.finetune})
    windows = {horizon: check_windows(data, horizon) for horizon in horizons}
    form, series = form_of(data, horizons[0]), series_digest(windows[horizons[0]])
    rows = table_rows(config, data, series, model, run, options, ranks, show=show)
    found: dict[str, list[ForecastRow]] = {str(horizon): [] for horizon in horizons}
    for number, row in enumerate(rows, 1):
        place, start = Run(run.path / "forecast" / row.folder), time.perf_counter()
        kept = place.summary_of(ForecastFigures)
        measured = kept or row.measure(place)
        if show and ranks.is_main:
            took = "kept" if kept else f"{time.perf_counter() - start:.0f} s"
            cells = f"MSE {significant(measured['mse'], 4)}, MAE {significant(measured['mae'], 4)}"
            say_progress(f"{number}/{len(rows)}  horizon {row.horizon}, {row.name}: {cells} ({took})")
        found[str(row.horizon)].append({"name": row.name, "folder": f"forecast/{row.folder}", **measured})
    clusters = {str(horizon): stretches(of["test"]) for horizon, of in windows.items()}
    counts = {horizon: {split: len(cast(Sized, each)) for split, each in of.items()} for horizon, of in windows.items()}
    summary: ForecastSummary = {
        "horizons": found,
        "stretches": {horizon: len(set(each.tolist())) for horizon, each in clusters.items()},
        "windows": {str(horizon): of["test"] for horizon, of in counts.items()},
        "left_out": {str(horizon): getattr(of["test"], "left_out", 0) for horizon, of in windows.items()},
        "fitted_on": {str(horizon): min(of["train"], options.fit_samples) for horizon, of in counts.items()},
        "look_back": form.steps,
        **cast(ForecastSummary, data.model_dump(include={"patch", "channels", "normalise"})),  # where it has them
        "seed": config.train.seed,
        "finetune_steps": options.steps,
        "fit_samples": options.fit_samples,
        "made_with": provenance(),
    }
    if ranks.is_main:  # it alone has every row
        summary["differences"] = over_windows([run], [summary], clusters)
    return summary


def table_rows(
    config: PretrainConfig,
    data: Modality,
    series: str,
    model: NEPA,
    run: Run,
    options: ForecastOptions,
    ranks: World,
    *,
    show: bool,
) -> list[Row[ForecastFigures]]:
    """The rows of the table; the networks that are trained come last, as they take longest. series: `series_digest`."""
    samples, device, causal = options.fit_samples, ranks.device, config.objective.causal
    horizons = sorted({*options.horizons, *options.finetune})
    untrained = build_model(config).to(device).eval()
    about = {"fitted": FITTED, "data": data.model_dump(mode="json", exclude={"root"}), "series": series}
    fitted = about | {"samples": samples, "causal": causal}
    weights = {"pre-trained": weights_digest(model), "random": weights_digest(untrained)}
    reads: dict[str, tuple[Reader, dict[str, str]]] = {
        "frozen": (partial(network_features, model, causal=causal), {"weights": weights["pre-trained"]}),
        UNTRAINED["frozen"]: (partial(network_features, untrained, causal=causal), {"weights": weights["random"]}),
        LINEAR: (raw_features, {}),
    }
    arms: dict[str, tuple[str | None, Network, str]] = {
        "fine-tuned": (str(run.path), "predictor", weights["pre-trained"]),
        UNTRAINED["fine-tuned"]: (None, "predictor", weights["random"]),
        DLINEAR: (None, "dlinear", ""),
    }

    def ridge(name: str, horizon: int) -> Row[ForecastFigures]:
        read, own = reads[name]
        measure = kept(lambda: best_ridge(data, read, horizon, samples, device), ranks)
        return Row(name, horizon, fitted | own, measure)

    def persistence(horizon: int) -> Row[ForecastFigures]:
        measure = kept(lambda: score(data, "test", horizon, device, lambda batch: repeat_last(data, batch)), ranks)
        return Row(PERSISTENCE, horizon, about, measure)

    def trained(name: str, horizon: int) -> Row[ForecastFigures]:
        init, network, start = arms[name]
        arm = short(config, init, network, horizon, steps=options.steps, samples=samples)
        settings = arm.model_dump(mode="json", exclude={"init", "data"})
        measure = partial(train, arm, ranks=ranks, show=show)
        return Row(name, horizon, fitted | {"weights": start, "settings": settings}, measure)

    return [
        *(ridge(name, horizon) for name in reads for horizon in horizons),
        *(persistence(horizon) for horizon in horizons),
        *(trained(name, horizon) for horizon in sorted(set(options.finetune)) for name in arms),
    ]


def kept(measure: Callable[[], Scored], ranks: World) -> Callable[[Run], ForecastFigures]:
    """A measurement that leaves its figures in a row's folder, as `train` does."""

    def measured(place: Run) -> ForecastFigures:
        found = measure()
        if ranks.is_main:
            return leave(place, found)
        found.pop("errors")
        return found

    return measured


def over_windows(
    runs: Sequence[Run], summaries: Sequence[ForecastSummary], clusters: Mapping[str, Tensor]
) -> dict[str, list[ErrorDifference]]:
    """Horizon -> `paired_differences` over the test windows of one run, or of several together.

    Args:
        clusters: horizon -> `stretches`.

    Raises:
        UserError: errors of a row are missing, or are of other windows in one run than in another.
    """
    found = {}
    for horizon, rows in summaries[0]["horizons"].items():
        errors = {}
        for number, row in enumerate(rows):
            each = [
                left_errors(Run(run.path / summary["horizons"][horizon][number]["folder"]))
                for run, summary in zip(runs, summaries, strict=True)
            ]
            if odd := [str(run.path) for run, left in zip(runs, each, strict=True) if len(left) != len(each[0])]:
                raise UserError(
                    f"also: {odd[0]} has other test windows than {runs[0].path}; name runs on the same data"
                )
            errors[row["name"]] = torch.stack(each)
        found[horizon] = paired_differences(errors, clusters[horizon])
    return found


def over_seeds(targets: Sequence[str], summaries: Sequence[ForecastSummary], data: Modality) -> SeedsSummary:
    """What forecast_seeds.json holds: the figures of every row with mean and deviation over the runs."""
    first = summaries[0]
    clusters = {horizon: stretches(data.forecasts("test", int(horizon))) for horizon in first["horizons"]}

    def row(horizon: str, number: int, name: str) -> SeedsRow:
        mse, mae = (spread(figures(summaries, horizon, number, key)) for key in ERRORS)
        return {"name": name, "mse": mse, "mae": mae}

    return {
        **cast(SeedsSummary, first),
        "horizons": {
            horizon: [row(horizon, number, each["name"]) for number, each in enumerate(rows)]
            for horizon, rows in first["horizons"].items()
        },
        "differences": over_windows([Run(Path(target)) for target in targets], summaries, clusters),
        "runs": list(targets),
        "seed": [summary["seed"] for summary in summaries],
    }
