"""Ridge regression in closed form, for numbers and for classes.

Shapes: S samples, D width of a feature, K numbers to predict, or classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Credit = Callable[[Tensor, Tensor], Tensor]
"""(predicted, truth), [S, K] each -> what each sample adds to a figure that is their mean, float64 [S]."""

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the number of samples


def r2(predicted: Tensor, truth: Tensor) -> Tensor:
    """What each sample adds to the coefficient of determination, [S], of numbers [S, K] each.

    The mean over S is R2, itself the mean over the K numbers; 0 for one that does not vary. The variance of the labels
    counts as known in what is made from single samples, such as intervals: it is the same for all that is compared.
    """
    truth, predicted = truth.double(), predicted.double()
    variance = (truth - truth.mean(0)).square().mean(0)
    left = (truth - predicted).square()
    return torch.where(variance > 0, 1 - left / variance, 0.0).mean(1)


def right_class(predicted: Tensor, truth: Tensor) -> Tensor:
    """1 where the largest of the K numbers is that of the class, which is 1 in `truth`; else 0."""
    return truth.gather(1, predicted.argmax(1, keepdim=True))[:, 0].double()


def ridge(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, credit: Credit = r2) -> Tensor:
    """Ridge regression of numbers [S, K] on features [S, D] standardised by the training samples; credits [S].

    The strength, of six, is the one that serves the last fifth of the training samples best when the others are
    fitted.
    """
    kept = len(x) - len(x) // 5
    held = ridge_predictions(x[:kept], y[:kept], x[kept:])
    best = max(_STRENGTHS, key=lambda strength: float(credit(held[strength], y[kept:]).mean()))
    return credit(ridge_predictions(x, y, x_test)[best], y_test)


def ridge_predictions(x: Tensor, y: Tensor, x_test: Tensor) -> dict[float, Tensor]:
    """Predictions [S, K] for `x_test` by every strength."""
    x, x_test = (part.double() for part in standardised(x, x_test))
    middle = y.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    onto, read = vectors.T @ (x.T @ (y.double() - middle)) / len(x), x_test @ vectors
    return {strength: read @ (onto / (values.clamp(min=0) + strength)[:, None]) + middle for strength in _STRENGTHS}


def standardised(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Both, shifted and scaled by the mean and standard deviation of x; constant features become 0."""
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)
    return (x - mean) / std, (x_test - mean) / std
