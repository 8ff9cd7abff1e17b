"""The process that measures rows, one after the other: `python -m benchmarks.worker JOB.json`.

JOB.json holds a list of rows. What is found of row N is written to N.json beside it, whole or not at all; whoever waits
(`benchmarks.running`) starts another process where this one has died or taken too long.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from benchmarks.rows import Kept, Machine, Row, Status

WORK = {
    "step": "benchmarks.measures:step",
    "fit": "benchmarks.measures:fit",
    "loop": "benchmarks.measures:loop",
    "load": "benchmarks.measures:load",
    "decode": "benchmarks.measures:decode",
    "photos": "benchmarks.photos:make_photos",
    "tests": "benchmarks.commands:tests",
    "nepa": "benchmarks.commands:nepa",
    "train": "benchmarks.commands:train_for",
    "absent": "benchmarks.commands:absent",
}
"""First word of a row -> the function that its other words are given to; imported when a row asks for it.

Another first word is such a path itself.
"""

PACKAGES = ("torch", "torchvision", "triton", "xformers", "pydantic")
"""Whose versions stand beside every figure."""


def measure(row: Row) -> Kept:
    """What is found of a row; whatever goes wrong is kept as its error."""
    began = time.monotonic()
    kept: Kept = {
        "name": row.name,
        "words": list(row.words),
        "seeds": list(row.seeds),
        "status": "done",
        "seconds": 0.0,
    }
    try:
        kept["figures"] = _function(row.words[0])(*row.words[1:], **_time(row))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an exit, too, is this row's alone
        if type(error).__name__ == "Interrupted":  # a training loop has heard that this process is to end
            raise KeyboardInterrupt from error
        traceback.print_exc()
        kept["status"], kept["error"] = _status(error), said(error)
        if figures := getattr(error, "figures", None):
            kept["figures"] = figures
    kept["seconds"] = round(time.monotonic() - began, 1)
    _forget()
    return kept


def _function(name: str) -> Callable[..., dict[str, list[float]]]:
    module, _, function = WORK.get(name, name).partition(":")
    return cast(Callable[..., dict[str, list[float]]], getattr(importlib.import_module(module), function))


def _time(row: Row) -> dict[str, float]:
    return {"seconds": row.seconds} if row.words[0] == "train" else {}


def _status(error: BaseException) -> Status:
    """By the names of the exceptions: their modules may be what could not be imported."""
    names = {"OutOfMemoryError": "out of memory", "NotFinished": "not finished", "NoData": "no data"}
    return cast(Status, names.get(type(error).__name__, "failed"))


def said(error: BaseException) -> str:
    """One line of an exception."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text[:400] if kind in ("UserError", "Failed", "NotFinished", "NoData") else f"{kind}: {text}"[:400]


def _forget() -> None:
    """Give back what a row has held, so that the next begins as the first did."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        torch.cuda.empty_cache()


def machine() -> Machine:
    """The device, and the versions of what matters to a figure."""
    import torch

    found = torch.cuda.is_available()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    versions["torch"] = torch.__version__
    versions["cuda"] = str(torch.version.cuda) if found else "none"
    return {
        "device": torch.cuda.get_device_name() if found else platform.machine(),
        "memory": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if found else 0.0,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "versions": versions,
    }


def write(file: Path, value: Any) -> None:
    """JSON that appears whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(value, indent=1))
    new.replace(file)


def end_with(parent: int) -> None:
    """Ask this process to end when the one that has started it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main(job: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a row has started is ended on the way out
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    for number, words in enumerate(json.loads(job.read_text())):
        row = Row(words[0], tuple(words[1]), words[2], tuple(words[3]))
        print(f"--- {row.name}: {' '.join(row.words)}", flush=True)
        write(job.with_name(f"{number}.json"), measure(row))


if __name__ == "__main__":
    if sys.argv[1:] == ["--machine"]:
        print(json.dumps(machine()))
    else:
        main(Path(sys.argv[1]))
