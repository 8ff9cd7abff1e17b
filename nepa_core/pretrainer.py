"""What is trained: the objective as a mixture of terms, and the network with the heads that some terms need."""

from __future__ import annotations

import difflib
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from nepa_core.basics import FROZEN, UserError
from nepa_core.flow import FlowConfig, FlowHead, in_deviations, moments
from nepa_core.model import NEPA, PREDICTION_HEAD, HeadKind, HeadOutputs, Prediction
from nepa_core.objective import pair_up
from nepa_core.predictor import PredictorConfig, Trace, init_weights
from nepa_core.terms import SPACES, TERMS, Gather, Space, term
from nepa_core.tokens import Tokens

HEADS = ("heads.", PREDICTION_HEAD)
"""What the names of the tensors start with that are of pre-training alone."""


class ObjectiveConfig(BaseModel):
    """What is trained. The paper's setting is True, True, True, 0 and the default term.

    Attributes:
        causal: attend backwards only while pre-training.
        shift: compare with the next embedding; False compares with the token's own, which is the input.
        stop_gradient: hold the target constant.
        unknown_target: allow an order that is drawn for each sample without `model.predict_position`, to see that the
            best prediction is then close to the mean embedding.
        head: a small network between the predictor's output and the prediction, on that side only, in every term:
            "simsiam" or "mlp" of `model.prediction_head`. Read-outs never see it.
        input_mask: share of the input embeddings replaced by the mask token (needs `model.mask_token`).
        terms: name of a term (`terms.TERMS`), or `module:function` of the user's -> its weight; 0 leaves it out.
        temperature: of both InfoNCE terms.
        redundancy: weight of the off-diagonal in Barlow Twins (0.005 in its paper).
        projector: hidden and output width of the head behind the projected terms and SIGReg.
        slices: random directions of SIGReg, drawn anew each step.
        horizons: the term of that name predicts 1 to this many places ahead.
        layers: blocks, counted from 1, from whose output the term `intermediate` predicts.
    """

    model_config = FROZEN

    causal: bool
    shift: bool
    stop_gradient: bool
    input_mask: float = Field(ge=0, lt=1)
    unknown_target: bool = False
    head: HeadKind = Field(default="none", exclude_if=lambda head: head == "none")
    terms: dict[str, float] = {"cosine": 1.0}
    temperature: float = Field(default=0.1, gt=1e-6, le=1e6)
    redundancy: float = Field(default=0.005, ge=0, le=1e6)
    projector: tuple[int, int] = (512, 64)
    slices: int = Field(default=64, gt=0, le=2**20)
    horizons: int = Field(default=4, gt=0, le=2**16)
    layers: tuple[int, ...] = ()

    @field_validator("terms")
    @classmethod
    def _known(cls, terms: dict[str, float]) -> dict[str, float]:
        for name, weight in terms.items():
            if name not in TERMS and ":" not in name:
                close = difflib.get_close_matches(name, TERMS, n=2)
                near = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(TERMS)}, module:function"
                raise ValueError(f"there is no term {name}; {near}")
            if not 0 <= weight <= 1e6:
                raise ValueError(f"the weight of {name} must be a number from 0 to a million")
        return {name: weight for name, weight in terms.items() if weight > 0}

    @field_validator("projector")
    @classmethod
    def _positive(cls, widths: tuple[int, int]) -> tuple[int, int]:
        if min(widths) < 1 or max(widths) > 2**20:
            raise ValueError("both widths must be above 0, and no more than a million")
        return widths

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not any(term(name).space for name in self.terms):
            known = ", ".join(name for name, each in TERMS.items() if each.space)
            raise ValueError(f"objective.terms needs one that trains the prediction: {known}")
        for name in self.terms:
            if self.stop_gradient and term(name).shapes_targets:
                raise ValueError(f"objective.terms.{name} shapes the targets: it needs objective.stop_gradient=false")
        for name in ("horizons", "flow"):
            if name in self.heads and not self.shift:
                raise ValueError(f"objective.terms.{name} looks ahead: it needs objective.shift=true")
        if "layers" in self.heads and not self.layers:
            raise ValueError("objective.terms.intermediate needs objective.layers, such as [2]")
        return self

    @property
    def space(self) -> Space:
        """Where prediction and target meet: as they are, where one of the terms compares them so."""
        found = {term(name).space for name in self.terms}
        return next(space for space in SPACES if space in found)

    @property
    def heads(self) -> set[str | None]:
        """What the terms are computed behind; None among them where one compares what the predictor itself gives."""
        return {term(name).head for name in self.terms}

    @property
    def has_heads(self) -> bool:
        """Whether a term needs a head."""
        return self.heads != {None}


