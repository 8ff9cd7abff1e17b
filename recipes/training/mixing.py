"""Mixup and CutMix of a training batch and of its labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality, first_sample
from nepa_core.runtime.fit import samples_at_once
from recipes.configs import BesideConfig, FinetuneConfig, MixConfig
from recipes.networks.goals import Classification, Goal, MultiLabel

Mix = Callable[[Batch], tuple[Batch, Tensor]]
"""A batch of an even number of samples -> the mixed one, and what is to be said of it, float32 [B, C]."""


def check_pairs(config: FinetuneConfig | BesideConfig, ranks: int) -> None:
    """Refuse what `make_mix` can't pair, before a network is built.

    Raises:
        UserError: batches are mixed, and an odd number of samples is in one.
    """
    if config.mix is not None and (count := samples_at_once(config.train, ranks=ranks)) % 2:
        raise UserError(
            f"mix pairs the samples of a batch, and {count} at once are an odd number: set train.micro_batch or "
            "train.batch to an even one, or mix=null"
        )


def make_mix(config: MixConfig, data: Modality, goal: Goal, smoothing: float) -> Mix:
    """The mixing of a batch with itself backwards, one share for all of it; random numbers are those of the step.

    Images ("image") are mixed by timm, which draws from NumPy, seeded here from torch's global generator. All else is
    mixed by `Modality.mixed`.

    Raises:
        UserError: samples can't be mixed, or have not one class or several each.
    """
    if goal.per_token or not isinstance(goal, Classification | MultiLabel):
        raise UserError(
            "mix is for one class a sample or several, and this adapter's samples hold other targets; set mix=null"
        )
    if "image" not in first_sample(data) and not data.offers("mixed"):
        raise UserError(f"mix is for images and spectrograms, and {type(data).__name__} has no mixed(); set mix=null")

    def mix(batch: Batch) -> tuple[Batch, Tensor]:
        if "image" in batch:
            return mixed_images(config, batch, goal, smoothing)
        soft = goal.soft(batch["label"], smoothing)
        if (drawn := draw(config)) is None:
            return batch, soft
        batch, kept = data.mixed(batch, *drawn)
        return batch, kept[:, None] * soft + (1 - kept)[:, None] * soft.flip(0)

    return mix


def draw(config: MixConfig) -> tuple[float, tuple[float, float] | None] | None:
    """The share of a sample itself, and the centre of CutMix's box or None for mixup; None leaves a batch as it is."""
    mixes, cuts, *centre = torch.rand(4).tolist()
    if mixes >= config.prob:
        return None
    cut = config.mixup == 0 or (config.cutmix > 0 and cuts < 0.5)
    alpha = torch.tensor(config.cutmix if cut else config.mixup)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return share, (centre[0], centre[1]) if cut else None


def mixed_images(
    config: MixConfig, batch: Batch, goal: Classification | MultiLabel, smoothing: float
) -> tuple[Batch, Tensor]:
    """The batch with float images of 0 to 255, and what is to be said of it."""
    from timm.data.mixup import Mixup  # a second to import, for mixing alone

    label, several = batch["label"], isinstance(goal, MultiLabel)
    rows = torch.arange(len(label), device=label.device)
    mixup = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.prob,
        label_smoothing=0.0 if several else smoothing,
        num_classes=len(label) if several else goal.outputs,
    )
    np.random.seed(int(torch.randint(2**32, ())))
    images, soft = mixup(batch["image"].float(), rows if several else label)
    if several:  # timm has said of every image how much of which is in it
        soft = soft @ goal.soft(label, smoothing)
    return batch | {"image": images}, soft
