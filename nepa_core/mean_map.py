"""The conditional mean of a raw token, as far as a linear map knows it: ridge regression in closed form.

From the prediction at place t to the raw token at t + 1 it is what can be said of that token in one answer: the mean of
all that may come, not one of them (`flow` samples these). From an embedding to its own token it undoes the embedder.

Shapes: M tokens, D width, P numbers in a raw token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STRENGTHS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the ridge, times the mean variance of a feature."""


@torch.no_grad()
def fit_mean(features: Tensor, values: Tensor) -> nn.Linear:
    """The best linear map [M, D] -> [M, P], float32.

    The strength is the one with which the first four fifths of the rows say the last fifth best; then all are fitted.
    """
    known = len(features) - len(features) // 5
    held = [_ridge(features[:known], values[:known], strength) for strength in STRENGTHS]
    rows = slice(known, None) if known < len(features) else slice(None)
    errors = [float((each(features[rows].float()) - values[rows]).square().mean()) for each in held]
    return _ridge(features, values, STRENGTHS[errors.index(min(errors))])


def _ridge(features: Tensor, values: Tensor, strength: float) -> nn.Linear:
    x, y = features.double(), values.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram, cross = (x - x_mean).T @ (x - x_mean), (x - x_mean).T @ (y - y_mean)
    gram.diagonal().add_(strength * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, cross)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device=features.device)
    linear.weight.copy_(weight.T)
    linear.bias.copy_(y_mean - x_mean @ weight)
    return linear
