"""Series as they lie on the disk: CSV and parquet tables, and the UCR and UEA layouts of labelled series.

Values keep the float64 of the file, so that a signal on a large offset survives until its mean is taken off.

Shapes: T rows (time steps), C columns (channels), S labelled series. Missing values are NaN.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from modalities.data.csv_files import NULLS, Csv, bad_row, find_out, line_of, not_a_number, read_blocks
from modalities.data.growing import Growing, blocks, is_whole, rises
from modalities.data.listing import data_folder, is_hidden, printable, say
from modalities.data.text_files import check_file, read_lines
from modalities.data.time_axis import (
    AN_INDEX,
    Gaps,
    StampReader,
    Stamps,
    as_clock,
    calendar_stamps,
    check_rising,
    clock_stamps,
    counts,
    find_gaps,
    may_count,
)
from nepa_core.basics import UserError, some
from nepa_core.runtime.config import closest

BLOCK = 1 << 19  # bytes of CSV parsed at a time
_TIMES = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time)
_LARGEST = float(np.finfo(np.float32).max)
_OVERFLOW = ", or beyond the 3.4e38 that float32 holds"
TIME_NAMES = ("time", "date", "datetime", "timestamp", "ds")
_SENTINELS = (-999.0, -9999.0, -99999.0, -999999.0)
"""Numbers that many instruments write where they have no value."""


class Table(NamedTuple):
    """A series: the names of its C columns, and values [T, C] float64, an array that owns its memory.

    Attributes:
        breaks: rows before which time is missing, see `modalities.data.time_axis.find_gaps`.
        gap: one line on them, without the file, or None.
        notes: lines on what was found out and may be wrong.
        row: place of a row -> how a message calls it.
    """

    columns: tuple[str, ...]
    values: np.ndarray
    breaks: tuple[int, ...] = ()
    gap: str | None = None
    notes: tuple[str, ...] = ()
    row: Callable[[int], str] = "row {}".format


class LabelledSeries(NamedTuple):
    """Series with a label each: values [S, T, C] float64 (NaN after the end of a shorter one); S names of classes, or
    numbers to predict.

    Attributes:
        path: the file. rows: [S], the line of each in it.
    """

    values: np.ndarray
    labels: tuple[str, ...] | tuple[float, ...]
    path: str = ""
    rows: tuple[int, ...] = ()


class _File(NamedTuple):
    """A table on the disk: names and types of all its columns.

    Attributes:
        form: how a CSV file is read; None for parquet.
    """

    path: str
    names: tuple[str, ...]
    types: tuple[pa.DataType, ...]
    form: Csv | None

    def row(self, place: int, rows: int | None = None) -> str:
        """How a message calls a row, 0 the first: of a CSV file by its line, of parquet by its number from 1 on."""
        return f"row {place + 1 if self.form is None else line_of(self.form, place, rows)}"


def read_table(path: str, *, time: str | None = None, columns: Sequence[str] | None = None) -> Table:
    """Read a series from a CSV (`modalities.data.csv_files` says which) or .parquet file whose rows are in order.

    Columns that only count (an index, a row number, seconds since 1970: `modalities.data.time_axis.counts`) are no
    channels unless `columns` names them; where no other column holds time stamps, one of them does. Held at once: the
    values, the time stamps and a block of the file.

    Args:
        time: name of the column of time stamps. Default: the only one that holds dates or times, else the only one
            called as `TIME_NAMES` has it, whatever its case, else the only one that is no number; or none.
        columns: names of the channels. Default: every other column.

    Raises:
        UserError: naming file, row (of a CSV its line, the head's is 1) and column: the file can't be read; a column is
            unknown, has the name of another, or holds text or infinities; there is none; time stamps are missing,
            repeated or out of order.
    """
    file = _open(path)
    time = _time_column(file, time, columns)
    names = tuple(columns or (name for name in _default_columns(file) if name != time))
    if not names:
        raise UserError(f"{path}: no numeric column; a series needs at least one beside its time stamps")
    for name in (*names, *((time,) if time is not None else ())):
        count = file.names.count(name)
        if count > 1:
            raise UserError(f"{path}: {count} columns are called {name!r}; rename them, or name others by data.columns")
    calendar = _calendar(file, names) if columns is None else {}
    suspects = _suspects(file, names, time, columns)
    suspects += [name for name in calendar.values() if name not in suspects]
    read = _read_columns(file, [name for name in names if name not in suspects], suspects, time)
    values, rows = read.values, len(read.values)
    found = {name: (what, each) for name, each in read.suspects.items() if (what := counts(name, each)) is not None}
    dates = _calendar_stamps(calendar, read.suspects)
    if dates is not None:
        found |= {name: ("a part of the date", read.suspects[name]) for name in calendar.values()}
    if columns is None:
        names, values, found = _without_counters(names, values, read.suspects, found)
    stamps = None
    if time is not None and read.stamps is not None:
        stamps = read.stamps
        check_rising(path, time, stamps, lambda row: file.row(row, rows))
    elif dates is not None:
        stamps = dates
        check_rising(path, ", ".join(calendar.values()), stamps, lambda row: file.row(row, rows))
    elif (clock := as_clock(found)) is not None:
        stamps = clock_stamps(*found[clock])
    gaps = Gaps() if stamps is None else find_gaps(stamps, lambda row: file.row(row, rows))
    notes = list(file.form.notes if file.form is not None else ())
    if found and columns is None:
        told = ", ".join(f"{name!r} ({what})" for name, (what, _) in found.items())
        notes.append(f"{path}: not read as channels: {told}; data.columns=[...] names the ones to read")
        notes += [
            f"{path}: the index {name!r} does not rise from row to row, so the rows may be out of order; sort them"
            for name, (what, each) in found.items()
            if what == AN_INDEX and not rises(each)
        ]
    notes += _sentinel_notes(path, names, values)
    return Table(names, values, gaps.breaks, gaps.note, tuple(notes), lambda row: file.row(row, rows))


_CALENDAR = (("year", "yr", "yyyy"), ("month", "mo"), ("day",), ("hour", "hr"), ("minute",), ("second",))
"""What columns with the parts of a date are called, from the longest part to the shortest."""


def _calendar(file: _File, names: Sequence[str]) -> dict[int, str]:
    """The columns of whole numbers that are the parts of a date by their names: place in `_CALENDAR` -> name.

    None where there is no year or no month.
    """
    kinds = dict(zip(file.names, file.types, strict=True))
    whole = {name.strip().lower(): name for name in names if pa.types.is_integer(kinds[name])}
    found: dict[int, str] = {}
    for place, also in enumerate(_CALENDAR):
        name = next((whole[each] for each in also if each in whole), None)
        if name is None:
            break
        found[place] = name
    return found if len(found) > 1 else {}


def _calendar_stamps(calendar: dict[int, str], read: dict[str, np.ndarray]) -> Stamps | None:
    """The time stamps that columns with parts of a date make, if they do."""
    if not calendar:
        return None
    stamps = calendar_stamps(*(read[calendar[place]] for place in sorted(calendar)))
    return None if stamps is None else Stamps(stamps, dated=True)


class _Read(NamedTuple):
    """What one pass over a file gives: values [T, C], the columns [T] that may only count, and the time stamps."""

    values: np.ndarray
    suspects: dict[str, np.ndarray]
    stamps: Stamps | None


def _read_columns(file: _File, names: Sequence[str], suspects: Sequence[str], time: str | None) -> _Read:
    path = file.path
    values, counted, stamps = Growing(len(names)), {name: Growing() for name in suspects}, StampReader()
    for batch in _batches(file, names, suspects, time):
        rows = values.rows
        if not rows and len(batch) and names and not any(_reads_as_number(batch[name][0].as_py()) for name in names):
            cell = not_a_number(file.row(0), names[0], str(batch[names[0]][0].as_py()))
            raise UserError(
                f"{path}: no numeric column among {_listed(names)}, and a series needs at least one: {cell}"
            )
        room = values.make_room(len(batch))
        for i, name in enumerate(names):
            room[:, i] = _numbers(file, name, batch[name], rows)
        for name in suspects:
            counted[name].add(_numbers(file, name, batch[name], rows))
        if time is not None and len(batch):
            odd = stamps.add(batch[time])
            if odd is not None and odd.missing:
                raise UserError(
                    f"{path}: {file.row(rows + odd.place)} has no time stamp in column {time!r}; fill it in"
                )
            if odd is not None:
                text = batch[time][odd.place].as_py()
                such = f"{text!r} in {file.row(rows + odd.place)}" if rows + odd.place else f"text such as {text!r}"
                raise UserError(
                    f"{path}: column {time!r} holds {such}, neither a number nor an ISO 8601 time stamp; fix it, or "
                    "name the columns to read by data.columns and data.time"
                )
    if not values.rows:
        raise UserError(f"{path}: no rows below its head; a series needs at least a window")
    integer = {name for name in suspects if pa.types.is_integer(file.types[file.names.index(name)])}
    found: dict[str, np.ndarray] = {}
    for name in suspects:  # one at a time: the numbers read go as the whole ones come
        whole = counted.pop(name).whole()
        found[name] = _as_integers(whole) if name in integer else whole
    return _Read(values.whole(), found, None if time is None else stamps.stamps())


def _as_integers(values: np.ndarray) -> np.ndarray:
    """Numbers [T] read in float64 as int64, in the same memory, where all of them are whole."""
    fits = len(values) and values.min() > -(2**62) and values.max() < 2**62 and is_whole(values)
    if not fits:
        return values
    whole = values.view(np.int64)  # of the same size, so a column need not be held twice
    for read, written in zip(blocks(values), blocks(whole), strict=True):
        written[:] = read.astype(np.int64)
    return whole


Found = dict[str, tuple[str, np.ndarray]]
"""Columns that only count: name -> in words what, and their values [T]."""


def _without_counters(
    names: tuple[str, ...], values: np.ndarray, suspects: dict[str, np.ndarray], found: Found
) -> tuple[tuple[str, ...], np.ndarray, Found]:
    """The channels, with those among the suspects that turned out to be some; and the columns that do count.

    Args:
        names: of channels and suspects, as they lie in the file. values: [T, C] of those that are no suspects.
    """
    if len(found) == len(names):  # a series that counts is a series, where there is no other
        found = {name: each for name, each in found.items() if each[0] == AN_INDEX and len(found) > 1}
    if found.keys() == suspects.keys():
        return tuple(name for name in names if name not in found), values, found
    plain = iter(values.T)
    columns = [suspects[name] if name in suspects else next(plain) for name in names]
    kept = [place for place, name in enumerate(names) if name not in found]
    values = np.stack([columns[place] for place in kept], 1).astype(np.float64)
    return tuple(names[place] for place in kept), values, found


def _sentinel_notes(path: str, names: Sequence[str], values: np.ndarray) -> list[str]:
    notes = []
    for place, name in enumerate(names):
        with np.errstate(invalid="ignore"):
            lowest = np.fmin.reduce(values[:, place])
        if lowest not in _SENTINELS:
            continue
        rest = values[:, place][values[:, place] > lowest]
        if len(rest) and rest.min() - lowest > rest.max() - rest.min():  # far below all others
            count = int((values[:, place] == lowest).sum())
            notes.append(
                f"{path}: column {name!r} holds {lowest:g} {count:,} time{'' if count == 1 else 's'}, which often "
                "stands for a missing value; if so, empty those cells"
            )
    return notes


def _open(path: str) -> _File:
    """Names and types of the columns; of a CSV as its first block has them."""
    check_file(path, "name a .csv or .parquet file by data.root")
    form = None
    try:
        if _is_parquet(path):
            schema = pa.parquet.read_schema(path)
            return _File(path, tuple(schema.names), tuple(schema.types), None)
        form = find_out(path)
        return _File(path, form.names, tuple(next(read_blocks(form, BLOCK)).schema.types), form)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {_why(error, form, ())}") from error


def _is_parquet(path: str) -> bool:
    if path.lower().endswith((".parquet", ".pq")):
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _default_columns(file: _File) -> list[str]:
    """All but those without a name and without a value, as a separator at the end of every row makes one."""
    return [
        name
        for name, kind in zip(file.names, file.types, strict=True)
        if name or not pa.types.is_null(kind) or file.form is None
    ]


def _time_column(file: _File, time: str | None, columns: Sequence[str] | None) -> str | None:
    for name in (*((time,) if time is not None else ()), *(columns or ())):
        if name not in file.names:
            key = "time" if name == time else "columns"
            raise UserError(
                f"{file.path}: no column {name!r} (data.{key}){closest(name, file.names)}; it has {_listed(file.names)}"
            )
    if time is not None:
        return time
    others = [(name, kind) for name, kind in zip(file.names, file.types, strict=True) if name not in (columns or ())]
    stamps = [name for name, kind in others if any(is_kind(kind) for is_kind in _TIMES)]
    called = [name for name, _ in others if name.lower() in TIME_NAMES]
    words = [name for name, kind in others if not _is_number(kind) and not pa.types.is_boolean(kind)]
    return next((found[0] for found in (stamps, called, words) if len(found) == 1), None)


def _listed(names: Sequence[str]) -> str:
    return some([name or "''" for name in names], 20)


def _suspects(file: _File, names: Sequence[str], time: str | None, columns: Sequence[str] | None) -> list[str]:
    """Columns that nobody named and that may only count, by their names and their first block."""
    if columns is not None:
        known = {*columns, *((time,) if time is not None else ())}
        names = () if time is not None else [name for name in file.names if name not in known]
    kinds = dict(zip(file.names, file.types, strict=True))
    wanted = [name for name in names if file.names.count(name) == 1 and _is_number(kinds[name])]
    first = next((batch for batch in _batches(file, (), wanted, None) if len(batch)), None) if wanted else None
    if first is None:
        return []
    integer = {name for name in wanted if pa.types.is_integer(kinds[name])}
    whole = {name: _numbers(file, name, first[name], 0) for name in wanted}
    return [
        name for name, each in whole.items() if may_count(name, _as_integers(each.copy()) if name in integer else each)
    ]


def _is_number(kind: pa.DataType) -> bool:
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(plain or pa.types.is_null(kind))


def _batches(file: _File, names: Sequence[str], suspects: Sequence[str], time: str | None) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a file, block by block."""
    wanted = [*names, *suspects, *((time,) if time is not None else ())]
    places = {name: file.names.index(name) for name in wanted}
    types = {name: file.types[place] for name, place in places.items()}
    try:
        if file.form is None:
            with pa.parquet.ParquetFile(file.path) as parquet:
                yield from parquet.iter_batches(columns=wanted)
            return
        kinds = {places[name]: pa.float64() if _is_number(types[name]) else pa.string() for name in (*names, *suspects)}
        if time is not None:
            kinds[places[time]] = _stamp_type(types[time])
        for batch in read_blocks(file.form, BLOCK, kinds):
            yield pa.RecordBatch.from_arrays([batch[str(places[name])] for name in wanted], names=wanted)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        numbers = [places[name] for name in wanted if name != time or _is_number(types[name])]
        raise UserError(f"{file.path}: {_why(error, file.form, numbers)}") from error


def _stamp_type(kind: pa.DataType) -> pa.DataType:
    """Fractions of a second may come later than the first block."""
    return pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) and kind.unit in ("s", "ms") else kind


