from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.verdict.judge import LinearPoint, Verdict
from recipes.configs import PretrainConfig
from recipes.report.card import covered, judgement, linear_control, verdict_in
from recipes.report.provenance import unreadable
from recipes.training.advice import advice
from recipes.training.pretraining import pretrain

pytestmark = pytest.mark.pictures


def verdict(**changes: Any) -> Verdict:
    """Of 30 % identified, 20 points above every baseline, on 500 samples."""
    names = ("linear", "copy", "untrained")
    found: dict[str, Any] = dict.fromkeys(Verdict.model_fields, 0.0)
    found |= {f"margin_{name}": 0.2 for name in names} | {f"margin_{name}_ci95": 0.01 for name in names}
    found |= {f"retrieval_top1_{name}": 0.1 for name in names}
    found |= {"retrieval_top1": 0.3, "samples": 500, "asked": 500, "clusters": 500, "retrieval_candidates": 64}
    found |= {"fitted_samples": 1000, "training_samples": 1000, "linear_features": 64, "linear_of": 64}
    found |= {
        "rivals_overlap": False,
        "collapsed": False,
        "linear_moved": None,
        "linear_moved_ci95": None,
        "counts": None,
    }
    found |= {"effective_rank_embedding": 4.0, "effective_rank_embedding_start": 5.0, "linear_curve": ()}
    return Verdict.model_construct(**found | {"loss_per_position": {}} | changes)


def against(name: str, margin: float) -> dict[str, float]:
    return {f"margin_{name}": margin, f"retrieval_top1_{name}": 0.3 - margin}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "LEARNED. "),
        (against("copy", 0.01), "LEARNED, BUT NO MORE THAN COPYING. The current token itself identifies 29.0%"),
        (
            against("linear", -0.2),
            "LEARNED, BUT LESS THAN LINEAR. A ridge regression on the previous tokens identifies 50",
        ),
        (
            {"retrieval_top1": 0.176, "margin_copy": -0.022, "margin_linear": -0.081}
            | {"retrieval_top1_copy": 0.198, "retrieval_top1_linear": 0.257},
            "LEARNED, BUT LESS THAN LINEAR. A ridge regression on the previous tokens identifies 25.7% of the next "
            "tokens, the predictor 17.6%.",
        ),
        (against("copy", -0.2) | against("linear", 0.009), "LEARNED, BUT LESS THAN COPYING"),
        (against("copy", -0.2) | against("untrained", 0.005), "NOTHING LEARNED"),
        ({"margin_untrained_ci95": None}, "NOT KNOWN"),  # one cluster
        ({"collapsed": True}, "COLLAPSED"),
    ],
)
def test_the_first_words_name_the_best_baseline_that_is_not_beaten(changes: dict[str, Any], words: str) -> None:
    """By more than the interval, 0.01."""
    assert judgement(verdict(**changes)).startswith(words)


STARVED = {"linear_moved": 0.05, "linear_moved_ci95": 0.01}


def test_a_starved_control_is_said_and_takes_the_verdict_where_the_margin_depends_on_it() -> None:
    curve = tuple(LinearPoint(samples=n, retrieval_top1=x) for n, x in ((250, 0.04), (500, 0.07), (1000, 0.1)))
    wide = verdict(**STARVED, linear_curve=curve, training_samples=4000)
    assert judgement(wide).startswith("LEARNED. ")
    (told,) = linear_control(wide)
    assert "fitted on 1,000 of 4,000 samples (identified 4.0% on 250, 7.0% on 500, 10.0% on 1,000)" in told
    assert "It is starved: the last doubling of its samples moved it by +5.0 points" in told
    assert "another such would leave a margin of +15.0; raise verdict.fit_samples" in told
    narrow = verdict(**STARVED, margin_linear=0.04, training_samples=4000)
    assert judgement(narrow).startswith("LEARNED, BUT THE LINEAR CONTROL IS STARVED")
    assert not narrow.beats_all
    whole = verdict(**STARVED, margin_linear=0.04)  # a control that had all that the network had is a fair one
    assert judgement(whole).startswith("LEARNED. ")
    assert "more would still make it stronger: the last doubling moved it by +5.0 points" in linear_control(whole)[0]
    fed = verdict(
        linear_moved=0.009, linear_moved_ci95=0.01, margin_linear=0.015, fitted_samples=600, linear_features=32
    )
    assert judgement(fed).startswith("LEARNED. ")
    assert linear_control(fed) == [
        "The linear control reads 32 of 64 numbers a sequence, fitted on 600 of 1,000 samples."
    ]
    (long,) = linear_control(verdict(linear_features=32, loss_per_position={"linear": [-0.5] * 33}))
    assert long.startswith(
        "The linear control reads 32 of 64 numbers a sequence for each target, of the tokens next to it"
    )


def test_the_interval_says_what_it_covers() -> None:
    assert "these samples alone; other seeds of the run differ" in covered(verdict())
    assert "3 independent groups of these samples alone (few for an interval); other" in covered(verdict(clusters=3))
    assert "8 independent groups of these samples alone" in covered(verdict(clusters=8, asked=500))
    assert "these samples alone" in covered(verdict(samples=100, clusters=64, asked=64)), "36 had too few rivals"


