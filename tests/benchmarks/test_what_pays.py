"""benchmarks.what_pays: pages follow from the kept figures, and every declared test counts in the correction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import what_pays
from benchmarks.what_pays import (
    FROZEN,
    PAGES,
    RIVALS,
    TASKS,
    Found,
    Task,
    filled,
    full_table,
    read_kept,
    real,
    short_table,
    signed,
)
from recipes.comparison import engine, measures
from recipes.comparison.objectives import REFERENCE
from recipes.report.objectives import RANDOM


def made(p: float, p_both: float, mean: float = 0.05) -> Found:
    spread: Any = {"values": [0.5, 0.6], "mean": 0.55, "std": 0.07, "ci95": 0.6, "both": 0.7}
    test: Any = {"mean": mean, "half": 0.01, "p": p, "p_both": p_both}
    keys = ("probe", "finetuned_all")
    return {
        "frozen": FROZEN,
        "seeds": [0, 1],
        "spreads": {key: dict.fromkeys((REFERENCE, FROZEN, RANDOM), spread) for key in keys},
        "tests": {key: dict.fromkeys(RIVALS, test) for key in keys},
        "raw_tokens": 0.5,
        "made_with": {},
    }


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_are_what_the_kept_figures_make(name: str) -> None:
    page = PAGES[name].read_text()
    assert filled(page, name, read_kept()) == page, "run python -m benchmarks.what_pays table"


def test_holm_counts_every_declared_test_and_both_p_are_needed() -> None:
    declared = 2 * sum(len(task.measures) for task in TASKS)
    just = 0.04 / declared
    assert len(real({"GunPoint": made(just, just)})) == 4
    assert not real({"GunPoint": made(0.06 / declared, just)})  # beyond, though four tests alone would let it pass
    assert not real({"GunPoint": made(just, 0.06 / declared)})


def test_tables_name_what_is_not_finished_and_set_bold_what_stands() -> None:
    lines = full_table({"GunPoint": made(1e-9, 1e-9, mean=-0.02)})
    assert sum("not finished" in line for line in lines) == len(TASKS) - 1
    assert sum("**-2.0 ± 1.0**" in line for line in lines) == 2
    (line,) = short_table({"GunPoint": made(0.5, 0.5)})[2:]
    assert line == "| GunPoint | +5.0 ± 1.0 | +5.0 | +5.0 ± 1.0 |"


def test_a_difference_that_rounds_to_nothing_has_no_minus() -> None:
    assert signed(-0.0002, 0.01) == "+0.0 ± 1.0"
    assert signed(-0.0123, 0.01) == "-1.2 ± 1.0"


def test_a_block_is_replaced_between_its_marks_alone() -> None:
    page = "before\n<!-- what-pays-short -->\nold\n<!-- end of what-pays-short -->\nbehind\n"
    new = filled(page, "what-pays-short", {})
    assert "old" not in new
    assert new.startswith("before\n<!-- what-pays-short -->\n")
    assert new.endswith("<!-- end of what-pays-short -->\nbehind\n")
    assert filled(new, "what-pays-short", {}) == new


@pytest.mark.parametrize("lost", ["<!-- what-pays-short -->", "<!-- end of what-pays-short -->"])
def test_a_page_that_lost_a_mark_is_refused(lost: str) -> None:
    page = "before\n<!-- what-pays-short -->\nold\n<!-- end of what-pays-short -->\n"
    for wrong in (page.replace(lost, ""), page + page):
        with pytest.raises(ValueError, match="the page needs <!-- what-pays-short --> once"):
            filled(wrong, "what-pays-short", {})


@pytest.mark.slow
def test_a_task_is_measured_and_tested_against_both_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(what_pays, "SEEDS", (0, 1, 2))
    few = {"learning_rates": (1e-3,), "finetune_steps": (3,), "finetune_causal": (False,)}
    monkeypatch.setattr(engine, "share", lambda jobs, workers: engine.work_through(jobs))
    monkeypatch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 48, "test_samples": 48}))
    task = Task("waves", "waves", "tests.tiny:recipe", {"train.length.steps": 6}, (2,), few)
    found = what_pays.run(task, tmp_path, tmp_path, workers=1)
    assert found["seeds"] == [0, 1, 2]
    for key in task.measures:
        values = {name: found["spreads"][key][name]["mean"] for name in (FROZEN, *RIVALS)}
        for rival in RIVALS:
            assert found["tests"][key][rival]["mean"] == pytest.approx(values[FROZEN] - values[rival], abs=1e-6)
            assert 0 <= found["tests"][key][rival]["p_both"] <= 1
