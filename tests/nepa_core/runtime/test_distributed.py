"""Two processes over gloo, and two "machines" of two, train as one does, however the network is held.

This file is also the program that torchrun starts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

import nepa_core
from nepa_core.basics import Batch
from nepa_core.runtime.checkpoint import Checkpoint, load_latest
from nepa_core.runtime.config import override, save_config
from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.fit import Interrupted, StepFunction, StepOutput
from nepa_core.runtime.locks import take_back
from nepa_core.runtime.run import Run
from recipes.cli import leave, main
from recipes.configs import PretrainConfig
from recipes.networks.goals import numbered
from recipes.presets import short
from recipes.resolve import read_target
from recipes.training import pretraining
from recipes.training.finetuning import build_classifier, finetune, measure
from recipes.training.pretraining import pretrain
from tests import tiny
from tests.conftest import ROOT
from tests.tiny import CPU


class Case(NamedTuple):
    recipe: str
    keys: dict[str, Any]
    several: tuple[str, ...] = ()
    """Keys that are true with several processes alone."""


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
    "prediction head": Case(
        "tests.tiny:ragged", {"objective.terms": {"cosine": 1.0, "raw_token": 1.0}, "objective.head": "simsiam"}
    ),
    "recomputed": Case("tests.tiny:ragged", {"train.recompute": True, "train.micro_batch": 2}),
    "balanced": Case("tests.tiny:ragged", {"train.sampling": "balanced", "train.micro_batch": 2}),
    "packed": Case("tests.tiny:ragged", {"model.pack": True, "train.micro_batch": 1, "train.keep": 3}),
}
SHARDED = {
    "fsdp packed": Case(*CASES["packed"]),
    "fsdp negatives": Case(*CASES["negatives of both"]),
    "fsdp heads": Case("tests.tiny:recipe", CASES["heads"].keys, ("train.recompute", "train.compile")),
    "fsdp random": Case(*CASES["random"]),
    "fsdp prediction head": Case(*CASES["prediction head"]),
    "fsdp finetune": Case("", {}),
}
"""With two processes. The first word is the strategy."""
FOUR = {
    "ddp packed": Case(*CASES["packed"]),
    "hsdp packed": Case(*CASES["packed"]),
    "hsdp negatives": Case(*CASES["negatives of both"]),
    "fsdp heads": SHARDED["fsdp heads"],
    "fsdp regrown": Case(*CASES["packed"]),
}
"""With two machines of two."""
PROGRAM = "tests.nepa_core.runtime.test_distributed"
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def torchrun(
    *words: str, machines: int = 1, fewest: int | None = None, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Start two ranks of a module on the loopback interface, or two on each of several "machines", and wait for them.

    Args:
        fewest: machines with which it goes on where others are lost; what the first one says then counts.
        restarts: how often torchrun starts them anew where one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The lines of docs/many-gpus.md.
    nodes = str(machines) if fewest is None else f"{fewest}:{machines}"
    meeting = ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    where = meeting if machines > 1 or restarts else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts), *where]
    if fewest is not None:
        launcher += ["--rdzv-conf", "last_call_timeout=10,is_host={}"]  # on one computer both would be the first one
    command = [sys.executable, *launcher, "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with ExitStack() as stack:
        agents = [
            stack.enter_context(
                Popen([word.replace("is_host={}", f"is_host={int(machine == 0)}") for word in command],
                      cwd=ROOT, env=environment, stdout=PIPE, stderr=PIPE, text=True)
            )
            for machine in range(machines)
        ]  # fmt: skip
        try:
            said = [agent.communicate(timeout=600) for agent in agents]
        except subprocess.TimeoutExpired:
            for agent in agents:
                agent.terminate()  # it ends the ranks, too
            raise
    if fewest is not None:
        return subprocess.CompletedProcess(command, agents[0].returncode, *said[0])
    status = max((agent.returncode for agent in agents), key=abs)
    return subprocess.CompletedProcess(command, status, *("".join(each) for each in zip(*said, strict=True)))


def rank_main(out: Path, names: list[str]) -> int:
    """What each rank does: train the cases one after the other; rank 1 watches itself for writes below `out`."""
    if names == ["refused"]:
        return refused(out / "refused")
    written: list[str] = []
    if os.environ["RANK"] != "0":
        sys.addaudithook(lambda event, args: written.append(f"{event} {args}") if _writes(event, args, out) else None)
    without_code = partial(torch.compile, backend="eager")  # traced, which is what can fail, and not compiled
    with world() as ranks, patch.object(torch, "compile", without_code):
        for name in names:
            which = name.removeprefix("killed ").removeprefix("stopped ")
            strategy = which.split()[0] if which in SHARDED | FOUR else "ddp"
            if "finetune" in name:
                finetune_and_count(out / name, ranks, strategy)
                continue
            case = (CASES | SHARDED | FOUR)[which]
            keys = case.keys | dict.fromkeys(case.several, True) | {"train.strategy": strategy}
            config = read_target(PretrainConfig, case.recipe, keys)
            if name.startswith("stopped"):
                with (
                    stopped_at_the_end(ranks),
                    pytest.raises(Interrupted, match="after the last of 12 steps") as raised,
                ):
                    pretrain(config, Run(out / name), ranks)
                assert raised.value.status == 143
                assert not (out / name / "summary.json").exists()
            with slow_disk(ranks) if name == "whole" else killed_once() if "killed" in name else nullcontext():
                pretrain(config, Run(out / name), ranks)
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


@contextmanager
def killed_once() -> Iterator[None]:
    """The last rank is killed in step 7, before torchrun has restarted the ranks; of two machines, torchrun with it."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if not last or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        yield
        return
    lost = [os.getppid()] if os.environ["GROUP_RANK"] == "1" else []

    def die() -> None:
        for process in (*lost, os.getpid()):
            os.kill(process, signal.SIGKILL)

    with in_call(13, die):
        yield


