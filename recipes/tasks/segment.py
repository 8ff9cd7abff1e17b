"""nepa segment: train the whole network to name the class of every pixel, from pre-trained weights or random ones.

RECIPE is a segmentation recipe. `init=` takes a run, a folder in the released layout or a hub name; null starts
from random weights, the control that every figure needs beside it. Tokens are read in the adapter's order and put
back into the grid before any map is made. Reported are the raw and the averaged weights after the last step, on all
held-out images, from one matrix of counts that is exact over images and processes.

BatchNorm (in UPerNet): on several GPUs its statistics are those of the whole micro-batch (SyncBatchNorm); on several
CPU processes each has its own in training, and their mean is what is evaluated. An average of the weights has no
statistics of its own and is evaluated with those of the raw weights, to which the decay to a learning rate of zero
brings it close.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.configs import SegmentConfig
from recipes.report.provenance import rendered
from recipes.report.segment import report
from recipes.resolve import default_out, read_target
from recipes.training.segmentation import segment


class Options(BaseModel):
    """Options of `nepa segment`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="run folder; default runs/NAME-segment")


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    run = Run(Path(options.out or default_out(target, "segment")))
    before = run.summary() is not None
    with world() as ranks, at_work(run, ranks, trains=True):
        summary = segment(config, run, ranks)
        if ranks.is_main:
            print(rendered(lambda: report(run, summary, ()), run, before=before))


def read_config(target: str, changes: dict[str, Any]) -> SegmentConfig:
    return read_target(SegmentConfig, target, changes)
