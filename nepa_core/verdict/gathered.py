"""Sequences and what a model made of them: what every figure on held-out data is computed from.

Shapes: S samples, N tokens, T places (with BOS), Q = T - 1 predictions, P numbers in a raw token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction, evaluating
from nepa_core.objective import pair_up
from nepa_core.pretrainer import Pretrainer
from nepa_core.tokens import Tokens
from nepa_core.verdict.drawing import Drawn


class Gathered(NamedTuple):
    """Sequences and what a model made of them, float32 on the CPU.

    Attributes:
        values: [S, N, P] raw tokens in the order of prediction.
        embeddings, predictions: [S, T, D], in the space where the objective compares them (`Pretrainer.judged`), the
            predictions behind the prediction head, where there is one.
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
    def real(self) -> Tensor:
        """The mask, all True where there is none: [S, T] bool."""
        return torch.ones(self.embeddings.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

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
        some = self._each(lambda name, x: x[index])
        whole = self._replace(**some, drawn=None if self.drawn is None else self.drawn.at(index))
        return whole if tokens is None else whole._sized(tokens)

    def _sized(self, tokens: int) -> Gathered:
        longer = tokens >= self.values.shape[1]
        whole = self._replace(mask=self.real) if longer else self
        front = {"values": 0, "order": 0}  # places before the first token; the rest has those of BOS
        sized = whole._each(lambda name, x: _to_length(x, tokens + front.get(name, self.bos)))
        if longer and self.order is not None:  # padding keeps the places behind, or an order could not be inverted
            sized["order"][:, self.order.shape[1] :] = torch.arange(self.order.shape[1], tokens)
        return self._replace(**sized)

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """What `change` makes of each of the tensors; predictions that are the embeddings stay the same tensor."""
        found = {name: change(name, x) for name, x in self._tensors().items() if name != "predictions"}
        same = self.predictions is self.embeddings
        found["predictions"] = found["embeddings"] if same else change("predictions", self.predictions)
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """Those that are there."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}


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
    with evaluating(model):
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
    with evaluating(model):
        for batch in batches:
            tokens = modality.read(batch)
            embeddings, mask = model.embedded(tokens)
            if isinstance(model, Pretrainer):
                embeddings = model.targets(embeddings, tokens)
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
    tokens, samples, start = max(part.values.shape[1] for part in parts), sum(len(part.values) for part in parts), 0
    whole: dict[str, Any] = {}
    once = all(part.predictions is part.embeddings for part in parts)
    for part in parts:  # one at a time, so that only the whole is held twice
        part = part._replace(mask=part.real)
        part = part if part.values.shape[1] == tokens else part.rows(slice(None), tokens=tokens)
        for name, x in part._tensors().items():
            if not (once and name == "predictions"):
                whole.setdefault(name, x.new_empty(samples, *x.shape[1:]))[start : start + len(x)] = x
        start += len(part.values)
    if once:
        whole["predictions"] = whole["embeddings"]
    return parts[0]._replace(**whole | {"mask": None if whole["mask"].all() else whole["mask"]}, drawn=None)


def _to_length(x: Tensor, places: int) -> Tensor:
    """[S, N, ...] cut to so many places, or padded with zeros (False)."""
    missing = places - x.shape[1]
    return x[:, :places] if missing < 0 else F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
