"""The terms that an objective is mixed of: their formulas, and the one table of them.

A term is a function (prediction, target, counted) -> scalar: [B, Q, D] twice and [B, Q] bool, the pairs that count
(None for all). In the table p and z are one prediction and one target, and the term is the mean over the pairs that
count, in float32 whatever autocast says. A new term is a function and an entry of `TERMS`, or a function of the user's,
named by its import path. `pretrainer` mixes them, and has the heads that some are computed behind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.basics import UserError, call
from nepa_core.objective import masked_mean, negative_cosine

Gather = Callable[[Tensor], Tensor]
"""[B, ...] of this process -> [B', ...] of all, its own first; gradients flow back to their owners."""

Space = Literal["embedding", "standardised", "projected", "raw"]
"""Where prediction and target meet: as they are, with targets standardised over the batch, behind the projector, among
raw tokens."""

SPACES: tuple[Space, ...] = get_args(Space)


class Term(NamedTuple):
    """An entry of the table.

    Attributes:
        function: (prediction, target, counted, **settings) -> float32 scalar; both as the head makes them.
        formula: the same in writing, of one pair. compares: what the letters of it stand for.
        source: the paper.
        space: where it brings prediction and target together, or None where it does not.
        head: what it is computed behind, named as in `ObjectiveConfig`: "projector"; "horizons" and "layers" are
            several, and the term is the mean over them; "flow" is `flow.FlowHead`; "raw" a linear map to raw tokens.
        across: the samples that it looks across: None for no other than that of the pair, those of a "forward pass"
            of one process, or of "all processes"; it then needs two of them.
        settings: keys of `ObjectiveConfig` that the function is given.
        shapes_targets: it is computed from the targets alone, so their gradient must flow.
    """

    function: Callable[..., Tensor]
    formula: str
    compares: str
    source: str
    space: Space | None = "embedding"
    head: Literal["projector", "horizons", "layers", "flow", "raw"] | None = None
    across: Literal["forward pass", "all processes"] | None = None
    settings: tuple[str, ...] = ()
    shapes_targets: bool = False


# ------------------------------------------------------------------------------------------------- formulas


def _float32(term: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(term)
    def outside_autocast(prediction: Tensor, target: Tensor, *rest: Any, **options: Any) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            return term(prediction.float(), target.float(), *rest, **options)

    return outside_autocast


def cosine(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """The paper's comparison."""
    return masked_mean(negative_cosine(prediction, target), counted)


@_float32
def mse(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """Squared distance per dimension."""
    return masked_mean((prediction - target).square().mean(-1), counted)


@_float32
def mse_normalised(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """Squared distance to the target as MAE normalises the pixels of a patch."""
    return mse(prediction, F.layer_norm(target, target.shape[-1:], eps=1e-6), counted)


@_float32
def soft_cross_entropy(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """Cross-entropy over the dimensions, both sides a softmax of them; p is found up to a constant."""
    return masked_mean(-(target.softmax(-1) * prediction.log_softmax(-1)).sum(-1), counted)


@_float32
def standardised(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """The cosine with the mean embedding of each place taken out of the target."""
    return cosine(prediction, _standardise(target, counted, over=(0,)), counted)


@_float32
def infonce_sample(prediction: Tensor, target: Tensor, counted: Tensor | None, *, temperature: float) -> Tensor:
    """InfoNCE with the cosine over a temperature as its score; negatives are the other tokens of the sample."""
    logits = _unit(prediction) @ _unit(target).mT / temperature  # [B, asked, offered]
    if counted is not None:
        logits = logits.masked_fill(~counted[:, None, :], -1e9)
    return masked_mean(logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2), counted)


@_float32
def infonce_position(
    prediction: Tensor, target: Tensor, counted: Tensor | None, *, temperature: float, gather: Gather
) -> Tensor:
    """The same; negatives are the tokens of all other samples at the same place."""
    samples, places = prediction.shape[:2]
    real = _ones(target) if counted is None else counted.float()
    offered, real = gather(_unit(target))[:, :places], gather(real)[:, :places]
    logits = _unit(prediction).transpose(0, 1) @ offered.permute(1, 2, 0) / temperature  # [Q, asked, offered]
    logits = logits.masked_fill(real.T[:, None, :] == 0, -1e9)
    true = logits[:, :, :samples].diagonal(dim1=1, dim2=2)
    return masked_mean((logits.logsumexp(-1) - true).T, counted)


@_float32
def barlow(prediction: Tensor, target: Tensor, counted: Tensor | None, *, redundancy: float) -> Tensor:
    """Barlow Twins of prediction and target, divided by D."""
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
    """SIGReg of LeJEPA: how far the N tokens of a sample, or the N samples at a place, are from a standard normal.

    Trapezoid with 17 knots along `slices` random unit directions. There is no factor N in front: a weight for the
    statistic with it is to be multiplied by N.
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


# ------------------------------------------------------------------------------------------------- the table

_SCORE = "CPC, eq. 4, with the score of SimCLR, eq. 1"
_HERE = "a trial of this project"
_SIGREG = "2 * mean_a integral_0^3 abs(phi(t) - exp(-t^2/2))^2 exp(-t^2/2) dt"
_PHI = "phi(t), the mean of exp(i t a.g(z)) over {}, and a standard normal, along random unit directions a"

# fmt: off
TERMS = {
    "cosine": Term(cosine, "-cos(p, z)", "p and z", "NEPA, Algorithm 1"),
    "mse": Term(mse, "mean_d (p - z)^2", "p and z", 'I-JEPA, section 3, "Loss"'),
    "mse_normalised": Term(
        mse_normalised, "mean_d (p - (z - mean_d z) / std_d z)^2", "p and z less its mean, over its deviation",
        'MAE, section 3, "Reconstruction target"'),
    "soft_cross_entropy": Term(
        soft_cross_entropy, "-sum_d softmax(z)_d * log softmax(p)_d", "p and z, each as a distribution over dimensions",
        'NAPE (arXiv 2608.19863), ablation of the loss; it gives no formula'),
    "standardised": Term(
        standardised, "-cos(p, (z - m) / s)",
        "p and z; m and s are mean and deviation of a dimension over the samples at a place", _HERE,
        space="standardised", across="forward pass"),
    "infonce_sample": Term(
        infonce_sample, "-log softmax_s(cos(p[t], z[s]) / temperature) at s = t", "p and all z of the sample", _SCORE,
        settings=("temperature",)),
    "infonce_position": Term(
        infonce_position, "-log softmax_c(cos(p[b], z[c]) / temperature) at c = b",
        "p and the z of all samples at its place, which is this project's choice", _SCORE,
        across="all processes", settings=("temperature",)),
    "barlow": Term(
        barlow, "(sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2) / D",
        "p and z by C, their correlation over all pairs (eq. 2)", "Barlow Twins, eq. 1, divided by D",
        space="standardised", across="forward pass", settings=("redundancy",)),
    "projected_cosine": Term(
        cosine, "-cos(g(p), g(z))", "p and z behind the projector g", _HERE, space="projected", head="projector"),
    "projected_mse": Term(
        mse, "mean_d (g(p) - g(z))^2", "p and z behind the projector g", "LeNEPA, which adds SIGReg to it",
        space="projected", head="projector"),
    "raw_token": Term(
        cosine, "-cos(W p, y)", "a linear map W of p, and y, the raw content (standardised) of the next token",
        "NAPE (arXiv 2608.19863), ablation of the target", space="raw", head="raw"),
    "horizons": Term(
        cosine, "mean_k -cos(W_k p[t], z[t + k])", "a linear map W_k of p and the z that lies k = 1 ... K places ahead",
        "CPC, eq. 3, with NEPA's cosine in place of InfoNCE", head="horizons"),
    "sigreg_tokens": Term(
        partial(sigreg, over="tokens"), _SIGREG, _PHI.format("the tokens of a sample"),
        "SIGReg of LeJEPA, as in LeNEPA", space=None, head="projector", settings=("slices",), shapes_targets=True),
    "sigreg_batch": Term(
        partial(sigreg, over="batch"), _SIGREG, _PHI.format("the samples at a place"), "SIGReg of LeJEPA",
        space=None, head="projector", across="forward pass", settings=("slices",), shapes_targets=True),
    "intermediate": Term(
        cosine, "mean_l -cos(V_l h_l[t], z[t + 1])", "a linear map V_l of the output h_l of block l, and z",
        "Deeply-Supervised Nets have losses at inner layers; this one is this project's", space=None, head="layers"),
    "flow": Term(
        mse, "mean_i (v(s y + (1 - s) e, s, p, c) - (y - e))_i^2",
        "the velocity of a small network v; y and c are raw content (standardised) and coordinates of the next token, "
        "s a random time from 0 to 1 and e normal noise",
        "flow matching, eq. 23 of arXiv 2210.02747, with a head per token as in MAR", space=None, head="flow"),
}
# fmt: on
"""Name -> what the term is: the only place that says so."""


def term(name: str) -> Term:
    """The entry of a name, or that of a user's `module:function`: compared as they are, no head, no settings.

    The module is imported when the term is computed. Who takes the name from a file asks first whether its code may
    be run, as `recipes.configs` does.
    """
    return TERMS.get(name) or Term(_own(name), name, "p and z", "your own")


def _own(path: str) -> Callable[..., Tensor]:
    @_float32
    def computed(prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        module, _, name = path.partition(":")
        key, function = f"objective.terms.{path}", getattr(import_module(module), name)
        loss = call(f"{key} called with (predictions, targets, mask)", function, prediction, target, counted)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"{key} gives {found}, and a loss is a tensor of one number without axes: return its mean")
        return loss

    return computed


def table() -> str:
    """All terms as a table in Markdown."""

    def cells(name: str, each: Term) -> tuple[str, ...]:
        keys = ", ".join([*each.settings, *(["stop_gradient=false"] if each.shapes_targets else [])])
        return f"`{name}`", f"`{each.formula}`", each.compares, each.head or "", each.across or "", keys, each.source

    head = ("term", "formula", "compares", "head", "looks across the samples of", "keys", "source")
    rows = [cells(name, each) for name, each in TERMS.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def lines() -> str:
    """All terms, their formulas and what the letters stand for, as the command's help has them."""
    rows = [f"  {name:<16}  {each.formula}\n{'':20}{each.compares}" for name, each in TERMS.items()]
    own = "  module:function   a function of yours: (predictions, targets, mask) -> loss; see docs/objectives.md"
    return "\n".join(["terms of objective.terms, of a prediction p and its target z, the next embedding:", *rows, own])
