"""What forecasts a series: ridge regressions on frozen features or raw values, persistence, and trained networks.

All are fitted on the same random choice of training windows (`chosen`), by the error that `score` reports: that of the
z-scored series. Where windows are normalised one by one, inputs and outputs of a model are in a window's own units, and
what it says is multiplied by the window's deviation before it is compared. So a flat window, whose own units are next
to nothing, counts for next to nothing.

Shapes: B samples, L steps of look-back, H to forecast, C channels in a sample, F features, Y = H * C, W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, PositiveInt, SerializeAsAny
from torch import Tensor, nn
from torch.utils.data import Dataset

from nepa_core.basics import FROZEN, Batch, UserError
from nepa_core.contract import check_forecasts
from nepa_core.ema import Ema, applied
from nepa_core.modality import Modality
from nepa_core.model import NEPA, draw_coord_scale, layers_above
from nepa_core.pooling import canonical_tokens, last_token
from nepa_core.predictor import PredictorConfig, Trace
from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.data import epoch_order, fold_seed, plain_batches, replace_broken
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import StepFunction, StepOutput, TrainConfig, fit
from nepa_core.runtime.optim import Duration, OptimConfig
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import load_backbone, read_weights
from nepa_core.samples import Some
from nepa_core.tokens import LARGEST_VALUE
from recipes.configs import PretrainConfig
from recipes.report.summaries import ForecastFigures
from recipes.statistics.held_out import NUMBER, Numbered
from recipes.training.train import opened

READOUTS = ("flattened tokens", "last token")
STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # of the ridge, times the mean variance of a feature
BATCH = 256
ERRORS_FILE = "errors.npy"
TREND = 25  # steps of DLinear's moving average

Network = Literal["predictor", "dlinear"]


class Form(NamedTuple):
    """What all windows of an adapter have in common: `steps` L, `channels` C of a sample, and `tokens` N."""

    steps: int
    channels: int
    tokens: int


def form_of(data: Modality, horizon: int) -> Form:
    """Seen on the first validation window."""
    batch = next(plain_batches(data.forecasts("validation", horizon), batch=1, device=torch.device("cpu")))
    steps, channels = batch["series"].shape[1:]
    return Form(steps, channels, data.tokenize(batch).values.shape[1])


def check_windows(data: Modality, horizon: int) -> dict[str, Dataset[Batch]]:
    """The windows of all splits, before anything is fitted.

    Raises:
        UserError: the adapter offers no forecasts, a split is too short, or windows are not what `Modality.forecasts`
            says.
    """
    try:
        return {split: check_forecasts(data, split, horizon) for split in ("train", "validation", "test")}
    except AssertionError as error:
        raise UserError(f"{type(data).__name__}: {error}") from error


def series_digest(windows: Mapping[str, Dataset[Batch]]) -> str:
    """SHA-256 of the series that windows are cut from, where they have it as `values`, else of all windows."""
    digest, whole = hashlib.sha256(), getattr(windows["test"], "values", None)
    if whole is not None:
        digest.update(whole.numpy().tobytes())
        return digest.hexdigest()
    for each in windows.values():
        for batch in plain_batches(each, batch=BATCH, device=torch.device("cpu")):
            for name in sorted(batch):
                digest.update(batch[name].numpy().tobytes())
    return digest.hexdigest()


def chosen(data: Modality, split: str, horizon: int, samples: int) -> Some:
    """At most `samples` windows of a split, chosen at random: the same ones for all that is fitted."""
    windows = data.forecasts(split, horizon)
    return Some(windows, epoch_order(len(cast(Sized, windows)), 0, 0)[:samples].tolist())


def sound_batches(data: Modality, windows: Dataset[Batch], device: torch.device) -> Iterator[Batch]:
    """All windows, batch by batch, the same for every row of the table.

    Raises:
        UserError: one of them holds NaN or infinity, in its look-back or in what is to be forecast; at the end.
    """
    broken: set[str] = set()
    numbered = Numbered(windows)
    for batch in plain_batches(numbered, batch=BATCH, device=device, unreadable=broken, tokenize=data.tokenize):
        sound = (batch["future"].abs() <= LARGEST_VALUE).flatten(1).all(1)
        if not sound.all():
            lost = batch[NUMBER][~sound].tolist()
            broken |= {f"{numbered.name(row)}: what is to be forecast is not finite" for row in lost}
        yield {name: value for name, value in batch.items() if name != NUMBER}
    if broken:
        raise UserError(
            f"{type(data).__name__}: {len(broken):,} of {len(cast(Sized, windows)):,} windows can't be forecast; "
            f"the first is {min(broken)}; empty such cells, or repair them"
        )


def in_series_units(data: Modality, batch: Batch, future: Tensor) -> Tensor:
    """A forecast [B, H, C] in the window's own units -> float32 in those of the z-scored series."""
    mean, std = data.window_scale(batch)
    return future.float() * std + mean


