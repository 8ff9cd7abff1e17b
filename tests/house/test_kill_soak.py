"""Eleven kinds of work, killed at random moments, end byte for byte as those that were not."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.cli import main
from tests.tiny_scenes import write_scenes

pytestmark = pytest.mark.slow

RANDOM = "tests.tiny:random"
LONG = ("train.length.steps=60", "train.checkpoint=10", "train.log=7", "train.evaluate=25")
KILLS = 3  # of each kind

KINDS: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain", RANDOM, *LONG, "out=OUT"),
    "finetune": ("finetune", "base", *LONG, "out=OUT"),
    "segment": ("segment", "tests.tiny_scenes:recipe", "data.root=soak-scenes", "train.length.steps=20", "out=OUT"),
    "forecast": ("forecast", "OUT", "horizons=8", "finetune=8", "steps=40", "fit_samples=500"),
    "probe": ("probe", "base", "out=OUT", "poolings=mean,attentive"),
    "orders": (
        "orders", "recipes.vision:digits_2x2", "orders=raster,column", "seeds=0", "labels=5", "finetune_steps=10",
        "cross=false", "workers=1", "model.dim=32", "model.depth=2", "model.mlp_dim=64", "train.length.steps=30",
        "train.checkpoint=10", "verdict.fit_samples=100", "verdict.test_samples=100", "out=OUT",
    ),
    "accumulate": ("pretrain", RANDOM, *LONG, "train.micro_batch=2", "out=OUT"),
    "workers": ("pretrain", RANDOM, *LONG, "train.workers=2", "out=OUT"),
    "no average": ("pretrain", RANDOM, *LONG, "train.ema=null", "out=OUT"),
    "two processes": ("pretrain", RANDOM, *LONG, "train.batch=8", "out=OUT"),
    "fsdp": ("pretrain", RANDOM, *LONG, "train.batch=8", "train.strategy=fsdp", "out=OUT"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-trained run, scenes, and a pre-trained series."""
    folder = tmp_path_factory.mktemp("soak")
    with contextlib.chdir(folder):
        assert main(["pretrain", "tests.tiny:recipe", "out=base", "train.length.steps=2"]) == 0
        write_scenes(folder / "soak-scenes")
        for name in ("whole-forecast", "killed-forecast"):
            series = ("train.length.steps=2", "verdict.fit_samples=100", "verdict.test_samples=100")
            assert main(["pretrain", "recipes.timeseries:demo", *series, f"out={name}"]) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_it_ends_as_an_unbroken_one(kind: str, place: Path) -> None:
    draw = random.Random(kind)
    ranks = 2 if kind in ("two processes", "fsdp") else 1
    words = {name: [word.replace("OUT", f"{name}-{kind}") for word in KINDS[kind]] for name in ("whole", "killed")}
    began = time.monotonic()
    finish(start(words["whole"], place, ranks))
    took = time.monotonic() - began
    killed = 0
    folder, fresh = place / f"killed-{kind}", place / f"fresh-{kind}"
    if folder.exists():  # what the command reads
        shutil.copytree(folder, fresh)
    for _ in range(20):
        team = start(words["killed"], place, ranks)
        time.sleep(draw.uniform(0.05, 0.9) * took)
        alive = [process for process in team if process.is_alive()]
        for process in alive:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in team:
            process.join(60)
        killed += bool(alive)
        if not alive and not killed:  # done before the first kill: the whole run had a busier machine
            shutil.rmtree(folder)
            if fresh.exists():
                shutil.copytree(fresh, folder)
            took /= 2
        elif killed == KILLS or not alive:
            break
    assert killed
    finish(start(words["killed"], place, ranks))
    expected = results(place / f"whole-{kind}")
    assert expected
    assert results(folder) == expected


def start(words: list[str], place: Path, ranks: int) -> list[BaseProcess]:
    """The command in processes of its own, forked, as importing torch takes longer than most of these runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    team = [context.Process(target=command, args=(words, place, rank, ranks, port)) for rank in range(ranks)]
    for process in team:
        process.start()
    return list(team)


def command(words: list[str], place: Path, rank: int, ranks: int, port: int) -> None:
    os.chdir(place)
    torch.set_num_threads(1)
    if ranks > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in world.items()}}
    os._exit(main(words))


def finish(team: list[BaseProcess]) -> None:
    for process in team:
        process.join(240)
        assert process.exitcode == 0


READ: dict[str, Callable[[bytes], Any]] = {
    "metrics.jsonl": bytes, ".safetensors": bytes, ".npy": bytes, "probe.json": lambda text: figures(json.loads(text)),
    "forecast.json": lambda text: figures(json.loads(text)),
}  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    """What a folder holds that is a function of config and data; of checkpoints the last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    last = {path.parent: path for path in sorted(folder.rglob("step_*"))}
    files = [path for path in files if path.parent.parent not in last or path.parent in last.values()]
    assert not list(folder.rglob(".writing_*")), "something half-written was left"
    return {
        str(path.relative_to(folder)): read(path.read_bytes())
        for path in files
        for name, read in READ.items()
        if path.name.endswith(name)
    }


def figures(saved: Any) -> Any:
    """Without times and what it was made with."""
    if isinstance(saved, dict):
        return {key: figures(value) for key, value in saved.items() if key not in ("made_with", "seconds")}
    return [figures(each) for each in saved] if isinstance(saved, list) else saved
