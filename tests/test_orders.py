import itertools

import pytest
import torch
from torch import Tensor

from modalities.orders import grid_order, hilbert, seeded_random

SIZES = list(itertools.product(range(1, 25), repeat=2))


def _row_column(order: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return order // columns, order % columns


def test_hilbert_visits_every_patch_of_any_rectangle_by_unit_steps() -> None:
    for rows, columns in SIZES:
        order = hilbert(rows, columns)
        assert order.dtype == torch.int64
        assert order[0] == 0
        assert torch.equal(order.sort().values, torch.arange(rows * columns)), (rows, columns)
        row, column = _row_column(order, columns)
        steps = row.diff().abs() + column.diff().abs()
        assert (steps == 1).all(), (rows, columns)


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_hilbert_on_powers_of_two_finishes_each_aligned_square_before_leaving_it(side: int) -> None:
    row, column = _row_column(hilbert(side, side), side)
    cell = 1
    while cell < side:
        squares = (row // cell) * side + column // cell
        assert all(len(run.unique()) == 1 for run in squares.split(cell * cell))
        cell *= 2


def test_hilbert_works_its_way_along_an_elongated_rectangle() -> None:
    """A unit-step path could also run down one edge and back along the other, which is not local at all."""
    for short, long in itertools.product(range(2, 9), range(24, 40)):
        for rows, columns in ((short, long), (long, short)):
            row, column = _row_column(hilbert(rows, columns), columns)
            along = column if columns > rows else row
            fallback = (along.cummax(0).values - along).max()
            assert fallback < 2 * short, (rows, columns)


def test_raster_is_the_canonical_order() -> None:
    assert torch.equal(grid_order("raster", 3, 5, seed=0), torch.arange(15))


def test_random_is_drawn_from_its_seed_alone() -> None:
    state = torch.get_rng_state()
    order = seeded_random(6, 7, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order.sort().values, torch.arange(42))
    assert torch.equal(order, seeded_random(6, 7, seed=1))
    assert not torch.equal(order, seeded_random(6, 7, seed=2))


def test_an_order_is_found_by_its_name() -> None:
    assert torch.equal(grid_order("hilbert", 4, 6, seed=3), hilbert(4, 6))
    assert torch.equal(grid_order("random", 4, 6, seed=3), seeded_random(4, 6, 3))
    with pytest.raises(ValueError, match="no patch order 'zigzag'"):
        grid_order("zigzag", 4, 6, seed=0)  # type: ignore[arg-type]


def test_an_order_first_asked_for_in_inference_mode_serves_training_too() -> None:
    with torch.inference_mode():
        order = grid_order("random", 5, 9, seed=77)
    assert grid_order("random", 5, 9, seed=77) is order
    features = torch.zeros(2, 45, 3, requires_grad=True)
    features[:, order].sum().backward()
    assert features.grad is not None
