"""What a training run will take, before it is paid for: memory, operations, hours, energy, cost.

Memory and operations are those of one forward and backward pass of a few samples on this CPU, counted operation by
operation, and extrapolated to the micro-batch: what is alive at each operation is a constant and so much a sample.
Shapes say all of that, so matrix products and attention, which take nearly all the time, are not worked out.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sized
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from nepa_core.basics import FROZEN, Batch, UserError
from nepa_core.modality import Modality
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import autocast_dtype, plan
from nepa_core.runtime.meter import say_progress
from recipes.training.bench import one_batch, pass_flops
from recipes.training.workload import Trained, network, predictor_in, step_function

_CPU = torch.device("cpu")
_HERE = World(0, 1, _CPU)
_MIB, _GIB = 2**20, 2**30
_ATEN = torch.ops.aten


class Accelerator(NamedTuple):
    """A device, as its maker's data sheet has it.

    Attributes:
        memory: GiB that a program finds free. peak: TFLOP/s of dense bfloat16 matrix products. watts: at most.
    """

    name: str
    memory: float
    peak: float
    watts: float


ACCELERATORS = {
    "a100": Accelerator("NVIDIA A100 SXM 80 GB", 79, 312, 400),
    "h100": Accelerator("NVIDIA H100 SXM", 79, 989, 700),
    "h200": Accelerator("NVIDIA H200 SXM", 139, 989, 700),
    "b200": Accelerator("NVIDIA B200 SXM", 178, 2250, 1000),
    "l40s": Accelerator("NVIDIA L40S", 44, 362, 350),
    "rtx4090": Accelerator("NVIDIA GeForce RTX 4090", 23, 165, 450),
}

AUTHORS = 0.14
"""Share of the peak that the NEPA authors' 3 days on 8 H100 come to (ViT-B/14, 1,600 epochs of ImageNet)."""

_CONTEXT = 1.5  # GiB that CUDA and NCCL take beside the tensors
_SAMPLES = (2, 4)  # of the passes that are counted
_LEAST_PASS = 0.01  # seconds of arithmetic; ViT-B's pass starts 2,200 operations, for some microseconds each
_LOADED, _LOADING = 512, 3.0  # samples and seconds at most by which the rate of loading is measured


class PlanOptions(BaseModel):
    """Options of `nepa plan`."""

    model_config = FROZEN

    device: Literal["a100", "h100", "h200", "b200", "l40s", "rtx4090"] = Field(
        default="h100", description="the accelerator, by its data sheet"
    )
    devices: int = Field(default=1, gt=0, le=2**20, description="how many of them")
    machines: int = Field(
        default=1, gt=0, le=2**20, description="that the devices are in, as many in each: with several, hsdp has a row"
    )
    share: float = Field(
        default=AUTHORS,
        gt=0,
        le=1,
        description="of the device's peak that training reaches; 0.14 is what the NEPA authors' days on H100s come to, "
        "`nepa bench` measures yours",
    )
    samples: int | None = Field(
        default=None, gt=0, le=2**50, description="training samples, where the recipe's data are not here in full"
    )
    price: float | None = Field(default=None, ge=0, description="of one device for an hour, in any currency")
    kwh_price: float | None = Field(default=None, ge=0, description="of a kilowatt-hour, in the same currency")


class Planned(NamedTuple):
    """What `nepa plan` says.

    Attributes:
        parameters: all of them. flops: of a sample, forward and backward. rate: samples a second of all devices.
        steps, samples: of the whole run. micro_batch: of one process. checkpoint: bytes. loaded: samples a second that
            one core loads here.
    """

    parameters: int
    flops: float
    rate: float
    steps: int
    samples: int
    micro_batch: int
    memory: list[Need]
    checkpoint: int
    loaded: float

    @property
    def hours(self) -> float:
        return self.samples / self.rate / 3600


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still alive, after each operation: `line`.

    What an operation takes within itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.line: list[int] = []
        self._now = 0
        self._known = {each.untyped_storage().data_ptr() for each in known}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.line.append(self._now)
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if not size or key in self._alive or storage.data_ptr() in self._known:
            return

        def gone(_: object) -> None:
            self._now -= size
            del self._alive[key]

        self._now += size
        self._alive[key] = weakref.ref(storage, gone)


