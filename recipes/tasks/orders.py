"""nepa orders: which patch order? Every order pre-trained with every seed at the same budget, measured and compared.

  orders=raster,hilbert,random:1,random:2    built-in orders (NAME:SEED is a drawn one of another seed), orders of your
                                             own as module:function, or files
  seeds=0,1,2                                three or more, or no difference can be told from noise

For each: a linear probe of the best layer, chosen on held-back training samples and never on the test samples, and a
short fine-tuning on labels= a class, both also for the same network with random weights under the same order; the lift
of the prediction over its baselines; attention; and what the order itself is like. Losses of different orders are not
comparable, for each asks other questions: orders are ranked by accuracy, with 95 % intervals over seeds and test
samples together, and paired tests. A series without targets is forecast instead, 96 steps ahead (see
`recipes.comparison.downstream`).

Before the first pre-training a line says how large a difference so many seeds will show, and how many seeds 2 points
would take, from the spread of random weights.

predict_position= gives every order, raster included, the same knowledge of where the next token lies; random_per_sample
needs it. What is finished is kept: the same command goes on where it was stopped, and several commands may share a
folder, each on its own GPU. More orders or seeds add to it as a further look, which the tests are corrected for: what
is compared is declared in protocol.json before the first run (see `recipes.statistics.protocol`). An order in a file is
known by what the file holds, so a changed file is another order; a function is known by its name alone: after changing
it, name another out=.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.comparison.engine import read_recipe
from recipes.comparison.orders import OrdersOptions as Options
from recipes.comparison.orders import orders
from recipes.report.orders import render
from recipes.resolve import default_out


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_recipe("orders", target, changes)
    out = Path(options.out or default_out(target, "orders"))
    print(render(orders(config, options, out)))
    print(f"Report: {out / 'report' / 'index.html'}")