def objective_loss(config: ObjectiveConfig, out: Prediction, *, gather: Gather = lambda x: x) -> Tensor:
    """The loss of one batch: the sum of the terms times their weights, a float32 scalar.

    Formulas and sources are in `terms.TERMS`. Every term is a mean over its own pairs; where masks leave micro-batches
    or processes with unequal shares of the pairs, they are weighed by those of neighbouring places.

    Args:
        gather: brings the samples of all processes together, for terms that look across them.

    Raises:
        UserError: a horizon lies beyond the end of every sequence, or a term of the user's fails or gives no loss.
        ValueError: a term needs a head that the network has not; a `Pretrainer` of this config has it.
    """
    embeddings, predictions, mask, heads = out
    heads = heads or HeadOutputs()
    # Head -> predictions, embeddings and the places from a prediction to its target.
    compared: dict[str | None, list[tuple[Tensor, Tensor, int]]] = {
        None: [(predictions, embeddings, 1)],
        "projector": [] if heads.projected is None else [(*heads.projected, 1)],
        "horizons": [(made, embeddings, ahead) for ahead, made in enumerate(heads.horizons, 1)],
        "layers": [(made, embeddings, 1) for made in heads.layers],
        "flow": [(*heads.flow, 1)] if heads.flow else [],
        "raw": [(*heads.raw, 1)] if heads.raw else [],
    }
    if headless := [name for name in config.terms if not compared[term(name).head]]:
        raise ValueError(f"the term {headless[0]} needs a head: let a Pretrainer with this objective predict")
    if "horizons" in config.heads and config.horizons >= embeddings.shape[1]:
        raise UserError(
            f"objective.horizons={config.horizons} reaches beyond sequences of {embeddings.shape[1]} places; lower it"
        )

    def value(name: str) -> Tensor:
        each, losses = term(name), []
        settings = {key: getattr(config, key) for key in each.settings}
        if each.across == "all processes":
            settings["gather"] = gather
        for made, source, ahead in compared[each.head]:
            prediction, target, counted = pair_up(made, source, mask, shift=config.shift, ahead=ahead)
            target = target.detach() if config.stop_gradient else target
            losses.append(each.function(prediction, target, counted, **settings))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    weighted = [weight * value(name) for name, weight in config.terms.items()]
    return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()


OF_TOKENS = {"flow", "raw"}
"""Heads that are made for raw tokens."""


class RawHead(nn.Module):
    """A linear map D -> P from a prediction to the next raw token, each of its numbers standardised.

    Raw tokens may lie far from 0, such as the logarithm of a spectrum: a constant alone would have a cosine near 1 with
    all of them (.95 with those of spoken digits, and .07 once they are standardised).

    Args:
        dim: D. tokens: some training tokens, that give size, mean and standard deviation.

    Attributes:
        mean, std: [P] float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, tokens: Tokens) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, tokens.values.shape[-1])
        for name, found in zip(("mean", "std"), moments(tokens), strict=True):
            self.register_buffer(name, found.float())

    def forward(self, predictions: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, P]."""
        return cast(Tensor, self.linear(predictions))

    def content(self, tokens: Tokens, places: int) -> Tensor:
        """Standardised raw tokens at their places, [B, T, P]; 0 for BOS and for padding, which may be any number."""
        values = torch.where(tokens.real[..., None], tokens.values, self.mean)
        return F.pad(in_deviations(values, self.mean, self.std), (0, 0, places - values.shape[1], 0))


