"""How good what is generated is: scores of every held-out sample, and whether it can be told from the data.

All distances are of raw tokens, each number standardised by its mean and deviation over training samples.

Shapes: K draws, B samples of a batch, S of all, N tokens, P numbers in a raw token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nepa_core.tokens import Tokens
from nepa_core.verdict.intervals import Interval, over_samples
from recipes.generation.reading import Samples, scored
from recipes.generation.rivals import Known, Rival
from recipes.report.summaries import GenerateRow, GenerateVerdict, LawFigures
from recipes.statistics.scores import energy_score
from recipes.statistics.worth import Beside, words

_BYTES = 2**26  # of the draws that are held at once
OWN, BEST = "NEPA", "the best possible"

Standardise = Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """Of one rival, lower is better; a number for each sample.

    Attributes:
        following: energy score of the next token, mean over the tokens of a sample. error: squared error of its mean, by
            number. completion: energy score of all that is made of a sample, as one vector.
        tokens: [B, N] each, energy score of every token in canonical order; NaN where nothing predicts it.
    """

    following: Tensor
    error: Tensor
    completion: Tensor
    tokens: list[Tensor]


def score(rival: Rival, samples: Samples, draws: int, standardise: Standardise, *, bos: bool) -> Scores:
    """Scores of all samples, batch by batch."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    tokens_of: list[Tensor] = []
    for tokens, given in _pieces(samples, draws):
        truth, counted = standardise(tokens.values), scored(tokens, bos=bos)
        flat = truth.flatten(0, 1)
        each = energy_score(standardise(rival.following(tokens, draws)).flatten(1, 2), flat).view(counted.shape)
        wrong = (standardise(rival.mean(tokens)) - truth).square().mean(-1)
        made = standardise(rival.complete(tokens, given, draws))
        found.append((_mean(each, counted), _mean(wrong, counted), of_made(made, truth, given)))
        tokens_of.append(tokens.canonical(each.masked_fill(~counted, torch.nan)))
    return Scores(*map(torch.cat, zip(*found, strict=True)), tokens_of)


def of_made(made: Tensor, truth: Tensor, given: Tensor) -> Tensor:
    """The energy score of completions [K, B, N, P] against [B, N, P], over what is not given: [B] float64."""
    new = (~given)[..., None]
    whole = energy_score((made * new).flatten(2), (truth * new).flatten(1))
    size = truth.shape[-1] * (~given).sum(1)
    return whole * (truth[0].numel() / size).sqrt()


def _pieces(samples: Samples, draws: int) -> list[tuple[Tokens, Tensor]]:
    """The parts, cut so that draws of each fit into memory."""
    found = []
    for part, given in zip(samples.parts, samples.given, strict=True):
        step = max(1, _BYTES // (max(4 * draws, 8 * part.values.shape[2]) * part.values[0].numel()))  # and covariances
        for rows in torch.arange(len(given)).split(step):
            found.append((part.rows(rows), given[rows]))
    return found


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Over the tokens that count, [B, N] -> [B] float64."""
    return values.double().masked_fill(~counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)


def table(scores: Mapping[str, Scores], part: str, samples: Samples) -> list[GenerateRow]:
    """A row for every rival: its figure, and by how much it is above that of the network, paired over samples."""
    own, rows = getattr(scores[OWN], part), list[GenerateRow]()
    for name, each in scores.items():
        values = getattr(each, part)
        apart = over_samples(values - own, samples.clusters, chained=samples.chained)
        half = None if name == OWN else apart.half
        rows.append({"name": name, "figure": float(values.mean()), "margin": apart.mean, "ci95": half})
    return rows


def verdict(rows: list[GenerateRow]) -> GenerateVerdict:
    """What beats the network, in the words of the probe's verdict; the best possible is no rival."""
    rivals = [row for row in rows if row["name"] not in (OWN, BEST)]
    beside = [
        Beside(name=row["name"], of="", figure=-row["figure"], margin=row["margin"], ci95=row["ci95"])
        for row in rivals
    ]
    headline, sentence = words(beside)
    return {"headline": headline, "verdict": sentence}


def law_recovered(rival: Rival, known: Known, samples: Samples, draws: int) -> LawFigures:
    """How far samples keep to the law that is known, over all tokens of all samples, with 95 % intervals.

    mean: of the samples minus that of the law, by number, in standard deviations of the law. variance: of the samples
    over that of the law. Both are of numbers that vary; 0 and 1 are right.
    """
    shifts, ratios = list[Tensor](), list[Tensor]()
    for tokens, _ in _pieces(samples, draws):
        law, drawn = known.law(tokens), rival.following(tokens, draws).double()
        variance = law.covariance.diagonal(dim1=-2, dim2=-1)
        shifts.append(((drawn.mean(0) - law.mean) / variance.sqrt()).flatten(1).mean(1))
        ratios.append((drawn.var(0) / variance).flatten(1).mean(1))
    found = [over_samples(torch.cat(x), samples.clusters, chained=samples.chained) for x in (shifts, ratios)]
    return {"mean": of_interval(found[0]), "variance": of_interval(found[1])}


def of_interval(interval: Interval) -> list[float | None]:
    """A mean and the half-width of its interval, as a file has them."""
    return [interval.mean, interval.half]


def signal_to_noise(error: float) -> float:
    """PSNR in dB of pictures of 256 levels with this mean squared error."""
    return 10 * math.log10(255**2 / max(error, 1e-12))
