"""Two commands on one folder: one lock, which the kernel frees, and a line that says who holds it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from nepa_core.basics import UserError
from nepa_core.runtime import locks as runs
from nepa_core.runtime.locks import holder, holding, lock_beside, locked
from recipes.cli import main
from tests.conftest import ROOT

TINY = "tests.tiny:recipe"


def test_a_lock_keeps_others_out_and_says_whose_it_is(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".lock"
    with locked(file) as mine, locked(file) as other:
        assert (mine, other) == (True, False)
        found = holder(file)
        assert found is not None
        assert (found.pid, found.trains) == (os.getpid(), True)
        assert str(found).startswith("`nepa")
    with locked(file, keep=False) as mine:
        assert mine
    assert not file.exists()
    assert holder(file) is None


def hold(file: Path, taken: Connection) -> None:
    with locked(file):
        taken.send(True)
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    hear, say = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / ".lock", say))
    process.start()
    assert hear.recv()
    with locked(tmp_path / ".lock") as mine:
        assert not mine
    process.kill()
    process.join()
    with locked(tmp_path / ".lock") as mine:
        assert mine


def test_a_loader_process_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock") as mine:
        assert mine
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    try:
        with locked(tmp_path / ".lock") as mine:
            assert mine
    finally:
        child.kill()
        child.join()


def test_a_lock_whose_file_was_removed_by_the_one_before_keeps_others_out(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file, keep=False):
        file.unlink()
        with locked(file) as other:
            assert other, "the file that is there now is another one"


def test_nobody_waits_for_training(tmp_path: Path) -> None:
    for trains in (True, False):
        with (
            holding(tmp_path, trains=True),
            pytest.raises(UserError, match=rf"in use by `nepa.*process {os.getpid()} on .*: wait for it or stop it"),
            holding(tmp_path, trains=trains),
        ):
            raise AssertionError("two had the lock")


def test_a_second_one_waits_for_what_is_short_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with holding(tmp_path, trains=True):
            order.append("second")

    with holding(tmp_path, trains=False):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(3 * runs._WAIT)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert capsys.readouterr().err.count("waiting for `nepa") == 1


def test_folders_made_for_a_lock_alone_are_gone_afterwards(tmp_path: Path) -> None:
    for lock in (None, lock_beside(tmp_path / "a" / "b")):
        with holding(tmp_path / "a" / "b", trains=True, lock=lock):
            assert (tmp_path / "a").is_dir()
        assert list(tmp_path.iterdir()) == []


def test_a_command_on_a_run_that_is_trained_is_refused_and_the_finished_one_is_read_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", TINY, "out=run", "train.length.steps=1"]) == 0
    capsys.readouterr()
    with locked(Path("run/.lock"), trains=True):
        assert main(["pretrain", "run"]) == 0, "only shown"
        capsys.readouterr()
        for words in (["probe", "run"], ["inspect", "run"], ["pretrain", TINY, "out=run/.."]):
            main(words)
        lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("nepa: run is in use by") for line in lines[:2]] == [True, True]
    assert "is not a run folder" in lines[2]
    assert main(["inspect", "run", "samples=1"]) == 0
    assert not Path("run/.lock").exists()


# ---------------------------------------------------------------------------------------------- real processes


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "recipes", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    err = process.communicate(timeout=600)[1]
    return process.returncode, err


@pytest.mark.slow
def test_a_run_started_twice_at_once_is_computed_once(tmp_path: Path) -> None:
    words = ("pretrain", TINY, f"out={tmp_path / 'run'}", "train.length.steps=300", "train.log=1")
    found = [ended(process) for process in [start(*words), start(*words), start(*words)]]
    assert sorted(status for status, _ in found) == [0, 2, 2]
    assert all("is in use by `nepa pretrain" in err for status, err in found if status == 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "lr" in line]
    assert steps == list(range(1, 301))
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_two_probes_of_one_run_take_turns(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert main(["pretrain", TINY, f"out={run}", "train.length.steps=2"]) == 0
    found = [ended(process) for process in [start("probe", run), start("probe", run, "layers=0")]]
    assert [status for status, _ in found] == [0, 0]
    parts = list((tmp_path / "run" / "features").rglob(".writing_*"))
    assert parts == []
    assert json.loads((tmp_path / "run" / "probe.json").read_text())["layers"]