def refused(folder: Path) -> int:
    """The command, with a batch that two processes can't share; the first one is the last to have cleared up."""

    def slowly(*given: Any) -> None:
        time.sleep(2)
        take_back(*given)

    with patch("nepa_core.runtime.locks.take_back", slowly):
        return main(["pretrain", "tests.tiny:recipe", "train.batch=7", f"out={folder}"])


@contextmanager
def stopped_at_the_end(ranks: World) -> Iterator[None]:
    """The last rank alone is asked to stop in the last step."""
    if ranks.is_main:
        yield
        return
    with in_call(24, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        yield


@contextmanager
def in_call(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Within the block something happens in that call of the step function (from 1), of two micro-batches a step."""
    make_step = pretraining.make_step

    def acting(*given: Any) -> StepFunction:
        step, calls = make_step(*given), count(1)

        def run(model: torch.nn.Module, batch: Batch) -> StepOutput:
            if next(calls) == number:
                act()
            return step(model, batch)

        return run

    with patch.object(pretraining, "make_step", acting):
        yield


def finetune_and_count(folder: Path, ranks: World, strategy: str = "ddp") -> dict[str, Any]:
    """Fine-tune the tiny recipe; then the figures of a network given by its seed, over an uneven number of batches."""
    tuning = override(short(tiny.recipe()), {"train.strategy": strategy})
    assert tuning.optim.layer_decay is not None
    finetune(tuning.model_copy(update={"recipe": "tests.tiny:recipe"}), Run(folder), ranks, show=False)
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
    done = torchrun(PROGRAM, str(out), *CASES, *SHARDED, "finetune")
    assert done.returncode == 0, done.stderr  # 3 is that rank 1 wrote something
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, two: Path) -> Path:
    """The same of two machines with two processes each; one run goes on from what two processes made of it."""
    out = tmp_path_factory.mktemp("four")
    cut(two / "packed", out / "fsdp regrown", after=4)
    done = torchrun(PROGRAM, str(out), *FOUR, machines=2)
    assert done.returncode == 0, done.stderr
    assert "going on after step 4" in done.stderr
    return out


def cut(run: Path, copy: Path, *, after: int) -> None:
    """A copy of a finished run as it was at its checkpoint of a step."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > f"step_{after:08d}":
            shutil.rmtree(checkpoint)
    (copy / "summary.json").unlink()


def newest(run: Path) -> Checkpoint:
    found, notes = load_latest(run / "checkpoints")
    assert found is not None
    assert notes == []
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES | SHARDED if not name.endswith(("random", "finetune"))])
def test_two_processes_train_as_one_does(two: Path, alone: Callable[[str], Path], name: str) -> None:
    agree(alone(name), two / name, processes=2)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FOUR)
def test_two_machines_of_two_processes_train_as_one_does(four: Path, alone: Callable[[str], Path], name: str) -> None:
    agree(alone(name), four / name, processes=4)


