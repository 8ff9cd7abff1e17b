"""The whole model: embed the tokens, put BOS in front, predict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_core.basics import UserError
from nepa_core.predictor import Predictor, PredictorConfig, Trace, init_weights
from nepa_core.rope import of_next, rotary_table
from nepa_core.tokens import Tokens

HeadKind = Literal["none", "mlp", "simsiam"]
"""What stands between the predictor and its predictions while pre-training, see `prediction_head`."""

PREDICTION_HEAD = "prediction_head."
"""What the names of its tensors start with."""


class HeadOutputs(NamedTuple):
    """What the heads of a `Pretrainer` add to a forward pass.

    Attributes:
        projected: predictions and embeddings behind the projector, [B, T, P'] each, or None.
        horizons: [B, T, D] each; the k-th, from 1, predicts k places ahead.
        layers: [B, T, D] each, predictions of the next embedding from the chosen blocks.
        flow: [B, T, P] each: the velocity at a place, and at the place of each token the one that is wanted of the
            place before it (`flow.FlowHead.pairs`). Drawn in the forward pass.
        raw: [B, T, P] each: the predicted content of the next token, and at the place of each token its own.
    """

    projected: tuple[Tensor, Tensor] | None = None
    horizons: tuple[Tensor, ...] = ()
    layers: tuple[Tensor, ...] = ()
    flow: tuple[Tensor, Tensor] | tuple[()] = ()
    raw: tuple[Tensor, Tensor] | tuple[()] = ()


class Prediction(NamedTuple):
    """What one forward pass gives.

    Attributes:
        embeddings: [B, T, D], the raw embeddings (BOS first, where there is one): the targets. No norm and no
            positional term has touched them.
        predictions: [B, T, D]; place t predicts the embedding at place t + 1: the predictor's output, or what the
            prediction head makes of it, where there is one.
        mask: [B, T] bool, True for a real token, or None.
        heads: what the objective's heads made of it, where there are any.
    """

    embeddings: Tensor
    predictions: Tensor
    mask: Tensor | None
    heads: HeadOutputs | None = None


class NEPA(nn.Module):
    """Embedder, BOS and predictor.

    Args:
        config: the network's shape and switches.
        embed: raw tokens [B, N, P] -> [B, N, D], initialised; `Modality.embedder(config.dim)` gives it.
        head: on the predictions alone (`objective.head`). Read-outs see the predictor's output, so a network that is
            built for them has none.
    """

    def __init__(self, config: PredictorConfig, embed: nn.Module, head: HeadKind = "none") -> None:
        super().__init__()
        self.config = config
        self.embed = embed
        self.bos = _learned_vector(1, config.dim) if config.bos else None
        self.mask_token = _learned_vector(1, config.dim) if config.mask_token else None
        self.positions = _learned_vector(config.learned_positions, config.dim) if config.learned_positions else None
        self.predictor = Predictor(config)
        # Last, so that the other weights are those of the same seed without it.
        self.next_position = _linear(config.dim) if config.predict_position == "add" else None
        self.parts = _learned_vector(config.parts, config.dim) if config.parts else None
        self.prediction_head = prediction_head(head, config.dim)

    def forward(
        self,
        tokens: Tokens,
        *,
        causal: bool,
        hidden: Tensor | None = None,
        coord_scale: float = 1.0,
        trace: Trace | None = None,
    ) -> Prediction:
        """Embed and predict.

        Args:
            tokens: N tokens in the order of prediction.
            causal: attend backwards only.
            hidden: [B, N] bool, True where the input (never the target) is replaced by the mask token.
            coord_scale: factor on all coordinates, see `draw_coord_scale`.
            trace: filled with the hidden states and, with the "eager" back-end, the attention maps.
        """
        embeddings, mask = self.embedded(tokens)
        x = embeddings
        if hidden is not None:
            x = self._hide(x, hidden)
        for vectors in self.positional(tokens, mask, coord_scale):
            x = x + vectors.to(x.dtype)
        output = self.predictor(x, tokens.coords, causal=causal, mask=mask, coord_scale=coord_scale, trace=trace)
        return Prediction(embeddings, self.predicted(output), mask)

    def predicted(self, output: Tensor) -> Tensor:
        """The next embeddings that the predictor's output [..., D] stands for.

        Whatever compares, shows or decodes predictions takes them from here; probes, fine-tuning and features read the
        output itself.
        """
        return output if self.prediction_head is None else self.prediction_head(output).to(output.dtype)

    def embedded(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The raw embeddings [B, T, D], BOS first where there is one, and their mask [B, T] or None."""
        embeddings = self.embedded_values(tokens.values)
        mask = tokens.mask
        if self.bos is not None:
            embeddings = torch.cat((self.bos.expand(embeddings.shape[0], 1, -1), embeddings), dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return embeddings, mask

    def embedded_values(self, values: Tensor) -> Tensor:
        """The raw embeddings of tokens alone: [B, n, P] -> [B, n, D]."""
        embeddings = self.embed(values)
        # The residual stream is float32 also under autocast: a branch scaled by 1e-5 is lost in a bfloat16 sum.
        return cast(Tensor, embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))

    def positional(self, tokens: Tokens, mask: Tensor | None, coord_scale: float = 1.0) -> list[Tensor]:
        """What is added to the embeddings of a whole sequence, [T, D] or [B, T, D] each; nothing where RoPE is all.

        Args:
            mask: of `embedded`.
        """
        added = [] if self.positions is None else [self._learned_positions(tokens)]
        added += [] if self.parts is None else [self._learned_parts(tokens)]
        return added if self.next_position is None else [*added, self._next_positions(tokens, mask, coord_scale)]

    def _hide(self, x: Tensor, hidden: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("hiding inputs needs the mask token: model.mask_token=true")
        if self.bos is not None:
            hidden = F.pad(hidden, (1, 0), value=False)
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def _learned_positions(self, tokens: Tokens) -> Tensor:
        """The learned vector of each token's canonical place, [T, D] or [B, T, D]; zero for BOS."""
        assert self.positions is not None
        count = tokens.values.shape[1]
        if count > len(self.positions):
            raise UserError(
                f"model.learned_positions={len(self.positions)} is less than the {count} tokens of a sample: raise it, "
                "or leave it at 0"
            )
        vectors = self.positions[:count] if tokens.order is None else self.positions[tokens.order]
        return vectors if self.bos is None else F.pad(vectors, (0, 0, 1, 0))

    def _learned_parts(self, tokens: Tokens) -> Tensor:
        """The learned vector of each token's part, [T, D] or [B, T, D]; zero for BOS and for padding of no part."""
        assert self.parts is not None
        if tokens.part is None:
            raise UserError(f"model.parts={len(self.parts)} is for data of several parts: set it to 0")
        part = tokens.part.to(self.parts.device)
        vectors = torch.where((part >= 0)[..., None], self.parts[part.clamp(min=0)], 0.0)
        return vectors if self.bos is None else F.pad(vectors, (0, 0, 1, 0))

    def _next_positions(self, tokens: Tokens, mask: Tensor | None, coord_scale: float) -> Tensor:
        """The vector of the next token's coordinates at every place, [T, D] or [B, T, D]; zero where none follows."""
        assert self.next_position is not None
        table = rotary_table(
            tokens.coords,
            self.config.dim,
            self.config.rope_theta or 100.0,
            device=tokens.values.device,
            scale=coord_scale,
            bos=self.bos is not None,
        )
        vectors = self.next_position(torch.cat(table, dim=-1))
        return of_next(vectors, mask, missing=torch.zeros_like(vectors))


def prediction_head(kind: HeadKind, dim: int) -> nn.Sequential | None:
    """The head g of NAPE (arXiv 2608.19863), D -> D: the prediction is g(h), and h stays for read-outs.

    Args:
        kind: "simsiam" is the paper's default, three linear maps with LayerNorm and GELU between; "mlp" its variant of
            two with GELU between (whether a norm stands there the paper does not say); "none" gives None.
    """
    norms = {"none": (), "mlp": (False,), "simsiam": (True, True)}[kind]
    if not norms:
        return None
    layers: list[nn.Module] = []
    for norm in norms:
        layers += [nn.Linear(dim, dim), *([nn.LayerNorm(dim)] if norm else []), nn.GELU()]
    head = nn.Sequential(*layers, nn.Linear(dim, dim))
    head.apply(init_weights)
    return head


_BELOW_BLOCKS = {"embed", "bos", "mask_token", "positions", "next_position", "parts"}


def layers_above(name: str, depth: int, *, head_counts: bool) -> int:
    """How many layers lie above a parameter of a network of `depth` blocks, for layer-wise decay.

    Whatever sits on top of the blocks (the final norm, a head) has 0. Block i has `depth` - 1 - i blocks above it,
    what comes before the blocks (embedder, BOS) has `depth`, and the head is one more layer where it counts.

    Args:
        name: of a parameter of `NEPA`, also inside another module ("backbone.predictor.blocks.3.norm1.weight").
        head_counts: True is the numbering of BEiT and MAE (last block 1, BOS `depth` + 1), False that of the released
            NEPA scripts (last block 0, BOS `depth`).
    """
    parts = name.split(".")
    for place, part in enumerate(parts):  # the first that says where, for an embedder may have blocks of its own
        if part in _BELOW_BLOCKS:
            return depth + head_counts
        if part == "blocks":
            return depth - 1 - int(parts[place + 1]) + head_counts
    return 0


def at_head_rate(name: str) -> bool:
    """Whether a parameter of a fine-tuned network trains at `optim.head_lr`, where there is one.

    The predictor's final norm does, and all of the head but a norm in it, as in the released scripts: their
    `layernorm` and `classifier` do, `fc_norm` has the rate of the last block.

    Args:
        name: of a parameter of a module that holds a `NEPA` and a "head" ("backbone.predictor.norm.weight").
    """
    parts = name.split(".")
    return "norm" not in parts if parts[0] == "head" else "predictor.norm" in name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in evaluation mode, afterwards in its own again."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def draw_coord_scale(rescale: float) -> float:
    """One factor for all coordinates of a step, log-uniform in [1/rescale, rescale]; 1.0 when off.

    Drawn from torch's global CPU generator.
    """
    if rescale == 1:
        return 1.0
    return math.exp((2 * torch.rand(()).item() - 1) * math.log(rescale))


def _linear(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim, bias=False)
    init_weights(linear)
    return linear


def _learned_vector(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(count, dim), std=0.02))
