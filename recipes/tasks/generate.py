"""nepa generate: what a run expects next, drawn: samples from nothing, completions, and a card that judges them.

On the frozen network stand two decoders, fitted on training samples: `mean`, a ridge from a prediction to the raw token
after it, and `flow`, a small network that samples that token. Sequences are made token by token. Of held-out samples
the first half of the tokens is given (keep=0.5, or keep=3 tokens), or all but a region of their grid
(region=[y0,x0,y1,x1]; of steps or slices, too, region=[s0,y0,x0,s1,y1,x1]) where the network was trained on orders of
each sample's own and is told where the next token lies. What is given stays bit for bit.

The card has the energy scores of completions and of single next tokens, beside the same decoders on the untrained
network, a linear-Gaussian autoregression, copying and, where the adapter knows the law of its data, the best possible,
with paired 95 % intervals; whether a classifier tells samples from the data; copies of training samples; and diversity.

generate.json lies in the run; card, page and decoders in RUN/generate/, and those are found again by the digest of
weights, data and settings. out=DIR takes card, page and generate.json.
"""

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
        found = generate(net, config, options, kept, show=True)
        found.summary["made_with"] = provenance()
        noun, source = net.data.token_name, net.data.samples_of(options.split)
        page, folder = report(Path(target), found.summary, shown(found, net.data, source), noun), options.out or kept
        page.write(Path(folder))
        Run(Path(options.out or target)).write_summary(found.summary, "generate.json")
        print(page.text(Path(folder)))
