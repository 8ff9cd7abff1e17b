"""nepa embed: features of a run's network for many samples, as a table.

A row is a sample, or with pooling=none a token: its name (the file, or "sample 3"), its number, its label where there
is one, and the features of each layer that layer= names, as `nepa probe` reads them: without augmentation, with the
averaged weights and the run's own attention. Samples are those of a split (split=train; data.root=DIR for other data of
the same form), or files=a.png,b.png or files=DIR for adapters that read files by name.

The table is parquet, npy or safetensors, by the suffix of out= or by format=; beside it FILE.json says what it is made
of. npy has one file a column (x.npy the features, x.label.npy ...), and names lie in FILE.name.txt (x.npy.name.txt),
also beside safetensors. No other file is overwritten. Memory does not grow with the number of samples. Stopped or
killed, the same command goes on; several processes (torchrun) give the same table. Samples that can't be read are left
out, and named.

surprise=true adds how badly the network predicts each sample (the mean of -cos, -1 to 1), an anomaly score, and
surprise_quantile, the share of training samples, or with usual=test of held-out ones, that surprise less. Both are NaN
for a sample of which nothing is predicted. surprise=tokens adds it for each token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nepa_core.runtime.distributed import world
from nepa_core.runtime.load import load
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.readout.embedding import EmbedOptions as Options
from recipes.readout.embedding import embed, out_file, render
from recipes.resolve import read_network

FREE = ("data.", "train.workers")
"""Keys of a run that may be changed: they say which samples are read, and how they are loaded."""

read_config = partial(read_network, free=FREE, task="embed")


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config, file = read_config(target, changes), out_file(target, options)
    with world() as ranks, at_work(Run(file.parent), ranks, trains=False):
        net = load(target, data=config.data)
        record = embed(net, options, file, ranks, workers=config.train.workers, show=True)
        if ranks.is_main:
            print(render(record, file))
