"""nepa evaluate: held-out figures of a fine-tuned, imported or segmentation run, without training.

The averaged weights are read, where there are any. Keys of the run can be set, such as data.root=DIR, causal=true
or, of a segmentation run, evaluation.scales=[0.75,1.0,1.25] evaluation.flip=true; what the network is can't.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.run import Run
from recipes import segment
from recipes.finetune import FinetuneConfig, load_classifier, measure
from recipes.goals import FIGURES, Goal, Regression, find_goal
from recipes.segment import SegmentConfig
from recipes.targets import is_run, read_target, task_of
from recipes.training import provenance
from recipes.weights import read_weights

FREE = (
    "data.",
    "causal",
    "evaluation.",
    "model.attention",
    "train.batch",
    "train.micro_batch",
    "train.workers",
    "train.precision",
)
"""Keys of a run, or beginnings of keys, that may be changed: they say what is measured, and how it is computed."""


class Options(BaseModel):
    """Options of `nepa evaluate`: none."""

    model_config = FROZEN


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    with world() as ranks:
        if isinstance(config, SegmentConfig):
            summary = segment.evaluate(config, read_weights(target), ranks)
            text = f"mIoU {summary['mIoU']:.2%}, mAcc {summary['mAcc']:.2%}, aAcc {summary['aAcc']:.2%}"
        else:
            summary = dict(measured(config, target, ranks))
            shown = [figure for figure in FIGURES if figure.key in summary]
            text = ", ".join(f"{figure.title} {format(summary[figure.key], figure.form)}" for figure in shown)
        if ranks.is_main:
            Run(Path(target)).write_summary(summary | {"made_with": provenance()}, "evaluate.json")
            print(f"Held out: {text}.")


def measured(config: FinetuneConfig, target: str, ranks: World) -> dict[str, float]:
    """Held-out figures of a fine-tuned or imported run.

    Raises:
        UserError: the data has other targets than the run was trained on.
    """
    model = load_classifier(config, read_weights(target)).to(ranks.device)
    told, wanted = (_in_words(goal) for goal in (find_goal(config.data), model.goal))
    if told != wanted:
        raise UserError(
            f"{target} was trained on {wanted} and this data has {told}; name the data it was trained for with "
            "data.root=DIR"
        )
    return measure(config, model, ranks)


def _in_words(goal: Goal) -> str:
    what = "numbers" if isinstance(goal, Regression) else "classes per token" if goal.per_token else "classes"
    return f"{goal.outputs} {what}"


def read_config(target: str, changes: dict[str, Any]) -> FinetuneConfig | SegmentConfig:
    """The settings of a fine-tuned or segmentation run, with changes."""
    if not is_run(target):
        raise UserError(f"{target} is not a run folder; name one of `nepa finetune`, `nepa import` or `nepa segment`")
    for key in changes:
        if not key.startswith(FREE):
            raise UserError(f"{key} can't be set for nepa evaluate, which trains nothing; what can: {', '.join(FREE)}")
    return read_target(SegmentConfig if task_of(target) == SegmentConfig.task else FinetuneConfig, target, changes)
