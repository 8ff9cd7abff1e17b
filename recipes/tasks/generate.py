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
from recipes.generation.generating import generate
from recipes.generation.showing import shown
from recipes.report.generate import report
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
        if net.labelled or not isinstance(config, PretrainConfig):
            raise UserError(
                f"{target} was trained on labels, and its output no longer predicts the next token: name the run of "
                "pre-training that it began with"
            )
        kept = Path(target) / "generate"
        folder = Path(options.out or kept)
        found = generate(net, config, options, kept, show=True)
        found.summary["made_with"] = provenance()
        page = report(
            Path(target), found.summary, shown(found, net.data, net.data.samples_of(options.split)), net.data.token_name
        )
        page.write(folder)
        Run(folder).write_summary(found.summary, "generate.json")
        print(page.text(folder))
