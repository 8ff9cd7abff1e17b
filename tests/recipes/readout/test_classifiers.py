"""The classifiers of a probe against brute force, scikit-learn and formulas written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from recipes.networks.heads import AttentiveHead
from recipes.readout import classifiers
from recipes.readout.classifiers import (
    MAE,
    AttentiveProtocol,
    TokenFeatures,
    attentive,
    knn,
    knn_regression,
    lars,
    lars_optimizer,
    linear,
)
from recipes.statistics.ridge import r2, ridge


def clusters(samples: int, dim: int, classes: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal clouds around fixed centres: [samples, dim], labels [samples]."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=draw)
    return centres[labels] + spread * torch.randn(samples, dim, generator=draw), labels


def brute_force_knn(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, k: int, temperature: float) -> list[float]:
    """Right or not, sample by sample."""
    right = []
    for sample, truth in zip(x_test.tolist(), y_test.tolist(), strict=True):
        near = []
        for other, label in zip(x.tolist(), y.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(sample, other, strict=True))
            near.append((dot / math.hypot(*sample) / math.hypot(*other), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(near, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        right.append(float(max(votes, key=lambda label: votes[label]) == truth))
    return right


@pytest.mark.parametrize("at_once", [2**27, 100])
@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (3, 1.0)])
def test_knn_is_what_brute_force_gives(
    monkeypatch: pytest.MonkeyPatch, at_once: int, k: int, temperature: float
) -> None:
    monkeypatch.setattr(classifiers, "_AT_ONCE", at_once)
    x, y = clusters(60, 4, 5, 1.0)
    x_test, y_test = clusters(50, 4, 5, 1.0, seed=1)
    expected = brute_force_knn(x, y, x_test, y_test, k, temperature)
    assert knn(x, y, x_test, y_test, k=k, temperature=temperature).tolist() == expected
    assert 0.3 < np.mean(expected) < 0.9


def test_knn_weighs_near_neighbours_more() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    y, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]])
    assert knn(x, y, test, torch.tensor([0])) == 1.0
    assert knn(x, y, test, torch.tensor([0]), temperature=100.0) == 0.0, "then the majority decides"


@pytest.mark.parametrize("at_once", [2**27, 60])
def test_linear_is_logistic_regression(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(classifiers, "_AT_ONCE", at_once)
    x, y = clusters(300, 6, 4, 1.5)
    x_test, y_test = clusters(500, 6, 4, 1.5, seed=1)
    x[:, 0], x_test[:, 0] = 1e4 * x[:, 0] + 1e5, 1e4 * x_test[:, 0] + 1e5
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(max_iter=200).fit(scaler.transform(x), y)
    expected = torch.from_numpy(model.predict(scaler.transform(x_test)) == y_test.numpy()).double()
    assert int((linear(x, y, x_test, y_test) != expected).sum()) <= 2, "of 500 samples, one by one"
    assert 0.5 < expected.mean() < 0.95


def test_linear_of_several_classes_is_a_logistic_regression_of_each() -> None:
    draw = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(80, 6, generator=draw), torch.randn(40, 6, generator=draw)
    weight = torch.randn(6, 3, generator=draw)
    y, y_test = (each @ weight + torch.randn(len(each), 3, generator=draw) > 0 for each in (x, x_test))
    credits = classifiers.linear_multi_label(x, y, x_test, y_test)
    from sklearn.metrics import average_precision_score

    mean, std = x.mean(0), x.std(0, correction=0)
    scores = [
        LogisticRegression(C=1.0, max_iter=1000, tol=1e-6)
        .fit(((x - mean) / std).numpy(), y[:, place].numpy())
        .decision_function(((x_test - mean) / std).numpy())
        for place in range(3)
    ]
    wanted = average_precision_score(y_test.numpy(), np.stack(scores, 1), average="macro")
    assert float(credits.mean()) == pytest.approx(wanted, abs=2e-3)
    assert len(credits) == 40


def test_linear_reads_what_is_linear() -> None:
    x, y = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) * 100, torch.arange(400) % 2
    x[:, 4] = 7.0  # constant
    assert linear(x[:200], y[:200], x[200:], y[200:]).mean() < 0.65
    x[:, 3] += 300 * y  # in one of five dimensions, at a large scale
    assert linear(x[:200], y[:200], x[200:], y[200:]).mean() > 0.9


def test_the_rates_of_lars_are_those_of_mae(monkeypatch: pytest.MonkeyPatch) -> None:
    """MAE's schedule takes the epoch with its fraction: 0 at the first step, a tenth of the peak after one of ten."""
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(classifiers, "lars_optimizer", lambda head: Watched(head.parameters(), lr=0.0))
    x, y = clusters(60, 8, 3, 0.1)
    lars(x, y, x, y, protocol=MAE._replace(batch=20, epochs=30))
    peak, expected = 0.1 * 20 / 256, []
    for step in range(3 * 30):
        epoch = step / 3
        rising, falling = epoch / 10, 0.5 * (1 + math.cos(math.pi * (epoch - 10) / (30 - 10)))
        expected.append(peak * (rising if epoch < 10 else falling))
    assert seen == pytest.approx(expected)
    assert seen[0] == 0


