"""Does one part of a sample predict another? The first token of B from the tokens of A alone, among other samples'.

Beside it stand the untrained network, the trained one given another sample's A, and a ridge regression from the raw
tokens of A to the embedding of that token, fitted on training pairs.

Shapes: S samples, N tokens, T places, n tokens of A at most, P numbers in a raw token, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from nepa_core.basics import FROZEN, Batch
from nepa_core.modality import Crossing
from nepa_core.model import NEPA, evaluating
from nepa_core.pretrainer import Pretrainer
from nepa_core.tokens import Tokens
from nepa_core.verdict.baselines import fit_baselines
from nepa_core.verdict.diagnostics import identified
from nepa_core.verdict.gathered import Gathered, joined
from nepa_core.verdict.intervals import Interval, over_samples


class Crossed(BaseModel):
    """How often the first token of one part is identified from another part alone, on held-out data.

    Attributes:
        samples: held-out samples asked. clusters: how many groups of them are independent.
        fitted_samples: training samples that the linear map was fitted on.
        retrieval_candidates: 64, or as many held-out samples as there are; chance is one over it.
        retrieval_top1, retrieval_top1_*: share identified by the network, by it before training, by it given another
            sample's part, and by the linear map.
        margin_*, margin_*_ci95: the first of these minus the others, and the half-width of its 95 % interval, paired
            over samples.
    """

    model_config = FROZEN

    samples: int
    clusters: int
    fitted_samples: int
    retrieval_candidates: int
    retrieval_top1: float
    retrieval_top1_untrained: float
    retrieval_top1_shuffled: float
    retrieval_top1_linear: float
    margin_untrained: float
    margin_untrained_ci95: float | None
    margin_shuffled: float
    margin_shuffled_ci95: float | None
    margin_linear: float
    margin_linear_ci95: float | None

    @property
    def untrained(self) -> Interval:
        return Interval(self.margin_untrained, self.margin_untrained_ci95)

    @property
    def shuffled(self) -> Interval:
        return Interval(self.margin_shuffled, self.margin_shuffled_ci95)

    @property
    def linear(self) -> Interval:
        return Interval(self.margin_linear, self.margin_linear_ci95)

    @property
    def predicts(self) -> bool:
        """Whether the one part says more of the other than the network knows without it or before training."""
        return self.untrained.above and self.shuffled.above


@torch.no_grad()
def gather_crossing(
    model: NEPA, crossing: Crossing, batches: Iterable[Batch], *, predicts: bool = True
) -> Iterator[Gathered]:
    """Of every batch two tokens a sample: all of A as one, and the first of B, with what is predicted of it.

    Samples that lack one of the two are masked.

    Args:
        predicts: else the prediction is the target, for fitting.
    """
    with evaluating(model):
        for batch in batches:
            tokens = crossing.data.read(batch)
            if predicts:
                out = model(tokens, causal=True)
                made = model.judged(out) if isinstance(model, Pretrainer) else (out.predictions, out.embeddings)
                predictions, embeddings = made
            else:
                embeddings, _ = model.embedded(tokens)
                embeddings = model.targets(embeddings, tokens) if isinstance(model, Pretrainer) else embeddings
                predictions = embeddings
            yield _two_tokens(tokens, predictions, embeddings, crossing)


def _two_tokens(tokens: Tokens, predictions: Tensor, embeddings: Tensor, crossing: Crossing) -> Gathered:
    assert tokens.part is not None
    part = tokens.part.to(tokens.values.device).expand(tokens.values.shape[:2])
    given, asked = (part == crossing.source) & tokens.real, (part == crossing.target) & tokens.real
    first = asked.int().argmax(1)  # the place of the first token of B, and before it A alone
    place, rows = first + embeddings.shape[1] - part.shape[1], torch.arange(len(part), device=part.device)
    whole = torch.where(given[..., None], tokens.values, 0.0)
    count = int(given.sum(1).max())
    front = given.int().argsort(dim=1, descending=True, stable=True)[:, :count]  # they lie before all others
    flat = whole[rows[:, None], front].flatten(1).float().cpu()
    target, prediction = (x.float().cpu() for x in (embeddings[rows, place], predictions[rows, place - 1]))
    real = (given.any(1) & asked.any(1)).cpu()
    return Gathered(
        values=torch.stack((flat, torch.zeros_like(flat)), dim=1),
        embeddings=torch.stack((torch.zeros_like(target), target), dim=1),
        predictions=torch.stack((prediction, torch.zeros_like(prediction)), dim=1),
        mask=torch.stack((real, real), dim=1),
    )


def whole(parts: Iterable[Gathered]) -> Gathered:
    """The batches of `gather_crossing` as one, A padded to the longest."""
    found = list(parts)
    size = max(part.values.shape[-1] for part in found)
    return joined([_widened(part, size) for part in found])


def _widened(part: Gathered, size: int) -> Gathered:
    missing = size - part.values.shape[-1]
    values = part.values[..., :size] if missing < 0 else F.pad(part.values, (0, missing))
    return part._replace(values=values)


def judge_crossing(
    training: Iterable[Gathered], test: Gathered, untrained: Gathered, *, total: int, device: torch.device
) -> Crossed:
    """Compare.

    Args:
        training: of `gather_crossing` without predictions, of the trained network; test: of held-out samples, with
            `drawn`; untrained: of the network before training, the same samples.
        total: training samples, about.
    """
    size = test.values.shape[-1]
    fitted = fit_baselines((_widened(part, size) for part in training), test, total=total, device=device)
    drawn = torch.randperm(len(test.values), generator=torch.Generator().manual_seed(0))
    other = torch.empty_like(drawn)
    other[drawn] = drawn.roll(1)  # one cycle through all samples: none is given its own
    found = {
        "model": identified(test.predictions[:, :-1], test),
        "untrained": identified(untrained.predictions[:, :-1], untrained),
        "shuffled": identified(test.predictions[other, :-1], test),
        "linear": identified(fitted.predictions["linear"], test),
    }
    asked = ~torch.stack(list(found.values())).isnan().any(0)
    clusters = None if test.drawn is None else test.drawn.cluster[asked]
    chained = test.drawn is not None and test.drawn.chained
    top1 = {name: float(credit[asked].mean()) for name, credit in found.items()}
    margins = {
        name: over_samples((found["model"] - credit)[asked], clusters, chained=chained)
        for name, credit in found.items()
    }
    return Crossed(
        samples=int(asked.sum()),
        clusters=int(asked.sum()) if clusters is None else len(set(clusters.tolist())),
        fitted_samples=fitted.samples,
        retrieval_candidates=len(test.values) if test.drawn is None else int(test.drawn.group.bincount().max()),
        retrieval_top1=top1["model"],
        retrieval_top1_untrained=top1["untrained"],
        retrieval_top1_shuffled=top1["shuffled"],
        retrieval_top1_linear=top1["linear"],
        margin_untrained=margins["untrained"].mean,
        margin_untrained_ci95=margins["untrained"].half,
        margin_shuffled=margins["shuffled"].mean,
        margin_shuffled_ci95=margins["shuffled"].half,
        margin_linear=margins["linear"].mean,
        margin_linear_ci95=margins["linear"].half,
    )
