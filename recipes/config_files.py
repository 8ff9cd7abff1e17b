"""Config files: `nepa pretrain my.yaml`, with the keys and values of the command line.

    recipe: recipes.vision:digits    # or the folder of a run: the word after the task
    out: runs/slow
    optim.lr: 3e-4                   # dotted, or nested as below
    train:
      length: {steps: 200}

What the command line says beside the file goes before what the file says. Values are read as on the command line: as
JSON where they are some, else as text, so that 3e-4 is a number and `no` a word; text in quotes stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nepa_core.basics import UserError
from nepa_core.runtime import trust
from nepa_core.runtime.config import import_paths, shown
from recipes.networks.backbones import TIMM

SUFFIXES = (".yaml", ".yml")
_LARGEST = 1 << 20  # bytes


class ConfigFile(NamedTuple):
    """What a config file says.

    Attributes:
        path: of the file.
        target: the recipe or run that it names.
        values: dotted key -> value.
        lines: dotted key -> the line it stands in, 1 for the first.
    """

    path: Path
    target: str
    values: dict[str, Any]
    lines: dict[str, int]


def read_config_file(path: Path) -> ConfigFile:
    """Read a config file.

    Raises:
        UserError: naming file and line: it is missing or no YAML, a key comes twice or is no text, or `recipe` is
            missing.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST:,} bytes: it is no config file")
        text = path.read_text("utf-8")
        aliases = [f"*{each.anchor}" for each in yaml.parse(text, yaml.SafeLoader) if isinstance(each, yaml.AliasEvent)]
        if aliases:  # they could stand for more than any memory holds
            raise UserError(f"{path}: aliases are not read; write out what {aliases[0]} stands for")
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a recipe, a run, or a config file that exists") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as such") from error
    except RecursionError as error:
        raise UserError(f"{path}: its keys are nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where}: no YAML: {getattr(error, 'problem', None) or 'odd characters'}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} holds no keys: write lines such as `recipe: recipes.vision:digits`")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value, line in _entries(root, "", path):
        if key in values:
            raise UserError(f"{path}, line {line}: {shown(key)} is given twice, here and in line {lines[key]}")
        values[key], lines[key] = value, line
    target = values.pop("recipe", None)
    if not isinstance(target, str):
        raise UserError(f"{path} names no recipe: write a line such as `recipe: recipes.vision:digits`")
    for key, value in {"recipe": target, **values}.items():
        for named in import_paths(key, value):
            if key != "beside" or not named.startswith(TIMM):  # its own models are no code of a user
                _check_trust(named, path, lines[key])
    trust.seen_in(path, values)
    return ConfigFile(path, target, values, lines)


def _check_trust(named: str, path: Path, line: int) -> None:
    try:
        with trust.reading(path):
            trust.check(named)
    except UserError as error:
        raise UserError(
            f"{path}, line {line}: it names {shown(named)}, code that would be run: look at that code, and where you "
            "trust it give the same command with trust=true"
        ) from error


def _entries(node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, line) of all that a mapping holds."""
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode) or not name.value:
            raise UserError(f"{path}, line {line}: a key must be a name, such as optim.lr")
        if name.value.split() != [name.value]:
            raise UserError(f"{path}, line {line}: the key {shown(repr(name.value))} has blanks; take them out")
        key = f"{prefix}{name.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _entries(value, f"{key}.", path)
        else:
            yield key, _value(value), line


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(each) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        return {name.value: _value(value) for name, value in node.value}
    text: str = node.value
    if isinstance(node, yaml.ScalarNode) and node.style is None:  # without quotes
        with suppress(ValueError):
            return json.loads(text or "null")
    return text


@contextmanager
def naming_lines(file: ConfigFile, given: Collection[str]) -> Iterator[None]:
    """Within the block an error over keys of this file names their lines, too.

    Args:
        given: keys that the command line has, whatever the file says of them.
    """
    try:
        yield
    except UserError as error:
        if not (lines := sorted(set(_lines_of(str(error), file, given)))):
            raise
        where = f"line{'s' if len(lines) > 1 else ''} {' and '.join(map(str, lines))}"
        raise UserError(f"{file.path}, {where}: {error}") from error


def _lines_of(error: str, file: ConfigFile, given: Collection[str]) -> list[int]:
    """That of the key or recipe that an error begins with, or those of the group, or of all that it names."""
    error = error.removeprefix("unknown key ").lstrip("'")
    lines = {shown(key): line for key, line in file.lines.items() if key not in given}
    begun = [key for key in (*lines, *given, file.target) if re.match(rf"{re.escape(key)}(?![\w.])", error)]
    if begun:
        key = max(begun, key=len)
        return [] if key in given else [lines.get(key, file.lines["recipe"])]
    group = error.partition(":")[0]
    if found := [line for key, line in lines.items() if key.startswith(f"{group}.")]:
        return found
    ends = {key: r"(?![\w.])" if "." in key else "=" for key in lines}  # "out" alone is a word like any other
    return [line for key, line in lines.items() if re.search(rf"(?<![\w.]){re.escape(key)}{ends[key]}", error)]


class _Dumper(yaml.SafeDumper):
    """Lists in one line, groups over several."""


def _in_one_line(dumper: yaml.SafeDumper, values: Sequence[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(list, _in_one_line)
_Dumper.add_representer(tuple, _in_one_line)


def as_text(target: str, values: Mapping[str, Any]) -> str:
    """The config file that says the same as this recipe or run and these keys with their values."""
    nested: dict[str, Any] = {"recipe": target}
    for key, value in {**values, "recipe": target}.items():
        *groups, last = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    text: str = yaml.dump(nested, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return text
