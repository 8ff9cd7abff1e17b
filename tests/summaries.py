"""Whether a file of figures holds what its class in recipes/report/summaries.py declares, and no more."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from recipes.report.summaries import ObjectiveFigures, OrderFigures, RunMeasures
from recipes.statistics.significance import Spread

OPEN = re.compile(r"finetuned_(\d+|all)(_random)?")
"""Keys without an end, of these classes alone: see the head of recipes/report/summaries.py."""

FIGURE = {RunMeasures: float, OrderFigures: Spread, ObjectiveFigures: Spread}


def check_summary(file: Path, kind: type) -> dict[str, Any]:
    """The content of a file, all of whose keys and kinds of values the class declares, down to the last."""
    found: dict[str, Any] = json.loads(file.read_text())
    assert undeclared(found, kind, file.name) == []
    return found


def undeclared(value: Any, kind: Any, where: str = "") -> list[str]:
    """The places of keys that are not declared, and of values of another kind."""
    if isinstance(kind, TypeVar):
        kind = Spread if isinstance(value, dict) else float
    if kind is Any:
        return []
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return min((undeclared(value, each, where) for each in inner), key=len)
    if is_typeddict(kind) and isinstance(value, dict):
        keys = get_type_hints(kind)
        named = {key: FIGURE[kind] for key in value if kind in FIGURE and OPEN.fullmatch(key)} | keys
        wrong = [f"{where}.{key} is not declared" for key in value if key not in named]
        known = {key: each for key, each in value.items() if key in named}
        return wrong + [line for key in known for line in undeclared(known[key], named[key], f"{where}.{key}")]
    if origin is dict and isinstance(value, dict):
        return [line for key, each in value.items() for line in undeclared(each, inner[1], f"{where}[{key!r}]")]
    if origin is list and isinstance(value, list):
        return [line for place, each in enumerate(value) for line in undeclared(each, inner[0], f"{where}[{place}]")]
    plain = (int, float) if kind is float else kind
    fits = not is_typeddict(kind) and origin is None and isinstance(value, plain)
    return [] if fits else [f"{where} is {value!r:.60}, not {kind}"]
