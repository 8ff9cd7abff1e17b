"""The fit loop. There is one: a task is a step function that turns a batch into a loss.

One optimiser step is: `accumulate` micro-batches forward and backward, one norm of the gradient, one fused
AdamW step that also divides by the weight of the batch, clips, and does nothing where the gradient is not finite
(all on the device, without waiting for it), one fused EMA update.

Everything random in a step is drawn after seeding with (seed, step, micro-batch, rank), and the data order is a
function of (seed, step), so a checkpoint needs no generator state and a resumed run repeats an uninterrupted one
bit for bit on the CPU.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

import torch
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from nepa_core.basics import FROZEN, MOST_SEED, Batch, UserError
from nepa_core.ema import Ema
from nepa_core.pretrainer import HEADS
from nepa_core.runtime.balance import balanced_weights
from nepa_core.runtime.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    load_latest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from nepa_core.runtime.config import listed, load_object
from nepa_core.runtime.data import DrawSampler, TrainingBatches, fold_seed, seed_step
from nepa_core.runtime.distributed import World
from nepa_core.runtime.going_on import Change, Cycle, Settings, take_up
from nepa_core.runtime.meter import Meter
from nepa_core.runtime.optim import Duration, OptimConfig, make_optimizer, set_rates
from nepa_core.runtime.run import Run
from nepa_core.runtime.strategies import Strategy, held
from nepa_core.runtime.whole import Whole, norm_here


class TrainConfig(BaseModel):
    """How long, how much at once, and what is kept.

    Attributes:
        length: of the whole run, in steps or epochs.
        batch: global batch, over all processes and micro-batches.
        micro_batch: most samples a process holds at once, or None for its whole share of the batch; gradient
            accumulation follows from it.
        seed: of weights, data order and everything random in a step.
        ema: decay of the averaged weights, or None for none. Where there is an average it is what is judged.
        precision: "auto" is bfloat16 autocast on CUDA devices that have it and float32 elsewhere.
        strategy: of several processes: "ddp" (each holds the whole network), "fsdp" (each holds a slice of every
            weight, average and mean of the optimiser) or "hsdp" (slices within a machine, a copy on each machine).
        compile: run the predictor's blocks through torch.compile.
        recompute: activation checkpointing, see `Predictor.recompute_blocks`: less memory for more time.
        workers: processes that load data, for each rank, and at most as many as it has cores; 0 loads in the main
            process.
        log, evaluate, checkpoint: steps between lines of metrics, held-out measurements, checkpoints.
        keep: checkpoints that are kept.
        max_unreadable: share of the training samples, and of the held-out ones, that may be unreadable.
        sampling: "shuffled" takes every sample once in an epoch; "balanced" draws as many, with rare classes as often
            as common ones, see `nepa_core.runtime.balance`.
        logger: a library that gets every line, and at the end pictures and card, see `nepa_core.runtime.loggers`.
        hooks: functions of the user's, module:function, that hear of every line, every checkpoint and the end.
        probe: in pre-training, read the labels of a few hundred samples at every held-out measurement, see
            `recipes.training.online_probe`.
    """

    model_config = FROZEN

    length: Duration
    batch: int = Field(gt=0, le=2**40)
    micro_batch: int | None = Field(default=None, gt=0, le=2**40)
    seed: int = Field(default=0, ge=0, lt=MOST_SEED)
    ema: float | None = Field(gt=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    strategy: Strategy = "ddp"
    compile: bool = False
    recompute: bool = False
    workers: int = Field(ge=0, le=2**20)
    log: int = Field(gt=0, le=10**12)
    evaluate: int = Field(gt=0, le=10**12)
    checkpoint: int = Field(gt=0, le=10**12)
    keep: int = Field(gt=0, le=10**12)
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    sampling: Literal["shuffled", "balanced"] = Field(default="shuffled", exclude_if=lambda how: how == "shuffled")
    probe: bool = False
    logger: Literal["tensorboard", "wandb", "mlflow", "trackio"] | None = None
    hooks: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def _hooks_exist(self) -> Self:
        for name in self.hooks:  # here, and not where they are called: a file may have named them
            if not callable(load_object(name)):
                raise UserError(f"train.hooks={name} is no function of (event, what)")
        return self


class StepOutput(NamedTuple):
    """What a step function returns for one micro-batch.

    Attributes:
        loss: float32 scalar, a mean.
        weight: of how many things (predictions, labels) the loss is a mean: a batch's loss is the mean over
            all of them, however they fall on micro-batches and ranks.
        tokens: real input tokens seen, padding not counted, for the rate.
        broken: [B] uint8, 0 but for samples of the batch that are not finite, see `replace_broken`; None where that
            was not looked at.
    """

    loss: Tensor
    weight: Tensor | float
    tokens: Tensor | int
    broken: Tensor | None = None


StepFunction = Callable[[nn.Module, Batch], StepOutput]


class FitResult(NamedTuple):
    """Figures of a finished fit over all sittings of a resumed run.

    Attributes:
        unreadable: names of the samples skipped, and why. changes: see `going_on.TakenUp`. origin: see `fit`.
    """

    steps: int
    seconds: float
    tokens: int
    data_wait_share: float
    unreadable: list[str]
    changes: Sequence[Change] = ()
    origin: Mapping[str, Any] | None = None


class Diverged(UserError):
    """The gradients are no longer finite. A search of learning rates may go on without this one."""


class Interrupted(Exception):
    """The run was asked to stop and did, after a checkpoint. `status` is the exit status for it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)  # both, or it can't be brought from one process to another
        self.message, self.status = message, status

    def __str__(self) -> str:
        return self.message


