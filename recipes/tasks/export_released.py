"""nepa export: a run as a folder in the released Hugging Face layout, or its encoder as a graph.

The layout (format=released, of a run of pretrain or finetune on images, or on scenes, whose crop is the image):
config.json, preprocessor_config.json, model.safetensors and, where the run has averages, ema.safetensors. What
`nepa import` read comes out again byte for byte, unknown fields of config.json included.

The graph (format=onnx, or torch for a .pt2 of torch.export; of any run with a network) needs this package no more. It
goes from the tensors of a batch, such as uint8 pixels [batch, C, H, W], to the features of layer= and pooling=, with
the averaged weights where there are any and the run's own attention. The number of samples is free, and where they have
unequal lengths the length is, too. Where the adapter's own `tokenize` can't be traced the graph begins at the tokens
and says so. It is run beside the network on other samples before it is kept. FILE.json has the inputs with shape, dtype
and meaning, the outputs and the versions. format=onnx needs nepa[onnx].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from nepa_core.basics import UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.load import Layer, load
from nepa_core.runtime.locks import at_work, holding, lock_beside
from nepa_core.runtime.run import Run
from recipes.released.exporting import FREE as FREE
from recipes.released.exporting import ExportOptions as Options
from recipes.released.exporting import export_released, read_config
from recipes.released.graphs import SUFFIXES, export_graph, render
from recipes.resolve import read_network


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    if options.format != "released":
        return graph(target, options, changes)
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
    return None


def graph(target: str, options: Options, changes: dict[str, Any]) -> None:
    config, suffix = read_network(target, changes, free=FREE, task="export"), SUFFIXES[options.format]
    file = Path(options.out or f"{target}/export/encoder{suffix}")
    if file.suffix != suffix:
        raise UserError(f"out={file}: a graph of format={options.format} is a file that ends in {suffix}")
    with world() as ranks, at_work(Run(file.parent), ranks, trains=False):
        if ranks.is_main:
            net = load(target, data=config.data)
            (row,) = net.rows([cast(Layer, options.layer)], None if options.pooling == "none" else options.pooling)
            print(render(export_graph(net, row, options.format, file), file))
