"""What fine-tuning teaches a network to say, told by what the samples of an adapter hold.

  "label", an integer            one class a sample
  "label", bool [C]              any number of C classes a sample (multi-label)
  "label", float32 [] or [K]     one or K numbers a sample (regression)
  "target", integers [N]         one class a token, in canonical order; without a "label" beside it

A negative class is none: it counts in no loss and in no figure, like the targets of padding.

Shapes: B samples, N tokens, C classes, K numbers, O outputs (C or K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality, first_sample
from nepa_core.runtime.balance import known_labels
from nepa_core.runtime.data import plain_batches
from nepa_core.tokens import Tokens
from recipes.networks.average_precision import average_precision, ranked

NONE = -100
"""The class of what has none, as `F.cross_entropy` has it."""

_STATISTICS = 10_000  # most training samples that are read for what a goal needs of their labels

Kind = Literal["class", "classes", "numbers", "token classes"]


FigureKey = Literal["accuracy", "top5", "map", "auroc", "mse", "mae", "r2", "held_out_loss"]
Headline = Literal["accuracy", "map", "r2"]
"""The figure that a goal is judged by."""
AveragedKey = Literal[
    "accuracy_ema", "top5_ema", "map_ema", "auroc_ema", "mse_ema", "mae_ema", "r2_ema", "held_out_loss_ema"
]
AVERAGED: dict[FigureKey, AveragedKey] = {
    "accuracy": "accuracy_ema",
    "top5": "top5_ema",
    "map": "map_ema",
    "auroc": "auroc_ema",
    "mse": "mse_ema",
    "mae": "mae_ema",
    "r2": "r2_ema",
    "held_out_loss": "held_out_loss_ema",
}
"""A figure of the raw weights -> the same of the averaged ones."""


class GoalFigures(TypedDict, total=False):
    """Held-out figures: of the raw weights and, with "_ema", of the averaged ones."""

    accuracy: float
    top5: float  # of six classes or more
    map: float  # average precision, the mean over the classes that a held-out sample has, as auroc
    auroc: float
    mse: float  # in the unit of the labels, as mae
    mae: float
    r2: float
    held_out_loss: float  # cross-entropy, binary where classes are several, or squared error of standardised numbers
    accuracy_ema: float
    top5_ema: float
    map_ema: float
    auroc_ema: float
    mse_ema: float
    mae_ema: float
    r2_ema: float
    held_out_loss_ema: float
    samples: int  # that could be read
    without_class: int  # of these


class Shown(NamedTuple):
    """A held-out figure as it is shown: its key in the summary, its title, and its format."""

    key: FigureKey
    title: str
    form: str


@dataclass(frozen=True, eq=False)
class Classification:
    """One class a sample or, with `per_token`, one a token.

    Attributes:
        binary: the loss is binary cross-entropy, of every class by itself; only of one class a sample.
    """

    names: tuple[str, ...]
    per_token: bool = False
    binary: bool = False

    whole: ClassVar[bool] = False
    headline: ClassVar[Headline] = "accuracy"
    loss_name: ClassVar[str] = "cross-entropy"
    shown: ClassVar[tuple[Shown, ...]] = (Shown("accuracy", "top-1", ".2%"), Shown("top5", "top-5", ".2%"))

    @property
    def outputs(self) -> int:
        return len(self.names)

    @property
    def sums_shape(self) -> tuple[int, ...]:
        return (4,)

    def truth(self, batch: Batch, tokens: Tokens) -> Tensor:
        """The classes [B] or [B, N] int64 of a batch, `NONE` where there is none.

        Raises:
            UserError: there is not one target a token.
        """
        if not self.per_token:
            label: Tensor = batch["label"]
            return torch.where(label < 0, NONE, label.long())
        target, count = batch["target"], tokens.values.shape[1]
        if target.shape[1:] != (count,):
            raise UserError(f"the key 'target' has shape {list(target.shape[1:])} for {count} tokens; make it [N]")
        counted = target >= 0
        if tokens.mask is not None:
            counted &= tokens.canonical(tokens.mask)
        return torch.where(counted, target.long(), NONE)

    def scored(self, truth: Tensor) -> Tensor:
        """How many samples have a class, int64 scalar: classes [B] or [B, N]."""
        return (truth.reshape(len(truth), -1) >= 0).any(1).sum()

    def loss(self, outputs: Tensor, truth: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor | float]:
        """Mean cross-entropy, and over how many classes: logits [B, C] or [B, N, C], classes or shares [B, C].

        Binary cross-entropy is the mean over classes, too. Shares that are all 0 are of a sample without a class.
        """
        if self.binary:
            soft = truth if truth.is_floating_point() else self.soft(truth, smoothing)
            counted = soft.sum(1) > 0
            each = F.binary_cross_entropy_with_logits(outputs, soft, reduction="none").mean(1)
            return each.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1), counted.sum()
        if truth.is_floating_point():
            count = (truth.sum(1) > 0).sum()
            total = F.cross_entropy(outputs, truth, label_smoothing=smoothing, reduction="sum")
            return total / count.clamp(min=1), count
        count = (truth >= 0).sum()
        total = F.cross_entropy(
            outputs.flatten(0, -2), truth.flatten(), label_smoothing=smoothing, ignore_index=NONE, reduction="sum"
        )
        return total / count.clamp(min=1), count

    def soft(self, label: Tensor, smoothing: float) -> Tensor:
        """Classes [B] as shares [B, C] float32, `smoothing` of each spread over all classes; 0 where there is none."""
        share = F.one_hot(label.long().clamp(min=0), self.outputs) * (1 - smoothing) + smoothing / self.outputs
        return share * (label >= 0)[:, None]

    def sums(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """[4] float64: first right, right among five, loss, and how many classes.

        Raises:
            UserError: a class that the network has no output for.
        """
        logits, labels = outputs.flatten(0, -2), truth.flatten()
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        if len(labels) and labels.max() >= self.outputs:
            raise UserError(
                f"the held-out data holds class {int(labels.max())} and the network tells {self.outputs} apart, from 0 "
                "on; fix its labels, or name other data with data.root=DIR"
            )
        among = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        if self.binary:
            mean, _ = self.loss(logits, labels, smoothing=0.0)
            loss = mean.double() * len(labels)
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
        return torch.stack((among[:, 0].sum(), among.sum(), loss, torch.tensor(len(labels)).to(loss)))

    def averaged(self, outputs: Tensor, group: Tensor) -> Tensor:
        """Logits [V, C] of the mean probability of views: logits [S, C] of these, group [S] int64 from 0 to V - 1."""
        if self.binary:
            return _binary_means(outputs, group)
        return _means(outputs.double().softmax(-1), group).clamp(min=1e-300).log().float()

    def parts(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """What each sample adds to the accuracy, [B, 2] float64: how many are right, and of how many classes."""
        counted = truth >= 0
        right = (outputs.argmax(-1) == truth) & counted
        return torch.stack([each.reshape(len(truth), -1).sum(1) for each in (right, counted)], dim=1).double()

    def credits(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Of the `parts` [S, 2] of all samples: the share that is right [S] float64, and of how many [S] int64."""
        right, count = parts.unbind(1)
        return right / count.clamp(min=1), count.long()

    def figures(self, sums: Tensor) -> GoalFigures:
        """Top-1, top-5 (of six classes or more, for it says nothing of fewer) and mean cross-entropy."""
        correct, among, loss, count = sums.tolist()
        if not count:
            raise UserError("no held-out sample has a class; every 'label' or 'target' there is negative or padding")
        five: GoalFigures = {"top5": among / count} if self.outputs > 5 else {}
        return {"accuracy": correct / count, **five, "held_out_loss": loss / count}


