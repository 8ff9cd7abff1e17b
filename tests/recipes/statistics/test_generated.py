"""Two-sample tests, copies, diversity and levels: what signals of the data's own law get, and others do not."""

import math

import pytest
import torch
from torch import Tensor

from modalities.image import Images
from recipes.statistics import generated
from recipes.statistics.generated import Levels, diversity, levels, nearest, two_sample


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- levels


def digits() -> tuple[Images, Tensor]:
    """The adapter and the raw tokens of 400 images, [6400, 4]."""
    data = Images(source="digits", size=(8, 8), patch=(2, 2), channels=1, mean=(0.3,), std=(0.35,), in_memory=True)
    batch = data.dataset("train").__getitems__(list(range(400)))  # type: ignore[attr-defined]
    return data, data.tokenize(batch).values.flatten(0, 1)


def test_digits_have_17_levels_and_noise_is_brought_back_to_them() -> None:
    _, values = digits()
    found = levels(values)
    assert found is not None
    assert found.counts.tolist() == [17] * 4
    step = float(found.table.diff().min())
    noisy = values + step * (normal(*values.shape) / 4).clamp(-0.49, 0.49)
    assert torch.equal(found.snap(noisy), values)
    assert torch.equal(found.snap(torch.tensor([[-99.0, 99.0, 0.0, 0.0]]))[0, :2], found.table[0, [0, 16]])
    whole = noisy.view(400, 16, 4)
    assert torch.equal(found.snap(whole), values.view(400, 16, 4))


def test_a_seldom_pixel_of_whole_images_has_levels_too() -> None:
    """The corner of a digit is 0 in nearly all images, its other levels occur once."""
    data, _ = digits()
    images = data.dataset("train").__getitems__(list(range(400)))["image"].flatten(1).float()  # type: ignore[attr-defined]
    found = levels(images)
    assert found is not None
    assert int(found.counts.min()) >= 1
    assert torch.equal(found.snap(images + 0.1), images)


def test_continuous_numbers_stay_as_they_are() -> None:
    values = normal(2000, 3)
    assert levels(values) is None
    flag = (normal(2000, 1, seed=1) > 0).float()
    silent = normal(2000, 1, seed=2) * (normal(2000, 1, seed=3) > 1.5)  # a spectrogram's band: 0 for the most part
    found = levels(torch.cat((values, flag, silent), 1))
    assert found is not None
    assert found.counts.tolist() == [0, 0, 0, 2, 0]
    mixed = torch.cat((values, flag + 0.3, silent), 1)
    assert torch.equal(found.snap(mixed), torch.cat((values, flag, silent), 1))


def test_many_levels_or_few_samples_are_no_quantisation() -> None:
    draw = torch.Generator().manual_seed(0)
    assert levels(torch.randint(0, 600, (60_000, 1), generator=draw).float()) is None
    assert levels(torch.randint(0, 256, (300, 1), generator=draw).float()) is None
    pixels = levels(torch.randint(0, 256, (6000, 1), generator=draw).float())
    assert pixels is not None
    assert pixels.counts.tolist() == [256]


def test_a_constant_number_and_ties() -> None:
    found = levels(torch.tensor([[2.0]]).expand(20, 1))
    assert found is not None
    assert found.snap(torch.tensor([[7.0], [-1.0]])).flatten().tolist() == [2, 2]
    pair = Levels(torch.tensor([[0.0, 1.0]]), torch.tensor([2]))
    assert pair.snap(torch.tensor([[0.5], [0.5001]])).flatten().tolist() == [0, 1]


# ---- two samples


def test_signals_of_one_law_can_not_be_told_apart() -> None:
    found = two_sample(normal(250, 6), normal(300, 6, seed=1), seed=0)
    assert found.each == 250
    for accuracy in (found.trees, found.linear):
        assert accuracy.half is not None
        assert accuracy.half == pytest.approx(1.96 * 0.5 / math.sqrt(500), rel=0.02)
        assert abs(accuracy.mean - 0.5) < 1.5 * accuracy.half
    assert two_sample(normal(250, 6), normal(300, 6, seed=1), seed=0) == found


