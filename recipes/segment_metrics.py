"""Segmentation metrics from one matrix of counts, which adds up exactly over images, batches and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nepa_core.basics import UserError


class Scores(NamedTuple):
    """Scores of a confusion matrix, between 0 and 1.

    Attributes:
        miou: mean IoU over the classes that occur in the truth or in the prediction.
        macc: mean accuracy over the classes that occur in the truth.
        aacc: accuracy over all labelled pixels.
        iou, acc: of every class; None where it does not occur, as above.
    """

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]
    acc: list[float | None]


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Counts of (true class, predicted class), [C, C] int64, over the pixels whose target is a class.

    Args:
        prediction: integers of any shape, 0 to C - 1. target: the same shape; values from C on are left out.
    """
    labelled = target < classes
    pairs = target[labelled].long() * classes + prediction[labelled].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(counts: Tensor) -> Scores:
    """Scores of a confusion matrix [C, C] (rows are the truth); computed in float64.

    Raises:
        UserError: it counts no pixel.
    """
    if not counts.any():
        raise UserError("no held-out pixel has a class; look at data.first_label and data.ignored_labels")
    hits, truth, predicted = counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist()
    iou = [_share(h, t + p - h) for h, t, p in zip(hits, truth, predicted, strict=True)]
    acc = [_share(h, t) for h, t in zip(hits, truth, strict=True)]
    return Scores(_mean(iou), _mean(acc), sum(hits) / sum(truth), iou, acc)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present)