class Plan(NamedTuple):
    """A run in steps: what follows from the config, the size of the data and the number of processes."""

    total: int
    warmup: int
    per_epoch: int
    accumulate: int
    peak_lr: float


def samples_at_once(config: TrainConfig, *, ranks: int) -> int:
    """Samples of one forward pass of one process: its share of the batch, or `micro_batch` where that is less.

    Raises:
        UserError: the batch does not fit the processes or the micro-batch.
    """
    if config.batch % ranks:
        near = " or ".join(map(str, _batches_near(config, ranks)))
        raise UserError(
            f"train.batch={config.batch} is not a multiple of the {ranks} processes; set train.batch={near}"
        )
    share = config.batch // ranks
    micro = min(config.micro_batch or share, share)
    if share % micro:
        most = next(size for size in range(micro, 0, -1) if share % size == 0)
        raise UserError(
            f"train.micro_batch={micro} does not divide the {share} samples each process gets; "
            f"set train.micro_batch={most}"
        )
    return micro


def _batches_near(config: TrainConfig, ranks: int) -> list[int]:
    """The next smaller and larger batches that fit the processes and, where there is one, the micro-batch."""
    low = config.batch // ranks
    high, micro = low + 1, config.micro_batch
    if micro is not None:
        low = low if low <= micro else low // micro * micro
        high = high if high <= micro else -(-high // micro) * micro
    return [share * ranks for share in (low, high) if share]


def plan(config: TrainConfig, optim: OptimConfig, *, samples: int, ranks: int) -> Plan:
    """Turn durations into steps and the global batch into micro-batches.

    Raises:
        UserError: the batch does not fit the data, the processes or the micro-batch.
    """
    per_epoch = samples // config.batch
    if per_epoch == 0:
        raise UserError(f"train.batch={config.batch} is more than the {samples} training samples; lower it")
    accumulate = config.batch // (ranks * samples_at_once(config, ranks=ranks))
    if config.length.fraction is not None:
        raise UserError("train.length is the whole run: give it in steps or epochs")
    total = config.length.in_steps(steps_per_epoch=per_epoch, total=0)
    if total == 0:
        raise UserError("train.length is 0 steps; lengthen it")
    warmup = optim.warmup.in_steps(steps_per_epoch=per_epoch, total=total)
    return Plan(total, min(warmup, total), per_epoch, accumulate, optim.peak(config.batch))


class Stopwatch:
    """Where the time of a step goes. `synchronise` waits for the device at every lap (for `nepa bench`)."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronise = synchronise
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        if self._synchronise is not None:
            self._synchronise()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class _Tally:
    """Sums since the last line of metrics, over all ranks, on the device.

    They are part of a checkpoint, so a line never loses a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = {name: torch.zeros((), device=device) for name in ("loss", "weight", "grad_norm", "skipped")}
        self.steps = 0

    def add(self, **values: Tensor) -> None:
        bad = values["skipped"] > 0
        for name, value in values.items():
            self.sums[name] += value if name == "skipped" else value.masked_fill(bad, 0.0)
        self.steps += 1

    def take(self) -> tuple[dict[str, float], int]:
        """The sums as numbers (waits for the device) and the steps they are over; starts again from zero."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).tolist()
        steps, self.steps = self.steps, 0
        for value in self.sums.values():
            value.zero_()
        return dict(zip(names, values, strict=True)), steps


def fit(
    *,
    model: nn.Module,
    step_function: StepFunction,
    step_at: Callable[[float], StepFunction] | None = None,
    dataset: Dataset[Batch],
    config: TrainConfig,
    optim: OptimConfig,
    run: Run,
    world: World,
    ema: Ema | None = None,
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    untrained: bool = True,
    changed_data: bool = False,
    height: Callable[[str], int] = lambda name: 0,
    head: Callable[[str], bool] = lambda name: False,
    begin: Callable[[], object] = lambda: None,
    origin: Mapping[str, Any] | None = None,
    watch: Stopwatch | None = None,
    show: bool = True,
) -> FitResult:
    """Train `model` in place to the end of its plan, going on from the run's newest checkpoint.

    Args:
        model: on `world.device`. All its trainable parameters must take part in every step.
        step_function: (model as the ranks share it, batch) -> StepOutput; called under autocast.
        step_at: the share of the run that is done -> the step function from there on; for one that changes with it.
        ema: the averages of `model`'s parameters, updated after every step.
        evaluate: held-out figures for metrics.jsonl, called on every rank before the first step, every
            `config.evaluate` steps and after the last; what the main process returns is logged, and a "warning" and
            figures of the online probe are shown, too.
        untrained: False leaves out the evaluation before the first step, as where a new head gives only zeros.
        changed_data: go on although the data is not what it was at the last checkpoint, see `Modality.changed`.
        height: parameter name -> number of layers above its own, for `optim.layer_decay`.
        head: parameter name -> whether it trains at `optim.head_lr`.
        begin: writes the settings into the run's folder: called on the main process, once it is known that they fit
            what is there and before anything else is written.
        origin: plain values that say where the weights of `model` are from; kept in every checkpoint.
        watch: told where the time of every step goes.
        show: progress on the screen.

    Raises:
        UserError: the plan does not fit, the disk is full, too many samples are unreadable, or a whole
            interval of steps had gradients that are not finite.
        Interrupted: Ctrl-C or SIGTERM, on every rank where it came to one; a checkpoint was written. After the last
            step, too: what follows in the same command is not begun.
    """
    planned = plan(config, optim, samples=len(cast(Sized, dataset)), ranks=world.size)
    training = _Training(
        model=model,
        ema=ema,
        dataset=dataset,
        config=config,
        optim=optim,
        plan=planned,
        run=run,
        world=world,
        height=height,
        head=head,
        origin=origin,
        watch=watch or Stopwatch(),
    )
    with (
        Meter(planned.total, enabled=show and world.is_main) as meter,
        _stop_requests() as stop,
        BackgroundWriter(lambda path: run.tell("checkpoint", str(path))) as writer,
    ):
        training.restore(changed_data=changed_data, say=meter.say)
        world.barrier()  # all have read what is written from here on
        if world.is_main:
            begin()
            training.trim_run()
        if (training.done == 0 and untrained) or not training.measured:
            _measure(evaluate, training, meter)
        meter.resume(training.done)
        training.begin()
        while training.done < planned.total:
            training.step(step_function if step_at is None else step_at(training.done / planned.total))
            done, last = training.done, training.done == planned.total
            meter.advance(done)
            if done % config.log == 0 or last:
                _log(training, meter)
            if done % config.evaluate == 0 or last:
                _measure(evaluate, training, meter, training.kept_if_refused(writer, meter))
            stopping = stop.wanted if world.size == 1 else done % config.log == 0 and world.any(stop.wanted)
            training.watch.lap("rest")
            if done % config.checkpoint == 0 or done == training.steady or last or stopping:
                training.save(writer)
                training.watch.lap("checkpoint")
            writer.look()
            if stopping and not last:
                writer.wait()
                raise Interrupted(
                    f"stopped after step {done} of {planned.total}; the same command goes on from there", stop.status
                )
        training.end()
        writer.wait()
    result = training.result()
    if world.any(stop.wanted):  # since the last step; read here, where a signal is no longer taken for later
        raise Interrupted(
            f"stopped after the last of {planned.total} steps, which are kept; the same command goes on from there",
            stop.status,
        )
    return result


class _Training:
    """What the steps of a run change: network, average, optimiser, tally, and how far they are.

    Attributes:
        done: steps, over all sittings. steady: the step whose checkpoint stays, see `going_on.Cycle.steady`.
        measured: held-out figures of what was restored are written, as far as they are due.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        ema: Ema | None,
        dataset: Dataset[Batch],
        config: TrainConfig,
        optim: OptimConfig,
        plan: Plan,
        run: Run,
        world: World,
        height: Callable[[str], int],
        head: Callable[[str], bool],
        origin: Mapping[str, Any] | None,
        watch: Stopwatch,
    ) -> None:
        self.run, self.world, self.watch, self.done = run, world, watch, 0
        self._model, self._ema, self._dataset = model, ema, dataset
        self._config, self._optim, self._plan, self._origin = config, optim, plan, origin
        self._settings = Settings(optim, config)
        self._trained = held(model, ema, world, config.strategy)
        self._optimizer = make_optimizer(self._trained, optim, height, head)
        self._tally = _Tally(world.device)
        self._data = fingerprint_of(dataset)
        self._weights = balanced_weights(dataset) if config.sampling == "balanced" else None
        self._names: dict[Tensor, str] = {value: name for name, value in self._trained.named_parameters()}
        self._parameters = [value for _, value in self._trained.named_parameters() if value.requires_grad]
        self._sitting = Sitting(Cycle(0, plan.warmup, plan.total))
        self._tokens = torch.tensor(0, device=world.device)  # stays there: reading it would wait for the device
        self._began = time.perf_counter()

    def restore(self, *, changed_data: bool, say: Callable[[str], None]) -> None:
        """Go back to where the run was left, see `restore`."""
        self._sitting = restore(
            self.run,
            self.world,
            model=self._model,
            optimizer=self._optimizer,
            names=self._names,
            part=self._trained.part,
            ema=self._ema,
            tally=self._tally,
            data=None if changed_data else self._data,
            settings=self._settings,
            plan=self._plan,
            say=say,
        )
        self.done = self._sitting.step
        self.steady = self._sitting.cycle.steady(self._optim)
        self._tokens += self._sitting.tokens

    def trim_run(self) -> None:
        """Set the files of the run's folder back to where it goes on."""
        if 0 < self.done < self._plan.total:
            self.run.set_aside(self.done)
        self.run.truncate_metrics(self._sitting.metrics_bytes)

    def begin(self) -> None:
        """Open the data and hand the network to the processes; time counts from here on."""
        self._batches = _batches(
            self._dataset,
            self._config,
            self.world,
            self._weights,
            accumulate=self._plan.accumulate,
            start=self.done,
            stop=self._plan.total,
        )
        self._batches.unreadable.update(self._sitting.unreadable)
        self._stream = iter(self._batches)
        self._model.train()
        self._shared = self._trained.begin().train()
        self._began = time.perf_counter()
        self.watch.lap("start")

    def step(self, step_function: StepFunction) -> None:
        """One optimiser step: gradients of all micro-batches, AdamW, the average, the tally."""
        sums = self._accumulate(step_function)
        self._trained.collect()
        self._rate = self._set_rates()
        loss, weight, seen = self.world.sum(sums)
        self._tokens += seen.long()
        norm, skipped = update(
            self._optimizer,
            self._parameters,
            weight=weight / self.world.size,
            clip=self._optim.clip,
            norm_of=self._trained.norm,
        )
        self.watch.lap("optimizer")
        if self._trained.ema is not None:
            self._trained.ema.update()
            self.watch.lap("ema")
        self._tally.add(loss=loss, weight=weight, grad_norm=norm, skipped=skipped)
        self.done += 1

    def _set_rates(self) -> float:
        cycle = self._sitting.cycle
        return set_rates(
            self._optimizer,
            self._optim,
            peak=self._plan.peak_lr,
            step=self.done - cycle.start,
            total=cycle.total - cycle.start,
            warmup=cycle.warmup,
        )

    def _accumulate(self, step_function: StepFunction) -> Tensor:
        """Forward and backward over the micro-batches of a step; gradients are left as sums over all that was weighed.

        Returns:
            [3] float32, sums on this rank: of loss times weight, of the weights, and of the tokens.
        """
        world, parts = self.world, self._plan.accumulate
        sums = torch.zeros(3, device=world.device)
        dtype = autocast_dtype(self._config.precision, world.device)
        for part in range(parts):
            batch = next(self._stream)
            self.watch.lap("data")
            seed_step(fold_seed(self._config.seed, "step", self.done, part, world.rank), world.device)
            with self._trained.micro_batch(first=part == 0, last=part == parts - 1):
                # Autocast is entered anew each time: around the whole loop it would keep stale casts of the weights.
                with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
                    out = step_function(self._shared, batch)
                self.watch.lap("forward")
                if out.broken is not None:
                    self._batches.suspect(out.broken)
                weighted = out.loss * out.weight
                weighted.backward()
            sums[0] += weighted.detach()
            sums[1] += out.weight
            sums[2] += out.tokens
            self.watch.lap("backward")
        return sums

    def line(self) -> dict[str, float]:
        """The figures since the last line of metrics.

        Raises:
            Diverged: no step since then had a finite gradient.
        """
        self._batches.settle()
        return _metrics_line(self._tally, done=self.done, lr=self._rate, epoch=self.done / self._plan.per_epoch)

    def timing(self) -> dict[str, Any]:
        """Steps done, seconds and tokens over all sittings; waits for the device."""
        return {"step": self.done, "seconds": self.seconds(), "tokens": int(self._tokens)}

    def seconds(self) -> float:
        """Spent on steps, over all sittings."""
        return self._sitting.seconds + time.perf_counter() - self._began

    @property
    def measured(self) -> bool:
        return self._sitting.measured

    @contextmanager
    def kept_if_refused(self, writer: BackgroundWriter, meter: Meter) -> Iterator[None]:
        """Around a measurement: where held-out data can't be read, the steps so far are not lost with it.

        Of one process alone: of several, the others may wait for this one elsewhere than in `save`.
        """
        try:
            yield
        except UserError:
            if self.world.size == 1:
                with suppress(UserError):  # of a full disk: what ended the run is said
                    self.save(writer, measured=False)
                    writer.wait()
                    meter.say(f"the {self.done} steps so far are kept; the same command goes on from there")
            raise

    def whole(self) -> AbstractContextManager[None]:
        """Within the block model and average hold their values, see `Whole.whole`."""
        return self._trained.whole()

    def save(self, writer: BackgroundWriter, *, measured: bool = True) -> None:
        """Copy all that `restore` needs, and have it written while training goes on; called on every rank.

        Args:
            measured: False where held-out figures are due and not written; they are then measured first of all.
        """
        seconds, tokens = self.seconds(), int(self._tokens)
        self._batches.settle()
        unreadable = self.world.union(self._batches.unreadable)
        tensors = self._tensors()
        if not self.world.is_main:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # the copies are there
        state = {
            "metrics_bytes": self.run.metrics_size(),
            "seconds": seconds,
            "tokens": tokens,
            "tally_steps": self._tally.steps,
            "unreadable": unreadable,
            "data": self._data,
            "cycle": list(self._sitting.cycle),
            "settings": self._settings.stored(),
            "changes": list(self._sitting.changes),
            "origin": self._sitting.origin or self._origin,
            "measured": measured,
        }
        stays = self.steady if self._optim.schedule == "wsd" else None
        checkpoint = Checkpoint(self.done, tensors, state)
        writer.write(partial(save_checkpoint, self.run.checkpoints, checkpoint, keep=self._config.keep, stays=stays))

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        groups = {"optimizer": optimizer_tensors(self._optimizer, self._names), "tally": self._tally.sums}
        groups |= _heads_apart("model", self._trained.state())
        if self._trained.ema is not None:
            groups |= _heads_apart("ema", self._trained.ema.averages)
        return {group: _copies(each, self._trained, kept=self.world.is_main) for group, each in groups.items()}

    def end(self) -> None:
        """Model and average hold their values from here on; called on every rank."""
        self._trained.end()

    def result(self) -> FitResult:
        spent = self.watch.seconds
        working = sum(spent.values()) - spent.get("start", 0.0)
        return FitResult(
            steps=self._plan.total,
            seconds=self.seconds(),
            tokens=int(self._tokens),
            data_wait_share=spent.get("data", 0.0) / max(working, 1e-9),
            unreadable=self.world.union(self._batches.unreadable),
            changes=self._sitting.changes,
            origin=self._sitting.origin or self._origin,
        )


