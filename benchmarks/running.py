"""Run the rows of a stage in processes of their own, within their time, and keep what is found.

Nothing but Python is needed here: this process neither holds memory of the device nor dies with what does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from benchmarks.rows import FINAL, SOURCE, Kept, Machine, Row, Stage, StageFile, Status
from benchmarks.worker import write

ROOT = Path(__file__).resolve().parents[1]
START = 90.0  # seconds that a process may take to import what it needs, beside its first row
GRACE = 30.0  # seconds that a training run may take for a checkpoint when it is stopped
TRAINS = ("nepa", "train")  # rows whose process is given that time
_POLL = 0.05

Clock = Callable[[], float]
"""Seconds that are left."""


def clock(seconds: float) -> Clock:
    """Counts down from now."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


def machine_here(environment: Mapping[str, str]) -> Machine:
    """What `benchmarks.worker` sees, asked in a process of its own.

    Raises:
        SystemExit: there is no torch.
    """
    command = [sys.executable, "-m", "benchmarks.worker", "--machine"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"benchmarks.gpu: {(done.stderr.strip() or 'no answer').splitlines()[-1]}")
    found: Machine = json.loads(done.stdout.splitlines()[-1])
    return found


def commit() -> str:
    """The commit of this code, with a + where the work tree differs from it; outside a checkout a digest of it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return f"source {digest_of(SOURCE)}"


def digest_of(folders: Sequence[str]) -> str:
    """Of the Python files in these folders."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:10]


def ground(source: Sequence[str], machine: Machine) -> str:
    """Of what all figures from these folders of source depend on: the source, the device and the versions.

    The versions of what may come later, such as xformers, are left out: a row that failed is tried again anyway.
    """
    versions = {name: machine["versions"].get(name) for name in ("python", "torch", "cuda")}
    return _short([digest_of(source), machine["device"], versions])


def key_of(stage: Stage, machine: Machine) -> str:
    """Of what the figures of a stage depend on: the same, and the words of its rows."""
    return _short([ground(stage.source, machine), [(row.name, row.words) for row in stage.rows]])


def _short(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:10]


def read_stage(file: Path, key: str) -> list[Kept]:
    """The rows that are kept, or nothing where there are none or the file is damaged."""
    with suppress(OSError, ValueError, KeyError):
        found: StageFile = json.loads(file.read_text())
        if found["key"] == key:
            return found["rows"]
    return []


def left_to_do(stage: Stage, kept: Sequence[Kept]) -> list[Row]:
    """The rows that nothing final is known of: those never tried first."""
    known = {row["name"]: row["status"] for row in kept}
    rows = [row for row in stage.rows if known.get(row.name) not in FINAL]
    return sorted(rows, key=lambda row: known.get(row.name) == "failed")


def unfinished(
    row: Row, status: Status = "not finished", error: str = "no time was left for it", seconds: float = 0.0
) -> Kept:
    """What is kept of a row without a figure, and after so many seconds."""
    return {
        "name": row.name,
        "words": list(row.words),
        "seeds": list(row.seeds),
        "status": status,
        "seconds": round(seconds, 1),
        "error": error,
    }


def run_rows(
    rows: Sequence[Row], left: Clock, log: TextIO, environment: Mapping[str, str], keep: Callable[[Kept], None]
) -> None:
    """Measure rows one after the other and hand each to `keep` as soon as it is known.

    A row that takes longer than its time, or whose process dies, is kept as such, and another process goes on with the
    next. Rows that no time is left for are "not finished".

    Raises:
        KeyboardInterrupt: Ctrl-C; the row under way is kept as not finished.
    """
    rest = list(rows)
    while rest and left() > 0:
        done = _one_process(rest, left, log, environment, keep)
        rest = rest[done:]
    for row in rest:
        keep(unfinished(row))


def _one_process(
    rows: Sequence[Row], left: Clock, log: TextIO, environment: Mapping[str, str], keep: Callable[[Kept], None]
) -> int:
    """How many of these rows are settled when the process has ended; at least one."""
    with tempfile.TemporaryDirectory(prefix="nepa-gpu-") as folder:
        job = Path(folder) / "job.json"
        write(job, rows)
        command = [sys.executable, "-m", "benchmarks.worker", str(job)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        grace, began = 0.0, time.monotonic()
        try:
            for number, row in enumerate(rows):
                began = time.monotonic()
                if left() <= 0:
                    return number
                grace = GRACE if row.words[0] in TRAINS else 0.0
                result = job.with_name(f"{number}.json")
                found = _wait(process, result, row, left, START if number == 0 else 0.0)
                keep(found)
                if not result.exists() or spoilt(found):  # it has died, hangs, or is of no use
                    return number + 1
            return len(rows)
        except KeyboardInterrupt:
            keep(unfinished(row, error="interrupted", seconds=time.monotonic() - began))
            raise
        finally:
            stop(process, grace)


def spoilt(row: Kept) -> bool:
    """Whether an error has left the device unusable for this process: it says so to whatever comes next, too."""
    return row["status"] == "failed" and "CUDA error" in row.get("error", "")


def _wait(process: subprocess.Popen[bytes], result: Path, row: Row, left: Clock, extra: float) -> Kept:
    """The result of a row as soon as it is there."""
    seconds = min(row.seconds + extra, left())
    time_left = clock(seconds)
    while not result.exists():
        if process.poll() is not None and not result.exists():
            ended = f"its process ended with status {process.returncode}, see the log"
            return unfinished(row, "failed", ended, seconds - time_left())
        if min(time_left(), left()) <= 0:
            return unfinished(row, error=f"stopped when its {seconds:.0f} s were over", seconds=seconds - time_left())
        time.sleep(_POLL)
    found: Kept = json.loads(result.read_text())
    return found


def stop(process: subprocess.Popen[bytes], grace: float = 0.0) -> None:
    """End a process, which is asked first where there is some grace, and then all that it has started."""
    if grace and process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
