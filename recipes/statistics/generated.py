"""Can generated signals be told from the data? Tests of many signals, each a vector.

They are brought to the data's own quantisation (`levels`) before: where pixels have 17 levels, a classifier tells
continuous ones apart at a glance, which says nothing of what is drawn.

Shapes: M items, P numbers in one, K levels, F numbers in a whole signal; R real, G generated, T training and H held-out
signals. All are floating tensors on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nepa_core.verdict.intervals import Interval, over_samples

_BYTES = 2**26  # most of the distances that are held at once
_LEVELS = 512  # most of a number that is called quantised
_REPEATS = 8  # of a level, on average
_FOLDS = 5
_CLOSE = 0.01  # the share of held-out signals that are as close to a training signal as a copy


# ------------------------------------------------------------------------------------ the data's own levels


class Levels(NamedTuple):
    """The levels that each of P numbers has in the data.

    Attributes:
        table: [P, K] float32, sorted, infinity behind the last one of each number.
        counts: [P] int64, levels of each number; 0 for one that is continuous.
    """

    table: Tensor
    counts: Tensor

    def snap(self, values: Tensor) -> Tensor:
        """[..., P], each number at its nearest level; continuous ones as they are."""
        rows = values.flatten(0, -2).T.contiguous()  # [P, M]
        middles = (self.table[:, 1:] + self.table[:, :-1]) / 2
        place = torch.searchsorted(middles, rows).minimum((self.counts - 1).clamp(min=0)[:, None])
        return torch.where(self.counts > 0, self.table.gather(1, place).T, rows.T).view(values.shape)


def levels(values: Tensor) -> Levels | None:
    """The data's own quantisation, such as the 256 levels of pixels, from values [M, P]; None where all is continuous.

    A number is quantised that has at most 512 values, an eighth of M or less, and half of which at least occur twice:
    a spectrogram that is silent for the most part has few values, too, but the others occur once. A number that seldom
    leaves one value, such as the corner of a picture, goes with the others that have few.
    """
    found = [column.unique(return_counts=True) for column in values.T]
    distinct = torch.tensor([len(each) for each, _ in found])
    again = torch.tensor([int((counts > 1).sum()) for _, counts in found])
    few = (distinct <= _LEVELS) & (_REPEATS * distinct <= len(values))
    counts = torch.where(few & ((2 * again >= distinct) | (2 * again[few].sum() >= distinct[few].sum())), distinct, 0)
    if not counts.any():
        return None
    table = torch.full((len(found), int(counts.max())), torch.inf)
    for row, (each, _), count in zip(table, found, counts.tolist(), strict=True):
        row[:count] = each[:count]
    return Levels(table, counts)


# --------------------------------------------------------------------------------- samples against the data


class TwoSample(NamedTuple):
    """Shares of signals that a classifier tells for what they are, real or generated; 0.5 is perfect.

    Attributes:
        trees: by boosted trees. linear: by a logistic regression.
        each: real signals, and as many generated ones.
    """

    trees: Interval
    linear: Interval
    each: int


def two_sample(real: Tensor, generated: Tensor, seed: int, clusters: tuple[Tensor, Tensor] | None = None) -> TwoSample:
    """Can a classifier tell generated signals [G, F] from real ones [R, F]? Its accuracy in five-fold cross-validation.

    The classifier two-sample test (Lopez-Paz and Oquab 2017) with scikit-learn's HistGradientBoostingClassifier and,
    after standardising, LogisticRegression, both as they come. As many of either kind are drawn as there are of the
    rarer one, so that chance is 0.5. An accuracy below it is chance, too. Intervals are over signals, or clusters of
    them, for classifiers as they are: that others were trained on other signals is not in them.

    500 of each, of 64 numbers, take 3 s of one core; 1,000 of each, of 768 numbers, 24 s. With 500 of each the interval
    is ± 0.03. A stronger classifier, or more signals, may find what these do not.

    Args:
        clusters: int64 [R] and [G], equal for signals that depend on each other, such as a completion and the sample it
            was made from: they are never on both sides of a fold.

    Raises:
        ValueError: there are fewer than five of either, or of the clusters.
    """
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    each = min(len(real), len(generated))
    draw = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(kind), generator=draw)[:each] for kind in (real, generated)]
    signals = torch.cat([real[chosen[0]], generated[chosen[1]]]).float().numpy()
    kinds = np.repeat([0, 1], each)
    groups = None if clusters is None else torch.cat([of[rows] for of, rows in zip(clusters, chosen, strict=True)])
    if (count := each if groups is None else len(groups.unique())) < _FOLDS:
        raise ValueError(f"{count} signals of a kind can't be told from others; {_FOLDS} are the least")
    folds = (StratifiedKFold if groups is None else StratifiedGroupKFold)(_FOLDS, shuffle=True, random_state=seed)

    def accuracy(classifier: object) -> Interval:
        found = cross_val_predict(
            classifier, signals, kinds, cv=folds, groups=None if groups is None else groups.numpy()
        )
        return over_samples(torch.from_numpy(found == kinds).double(), groups)

    trees = accuracy(HistGradientBoostingClassifier(random_state=seed))
    return TwoSample(trees, accuracy(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))), each)


class Nearest(NamedTuple):
    """How close generated signals are to training signals, beside held-out ones.

    Attributes:
        distance: [G] float64, to the nearest training signal. to: int64 [G], which one that is.
        threshold: the distance below which, or at which, a signal counts as a copy.
        copies: [G] bool. held_out: the share of held-out signals that would count as copies: 0.01, or more where the
            data repeat themselves.
    """

    distance: Tensor
    to: Tensor
    threshold: float
    copies: Tensor
    held_out: float


def nearest(generated: Tensor, train: Tensor, held_out: Tensor) -> Nearest:
    """The nearest training signal [T, F] of each generated one [G, F]; copies are as close as 1 % of held-out ones.

    The share of copies, `copies.double().mean()`, is that of `held_out` where generated signals are new ones of the
    same law, and more where training samples are repeated. Completions share their kept part with held-out samples,
    so give the part that was made, of all three.
    """
    (distance, to), (others, _) = (_nearest(x, train) for x in (generated, held_out))
    threshold = float(others.quantile(_CLOSE, interpolation="lower"))
    return Nearest(distance, to, threshold, distance <= threshold, float((others <= threshold).double().mean()))


def diversity(generated: Tensor, real: Tensor) -> Interval:
    """Mean distance of two generated signals [G, F] over that of two real ones [R, F], which is 1 for the data's own.

    The interval is that of two independent U-statistics, by the delta method: give signals that do not depend on each
    other, one completion of each sample.

    Raises:
        ValueError: there are fewer than two of either, or all real ones are the same.
    """
    (made, error), (true, other) = (_mean_distance(x) for x in (generated, real))
    if not true:
        raise ValueError("the real signals are all the same, so that there is no diversity to compare with")
    return Interval(made / true, math.hypot(error, made / true * other) / true)


def _mean_distance(signals: Tensor) -> tuple[float, float]:
    """Of two signals [M, F], and the half-width of its 95 % interval.

    An item's mean distance to the others counts twice around their mean, for every pair has two items (Hoeffding 1948).
    """
    if len(signals) < 2:
        raise ValueError("the distance of two signals needs two of them")
    apart = torch.cat([rows.double().sum(1) for rows in _distances(signals, signals)]) / (len(signals) - 1)
    mean, half, _ = over_samples(2 * apart - apart.mean())
    return mean, half or 0.0


def _nearest(signals: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.cat([distances.argmin(1) for distances in _distances(signals, train)])
    return torch.linalg.vector_norm(signals.double() - train[index].double(), dim=1), index


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """[m, len(b)] float32, some rows of `a` at a time: by products, of centred signals, which is fast for many."""
    middle = b.float().mean(0)
    centred = b.float() - middle
    for some in a.split(max(1, _BYTES // (4 * len(b)))):
        yield torch.cdist(some.float() - middle, centred)
