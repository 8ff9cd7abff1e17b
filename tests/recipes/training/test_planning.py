"""nepa plan: figures beforehand that agree with what training then takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core.runtime.config import override
from recipes.cli import main
from recipes.training import planning
from recipes.training.bench import pass_flops
from recipes.training.planning import Need, Pass, PlanOptions, count_pass, plan_run
from recipes.training.workload import Trained, network, read_trained
from tests import tiny, tiny_scenes

SIZES = {
    "narrow": ("model.dim=128", "model.depth=4", "model.mlp_dim=512", "train.batch=128", "train.micro_batch=128"),
    "middle": ("model.dim=256", "model.depth=6", "model.mlp_dim=1024", "train.batch=64", "train.micro_batch=64"),
    "long": ("model.dim=384", "model.depth=8", "model.heads=6", "model.mlp_dim=1536", "train.batch=24",
             "train.micro_batch=24", "data.patch=[2,2]"),
}  # fmt: skip
MEASURE = """
import sys
from nepa_core.runtime.config import parse_assignments
from nepa_core.runtime.distributed import world
from recipes.training.bench import one_batch, peak_memory, training_memory
from recipes.training.planning import PlanOptions, plan_run
from recipes.training.workload import read_trained
config = read_trained("recipes.vision:cifar10", parse_assignments(sys.argv[2:]))
with world() as ranks:
    if sys.argv[1] == "plan":
        print(plan_run(config, PlanOptions(device="h100")).memory[0].peak(config.train.batch))
    else:
        one_batch(config, ranks, config.train.batch)
        before = peak_memory(ranks.device)
        print(training_memory(config, ranks) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_planned_memory_is_what_training_takes(size: str) -> None:
    """On a CPU, in a process of its own. Pieces of the C library's heap that it does not give back are not planned."""
    words = ("data.source=noise", "data.augment=none", "train.workers=0", "train.precision=float32", *SIZES[size])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    planned, measured = (
        float(subprocess.run([sys.executable, "-c", MEASURE, what, *words], env=environment, capture_output=True,
                             text=True, check=True).stdout)
        for what in ("plan", "measure")
    )  # fmt: skip
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_pass_is_extrapolated_to_any_batch() -> None:
    config = tiny.recipe()
    model = network(config)
    seen = count_pass(config, model, recompute=False, precision="float32")
    larger = _peak_of(config, 16)
    assert seen.peak(16) == pytest.approx(larger, rel=0.02)
    assert seen.activations(16) <= seen.peak(16)
    again = count_pass(config, model, recompute=True, precision="float32")
    assert again.peak(64) < seen.peak(64)


def counted_scenes(folder: Path) -> Trained:
    tiny_scenes.write_scenes(folder)
    return tiny_scenes.recipe().model_copy(update={"data": tiny_scenes.scenes(folder)})


COUNTED: dict[str, Callable[[Path], Trained]] = {
    "plain": lambda _: tiny.recipe(),
    "ragged": lambda _: tiny.ragged(),
    "packed": lambda _: override(tiny.ragged(), {"model.pack": True}),
    "eager": lambda _: override(tiny.recipe(), {"model.attention": "eager", "model.qk_norm": "affine"}),
    "scenes": counted_scenes,
}
OFTEN = ("packed", "eager", "scenes")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in COUNTED]
)
def test_what_is_not_worked_out_changes_no_figure(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Matrix products and attention are stood in for by zeros: bytes, events and operations stay."""
    config = COUNTED[name](tmp_path)
    quick, whole = [], []
    for found, costly in ((quick, planning._COSTLY), (whole, set())):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "_COSTLY", costly)
            model = network(config)
            with planning.Uncomputed():
                found.append(pass_flops(config, planning._HERE, 2, model))
            for recompute in (False, True):
                seen = count_pass(config, model, recompute=recompute, precision="bfloat16")
                found.append([seen.forward, seen.constant.tolist(), seen.slope.tolist()])
    assert quick == whole


def test_a_second_count_of_one_network_is_that_of_a_new_one() -> None:
    config = tiny.recipe()
    model = network(config)
    for recompute in (True, False):
        again = count_pass(config, model, recompute=recompute, precision="float32")
        fresh = count_pass(config, network(config), recompute=recompute, precision="float32")
        assert torch.equal(again.constant, fresh.constant)


def _peak_of(config: Trained, samples: int) -> float:
    """What is alive at most at that batch, counted there."""
    model, step = network(config).train(), planning.step_function(config)
    batch = planning.one_batch(config, planning._HERE, samples)
    step(model, batch).loss.backward()
    model.zero_grad(set_to_none=True)
    with planning.Live([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        out = step(model, batch)
        (out.loss * out.weight).backward()
    return max(live.line)


def test_need_by_strategy() -> None:
    seen = Pass(torch.tensor([0.0, 50.0, 100.0]), torch.tensor([1.0, 10.0, 0.0]), 2)
    one = Need(seen, weights=100, copies=4, block=20, strategy="ddp", devices=1)
    assert (one.held, one.peak(10), one.largest(1000)) == (400, 550, 55)
    many = one._replace(devices=4)
    assert many.peak(10) == 650  # and the buckets of the gradients
    shared = many._replace(strategy="fsdp")
    assert (shared.held, shared.peak(10)) == (100, 100 + 25 + 20 + 150)
    machine = many._replace(strategy="hsdp", devices=2)
    assert (machine.held, machine.peak(10)) == (200, 200 + 50 + 20 + 150)
    assert one.largest(10) == 0


def test_the_largest_micro_batch_is_one_that_training_takes() -> None:
    seen = Pass(torch.tensor([0.0, 50.0, 100.0]), torch.tensor([1.0, 10.0, 0.0]), 2)
    one = Need(seen, weights=100, copies=4, block=20, strategy="ddp", devices=1)
    assert [one.usable(1000, share) for share in (1024, 110, 64, 48)] == [32, 55, 32, 48]  # 55 fit
    assert one.usable(10, 64) == 0


def test_hsdp_has_a_row_where_machines_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tests.tiny:recipe", "devices=4"]) == 0
    assert "hsdp" not in capsys.readouterr().out.partition("memory of one")[2]
    assert main(["plan", "tests.tiny:recipe", "devices=4", "machines=2"]) == 0
    captured = capsys.readouterr()
    held = dict(re.findall(r"^(\w+) +([\d.]+) MiB", captured.out.partition("memory of one")[2], re.MULTILINE))
    assert float(held["ddp"]) > float(held["hsdp"]) > float(held["fsdp"]) > 0
    assert "1/4  building the network" in captured.err


def test_where_starting_kernels_decides_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for share in ("0.5", "1e-8"):
        assert main(["plan", "tests.tiny:recipe", f"share={share}"]) == 0
        said.append(capsys.readouterr().out)
    small, slow = said
    assert "the time of starting kernels decides, not arithmetic: the rate is an upper bound" in small
    assert "at most" in small.split("rate", 1)[1].splitlines()[0]
    assert "starting kernels" not in slow


def test_hours_follow_from_operations() -> None:
    config = override(tiny.recipe(), {"train.length.steps": 1000})
    found = plan_run(config, PlanOptions(device="a100", devices=2, share=0.5))
    assert found.rate == pytest.approx(2 * 0.5 * 312e12 / (pass_flops(config, planning._HERE, 2) / 2))
    assert found.samples == 1000 * config.train.batch
    assert found.hours == pytest.approx(found.samples / found.rate / 3600)
    parameters = sum(each.numel() for each in network(config).parameters())
    assert (found.parameters, found.checkpoint) == (parameters, 4 * 4 * parameters)


@pytest.mark.slow
def test_the_authors_days_follow_from_their_share(capsys: pytest.CaptureFixture[str]) -> None:
    """3 days on 8 H100 at about 14 % (`recipes.vision.base_in1k`)."""
    noise = ("data.source=noise", "data.augment=none", "samples=1281167", "devices=8", "price=2", "kwh_price=0.1")
    assert main(["plan", "recipes.vision:base_in1k", *noise]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1].isalpha())
    days, unit = said["time"].split()[:2]
    assert unit == "days,"
    assert float(days) == pytest.approx(3, abs=0.25)
    assert said["cost"].endswith("for the energy")
    assert said["length"].startswith("499,200 steps of 4,096")


BUILT_IN = {
    "recipes.vision:base_in1k": "noise",
    "recipes.audio:fsdd": "synthetic",
    "recipes.video:folder": "digits",
    "recipes.volumes:folder": "shapes",
    "recipes.text:folder": "stdlib",
    "recipes.events:table": "process",
    "recipes.timeseries:etth1": "var",
}


@pytest.mark.parametrize("recipe", BUILT_IN)
def test_where_the_data_are_not_here_built_in_ones_are_named(
    recipe: str, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = f"; or plan with built-in data in their place: data.source={BUILT_IN[recipe]} samples=N, the number of yours"
    assert fails("plan", recipe).endswith(hint)
    config = read_trained(recipe, {"data.source": BUILT_IN[recipe]})
    assert len(config.data.samples_of("train")) >= planning._SAMPLES[1]  # type: ignore[arg-type]


def test_an_adapter_without_built_in_data_names_none(fails: Callable[..., str]) -> None:
    assert "plan with" not in fails("plan", "recipes.presets:features")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BUILT_IN)
def test_a_plan_with_built_in_data(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, f"data.source={BUILT_IN[recipe]}", "samples=1281167"]) == 0
    assert "GFLOP a sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("device=h1000",), "device=h1000: "),
        (("devices=3",), "train.batch=8 is not a multiple of the 3 processes; set train.batch=6 or 9"),
        (
            ("devices=4", "machines=3"),
            "devices=4 is not a multiple of machines=3, and every machine has as many; set devices=3 or 6",
        ),
        (("samples=1",), "train.batch=8 is more than the 1 training samples; lower it"),
        (("share=1.5",), "share=1.5: "),
    ],
)
def test_what_can_not_be_planned_is_one_line(words: Any, line: str, fails: Callable[..., str]) -> None:
    assert fails("plan", "tests.tiny:recipe", *words).startswith(line)
