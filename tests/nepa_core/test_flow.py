"""The flow head recovers conditional laws that are known, and the mean map their means."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core import Tokens
from nepa_core.flow import FlowConfig, FlowHead
from nepa_core.mean_map import fit_mean

SIZE, WIDTH = 6, 8
DRAW = torch.Generator().manual_seed(0)
MAP, NOISE = 0.3 * torch.randn(WIDTH, SIZE, generator=DRAW), 0.3 * torch.randn(SIZE, SIZE, generator=DRAW)
SMALL = FlowConfig(blocks=2, width=64)


def mean_of(condition: Tensor, coords: Tensor) -> Tensor:
    return F.layer_norm(condition, [WIDTH]) @ MAP + 0.3 * coords - 0.45


def law(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Values, conditions and coordinates: y = mean + noise of one covariance."""
    condition = 5 * torch.randn(count, WIDTH, generator=draw) + 1
    coords = torch.randint(4, (count, 1), generator=draw).float()
    noise = torch.randn(count, SIZE, generator=draw) @ NOISE.T
    return mean_of(condition, coords) + noise, condition, coords


@pytest.fixture(scope="module")
def trained() -> FlowHead:
    draw = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = FlowHead(SMALL, SIZE, WIDTH, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(*law(256, draw), draw).backward()
        optimizer.step()
        schedule.step()
    return head


@pytest.mark.parametrize(("method", "steps"), [("heun", 12), ("euler", 40)])
def test_a_known_conditional_law_is_recovered(trained: FlowHead, method: Literal["heun", "euler"], steps: int) -> None:
    count = 3000
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        _, condition, coords = law(1, draw)
        condition, coords = condition.expand(count, -1), coords.expand(count, -1)
        made = trained.sample(condition, coords, steps=steps, method=method, generator=draw)
        assert (made.mean(0) - mean_of(condition, coords)[0]).abs().max() < 0.15
        assert (made.T.cov() - NOISE @ NOISE.T).abs().max() < 0.2


def test_several_draws_of_a_condition_are_those_of_repeated_ones(trained: FlowHead) -> None:
    _, condition, coords = law(4, torch.Generator().manual_seed(2))
    several = trained.sample(condition, coords, steps=3, draws=5, generator=torch.Generator().manual_seed(3))
    repeated = trained.sample(
        condition.expand(5, -1, -1), coords.expand(5, -1, -1), steps=3, generator=torch.Generator().manual_seed(3)
    )
    assert several.shape == (5, 4, SIZE)
    torch.testing.assert_close(several, repeated, rtol=0, atol=1e-5)


def test_temperature_narrows_what_is_sampled(trained: FlowHead) -> None:
    _, condition, coords = law(1, torch.Generator().manual_seed(7))
    condition, coords = condition.expand(500, -1), coords.expand(500, -1)
    spread = [
        trained.sample(condition, coords, steps=8, temperature=each, generator=torch.Generator().manual_seed(0)).std(0)
        for each in (0.0, 0.5, 1.0)
    ]
    assert spread[0].max() < 1e-5
    assert (spread[1] < 0.7 * spread[2]).all()


def test_the_scale_of_a_condition_does_not_matter_and_its_coordinates_do(trained: FlowHead) -> None:
    def sampled(scale: float, moved: float) -> Tensor:
        _, condition, coords = law(5, torch.Generator().manual_seed(3))
        draw = torch.Generator().manual_seed(0)
        return trained.sample(scale * condition, coords + moved, steps=4, generator=draw)

    torch.testing.assert_close(sampled(100.0, 0.0), sampled(1.0, 0.0), rtol=0, atol=1e-4)
    assert (sampled(1.0, 1.0) - sampled(1.0, 0.0)).abs().max() > 0.1


def test_at_the_start_samples_are_standard_normal_however_narrow_the_head() -> None:
    made = FlowHead(FlowConfig(width=8), 40, WIDTH, 2).sample(torch.randn(3000, WIDTH), torch.rand(3000, 2), steps=8)
    assert (made.T.cov() - torch.eye(40)).abs().max() < 0.15
    assert made.mean(0).abs().max() < 0.1


def test_one_generator_decides_all_and_none_draws_from_the_global_one() -> None:
    head, given = FlowHead(SMALL, SIZE, WIDTH, 1), law(5, torch.Generator().manual_seed(0))
    for draw in (lambda g: head.loss(*given, g), lambda g: head.sample(*given[1:], steps=2, generator=g)):
        first, again = (draw(torch.Generator().manual_seed(4)) for _ in range(2))
        assert torch.equal(first, again)
        before = torch.get_rng_state()
        draw(torch.Generator())
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(4)
        assert torch.equal(draw(None), first)


def test_it_computes_in_float32_under_autocast() -> None:
    head, (values, condition, coords) = FlowHead(SMALL, SIZE, WIDTH, 1), law(5, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(head.leave.weight)
    plain = head.loss(values, condition.bfloat16().float(), coords, torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        inside = head.loss(values, condition.bfloat16(), coords, torch.Generator().manual_seed(4))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


def test_numbers_are_standardised_over_real_tokens_and_constant_ones_come_back_as_they_were() -> None:
    values, mask = 3 * torch.randn(4, 5, SIZE) + 2, torch.rand(4, 5) < 0.6
    values[..., 2] = 0.1
    values[~mask] = 1e4
    head = FlowHead(SMALL, SIZE, WIDTH, 1).measure(Tokens(values, torch.zeros(5, 1), mask))
    real = values[mask]
    inside = head.standardised(real)
    varies = torch.arange(SIZE) != 2
    torch.testing.assert_close(inside.mean(0), torch.zeros(SIZE), rtol=0, atol=1e-5)
    torch.testing.assert_close(inside.std(0, correction=0), varies.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(head.restored(inside), real, rtol=0, atol=1e-5)
    assert torch.equal(head.restored(torch.randn(9, SIZE))[:, 2], torch.full((9,), 0.1))
    assert {"mean", "std"} <= head.state_dict().keys()


def test_the_mean_map_undoes_a_linear_embedder_and_finds_a_conditional_mean() -> None:
    values, condition, _ = law(3000, torch.Generator().manual_seed(0))
    embedded = torch.nn.Linear(SIZE, WIDTH)(values).detach()
    torch.testing.assert_close(fit_mean(embedded, values)(embedded), values, rtol=0, atol=1e-3)
    noisy = condition @ MAP + torch.randn(3000, SIZE, generator=torch.Generator().manual_seed(1))
    error = (fit_mean(condition, noisy)(condition) - condition @ MAP).square().mean().sqrt()
    assert error < 0.1
