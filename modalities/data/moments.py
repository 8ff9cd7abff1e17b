"""Mean and standard deviation of columns, block by block, exact for large offsets and for tiny units.

Sums of squares would lose 10 sin(t) on an offset of 1e9; blocks are shifted by their own means and merged (Chan,
Golub and LeVeque 1979).

Shapes: n rows, P columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROUNDING = 1e-12
"""Of a column's mean, for numbers read in float64: a deviation below it is rounding of a constant, not a signal."""
ROUNDING_SINGLE = 1e-6
"""The same for numbers that were computed or stored in float32 or less."""


class ColumnMoments:
    """What has been added so far.

    Attributes:
        count: [P] int64, values that are not missing. mean: [P] float64.
    """

    def __init__(self, columns: int) -> None:
        self.count, self.mean = np.zeros(columns, np.int64), np.zeros(columns)
        self._squares = np.zeros(columns)  # of deviations from the mean

    def add(self, rows: Array) -> None:
        """Count rows [n, P]; NaN is missing."""
        rows = rows.astype(np.float64, copy=False)
        real = ~np.isnan(rows)
        more = real.sum(0)
        mean = np.where(real, rows, 0.0).sum(0) / np.maximum(more, 1)
        apart = np.where(real, rows - mean, 0.0)
        rest = apart.sum(0) / np.maximum(more, 1)  # what rounding left in the mean
        mean, squares = mean + rest, np.square(apart).sum(0) - more * rest**2
        count, delta = np.maximum(self.count + more, 1), mean - self.mean
        self._squares += squares + delta**2 * (self.count * more / count)
        self.mean += delta * (more / count)
        self.count += more

    def deviation(self, rounding: float) -> Array:
        """Standard deviations [P] float64; 1 for a column that is constant but for `rounding` times its mean."""
        std = np.sqrt(np.maximum(self._squares, 0.0) / np.maximum(self.count, 1))
        return np.where(std > rounding * np.abs(self.mean), std, 1.0)
