"""nepa finetune: train the whole network on targets, starting from pre-trained weights or from random ones.

What is taught follows from the samples: an integer "label" is a class, a float one [K] is regression, a "target" [N]
of integers is a class per token (see `recipes.networks.goals`).

RECIPE is a fine-tuning recipe, or a pre-training one, which then gives the data and the network to a short general
setting; a RUN of `nepa pretrain` or `nepa import` is both recipe and `init=`, and one of `nepa finetune` is trained
to its end or, with out=DIR, once more from its own start. `init=` takes a run, a folder in the released layout or a
hub name; null starts from random weights. Reported are the raw and the averaged weights after the last step, never
the best step on the held-out data.

After the run its control is trained in RUN/control: the same from random weights, with an embedder that learns
(control=false leaves it out). The verdict is the difference between the two, with a 95 % interval that is paired over
held-out samples, of the averaged weights where there are any.

`folds=all` trains and judges a run for each fold of the data in RUN/fold-NAME, that fold held out (`folds=1,2` only
those), and reports every figure with mean and sample standard deviation over the folds that are finished in RUN. The
same command goes on where it stopped.

`beside=timm:NAME` trains a model of timm the same in RUN/beside, from its own weights (`timm:NAME@FILE.safetensors`
takes them from a file, `pretrained=false` leaves them random), and adds it to the verdict: the same data, augmentation,
mixing, optimiser, schedule, average and steps, at the image size, mean and std of its own data config. Layer decay
follows timm's grouping of its layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from modalities.data.listing import say
from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.config import listed
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run, is_imported
from recipes.configs import FinetuneConfig
from recipes.networks.backbones import check_beside
from recipes.options import once
from recipes.presets import SHORT
from recipes.report import folds as report_of_folds
from recipes.report.finetune import report, verdict
from recipes.report.provenance import rendered
from recipes.resolve import default_out, is_of
from recipes.training.finetuning import beside_config, beside_control, finetune, read_config, untaught
from recipes.training.folds import chosen_folds, finetune_folds


class Options(BaseModel):
    """Options of `nepa finetune`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="run folder; default runs/NAME-finetune")
    control: bool = Field(default=True, description="train the same from random weights, too, in RUN/control")
    beside: Annotated[tuple[str, ...], BeforeValidator(listed), AfterValidator(once)] = Field(
        default=(), description="models of timm to train the same, timm:NAME or timm:NAME@FILE.safetensors"
    )
    folds: Annotated[tuple[str, ...], BeforeValidator(listed), AfterValidator(once)] = Field(
        default=(), description="all, or some folds of the data, 1,2,3: a run for each, held out in turn"
    )
    pretrained: bool = Field(default=True, description="timm's weights; false: random ones where no file is named")

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        check_beside(self.beside, pretrained=self.pretrained)
        return self


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    run = Run(Path(options.out or default_out(target, "finetune")))
    own = is_of(FinetuneConfig, target) and not is_imported(target)
    before = run.summary() is not None
    if options.folds:
        over_folds(config, run, options, changes, setting="" if own else SHORT)
        return
    others = [beside_config(config, name, pretrained=options.pretrained) for name in options.beside]
    with world() as ranks, at_work(run, ranks, trains=True):
        if ranks.is_main and not before and (line := untaught(config.data)) is not None:
            say(line)
        summary = finetune(config, run, ranks, setting="" if own else SHORT)
        if ranks.is_main:
            print(rendered(lambda: report(run, summary), run, before=before), flush=True)  # the control takes as long
        if others or (options.control and config.init is not None):
            summary = beside_control(config, run, ranks, summary, control=options.control, others=others)
        if ranks.is_main:
            print("\n".join(["", *verdict(summary, run)]))


def over_folds(config: FinetuneConfig, run: Run, options: Options, changes: dict[str, Any], *, setting: str) -> None:
    """A run for each fold, and all of them beside each other."""
    if changes.get("data.fold") is not None:
        raise UserError("folds= holds out one fold after another: leave data.fold out")
    folds = chosen_folds(config.data, options.folds)
    with world() as ranks, at_work(run, ranks, trains=True, goes_on=True):
        summary = finetune_folds(
            config,
            run,
            ranks,
            folds,
            setting=setting,
            control=options.control,
            beside=options.beside,
            pretrained=options.pretrained,
        )
        if ranks.is_main:
            print(report_of_folds.report(run, summary).text(run.report))
