"""Next-embedding prediction in one file: the shift, the stop-gradient and the cosine.

The prediction at place t is compared with the embedding of place t + 1. The paper's loss (its Algorithm 1) is

    loss = -mean over b, t of cos(prediction[b, t], stop_gradient(embedding[b, t + 1]))

with range [-1, 1]; -1 is perfect. Shift and stop-gradient are arguments, because the paper ablates both. Other
comparisons of the same two, and mixtures of them, are in `terms`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_up(
    predictions: Tensor, embeddings: Tensor, mask: Tensor | None, *, shift: bool, ahead: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay every prediction beside its target.

    Args:
        predictions, embeddings: [B, T, D].
        mask: [B, T] bool, True for a real token, or None.
        ahead: places from a prediction to its target.

    Returns:
        predictions and targets [B, T - ahead, D] (T without the shift), and which pairs count [B, T - ahead] bool or
        None: those whose source and target are both real.
    """
    if not shift:
        return predictions, embeddings, mask
    counted = None if mask is None else mask[:, :-ahead] & mask[:, ahead:]
    return predictions[:, :-ahead], embeddings[:, ahead:], counted


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos over the last axis, in float32 whatever autocast says; [..., D] twice -> [...].

    Vectors shorter than 1e-6 count as that long: a zero vector has no direction, and its gradient would swamp
    all others.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        a, b = (F.normalize(x.float(), dim=-1, eps=1e-6) for x in (prediction, target))
        return -(a * b).sum(-1)


def masked_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over the entries that count, shapes equal; 0 where none does."""
    if counted is None:
        return values.mean()
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def pair_count(predictions: Tensor, mask: Tensor | None = None, *, shift: bool = True) -> Tensor | int:
    """How many pairs the loss of a batch is a mean over (a tensor where a mask decides); shapes as in `pair_up`."""
    _, target, counted = pair_up(predictions, predictions, mask, shift=shift)
    return target.shape[0] * target.shape[1] if counted is None else counted.sum()


def next_embedding_loss(
    predictions: Tensor,
    embeddings: Tensor,
    mask: Tensor | None = None,
    *,
    shift: bool = True,
    stop_gradient: bool = True,
) -> Tensor:
    """The paper's loss of one batch: mean negative cosine over all pairs that count, a float32 scalar.

    Args:
        predictions: [B, T, D], the predictor's output.
        embeddings: [B, T, D], the predictor's input before any positional term: the source of the targets.
        mask: [B, T] bool, True for a real token, or None.
    """
    prediction, target, counted = pair_up(predictions, embeddings, mask, shift=shift)
    return masked_mean(negative_cosine(prediction, target.detach() if stop_gradient else target), counted)