@pytest.mark.distributed
def test_one_process_ends_what_two_whole_and_four_sharded_ones_began(
    four: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    cut(four / "fsdp regrown", tmp_path / "again", after=8)
    case = FOUR["fsdp regrown"]
    pretrain(read_target(PretrainConfig, case.recipe, case.keys), Run(tmp_path / "again"), World(0, 1, CPU), show=False)
    agree(alone("fsdp regrown"), tmp_path / "again", processes=1)
    loaded = [nepa_core.load(run).model.state_dict() for run in (alone("fsdp regrown"), four / "fsdp regrown")]
    assert all(torch.allclose(loaded[1][key], value, atol=1e-6) for key, value in loaded[0].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What one process makes of a case; the same one for cases that differ in how the network is held."""
    out, done = tmp_path_factory.mktemp("one"), list[Case]()

    def run(name: str) -> Path:
        case = (CASES | SHARDED | FOUR)[name]
        if case not in done:
            done.append(case)
            config = read_target(PretrainConfig, case.recipe, case.keys)
            pretrain(config, Run(out / str(done.index(case))), World(0, 1, CPU), show=False)
        return out / str(done.index(case))

    return run


def agree(one: Path, several: Path, *, processes: int) -> None:
    """Losses and weights of one process and of several are the same within rounding."""
    expected, found = newest(one), newest(several)
    assert found.tensors.keys() == expected.tensors.keys()
    for group in expected.tensors.keys() - {"tally"}:
        assert found.tensors[group].keys() == expected.tensors[group].keys()
        for key, value in expected.tensors[group].items():
            assert torch.allclose(found.tensors[group][key], value, rtol=1e-6, atol=1e-6), key
    for line, other in zip(Run(one).metrics(), Run(several).metrics(), strict=True):
        assert other == pytest.approx(line, rel=1e-3)
        if "loss" in line:
            assert other["loss"] == pytest.approx(line["loss"], abs=1e-6)
    alone, together = Run(one).summary(), Run(several).summary()
    assert alone is not None
    assert together is not None
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-6)
    assert found.state["tokens"] == expected.state["tokens"]
    assert together["made_with"]["processes"] == processes


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["finetune", "fsdp finetune"])
def test_two_processes_fine_tune_as_one_does_and_count_the_same_to_the_last_digit(
    two: Path, tmp_path: Path, name: str
) -> None:
    figures = finetune_and_count(tmp_path / "one", World(0, 1, CPU))
    assert Run(two / name).summary("counted.json") == figures
    expected, found = newest(tmp_path / "one"), newest(two / name)
    for group in ("model", "ema"):
        for key, value in expected.tensors[group].items():
            assert torch.allclose(found.tensors[group][key], value, atol=1e-5), key
    lines = zip(Run(tmp_path / "one").metrics(), Run(two / name).metrics(), strict=True)
    for line, other in lines:
        assert other == pytest.approx(line, rel=1e-2)


@pytest.mark.distributed
def test_two_processes_resume_bit_for_bit(two: Path, tmp_path: Path) -> None:
    """From step 8, two steps into a line of metrics, with everything random on; and after a rank was killed, or asked
    to stop in the last step."""
    for name in ("random", "fsdp random"):
        cut(two / name, tmp_path / name, after=8)
    names = ["random", "fsdp random", "killed random", "stopped random"]
    done = torchrun(PROGRAM, str(tmp_path), *names, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "going on after step 8" in done.stderr
    for name in names:
        whole, again = two / name.removeprefix("killed ").removeprefix("stopped "), tmp_path / name
        assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        expected, found = newest(whole), newest(again)
        for group, tensors in expected.tensors.items():
            assert all(torch.equal(found.tensors[group][key], value) for key, value in tensors.items()), group


@pytest.mark.distributed
def test_two_processes_that_augment_on_the_device_resume_bit_for_bit(tmp_path: Path) -> None:
    words = (
        *("data.augment=randaugment", "data.erase=0.5", "data.augment_on=device", "train.batch=16", "model.depth=1"),
        *("train.length.steps=4", "train.log=1", "train.evaluate=4", "train.checkpoint=2", "verdict.fit_samples=32"),
        *("verdict.test_samples=32", "verdict.health_samples=16"),
    )
    whole, again = (tmp_path / name / "run" for name in ("whole", "again"))
    assert torchrun("recipes", "pretrain", "recipes.vision:digits", *words, f"out={whole}").returncode == 0
    cut(whole, again, after=2)
    done = torchrun("recipes", "pretrain", "recipes.vision:digits", *words, f"out={again}")
    assert "going on after step 2" in done.stderr
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.distributed
@pytest.mark.slow
def test_one_machine_goes_on_where_the_other_is_lost(alone: Callable[[str], Path], tmp_path: Path) -> None:
    """Four processes become two in step 7: the same batches, losses and weights as of one."""
    done = torchrun(PROGRAM, str(tmp_path), "killed hsdp packed", machines=2, fewest=1, restarts=3)
    assert done.returncode == 0, done.stderr
    assert "going on after step 4" in done.stderr
    agree(alone("hsdp packed"), tmp_path / "killed hsdp packed", processes=2)


@pytest.mark.distributed
def test_a_wrong_config_ends_both_processes_with_one_line(two: Path) -> None:
    out = two / "whole"
    done = torchrun("recipes", "pretrain", "tests.tiny:ragged", f"out={out}")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("nepa: ")] == [
        f"nepa: {out} holds a run of tests.tiny:recipe; name another folder for tests.tiny:ragged with out=DIR"
    ]


@pytest.mark.distributed
def test_a_refusal_is_said_and_leaves_nothing_though_the_first_process_is_the_last_to_end(tmp_path: Path) -> None:
    """torchrun ends all that are left when one has ended with an error."""
    done = torchrun(PROGRAM, str(tmp_path), "refused")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("nepa: ")]
    assert len(said) == 1, done.stderr
    assert "train.batch=7 is not a multiple of the 2 processes" in said[0]
    assert list(tmp_path.iterdir()) == []


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
