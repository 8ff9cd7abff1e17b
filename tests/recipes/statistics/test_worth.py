"""The closing verdict of a probe and of a fine-tuning: what it says of made credits, and what it counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from recipes.statistics.worth import MAJORITY, RANDOM, RAW, Score, Worth, judge, sentences, without_control, worth_in

SAMPLES = 1000
EACH = torch.arange(SAMPLES)


def right(share: float, seed: int) -> Tensor:
    """Credits [SAMPLES] of which so many are 1, at places drawn by `seed`."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
    return (order < round(share * SAMPLES)).double()


def judged(own: float, random: float, raw: float | None = None, *others: float, clusters: Tensor = EACH) -> Worth:
    shares = [random, *([] if raw is None else [raw]), *others]
    names = [RANDOM, *([] if raw is None else [RAW]), *[MAJORITY] * len(others)]
    rivals = [
        Score(name, "", share, right(share, 1 + i)) for i, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
    return judge(Score("this network", "layer 2, mean", own, right(own, 0)), rivals, clusters, metric="accuracy")


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((0.9, 0.6, 0.5), "PAYS: better than random weights and raw tokens."),
        ((0.9, 0.6), "PAYS: better than random weights."),
        ((0.6, 0.9, 0.5), "DOES NOT PAY: beaten by random weights; better than raw tokens."),
        ((0.5, 0.8, 0.9), "DOES NOT PAY: beaten by raw tokens and random weights."),
        ((0.5, 0.9, 0.8), "DOES NOT PAY: beaten by random weights and raw tokens."),
        ((0.6, 0.9), "DOES NOT PAY: beaten by random weights."),
        ((0.7, 0.7), "NOT SEEN TO PAY: no difference from random weights is seen."),
        ((0.7, 0.71, 0.4), "NOT SEEN TO PAY: no difference from random weights is seen; better than raw tokens."),
        ((0.7, 0.5, 0.9), "BEHIND RAW TOKENS: beaten by raw tokens; better than random weights."),
        ((0.7, 0.7, 0.9), "BEHIND RAW TOKENS: beaten by raw tokens; no difference from random weights is seen."),
        (
            (0.7, 0.5, 0.7),
            "NO MORE THAN RAW TOKENS: no difference from raw tokens is seen; better than random weights.",
        ),
        (
            (0.6, 0.5, 0.7, 0.9),
            "BEHIND THE MOST FREQUENT CLASS: beaten by the most frequent class and raw tokens; "
            "better than random weights.",
        ),
    ],
)
def test_the_first_words_name_the_best_thing_that_is_not_beaten(figures: tuple[float, ...], verdict: str) -> None:
    worth = judged(*figures)
    assert worth.verdict == verdict
    assert verdict.startswith(f"{worth.headline}: ")
    assert worth.headline == worth.headline.upper()


def test_a_difference_is_paired_sample_by_sample() -> None:
    """Three of a thousand more, on the same samples otherwise: seen, which two independent shares would not be."""
    own, other = right(0.8, 0), right(0.8, 0)
    other[own.nonzero()[:12, 0]] = 0
    worth = judge(Score("a", "", 0.8, own), [Score(RANDOM, "", 0.788, other)], EACH, metric="accuracy")
    (beside,) = worth.beside
    assert worth.headline == "PAYS"
    assert beside.margin == pytest.approx(0.012)
    assert beside.ci95 == pytest.approx(1.96 * (0.012 * 0.988 / SAMPLES) ** 0.5, rel=0.01)


def test_samples_that_depend_on_each_other_count_as_one() -> None:
    """Fifty copies of each of twenty samples: twenty independent ones, and no difference is seen between them."""
    own, other = (torch.tensor(each).double() for each in ([1] * 14 + [0] * 6, [1] * 10 + [0] * 8 + [1, 1]))

    def compared(own: Tensor, other: Tensor, clusters: Tensor) -> Worth:
        return judge(Score("a", "", 0.7, own), [Score(RANDOM, "", 0.6, other)], clusters, metric="accuracy")

    twenty = compared(own, other, EACH[:20])
    alone, grouped = (compared(own.repeat(50), other.repeat(50), clusters) for clusters in (EACH, EACH % 20))
    assert grouped.beside[0].ci95 == pytest.approx(twenty.beside[0].ci95)
    assert alone.headline == "PAYS"
    assert grouped.headline == "NOT SEEN TO PAY"
    assert (grouped.clusters, grouped.samples) == (20, SAMPLES)
    assert "paired over 1,000 held-out samples in 20 independent groups" in sentences(grouped, form=".3f")[2]


def test_where_there_is_no_interval_nothing_is_claimed() -> None:
    """One series alone, or a figure that is not finite, as of a regression on a network that diverged."""
    own, one = Score("a", "", 0.9, right(0.9, 0)), torch.zeros(SAMPLES, dtype=torch.int64)
    alone = judge(own, [Score(RANDOM, "", 0.3, right(0.3, 5))], one, metric="accuracy")
    torn = judge(own, [Score(RANDOM, "", float("nan"), None)], EACH, metric="accuracy")
    for worth, margin in ((alone, "+60.0"), (torn, "+nan")):
        assert worth.headline == "NOT KNOWN"
        assert worth.beside[0].ci95 is None
        read = worth_in(json.loads(json.dumps({"worth": worth.model_dump(mode="json")})))
        assert read is not None
        assert f"over random weights {margin} ± unknown points" in sentences(read, form=".3f")[2]


def test_the_sentences_give_figures_intervals_and_what_they_cover() -> None:
    said = sentences(judged(0.9, 0.6, 0.5), form=".3f")
    assert said[1] == "This network (layer 2, mean) 0.900; random weights 0.600; raw tokens 0.500."
    assert said[2].startswith("Margins: over random weights +30.0 ± ")
    assert said[2].endswith("The intervals cover these test samples of one seed, not other seeds.")
    assert "independent groups" not in said[2]
    one = sentences(judged(0.9, 0.6), form=".2%")
    assert "this network (layer 2, mean) 90.00%" in one[1].lower()
    assert one[2].startswith("Margin: ")
    assert one[2].endswith("The interval covers these test samples of one seed, not other seeds.")


def test_r2_is_no_percentage() -> None:
    scores = [Score(name, "", x, x + torch.linspace(-1, 1, SAMPLES)) for name, x in (("a", 0.4), (RANDOM, 0.1))]
    noise = 0.1 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    worth = judge(scores[0], [scores[1]._replace(credits=scores[1].credits + noise)], EACH, metric="r2")  # type: ignore[operator]
    assert worth.headline == "PAYS"
    assert "of R2 (95 %" in sentences(worth, form=".3f")[2]
    assert "points" not in sentences(worth, form=".3f")[2]


def test_the_verdict_is_read_back_from_a_summary() -> None:
    worth = judged(0.9, 0.6, 0.5)
    assert worth_in({"worth": worth.model_dump(mode="json")}) == worth
    assert worth_in({}) is None


def test_a_missing_control_is_said_with_the_command_for_it() -> None:
    said = without_control("runs/base", "nepa finetune runs/base-finetune")
    assert "the control from random weights is missing" in said
    assert "`nepa finetune runs/base-finetune` trains it" in said
    assert "init=RUN" in without_control(None, "")
