"""Events as they lie on the disk: a CSV or parquet table with a row for each, of one entity or several.

Rows are sorted by entity and time. What was out of order or doubled, empty names, and numbers that are missing or
infinite are counted and said; a time must stand in every row.

Shapes: E events of all entities together, in their order; C columns of numbers.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modalities.data.csv_files import bad_row, find_out, line_of, read_blocks
from modalities.data.hub import one_line
from modalities.data.listing import printable, say
from modalities.data.remote import at_hand
from modalities.data.series import TIME_NAMES
from modalities.data.text_files import check_file
from modalities.data.time_axis import StampReader
from nepa_core.basics import UserError, number_of, some
from nepa_core.runtime.config import closest

COLUMNS = {
    "entity": ("entity", "id", "user", "user_id", "customer", "patient", "subject", "device", "machine", "case"),
    "time": (*TIME_NAMES, "start", "when"),
    "kind": ("kind", "event", "type", "event_type", "activity", "code", "action"),
    "label": ("label", "class", "outcome"),
}
"""What the columns are called where no key names them, in any case."""
_SECOND = 1e6  # stamps are in microseconds
_LARGEST = float(np.finfo(np.float32).max)

Array = np.ndarray[Any, Any]


class EventTable(NamedTuple):
    """Events sorted by entity and time.

    Attributes:
        path: the file. names: of entities, in order. entity: [E] int64, the place of each event's in them.
        time: [E] float64, in seconds since the first event of all, or in the numbers of the file.
        kind: [E], names. columns: C names. numbers: [E, C] float64, NaN where missing.
        labels: of entities, or None.
    """

    path: str
    names: tuple[str, ...]
    entity: Array
    time: Array
    kind: Array
    columns: tuple[str, ...]
    numbers: Array
    labels: tuple[str, ...] | None


class Named(NamedTuple):
    """Names of columns that the user gave; None for the usual ones, and for all other numbers."""

    entity: str | None = None
    time: str | None = None
    kind: str | None = None
    values: tuple[str, ...] | None = None
    label: str | None = None


@lru_cache(maxsize=4)
def read_events(path: str, named: Named) -> EventTable:
    """Read a table of events.

    Raises:
        UserError: naming file, row and column: it can't be read or is empty; a column is not there; a time is missing
            or no time stamp; a number is none; or an entity has two labels.
    """
    file = str(Path(at_hand(path)).expanduser())
    check_file(file, "name a .csv or .parquet table of events by data.root")
    try:
        table, row = _parquet(file, named) if _is_parquet(file) else _csv(file, named)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise UserError(f"{printable(path)}: {one_line(error)}") from error
    if not len(table.time):
        raise _no_rows(path)
    return _sorted(path, table, row)


def _no_rows(path: str) -> UserError:
    return UserError(f"{printable(path)}: no rows below its head; events are wanted, a row each")


class _Raw(NamedTuple):
    """Columns of a file in the order of its rows."""

    entity: list[str]
    time: Array
    kind: list[str]
    columns: tuple[str, ...]
    numbers: Array
    labels: list[str] | None


class _Places(NamedTuple):
    """Which columns of a file are what."""

    entity: str | None
    time: str
    kind: str | None
    values: tuple[str, ...]
    label: str | None


def _is_parquet(path: str) -> bool:
    return path.lower().endswith((".parquet", ".pq"))


def _parquet(path: str, named: Named) -> tuple[_Raw, Any]:
    schema = pq.read_schema(path)
    places = _places(path, schema.names, schema.types, named)
    table = pq.read_table(path, columns=[name for name in _wanted(places) if name])
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    return _raw(path, columns, places, lambda place: f"row {place + 1}"), lambda place: f"row {place + 1}"


def _csv(path: str, named: Named) -> tuple[_Raw, Any]:
    form = find_out(path)
    for note in form.notes:
        say(note)
    types = next(read_blocks(form, 1 << 19)).schema.types
    places = _places(path, form.names, types, named)
    where = {name: form.names.index(name) for name in _wanted(places) if name}
    kinds = {place: pa.string() for place in where.values()} | {where[name]: pa.float64() for name in places.values}
    kinds[where[places.time]] = _time_type(types[where[places.time]])

    def row(place: int) -> str:
        return f"row {line_of(form, place)}"

    try:
        try:
            blocks = list(read_blocks(form, 1 << 19, kinds))
        except pa.ArrowException:  # a time further down may be none, which its text tells
            blocks = list(read_blocks(form, 1 << 19, kinds | {where[places.time]: pa.string()}))
    except (pa.ArrowException, OSError, ValueError) as error:
        found = bad_row(form, [where[name] for name in places.values])
        raise UserError(f"{path}: {found or one_line(error)}") from error
    if not blocks:
        raise _no_rows(path)
    table = pa.Table.from_batches(blocks)
    columns = {name: table[str(place)].combine_chunks() for name, place in where.items()}
    return _raw(path, columns, places, row), row


def _time_type(kind: pa.DataType) -> pa.DataType:
    """Numbers and times as they are, fractions of either being possible later; else text, which is read here."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.float64() if pa.types.is_integer(kind) or pa.types.is_floating(kind) else pa.string()


