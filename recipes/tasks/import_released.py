"""nepa import: a checkpoint in the released layout becomes a run, for probe, inspect, export and init=.

DIR is a folder with config.json and model.safetensors, or a name on the Hugging Face hub, OWNER/NAME. Averaged weights
beside them, ema.safetensors or the authors' pytorch_model_ema.bin (of which nothing but tensors is read), come along,
and are what every later task reads: evaluate, probe, inspect, finetune and init=. Held-out images are read as the
published figures of that size were measured, unless preprocessor_config.json says otherwise by crop_pct and crop_mode
("center", or "squash"). A fine-tuned checkpoint becomes a run of `nepa finetune`, a pre-trained one a run of
`nepa pretrain`; `nepa finetune RUN` starts from either, in a folder of its own. The rest of the run's config is that
of the released recipe; any key of it can be set, data.root=DIR above all, but for those that the weights decide. The
source, its SHA-256 and its whole config.json are kept in import.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.released.importing import DECIDED as DECIDED
from recipes.released.importing import import_released
from recipes.released.importing import read_config as read_config


class Options(BaseModel):
    """Options of `nepa import`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="run folder; default runs/NAME-OF-THE-CHECKPOINT")


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    run = Run(Path(options.out or f"runs/{Path(target).resolve().name}"))
    with world() as ranks, at_work(run, ranks, trains=False):
        if ranks.is_main:
            print(import_released(target, run, changes))
