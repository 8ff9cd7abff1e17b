"""What a start is worth downstream: read-outs, and fine-tuning at its own best learning rate.

The same functions serve pre-trained and random weights. Where samples have targets, these are read by a linear probe
and taught by fine-tuning; a series without any is forecast instead.

The learning rate is chosen for each start, seed and number of labels, by training once with each: the one whose network
does best on held-back training samples, which none of them is trained on, is the one whose held-out figure counts.
Every start is given the same learning rates, steps and samples, so random weights are tuned with the same care.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel

from modalities.timeseries import TimeSeries
from nepa_core.basics import FROZEN, Batch
from nepa_core.model import NEPA
from nepa_core.runtime.config import override
from nepa_core.runtime.data import epoch_order, fold_seed
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes import finetune, forecasters, probe
from recipes.features import network_reader, raw_reader, tokens_per_sample
from recipes.goals import find_goal
from recipes.measures import PROBE, Some, few_labels, score_readers, short_tuning, trained
from recipes.pretrain import PretrainConfig

HELD_BACK = 1000
"""Most training samples that the learning rate is chosen on, and never more than a fifth of them."""

HORIZON = 96
"""Steps that a series without targets is forecast for."""

_WINDOWS = 20_000  # most that forecasts are fitted on


class Care(BaseModel):
    """How a start is fine-tuned: training labels a class (None for all), steps, and learning rates to choose from."""

    model_config = FROZEN

    labels: tuple[int | None, ...]
    finetune_steps: int
    learning_rates: tuple[float, ...]


class Tuned(NamedTuple):
    """A held-out figure and the learning rate that held-back samples chose for it."""

    figure: float
    lr: float


def is_forecast(config: PretrainConfig) -> bool:
    """Whether the data is a series without targets."""
    return isinstance(config.data, TimeSeries) and config.data.source != "labelled"


def check(config: PretrainConfig) -> None:
    """Say what is wrong before hours of training.

    Raises:
        UserError: the samples have no target and are no series with validation rows, or a series is too short.
    """
    if not is_forecast(config):
        find_goal(config.data)
        return
    for split in ("train", "validation", "test"):
        cast(TimeSeries, config.data).forecasts(split, HORIZON)


def downstream(config: PretrainConfig, model: NEPA, init: Path | None, care: Care) -> dict[str, Any]:
    """Everything that is measured of a start.

    Args:
        config: of pre-training; its seed draws the labels and the order of the samples.
        model: the network, in evaluation mode. init: the run it is of, or None for random weights.

    Returns:
        `probe`, of the layer that held-back samples choose, and its `probe_row`; `probe_final`, of the final norm;
        `finetuned_50` and so on, "all" for None; `learning_rates`: the chosen one of each; `layers`: names, probes and
        (but for forecasts) effective ranks, layer by layer; `metric`: accuracy, r2, or skill of a forecast, which is
        1 - MSE / MSE of repeating the last value.
    """
    device = next(model.parameters()).device
    tuned: dict[str, Tuned] = {}
    for labels in finetunings(config, care):
        name = f"finetuned_{'all' if labels is None else labels}"
        if is_forecast(config):
            tuned[name] = forecast_tuned(config, init, device, care)
        else:
            tuned[name] = fine_tuned(config, init, device, labels, care)
    read = forecast_layers(config, model) if is_forecast(config) else probed_layers(config, model)
    figures = {name: each.figure for name, each in tuned.items()}
    return {**read, **figures, "learning_rates": {name: each.lr for name, each in tuned.items()}}


def finetunings(config: PretrainConfig, care: Care) -> tuple[int | None, ...]:
    """The numbers of labels that can be asked of the data: forecasts have no classes to count."""
    return (None,) if is_forecast(config) else care.labels


def raw_figure(config: PretrainConfig, device: torch.device) -> float:
    """The same read-out of the raw tokens."""
    if is_forecast(config):
        return float(_skill(config, forecasters.raw_features, device)["skill"])
    reader = raw_reader(attentive=False, per_token=tokens_per_sample(config.data.plain()) > 0)
    ((row,),) = score_readers(config, [reader], World(0, 1, device))
    return float(row[probe.metric_of(row)])


# --------------------------------------------------------------------------------------------- with targets


def probed_layers(config: PretrainConfig, model: NEPA) -> dict[str, Any]:
    """The rows that `nepa orders` reads, too: every layer, mean over tokens and last token, or single tokens."""
    causal, depth = config.objective.causal, config.model.depth
    if per_sample := tokens_per_sample(config.data.plain()):
        rows, _ = probe.token_rows(PROBE, depth=depth, per_sample=per_sample)
    else:
        rows, _ = probe.chosen_rows(PROBE, depth=depth, bos=config.model.bos, causal=causal)
    device = next(model.parameters()).device
    (scored,) = score_readers(config, [network_reader(config, model, rows, causal=causal)], World(0, 1, device))
    best = probe.best_row(scored)
    metric = probe.metric_of(best)
    means = [row for row in scored if not row["name"].endswith(", last")]
    return {
        "metric": metric,
        "probe": best[metric],
        "probe_row": best["name"],
        "probe_final": means[-1][metric],
        "layers": {
            "name": [row["name"].partition(",")[0] for row in means],
            "probe": [row[metric] for row in means],
            "rank": [row["effective_rank"] for row in means],
        },
    }


def held_back(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices to choose by), drawn by `seed`."""
    drawn = epoch_order(count, fold_seed(seed, "held back"), 0).tolist()
    cut = min(HELD_BACK, count // 5)
    return drawn[cut:], drawn[:cut]


def fine_tuned(
    config: PretrainConfig, init: Path | None, device: torch.device, labels: int | None, care: Care
) -> Tuned:
    """Held-out accuracy (r2 of numbers) of all weights after `measures.short_tuning` on `labels` a class."""
    goal, seed = find_goal(config.data), config.train.seed
    whole, plain = (data.dataset("train") for data in (config.data, config.data.plain()))
    rest, kept = held_back(len(cast(Any, whole)), seed)
    samples, choosing = Some(whole, rest), Some(plain, kept)
    if labels is not None:
        samples = few_labels(samples, goal, labels, seed)
    alone = World(0, 1, device)
    setting = short_tuning(config, init, samples, whole=labels is None, steps=care.finetune_steps)

    def at(lr: float) -> tuple[float, float, finetune.Classifier]:
        tuning = override(setting, {"optim.lr": lr})
        model = trained(tuning, goal, samples, device)
        return finetune.measure(tuning, model, alone, choosing)[goal.headline], lr, model

    tried = list(map(at, care.learning_rates))  # a rate that diverges is never the best
    _, lr, model = max(tried, key=lambda found: found[0] if math.isfinite(found[0]) else -math.inf)
    return Tuned(finetune.measure(setting, model, alone)[goal.headline], lr)


# ------------------------------------------------------------------------------------ series without targets


def forecast_layers(config: PretrainConfig, model: NEPA) -> dict[str, Any]:
    """A ridge forecast from every layer, flattened or of the last token, whichever validates better."""
    causal, device = config.objective.causal, next(model.parameters()).device

    def of_layer(name: str) -> forecasters.Reader:
        def read(data: TimeSeries, batch: Batch) -> dict[str, torch.Tensor]:
            found = forecasters.network_features(model, data, batch, causal=causal)
            return {key: value for key, value in found.items() if key.startswith(f"{name},")}

        return read

    names = ["embedding", *(f"layer {layer}" for layer in range(1, config.model.depth + 1)), "final norm"]
    rows = [_skill(config, of_layer(name), device) for name in names]
    best = min(rows, key=lambda row: float(row["validation_scaled_mse"]))
    return {
        "metric": "skill",
        "probe": best["skill"],
        "probe_row": best["readout"],
        "probe_final": rows[-1]["skill"],
        "layers": {"name": names, "probe": [row["skill"] for row in rows]},
    }


def _skill(config: PretrainConfig, read: forecasters.Reader, device: torch.device) -> dict[str, Any]:
    """A ridge forecast, see `forecasters.best_ridge`, and its skill."""
    data = cast(TimeSeries, config.data.plain())
    found = forecasters.best_ridge(data, read, HORIZON, _WINDOWS, device)
    return found | {"skill": 1 - found["mse"] / persistence(data, device)}


def persistence(data: TimeSeries, device: torch.device) -> float:
    """MSE of repeating the last value."""
    repeat = forecasters.score(data, "test", HORIZON, device, lambda batch: forecasters.repeat_last(data, batch))
    return repeat["mse"]


def forecast_tuned(config: PretrainConfig, init: Path | None, device: torch.device, care: Care) -> Tuned:
    """Skill of the whole network after training to forecast; the learning rate is chosen on the validation rows."""
    setting = forecasters.short(
        config, None if init is None else str(init), "predictor", HORIZON, steps=care.finetune_steps, samples=_WINDOWS
    )

    def at(lr: float) -> tuple[float, float, float]:
        with tempfile.TemporaryDirectory() as folder:
            tuning = override(setting, {"optim.lr": lr})
            found = forecasters.train(tuning, Run(Path(folder)), World(0, 1, device), show=False)
        return found["validation_mse"], lr, found["mse"]

    tried = list(map(at, care.learning_rates))
    _, lr, error = min(tried, key=lambda found: found[0] if math.isfinite(found[0]) else math.inf)
    return Tuned(1 - error / persistence(setting.data, device), lr)
