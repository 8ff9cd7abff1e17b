"""Figures of one row that are taken in the process that asks: steps, the fit loop, loading, decoding.

Each function takes the words of a row and gives figures: a name, and the values of all turns. Options of `nepa bench`
(`steps`, `repeats`) and keys of the recipe stand among the words, as on the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Sized
from functools import lru_cache
from typing import cast

import torch
from torch import nn

from benchmarks.authors import AuthorsNetwork
from nepa_core.runtime.config import override
from nepa_core.runtime.data import DrawSampler, TrainingBatches
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.fit import Stopwatch, autocast_dtype
from recipes.cli import split_options
from recipes.configs import PretrainConfig
from recipes.training import bench
from recipes.training.bench import PHASES, BenchOptions, bare_of, bare_step, model_of, one_batch, step_flops, timed_fit
from recipes.training.workload import read_trained

Figures = dict[str, list[float]]
"""Name -> the values of all turns, or seeds."""

WARM = 3  # steps before a clock starts
SKIPPED = 10  # steps of the fit loop before it does: processes that load data start meanwhile


def ours(config: PretrainConfig, ranks: World) -> nn.Module:
    """The network of the recipe."""
    return model_of(config, ranks)


def authors(config: PretrainConfig, ranks: World) -> nn.Module:
    """The authors' network of the same shape, compiled block by block where the recipe says so."""
    model = AuthorsNetwork(config.model, config.data.embedder(config.model.dim)).to(ranks.device)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    return model


FORMS: dict[str, Callable[[PretrainConfig, World], nn.Module]] = {"ours": ours, "authors": authors, "bare": bare_of}
"""The networks whose step is timed, all with our optimiser, average and objective."""


def step(form: str, *words: str) -> Figures:
    """`repeats` turns of `steps` training steps on a batch that lies on the device: the least a step can be."""
    options, config = read(words)
    with world() as ranks:
        start_memory(ranks.device)
        run = bare_step(config, FORMS[form](config, ranks).train(), ranks)
        batch = one_batch(config, ranks, config.train.batch)
        for _ in range(WARM):
            run(batch)
        seconds = []
        for _ in range(options.repeats):
            began = now(ranks.device)
            for _ in range(options.steps):
                run(batch)
            seconds.append((now(ranks.device) - began) / options.steps)
        memory = peak(ranks.device)  # before the operations are counted
        return of_steps(seconds, config, ranks) | memory


def of_steps(seconds: Sequence[float], config: PretrainConfig, ranks: World) -> Figures:
    """Rates from the seconds of a step; operations are those of our network, whatever network took the step."""
    few = override(
        config, {"train.batch": 2, "train.micro_batch": 2, "train.compile": False, "model.attention": "sdpa"}
    )
    flops = step_flops(few, ranks) / 2 * config.train.batch
    most = ceiling(ranks.device, autocast_dtype(config.train.precision, ranks.device) or torch.float32)
    return {
        "images/s": [config.train.batch / each for each in seconds],
        "ms a step": [1000 * each for each in seconds],
        "% of the ceiling": [100 * flops / each / most for each in seconds],
        "ceiling, TFLOP/s": [most / 1e12],
    }


@lru_cache
def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """`matmul_ceiling`, measured once a process."""
    return bench.matmul_ceiling(device, dtype)


class Steady(Stopwatch):
    """A stopwatch that starts after the first steps."""

    def __init__(self, skipped: int, device: torch.device) -> None:
        super().__init__()
        self._left, self._device = skipped, device

    def lap(self, phase: str) -> None:
        if self._left > 0:
            self._left -= phase == "rest"
            if self._left == 0:
                now(self._device)
                super().lap(phase)
                self.seconds.clear()
            return
        super().lap(phase)


def fit(*words: str) -> Figures:
    """The fit loop as `nepa pretrain` runs it, `repeats` times: its rate, and how long it waits for data."""
    options, config = read(words)
    with world() as ranks:
        start_memory(ranks.device)
        rates, waits = [], []
        for _ in range(options.repeats):
            watch = Steady(SKIPPED, ranks.device)
            timed_fit(config, options.steps + SKIPPED, ranks, watch)
            total = sum(watch.seconds.get(name, 0.0) for name in PHASES)
            rates.append(config.train.batch * options.steps / total)
            waits.append(100 * watch.seconds.get("data", 0.0) / total)
        return {"images/s": rates, "waits for data, %": waits} | peak(ranks.device)


def loop(*words: str) -> Figures:
    """Time of the fit loop over that of a bare loop, `repeats` times."""
    options, config = read(words)
    with world() as ranks:
        found = bench.against_bare_loop(config, options, ranks)
    return {"fit loop / bare loop": sorted(found.values())}  # median, lowest and highest


def load(*words: str) -> Figures:
    """Images a second of loading alone, with what it leaves to the device: `repeats` turns of `steps` batches."""
    options, config = read(words)
    with world() as ranks:
        dataset, train = config.data.samples_of("train"), config.train
        count = SKIPPED + options.steps * options.repeats
        sampler = DrawSampler(
            len(cast(Sized, dataset)), batch=train.batch, accumulate=1, rank=0, ranks=1, seed=0, start=0, stop=count
        )
        batches = iter(
            TrainingBatches(dataset, sampler, workers=train.workers, max_unreadable=0.0, device=ranks.device)
        )
        rates = []
        for _ in range(SKIPPED):
            config.data.before_mixing(next(batches))
        for _ in range(options.repeats):
            began = now(ranks.device)
            for _ in range(options.steps):
                config.data.before_mixing(next(batches))
            rates.append(train.batch * options.steps / (now(ranks.device) - began))
        return {"images/s": rates}


def decode(*words: str) -> Figures:
    """Images a second of one core, see `nepa bench against=decode`."""
    options, config = read(words)
    found = bench.against_bare_decode(config, options)
    return {name: [value] for name, value in found.items() if "/" in name and not name.startswith("ours")} | {
        "ours / bare": sorted(value for name, value in found.items() if name.startswith("ours"))
    }


def read(words: Sequence[str]) -> tuple[BenchOptions, PretrainConfig]:
    """Options and recipe of the words RECIPE [key=value ...].

    Raises:
        UserError: there is no such recipe, or a key does not fit.
    """
    options, changes = split_options(BenchOptions, words[1:])
    return options, cast(PretrainConfig, read_trained(words[0], changes))


def start_memory(device: torch.device) -> None:
    """Forget the peak of what this process did before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> Figures:
    """Peak memory of the device; a process on the CPU knows only that of all it ever did."""
    return {"peak GiB": [bench.peak_memory(device) / 2**30]} if device.type == "cuda" else {}


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
