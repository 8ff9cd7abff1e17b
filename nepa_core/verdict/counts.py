"""n-gram counts: what the next token is by how often each followed the last ones in training, for discrete tokens.

The control beside the linear one where tokens are symbols. Probabilities are interpolated over shorter contexts as
Witten and Bell (1991) do: p(w | c) = (count(c, w) + kinds(c) p(w | shorter c)) / (count(c) + kinds(c)), kinds(c) being
how many different symbols followed c. How long contexts are is chosen on training samples held back.

Shapes: S samples, N tokens, Q places whose token is identified, M tokens in all, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nepa_core.verdict.diagnostics import by_group, credits_of
from nepa_core.verdict.gathered import Gathered

LONGEST = 5
"""Tokens of the longest n-gram."""
_TOKENS = 2**23  # most training tokens that are counted
_NOTHING = -1  # what stands in a context where no token does

Symbols = Callable[[Tensor], Tensor | None]
"""`Modality.symbols`."""
Integers = np.ndarray[Any, np.dtype[np.int64]]


class Counted(NamedTuple):
    """What counts identify among the same candidates as the network.

    Attributes:
        credits: [S], see `diagnostics.identified`. tokens: of the n-grams. fitted: training tokens that were counted.
        most: [S] what knowing the next token would identify: equal candidates share the credit.
        same: how many of the other candidates are that token, on average.
    """

    credits: Tensor
    tokens: int
    fitted: int
    most: Tensor
    same: float


class _Table(NamedTuple):
    """n-grams of one length: sorted keys of contexts with what followed and how often, and of contexts alone."""

    pairs: Integers
    pair_counts: Integers
    contexts: Integers
    context_counts: Integers
    kinds: Integers


class Counts:
    """Collects training tokens, then counts. The first samples that are added are those that are held back."""

    def __init__(self) -> None:
        self._parts: list[tuple[Integers, Integers]] = []
        self.tokens = 0

    def add(self, part: Gathered, symbols: Tensor) -> None:
        """Take the symbols [S, N] of more samples, up to 2^23 tokens."""
        if self.tokens >= _TOKENS:
            return
        keys, words = _grams(part, symbols)
        self._parts.append((keys, words))
        self.tokens += len(words)

    def judged(self, test: Gathered, symbols: Tensor, held: Gathered, held_symbols: Tensor) -> Counted:
        """Choose the length on held-back samples, of which the first that were added are, and identify."""
        rest = self._parts[1:] or self._parts
        lengths = _tables(rest, LONGEST)
        chosen = max(range(1, LONGEST + 1), key=lambda n: _figure(_credits(lengths[:n], held, held_symbols)))
        tables = _tables(self._parts, chosen)
        most = _same(test, symbols)
        return Counted(_credits(tables, test, symbols), chosen, self.tokens, most, _others(test, symbols))


def _figure(credits: Tensor) -> float:
    mean = float(credits.nanmean())
    return -math.inf if math.isnan(mean) else mean


# ------------------------------------------------------------------------------------------------- counting


def _mixed(keys: Integers) -> Integers:
    """Every bit of int64 numbers spread over all others (the finaliser of SplitMix64; products wrap around)."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).view(np.int64)


def _joined(context: Integers, word: Integers) -> Integers:
    """One key of a context and what stands before or behind it."""
    with np.errstate(over="ignore"):
        return _mixed(context * np.int64(3) + _mixed(word + np.int64(7)))


def _contexts(part: Gathered, symbols: Tensor) -> Integers:
    """Keys of what is read before each token, by 0 to LONGEST - 1 tokens of it: [LONGEST, S, N]."""
    words = symbols.numpy()
    if part.mask is not None:
        words = np.where(part.mask[:, part.bos :].numpy(), words, _NOTHING)
    keys = [np.zeros_like(words)]
    for back in range(1, LONGEST):
        before = np.full_like(words, _NOTHING)
        before[:, back:] = words[:, : words.shape[1] - back]
        keys.append(_joined(keys[-1], before))
    return np.stack(keys)