class Uncomputed(TorchDispatchMode):
    """Matrix products and attention give zeros of the size, dtype and layout that they would have.

    All else is computed, as what is done with the data may depend on their values; convolutions, too, whose layout the
    kernel chooses.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _COSTLY:
            return func(*args, **(kwargs or {}))
        return tree_map(_as_zeros, func(*tree_map(_as_meta, args), **tree_map(_as_meta, kwargs or {})))


_COSTLY = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def _as_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _as_zeros(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


class Pass(NamedTuple):
    """Bytes alive while a micro-batch goes forward and backward, beside what is held throughout.

    Attributes:
        constant, slope: [events] of n samples, constant + n * slope. forward: events before the backward pass.
    """

    constant: Tensor
    slope: Tensor
    forward: int

    def peak(self, samples: int) -> float:
        """With gradients, which are whole at its end."""
        return float((self.constant + samples * self.slope).max())

    def activations(self, samples: int) -> float:
        """The most before gradients are there."""
        return float((self.constant + samples * self.slope)[: self.forward].max())


class Need(NamedTuple):
    """What a device takes in one strategy.

    Attributes:
        weights: bytes of them. copies: of that size that are held, without gradients. block: bytes of the weights and
            gradients of the largest block, which fsdp and hsdp gather. devices: that share one copy, with hsdp those of
            a machine.
    """

    seen: Pass
    weights: int
    copies: int
    block: int
    strategy: str
    devices: int
    recompute: bool = False

    @property
    def held(self) -> float:
        """Bytes of weights, average and optimiser."""
        return self.copies * self.weights / (1 if self.strategy == "ddp" else self.devices)

    def peak(self, samples: int) -> float:
        """Bytes at a micro-batch."""
        if self.strategy != "ddp":
            return self.held + self.weights / self.devices + self.block + self.seen.activations(samples)
        buckets = self.weights if self.devices > 1 else 0  # in which ranks exchange gradients
        return self.held + buckets + self.seen.peak(samples)

    def largest(self, room: float) -> int:
        """The largest micro-batch that fits; 0: not even one sample."""
        low, high = 0, 2**24
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.peak(middle) <= room else (low, middle - 1)
        return low

    def usable(self, room: float, share: int) -> int:
        """The largest value of `train.micro_batch` that fits and divides a device's share of a batch; 0: none."""
        most = min(self.largest(room), share)
        return next((each for each in range(most, 0, -1) if share % each == 0), 0)


def count_pass(config: Trained, model: nn.Module, *, recompute: bool, precision: str) -> Pass:
    """See `Pass`.

    Args:
        model: of `network(config)`. precision: as `train.precision`, of the device that is planned for.
    """
    step = step_function(config)
    model.train()
    predictor_in(model).recompute = recompute
    dtype = autocast_dtype(precision, _CPU)
    lines, forward = list[list[int]](), 0
    for samples in (_SAMPLES[0], *_SAMPLES):  # the first fills what is made once
        batch = one_batch(config, _HERE, samples)
        model.zero_grad(set_to_none=True)
        tensors = (each for each in batch.values() if isinstance(each, Tensor))
        torch.manual_seed(0)
        with Uncomputed(), Live([*model.parameters(), *model.buffers(), *tensors]) as live:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                out = step(model, batch)
                loss = out.loss * out.weight
            forward = len(live.line)
            loss.backward()
        lines.append(live.line)
    model.zero_grad(set_to_none=True)
    few, more = (torch.tensor(line, dtype=torch.float64) for line in lines[1:])
    if len(few) != len(more):  # other kernels for other sizes: the two peaks still say it
        few, more, forward = few.max()[None], more.max()[None], 1
    slope = (more - few) / (_SAMPLES[1] - _SAMPLES[0])
    return Pass(few - _SAMPLES[0] * slope, slope, forward)


def plan_run(config: Trained, options: PlanOptions) -> Planned:
    """Count, and divide.

    Raises:
        UserError: the recipe's data can't be read, or its batch does not fit the devices.
    """
    device, count = ACCELERATORS[options.device], options.devices
    if count % options.machines:
        low = count // options.machines * options.machines
        near = [str(each) for each in (low, low + options.machines) if each]
        raise UserError(
            f"devices={count} is not a multiple of machines={options.machines}, and every machine has as many; "
            f"set devices={' or '.join(near)}"
        )
    data = _training_data(config.data)
    steps = plan(config.train, config.optim, samples=options.samples or len(cast(Sized, data)), ranks=options.devices)
    say_progress("1/4  building the network")
    model = network(config)
    weights = _bytes(model)
    say_progress("2/4  counting operations")
    with Uncomputed():
        flops = pass_flops(config, _HERE, _SAMPLES[0], model) / _SAMPLES[0]
    say_progress("3/4  counting memory, without and with train.recompute")
    memory = _needs(config, model, options)
    say_progress("4/4  timing how fast this core loads samples")
    return Planned(
        parameters=sum(each.numel() for each in model.parameters()),
        flops=flops,
        rate=count * options.share * device.peak * 1e12 / flops,
        steps=steps.total,
        samples=steps.total * config.train.batch,
        micro_batch=config.train.batch // count // steps.accumulate,
        memory=memory,
        checkpoint=_copies(config) * weights,
        loaded=_loading(config),
    )


def _needs(config: Trained, model: nn.Module, options: PlanOptions) -> list[Need]:
    """Of every strategy, without and with recomputing."""
    sharing = {"ddp": options.devices}
    if options.devices > 1:
        sharing["fsdp"] = options.devices
    if options.machines > 1:
        sharing["hsdp"] = options.devices // options.machines
    precision = "bfloat16" if config.train.precision == "auto" else config.train.precision
    block = 2 * max(_bytes(each) for each in predictor_in(model).blocks)  # weights and gradients of one, gathered
    needs = []
    for recompute in (False, True):
        seen = count_pass(config, model, recompute=recompute, precision=precision)
        for strategy, devices in sharing.items():
            needs.append(Need(seen, _bytes(model), _copies(config), block, strategy, devices, recompute))
    return needs


