"""An array of rows that come in blocks, for tables that may nearly fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ROWS = 1 << 16  # looked at together, so that what is worked out of a column never weighs what the column does


class Growing:
    """Rows [T, ...] of one width, in one array that grows in place: its pages are mapped anew, not copied."""

    def __init__(self, *width: int) -> None:
        self._array: Array = np.empty((0, *width))
        self.rows = 0

    def make_room(self, rows: int, dtype: np.dtype[Any] | type = np.float64) -> Array:
        """The next rows, [rows, ...], to write into. The first call chooses the dtype."""
        if not self.rows:
            self._array = self._array.astype(dtype)
        if self.rows + rows > len(self._array):
            self._array.resize(((self.rows + rows) * 17 // 16, *self._array.shape[1:]), refcheck=False)
        self.rows += rows
        return self._array[self.rows - rows : self.rows]

    def add(self, block: Array) -> None:
        """Rows [t, ...] behind those that are there."""
        self.make_room(len(block), block.dtype)[:] = block

    def whole(self) -> Array:
        """All rows [T, ...], in the one array."""
        self._array.resize((self.rows, *self._array.shape[1:]), refcheck=False)
        return self._array


def blocks(values: Array) -> Iterator[Array]:
    """The rows [T, ...], some at a time."""
    return (values[start : start + _ROWS] for start in range(0, len(values), _ROWS))


def steps(values: Array) -> Iterator[Array]:
    """Each row less the one above it, some at a time: T - 1 in all."""
    return (np.diff(values[start : start + _ROWS + 1]) for start in range(0, len(values) - 1, _ROWS))


def is_whole(values: Array) -> bool:
    """Whether all are whole numbers."""
    with np.errstate(invalid="ignore"):
        return values.dtype.kind in "iu" or all(bool((block == np.floor(block)).all()) for block in blocks(values))


def rises(values: Array) -> bool:
    """Whether every row is greater than the one above it."""
    return all(bool((each > 0).all()) for each in steps(values))


def usual_step(values: Array) -> float:
    """The median of the positive differences of neighbouring rows (the lower of two); 0 where there is none."""
    rising = [each[each > 0] for each in steps(values[: _ROWS + 1])]
    guess = _middle(rising)  # of the first rows: mostly it is that of all, which two counts tell
    below = upto = count = 0
    for each in steps(values):
        positive = each > 0
        count += int(positive.sum())
        below += int((positive & (each < guess)).sum())
        upto += int((positive & (each <= guess)).sum())
    if below <= (count - 1) // 2 < upto:
        return guess
    return _middle([each[each > 0] for each in steps(values)])


def _middle(parts: list[Array]) -> float:
    values = np.concatenate(parts) if parts else np.empty(0)
    if not len(values):
        return 0
    place = (len(values) - 1) // 2
    values.partition(place)
    middle: float = values[place].item()
    return middle
