"""nepa bench: how fast a recipe trains here, and where the time goes.

Tokens and samples a second, model FLOPs utilisation against a matrix product measured on the spot, peak memory,
and the share of a step in data, forward, backward, optimiser and EMA. `against=` adds a ratio measured by turns in
this one process: `loop`, the fit loop over a bare loop with the same model and batches; `transformer`, the
predictor over a bare pre-norm Transformer of the same shape without RoPE, QK-Norm and LayerScale; `padding`, real
tokens a second of packed rows (`model.pack=true`) over those of padded ones, and by how much their losses differ;
`objectives`, a step with each named objective over one with the cosine, the fastest turn of each.
`against=decode` trains nothing: it times one core that loads the recipe's training images, over torchvision's bare
decode_image and RandomResizedCrop of the same ones, and says how many such cores an H100 needs. Then the same images as
an array of pixels (`nepa resize format=array`), with augmentation left to the device (`data.augment_on=device`), and
decoded there, where it is a GPU (`data.decode_on=gpu`): each over JPEG on the CPU.
"""

from __future__ import annotations

from typing import Any

from nepa_core.runtime.distributed import world
from recipes.training.bench import AGAINST, against_bare_decode, bench, render
from recipes.training.bench import BenchOptions as Options
from recipes.training.workload import Trained, read_trained


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    if options.against == "decode":
        print(render(against_bare_decode(config, options), config))
        return
    with world() as ranks:
        figures = bench(config, options, ranks)
        if not ranks.is_main:
            return
        if options.against in AGAINST:
            figures |= AGAINST[options.against](config, options, ranks)
        print(render(figures, config))


def read_config(target: str, changes: dict[str, Any]) -> Trained:
    """The recipe or run of any task that trains."""
    return read_trained(target, changes)
