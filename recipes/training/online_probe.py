"""A small probe while pre-training (`train.probe=true`), so that one sees early whether it pays.

A ridge reads the labels of a fixed draw of training samples from the mean of the last layer's tokens, and is scored on
a fixed draw of held-out ones. It is quick and coarse, to 9 points either way: `nepa probe` is the answer, with more
samples, every layer and what the raw tokens give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nepa_core.basics import Batch, UserError
from nepa_core.ema import Ema, applied
from nepa_core.model import NEPA, evaluating
from nepa_core.pooling import Row, read_rows
from nepa_core.runtime.data import plain_batches, to_device
from nepa_core.runtime.fit import autocast_dtype
from recipes.configs import PretrainConfig
from recipes.networks.average_precision import average_precision
from recipes.statistics.ridge import r2, ridge, right_class
from recipes.training.judging import eval_batch

SAMPLES = 128
"""Of each split, at most. They are kept in memory. More would take more than 2 % of the time that digits train."""


class Labelled(NamedTuple):
    """Samples of a split with their labels, [S] integers, bool [S, C] or [S, K] numbers."""

    batches: list[Batch]
    labels: Tensor


class OnlineProbe(NamedTuple):
    """The samples that every measurement reads anew."""

    train: Labelled
    test: Labelled


def online_probe(config: PretrainConfig) -> OnlineProbe | None:
    """What `train.probe` asks for; None where it is false.

    Raises:
        UserError: samples have no labels.
    """
    return OnlineProbe(_labelled(config, "train"), _labelled(config, "test")) if config.train.probe else None


def _labelled(config: PretrainConfig, split: str) -> Labelled:
    data = config.data.plain()
    batches = plain_batches(
        data.samples_of(split),
        batch=eval_batch(config),
        device=torch.device("cpu"),
        limit=SAMPLES,
        seed=config.verdict.draw,
        tokenize=data.tokenize,
        labels=True,
    )
    found: list[Batch] = []
    labels: list[Tensor] = []
    for batch in batches:
        label = batch.get("label")
        if not isinstance(label, Tensor):
            break
        found.append(batch)
        one = not label.is_floating_point() and label.dtype != torch.bool
        labels.append(torch.where(label < 0, -1, label) if one else label)
    whole = torch.cat(labels) if labels else torch.empty(0)
    if (known := int((whole.reshape(len(whole), -1) >= 0).any(1).sum()) if len(whole) else 0) < 10:
        raise UserError(
            f'train.probe=true reads the key "label" of samples, and {known} of {SAMPLES} {split} samples of '
            f"{type(data).__name__} have one: leave train.probe out, or add labels"
        )
    return Labelled(found, whole)


@torch.no_grad()
def probe_figure(probe: OnlineProbe, config: PretrainConfig, model: NEPA, ema: Ema | None) -> dict[str, float]:
    """ "probe_accuracy", "probe_map" of several classes a sample, or "probe_r2" of numbers: held out, of the averaged
    weights where there are any."""
    with evaluating(model), applied(ema):
        x, x_test = (_features(each.batches, config, model) for each in probe)
    y, y_test = (each.labels for each in probe)
    if y.is_floating_point():
        y, y_test = (each.reshape(len(each), -1) for each in (y, y_test))
        return {"probe_r2": float(ridge(x, y, x_test, y_test, r2).mean())}
    if y.dtype == torch.bool:
        return {"probe_map": float(ridge(x, y.float(), x_test, y_test.float(), average_precision).mean())}
    x, y, x_test, y_test = x[y >= 0], y[y >= 0], x_test[y_test >= 0], y_test[y_test >= 0]
    classes = y.unique()
    y, y_test = ((each[:, None] == classes).float() for each in (y, y_test))
    return {"probe_accuracy": float(ridge(x, y, x_test, y_test, right_class).mean())}


def _features(batches: list[Batch], config: PretrainConfig, model: NEPA) -> Tensor:
    """The mean over the tokens of the final norm, [S, D] on the CPU."""
    device, data = next(model.parameters()).device, config.data.plain()
    rows, dtype = [Row(config.model.depth + 1, "mean")], autocast_dtype(config.train.precision, device)
    found = []
    for batch in batches:
        tokens = data.read(to_device(batch, device))
        found.append(read_rows(model, tokens, rows, causal=config.objective.causal, dtype=dtype)[0][0].cpu())
    return torch.cat(found)
