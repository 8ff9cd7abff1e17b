"""nepa evaluate: held-out figures of a fine-tuned, imported or segmentation run, without training.

The averaged weights are read, where there are any, and the pixels of held-out images are those that the run's recipe
or the imported checkpoint says (data.crop_ratio, data.squash); both are printed. Keys of the run can be set, such as
data.root=DIR, causal=true or, of a segmentation run, evaluation.scales=[0.75,1.0,1.25] evaluation.flip=true; what the
network is can't. The classes of the data must be those that the run was trained on, in number and, where both have
names, by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run, is_run, refuse_holder, task_of
from nepa_core.runtime.weights import read_weights
from recipes.configs import FinetuneConfig, PretrainConfig, SegmentConfig
from recipes.networks.goals import FIGURES
from recipes.report.finetune import scored_samples
from recipes.report.provenance import provenance, unreadable
from recipes.report.segment import MEASURES
from recipes.report.summaries import EvaluateSummary
from recipes.resolve import read_target
from recipes.statistics.segment_metrics import classes_in_truth, lonely, score_text
from recipes.training import segmentation
from recipes.training.evaluating import class_lines, compare_classes, measured

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
            summary: EvaluateSummary = segmentation.evaluate(config, weights, ranks)
            present = classes_in_truth(summary)
            text = ", ".join(f"{name} {score_text(summary[name], present)}" for name in MEASURES)
            text += f", {summary['images']} images"
        else:
            left_out: set[str] = set()
            config = config.model_copy(update={"data": config.data.as_trained_on(weights.data)})
            summary = {**measured(config, weights, ranks, left_out), "unreadable_held_out_messages": sorted(left_out)}
            shown = [figure for figure in FIGURES if figure.key in summary]
            text = ", ".join(f"{figure.title} {format(summary[figure.key], figure.form)}" for figure in shown)
            text += f", {scored_samples(summary, 'samples')}"
        if ranks.is_main:
            kind = "ema" if weights.averaged else "raw"
            seen = config.data.held_out_as()
            summary |= {"held_out_as": seen, "weights": kind, "made_with": provenance()}
            Run(Path(target)).write_summary(summary, "evaluate.json")
            if seen is not None:
                print(f"Held-out {seen}.")
            print(f"Held out: {text}, {'averaged' if weights.averaged else 'raw'} weights.")
            if isinstance(config, SegmentConfig):
                print("\n".join([class_lines(summary["classes"], classes_in_truth(summary)), *lonely(summary)]))
            for line in unreadable(summary, "evaluate.json"):
                print(line)


def read_config(target: str, changes: dict[str, Any]) -> FinetuneConfig | SegmentConfig:
    """The settings of a fine-tuned or segmentation run, with changes.

    Raises:
        UserError: it is no such run, or a change is to what training decided.
    """
    if not is_run(target):
        refuse_holder(target)
        raise UserError(f"{target} is not a run folder; name one of `nepa finetune`, `nepa import` or `nepa segment`")
    for key in changes:
        if not key.startswith(FREE):
            raise UserError(f"{key} can't be set for nepa evaluate, which trains nothing; what can: {', '.join(FREE)}")
    if task_of(target) == PretrainConfig.task:
        raise UserError(
            f"{target} was pre-trained only and has no head to evaluate: `nepa probe {target}` reads it out, "
            f"`nepa finetune {target}` trains one"
        )
    if task_of(target) == SegmentConfig.task:
        return read_target(SegmentConfig, target, changes)
    return read_target(FinetuneConfig, target, changes)
