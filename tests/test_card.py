from pathlib import Path

import pytest
import torch

from nepa_core.diagnostics import Verdict
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.card import judgement
from recipes.pretrain import PretrainConfig, pretrain
from recipes.training import unreadable


@pytest.mark.parametrize(
    ("margins", "words"),
    [
        ({}, "LEARNED. "),
        ({"copy": 0.01}, "LEARNED, BUT NO MORE THAN COPYING"),
        ({"copy": -0.2, "linear": 0.009}, "LEARNED, BUT NO MORE THAN LINEAR"),
        ({"copy": -0.2, "linear": -0.1, "untrained": 0.005}, "NOTHING LEARNED"),
    ],
)
def test_the_first_words_name_a_baseline_that_is_not_beaten(margins: dict[str, float], words: str) -> None:
    """By more than the interval, 0.01."""
    names = ("linear", "copy", "untrained")
    values = {f"margin_{name}": margins.get(name, 0.3) for name in names}
    intervals = {f"margin_{name}_ci95": 0.01 for name in names}
    rank = {"effective_rank_embedding": 2.0, "effective_rank_embedding_start": 5.0}
    assert judgement(Verdict.model_construct(**values, **intervals, **rank, collapsed=False)).startswith(words)
    assert judgement(Verdict.model_construct(**values, **intervals, **rank, collapsed=True)).startswith("COLLAPSED")


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
