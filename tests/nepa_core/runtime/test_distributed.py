"""Two processes over gloo train as one does. This file is also the program that torchrun starts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from nepa_core.runtime.checkpoint import Checkpoint, load_latest
from nepa_core.runtime.config import override, save_config
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.run import Run
from recipes.cli import leave
from recipes.configs import PretrainConfig
from recipes.networks.goals import numbered
from recipes.presets import short
from recipes.resolve import read_target
from recipes.training.finetuning import build_classifier, finetune, measure
from recipes.training.pretraining import pretrain
from tests import tiny
from tests.conftest import ROOT
from tests.tiny import CPU


class Case(NamedTuple):
    recipe: str
    keys: dict[str, Any]


CASES = {
    "whole": Case("tests.tiny:recipe", {}),
    "masked": Case("tests.tiny:ragged", {}),
    "masked, accumulated": Case("tests.tiny:ragged", {"train.micro_batch": 2}),
    "random": Case("tests.tiny:random", {"train.micro_batch": 2}),
    "negatives of both": Case(
        "tests.tiny:ragged", {"objective.terms": {"infonce_position": 1.0}, "objective.stop_gradient": False}
    ),
    "heads": Case(
        "tests.tiny:recipe",
        {
            "objective.terms": {"projected_cosine": 1.0, "horizons": 1.0, "intermediate": 1.0},
            "objective.stop_gradient": False,
            "objective.layers": [1],
        },
    ),
    "recomputed": Case("tests.tiny:ragged", {"train.recompute": True, "train.micro_batch": 2}),
}
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks of a module on the loopback interface and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = [sys.executable, *launcher, "--master-port", str(port), "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends the ranks, too
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def rank_main(out: Path, names: list[str]) -> int:
    """What each rank does: train the cases one after the other; rank 1 watches itself for writes below `out`."""
    written: list[str] = []
    if os.environ["RANK"] != "0":
        sys.addaudithook(lambda event, args: written.append(f"{event} {args}") if _writes(event, args, out) else None)
    with world() as ranks:
        for name in names:
            if name == "finetune":
                finetune_and_count(out / name, ranks)
                continue
            case = CASES[name]
            with slow_disk(ranks) if name == "whole" else nullcontext():
                pretrain(read_target(PretrainConfig, case.recipe, case.keys), Run(out / name), ranks)
    if written:
        print(f"rank {os.environ['RANK']} wrote: {written}", file=sys.stderr)
        return 3
    return 0


@contextmanager
def slow_disk(ranks: World) -> Iterator[None]:
    """Rank 0 is slow to write config.json and rank 1 slow to act on its absence: a race lies between them."""

    def write(*args: Any) -> None:
        time.sleep(0.2)
        save_config(*args)

    def exists(path: Path) -> bool:
        answer = os.path.exists(path)
        if path.name == "config.json" and not ranks.is_main:
            time.sleep(0.4)
        return answer

    with patch("nepa_core.runtime.run.save_config", write), patch.object(Path, "exists", exists):
        yield


def finetune_and_count(folder: Path, ranks: World) -> dict[str, Any]:
    """Fine-tune the tiny recipe; then the figures of a network given by its seed, over an uneven number of batches."""
    finetune(short(tiny.recipe()).model_copy(update={"recipe": "tests.tiny:recipe"}), Run(folder), ranks, show=False)
    config = short(
        override(tiny.ragged(), {"data.samples": 53, "data.unreadable": [3, 11], "train.max_unreadable": 0.1})
    )
    model, _ = build_classifier(config, numbered(2))
    torch.nn.init.normal_(model.head.classifier.weight)
    figures = measure(config, model, ranks)
    if ranks.is_main:
        Run(folder).write_summary(figures, "counted.json")
    return figures


def _writes(event: str, args: tuple[Any, ...], out: Path) -> bool:
    if not any(str(arg).startswith(str(out)) for arg in args):
        return False
    return event in WRITES or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


if __name__ == "__main__":
    leave(rank_main(Path(sys.argv[1]), sys.argv[2:]))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every case, each by two processes."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun("tests.nepa_core.runtime.test_distributed", str(out), *CASES, "finetune")
    assert done.returncode == 0, done.stderr  # 3 is that rank 1 wrote something
    return out


def newest(run: Path) -> Checkpoint:
    found, notes = load_latest(run / "checkpoints")
    assert found is not None
    assert notes == []
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["whole", "masked", "masked, accumulated", "negatives of both", "heads", "recomputed"])
def test_two_processes_train_as_one_does(two: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    pretrain(read_target(PretrainConfig, case.recipe, case.keys), Run(tmp_path / "one"), World(0, 1, CPU), show=False)
    expected, found = newest(tmp_path / "one"), newest(two / name)
    for group in expected.tensors.keys() - {"optimizer", "tally"}:
        for key, value in expected.tensors[group].items():
            assert torch.allclose(found.tensors[group][key], value, atol=1e-6), key
    lines = zip(Run(tmp_path / "one").metrics(), Run(two / name).metrics(), strict=True)
    for line, other in lines:
        assert other == pytest.approx(line, rel=1e-3)
    one, both = Run(tmp_path / "one").summary(), Run(two / name).summary()
    assert one is not None
    assert both is not None
    assert both["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert found.state["tokens"] == expected.state["tokens"]
    assert both["made_with"]["processes"] == 2


@pytest.mark.distributed
def test_two_processes_fine_tune_as_one_does_and_count_the_same_to_the_last_digit(two: Path, tmp_path: Path) -> None:
    figures = finetune_and_count(tmp_path / "one", World(0, 1, CPU))
    assert Run(two / "finetune").summary("counted.json") == figures
    expected, found = newest(tmp_path / "one"), newest(two / "finetune")
    for group in ("model", "ema"):
        for key, value in expected.tensors[group].items():
            assert torch.allclose(found.tensors[group][key], value, atol=1e-5), key
    lines = zip(Run(tmp_path / "one").metrics(), Run(two / "finetune").metrics(), strict=True)
    for line, other in lines:
        assert other == pytest.approx(line, rel=1e-2)


@pytest.mark.distributed
def test_two_processes_resume_bit_for_bit(two: Path, tmp_path: Path) -> None:
    """From step 8, two steps into a line of metrics, with everything random on."""
    whole, again = two / "random", tmp_path / "random"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000012")
    (again / "summary.json").unlink()
    done = torchrun("tests.nepa_core.runtime.test_distributed", str(tmp_path), "random")
    assert done.returncode == 0, done.stderr
    assert "going on after step 8" in done.stderr
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    expected, found = newest(whole), newest(again)
    for group, tensors in expected.tensors.items():
        assert all(torch.equal(found.tensors[group][key], value) for key, value in tensors.items()), group


@pytest.mark.distributed
def test_a_wrong_config_ends_both_processes_with_one_line(two: Path) -> None:
    out = two / "whole"
    done = torchrun("recipes", "pretrain", "tests.tiny:ragged", f"out={out}")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("nepa: ")] == [
        f"nepa: {out} holds a run of tests.tiny:recipe; name another folder for tests.tiny:ragged with out=DIR"
    ]


@pytest.mark.distributed
def test_one_sample_a_process_with_nothing_to_compare_it_with_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ['objective.terms={"standardised":1}', "train.batch=2", f"out={out}"]
    done = torchrun("recipes", "pretrain", "tests.tiny:recipe", *words)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("nepa: ")] == [
        "nepa: objective.terms.standardised compares the samples of one forward pass of a process, and train.batch=2 "
        "on 2 processes leaves it one: set train.batch=4 or more"
    ]
    assert not out.exists()
