import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modalities.orders import ORDERS, grid_order, inverse, is_static, known_order, padding_behind, read_order
from modalities.orders.curves import Grid, cells, hilbert
from modalities.orders.measures import mean_measures, order_measures
from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.tokens import Tokens
from recipes.vision import digits_2x2

SIZES = list(itertools.product(range(1, 25), repeat=2))


def _row_column(order: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return order // columns, order % columns


def test_hilbert_visits_every_patch_of_any_rectangle_by_unit_steps() -> None:
    for rows, columns in SIZES:
        order = hilbert((rows, columns))
        assert order.dtype == torch.int64
        assert order[0] == 0
        assert torch.equal(order.sort().values, torch.arange(rows * columns)), (rows, columns)
        row, column = _row_column(order, columns)
        steps = row.diff().abs() + column.diff().abs()
        assert (steps == 1).all(), (rows, columns)


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_hilbert_on_powers_of_two_finishes_each_aligned_square_before_leaving_it(side: int) -> None:
    row, column = _row_column(hilbert((side, side)), side)
    cell = 1
    while cell < side:
        squares = (row // cell) * side + column // cell
        assert all(len(run.unique()) == 1 for run in squares.split(cell * cell))
        cell *= 2


def test_hilbert_works_its_way_along_an_elongated_rectangle() -> None:
    """A unit-step path could also run down one edge and back along the other, which is not local at all."""
    for short, long in itertools.product(range(2, 9), range(24, 40)):
        for rows, columns in ((short, long), (long, short)):
            row, column = _row_column(hilbert((rows, columns)), columns)
            along = column if columns > rows else row
            fallback = (along.cummax(0).values - along).max()
            assert fallback < 2 * short, (rows, columns)


STATIC = [name for name in ORDERS if is_static(name)]
GRIDS = [
    *((n,) for n in (1, 2, 7, 16)),
    *itertools.product((1, 2, 3, 4, 7, 8, 14), repeat=2),
    *itertools.product((1, 2, 3, 5, 8), repeat=3),
]


@pytest.mark.parametrize("name", STATIC)
def test_every_order_is_a_permutation_of_every_grid_with_an_exact_inverse(name: str) -> None:
    for grid in GRIDS:
        if name.startswith("spiral") and len(grid) == 3:
            continue
        order = grid_order(name, grid, seed=5)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(math.prod(grid))), grid
        assert torch.equal(order[inverse(order)], torch.arange(len(order))), grid


@pytest.mark.parametrize("name", ["snake", "spiral_in", "spiral_out"])
def test_snakes_and_spirals_go_by_unit_steps(name: str) -> None:
    for grid in (grid for grid in GRIDS if len(grid) == 2 or name == "snake"):
        steps = cells(grid)[grid_order(name, grid)].diff(dim=0).abs().sum(1)
        assert (steps == 1).all(), grid


@pytest.mark.parametrize("side", [2, 4, 8])
def test_hilbert_goes_through_cubes_by_unit_steps_and_finishes_each_aligned_cube(side: int) -> None:
    path = cells((side,) * 3)[hilbert((side,) * 3)]
    assert (path.diff(dim=0).abs().sum(1) == 1).all()
    halves = (path // (side // 2)).split(side**3 // 8)
    assert all(len(half.unique(dim=0)) == 1 for half in halves)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("column", [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
        ("reverse", [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("rising", [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]),
        ("zigzag", [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]),
        ("snake", [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]),
        ("diagonal", [0, 1, 4, 2, 5, 8, 3, 6, 9, 7, 10, 11]),
        ("morton", [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]),
        ("spiral_in", [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
        ("spiral_out", [6, 5, 4, 8, 9, 10, 11, 7, 3, 2, 1, 0]),
        ("centre_out", [5, 6, 1, 2, 9, 10, 4, 7, 0, 3, 8, 11]),
        ("strided", [0, 2, 8, 10, 1, 3, 4, 5, 6, 7, 9, 11]),
        ("blocks", [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_the_paths_over_three_rows_of_four(name: str, path: list[int]) -> None:
    assert grid_order(name, (3, 4)).tolist() == path


def test_the_last_axis_runs_fastest_on_three_axes() -> None:
    assert grid_order("column", (2, 1, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert grid_order("morton", (2, 2, 2)).tolist() == list(range(8))
    assert grid_order("strided", (8,)).tolist() == [0, 4, 2, 6, 1, 3, 5, 7]
    assert grid_order("spiral_in", (5,)).tolist() == [0, 4, 1, 3, 2]
    with pytest.raises(UserError, match="spiral_in and spiral_out are for grids of 1 or 2 axes"):
        grid_order("spiral_out", (2, 2, 2))


def test_random_is_drawn_from_its_seed_alone() -> None:
    state = torch.get_rng_state()
    order = grid_order("random", (6, 7), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order, grid_order("random", (7, 6), seed=1))
    assert not torch.equal(order, grid_order("random", (6, 7), seed=2))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UserError,
        match=r"^data\.patch_order=hilbrt: neither an order's name nor module:function; did you mean hilbert\?",
    ):
        override(digits_2x2(), {"data.patch_order": "hilbrt"})
    with pytest.raises(ValueError, match="no static patch order 'wobble'"):
        grid_order("wobble", (4, 6))


def test_an_order_first_asked_for_in_inference_mode_serves_training_too() -> None:
    with torch.inference_mode():
        order = grid_order("random", (5, 9), seed=77)
    assert grid_order("random", (5, 9), seed=77) is order
    features = torch.zeros(2, 45, 3, requires_grad=True)
    features[:, order].sum().backward()
    assert features.grad is not None


@pytest.mark.parametrize("name", ["raster", "hilbert", "random", "random_per_sample", "random_annealed"])
@pytest.mark.parametrize("progress", [None, 0.0, 0.5, 1.0])
def test_padding_never_comes_between_real_tokens_on_cells(name: str, progress: float | None) -> None:
    """Else the pairs around it are lost to the loss."""
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.randint(2, 9, (16, 1))
    mask = mask.gather(1, torch.rand(16, 9).argsort(1))
    tokens = Tokens(torch.randn(16, 9, 3), torch.zeros(16, 9, 2), mask)
    order = read_order(name, 0, tokens, (3, 3), progress, cell=torch.randint(0, 3, (16, 9, 2)))
    if order is None:
        assert (name, progress) == ("random_annealed", None)
    else:
        read = tokens.reordered(order).mask
        assert read is not None
        assert (read.int().diff(dim=1) <= 0).all()


def test_tokens_that_lie_on_cells_of_a_grid_are_read_along_its_path() -> None:
    cell = torch.tensor([[[1, 0], [0, 1], [1, 1], [0, 1]], [[0, 0], [1, 1], [1, 0], [0, 1]]])
    tokens = Tokens(torch.randn(2, 4, 3), cell.float())
    found = read_order("snake", 0, tokens, (2, 2), cell=cell)  # 00, 01, 11, 10
    assert found is not None
    assert found.tolist() == [[1, 3, 2, 0], [0, 3, 1, 2]]
    random = read_order("random_per_sample", 0, tokens, (2, 2), cell=cell)
    assert random is not None
    assert torch.equal(random.sort(1).values, torch.arange(4).expand(2, 4))


# ---- orders of each sample


def tokens_of(grid: Grid, samples: int = 3, real: int | None = None) -> Tokens:
    values = torch.randn(samples, math.prod(grid), 2, generator=torch.Generator().manual_seed(1))
    mask = None if real is None else cells(grid)[:, -1].expand(samples, -1) < real
    return Tokens(values, cells(grid).float(), mask)


def drawn(name: str, tokens: Tokens, grid: Grid, progress: float | None, seed: int = 0) -> Tensor:
    order = read_order(name, seed, tokens, grid, progress)
    assert order is not None
    assert torch.equal(order.sort(1).values, torch.arange(math.prod(grid)).expand(order.shape))
    return order


@pytest.mark.parametrize("progress", [None, 0.0, 0.9])
def test_an_order_for_each_sample_differs_between_samples_and_puts_padding_last(progress: float | None) -> None:
    tokens = tokens_of((4, 6), real=4)
    assert tokens.mask is not None
    order = drawn("random_per_sample", tokens, (4, 6), progress)
    assert len(order.unique(dim=0)) == 3
    assert tokens.mask.gather(1, order)[:, :16].all()


def test_in_evaluation_it_hangs_on_the_sample_alone() -> None:
    state = torch.get_rng_state()
    whole, padded = tokens_of((4, 4)), tokens_of((4, 6), real=4)
    padded.values[padded.mask] = whole.values.flatten(0, 1)
    order = drawn("random_per_sample", whole, (4, 4), None)
    assert torch.equal(torch.get_rng_state(), state)
    alone = replace(whole, values=whole.values[1:2])
    assert torch.equal(drawn("random_per_sample", alone, (4, 4), None), order[1:2])
    within = drawn("random_per_sample", padded, (4, 6), None)[:, :16]
    assert torch.equal(within // 6 * 4 + within % 6, order)
    assert not torch.equal(drawn("random_per_sample", whole, (4, 4), None, seed=1), order)
    changed = replace(whole, values=whole.values + torch.eye(16, 2))
    assert not torch.equal(drawn("random_per_sample", changed, (4, 4), None), order)


def test_orders_from_content_are_spread_evenly() -> None:
    """Every token comes first equally often, also where most of the content is the same in all samples."""
    values = torch.zeros(4000, 8, 3)
    values[:, 5, 1] = torch.arange(4000)
    order = drawn("random_per_sample", Tokens(values, torch.zeros(8, 1)), (8,), None)
    for place in range(8):
        assert order[:, place].bincount(minlength=8).min() > 400  # 500 expected, deviation 21


def test_in_training_it_is_drawn_from_the_global_generator() -> None:
    tokens = tokens_of((4, 4))
    torch.manual_seed(4)
    first, second = (drawn("random_per_sample", tokens, (4, 4), 0.5) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(drawn("random_per_sample", tokens, (4, 4), 0.5), first)
    assert not torch.equal(first, second)


def test_annealing_goes_from_random_to_raster() -> None:
    tokens, raster = tokens_of((4, 4), samples=2000), torch.arange(16)
    for progress in (0.0, 0.3, 1.0):
        order = drawn("random_annealed", tokens, (4, 4), progress)
        assert abs(float((order == raster).all(1).float().mean()) - progress) < 0.04
    assert read_order("random_annealed", 0, tokens, (4, 4)) is None


# ---- orders of the user's


def by_saliency(tokens: Tokens, grid: Grid) -> Tensor:
    """The patches with the most contrast first."""
    return tokens.values.var(-1).argsort(dim=1, descending=True)


def doubled(tokens: Tokens, grid: Grid) -> Tensor:
    return torch.zeros(len(tokens.values), math.prod(grid), dtype=torch.int64)


def short(tokens: Tokens, grid: Grid) -> Tensor:
    return torch.arange(3)


def fractions(tokens: Tokens, grid: Grid) -> Tensor:
    return torch.rand(math.prod(grid))


def an_array(tokens: Tokens, grid: Grid) -> object:
    return np.arange(math.prod(grid))


def of_tokens_alone(tokens: Tokens) -> Tensor:
    return torch.arange(tokens.values.shape[1])


def failing(tokens: Tokens, grid: Grid) -> Tensor:
    return torch.arange(16)[tokens.values.shape[1] + 1]


def test_an_order_of_ones_own_is_a_function_of_the_tokens() -> None:
    tokens = tokens_of((4, 4))
    order = drawn("tests.modalities.orders.test_orders:by_saliency", tokens, (4, 4), None)
    assert torch.equal(order[:, 0], tokens.values.var(-1).argmax(1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("doubled", "is not a permutation: it must name each of 0 to 15 once"),
        ("short", r"gives the shape \[3\] on the grid \(4, 4\): make it \[16\] or \[3, 16\]"),
        ("fractions", r"gives numbers of type float32, not whole ones: make it \[16\] or \[3, 16\] of int64"),
        ("an_array", "gives ndarray, not a tensor of whole numbers"),
        ("of_tokens_alone", r"called with \(tokens, grid\) fails: TypeError: .*takes 1 positional argument but 2"),
        ("failing", r"called with \(tokens, grid\) fails, line \d+ of test_orders.py: IndexError: index 17 is out"),
    ],
)
def test_what_is_wrong_with_it_is_one_line_with_its_name(name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^patch_order=tests.modalities.orders.test_orders:{name} .*{words}"):
        read_order(f"tests.modalities.orders.test_orders:{name}", 0, tokens_of((4, 4)), (4, 4))


def test_a_function_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="did you mean by_saliency"):
        override(digits_2x2(), {"data.patch_order": "tests.modalities.orders.test_orders:by_salience"})


def test_what_is_no_function_is_told_where_it_is_named() -> None:
    with pytest.raises(
        UserError,
        match=r"patch_order=tests.modalities.orders.test_orders:STATIC is no function of \(tokens, grid\) but of",
    ):
        override(digits_2x2(), {"data.patch_order": "tests.modalities.orders.test_orders:STATIC"})


def test_a_permutation_may_come_from_a_file(tmp_path: Path) -> None:
    order = torch.arange(12).flip(0)
    np.save(tmp_path / "path.npy", order.numpy())
    (tmp_path / "path.txt").write_text("\n".join(map(str, order.tolist())))
    for file in ("path.npy", "path.txt"):
        assert torch.equal(grid_order(str(tmp_path / file), (3, 4)), order)
    with pytest.raises(UserError, match=r"path.npy gives the shape \[12\] on the grid \(4, 4\)"):
        grid_order(str(tmp_path / "path.npy"), (4, 4))
    with pytest.raises(UserError, match="no such file"):
        known_order(str(tmp_path / "missing.npy"))
    (tmp_path / "words.txt").write_text("first second")
    with pytest.raises(UserError, match="can't be read as a list of whole numbers"):
        grid_order(str(tmp_path / "words.txt"), (1, 2))
    np.save(tmp_path / "float.npy", np.arange(4.0))
    with pytest.raises(
        UserError, match=r"float.npy gives numbers of type float64, not whole ones: make it \[4\] of int64"
    ):
        grid_order(str(tmp_path / "float.npy"), (2, 2))


@pytest.mark.parametrize(("name", "words"), [("none.npy", "can't be read as a list"), ("none.txt", r"the shape \[0\]")])
def test_an_empty_file_is_one_line(name: str, words: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} .*{words}"):
        grid_order(str(tmp_path / name), (2, 2))
    assert not recwarn.list


# ---- measures


def test_measures_of_paths_counted_by_hand() -> None:
    raster = order_measures(cells((2, 3))[grid_order("raster", (2, 3))])
    assert raster["step"] == pytest.approx((4 + math.sqrt(5)) / 5)
    assert raster["neighbours_seen"] == pytest.approx((0 + 1 / 5 + 1 / 3) / 3)
    assert raster["lone"] == 0
    line = order_measures(cells((5,))[torch.tensor([0, 2, 4, 1, 3])])
    seen = [0, 0, 0, 1, 1]
    assert line == {"step": 2.25, "seen": seen, "neighbours_seen": 0.0, "lone": 0.5, "locality": 1.0}
    assert raster["seen"] == pytest.approx([0, 1 / 5, 1 / 3, 2 / 3, 4 / 5, 1])
    assert order_measures(cells((1,)))["seen"] == [0]


def test_measures_of_samples_of_unequal_length_are_averaged_where_they_are() -> None:
    long, short = (order_measures(cells((length,))) for length in (4, 2))
    assert long["seen"] == [0, 0.5, 0.5, 1]
    assert short["seen"] == [0, 1]
    means = mean_measures([long, short])
    assert means["seen"] == pytest.approx([0, 0.75, 0.5, 1])
    assert means["step"] == 1
    assert means["neighbours_seen"] == pytest.approx((0.25 + 0) / 2)


def test_local_orders_measure_as_local() -> None:
    found = {name: order_measures(cells((14, 14))[grid_order(name, (14, 14))]) for name in STATIC}
    assert found["hilbert"]["step"] == found["snake"]["step"] == 1
    assert found["hilbert"]["locality"] < 0.35 < found["raster"]["locality"] < 0.7
    assert found["random"]["locality"] == pytest.approx(1, abs=0.1)
    assert found["strided"]["lone"] > found["raster"]["lone"] == 0
    assert found["strided"]["neighbours_seen"] < 0.35 < found["raster"]["neighbours_seen"]


def test_padding_is_put_behind_only_where_it_is_not() -> None:
    order, full = torch.tensor([2, 0, 1, 3]), torch.ones(2, 4, dtype=torch.bool)
    behind = torch.tensor([[True, True, True, False], [True, False, True, False]])
    between = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert padding_behind(order, None) is padding_behind(order, full) is padding_behind(order, behind) is order
    assert padding_behind(None, between) is None
    moved = padding_behind(order, between)
    assert moved is not None
    assert moved.tolist() == [[2, 0, 1, 3], [0, 1, 3, 2]]
    each = order.expand(2, -1)
    assert torch.equal(padding_behind(each, between), moved)
    assert torch.equal(padding_behind(each, full), each)
