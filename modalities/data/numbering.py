"""Classes that have numbers and no names: they must be counted from 0 on."""

from __future__ import annotations

from typing import Any

import numpy as np

from nepa_core.basics import UserError

Labels = np.ndarray[Any, Any]


def check_numbering(labels: Labels, where: str, also: str = "") -> None:
    """See that the classes [S] of training samples are numbered from 0 on: a gap would be a class that never occurs.

    Args:
        also: another way out than to number them anew, in words.

    Raises:
        UserError: they are not.
    """
    found = np.unique(labels)
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if len(gaps):
        raise UserError(
            f"{where}: {len(found)} classes occur in training, numbered from {found[0]} to {found[-1]}, and none is "
            f"{gaps[0]}; number them from 0 to {len(found) - 1}{also}"
        )


def first_unknown(train: Labels, test: Labels) -> int | None:
    """The first held-out sample [T] whose class no training sample [S] has, or None."""
    unknown = np.flatnonzero(~np.isin(test, train))
    return int(unknown[0]) if unknown.size else None
