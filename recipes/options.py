"""The options of the tasks: how they are read and described."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nepa_core.runtime.config import listed


def describe_fields(kind: type[BaseModel]) -> str:
    """The options of a task, a line each with what can be chosen and the default, for its --help."""
    rows = {name: _described(field) for name, field in kind.model_fields.items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name + '=':<{width + 1}}  {text}" for name, text in rows.items())


def _described(field: FieldInfo) -> str:
    text, several = field.description or "", "tuple" in str(field.annotation)
    said = []
    if allowed := choices(field.annotation):
        said.append(f"{'some' if several else 'one'} of {', '.join(allowed)}")
    if field.default not in (None, PydanticUndefined, ()) and "default" not in text:
        said.append(f"default {_as_listed(field.default)}")
    return f"{text} ({'; '.join(said)})" if said else text


def choices(annotation: Any) -> tuple[str, ...]:
    """The values of a type that has few: of `Literal`, `bool`, either or None, or a tuple of one."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return "true", "false"
    inner = [each for each in get_args(annotation) if each not in (NoneType, Ellipsis)]
    return choices(inner[0]) if len(inner) == 1 else ()


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