def _measure(
    evaluate: Callable[[], Mapping[str, Any]] | None,
    training: _Training,
    meter: Meter,
    around: AbstractContextManager[None] | None = None,
) -> None:
    """Log the held-out figures, and show those that a reader waits for.

    Args:
        around: entered while held-out data is read.
    """
    if evaluate is None:
        return
    with around or nullcontext(), meter.busy("held-out data"), training.whole():
        figures = evaluate()
    if not training.world.is_main:
        return
    training.run.log({"step": training.done, **figures})
    for name, figure in figures.items():
        if name == "warning":
            meter.say(f"step {training.done}: {figure}")
        elif name.startswith("probe_"):
            meter.say(f"step {training.done}: {name.replace('_', ' ')} {figure:.3f}")


def _log(training: _Training, meter: Meter) -> None:
    """Log the figures since the last line, and how long all has taken."""
    line = training.line()
    if training.world.is_main:
        training.run.log(line)
        training.run.log_timing(training.timing())
        meter.note(f"loss {line['loss']:.4f}")
    if line["skipped_steps"]:
        meter.say(f"step {training.done}: {line['skipped_steps']:.0f} steps skipped, their gradients were not finite")


def fingerprint_of(dataset: Dataset[Batch]) -> str:
    """Tells a data set from what it becomes when files are added or lost: its own `fingerprint()`, or its length."""
    own = getattr(dataset, "fingerprint", None)
    return f"{len(cast(Sized, dataset))} samples" if own is None else str(own())


