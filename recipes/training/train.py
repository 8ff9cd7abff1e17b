"""What every training task does around `fit`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from pydantic import BaseModel
from torch import nn

from modalities.data.listing import say, shared_content
from nepa_core.basics import UserError, needs
from nepa_core.contract import check_first_batches
from nepa_core.ema import Ema
from nepa_core.modality import Modality
from nepa_core.model import at_head_rate, layers_above
from nepa_core.predictor import Predictor, PredictorConfig
from nepa_core.runtime.config import keys, load_object
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import FitResult, StepFunction, TrainConfig, fit, plan
from nepa_core.runtime.loggers import Listener, logger, shielded
from nepa_core.runtime.meter import say_progress
from nepa_core.runtime.optim import OptimConfig
from nepa_core.runtime.run import Run, Summary, is_imported
from nepa_core.runtime.weights import newest, read_weights
from recipes.report.provenance import provenance
from recipes.report.summaries import TrainingCost


class Recipe(Protocol):
    """The part of a config that training reads."""

    @property
    def data(self) -> Modality: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def train(self) -> TrainConfig: ...


def opened(config: BaseModel, run: Run, ranks: World, kind: type[Summary], *, midway: bool = False) -> Summary | None:
    """Check the run's folder on every rank; the summary if it was finished before, else None. `train` writes it.

    Args:
        midway: see `Run.open`.

    Raises:
        UserError: the folder can't be used, or the run was imported and its weights are damaged: those of the seed
            would take their place.
    """
    goes_on = run.open(config, write=False, midway=midway)
    ranks.barrier()  # before one of them writes
    if is_imported(str(run.path)):
        newest(run)
    if not goes_on and (summary := run.summary_of(kind)) is not None:
        began, now = summary.get("began_with"), digest_of_start(config)
        if began and now and began != now:
            raise UserError(
                f"{run.path} is finished and began with other weights than {start_name(config)} has now: name another "
                "folder with out=DIR, or remove this one"
            )
        if ranks.is_main and (
            unheard := [key for key in ("logger", "hooks") if getattr(cast(Recipe, config).train, key)]
        ):
            say(f"{run.path} is finished, so train.{unheard[0]} hears nothing of it")
        return summary
    recipe = cast(Recipe, config)
    if (logger := recipe.train.logger) is not None:
        needs(f"train.logger={logger}", logger, extra=logger)
    if isinstance(model := getattr(config, "model", None), PredictorConfig):
        check_memory(model, ranks.device)
    check_data(recipe.data, predicts=hasattr(config, "objective"))
    return None


def start_name(config: BaseModel) -> str | None:
    """The run, folder or file that a config's training begins with; None: random weights, or those of a hub."""
    init = getattr(config, "init", None) or getattr(config, "backbone", "").partition("@")[2]
    return init if init and Path(init).exists() else None


def digest_of_start(config: BaseModel) -> str | None:
    """Tells those weights from others that a later command would find in their place; None where they can't be read."""
    if (name := start_name(config)) is None:
        return None
    if Path(name).is_file():
        with Path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return read_weights(name).digest
    except UserError:
        return None


def check_memory(config: PredictorConfig, device: torch.device) -> None:
    """Whether a network can fit at all, before the system kills the process that makes it.

    Raises:
        UserError: its weights are more than the memory of this machine; on a CPU also where there is no room for
            gradients and the two means of AdamW.
    """
    need, have = config.weights * 4 * (1 if device.type == "cuda" else 4), memory()
    if need > have:
        raise UserError(
            f"the network of model.dim={config.dim}, model.depth={config.depth}, model.mlp_dim={config.mlp_dim} needs "
            f"{need / 1e9:,.0f} GB and this machine has {have / 1e9:,.0f}; make it smaller"
        )


