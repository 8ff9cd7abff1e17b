"""nepa evaluate: held-out accuracy of a fine-tuned run, or of an imported fine-tuned checkpoint, without training.

The averaged weights are read, where there are any. Keys of the run can be set, such as data.root=DIR or
causal=true; what the network is can't.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.run import Run
from recipes.finetune import FinetuneConfig, accuracy, class_names, load_classifier
from recipes.pretrain import provenance
from recipes.targets import is_run, read_target
from recipes.weights import read_weights


class Options(BaseModel):
    """Options of `nepa evaluate`: none."""

    model_config = FROZEN


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    with world() as ranks:
        model = load_classifier(config, read_weights(target)).to(ranks.device)
        classes = model.head.classifier.out_features
        if len(class_names(config.data)) != classes:
            raise UserError(
                f"{target} was trained on {classes} classes and this data has {len(class_names(config.data))}; "
                "name the data it was trained for with data.root=DIR"
            )
        summary: dict[str, Any] = accuracy(config, model, ranks)
        if ranks.is_main:
            Run(Path(target)).write_summary(summary | {"made_with": provenance()}, "evaluate.json")
            print(f"Held-out accuracy: top-1 {summary['accuracy']:.2%}, top-5 {summary['top5']:.2%}.")


def read_config(target: str, changes: dict[str, Any]) -> FinetuneConfig:
    """The settings of a fine-tuned run, with changes."""
    if not is_run(target):
        raise UserError(f"{target} is not a run folder; name one of `nepa finetune` or `nepa import`")
    return read_target(FinetuneConfig, target, changes)