def repeat_last(data: Modality, batch: Batch) -> Tensor:
    """The last value of each channel that is not missing, at every step to come, [B, H, C]."""
    series: Tensor = batch["series"]
    observed = batch.get("observed", torch.ones_like(series, dtype=torch.bool))
    steps = torch.arange(series.shape[1], device=series.device)[None, :, None]
    last = torch.where(observed, steps, 0).amax(1, keepdim=True)
    return series.gather(1, last).expand_as(batch["future"])


class Scored(ForecastFigures, total=False):
    """With what goes to errors.npy: the squared error of every test window, [W] on the CPU."""

    errors: Tensor


@torch.no_grad()
def score(data: Modality, split: str, horizon: int, device: torch.device, predict: Callable[[Batch], Tensor]) -> Scored:
    """MSE and MAE of z-scored values over every window of a split; `predict` gives [B, H, C].

    `errors` are float64, means over the horizon and the channels of a sample.
    """
    squared, absolute = [], []
    for batch in sound_batches(data, data.forecasts(split, horizon), device):
        error = (predict(batch).float() - batch["future"]).double()
        squared.append(error.square().mean((1, 2)).cpu())
        absolute.append(error.abs().mean((1, 2)).cpu())
    errors = torch.cat(squared)
    return {"mse": float(errors.mean()), "mae": float(torch.cat(absolute).mean()), "errors": errors}


def leave(run: Run, figures: Scored) -> ForecastFigures:
    """Write what `score` and its like gave to a row's folder: "errors" to errors.npy, then the rest to summary.json.

    Returns:
        The rest.
    """
    rest = figures.copy()
    errors = rest.pop("errors")
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        np.save(run.path / ERRORS_FILE, errors.float().numpy())
    run.write_summary(rest)
    return rest


def left_errors(run: Run) -> Tensor:
    """The squared errors [W] float32 of the test windows that `leave` wrote.

    Raises:
        UserError: they are missing or damaged.
    """
    file = run.path / ERRORS_FILE
    try:
        return torch.from_numpy(np.load(file))
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise UserError(f"{file} can't be read ({error}); delete {run.path} and give the same command again") from error


# ----------------------------------------------------------------------------------- ridge on frozen features

Reader = Callable[[Modality, Batch], dict[str, Tensor]]
"""(adapter, batch) -> name of a read-out -> features [B, F]."""


def raw_features(data: Modality, batch: Batch) -> dict[str, Tensor]:
    """The look-back window as the network sees it: normalised, missing tokens as zeros."""
    tokens = data.tokenize(batch)
    values = tokens.values if tokens.mask is None else tokens.values * tokens.mask[..., None]
    return {"raw": values.flatten(1)}


def network_features(model: NEPA, data: Modality, batch: Batch, *, causal: bool) -> dict[str, Tensor]:
    """Every layer's tokens, flattened in canonical order, and its last real token; BOS left out."""
    tokens, trace, bos = data.read(batch), Trace(), model.config.bos
    mask = model(tokens, causal=causal, trace=trace).mask
    found = {}
    for layer, hidden in enumerate(trace.hidden):
        name = {0: "embedding", len(trace.hidden) - 1: "final norm"}.get(layer, f"layer {layer}")
        found[f"{name}, {READOUTS[0]}"] = canonical_tokens(hidden, tokens, bos=bos).flatten(1)
        found[f"{name}, {READOUTS[1]}"] = last_token(hidden, mask)
    return found