def _why(error: Exception, form: Csv | None, numbers: Sequence[int]) -> str:
    """What is wrong with a file, with the row where that can be found out."""
    found = None
    if form is not None:
        with suppress(OSError, ValueError, csv.Error):
            found = bad_row(form, numbers)
    return found or _one_line(error)


def _reads_as_number(value: Any) -> bool:
    """A number, its text, or nothing, which is a missing value."""
    try:
        float(value or 0)
    except (TypeError, ValueError):
        return False
    return True


def _numbers(file: _File, name: str, column: pa.Array, before: int) -> np.ndarray:
    """One column of a block as float64 with NaN; `before` rows of the file lie above."""
    path = file.path
    try:
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        for row, value in enumerate(column.to_pylist()):
            if not _reads_as_number(value):
                raise UserError(f"{path}: {not_a_number(file.row(before + row), name, str(value))}") from error
        raise UserError(
            f"{path}: column {name!r} holds {column.type}, not numbers; leave it out by data.columns"
        ) from error
    values = np.asarray(values, np.float64)
    infinite = np.abs(values) > _LARGEST
    if infinite.any():
        raise UserError(
            f"{path}: {file.row(before + int(infinite.argmax()))} of column {name!r} is infinite{_OVERFLOW}; empty the "
            "cell if the value is missing"
        )
    return values


