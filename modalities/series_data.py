"""Series as they lie on the disk: CSV and parquet tables, and the UCR and UEA layouts of labelled series.

Values keep the float64 of the file, so that a signal on a large offset survives until its mean is taken off.

Shapes: T rows (time steps), C columns (channels), S labelled series. Missing values are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from nepa_core.basics import UserError

BLOCK = 1 << 19  # bytes of CSV parsed at a time
_TIMES = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time)
_LARGEST = float(np.finfo(np.float32).max)
_OVERFLOW = ", or beyond the 3.4e38 that float32 holds"
TIME_NAMES = ("time", "date", "datetime", "timestamp", "ds")


class Table(NamedTuple):
    """A series: the names of its C columns, and values [T, C] float64, an array that owns its memory."""

    columns: tuple[str, ...]
    values: np.ndarray


class LabelledSeries(NamedTuple):
    """Series with a label each: values [S, T, C] float64 (NaN after the end of a shorter one); S names of classes, or
    numbers to predict."""

    values: np.ndarray
    labels: tuple[str, ...] | tuple[float, ...]


def read_table(path: str, *, time: str | None = None, columns: Sequence[str] | None = None) -> Table:
    """Read a series from a .csv or .parquet file whose rows are equally spaced and in order.

    Held at once: the values and a block of the file.

    Args:
        time: name of the column of time stamps. Default: the only one that holds dates or times, else the only one
            called as `TIME_NAMES` has it, whatever its case, else the only one that is no number; or none.
        columns: names of the channels. Default: every other column.

    Raises:
        UserError: naming file, row (the first below the head is 1) and column: the file can't be read; a column is
            unknown, has the name of another, or holds text or infinities; there is none; time stamps are missing,
            repeated or out of order.
    """
    schema = _schema(path)
    time = _time_column(path, schema, time, columns)
    names = tuple(columns or (name for name in schema.names if name != time))
    if not names:
        raise UserError(f"{path}: no numeric column; a series needs at least one beside its time stamps")
    for name in (*names, *((time,) if time else ())):
        count = schema.names.count(name)
        if count > 1:
            raise UserError(f"{path}: {count} columns are called {name!r}; rename them, or name others by data.columns")
    kinds = {name: pa.float64() for name in names}
    rows, values, last = 0, np.empty((0, len(names))), None
    for batch in _batches(path, schema, kinds, time):
        if not rows and len(batch) and not any(_reads_as_number(batch[name][0].as_py()) for name in names):
            raise UserError(f"{path}: no numeric column among {', '.join(names)}; a series needs at least one")
        if rows + len(batch) > len(values):  # large arrays grow in place: their pages are mapped anew, not copied
            values.resize(((rows + len(batch)) * 9 // 8, len(names)), refcheck=False)
        for i, name in enumerate(names):
            values[rows : rows + len(batch), i] = _numbers(path, name, batch[name], rows)
        if time is not None and len(batch):
            last = _check_times(path, time, batch[time], rows, last)
        rows += len(batch)
    if not rows:
        raise UserError(f"{path}: no rows below its head; a series needs at least a window")
    values.resize((rows, len(names)), refcheck=False)
    return Table(names, values)


def _schema(path: str) -> pa.Schema:
    """Names and types of the columns; of a CSV as its first block has them."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name a .csv or .parquet file by data.root")
    try:
        if path.endswith(".parquet"):
            return pa.parquet.read_schema(path)
        with closing(pa.csv.open_csv(path, pa.csv.ReadOptions(block_size=BLOCK))) as reader:
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def _time_column(path: str, schema: pa.Schema, time: str | None, columns: Sequence[str] | None) -> str | None:
    for name in (*((time,) if time else ()), *(columns or ())):
        if name not in schema.names:
            key = "time" if name == time else "columns"
            raise UserError(f"{path}: no column {name!r} (data.{key}); it has {', '.join(schema.names)}")
    if time is not None:
        return time
    others = [field for field in schema if field.name not in (columns or ())]
    stamps = [field.name for field in others if any(is_kind(field.type) for is_kind in _TIMES)]
    called = [field.name for field in others if field.name.lower() in TIME_NAMES]
    words = [field.name for field in others if not _is_number(field.type)]
    return next((found[0] for found in (stamps, called, words) if len(found) == 1), None)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _batches(path: str, schema: pa.Schema, kinds: dict[str, Any], time: str | None) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a file, block by block."""
    wanted = [*kinds, *((time,) if time else ())]
    text = {name: pa.string() for name in kinds if not _is_number(schema.field(name).type)}  # to say which row it is
    stamps = {time: schema.field(time).type} if time else {}
    try:
        if path.endswith(".parquet"):
            with pa.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(columns=wanted)
            return
        with closing(
            pa.csv.open_csv(
                path,
                pa.csv.ReadOptions(block_size=BLOCK, use_threads=False),
                convert_options=pa.csv.ConvertOptions(column_types=kinds | text | stamps, include_columns=wanted),
            )
        ) as reader:
            yield from reader
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def _reads_as_number(value: Any) -> bool:
    """A number, its text, or nothing, which is a missing value."""
    try:
        float(value or 0)
    except (TypeError, ValueError):
        return False
    return True


def _numbers(path: str, name: str, column: pa.Array, before: int) -> np.ndarray:
    """One column of a block as float64 with NaN; `before` rows of the file lie above."""
    try:
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        for row, value in enumerate(column.to_pylist(), before + 1):
            if not _reads_as_number(value):
                raise UserError(
                    f"{path}: row {row} of column {name!r} is {value!r}, which is no number; mend it, or leave the "
                    "column out by data.columns"
                ) from error
        raise UserError(
            f"{path}: column {name!r} holds {column.type}, not numbers; leave it out by data.columns"
        ) from error
    values = np.asarray(values, np.float64)
    infinite = np.abs(values) > _LARGEST
    if infinite.any():
        raise UserError(
            f"{path}: row {before + 1 + int(infinite.argmax())} of column {name!r} is infinite{_OVERFLOW}; empty the "
            "cell if the value is missing"
        )
    return values


def _check_times(path: str, name: str, column: pa.Array, before: int, last: Any) -> Any:
    """See that a block's time stamps rise, also from the `last` one of the block above; returns its own last."""
    absent = column.is_null(nan_is_null=True).index(pa.scalar(True)).as_py()
    if absent >= 0:
        row = before + 1 + absent
        raise UserError(f"{path}: row {row} has no time stamp in column {name!r}; fill it in")
    if not _is_number(column.type) and not any(is_kind(column.type) for is_kind in _TIMES):
        raise UserError(
            f"{path}: column {name!r} holds text such as {column[0].as_py()!r}, neither numbers nor ISO 8601 time "
            "stamps; mend it, or name the columns to read by data.columns and data.time"
        )
    whole = column if last is None else pa.concat_arrays([pa.array([last], column.type), column])
    falls = pc.less_equal(whole[1:], whole[:-1])
    place = falls.index(pa.scalar(True)).as_py()
    if place >= 0:
        row = before + place + (2 if last is None else 1)
        what = "repeats the time stamp of" if whole[place + 1] == whole[place] else "is earlier than"
        raise UserError(
            f"{path}: row {row} ({whole[place + 1].as_py()}) {what} the row above; sort the rows by {name!r}, or name "
            "other columns by data.time and data.columns"
        )
    return column[-1].as_py()


