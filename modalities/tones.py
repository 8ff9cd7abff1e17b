"""Melodies: short sequences of tones, of which the pattern of pitches is the class. Embedded, nothing is downloaded.

A token is one tone: the energy in P bands of pitch, a bump over the band of the tone, with noise. Shapes: B samples,
N tones, P bands.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from modalities.orders import Ordered
from nepa_core.basics import Batch
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens

RATE = 8000
"""Hz, of the sound that `Tones.decode` makes."""


class Tones(Ordered, Modality):
    """Melodies of `kinds` patterns; each tone of a sample is off its pattern by chance.

    Attributes:
        kinds: patterns, the classes; named 0, 1, ...
        tones, bands: N and P.
        detune: standard deviation of a tone from its pattern, in bands.
        noise: standard deviation of the energies.
        samples: (training, held-out).
        patch_order, order_seed: the order in which tones are predicted, see `modalities.orders`.
    """

    token_name: ClassVar[str] = "tone"

    kinds: PositiveInt = 10
    tones: int = Field(default=8, ge=2, le=256)
    bands: int = Field(default=12, ge=2, le=256)
    detune: float = Field(default=0.4, ge=0, le=100)
    noise: float = Field(default=0.3, ge=0, le=100)
    samples: tuple[PositiveInt, PositiveInt] = (1500, 500)

    def dataset(self, split: str) -> Dataset[Batch]:
        return Melodies(self, split)

    def tokenize(self, batch: Batch) -> Tokens:
        return Tokens(batch["energies"], torch.arange(self.tones)[:, None] / 4)

    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.kinds)))

    def order(self, tokens: Tokens) -> Tensor | None:
        return self.ordered(tokens, (self.tones,))

    def describe(self, tokens: Tokens) -> Sketch:
        """A piano roll: a column a tone, high pitches on top."""
        energies = tokens.canonical(tokens.values).transpose(1, 2).flip(1)
        return Sketch(((energies + 0.5) / 2).clamp(0, 1), (1, self.tones))

    def decode(self, tokens: Tokens) -> Signal:
        """Sound: a sixth of a second of the loudest pitch of each tone, from 220 Hz in half-tones."""
        pitch = tokens.canonical(tokens.values).argmax(-1)
        time = torch.arange(RATE // 6) / RATE
        hertz = (220 * 2 ** (pitch.float() / 12)).cpu()
        fade = (math.pi * time * 6).sin()
        return Signal("sound", (0.5 * fade * (2 * math.pi * hertz[..., None] * time).sin()).flatten(1), RATE)


class Melodies(Dataset[Batch]):
    """In memory; the same on every machine, the splits from seeds of their own."""

    def __init__(self, form: Tones, split: str) -> None:
        count = form.samples[split != "train"]
        scores = torch.rand(form.tones, form.bands, generator=torch.Generator().manual_seed(0)).argsort(1)
        score = scores.T[torch.arange(form.kinds) % form.bands]  # [kinds, N]: no two share a tone while bands last
        draw = torch.Generator().manual_seed(1 + (split != "train"))
        self.labels = torch.randint(form.kinds, (count,), generator=draw)
        pitch = score[self.labels] + form.detune * torch.randn(count, form.tones, generator=draw)
        bump = (-0.5 * (torch.arange(form.bands) - pitch[..., None]).square()).exp()
        self.energies = bump + form.noise * torch.randn(bump.shape, generator=draw)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"energies": self.energies[index], "label": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> Batch:
        return {"energies": self.energies[indices], "label": self.labels[indices]}
