"""nepa plan: what a training run will take, before it is paid for.

Parameters, operations a sample, samples a second at a stated share of the device's peak, hours, energy and cost, the
cores that loading takes, the size of a checkpoint, and memory with the largest micro-batch that fits, by strategy,
without and with `train.recompute`. Counted on this CPU on four samples of the recipe's data, or of noise, so that
nothing is trained: `data.source=noise samples=1281167` stands for ImageNet where it is not here. The largest
micro-batch is a value of `train.micro_batch` that fits and divides what a device has of a step. With `machines=` there
is a row for `train.strategy=hsdp`, too. Where a network is so small that the time of starting kernels decides, not
arithmetic, that is said, and the rate is an upper bound. `share=` is an assumption until `nepa bench` has measured it
on your device.
"""

from __future__ import annotations

from typing import Any

from recipes.training.planning import PlanOptions as Options
from recipes.training.planning import plan_run, render
from recipes.training.workload import Trained, read_trained


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_config(target, changes)
    print(render(plan_run(config, options), config, options))


def read_config(target: str, changes: dict[str, Any]) -> Trained:
    """The recipe or run of any task that trains."""
    return read_trained(target, changes)
