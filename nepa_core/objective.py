"""The objectives of next-embedding prediction: the only copy in the house.

The prediction at place t is compared with the embedding of place t + 1. The paper's loss (its Algorithm 1) is

    loss = -mean over b, t of cos(prediction[b, t], stop_gradient(embedding[b, t + 1]))

with range [-1, 1]; -1 is perfect. Shift and stop-gradient are arguments, because the paper ablates both.

The rest of the family are other comparisons of the same two. Each is a term (prediction, target, counted) -> scalar:
[B, Q, D] twice and [B, Q] bool, the pairs that count (None for all); p and z below are one prediction and one target,
the term is the mean over the pairs that count, in float32 whatever autocast says. `pretrainer` mixes them, and has the
heads of the terms that compare what a head makes of p or z. Terms that compare samples see one micro-batch of one
process, except `infonce_position`: its negatives come from all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Term = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Gather = Callable[[Tensor], Tensor]
"""[B, ...] of this process -> [B', ...] of all, its own first; gradients flow back to their owners."""


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


# ------------------------------------------------------------------------------------------------- terms


def _float32(term: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(term)
    def outside_autocast(prediction: Tensor, target: Tensor, *rest: Any, **options: Any) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            return term(prediction.float(), target.float(), *rest, **options)

    return outside_autocast


def cosine(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """-cos(p, z): NEPA, Algorithm 1."""
    return masked_mean(negative_cosine(prediction, target), counted)


@_float32
def mse(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """|p - z|^2 / D: the squared distance of I-JEPA (section 3, "Loss"), per dimension, to the next embedding."""
    return masked_mean((prediction - target).square().mean(-1), counted)


@_float32
def mse_normalised(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """|p - (z - mean z) / std z|^2 / D, mean and std over the D of one target.

    MAE (section 3, "Reconstruction target") normalises the pixels of a patch so.
    """
    return mse(prediction, F.layer_norm(target, target.shape[-1:], eps=1e-6), counted)


@_float32
def standardised(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """-cos(p, (z - m) / s), with mean m and deviation s of every dimension over the batch at each position.

    No paper's: a trial of this project, which takes the mean embedding of each place out of the target.
    """
    return cosine(prediction, _standardise(target, counted, over=(0,)), counted)


@_float32
def infonce_sample(prediction: Tensor, target: Tensor, counted: Tensor | None, *, temperature: float) -> Tensor:
    """-log softmax_s(cos(p[t], z[s]) / temperature) at s = t: InfoNCE among the tokens of one sample.

    CPC, eq. 4, with the cosine over a temperature (SimCLR, eq. 1) as its score.
    """
    logits = _unit(prediction) @ _unit(target).mT / temperature  # [B, asked, offered]
    if counted is not None:
        logits = logits.masked_fill(~counted[:, None, :], -1e9)
    return masked_mean(logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2), counted)


@_float32
def infonce_position(
    prediction: Tensor, target: Tensor, counted: Tensor | None, *, temperature: float, gather: Gather
) -> Tensor:
    """-log softmax_c(cos(p[b], z[c]) / temperature) at c = b: InfoNCE among all samples, at one and the same place.

    CPC, eq. 4, with the score of SimCLR, eq. 1. That the negatives are of the same place is this project's choice.
    """
    samples, places = prediction.shape[:2]
    real = _ones(target) if counted is None else counted.float()
    offered, real = gather(_unit(target))[:, :places], gather(real)[:, :places]
    logits = _unit(prediction).transpose(0, 1) @ offered.permute(1, 2, 0) / temperature  # [Q, asked, offered]
    logits = logits.masked_fill(real.T[:, None, :] == 0, -1e9)
    true = logits[:, :, :samples].diagonal(dim1=1, dim2=2)
    return masked_mean((logits.logsumexp(-1) - true).T, counted)


@_float32
def barlow(prediction: Tensor, target: Tensor, counted: Tensor | None, *, redundancy: float) -> Tensor:
    """(sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2) / D: Barlow Twins (eq. 1), divided by D.

    C [D, D] is the correlation of prediction and target over all pairs that count (eq. 2).
    """
    a, b = (_standardise(x, counted, over=(0, 1)).flatten(0, 1) for x in (prediction, target))
    if counted is not None:
        a = torch.where(counted.flatten()[:, None], a, 0.0)
        b = torch.where(counted.flatten()[:, None], b, 0.0)
    count = len(a) if counted is None else counted.sum().clamp(min=1)
    squares = (a.T @ b / count - torch.eye(a.shape[-1], device=a.device)).square()
    on = squares.diagonal().sum()
    return (on + redundancy * (squares.sum() - on)) / a.shape[-1]


@_float32
def sigreg(
    _: Tensor, target: Tensor, counted: Tensor | None, *, over: Literal["tokens", "batch"], slices: int
) -> Tensor:
    """How far the targets are from a standard normal (SIGReg of LeJEPA), over a sample's tokens or over the batch.

    The mean over random unit directions a of 2 * integral_0^3 |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt, with phi the
    mean of exp(i t z.a) over the N tokens of a sample (LeNEPA) or the N samples at a position; trapezoid, 17 knots.
    There is no factor N in front: a weight for the statistic with it is to be multiplied by N.
    """
    axis = 1 if over == "tokens" else 0
    directions = F.normalize(torch.randn(target.shape[-1], slices, device=target.device), dim=0)
    knots = torch.linspace(0, 3, 17, device=target.device)[1:]  # at 0 both sides are 1
    step = torch.full_like(knots, 3 / 16)
    step[-1] /= 2
    angles = (target @ directions)[..., None] * knots  # [B, Q, slices, knots]
    weight = (_ones(target) if counted is None else counted.float())[..., None, None]
    count = weight.sum(axis).clamp(min=1)
    real, imaginary = ((wave * weight).sum(axis) / count for wave in (angles.cos(), angles.sin()))
    normal = torch.exp(-knots.square() / 2)
    distance = ((real - normal).square() + imaginary.square()) * normal
    statistic = 2 * (distance * step).sum(-1).mean(-1)
    return masked_mean(statistic, None if counted is None else counted.any(axis))


def projected_cosine(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """-cos(g(p), g(z)), of g(p) and g(z) with g the projector. No paper's: a trial of this project."""
    return cosine(prediction, target, counted)


def projected_mse(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """|g(p) - g(z)|^2 / D', of g(p) and g(z) with g the projector, D' wide: what LeNEPA adds SIGReg to."""
    return mse(prediction, target, counted)


def horizons(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """-cos(W_k p[t], z[t + k]), of W_k p and the target k places ahead; then the mean over k = 1 ... K.

    A linear map W_k of every horizon is in the score of CPC (eq. 3); the cosine in place of its InfoNCE is NEPA's.
    """
    return cosine(prediction, target, counted)


def intermediate(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """-cos(V_l h_l[t], z[t + 1]), of V_l h_l with h_l the output of block l; then the mean over the chosen l.

    Losses at inner layers are the idea of Deeply-Supervised Nets; this one, with a linear map V_l each, is this
    project's.
    """
    return cosine(prediction, target, counted)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-6)


def _ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], device=x.device)


def _standardise(x: Tensor, counted: Tensor | None, *, over: tuple[int, ...]) -> Tensor:
    """(x - mean) / std over some of the first two axes of [B, Q, D], of the entries that count."""
    weight = (_ones(x) if counted is None else counted.float())[..., None]
    count = weight.sum(over, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(over, keepdim=True) / count
    variance = ((x - mean).square() * weight).sum(over, keepdim=True) / count
    return (x - mean) * (variance + 1e-6).rsqrt()