class Sitting(NamedTuple):
    """Where an earlier sitting of a run stopped: steps done, time and tokens spent, samples found unreadable.

    Attributes:
        cycle, changes: see `going_on.TakenUp`. metrics_bytes: of metrics.jsonl then. origin: see `fit`.
        measured: see `_Training`.
    """

    cycle: Cycle
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    unreadable: Sequence[str] = ()
    changes: Sequence[Change] = ()
    metrics_bytes: int = 0
    origin: Mapping[str, Any] | None = None
    measured: bool = True


def restore(
    run: Run,
    world: World,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    part: Callable[[str, Tensor], Tensor],
    ema: Ema | None,
    tally: _Tally,
    data: str | None,
    settings: Settings,
    plan: Plan,
    say: Callable[[str], None],
) -> Sitting:
    """The one place where training state is restored.

    Precedence: the newest undamaged checkpoint of this run, or where its length has changed the one that `take_up`
    finds; else the model as it was handed in (from the seed, or from an `init=` that the task has loaded).

    Args:
        part: see `Whole.part`; of the optimiser's means. Model and average are those that were handed in, whole.
        data: `fingerprint_of` the data, which must be that of the checkpoint; None where that does not matter.

    Raises:
        UserError: the network that the recipe builds now is not the one that was stored, the data has changed, the
            steps that are done don't allow the new length, or every checkpoint is damaged.
    """
    checkpoint, notes = load_latest(run.checkpoints)
    for note in notes:
        say(note)
    stored = None if checkpoint is None else checkpoint.state.get("data")
    # What is looked at may have grown since, behind a semicolon.
    if checkpoint is not None and None not in (data, stored) and not f"{data};".startswith(f"{stored};"):
        raise UserError(
            f"the training data of {run.path} changed since step {checkpoint.step} (then {stored}; now {data}), so the "
            "samples would come in another order: give it back, go on all the same with data.changed=true, or name "
            "another folder with out=DIR"
        )
    cycle = Cycle(0, plan.warmup, plan.total)
    if checkpoint is None:
        if notes:
            raise UserError(
                f"no checkpoint of {run.path} can be read, and training from the start would replace them: put the "
                f"damaged files back, name another folder with out=DIR, or remove {run.checkpoints}"
            )
        return Sitting(cycle)
    found = take_up(run, checkpoint, settings, cycle, per_epoch=plan.per_epoch)
    checkpoint = found.checkpoint
    state, tensors = checkpoint.state, checkpoint.tensors
    try:
        sitting = Sitting(
            found.cycle,
            checkpoint.step,
            state["seconds"],
            state["tokens"],
            state["unreadable"],
            found.changes,
            state["metrics_bytes"],
            state.get("origin"),
            state.get("measured", True),
        )
        model.load_state_dict(_with_heads("model", checkpoint))
        restore_optimizer(optimizer, names, tensors["optimizer"], part)
        if ema is not None:
            ema.restore(_with_heads("ema", checkpoint))
        for name, value in tensors["tally"].items():
            tally.sums[name].copy_(value)
        tally.steps = state["tally_steps"]
    except RuntimeError as error:
        raise UserError(
            f"the checkpoints of {run.path} are of another network than the recipe builds now: {error}; "
            "give the earlier code back, or name another folder with out=DIR"
        ) from error
    except KeyError as error:
        if "optimizer" not in tensors:
            raise UserError(
                f"{run.path} holds weights without the optimiser's state, as a pushed run does, so it can't go on: "
                f"begin another one with them by init={run.path}"
            ) from error
        raise UserError(
            f"{run.checkpoints}: the newest checkpoint lacks {error}, so it was written by another version; give the "
            "earlier code back, or name another folder with out=DIR"
        ) from error
    for line in found.said:
        say(line)
    return sitting


