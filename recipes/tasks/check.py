"""nepa check: is this adapter fit to learn from? Says in plain words what is wrong with it, before anything is trained.

Reads the first few samples of each split and tries what every task relies on: shapes and dtypes, masks, an order that
can be undone, tokens that share no numbers, predictions that see nothing of their target, and two steps of training of
a tiny network on the CPU. Nothing is written. Of a sound adapter it says what was read and what holds.

Takes a recipe or a run of any task that trains. Keys that begin with data. may be changed, such as data.root=DIR.
"""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nepa_core.basics import FROZEN, UserError
from nepa_core.contract import CHECKS, UNREADABLE, check_modality, looked_at
from nepa_core.modality import Modality
from recipes.training.workload import read_trained

FREE = ("data.",)
"""The keys of a recipe that matter here."""

UNSEEN = """\
No check sees what tokens share behind a transform (a spectrogram's window, a mean over the sample): whether that gives
the next token away is yours to judge."""


class Options(BaseModel):
    """`nepa check` has none."""

    model_config = FROZEN


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    data = read_trained(target, changes).data
    name = type(data).__name__
    try:
        check_modality(data)
        print(render(data))
    except AssertionError as error:
        raise UserError(f"{name}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        if (line := own_line(error, data)) is None:
            raise
        raise UserError(f"{name}: {type(error).__name__} at {line}: {error}") from error


def render(data: Modality) -> str:
    """What was read of an adapter that passes every check, and what holds."""
    checks = {check.__name__.removeprefix("check_"): (check.__doc__ or "").splitlines()[0] for check in CHECKS}
    width = max(map(len, checks))
    looked = looked_at(data)
    but = " Samples that can't be read were left out, see below." if UNREADABLE in looked else ""
    lines = [f"{type(data).__name__} passes all {len(checks)} checks.{but}", ""]
    column = max(map(len, looked))
    lines += [f"{what:<{column}}  {found}" for what, found in looked.items()]
    if but:
        lines.append(f"{'':<{column}}  Training leaves such samples out and names them, up to train.max_unreadable.")
    lines += ["", *(f"{check:<{width}}  {holds}" for check, holds in checks.items())]
    return "\n".join([*lines, "", UNSEEN])


def own_line(error: Exception, data: Modality) -> str | None:
    """ "my_waves.py:17": the innermost line of the adapter's folder that an error went through, or None."""
    home = Path(inspect.getfile(type(data))).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(home) and "site-packages" not in file.relative_to(home).parts:
            return f"{file.name}:{frame.lineno}"
    return None
