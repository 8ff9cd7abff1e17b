"""How often a training sample is drawn so that rare classes come as often as common ones."""

from __future__ import annotations

from collections.abc import Sized
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UnreadableSample, UserError

_ROWS = 2**16  # labels turned into float64 at once: two million of 527 classes would be 9 GB
NEEDS = "train.sampling=balanced is for samples with classes; leave it out"


def balanced_weights(dataset: Dataset[Batch]) -> Tensor:
    """The weight of every sample, [S] float64: 1 over the samples of its class, or the sum of that over its classes.

    As PSLA has it (Gong et al. 2021), and those after it on AudioSet. A sample without a class is not drawn. Labels are
    those of `every_label` (see `Modality.dataset`); else every sample is read for its own, and one that can't be read
    is not drawn either.

    Raises:
        UserError: samples have no classes of their own, or are of several kinds.
    """
    if hasattr(dataset, "strata"):
        raise UserError(f"{NEEDS}: these are of several kinds, whose shares data.weights says")
    labels = _labels(dataset)
    if labels is None or labels.is_floating_point() or labels.ndim != (2 if labels.dtype == torch.bool else 1):
        raise UserError(f"{NEEDS}: these have {'no labels' if labels is None else 'other labels'}")
    if labels.dtype == torch.bool:
        count = labels.sum(0).double()
        each = torch.where(count > 0, 1 / count, 0.0)
        weights = torch.cat([rows.double() @ each for rows in labels.split(_ROWS)])
    else:
        classed = labels >= 0
        count = labels[classed].bincount().double()
        weights = torch.zeros(len(labels), dtype=torch.float64)
        weights[classed] = 1 / count[labels[classed]]
    if not weights.any():
        raise UserError(f"{NEEDS}: no training sample has one")
    return weights


def known_labels(dataset: Dataset[Batch]) -> Tensor | None:
    """The labels [S] or [S, C] of all samples, where they are known without reading one (`every_label`); else None."""
    known: Tensor | None = dataset.every_label() if hasattr(dataset, "every_label") else None
    return known


def _labels(dataset: Dataset[Batch]) -> Tensor | None:
    """[S] or [S, C] of all samples, negative or without any class where one can't be read; None: there are none."""
    if hasattr(dataset, "every_label"):
        return known_labels(dataset)
    found: dict[int, Any] = {}
    for index in range(len(cast(Sized, dataset))):
        with suppress(UnreadableSample):
            sample = dataset[index]
            if "label" not in sample:
                return None
            found[index] = torch.as_tensor(sample["label"])
    if not found:
        return None
    first = next(iter(found.values()))
    none = torch.full_like(first, 0 if first.dtype == torch.bool else -1)
    return torch.stack([found.get(index, none) for index in range(len(cast(Sized, dataset)))])
