"""What forecasts a series: ridge regressions on frozen features or raw values, persistence, and trained networks.

All are fitted on the same random choice of training windows (`chosen`) and scored by `score`.

Shapes: B samples, L steps of look-back, H to forecast, C channels in a sample, F features, Y = H * C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, PositiveInt, SerializeAsAny
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from modalities.timeseries import TimeSeries
from nepa_core.basics import FROZEN, Batch
from nepa_core.ema import Ema, applied
from nepa_core.model import NEPA, draw_coord_scale, layers_above
from nepa_core.predictor import PredictorConfig, Trace
from nepa_core.runtime.data import epoch_order, fold_seed, plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import StepFunction, StepOutput, TrainConfig, fit
from nepa_core.runtime.optim import Duration, OptimConfig
from nepa_core.runtime.run import Run
from recipes.heads import canonical_tokens, last_token
from recipes.pretrain import PretrainConfig
from recipes.training import opened
from recipes.weights import load_backbone, read_weights

READOUTS = ("flattened tokens", "last token")
STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # of the ridge, times the mean variance of a feature
BATCH = 256
TREND = 25  # steps of DLinear's moving average

Network = Literal["predictor", "dlinear"]


def chosen(data: TimeSeries, split: str, horizon: int, samples: int) -> Dataset[Batch]:
    """At most `samples` windows of a split, chosen at random: the same ones for all that is fitted."""
    windows = data.forecasts(split, horizon)
    return Subset(windows, epoch_order(len(windows), 0, 0)[:samples].tolist())


def scaled_future(data: TimeSeries, batch: Batch) -> Tensor:
    """The future [B, H, C] in the window's own units."""
    mean, std = data.scale(batch)
    scaled: Tensor = (batch["future"] - mean) / std
    return scaled


def repeat_last(data: TimeSeries, batch: Batch) -> Tensor:
    """The last value of each channel that is not missing, at every step to come, [B, H, C]."""
    series: Tensor = batch["series"]
    observed = batch.get("observed", torch.ones_like(series, dtype=torch.bool))
    steps = torch.arange(series.shape[1], device=series.device)[None, :, None]
    last = torch.where(observed, steps, 0).amax(1, keepdim=True)
    return series.gather(1, last).expand_as(batch["future"])


@torch.no_grad()
def score(
    data: TimeSeries, split: str, horizon: int, device: torch.device, predict: Callable[[Batch], Tensor]
) -> dict[str, float]:
    """MSE and MAE of z-scored values over every window of a split; `predict` gives [B, H, C]."""
    squared, absolute, count = 0.0, 0.0, 0
    for batch in plain_batches(data.forecasts(split, horizon), batch=BATCH, device=device):
        error = predict(batch).float() - batch["future"]
        squared += float(error.double().square().sum())
        absolute += float(error.double().abs().sum())
        count += error.numel()
    return {"mse": squared / count, "mae": absolute / count}


# ----------------------------------------------------------------------------------- ridge on frozen features

Reader = Callable[[TimeSeries, Batch], dict[str, Tensor]]
"""(adapter, batch) -> name of a read-out -> features [B, F]."""


def raw_features(data: TimeSeries, batch: Batch) -> dict[str, Tensor]:
    """The look-back window as the network sees it: normalised, missing tokens as zeros."""
    tokens = data.tokenize(batch)
    values = tokens.values if tokens.mask is None else tokens.values * tokens.mask[..., None]
    return {"raw": values.flatten(1)}


def network_features(model: NEPA, data: TimeSeries, batch: Batch, *, causal: bool) -> dict[str, Tensor]:
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
    """Sums over samples, float64 on the device: of 1, x, y, x x^T, x y^T and |y|^2."""

    samples: int
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
def best_ridge(data: TimeSeries, read: Reader, horizon: int, samples: int, device: torch.device) -> dict[str, Any]:
    """Fit a ridge on every read-out, take the one (and the strength) that validates best, and score it on the test."""
    return best_of(data, read, fitted_ridges(data, read, horizon, samples, device), horizon, device)


