"""docs/vision-recipe.md names every key of the ImageNet and ADE20K presets, with the value that it has and a source."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from nepa_core.runtime.optim import Duration
from recipes import vision
from tests.conftest import ROOT

SOURCE = re.compile(r"\b(paper|scripts|release|MAE|BEiT|data set|chosen here)\b")
Rows = dict[str, tuple[list[Any], str]]


def tables() -> dict[tuple[str, ...], Rows]:
    """The presets that head a table -> key -> its value in each of them (as JSON), and its source."""
    found: dict[tuple[str, ...], Rows] = {}
    rows: Rows | None = None
    for line in (ROOT / "docs" / "vision-recipe.md").read_text().splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        first, *cells, source = [cell.strip() for cell in line.strip("|").split("|")]
        if first == "key":
            rows = found[tuple(cells)] = {}
        elif rows is not None and set(first) != {"-"}:
            assert first not in rows, f"{first} has two rows"
            values: list[Any] = []
            for cell in cells:  # an empty one is as the one before it
                values.append(json.loads(cell.strip("`")) if cell else values[-1])
            rows[first] = (values, source)
    return found


def values_of(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its value as JSON has it; a duration is one key, {"epochs": 100.0}."""
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel) and not isinstance(value, Duration):
            found |= values_of(value, f"{prefix}{name}.")
        else:
            plain = value.model_dump(exclude_none=True) if isinstance(value, Duration) else value
            found[prefix + name] = json.loads(json.dumps(plain))
    return found


TABLES = tables()


def test_both_forms_and_both_sizes_have_a_table() -> None:
    named = {name for names in TABLES for name in names}
    sizes = ("base", "large")
    kinds = ("in1k", "in1k_paper", "in1k_finetune", "in1k_finetune_paper", "ade20k")
    assert named == {f"{size}_{kind}" for size in sizes for kind in kinds}


@pytest.mark.parametrize("names", TABLES, ids=lambda names: names[0])
def test_every_key_has_one_row_with_the_values_of_the_presets(names: tuple[str, ...]) -> None:
    rows = TABLES[names]
    for column, name in enumerate(names):
        expected = values_of(getattr(vision, name)())
        assert {key: values[column] for key, (values, _) in rows.items()} == expected, name


@pytest.mark.parametrize("names", TABLES, ids=lambda names: names[0])
def test_every_row_has_a_source(names: tuple[str, ...]) -> None:
    without = [key for key, (_, source) in TABLES[names].items() if not SOURCE.search(source)]
    assert without == []
