"""How many seeds see a difference: what is said against tables that are drawn and tested as comparisons are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.statistics import power
from recipes.statistics.power import MOST_SEEDS, POWER, SEE, Outlook, Samples, least_seen, outlook, samples_of, sentence
from recipes.statistics.protocol import Look, alone
from recipes.statistics.significance import Credits, Difference, differences, first_step

SPREAD = 0.01
WORDS = {"noun": "orders", "of": "the probe"}


def found(each: Difference) -> bool:
    """Whether "a" is called better at Holm's first step, which asks most."""
    return each.better == "a" and each.mean >= each.needed


def drawn(draw: np.random.Generator, variants: int, seeds: int, samples: int, lasting: float, noise: float) -> Credits:
    """What samples add where "a" is like the others.

    All variants share a part of every sample and of every seed. `lasting` and `noise`: standard deviations of what a
    sample adds with a variant whatever the seed, and with a single seed.
    """
    shared = draw.normal(size=samples) + 0.1 * draw.normal(size=(seeds, 1))
    of = {}
    for place in range(variants):
        own = lasting * draw.normal(size=samples) + noise * draw.normal(size=(seeds, samples))
        of["abcdefgh"[place]] = torch.tensor(shared + own + SPREAD * draw.normal(size=(seeds, 1)))
    return Credits(of)


def of_a(credits: Credits, shift: float) -> Difference:
    """The test of the first two variants, where "a" is so much better."""
    of = {name: each + shift * (name == "a") for name, each in credits.of.items()}
    groups = {name: each.mean(1).tolist() for name, each in of.items()}
    look = alone(len(of), range(len(groups["a"])))
    every = differences(groups, [("a", "b")], correction=look.pairs(), credits=credits._replace(of=of))
    return every[0]


@pytest.mark.parametrize(("variants", "seeds"), [(2, 3), (5, 3), (5, 8)])
def test_the_stated_difference_is_seen_as_often_as_stated(variants: int, seeds: int) -> None:
    """400 tables with a seed effect that all share. (4,000: 79.2, 79.4 and 78.3 %.)"""
    draw, look = np.random.default_rng(7), alone(variants, range(seeds))
    level = first_step(1, look.pairs())
    shift = least_seen(SPREAD, variants=variants, seeds=seeds, level=level)
    hits = 0
    for _ in range(400):
        table = SPREAD * draw.normal(size=(variants, seeds)) + 0.05 * draw.normal(size=seeds)
        table[0] += shift
        groups = dict(zip("abcde", table.tolist(), strict=False))
        (each,) = differences(groups, [("a", "b")], correction=look.pairs())
        hits += found(each)
    assert hits / 400 == pytest.approx(POWER, abs=0.06)


@pytest.mark.parametrize("seeds", [3, 12])
def test_it_is_where_other_test_samples_are_drawn_too(seeds: int) -> None:
    """200 comparisons, each of new seeds and of 150 new samples. (2,000: 80 % with 3 seeds, 83 % with 12.)"""
    draw, sizes = np.random.default_rng(3), {"samples": 150, "lasting": 0.2, "noise": 0.2}
    each = 2 / sizes["samples"]  # of a difference: two variants
    samples = Samples(each * sizes["lasting"] ** 2, each * sizes["noise"] ** 2, 149)
    spread = float(np.hypot(SPREAD, sizes["noise"] / sizes["samples"] ** 0.5))  # of what is measured on samples
    level = first_step(1, alone(3, range(seeds)).pairs())
    shift = least_seen(spread, variants=3, seeds=seeds, level=level, samples=samples)
    hits = sum(found(of_a(drawn(draw, 3, seeds, **sizes), shift)) for _ in range(200))  # type: ignore[arg-type]
    assert hits / 200 == pytest.approx(POWER, abs=0.08)