def read_labelled(root: str, split: str) -> LabelledSeries:
    """Read `*_TRAIN` or `*_TEST` (.tsv of the UCR archive, .ts of the UEA archive) in a folder.

    A .tsv row is a label and the values. A .ts row is one list of values a dimension, and the label, with colons
    between them. "?", "NaN" and an empty field are missing values. Labels are classes; they are numbers to predict
    behind "@targetLabel true" in a .ts, and in a .tsv that has numbers alone, not all of them whole.

    Raises:
        UserError: naming file and row: there is not one such file, or a row does not fit.
    """
    path = _labelled_file(root, split)
    series: list[list[np.ndarray]] = []
    labels: list[str] = []
    rows: list[int] = []
    tabs = path.suffix.lower() == ".tsv"
    data, regression = tabs, False
    for row, line in enumerate(read_lines(path), 1):
        if not line.strip() or line.startswith(("#", "%")):
            continue
        if line.startswith("@"):
            words = line.lower().split()
            data |= words == ["@data"]
            regression |= words == ["@targetlabel", "true"]
            continue
        if not data:
            raise UserError(f"{path}: row {row} comes before @data")
        if tabs:
            label, *fields = line.split("\t")
            dimensions = [fields]
        else:
            *parts, label = line.strip().split(":")
            dimensions = [part.split(",") for part in parts]
        label = label.strip()
        if not dimensions or not dimensions[0] or "," in label or label.lower() in ("", "?", "nan"):
            raise UserError(f"{path}: row {row} has no label beside its values")
        if (
            tabs
            and not series
            and all(field.strip() not in NULLS and _number(field) is None for field in (label, *fields))
        ):
            say(f"{path}: row {row} is read as names of columns, not as a series")
            continue
        series.append([_floats(f"{path}: row {row}", fields) for fields in dimensions])
        labels.append(label)
        rows.append(row)
        if regression and _number(label) is None:
            raise UserError(f"{path}: row {row} is labelled {label!r}, which is no finite number to predict")
        if len(series[-1]) != len(series[0]):
            raise UserError(f"{path}: row {row} has {len(series[-1])} dimensions, the first has {len(series[0])}")
    if tabs and _is_head(labels, series):
        say(f"{path}: row {rows[0]} is read as names of columns, not as a series")
        del series[0], labels[0], rows[0]
    if not series:
        raise UserError(f"{path}: no series in it")
    longest = max(len(channel) for sample in series for channel in sample)
    values = np.full((len(series), longest, len(series[0])), np.nan)
    for i, sample in enumerate(series):
        for c, channel in enumerate(sample):
            values[i, : len(channel), c] = channel
    found = _labels(labels, regression=None if tabs else regression)
    return LabelledSeries(values, found, str(path), tuple(rows))


