"""What the word after the task names: a recipe (`module:function`) or the folder of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nepa_core.basics import UserError
from nepa_core.runtime.config import Config, explain, load_config, load_object, override, read_saved

Convert = Mapping[type[BaseModel], Callable[[Any, str | None], Config]]
"""Config class of another task -> function of (its config, the run it was found in or None)."""


def read_target(
    kind: type[Config], target: str, changes: Mapping[str, Any], *, convert: Convert[Config] | None = None
) -> Config:
    """The config of a recipe or of a run, with changes applied.

    Args:
        convert: how recipes and runs of other tasks become one of this kind.

    Raises:
        UserError: there is no such recipe or run, or it is of another task, or a change does not fit.
    """
    others = convert or {}
    if is_run(target):
        file = Path(target) / "config.json"
        other = next((other for other in others if vars(other)["task"] == task_of(target)), None)
        return override(
            load_config(kind, file) if other is None else others[other](load_config(other, file), target), changes
        )
    if ":" not in target:
        raise UserError(f"{target!r} is neither a run folder nor a recipe such as recipes.vision:digits")
    recipe = load_object(target)
    if not callable(recipe) or any(p.default is p.empty for p in inspect.signature(recipe).parameters.values()):
        raise UserError(f"{target} must be a function without arguments that returns a config")
    try:
        config = recipe()
    except ValidationError as error:
        raise UserError(f"{target}: {explain(error, '', kind)}") from error
    other = next((other for other in others if isinstance(config, other)), None)
    if other is not None:
        config = others[other](config, None)
    if not isinstance(config, kind):
        raise UserError(f"{target} gives a {type(config).__name__}, this task wants a {kind.__name__}")
    if "recipe" in type(config).model_fields:
        config = config.model_copy(update={"recipe": target})
    return override(config, changes)


def task_of(run: str) -> str:
    """The task that a run folder is of."""
    return str(read_saved(Path(run) / "config.json").get("task", "pretrain"))


def is_run(target: str) -> bool:
    """A folder with a config.json that is not one of the Hugging Face layout."""
    file = Path(target) / "config.json"
    return file.is_file() and "model_type" not in read_saved(file)


def default_out(target: str, task: str) -> str:
    """Where a task writes when `out=` is not given: the run itself if it is of this task, or runs/NAME (-TASK)."""
    if is_run(target):
        return target if task_of(target) == task else f"{target.rstrip('/')}-{task}"
    name = target.partition(":")[2]
    return f"runs/{name}" if task == "pretrain" else f"runs/{name}-{task}"


def describe_fields(kind: type[BaseModel]) -> str:
    """The options of a task, a line each, for its --help."""
    rows = {name: field.description or "" for name, field in kind.model_fields.items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name + '=':<{width + 1}}  {text}" for name, text in rows.items())


def listed(value: Any) -> Any:
    """A list option as it comes from the command line: `a,b`, `[a,b]` (a shell takes the quotes out) or one value."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.strip("[] ").split(","))
    return (value,) if isinstance(value, int | float) else value
