"""Intervals over held-out samples, clusters and seeds: worked by hand, and how often they cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from nepa_core.verdict.intervals import Interval, over_both, over_samples
from recipes.report.tables import credits_of, gain_spreads, margin, spreads
from recipes.statistics.credits import pack_credits
from recipes.statistics.held_out import pack_clusters
from recipes.statistics.significance import Credits, differences, spread

# -------------------------------------------------------------------------------------------- exact values


def test_independent_samples_make_the_t_interval() -> None:
    values = torch.tensor([0.1, 0.4, 0.3, 0.8, 0.5])
    found = over_samples(values)
    reference = stats.ttest_1samp(values.double().numpy(), 0).confidence_interval()
    assert found.mean == pytest.approx(0.42)
    assert found.half == pytest.approx((reference.high - reference.low) / 2)
    assert found.above
    assert not found.below


def test_clusters_of_one_size_make_the_t_interval_of_their_means() -> None:
    values = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = over_samples(values.flatten(), torch.arange(4).repeat_interleave(3))
    reference = stats.ttest_1samp(values.double().mean(1).numpy(), 0).confidence_interval()
    assert found.half == pytest.approx((reference.high - reference.low) / 2)
    assert found.df == 3
    assert found.half > (over_samples(values.flatten()).half or 0), "rows are not independent"


def test_seeds_and_samples_add_up() -> None:
    same = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).expand(3, 5)  # nothing is known of seeds that never differ
    alone = over_samples(same[0])
    assert over_both(same[:1]) == alone
    assert over_both(same).half == pytest.approx(alone.half)
    level = torch.tensor([[0.1], [0.2], [0.4]]).expand(3, 5)  # nor of samples that never do
    reference = stats.ttest_1samp([0.1, 0.2, 0.4], 0).confidence_interval()
    assert over_both(level).half == pytest.approx((reference.high - reference.low) / 2, rel=1e-5)
    both = over_both(same + level)
    seeds, samples = np.var([0.1, 0.2, 0.4], ddof=1) / 3, float(same[0].var()) / 5
    df = (seeds + samples) ** 2 / (seeds**2 / 2 + samples**2 / 4)
    assert both.df == pytest.approx(df, rel=1e-5)
    assert both.half == pytest.approx(stats.t.ppf(0.975, df) * (seeds + samples) ** 0.5, rel=1e-5)
    mostly_seeds = over_both(0.1 * same + level)
    assert mostly_seeds.half == pytest.approx((reference.high - reference.low) / 2, rel=1e-5), "never narrower"


def test_too_little_is_said_to_be_too_little() -> None:
    assert over_samples(torch.tensor([0.3])).half is None
    assert over_samples(torch.rand(6), torch.zeros(6)).half is None, "one cluster"
    assert over_both(torch.rand(3, 6), torch.zeros(6)).half is None
    assert not Interval(0.5, None).above


# ------------------------------------------------------------------------------------ in the comparisons


def rows_of(credits: Tensor, clusters: Tensor | None = None, key: str = "probe") -> list[dict[str, object]]:
    """[K, S] credits as the rows of K seeds."""
    kept = {} if clusters is None else {key: pack_clusters(clusters)}
    return [{key: float(each.mean()), "credits": {key: pack_credits(each)}, "clusters": kept} for each in credits]


def test_tables_hold_the_interval_over_seeds_and_samples_where_samples_are_known() -> None:
    draw = torch.Generator().manual_seed(0)
    credits = (torch.rand(3, 40, generator=draw) < 0.7).float()
    clusters = torch.arange(10).repeat_interleave(4)
    rows = {"a": rows_of(credits, clusters), "old": [{"probe": 0.5}, {"probe": 0.6}, {"probe": 0.7}]}
    found = spreads(rows, "probe")
    assert found["a"]["both"] == pytest.approx(over_both(credits, clusters).half)
    assert "both" not in found["old"], "results of before are over seeds alone"
    assert credits_of(rows, "probe") is None
    gain = gain_spreads({"a": rows["a"]}, {"a": rows_of(0 * credits, clusters)}, "probe", "probe")["a"]
    assert gain["mean"] == pytest.approx(found["a"]["mean"])
    assert gain["both"] == pytest.approx(found["a"]["both"])


def test_of_one_seed_the_interval_is_over_samples() -> None:
    credits = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    assert spread([0.75], credits)["both"] == pytest.approx(over_samples(credits[0]).half)
    assert spread([0.75])["ci95"] is None


def test_the_margin_over_linear_is_over_both_where_runs_kept_their_samples() -> None:
    model, linear = torch.tensor([[1.0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]]), torch.tensor([[0.0, 1, 0, 0, 1, 1]] * 2)
    runs = [
        {"retrieval_top1": float(a.mean()), "retrieval_top1_linear": float(b.mean())}
        for a, b in zip(model, linear, strict=True)
    ]
    apart = margin(runs)
    assert apart is not None
    assert "both" not in apart
    for run, a, b in zip(runs, model, linear, strict=True):
        run["credits"] = {"model": pack_credits(a), "linear": pack_credits(b), "clusters": None}  # type: ignore[assignment]
    both = margin(runs)
    assert both is not None
    assert both["mean"] == pytest.approx(apart["mean"]) == pytest.approx(0.25)
    assert both["both"] == pytest.approx(over_both(model - linear).half)
    assert margin([{"loss": 1.0}]) is None
    for chained in (False, True):  # as a run on overlapping windows keeps them
        for run in runs:
            run["credits"] |= {"clusters": pack_clusters(torch.tensor([0, 0, 1, 1, 2, 2]), chained=chained)}  # type: ignore[operator]
        windows = margin(runs)
        assert windows is not None
        expected = over_both(model - linear, torch.tensor([0, 0, 1, 1, 2, 2]), chained=chained).half
        assert windows["both"] == pytest.approx(expected)


def test_stretches_of_a_series_are_chained_in_every_comparison_too() -> None:
    """What windows of neighbouring stretches share widens tables and tests, as it does the verdict of one run."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 40, generator=draw)
    clusters = torch.arange(10).repeat_interleave(4)

    def rows(credits: Tensor, *, chained: bool) -> list[dict[str, object]]:
        packed = {"skill": pack_clusters(clusters, chained=chained)}
        return [row | {"clusters": packed} for row in rows_of(credits, key="skill")]

    apart, chain = (credits_of({"a": rows(a, chained=c), "b": rows(b, chained=c)}, "skill") for c in (False, True))
    assert apart is not None
    assert chain is not None
    assert (apart.chained, chain.chained) == (False, True)
    found = spreads({"a": rows(a, chained=True)}, "skill")["a"]
    assert found["both"] == pytest.approx(over_both(a, clusters, chained=True).half, rel=1e-2)
    values = {name: [float(seed.mean()) for seed in of] for name, of in (("a", a), ("b", b))}
    (narrow,), (wide,) = (differences(values, credits=of) for of in (apart, chain))
    assert narrow.p_both is not None
    assert wide.p_both is not None
    assert wide.p_both > narrow.p_both


