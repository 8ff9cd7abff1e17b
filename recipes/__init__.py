"""The `nepa` command: one file a task, one file of presets a field; in Python `from recipes import pretrain`."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`pretrain`, imported when it is asked for: the help of the command needs no torch."""
    if name == "pretrain":
        return import_module("recipes.training.door").pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