class Heads(nn.Module):
    """The small trainable parts of an objective that read-outs know nothing of.

    The projector is Linear, LayerNorm, ReLU, Linear. LeNEPA's has a BatchNorm; a LayerNorm sees one token at a time, so
    it needs no statistics over masked tokens, micro-batches or processes, and training and evaluation agree. Every
    horizon and every chosen block has a linear map D -> D, raw tokens one D -> P.

    Args:
        dim: D. tokens: some training tokens, for the heads of `OF_TOKENS`: their size, mean and standard
            deviation.

    Raises:
        ValueError: one of these terms without tokens.
    """

    def __init__(self, config: ObjectiveConfig, dim: int, tokens: Tokens | None = None) -> None:
        super().__init__()
        self.blocks_read = config.layers if "layers" in config.heads else ()
        self.projector: nn.Sequential | None = None
        if "projector" in config.heads:
            hidden, width = config.projector
            self.projector = nn.Sequential(
                nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
        ahead = config.horizons if "horizons" in config.heads else 0
        self.horizons = nn.ModuleList(nn.Linear(dim, dim) for _ in range(ahead))
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in self.blocks_read)
        if tokens is None and (asking := config.heads & OF_TOKENS):
            raise ValueError(f"the head {min(map(str, asking))} needs training tokens: give some to the Pretrainer")
        self.raw = RawHead(dim, tokens) if tokens is not None and "raw" in config.heads else None
        self.apply(init_weights)
        self.flow: FlowHead | None = None  # after that, for it has a start of its own
        if tokens is not None and "flow" in config.heads:
            size, axes = tokens.values.shape[-1], tokens.coords.shape[-1]
            self.flow = FlowHead(FlowConfig(), size, dim, axes).measure(tokens)

    def forward(self, out: Prediction, hidden: list[Tensor], tokens: Tokens) -> HeadOutputs:
        """`hidden` as in `Trace`: the input and the output of every block, [B, T, D] each."""
        projector = self.projector
        return HeadOutputs(
            projected=None if projector is None else (projector(out.predictions), projector(out.embeddings)),
            horizons=tuple(head(out.predictions) for head in self.horizons),
            layers=tuple(head(hidden[block]) for head, block in zip(self.layers, self.blocks_read, strict=True)),
            flow=() if self.flow is None else self._flowing(self.flow, out.predictions, tokens),
            raw=()
            if self.raw is None
            else (self.raw(out.predictions), self.raw.content(tokens, out.predictions.shape[1])),
        )

    @staticmethod
    def _flowing(head: FlowHead, predictions: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """`HeadOutputs.flow`; zeros where no token follows, and at the first place."""
        predicted = predictions.shape[1] - 1  # tokens: all but the first where there is no BOS
        first = tokens.values.shape[1] - predicted
        known = torch.where(tokens.real[..., None], tokens.values, head.mean)  # padding may be any large number
        coords = tokens.coords[..., first:, :]
        velocity, wanted = head.pairs(head.standardised(known[:, first:]), predictions[:, :-1], coords)
        return F.pad(velocity, (0, 0, 0, 1)), F.pad(wanted, (0, 0, 1, 0))


class Pretrainer(NEPA):
    """`NEPA` with the heads of its objective, under names that start with "heads."; what it predicts is the same.

    Args:
        tokens: some training tokens, for some terms (see `Heads`).
    """

    def __init__(
        self, config: PredictorConfig, embed: nn.Module, objective: ObjectiveConfig, tokens: Tokens | None = None
    ) -> None:
        super().__init__(config, embed, objective.head)
        self.objective = objective
        self.heads = Heads(objective, config.dim, tokens)

    def forward(self, tokens: Tokens, *, trace: Trace | None = None, **how: Any) -> Prediction:
        """As `NEPA.forward`, with the outputs of the heads."""
        if trace is None and self.heads.blocks_read:
            trace = Trace()
        out = super().forward(tokens, trace=trace, **how)
        return out._replace(heads=self.heads(out, [] if trace is None else trace.hidden, tokens))

    def targets(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        """What is predicted of tokens with these embeddings [B, T, D], in the space of `judged`."""
        if self.objective.space == "raw" and self.heads.raw is not None:
            return self.heads.raw.content(tokens, embeddings.shape[1])
        projector = self.heads.projector if self.objective.space == "projected" else None
        return embeddings if projector is None else cast(Tensor, projector(embeddings))

    def judged(self, out: Prediction) -> tuple[Tensor, Tensor]:
        """Predictions and embeddings in the space where the objective brings them together, [B, T, D or other].

        Both behind the projector, where that is the space of the objective; predicted and true raw tokens, where only
        these are compared; what the head of the first horizon predicts, where no other term compares with embeddings;
        else predictions and embeddings. Predictions are behind the prediction head, where there is one: the predictor's
        output is then trained to be what the head needs, and is near no embedding by itself.
        """
        assert out.heads is not None
        if self.objective.space == "raw" and out.heads.raw:
            return out.heads.raw
        if self.objective.space == "projected" and out.heads.projected is not None:
            return out.heads.projected
        if None not in self.objective.heads:
            return out.heads.horizons[0], out.embeddings
        return out.predictions, out.embeddings
