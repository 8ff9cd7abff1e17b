"""Means and deviations of columns, whatever their offset and unit."""

from __future__ import annotations

import numpy as np
import pytest

from modalities.data.moments import ROUNDING, ColumnMoments


def added(rows: np.ndarray, blocks: int) -> ColumnMoments:
    moments = ColumnMoments(rows.shape[1])
    for block in np.array_split(rows, blocks):
        moments.add(block)
    return moments


@pytest.mark.parametrize("blocks", [1, 7, 400])
def test_offsets_units_gaps_and_blocks_change_nothing(blocks: int) -> None:
    wave = np.sin(np.arange(400.0))
    wave[5] = np.nan
    moments = added(np.stack([wave, 1e9 + 10 * wave, 1e-12 * wave, -1e8 + wave], 1), blocks)
    real = wave[~np.isnan(wave)]
    assert moments.count.tolist() == [399] * 4
    np.testing.assert_allclose(moments.deviation(ROUNDING) / real.std(), [1, 10, 1e-12, 1], rtol=1e-6)
    np.testing.assert_allclose(moments.mean[1] - 1e9, 10 * real.mean(), atol=1e-5)


def test_a_constant_is_known_by_its_own_rounding() -> None:
    """0.1 + 0.2 is not 0.3, and 1e8 and 1e8 + 1 are two numbers."""
    columns = [[0.3, 0.1 + 0.2], [7e-30, 7e-30], [0.0, 0.0], [1e8, 1e8 + 1], [1e-30, 2e-30]]
    moments = added(np.array(columns).T.repeat(50, 0), 3)
    np.testing.assert_allclose(moments.deviation(ROUNDING), [1, 1, 1, 0.5, 5e-31], rtol=1e-6)


def test_a_block_far_from_the_rest_costs_no_digits() -> None:
    rows = np.concatenate([np.zeros(4), 1e9 + np.arange(10.0)])[:, None]
    assert added(rows, 14).deviation(ROUNDING)[0] == pytest.approx(rows.std(), rel=1e-12)
