"""What predictors without a network say: copying, mean embeddings, and a linear autoregression on the raw tokens.

The linear one is the control that counts: a ridge regression of the next embedding's direction on all previous raw
tokens. It is fitted on a stream of training samples, of which it keeps moments only (counts, sums and products), so
memory does not grow with their number and the whole training split can be used. Its strength is chosen on the first
tenth of the samples, which then join the others. Predictions after a quarter and a half of the samples show whether
more of them would make it stronger.

Shapes: S samples, N tokens, T places (with BOS), Q = T - 1 predictions, P numbers in a raw token, D width of an
embedding, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.objective import masked_mean, negative_cosine
from nepa_core.verdict.diagnostics import identified
from nepa_core.verdict.gathered import Gathered, joined

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, times the mean variance of a feature

_FEATURES = 4096  # most of the linear autoregression; above, each token is reduced to its principal components
_PRODUCTS = 2**21  # most features x places: for each there is a product with every number of the target
_SEEN_FEATURES = 1024  # most where there is a matrix of its own for every position of the target
_BYTES = 2**29  # most for the matrices of all places, where each has its own
_NEAR = 16  # tokens of which a target reads as many numbers as fit, where not even one of every token would
_HELD = 1024  # most samples that the strength is chosen on
_HELD_BYTES = 2**26  # and most that they take
_CHUNK = 1024  # samples whose moments are taken at once
_CHUNK_BYTES = 2**25  # and most that they take
_PIECE_BYTES = 2**24  # most raw tokens that are reduced at once


class Fitted(NamedTuple):
    """Baselines fitted on training samples, and what they say of the test samples.

    Attributes:
        predictions: "copy", "mean", "position_mean" and "linear" -> [S, Q, D], beside `test.targets`.
        samples: that they were fitted on.
        curve: (samples, [S] what the linear one identifies when fitted on so many, see `diagnostics.identified`), at
            about a quarter and a half of them; empty where there are too few.
        features: numbers of a whole sequence that the linear one reads; fewer than there are tokens where it reads
            those next to each target alone. of: how many there are.
    """

    predictions: dict[str, Tensor]
    samples: int
    curve: tuple[tuple[int, Tensor], ...]
    features: int
    of: int


def fit_baselines(
    parts: Iterable[Gathered], test: Gathered, *, total: int, device: torch.device | None = None
) -> Fitted:
    """Fit all baselines in one pass.

    copy: the current token's own embedding. mean: the best constant. position_mean: the best constant of each place.
    linear: `Autoregression`. Where samples have orders of their own and the model is told the position that it
    predicts, so are these two: one constant for each position of the target, and `FromSeen`.

    Args:
        parts: training samples in random order. total: how many there will be, about.
        device: where the products are computed; default: the CPU.
    """
    device = device or torch.device("cpu")
    stream = chunks(parts, test, total=total)
    held = next(stream)
    linear: Regressions = (Autoregression if test.order is None else FromSeen)(held, test, device)
    means = _Means(test)
    means.add(held)
    samples, marks = 0, [total // 4, total // 2] if total >= 64 else []
    curve: list[tuple[int, Tensor]] = []
    for part in stream:
        means.add(part)
        for some in _cut(part, [mark - samples for mark in marks]):
            linear.add(some)
            samples += len(some.values)
            if marks and samples >= marks[0]:
                marks.pop(0)
                linear.choose(held)
                curve.append((samples, identified(linear.predict(test), test)))
        del part, some  # or they would be alive beside the next
    if samples:
        linear.choose(held)
        linear.add(held)
    else:  # one sample, or a few: nothing can be held back
        linear.add(held)
        linear.choose(held)
    mean, position_mean = means.predict(test)
    copied = test.embeddings[:, :-1]
    predictions = {"copy": copied, "mean": mean, "position_mean": position_mean, "linear": linear.predict(test)}
    return Fitted(predictions, samples + len(held.values), tuple(curve), linear.features, test.values[0].numel())


def chunks(parts: Iterable[Gathered], like: Gathered, *, total: int) -> Iterator[Gathered]:
    """The samples in order: first those that strengths are chosen on, then as many at once as are worth a product.

    Args:
        like: what samples are like. total: how many there will be, about.
    """
    size = 4 * (like.values[0].numel() + 2 * like.embeddings[0].numel())
    first = max(1, min(_HELD, total // 10, _HELD_BYTES // size))
    chunk = max(1, min(_CHUNK, _CHUNK_BYTES // size))
    waiting: list[Gathered] = []
    missing = first
    for part in parts:
        while len(part.values) >= missing:
            waiting.append(part.rows(slice(missing)))
            part = part.rows(slice(missing, None))
            yield _taken(waiting)
            missing = chunk
        waiting.append(part)
        missing -= len(part.values)
    if missing < chunk:
        yield _taken(waiting)


def _taken(waiting: list[Gathered]) -> Gathered:
    """What waits, as one; then nothing waits, and nobody else holds it."""
    whole = joined(waiting)
    waiting.clear()
    return whole


def _cut(part: Gathered, places: list[int]) -> list[Gathered]:
    """A chunk in pieces that end at these places, so far as they lie inside."""
    ends = [0, *(place for place in places if 0 < place < len(part.values)), len(part.values)]
    return [part.rows(slice(a, b)) for a, b in pairwise(ends)]


# ------------------------------------------------------------------------------------------------- constants


class _Means:
    """Sums of the targets' directions for each place, or each position of the target where orders differ."""

    def __init__(self, test: Gathered) -> None:
        self.by_order = test.order is not None
        self.sums = torch.zeros(0, test.embeddings.shape[-1], dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.float64)

    def add(self, part: Gathered) -> None:
        unit = F.normalize(part.targets, dim=-1)
        if self.by_order:
            unit, counted = part.by_target(unit)
        else:
            counted = torch.ones(unit.shape[:2], dtype=torch.bool) if part.counted is None else part.counted
        longer = max(unit.shape[1] - len(self.sums), 0)
        self.sums, self.counts = F.pad(self.sums, (0, 0, 0, longer)), F.pad(self.counts, (0, longer))
        self.sums[: unit.shape[1]] += (unit * counted[..., None]).double().sum(0)
        self.counts[: unit.shape[1]] += counted.sum(0)

    def predict(self, test: Gathered) -> tuple[Tensor, Tensor]:
        """The mean of all and that of each place, [S, Q, D] both."""
        shape = test.targets.shape
        mean = (self.sums.sum(0) / self.counts.sum().clamp(min=1)).float()
        each = (self.sums / self.counts.clamp(min=1)[:, None]).float()
        positions = test.values.shape[1] if self.by_order else shape[1]
        each = F.pad(each, (0, 0, 0, max(positions - len(each), 0)))  # places that no training sample reaches
        placed = each[: shape[1]].expand(shape) if test.order is None else each[test.order[:, -shape[1] :]]
        return mean.expand(shape), placed


