"""Text and other sequences of symbols: bytes, letters, or the lines of a vocabulary.

Shapes: B windows, L symbols in a window, k symbols in a token, N = L / k tokens, V kinds of symbols, P = k * V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from modalities.data.documents import FASTA, HELD_OUT, TEXT
from modalities.data.text_windows import Ends, Form, SourceName, TextWindows, classes_of, open_text_files, open_windows
from modalities.data.vocabulary import OTHER, Vocabulary, open_vocabulary
from modalities.orders import Ordered, padding_behind
from nepa_core.basics import Batch
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens

UNIT = 4
"""Tokens to one unit of a coordinate."""
_CELL = (8, 13)  # width and height of a letter in the picture, in pixels
_LETTERS = 6  # most that are drawn of a symbol
_BESIDE = 0.6  # grey of padding
_MULTIPLIER = -7046029254386353131  # odd: symbols of a token become one number


class Text(Ordered, Modality):
    """Documents cut into windows; a token holds `patch` symbols, each one-hot.

    A linear map of one-hot numbers is a table of embeddings, one for each symbol and place in the token. What is less
    than a token at the end of a document is left out.

    Attributes:
        source: "file" (what lies at `root`) or "stdlib": code and docstrings of Python's own library.
        root, held_out: see `modalities.data.documents`.
        text, label: columns of a table; default: those with the usual names.
        letters: a string whose letters are the symbols. vocabulary: a file with one symbol a line. Neither: the bytes
            of UTF-8. What has no symbol is read as one more.
        patch: symbols in a token; it divides the window.
        window: symbols in a sample.
        ends: what becomes of a document's last window where it is not full: "pad" fills it up and masks what is not
            real, "drop" leaves it out, and with it documents shorter than a window.
        patch_order, order_seed: the order in which tokens are predicted, see `modalities.orders`; "raster" is reading.
    """

    suffixes: ClassVar[tuple[str, ...]] = (*TEXT, *FASTA)
    built_in: ClassVar[str] = "stdlib"

    source: SourceName
    patch: PositiveInt
    window: PositiveInt
    root: str | None = None
    held_out: float = Field(default=HELD_OUT, gt=0, lt=1)
    text: str | None = None
    label: str | None = None
    letters: str | None = Field(default=None, min_length=1)
    vocabulary: str | None = None
    ends: Ends = "pad"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source == "file" and self.root is None:
            raise ValueError("data.source=file needs data.root=PATH, a folder of texts, a table or a FASTA file")
        if self.letters is not None and self.vocabulary is not None:
            raise ValueError("data.letters and data.vocabulary are two ways to name symbols: leave one out")
        if self.window % self.patch or self.window < 2 * self.patch:
            near = max(self.window // self.patch, 1) * self.patch
            raise ValueError(
                f"data.window={self.window} is not two or more tokens of data.patch={self.patch}; "
                f"{max(near, 2 * self.patch)} and {near + 2 * self.patch} fit"
            )
        return self

    @property
    def form(self) -> Form:
        """What the windows depend on."""
        return Form(**{name: getattr(self, name) for name in Form._fields})

    @property
    def symbols_known(self) -> Vocabulary:
        """The symbols and their numbers."""
        return open_vocabulary(self.letters, self.vocabulary)

    def dataset(self, split: str) -> TextWindows:
        return open_windows(self.form, split)

    def tokenize(self, batch: Batch) -> Tokens:
        """One-hot symbols [B, N, k * V] of batch["symbols"] [B, L], the first batch["tokens"] [B] of them real."""
        numbers: Tensor = batch["symbols"]
        values = F.one_hot(numbers, self.symbols_known.size).float().unflatten(1, (-1, self.patch)).flatten(2)
        coords = torch.arange(values.shape[1])[:, None] / UNIT
        if "tokens" not in batch:
            return Tokens(values, coords)
        mask = torch.arange(values.shape[1], device=values.device) < batch["tokens"][:, None]
        return Tokens(values * mask[..., None], coords, mask)

    def classes(self) -> tuple[str, ...] | None:
        return classes_of(self.form)

    def token_dim(self) -> int:
        return self.patch * self.symbols_known.size

    def symbols(self, values: Tensor) -> Tensor:
        """See `Modality.symbols`; wrapped around where there are more kinds of tokens than int64 numbers."""
        found = torch.zeros(values.shape[:-1], dtype=torch.int64, device=values.device)
        for each in self._numbers(values).unbind(-1):
            found = found * _MULTIPLIER + each
        return found

    def order(self, tokens: Tokens) -> Tensor | None:
        return padding_behind(self.ordered(tokens, (tokens.values.shape[1],)), tokens.mask)

    def describe(self, tokens: Tokens) -> Sketch:
        """The text itself, black on white in lines of a few tokens each; a line break is a hook, padding is grey."""
        shown = [self.symbols_known.shown(each) for each in self.decode(tokens).data.clamp(min=0).tolist()]
        real, count = tokens.canonical(tokens.real).tolist(), tokens.values.shape[1]
        letters = min(_LETTERS, max((len(each) for each in self.symbols_known.symbols), default=1))
        wide = self.patch * letters * _CELL[0]
        rows = min((n for n in range(1, count + 1) if not count % n), key=lambda n: abs(count // n * wide - 48 * n))
        pages = [
            _page(each, there, self.patch, (rows, count // rows), letters)
            for each, there in zip(shown, real, strict=True)
        ]
        return Sketch(torch.stack(pages).to(tokens.values.device), (rows, count // rows))

    def decode(self, tokens: Tokens) -> Signal:
        """The likeliest symbols; `text_of` says what they read."""
        numbers = self._numbers(tokens.canonical(tokens.values)).masked_fill(
            ~tokens.canonical(tokens.real)[..., None], -1
        )
        return Signal("symbols", numbers.flatten(1))

    def text_of(self, numbers: Tensor) -> str:
        """What symbols [n] read; a byte that is no whole character, as at the end of a window, is U+FFFD."""
        return "".join(self.symbols_known.shown(numbers[numbers >= 0].tolist()))

    def files(self, paths: Sequence[str]) -> TextWindows:
        """The beginnings of text files by name, of FASTA that of the first record.

        Raises:
            UnreadableSample: from the data set, on access to a file that can't be read or has less than two tokens.
        """
        return open_text_files(self.form, paths)

    def _numbers(self, values: Tensor) -> Tensor:
        """The largest of each symbol's numbers, [..., N, k * V] -> [..., N, k]."""
        found: Tensor = values.unflatten(-1, (self.patch, -1)).argmax(-1)
        return found


def _page(shown: Sequence[str], real: Sequence[bool], patch: int, grid: tuple[int, int], letters: int) -> Tensor:
    """Symbols drawn into cells, [H, W] of 0 to 1."""
    rows, columns = grid
    wide, high = letters * _CELL[0], _CELL[1]
    page = Image.new("L", (columns * patch * wide, rows * high), round(255 * _BESIDE))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for place, symbol in enumerate(shown):
        line, column = divmod(place, columns * patch)
        if not real[place // patch]:
            continue
        draw.rectangle((column * wide, line * high, (column + 1) * wide - 1, (line + 1) * high - 1), fill=255)
        if symbol == "\n":
            left, top = column * wide + 1, (line + 1) * high - 5
            draw.line((left, top, left + 5, top, left + 5, top - 4), 128)  # an arrow's hook, as on the key
            continue
        middle = (2 * column + 1) * wide / 2
        draw.text((middle, line * high), symbol[:letters].replace(OTHER, "?"), 0, font, anchor="ma")
    picture: Tensor = torch.from_numpy(np.asarray(page, np.float32) / np.float32(255))
    return picture
