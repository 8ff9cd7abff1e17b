"""Scores against closed forms, and what samples of the true law reach."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.statistics import scores
from recipes.statistics.scores import coverage, crps, energy_score, pinball, quantiles


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normal_crps(truth: Tensor, mean: float, std: float) -> Tensor:
    """Of N(mean, std^2): Gneiting and Raftery 2007, after eq. 21."""
    z = (truth.double() - mean) / std
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(z)
    return std * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))


def length(size: int) -> float:
    """E|z| of a standard normal vector of so many numbers."""
    return math.sqrt(2) * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))


@pytest.mark.parametrize("samples", [2, 5, 400])
def test_crps_of_a_normal_has_no_bias_however_few_the_samples(samples: int) -> None:
    truth = torch.tensor([-2.0, 0.0, 0.7]).repeat(40_000 // samples * 5, 1)
    found = crps(0.5 + 1.5 * normal(samples, *truth.shape), truth)
    assert found.shape == truth.shape
    error = found.std(0) / math.sqrt(len(truth))
    assert ((found.mean(0) - normal_crps(truth[0], 0.5, 1.5)).abs() < 4 * error).all()
    assert error.max() < 0.02


def test_crps_is_the_mean_over_pairs_and_keeps_its_digits_far_from_zero() -> None:
    samples, truth = 1e6 + normal(7, 3, 4).double(), 1e6 + normal(3, 4, seed=1).double()
    pairs = (samples[:, None] - samples).abs().sum((0, 1)) / (7 * 6)
    expected = (samples - truth).abs().mean(0) - pairs / 2
    torch.testing.assert_close(crps(samples, truth), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_energy_score_of_a_gaussian_by_its_own_law(size: int) -> None:
    """E|x - y| = E|x - x'| = sqrt(2) E|z|, of which half is left."""
    found = energy_score(normal(10, 4000, size), normal(4000, size, seed=1))
    expected = length(size) / math.sqrt(2 * size)
    assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / math.sqrt(4000))
    if size != 3:
        assert round(expected, 2) == {1: 0.56, 50: 0.70}[size]  # as the docstring says


def test_the_energy_score_is_lowest_for_the_true_law() -> None:
    truth = normal(5000, 4)
    score = {name: float(energy_score(draws, truth).mean()) for name, draws in {
        "own": normal(20, 5000, 4, seed=1),
        "shifted": 0.3 + normal(20, 5000, 4, seed=1),
        "narrow": 0.6 * normal(20, 5000, 4, seed=1),
        "wide": 1.6 * normal(20, 5000, 4, seed=1),
        "mean": torch.zeros(20, 5000, 4),
        "tied": normal(20, 5000, 1, seed=1).expand(-1, -1, 4),  # the same law of each number, not of all together
    }.items()}  # fmt: skip
    assert all(score["own"] < other - 0.01 for name, other in score.items() if name != "own")


def test_the_energy_score_of_one_number_is_its_crps_whatever_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, truth = normal(6, 9, 1), normal(9, 1, seed=1)
    found = energy_score(samples, truth)
    torch.testing.assert_close(found, crps(samples, truth)[:, 0])
    monkeypatch.setattr(scores, "_BYTES", 700)
    assert torch.equal(energy_score(samples, truth), found)


def test_one_sample_has_no_score() -> None:
    for score in (crps, energy_score):
        with pytest.raises(ValueError, match="two of them or more"):
            score(normal(1, 3, 2), normal(3, 2))


def test_quantiles_lie_where_another_draw_is_below_with_their_chance() -> None:
    samples = torch.tensor([3.0, 1.0, 2.0])[:, None]
    levels = torch.tensor([0.0, 0.25, 0.375, 0.5, 0.75, 1.0])
    assert quantiles(samples, levels)[:, 0].tolist() == [1, 1, 1.5, 2, 3, 3]
    expected = torch.from_numpy(np.quantile(normal(11, 2, 3).numpy(), [0.1, 0.5, 0.93], axis=0, method="weibull"))
    torch.testing.assert_close(quantiles(normal(11, 2, 3), torch.tensor([0.1, 0.5, 0.93])), expected.double())


@pytest.mark.parametrize(("samples", "level"), [(3, 0.5), (19, 0.9), (39, 0.9), (100, 0.5), (100, 0.9)])
def test_a_calibrated_forecast_covers_its_level_with_few_samples_too(samples: int, level: float) -> None:
    count = 40_000
    inside = coverage(normal(samples, count), normal(count, seed=1), level)
    assert float(inside.mean()) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / count) + 0.002)
    assert coverage(0.5 * normal(samples, count), normal(count, seed=1), level).mean() < level - 0.1


@pytest.mark.parametrize(("level", "least"), [(0.9, 19), (0.5, 3), (0.955, 44)])
def test_too_few_samples_for_an_interval_say_how_many_it_takes(level: float, least: int) -> None:
    coverage(normal(least, 5), normal(5), level)
    with pytest.raises(ValueError, match=f"{least - 1} samples have no central interval of .*; draw {least}"):
        coverage(normal(least - 1, 5), normal(5), level)


def test_the_pinball_loss_is_lowest_at_the_quantile_and_its_mean_is_half_the_crps() -> None:
    truth = normal(100_000)
    levels = torch.tensor([0.1, 0.5, 0.9])
    own = torch.special.ndtri(levels)[:, None]
    best = pinball(own, levels, truth[None].squeeze(0)).mean(1)
    assert best.shape == (3,)
    for shift in (-0.2, 0.2):
        assert (pinball(own + shift, levels, truth).mean(1) > best).all()
    assert pinball(torch.tensor([1.0, 1.0]), torch.tensor([0.1, 0.9]), torch.tensor(3.0)).tolist() == pytest.approx(
        [0.2, 1.8]
    )
    fine = (torch.arange(400) + 0.5) / 400
    one = torch.tensor([0.3])
    twice = 2 * pinball(torch.special.ndtri(fine.double())[:, None], fine, one).mean(0)
    torch.testing.assert_close(twice, normal_crps(one, 0.0, 1.0), rtol=0, atol=1e-3)
