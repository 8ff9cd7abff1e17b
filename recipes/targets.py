"""What the word after the task names: a recipe (`module:function`) or the folder of a run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nepa_core.basics import UserError
from nepa_core.runtime.config import Config, explain, listed, load_config, load_object, override, read_saved

RECORD = "import.json"
"""The file that `nepa import` leaves in a run: where its weights came from."""

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
        raise UserError(f"{target} {_what_it_gives(config)}; name a recipe of `nepa {vars(kind)['task']}`{_LISTS}")
    if "recipe" in type(config).model_fields:
        config = config.model_copy(update={"recipe": target})
    return override(config, changes)


_LISTS = ", as `nepa recipes` lists them"


def _what_it_gives(config: Any) -> str:
    task = vars(type(config)).get("task")
    return f"gives a {type(config).__name__}, no recipe" if task is None else f"is a recipe of `nepa {task}`"


def is_of(kind: type[BaseModel], target: str) -> bool:
    """Whether a recipe or run that `read_target` has read is of this kind itself, and was not converted to it."""
    return task_of(target) == vars(kind)["task"] if is_run(target) else isinstance(load_object(target)(), kind)


def task_of(run: str) -> str:
    """The task that a run folder is of."""
    return str(read_saved(Path(run) / "config.json").get("task", "pretrain"))


def is_run(target: str) -> bool:
    """A folder with a config.json that is not one of the Hugging Face layout."""
    file = Path(target) / "config.json"
    released = (Path(target) / "model.safetensors").is_file()  # runs keep theirs in checkpoints/
    return file.is_file() and not released and "model_type" not in read_saved(file)


def is_imported(target: str) -> bool:
    """Whether a folder is a run that `nepa import` wrote."""
    return (Path(target) / RECORD).is_file()


def default_out(target: str, task: str) -> str:
    """Where a task writes when `out=` is not given: the run itself if it is of this task, or runs/NAME (-TASK).

    What was imported is pre-trained on in its folder, and fine-tuned in another. A recipe whose name says its task
    is not given the task's name once more.
    """
    if is_run(target):
        goes_on = task_of(target) == task and not (task == "finetune" and is_imported(target))
        return target if goes_on else f"{target.rstrip('/')}-{task}"
    name = target.partition(":")[2]
    return f"runs/{name}" if task == "pretrain" or task in name.split("_") else f"runs/{name}-{task}"


def describe_fields(kind: type[BaseModel]) -> str:
    """The options of a task, a line each with what can be chosen and the default, for its --help."""
    rows = {name: _described(field) for name, field in kind.model_fields.items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name + '=':<{width + 1}}  {text}" for name, text in rows.items())


def _described(field: FieldInfo) -> str:
    text, several = field.description or "", "tuple" in str(field.annotation)
    said = []
    if choices := _choices(field.annotation):
        said.append(f"{'some' if several else 'one'} of {', '.join(choices)}")
    if field.default not in (None, PydanticUndefined, ()) and "default" not in text:
        said.append(f"default {_as_listed(field.default)}")
    return f"{text} ({'; '.join(said)})" if said else text


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a type that has few: of `Literal`, `bool`, either or None, or a tuple of one."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return "true", "false"
    inner = [each for each in get_args(annotation) if each not in (NoneType, Ellipsis)]
    return _choices(inner[0]) if len(inner) == 1 else ()


def given(value: Any) -> str:
    """A value as it would be given on the command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def _as_listed(value: Any) -> str:
    """The default of an option, whose lists of words need no quotes."""
    words = isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    return ",".join(value) if words else given(value)


def listed_or_all(value: Any) -> Any:
    """The same with None for the word "all"."""
    return tuple(None if str(name) == "all" else name for name in listed(value))


def once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list option in which every value counts once.

    Raises:
        ValueError: one is given twice.
    """
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{'all' if twice[0] is None else given(twice[0])} is given twice")
    return values
