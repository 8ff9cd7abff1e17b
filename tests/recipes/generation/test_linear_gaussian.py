"""The linear-Gaussian autoregression finds a normal law whose conditionals are known, by any order and under masks."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modalities.timeseries import TimeSeries
from nepa_core.tokens import Tokens
from recipes.generation.linear_gaussian import LinearGaussian, covariances, fit_linear_gaussian
from recipes.statistics.scores import energy_score
from recipes.timeseries import demo

N, P = 4, 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MIX = torch.randn(N * P, N * P, generator=seeded(7)) + torch.eye(N * P)
MEAN = torch.arange(N * P) / 3.0
COVARIANCE = MIX @ MIX.T
PLACES = torch.arange(N)[:, None].float()


def drawn(count: int, seed: int = 0) -> Tensor:
    """[count, N, P] of the normal law of MEAN and COVARIANCE."""
    return (MEAN + torch.randn(count, N * P, generator=seeded(seed)) @ MIX.T).view(count, N, P)


def parts(values: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Iterator[Tokens]:
    for rows in torch.arange(len(values)).split(500):
        tokens = Tokens(values[rows], PLACES, None if mask is None else mask[rows])
        yield tokens.reordered(order if order is None or order.ndim == 1 else order[rows])


def conditional(values: Tensor, order: list[int], place: int) -> tuple[Tensor, Tensor]:
    """The law of the token at a place of the order, given those before it [B, N, P] in this order: closed form."""
    index = torch.tensor([[token * P + i for i in range(P)] for token in order])
    past, next_ = index[:place].flatten(), index[place]
    weights = torch.linalg.solve(COVARIANCE[past][:, past], COVARIANCE[past][:, next_])
    mean = MEAN[next_] + (values[:, :place].flatten(1) - MEAN[past]) @ weights
    return mean, COVARIANCE[next_][:, next_] - COVARIANCE[next_][:, past] @ weights


def assert_is_the_law(model: LinearGaussian, tokens: Tokens, order: list[int]) -> None:
    law = model.law(tokens)
    for place in range(N):
        mean, covariance = conditional(tokens.values, order, place)
        scale = float(covariance.diagonal().mean()) ** 0.5
        assert (law.mean[:, place] - mean).abs().mean() < 0.05 * scale
        found = law.covariance[place] if law.covariance.ndim == 3 else law.covariance[0, place]
        torch.testing.assert_close(found, covariance.double(), rtol=0, atol=0.15 * scale**2)


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
@pytest.mark.parametrize("own", [False, True])
def test_the_conditional_law_is_found_in_any_order(order: list[int] | None, own: bool) -> None:
    """Of the whole data or, the same one, of each sample: then for positions of the target, which it is told."""
    permutation = torch.tensor(order or range(N))
    permutation = permutation.expand(20_000, -1) if own else permutation
    model = fit_linear_gaussian(parts(drawn(20_000), permutation), total=20_000, length=N)
    (tokens,) = parts(drawn(200, seed=1), permutation[:200] if own else permutation)
    assert_is_the_law(model, tokens, order or list(range(N)))


def test_orders_of_each_sample_read_what_is_seen_alone() -> None:
    draw = seeded(3)
    order = torch.rand(6000, N, generator=draw).argsort(1)
    model = fit_linear_gaussian(parts(drawn(6000), order), total=6000, length=N)
    (tokens,) = parts(drawn(200, seed=1), order[:200])
    law = model.law(tokens)
    assert law.covariance.shape == (200, N, P, P)
    apart = (tokens.values - law.mean).square().mean((0, 2))
    assert (apart[1:] < apart[0]).all()
    changed = tokens.values.clone()
    changed[:, 2:] += 5
    other = model.law(replace(tokens, values=changed))
    assert torch.equal(other.mean[:, :3], law.mean[:, :3])
    assert not torch.equal(other.mean[:, 3], law.mean[:, 3])
    first = model.sample(tokens, 2, seeded(0))
    assert torch.equal(model.sample(replace(tokens, values=changed.nan_to_num()), 2, seeded(0)), first)
    many = torch.stack([model.sample(tokens, 2, draw) for _ in range(300)])
    torch.testing.assert_close(many.mean(0), law.mean[:, 2], rtol=0, atol=1.2)
    assert (many - law.mean[:, 2]).mean().abs() < 0.1


@pytest.mark.parametrize("own", [False, True])
def test_what_is_drawn_from_nothing_has_the_law_of_the_data(own: bool) -> None:
    order = torch.tensor([1, 3, 0, 2])
    order = order.expand(20_000, -1) if own else order
    model = fit_linear_gaussian(parts(drawn(20_000), order), total=20_000, length=N)
    empty = Tokens(torch.full((20_000, N, P), torch.nan), PLACES).reordered(order)
    made = model.complete(empty, 0, seeded(5))
    found = made.canonical(made.values).flatten(1)
    torch.testing.assert_close(found.mean(0), MEAN, rtol=0, atol=0.15)
    torch.testing.assert_close(found.T.cov(), COVARIANCE, rtol=0, atol=0.1 * float(COVARIANCE.diagonal().max()))


def test_kept_tokens_stay_bit_for_bit_and_the_rest_follows_from_them() -> None:
    model = fit_linear_gaussian(parts(drawn(4000)), total=4000, length=N)
    (tokens,) = parts(drawn(300, seed=1))
    made = model.complete(tokens, 2, seeded(0)).values
    assert torch.equal(made[:, :2], tokens.values[:, :2])
    assert (made[:, 2:] != tokens.values[:, 2:]).all()
    assert torch.equal(model.complete(tokens, 2, seeded(0)).values, made)
    blind = tokens.values.clone()
    blind[:, 2:] = torch.nan
    assert torch.equal(model.complete(replace(tokens, values=blind), 2, seeded(0)).values, made)
    each = torch.arange(300) % (N + 1)
    some = model.complete(tokens, each, seeded(0)).values
    kept = torch.arange(N) < each[:, None]
    assert torch.equal((some == tokens.values).all(-1), kept)
    assert torch.equal(model.complete(tokens, kept, seeded(0)).values, some)


def test_padding_is_neither_read_nor_made_and_rare_places_have_a_law() -> None:
    lengths = torch.randint(2, N, (3000,), generator=seeded(2))
    lengths[:1] = N  # the last place is in one sequence alone
    mask = torch.arange(N) < lengths[:, None]
    values = drawn(3000).masked_fill(~mask[..., None], 1e6)
    model = fit_linear_gaussian(parts(values, mask=mask), total=3000, length=N + 1)
    assert torch.linalg.cholesky(model.covariance).isfinite().all()
    (tokens,) = parts(values[:40], mask=mask[:40])
    law = model.law(tokens)
    assert law.mean.shape == (40, N, P)
    for place in (0, 1):
        mean, covariance = conditional(tokens.values, list(range(N)), place)
        torch.testing.assert_close(law.mean[:, place], mean, rtol=0, atol=0.6)
        torch.testing.assert_close(law.covariance[place], covariance.double(), rtol=0.25, atol=0.6)
    made = model.complete(tokens, 1, seeded(0)).values
    assert torch.equal(made[~mask[:40]], values[:40][~mask[:40]])
    assert (made[mask[:40]].abs() < 100).all()


def test_a_few_wide_samples_with_constant_numbers_have_a_law() -> None:
    values = torch.randn(30, 3, 40, generator=seeded(0))
    values[..., :5] = 2.0
    tokens = Tokens(values, torch.zeros(3, 1))
    model = fit_linear_gaussian([tokens], total=30, length=3)
    made = model.complete(tokens, 0, seeded(0)).values
    assert made.isfinite().all()
    assert (made[..., :5] - 2).abs().max() < 0.02
    one = fit_linear_gaussian([tokens.rows(torch.tensor([0, 1]))], total=2, length=3)
    assert one.complete(tokens, 1, seeded(0)).values.isfinite().all()
    with pytest.raises(ValueError, match="3 tokens in place of the 2"):
        fit_linear_gaussian([tokens], total=30, length=2)


def test_covariances_of_few_residuals_have_the_shape_of_all() -> None:
    shape = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    sizes = torch.tensor([1, 5, 1])[:, None]
    left = torch.randn(3000, 3, 2, generator=seeded(0)).double() @ torch.linalg.cholesky(shape).T * sizes
    counted = torch.ones(3000, 3, dtype=torch.bool)
    counted[2:, 2] = False
    counted[:, 0] &= torch.arange(3000) < 2000
    found = covariances(left, counted)
    torch.testing.assert_close(found[0], shape, rtol=0, atol=0.1)
    torch.testing.assert_close(found[1], 25 * shape, rtol=0, atol=2.5)
    correlation = float(found[2, 0, 1] / (found[2, 0, 0] * found[2, 1, 1]).sqrt())
    assert 0.6 < correlation < 0.999


def test_the_law_of_the_synthetic_series_is_recovered() -> None:
    """Its energy score on held-out tokens is that of the known law within 1 %; far below that of the mean."""
    data = demo().data
    assert isinstance(data, TimeSeries)
    train = data.dataset("train")
    rows = torch.randperm(len(train), generator=seeded(0))  # type: ignore[arg-type]
    batches = (data.read(train.__getitems__(some.tolist())) for some in rows.split(500))  # type: ignore[attr-defined]
    model = fit_linear_gaussian(batches, total=len(rows), length=16)
    held_out = data.dataset("test")
    tokens = data.read(held_out.__getitems__(list(range(0, 1480, 8))))  # type: ignore[attr-defined]
    known, found = data.known_law(tokens), model.law(tokens)
    assert known is not None
    deviation = known.covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found.mean - known.mean) / deviation).square().mean() < 0.05
    torch.testing.assert_close(found.covariance[1:], known.covariance[1:], rtol=0, atol=0.1)
    score = {}
    for name, law in {"known": known, "found": found}.items():
        samples = law.draw(40, seeded(1)).flatten(1, 2)
        score[name] = float(energy_score(samples, tokens.values.flatten(0, 1)).mean())
    assert 1 - 0.005 < score["found"] / score["known"] < 1.03
