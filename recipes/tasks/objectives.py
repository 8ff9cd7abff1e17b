"""nepa objectives: does pre-training pay, and with which objective? Each with every seed at the same budget.

  objectives=cosine,infonce_sample,infonce_position   names of terms and mixtures, module:function, `recipe` (see below)
  seeds=0,1,2                                         three or more, or no difference can be told from noise
  labels=10,50,all                                    training labels a class to fine-tune on

For each: the verdict's figures; a linear probe of the best layer, chosen on held-back training samples, and of the
last one (final norm, mean over tokens); fine-tuning. All of it stands beside the same network with random weights,
which are measured once a seed and fine-tuned with the same care: of learning_rates=, then finetune_steps=, then
finetune_causal= every start, seed and number of labels has what serves best within its own labels, never the test
samples. Few labels are cut into three parts, and every setting is trained three times, each time without one part; of
all labels a fifth (1,000 at most) is held back. The network that counts is then trained on all of them. While the best
rate or number of steps lies at an end of its list, the list grows there, twice at most. A series without targets is
forecast instead, horizon= steps ahead (see `recipes.comparison.downstream`).

What that costs for each start, seed and number of labels with the lists as they are by default: 2,300 steps of
fine-tuning where 100 are best, 5,700 where 300 are, 24,000 at worst; with all labels 800, 2,100 and 9,800. One value
in each list (learning_rates=1e-3 finetune_steps=300 finetune_causal=false) chooses nothing and costs its own steps.

Losses of different objectives are not comparable: objectives are ranked by accuracy, with 95 % intervals over seeds and
test samples together and paired tests against random weights, which say whether pre-training pays, and against the
cosine.

A mixture of your own is the objective `recipe`: what the recipe says with its key=values, beside any named ones, as in
objectives=cosine,recipe 'objective.terms={"mse":1,"barlow":0.1}'. The named ones override objective.terms,
objective.stop_gradient and objective.head, and keep every other key, such as objective.temperature. With _head behind
it (cosine_head, infonce_sample_head) a name has a small head on the prediction side, objective.head=simsiam.

What is finished is kept: the same command goes on where it was stopped, and several commands may share a folder, each
on its own GPU. More objectives or seeds add to it as a further look, which the tests are corrected for: what is
compared is declared in protocol.json before the first run (see `recipes.statistics.protocol`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nepa_core.terms import lines
from recipes.comparison.engine import read_recipe
from recipes.comparison.objectives import ObjectivesOptions as Options
from recipes.comparison.objectives import objectives
from recipes.objective_names import check_given
from recipes.report.objectives import render
from recipes.resolve import default_out

NOTES = [lines(), ""]  # what --help says after the options


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_recipe("objectives", target, changes)
    check_given(changes, options.objectives)
    out = Path(options.out or default_out(target, "objectives"))
    print(render(objectives(config, options, out)))
    print(f"Report: {out / 'report' / 'index.html'}")
