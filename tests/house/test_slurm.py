"""examples/slurm.sh on two "machines" of one process each, with stand-ins for SLURM's own commands."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nepa_core.runtime.run import Run
from tests.conftest import ROOT

STANDS_FOR = {
    "srun": '"$@" & echo $! >>agents; "$@" & echo $! >>agents; wait',
    "scancel": 'test "$*" = "--signal=TERM 7" && kill -TERM $(cat agents)',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" >>asked; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "${{@/:29500/:$PORT}}"',
}
LONG = ("tests.tiny:random", "train.length.steps=100000", "train.checkpoint=50", "train.keep=1", "train.log=5")


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_job_whose_time_is_over_stands_in_line_again_and_goes_on(tmp_path: Path) -> None:
    for name, line in STANDS_FOR.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    environment = {
        **os.environ,
        **slurm,
        "PORT": str(port),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run, before = Run(tmp_path / "run"), list[int]()
    for _ in range(2):
        (tmp_path / "agents").unlink(missing_ok=True)
        command = ["bash", str(ROOT / "examples/slurm.sh"), "pretrain", *LONG, "out=run", "train.strategy=hsdp"]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as job:
            until = time.monotonic() + 90
            while newest(run) <= max(before, default=0) and time.monotonic() < until:
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
            _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
        assert ("going on after step" in said) == bool(before), said
        before.append(newest(run))
    assert 0 < before[0] < before[1]
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 2


def newest(run: Run) -> int:
    """The step of the newest checkpoint, 0 for none."""
    return max((int(path.name.removeprefix("step_")) for path in run.checkpoints.glob("step_*")), default=0)
