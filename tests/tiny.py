"""A data set of a few hundred numbers and recipes for it that train in a blink: what the tests run on.

Recipes are named as `tests.tiny:recipe`, so that the command can be tested in other processes too.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UnreadableSample
from nepa_core.ema import Ema
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import FitResult, StepFunction, StepOutput, fit
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes.configs import PretrainConfig
from recipes.presets import small
from recipes.training.judging import held_out_health
from recipes.training.pretraining import make_step
from recipes.training.starting import build_pretrainer

CPU = torch.device("cpu")

SHAPE: dict[str, Any] = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 32,
    "activation": "gelu",
    "gated": False,
    "layer_scale": 1.0,
    "qk_norm": "plain",
    "rope_theta": 100.0,
    "rope_rescale": 1.0,
    "bos": True,
    "norm_eps": 1e-6,
}
"""Settings of a small `PredictorConfig`, for tests that change a few."""


Count = Annotated[int, Field(ge=0, le=10**6)]


class Waves(Modality):
    """Noisy vectors that turn from token to token, at one of two speeds: the label.

    Attributes:
        samples: in each split. tokens, size: N and P.
        ragged: sequences of 2 to N real tokens, padded with large numbers, and a mask.
        jitter: standard deviation of the noise that augmentation adds to the training split.
        unreadable: indices that raise UnreadableSample.
        labelled: whether the samples carry their label.
    """

    samples: Count = 48
    tokens: Count = 6
    size: Count = 4
    ragged: bool = False
    jitter: float = 0.0
    unreadable: tuple[int, ...] = ()
    labelled: bool = True

    def dataset(self, split: str) -> Dataset[Batch]:
        jitter = self.jitter if split == "train" else 0.0
        series = Series(*_waves(self.samples, self.tokens, self.size, self.ragged, split), jitter, self.unreadable)
        if self.labelled:
            return series
        return cast(Dataset[Batch], [{k: v for k, v in sample.items() if k != "label"} for sample in series])

    def tokenize(self, batch: Batch) -> Tokens:
        values: Tensor = batch["values"]
        places = torch.arange(values.shape[1])
        mask = places.to(values.device) < batch["length"][:, None] if self.ragged else None
        return Tokens(values, places[:, None].float(), mask)

    def plain(self) -> Waves:
        return self.model_copy(update={"jitter": 0.0})


class Series(Dataset[Batch]):
    """Sequences in memory; the noise comes from torch's global generator."""

    def __init__(
        self, values: Tensor, lengths: Tensor, labels: Tensor, jitter: float = 0.0, unreadable: tuple[int, ...] = ()
    ) -> None:
        self.values, self.lengths, self.labels = values, lengths, labels
        self.jitter, self.unreadable = jitter, unreadable

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Batch:
        if index in self.unreadable:
            raise UnreadableSample(f"sample {index}: torn")
        noise = self.jitter * torch.randn_like(self.values[index])
        values = self.values[index] + noise
        length, label = self.lengths[index], self.labels[index]
        return {"values": values, "length": length, "label": label, "index": torch.as_tensor(index)}


@functools.cache
def _waves(samples: int, tokens: int, size: int, ragged: bool, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values [n, N, P], lengths [n], labels [n]."""
    source = torch.Generator().manual_seed(len(split))
    labels = torch.randint(2, (samples,), generator=source)
    angles = torch.arange(tokens) * torch.where(labels == 0, 0.5, 1.5)[:, None]
    start = torch.randn(samples, 1, size, generator=source)
    other = torch.randn(samples, 1, size, generator=source)
    values = start * angles.cos()[..., None] + other * angles.sin()[..., None]
    values += 0.1 * torch.randn(values.shape, generator=source)
    lengths = torch.randint(2, tokens + 1, (samples,), generator=source) if ragged else torch.full((samples,), tokens)
    values[torch.arange(tokens) >= lengths[:, None]] = 100.0  # shows at once where padding is not masked
    return values, lengths, labels


def recipe() -> PretrainConfig:
    """Twelve steps of eight samples; lines, measurements and checkpoints fall on different steps."""
    return override(
        small(Waves()),
        {
            "model.dim": 16,
            "model.depth": 2,
            "model.heads": 2,
            "model.mlp_dim": 32,
            "optim.lr": 3e-3,
            "train.length.steps": 12,
            "train.batch": 8,
            "train.log": 3,
            "train.evaluate": 5,
            "train.checkpoint": 4,
            "train.ema": 0.9,
            "verdict.fit_samples": 32,
            "verdict.test_samples": 32,
            "verdict.health_samples": 16,
        },
    )


def ragged() -> PretrainConfig:
    """Sequences of unequal length, under a mask."""
    return override(recipe(), {"data.ragged": True})


def random() -> PretrainConfig:
    """Everything that draws random numbers at once: dropped paths and inputs, scaled coordinates, augmentation."""
    return override(
        recipe(),
        {
            "data.jitter": 0.3,
            "model.drop_path": 0.3,
            "model.rope_rescale": 2.0,
            "model.mask_token": True,
            "objective.input_mask": 0.4,
        },
    )


def training(
    config: PretrainConfig,
    folder: Path,
    *,
    step: StepFunction | None = None,
    step_at: Callable[[float], StepFunction] | None = None,
    evaluate: Callable[[NEPA], dict[str, float]] | None = None,
) -> tuple[NEPA, Ema, FitResult]:
    """The training part of `recipes.training.pretraining.pretrain` alone, with a step or an evaluation of its own."""
    run = Run(folder)
    run.open(config)
    world = World(0, 1, CPU)
    model = build_pretrainer(config)
    if config.train.recompute:
        model.predictor.recompute_blocks()
    ema = Ema(model, config.train.ema or 0.9)
    result = fit(
        model=model,
        step_function=step or make_step(config),
        step_at=step_at,
        dataset=config.data.dataset("train"),
        config=config.train,
        optim=config.optim,
        run=run,
        world=world,
        ema=ema,
        evaluate=lambda: held_out_health(config, model, world, ema) if evaluate is None else evaluate(model),
    )
    return model, ema, result


def interrupted_at(calls: set[int], step: StepFunction) -> StepFunction:
    """The step function, with a Ctrl-C in the middle of these calls (from 1)."""
    count = 0

    def interrupting(model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal count
        count += 1
        if count in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return step(model, batch)

    return interrupting
