"""nepa generate: what a run expects next, drawn: samples from nothing, completions, and a card that judges them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.load import load
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.configs import PretrainConfig
from recipes.generation.generating import GenerateOptions as Options
from recipes.generation.generating import check_network, generate
from recipes.report.provenance import provenance
from recipes.resolve import read_network

FREE = ("data.", "train.workers")
"""Keys of a run that may be changed: they say which samples are read, and how they are loaded."""

read_config = partial(read_network, free=FREE, task="generate")


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    with world() as ranks, at_work(Run(Path(target)), ranks, trains=False):
        if not ranks.is_main:
            return
        net = load(target, data=config.data)
        check_network(net, options)
        if not isinstance(config, PretrainConfig):
            raise UserError(f"{target} is no run of pre-training: name the one that it began with")
        run = Run(Path(options.out or Path(target) / "generate"))
        found = generate(net, config, options, Path(target) / "generate", show=True)
        summary = found.summary | {"made_with": provenance()}
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_summary(summary, "generate.json")
        print(summary)
