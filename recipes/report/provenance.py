"""What stands beside a number: command, commit, device, versions, and the samples that could not be read."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from nepa_core.runtime.config import read_saved
from nepa_core.runtime.run import Run, reading_back
from recipes.report.page import Report
from recipes.report.summaries import MadeWith, Unreadable


def rendered(report: Callable[[], Report], run: Run, *, before: bool) -> str:
    """The text of the report on a finished run.

    Args:
        before: it was finished by an earlier command, so that what is missing in summary.json is damage.
    """
    with reading_back(run.path / "summary.json") if before else nullcontext():
        return report().text(run.report)


NAMED = 3
"""Of the samples that could not be read, how many of a split are named on the screen."""


def unreadable(summary: Unreadable, file: str = "summary.json") -> list[str]:
    """Lines on the samples that could not be read, where there are any: how many, and the first by name and cause.

    Args:
        file: where all of them are listed.
    """
    counts = {"training": summary.get("unreadable_samples", 0), "held-out": summary.get("unreadable_held_out", 0)}
    told = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if not told:
        return []
    one = sum(counts.values()) == 1
    lines = [f"{told} sample{'' if one else 's'} could not be read and {'was' if one else 'were'} skipped."]
    lists = {
        "training": ("unreadable_messages", summary.get("unreadable_messages", [])),
        "held-out": ("unreadable_held_out_messages", summary.get("unreadable_held_out_messages", [])),
    }
    for kind, (key, messages) in lists.items():
        lines += [f"  {message}" for message in messages[:NAMED]]
        if len(messages) > NAMED:
            lines.append(f"  and {len(messages) - NAMED} more {kind} ones, see {key} in {file}")
    return lines


def settings_of(run: Run) -> str:
    """The keys of a run's config.json as they would be given, a line each; nothing where there is none."""

    file = run.path / "config.json"
    saved = read_saved(file) if file.exists() else {}
    return "\n".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat(saved))


def flat(group: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of what a JSON file holds, with its value."""
    for key, value in group.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def provenance() -> MadeWith:
    """Command, commit, device and versions: what a number needs beside it."""
    program = Path(sys.argv[0])
    ours = program.resolve().parent == Path(__file__).resolve().parents[1]  # python -m recipes, or torchrun -m
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": shlex.join(["nepa" if ours else program.name, *sys.argv[1:]]),
        "commit": _commit(),
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str | None:
    """The commit of this code, with a + where the work tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