def _grams(part: Gathered, symbols: Tensor) -> tuple[Integers, Integers]:
    """Contexts [LONGEST, M] and tokens [M] of samples, where these are real."""
    real = part.real[:, part.bos :].numpy()
    return _contexts(part, symbols)[:, real], symbols.numpy()[real]


def _tables(parts: list[tuple[Integers, Integers]], most: int) -> list[_Table]:
    """Of n-grams of 1 to `most` tokens."""
    words = np.concatenate([words for _, words in parts])
    found = []
    for length in range(most):
        context = np.concatenate([keys[length] for keys, _ in parts])
        pairs, first, pair_counts = np.unique(_joined(context, words), return_index=True, return_counts=True)
        contexts, context_counts = np.unique(context, return_counts=True)
        kinds = np.bincount(np.searchsorted(contexts, context[first]), minlength=len(contexts))
        found.append(_Table(pairs, pair_counts, contexts, context_counts, kinds))
    return found


def _found(keys: Integers, counts: Integers, wanted: Integers) -> Integers:
    """The counts of some keys; 0 of those that are not there."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, counts[place], 0)


def _probability(tables: list[_Table], context: Integers, words: Integers) -> Tensor:
    """Of each candidate after each context: [LONGEST, Q, S] and [Q, C] -> [Q, S, C]."""
    shape = (*context.shape[1:], words.shape[1])
    said = np.full(shape, 1 / (len(tables[0].pairs) + 1))  # a symbol that never occurred is one of as many and one
    for table, keys in zip(tables, context, strict=False):
        pairs = _found(table.pairs, table.pair_counts, _joined(keys[..., None], words[:, None]))
        total, kinds = (_found(table.contexts, each, keys)[..., None] for each in (table.context_counts, table.kinds))
        said = np.where(total > 0, (pairs + kinds * said) / np.maximum(total + kinds, 1), said)
    return torch.from_numpy(said)


# ------------------------------------------------------------------------------------------- identifying


def _places(part: Gathered, symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts [S, Q, LONGEST], symbols [S, Q] and what counts [S, Q], where candidates are compared.

    That is at one place, or at one position of the target where each sample has an order of its own.
    """
    context = torch.from_numpy(_contexts(part, symbols)).movedim(0, -1)[:, 1:]
    words = symbols[:, 1:]
    if part.order is not None:
        laid, counted = part.by_target(context)
        return laid, part.by_target(words)[0], counted
    counted = torch.ones_like(words, dtype=torch.bool) if part.counted is None else part.counted[:, part.bos :]
    return context, words, counted


def _credits(tables: list[_Table], part: Gathered, symbols: Tensor) -> Tensor:
    """What n-grams identify, [S]."""
    context, words, counted = _places(part, symbols)

    def of_group(rows: Tensor) -> Tensor:
        keys = context[rows].permute(2, 1, 0).numpy()
        said = _probability(tables, keys, words[rows].T.numpy()).log()
        return credits_of(said, counted[rows], tie=1e-9)

    return by_group(of_group, len(words), None if part.drawn is None else part.drawn.group)


def _same(part: Gathered, symbols: Tensor) -> Tensor:
    """What knowing the next token identifies, [S]."""
    _, words, counted = _places(part, symbols)

    def of_group(rows: Tensor) -> Tensor:
        there = words[rows].T
        return credits_of((there[:, :, None] == there[:, None]).double(), counted[rows], tie=0.5)

    return by_group(of_group, len(words), None if part.drawn is None else part.drawn.group)


def _others(part: Gathered, symbols: Tensor) -> float:
    """How many of the other candidates are the true token, on average over what is asked."""
    _, words, counted = _places(part, symbols)

    def of_group(rows: Tensor) -> Tensor:
        there, counts = words[rows].T, counted[rows].T
        same = ((there[:, :, None] == there[:, None]) & counts[:, None]).sum(-1) - 1.0
        return (same * counts).sum(0) / counts.sum(0)

    return float(by_group(of_group, len(words), None if part.drawn is None else part.drawn.group).nanmean())
