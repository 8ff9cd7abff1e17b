"""A linear-Gaussian autoregression on raw tokens: the control of everything that is generated.

The mean of a token is the ridge regression on all raw tokens before it that the verdict uses too
(`nepa_core.verdict.baselines`), here of the token itself and not of an embedding's direction: one regression for each
place in the order of prediction, or for each position where samples have orders of their own. What the mean leaves is
normal, with a covariance for each of them.

Shapes: B samples, N tokens, P numbers in a raw token, R residuals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.tokens import Law, Tokens
from nepa_core.verdict.baselines import Autoregression, FromSeen, Regressions, chunks, resized
from nepa_core.verdict.gathered import Gathered

_RESIDUALS = 8192  # most that the shape of the covariances is estimated from
_LEAST = 1e-6  # variance of every number, times the mean variance: constant ones have a law, too


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """A fitted autoregression; see `fit_linear_gaussian`. Tokens are float32 on the CPU, in the order of prediction.

    Attributes:
        linear: makes the features. weights: [F, P] and intercept [P] of every place, or position of the target.
        covariance: [N, P, P] float64, of them.
    """

    linear: Regressions
    weights: list[tuple[Tensor, Tensor]]
    covariance: Tensor

    def law(self, tokens: Tokens) -> Law:
        """Of every token given those before it: mean [B, N, P], covariance [N, P, P], or [B, N, P, P] by own orders."""
        part = _gathered(tokens, len(self.weights))
        means = [
            x @ weights + offset for x, (weights, offset) in zip(self.linear.read(part), self.weights, strict=True)
        ]
        mean, count = torch.stack(means, 1), tokens.values.shape[1]
        if part.order is None:
            return Law(mean[:, :count], self.covariance[:count])
        order = part.order[:, :count]
        return Law(mean[torch.arange(len(order))[:, None], order], self.covariance[order])

    def sample(self, tokens: Tokens, place: int, generator: torch.Generator | None = None) -> Tensor:
        """The token at a place, drawn given those before it: [B, P]. The values from there on are not read."""
        values = tokens.values.clone()
        values[:, place:] = 0.0
        part = _gathered(replace(tokens, values=values), len(self.weights))
        index = torch.full((len(values),), place) if part.order is None else part.order[:, place]
        drawn = torch.empty_like(values[:, place])
        for at, x in enumerate(self.linear.read(part)):
            rows = index == at
            if rows.any():
                weights, offset = self.weights[at]
                law = Law((x[rows] @ weights + offset)[:, None], self.covariance[at : at + 1])
                drawn[rows] = law.draw(1, generator)[0, :, 0]
        return drawn

    def complete(self, tokens: Tokens, keep: int | Tensor, generator: torch.Generator | None = None) -> Tokens:
        """Draw every token that is not kept, one after the other; kept ones stay as they are, and so does padding.

        Args:
            keep: how many leading tokens are given, one number or int64 [B]; or which, bool [B, N].
        """
        places = torch.arange(tokens.values.shape[1])
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            keep = places < torch.as_tensor(keep).view(-1, 1)
        values = tokens.values.clone()
        for place in places.tolist():
            made = tokens.real[:, place] & ~keep.expand(len(values), -1)[:, place]
            if made.any():
                values[made, place] = self.sample(replace(tokens, values=values), place, generator)[made]
        return replace(tokens, values=values)


def fit_linear_gaussian(parts: Iterable[Tokens], *, total: int, length: int) -> LinearGaussian:
    """Fit it in one pass, holding moments alone.

    The strength of the ridge is chosen on the first tenth of the samples, and the covariances are those of what it
    leaves there (`covariances`): of samples that it was not fitted on, as those that it is judged on. Where orders are
    [B, N], it is told the position of each target, as a network with `predict_position`; for one that is not told,
    leave the order out of the tokens.

    Args:
        parts: training samples in random order, as `Modality.read` gives them.
        total: how many there will be, about. length: N, of the longest, in training or later.

    Raises:
        ValueError: tokens are more than `length`.
    """
    stream = (_gathered(part, length) for part in parts)
    first = next(stream)
    rest = chunks(chain([first], stream), first, total=total)
    held = next(rest)
    linear: Regressions = (Autoregression if held.order is None else FromSeen)(
        held, held, torch.device("cpu"), raw=True
    )
    fitted = 0
    for part in rest:
        linear.add(part)
        fitted += len(part.values)
    if not fitted:  # too few to hold any back
        linear.add(held)
    linear.choose(held)
    left = held.targets - linear.predict(held)
    if held.order is not None:
        left, counted = held.by_target(left)
    else:
        counted = held.real[:, 1:] if held.counted is None else held.counted
    if fitted:
        linear.add(held)
    return LinearGaussian(linear, list(linear.solved()), covariances(left, counted))


def covariances(left: Tensor, counted: Tensor) -> Tensor:
    """The covariance of residuals [B, N, P] at every place, positive definite however few they are: [N, P, P] float64.

    Each has a size of its own, its mean variance, and a shape that leans on that of all places (shrunk by Ledoit and
    Wolf 2004): as if P residuals more had that one.

    Args:
        counted: [B, N] bool, residuals of real tokens.
    """
    from sklearn.covariance import ledoit_wolf

    rows = left[counted]
    size = left.shape[-1]
    some = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_RESIDUALS]]
    scale = some.double().square().mean(0).sqrt().clamp(min=1e-12)  # or constant numbers would be shrunk to vary
    pooled = torch.from_numpy(ledoit_wolf((some / scale).numpy(), assume_centered=True)[0]) * scale.outer(scale)
    whole = pooled.trace().clamp(min=1e-12)
    found = []
    for place in range(left.shape[1]):
        own = left[counted[:, place], place].double()
        square = own.T @ own / max(len(own), 1)
        shape = pooled * (square.trace() / whole if len(own) else 1.0)
        mixed = (len(own) * square + size * shape) / (len(own) + size)
        found.append(mixed + _LEAST * whole / size * torch.eye(size, dtype=torch.float64))
    return torch.stack(found)


def _gathered(tokens: Tokens, length: int) -> Gathered:
    """As the verdict's baselines read tokens, padded to `length`: each is a target, the first behind a BOS."""
    if tokens.values.shape[1] > length:
        raise ValueError(f"{tokens.values.shape[1]} tokens in place of the {length} that length= promised at most")
    values = tokens.values.float()
    targets = F.pad(values, (0, 0, 1, 0))
    mask = None if tokens.mask is None else F.pad(tokens.mask, (1, 0), value=True)
    own = tokens.order if tokens.order is not None and tokens.order.ndim == 2 else None
    return resized(Gathered(values, targets, targets, mask, own), length)
