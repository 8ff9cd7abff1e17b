"""The judgement that ends a pre-training run: the trained predictor beside baselines and beside itself untrained.

Baselines see the same embeddings: copying, mean embeddings, and a linear autoregression on the raw tokens, which is
the control that counts. What is compared is whether the true next token is identified among others, with intervals
that know which samples depend on each other; collapse is judged by the rank of the embeddings, not by the loss.
Predictions are those behind the prediction head (`objective.head`), of the untrained network, too: that is what is
trained to be near the embeddings, and what stands before it need not be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pydantic import BaseModel, Field
from torch import Tensor

from nepa_core.basics import FROZEN
from nepa_core.objective import masked_mean, negative_cosine
from nepa_core.verdict.baselines import Fitted
from nepa_core.verdict.counts import Counted
from nepa_core.verdict.diagnostics import health, identified
from nepa_core.verdict.drawing import RIVALS
from nepa_core.verdict.gathered import Gathered
from nepa_core.verdict.intervals import Interval, over_samples

COLLAPSE_SHARE = 0.5
"""Collapsed = the effective rank of the embeddings fell below this share of its value before training.

Training warns when it does.
"""


class LinearPoint(BaseModel):
    """How many of the next tokens the linear autoregression identifies when it is fitted on so many samples."""

    model_config = FROZEN

    samples: int
    retrieval_top1: float


class CountControl(BaseModel):
    """n-gram counts beside the network, where tokens are symbols.

    Attributes:
        tokens: of the n-grams. fitted: training tokens that were counted.
        retrieval_top1: share of next tokens identified by the counts.
        margin, margin_ci95: that of the network minus it, and the half-width of its interval, as those of `Verdict`.
        possible: what knowing the next token would identify, for equal candidates share the credit.
        same: how many of the other candidates are that token, on average.
    """

    model_config = FROZEN

    tokens: int
    fitted: int
    retrieval_top1: float
    margin: float
    margin_ci95: float | None
    possible: float
    same: float

    @property
    def interval(self) -> Interval:
        return Interval(self.margin, self.margin_ci95)


class Verdict(BaseModel):
    """Everything the card says, measured on held-out data; losses are negative cosines (-1 is perfect).

    Attributes:
        samples: held-out samples measured, drawn at random. asked: of them whose next tokens were identified, without
            those of a group that is too small; clusters: how many groups of these are independent.
        rivals_overlap: there was no room for two samples without common values.
        fitted_samples: training samples the baselines were fitted on; training_samples: all there are.
        linear_features: numbers of a sequence that the linear autoregression reads, of linear_of.
        linear_curve: what it identifies when fitted on fewer samples, and at the end.
        linear_moved, linear_moved_ci95: what the last doubling of its samples changed, paired over samples; None where
            there are too few.
        loss: of next-embedding prediction, whatever the run's own objective was.
        baseline_copy, baseline_mean, baseline_position_mean, baseline_linear: the same loss for predictors
            without a network.
        copy_wins: share of the predictions that the current token's own embedding would have beaten.
        retrieval_candidates: 64, or as many held-out samples as there are without overlap.
        retrieval_top1, retrieval_top1_*: share of next tokens identified, by the model, by the baselines and
            by the network before training, where at least one token precedes. Chance is 1 / retrieval_candidates.
        margin_linear, margin_linear_ci95: retrieval_top1 minus that of the linear autoregression, and the
            half-width of its 95 % interval over the samples (paired, by clusters); None for one cluster.
        margin_copy, margin_copy_ci95: the same against the copy of the current token.
        margin_untrained, margin_untrained_ci95: the same against the network before training.
        counts: n-gram counts beside the network; None where tokens are no symbols.
        effective_rank_*, spread_*, shared_direction_*: see the functions of those names; `*_start` is the
            network before training on the same samples.
        collapsed: effective_rank_embedding is below half of effective_rank_embedding_start.
        loss_per_position: predictor name -> loss at each place; None where no sample has a pair that counts, as where
            all of them have padding.
    """

    model_config = FROZEN

    samples: int
    asked: int = 0  # of summaries of before it was counted, as clusters
    clusters: int = 0
    rivals_overlap: bool = False
    fitted_samples: int
    training_samples: int = 0
    linear_features: int = 0
    linear_of: int = 0
    linear_curve: tuple[LinearPoint, ...] = ()
    linear_moved: float | None = None
    linear_moved_ci95: float | None = None
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
    margin_linear_ci95: float | None
    margin_copy: float
    margin_copy_ci95: float | None
    margin_untrained: float
    margin_untrained_ci95: float | None
    counts: CountControl | None = Field(default=None, exclude_if=lambda counts: counts is None)
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
    loss_per_position: dict[str, list[float | None]]

    @property
    def chance(self) -> float:
        return 1 / self.retrieval_candidates

    @property
    def untrained(self) -> Interval:
        return Interval(self.margin_untrained, self.margin_untrained_ci95)

    @property
    def linear(self) -> Interval:
        return Interval(self.margin_linear, self.margin_linear_ci95)

    @property
    def copying(self) -> Interval:
        return Interval(self.margin_copy, self.margin_copy_ci95)

    @property
    def has_intervals(self) -> bool:
        """Whether there are two clusters at least; else nothing can be told from chance."""
        return self.margin_untrained_ci95 is not None

    @property
    def beats_untrained(self) -> bool:
        return self.untrained.above

    @property
    def beats_linear(self) -> bool:
        return self.linear.above

    @property
    def beats_copy(self) -> bool:
        return self.copying.above

    @property
    def beats_counts(self) -> bool:
        """Also where there are none."""
        return self.counts is None or self.counts.interval.above

    @property
    def beats_all(self) -> bool:
        """All of them, the linear control also if it had not been starved."""
        others = self.beats_untrained and self.beats_copy and self.beats_counts
        return others and self.beats_linear and not self.beats_starved_alone

    @property
    def beats_starved_alone(self) -> bool:
        """The margin over the linear control would be gone if its next doubling moved it as much as the last."""
        starved = Interval(self.starved_margin, self.margin_linear_ci95)
        return self.beats_linear and self.linear_is_starved and not starved.above

    @property
    def linear_reads_near(self) -> bool:
        """Less than a number a token: it reads the tokens next to each target, for all would take too much memory."""
        return self.linear_features < len(self.loss_per_position.get("linear", ()))

    @property
    def linear_gains(self) -> bool:
        """Twice the samples would still move the control by more than its interval, as the last doubling did."""
        return self.linear_moved is not None and Interval(self.linear_moved, self.linear_moved_ci95).above

    @property
    def linear_is_starved(self) -> bool:
        """It still gains, and was not given all the training samples that the network had."""
        return self.linear_gains and self.fitted_samples < self.training_samples

    @property
    def starved_margin(self) -> float:
        """The margin over the linear control if the next doubling of its samples moved it as much as the last."""
        return self.margin_linear - (self.linear_moved or 0.0)


class Start(NamedTuple):
    """What is measured of the network before training, on the same held-out samples.

    Attributes:
        credits: [S], see `diagnostics.identified`. health: see `diagnostics.health`.
    """

    credits: Tensor
    health: dict[str, float]


def start_of(untrained: Gathered) -> Start:
    """Measure the network before training."""
    return Start(identified(untrained.predictions[:, :-1], untrained), health(untrained))


class Judged(NamedTuple):
    """A verdict, and what it was computed from.

    Attributes:
        credits: "model" and "linear" -> the share of its places that each sample had identified, [S'].
        clusters: [S'] int64, equal for samples that depend on each other, or None. chained: of `Spans`.
    """

    verdict: Verdict
    credits: dict[str, Tensor]
    clusters: Tensor | None
    chained: bool = False


def judge(
    fitted: Fitted, test: Gathered, before: Start, *, training_samples: int = 0, rivals_overlap: bool = False
) -> Judged:
    """Measure the trained model.

    Args:
        fitted: baselines fitted on training samples without augmentation, and what they say of `test`.
        test: held-out samples, gathered with the trained model.
        before: of the network before training, on the same held-out samples.
        training_samples: size of the training split; default: as many as the baselines were fitted on.
    """
    counted = test.counted
    predictions = {"model": test.predictions[:, :-1], **fitted.predictions}
    losses = {name: negative_cosine(x, test.targets) for name, x in predictions.items()}
    found = {name: identified(x, test) for name, x in predictions.items()}
    asked = ~found["model"].isnan()
    clusters = None if test.drawn is None else test.drawn.cluster[asked]
    curve = {samples: credit[asked] for samples, credit in fitted.curve}
    found = {name: credit[asked] for name, credit in found.items()}
    found["untrained"] = before.credits[asked]
    mean_loss = {name: float(masked_mean(loss, counted)) for name, loss in losses.items()}
    top1 = {name: float(credit.mean()) for name, credit in found.items()}
    chained = test.drawn is not None and test.drawn.chained

    def margin(rival: Tensor, own: str = "model") -> Interval:
        return over_samples(found[own] - rival, clusters, chained=chained)

    linear, copying, untrained = (margin(found[name]) for name in ("linear", "copy", "untrained"))
    moved = margin(list(curve.values())[-1], "linear") if curve else None
    points = [*((samples, float(credit.mean())) for samples, credit in curve.items())]
    now, start = health(test), before.health
    verdict = Verdict(
        samples=len(test.values),
        asked=int(asked.sum()),
        clusters=int(asked.sum()) if clusters is None else len(set(clusters.tolist())),
        rivals_overlap=rivals_overlap,
        fitted_samples=fitted.samples,
        training_samples=training_samples or fitted.samples,
        linear_features=fitted.features,
        linear_of=fitted.of,
        linear_curve=tuple(
            LinearPoint(samples=samples, retrieval_top1=value)
            for samples, value in [*points, (fitted.samples, top1["linear"])]
        ),
        linear_moved=None if moved is None else moved.mean,
        linear_moved_ci95=None if moved is None else moved.half,
        loss=mean_loss["model"],
        baseline_copy=mean_loss["copy"],
        baseline_mean=mean_loss["mean"],
        baseline_position_mean=mean_loss["position_mean"],
        baseline_linear=mean_loss["linear"],
        copy_wins=float(masked_mean((losses["copy"] < losses["model"]).float(), counted)),
        retrieval_candidates=_rivals(test),
        retrieval_top1=top1["model"],
        retrieval_top1_linear=top1["linear"],
        retrieval_top1_copy=top1["copy"],
        retrieval_top1_mean=top1["mean"],
        retrieval_top1_position_mean=top1["position_mean"],
        retrieval_top1_untrained=top1["untrained"],
        margin_linear=linear.mean,
        margin_linear_ci95=linear.half,
        margin_copy=copying.mean,
        margin_copy_ci95=copying.half,
        margin_untrained=untrained.mean,
        margin_untrained_ci95=untrained.half,
        counts=_of_counts(fitted.counts, asked, margin),
        **now,
        effective_rank_embedding_start=start["effective_rank_embedding"],
        effective_rank_prediction_start=start["effective_rank_prediction"],
        shared_direction_embedding_start=start["shared_direction_embedding"],
        collapsed=now["effective_rank_embedding"] < COLLAPSE_SHARE * start["effective_rank_embedding"],
        loss_per_position={name: _by_place(loss, counted) for name, loss in losses.items()},
    )
    return Judged(verdict, {name: found[name] for name in ("model", "linear")}, clusters, chained)


def _of_counts(counts: Counted | None, asked: Tensor, margin: Callable[[Tensor], Interval]) -> CountControl | None:
    """The figures of n-gram counts, if any."""
    if counts is None:
        return None
    credits = counts.credits[asked]
    apart = margin(credits)
    return CountControl(
        tokens=counts.tokens,
        fitted=counts.fitted,
        retrieval_top1=float(credits.mean()),
        margin=apart.mean,
        margin_ci95=apart.half,
        possible=float(counts.most[asked].mean()),
        same=counts.same,
    )


def _rivals(test: Gathered) -> int:
    """Samples that a next token is identified among."""
    if test.drawn is None:
        return min(RIVALS, len(test.values))
    return int(test.drawn.group.bincount().max())


def _by_place(loss: Tensor, counted: Tensor | None) -> list[float | None]:
    """Mean over samples at each place, [S, Q] -> Q numbers; None where nothing counts."""
    if counted is None:
        return [float(x) for x in loss.mean(0)]
    means = (loss * counted).sum(0) / counted.sum(0)
    return [float(mean) if some else None for mean, some in zip(means, counted.any(0).tolist(), strict=True)]
