"""How good what is generated is: scores of every held-out sample, and whether it can be told from the data.

All distances are of raw tokens, each number standardised by its mean and deviation over training samples.

Shapes: K draws, B samples of a batch, S of all, N tokens, P numbers in a raw token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nepa_core.modality import Modality
from nepa_core.tokens import Tokens
from nepa_core.verdict.intervals import Interval, over_samples
from recipes.generation.decoders import predictions
from recipes.generation.reading import Samples, scored, signals
from recipes.generation.rivals import Decoded, Known, Rival
from recipes.report.summaries import GenerateRow, GenerateVerdict, LawFigures, ReadingFigures, ToldApart
from recipes.statistics.generated import Levels, diversity, nearest, two_sample
from recipes.statistics.scores import energy_score
from recipes.statistics.worth import Beside, words

_BYTES = 2**26  # of the draws that are held at once
_TOLD = 512  # most numbers of a signal that classifiers read
OWN, BEST = "NEPA", "the best possible"

Standardise = Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """Of one rival, lower is better; a number for each sample.

    Attributes:
        following: energy score of the next token, mean over the tokens of a sample. error: squared error of its mean,
            by number. completion: energy score of all that is made of a sample, as one vector.
        tokens: [B, N] each, energy score of every token in canonical order; NaN where nothing predicts it.
    """

    following: Tensor
    error: Tensor
    completion: Tensor
    tokens: list[Tensor]

    def of(self, index: int) -> Tensor:
        """The scores of the tokens of one sample, [N]."""
        for part in self.tokens:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


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
    following, error, completion = map(torch.cat, zip(*found, strict=True))
    return Scores(following, error, completion, tokens_of)


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


class Says(Protocol):
    """What says the mean of every token, [B, N, P]."""

    def mean(self, tokens: Tokens) -> Tensor: ...


def readings(data: Modality, rivals: Mapping[str, Says], samples: Samples, *, bos: bool) -> list[ReadingFigures]:
    """What is read of the mean of each next token (`Modality.readings`): share of classes that are right, and mean
    absolute error of numbers, of each rival; intervals are paired over samples as everywhere."""
    kinds = {name: not x.is_floating_point() for name, x in data.readings(samples.parts[0].values).items()}
    found = {
        name: {rival: _read(data, each, samples, name, bos=bos) for rival, each in rivals.items()} for name in kinds
    }
    figures = list[ReadingFigures]()
    for name, scores in found.items():
        own, rows = scores[OWN], list[GenerateRow]()
        asked = own.isfinite()
        clusters = samples.clusters[asked]
        for rival, each in scores.items() if asked.any() else ():
            apart = over_samples((each - own)[asked], clusters, chained=samples.chained)
            half = None if rival == OWN else apart.half
            rows.append({"name": rival, "figure": float(each[asked].mean()), "margin": apart.mean, "ci95": half})
        if rows:
            figures.append({"name": name, "measure": "right" if kinds[name] else "error", "rows": rows})
    return figures


def _read(data: Modality, rival: Says, samples: Samples, name: str, *, bos: bool) -> Tensor:
    """Right or wrong by how much, mean over the tokens of a sample: [S]; NaN where none has this reading."""
    found = list[Tensor]()
    for tokens, _ in _pieces(samples, 1):
        true, said = (data.readings(x)[name] for x in (tokens.values, rival.mean(tokens)))
        counted = scored(tokens, bos=bos)
        if true.is_floating_point():
            counted &= ~true.isnan()
            off = (said.nan_to_num(0.0) - true).abs()
        else:
            off = (said == true).float()
        found.append(off.double().masked_fill(~counted, 0.0).sum(1) / counted.sum(1))
    return torch.cat(found)


def verdict(rows: list[GenerateRow]) -> GenerateVerdict:
    """What beats the network, in the words of the probe's verdict; the best possible is no rival."""
    rivals = [row for row in rows if row["name"] not in (OWN, BEST)]
    beside = [
        Beside(name=row["name"], of="", figure=-row["figure"], margin=row["margin"], ci95=row["ci95"]) for row in rivals
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


def one_draw(
    decoded: Decoded, samples: Samples, found: Levels | None, longest: int, *, all_of: bool, bos: bool
) -> Iterator[Tokens]:
    """One completion of every sample at the data's own levels, or with `all_of` one sample from nothing in its place.

    Lengths, positions and order are those of the sample.
    """
    for part, given in zip(samples.parts, samples.given, strict=True):
        kept = ~part.real | (part.real.cumsum(1) <= int(not bos)) if all_of else given
        made = replace(part, values=decoded.complete(part, kept, 1)[0])
        yield made if found is None else at_levels(made, kept, found, longest)


def at_levels(made: Tokens, given: Tensor, found: Levels, longest: int) -> Tokens:
    """Each number that was made at its nearest level in training samples, position by position."""
    near = found.snap(signals([made], longest)).unflatten(1, (longest, -1))[:, : given.shape[1]]
    near = replace(made, values=near, order=None).reordered(made.order).values
    return replace(made, values=torch.where(given[..., None], made.values, near))


def own_error(decoded: Decoded, samples: Samples, *, bos: bool) -> float:
    """Squared error of tokens from their own embeddings, each number standardised."""
    flow, found = decoded.decoders.flow, list[Tensor]()
    for part in samples.parts:
        _, embeddings = predictions(decoded.model, part, causal=decoded.causal)
        said = flow.standardised(decoded.decoders.own(embeddings))
        wrong = said - flow.standardised(part.values.to(said.device))
        found.append(wrong.square().mean(-1).cpu()[scored(part, bos=bos)])
    return float(torch.cat(found).mean())


def told_apart(real: Tensor, made: Tensor, samples: Samples | None, seed: int) -> ToldApart:
    """The two-sample test of held-out signals [S, F] and others; nothing where there are too few.

    Classifiers read a few hundred numbers of each, a fixed draw.

    Args:
        samples: that both are of, row by row, or None: the others are samples of their own.
    """
    chosen = torch.randperm(real.shape[1], generator=torch.Generator().manual_seed(seed))[:_TOLD].sort().values
    clusters = None if samples is None else (samples.clusters, samples.clusters)
    try:
        found = two_sample(real[:, chosen], made[:, chosen], seed, clusters)
    except ValueError:
        return {}
    return {"trees": of_interval(found.trees), "linear": of_interval(found.linear), "each": found.each}


def copied(made: Tensor, train: Tensor, real: Tensor) -> ToldApart:
    """Copies of training samples, and diversity where the real ones differ."""
    near = nearest(made, train, real)
    found: ToldApart = {
        "copies": of_interval(over_samples(near.copies.double())),
        "copies_held_out": near.held_out,
    }
    with suppress(ValueError):
        found["diversity"] = of_interval(diversity(made, real))
    return found


def signal_to_noise(data: Modality, decoded: Decoded, samples: Samples) -> float | None:
    """PSNR in dB of what mean completions make, in pictures of 256 levels; None where samples are none."""
    if not (data.offers("describe") or data.offers("decode")):
        return None
    wrong = size = 0.0
    for part, given in zip(samples.parts, samples.given, strict=True):
        sketch = data.describe(part.rows(torch.tensor([0])))
        if sketch.curves or (data.offers("decode") and data.decode(part.rows(torch.tensor([0]))).kind != "picture"):
            return None
        said = replace(part, values=decoded.completed_by_mean(part, given))
        true, made = (data.decode(each).data.double() for each in (part, said))
        wrong += float((true - made).square().sum())
        size += float((~given).double().mean()) * true.numel()
    return 10 * math.log10(255**2 / max(wrong / size, 1e-12))
