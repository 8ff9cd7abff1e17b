"""Pictures of tokens on three axes: slices side by side, each token in its own cell."""

from __future__ import annotations

import pytest
import torch

from nepa_core.tokens import Sketch, mosaic, slices_across


@pytest.mark.parametrize(
    ("slices", "across"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (12, 6), (16, 8), (100, 20)],
)
def test_slices_stand_in_lines_with_few_gaps(slices: int, across: int) -> None:
    assert slices_across(slices) == across


@pytest.mark.parametrize("slices", [1, 4, 7, 8])
def test_every_cell_lies_on_its_part_of_the_picture(slices: int) -> None:
    """Pictures whose grey numbers the token that they show."""
    grid, cell = (slices, 2, 3), 4
    numbers = torch.arange(slices * 6).view(1, slices, 2, 3).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    sketch = Sketch.of_slices(numbers + 1.0, grid)
    rows, columns = sketch.table
    assert sketch.canvas.shape == (1, rows * cell, columns * cell)
    drawn = sketch.canvas[0, ::cell, ::cell].flatten()
    assert torch.equal(drawn[sketch.cells()], torch.arange(slices * 6) + 1.0)
    assert int((drawn == 0).sum()) == rows * columns - slices * 6  # gaps are black
    colours = mosaic(torch.stack([numbers] * 3, -1))
    assert torch.equal(colours[..., 1] + 1.0 * (sketch.canvas > 0), sketch.canvas)


def test_tokens_in_rows_and_columns_stay_where_they_are() -> None:
    sketch = Sketch(torch.zeros(1, 4, 6), (2, 3))
    assert sketch.table == (2, 3)
    assert sketch.cells().tolist() == list(range(6))
