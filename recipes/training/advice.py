"""What to try where a verdict is not what one hoped for, from the run's own facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nepa_core.basics import UserError
from nepa_core.verdict.judge import Verdict
from recipes.configs import PretrainConfig
from recipes.resolve import find_recipe

ALIKE = 1.05
"""Rank before training below which there is next to nothing in the tokens to predict."""
RANK_LOST = 0.7
"""Share of the rank before training below which a loss of rank is the first thing to look at."""
SMALL_SCALE, LONG_RUN, SMALL_RATE = 0.01, 10_000, 3e-5
"""LayerScale that starves runs shorter than that many steps, and a rate at which little moves."""
JUDGED = 6
"""Held-out figures from which a curve says whether it still falls."""


def advice(verdict: Verdict, config: PretrainConfig, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """At most two lines on what to try where nothing, or no more than a baseline says, was learned: the run's facts."""
    if not verdict.collapsed and verdict.beats_all:
        return []
    if not verdict.collapsed and not verdict.has_intervals:
        return ["Hold out more data: two samples that don't depend on each other are needed, and dozens are better."]
    found = []
    rank, start = verdict.effective_rank_embedding, verdict.effective_rank_embedding_start
    lr, scale = config.optim.peak(config.train.batch), config.model.layer_scale
    steps = int(metrics[-1]["step"]) if metrics else 0
    wanted = recipe_steps(config.recipe)
    if start < ALIKE:
        return [
            f"The tokens were alike before training (effective rank {start:.2f}): look at the data by `nepa inspect`."
        ]
    if rank < RANK_LOST * start:
        found.append(
            f"The embeddings lost rank ({start:.1f} to {rank:.1f}): lower optim.lr (its peak was {lr:.1e})"
            + (
                f" or start with a larger model.layer_scale (it was {scale:g})."
                if scale is not None and scale < 1
                else "."
            )
        )
    if scale is not None and scale < SMALL_SCALE and steps < LONG_RUN:
        found.append(
            f"model.layer_scale={scale:g} starves the blocks in a run of {steps:,} steps: 1.0 suits runs below some "
            f"{LONG_RUN:,}."
        )
    if wanted is not None and steps < wanted:
        found.append(f"Only {steps:,} of the recipe's {wanted:,} steps were done: train longer.")
    elif (fell := still_falling(metrics)) is not None:
        found.append(
            f"The held-out objective still fell, by {fell:.0%} of all it fell, in the last fifth: train longer."
        )
    if not verdict.beats_untrained and lr < SMALL_RATE:
        found.append(f"The learning rate is small (optim.lr peaks at {lr:.1e}): try ten times as much.")
    if not found:
        linear = "" if verdict.beats_linear else "; where all structure is linear, nothing more can be learned"
        long_enough = wanted is not None or len(_held_out(metrics)) >= JUDGED
        sound = (
            "Rank, rate and length look sound here: try"
            if long_enough
            else "Rank and rate look sound here: try longer,"
        )
        found.append(f"{sound} another objective (`nepa objectives RECIPE`) or tokens of another size{linear}.")
    return found[:2]


def recipe_steps(recipe: str) -> int | None:
    """Steps that a built-in recipe has, where it counts in steps; nothing is imported but our own."""
    if not recipe.startswith("recipes."):
        return None
    try:
        preset = find_recipe(recipe)()
    except UserError:  # a recipe of another version, or a file that says something else
        return None
    steps: int | None = preset.train.length.steps
    return steps


def still_falling(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """The last fifth's share of the fall of the held-out objective, where it is above a tenth."""
    lines = _held_out(metrics)
    if len(lines) < JUDGED:
        return None
    late = lines[-1 - len(lines) // 5] - lines[-1]
    share = late / max(lines[0] - lines[-1], 1e-12)
    return share if share > 0.1 and late > 0 else None


def _held_out(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """The held-out objective over training."""
    return [line["held_out_objective"] for line in metrics if "held_out_objective" in line]
