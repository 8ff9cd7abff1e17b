"""What a start is worth downstream: read-outs, and fine-tuning in its own best setting.

The same functions serve pre-trained and random weights. Where samples have targets, these are read by a linear probe
and taught by fine-tuning; a series without any is forecast instead.

Learning rate, number of steps and attention are chosen for each start, seed and number of labels, in this order, each
by training once with every choice: the network that does best on held-back training samples, which none of them is
trained on, is the one whose held-out figure counts. Every start is given the same choices and samples, so random
weights are tuned with the same care.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from pydantic import BaseModel

from modalities.timeseries import TimeSeries
from nepa_core.basics import FROZEN
from nepa_core.diagnostics import effective_rank
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.predictor import Trace
from nepa_core.runtime.config import override
from nepa_core.runtime.data import epoch_order, fold_seed, plain_batches
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.run import Run
from recipes import finetune, forecasters, measures, probe
from recipes.features import Row, network_reader, raw_reader, tokens_per_sample
from recipes.goals import find_goal
from recipes.heads import mean_of_tokens
from recipes.held_out import draw_seed
from recipes.measures import PROBE, Some, by_layer, few_labels, score_readers, short_tuning, trained
from recipes.pretrain import PretrainConfig, build_model, load_pretrained

HELD_BACK = 1000
"""Most training samples that a setting is chosen on, and never more than a fifth of them."""

HORIZON = 96
"""Steps that a series without targets is forecast for where nobody says."""

_WINDOWS = 20_000  # most that forecasts are fitted on

Tuning = TypeVar("Tuning", finetune.FinetuneConfig, forecasters.ForecastConfig)
Found = TypeVar("Found")


class Care(BaseModel):
    """How a start is fine-tuned: training labels a class (None: all), the choices of `Setting`, steps of a forecast."""

    model_config = FROZEN

    labels: tuple[int | None, ...]
    learning_rates: tuple[float, ...]
    finetune_steps: tuple[int, ...]
    finetune_causal: tuple[bool, ...]
    horizon: int


class Setting(NamedTuple):
    """What is chosen for a fine-tuning: learning rate, steps, and whether attention is causal."""

    lr: float
    steps: int
    causal: bool

    def applied(self, config: Tuning) -> Tuning:
        """A fine-tuning in this setting."""
        changes = {"optim.lr": self.lr, "train.length.steps": self.steps, "causal": self.causal}
        return override(config, changes | {"train.checkpoint": self.steps})


class Tuned(NamedTuple):
    """A held-out figure and the setting that held-back samples chose for it."""

    figure: float
    setting: Setting


def is_forecast(config: PretrainConfig) -> bool:
    """Whether the data is a series without targets."""
    return isinstance(config.data, TimeSeries) and config.data.source != "labelled"


def check(config: PretrainConfig, horizon: int = HORIZON) -> None:
    """Say what is wrong before hours of training.

    Raises:
        UserError: the samples have no target and are no series with validation rows, or a series is too short.
    """
    if not is_forecast(config):
        find_goal(config.data)
        return
    for split in ("train", "validation", "test"):
        cast(TimeSeries, config.data).forecasts(split, horizon)


def downstream(config: PretrainConfig, model: NEPA, init: Path | None, care: Care) -> dict[str, Any]:
    """Everything that is measured of a start.

    Args:
        config: of pre-training; its seed draws the labels and the order of the samples.
        model: the network, in evaluation mode. init: the run it is of, or None for random weights.

    Returns:
        `probe`, of the layer that held-back samples choose, and its `probe_row`; `probe_final`, of the final norm;
        `finetuned_50` and so on, "all" for None; `settings`: the chosen `Setting` of each as a dictionary; `layers`:
        names, probes and (but for forecasts) effective ranks, layer by layer; `metric`: accuracy, r2, or skill of a
        forecast, which is 1 - MSE / MSE of repeating the last value.
    """
    device = next(model.parameters()).device
    tuned: dict[str, Tuned] = {}
    for labels in finetunings(config, care):
        name = f"finetuned_{'all' if labels is None else labels}"
        if is_forecast(config):
            tuned[name] = forecast_tuned(config, init, device, care)
        else:
            tuned[name] = fine_tuned(config, init, device, labels, care)
    read = forecast_layers(config, model, care.horizon) if is_forecast(config) else probed_layers(config, model)
    figures = {name: each.figure for name, each in tuned.items()}
    return {**read, **figures, "settings": {name: each.setting._asdict() for name, each in tuned.items()}}


def finetunings(config: PretrainConfig, care: Care) -> tuple[int | None, ...]:
    """The numbers of labels that can be asked of the data: forecasts have no classes to count."""
    return (None,) if is_forecast(config) else care.labels


def best_setting(care: Care, at: Callable[[Setting], tuple[float, Found]]) -> tuple[Setting, Found]:
    """The best learning rate at the first number of steps and attention, then the best of each of these in its turn.

    Args:
        at: trains in a setting -> (its score on held-back samples, where more is better; what is kept of the best).
    """
    tried: dict[Setting, tuple[float, Found]] = {}

    def best(settings: Sequence[Setting]) -> Setting:
        for each in settings:
            if each not in tried:
                tried[each] = at(each)
        scores = {each: tried[each][0] for each in settings}  # a setting that diverges is never the best
        return max(scores, key=lambda each: scores[each] if math.isfinite(scores[each]) else -math.inf)

    chosen = best([Setting(lr, care.finetune_steps[0], care.finetune_causal[0]) for lr in care.learning_rates])
    chosen = best([chosen, *(chosen._replace(steps=steps) for steps in care.finetune_steps)])
    chosen = best([chosen, *(chosen._replace(causal=causal) for causal in care.finetune_causal)])
    return chosen, tried[chosen][1]


def raw_figure(config: PretrainConfig, device: torch.device, horizon: int = HORIZON) -> float:
    """The same read-out of the raw tokens."""
    if is_forecast(config):
        data = cast(TimeSeries, config.data.plain())
        found = forecasters.best_ridge(data, forecasters.raw_features, horizon, _WINDOWS, device)
        return float(1 - found["mse"] / persistence(data, horizon, device))
    reader = raw_reader(attentive=False, per_token=tokens_per_sample(config.data.plain()) > 0)
    ((row,),) = score_readers(config, [reader], World(0, 1, device))
    return float(row[probe.metric_of(row)])


# --------------------------------------------------------------------- in one setting, beside random weights


def compared(config: PretrainConfig, model: NEPA, run: Run, labels: Sequence[int | None], steps: int) -> dict[str, Any]:
    """What `nepa orders` measures of a run downstream: `measures.read_out` and `measures.fine_tunings`.

    Of a series without targets the same keys hold skills of forecasts, and there are no labels to count: `labels` is
    (None,).
    """
    device = next(model.parameters()).device

    def tuned(init: Path | None, count: int | None) -> float:
        if is_forecast(config):
            return forecast_shortly(config, init, device, steps=steps)
        return measures.fine_tuned(config, init, device, labels=count, steps=steps)

    read = forecast_read_out(config, model) if is_forecast(config) else measures.read_out(config, model)
    return {**read, **measures.fine_tunings(run, labels, tuned)}


def read_as(folder: Path, reading: Modality) -> dict[str, Any]:
    """Probe of the run in `folder` when its samples are read by another adapter, such as one with another order.

    Of the best layer, means over tokens alone (of a forecast, as `forecast_layers`); the layer is chosen on held-back
    training samples.
    """
    with world() as ranks:
        config, model = load_pretrained(Run(folder), ranks.device)
        config = config.model_copy(update={"data": reading})
        if is_forecast(config):
            read = forecast_layers(config, model)
            return {key: read[key] for key in ("probe", "probe_row")}
        per_sample = tokens_per_sample(config.data.plain())
        rows = [Row(layer, "token" if per_sample else "mean") for layer in range(config.model.depth + 2)]
        reader = network_reader(config, model, rows, causal=config.objective.causal)
        (scored,) = score_readers(config, [reader], ranks)
    best = probe.best_row(scored)
    return {"probe": best[probe.metric_of(best)], "probe_row": best["name"]}


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
    return by_layer(scored)


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
    short = short_tuning(config, init, samples, whole=labels is None, steps=care.finetune_steps[0])

    def at(setting: Setting) -> tuple[float, tuple[finetune.FinetuneConfig, finetune.Classifier]]:
        tuning = setting.applied(short)
        model = trained(tuning, goal, samples, device)
        return finetune.measure(tuning, model, alone, choosing)[goal.headline], (tuning, model)

    setting, (tuning, model) = best_setting(care, at)
    return Tuned(finetune.measure(tuning, model, alone)[goal.headline], setting)


# ------------------------------------------------------------------------------------ series without targets


def forecast_layers(config: PretrainConfig, model: NEPA, horizon: int = HORIZON) -> dict[str, Any]:
    """A ridge forecast from every layer, flattened or of the last token, whichever validates better."""
    data, device = cast(TimeSeries, config.data.plain()), next(model.parameters()).device
    read = partial(forecasters.network_features, model, causal=config.objective.causal)
    fitted = forecasters.fitted_ridges(data, read, horizon, _WINDOWS, device)
    names = ["embedding", *(f"layer {layer}" for layer in range(1, config.model.depth + 1)), "final norm"]
    of_layer = [{key: each for key, each in fitted.items() if key.startswith(f"{name},")} for name in names]
    repeated = persistence(data, horizon, device)
    rows = [forecasters.best_of(data, read, ridges, horizon, device) for ridges in of_layer]
    skills = [1 - row["mse"] / repeated for row in rows]
    best = min(range(len(rows)), key=lambda layer: float(rows[layer]["validation_mse"]))
    return {
        "metric": "skill",
        "probe": skills[best],
        "probe_row": rows[best]["readout"],
        "probe_final": skills[-1],
        "layers": {"name": names, "probe": skills},
    }


def persistence(data: TimeSeries, horizon: int, device: torch.device) -> float:
    """MSE of repeating the last value."""
    repeat = forecasters.score(data, "test", horizon, device, lambda batch: forecasters.repeat_last(data, batch))
    return repeat["mse"]


def forecast_tuned(config: PretrainConfig, init: Path | None, device: torch.device, care: Care) -> Tuned:
    """Skill of the whole network after training to forecast; its setting is chosen on the validation rows."""
    start, steps = None if init is None else str(init), care.finetune_steps[0]
    short = forecasters.short(config, start, "predictor", care.horizon, steps=steps, samples=_WINDOWS)

    def at(setting: Setting) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            found = forecasters.train(setting.applied(short), Run(Path(folder)), World(0, 1, device), show=False)
        return -found["validation_mse"], found["mse"]

    setting, error = best_setting(care, at)
    return Tuned(1 - error / persistence(short.data, care.horizon, device), setting)


def forecast_shortly(config: PretrainConfig, init: Path | None, device: torch.device, *, steps: int) -> float:
    """`forecast_tuned` in the one setting of `forecasters.short`."""
    lr = forecasters.short(config, None, "predictor", HORIZON, steps=steps, samples=_WINDOWS).optim.lr
    causal = config.objective.causal
    one = {"learning_rates": (lr,), "finetune_steps": (steps,), "finetune_causal": (causal,)}
    care = Care(labels=(None,), horizon=HORIZON, **one)
    return forecast_tuned(config, init, device, care).figure


def forecast_read_out(config: PretrainConfig, model: NEPA) -> dict[str, Any]:
    """`measures.read_out` of a series without targets."""
    device = next(model.parameters()).device

    def read(network: NEPA) -> dict[str, Any]:
        found = forecast_layers(config, network)
        return found | {"layers": found["layers"] | {"rank": layer_ranks(config, network)}}

    random = build_model(config).to(device).eval()
    return measures.beside_random(read(model), read(random), raw_figure(config, device))


@torch.no_grad()
def layer_ranks(config: PretrainConfig, model: NEPA) -> list[float]:
    """Effective rank of drawn held-out windows' means over tokens, from the embedding to the final norm."""
    data, device = config.data.plain(), next(model.parameters()).device
    means: list[list[torch.Tensor]] = [[] for _ in range(config.model.depth + 2)]
    windows, limit = data.dataset("test"), PROBE.test_samples
    seed = draw_seed(windows, limit)
    for batch in plain_batches(windows, batch=forecasters.BATCH, device=device, limit=limit, seed=seed):
        trace = Trace()
        mask = model(data.read(batch), causal=config.objective.causal, trace=trace).mask
        for found, hidden in zip(means, trace.hidden, strict=True):
            found.append(mean_of_tokens(hidden, mask, bos=config.model.bos))
    return [effective_rank(torch.cat(found)) for found in means]