def memory() -> int:
    """Bytes that this process may use: the machine's, or those of its control group where that has fewer."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(file).read_text()))
    return min(found)


def check_data(data: Modality, *, predicts: bool) -> None:
    """Look at a first batch of both splits before there is a folder or a network, see `check_first_batches`.

    Raises:
        UserError: what is wrong with the adapter, and how to fix it.
    """
    try:
        check_first_batches(data, predicts=predicts)
    except AssertionError as error:
        raise UserError(f"{type(data).__name__}: {error}") from error


def train(
    model: nn.Module,
    predictor: Predictor | None,
    config: Recipe,
    run: Run,
    ranks: World,
    *,
    step_function: StepFunction,
    step_at: Callable[[float], StepFunction] | None = None,
    evaluate: Callable[[Ema | None], Mapping[str, Any]],
    untrained: bool = True,
    height_of: Callable[[str], int] | None = None,
    head_of: Callable[[str], bool] | None = None,
    announce: str = "",
    midway: bool = False,
    origin: Mapping[str, Any] | None = None,
    show: bool,
) -> tuple[FitResult, Ema | None]:
    """`fit` with what the config asks for around the model: compiled or recomputed blocks, an average, layer decay.

    The run's folder is made here, so that a command that fails on its data or its weights leaves nothing behind.

    Args:
        predictor: the one inside `model`, if any.
        step_at: see `fit`.
        evaluate: held-out figures for metrics.jsonl, given the average; called on every rank.
        untrained: evaluate before the first step, too.
        height_of, head_of: `height` and `head` of `fit`; default: those of a network of ours.
        announce: a line for the screen where a run starts that nothing was measured of before.
        midway: see `Run.open`. origin: see `fit`.
    """
    dataset = config.data.samples_of("train")
    if origin is None and (digest := digest_of_start(cast(BaseModel, config))) is not None:
        origin = {"digest": digest}
    plan(config.train, config.optim, samples=len(cast(Sized, dataset)), ranks=ranks.size)
    if ranks.is_main:
        say_leaks(config.data)
    if announce and show and ranks.is_main and not run.metrics_path.exists():
        say_progress(announce)
    if predictor is not None and config.train.compile:
        predictor.compile_blocks()
    if predictor is not None and config.train.recompute:
        predictor.recompute_blocks()
    ema = None if config.train.ema is None else Ema(model, config.train.ema)

    def begin() -> None:
        run.open(cast(BaseModel, config), midway=midway)
        run.listeners = listeners(config, run)

    try:
        result = fit(
            model=model,
            step_function=step_function,
            step_at=step_at,
            dataset=dataset,
            config=config.train,
            optim=config.optim,
            run=run,
            world=ranks,
            ema=ema,
            evaluate=lambda: evaluate(ema),
            untrained=untrained,
            changed_data=config.data.changed,
            height=height_of or height(config),
            head=head_of or head(config),
            begin=begin,
            origin=origin,
            show=show,
        )
    except BaseException:
        run.tell("stop", str(run.path))
        raise
    return result, ema


def listeners(config: Recipe, run: Run) -> list[Listener]:
    """The logger and the hooks that a config names; what fails in them is said, and ends nothing."""
    found = {f"train.hooks={name}": load_object(name) for name in config.train.hooks}
    if (library := config.train.logger) is not None:
        found[f"train.logger={library}"] = logger(library, run.path, keys(cast(BaseModel, config)))
    return [shielded(name, listener) for name, listener in found.items()]


def say_leaks(data: Modality) -> None:
    """Say on stderr how many held-out samples are training samples, too, by a hash of what is stored.

    Of datasets with a method `contents`, see `modalities.data.listing.Contents`; a second or two for the largest.
    """
    for each in data.strata().values() or (data,):
        train = getattr(each.samples_of("train"), "contents", lambda: None)()
        test = None if train is None else getattr(each.plain().samples_of("test"), "contents", lambda: None)()
        if train is not None and test is not None and (line := shared_content(train, test).line()):
            say(line)


def height(config: Recipe) -> Callable[[str], int]:
    """Parameter name -> layers above it where there is layer decay, else always 0, which needs fewer groups."""
    decay = config.optim.layer_decay
    if decay is None:
        return lambda name: 0
    depth = cast(PredictorConfig, getattr(config, "model", None)).depth
    return lambda name: layers_above(name, depth, head_counts=decay.head_counts)


def head(config: Recipe) -> Callable[[str], bool]:
    """Parameter name -> whether it trains at `optim.head_lr`; always False where there is none."""
    return at_head_rate if config.optim.head_lr is not None else lambda name: False


def cost(result: FitResult, model: nn.Module) -> TrainingCost:
    """What a run took and what it was made with, for summary.json."""
    return {
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        "data_wait_share": round(result.data_wait_share, 4),
        "unreadable_samples": len(result.unreadable),
        "unreadable_messages": result.unreadable,
        "changes": list(result.changes),
        "parameters": sum(value.numel() for value in model.parameters()),
        **({"began_with": result.origin["digest"]} if result.origin else {}),
        "made_with": provenance(),
    }
