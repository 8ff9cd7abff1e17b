"""Locks over machines: a live one keeps its lock, a lost one's is taken, and who wakes up late writes nothing.

A "machine" here is a process whose kernel is said to have another name, and whose kernel's locks reach nobody. This
file is also the program that such a machine runs.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nepa_core.basics import UserError
from nepa_core.runtime import leases, locks
from nepa_core.runtime.checkpoint import write_whole
from nepa_core.runtime.leases import LostLock
from nepa_core.runtime.locks import holding, locked
from nepa_core.runtime.run import Run
from recipes.cli import leave, main
from recipes.comparison import engine
from recipes.comparison.engine import Job
from tests.conftest import ROOT

FORK = multiprocessing.get_context("fork")
BEAT, LOST = 0.05, 0.4


def become(machine: str, place: Any, *, beat: float = BEAT, lost: float = LOST) -> None:
    """Let this process be another machine from here on.

    Args:
        place: `setattr`, or that of a monkeypatch.
    """
    place(leases, "reach", lambda descriptor: machine)
    place(locks, "_locked_by_kernel", lambda descriptor: True)
    place(leases, "BEAT", beat)
    place(leases, "LOST", lost)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that moves this process to a machine."""
    return lambda machine: become(machine, monkeypatch.setattr)


def tries(file: Path, seconds: float) -> bool:
    """Whether a lock could be taken at all within some seconds of trying."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with locked(file) as mine:
            if mine:
                return True
        time.sleep(0.02)
    return False


def test_the_lock_of_a_live_machine_is_never_taken(tmp_path: Path, at: Any) -> None:
    file = tmp_path / ".lock"
    at("one")
    with locked(file) as mine:
        assert mine
        at("two")
        assert not tries(file, 3 * LOST)
        assert not leases.is_doubtful(file), "it has been seen to live"
        leases.check()
    assert tries(file, LOST / 2), "given back, it is free at once"


def test_a_lost_machine_s_lock_is_taken_and_it_notices_before_it_writes(tmp_path: Path, at: Any) -> None:
    file = tmp_path / ".lock"
    at("one")
    with ExitStack() as rival, locked(file, keep=False) as mine:
        assert mine
        leases._LEASES[0]._over.set()  # no signs of life
        at("two")
        began = time.monotonic()
        while not rival.enter_context(locked(file)):
            time.sleep(0.02)
        assert time.monotonic() - began > LOST
        with pytest.raises(LostLock, match="has taken it for lost and goes on in its place"):
            write_whole(tmp_path / "summary.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"], "of the one that has it now"


def test_a_lock_whose_file_was_removed_is_lost(tmp_path: Path) -> None:
    with holding(tmp_path, trains=True):
        (tmp_path / ".lock").unlink()
        with pytest.raises(LostLock, match="this lock was removed"):
            Run(tmp_path).log({"step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_time_without_looks_says_nothing(tmp_path: Path, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival was stopped, or the server down for both: one beat of silence at most is seen."""
    file, now = tmp_path / ".lock", 0.0
    at("one")
    with locked(file):
        leases._LEASES[0]._over.set()
        at("two")
        monkeypatch.setattr(leases, "LOST", 60.0)
        monkeypatch.setattr(leases, "BEAT", 10.0)
        monkeypatch.setattr(leases.time, "monotonic", lambda: now)
        for look in range(6):
            now = 1000.0 * look
            assert not tries_once(file), look
        now += 1000.0
        assert tries_once(file)


def tries_once(file: Path) -> bool:
    with locked(file) as mine:
        return mine


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    for _ in range(2):
        with locked(tmp_path / ".lock") as mine, locked(tmp_path / ".lock") as other:
            assert (mine, other) == (True, False)


def test_a_claim_left_by_a_killed_process_is_cleared(tmp_path: Path, at: Any) -> None:
    at("one")
    with locked(tmp_path / ".lock"):
        (tmp_path / ".lock-claim").write_bytes((tmp_path / ".lock").read_bytes())
    assert tries(tmp_path / ".lock", LOST / 2), "of this machine"
    (tmp_path / ".lock-claim").touch()
    began = time.monotonic()
    assert tries(tmp_path / ".lock", 3 * LOST), "of any"
    assert time.monotonic() - began > LOST


