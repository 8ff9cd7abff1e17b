"""nepa push: a run on the Hugging Face hub, OWNER/NAME, with a model card made from its verdict and its probe.

The card (README.md) says what was learned, what is not known, how to load it and what it needs, and has the data, the
settings, and beside the figures the command, commit and device. Raw and averaged weights go along, and the run's
config.json byte for byte, paths such as data.root in it; neither the state of the optimiser nor data nor code does.
dry_run=true writes the folder and asks no network: look at it first.

The name is then taken by `nepa_core.load`, init= and every task that reads weights by name. layout=released writes the
layout of `nepa export` instead. Who may push is decided by `hf auth login`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import holding, lock_beside
from nepa_core.runtime.run import Run, reading_back
from recipes.readout import probing
from recipes.released.pushing import PushOptions as Options
from recipes.released.pushing import name_on_hub, push
from recipes.report import card, finetune, segment
from recipes.report.summaries import FinetuneSummary, PretrainSummary, ProbeSummary, SegmentSummary
from recipes.resolve import read_network

FREE = ()
"""Keys of the run that may be changed: none, it is pushed as it is."""


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    name_on_hub(options.to)
    if changes:
        raise UserError(f"nepa push hands on a run as it is; {next(iter(changes))} is not one of its options")
    if options.out is not None and not options.dry_run:
        raise UserError(f"out={options.out} is the folder of dry_run=true; leave it out")
    config, run = read_network(target, {}, free=FREE, task="push"), Run(Path(target))
    out = Path(options.out or run.path / "push")
    with world() as ranks:
        if ranks.is_main:
            with holding(out, trains=False, lock=lock_beside(out)):
                print(push(run, config, options, said(run, config)))


def said(run: Run, config: Any) -> dict[str, str]:
    """What the tasks said of a run, by the heading on its card."""
    found = {}
    with reading_back(run.path / "summary.json"):
        if config.task == "pretrain" and (trained := run.summary_of(PretrainSummary)) is not None:
            found["What was learned"] = card.render(trained, config.data)
        if config.task == "finetune" and (tuned := run.summary_of(FinetuneSummary)) is not None:
            found["What was learned"] = "\n".join([finetune.render(tuned), "", *finetune.verdict(tuned, run)])
        if config.task == "segment" and (segmented := run.summary_of(SegmentSummary)) is not None:
            found["What was learned"] = segment.render(segmented, run)
    with reading_back(run.path / "probe.json"):
        if (probed := run.summary_of(ProbeSummary, "probe.json")) is not None:
            found["What the features are worth"] = probing.render(probed)
    return found
