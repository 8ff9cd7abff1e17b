"""Symbols of a text: bytes, letters, or the lines of a file; what a text is in numbers, and back.

Shapes: n symbols of a text.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modalities.data.listing import printable
from modalities.data.text_files import check_file, read_lines
from nepa_core.basics import UserError

Integers = np.ndarray[Any, np.dtype[np.int16]]
OTHER = "\ufffd"
"""What is shown in place of what has no symbol, and of bytes that are no character."""
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}
_LARGEST = 2**15 - 2


class Vocabulary(NamedTuple):
    """Symbols in the order of their numbers; empty for the 256 bytes of UTF-8. One more number is for all else."""

    symbols: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return len(self.symbols) + 1 if self.symbols else 256

    def encode(self, text: str) -> tuple[Integers, Counter[str]]:
        """Numbers [n] of a text, of a vocabulary the longest symbol first; and characters that none of them covers."""
        if not self.symbols:
            return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int16), Counter()
        numbers, found = _numbers(self.symbols), _pattern(self.symbols).findall(text)
        other: Counter[str] = Counter(each for each in found if each not in numbers)
        return np.array([numbers.get(each, len(self.symbols)) for each in found], np.int16), other

    def shown(self, numbers: list[int]) -> list[str]:
        """What each number shows.

        A character of several bytes stands at the first, and nothing at the others; bytes that are no whole character,
        such as a half at a window's end, are `OTHER`.
        """
        if self.symbols:
            return [self.symbols[each] if each < len(self.symbols) else OTHER for each in numbers]
        content, found, place = bytes(numbers), list[str](), 0
        while place < len(content):
            size = _length(content, place)
            found += [content[place : place + size].decode(), *[""] * (size - 1)] if size else [OTHER]
            place += max(size, 1)
        return found


def _length(content: bytes, place: int) -> int:
    """Bytes of the character that begins here; 0 where none does."""
    for size in range(1, min(4, len(content) - place) + 1):
        try:
            codecs.decode(content[place : place + size], "utf-8")
        except UnicodeDecodeError:
            continue
        return size
    return 0


@lru_cache(maxsize=8)
def _numbers(symbols: tuple[str, ...]) -> dict[str, int]:
    return {symbol: number for number, symbol in enumerate(symbols)}


@lru_cache(maxsize=8)
def _pattern(symbols: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(symbols, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)


@lru_cache(maxsize=8)
def open_vocabulary(letters: str | None, file: str | None) -> Vocabulary:
    """The characters of a string, or the lines of a file (with \\n, \\t and \\\\ for line break, tab and backslash).

    Raises:
        UserError: the file can't be read, or a symbol stands twice.
    """
    if file is None:
        symbols, where = tuple(letters or ""), "data.letters"
    else:
        check_file(file, "data.vocabulary names a file with one symbol a line")
        symbols = tuple(_ESCAPES.get(line, line) for line in read_lines(Path(file)) if line)
        where = file
    twice = [symbol for symbol, count in Counter(symbols).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the symbol {printable(twice[0])!r} stands twice; keep one of them")
    if len(symbols) > _LARGEST:
        raise UserError(f"{where}: {len(symbols):,} symbols, more than {_LARGEST:,}; give fewer")
    return Vocabulary(symbols)
