"""The classes of recipes/report/summaries.py. That files keep to them is asked where tests make these files."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.report.summaries import FinetuneSummary, OrdersSummary, PretrainSummary, ProbeSummary
from tests.summaries import undeclared

SPREAD = {"values": [0.5], "mean": 0.5, "std": 0.0, "ci95": None}


@pytest.mark.parametrize(
    ("value", "kind", "places"),
    [
        ({"loss": -0.5, "linear_moved": None, "credits": {"model": "bits:", "clusters": None}}, PretrainSummary, []),
        ({"loss": -0.5, "baseline_copied": 0.1}, PretrainSummary, [".baseline_copied"]),
        ({"loss": "-0.5", "steps": 1.5}, PretrainSummary, [".loss", ".steps"]),
        ({"accuracy_ema": 1, "finetuned_10": 1.0}, FinetuneSummary, [".finetuned_10"]),
        ({"layers": [{"name": "embedding", "scores": {"knn": {"acuracy": 0.5}}}]}, ProbeSummary,
         [".layers[0].scores['knn'].acuracy"]),
        ({"orders": {"raster": {"finetuned_10_random": SPREAD, "probe": SPREAD, "both": 0.1}}}, OrdersSummary, []),
        ({"orders": {"raster": {"finetuned_10": 0.5, "probe": SPREAD | {"median": 0.5}}}}, OrdersSummary,
         [".orders['raster'].finetuned_10", ".orders['raster'].probe.median"]),
    ],
)  # fmt: skip
def test_a_key_that_no_class_declares_is_found_at_any_depth(value: Any, kind: type, places: list[str]) -> None:
    assert [line.partition(" ")[0] for line in undeclared(value, kind)] == places