def _wanted(places: _Places) -> tuple[str | None, ...]:
    return (places.entity, places.time, places.kind, *places.values, places.label)


def _places(path: str, names: Sequence[str], types: Sequence[pa.DataType], named: Named) -> _Places:
    for key in ("entity", "time", "kind", "values", "label"):
        given = getattr(named, key)
        for name in (given,) if isinstance(given, str) else given or ():
            if name not in names:
                raise UserError(
                    f"{path}: no column {name!r} (data.{key}){closest(name, names)}; it has {some(names, 20)}"
                )
            if names.count(name) > 1:
                raise UserError(f"{path}: {names.count(name)} columns are called {name!r}; rename them")
    lower = [name.lower() for name in names]
    found = {
        key: getattr(named, key) or next((names[lower.index(name)] for name in usual if name in lower), None)
        for key, usual in COLUMNS.items()
    }
    if found["time"] is None:
        raise UserError(
            f"{path}: no column is called time, date or the like; name it by data.time; it has {some(names, 20)}"
        )
    taken = set(found.values())
    numbers = tuple(
        name
        for name, kind in zip(names, types, strict=True)
        if name not in taken and (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
    )
    values = numbers if named.values is None else named.values
    return _Places(found["entity"], found["time"], found["kind"], values, found["label"])


def _raw(path: str, columns: dict[str, pa.Array], places: _Places, row: Any) -> _Raw:
    time, count = columns[places.time], len(columns[places.time])
    reader = StampReader()
    odd = reader.add(time)
    if odd is not None and odd.missing:
        raise UserError(f"{path}: {row(odd.place)} has no time in column {places.time!r}; fill it in")
    if odd is not None:
        raise UserError(
            f"{path}: {row(odd.place)} of column {places.time!r} is {str(time[odd.place].as_py())!r}, neither a number "
            "nor an ISO 8601 time stamp; fix it, or name another column by data.time"
        )
    stamps = reader.stamps()
    times = stamps.values.astype(np.float64) if not stamps.dated else (stamps.values - stamps.values.min()) / _SECOND
    if (wrong := np.flatnonzero(~np.isfinite(times))).size:
        raise UserError(f"{path}: {row(int(wrong[0]))} of column {places.time!r} is infinite; fix it")
    numbers = np.full((count, len(places.values)), np.nan)
    for place, name in enumerate(places.values):
        numbers[:, place] = columns[name].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        infinite = np.abs(numbers[:, place]) > _LARGEST
        if infinite.any():
            say(f"{path}: {number_of(int(infinite.sum()), 'infinite number')} in column {name!r}, read as missing")
            numbers[infinite, place] = np.nan
    return _Raw(
        _texts(path, columns, places.entity, count, "all"),
        times,
        _texts(path, columns, places.kind, count, "event"),
        places.values,
        numbers,
        None if places.label is None else _texts(path, columns, places.label, count, ""),
    )


def _texts(path: str, columns: dict[str, pa.Array], name: str | None, count: int, default: str) -> list[str]:
    """What stands in a column of names. Empty cells are one more name, and said."""
    if name is None:
        return [default] * count
    texts: list[str] = pc.fill_null(columns[name].cast(pa.string()), "").to_pylist()
    if empty := sum(not each for each in texts):
        say(
            f"{path}: {number_of(empty, 'empty cell')} in column {name!r}, read as one more name, which is empty; "
            "fill in, or remove the rows, if that is not meant"
        )
    return texts


def _sorted(path: str, raw: _Raw, row: Any) -> EventTable:
    names = tuple(sorted(set(raw.entity)))
    number = {name: place for place, name in enumerate(names)}
    entity = np.array([number[each] for each in raw.entity])
    within = np.lexsort((raw.time, entity))
    order = np.argsort(entity, kind="stable")
    late = int((np.diff(raw.time[order])[np.diff(entity[order]) == 0] < 0).sum())
    if late:
        said = number_of(late, "event stands", "events stand")
        say(f"{path}: {said} behind later ones of the same entity; all are sorted by time")
    entity, time = entity[within], raw.time[within]
    same = int(((np.diff(time) == 0) & (np.diff(entity) == 0)).sum())
    if same:
        said = number_of(same, "event has", "events have")
        say(f"{path}: {said} the time of the one before; such events stay in the order of the file")
    labels = None if raw.labels is None else _labels(path, raw.labels, raw.entity, names, row)
    kinds = np.array(raw.kind, dtype=object)[within]
    return EventTable(path, names, entity, time, kinds, raw.columns, raw.numbers[within], labels)


def _labels(path: str, labels: list[str], entity: list[str], names: Sequence[str], row: Any) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for place, (name, label) in enumerate(zip(entity, labels, strict=True)):
        if found.setdefault(name, label) != label:
            raise UserError(
                f"{path}: {row(place)}: entity {printable(name)} has the label {label!r} here and {found[name]!r} "
                "above; a label is of an entity: leave the column out by data.label, or give one"
            )
    return tuple(found[name] for name in names)


def counted(names: Sequence[str]) -> str:
    """ "a 3 times, b once and 4 more", the most frequent first."""
    most = Counter(names).most_common()
    return some([f"{printable(name)} ({count:,})" for name, count in most], 4)
