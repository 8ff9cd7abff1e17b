"""Held-out figures of a finished run."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from nepa_core.basics import UserError
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import Weights, class_names
from recipes.configs import FinetuneConfig
from recipes.networks.goals import Goal, Regression, find_goal
from recipes.report.summaries import HeldOutFigures
from recipes.statistics.segment_metrics import ClassIou, score_text
from recipes.training.finetuning import load_classifier, measure


def measured(
    config: FinetuneConfig, weights: Weights, ranks: World, left_out: set[str] | None = None
) -> HeldOutFigures:
    """Held-out figures of a fine-tuned or imported run; see `finetune.measure`.

    Raises:
        UserError: the data has other targets than the run was trained on.
    """
    model, target = load_classifier(config, weights).to(ranks.device), weights.source
    goal = find_goal(config.data)
    told, wanted = map(_in_words, (goal, model.goal))
    if told != wanted:
        raise UserError(
            f"{target} was trained on {wanted} and this data has {told}; name the data it was trained for with "
            "data.root=DIR"
        )
    compare_classes(target, goal.names or (), ranks)
    return measure(config, model, ranks, left_out=left_out)


def compare_classes(run: str, data: Sequence[str], ranks: World) -> None:
    """Compare the names of the data's classes with those that a run has written down.

    Case, underscores and synonyms behind a comma don't count ("tench, Tinca tinca", "Tench"). Lists that differ and
    share a name are of other classes, or of the same in another order: every figure would be wrong. Lists without a
    name in common may well name the same classes in two ways (ImageNet's n01440764 and "tench"), so these are
    measured, and a line on stderr says what is compared with what. Numbers are no names.

    Raises:
        UserError: the lists share names and differ; the message has the first places where they do.
    """
    trained = class_names(Run(Path(run)))
    pairs = [
        (number, one, other)
        for number, (one, other) in enumerate(zip(trained, data, strict=False))
        if _plain(one) != _plain(other)
    ]
    if not pairs or _numbered(trained) or _numbered(data):
        return
    differing = ", ".join(f"{number} is {one!r} there and {other!r} here" for number, one, other in pairs[:6])
    differing += f" and {len(pairs) - 6} more" if len(pairs) > 6 else ""
    if {*map(_plain, trained)} & {*map(_plain, data)}:
        raise UserError(
            f"the classes of {run} and of this data differ: {differing}; name the data it was trained for with "
            "data.root=DIR, or fix the names"
        )
    if ranks.is_main:
        print(f"The classes are named in two ways, and taken to be the same by number: {differing}.", file=sys.stderr)


def _plain(name: str) -> str:
    return name.partition(",")[0].replace("_", " ").strip().casefold()


def _numbered(names: Sequence[str]) -> bool:
    """Whether these are numbers in some dress, as classes without names are called."""
    return all(re.fullmatch(r"(LABEL_|class )?\d+", name) for name in names)


def class_lines(rows: Sequence[ClassIou], present: int) -> str:
    """The IoU of every class as text; `present`: classes in the truth."""
    width = max(len(row["name"]) for row in rows)
    ious = (score_text(row["iou"], present, ".1%") for row in rows)
    return "\n".join(
        [f"{'class':<{width}}  IoU", *(f"{row['name']:<{width}}  {iou}" for row, iou in zip(rows, ious, strict=True))]
    )


def _in_words(goal: Goal) -> str:
    if isinstance(goal, Regression):
        return f"{goal.outputs} numbers"
    return f"{goal.outputs} classes{', several a sample' if goal.whole else ' per token' if goal.per_token else ''}"
