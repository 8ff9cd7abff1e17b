"""What a trained network attends to and what it expects next, as numbers that can be drawn and compared.

Shapes: B samples, H heads, N tokens, T places (N, or N + 1 with BOS), D width. Places run in the order of
prediction; bring what belongs to tokens to canonical order with `Tokens.canonical` before drawing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.kernels.attention import attention_mask
from nepa_core.tokens import Sketch, Tokens

# -------------------------------------------------------------------------------------------- attention


def chosen_attention(attention: Sequence[Tensor], *, layer: int | None = None, head: int | None = None) -> Tensor:
    """Attention of one layer and head, both counted from 1, or averaged over all: [B, H, T, T] each -> [B, T, T]."""
    layers = torch.stack([weights if head is None else weights[:, head - 1 : head] for weights in attention])
    return layers.mean((0, 2)) if layer is None else layers[layer - 1].mean(1)


def uniform_attention(mask: Tensor, *, causal: bool) -> Tensor:
    """Equal weight on every place that may be seen: what the figures below are to be compared with.

    mask [B, T] bool, True for a real token -> [B, 1, T, T].
    """
    allowed = attention_mask(mask, causal=causal).float()
    return allowed / allowed.sum(-1, keepdim=True)


class AttentionFigures(NamedTuple):
    """How far and how wide each head looks, [B, H] each: means over the real tokens of a sample, BOS left out.

    Attributes:
        distance: from a token to the tokens it attends to, weighted by the attention that does not fall on BOS,
            in the unit of the positions.
        entropy: of the attention over all places, in nats.
        on_bos: share of the attention that falls on BOS; 0 without one.
    """

    distance: Tensor
    entropy: Tensor
    on_bos: Tensor


def attention_figures(weights: Tensor, positions: Tensor, mask: Tensor | None = None) -> AttentionFigures:
    """Measure the attention maps of one layer.

    Args:
        weights: [B, H, T, T], each row a distribution.
        positions: [N, A] or [B, N, A], where the token at each place lies, such as `grid_positions(grid)[order]`.
        mask: [B, N] bool, True for a real token, or None.
    """
    first = weights.shape[-1] - positions.shape[-2]  # 1 with BOS
    rows = weights[:, :, first:]
    apart = torch.cdist(positions, positions).unsqueeze(-3)  # [1, N, N] or [B, 1, N, N]
    on_tokens = rows[..., first:]
    distance = (on_tokens * apart).sum(-1) / on_tokens.sum(-1).clamp(min=1e-12)
    entropy = -torch.special.xlogy(rows, rows).sum(-1)
    on_bos = rows[..., :first].sum(-1)
    real = torch.ones_like(distance[:, :1]) if mask is None else mask[:, None].to(distance.dtype)
    return AttentionFigures(*((x * real).sum(-1) / real.sum(-1).clamp(min=1) for x in (distance, entropy, on_bos)))


def neighbour_share(weights: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of each head's attention on the tokens next to the one that looks, on its 8 neighbours in a grid, [B, H].

    Mean over the real tokens of a sample, BOS left out; itself is none of the neighbours. Arguments as in
    `attention_figures`.
    """
    first = weights.shape[-1] - positions.shape[-2]
    apart = (positions.unsqueeze(-2) - positions.unsqueeze(-3)).abs().amax(-1)
    near = ((apart > 0) & (apart < 1.5)).to(weights.dtype).unsqueeze(-3)
    share = (weights[:, :, first:, first:] * near).sum(-1)
    real = torch.ones_like(share[:, :1]) if mask is None else mask[:, None].to(share.dtype)
    return (share * real).sum(-1) / real.sum(-1).clamp(min=1)


def grid_positions(grid: tuple[int, ...]) -> Tensor:
    """(row, column) or (slice, row, column) of every token in canonical order, [N, A] float32, in units of a token."""
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))