@dataclass(frozen=True, eq=False)
class Regression:
    """Numbers [K] a sample; `mean` and `std` [K] are those of the training labels, by which the loss is scaled."""

    mean: Tensor
    std: Tensor

    per_token: ClassVar[bool] = False
    names: ClassVar[None] = None
    whole: ClassVar[bool] = False
    headline: ClassVar[Headline] = "r2"
    loss_name: ClassVar[str] = "mean squared error, standardised"
    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("mse", "MSE", ".4g"),
        Shown("mae", "MAE", ".4g"),
        Shown("r2", "R2", ".3f"),
    )

    @property
    def outputs(self) -> int:
        return len(self.mean)

    @property
    def sums_shape(self) -> tuple[int, ...]:
        return (5, self.outputs)

    def truth(self, batch: Batch, tokens: Tokens) -> Tensor:
        """The numbers [B, K] float32 of a batch.

        Raises:
            UserError: they are not K.
        """
        label: Tensor = batch["label"].float().reshape(len(batch["label"]), -1)
        if label.shape[1] != self.outputs:
            raise UserError(f"the key 'label' holds {label.shape[1]} numbers where {self.outputs} are wanted")
        return label

    def scored(self, truth: Tensor) -> int:
        """How many samples have numbers: all."""
        return len(truth)

    def loss(self, outputs: Tensor, truth: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor | float]:
        """Mean squared error of standardised numbers [B, K], and over how many samples."""
        return ((outputs - truth) / self.std.to(truth.device)).square().mean(), float(len(truth))

    def sums(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """[5, K] float64, standardised: squared and absolute errors, numbers and their squares; and how many."""
        mean, std = (x.to(truth.device).double() for x in (self.mean, self.std))
        y, error = (truth - mean) / std, (outputs - truth) / std
        return torch.stack((error.square(), error.abs(), y, y.square(), torch.ones_like(y))).sum(1)

    def averaged(self, outputs: Tensor, group: Tensor) -> Tensor:
        """The mean [V, K] of what is said of views [S, K]; group [S] int64 from 0 to V - 1."""
        return _means(outputs, group)

    def parts(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """What each sample adds to R2, [B, 2 K] float64: squared errors and numbers, standardised."""
        mean, std = (x.to(truth.device).double() for x in (self.mean, self.std))
        return torch.cat((((outputs - truth) / std).square(), (truth - mean) / std), dim=1)

    def credits(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Of the `parts` [S, 2 K] of all samples: what each adds to R2, [S] float64 (the mean is R2), and ones [S].

        The variance of the numbers counts as known, though it is of these samples, too: between figures of near 1 and
        near 0, an interval is up to a third too narrow.
        """
        squared, numbers = parts.chunk(2, dim=1)
        variance = numbers.var(0, correction=0)
        each = torch.where(variance > 1e-12 * numbers.square().mean(0), 1 - squared / variance, 0.0)
        return each.mean(1), torch.ones(len(parts), dtype=torch.int64)

    def figures(self, sums: Tensor) -> GoalFigures:
        """MSE and MAE in the unit of the labels, R2 (both mean over K) and the loss."""
        squared, absolute, total, squares, count = sums.cpu()
        std = self.std.cpu().double()
        varied = squares - total.square() / count
        r2 = torch.where(varied > 1e-12 * squares, 1 - squared / varied, 0.0)
        return {
            "mse": float((squared / count * std.square()).mean()),
            "mae": float((absolute / count * std).mean()),
            "r2": float(r2.mean()),
            "held_out_loss": float((squared / count).mean()),
        }


@dataclass(frozen=True, eq=False)
class MultiLabel:
    """Any number of classes a sample, each told from the rest by itself.

    Attributes:
        names: of the classes. shares: [C] float32, the share of the training samples that has each; the outputs of a
            network with zero weights are their log-odds.
        whole: figures need all held-out samples at once: a class ranks them against each other.
    """

    names: tuple[str, ...]
    shares: Tensor

    per_token: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    headline: ClassVar[Headline] = "map"
    loss_name: ClassVar[str] = "binary cross-entropy"
    shown: ClassVar[tuple[Shown, ...]] = (Shown("map", "mAP", ".2%"), Shown("auroc", "AUROC", ".4f"))

    @property
    def outputs(self) -> int:
        return len(self.names)

    @property
    def sums_shape(self) -> tuple[int, ...]:
        return (3,)

    def truth(self, batch: Batch, tokens: Tokens) -> Tensor:
        """Which classes each sample has, [B, C] float32 of 0 and 1.

        Raises:
            UserError: they are not C.
        """
        label: Tensor = batch["label"]
        if label.shape[1:] != (self.outputs,):
            raise UserError(
                f"the key 'label' has shape {list(label.shape[1:])} for {self.outputs} classes; make it [C]"
            )
        return label.float()

    def scored(self, truth: Tensor) -> int:
        """How many samples count: all, for one with no class at all is an example of each."""
        return len(truth)

    def loss(self, outputs: Tensor, truth: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor | float]:
        """Mean binary cross-entropy over samples and classes, and over how many samples: logits and truth [B, C].

        Smoothing moves 1 and 0 half its size towards each other, so that both keep the same weight.
        """
        soft = self.soft(truth, smoothing)
        return F.binary_cross_entropy_with_logits(outputs, soft), float(len(truth))

    def soft(self, label: Tensor, smoothing: float) -> Tensor:
        """Which classes each sample has [B, C] as float32, 1 and 0 moved half of `smoothing` towards each other."""
        return label.float() * (1 - smoothing) + smoothing / 2

    def sums(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """[3] float64, of all held-out samples: mAP, AUROC and loss: logits and truth [S, C].

        Classes that no sample has, or all have, are left out of both figures: there is nothing to rank.

        Raises:
            UserError: that is so of every class.
        """
        from torchmetrics.functional.classification import (  # a second to import, for these labels alone
            multilabel_auroc,
            multilabel_average_precision,
        )

        chosen = rankable(truth)
        if len(chosen) == 1:
            chosen = chosen.repeat(2)  # torchmetrics takes two or more; the mean is the same
        scores, right, count = _places(outputs[:, chosen]), truth[:, chosen].int(), len(chosen)
        precision = multilabel_average_precision(scores, right, count, average="macro")
        area = multilabel_auroc(scores, right, count, average="macro")
        loss, _ = self.loss(outputs, truth, smoothing=0.0)
        return torch.stack([x.double().cpu() for x in (precision, area, loss)])

    def averaged(self, outputs: Tensor, group: Tensor) -> Tensor:
        """Logits [V, C] of the mean probability of views: logits [S, C] of these, group [S] int64 from 0 to V - 1."""
        return _binary_means(outputs, group)

    def parts(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """What `credits` ranks, [B, 2 C] float64: logits and truth."""
        return torch.cat((outputs, truth), dim=1).double()

    def credits(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Of the `parts` [S, 2 C] of all samples: what each adds to mAP, [S] float64, and ones [S]."""
        credits = average_precision(*parts.chunk(2, dim=1))
        return credits, torch.ones(len(parts), dtype=torch.int64)

    def figures(self, sums: Tensor) -> GoalFigures:
        """mAP and AUROC, both the mean over classes, and the loss."""
        precision, area, loss = sums.tolist()
        return {"map": precision, "auroc": area, "held_out_loss": loss}


def _places(logits: Tensor) -> Tensor:
    """Where each stands among those of its column [S, C], float64 from 0 to below 1; equal ones at one place.

    For torchmetrics, which takes a sigmoid of logits, and that of float32 is 1 from 17 on.
    """
    places = [column.unique(return_inverse=True)[1] for column in logits.unbind(1)]
    return torch.stack(places, dim=1).double() / len(logits)


def _binary_means(outputs: Tensor, group: Tensor) -> Tensor:
    """Logits of the mean sigmoid; that of either sign, for 1 - p is 0 where p is nearly 1."""
    outputs = outputs.double()
    for_it, against = (_means(each.sigmoid(), group) for each in (outputs, -outputs))
    return (for_it.log() - against.log()).float()


def _means(rows: Tensor, group: Tensor) -> Tensor:
    """Mean [V, C] of the rows [S, C] of each group [S], from 0 to V - 1."""
    total = rows.new_zeros(int(group.max()) + 1, rows.shape[1]).index_add_(0, group, rows)
    return total / group.bincount().to(rows)[:, None]


Goal = Classification | MultiLabel | Regression
GOALS: tuple[type[Goal], ...] = (Classification, MultiLabel, Regression)
FIGURES = tuple(figure for goal in GOALS for figure in goal.shown)


def find_goal(data: Modality) -> Goal:
    """What the samples of an adapter can teach.

    Raises:
        UserError: nothing; one class alone; or numbers that are not finite.
    """
    sample = first_sample(data)
    kind = kind_of(sample)
    if kind == "numbers":
        train = data.plain().samples_of("train")
        return Regression(*label_statistics(train, type(data).__name__, limit=_STATISTICS))
    target = sample.get("target")
    if kind is None and target is not None and target.ndim == 2:
        raise UserError(
            f"{type(data).__name__} has a class for every pixel: train on them with `nepa segment`, such as "
            "recipes.vision:camvid_segment init=RUN"
        )
    names = data.classes()
    if kind is None or not names:
        raise UserError(
            f"{type(data).__name__} gives no class to train on; add to its samples an integer 'label', a bool 'label' "
            "[C] of several classes, numbers to predict as a float 'label', or a class per token as 'target' [N]"
        )
    if len(names) == 1:
        raise UserError(
            f"{type(data).__name__} has one class alone, {names[0]!r}, so that there is nothing to tell apart; look at "
            "what data.root=DIR holds"
        )
    if kind == "classes":
        train = data.plain().samples_of("train")
        return MultiLabel(names, class_shares(train, type(data).__name__, names, limit=_STATISTICS))
    return Classification(names, per_token=kind == "token classes")


def taught_by(goal: Goal, loss: Literal["cross_entropy", "bce"]) -> Goal:
    """The same goal, taught by the loss that a config names.

    Raises:
        UserError: "bce" where samples have no classes of their own.
    """
    if loss == "cross_entropy" or isinstance(goal, MultiLabel):
        return goal
    if goal.per_token or not isinstance(goal, Classification):
        raise UserError("loss=bce is for classes of samples, and this adapter's hold other targets; leave it out")
    return replace(goal, binary=True)


def fitted(goal: Goal, samples: Dataset[Batch], adapter: str) -> Goal:
    """The same goal, with what it takes from training labels (a scale, shares of classes) of these samples alone."""
    if isinstance(goal, Regression):
        return Regression(*label_statistics(samples, adapter))
    if isinstance(goal, MultiLabel):
        return MultiLabel(goal.names, class_shares(samples, adapter, goal.names))
    return goal


def numbered(classes: int, *, per_token: bool = False) -> Classification:
    """Classes named by their numbers."""
    return Classification(tuple(map(str, range(classes))), per_token)


def kind_of(sample: Mapping[str, Any]) -> Kind | None:
    """The kind of target in a sample, by its dtype and shape; a "label" goes before a "target"."""
    if "label" in sample:
        label = torch.as_tensor(sample["label"])
        if label.is_floating_point():
            return "numbers" if label.ndim <= 1 else None
        if label.dtype == torch.bool and label.ndim == 1:
            return "classes"
        return "class" if label.ndim == 0 else None
    target = sample.get("target")
    if target is None or target.is_floating_point() or target.ndim != 1:
        return None
    return "token classes"


def label_statistics(samples: Dataset[Batch], adapter: str, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [K] float32 of the labels of training samples; `limit` as in `_labels`.

    The deviation of a number that is always the same is 1.

    Raises:
        UserError: a label is NaN or infinite.
    """
    labels = _labels(samples, limit).double()
    if not labels.isfinite().all():
        raise UserError(f"{adapter} has a 'label' that is NaN or infinite; leave such samples out")
    mean, std = labels.mean(0), labels.std(0, correction=0)
    return mean.float(), torch.where(std > 1e-9 * mean.abs(), std, 1.0).float()


def rankable(truth: Tensor) -> Tensor:
    """The places [K] int64 of the classes that some held-out samples have and some have not; truth [S, C] bool.

    Raises:
        UserError: there is none.
    """
    chosen = ranked(truth).nonzero()[:, 0]
    if not len(chosen):
        raise UserError(
            "no class is of some held-out samples and not of others, so nothing can be ranked: hold out samples that "
            "differ in their classes"
        )
    return chosen


def class_shares(samples: Dataset[Batch], adapter: str, names: tuple[str, ...], *, limit: int | None = None) -> Tensor:
    """The share [C] float32 of training samples that has each class; `limit` as in `_labels`.

    A class that none of n has counts as one of 2 n + 2, as one that all have is missing in so many.

    Raises:
        UserError: a label has not one place a class.
    """
    labels = _labels(samples, limit)
    if labels.shape[1] != len(names):
        raise UserError(
            f"{adapter} names {len(names)} classes, and its 'label' has {labels.shape[1]} places; make it [C]"
        )
    return ((labels.sum(0) + 0.5) / (len(labels) + 1)).float()


def _labels(samples: Dataset[Batch], limit: int | None) -> Tensor:
    """The labels [S, K] of training samples: of all where they are known unread, else of `limit` drawn ones."""
    known = known_labels(samples)
    if known is None:
        seed = None if limit is None else 0
        batches = plain_batches(samples, batch=256, device=torch.device("cpu"), limit=limit, seed=seed, of="training")
        known = torch.cat([batch["label"] for batch in batches])
    return known.reshape(len(known), -1)
