"""What the page of `nepa generate` shows: single samples, drawn as their adapter draws them, and sounds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nepa_core.basics import UserError
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens
from recipes.generation.generating import Generated
from recipes.generation.judging import at_levels
from recipes.report.generate import ACROSS, Example, Shown
from recipes.report.page import Sound

EXAMPLES, WORST, DRAWN, HEARD = 6, 3, 3 * ACROSS, 3
_SAMPLES = 3  # of each completion


def shown(found: Generated, data: Modality, source: object) -> Shown:
    """Examples at random, the worst ones, samples from nothing, the map of scores, and sounds.

    Args:
        source: the data set of the held-out samples, which may have names for them.
    """
    worst = found.scores.completion.argsort(descending=True)[:WORST].tolist()
    drawn = [data.describe(_row(found.drawn, index)) for index in range(min(DRAWN, len(found.held_out.numbers)))]
    return Shown(
        [_example(found, data, source, index) for index in range(min(EXAMPLES, len(found.held_out.numbers)))],
        [_example(found, data, source, index) for index in worst],
        drawn,
        _energy(found, data),
        _sounds(found, data, source),
    )


def _example(found: Generated, data: Modality, source: object, index: int) -> Example:
    tokens, given = found.held_out.one(index)
    values = found.decoded.complete(tokens, given, _SAMPLES - 1)
    made = [_row(found.completed, index), *(_snapped(found, replace(tokens, values=each), given) for each in values)]
    nearest, _ = found.train.one(int(found.nearest[index]))
    mean = replace(tokens, values=found.decoded.completed_by_mean(tokens, given))
    return Example(
        _name(found, source, index),
        data.describe(tokens),
        tokens.canonical(given)[0],
        data.describe(mean),
        [data.describe(each) for each in made],
        data.describe(nearest),
        found.scores.of(index).float(),
    )


def _snapped(found: Generated, tokens: Tokens, given: Tensor) -> Tokens:
    longest = max(found.held_out.longest, found.train.longest)
    return tokens if found.levels is None else at_levels(tokens, given, found.levels, longest)


def _name(found: Generated, source: object, index: int) -> str:
    number = int(found.held_out.numbers[index])
    name = getattr(source, "name", None)
    return f"{found.summary['split']} {number}" + ("" if name is None else f", {name(number)}")


def _row(parts: Sequence[Tokens], index: int) -> Tokens:
    """One sample of several parts, [1, N, P]."""
    for part in parts:
        if index < len(part.values):
            return part.rows(torch.tensor([index]))
        index -= len(part.values)
    raise IndexError(index)


def _energy(found: Generated, data: Modality) -> tuple[Sketch, Tensor] | None:
    """The mean score of every token over the mean sample, where all samples have the same places."""
    parts, scores = found.held_out.parts, found.scores.tokens
    if any(part.mask is not None or part.values.shape[1] != parts[0].values.shape[1] for part in parts):
        return None
    mean = torch.cat([part.canonical(part.values) for part in parts]).mean(0, keepdim=True)
    first = parts[0].rows(torch.tensor([0]))
    plain = Tokens(mean, first.canonical(first.coords.expand(1, -1, -1)), None)
    return data.describe(plain), torch.cat(scores).nanmean(0).float()


def _sounds(found: Generated, data: Modality, source: object) -> list[Sound]:
    """Players of a few samples, beside what was made of them; none where samples are no sound."""
    made: list[tuple[str, str, Tokens]] = []
    heard = range(min(HEARD, len(found.held_out.numbers)))
    for index in heard:
        name, (tokens, _) = _name(found, source, index), found.held_out.one(index)
        made += [
            (f"truth_{index}.wav", f"{name}, as its tokens sound", tokens),
            (f"completed_{index}.wav", f"{name}, completed", _row(found.completed, index)),
        ]
    made += [(f"sample_{index}.wav", "a sample from nothing", _row(found.drawn, index)) for index in heard]
    sounds = []
    for file, caption, tokens in made:
        try:
            signal = data.decode(tokens)
        except UserError:  # of a front end that can't be inverted
            return []
        if signal.kind != "sound":
            return []
        sounds.append(Sound(file, caption, wav(signal)))
    return sounds


def wav(signal: Signal) -> bytes:
    """The first of some sounds as a WAV file of 16 bits."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, signal.data[0].clamp(-1, 1).numpy(), signal.rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()
