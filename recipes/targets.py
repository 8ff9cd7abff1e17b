"""What the word after the task names: a recipe (`module:function`) or the folder of a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nepa_core.basics import UserError
from nepa_core.runtime.config import Config, explain, load_config, load_object, override


def read_target(kind: type[Config], target: str, changes: Mapping[str, Any]) -> Config:
    """The config of a recipe or of a run, with changes applied.

    Raises:
        UserError: there is no such recipe or run, or it is of another task, or a change does not fit.
    """
    if is_run(target):
        return override(load_config(kind, Path(target) / "config.json"), changes)
    if ":" not in target:
        raise UserError(f"{target!r} is neither a run folder nor a recipe such as recipes.vision:digits")
    recipe = load_object(target)
    if not callable(recipe) or any(p.default is p.empty for p in inspect.signature(recipe).parameters.values()):
        raise UserError(f"{target} must be a function without arguments that returns a config")
    try:
        config = recipe()
    except ValidationError as error:
        raise UserError(f"{target}: {explain(error, '', kind)}") from error
    if not isinstance(config, kind):
        raise UserError(f"{target} gives a {type(config).__name__}, this task wants a {kind.__name__}")
    if "recipe" in kind.model_fields:
        config = config.model_copy(update={"recipe": target})
    return override(config, changes)


def is_run(target: str) -> bool:
    return (Path(target) / "config.json").is_file()


def default_out(target: str, task: str) -> str:
    """Where a task writes when `out=` is not given: the run itself, or runs/NAME (runs/NAME-TASK)."""
    if is_run(target):
        return target
    name = target.partition(":")[2]
    return f"runs/{name}" if task == "pretrain" else f"runs/{name}-{task}"


def describe_fields(kind: type[BaseModel]) -> str:
    """The options of a task, a line each, for its --help."""
    rows = {name: field.description or "" for name, field in kind.model_fields.items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name + '=':<{width + 1}}  {text}" for name, text in rows.items())
