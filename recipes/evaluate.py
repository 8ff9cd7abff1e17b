"""nepa evaluate: held-out figures of a fine-tuned, imported or segmentation run, without training.

The averaged weights are read, where there are any, and the pixels of held-out images are those that the run's recipe
or the imported checkpoint says (data.crop_ratio, data.squash); both are printed. Keys of the run can be set, such as
data.root=DIR, causal=true or, of a segmentation run, evaluation.scales=[0.75,1.0,1.25] evaluation.flip=true; what the
network is can't. The classes of the data must be those that the run was trained on, in number and, where both have
names, by their names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.run import Run
from recipes import segment
from recipes.finetune import FinetuneConfig, load_classifier, measure, scored_samples
from recipes.goals import FIGURES, Goal, Regression, find_goal
from recipes.pretrain import PretrainConfig
from recipes.segment import SegmentConfig
from recipes.segment_metrics import classes_in_truth, lonely, score_text
from recipes.segment_report import MEASURES
from recipes.targets import is_run, read_target, task_of
from recipes.training import at_work, provenance, unreadable
from recipes.weights import Weights, class_names, read_weights

FREE = (
    "data.",
    "causal",
    "evaluation.",
    "model.attention",
    "train.batch",
    "train.micro_batch",
    "train.workers",
    "train.precision",
    "train.max_unreadable",
)
"""Keys of a run, or beginnings of keys, that may be changed: they say what is measured, and how it is computed."""


class Options(BaseModel):
    """Options of `nepa evaluate`: none."""

    model_config = FROZEN


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    with world() as ranks, at_work(Run(Path(target)), ranks, trains=False):
        weights = read_weights(target)
        if isinstance(config, SegmentConfig):
            compare_classes(target, config.data.class_names(), ranks)
            summary = segment.evaluate(config, weights, ranks)
            present = classes_in_truth(summary)
            text = ", ".join(f"{name} {score_text(summary[name], present)}" for name in MEASURES)
            text += f", {summary['images']} images"
        else:
            left_out: set[str] = set()
            summary = dict(measured(config, weights, ranks, left_out))
            summary["unreadable_held_out_messages"] = sorted(left_out)
            shown = [figure for figure in FIGURES if figure.key in summary]
            text = ", ".join(f"{figure.title} {format(summary[figure.key], figure.form)}" for figure in shown)
            text += f", {scored_samples(summary, 'samples')}"
        if ranks.is_main:
            kind = "ema" if weights.averaged else "raw"
            seen = config.data.held_out_as()
            told = {"held_out_as": seen, "weights": kind, "made_with": provenance()}
            Run(Path(target)).write_summary(summary | told, "evaluate.json")
            if seen is not None:
                print(f"Held-out {seen}.")
            print(f"Held out: {text}, {'averaged' if weights.averaged else 'raw'} weights.")
            if isinstance(config, SegmentConfig):
                print("\n".join([class_lines(summary["classes"], classes_in_truth(summary)), *lonely(summary)]))
            for line in unreadable(summary, "evaluate.json"):
                print(line)


def measured(
    config: FinetuneConfig, weights: Weights, ranks: World, left_out: set[str] | None = None
) -> dict[str, float]:
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
            "data.root=DIR, or mend the names"
        )
    if ranks.is_main:
        print(f"The classes are named in two ways, and taken to be the same by number: {differing}.", file=sys.stderr)


def _plain(name: str) -> str:
    return name.partition(",")[0].replace("_", " ").strip().casefold()


def _numbered(names: Sequence[str]) -> bool:
    """Whether these are numbers in some dress, as classes without names are called."""
    return all(re.fullmatch(r"(LABEL_|class )?\d+", name) for name in names)


def class_lines(rows: Sequence[dict[str, Any]], present: int) -> str:
    """The IoU of every class as text; `present`: classes in the truth."""
    width = max(len(row["name"]) for row in rows)
    ious = (score_text(row["iou"], present, ".1%") for row in rows)
    return "\n".join(
        [f"{'class':<{width}}  IoU", *(f"{row['name']:<{width}}  {iou}" for row, iou in zip(rows, ious, strict=True))]
    )


def _in_words(goal: Goal) -> str:
    what = "numbers" if isinstance(goal, Regression) else "classes per token" if goal.per_token else "classes"
    return f"{goal.outputs} {what}"


def read_config(target: str, changes: dict[str, Any]) -> FinetuneConfig | SegmentConfig:
    """The settings of a fine-tuned or segmentation run, with changes.

    Raises:
        UserError: it is no such run, or a change is to what training decided.
    """
    if not is_run(target):
        raise UserError(f"{target} is not a run folder; name one of `nepa finetune`, `nepa import` or `nepa segment`")
    for key in changes:
        if not key.startswith(FREE):
            raise UserError(f"{key} can't be set for nepa evaluate, which trains nothing; what can: {', '.join(FREE)}")
    if task_of(target) == PretrainConfig.task:
        raise UserError(
            f"{target} was pre-trained only and has no head to evaluate: `nepa probe {target}` reads it out, "
            f"`nepa finetune {target}` trains one"
        )
    return read_target(SegmentConfig if task_of(target) == SegmentConfig.task else FinetuneConfig, target, changes)