def _copies(config: Trained) -> int:
    """How often the size of the weights is held: with AdamW's two moments, and the average."""
    return 3 + (config.train.ema is not None)


def _training_data(data: Modality) -> Dataset[Batch]:
    try:
        return data.samples_of("train")
    except UserError as error:
        if data.built_in is None:
            raise
        raise UserError(
            f"{error}; or plan with built-in data in their place: data.source={data.built_in} samples=N, the number of "
            "yours"
        ) from error


def _bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters())


def _loading(config: Trained) -> float:
    """Samples a second of processor time that this process reads, augmentation on the CPU and all."""
    data = config.data.samples_of("train")
    count, began = 0, time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch in plain_batches(data, batch=32, device=_CPU, limit=_LOADED, seed=1):
            count += len(next(iter(batch.values())))
            if time.process_time() - began > _LOADING:
                break
    finally:
        torch.set_num_threads(threads)
    return count / max(time.process_time() - began, 1e-9)


def render(planned: Planned, config: Trained, options: PlanOptions) -> str:
    """The plan in plain words and a table of memory."""
    lines = [f"{name:<11} {text}" for name, text in _bill(planned, config, options).items()]
    return "\n".join([*lines, "", *_memory_table(planned, config, options)])


def _bill(planned: Planned, config: Trained, options: PlanOptions) -> dict[str, str]:
    device, count = ACCELERATORS[options.device], options.devices
    hours, kwh = planned.hours, planned.hours * options.devices * device.watts / 1000
    bill = []
    if options.price is not None:
        bill.append(f"{options.price * hours * count:,.0f} for the devices")
    if options.kwh_price is not None:
        bill.append(f"{options.kwh_price * kwh:,.0f} for the energy")
    arithmetic = planned.micro_batch * count / planned.rate  # seconds of a pass of one device
    most = "at most " if arithmetic < _LEAST_PASS else ""
    return {
        "device": f"{count} x {device.name} ({device.peak:,.0f} TFLOP/s in bfloat16, {device.memory:g} GiB)",
        "parameters": f"{planned.parameters:,}",
        "operations": f"{planned.flops / 1e9:,.4g} GFLOP a sample, forward and backward",
        "rate": f"{most}{planned.rate:,.0f} samples/s, {planned.rate / count:,.0f} each, at {100 * options.share:g} % "
        "of the peak" + (" (what the NEPA authors' days come to)" if options.share == AUTHORS else ""),
        **({"small": _small(arithmetic)} if most else {}),
        "length": f"{planned.steps:,} steps of {config.train.batch:,}: {planned.samples:,} samples",
        "time": f"{_time(hours)}, {_amount(hours * count)} device hours",
        "energy": f"{_amount(kwh)} kWh{'' if most else ' at most'}, at {device.watts:g} W a device",
        **({"cost": ", ".join(bill)} if bill else {}),
        "loading": f"{most}{planned.rate / planned.loaded:,.3g} cores like this one, which loads "
        f"{planned.loaded:,.0f} samples/s",
        "checkpoint": f"{_size(planned.checkpoint)}, and {config.train.keep} are kept",
    }


def _small(arithmetic: float) -> str:
    return (
        f"the arithmetic of a micro-batch takes {1000 * arithmetic:.2g} ms of a device. Below {1000 * _LEAST_PASS:g} "
        "ms the time of starting kernels decides, not arithmetic: the rate is an upper bound, and time, energy and "
        "cost are more than these; `nepa bench` measures yours"
    )


def _memory_table(planned: Planned, config: Trained, options: PlanOptions) -> list[str]:
    device, share = ACCELERATORS[options.device], config.train.batch // options.devices
    table = [f"{'memory of one device':<22}{'held':>10}{'peak':>11}  {'largest micro-batch':>20}"]
    room = (device.memory - _CONTEXT) * _GIB
    for each in planned.memory:
        name = each.strategy if options.devices > 1 else "one device"
        peak, most = each.peak(planned.micro_batch), each.usable(room, share) or "none"
        what = f"{name}{', recompute' if each.recompute else ''}"
        fits = "" if peak <= room else "  does not fit"
        table.append(f"{what:<22}{_size(each.held):>10}{_size(peak):>11}  {most:>20}{fits}")
    return [
        *table,
        f"peak: of micro-batches of {planned.micro_batch:,}, and {_CONTEXT} GiB of the device are left free",
        f"largest micro-batch: that fits and divides the {share:,} samples which a device has of a step",
    ]


def _size(count: float) -> str:
    """Bytes, in MiB where they are less than a GiB."""
    value, unit = (count / _GIB, "GiB") if count >= _GIB else (count / _MIB, "MiB")
    digits = 0 if value >= 100 else 2
    return f"{value:,.{digits}f} {unit}"


def _amount(value: float) -> str:
    return f"{value:,.4g}" if value >= 0.01 else "less than 0.01"


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:,.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"