def test_a_step_of_lars_is_the_formula_of_mae() -> None:
    """Trust ratio 0.001 |w| / |g| on the matrix, momentum on what it scaled; the bias as in SGD."""
    torch.manual_seed(0)
    head = nn.Linear(3, 2)
    weight, bias = (value.detach().clone().double() for value in (head.weight, head.bias))
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    optimizer = lars_optimizer(head)
    for lr in (6.4, 3.0, 1.0):
        gradients = [torch.randn(2, 3), torch.randn(2)]
        head.weight.grad, head.bias.grad = gradients[0].clone(), gradients[1].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        trust = 0.001 * weight.norm() / gradients[0].double().norm()
        speeds[0] = 0.9 * speeds[0] + trust * gradients[0].double()
        speeds[1] = 0.9 * speeds[1] + gradients[1].double()
        weight, bias = weight - lr * speeds[0], bias - lr * speeds[1]
        assert torch.allclose(head.weight.double(), weight, atol=1e-6)
        assert torch.allclose(head.bias.double(), bias, atol=1e-5)


def test_the_protocol_of_mae_reads_clusters_in_even_batches() -> None:
    assert MAE == (0.1, 16_384, 90, 10)
    x, y = clusters(400, 8, 4, 0.5)
    x_test, y_test = clusters(200, 8, 4, 0.5, seed=1)
    state = torch.get_rng_state()
    right = lars(1000 * x + 5, y, 1000 * x_test + 5, y_test)
    assert right.mean() > 0.7, "90 steps are few"
    assert torch.equal(right, lars(1000 * x + 5, y, 1000 * x_test + 5, y_test))
    assert torch.equal(torch.get_rng_state(), state), "it has a generator of its own"
    four = MAE._replace(batch=100, base_lr=MAE.base_lr * MAE.batch / 100)  # batches an epoch, at the same rate
    assert lars(x, y, x_test, y_test, protocol=four).mean() > 0.95


def test_the_attentive_head_does_not_see_masked_tokens() -> None:
    torch.manual_seed(0)
    head = AttentiveHead(128, 3)
    assert head.heads == 2
    nn.init.normal_(head.query)
    x, mask = torch.randn(4, 5, 128), torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    out = head(x, mask)
    torn = torch.where(mask[..., None], x, 1e3 * torch.randn_like(x))
    assert torch.allclose(head(torn, mask), out, atol=1e-5)
    assert torch.allclose(head(x[1:2, :3], mask[1:2, :3]), out[1:2], atol=1e-5)
    assert not torch.allclose(head(torn, torch.ones_like(mask)), out, atol=1e-2)
    nn.init.zeros_(head.query)
    values = (head.value(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(head(x, mask), head.classifier(values), atol=1e-5), "it starts as the mean"


SHORT = AttentiveProtocol(lr=1e-2, most_lr=1e-2, weight_decay=0.05, batch=64, epochs=1, steps=150, warmup=0.1)


def test_the_attentive_probe_finds_the_token_that_tells() -> None:
    """One of twelve tokens is marked and holds the class, elsewhere in each sample; the others shout it wrongly."""
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 2
    values = draw.normal(size=(400, 12, 8)).astype(np.float16)
    values[:, :, 1] = 3 * draw.choice([-1, 1], size=(400, 12))
    places = draw.integers(6, size=400)
    values[:, :, 0], values[np.arange(400), places, 0] = 0, 8
    values[np.arange(400), places, 1] = 6 * labels - 3
    mask = np.arange(12) < draw.integers(6, 13, size=400)[:, None]
    values[~mask] = 6e4  # what is masked must not even enter the moments
    y = torch.from_numpy(labels)
    x = TokenFeatures(values, mask)
    state = torch.get_rng_state()
    right = attentive(x[:300], y[:300], x[300:], y[300:], protocol=SHORT)
    assert torch.equal(torch.get_rng_state(), state), "it has a generator of its own"
    mean = torch.from_numpy((values.astype(np.float32) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))
    assert right.shape == (100,)
    assert right.mean() > 0.95
    assert linear(mean[:300], y[:300], mean[300:], y[300:]).mean() < 0.8
    assert torch.equal(attentive(x[:300], y[:300], x[300:], y[300:], protocol=SHORT), right)


def test_the_credits_of_a_regression_are_r2_and_say_which_samples_are_missed() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(300, 4, generator=draw), torch.randn(4, 2, generator=draw)
    y = torch.cat((x @ weights + 0.3 * torch.randn(300, 2, generator=draw), torch.full((300, 1), 5.0)), dim=1)
    far = y[200:].clone()
    far[7] += torch.tensor([100.0, 0.0, 0.0])
    for read in (ridge, knn_regression):
        for truth in (y[200:], far):
            credits = read(x[:200], y[:200], x[200:], truth)
            assert credits.shape == (100,)
            assert credits.dtype == torch.float64
        assert credits.argmin() == 7
    predicted = truth + torch.randn(truth.shape, generator=draw)
    expected = np.mean([r2_score(truth[:, k], predicted[:, k]) for k in (0, 1)]) * 2 / 3
    assert float(r2(predicted, truth).mean()) == pytest.approx(expected), "the number that never varies gives 0"
