"""What each sample adds to mAP: its mean, its slope, and how often an interval made of it misses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from recipes.networks.average_precision import average_precision


def drawn(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and truth."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.rand(samples, classes, generator=draw) < 0.3
    return (truth + 2 * torch.randn(samples, classes, generator=draw)).round(), truth


def test_a_credit_is_what_the_figure_gains_by_the_weight_of_its_sample() -> None:
    scores, truth = drawn(40, 3)
    credits = average_precision(scores, truth)

    def weighted(weight: np.ndarray) -> float:
        return float(average_precision_score(truth.numpy(), scores.numpy(), average="macro", sample_weight=weight))

    whole = weighted(np.ones(40))
    assert float(credits.mean()) == pytest.approx(whole, abs=1e-12)
    for row in range(40):
        more = np.ones(40)
        more[row] += 1e-5
        assert float(credits[row]) == pytest.approx(whole + 40 * (weighted(more) - whole) / 1e-5, abs=1e-3)


def test_classes_that_nobody_or_everybody_has_are_left_out() -> None:
    scores, truth = drawn(40, 3)
    others = torch.tensor([[True, False]]).expand(40, 2)
    wider = average_precision(torch.cat((scores, torch.randn(40, 2)), 1), torch.cat((truth, others), 1))
    torch.testing.assert_close(wider, average_precision(scores, truth), rtol=0, atol=0)
    assert not average_precision(torch.randn(40, 2), others).any()


def test_two_equally_good_scorers_differ_beyond_their_interval_in_one_draw_of_twenty() -> None:
    draw = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(300):
        truth = torch.rand(500, 2, generator=draw) < 0.1
        seen = truth + torch.randn(500, 2, generator=draw)
        one, other = (average_precision(seen + 0.7 * torch.randn(500, 2, generator=draw), truth) for _ in range(2))
        apart = one - other
        missed += bool(apart.mean().abs() > 1.96 * apart.std() / 500**0.5)
    assert 4 <= missed <= 28, "15 are expected; credits of the right samples alone miss some 65"