def token_positions(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    """Where the token at each place lies, [N, A] or [B, N, A] float32 in the order of reading, on its own device.

    (row, column), or (slice, row, column), on the grid that it is drawn in; of tokens that have coordinates on several
    axes and are drawn in one row, as point clouds are, the coordinates, in units of the median distance of a token to
    the nearest other one.
    """
    if len(grid) > 2 or grid[0] > 1 or tokens.coords.shape[-1] == 1:
        cells = grid_positions(grid).to(tokens.values.device)
        return cells if tokens.order is None else cells[tokens.order.to(cells.device)]
    coords = tokens.coords.to(tokens.values.device)
    apart = torch.cdist(coords, coords) + torch.diag(coords.new_full(coords.shape[-2:-1], torch.inf))
    if tokens.mask is not None:
        apart = apart.masked_fill(~tokens.mask[:, None], torch.inf)[tokens.mask]
    nearest = apart.amin(-1)
    return coords / nearest[nearest.isfinite()].median().clamp(min=1e-12)


# ------------------------------------------------------------------------------------------- similarity


def next_similarity(predictions: Tensor, embeddings: Tensor, *, bos: bool) -> Tensor:
    """Cosine between what every place predicts and every token of the same sample (the paper's similarity map).

    predictions, embeddings [B, T, D] -> [B, T, N], float32.
    """
    predictions, tokens = (F.normalize(x.float(), dim=-1) for x in (predictions, embeddings[:, int(bos) :]))
    return predictions @ tokens.mT


def next_rank(similarity: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rank of the true next token among the real tokens of the sample, for every place that has a next token.

    1 is best; tokens that tie (blank patches) share the mean of their ranks, so a guess gets (real tokens + 1) / 2.

    Args:
        similarity: [B, T, N] of `next_similarity`, tokens in the order of prediction.
        mask: [B, N] bool, True for a real token, or None.

    Returns:
        [B, T - 1] float32, NaN where source or target is not real.
    """
    _, places, count = similarity.shape
    bos = places - count
    real = torch.ones_like(similarity[:, 0], dtype=torch.bool) if mask is None else mask
    asked = similarity[:, :-1]  # place t is asked for token t + 1 - bos
    true = asked[..., 1 - bos :].diagonal(dim1=1, dim2=2)[..., None]
    tied = (asked - true).abs() <= 1e-6  # equal tokens differ by rounding
    better = (asked > true) & ~tied
    rank = 1 + (better & real[:, None]).sum(-1) + ((tied & real[:, None]).sum(-1) - 1) / 2
    source = F.pad(real, (bos, 0), value=True)[:, :-1]
    return rank.masked_fill(~(source & real[:, 1 - bos :]), torch.nan)


# ------------------------------------------------------------------------------------------------ colour


def pca_colours(rows: Tensor) -> Tensor:
    """The first three principal components of rows [M, D] as RGB between 0 and 1, [M, 3] float32.

    Each component runs from its 1st to its 99th percentile; the largest of its weights is positive, so that the
    same rows always give the same colours. A component without variance is 0.5.
    """
    centred = rows.double() - rows.double().mean(0)
    variance, directions = torch.linalg.eigh(centred.T @ centred)
    variance, directions = variance.flip(0)[:3], directions.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    scores = centred @ (directions * largest.sign())
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.where(variance > 1e-9 * variance[:1].clamp(min=1e-12), colours, 0.5)
    return F.pad(colours, (0, 3 - colours.shape[1]), value=0.5).float()


class Reading(NamedTuple):
    """What the network makes of one sample; what belongs to tokens is in canonical order.

    Attributes:
        name: what the sample is called.
        sketch: of this sample alone.
        order: [N] int64, the token at each place.
        real: [N] bool, False for padding.
        query, next: tokens; the next one is what is predicted at the query's place, None after the last.
        attention: [N] float, from the query; NaN where it may not look.
        on_bos: the query's attention to BOS.
        similarity: [N] float, NaN for padding.
        rank: of the next token among the tokens of the sample; NaN after the last.
        ranks: the same for every place that has a next token.
        hidden: [N, D] each, as in `Trace.hidden`.
        layers: figures of every layer, and of uniform attention at the end.
    """

    name: str
    sketch: Sketch
    order: Tensor
    real: Tensor
    query: int
    next: int | None
    attention: Tensor
    on_bos: float
    similarity: Tensor
    rank: float
    ranks: Tensor
    hidden: list[Tensor]
    layers: list[AttentionFigures]

    @property
    def path(self) -> Tensor:
        """The real tokens in the order of prediction, int64: as many as there are."""
        return self.order[self.real[self.order]]


class Failure(NamedTuple):
    """A sample with the loss of each token, -cos of prediction and embedding: 1 is worst.

    Attributes:
        name: what the sample is called. sketch: of this sample alone.
        losses: [N] float in canonical order, NaN where nothing predicts the token.
        token: the worst of those that another token comes before.
    """

    name: str
    sketch: Sketch
    losses: Tensor
    token: int


class Failures(NamedTuple):
    """The worst-predicted samples, from the worst down.

    Attributes:
        searched: samples that were read. split: theirs. mean: loss of a sample, over all of them.
        samples: the highest loss over all tokens. tokens: the highest loss of one token.
    """

    searched: int
    split: str
    mean: float
    samples: list[Failure]
    tokens: list[Failure]
