"""What is trained: the objective as a mixture of terms, and the network with the heads that some terms need."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from nepa_core import objective
from nepa_core.basics import FROZEN, UserError
from nepa_core.model import NEPA, HeadOutputs, Prediction
from nepa_core.objective import Gather, Term, pair_up
from nepa_core.predictor import PredictorConfig, Trace, init_weights
from nepa_core.tokens import Tokens

# Names of terms, by what they compare. A term over several heads is the mean over them.
AS_THEY_ARE = ("cosine", "mse", "mse_normalised", "infonce_sample", "infonce_position", "horizons")
STANDARDISED = ("standardised", "barlow")
"""Terms whose targets are standardised over the batch first."""

PROJECTED = ("projected_cosine", "projected_mse")
"""Terms that compare prediction and target behind the projector."""

SIGREG = ("sigreg_tokens", "sigreg_batch")
"""Terms that shape the projected embeddings, and know no prediction."""

BEHIND_PROJECTOR = (*PROJECTED, *SIGREG)
"""Terms that need the projector."""

PREDICTIVE = (*AS_THEY_ARE, *STANDARDISED, *PROJECTED)
TERMS = (*PREDICTIVE, *SIGREG, "intermediate")
ACROSS_SAMPLES = ("standardised", "infonce_position", "barlow", "sigreg_batch")
"""Terms that compare the samples of one forward pass, and so need two."""

ACROSS_PROCESSES = ("infonce_position",)
"""Those of them that compare the samples of all processes; the others see the process's own."""

HEADS = "heads."
"""What the names of the heads' tensors start with."""