@pytest.mark.parametrize(
    ("changes", "found", "tried"),
    [
        ({}, {}, []),
        ({}, against("linear", -0.1), ["Rank and rate look sound here: try longer, another objective"]),
        (
            {},
            against("untrained", 0.0) | {"effective_rank_embedding": 1.0, "effective_rank_embedding_start": 1.0},
            ["The tokens were alike before training (effective rank 1.00)"],
        ),
        ({}, against("linear", -0.1) | {"effective_rank_embedding": 3.0}, ["The embeddings lost rank (5.0 to 3.0)"]),
        (
            {"model.layer_scale": 1e-5, "optim.lr": 1e-6},
            against("untrained", 0.0),
            ["model.layer_scale=1e-05 starves the blocks in a run of 10 steps", "The learning rate is small"],
        ),
        (
            {},
            dict.fromkeys([f"margin_{name}_ci95" for name in ("linear", "copy", "untrained")]),
            ["Hold out more data"],
        ),
        ({"recipe": "recipes.vision:digits"}, against("linear", -0.1), ["Only 10 of the recipe's 800 steps were done"]),
    ],
)
def test_what_to_try_comes_from_the_facts_of_the_run(
    tiny_recipe: PretrainConfig, changes: dict[str, Any], found: dict[str, Any], tried: list[str]
) -> None:
    said = advice(verdict(**found), override(tiny_recipe, changes), [{"step": 10}])
    assert len(said) == len(tried) <= 2
    assert all(text.startswith(words) for text, words in zip(said, tried, strict=True))


def test_all_structure_may_be_linear_only_where_a_linear_control_is_not_beaten(tiny_recipe: PretrainConfig) -> None:
    for name, expected in (("linear", True), ("copy", False)):
        (text,) = advice(verdict(**against(name, -0.1)), tiny_recipe, [{"step": 10}])
        assert ("where all structure is linear" in text) is expected


def test_the_verdict_of_a_run_of_before_still_opens() -> None:
    """Its summary has neither clusters nor the curve of the linear control."""
    whole = verdict().model_dump()
    for key in ("asked", "clusters", "rivals_overlap", "training_samples", "linear_features", "linear_of"):
        del whole[key]
    for key in ("linear_curve", "linear_moved", "linear_moved_ci95"):
        del whole[key]
    before = verdict_in(whole)
    assert judgement(before).startswith("LEARNED. ")
    assert linear_control(before) == []
    assert "these samples" not in covered(before)


def test_a_held_out_split_of_one_sample_is_refused_before_training(
    tiny_recipe: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = type(tiny_recipe.data).dataset
    one = lambda data, split: Subset(whole(data, split), range(1 if split == "test" else 48))  # noqa: E731
    monkeypatch.setattr(type(tiny_recipe.data), "dataset", one)
    with pytest.raises(UserError, match=r"held-out split has fewer than two samples \(1\), .*put more samples"):
        pretrain(tiny_recipe, Run(tmp_path / "run"), World(0, 1, torch.device("cpu")), show=False)
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_not_finite_is_said_in_one_line(tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    config = override(tiny_recipe, {"optim.lr": 1e4})
    with pytest.raises(UserError, match="NaN or infinity on held-out samples"):
        pretrain(config, Run(tmp_path), World(0, 1, torch.device("cpu")), show=False)


@pytest.mark.parametrize(
    ("training", "held_out", "line"),
    [
        (0, 0, []),
        (1, 0, ["1 training sample could not be read and was skipped."]),
        (0, 2, ["2 held-out samples could not be read and were skipped."]),
        (1, 2, ["1 training and 2 held-out samples could not be read and were skipped."]),
    ],
)
def test_samples_left_out_are_told(training: int, held_out: int, line: list[str]) -> None:
    assert unreadable({"unreadable_samples": training, "unreadable_held_out": held_out}) == line


def test_the_summary_counts_held_out_samples_left_out(tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    changes = {"data.unreadable": [1, 2], "train.max_unreadable": 0.5, "train.length.steps": 1}
    config = override(tiny_recipe, changes)
    summary = pretrain(config, Run(tmp_path), World(0, 1, torch.device("cpu")), show=False)
    assert summary["unreadable_held_out"] == 2
    assert summary["unreadable_held_out_messages"] == ["sample 1: torn", "sample 2: torn"]


def test_the_first_samples_left_out_are_named() -> None:
    messages = [f"{i}.wav: torn" for i in range(5)]
    summary = {"unreadable_samples": 5, "unreadable_messages": messages}
    summary |= {"unreadable_held_out": 1, "unreadable_held_out_messages": ["9.wav: is silent"]}
    assert unreadable(summary, "probe.json") == [
        "5 training and 1 held-out samples could not be read and were skipped.",
        *("  0.wav: torn", "  1.wav: torn", "  2.wav: torn"),
        "  and 2 more training ones, see unreadable_messages in probe.json",
        "  9.wav: is silent",
    ]