def test_the_accuracy_of_the_best_classifier_is_reached() -> None:
    """Of N(0, 1) against N(2, 1) it is Phi(1) = 84 %; of another spread a linear one sees nothing."""
    shifted = normal(400, 2, seed=1)
    shifted[:, 0] += 2
    found = two_sample(normal(400, 2), shifted, seed=0)
    assert found.linear.mean == pytest.approx(0.841, abs=0.04)
    assert found.trees.mean == pytest.approx(0.83, abs=0.05)
    wide = two_sample(normal(400, 2), 3 * normal(400, 2, seed=1), seed=0)
    assert wide.trees.mean > 0.75
    assert wide.linear.mean < 0.6


def test_completions_stay_on_the_side_of_the_sample_they_were_made_from() -> None:
    """Else the kept part would tell: the pair of a signal is among the others, and is of the other kind."""
    kept = normal(200, 4)
    real, made = (torch.cat((kept, normal(200, 2, seed=seed)), 1) for seed in (1, 2))
    number = torch.arange(200)
    apart = two_sample(real, made, 0, clusters=(number, number))
    assert abs(apart.trees.mean - 0.5) < 0.07
    together = two_sample(real, made, 0)
    assert together.trees.mean < apart.trees.mean - 0.05


def test_a_few_signals_are_no_test() -> None:
    with pytest.raises(ValueError, match="4 signals of a kind can't be told from others; 5 are the least"):
        two_sample(normal(9, 2), normal(4, 2), seed=0)


# ---- copies, diversity


def test_copies_are_found_and_new_signals_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out, new = normal(500, 8), normal(400, 8, seed=1), normal(400, 8, seed=2)
    found = nearest(new, train, held_out)
    apart = (new[:, None] - train).double().norm(dim=2)
    torch.testing.assert_close(found.distance, apart.min(1).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.to, apart.argmin(1))
    assert found.held_out == 0.01
    assert found.copies.double().mean() < 0.03
    near = new.clone()
    near[[3, 70]] = train[[11, 12]] + 0.01 * normal(2, 8, seed=3)
    again = nearest(near, train, held_out)
    assert again.copies[[3, 70]].all()
    assert again.to[[3, 70]].tolist() == [11, 12]
    exact = nearest(train[:5] + 1000, train + 1000, held_out + 1000)  # far from zero, where products round
    assert exact.distance.max() == 0
    monkeypatch.setattr(generated, "_BYTES", 4000)
    assert torch.equal(nearest(near, train, held_out).distance, again.distance)


def test_data_that_repeat_themselves_say_so() -> None:
    train = normal(100, 8)
    held_out = torch.cat((train[:30], normal(70, 8, seed=1)))
    found = nearest(normal(50, 8, seed=2), train, held_out)
    assert (found.threshold, found.held_out) == (0, 0.3)
    assert not found.copies.any()
    assert nearest(train[:9], train, held_out).copies.all()


def test_diversity_is_1_for_the_datas_own_law_and_its_interval_covers_that() -> None:
    real = [diversity(normal(40, 6, seed=seed), normal(60, 6, seed=1000 + seed)) for seed in range(200)]
    covered = sum(abs(each.mean - 1) < (each.half or 0) for each in real) / len(real)
    assert 0.9 <= covered <= 0.99
    assert diversity(0.5 * normal(300, 6), normal(300, 6, seed=1)).mean == pytest.approx(0.5, abs=0.03)
    same = diversity(torch.ones(5, 6), normal(50, 6))
    assert (same.mean, same.half) == (0, 0)
    assert torch.pdist(normal(30, 6)).mean() == pytest.approx(generated._mean_distance(normal(30, 6))[0], rel=1e-5)


def test_diversity_needs_two_signals_that_differ() -> None:
    with pytest.raises(ValueError, match="needs two of them"):
        diversity(normal(1, 6), normal(5, 6))
    with pytest.raises(ValueError, match="real signals are all the same"):
        diversity(normal(5, 6), torch.ones(5, 6))
