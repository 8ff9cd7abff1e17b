"""What the rows of tests do; they run in other processes, so they are named as tests.benchmarks.work:NAME."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.commands import Failed


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


def count(file: str, *values: str) -> dict[str, list[float]]:
    """Give these values, and leave a line in a file."""
    with Path(file).open("a") as stream:
        stream.write("once\n")
    return {"figure": [float(value) for value in values]}


def fail(message: str) -> dict[str, list[float]]:
    raise ValueError(message)


def fail_in_part() -> dict[str, list[float]]:
    raise Failed("1 tests failed", {"passed": [7.0], "failed": [1.0]})


def overflow() -> dict[str, list[float]]:
    raise OutOfMemoryError("tried to allocate 80 GiB")


def die() -> dict[str, list[float]]:
    os._exit(3)


def hang() -> dict[str, list[float]]:
    time.sleep(600)
    return {}


def lack() -> dict[str, list[float]]:
    import no_such_package  # noqa: F401

    return {}
