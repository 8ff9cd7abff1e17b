"""Columns of encoded images and of labels in Arrow tables, brought to one type whatever a shard stored them in.

Shards of one data set often differ where it does not matter: int32 beside int64, a path that is null throughout, the
order of the fields, large or dictionary-encoded strings. The columns are unified here; what can't be is one line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modalities.data.hub import one_line
from modalities.data.listing import Integers, anew, is_hidden, read_whole
from nepa_core.basics import UserError

ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An encoded image, or the file that holds it: the layout of Hugging Face."""
CHUNK = 2**31 - 1  # bytes that the offsets of one chunk of pa.binary() can count


def parquet_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """`<name>-*.parquet` of the first name that any has, in the folder or in its data/."""
    places = [(place, name) for name in names for place in (folder, folder / "data")]
    found = (sorted(place.glob(f"{name}-*.parquet")) for place, name in places)
    kept = ([file for file in files if file.is_file() and not is_hidden(file.name)] for files in found)
    return next((files for files in kept if files), [])


def parquet_schema(file: Path) -> tuple[pa.Schema, int]:
    """Schema and number of rows of a parquet file.

    Raises:
        UserError: it can't be read.
    """
    try:
        head = pq.read_metadata(file)
        return head.schema.to_arrow_schema(), head.num_rows
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from error


def read_columns(file: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a parquet file.

    Raises:
        UserError: it can't be read.
    """
    try:
        with pq.ParquetFile(file) as stored:
            return stored.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: BaseException) -> UserError:
    """The refusal of a parquet file that can't be read."""
    return UserError(f"{file}: not a readable parquet file ({one_line(error)}); {anew(file)}")


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type holds encoded images."""
    return bool(pa.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def holds_numbers(kind: pa.DataType) -> bool:
    """Whether a column of this type holds integers."""
    return bool(pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind))


def images_of(column: pa.ChunkedArray, title: str) -> pa.ChunkedArray:
    """A column of encoded images as ENCODED; one that is that already is not copied.

    Raises:
        UserError: its bytes are no bytes, or its paths no strings.
    """
    if column.type == ENCODED:
        return column
    try:
        chunks = [part for chunk in column.chunks for part in _encoded(chunk)]
    except pa.ArrowException as error:
        raise UserError(f"{title}: the images are stored as {column.type}, not as bytes ({one_line(error)})") from error
    return pa.chunked_array(chunks, ENCODED)


def _encoded(chunk: pa.StructArray) -> list[pa.StructArray]:
    if chunk.nbytes > CHUNK and len(chunk) > 1:
        half = len(chunk) // 2
        return [part for each in (chunk[:half], chunk[half:]) for part in _encoded(each)]
    fields = [
        chunk.field(place) if (place := chunk.type.get_field_index(field.name)) >= 0 else pa.nulls(len(chunk))
        for field in ENCODED
    ]
    cast = [values.cast(field.type) for values, field in zip(fields, ENCODED, strict=True)]
    return [pa.StructArray.from_arrays(cast, fields=list(ENCODED), mask=chunk.is_null())]


def labels_of(column: pa.ChunkedArray, title: str) -> pa.ChunkedArray:
    """A column of integers as int64.

    Raises:
        UserError: a number is too large.
    """
    try:
        return column.cast(pa.int64())
    except pa.ArrowException as error:
        raise UserError(f"{title}: a label is no class number ({one_line(error)}); repair the labels") from error


def image_bytes(stored: dict[str, Any] | None) -> bytes:
    """The encoded image that a row of ENCODED holds or names; raises ValueError or OSError where there is none."""
    if stored is not None and stored["bytes"] is not None:
        return bytes(stored["bytes"])
    if stored is None or stored["path"] is None:
        raise ValueError("the row holds no image bytes")
    return read_whole(stored["path"])


def stored_sizes(column: pa.ChunkedArray) -> Integers:
    """Bytes of each image of an ENCODED column, [n] int64; -1 where the row holds none."""
    parts = [pc.binary_length(pc.struct_field(chunk, "bytes")).fill_null(-1).to_numpy() for chunk in column.chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def stored_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library wrote into the schema of a file for this column, if any."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
