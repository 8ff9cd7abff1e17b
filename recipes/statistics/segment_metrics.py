"""Segmentation metrics from one matrix of counts, which adds up exactly over images, batches and ranks."""

from __future__ import annotations

from typing import Literal, NamedTuple, NotRequired, TypedDict

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
        present: classes that occur in the truth. Of one there is nothing to tell apart, see `score_text`.
    """

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]
    acc: list[float | None]
    present: int


ScoreKey = Literal["mIoU", "mAcc", "aAcc", "mIoU_ema", "mAcc_ema", "aAcc_ema"]


class ClassIou(TypedDict):
    """One class; None where it occurs neither in the truth nor in the prediction."""

    name: str
    iou: float | None
    iou_ema: NotRequired[float | None]  # of the averaged weights


class SegmentFigures(TypedDict, total=False):
    """`Scores` as they are written down, of the raw weights and, with "_ema", of the averaged ones."""

    mIoU: float
    mAcc: float
    aAcc: float
    mIoU_ema: float
    mAcc_ema: float
    aAcc_ema: float
    classes: list[ClassIou]
    classes_in_truth: int
    images: int


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
    return Scores(_mean(iou), _mean(acc), sum(hits) / sum(truth), iou, acc, sum(each > 0 for each in truth))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present)


def score_text(score: float | None, present: int, form: str = ".2%") -> str:
    """A score as text. Where the truth has one class, a network that names it everywhere would score 100 %: "-"."""
    if score is None:
        return "does not occur"
    return format(score, form) if present > 1 else "-"


def classes_in_truth(summary: SegmentFigures) -> int:
    """Classes that occur in the held-out truth; of a summary of before this was counted, all of them."""
    return summary.get("classes_in_truth", len(summary["classes"]))


def lonely(summary: SegmentFigures) -> list[str]:
    """A line on held-out pixels that all have the same class, or none."""
    if classes_in_truth(summary) > 1:
        return []
    return [
        f"Of {len(summary['classes'])} classes one alone occurs in the held-out annotations, so there is no score: "
        "look at the annotations, data.first_label and data.ignored_labels."
    ]
