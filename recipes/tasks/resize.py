"""nepa resize: write a recipe's images once more, scaled down, as shards that load twice as fast or as an array.

Most of the time a core spends on an image of ImageNet goes into decoding pixels that the next step scales away. Here
every image is scaled (bicubic, antialiased) until its shorter side is `size`, and stored as JPEG; one that is a JPEG
and no larger is stored as it is. Random crops are then cut out of the smaller image: those of fewer than
224 x 224 of its pixels are magnified where they might have been scaled down before. Train on the result with
`data.source=folder data.root=OUT`. Interrupted, the same command goes on with the next shard.

`format=array` writes the pixels themselves, `train.npy` and `val.npy` (uint8 [n, size, size, C], with labels, names and
classes in `.npz` beside them): every image is scaled to cover a square of `size` and cropped to it at the centre, so
random crops no longer see the ends of the longer side. Held-out images are read as from the original where recipes
scale them to `size` themselves. 1,281,167 images of 256 take 252 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nepa_core.runtime.locks import holding, lock_beside
from recipes.configs import PretrainConfig
from recipes.resolve import default_out, read_target
from recipes.training.resizing import ResizeOptions as Options
from recipes.training.resizing import resize

FREE = ("data.",)
"""The keys of a recipe that matter here."""


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    data = read_target(PretrainConfig, target, changes).data
    out = Path(options.out or default_out(target, "resize"))
    with holding(out, trains=False, lock=lock_beside(out)):
        unreadable = resize(data, options, out)
    for message in unreadable:
        print(f"left out: {message}", file=sys.stderr)
    megabytes = sum(file.stat().st_size for kind in ("*.tar", "*.np?") for file in out.glob(kind)) / 1e6
    print(
        f"{out}: {megabytes:,.1f} MB, {len(unreadable)} unreadable images left out; train on it with "
        f"data.source=folder data.root={out}"
    )