class Moments(NamedTuple):
    """Weighted sums over samples, float64 on the device: of 1, x, y, x x^T, x y^T and |y|^2."""

    weight: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor


class Ridge(NamedTuple):
    """y = x @ weights [F, Y] + offset [Y]."""

    weights: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weights + self.offset


@torch.no_grad()
def best_ridge(data: Modality, read: Reader, horizon: int, samples: int, device: torch.device) -> Scored:
    """Fit a ridge on every read-out, take the one (and the strength) that validates best, and score it on the test."""
    return best_of(data, read, fitted_ridges(data, read, horizon, samples, device), horizon, device)


@torch.no_grad()
def fitted_ridges(
    data: Modality, read: Reader, horizon: int, samples: int, device: torch.device
) -> dict[str, tuple[Ridge, float]]:
    """A ridge on every read-out and its validation MSE, from one pass over the training and validation windows.

    A ridge says the future in the window's own units: z = std * (x @ weights + offset) + mean. The error in z is
    weighted least squares, with weight std^2, on (z - mean) / std, for the offset alike. Channels that stand in one
    sample have deviations of their own, so each has its own weights and strength.
    """
    held_on = chosen(data, "validation", horizon, max(samples // 4, 1))
    train = _moments(data, read, chosen(data, "train", horizon, samples), device)
    held = _moments(data, read, held_on, device)
    found = {}
    for name, of_groups in train.items():
        fits = [fit_ridge(*pair) for pair in zip(of_groups, held[name], strict=True)]
        weights, offset = (  # the groups are channels, or all of them are one
            rearrange(torch.stack(parts), "g ... (h c) -> ... (h g c)", h=horizon)
            for parts in zip(*(ridge for ridge, _ in fits), strict=True)
        )
        error = sum(error * each.weight for (_, error), each in zip(fits, held[name], strict=True))
        found[name] = Ridge(weights, offset), error / (len(held_on) * len(fits))
    return found


@torch.no_grad()
def best_of(
    data: Modality, read: Reader, fitted: Mapping[str, tuple[Ridge, float]], horizon: int, device: torch.device
) -> Scored:
    """What `score` gives on the test windows for the read-out that validates best; its name and validation MSE."""
    name = min(fitted, key=lambda name: fitted[name][1])
    ridge, validation = fitted[name]
    predict = partial(predict_by, data, read, name, ridge, horizon)
    return {**score(data, "test", horizon, device, predict), "readout": name, "validation_mse": validation}


def predict_by(data: Modality, read: Reader, name: str, ridge: Ridge, horizon: int, batch: Batch) -> Tensor:
    """What a ridge on the read-out of this name says, [B, H, C] in the units of "series"."""
    future = rearrange(ridge(read(data, batch)[name].float()), "b (h c) -> b h c", h=horizon)
    return in_series_units(data, batch, future)


def _moments(data: Modality, read: Reader, windows: Dataset[Batch], device: torch.device) -> dict[str, list[Moments]]:
    """The moments of every read-out with the future, over some windows.

    Weighted by std^2, for each channel of a sample apart; all channels are one group where they share their units.
    Nothing is divided by std: std^2 x x^T comes of std x, and std^2 x y^T of std x and std y = z - mean.
    """
    sums: dict[str, list[list[Any]]] = {}
    for batch in sound_batches(data, windows, device):
        mean, std = data.window_scale(batch)
        future = batch["future"] - mean
        shared = std.shape[2] == 1
        groups = [(std[:, 0], future.flatten(1))] if shared else list(zip(*_channels(std, future), strict=True))
        for name, x in read(data, batch).items():
            found = [_weighted(x.float(), own, y) for own, y in groups]
            if name in sums:
                found = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums[name], found, strict=True)]
            sums[name] = found
    return {name: [Moments(*parts) for parts in found] for name, found in sums.items()}