# ----------------------------------------------------------------------------------------- linear regressions


class Regressions(Protocol):
    """Regressions on raw tokens, one for each place or position of the target, that are fitted on a stream.

    Of the targets' directions; made with `raw`, of the targets themselves.
    """

    features: int

    def add(self, part: Gathered) -> None:
        """Take the moments of more samples."""

    def choose(self, held: Gathered) -> None:
        """Choose the strength that serves these samples best: among all at first, then beside the last choice."""

    def read(self, part: Gathered) -> Iterator[Tensor]:
        """The features of every regression in turn, [S, F]."""

    def solved(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Its weights [F, D] and intercept [D], of all samples so far, with the chosen strength.

        One after the other, for together they take much memory.
        """

    def predict(self, test: Gathered) -> Tensor:
        """[S, Q, D] of them."""


def _goal(part: Gathered, raw: bool) -> Tensor:
    return part.targets if raw else F.normalize(part.targets, dim=-1)


def _error(predicted: Tensor, goal: Tensor, raw: bool) -> Tensor:
    return (predicted - goal).square().mean(-1) if raw else negative_cosine(predicted, goal)


class _Moments:
    """Sums over rows of 1, x [F], y [D], x x^T and x y^T."""

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        self.x, self.y = (torch.zeros(size, dtype=torch.float64, device=device) for size in (features, outputs))
        self.xx = torch.zeros(features, features, device=device)
        self.xy = torch.zeros(features, outputs, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.x += x.double().sum(0)
        self.y += y.double().sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """Weights [F, D] and intercept [D]."""
        count = max(self.count, 1)
        x, y = (self.x / count).float(), (self.y / count).float()
        cross = self.xy / count - torch.outer(x, y)
        weights = torch.cholesky_solve(cross, _factor(_covariance(self.xx, x, count), strength))
        return weights, y - x @ weights

    @property
    def scale(self) -> float:
        """Mean square of a feature."""
        return float(self.xx.trace()) / max(self.count * len(self.xx), 1)


def _factor(gram: Tensor, strength: float) -> Tensor:
    """Cholesky factor of gram + strength; gram is written over.

    A strength that rounding would swallow is raised until the factor exists, as it must be where there are many
    features and few rows, at the last places of sequences of unequal length.
    """
    ridge = max(strength, 2 * torch.finfo(gram.dtype).eps * float(gram.trace()), 1e-8)
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    while int(failed) and math.isfinite(ridge):
        gram.diagonal().add_(9 * ridge)
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(gram)
    return cast(Tensor, factor)


def _covariance(xx: Tensor, mean: Tensor, count: int) -> Tensor:
    """Of features with these sums of products, as a matrix of its own."""
    return (xx / count).addr_(mean, mean, alpha=-1)


class _Features(NamedTuple):
    """How raw tokens become features: minus a mean of each place, then reduced where there are too many.

    Padding and missing tokens become 0, the mean. Mean [N, P] and basis [P, K] are those of the first samples.
    """

    mean: Tensor
    basis: Tensor | None

    @classmethod
    def of(cls, first: Gathered, count: int, keep: int) -> _Features:
        """For `count` tokens of which each may keep `keep` numbers, one at least."""
        part = resized(first, count)
        real = torch.ones(part.values.shape[:2]) if part.mask is None else part.mask[:, part.bos :].float()
        mean = (part.values * real[..., None]).sum(0) / real.sum(0).clamp(min=1)[:, None]
        keep = max(1, keep)
        if part.values.shape[-1] <= keep:
            return cls(mean, None)
        rows = ((part.values - mean) * real[..., None]).flatten(0, 1)
        if rows.shape[1] > _FEATURES:  # a matrix of that side would take too much memory, and there are fewer rows
            return cls(mean, _of_rows(rows, keep))
        try:
            return cls(mean, torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -keep:])
        except RuntimeError:  # of LAPACK: too many eigenvalues are equal, as where much of a token is padding
            return cls(mean, _of_rows(rows, keep))

    @property
    def size(self) -> int:
        """K, of one token."""
        return self.mean.shape[1] if self.basis is None else self.basis.shape[1]

    def read(self, part: Gathered) -> Tensor:
        """[S, N, K]."""
        if self.basis is None:
            return self._centred(part)
        step = max(1, _PIECE_BYTES // (4 * self.mean.numel()))  # of raw tokens, which are wide
        ends = range(0, len(part.values), step)
        return torch.cat([self._centred(part.rows(slice(a, a + step))) @ self.basis for a in ends])

    def _centred(self, part: Gathered) -> Tensor:
        """[S, N, P]."""
        x = part.values - self.mean
        if part.mask is not None:
            x *= part.mask[:, part.bos :, None]
        return x


def _of_rows(rows: Tensor, keep: int) -> Tensor:
    """The first principal directions of rows [m, P], [P, keep or m]."""
    return cast(Tensor, torch.linalg.svd(rows, full_matrices=False).Vh[:keep].T.contiguous())


class Autoregression:
    """Ridge regression of each target's direction on the raw tokens before it, one regression a place.

    All places have one strength. Where no token is missing they share one matrix, because the tokens before place t
    are the first of those before place t + 1, and so is its Cholesky factor; else each has its own, of the samples
    that count there, for a mask may go with the content. So has each where sequences are so long that the budget
    leaves less than a number a token: then it reads the last tokens alone.
    """

    def __init__(self, first: Gathered, test: Gathered, device: torch.device, *, raw: bool = False) -> None:
        self.raw, self.count, self.places = raw, test.values.shape[1], test.targets.shape[1]
        ragged = test.counted is not None or first.counted is not None
        most = math.isqrt(3 * _BYTES // 4 // self.places) if ragged else _PRODUCTS // self.places
        most = min(_FEATURES, most)
        if far := most < self.count:
            most = math.isqrt(_BYTES // 4 // self.places)
        self.apart, self.device = ragged or far, device
        self.reader = _Features.of(first, self.count, most // (_NEAR if far else self.count))
        size, outputs = self.reader.size, test.embeddings.shape[-1]
        near = max(1, most // size) if far else self.count
        ends = [1 - test.bos + place for place in range(self.places)]  # in tokens
        self.spans = [slice(max(0, end - near) * size, end * size) for end in ends]  # features of each place
        self.features, self.outputs = near * size, outputs
        self.scale = float(self.reader.read(resized(first, self.count)).square().mean())  # strengths are times this
        if self.apart:
            self.moments = [_Moments(span.stop - span.start, outputs, device) for span in self.spans]
        else:
            self.shared = _Moments(self.spans[-1].stop, 0, device)
            self.y = torch.zeros(self.places, outputs, dtype=torch.float64, device=device)
            self.xy = [torch.zeros(span.stop, outputs, device=device) for span in self.spans]
        self.tried: tuple[float, ...] = STRENGTHS
        self.strength = STRENGTHS[0]

    def add(self, part: Gathered) -> None:
        part = resized(part, self.count)
        x, goal = self.reader.read(part).flatten(1).to(self.device), _goal(part, self.raw).to(self.device)
        counted = part.counted
        if self.apart:
            for place, moments in enumerate(self.moments):
                rows = slice(None) if counted is None else counted[:, place].to(self.device)
                moments.add(x[rows, self.spans[place]], goal[rows, place])
            return
        if counted is not None:  # none of the first samples had a gap, so these are rare
            whole = counted.all(1).to(self.device)
            x, goal = x[whole], goal[whole]
        self.shared.add(x[:, : len(self.shared.xx)], x.new_zeros(len(x), 0))
        self.y += goal.double().sum(0)
        for place, product in enumerate(self.xy):
            product.addmm_(x[:, : len(product)].T, goal[:, place])

    def _solved(self, strength: float) -> Iterator[tuple[Tensor, Tensor]]:
        if self.apart:
            yield from (moments.solve(strength * self.scale) for moments in self.moments)
            return
        count, x = max(self.shared.count, 1), (self.shared.x / max(self.shared.count, 1)).float()
        factor = _factor(_covariance(self.shared.xx, x, count), strength * self.scale)
        for place, product in enumerate(self.xy):
            width, y = len(product), (self.y[place] / count).float()
            cross = product / count - torch.outer(x[:width], y)
            weights = torch.cholesky_solve(cross, factor[:width, :width]) if width else cross
            yield weights, y - x[:width] @ weights

    def solved(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._solved(self.strength)

    def read(self, part: Gathered) -> Iterator[Tensor]:
        flat = self.reader.read(resized(part, self.count)).flatten(1).to(self.device)
        return (flat[:, span] for span in self.spans)

    def _predicted(self, part: Gathered, strength: float) -> Tensor:
        found = torch.empty(len(part.values), self.places, self.outputs, device=self.device)
        for place, (x, (weights, offset)) in enumerate(zip(self.read(part), self._solved(strength), strict=True)):
            found[:, place] = x @ weights + offset
        return found.cpu()

    def choose(self, held: Gathered) -> None:
        part = resized(held, self.count)
        goal = _goal(part, self.raw)
        errors = {
            strength: float(masked_mean(_error(self._predicted(part, strength), goal, self.raw), part.counted))
            for strength in self.tried
        }
        self.strength = min(errors, key=errors.__getitem__)
        self.tried = _beside(self.strength)

    def predict(self, test: Gathered) -> Tensor:
        return self._predicted(test, self.strength)


class FromSeen:
    """`Autoregression` for orders of each sample: one regression for every position of the target.

    Its features are the raw tokens in canonical order, those not read before the target as their mean; where sequences
    are so long that the budget leaves less than a number a token, those around the target. Each regression chooses its
    own strength.
    """

    def __init__(self, first: Gathered, test: Gathered, device: torch.device, *, raw: bool = False) -> None:
        self.raw, self.count = raw, max(first.values.shape[1], test.values.shape[1])
        most, first = math.isqrt(_BYTES // 4 // self.count), _canonical(resized(first, self.count))
        far = min(_SEEN_FEATURES, most) < self.count
        keep = most // _NEAR if far else min(_SEEN_FEATURES, most) // self.count
        self.reader, self.device = _Features.of(first, self.count, keep), device
        self.near = max(1, most // self.reader.size) if far else self.count
        self.features, outputs = self.near * self.reader.size, test.embeddings.shape[-1]
        self.moments = [_Moments(self.features, outputs, device) for _ in range(self.count)]
        self.tried: list[tuple[float, ...]] = [STRENGTHS] * self.count
        self.strengths = [STRENGTHS[0]] * self.count

    def read(self, part: Gathered) -> Iterator[Tensor]:
        part = resized(part, self.count)
        assert part.order is not None
        x, place, near = self.reader.read(_canonical(part)), part.order.argsort(1), self.near
        for target in range(self.count):
            start = min(max(0, target - near // 2), self.count - near)
            around = slice(start, start + near)
            seen = place[:, around] < place[:, target, None]
            yield (x[:, around] * seen[..., None]).flatten(1).to(self.device)

    def add(self, part: Gathered) -> None:
        if part.values.shape[1] > self.count:  # longer than all test samples and the first ones: no place for it
            return
        part = resized(part, self.count)
        goal, counted = (x.to(self.device) for x in part.by_target(_goal(part, self.raw)))
        for target, x in enumerate(self.read(part)):
            rows = counted[:, target]
            self.moments[target].add(x[rows], goal[rows, target])

    def choose(self, held: Gathered) -> None:
        part = resized(held, self.count)
        goal, counted = (x.to(self.device) for x in part.by_target(_goal(part, self.raw)))
        for target, x in enumerate(self.read(part)):
            moments, rows, errors = self.moments[target], counted[:, target], {}
            for strength in self.tried[target]:
                weights, offset = moments.solve(strength * moments.scale)
                errors[strength] = float(_error(x[rows] @ weights + offset, goal[rows, target], self.raw).sum())
            self.strengths[target] = min(errors, key=errors.__getitem__)
            self.tried[target] = _beside(self.strengths[target])

    def solved(self) -> Iterator[tuple[Tensor, Tensor]]:
        for moments, strength in zip(self.moments, self.strengths, strict=True):
            yield moments.solve(strength * moments.scale)

    def predict(self, test: Gathered) -> Tensor:
        assert test.order is not None
        found = [
            (x @ weights + offset).cpu() for x, (weights, offset) in zip(self.read(test), self.solved(), strict=True)
        ]
        index = test.order[:, 1 - test.bos :]
        return torch.stack(found, dim=1)[torch.arange(len(index))[:, None], index]


def _beside(strength: float) -> tuple[float, ...]:
    """A strength and its neighbours: more samples move the best one little."""
    place = STRENGTHS.index(strength)
    return STRENGTHS[max(place - 1, 0) : place + 2]


def _canonical(part: Gathered) -> Gathered:
    """Values and mask in canonical order; the rest as it is."""
    assert part.order is not None
    rows, place = torch.arange(len(part.order))[:, None], part.order.argsort(1)
    mask, bos = part.mask, part.bos
    if mask is not None:
        mask = torch.cat((mask[:, :bos], mask[:, bos:][rows, place]), dim=1)
    return part._replace(values=part.values[rows, place], mask=mask)


def resized(part: Gathered, count: int) -> Gathered:
    """Sequences cut, or padded with what is not real, to `count` tokens."""
    if part.values.shape[1] == count:
        return part
    return part.rows(slice(None), tokens=count)
