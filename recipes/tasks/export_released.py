"""nepa export: a run of pretrain or finetune on images becomes a folder in the released Hugging Face layout.

A pre-training run on scenes is one, too: its crop is the image.

Written are config.json, preprocessor_config.json, model.safetensors and, where the run has averages,
ema.safetensors. What `nepa import` read comes out again byte for byte, unknown fields of config.json included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import holding, lock_beside
from nepa_core.runtime.run import Run
from recipes.released.exporting import FREE as FREE
from recipes.released.exporting import ExportOptions as Options
from recipes.released.exporting import export_released, read_config


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    if changes:
        raise UserError(f"nepa export writes a run as it is; {next(iter(changes))} is not one of its options")
    if options.out is None:
        raise UserError("nepa export needs out=DIR, the folder to write")
    with world() as ranks:
        if ranks.is_main:
            read_config(target, changes)  # before anything is written
            out = Path(options.out)
            with holding(out, trains=False, lock=lock_beside(out)):
                print(export_released(Run(Path(target)), out, options))
