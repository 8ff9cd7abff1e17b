"""nepa transfer: which kind of data helps which? Each part of a mix alone against all together in one predictor.

RECIPE mixes parts (data.mode=mixed, such as recipes.together:digits_and_series), and its train.length.steps are those
of each part alone. Together there are as many steps in all (equal total cost: each part has its share of them), or as
many as give each part the samples that it has alone (equal own steps). All have the same network, whose blocks are
shared, and one embedder a part.

A part with labels is judged by the linear probe of its best layer, chosen on held-back training samples, a series
without any by a forecast horizon= steps ahead (skill: 1 - MSE / MSE of repeating the last value). Beside them stand
random weights and the raw tokens. The matrix holds the differences to each part alone, with 95 % intervals over seeds
and test samples together, and paired tests say which are real. Give three seeds or more.

What is finished is kept: the same command goes on where it was stopped, and several commands may share a folder. More
seeds add to it as a further look, which the tests are corrected for (see `recipes.statistics.protocol`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.comparison.engine import read_recipe
from recipes.comparison.transfer import TransferOptions as Options
from recipes.comparison.transfer import transfer
from recipes.report.transfer import render
from recipes.resolve import default_out


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_recipe("transfer", target, changes)
    out = Path(options.out or default_out(target, "transfer"))
    print(render(transfer(config, options, out)))
    print(f"Report: {out / 'report' / 'index.html'}")