@torch.no_grad()
def fitted_ridges(
    data: TimeSeries, read: Reader, horizon: int, samples: int, device: torch.device
) -> dict[str, tuple[Ridge, float]]:
    """`fit_ridge` of every read-out, from one pass over the training and validation windows."""
    train, held = (
        _moments(data, read, split, horizon, samples if split == "train" else max(samples // 4, 1), device)
        for split in ("train", "validation")
    )
    return {name: fit_ridge(train[name], held[name]) for name in train}


@torch.no_grad()
def best_of(
    data: TimeSeries, read: Reader, fitted: Mapping[str, tuple[Ridge, float]], horizon: int, device: torch.device
) -> dict[str, Any]:
    """The test figures of the read-out that validates best."""
    name = min(fitted, key=lambda name: fitted[name][1])
    ridge, validation = fitted[name]

    def predict(batch: Batch) -> Tensor:
        mean, std = data.scale(batch)
        return rearrange(ridge(read(data, batch)[name].float()), "b (h c) -> b h c", h=horizon) * std + mean

    return {**score(data, "test", horizon, device, predict), "readout": name, "validation_scaled_mse": validation}


def _moments(
    data: TimeSeries, read: Reader, split: str, horizon: int, samples: int, device: torch.device
) -> dict[str, Moments]:
    """The moments of every read-out with the future, over the chosen windows of a split."""
    sums: dict[str, list[Any]] = {}
    for batch in plain_batches(chosen(data, split, horizon, samples), batch=BATCH, device=device):
        y = scaled_future(data, batch).flatten(1)
        for name, x in read(data, batch).items():
            x = x.float()
            parts = (len(x), *(part.double() for part in (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())))
            if name in sums:
                sums[name] = [total + part for total, part in zip(sums[name], parts, strict=True)]
            else:
                sums[name] = list(parts)
    return {name: Moments(*parts) for name, parts in sums.items()}


def fit_ridge(train: Moments, held: Moments) -> tuple[Ridge, float]:
    """The ridge whose strength serves `held` best, and its mean squared error there, in the scale it was fitted in.

    In the eigenbasis of the covariance a strength scales the rows of one matrix, so all of them cost one product.
    """
    x, y = train.x / train.samples, train.y / train.samples
    cov, cross = _about(train, x, y)
    values, vectors = torch.linalg.eigh(cov)
    turned = vectors.T @ cross
    held_cov, held_cross = _about(held, x, y)
    held_cov = (vectors.T @ held_cov @ vectors) * (turned @ turned.T)
    held_cross = (turned * (vectors.T @ held_cross)).sum(1)
    energy = held.yy / held.samples - 2 * (held.y / held.samples) @ y + y @ y
    shrink = [1 / (values.clamp(min=0) + power * values.mean().clamp(min=1e-12)) for power in STRENGTHS]
    errors = [float(energy - 2 * held_cross @ d + d @ held_cov @ d) / len(y) for d in shrink]
    best = min(range(len(errors)), key=errors.__getitem__)
    weights = vectors @ (turned * shrink[best][:, None])
    return Ridge(weights.float(), (y - x @ weights).float()), errors[best]


def _about(moments: Moments, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of (x' - x)(x' - x)^T [F, F] and of (x' - x)(y' - y)^T [F, Y] over the samples x', y'."""
    mean, target = moments.x / moments.samples, moments.y / moments.samples
    cov = moments.xx / moments.samples - torch.outer(mean, x) - torch.outer(x, mean - x)
    cross = moments.xy / moments.samples - torch.outer(mean, y) - torch.outer(x, target - y)
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
    data: SerializeAsAny[TimeSeries]
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

    def forward(self, data: TimeSeries, batch: Batch, *, causal: bool, coord_scale: float = 1.0) -> Tensor:
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

    def forward(self, data: TimeSeries, batch: Batch, *, causal: bool, coord_scale: float = 1.0) -> Tensor:
        """The future [B, H, C] in the window's own units; it looks at the whole window, whatever `causal` says."""
        mean, std = data.scale(batch)
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
    assert isinstance(data, TimeSeries)
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
                "batch": min(128, samples, len(data.forecasts("train", horizon))),
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
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    data = config.data
    if config.network == "dlinear":
        return DLinear(data.window, config.horizon)
    backbone = NEPA(config.model, data.embedder(config.model.dim))
    if config.init is not None:
        load_backbone(backbone, config.model, read_weights(config.init))
    outputs = config.horizon * (1 if data.channels == "independent" else data.channel_count())
    return Forecaster(backbone, data.window // data.patch, outputs)


def train(config: ForecastConfig, run: Run, ranks: World, *, show: bool = True) -> dict[str, Any]:
    """Train through `fit` and score the averaged weights after the last step; a finished run is not trained again."""
    if (finished := opened(config, run, ranks)) is not None:
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
    summary = {**test, "validation_mse": held["mse"], "steps": result.steps, "seconds": round(result.seconds, 2)}
    run.write_summary(summary)
    return summary


def make_step(config: ForecastConfig) -> StepFunction:
    """The step function: batch -> mean squared error in the window's own units."""

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        scale = draw_coord_scale(config.model.rope_rescale)
        future = model(config.data, batch, causal=config.causal, coord_scale=scale)
        with torch.autocast(future.device.type, enabled=False):
            loss = F.mse_loss(future.float(), scaled_future(config.data, batch))
        return StepOutput(loss, float(len(future)), len(future) * (config.data.window // config.data.patch))

    return step


def _predict(config: ForecastConfig, model: nn.Module, batch: Batch) -> Tensor:
    """The future [B, H, C], z-scored: normalisation undone."""
    mean, std = config.data.scale(batch)
    future: Tensor = model(config.data, batch, causal=config.causal) * std + mean
    return future
