"""Data sets of the Hugging Face hub, by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modalities.data.listing import printable
from nepa_core.basics import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

ANSWER = 5.0  # seconds that the hub has to say whether it has a name


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and without the file that the caller names, or its type."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(told.split())) or type(error).__name__


def load_hub(name: str) -> DatasetDict:
    """Every split of a data set, downloaded into the cache of the `datasets` library.

    The hub is asked once whether it has the name. Where it does not say so, what is in the cache must do: the library
    itself would try for half a minute and print every trial.

    Raises:
        UserError: the data set is neither to be had nor in the cache.
    """
    import datasets
    import huggingface_hub

    if os.path.exists(os.path.expanduser(name)):
        raise UserError(f"data.source=hub data.root={name}: that is a folder here; read it with data.source=folder")
    try:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=ANSWER)
        except Exception as error:  # the clients of the hub raise a dozen kinds: no network, no such name, no access
            with offline():
                try:
                    return datasets.load_dataset(name)
                except Exception:
                    raise error from None
        return datasets.load_dataset(name)
    except Exception as error:
        raise UserError(
            f"data.source=hub data.root={name}: can't be had from the hub ({one_line(error)}); check the name "
            "(OWNER/NAME), your access and the network, or download it and give its folder with data.source=folder"
        ) from error


@contextmanager
def offline() -> Iterator[None]:
    """The hub's client, and `datasets` if it has been imported, as if HF_HUB_OFFLINE=1 had been set before."""
    import huggingface_hub

    settings: list[Any] = [huggingface_hub.constants]
    settings += [sys.modules["datasets"].config] if "datasets" in sys.modules else []
    before = [place.HF_HUB_OFFLINE for place in settings]
    try:
        for place in settings:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(settings, before, strict=True):
            place.HF_HUB_OFFLINE = value