def _labelled_file(root: str, split: str) -> Path:
    """The one file of a split, in small or large letters; hidden ones are none."""
    folder = data_folder(root, "a *_TRAIN and a *_TEST file, .tsv or .ts")
    wanted = (f"_{split}.tsv", f"_{split}.ts")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(wanted))
    found = [name for name in found if not is_hidden(name) and (folder / name).is_file()]
    if len(found) != 1:
        names = f" ({', '.join(map(printable, found[:3]))})" if found else ""
        raise UserError(
            f"{root} holds {len(found)} files *_{split.upper()}.tsv or .ts{names}; name a folder with one of them"
        )
    return folder / found[0]


def _is_head(labels: Sequence[str], series: Sequence[Sequence[np.ndarray]]) -> bool:
    """Whether the first row of a .tsv names its columns: a word above numbers that are labels, and places of values."""
    if len(labels) < 2 or _number(labels[0]) is not None or any(_number(label) is None for label in labels[1:]):
        return False
    places = np.arange(len(series[0][0]), dtype=np.float64)
    return np.array_equal(series[0][0], places) or np.array_equal(series[0][0], places + 1)


def _floats(where: str, fields: Sequence[str]) -> np.ndarray:
    """One channel, trailing missing values left out."""
    try:
        read = [np.nan if field.strip() in NULLS else float(field) for field in fields]
    except ValueError as error:
        raise UserError(f"{where}: {_one_line(error)}; series with time stamps of their own are not read") from error
    values = np.array(read, np.float64)
    if (np.abs(values) > _LARGEST).any():
        raise UserError(f"{where} holds a value that is infinite{_OVERFLOW}; write ? where a value is missing")
    real = np.flatnonzero(~np.isnan(values))
    return values[: real[-1] + 1] if len(real) else values[:0]


def _labels(texts: Sequence[str], *, regression: bool | None) -> tuple[str, ...] | tuple[float, ...]:
    """Names of classes, or numbers to predict; None leaves it to whether all are numbers and one has a fraction."""
    numbers = tuple(number for number in map(_number, texts) if number is not None)
    if regression is None:
        regression = len(numbers) == len(texts) and not all(number.is_integer() for number in numbers)
    return numbers if regression else tuple(map(_class, texts))


def _number(text: str) -> float | None:
    """What the text says, where float32 holds it and it is finite."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= _LARGEST else None


def _class(text: str) -> str:
    """ "1.0", "1.00e+00" and "1" are one class."""
    if re.fullmatch(r"[+-]?\d+", text):
        return str(int(text))
    number = _number(text)
    return str(int(number)) if number is not None and number.is_integer() and abs(number) < 2**53 else text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