def _channels(std: Tensor, future: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Channel by channel: std [B, 1, C] as [B, 1], and future [B, H, C] as [B, H]."""
    return [each[:, 0, None] for each in std.unbind(2)], list(future.unbind(2))


def _weighted(x: Tensor, std: Tensor, y: Tensor) -> list[Any]:
    """The parts of `Moments` of a batch, of x [B, F], std [B, 1] and std * y [B, Y]."""
    own = std * x
    parts = ((std * own).sum(0), (std * y).sum(0), own.T @ own, own.T @ y, y.square().sum())
    return [float(std.double().square().sum()), *(part.double() for part in parts)]


def fit_ridge(train: Moments, held: Moments) -> tuple[Ridge, float]:
    """The ridge whose strength serves `held` best, and its (weighted) mean squared error there, per number of y.

    In the eigenbasis of the covariance a strength scales the rows of one matrix, so all of them cost one product.
    """
    x, y = train.x / train.weight, train.y / train.weight
    cov, cross = _about(train, x, y)
    values, vectors = torch.linalg.eigh(cov)
    turned = vectors.T @ cross
    held_cov, held_cross = _about(held, x, y)
    held_cov = (vectors.T @ held_cov @ vectors) * (turned @ turned.T)
    held_cross = (turned * (vectors.T @ held_cross)).sum(1)
    energy = held.yy / held.weight - 2 * (held.y / held.weight) @ y + y @ y
    scale = float(values.mean())
    scale = scale if scale > 0 else 1.0  # features that never vary
    shrink = [1 / (values.clamp(min=0) + power * scale) for power in STRENGTHS]
    errors = [float(energy - 2 * held_cross @ d + d @ held_cov @ d) / len(y) for d in shrink]
    best = min(range(len(errors)), key=errors.__getitem__)
    weights = vectors @ (turned * shrink[best][:, None])
    return Ridge(weights.float(), (y - x @ weights).float()), errors[best]


def _about(moments: Moments, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of (x' - x)(x' - x)^T [F, F] and of (x' - x)(y' - y)^T [F, Y] over the samples x', y'."""
    mean, target = moments.x / moments.weight, moments.y / moments.weight
    cov = moments.xx / moments.weight - torch.outer(mean, x) - torch.outer(x, mean - x)
    cross = moments.xy / moments.weight - torch.outer(mean, y) - torch.outer(x, target - y)
    return cov, cross


# ------------------------------------------------------------------------------------------ trained networks


class ForecastConfig(BaseModel):
    """A network trained to forecast.

    Attributes:
        init: a run to start from; None for random weights.
        network: "predictor" under one linear map of its flattened tokens, or "dlinear".
        causal: attend backwards only.
        horizon: steps to forecast.
        samples: most windows (times channels where independent) to train on.
    """

    model_config = FROZEN

    task: ClassVar[str] = "forecast"

    init: str | None
    data: SerializeAsAny[Modality]
    model: PredictorConfig
    network: Network
    causal: bool
    horizon: PositiveInt
    samples: PositiveInt
    optim: OptimConfig
    train: TrainConfig


class Forecaster(nn.Module):
    """The predictor and one linear map, which starts at zero, of its flattened output to the future."""

    def __init__(self, backbone: NEPA, tokens: int, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(tokens * backbone.config.dim, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, data: Modality, batch: Batch, *, causal: bool, coord_scale: float = 1.0) -> Tensor:
        """The future [B, H, C] in the window's own units."""
        tokens = data.read(batch)
        out = self.backbone(tokens, causal=causal, coord_scale=coord_scale)
        features = canonical_tokens(out.predictions, tokens, bos=self.backbone.config.bos)
        future: Tensor = rearrange(self.head(features.flatten(1)), "b (h c) -> b h c", c=batch["series"].shape[2])
        return future


class DLinear(nn.Module):
    """A linear map of the moving average and one of the rest, shared by the channels; both start as the mean.

    Sees the window as the adapter normalises it. The function is linear in the window, as the ridge's.
    """

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(window, horizon), nn.Linear(window, horizon)
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / window)
            nn.init.zeros_(layer.bias)

    def forward(self, data: Modality, batch: Batch, *, causal: bool, coord_scale: float = 1.0) -> Tensor:
        """The future [B, H, C] in the window's own units; it looks at the whole window, whatever `causal` says."""
        mean, std = data.window_scale(batch)
        series = (batch["series"] - mean) / std
        series = torch.where(batch["observed"], series, 0.0) if "observed" in batch else series
        series = series.transpose(1, 2)  # [B, C, L]
        trend = F.avg_pool1d(F.pad(series, (TREND // 2, TREND // 2), mode="replicate"), TREND, stride=1)
        future: Tensor = self.trend(trend) + self.rest(series - trend)
        return future.transpose(1, 2)


def short(
    config: PretrainConfig, init: str | None, network: Network, horizon: int, *, steps: int, samples: int
) -> ForecastConfig:
    """The setting of all trained networks, chosen here: batch 128, averaged weights, lr 5e-4 (DLinear 1e-3)."""
    data = config.data.plain()
    windows = cast(Sized, data.forecasts("train", horizon))
    return ForecastConfig(
        init=init,
        data=data,
        model=config.model.model_copy(update={"mask_token": False, "rope_rescale": 1.0}),
        network=network,
        causal=config.objective.causal,
        horizon=horizon,
        samples=samples,
        optim=OptimConfig(
            lr=1e-3 if network == "dlinear" else 5e-4,
            lr_batch=None,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=Duration(fraction=0.1),
            clip=1.0,
        ),
        train=config.train.model_copy(
            update={
                "length": Duration(steps=steps),
                "batch": min(128, samples, len(windows)),
                "micro_batch": None,
                "ema": 0.99,
                "evaluate": steps,
                "checkpoint": steps,
                "compile": False,
            }
        ),
    )


def build(config: ForecastConfig) -> Forecaster | DLinear:
    """The network with the weights of `init`, or the seed's."""
    data = config.data
    steps, channels, tokens = form_of(data, config.horizon)
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    if config.network == "dlinear":
        return DLinear(steps, config.horizon)
    backbone = NEPA(config.model, data.embedder(config.model.dim))
    if config.init is not None:
        load_backbone(backbone, config.model, read_weights(config.init))
    return Forecaster(backbone, tokens, config.horizon * channels)


def train(config: ForecastConfig, run: Run, ranks: World, *, show: bool = True) -> ForecastFigures:
    """Train through `fit` and score the averaged weights after the last step; a finished run is not trained again."""
    if (finished := opened(config, run, ranks, ForecastFigures)) is not None:
        return finished
    model = build(config).to(ranks.device)
    if ranks.is_main:
        run.open(config)
    ema = None if config.train.ema is None else Ema(model, config.train.ema)
    result = fit(
        model=model,
        step_function=make_step(config),
        dataset=chosen(config.data, "train", config.horizon, config.samples),
        config=config.train,
        optim=config.optim,
        run=run,
        world=ranks,
        ema=ema,
        changed_data=config.data.changed,
        height=lambda name: layers_above(name, config.model.depth, head_counts=True),
        show=show,
    )
    if not ranks.is_main:
        return {}
    model.eval()
    with applied(ema):
        test, held = (
            score(config.data, split, config.horizon, ranks.device, partial(_predict, config, model))
            for split in ("test", "validation")
        )
    test |= {"validation_mse": held["mse"], "steps": result.steps, "seconds": round(result.seconds, 2)}
    return leave(run, test)


def make_step(config: ForecastConfig) -> StepFunction:
    """The step function: batch -> mean squared error of the z-scored series, as it is reported."""

    tokens = form_of(config.data, config.horizon).tokens

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        _, batch, broken = replace_broken(config.data.tokenize(batch), batch)
        scale = draw_coord_scale(config.model.rope_rescale)
        future = model(config.data, batch, causal=config.causal, coord_scale=scale)
        with torch.autocast(future.device.type, enabled=False):
            loss = F.mse_loss(in_series_units(config.data, batch, future), batch["future"])
        return StepOutput(loss, float(len(future)), len(future) * tokens, broken)

    return step


def _predict(config: ForecastConfig, model: nn.Module, batch: Batch) -> Tensor:
    """The future [B, H, C], z-scored: normalisation undone."""
    return in_series_units(config.data, batch, model(config.data, batch, causal=config.causal))
