"""Configs as users touch them: `key=value` overrides, import paths, JSON, and what differs between two."""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nepa_core.basics import UserError, some
from nepa_core.modality import Modality
from nepa_core.runtime import trust
from nepa_core.runtime.checkpoint import read_json, write_whole
from nepa_core.runtime.optim import Duration

Config = TypeVar("Config", bound=BaseModel)


def load_object(path: str) -> Any:
    """Import `package.module:name`; the current folder counts as a place to import from, unless it is a run's.

    Raises:
        UserError: the module or the name does not exist, or its code is not to be trusted (see `trust`).
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{shown(path)!r} is not of the form module:function, such as recipes.vision:digits")
    trust.check(path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{path}: importing {module_name} failed: {error}") from error
        raise UserError(
            f"{shown(path)}: no module {shown(module_name)!r} here; run the command from the folder that holds it"
        ) from error
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"{path}: importing {module_name} failed: {error}") from error
    if not hasattr(module, name):
        raise UserError(f"{shown(path)}: {module_name} has no {shown(name)!r}{nearest(name, _own(module))}")
    return getattr(module, name)


def _own(module: ModuleType) -> list[str]:
    """The public functions and classes that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
    ]


def import_path(thing: type) -> str:
    """The path that `load_object` turns back into this class."""
    return f"{thing.__module__}:{thing.__qualname__}"


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for a mistyped word; where none is near the known words, or the nearest three of many."""
    known = sorted(known)
    if close := closest(word, known):
        return close
    if len(known) > _FEW:
        return f"; there are {len(known)}, such as {some(difflib.get_close_matches(word, known, n=3, cutoff=0.0))}"
    return f"; known: {', '.join(known)}" if known else ""


def closest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or nothing where none is near; for a message that lists the known words anyway."""
    close = difflib.get_close_matches(word, [*known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


_FEW = 20  # words that are listed whole


def nearest_key(key: str, known: Sequence[str]) -> str:
    """The same for a dotted key: one of its group, those with a part of its name, the whole group, or all groups."""
    *groups, last = key.split(".")
    group = ".".join(groups)
    own = {name.removeprefix(f"{group}."): name for name in known if groups and name.startswith(f"{group}.")}
    if close := difflib.get_close_matches(last, own, n=1, cutoff=0.45):
        return f"; did you mean {own[close[0]]}?"
    parts = {part for name in known for part in name.split(".")}
    close = difflib.get_close_matches(last, parts, n=1, cutoff=0.7) if not own else []  # else one of another group
    part = last if last in parts else next(iter(close), None)
    having = [name for name in known if part in name.split(".")]
    having = [name for name in having if name in own.values()] or having
    if having:
        having.sort(key=lambda name: (name.split(".")[-1] != part, not name.startswith("train."), name.count(".")))
        return f"; did you mean {' or '.join(having[:3])}?"
    if own:
        return f"; {group} has {', '.join(own)}"
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"; did you mean {close[0]}?"
    tops = dict.fromkeys(name.partition(".")[0] for name in known)
    return f"; keys begin with {', '.join(tops)}: add --help to see all"


def parse_assignments(words: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=1e-3", "data.root=/x"]` to a dictionary; values are JSON where they parse, else strings.

    Raises:
        UserError: a word is not of the form key=value, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise UserError(f"{shown(word)!r} is not of the form key=value")
        if key in found:
            raise UserError(f"{shown(key)} is given twice")
        try:
            found[key] = json.loads(text)
        except RecursionError as error:
            raise UserError(f"{shown(key)}={shown(text)}: brackets are nested too deeply") from error
        except ValueError:
            found[key] = text
    return found


def listed(value: Any) -> Any:
    """A list option as it comes from the command line: `a,b`, `[a,b]` (a shell takes the quotes out) or one value."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.strip("[] ").split(","))
    return (value,) if isinstance(value, int | float) else value


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of a config with dotted keys replaced, validated anew.

    Keys of a group that is null make the group; all that it has no default for must then be given.

    Raises:
        UserError: a key is unknown (the nearest valid one is named) or missing, a value does not fit, or a group is
            both null and set.
    """
    for key, value in changes.items():
        _check_key(config, key, value)
        if value is None and (inner := next((each for each in changes if each.startswith(f"{key}.")), None)):
            raise UserError(f"{key}=null and {inner} contradict each other: leave one of them out")
    return _override(config, dict(changes), "")


def _check_key(config: BaseModel, key: str, value: Any) -> None:
    node: Any = config
    kind: type[BaseModel] | None = type(config)  # of a group, be it null
    known = list(keys(config))
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, dict):
            if isinstance(node.get(part), BaseModel):
                node, kind = node[part], type(node[part])
                continue
            if depth == len(parts) - 1 or ":" in key:
                return  # the config that holds the dictionary says which entries it takes; an import path has dots
            raise UserError(f"unknown key {shown(key)}{nearest(part, node)}")
        if kind is None:
            raise UserError(f"unknown key {shown(key)}: {shown('.'.join(parts[:depth]))} is a single value")
        if node is None:
            known += [".".join((*parts[:depth], name)) for name in kind.model_fields]
        if part not in kind.model_fields:
            if depth == len(parts) - 1 and isinstance(node, Modality):
                raise UserError(f"unknown key {shown(key)}{_no_setting(node, '.'.join(parts[:depth]), part)}")
            raise UserError(f"unknown key {shown(key)}{nearest_key(key, known)}")
        node = getattr(node, part, None)
        kind = type(node) if isinstance(node, BaseModel) else _group(kind, part)
    if isinstance(node, BaseModel) and value is not None and not isinstance(value, BaseModel):
        first = next(iter(keys(node, f"{key}.")), key)
        raise UserError(f"{key} holds several keys: set them one by one, such as {first}=VALUE")


def _no_setting(data: Modality, group: str, name: str) -> str:
    """ "; did you mean data.limit?", or all settings that an adapter has."""
    if name == "part":
        return f": the adapter {type(data).__name__} has no parts; Together has (docs/together.md)"
    if close := difflib.get_close_matches(name, type(data).model_fields, n=1, cutoff=0.6):
        return f"; did you mean {group}.{close[0]}?"
    if name in ("patch_order", "order_seed"):
        return f": the adapter {type(data).__name__} has no orders; it has where it inherits Ordered (docs/orders.md)"
    has = ", ".join(name for name, field in type(data).model_fields.items() if not field.exclude) or "none"
    return f": the adapter {type(data).__name__} has no such setting; it has {has}"


def _override(node: Config, changes: dict[str, Any], prefix: str) -> Config:
    values = {name: getattr(node, name) for name in type(node).model_fields}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    for head, inner in nested.items():
        group = _group(type(node), head)
        if isinstance(getattr(node, head), dict):
            values[head] = (values[head] or {}) | _entries(values[head], inner, f"{prefix}{head}.")
        elif values[head] is None and group is not None:
            values[head] = _made(group, inner, f"{prefix}{head}.")
        else:
            values[head] = _override(values[head], inner, f"{prefix}{head}.")
    if isinstance(node, Duration):  # it holds one unit: naming one replaces the other
        values = changes
    return validated(type(node), values, prefix)


def _entries(old: dict[str, Any] | None, inner: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a dictionary that keys change: whole ones, or fields of those that are configs."""
    found: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {}
    for key, value in inner.items():
        name, _, rest = key.partition(".")
        if rest and isinstance((old or {}).get(name), BaseModel):
            fields.setdefault(name, {})[rest] = value
        else:
            found[key] = value
    return found | {name: _override(old[name], changes, f"{prefix}{name}.") for name, changes in fields.items() if old}


def _group(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of a group that may be null, told by the annotation of its field; None for a single value."""
    allowed = get_args(kind.model_fields[name].annotation)
    return next((each for each in allowed if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _made(kind: type[Config], values: dict[str, Any], prefix: str) -> Config:
    """A group that was null, of the keys that were given."""
    missing = [prefix + name for name, field in kind.model_fields.items() if field.is_required() and name not in values]
    if missing:
        raise UserError(f"{prefix.removesuffix('.')} is null here: give {', '.join(missing)}, too")
    return validated(kind, values, prefix)


def validated(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Construct a config; what does not fit becomes one line that names the key.

    Raises:
        UserError: a value is missing, unknown, of a wrong type or out of range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, prefix, kind)) from error


def explain(error: ValidationError, prefix: str, kind: type[BaseModel]) -> str:
    """The first complaint of a pydantic error as one line."""
    errors = error.errors()
    first = errors[0]
    place = _place(first, kind)
    key = prefix + _typed(place)
    message = first["msg"].removeprefix("Value error, ")
    if not place:  # a validator over the whole config names its keys itself, a Duration can't
        if prefix.startswith("data.") and prefix != "data.":  # of an adapter within another, or of a group of one
            holder = prefix[: prefix.rindex(".", 0, -1) + 1]
            own = kind.model_fields
            message = re.sub(r"\bdata\.(?=(\w+))", lambda key: prefix if key[1] in own else holder, message)
        return message if kind is not Duration else f"{prefix.removesuffix('.')}: {message}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(str(place[-1]), kind.model_fields)}"
    if first["type"] == "missing":
        if _in_list(place):
            return f"{key}={shown(first['input'])}: too few elements"
        return f"{key} is missing"
    others = list(dict.fromkeys(prefix + _typed(_place(each, kind)) for each in errors))
    more = f" (and also {some(others[1:])})" if others[1:] else ""
    of_key = [each for each in errors if _place(each, kind)[:2] == place[:2]]  # by each type that would do
    if _in_list(place):
        message = f"each should be {_either(of_key)}"
    elif all(each["msg"].startswith(_SHOULD) for each in of_key):
        message = f"input should be {_either(of_key)}"
    elif first["type"] == "too_short" and not first["input"]:
        message = "name at least one"
    field = kind.model_fields.get(str(place[0]))
    about = f" ({field.description})" if _in_list(place) and field is not None and field.description else ""
    return f"{key}={shown(first['input'])}: {message[0].lower()}{message[1:]}{about}{more}"


_SHOULD = "Input should be "


def _either(errors: Sequence[ErrorDetails]) -> str:
    """ "a, b or c" of all that would do; names that can be chosen stand once, whichever types they are of."""
    wanted = list(dict.fromkeys(word for each in errors for word in _wanted(each)))
    return " or ".join(word for word in (", ".join(wanted[:-1]), wanted[-1]) if word)


def _wanted(error: ErrorDetails) -> list[str]:
    """ "a valid integer" of "Input should be a valid integer, unable to parse string as an integer"; every name."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")
    if error["type"] == "tuple_type":
        return ["a list in brackets, such as [1,2]"]
    message = error["msg"].removeprefix(_SHOULD)
    return [message.partition(",")[0] if error["type"].endswith("_parsing") else message]


Place = tuple[int | str, ...]


def _place(error: ErrorDetails, kind: type[BaseModel]) -> Place:
    """Where a complaint is: field, field within, place in a list; without the members of a union."""
    found: list[int | str] = []
    expected: Any = kind
    for part in error["loc"]:
        members = _members(expected)
        expected = None
        if len(members) > 1:
            continue  # which member it is, as pydantic calls it
        found.append(part)
        if isinstance(members[0], type) and issubclass(members[0], BaseModel):
            field = members[0].model_fields.get(str(part))
            expected = None if field is None else field.annotation
    return tuple(found)


def _members(annotation: Any) -> list[Any]:
    """The types of a union but None, or the one type."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [each for each in get_args(annotation) if each is not NoneType]


def _typed(place: Place) -> str:
    """A key as a user types it: without the places in a list."""
    return ".".join(str(part) for part in itertools.takewhile(lambda part: not isinstance(part, int), place))


def _in_list(place: Place) -> bool:
    """Whether one element of a list is complained about, and not the list."""
    return len(place) > 1 and isinstance(place[1], int)


def shown(value: Any, most: int = 80) -> str:
    """A value as it is typed, lists, dictionaries, true and null as JSON, cut to so many characters."""
    typed = value is None or isinstance(value, list | tuple | dict | bool)
    text = json.dumps(value, separators=(",", ":"), default=str) if typed else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def keys(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a config with its value, in the order of the fields; those that are never stored last."""
    found: dict[str, Any] = {}
    fields = type(config).model_fields
    for name in sorted(fields, key=lambda name: bool(fields[name].exclude)):
        value = getattr(config, name)
        for key, each in (nested_in(prefix + name, value) or {prefix + name: value}).items():
            found |= keys(each, f"{key}.") if isinstance(each, BaseModel) else {key: each}
    return found


def nested_in(key: str, value: Any) -> dict[str, BaseModel]:
    """The configs that a value is or holds as a dictionary, by their dotted keys."""
    if isinstance(value, BaseModel):
        return {key: value}
    if isinstance(value, dict) and value and all(isinstance(each, BaseModel) for each in value.values()):
        return {f"{key}.{name}": each for name, each in value.items()}
    return {}


def differences(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values (None where one side lacks the key)."""
    a, b = (keys(config) | _adapter(config) | _adapters(config) for config in (old, new))
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def save_config(config: BaseModel, path: Path) -> None:
    """Write a config as JSON, with its task and the import path of its adapter beside their settings."""
    saved = _task(type(config)) | _adapter(config) | config.model_dump(mode="json", serialize_as_any=True)
    write_whole(path, json.dumps(saved, indent=2) + "\n")


def _task(kind: type[BaseModel]) -> dict[str, str]:
    """The task that a config is of (its class attribute `task`), under the key that the file has it under."""
    return {"task": kind.task} if hasattr(kind, "task") else {}


def _adapter(config: BaseModel) -> dict[str, str]:
    """The import path of a config's adapter, under the key that the file has it under."""
    data = getattr(config, "data", None)
    return {"adapter": import_path(type(data))} if isinstance(data, Modality) else {}


def _adapters(config: BaseModel) -> dict[str, str]:
    """The import paths of the adapters that an adapter holds, by the keys that a file has them under."""
    found: dict[str, str] = {}
    data = getattr(config, "data", None)
    held = {"data": data} if isinstance(data, Modality) else {}
    while held:
        key, adapter = held.popitem()
        if key != "data":
            found[f"{key}.adapter"] = import_path(type(adapter))
        for name in type(adapter).model_fields:
            inner = nested_in(f"{key}.{name}", getattr(adapter, name))
            held |= {own: each for own, each in inner.items() if isinstance(each, Modality)}
    return found


def load_config(kind: type[Config], path: Path) -> Config:
    """Read what `save_config` wrote, rebuilding the adapter from its import path.

    Raises:
        UserError: the file is missing or damaged, or a key does not fit.
    """
    saved = read_saved(path)
    wanted = _task(kind).get("task")
    task = saved.pop("task", wanted)
    if task != wanted:
        fix = f"; name one, or a recipe with init={path.parent}" if "init" in kind.model_fields else "; name one"
        raise UserError(f"{path} is of a run of `nepa {task}`, and a run of `nepa {wanted}` is wanted here{fix}")
    adapter = load_adapter(saved, path)
    saved.pop("adapter", None)
    try:
        with trust.reading(path):
            return validated(kind, saved if adapter is None else saved | {"data": adapter})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_saved(path: Path) -> dict[str, Any]:
    """What `save_config` wrote, as it stands in the file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        saved = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not a run folder: it holds no {path.name}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or start a new run") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds no settings; restore it or start a new run")
    trust.seen_in(path, saved)
    return saved


def load_adapter(saved: Mapping[str, Any], file: Path) -> Modality | None:
    """The adapter that a saved config names, or None where it names none.

    Args:
        file: where it was saved.

    Raises:
        UserError: the class is not found, is no adapter, is of code that is not to be trusted (see `trust`), or a
            setting does not fit.
    """
    if "adapter" not in saved:
        return None
    name = str(saved["adapter"])
    try:
        with trust.reading(file):
            adapter = load_object(name)
            if not (isinstance(adapter, type) and issubclass(adapter, Modality)):
                raise UserError(f"{shown(name)} is not an adapter (a subclass of Modality)")
            return validated(adapter, saved.get("data", {}), "data.")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def as_saved(adapter: Modality) -> dict[str, Any]:
    """An adapter inside another as a file holds it: its settings, and its import path under "adapter"."""
    return {"adapter": import_path(type(adapter)), **adapter.model_dump(mode="json", serialize_as_any=True)}


def from_saved(value: Any, key: str) -> Modality:
    """The way back of `as_saved`, by the rule of `trust` that holds where it is read; an adapter as it is.

    Args:
        key: of the adapter, such as "data.parts.image".

    Raises:
        UserError: it is none, or as of `load_adapter`.
    """
    if isinstance(value, Modality):
        return value
    if not isinstance(value, Mapping) or "adapter" not in value:
        raise UserError(f"{key}={shown(value)} is no adapter: settings, and its class as adapter=module:Class")
    name = str(value["adapter"])
    found = load_object(name)
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise UserError(f"{key}.adapter={shown(name)} is not an adapter (a subclass of Modality)")
    return validated(found, {field: each for field, each in value.items() if field != "adapter"}, f"{key}.")


def addresses_of(config: BaseModel) -> list[str]:
    """The addresses that a config's data are fetched from."""
    data = getattr(config, "data", None)
    return trust.addresses_in(*keys(data).values()) if isinstance(data, Modality) else []


_IMPORT_PATH = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def imports_of(config: BaseModel) -> list[str]:
    """The import paths that a config names: its adapter, an order of the user's, terms of the objective, and hooks."""
    data = getattr(config, "data", None)
    if not isinstance(data, Modality):
        return []
    values = [*keys(data).values(), *getattr(getattr(config, "objective", None), "terms", ())]
    values += getattr(getattr(config, "train", None), "hooks", ())
    return [import_path(type(data)), *_adapters(config).values(), *import_paths(*values)]


def import_paths(*values: Any) -> list[str]:
    """Those among some values that are of the form module:function, in lists of any form and dictionaries, too."""
    found: list[str] = []
    for value in values:
        if isinstance(value, str):
            found += [each for each in listed(value) if _IMPORT_PATH.fullmatch(each)]
        elif isinstance(value, list | tuple | dict):
            found += import_paths(*value, *(value.values() if isinstance(value, dict) else ()))
    return found
