"""Speed, memory, and where the time of a step goes."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from modalities.data.image_arrays import write_beside
from modalities.data.image_augment import CentreCrop
from modalities.data.image_decode import decode_as_stored
from nepa_core.basics import FROZEN, Batch, UnreadableSample, UserError
from nepa_core.ema import Ema
from nepa_core.modality import Modality
from nepa_core.model import Prediction
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime import trust
from nepa_core.runtime.config import imports_of, override, save_config
from nepa_core.runtime.data import epoch_order, plain_batches
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.fit import FitResult, Plan, Stopwatch, autocast_dtype, fit, plan
from nepa_core.runtime.optim import MOST_STEPS, Duration, make_optimizer
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes.configs import PretrainConfig
from recipes.objective_names import NAMED, named
from recipes.report.provenance import provenance
from recipes.training.train import head, height
from recipes.training.workload import Trained, network, predictor_in, step_function

DECODED = 256  # images in a turn of against=decode
ARRAY = 256  # pixels of a side of them, as nepa resize format=array writes them by default
_CPU = torch.device("cpu")
H100_IMAGES = 2000
"""Images a second of an H100 that loading should keep up with, assumed: about twice the 990 of the NEPA authors'
ViT-B/14 (see recipes.vision), as a faster loop is possible. That is 28 % of the peak; `nepa plan` has their 14 %."""
PHASES = ("data", "forward", "backward", "optimizer", "ema", "rest")


class BenchOptions(BaseModel):
    """Options of `nepa bench`."""

    model_config = FROZEN

    steps: int = Field(default=20, gt=1, le=MOST_STEPS, description="optimiser steps that are timed")
    against: Literal["loop", "transformer", "padding", "objectives", "decode"] | None = Field(
        default=None,
        description="also time turns against a bare loop (loop) or Transformer (transformer), or packed against padded "
        "rows (padding), or other objectives against the cosine (objectives); or loading alone, against bare decoding "
        "(decode)",
    )
    repeats: int = Field(default=5, gt=0, description="turns of each side in the ratio of against=")


def bench(config: Trained, options: BenchOptions, ranks: World) -> dict[str, float]:
    """Time the fit loop on this recipe: once undisturbed, and once waiting for the device after every phase.

    Checkpoints are left out: how often they come is another key.
    """
    whole, apart = Stopwatch(), Stopwatch(lambda: _synchronise(ranks.device))
    memory = training_memory(config, ranks)  # first: the mark only rises, and writing checkpoints takes memory too
    result = timed_fit(config, options.steps, ranks, whole)
    if ranks.device.type == "cuda":  # with what the exchange of gradients takes; checkpoints are written from the CPU
        memory = peak_memory(ranks.device)
    timed_fit(config, options.steps, ranks, apart)
    seconds = sum(whole.seconds.get(name, 0.0) for name in PHASES) / options.steps
    flops = step_flops(config, ranks) / seconds
    ceiling = matmul_ceiling(ranks.device, autocast_dtype(config.train.precision, ranks.device) or torch.float32)
    phases = {name: apart.seconds.get(name, 0.0) for name in PHASES}
    total = sum(phases.values())
    return {
        "tokens/s": result.tokens / options.steps / seconds,
        "samples/s": config.train.batch / seconds,
        "ms/step": 1000 * seconds,
        "TFLOP/s per process": flops / 1e12,
        "TFLOP/s of a large matrix product": ceiling / 1e12,
        "model FLOPs utilisation %": 100 * flops / ceiling,
        "peak memory GiB": memory / 2**30,
        **{f"{name} %": 100 * value / total for name, value in phases.items()},
    }


def timed_fit(config: Trained, steps: int, ranks: World, watch: Stopwatch) -> FitResult:
    """`fit` for a few steps after some that warm up, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        _fit(config, max(2, steps // 4), ranks, Path(folder) / "warm", None)
        return _fit(config, steps, ranks, Path(folder) / "timed", watch)


def _fit(config: Trained, steps: int, ranks: World, folder: Path, watch: Stopwatch | None) -> FitResult:
    train = config.train.model_copy(
        update={"length": Duration(steps=steps), "log": steps, "evaluate": steps, "checkpoint": steps}
    )
    model = model_of(config, ranks)
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return fit(
        model=model,
        step_function=step_function(config),
        dataset=config.data.samples_of("train"),
        config=train,
        optim=config.optim,
        run=run,
        world=ranks,
        ema=None if train.ema is None else Ema(model, train.ema),
        height=height(config),
        head=head(config),
        watch=watch,
        show=False,
    )


def step_flops(config: Trained, ranks: World) -> float:
    """Floating-point operations of one process' share of a step; see `pass_flops`."""
    steps = _plan(config, ranks)
    return steps.accumulate * pass_flops(config, ranks, config.train.batch // ranks.size // steps.accumulate)


def pass_flops(config: Trained, ranks: World, samples: int, model: nn.Module | None = None) -> float:
    """Floating-point operations of so many samples at once, forward and backward, as torch counts them.

    Those of the method: what `train.recompute` does twice counts once.

    Args:
        model: of `network(config)`, where there is one already; it gets gradients.
    """
    model, step = (network(config) if model is None else model).to(ranks.device), step_function(config)
    batch = one_batch(config, ranks, samples)
    with FlopCounterMode(display=False) as counter:
        step(model, batch).loss.backward()
    return float(counter.get_total_flops())


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large square matrix products."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        _synchronise(device)
        began = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def training_memory(config: Trained, ranks: World) -> int:
    """Peak bytes of two bare training steps of one micro-batch."""
    run = bare_step(config, model_of(config, ranks).train(), ranks)
    batch = one_batch(config, ranks, config.train.batch // ranks.size // _plan(config, ranks).accumulate)
    for _ in range(2):
        run(batch)
    return peak_memory(ranks.device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator on CUDA, else the high-water mark of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would give a child its parent's mark
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


# ------------------------------------------------------------------------------------------- references


class BareTransformer(nn.Module):
    """A pre-norm SDPA Transformer of the recipe's shape, with none of RoPE, QK-Norm and LayerScale."""

    def __init__(self, config: PredictorConfig, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.bos = nn.Parameter(torch.zeros(1, config.dim))
        self.blocks = nn.ModuleList(BareBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tokens, *, causal: bool, **_: Any) -> Prediction:
        x = self.embed(tokens.values).float()  # the residual stream is float32 on both sides
        x = embeddings = torch.cat((self.bos.expand(len(x), 1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x, causal)
        return Prediction(embeddings, self.norm(x), None)


class BareBlock(nn.Module):
    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, dim))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        batch, places, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, places, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, places, dim))
        after: Tensor = x + self.mlp(self.norm2(x))
        return after


def bare_step(config: Trained, model: nn.Module, ranks: World) -> Callable[[Batch], None]:
    """Forward, backward, optimiser and EMA, written out: the least a training step can be."""
    step, optimizer = step_function(config), make_optimizer(model, config.optim)
    ema = None if config.train.ema is None else Ema(model, config.train.ema)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    dtype = autocast_dtype(config.train.precision, ranks.device)

    def run(batch: Batch) -> None:
        with torch.autocast(ranks.device.type, dtype, enabled=dtype is not None):
            loss = step(model, batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update()

    return run


def against_bare_loop(config: Trained, options: BenchOptions, ranks: World) -> dict[str, float]:
    """Time of `fit` over the time of a bare loop with the same model, optimiser, EMA and prepared batches."""
    steps = options.steps
    batch = one_batch(config, ranks, config.train.batch)
    ratios = []
    for _ in range(options.repeats):
        run = bare_step(config, model_of(config, ranks).train(), ranks)
        for _ in range(max(2, steps // 4)):
            run(batch)
        began = _now(ranks.device)
        for _ in range(steps):
            run(batch)
        bare = _now(ranks.device) - began
        watch = Stopwatch()
        timed_fit(config, steps, ranks, watch)
        inside = sum(watch.seconds.get(name, 0.0) for name in PHASES if name != "data")
        ratios.append(inside / bare)
    return _ratio("fit loop / bare loop, time", ratios)


def _ratio(name: str, ratios: list[float]) -> dict[str, float]:
    return {name: statistics.median(ratios), f"{name}, lowest": min(ratios), f"{name}, highest": max(ratios)}


def by_turns(
    one: Callable[[Batch], None], other: Callable[[Batch], None], batch: Batch, repeats: int, ranks: World
) -> list[float]:
    """Time of one side over that of the other, each turn by turn after a first that warms up."""
    return [a / b for a, b in turns(one, other, batch, repeats, ranks)]


def turns(
    one: Callable[[Batch], None], other: Callable[[Batch], None], batch: Batch, repeats: int, ranks: World
) -> list[tuple[float, float]]:
    """Seconds of both sides, turn by turn after a first that warms up."""
    found = []
    for _ in range(repeats + 1):
        seconds = []
        for run in (one, other):
            began = _now(ranks.device)
            run(batch)
            seconds.append(_now(ranks.device) - began)
        found.append((seconds[0], seconds[1]))
    return found[1:]


def against_bare_transformer(config: Trained, options: BenchOptions, ranks: World) -> dict[str, float]:
    """Time and peak memory of a training step of this predictor over those of a bare Transformer.

    Raises:
        UserError: the recipe is not of pre-training.
    """
    if not isinstance(config, PretrainConfig):
        raise UserError("against=transformer compares pre-training steps; name a pre-training recipe")
    batch = one_batch(config, ranks, config.train.micro_batch or config.train.batch)
    sides = {
        "nepa": bare_step(config, model_of(config, ranks).train(), ranks),
        "bare": bare_step(config, bare_of(config, ranks).train(), ranks),
    }
    ratios = by_turns(sides["nepa"], sides["bare"], batch, options.repeats, ranks)
    memory = {name: _memory_alone(config, name) for name in sides}
    return {
        **_ratio("predictor / bare Transformer, time", ratios),
        "predictor / bare Transformer, peak memory": memory["nepa"] / memory["bare"],
    }


def against_padding(config: Trained, options: BenchOptions, ranks: World) -> dict[str, float]:
    """Time of a training step with padded rows over that with packed ones: the ratio of their real tokens a second.

    Raises:
        UserError: no token of a batch is padding.
    """
    batch = one_batch(config, ranks, config.train.micro_batch or config.train.batch)
    mask = config.data.read(batch).mask
    if mask is None or mask.all():
        raise UserError("against=padding wants sequences of unequal length, and no token of a batch is padding here")
    configs = {
        name: config.model_copy(update={"model": config.model.model_copy(update={"pack": name == "packed"})})
        for name in ("padded", "packed")
    }
    losses = {name: _first_loss(each, batch, ranks) for name, each in configs.items()}
    sides = {name: bare_step(each, model_of(each, ranks).train(), ranks) for name, each in configs.items()}
    ratios = by_turns(sides["padded"], sides["packed"], batch, options.repeats, ranks)
    return {
        "real tokens %": 100 * float(mask.float().mean()),
        **_ratio("packed / padded rows, real tokens/s", ratios),
        "packed - padded rows, loss": losses["packed"] - losses["padded"],
    }


def against_cosine(config: Trained, options: BenchOptions, ranks: World) -> dict[str, float]:
    """Time of a training step with each named objective over that with the cosine, the fastest turn of each side.

    Raises:
        UserError: the recipe is not of pre-training.
    """
    if not isinstance(config, PretrainConfig):
        raise UserError("against=objectives compares pre-training steps; name a pre-training recipe")
    batch = one_batch(config, ranks, config.train.micro_batch or config.train.batch)

    def side(name: str) -> Callable[[Batch], None]:
        each = named(name, config)
        return bare_step(each, model_of(each, ranks).train(), ranks)

    cosine, figures = side("cosine"), {}
    for name in NAMED:
        if name != "cosine":
            mine, theirs = zip(*turns(side(name), cosine, batch, options.repeats, ranks), strict=True)
            figures[f"{name} / cosine, time"] = min(mine) / min(theirs)
    return figures


def _first_loss(config: Trained, batch: Batch, ranks: World) -> float:
    """Of a network with random weights, the same at every call, in the precision of training."""
    torch.manual_seed(0)
    model, dtype = network(config).to(ranks.device).eval(), autocast_dtype(config.train.precision, ranks.device)
    with torch.autocast(ranks.device.type, dtype, enabled=dtype is not None):
        return float(step_function(config)(model, batch).loss.detach())


def against_bare_decode(config: Trained, options: BenchOptions) -> dict[str, float]:
    """Images a second of CPU time that one core loads, by every path, and what the device does of them.

    This recipe's JPEG beside decode_image + RandomResizedCrop alone; the same images as an array of pixels; that with
    the augmentation left to the device; and JPEG decoded there, where it is a GPU. Loading includes everything up to a
    batch on the CPU. All sides read the same images, and wait for no disk that the first, untimed turn has not read.

    Raises:
        UserError: the recipe's data are not images that are decoded on access.
    """
    torch.set_num_threads(1)
    dataset = config.data.samples_of("train")
    raw = getattr(dataset, "raw", None)
    if raw is None or not isinstance(raw(0), bytes):
        fix = f"a recipe of {type(config.data).__name__} can't be timed so"
        if hasattr(config.data, "in_memory"):
            fix = "set data.in_memory=false and data.root=DIR"
        raise UserError(f"nepa bench against=decode times Images whose files are decoded on access; {fix}")
    count = len(cast(Sized, dataset))
    rows = epoch_order(count, 0, 0)[:DECODED].tolist()  # drawn: folders come class by class
    data = override(config, {"data.augment_on": "cpu", "data.decode_on": "cpu"}).data
    size = next(plain_batches(data.samples_of("train"), batch=1, device=_CPU))["image"].shape[-2:]
    crop = v2.RandomResizedCrop(tuple(size), interpolation=v2.InterpolationMode.BICUBIC)

    def bare() -> None:
        for row in rows:
            with suppress(RuntimeError):  # the damaged ones: ours leaves them out too
                crop(decode_as_stored(raw(row)))

    def decoded() -> None:
        for row in rows:
            with suppress(RuntimeError):
                decode_as_stored(raw(row))

    with tempfile.TemporaryDirectory() as folder:
        kept = as_array(dataset, rows, Path(folder))
        there = {"data.source": "folder", "data.root": folder, "data.limit": None, "data.decode_on": "cpu"}
        array, later = (override(config, there | {"data.augment_on": on}).data for on in ("cpu", "device"))
        pixels: Any = array.samples_of("train")

        def read() -> None:
            for row in range(kept):
                pixels.raw(row)

        sides: dict[str, Callable[[], None]] = {
            "ours": lambda: _loaded(data, len(rows)),
            "bare": bare,
            "decoded": decoded,
            "read": read,
            "array": lambda: _loaded(array, kept),
            "later": lambda: _loaded(later, kept),
        }
        counts = {name: len(rows) if name in ("ours", "bare", "decoded") else kept for name in sides}
        on_device = {"array": later}
        if torch.cuda.is_available():
            with suppress(UserError):  # nothing random is done to the images, so nothing is decoded there
                on_device["gpu"] = override(config, {"data.decode_on": "gpu"}).data
                sides["gpu"], counts["gpu"] = lambda: _loaded(on_device["gpu"], len(rows)), len(rows)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.repeats + 1):
            for name, side in sides.items():
                began = time.process_time()
                side()
                if turn:
                    rates[name].append(counts[name] / (time.process_time() - began))
        done = {name: _done_on_device(each, kept, options.repeats) for name, each in on_device.items()}
    rate = {name: statistics.median(each) for name, each in rates.items()}
    figures = {
        "images/s per core": rate["ours"],
        "bare decode + RandomResizedCrop, images/s per core": rate["bare"],
        **_ratio("ours / bare, images/s", [a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)]),
        f"cores for the {H100_IMAGES:,} images/s of an H100": H100_IMAGES / rate["ours"],
        "JPEG decoded, nothing else, images/s per core": rate["decoded"],
        f"pixels of {ARRAY} x {ARRAY} read, nothing else, images/s per core": rate["read"],
        **_ratio("read / decoded, images/s", [a / b for a, b in zip(rates["read"], rates["decoded"], strict=True)]),
        "array, images/s per core": rate["array"],
        "array / JPEG, images/s": rate["array"] / rate["ours"],
    }
    if done["array"]:
        figures |= {
            "array, augmented on the device, images/s per core": rate["later"],
            "array, augmented on the device / JPEG, images/s": rate["later"] / rate["ours"],
            f"augmented on {_device()}, images/s of the device": done["array"],
        }
    if done.get("gpu"):
        figures |= {
            "JPEG, decoded on the GPU, images/s per core": rate["gpu"],
            "JPEG, decoded on the GPU / on the CPU, images/s": rate["gpu"] / rate["ours"],
            "decoded and augmented on the GPU, images/s of the device": done["gpu"],
        }
    return figures


def as_array(dataset: Any, rows: Sequence[int], folder: Path) -> int:
    """Write some images as both splits of an array, see `modalities.data.image_arrays`; how many could be read."""
    fitted, images, labels, names = CentreCrop((ARRAY, ARRAY)), list[Tensor](), list[int](), list[str]()
    for row in rows:
        with suppress(UnreadableSample):
            images.append(fitted(dataset.decoded(row)).permute(1, 2, 0))
            labels.append(0)
            names.append(dataset.name(row))
    for split in ("train", "val"):
        np.save(folder / f"{split}.npy", torch.stack(images).numpy())
        write_beside(folder / f"{split}.npz", labels, names, ())
    return len(images)


def _loaded(data: Modality, count: int) -> None:
    for _ in plain_batches(data.samples_of("train"), batch=64, device=_CPU, limit=count, seed=0):
        pass


def _done_on_device(data: Modality, count: int, repeats: int) -> float:
    """Images a second of what a batch leaves to the device, by the clock; 0 where it leaves nothing."""
    device = _device()
    batches = list(plain_batches(data.samples_of("train"), batch=64, device=device, limit=count, seed=0))
    if not any(isinstance(value, list) for value in batches[0].values()):
        return 0.0
    rates = []
    for _ in range(repeats + 1):
        began = _now(device)
        for batch in batches:
            data.before_mixing(batch)
        rates.append(count / (_now(device) - began))
    return statistics.median(rates[1:])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


AGAINST: dict[str | None, Callable[[Trained, BenchOptions, World], dict[str, float]]] = {
    "loop": against_bare_loop,
    "transformer": against_bare_transformer,
    "padding": against_padding,
    "objectives": against_cosine,
}
"""Options of `against` that train."""


def _memory_alone(config: PretrainConfig, side: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, Path(folder) / "config.json")
        arguments = (folder, side, imports_of(config))
        code = f"from recipes.training.bench import print_peak; print_peak(*{arguments!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(folder: str, side: str, imports: Sequence[str]) -> None:
    """Run two bare steps of one side and print the peak memory; see `_memory_alone`."""
    trust.allow(imports)
    config = Run(Path(folder)).load_config(PretrainConfig)
    with world() as ranks:
        model = model_of(config, ranks) if side == "nepa" else bare_of(config, ranks)
        run = bare_step(config, model.train(), ranks)
        batch = one_batch(config, ranks, config.train.micro_batch or config.train.batch)
        for _ in range(2):
            run(batch)
        print(peak_memory(ranks.device))


def model_of(config: Trained, ranks: World) -> nn.Module:
    """The network as it trains: on its device, compiled or recomputed where the recipe says so."""
    model = network(config).to(ranks.device)
    if config.train.compile:
        predictor_in(model).compile_blocks()
    if config.train.recompute:
        predictor_in(model).recompute_blocks()
    return model


def _plan(config: Trained, ranks: World) -> Plan:
    samples = len(config.data.samples_of("train"))  # type: ignore[arg-type]
    return plan(config.train, config.optim, samples=samples, ranks=ranks.size)


def bare_of(config: PretrainConfig, ranks: World) -> BareTransformer:
    """A bare Transformer of the recipe's shape, on its device."""
    return BareTransformer(config.model, config.data.embedder(config.model.dim)).to(ranks.device)


def one_batch(config: Trained, ranks: World, size: int) -> Batch:
    """So many training samples, on the device."""
    data: Modality = config.data
    dataset = data.samples_of("train")
    batches: Iterator[Batch] = plain_batches(dataset, batch=size, device=ranks.device, limit=size, seed=0)
    return next(batches)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _now(device: torch.device) -> float:
    _synchronise(device)
    return time.perf_counter()


H100_WORDS = (
    f"{H100_IMAGES:,} images/s of an H100 are assumed: twice what the NEPA authors' days come to for ViT-B/14, so that "
    "a faster loop is fed, too; `nepa plan` counts with their share of the peak"
)


def render(figures: dict[str, float], config: Trained) -> str:
    """The figures a line each, and what they were measured with."""
    width = max(map(len, figures))
    lines = [f"{name:<{width}}  {value:>12,.3f}" for name, value in figures.items()]
    made = ", ".join(f"{name} {value}" for name, value in provenance().items())
    if any("of an H100" in name for name in figures):
        lines += ["", H100_WORDS]
    return "\n".join([*lines, "", f"batch {config.train.batch}, {made}"])