def _heads_apart(group: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A group of a checkpoint, and its objective heads as a group of their own, which no reader of weights takes."""
    heads = {name: value for name, value in tensors.items() if name.startswith(HEADS)}
    rest = {name: value for name, value in tensors.items() if name not in heads}
    return {group: rest} | ({f"{group}_heads": heads} if heads else {})


def _copies(tensors: Mapping[str, Tensor], trained: Whole, *, kept: bool) -> dict[str, Tensor]:
    """Copies on the CPU, whole and one after the other, which no later step changes; called on every rank.

    Args:
        tensors: by the name of a parameter, or by that and "/KEY". kept: False gives none, as on all ranks but one.
    """
    found = {}
    for key, value in tensors.items():
        whole = trained.gathered(key.partition("/")[0], value)
        if kept:
            copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
            found[key] = copy.copy_(whole.detach(), non_blocking=True)
    return found


def _with_heads(group: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The way back of `_heads_apart`."""
    return checkpoint.tensors[group] | checkpoint.tensors.get(f"{group}_heads", {})


def _batches(
    dataset: Dataset[Batch],
    config: TrainConfig,
    world: World,
    weights: Tensor | None,
    *,
    accumulate: int,
    start: int,
    stop: int,
) -> TrainingBatches:
    sampler = DrawSampler(
        len(cast(Sized, dataset)),
        batch=config.batch,
        accumulate=accumulate,
        rank=world.rank,
        ranks=world.size,
        seed=config.seed,
        start=start,
        stop=stop,
        strata=dataset.strata() if hasattr(dataset, "strata") else None,
        weights=weights,
    )
    return TrainingBatches(
        dataset, sampler, workers=config.workers, max_unreadable=config.max_unreadable, device=world.device
    )


def update(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    *,
    weight: Tensor,
    clip: float | None,
    norm_of: Callable[[list[Tensor]], Tensor] = norm_here,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on gradients that are sums still to be divided by `weight`.

    Division, clipping and the finite check ride on the fused AdamW kernel (its `grad_scale` and `found_inf`,
    made for loss scaling), so they cost one reading of the gradients and no waiting for the device.

    Args:
        norm_of: the norm of all gradients together, where these are slices also over the processes.

    Returns:
        The gradient's norm before clipping, and 1.0 where the step was skipped (not finite), else 0.0.
    """
    gradients = [value.grad for value in parameters if value.grad is not None]
    norm = norm_of(gradients) / weight
    skipped = (~torch.isfinite(norm)).float()
    scale = weight if clip is None else weight * (norm / clip).clamp(min=1.0)
    optimizer.grad_scale, optimizer.found_inf = scale, skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def _metrics_line(tally: _Tally, *, done: int, lr: float, epoch: float) -> dict[str, float]:
    """The figures since the last line.

    Raises:
        Diverged: no step since then had a finite gradient.
    """
    sums, steps = tally.take()
    if sums["skipped"] == steps:
        raise Diverged(
            f"the last {steps} steps up to step {done} had gradients that are not finite: lower optim.lr or look for "
            "broken samples; checkpoints before this are kept"
        )
    return {
        "step": done,
        "epoch": epoch,
        "lr": lr,
        "loss": sums["loss"] / sums["weight"],
        "grad_norm": sums["grad_norm"] / (steps - sums["skipped"]),
        "skipped_steps": sums["skipped"],
    }


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on this device, or None for float32 throughout; see `TrainConfig.precision`."""
    if precision == "bfloat16":
        return torch.bfloat16
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


class _Stop:
    """Whether this rank was asked to stop, and the exit status: that of SIGTERM where only another one was asked."""

    wanted = False
    status = 128 + signal.SIGTERM


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Within the block the first Ctrl-C or SIGTERM asks for a stop after the step; a second one ends at once."""
    stop = _Stop()
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        stop.wanted, stop.status = True, 128 + number
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