def read_labelled(root: str, split: str) -> LabelledSeries:
    """Read `*_TRAIN` or `*_TEST` (.tsv of the UCR archive, .ts of the UEA archive) in a folder.

    A .tsv row is a label and the values. A .ts row is one list of values a dimension, and the label, with colons
    between them. "?", "NaN" and an empty field are missing values. Labels are classes; they are numbers to predict
    behind "@targetLabel true" in a .ts, and in a .tsv that has numbers alone, not all of them whole.

    Raises:
        UserError: naming file and row: there is not one such file, or a row does not fit.
    """
    found = sorted(file for file in Path(root).glob(f"*_{split.upper()}.ts*") if file.suffix in (".ts", ".tsv"))
    if len(found) != 1:
        raise UserError(f"{root} holds {len(found)} files *_{split.upper()}.tsv or .ts; name a folder with one")
    path = found[0]
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    series, labels = [], []
    data, regression = path.suffix == ".tsv", False
    for row, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("@"):
            words = line.lower().split()
            data |= words == ["@data"]
            regression |= words == ["@targetlabel", "true"]
            continue
        if not data:
            raise UserError(f"{path}: row {row} comes before @data")
        if path.suffix == ".tsv":
            label, *fields = line.rstrip("\n").split("\t")
            dimensions = [fields]
        else:
            *parts, label = line.strip().split(":")
            dimensions = [part.split(",") for part in parts]
        if not dimensions or not label.strip() or "," in label:
            raise UserError(f"{path}: row {row} has no label beside its values")
        series.append([_floats(f"{path}: row {row}", fields) for fields in dimensions])
        labels.append(label.strip())
        if regression and _number(label) is None:
            raise UserError(f"{path}: row {row} is labelled {label.strip()!r}, which is no finite number to predict")
        if len(series[-1]) != len(series[0]):
            raise UserError(f"{path}: row {row} has {len(series[-1])} dimensions, the first has {len(series[0])}")
    if not series:
        raise UserError(f"{path}: no series in it")
    longest = max(len(channel) for sample in series for channel in sample)
    values = np.full((len(series), longest, len(series[0])), np.nan)
    for i, sample in enumerate(series):
        for c, channel in enumerate(sample):
            values[i, : len(channel), c] = channel
    return LabelledSeries(values, _labels(labels, regression=None if path.suffix == ".tsv" else regression))


def _floats(where: str, fields: Sequence[str]) -> np.ndarray:
    """One channel, trailing missing values left out."""
    try:
        read = [np.nan if field.strip() in ("", "?") else float(field) for field in fields]
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
    """ "1.0" and "1" are one class."""
    whole = text.removesuffix(".0")
    return str(int(whole)) if whole.lstrip("+-").isdecimal() else text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
