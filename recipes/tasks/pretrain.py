"""nepa pretrain: next-embedding pre-training, and the verdict that ends it.

RECIPE is module:function, built in (`nepa recipes`) or your own; a RUN is one to go on with. The run goes to out=, or
to runs/NAME (a recipe of your own: runs/MODULE-NAME): config.json, metrics.jsonl, checkpoints/, summary.json with the
figures of the verdict, and report/ with its plots. Stopped by Ctrl-C, SIGTERM or a crash, it goes on where it was by
the same command; a finished run is only shown again, and `nepa pretrain RUN out=OTHER` trains its settings anew.

`nepa pretrain RUN train.length.steps=MORE` lengthens a finished run: optim.schedule=wsd goes on from the end of its
stable phase, cosine begins a second cycle. An unfinished RUN takes optim.lr and other keys anew, which are recorded
with the step. `init=` begins with the weights of a run, a folder in the released layout or a hub name.

The verdict compares the prediction on held-out data with a linear autoregression, with copying, with mean embeddings
and with the network before training, and judges collapse by the rank of the embeddings. `nepa probe RUN` is the next
question.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN
from nepa_core.terms import lines
from recipes.training.door import pretrain

NOTES = [lines(), ""]  # what --help says after the options


class Options(BaseModel):
    """Options of `nepa pretrain`."""

    model_config = FROZEN

    out: str | None = Field(
        default=None, description="run folder; default runs/NAME, or runs/MODULE-NAME of a recipe of your own"
    )


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    if verdict := pretrain(target, options.out, changes=changes).verdict:
        print(verdict)
