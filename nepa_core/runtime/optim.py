"""Durations, parameter groups, the optimiser and its schedule."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import nn

from nepa_core.basics import FROZEN


class Duration(BaseModel):
    """A length of training in one of three units; exactly one is given.

    Attributes:
        steps: optimiser steps. epochs: passes over the training data. fraction: share of the whole run.
    """

    model_config = FROZEN

    steps: int | None = Field(default=None, ge=0)
    epochs: float | None = Field(default=None, ge=0)
    fraction: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(value is not None for value in (self.steps, self.epochs, self.fraction)) != 1:
            raise ValueError("a duration needs exactly one of steps, epochs, fraction")
        return self

    def in_steps(self, *, steps_per_epoch: int, total: int) -> int:
        """This duration in optimiser steps; `total` is what a fraction is taken of."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        assert self.fraction is not None
        return round(self.fraction * total)


class OptimConfig(BaseModel):
    """AdamW with linear warm-up and a cosine to zero.

    Attributes:
        lr: peak learning rate.
        lr_batch: the global batch that `lr` is meant for; the rate used is lr * train.batch / lr_batch. None
            uses `lr` as it stands.
        betas, weight_decay: of AdamW; biases, norms and LayerScale are not decayed.
        warmup: linear rise from 0.
        clip: largest norm of the gradient, or None.
    """

    model_config = FROZEN

    lr: float = Field(gt=0)
    lr_batch: int | None = Field(gt=0)
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    warmup: Duration
    clip: float | None = Field(gt=0)

    def peak(self, batch: int) -> float:
        """The peak learning rate at this global batch."""
        return self.lr if self.lr_batch is None else self.lr * batch / self.lr_batch


def lr_factor(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices, which decay, and vectors, which don't.

    Vectors are biases, norm weights and LayerScale. Every trainable parameter is in exactly one group.
    """
    trainable = [value for value in model.parameters() if value.requires_grad]
    decayed = [value for value in trainable if value.ndim >= 2]
    others = [value for value in trainable if value.ndim < 2]
    if len({id(value) for value in decayed + others}) != len(trainable):
        raise AssertionError("a parameter is in no group or in two")
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in its fused form, which can also scale gradients and skip a step on the device."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=0.0,  # set before every step by the schedule
        betas=config.betas,
        fused=True,
    )
