import math

import pytest
import torch
from torch import Tensor

import nepa_core.rope
from nepa_core.rope import RotaryTable, rotary_angles, rotary_table, rotate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _coords(axes: int, seed: int = 0, count: int = 7) -> Tensor:
    return torch.rand(count, axes, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _table(coords: Tensor, head_dim: int = 16, theta: float = 100.0, **options: object) -> RotaryTable:
    return rotary_table(coords, head_dim, theta, device=CPU, **options)  # type: ignore[arg-type]


def test_two_axes_follow_the_released_formula() -> None:
    head_dim, theta, coords = 24, 100.0, _coords(2)
    inverse = theta ** -torch.arange(0, 1, 4 / head_dim, dtype=torch.float64)
    angles = (2 * math.pi * coords.double()[:, :, None] * inverse).flatten(1).tile(2)
    q = torch.randn(2, 3, 7, head_dim)
    a, b = q.double().chunk(2, dim=-1)
    expected = q.double() * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()
    torch.testing.assert_close(rotate(q, _table(coords, head_dim)).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("axes", "left_over"), [(1, 0), (2, 0), (3, 2)])
def test_each_axis_turns_its_own_share_of_the_pairs(axes: int, left_over: int) -> None:
    coords = _coords(axes)
    angles = rotary_angles(coords, 16, 50.0)
    share = 8 // axes
    expected = torch.zeros(7, 8, dtype=torch.float64)
    for axis in range(axes):
        for i in range(share):
            expected[:, axis * share + i] = 2 * math.pi * coords[:, axis].double() / 50.0 ** (i / share)
    assert (expected == 0).all(0).sum() == left_over
    assert angles.dtype == torch.float32
    torch.testing.assert_close(angles.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_only_differences_of_coordinates_matter(axes: int) -> None:
    coords, shift = _coords(axes), torch.linspace(0.3, 0.9, axes)
    q, k = torch.randn(2, 1, 1, 7, 16).unbind()
    here, there = _table(coords), _table(coords + shift)
    scores = rotate(q, here) @ rotate(k, here).transpose(-1, -2)
    torch.testing.assert_close(rotate(q, there) @ rotate(k, there).transpose(-1, -2), scores, rtol=0, atol=2e-5)
    assert (rotate(q, there) @ rotate(k, here).transpose(-1, -2) - scores).abs().max() > 0.1


def test_bos_is_not_rotated() -> None:
    coords = _coords(2)
    x = torch.randn(2, 3, 8, 16)
    turned = rotate(x, _table(coords, bos=True))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert torch.equal(turned[:, :, 1:], rotate(x[:, :, 1:], _table(coords)))


def test_the_table_is_made_once_for_equal_coordinates() -> None:
    coords = _coords(2)
    table = _table(coords)
    assert _table(coords.clone()) is table
    assert _table(coords.T.contiguous().T) is table
    others = [
        _table(_coords(2, seed=1)),
        _table(coords, bos=True),
        _table(coords, theta=10.0),
        _table(coords, dtype=torch.bfloat16),
        _table(coords.view(-1, 1), head_dim=16),
    ]
    assert all(other.cos.shape != table.cos.shape or not torch.equal(other.cos, table.cos) for other in others)


def test_a_scale_that_changes_each_step_reuses_the_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    coords, made = _coords(2, seed=2), []
    original = rotary_angles
    monkeypatch.setattr(nepa_core.rope, "rotary_angles", lambda *a, **k: made.append(1) or original(*a, **k))
    for scale in (0.5, 1.3, 2.0):
        expected = original(coords * scale, 16, 100.0)
        torch.testing.assert_close(_table(coords, scale=scale).sin, expected.sin(), rtol=0, atol=1e-5)
    assert len(made) == 1


def test_angles_are_float32_where_attention_is_bfloat16() -> None:
    coords = torch.arange(300.0)[:, None] + 0.25
    with torch.autocast("cpu", torch.bfloat16):
        tables = [_table(coords, dtype=torch.bfloat16), _table(coords[None], dtype=torch.bfloat16)]
    frequencies = 100.0 ** -(torch.arange(8).double() / 8)
    angles = 2 * math.pi * coords.double() * frequencies
    for table in tables:
        assert table.cos.dtype == table.sin.dtype == torch.bfloat16
        torch.testing.assert_close(table.cos.double().view(300, 8), angles.cos(), rtol=0, atol=5e-3)
        torch.testing.assert_close(table.sin.double().view(300, 8), angles.sin(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("bos", [False, True])
def test_coordinates_per_sample_equal_shared_ones(bos: bool) -> None:
    shared = [_coords(2, seed=s) for s in range(3)]
    x = torch.randn(3, 2, 7 + bos, 16)
    together = rotate(x, _table(torch.stack(shared), bos=bos, scale=1.5))
    for row, coords in enumerate(shared):
        alone = rotate(x[row : row + 1], _table(coords, bos=bos, scale=1.5))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_table_first_made_in_inference_mode_serves_training_too(scale: float) -> None:
    coords = _coords(2, seed=3)
    with torch.inference_mode():
        _table(coords, scale=scale)
    x = torch.randn(1, 1, 7, 16, requires_grad=True)
    rotate(x, _table(coords, scale=scale)).sum().backward()
    assert x.grad is not None
