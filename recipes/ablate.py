"""nepa ablate: the paper's ablations on your data, as one table and one plot.

Arms: the recipe as it is; shift off; causal mask off; stop-gradient off; 40 % and 60 % of the inputs masked (the
paper's Table of ablations). Every arm is pre-trained and probed with every seed at the same budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.run import Run
from recipes import compare
from recipes.pretrain import PretrainConfig
from recipes.targets import default_out, is_run, read_target
from recipes.training import provenance

ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "shift off": {"objective.shift": False},
    "causal mask off": {"objective.causal": False},
    "stop-gradient off": {"objective.stop_gradient": False},
    "input mask 40 %": {"objective.input_mask": 0.4, "model.mask_token": True},
    "input mask 60 %": {"objective.input_mask": 0.6, "model.mask_token": True},
}
"""Arm -> the keys it changes."""


class Options(BaseModel):
    """Options of `nepa ablate`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="folder of all runs and the report; default runs/NAME-ablate")
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1, description="such as [0,1,2]; default [0,1]")
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core, one with a GPU")


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    if is_run(target):
        raise UserError(f"nepa ablate starts from a recipe such as recipes.vision:digits, and {target} is a run folder")
    config = read_target(PretrainConfig, target, changes)
    out = Path(options.out or default_out(target, "ablate"))
    print(compare.render(ablate(config, options, out)))
    print(f"Report: {out / 'report' / 'index.html'}")


def ablate(config: PretrainConfig, options: Options, out: Path) -> dict[str, Any]:
    """Run all arms and write summary.json and report/ into `out`."""
    arms = [compare.Arm(name, override(config, changes)) for name, changes in ARMS.items()]
    result = compare.compare(arms, options.seeds, out, workers=options.workers or compare.default_workers())
    result |= {"recipe": config.recipe, "made_with": provenance()}
    compare.write_report(out / "report", f"Ablations: {config.recipe}", result)
    Run(out).write_summary(result)
    return result
