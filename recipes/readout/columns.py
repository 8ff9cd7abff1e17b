"""Tables that are written part by part, and joined into parquet, npy or safetensors without being held whole.

A part is a small parquet file. A column of R rows is numbers [R] or [R, K], or text.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Array = np.ndarray[Any, np.dtype[Any]]
SUFFIXES = (".parquet", ".npy", ".safetensors")
_PLAIN: dict[str, Any] = {"compression": "NONE", "use_dictionary": False}
_NOTE = b"nepa"
_SAFETENSORS = {"<f4": "F32", "<f8": "F64", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
                "|u1": "U8", "|b1": "BOOL"}  # fmt: skip


def table_of(columns: Mapping[str, Array | Sequence[str]]) -> pa.Table:
    """Columns of equally many rows."""
    return pa.table({name: _packed(values) for name, values in columns.items()})


def _packed(values: Array | Sequence[str]) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string())
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))


def _numbers(column: pa.ChunkedArray) -> Array:
    array = column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    flat: Array = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(array), array.type.list_size)


def write_part(file: Path, tables: Sequence[pa.Table], note: Any) -> None:
    """Write rows, and plain values beside them, whole or not at all."""
    table = pa.concat_tables(tables) if tables else pa.table({})
    draft = file.with_name(f".{file.name}")
    with draft.open("wb") as stream:
        pq.write_table(table.replace_schema_metadata({_NOTE: json.dumps(note)}), stream, **_PLAIN)
        stream.flush()
        os.fsync(stream.fileno())
    draft.rename(file)


@contextmanager
def _opened(part: Path) -> Iterator[pq.ParquetFile]:
    """A part; pyarrow itself would take a name with a colon for an address."""
    with part.open("rb") as stream:
        yield pq.ParquetFile(stream)


def is_part(file: Path) -> bool:
    """Whether a part is there and whole."""
    try:
        with _opened(file):
            return True
    except (OSError, pa.ArrowInvalid):
        return False


def note_of(part: Path) -> Any:
    """The plain values of a part."""
    return json.loads(_schema(part).metadata[_NOTE])


def rows_of(part: Path) -> int:
    with _opened(part) as table:
        return int(table.metadata.num_rows)


def column_of(part: Path, name: str) -> Array:
    """One column of numbers."""
    return _numbers(_table(part, [name]).column(0))


def _schema(part: Path) -> pa.Schema:
    with _opened(part) as table:
        return table.schema_arrow


def _table(part: Path, columns: list[str] | None = None) -> pa.Table:
    with _opened(part) as table:
        return table.read(columns)


def shapes(part: Path) -> dict[str, str]:
    """Name of each column -> "float32 [64]", the type of its numbers and how many a row has; "string"."""
    return {field.name: _shape(field.type) for field in _schema(part)}


def _shape(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{_shape(kind.value_type)} [{kind.list_size}]"
    return "string" if pa.types.is_string(kind) else str(np.dtype(kind.to_pandas_dtype()))


def file_of(table: str, column: str, *, text: bool, main: str | None) -> str:
    """The file that a column of a table lies in: of x.npy x.COLUMN.npy, and of text x.npy.COLUMN.txt, a row a line.

    safetensors has text beside it in the same way, and parquet all in one file.

    Args:
        main: the column whose npy file has the name of the table.
    """
    if (suffix := Path(table).suffix) == ".parquet" or column == main:
        return table
    if text:
        return f"{table}.{column}.txt"
    return f"{Path(table).stem}.{column}.npy" if suffix == ".npy" else table


def join(parts: Sequence[Path], name: str, folder: Path, main: str | None) -> list[Path]:
    """Write the rows of all parts, which have some, in their order, as the files of a table, see `file_of`.

    Args:
        name: of the table, with its suffix, which is the format.
        folder: where the files are written.
        main: as of `file_of`.

    Returns:
        The files.
    """
    schema = _schema(parts[0]).remove_metadata()
    if (suffix := Path(name).suffix) == ".parquet":
        _join_parquet(parts, folder / name, schema)
        return [folder / name]
    text = [field.name for field in schema if pa.types.is_string(field.type)]
    files = [folder / file_of(name, column, text=True, main=main) for column in text]
    for file, column in zip(files, text, strict=True):
        with file.open("w") as lines:
            for part in parts:
                lines.writelines(f"{each}\n" for each in _table(part, [column]).column(0).to_pylist())
    count = sum(map(rows_of, parts))
    first = _table(parts[0]).slice(0, 1)
    kinds = {column: _numbers(first[column]) for column in schema.names if column not in text}
    shape = {column: (count, *kind.shape[1:]) for column, kind in kinds.items()}
    if suffix == ".npy":
        for column, kind in kinds.items():
            file = folder / file_of(name, column, text=False, main=main)
            with file.open("wb") as stream:
                head = {"descr": kind.dtype.str, "fortran_order": False, "shape": shape[column]}
                np.lib.format.write_array_header_1_0(stream, head)
                _copy(parts, column, stream)
            files.append(file)
        return files
    names = sorted(kinds, key=lambda column: -kinds[column].itemsize)  # so that all lie on multiples of their size
    with (folder / name).open("wb") as stream:
        stream.write(_header({column: (kinds[column].dtype, shape[column]) for column in names}))
        for column in names:
            _copy(parts, column, stream)
    return [*files, folder / name]


def _join_parquet(parts: Sequence[Path], file: Path, schema: pa.Schema) -> None:
    with file.open("wb") as stream, pq.ParquetWriter(stream, schema, **_PLAIN) as writer:
        for part in parts:
            writer.write_table(_table(part).replace_schema_metadata(None))


def _header(columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bytes:
    """Of a safetensors file that holds these arrays one after the other."""

    def entries() -> Iterator[tuple[str, Any]]:
        end = 0
        for name, (dtype, shape) in columns.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            yield name, {"dtype": _SAFETENSORS[dtype.str], "shape": shape, "data_offsets": [start, end]}

    text = json.dumps(dict(entries())).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(parts: Sequence[Path], column: str, into: BinaryIO) -> None:
    for part in parts:
        into.write(np.ascontiguousarray(column_of(part, column)).data)
