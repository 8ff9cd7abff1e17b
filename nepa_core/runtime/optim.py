"""Durations, parameter groups, the optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import nn

from nepa_core.basics import FROZEN, HasParameters

MOST_STEPS = 10**12
"""More than any run has; beyond it a number of steps is a slip."""


class Duration(BaseModel):
    """A length of training in one of three units; exactly one is given.

    Attributes:
        steps: optimiser steps. epochs: passes over the training data. fraction: share of the whole run.
    """

    model_config = FROZEN

    steps: int | None = Field(default=None, ge=0, le=MOST_STEPS)
    epochs: float | None = Field(default=None, ge=0, le=10**9)
    fraction: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(value is not None for value in (self.steps, self.epochs, self.fraction)) != 1:
            raise ValueError("a duration needs exactly one of steps, epochs, fraction")
        return self

    def in_steps(self, *, steps_per_epoch: int, total: int) -> int:
        """This duration in optimiser steps.

        Args:
            total: what a fraction is taken of; the result is rounded up, as in the released scripts: a warm-up of
                2.5 % of 1,001 steps is 26.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        assert self.fraction is not None
        return math.ceil(self.fraction * total)


class LayerDecay(BaseModel):
    """Smaller learning rates for lower layers, in fine-tuning: a layer's factor is rate ** (layers above it).

    Attributes:
        start, end: the rate at the start and at the end of the run, along half a cosine between them (the released
            scripts). The paper fine-tunes with 0.35 to 1.0 (B) and 0.60 to 1.0 (L), the released scripts with a fixed
            0.65 and 0.75.
        staggered_warmup: a layer whose factor is g at the start warms up over warmup less round(warmup * g) steps, at
            least one, so that lower layers take longer and the topmost has its full rate from the second step on (the
            released scripts).
        head_counts: what lies on the blocks is a layer of its own, as BEiT and MAE count; False gives the last block
            the factor 1, too (the released scripts). See `nepa_core.model.layers_above`.
    """

    model_config = FROZEN

    start: float = Field(gt=0, le=1)
    end: float = Field(gt=0, le=1)
    staggered_warmup: bool
    head_counts: bool = True

    def factor(self, height: int, step: int, total: int) -> float:
        """The factor of a layer with `height` layers above it at a step (from 0) of `total`."""
        rate = self.start + (self.end - self.start) * 0.5 * (1 - math.cos(math.pi * step / total))
        return float(rate**height)

    def warmup(self, height: int, warmup: int) -> int:
        """Steps of warm-up of a layer."""
        if not self.staggered_warmup or warmup == 0:
            return warmup
        return max(warmup - round(warmup * self.start**height), 1)


Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay of a running mean: AdamW divides by 1 - beta."""


class OptimConfig(BaseModel):
    """AdamW, its linear warm-up and the schedule of the rate after that.

    Attributes:
        lr: peak learning rate.
        lr_batch: the global batch that `lr` is meant for; the rate used is lr * train.batch / lr_batch. None
            uses `lr` as it stands.
        betas, weight_decay: of AdamW; biases, norms and LayerScale are not decayed.
        warmup: linear rise from 0, which is the rate of the first step.
        clip: largest norm of the gradient, or None.
        schedule: from the peak to zero by half a "cosine", in a "linear" way, or by the "poly" rule of DeepLab,
            (1 - progress) ** 0.9; "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at the peak
            and falls at the end by 1 - sqrt(progress) (Haegele et al. 2024, arXiv 2405.18392); "constant" stays there.
        decay_share: of "wsd", the share of the run that its decay takes.
        layer_decay: smaller rates for lower layers, or None.
        head_lr: in fine-tuning the peak rate of a classifier and of the predictor's final norm, never scaled by the
            batch (the released scripts), see `nepa_core.model.at_head_rate`; None gives them the rate of the body.
    """

    model_config = FROZEN

    lr: float = Field(gt=0, le=1e4)
    lr_batch: int | None = Field(gt=0, le=2**40)
    betas: tuple[Beta, Beta]
    weight_decay: float = Field(ge=0, le=1e4)
    warmup: Duration
    clip: float | None = Field(gt=1e-12, le=1e12)
    schedule: Literal["cosine", "linear", "poly", "wsd", "constant"] = "cosine"
    decay_share: float = Field(default=0.2, gt=0, le=1)
    layer_decay: LayerDecay | None = None
    head_lr: float | None = Field(default=None, gt=0, le=1e4)

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, values: Any) -> Any:
        """Runs of before `schedule` had wsd call it `decay`."""
        if not (isinstance(values, dict) and "decay" in values):
            return values
        return {"schedule" if key == "decay" else key: value for key, value in values.items()}

    def peak(self, batch: int) -> float:
        """The peak learning rate at this global batch."""
        return self.lr if self.lr_batch is None else self.lr * batch / self.lr_batch

    def steady(self, warmup: int, total: int) -> int:
        """The steps, from the first, whose rates are those of any longer run with the same warm-up."""
        if self.schedule == "wsd":
            return max(total - max(round(self.decay_share * total), 1), warmup)
        return total if self.schedule == "constant" else 0


def lr_factor(step: int, *, warmup: int, total: int, schedule: str = "cosine", steady: int = 0) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up from 0, then `OptimConfig.schedule`.

    Args:
        steady: of "wsd", the step at which the decay begins.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant" or (schedule == "wsd" and step < steady):
        return 1.0
    if schedule == "wsd":
        return 1 - math.sqrt((step - steady) / (total - steady))
    progress = (step - warmup) / max(total - warmup, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return float((1 - progress) ** (1.0 if schedule == "linear" else 0.9))


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, peak: float, step: int, total: int, warmup: int
) -> float:
    """Give every parameter group its learning rate for a step (from 0); returns that of the topmost layers."""

    steady = config.steady(warmup, total)

    def rate(height: int) -> float:
        steps, factor = warmup, 1.0
        if config.layer_decay is not None:
            steps = config.layer_decay.warmup(height, warmup)
            factor = config.layer_decay.factor(height, step, total)
        return factor * lr_factor(step, warmup=steps, total=total, schedule=config.schedule, steady=steady)

    for group in optimizer.param_groups:
        own = config.head_lr if group["head"] and config.head_lr is not None else peak
        group["lr"] = own * rate(group["height"])
    return peak * rate(0)


def parameter_groups(
    model: HasParameters,
    weight_decay: float,
    height: Callable[[str], int],
    head: Callable[[str], bool] = lambda name: False,
) -> list[dict[str, object]]:
    """Trainable parameters by height (layers above), by head or body, and by kind: matrices decay, vectors don't.

    Vectors are biases, norm weights and LayerScale; BOS, which is [1, D], decays. Every trainable parameter is in
    exactly one group.
    """
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():  # names each parameter once, also a shared one
        if value.requires_grad:
            groups.setdefault((height(name), head(name), value.ndim >= 2), []).append(value)
    return [
        {"params": values, "height": above, "head": on_top, "weight_decay": weight_decay if matrix else 0.0}
        for (above, on_top, matrix), values in groups.items()
    ]


def make_optimizer(
    model: HasParameters,
    config: OptimConfig,
    height: Callable[[str], int] = lambda name: 0,
    head: Callable[[str], bool] = lambda name: False,
) -> torch.optim.AdamW:
    """AdamW in its fused form, which can also scale gradients and skip a step on the device.

    Args:
        height: name of a parameter -> number of layers above its own, for `OptimConfig.layer_decay`.
        head: name of a parameter -> whether its rate is `OptimConfig.head_lr`.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, height, head),
        lr=0.0,  # set before every step by the schedule
        betas=config.betas,
        fused=True,
    )
