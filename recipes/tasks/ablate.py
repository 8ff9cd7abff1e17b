"""nepa ablate: the paper's ablations on your data, as one table and one plot.

Arms: the recipe as it is; shift off; causal mask off; stop-gradient off; 40 % and 60 % of the inputs masked (the
paper's Table of ablations). Every arm is pre-trained and probed with every seed at the same budget. What is finished
is kept and never run again: the same command goes on where it was stopped, and several may share a folder. What is
compared is declared in protocol.json before the first run; more seeds later are a further look, which the tests are
corrected for (see `recipes.statistics.protocol`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.comparison import engine
from recipes.comparison.ablate import AblateOptions as Options
from recipes.comparison.ablate import ablate
from recipes.report.ablate import render
from recipes.resolve import default_out


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = engine.read_recipe("ablate", target, changes)
    out = Path(options.out or default_out(target, "ablate"))
    print(render(ablate(config, options, out)))
    print(f"Report: {out / 'report' / 'index.html'}")
