"""nepa pretrain: next-embedding pre-training, and the verdict that ends it.

RECIPE is module:function, built in (`nepa recipes`) or your own; a RUN is one to go on with. The run goes to out=, or
to runs/NAME (a recipe of your own: runs/MODULE-NAME): config.json, metrics.jsonl, checkpoints/, summary.json with the
figures of the verdict, and report/ with its plots. Stopped by Ctrl-C, SIGTERM or a crash, it goes on where it was by
the same command; a finished run is only shown again, and `nepa pretrain RUN out=OTHER` trains its settings anew.

The verdict compares the prediction on held-out data with a linear autoregression, with copying, with mean embeddings
and with the network before training, and judges collapse by the rank of the embeddings. `nepa probe RUN` is the next
question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.configs import PretrainConfig
from recipes.report import card
from recipes.report.provenance import rendered
from recipes.resolve import default_out, read_target
from recipes.training.pretraining import pretrain


class Options(BaseModel):
    """Options of `nepa pretrain`."""

    model_config = FROZEN

    out: str | None = Field(
        default=None, description="run folder; default runs/NAME, or runs/MODULE-NAME of a recipe of your own"
    )


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_target(PretrainConfig, target, changes)
    run = Run(Path(options.out or default_out(target, "pretrain")))
    before = run.summary() is not None
    with world() as ranks, at_work(run, ranks, trains=True):
        summary = pretrain(config, run, ranks)
        if ranks.is_main:
            print(rendered(lambda: card.render(summary, config.data, run), run, before=before))
