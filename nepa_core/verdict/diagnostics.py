"""Was anything learned? Measurements that the loss alone can't give: rank of the embeddings, identification.

The loss of this objective reaches -0.9 when little was learned: a predictor that repeats the current token, or
one constant vector, can score as well. So collapse is judged by the rank of the embeddings and prediction by whether
the true next token can be told from others; `verdict` puts both beside baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.objective import masked_mean, negative_cosine
from nepa_core.verdict.drawing import RIVALS
from nepa_core.verdict.gathered import Gathered

_TIE = 1e-6  # cosines closer than this are equal: identical tokens differ by rounding
_WHOLE = 0.9  # a group counts if it has this share of its rivals: a few may have been unreadable


# --------------------------------------------------------------------------------------------- collapse


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values (RankMe), rows [M, D] scaled to unit length.

    1 when all rows point one way, at most D. Not centred: a shared direction counts as the loss of rank it is.
    """
    unit = F.normalize(rows.double(), dim=-1)
    singular = torch.linalg.eigvalsh(unit.T @ unit).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-300)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def spread(rows: Tensor) -> float:
    """Mean standard deviation per dimension of unit rows [M, D], times sqrt(D): 1 is isotropic, 0 collapsed."""
    return float(F.normalize(rows, dim=-1).std(0).mean() * math.sqrt(rows.shape[-1]))


def shared_direction(rows: Tensor) -> float:
    """Length of the mean of unit rows [M, D]: the cosine that the best constant vector reaches."""
    return float(F.normalize(rows, dim=-1).mean(0).norm())


def health(gathered: Gathered) -> dict[str, float]:
    """Rank, spread and shared direction of the network's embeddings (without BOS) and of the predictions."""
    own = gathered.embeddings if gathered.encoded is None else gathered.encoded
    embeddings, predictions = own[:, gathered.bos :], gathered.predictions[:, :-1]
    mask, counted = gathered.mask, gathered.counted
    own = embeddings.flatten(0, 1) if mask is None else embeddings[mask[:, gathered.bos :]]
    predicted = predictions.flatten(0, 1) if counted is None else predictions[counted]
    return {
        "effective_rank_embedding": effective_rank(own),
        "effective_rank_prediction": effective_rank(predicted),
        "spread_embedding": spread(own),
        "spread_prediction": spread(predicted),
        "shared_direction_embedding": shared_direction(own),
        "shared_direction_prediction": shared_direction(predicted),
    }


# ----------------------------------------------------------------------------------------- identification


def identification(
    predictions: Tensor, targets: Tensor, counted: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """How often the true next token is the nearest (cosine) among the samples of a group at the same place.

    Args:
        predictions, targets: [S, Q, D].
        counted: [S, Q] bool; other pairs are neither asked nor offered.
        group: [S] int64, the group of every sample, numbered from 0; default: 64 after 64.

    Returns:
        [S] float32, the share of each sample's places that were identified; NaN for samples that have nothing to ask
        and for those of a group that is smaller than the largest. Equal candidates share the credit, so chance is one
        over the number of candidates whatever repeats.
    """

    def of_group(rows: Tensor) -> Tensor:
        asked, offered = (F.normalize(x[rows].transpose(0, 1), dim=-1) for x in (predictions, targets))
        return credits_of(asked @ offered.transpose(1, 2), None if counted is None else counted[rows], tie=_TIE)

    return by_group(of_group, len(predictions), group)


def by_group(credits: Callable[[Tensor], Tensor], samples: int, group: Tensor | None) -> Tensor:
    """What `credits` gives of the rows of each group, [S]; NaN for those of a group smaller than the largest.

    Args:
        group: see `identification`.
    """
    group = torch.arange(samples) // RIVALS if group is None else group
    sizes = group.bincount()
    found = torch.full((samples,), math.nan)
    for name, size in enumerate(sizes.tolist()):
        if size >= _WHOLE * sizes.max():
            rows = (group == name).nonzero()[:, 0]
            found[rows] = credits(rows).float()
    return found


def credits_of(score: Tensor, counted: Tensor | None, *, tie: float) -> Tensor:
    """`identification` of one group by any score, higher for the likelier candidate: [Q, asked, offered] -> [S].

    Args:
        counted: [S, Q] bool. tie: scores closer than this are equal.
    """
    true = score.diagonal(dim1=1, dim2=2)[..., None].clone()
    if counted is not None:
        score = score.masked_fill(~counted.T[:, None, :], -math.inf)
    beaten = (score > true + tie).any(-1)
    beaten |= true[..., 0].isnan()
    credit = torch.where(beaten, 0.0, 1.0 / ((score - true).abs() <= tie).sum(-1).clamp(min=1))
    if counted is None:
        return credit.mean(0)
    return (credit * counted.T).sum(0) / counted.T.sum(0)


def identified(predictions: Tensor, gathered: Gathered) -> Tensor:
    """`identification` where a token precedes, [S]: from BOS alone every sample's prediction is the same.

    Args:
        predictions: [S, Q, D] beside `gathered.targets`.
    """
    first, counted = gathered.bos, gathered.counted
    group = None if gathered.drawn is None else gathered.drawn.group
    if gathered.order is not None:  # candidates lie at one position, or the position alone would tell them apart
        laid, counts = gathered.by_target(predictions[:, first:])
        return identification(laid, gathered.by_target(gathered.targets[:, first:])[0], counts, group)
    asked = None if counted is None else counted[:, first:]
    return identification(predictions[:, first:], gathered.targets[:, first:], asked, group)


def learning(gathered: Gathered) -> dict[str, float]:
    """How much is learned, without baselines that need fitting: `copy_gap` and `retrieval_top1`.

    copy_gap: cos(prediction, target) minus cos(current embedding, target), the mean over all places. retrieval_top1:
    `identification` where a token precedes.
    """
    loss = negative_cosine(gathered.predictions[:, :-1], gathered.targets)
    copied = negative_cosine(gathered.embeddings[:, :-1], gathered.targets)
    return {
        "copy_gap": float(masked_mean(copied - loss, gathered.counted)),
        "retrieval_top1": float(identified(gathered.predictions[:, :-1], gathered).nanmean()),
    }