class ObjectiveConfig(BaseModel):
    """What is trained. The paper's setting is True, True, True, 0 and the default term.

    Attributes:
        causal: attend backwards only while pre-training.
        shift: compare with the next embedding; False compares with the token's own, which is the input.
        stop_gradient: hold the target constant.
        unknown_target: allow an order that is drawn for each sample without `model.predict_position`, to see that the
            best prediction is then close to the mean embedding.
        input_mask: share of the input embeddings replaced by the mask token (needs `model.mask_token`).
        terms: name of a term (`TERMS`) -> its weight; 0 leaves it out.
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
            if name not in TERMS:
                close = difflib.get_close_matches(name, TERMS, n=2)
                near = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(TERMS)}"
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
        if not self.has(PREDICTIVE):
            raise ValueError(f"objective.terms needs one that trains the prediction: {', '.join(PREDICTIVE)}")
        for name in SIGREG:
            if self.stop_gradient and name in self.terms:
                raise ValueError(f"objective.terms.{name} shapes the targets: it needs objective.stop_gradient=false")
        if "horizons" in self.terms and not self.shift:
            raise ValueError("objective.terms.horizons looks ahead: it needs objective.shift=true")
        if "intermediate" in self.terms and not self.layers:
            raise ValueError("objective.terms.intermediate needs objective.layers, such as [2]")
        return self

    def has(self, names: tuple[str, ...]) -> bool:
        """Whether one of these terms is in the mixture."""
        return any(name in self.terms for name in names)

    @property
    def space(self) -> Literal["embedding", "standardised", "projected"]:
        """Where prediction and target meet: as they are, where one of the terms compares them so."""
        if self.has(AS_THEY_ARE):
            return "embedding"
        return "standardised" if self.has(STANDARDISED) else "projected"

    @property
    def has_heads(self) -> bool:
        """Whether a term needs a head."""
        return self.has((*BEHIND_PROJECTOR, "horizons", "intermediate"))


def objective_loss(config: ObjectiveConfig, out: Prediction, *, gather: Gather = lambda x: x) -> Tensor:
    """The loss of one batch: the sum of the terms times their weights, a float32 scalar.

    The formula of a term and its source stand at the function of its name in `objective` (both SIGReg terms: `sigreg`).
    Every term is a mean over its own pairs; where masks leave micro-batches or processes with unequal shares of the
    pairs, they are weighed by those of neighbouring places.

    Args:
        gather: brings the samples of all processes together, for `infonce_position`.

    Raises:
        UserError: a horizon lies beyond the end of every sequence.
        ValueError: a term needs a head that the network has not; a `Pretrainer` of this config has it.
    """
    embeddings, predictions, mask, heads = out
    formulas, heads = _formulas(config, gather), heads or HeadOutputs()
    made_by = {"horizons": heads.horizons, "intermediate": heads.layers}
    made_by |= dict.fromkeys(BEHIND_PROJECTOR, heads.projected or ())
    if headless := [name for name in config.terms if name in made_by and not made_by[name]]:
        raise ValueError(f"the term {headless[0]} needs a head: let a Pretrainer with this objective predict")
    if "horizons" in config.terms and config.horizons >= embeddings.shape[1]:
        raise UserError(
            f"objective.horizons={config.horizons} reaches beyond sequences of {embeddings.shape[1]} places; lower it"
        )

    def compared(name: str) -> list[tuple[Tensor, Tensor, int]]:
        """What a term compares: predictions, embeddings and the places between a prediction and its target."""
        if name == "horizons":
            return [(made, embeddings, ahead) for ahead, made in enumerate(heads.horizons, 1)]
        if name == "intermediate":
            return [(made, embeddings, 1) for made in heads.layers]
        if name in BEHIND_PROJECTOR and heads.projected is not None:
            return [(*heads.projected, 1)]
        return [(predictions, embeddings, 1)]

    def value(name: str) -> Tensor:
        losses = []
        for made, source, ahead in compared(name):
            prediction, target, counted = pair_up(made, source, mask, shift=config.shift, ahead=ahead)
            losses.append(formulas[name](prediction, target.detach() if config.stop_gradient else target, counted))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    weighted = [weight * value(name) for name, weight in config.terms.items()]
    return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()


def _formulas(config: ObjectiveConfig, gather: Gather) -> dict[str, Term]:
    sigreg = partial(objective.sigreg, slices=config.slices)
    return {
        "cosine": objective.cosine,
        "mse": objective.mse,
        "mse_normalised": objective.mse_normalised,
        "standardised": objective.standardised,
        "infonce_sample": partial(objective.infonce_sample, temperature=config.temperature),
        "infonce_position": partial(objective.infonce_position, temperature=config.temperature, gather=gather),
        "barlow": partial(objective.barlow, redundancy=config.redundancy),
        "projected_cosine": objective.projected_cosine,
        "projected_mse": objective.projected_mse,
        "sigreg_tokens": partial(sigreg, over="tokens"),
        "sigreg_batch": partial(sigreg, over="batch"),
        "horizons": objective.horizons,
        "intermediate": objective.intermediate,
    }


class Heads(nn.Module):
    """The small trainable parts of an objective that read-outs know nothing of.

    The projector is Linear, LayerNorm, ReLU, Linear. LeNEPA's has a BatchNorm; a LayerNorm sees one token at a time, so
    it needs no statistics over masked tokens, micro-batches or processes, and training and evaluation agree. Every
    horizon and every chosen block has a linear map D -> D.
    """

    def __init__(self, config: ObjectiveConfig, dim: int) -> None:
        super().__init__()
        self.blocks_read = config.layers if "intermediate" in config.terms else ()
        self.projector: nn.Sequential | None = None
        if config.has(BEHIND_PROJECTOR):
            hidden, width = config.projector
            self.projector = nn.Sequential(
                nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
        ahead = config.horizons if "horizons" in config.terms else 0
        self.horizons = nn.ModuleList(nn.Linear(dim, dim) for _ in range(ahead))
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in self.blocks_read)
        self.apply(init_weights)

    def forward(self, out: Prediction, hidden: list[Tensor]) -> HeadOutputs:
        """`hidden` as in `Trace`: the input and the output of every block, [B, T, D] each."""
        projector = self.projector
        return HeadOutputs(
            projected=None if projector is None else (projector(out.predictions), projector(out.embeddings)),
            horizons=tuple(head(out.predictions) for head in self.horizons),
            layers=tuple(head(hidden[block]) for head, block in zip(self.layers, self.blocks_read, strict=True)),
        )


class Pretrainer(NEPA):
    """`NEPA` with the heads of its objective, under names that start with "heads."; what it predicts is the same."""

    def __init__(self, config: PredictorConfig, embed: nn.Module, objective: ObjectiveConfig) -> None:
        super().__init__(config, embed)
        self.objective = objective
        self.heads = Heads(objective, config.dim)

    def forward(self, tokens: Tokens, *, trace: Trace | None = None, **how: Any) -> Prediction:
        """As `NEPA.forward`, with the outputs of the heads."""
        if trace is None and self.heads.blocks_read:
            trace = Trace()
        out = super().forward(tokens, trace=trace, **how)
        return out._replace(heads=self.heads(out, [] if trace is None else trace.hidden))

    def targets(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, T, D] in the space of `judged`."""
        projector = self.heads.projector if self.objective.space == "projected" else None
        return embeddings if projector is None else cast(Tensor, projector(embeddings))

    def judged(self, out: Prediction) -> tuple[Tensor, Tensor]:
        """Predictions and embeddings in the space where the objective brings them together, [B, T, D or less].

        Both behind the projector, where that is the space of the objective; what the head of the first horizon
        predicts, where no other term compares with embeddings; else the predictor's output and the embeddings.
        """
        assert out.heads is not None
        if self.objective.space == "projected" and out.heads.projected is not None:
            return out.heads.projected
        if not self.objective.has(tuple(name for name in (*AS_THEY_ARE, *STANDARDISED) if name != "horizons")):
            return out.heads.horizons[0], out.embeddings
        return out.predictions, out.embeddings
