"""What every other file may need: the batch type, the frozen-config setting, the two errors and the cores."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ConfigDict

Batch = dict[str, Any]
"""One batch as a dataset gives it: names to tensors with the sample axis first."""

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
"""The `model_config` of every config class: no change after construction, no unknown key; `out=2024` is a name."""


MOST_SEED = 2**62
"""Seeds are below this: they are added to, and torch takes 64 bits with a sign."""


class UserError(Exception):
    """Something the user can mend.

    The message is one line that names the key or file and the mend; the command prints it
    without a traceback and exits with status 2.
    """


class UnreadableSample(Exception):
    """A dataset raises this for one sample it can't read; the loader skips it and counts it.

    The message names the file (or row) and the cause.
    """


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
