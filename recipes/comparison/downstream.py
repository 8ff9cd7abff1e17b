"""What a start is worth downstream: read-outs, and fine-tuning in its own best setting.

The same functions serve pre-trained and random weights. Where samples have targets, these are read by a linear probe
and taught by fine-tuning; a series without any is forecast instead.

Learning rate, number of steps and attention are chosen for each start, seed and number of labels, in this order, each
by training with every choice (`best_setting`). Choosing needs no further labels: of few labels a class a setting is
scored by cross-validation within them, of all labels on a part of them that is held back. The network whose held-out
figure counts is then trained in the chosen setting on every label that was counted. A series is chosen for on its
validation rows. Every start is given the same choices and samples, so random weights are tuned with the same care.

"Tuned" means that the best learning rate and number of steps lie inside what was tried: while the best is at an end,
the list grows there by the factor between its last two, `EXTENSIONS` times at most. Where it ends at that end, it is
said.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from pydantic import BaseModel
from torch.utils.data import Dataset

from nepa_core.basics import FROZEN, Batch
from nepa_core.modality import Modality, first_sample
from nepa_core.model import NEPA
from nepa_core.pooling import Row, mean_of_tokens
from nepa_core.predictor import Trace
from nepa_core.runtime.config import override
from nepa_core.runtime.data import epoch_order, fold_seed
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.fit import Diverged
from nepa_core.runtime.run import Run
from nepa_core.samples import Some
from nepa_core.verdict.diagnostics import effective_rank
from recipes import configs, presets
from recipes.comparison.measures import (
    PROBE,
    Figure,
    as_row,
    by_layer,
    few_labels,
    joined,
    score_readers,
    short_tuning,
    tested,
    trained,
)
from recipes.configs import PretrainConfig
from recipes.networks.goals import find_goal, fitted, kind_of
from recipes.readout import forecasters, probing
from recipes.readout.features import network_reader, raw_reader, tokens_per_sample
from recipes.report.forecast import stretches
from recipes.report.summaries import ChosenSetting, RunMeasures, finetuned
from recipes.statistics.credits import pack_credits
from recipes.statistics.held_out import drawn_batches, pack_clusters
from recipes.training import finetuning
from recipes.training.pretraining import load_pretrained
from recipes.training.starting import build_model

HELD_BACK = 1000
"""Most training samples that a setting is chosen on where all are labelled, and never more than a fifth of them."""

FOLDS = 3
"""Parts that few labels are cut into to choose a setting by; choices a factor of 3 apart need no more."""

EXTENSIONS = 2
"""How often a list of learning rates or steps grows at either end while the best lies there: with factors of about 3 by
ten times at most."""

HORIZON = 96
"""Steps that a series without targets is forecast for where nobody says."""

_WINDOWS = 20_000  # most that forecasts are fitted on

Tuning = TypeVar("Tuning", configs.FinetuneConfig, forecasters.ForecastConfig)


class CareBefore(BaseModel):
    """`Care` as it was when settings were chosen on 1,000 further labelled samples, from the lists as they are.

    It names the results that were kept then, which still open.
    """

    model_config = FROZEN

    labels: tuple[int | None, ...]
    learning_rates: tuple[float, ...]
    finetune_steps: tuple[int, ...]
    finetune_causal: tuple[bool, ...]
    horizon: int

    @classmethod
    def of(cls, care: Care) -> CareBefore:
        return CareBefore(**care.model_dump(include=set(CareBefore.model_fields)))


class Care(CareBefore):
    """How a start is fine-tuned: training labels a class (None: all), the choices of `Setting`, steps of a forecast.

    Attributes:
        folds: see `FOLDS`. extensions: see `EXTENSIONS`; 0 leaves the lists as they are.
    """

    folds: int = FOLDS
    extensions: int = EXTENSIONS

    @property
    def only(self) -> Setting | None:
        """The one setting that there is, or None where there is a choice."""
        if max(map(len, (self.learning_rates, self.finetune_steps, self.finetune_causal))) > 1:
            return None
        return Setting(self.learning_rates[0], self.finetune_steps[0], self.finetune_causal[0])


class Setting(NamedTuple):
    """What is chosen for a fine-tuning: learning rate, steps, and whether attention is causal."""

    lr: float
    steps: int
    causal: bool

    def applied(self, config: Tuning) -> Tuning:
        """A fine-tuning in this setting."""
        changes = {"optim.lr": self.lr, "train.length.steps": self.steps, "causal": self.causal}
        return override(config, changes | {"train.checkpoint": self.steps})


class Chosen(NamedTuple):
    """What `best_setting` found.

    Attributes:
        setting: the best. kept: what was kept of it.
        at_end: those of "lr" and "steps" whose best lies at an end of all that was tried, so that a longer list may
            serve better; a list of one was not chosen from and is never named.
    """

    setting: Setting
    kept: Any
    at_end: tuple[str, ...] = ()

    def written(self) -> ChosenSetting:
        """As a summary holds it."""
        setting = self.setting
        return {"lr": setting.lr, "steps": setting.steps, "causal": setting.causal, "at_end": list(self.at_end)}


class Tuned(NamedTuple):
    """A held-out figure, the setting that was chosen for it, and how many labels that took in all.

    Attributes:
        labels: labelled training samples (windows of a series) used, for choosing and for training.
    """

    figure: Figure
    chosen: Chosen
    labels: int


def is_forecast(config: PretrainConfig) -> bool:
    """Whether the data is a series without targets: its adapter offers `forecasts`, and samples have none."""
    return config.data.offers("forecasts") and kind_of(first_sample(config.data)) is None


def check(config: PretrainConfig, horizon: int = HORIZON) -> None:
    """Say what is wrong before hours of training.

    Raises:
        UserError: the samples have no target and are no series with validation rows, or a series is too short.
    """
    if not is_forecast(config):
        find_goal(config.data)
        return
    forecasters.check_windows(config.data, horizon)


def downstream(config: PretrainConfig, model: NEPA, init: Path | None, care: Care) -> RunMeasures:
    """Everything that is measured of a start.

    Args:
        config: of pre-training; its seed draws the labels and the order of the samples.
        model: the network, in evaluation mode. init: the run it is of, or None for random weights.

    Returns:
        Probes, fine-tunings and how these were set. Skill of a forecast is 1 - MSE / MSE of repeating the last value;
        `credits` and `clusters`: see `recipes.comparison.measures.Figure`.
    """
    device = next(model.parameters()).device
    tuned: dict[str, Tuned] = {}
    for labels in finetunings(config, care):
        name = finetuned(labels)
        if is_forecast(config):
            tuned[name] = forecast_tuned(config, init, device, care)
        else:
            tuned[name] = fine_tuned(config, init, device, labels, care)
    read = forecast_layers(config, model, care.horizon) if is_forecast(config) else probed_layers(config, model)
    return joined(read, as_row({name: each.figure for name, each in tuned.items()})) | {
        "settings": {name: each.chosen.written() for name, each in tuned.items()},
        "label_counts": {name: each.labels for name, each in tuned.items()},
    }


def finetunings(config: PretrainConfig, care: Care) -> tuple[int | None, ...]:
    """The numbers of labels that can be asked of the data: forecasts have no classes to count."""
    return (None,) if is_forecast(config) else care.labels


def best_setting(care: Care, at: Callable[[Setting], tuple[float, Any]]) -> Chosen:
    """The best learning rate at the first number of steps and attention, then the best of each of these in its turn.

    Of equally good ones that nearest the middle of the list is taken. Lists of learning rates and steps grow while the
    best lies at an end, by the factor between the last two there, `care.extensions` times at most; lists of one are
    taken as they are.

    Args:
        at: trains in a setting -> (its score, where more is better; what is kept of the best).

    Raises:
        Diverged: training does in every setting.
    """
    tried: dict[Setting, tuple[float, Any]] = {}

    def score(setting: Setting) -> float:  # one that diverges is never the best
        if setting not in tried:
            try:
                tried[setting] = at(setting)
            except Diverged:
                tried[setting] = -math.inf, None
        found = tried[setting][0]
        return found if math.isfinite(found) else -math.inf

    def best(settings: Sequence[Setting]) -> int:
        scores = [score(each) for each in settings]
        if max(scores) == -math.inf:
            return 0  # lower rates may not diverge
        middle = (len(scores) - 1) / 2
        return max(range(len(scores)), key=lambda place: (scores[place], -abs(place - middle), -place))

    def along(start: Setting, key: str, values: Sequence[Any]) -> tuple[Setting, bool]:
        line = sorted(values)
        left = {"low": care.extensions, "high": care.extensions} if len(line) > 1 else {"low": 0, "high": 0}
        while True:
            place = best([start._replace(**{key: value}) for value in line])
            if place == 0 and left["low"]:
                left["low"] -= 1
                further = beyond(line[0], line[1])
                line = [further, *line] if further < line[0] else line
            elif place == len(line) - 1 and left["high"]:
                left["high"] -= 1
                line = [*line, beyond(line[-1], line[-2])]
            else:
                return start._replace(**{key: line[place]}), len(line) > 1 and place in (0, len(line) - 1)

    start = Setting(care.learning_rates[0], care.finetune_steps[0], care.finetune_causal[0])
    start, rate_at_end = along(start, "lr", care.learning_rates)
    start, steps_at_end = along(start, "steps", care.finetune_steps)
    causal = [start, *(start._replace(causal=causal) for causal in care.finetune_causal if causal != start.causal)]
    scores = [score(each) for each in causal]
    setting = causal[scores.index(max(scores))]
    if score(setting) == -math.inf:
        raise Diverged(f"fine-tuning diverges at every learning rate from {min(tried).lr:g} on: name lower ones")
    ends = {"lr": rate_at_end, "steps": steps_at_end}
    return Chosen(setting, tried[setting][1], tuple(key for key, end in ends.items() if end))


def beyond(end: float, inner: float) -> float:
    """The next value of a list after its end, by the factor between its last two; three digits, whole where they are.

    Steps end at 1: there the end itself comes back.
    """
    if isinstance(end, int) and isinstance(inner, int):
        return max(1, round(end * end / inner))
    return float(f"{end * end / inner:.3g}")


def middle_setting(care: Care) -> Setting:
    """Where there is nothing to choose by: the middle learning rate and the first of the others."""
    rates = sorted(care.learning_rates)
    return Setting(rates[len(rates) // 2], care.finetune_steps[0], care.finetune_causal[0])


def raw_figure(config: PretrainConfig, device: torch.device, horizon: int = HORIZON) -> float:
    """The same read-out of the raw tokens."""
    if is_forecast(config):
        data = config.data.plain()
        found = forecasters.best_ridge(data, forecasters.raw_features, horizon, _WINDOWS, device)
        return float(1 - found["mse"] / persistence(data, horizon, device))
    reader = raw_reader(attentive=False, per_token=tokens_per_sample(config.data.plain()) > 0)
    ((row,),) = score_readers(config, [reader], World(0, 1, device))
    return float(row[probing.metric_of(row)])


# --------------------------------------------------------------------- in one setting, beside random weights


def one_setting(config: PretrainConfig, labels: Sequence[int | None], steps: int) -> Care:
    """Nothing to choose: the learning rate and attention of the preset, and so many steps."""
    if is_forecast(config):
        lr = forecasters.short(config, None, "predictor", HORIZON, steps=steps, samples=_WINDOWS).optim.lr
        causal = config.objective.causal
    else:
        preset = presets.short(config)
        lr, causal = preset.optim.lr, preset.causal
    one = {"learning_rates": (lr,), "finetune_steps": (steps,), "finetune_causal": (causal,)}
    return Care(labels=tuple(labels), horizon=HORIZON, **one)


def beside_random(
    config: PretrainConfig, model: NEPA, run: Run, care: Care, random: RunMeasures | None = None
) -> RunMeasures:
    """`downstream` of a run; under names that end in "_random" of the random weights of its seed; and `raw_tokens`.

    Args:
        random: of `untrained`, where that was measured before.
    """
    device = next(model.parameters()).device
    own = downstream(config, model, run.path, care)
    random = downstream(config, build_model(config).to(device).eval(), None, care) if random is None else random
    layers, control = own["layers"], random["layers"]
    return joined(own, as_control(random)) | {
        "raw_tokens": raw_figure(config, device),
        "layers": layers | {"probe_random": control["probe"], "rank_random": control["rank"]},
    }


def untrained(config: PretrainConfig, care: Care) -> RunMeasures:
    """`downstream` of the random weights of a seed, by a process of its own."""
    with world() as ranks:
        return downstream(config, build_model(config).to(ranks.device).eval(), None, care)


def as_control(random: RunMeasures) -> RunMeasures:
    """What is kept beside a run of `downstream` of its random weights, under names that end in "_random"."""
    twin: RunMeasures = {
        "probe_random": random["probe"],
        "probe_final_random": random["probe_final"],
        "probe_row_random": random["probe_row"],
        "credits": {f"{name}_random": packed for name, packed in random["credits"].items()},
        "clusters": {f"{name}_random": packed for name, packed in random["clusters"].items()},
    }
    tuned = {f"{key}_random": value for key, value in random.items() if key in random["settings"]}
    return cast(RunMeasures, tuned) | twin


def read_as(folder: Path, reading: Modality) -> RunMeasures:
    """Probe of the run in `folder` when its samples are read by another adapter, such as one with another order.

    Of the best layer, means over tokens alone (of a forecast, as `forecast_layers`); the layer is chosen on held-back
    training samples.
    """
    with world() as ranks:
        config, model = load_pretrained(Run(folder), ranks.device)
        config = config.model_copy(update={"data": reading})
        if is_forecast(config):
            read = forecast_layers(config, model)
            return {"probe": read["probe"], "probe_row": read["probe_row"]}
        per_sample = tokens_per_sample(config.data.plain())
        rows = [Row(layer, "token" if per_sample else "mean") for layer in range(config.model.depth + 2)]
        reader = network_reader(config, model, rows, causal=config.objective.causal)
        (scored,) = score_readers(config, [reader], ranks)
    best = probing.best_row(scored)
    return {"probe": best[probing.metric_of(best)], "probe_row": best["name"]}


# --------------------------------------------------------------------------------------------- with targets


def probed_layers(config: PretrainConfig, model: NEPA) -> RunMeasures:
    """The rows that `nepa orders` reads, too: every layer, mean over tokens and last token, or single tokens."""
    causal, depth = config.objective.causal, config.model.depth
    if per_sample := tokens_per_sample(config.data.plain()):
        rows, _ = probing.token_rows(PROBE, depth=depth, per_sample=per_sample)
    else:
        rows, _ = probing.chosen_rows(PROBE, depth=depth, bos=config.model.bos, causal=causal)
    device = next(model.parameters()).device
    (scored,) = score_readers(config, [network_reader(config, model, rows, causal=causal)], World(0, 1, device))
    return by_layer(scored)


def held_back(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices to choose by), drawn by `seed`: a fifth to choose by, one sample at least.

    Of a single sample there is nothing to choose by.
    """
    drawn = epoch_order(count, fold_seed(seed, "held back"), 0).tolist()
    cut = min(HELD_BACK, max(count // 5, 1), count - 1)
    return drawn[cut:], drawn[:cut]


def folds(kinds: Sequence[int], count: int) -> list[tuple[list[int], list[int]]]:
    """(places to train on, places to score) for each part of few labelled samples.

    The samples of a class are dealt to the parts in turn, so no part takes all of a class. A class of one sample is
    always trained on and never scored.

    Args:
        kinds: class of every sample. count: parts wanted; fewer where fewer samples can be scored.

    Returns:
        At least two parts, or none where no class has two samples.
    """
    several = [kind for kind in sorted(set(kinds)) if kinds.count(kind) > 1]
    dealt = [place for kind in several for place, own in enumerate(kinds) if own == kind]
    parts = [dealt[part::count] for part in range(min(count, len(dealt)))]
    return [([place for place in range(len(kinds)) if place not in set(part)], part) for part in parts]


def fine_tuned(
    config: PretrainConfig, init: Path | None, device: torch.device, labels: int | None, care: Care
) -> Tuned:
    """Held-out accuracy (r2 of numbers) of all weights after `measures.short_tuning` on `labels` a class.

    No label beside these is used: see the head of this file. With one label a class there is nothing to choose by, and
    `middle_setting` is taken.
    """
    goal, seed = find_goal(config.data), config.train.seed
    whole, plain = (data.samples_of("train") for data in (config.data, config.data.plain()))
    alone = World(0, 1, device)

    def short(samples: Dataset[Batch], setting: Setting) -> configs.FinetuneConfig:
        return setting.applied(short_tuning(config, init, samples, whole=labels is None, steps=setting.steps))

    def at(setting: Setting) -> tuple[float, None]:
        total = 0.0
        for rest, kept in parts:
            samples = Some(whole, rest)
            tuning = short(samples, setting)
            model = trained(tuning, goal, samples, device)
            figures = finetuning.measure(tuning, model, alone, Some(plain, kept))
            # R2 and mAP of few samples are noise, and their loss is not.
            total += len(kept) * (figures["accuracy"] if "accuracy" in figures else -figures["held_out_loss"])
        return total / sum(len(kept) for _, kept in parts), None

    if labels is None:
        samples, used = whole, len(cast(Any, whole))
        parts = [each for each in [held_back(used, seed)] if each[1]]
    else:
        samples = few_labels(whole, goal, labels, seed)
        goal = fitted(goal, samples, type(config.data).__name__)  # so that no other labels are used
        used = len(samples)
        parts = [
            ([samples.indices[place] for place in train], [samples.indices[place] for place in held])
            for train, held in folds(samples.kinds, care.folds)
        ]
    chosen = best_setting(care, at) if parts and care.only is None else Chosen(middle_setting(care), None)
    tuning = short(samples, chosen.setting)
    return Tuned(tested(tuning, trained(tuning, goal, samples, device), device), chosen, used)


# ------------------------------------------------------------------------------------ series without targets


def forecast_layers(config: PretrainConfig, model: NEPA, horizon: int = HORIZON) -> RunMeasures:
    """A ridge forecast from every layer, flattened or of the last token, whichever validates better."""
    data, device = config.data.plain(), next(model.parameters()).device
    read = partial(forecasters.network_features, model, causal=config.objective.causal)
    fitted = forecasters.fitted_ridges(data, read, horizon, _WINDOWS, device)
    names = ["embedding", *(f"layer {layer}" for layer in range(1, config.model.depth + 1)), "final norm"]
    of_layer = [{key: each for key, each in fitted.items() if key.startswith(f"{name},")} for name in names]
    repeated = persistence(data, horizon, device)
    rows = [forecasters.best_of(data, read, ridges, horizon, device) for ridges in of_layer]
    skills = [skill(data, horizon, row, repeated) for row in rows]
    best = min(range(len(rows)), key=lambda layer: float(rows[layer]["validation_mse"]))
    return as_row({"probe": skills[best], "probe_final": skills[-1]}) | {
        "metric": "skill",
        "probe_row": rows[best]["readout"],
        "layers": {"name": names, "probe": [each.value for each in skills], "rank": layer_ranks(config, model)},
    }


def skill(data: Modality, horizon: int, found: forecasters.Scored, repeated: float) -> Figure:
    """1 - MSE / MSE of repeating the last value, over the test windows, with what each adds.

    Windows that overlap depend on each other: they are one cluster by the stretch of time that they start in.

    Args:
        repeated: the other MSE.
    """
    credits = 1 - found["errors"].double() / repeated
    packed = pack_credits(credits) if bool(credits.isfinite().all()) else None
    clusters = pack_clusters(stretches(data.forecasts("test", horizon)), chained=True)
    return Figure(1 - found["mse"] / repeated, packed, clusters)


def persistence(data: Modality, horizon: int, device: torch.device) -> float:
    """MSE of repeating the last value."""
    repeat = forecasters.score(data, "test", horizon, device, lambda batch: forecasters.repeat_last(data, batch))
    return float(repeat["mse"])


def forecast_tuned(config: PretrainConfig, init: Path | None, device: torch.device, care: Care) -> Tuned:
    """Skill of the whole network after training to forecast; its setting is chosen on the validation rows."""
    start, steps = None if init is None else str(init), care.finetune_steps[0]
    short = forecasters.short(config, start, "predictor", care.horizon, steps=steps, samples=_WINDOWS)

    def at(setting: Setting) -> tuple[float, forecasters.Scored]:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            figures = forecasters.train(setting.applied(short), run, World(0, 1, device), show=False)
            found: forecasters.Scored = {**figures, "errors": forecasters.left_errors(run)}
        return -found["validation_mse"], found

    chosen = best_setting(care, at)
    figure = skill(short.data, care.horizon, chosen.kept, persistence(short.data, care.horizon, device))
    return Tuned(figure, chosen, min(_WINDOWS, len(cast(Sized, short.data.forecasts("train", care.horizon)))))


@torch.no_grad()
def layer_ranks(config: PretrainConfig, model: NEPA) -> list[float]:
    """Effective rank of drawn held-out windows' means over tokens, from the embedding to the final norm."""
    data, device = config.data.plain(), next(model.parameters()).device
    means: list[list[torch.Tensor]] = [[] for _ in range(config.model.depth + 2)]
    for batch in drawn_batches(data, PROBE.test_samples, device, at_once=forecasters.BATCH):
        trace = Trace()
        mask = model(data.read(batch), causal=config.objective.causal, trace=trace).mask
        for found, hidden in zip(means, trace.hidden, strict=True):
            found.append(mean_of_tokens(hidden, mask, bos=config.model.bos))
    return [effective_rank(torch.cat(found)) for found in means]
