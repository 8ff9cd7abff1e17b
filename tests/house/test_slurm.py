"""The scripts of examples/ on two "machines" of one process each, with stand-ins for SLURM's own commands."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nepa_core.runtime.run import Run
from tests.conftest import ROOT

STANDS_FOR = {
    "srun": '"$@" & echo $! >>agents; "$@" & echo $! >>agents; wait',
    "scancel": 'test "$*" = "--signal=TERM 7" && kill -TERM $(cat agents)',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" >>asked; fi',
    "python": f'exec {sys.executable} "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "${{@/:29500/:$PORT}}"',
}
LONG = ("tests.tiny:random", "train.length.steps=100000", "train.checkpoint=50", "train.keep=1", "train.log=5")
SMALL = ("recipes.vision:digits", "model.dim=32", "model.heads=2", "model.depth=1", "data.limit=200",
         "train.batch=32", "train.length.steps=40", "train.checkpoint=10")  # fmt: skip


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_job_whose_time_is_over_stands_in_line_again_and_goes_on(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    environment = cluster(tmp_path) | slurm | {"PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    run, before = Run(tmp_path / "run"), list[int]()
    for _ in range(2):
        (tmp_path / "agents").unlink(missing_ok=True)
        command = ["bash", str(ROOT / "examples/slurm.sh"), "pretrain", *LONG, "out=run", "train.strategy=hsdp"]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as job:
            until = time.monotonic() + 600
            while newest(run) <= max(before, default=0) and time.monotonic() < until:
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
            _, said = job.communicate(timeout=600)
        assert job.returncode == 0, said
        assert ("going on after step" in said) == bool(before), said
        before.append(newest(run))
    assert 0 < before[0] < before[1]
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 2


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_jobs_of_an_array_share_a_comparison(tmp_path: Path) -> None:
    """One of them is asked to stop while both are at work; what it leaves the other takes up."""
    environment, out = cluster(tmp_path) | {"SLURM_ARRAY_JOB_ID": "9"}, tmp_path / "all"
    words = ["ablate", *SMALL, "seeds=0", "workers=1", "out=all"]
    script = ["bash", str(ROOT / "examples/slurm_array.sh"), *words]
    with ExitStack() as stack:
        jobs = list[subprocess.Popen[str]]()
        for task in ("0", "1"):
            job = {"cwd": tmp_path, "env": environment | {"SLURM_ARRAY_TASK_ID": task}, "start_new_session": True}
            jobs.append(stack.enter_context(subprocess.Popen(script, stderr=subprocess.PIPE, text=True, **job)))
            stack.callback(end, jobs[-1])
        until = time.monotonic() + 600
        while len(list(out.glob("runs/*/checkpoints/step_*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        jobs[0].send_signal(signal.SIGUSR1)
        said = [job.communicate(timeout=600)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert (tmp_path / "asked").read_text() == "requeue 9_0\n"
    assert len(list(out.glob("runs/*"))) == len(list(out.glob("runs/*/summary.json"))) == 6
    assert (out / "summary.json").exists()


def end(job: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)


def cluster(folder: Path) -> dict[str, str]:
    """The environment of a job, with the stand-ins in a folder."""
    for name, line in STANDS_FOR.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def newest(run: Run) -> int:
    """The step of the newest checkpoint, 0 for none."""
    return max((int(path.name.removeprefix("step_")) for path in run.checkpoints.glob("step_*")), default=0)
