"""The objective of next-embedding prediction (Algorithm 1 of the paper): the only copy in the house.

The prediction at place t is compared with the embedding of place t + 1, which is held constant:

    loss = -mean over b, t of cos(prediction[b, t], stop_gradient(embedding[b, t + 1]))

Range [-1, 1]; -1 is perfect. Shift and stop-gradient are arguments, because the paper ablates both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor

from nepa_core.basics import FROZEN


class ObjectiveConfig(BaseModel):
    """What is trained. The paper's setting is True, True, True, 0.

    Attributes:
        causal: attend backwards only while pre-training.
        shift: compare with the next embedding; False compares with the token's own, which is the input.
        stop_gradient: hold the target constant.
        unknown_target: allow an order that is drawn for each sample without `model.predict_position`, to see that the
            best prediction is then close to the mean embedding.
        input_mask: share of the input embeddings replaced by the mask token (needs `model.mask_token`).
    """

    model_config = FROZEN

    causal: bool
    shift: bool
    stop_gradient: bool
    input_mask: float = Field(ge=0, lt=1)
    unknown_target: bool = False


def pair_up(
    predictions: Tensor, embeddings: Tensor, mask: Tensor | None, *, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay every prediction beside its target.

    Args:
        predictions, embeddings: [B, T, D].
        mask: [B, T] bool, True for a real token, or None.

    Returns:
        predictions and targets [B, T - 1, D] (T without the shift), and which pairs count [B, T - 1] bool or
        None: those whose source and target are both real.
    """
    if not shift:
        return predictions, embeddings, mask
    counted = None if mask is None else mask[:, :-1] & mask[:, 1:]
    return predictions[:, :-1], embeddings[:, 1:], counted


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
    """The loss of one batch: mean negative cosine over all pairs that count, a float32 scalar.

    Args:
        predictions: [B, T, D], the predictor's output.
        embeddings: [B, T, D], the predictor's input before any positional term: the source of the targets.
        mask: [B, T] bool, True for a real token, or None.
    """
    prediction, target, counted = pair_up(predictions, embeddings, mask, shift=shift)
    return masked_mean(negative_cosine(prediction, target.detach() if stop_gradient else target), counted)
