"""Sequences and what a model made of them: what every figure on held-out data is computed from.

Shapes: S samples, N tokens, T places (with BOS), Q = T - 1 predictions, P numbers in a raw token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction
from nepa_core.objective import pair_up
from nepa_core.pretrainer import Pretrainer
from nepa_core.tokens import Tokens
from nepa_core.verdict.drawing import Drawn


class Gathered(NamedTuple):
    """Sequences and what a model made of them, float32 on the CPU.

    Attributes:
        values: [S, N, P] raw tokens in the order of prediction.
        embeddings, predictions: [S, T, D], in the space where the objective compares them (`Pretrainer.judged`).
        mask: [S, T] bool or None.
        order: [S, N] int64, the canonical index of every token, where each sample has an order of its own and the
            model is told the position that it predicts: baselines are then told it too. Else None.
        encoded: [S, T, D'], the network's own embeddings where `embeddings` are a projection of them, else None.
        drawn: which samples these are, or None where that does not matter.
    """

    values: Tensor
    embeddings: Tensor
    predictions: Tensor
    mask: Tensor | None
    order: Tensor | None = None
    encoded: Tensor | None = None
    drawn: Drawn | None = None

    @property
    def bos(self) -> int:
        """Places in front of the first token: 1 with BOS, else 0."""
        return self.embeddings.shape[1] - self.values.shape[1]

    @property
    def targets(self) -> Tensor:
        """[S, T - 1, D], the embedding that each prediction but the last is compared with."""
        return self.embeddings[:, 1:]

    def by_target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lay what belongs to the predictions but the last, [S, Q, ...], where their targets lie: [S, N, ...].

        Returns:
            That, zero where nothing belongs, and where something does and counts, [S, N] bool.
        """
        assert self.order is not None
        samples, count = self.order.shape
        pairs = torch.ones(x.shape[:2], dtype=torch.bool) if self.counted is None else self.counted[:, -x.shape[1] :]
        index = self.order[:, -x.shape[1] :].masked_fill(~pairs, count)  # a place for what does not count
        rows = torch.arange(samples)[:, None]
        laid, counts = x.new_zeros(samples, count + 1, *x.shape[2:]), pairs.new_zeros(samples, count + 1)
        laid[rows, index], counts[rows, index] = x, True
        return laid[:, :count], counts[:, :count]

    @property
    def counted(self) -> Tensor | None:
        """[S, T - 1] bool, the pairs whose source and target are real, or None for all."""
        return pair_up(self.predictions, self.embeddings, self.mask, shift=True)[2]

    def rows(self, index: slice | Tensor, *, tokens: int | None = None) -> Gathered:
        """Some of the samples; with `tokens`, cut or padded (with what is not real) to that many tokens."""
        embeddings = self.embeddings[index]
        whole = Gathered(
            values=self.values[index],
            embeddings=embeddings,
            predictions=embeddings if self.predictions is self.embeddings else self.predictions[index],
            mask=None if self.mask is None else self.mask[index],
            order=None if self.order is None else self.order[index],
            encoded=None if self.encoded is None else self.encoded[index],
            drawn=None if self.drawn is None else self.drawn.at(index),
        )
        return whole if tokens is None else whole._sized(tokens)

    def _sized(self, tokens: int) -> Gathered:
        count, bos = self.values.shape[1], self.bos
        if tokens < count:
            places = slice(tokens + bos)
            return self._replace(
                values=self.values[:, :tokens],
                embeddings=self.embeddings[:, places],
                predictions=self.predictions[:, places],
                mask=None if self.mask is None else self.mask[:, places],
                order=None if self.order is None else self.order[:, :tokens],
                encoded=None if self.encoded is None else self.encoded[:, places],
            )
        mask = torch.ones(self.embeddings.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        return self._replace(
            values=_padded(self.values, tokens),
            embeddings=_padded(self.embeddings, tokens + bos),
            predictions=_padded(self.predictions, tokens + bos),
            mask=_padded(mask, tokens + bos),
            order=None if self.order is None else _padded_order(self.order, tokens),
            encoded=None if self.encoded is None else _padded(self.encoded, tokens + bos),
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def gather(
    model: NEPA,
    modality: Modality,
    batches: Iterable[Batch],
    *,
    causal: bool,
    limit: int | None = None,
    watch: Callable[[Prediction], None] | None = None,
) -> Gathered:
    """Run the model over batches (already on its device), in evaluation mode, for up to `limit` samples.

    Args:
        watch: shown what the model gives for every batch.

    Raises:
        UserError: what it gives is not finite.
    """
    parts: list[Gathered] = []
    count = 0
    with _evaluating(model):
        for batch in batches:
            tokens = modality.read(batch)
            out = model(tokens, causal=causal)
            if watch is not None:
                watch(out)
            parts.append(_gathered(model, tokens, out))
            count += len(out.embeddings)
            if limit is not None and count >= limit:
                break
    return joined(parts).rows(slice(limit))


def _gathered(model: NEPA, tokens: Tokens, out: Prediction) -> Gathered:
    """What the model made of one batch."""
    predictions, embeddings = model.judged(out) if isinstance(model, Pretrainer) else (out.predictions, out.embeddings)
    if not (embeddings.isfinite().all() and predictions.isfinite().all()):
        raise UserError(
            "the network gives NaN or infinity on held-out samples, so training has diverged: lower optim.lr or "
            "model.layer_scale; checkpoints before this are kept"
        )
    return Gathered(
        values=tokens.values.float().cpu(),
        embeddings=embeddings.float().cpu(),
        predictions=predictions.float().cpu(),
        mask=None if out.mask is None else out.mask.cpu(),
        order=_own_order(model, tokens),
        encoded=None if embeddings is out.embeddings else out.embeddings.float().cpu(),
    )


@torch.no_grad()
def gather_targets(model: NEPA, modality: Modality, batches: Iterable[Batch]) -> Iterator[Gathered]:
    """What baselines are fitted on: raw tokens and their targets, batch by batch; nothing is predicted.

    `predictions` are the embeddings once more, for their shape.
    """
    with _evaluating(model):
        for batch in batches:
            tokens = modality.read(batch)
            embeddings, mask = model.embedded(tokens)
            if isinstance(model, Pretrainer):
                embeddings = model.targets(embeddings)
            found = embeddings.float().cpu()
            yield Gathered(
                values=tokens.values.float().cpu(),
                embeddings=found,
                predictions=found,
                mask=None if mask is None else mask.cpu(),
                order=_own_order(model, tokens),
            )


def _own_order(model: NEPA, tokens: Tokens) -> Tensor | None:
    """The order of every sample, where each has its own and the model is told the position that it predicts."""
    told = model.config.predict_position != "off" and tokens.order is not None and tokens.order.ndim == 2
    return tokens.order.cpu() if told and tokens.order is not None else None


def joined(parts: list[Gathered]) -> Gathered:
    """One after the other, padded to the longest; the mask is None where all is real. `drawn` is not kept."""
    first, tokens = parts[0], max(part.values.shape[1] for part in parts)
    places = tokens + first.bos
    embeddings = _stacked([part.embeddings for part in parts], places)
    real = [torch.ones(p.embeddings.shape[:2], dtype=torch.bool) if p.mask is None else p.mask for p in parts]
    mask = _stacked(real, places)
    once = all(part.predictions is part.embeddings for part in parts)
    return Gathered(
        values=_stacked([part.values for part in parts], tokens),
        embeddings=embeddings,
        predictions=embeddings if once else _stacked([part.predictions for part in parts], places),
        mask=None if mask.all() else mask,
        order=None
        if first.order is None
        else torch.cat([_padded_order(part.order, tokens) for part in parts if part.order is not None]),
        encoded=None
        if first.encoded is None
        else _stacked([part.encoded for part in parts if part.encoded is not None], places),
    )


def _stacked(parts: list[Tensor], places: int) -> Tensor:
    """[S, places, ...] one after the other, zeros (False) behind the shorter; no part is copied twice."""
    whole = parts[0].new_zeros(sum(map(len, parts)), places, *parts[0].shape[2:])
    start = 0
    for part in parts:
        whole[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return whole


def _padded(x: Tensor, places: int) -> Tensor:
    """[S, N, ...] with zeros (False) up to so many places."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, places - x.shape[1]))


def _padded_order(order: Tensor, tokens: int) -> Tensor:
    """Padding keeps the places behind, or an order could not be inverted."""
    behind = torch.arange(order.shape[1], tokens)
    return torch.cat((order, behind.expand(len(order), -1)), dim=1)
