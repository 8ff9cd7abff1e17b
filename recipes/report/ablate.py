"""Table, plot and page of nepa ablate."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nepa_core.runtime.checkpoint import disk_errors
from recipes.report.page import Figure, compose
from recipes.report.plots import interval_plot, line_plot
from recipes.report.tables import (
    TESTED,
    Column,
    Rows,
    difference_table,
    html_table,
    margin_cell,
    margin_note,
    spread_table,
    text_table,
)
from recipes.statistics.significance import Difference

COLUMNS = (
    Column("objective", "objective"),
    Column("loss", "next-token loss"),
    Column("retrieval_top1", "identified"),
    Column("effective_rank_embedding", "rank", ".1f"),
    Column("probe_best", "probe, best layer"),
    Column("probe_final", "probe, final norm"),
)


def table(result: dict[str, Any]) -> list[list[str]]:
    """Head and one row an arm, mean ± standard deviation over seeds."""
    rows: Rows = {
        name: [{c.key: arm[c.key]["values"][i] for c in COLUMNS} for i in range(len(result["seeds"]))]
        for name, arm in result["arms"].items()
    }
    head, *lines = spread_table(rows, COLUMNS, half="std")
    collapsed = [f"{arm['collapsed']} of {len(result['seeds'])}" for arm in result["arms"].values()]
    return [[*head, "collapsed"], *([*line, cell] for line, cell in zip(lines, collapsed, strict=True))]


def render(result: dict[str, Any]) -> str:
    """The table as text."""
    return f"{text_table(table(result))}\n\n{_foot(result)}\n\n{_margins(result)}\n\n{result['verdict']}"


def _margins(result: dict[str, Any]) -> str:
    """Identification beyond the linear baseline, arm by arm."""
    told = "; ".join(f"{name} {margin_cell(each)}" for name, each in result["margins"].items())
    return f"{margin_note(result['margins'])} {told}."


def _foot(result: dict[str, Any]) -> str:
    random = result["random_init"]
    return (
        f"Mean ± standard deviation over {len(result['seeds'])} seeds, held-out data. Rank is the effective rank of "
        f"the embeddings, {result['effective_rank_embedding_start']:.1f} before training. Linear probe without "
        f"pre-training: random weights {random['mean']:.3f} ± {random['std']:.3f}, raw tokens "
        f"{result['raw_tokens']:.3f}."
    )


def write_report(folder: Path, title: str, result: dict[str, Any]) -> None:
    """PNGs and a page: the answer, probe accuracy by arm, the table, rank over training by arm."""
    arms = result["arms"]
    parts: list[str | Figure] = [
        f'<div id="answer"><p><strong>{html.escape(result["verdict"])}</strong></p></div>',
        Figure(
            "probe.png",
            "Linear probe of the best layer, chosen on held-back training samples, from the best arm down: mean ± "
            "standard deviation, a dot a seed.",
            interval_plot(
                {name: measures["probe_best"] for name, measures in arms.items()},
                x="probe accuracy",
                reference={"random weights": result["random_init"]["mean"], "raw tokens": result["raw_tokens"]},
                half="std",
            ),
        ),
        f"{html_table(table(result))}<p>{html.escape(_foot(result))}</p><p>{html.escape(_margins(result))}</p>",
        *_tests(result),
        Figure(
            "rank.png",
            f"Effective rank of the embeddings over training (seed {result['seeds'][0]}).",
            line_plot(
                {name: _columns(measures["rank_over_training"]) for name, measures in arms.items()},
                x="step",
                y="effective rank",
                from_zero=True,
            ),
        ),
    ]
    made = ", ".join(f"{name} {value}" for name, value in result["made_with"].items())
    with disk_errors(folder):
        compose(folder, title=title, parts=parts, foot=made)


def _tests(result: dict[str, Any]) -> list[str]:
    """The paired tests of every arm against the base; none of fewer than three seeds."""
    found = [Difference(**each) for each in result["differences"]]
    return [f"<p>{html.escape(TESTED)}</p>{html_table(difference_table(found))}"] if found else []


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [rank for _, rank in points]