def test_a_lock_of_before_there_were_leases_is_the_kernel_s_alone(tmp_path: Path) -> None:
    held = '{"pid": 1, "host": "x", "command": "nepa", "since": "", "trains": true}'
    (tmp_path / ".lock").write_text(held)
    with locked(tmp_path / ".lock") as mine:
        assert mine


@pytest.mark.slow
def test_training_waits_to_see_whether_a_machine_is_lost(
    tmp_path: Path, at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    at("one")
    with locked(tmp_path / ".lock"):
        at("two")
        with pytest.raises(UserError, match="is in use by `nepa"), holding(tmp_path, trains=True):
            raise AssertionError("two had the lock")
        leases._WATCHES.clear()
        leases._LEASES[0]._over.set()
        with holding(tmp_path, trains=True):
            assert "or is lost: 0 seconds will tell" in capsys.readouterr().err


def contend(file: Path, log: Path, machine: int) -> None:
    become(str(machine), setattr)
    for _ in range(3):
        while True:
            with locked(file, keep=machine % 2 == 0) as mine:
                if mine:
                    with log.open("a") as stream:
                        stream.write(f"in {machine}\n")
                    time.sleep(0.01)
                    with log.open("a") as stream:
                        stream.write(f"out {machine}\n")
                    break
            time.sleep(0.002)


def test_machines_that_find_a_lost_one_at_once_take_turns(tmp_path: Path, at: Any) -> None:
    """Rivals that judge one machine lost together, and locks that are removed while others open them."""
    at("lost")
    with locked(tmp_path / "other") as mine:
        assert mine
        (tmp_path / ".lock").write_bytes((tmp_path / "other").read_bytes())
    team = [FORK.Process(target=contend, args=(tmp_path / ".lock", tmp_path / "log", number)) for number in range(5)]
    for process in team:
        process.start()
    for process in team:
        process.join(60)
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 30
    for entry, end in zip(lines[::2], lines[1::2], strict=True):
        assert entry.split()[0] == "in"
        assert end == entry.replace("in", "out")


def test_a_comparison_leaves_a_pair_to_who_has_taken_it(tmp_path: Path, at: Any) -> None:
    with ExitStack() as rival:

        def work() -> dict[str, Any]:
            leases._LEASES[0]._over.set()
            at("two")
            while not rival.enter_context(locked(tmp_path / ".lock")):
                time.sleep(0.02)
            return {}

        at("one")
        job = Job("x", tmp_path / "r.json", tmp_path / ".lock", work)
        assert not engine.attempt(job)
        assert not job.done


# -------------------------------------------------------------------------------------------------- real processes


WORDS = ("pretrain", "tests.tiny:recipe", "train.length.steps=600", "train.log=1", "train.checkpoint=60")


def start(machine: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.nepa_core.runtime.test_leases", machine, *WORDS, f"out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(what: Any, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_run_goes_on_at_another_machine_and_the_one_that_wakes_up_writes_nothing(tmp_path: Path, how: int) -> None:
    """Against a run of one machine, byte for byte."""
    run = Run(tmp_path / "run")
    one = start("one", run.path)
    with one:
        wait_for(lambda: len(list(run.checkpoints.glob("step_*"))) > 0, one)
        two = start("two", run.path)
        assert two.communicate(timeout=600)[1].splitlines()[-1].startswith(f"nepa: {run.path} is in use by `nepa"), (
            "slow"
        )
        one.send_signal(how)
        if how == signal.SIGKILL:
            one.wait()
        began = time.monotonic()
        two = start("two", run.path)
        said = two.communicate(timeout=600)[1]
        assert two.returncode == 0, said
        assert "or is lost" in said
        assert "going on after step" in said
        assert time.monotonic() - began > 1.0
        before = files(run.path)
        if how == signal.SIGSTOP:
            one.send_signal(signal.SIGCONT)
            assert one.communicate(timeout=600)[1].splitlines()[-1].startswith(f"nepa: {run.path}")
            assert one.returncode == 2
        assert files(run.path) == before
    assert main([*WORDS, f"out={tmp_path / 'alone'}"]) == 0
    assert run.metrics_path.read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()


if __name__ == "__main__":
    become(sys.argv[1], setattr, beat=0.1, lost=1.0)
    if sys.argv[1] == "one":  # a slow one
        log = Run.log
        setattr(Run, "log", lambda *given: (time.sleep(0.1), log(*given)))  # noqa: B010
    leave(main(sys.argv[2:]))