def luck_with_the_test_set(draw: np.random.Generator, samples: int) -> tuple[bool, bool]:
    """Whether two starts that differ on this test set alone are called different: (by seeds alone, by both).

    On any sample one of them is right more often, whatever the seed; over all samples that there are, none is.
    """
    leaning = 0.25 * draw.normal(size=samples)
    credits = {
        name: torch.from_numpy(draw.random((3, samples)) < 0.5 + sign * leaning).float()
        for name, sign in (("a", 1), ("b", -1))
    }
    values = {name: each.mean(1).tolist() for name, each in credits.items()}
    alone, both = differences(values), differences(values, credits=Credits(credits))
    return alone[0].real, both[0].real


def test_luck_with_the_test_set_is_no_difference() -> None:
    found = [luck_with_the_test_set(np.random.default_rng(i), 100) for i in range(150)]
    assert sum(both for _, both in found) / 150 <= 0.05


@pytest.mark.slow
def test_luck_with_the_test_set_would_fool_a_test_over_seeds() -> None:
    """2,000 null comparisons of three seeds: see the bounds."""
    alone, both = np.mean([luck_with_the_test_set(np.random.default_rng(i), 100) for i in range(2000)], axis=0)
    assert both <= 0.05
    assert alone > 0.05


# ------------------------------------------------------------------------------------------------ coverage


def drawn(draw: np.random.Generator, seeds: int, samples: int, of_seeds: float, of_samples: float) -> Tensor:
    """[K, S] of mean 0: an effect of each seed, one of each sample, and noise of both."""
    values = of_seeds * draw.normal(size=(seeds, 1)) + of_samples * draw.normal(size=(1, samples))
    return torch.from_numpy(values + draw.normal(size=(seeds, samples)))


def bootstrapped(values: Tensor, draw: np.random.Generator) -> bool:
    """Whether scipy's percentile bootstrap over seeds and samples covers 0."""
    table = values.numpy()

    def mean(seeds: np.ndarray, samples: np.ndarray) -> float:
        return float(table[np.ix_(seeds, samples)].mean())

    found = stats.bootstrap(
        tuple(np.arange(count) for count in table.shape), mean, vectorized=False, n_resamples=399, method="percentile",
        rng=draw,
    ).confidence_interval  # fmt: skip
    return bool(found.low <= 0 <= found.high)


def covers(values: Tensor, clusters: Tensor | None = None) -> bool:
    found = over_both(values, clusters)
    assert found.half is not None
    return abs(found.mean) <= found.half


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("of_seeds", "of_samples"), [(0.3, 0.3), (0.1, 1.0), (0.0, 1.0)])
def test_intervals_over_seeds_and_samples_cover(seeds: int, of_seeds: float, of_samples: float) -> None:
    """At least 94 % of 2,000, where seeds, samples or both vary."""
    found = [covers(drawn(np.random.default_rng(i), seeds, 60, of_seeds, of_samples)) for i in range(2000)]
    assert np.mean(found) >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "most"), [(3, 0.85), (5, 0.92)])
def test_a_bootstrap_over_seeds_and_samples_covers_too_little(seeds: int, most: float) -> None:
    """Where seeds matter: why there is none here."""
    tables = [drawn(np.random.default_rng(i), seeds, 60, 0.5, 0.5) for i in range(300)]
    draw = np.random.default_rng(0)
    assert np.mean([bootstrapped(each, draw) for each in tables]) <= most
    assert np.mean([covers(each) for each in tables]) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 20])
def test_intervals_over_clusters_cover_and_those_over_rows_do_not(count: int) -> None:
    """2,000 draws of clusters of 5 to 20 samples that share half of their variance."""
    covered = {"clusters": 0, "rows": 0}
    for i in range(2000):
        draw = np.random.default_rng(i)
        sizes = draw.integers(5, 21, size=count)
        clusters = torch.from_numpy(np.repeat(np.arange(count), sizes))
        values = torch.from_numpy(np.repeat(draw.normal(size=count), sizes) + draw.normal(size=sizes.sum()))
        for kind, found in (("clusters", over_samples(values, clusters)), ("rows", over_samples(values))):
            assert found.half is not None
            covered[kind] += abs(found.mean) <= found.half
    assert covered["clusters"] / 2000 >= 0.92
    assert covered["rows"] / 2000 <= 0.7
