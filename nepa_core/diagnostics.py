"""Was anything learned? Measurements on held-out data that the loss alone can't give.

The loss of this objective reaches -0.9 when little was learned: a predictor that repeats the current token, or
one constant vector, can score as well. So the trained predictor stands here beside baselines that see the same
embeddings, beside the network before training, and beside a linear autoregression; and collapse is judged by
the rank of the embeddings, not by the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from nepa_core.basics import FROZEN, Batch
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction
from nepa_core.objective import masked_mean, negative_cosine, pair_up
from nepa_core.pretrainer import Pretrainer

CANDIDATES = 64
"""Next-token identification is a choice among this many samples."""

COLLAPSE_SHARE = 0.5
"""Collapsed = the effective rank of the embeddings fell below this share of its value before training.

Training warns when it does.
"""

_RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean variance of a feature
_RIDGE_FEATURES = 4096  # most features of the linear autoregression; above, each token is reduced by PCA
_SEEN_FEATURES = 1024  # the same where there is a matrix of its own for every place
_TIE = 1e-6  # cosines closer than this are equal: identical tokens differ by rounding


class Gathered(NamedTuple):
    """Sequences and what a model made of them, float32 on the CPU.

    Attributes:
        values: [S, N, P] raw tokens in the order of prediction.
        embeddings, predictions: [S, T, D], in the space where the objective compares them (`Pretrainer.judged`).
        mask: [S, T] bool or None.
        order: [S, N] int64, the canonical index of every token, where each sample has an order of its own and the
            model is told the position that it predicts: baselines are then told it too. Else None.
        encoded: [S, T, D'], the network's own embeddings where `embeddings` are a projection of them, else None.
    """

    values: Tensor
    embeddings: Tensor
    predictions: Tensor
    mask: Tensor | None
    order: Tensor | None = None
    encoded: Tensor | None = None

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
    """
    parts: list[dict[str, Tensor]] = []
    count, was_training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            tokens = modality.read(batch)
            out = model(tokens, causal=causal)
            if watch is not None:
                watch(out)
            real = torch.ones(out.embeddings.shape[:2], dtype=torch.bool) if out.mask is None else out.mask.cpu()
            predictions, embeddings = model.judged(out) if isinstance(model, Pretrainer) else (out.predictions, None)
            kept = {"values": tokens.values, "embeddings": out.embeddings, "predictions": predictions}
            if embeddings is not None and embeddings is not out.embeddings:
                kept |= {"embeddings": embeddings, "encoded": out.embeddings}
            part = {name: x.float().cpu() for name, x in kept.items()} | {"mask": real}
            if model.config.predict_position != "off" and tokens.order is not None and tokens.order.ndim == 2:
                part["order"] = tokens.order.cpu()
            parts.append(part)
            count += len(real)
            if limit is not None and count >= limit:
                break
    finally:
        model.train(was_training)
    longest = max(part["values"].shape[1] for part in parts)
    for part in parts:
        if "order" in part:  # padding keeps the places behind, or an order could not be inverted
            behind = torch.arange(part["order"].shape[1], longest)
            part["order"] = torch.cat((part["order"], behind.expand(len(part["order"]), -1)), dim=1)
    whole = {name: _stack([part[name] for part in parts])[:limit] for name in parts[0]}
    mask = whole.pop("mask")
    return Gathered(**whole, mask=None if mask.all() else mask)


def _stack(parts: list[Tensor]) -> Tensor:
    """Concatenate [B, N, ...] of unequal N, padded with zeros (False) to the longest."""
    longest = max(part.shape[1] for part in parts)
    padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
    return torch.cat([F.pad(part, pad) for part, pad in zip(parts, padding, strict=True)])


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
    rows = {
        "embedding": embeddings.flatten(0, 1) if mask is None else embeddings[mask[:, gathered.bos :]],
        "prediction": predictions.flatten(0, 1) if counted is None else predictions[counted],
    }
    measures = {"effective_rank": effective_rank, "spread": spread, "shared_direction": shared_direction}
    return {f"{name}_{of}": measure(x) for name, measure in measures.items() for of, x in rows.items()}


# -------------------------------------------------------------------------------------------- baselines


def baseline_predictions(train: Gathered, test: Gathered) -> dict[str, Tensor]:
    """What predictors without a network say, fitted on `train`; each [S, T - 1, D] beside `test.targets`.

    copy: the current token's own embedding. mean: the best constant. position_mean: the best constant of each
    place. linear: ridge regression of the target's direction on all previous raw tokens, see
    `linear_autoregression`. Where samples have orders of their own and the model is told the position that it
    predicts, so are these two: one constant for each position of the target, `linear_from_seen`.
    """
    unit = F.normalize(train.targets, dim=-1)
    mean = unit.flatten(0, 1) if train.counted is None else unit[train.counted]
    shape = test.targets.shape
    return {
        "copy": test.embeddings[:, :-1],
        "mean": mean.mean(0).expand(shape),
        "position_mean": (
            _position_mean(unit, train.counted).expand(shape)
            if test.order is None
            else _position_mean(*train.by_target(unit))[test.order[:, -shape[1] :]]
        ),
        "linear": linear_autoregression(train, test) if test.order is None else linear_from_seen(train, test),
    }


def _position_mean(targets: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over samples at each place, [S, Q, D] -> [Q, D]."""
    if counted is None:
        return targets.mean(0)
    weight = counted[..., None].float()
    return (targets * weight).sum(0) / weight.sum(0).clamp(min=1)


def linear_autoregression(train: Gathered, test: Gathered) -> Tensor:
    """Ridge regression of each target's direction on the raw tokens before it, one regression a place.

    The strength is the one (of six) that serves the last tenth of the training samples best. Where N * P
    exceeds 4,096 features, every token is first reduced to its leading principal components. Places share
    one Cholesky factor, because the previous tokens of place t are a leading block of those of place t + 1.

    Returns:
        [S, T - 1, D] predictions for `test`.
    """
    x_train, x_test = _features(train, test, most=_RIDGE_FEATURES)
    size = x_train.shape[-1]
    first = 1 - train.bos  # the token that the first prediction is about
    unit = F.normalize(train.targets, dim=-1)
    split = max(1, len(x_train) - max(1, len(x_train) // 10))
    fit, held = slice(None, split), slice(split, None)
    counted = train.counted
    means = _position_mean(unit[fit], None if counted is None else counted[fit])
    x_fit = x_train[fit].flatten(1)
    scale = x_fit.square().mean()
    middle = x_fit.mean(0)
    centred = x_fit - middle
    shared = None if counted is not None else centred.T @ centred / len(x_fit)

    def solve(strength: float) -> list[tuple[Tensor, Tensor]]:
        """Weights [width, D] and intercept [D] of every place."""
        factor = None if shared is None else _factor(shared, strength * scale)
        solved = []
        for q in range(unit.shape[1]):
            width = (first + q) * size
            if width == 0:
                solved.append((x_fit.new_zeros(0, unit.shape[-1]), means[q]))
                continue
            x, y, centre = centred[:, :width], unit[fit][:, q], middle[:width]
            if counted is not None:  # the centre of the rows that count, for a mask may go with the content
                rows = counted[fit][:, q]
                x, y = x_fit[rows, :width], y[rows]
                centre = x.sum(0) / max(len(x), 1)
                x = x - centre
            count = max(len(x), 1)
            place = _factor(x.T @ x / count, strength * scale) if factor is None else factor[:width, :width]
            weights = torch.cholesky_solve(x.T @ y / count, place)
            solved.append((weights, means[q] - centre @ weights))
        return solved

    def predict(x: Tensor, solved: list[tuple[Tensor, Tensor]]) -> Tensor:
        flat = x.flatten(1)
        predicted: Tensor = torch.stack([flat[:, : len(w)] @ w + offset for w, offset in solved], dim=1)
        return predicted

    def quality(solved: list[tuple[Tensor, Tensor]]) -> float:
        cosine = -negative_cosine(predict(x_train[held], solved), unit[held])
        return float(masked_mean(cosine, None if counted is None else counted[held]))

    best = max((solve(strength) for strength in _RIDGE_STRENGTHS), key=quality)
    return predict(x_test, best)


def linear_from_seen(train: Gathered, test: Gathered) -> Tensor:
    """`linear_autoregression` for orders of each sample: one regression for every position of the target.

    Its features are the raw tokens in canonical order, those not read before the target as their mean; they are
    reduced to 1,024 in all. Each regression chooses its own strength.

    Returns:
        [S, T - 1, D] predictions for `test`, in the order of prediction.
    """
    assert train.order is not None
    assert test.order is not None
    unit, counts = train.by_target(F.normalize(train.targets, dim=-1))
    laid = [_canonical(part) for part in (train, test)]
    x_train, x_test = _features(laid[0], laid[1], most=_SEEN_FEATURES)
    place_train, place_test = train.order.argsort(1), test.order.argsort(1)
    split = max(1, len(unit) - max(1, len(unit) // 10))
    found = []
    for target in range(unit.shape[1]):
        x, x_new = (
            (x * (place < place[:, target, None])[..., None]).flatten(1)
            for x, place in ((x_train, place_train), (x_test, place_test))
        )
        rows = counts[:, target]
        y, fit, held = unit[:, target], rows.clone(), rows.clone()
        fit[split:], held[:split] = False, False
        middle, mean = (z[fit].sum(0) / fit.sum().clamp(min=1) for z in (x, y))
        centred = x[fit] - middle
        gram, product = (centred.T @ z / max(len(centred), 1) for z in (centred, y[fit]))
        solved = [
            torch.cholesky_solve(product, _factor(gram, strength * x.square().mean())) for strength in _RIDGE_STRENGTHS
        ]
        best = min(solved, key=lambda w: float(negative_cosine((x[held] - middle) @ w + mean, y[held]).sum()))
        found.append((x_new - middle) @ best + mean)
    index = test.order[:, 1 - test.bos :]
    return torch.stack(found, dim=1)[torch.arange(len(index))[:, None], index]


def _canonical(gathered: Gathered) -> Gathered:
    """Values and mask in canonical order; the rest as it is."""
    assert gathered.order is not None
    rows, place = torch.arange(len(gathered.order))[:, None], gathered.order.argsort(1)
    mask, bos = gathered.mask, gathered.bos
    if mask is not None:
        mask = torch.cat((mask[:, :bos], mask[:, bos:][rows, place]), dim=1)
    return gathered._replace(values=gathered.values[rows, place], mask=mask)


def _factor(gram: Tensor, strength: Tensor) -> Tensor:
    """Cholesky factor of gram + strength. A strength that float32 would round away is raised to what it can hold.

    Else it fails where there are many features and few rows, as at the last places of sequences of unequal length.
    """
    least = 2 * torch.finfo(gram.dtype).eps * gram.trace()
    factor: Tensor = torch.linalg.cholesky(gram + torch.maximum(strength, least).clamp(min=1e-8) * torch.eye(len(gram)))
    return factor


def _features(train: Gathered, test: Gathered, *, most: int) -> tuple[Tensor, Tensor]:
    """Raw tokens, centred per place on the training mean, reduced where there are too many; padding is 0."""
    mean = _position_mean(train.values, None if train.mask is None else train.mask[:, train.bos :])
    keep = max(1, most // train.values.shape[1])
    basis = None
    centred = []
    for part in (train, test):
        x = part.values - mean
        if part.mask is not None:
            x = x * part.mask[:, part.bos :, None]
        if x.shape[-1] > keep:
            if basis is None:
                rows = x.flatten(0, 1)
                basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -keep:]
            x = x @ basis
        centred.append(x)
    return centred[0], centred[1]


# ----------------------------------------------------------------------------------------- identification


def identification(predictions: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """How often the true next token is the nearest (cosine) among 64 samples at the same place.

    Args:
        predictions, targets: [S, Q, D].
        counted: [S, Q] bool; other pairs are neither asked nor offered.

    Returns:
        [S'] float32, the share of each sample's places that were identified. S' is S rounded down to whole groups
        of 64 (all of S in one group, where S is less), without samples that have nothing to ask. Equal candidates
        share the credit, so chance is one over the number of candidates whatever repeats.
    """
    size = min(CANDIDATES, len(predictions))
    groups = len(predictions) // size
    credits_ = []
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        asked, offered = (F.normalize(x[rows].transpose(0, 1), dim=-1) for x in (predictions, targets))
        cosine = asked @ offered.transpose(1, 2)  # [Q, asked, offered]
        true = cosine.diagonal(dim1=1, dim2=2)[..., None].clone()
        if counted is not None:
            cosine = cosine.masked_fill(~counted[rows].T[:, None, :], -math.inf)
        beaten = (cosine > true + _TIE).any(-1)
        beaten |= true[..., 0].isnan()
        credit = torch.where(beaten, 0.0, 1.0 / ((cosine - true).abs() <= _TIE).sum(-1).clamp(min=1))
        if counted is None:
            credits_.append(credit.mean(0))
        else:
            real = counted[rows].T
            asks = real.any(0)
            credits_.append(((credit * real).sum(0) / real.sum(0))[asks])
    return torch.cat(credits_)


def learning(gathered: Gathered) -> dict[str, float]:
    """How much is learned, without baselines that need fitting: `copy_gap` and `retrieval_top1`.

    copy_gap: cos(prediction, target) minus cos(current embedding, target), the mean over all places. retrieval_top1:
    `identification` where a token precedes.
    """
    loss = negative_cosine(gathered.predictions[:, :-1], gathered.targets)
    copied = negative_cosine(gathered.embeddings[:, :-1], gathered.targets)
    return {
        "copy_gap": float(masked_mean(copied - loss, gathered.counted)),
        "retrieval_top1": float(_identified(gathered.predictions[:, :-1], gathered).mean()),
    }


# ----------------------------------------------------------------------------------------------- verdict


class Verdict(BaseModel):
    """Everything the card says, measured on held-out data; losses are negative cosines (-1 is perfect).

    Attributes:
        samples: held-out samples measured; fitted_samples: training samples the baselines were fitted on.
        loss: of next-embedding prediction, whatever the run's own objective was.
        baseline_copy, baseline_mean, baseline_position_mean, baseline_linear: the same loss for predictors
            without a network.
        copy_wins: share of the predictions that the current token's own embedding would have beaten.
        retrieval_candidates: 64, or the number of held-out samples where there are fewer.
        retrieval_top1, retrieval_top1_*: share of next tokens identified, by the model, by the baselines and
            by the network before training, where at least one token precedes. Chance is 1 / retrieval_candidates.
        margin_linear, margin_linear_ci95: retrieval_top1 minus that of the linear autoregression, and the
            half-width of its 95 % interval (paired over samples).
        margin_copy, margin_copy_ci95: the same against the copy of the current token.
        margin_untrained, margin_untrained_ci95: the same against the network before training.
        effective_rank_*, spread_*, shared_direction_*: see the functions of those names; `*_start` is the
            network before training on the same samples.
        collapsed: effective_rank_embedding is below half of effective_rank_embedding_start.
        loss_per_position: predictor name -> loss at each place.
    """

    model_config = FROZEN

    samples: int
    fitted_samples: int
    loss: float
    baseline_copy: float
    baseline_mean: float
    baseline_position_mean: float
    baseline_linear: float
    copy_wins: float
    retrieval_candidates: int
    retrieval_top1: float
    retrieval_top1_linear: float
    retrieval_top1_copy: float
    retrieval_top1_mean: float
    retrieval_top1_position_mean: float
    retrieval_top1_untrained: float
    margin_linear: float
    margin_linear_ci95: float
    margin_copy: float
    margin_copy_ci95: float
    margin_untrained: float
    margin_untrained_ci95: float
    effective_rank_embedding: float
    effective_rank_embedding_start: float
    effective_rank_prediction: float
    effective_rank_prediction_start: float
    spread_embedding: float
    spread_prediction: float
    shared_direction_embedding: float
    shared_direction_embedding_start: float
    shared_direction_prediction: float
    collapsed: bool
    loss_per_position: dict[str, list[float]]

    @property
    def chance(self) -> float:
        return 1 / self.retrieval_candidates

    @property
    def beats_untrained(self) -> bool:
        return self.margin_untrained > self.margin_untrained_ci95

    @property
    def beats_linear(self) -> bool:
        return self.margin_linear > self.margin_linear_ci95

    @property
    def beats_copy(self) -> bool:
        return self.margin_copy > self.margin_copy_ci95


def judge(train: Gathered, test: Gathered, untrained: Gathered) -> Verdict:
    """Measure the trained model.

    Args:
        train: training samples without augmentation, gathered with the trained model: the baselines' data.
        test: held-out samples, gathered with the trained model.
        untrained: the same held-out samples, gathered with the network before training.
    """
    counted = test.counted
    predictions = {"model": test.predictions[:, :-1], **baseline_predictions(train, test)}
    losses = {name: negative_cosine(x, test.targets) for name, x in predictions.items()}
    found = {name: _identified(x, test) for name, x in predictions.items()}
    found["untrained"] = _identified(untrained.predictions[:, :-1], untrained)
    mean_loss = {name: float(masked_mean(loss, counted)) for name, loss in losses.items()}
    top1 = {name: float(credit.mean()) for name, credit in found.items()}
    margins = {name: _mean_and_ci95(found["model"] - found[name]) for name in ("linear", "copy", "untrained")}
    now, start = health(test), health(untrained)
    return Verdict(
        samples=len(test.values),
        fitted_samples=len(train.values),
        loss=mean_loss["model"],
        **{f"baseline_{name}": value for name, value in mean_loss.items() if name != "model"},
        copy_wins=float(masked_mean((losses["copy"] < losses["model"]).float(), counted)),
        retrieval_candidates=min(CANDIDATES, len(test.values)),
        retrieval_top1=top1["model"],
        **{f"retrieval_top1_{name}": value for name, value in top1.items() if name != "model"},
        **{f"margin_{name}": mean for name, (mean, _) in margins.items()},
        **{f"margin_{name}_ci95": half for name, (_, half) in margins.items()},
        **now,
        **{
            f"{name}_start": start[name]
            for name in (
                "effective_rank_embedding",
                "effective_rank_prediction",
                "shared_direction_embedding",
            )
        },
        collapsed=now["effective_rank_embedding"] < COLLAPSE_SHARE * start["effective_rank_embedding"],
        loss_per_position={
            name: _position_mean(loss[..., None], counted)[:, 0].tolist() for name, loss in losses.items()
        },
    )


def _identified(predictions: Tensor, gathered: Gathered) -> Tensor:
    """`identification` where a token precedes: from BOS alone every sample's prediction is the same."""
    first, counted = gathered.bos, gathered.counted
    if gathered.order is not None:  # candidates lie at one position, or the position alone would tell them apart
        laid, counts = gathered.by_target(predictions[:, first:])
        return identification(laid, gathered.by_target(gathered.targets[:, first:])[0], counts)
    return identification(
        predictions[:, first:], gathered.targets[:, first:], None if counted is None else counted[:, first:]
    )


def _mean_and_ci95(differences: Tensor) -> tuple[float, float]:
    """Mean over samples and the half-width of its 95 % normal interval."""
    half = 1.96 * differences.std() / math.sqrt(len(differences)) if len(differences) > 1 else torch.tensor(0.0)
    return float(differences.mean()), float(half)
