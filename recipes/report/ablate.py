"""Table, plot and page of nepa ablate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from recipes.report.page import Answer, Figure, Heading, Part, Report, Table, Words
from recipes.report.plots import interval_plot, line_plot
from recipes.report.summaries import AblateSummary
from recipes.report.tables import TESTED, difference_table, margin_cell, margin_note, text_table
from recipes.statistics.significance import Difference, Spread

Key = Literal["objective", "loss", "retrieval_top1", "effective_rank_embedding", "probe_best", "probe_final"]
COLUMNS: dict[Key, tuple[str, str]] = {
    "objective": ("objective", ".3f"),
    "loss": ("next-token loss", ".3f"),
    "retrieval_top1": ("identified", ".3f"),
    "effective_rank_embedding": ("rank", ".1f"),
    "probe_best": ("probe, best layer", ".3f"),
    "probe_final": ("probe, final norm", ".3f"),
}
"""Key of an arm -> its head and how numbers are written."""


def table(result: AblateSummary) -> list[list[str]]:
    """Head and one row an arm, mean ± standard deviation over seeds."""
    count = len(result["seeds"])

    def cell(found: Spread, form: str) -> str:
        return f"{found['mean']:{form}}" + (f" ± {found['std']:{form}}" if count > 1 else "")

    lines = [
        [name, *(cell(arm[key], form) for key, (_, form) in COLUMNS.items()), f"{arm['collapsed']} of {count}"]
        for name, arm in result["arms"].items()
    ]
    return [["", *(title for title, _ in COLUMNS.values()), "collapsed"], *lines]


def render(result: AblateSummary) -> str:
    """The table as text."""
    return f"{text_table(table(result))}\n\n{_foot(result)}\n\n{_margins(result)}\n\n{result['verdict']}"


def _margins(result: AblateSummary) -> str:
    """Identification beyond the linear baseline, arm by arm."""
    told = "; ".join(f"{name} {margin_cell(each)}" for name, each in result["margins"].items())
    return f"{margin_note(result['margins'])} {told}."


def _foot(result: AblateSummary) -> str:
    random = result["random_init"]
    return (
        f"Mean ± standard deviation over {len(result['seeds'])} seeds, held-out data. Rank is the effective rank of "
        f"the embeddings, {result['effective_rank_embedding_start']:.1f} before training. Linear probe without "
        f"pre-training: random weights {random['mean']:.3f} ± {random['std']:.3f}, raw tokens "
        f"{result['raw_tokens']:.3f}."
    )


def report(result: AblateSummary) -> Report:
    """The answer, probe accuracy by arm, the table, the paired tests, rank over training by arm."""
    return Report(f"Ablations: {result['recipe']}", render(result), result["made_with"], lambda: _parts(result))


def _parts(result: AblateSummary) -> Iterator[Part]:
    arms = result["arms"]
    yield Answer(result["verdict"])
    yield Figure(
        "probe.png",
        "Linear probe of the best layer, chosen on held-back training samples, from the best arm down: mean ± "
        "standard deviation, a dot a seed.",
        interval_plot(
            {name: measures["probe_best"] for name, measures in arms.items()},
            x="probe accuracy",
            reference={"random weights": result["random_init"]["mean"], "raw tokens": result["raw_tokens"]},
            half="std",
        ),
    )
    yield Table(table(result), "accuracy")
    yield Words([_foot(result), _margins(result)])
    if found := [Difference(**each) for each in result["differences"]]:  # none of fewer than three seeds
        yield Heading("Paired tests", "tests")
        yield Words([TESTED])
        yield Table(difference_table(found))
    yield Figure(
        "rank.png",
        f"Effective rank of the embeddings over training (seed {result['seeds'][0]}).",
        line_plot(
            {
                name: (
                    [step for step, _ in measures["rank_over_training"]],
                    [rank for _, rank in measures["rank_over_training"]],
                )
                for name, measures in arms.items()
            },
            x="step",
            y="effective rank",
            from_zero=True,
        ),
    )
