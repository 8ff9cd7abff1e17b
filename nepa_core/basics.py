"""What every other file may need: the batch type, the frozen-config setting, the two errors, small helpers."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict
from torch import nn

Batch = dict[str, Any]
"""One batch as a dataset gives it: names to tensors with the sample axis first."""

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
"""The `model_config` of every config class: no change after construction, no unknown key; `out=2024` is a name."""


MOST_SEED = 2**62
"""Seeds are below this: they are added to, and torch takes 64 bits with a sign."""


class HasParameters(Protocol):
    """A network, or what stands for its parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class UserError(Exception):
    """Something the user can fix.

    The message is one line that names the key or file and the fix; the command prints it
    without a traceback and exits with status 2.
    """


class UnreadableSample(Exception):
    """A dataset raises this for one sample it can't read; the loader skips it and counts it.

    The message names the file (or row) and the cause.
    """


def call(what: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a function of the user's gives; `what` says in an error which it is and what it is called with.

    Raises:
        UserError: it fails; the line names the place in it.
    """
    try:
        return function(*given)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        inside = traceback.extract_tb(error.__traceback__)[1:2]  # nothing where the call itself did not fit
        where = "".join(f", line {each.lineno} of {Path(each.filename).name}" for each in inside)
        raise UserError(f"{what} fails{where}: {type(error).__name__}: {error}") from error


def needs(key: str, *packages: str, extra: str | None) -> None:
    """Whether optional packages are installed; nothing is imported.

    Args:
        key: what the user gave that needs them. extra: of this package, which brings them, or None.

    Raises:
        UserError: one is not; the line has the command that installs it.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        ours = f"pip install nepa[{extra}], or " if extra else ""
        raise UserError(
            f"{key} needs {' and '.join(missing)}, not installed here: {ours}pip install {' '.join(missing)}"
        )


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def some(names: Sequence[str], most: int = 6) -> str:
    """ "a, b and 3 more": the first few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def number_of(count: int, one: str, many: str | None = None) -> str:
    """ "1 row", "2,000 rows": `many` where that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
