"""A run that is killed with no chance to say goodbye, started again by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

KEYS = ["train.length.steps=80", "train.checkpoint=10", "train.log=7", "train.evaluate=25"]


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "recipes", "pretrain", "tests.tiny:random", f"out={out}", *KEYS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def results(folder: Path) -> dict[str, bytes]:
    files = [folder / "metrics.jsonl", *(folder / "checkpoints" / "step_00000080").glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
def test_a_killed_run_ends_byte_for_byte_as_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
    wait_for(tmp_path / "killed" / "checkpoints" / "step_00000010", killed)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step_00000080").exists()

    assert start(tmp_path / "killed").wait(60) == 0
    assert whole.wait(60) == 0
    expected = results(tmp_path / "whole")
    assert set(expected) == {"metrics.jsonl", *(f"{n}.safetensors" for n in ("model", "ema", "optimizer", "tally"))}
    assert results(tmp_path / "killed") == expected
    assert (tmp_path / "killed" / "summary.json").exists()
