"""What the word after the task names: a recipe (`module:function`) or the folder of a run."""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from nepa_core.basics import UserError
from nepa_core.runtime.config import Config, explain, load_config, load_object, override, shown
from nepa_core.runtime.run import is_imported, is_run, refuse_holder, task_of
from recipes.configs import FinetuneConfig, PretrainConfig, SegmentConfig

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
        refuse_holder(target)
        raise UserError(f"{shown(target)!r} is neither a run folder nor a recipe such as recipes.vision:digits")
    recipe = find_recipe(target, vars(kind).get("task", "pretrain"))
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


NETWORKS: tuple[Any, ...] = (PretrainConfig, FinetuneConfig, SegmentConfig)
"""Configs of the tasks whose runs hold a network."""


def read_network(target: str, changes: Mapping[str, Any], *, free: tuple[str, ...], task: str) -> Any:
    """The settings of a run of any task that leaves a network, with changes.

    Args:
        free: how the keys begin that may be changed, the others being what training decided. task: that reads them.

    Raises:
        UserError: it is no such run, or a change is to another key, or does not fit.
    """
    if not is_run(target):
        refuse_holder(target)
        raise UserError(f"{target} is not a run folder; name one, such as `nepa pretrain` or `nepa import` makes")
    for key in changes:
        if not key.startswith(free):
            raise UserError(f"{key} can't be set for nepa {task}; what can: its options, {', '.join(free)}")
    if (kind := next((each for each in NETWORKS if each.task == task_of(target)), None)) is None:
        names = ", ".join(each.task for each in NETWORKS)
        raise UserError(f"{target} holds no network of its own: name a run of {names}")
    return read_target(kind, target, changes)


_LISTS = ", as `nepa recipes` lists them"


def find_recipe(target: str, task: str = "pretrain") -> Callable[[], Any]:
    """The function that `module:function` names, once it is known to be one that may be called for a config.

    That is a function written in Python without required arguments, whose annotation names a config; where there is no
    annotation, one of that module itself, and not of Python's own library.

    Args:
        task: whose recipes an error points to.

    Raises:
        UserError: it can't be a recipe; it has not been called.
    """
    found = load_object(target)
    function = _python_function(found)
    if function is None or any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(found).parameters.values()
    ):
        raise UserError(f"{target} must be a function without arguments that returns a config")
    gives = _annotation(function)
    if gives is inspect.Signature.empty:
        home, module = Path(function.__code__.co_filename), target.partition(":")[0]
        if function.__module__ != module or (home.is_relative_to(_LIBRARY) and "site-packages" not in home.parts):
            raise UserError(f"{target} is no recipe: write a function that returns a config, in a module of your own")
    elif not _may_be_config(gives):
        name = gives if isinstance(gives, str) else getattr(gives, "__name__", str(gives))
        raise UserError(f"{target} gives a {name}, no recipe; name a recipe of `nepa {task}`{_LISTS}")
    return cast(Callable[[], Any], found)


_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def _python_function(thing: Any) -> FunctionType | None:
    """The function that runs when a thing is called, where it is written in Python and makes no new object."""
    while isinstance(thing, partial):
        thing = thing.func
    if isinstance(thing, type):
        return None
    thing = inspect.unwrap(thing)  # of a cache
    if not isinstance(thing, FunctionType):
        thing = getattr(thing, "__func__", None) or inspect.getattr_static(type(thing), "__call__", None)
    return thing if isinstance(thing, FunctionType) else None


def _annotation(function: FunctionType) -> Any:
    """What a function says that it returns, as an object where the name is known in its module."""
    try:
        return inspect.signature(function, eval_str=True).return_annotation
    except Exception:  # a name that only a type checker imports
        return inspect.signature(function).return_annotation


def _may_be_config(gives: Any) -> bool:
    if isinstance(gives, str):
        return "Config" in gives
    if get_args(gives):  # one of several
        return any(_may_be_config(each) for each in get_args(gives))
    return gives is Any or (isinstance(gives, type) and issubclass(gives, BaseModel))


def _what_it_gives(config: Any) -> str:
    task = vars(type(config)).get("task")
    return f"gives a {type(config).__name__}, no recipe" if task is None else f"is a recipe of `nepa {task}`"


def is_of(kind: type[BaseModel], target: str) -> bool:
    """Whether a recipe or run that `read_target` has read is of this kind itself, and was not converted to it."""
    return task_of(target) == vars(kind)["task"] if is_run(target) else isinstance(find_recipe(target)(), kind)


def default_out(target: str, task: str) -> str:
    """Where a task writes when `out=` is not given: the run itself if it is of this task, or runs/NAME (-TASK).

    NAME is the name of a built-in recipe, and MODULE-NAME of one of the user's own, of which several may be a `base`;
    so it is of the built-in ones called `demo`.
    What was imported is pre-trained on in its folder, and fine-tuned in another. A recipe whose name says its task
    is not given the task's name once more.
    """
    if is_run(target):
        goes_on = task_of(target) == task and not (task == "finetune" and is_imported(target))
        return target if goes_on else f"{target.rstrip('/')}-{task}"
    module, _, name = target.partition(":")
    own_name = module.startswith("recipes.") and name != "demo"
    folder = f"runs/{name}" if own_name else f"runs/{module.removeprefix('recipes.')}-{name}"
    return folder if task == "pretrain" or task in name.split("_") else f"{folder}-{task}"