def test_what_lasts_over_seeds_is_told_from_what_a_seed_adds() -> None:
    credits = drawn(np.random.default_rng(0), 4, 6, 2000, 0.2, 0.5)
    samples = samples_of(credits)
    assert samples is not None
    assert samples.lasting == pytest.approx(2 * 0.2**2 / 2000, rel=0.1)
    assert samples.passing == pytest.approx(2 * 0.5**2 / 2000, rel=0.1)
    assert samples.df == 1999
    assert samples_of(Credits({name: each[:, :1] for name, each in credits.of.items()})) is None
    same = samples_of(credits._replace(clusters=torch.zeros(2000, dtype=torch.long)))
    assert same is None, "one cluster tells nothing of samples"


def table(seeds: int, variants: int = 6, spread: float = SPREAD) -> dict[str, list[float]]:
    draw = np.random.default_rng(1)
    shared = 0.1 * draw.normal(size=seeds)
    return {name: (0.7 + shared + spread * draw.normal(size=seeds)).tolist() for name in "abcdef"[:variants]}


def test_the_seeds_that_are_named_see_two_points_and_one_fewer_does_not() -> None:
    look = alone(6, range(5))
    told = outlook(table(5), correction=look.pairs())
    assert told.spread == pytest.approx(SPREAD, rel=0.3), "what all have in common at a seed is left out"
    assert told.sees is not None
    assert told.needs is not None
    how = {"variants": 6, "level": first_step(15, look.pairs())}
    assert least_seen(told.spread, seeds=told.needs, **how) <= SEE
    assert least_seen(told.spread, seeds=told.needs - 1, **how) > SEE
    assert told.at_best is None, "nothing is known of samples"
    later = outlook(table(5), correction=Look(2, 2, (0, 1, 2, 3, 4), ever=6).pairs())
    assert later.sees is not None
    assert later.sees > told.sees, "a further look may spend less"


def test_samples_that_hide_two_points_are_named() -> None:
    draw = np.random.default_rng(0)
    for lasting, hidden in ((0.2, True), (0.01, False)):
        credits = drawn(draw, 3, 3, 150, lasting, 0.01)
        groups = {name: each.mean(1).tolist() for name, each in credits.of.items()}
        told = outlook(groups, correction=alone(3, range(3)).pairs(), credits=credits)
        assert told.at_best is not None
        assert (told.at_best > SEE) is hidden
        assert (told.needs is None) is hidden
        assert ("hidden by the test samples however many seeds there are" in sentence(told, **WORDS)) is hidden


def test_it_is_said_in_plain_words() -> None:
    closing = " From the spread of random weights; that of trained networks may be another."
    told = Outlook(3, 10, spread=0.01, sees=0.0412, needs=9)
    assert sentence(told, **WORDS) == (
        "3 seeds see a difference of 4.1 points or more between two orders in the probe (80 % of the time); "
        f"2 points would take about 9 seeds.{closing}"
    )
    assert "; 2 points take about 9 seeds." in sentence(told._replace(seeds=12), **WORDS)
    many = sentence(told._replace(needs=None), **WORDS)
    assert f"; 2 points would take more than {MOST_SEEDS} seeds." in many
    assert "; 2 points are hidden by the test samples" in sentence(told._replace(needs=None, at_best=0.03), **WORDS)
    assert sentence(told._replace(seeds=2, sees=None), **WORDS).startswith(
        "2 seeds see no difference between orders in the probe, for fewer than three are not tested; 2 points would"
    )


@pytest.mark.parametrize(("seeds", "variants"), [(1, 6), (2, 2)])
def test_too_few_seeds_to_know_a_spread_are_said_to_be(seeds: int, variants: int) -> None:
    told = outlook(table(seeds, variants))
    assert told == Outlook(seeds, variants)
    assert "the spread over seeds is not known" in sentence(told, **WORDS)
    assert sentence(told, **WORDS).endswith("give three or more.")


def test_random_weights_that_do_alike_under_all_orders_tell_nothing() -> None:
    told = outlook({name: [0.4, 0.5, 0.6] for name in "abc"})
    assert told == Outlook(3, 3)
    assert sentence(told, **WORDS).startswith("Random weights do the same in the probe under all orders")


def test_a_spread_of_many_points_takes_more_seeds_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "MOST_SEEDS", 7)
    assert outlook(table(3, spread=1.0)).needs is None
