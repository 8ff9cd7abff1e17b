"""Where sequences of vectors lie: npy, a folder of npy files, safetensors or parquet, a split each.

Under the root, SPLIT being `train`, and `test`, `val` or `validation`:

  SPLIT.npy           values [S, N, P]; beside it, where there is one: SPLIT.lengths.npy [S], SPLIT.label.npy [S] or
                      [S, K], SPLIT.coords.npy [N, A] or [S, N, A]
  SPLIT/*.npy         a file [n, P] for each sequence, in the order of their names and of the numbers in these (2.npy
                      before 10.npy); NAME.coords.npy [n, A] beside NAME.npy, and SPLIT.label.npy beside the folder
  SPLIT.safetensors   the keys values, lengths, label, coords, as above
  SPLIT.parquet       the columns values and coords (lists of lists) and label

The first that is there is read, and what else is said. npy and safetensors stay on the disk and are read a sequence
at a time, without a map that would keep their pages in memory. Values of more than float32 holds (float64,
integers of 32 bits or more) are kept in float64, so that a small signal on a large offset is there until the adapter
has taken the mean off.

Shapes: S sequences, N tokens in the longest, n in one of them, P numbers in a token, A = 1 to 3 axes, K numbers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.listing import (
    HIDDEN,
    ODD,
    Contents,
    Passed,
    content_sample,
    fingerprint,
    is_hidden,
    natural_key,
    printable,
    say,
)
from nepa_core.basics import Batch, UnreadableSample, UserError

SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
"""What a split may be called; the first name found is taken."""

_LARGEST = float(np.finfo(np.float32).max)

Array = np.ndarray[Any, Any]
Read = Callable[[int], Array]


@dataclass(frozen=True, eq=False)
class Stored:
    """One split.

    Attributes:
        path: the file or folder. name: number of a sequence -> how errors call it.
        files: names of the files, in order.
        values: number of a sequence -> [>= n, P].
        dtype: float32 or float64, in which values are given.
        lengths: [S] int64, the n of each. width: P.
        coords: number of a sequence -> [>= n, A], or None. shared: [N, A] that all sequences share, or None.
        axes: A, 0 without coordinates.
        labels: [S] int64, or [S] or [S, K] float32, or None.
    """

    path: Path
    name: Callable[[int], str]
    files: tuple[str, ...]
    values: Read
    dtype: np.dtype[Any]
    lengths: Array
    width: int
    coords: Read | None
    shared: Array | None
    axes: int
    labels: Array | None

    @property
    def longest(self) -> int:
        return int(self.lengths.max())


class Sequences(Dataset[Batch]):
    """Sequences padded with zeros to `tokens`: "values" [N, P] and "length", "coords" and "label" if any.

    Values are float32, or float64 where they are stored with more digits (`Stored.dtype`).
    """

    def __init__(self, stored: Stored, tokens: int) -> None:
        self.stored, self.tokens = stored, tokens

    def __len__(self) -> int:
        return len(self.stored.lengths)

    def __getitem__(self, index: int) -> Batch:
        """Raises UnreadableSample where values or coordinates are NaN, infinite, or not of the shape of the others."""
        stored, length = self.stored, int(self.stored.lengths[index])
        sample: Batch = {
            "values": self._padded(stored.values, index, (length, stored.width), stored.dtype),
            "length": torch.tensor(length),
        }
        if stored.coords is not None:
            sample["coords"] = self._padded(stored.coords, index, (length, stored.axes), np.dtype(np.float32))
        if stored.labels is not None:
            sample["label"] = torch.from_numpy(np.array(stored.labels[index]))
        return sample

    def name(self, index: int) -> str:
        """What a message calls that sequence: its file, and its row where that holds several."""
        return printable(self.stored.name(index))

    def contents(self) -> Contents:
        """The values of every sequence as they are stored."""
        stored = self.stored

        def read(index: int) -> bytes:
            return bytes(np.ascontiguousarray(stored.values(index)[: stored.lengths[index]]).tobytes())

        return Contents(stored.lengths * stored.width * stored.dtype.itemsize, read, self.name)

    def fingerprint(self) -> str:
        """Changes where other sequences are stored, or one of another length or label; of arrays in one file also where
        the beginning, the middle or the end of it holds other values (`content_sample`)."""
        stored = self.stored
        known = fingerprint(stored.files, stored.lengths * stored.width, stored.labels)
        return known if stored.path.is_dir() else f"{known}; {content_sample(stored.path)}"

    def _padded(self, read: Read, index: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> Tensor:
        name = self.name(index)
        try:
            with np.errstate(over="ignore"):  # becomes an infinity, which is refused below
                rows = np.asarray(read(index)[: shape[0]], dtype)
        except (OSError, ValueError) as error:
            raise UnreadableSample(f"{name}: {error}") from error
        if rows.shape != shape:
            raise UnreadableSample(f"{name}: an array of shape {list(rows.shape)} where {list(shape)} is wanted")
        if not (np.abs(rows) <= _LARGEST).all():
            raise UnreadableSample(f"{name}: NaN or infinity in token {_first_bad(rows)}")
        return torch.from_numpy(np.pad(rows, ((0, self.tokens - shape[0]), (0, 0))))


def _first_bad(rows: Array) -> int:
    return int(np.flatnonzero(~(np.abs(rows) <= _LARGEST).all(1))[0])


def _kept(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """float64 where any of them holds more than float32 does, else float32."""
    wide = any(dtype.itemsize > (4 if dtype.kind == "f" else 2) for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


@lru_cache(maxsize=4)
def open_split(root: str, split: str) -> Stored:
    """A split of the layout at the head of this file.

    Raises:
        UserError: it is not there, is damaged, or its parts do not fit together; the file and the row are named.
    """
    folder = Path(root).expanduser()
    found = [
        (path, opener)
        for name in SPLITS[split]
        for suffix, opener in _OPENERS.items()
        if (path := folder / f"{name}{suffix}").exists()
    ]
    if not found:
        wanted = ", ".join(f"{SPLITS[split][0]}{suffix or '/'}" for suffix in _OPENERS)
        raise UserError(f"data.root={root} has no {split} split: one of {wanted} is wanted there")
    path, opener = found[0]
    if others := [other.name for other, _ in found[1:]]:
        say(f"{root}: {path.name} is read, and {', '.join(others)} left aside")
    stored = _opened(opener, path)
    _check(stored)
    return replace(stored, labels=_checked_labels(stored))


def _opened(opener: Callable[[Path], Stored], path: Path) -> Stored:
    if path.suffix and not path.is_file():  # a pipe might never end
        raise UserError(f"{path} can't be read: it is no regular file")
    try:
        return opener(path)
    except (OSError, ValueError, EOFError, KeyError, SafetensorError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _npy(path: Path) -> Stored:
    values = _array(path)
    beside = {key: path.with_suffix(f".{key}.npy") for key in ("lengths", "coords", "label")}
    rest = {key: _beside(file) for key, file in beside.items() if file.exists()}
    return _of_arrays(path, values, rest, _row_of(path, values))


def _row_of(path: Path, array: Array) -> Read | None:
    """A reader of rows of a memory map that leaves none of its pages in memory; None where rows lie scattered."""
    if not (isinstance(array, np.memmap) and array.flags.c_contiguous and array.ndim > 1):
        return None
    dtype, shape, offset = array.dtype, array.shape[1:], int(array.offset)
    count = int(np.prod(shape))

    def read(index: int) -> Array:
        row: Array = np.fromfile(path, dtype, count, offset=offset + index * count * dtype.itemsize)
        return row.reshape(shape)

    return read


def _beside(file: Path) -> Array:
    """What is stored beside the values: small, so all of it.

    Raises:
        UserError: it can't be read.
    """
    try:
        return np.array(_array(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {_one_line(error)}") from error


def _safetensors(path: Path) -> Stored:
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        if "values" not in names:
            raise UserError(f"{path} has no tensor 'values', only {', '.join(sorted(names))}")
        whole = file.get_slice("values")
        shape, wide = tuple(whole.get_shape()), whole.get_dtype() in ("F64", "I64", "I32", "U64", "U32")
        rest = {key: _as_array(file.get_tensor(key)) for key in names & {"lengths", "coords", "label"}}

    def read(index: int) -> Array:
        with safe_open(path, "pt") as file:
            row = file.get_slice("values")[index]
        found: Array = (row.double() if wide else row.float()).numpy()
        return found

    zero = np.zeros((), np.float64 if wide else np.float32)
    return _of_arrays(path, np.broadcast_to(zero, shape), rest, read)


def _as_array(tensor: Tensor) -> Array:
    """With what NumPy lacks, as bfloat16, in float32."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _of_arrays(path: Path, values: Array, rest: dict[str, Array], read: Read | None = None) -> Stored:
    """Of whole arrays: values [S, N, P] (its shape alone, where `read` gives a sequence)."""
    if values.ndim != 3:
        raise UserError(f"{path}: values have shape {list(values.shape)}; make them [S, N, P]")
    lengths, coords = rest.get("lengths"), rest.get("coords")
    lengths = np.full(len(values), values.shape[1]) if lengths is None else lengths
    if lengths.shape != (len(values),) or lengths.dtype.kind not in "iu":
        kind = f"{lengths.dtype} {list(lengths.shape)}"
        raise UserError(f"{path}: lengths are {kind}; make them integers [{len(values)}]")
    if (over := np.flatnonzero(lengths > values.shape[1])).size:
        row = int(over[0])
        raise UserError(f"{path}: row {row} has length {lengths[row]}, and the array holds {values.shape[1]} tokens")
    if coords is not None and coords.shape[:-1] not in (values.shape[:1] + values.shape[1:2], values.shape[1:2]):
        raise UserError(
            f"{path}: coords have shape {list(coords.shape)} for values of {list(values.shape)}; make them [N, A] or "
            "[S, N, A]"
        )
    shared = coords if coords is not None and coords.ndim == 2 else None
    return Stored(
        path,
        lambda index: f"{path}, row {index}",
        (path.name,),
        read or values.__getitem__,
        _kept(values.dtype),
        lengths.astype(np.int64),
        values.shape[2],
        None if coords is None or shared is not None else coords.__getitem__,
        shared,
        0 if coords is None else coords.shape[-1],
        rest.get("label"),
    )


def _folder(path: Path) -> Stored:
    """A folder of files; one that can't be read is a sequence that can't, so that labels stay with their files."""
    labels = path.with_name(f"{path.name}.label.npy")
    files = _listed(path, labels=labels.exists())
    if not files:
        raise UserError(f"{path} holds no npy file")
    broken: dict[int, str] = {}
    arrays = [_header(file, place, broken) for place, file in enumerate(files)]
    whole = [(file, array) for file, array in zip(files, arrays, strict=True) if array is not None]
    if not whole:
        raise UserError(f"{files[0]} can't be read: {broken[0]}; nor can any other file beside it")
    width = whole[0][1].shape[-1] if whole[0][1].ndim else 0
    for file, array in whole:
        if array.ndim != 2:
            raise UserError(f"{file} has shape {list(array.shape)}; make it [n, P], a row for each token")
        if array.shape[1] != width:
            raise UserError(f"{file} has shape {list(array.shape)}; make it [n, {width}], as {whole[0][0].name}")
    usual = max(len(array) for _, array in whole)
    lengths = np.array([usual if array is None else len(array) for array in arrays])
    coords, axes = _coords_beside(files, lengths, broken)

    def read(index: int) -> Array:
        if index in broken:
            raise ValueError(f"it can't be read: {broken[index]}")
        return _array(files[index])

    return Stored(
        path,
        lambda index: str(files[index]),
        tuple(file.name for file in files),
        read,
        _kept(*{array.dtype for _, array in whole}),
        lengths,
        width,
        coords,
        None,
        axes,
        _beside(labels) if labels.exists() else None,
    )


def _listed(path: Path, *, labels: bool) -> list[Path]:
    """The npy files of a folder with sequences in them, numbers in their names in order of size."""
    passed, names = Passed(), []
    for entry in os.scandir(path):
        if is_hidden(entry.name):
            passed.add(HIDDEN, entry.name)
        elif entry.is_dir():
            passed.add("folders", entry.name)
        elif not entry.name.lower().endswith(".npy"):
            passed.add(f"with the suffix {printable(os.path.splitext(entry.name)[1][:16])}", entry.name)
        elif not entry.is_file():
            passed.add(ODD, entry.name)
        elif not entry.name.lower().endswith(".coords.npy"):
            names.append(entry.name)
    if line := passed.line(str(path)):
        say(line)
    ordered = sorted(names, key=natural_key)
    if labels and (place := next((i for i, name in enumerate(sorted(names)) if name != ordered[i]), None)) is not None:
        before = printable(ordered[place])
        say(f"{path}: files have their labels in the order of the numbers in their names: {before} is number {place}")
    return [path / name for name in ordered]


def _header(file: Path, place: int, broken: dict[int, str]) -> Array | None:
    """A memory map of a file; None where it is damaged, and why, in `broken` under its place."""
    try:
        return _array(file)
    except (OSError, ValueError) as error:
        broken[place] = _one_line(error)
        return None


def _coords_beside(files: list[Path], lengths: Array, broken: dict[int, str]) -> tuple[Read | None, int]:
    """A reader of the coordinates beside the files, if any, and their axes; damaged ones are added to `broken`."""
    beside = [file.with_suffix(".coords.npy") for file in files]
    given = [file.exists() for file in beside]
    if not any(given):
        return None, 0
    if not all(given):
        raise UserError(f"{beside[given.index(False)]} is missing, and other sequences have coordinates")
    axes = None
    for place, (file, length) in enumerate(zip(beside, lengths, strict=True)):
        lost = place in broken
        array = _header(file, place, broken)
        if array is None:
            broken[place] = f"{file.name}: {broken[place]}"
            continue
        axes = (array.shape[-1] if array.ndim else 1) if axes is None else axes
        if not lost and array.shape != (length, axes):
            raise UserError(f"{file} has shape {list(array.shape)}; make it [{length}, {axes}]")
    return lambda index: _array(beside[index]), axes or 0


def _parquet(path: Path) -> Stored:
    table = pq.read_table(path, memory_map=True)
    if "values" not in table.column_names:
        raise UserError(f"{path} has no column 'values', only {', '.join(table.column_names)}")

    if table["values"].null_count:
        raise UserError(f"{path}: row {table['values'].to_pylist().index(None)} has no values")
    rows = _rows(path, table["values"], "values")
    lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False).astype(np.int64)
    width = _usual_width(rows)
    axes, coords = 0, None
    if "coords" in table.column_names:
        places = _rows(path, table["coords"], "coords")
        axes = _usual_width(places)
        coords = _row_reader(places, "coords", axes)
    return Stored(
        path,
        lambda index: f"{path}, row {index}",
        (path.name,),
        _row_reader(rows, "values", width),
        _kept(np.dtype(rows.type.value_type.value_type.to_pandas_dtype())),
        lengths,
        width,
        coords,
        None,
        axes,
        _label_column(path, table["label"].to_pylist()) if "label" in table.column_names else None,
    )


def _label_column(path: Path, labels: list[Any]) -> Array:
    """[S] or, of lists, [S, K].

    Raises:
        UserError: a row has none, or more or fewer than the first.
    """
    counts = [len(label) if isinstance(label, list) else 1 for label in labels]
    for row, (label, count) in enumerate(zip(labels, counts, strict=True)):
        if label is None:
            raise UserError(f"{path}: row {row} has no label; give it one, or leave the column out")
        if count != counts[0]:
            raise UserError(f"{path}: row {row} has a label of {count} numbers, and row 0 one of {counts[0]}")
    return np.array(labels)


def _rows(path: Path, column: pa.ChunkedArray, name: str) -> pa.Array:
    """A column of lists of lists of numbers, one for each sequence.

    Raises:
        UserError: it holds something else.
    """
    kind = column.type
    if not (_is_list(kind) and _is_list(kind.value_type) and _is_number(kind.value_type.value_type)):
        raise UserError(
            f"{path}: the column {name!r} holds {kind}; make every row a list of tokens, and each of these a list of "
            "numbers"
        )
    return column.combine_chunks()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _usual_width(rows: pa.Array) -> int:
    """Numbers in most tokens; 0 where there is no token."""
    widths = pc.list_value_length(rows.flatten()).drop_null().to_numpy(zero_copy_only=False)
    return int(np.bincount(widths).argmax()) if len(widths) else 0


def _row_reader(rows: pa.Array, name: str, width: int) -> Read:
    def read(index: int) -> Array:
        """[n, width]; ValueError where a token holds more numbers, or fewer, or is missing."""
        tokens = rows[index].values
        if tokens is None:
            raise ValueError(f"it has no {name}")
        widths = pc.list_value_length(tokens).fill_null(0).to_numpy(zero_copy_only=False)
        if (other := np.flatnonzero(widths != width)).size:
            token = int(other[0])
            raise ValueError(f"token {token} of {name} has length {widths[token]}, and most have {width}")
        numbers: Array = tokens.flatten().to_numpy(zero_copy_only=False)
        return numbers.reshape(len(tokens), width)

    return read


_OPENERS: dict[str, Callable[[Path], Stored]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    "": _folder,
}


def _array(path: Path) -> Array:
    """A memory map of an npy file.

    Raises:
        OSError, ValueError: it is damaged, no regular file, or holds no numbers.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")  # a pipe might never end
    try:
        array = np.load(path, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged head fails as whatever Python text it looks like
        if "pickle" in str(error) or "Python objects" in str(error):  # never say how these could be loaded
            raise ValueError("it is damaged or no npy file of numbers; Python objects are never read") from error
        raise ValueError(f"it is damaged or no npy file ({_one_line(error)})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of arrays, as npz files are; store one array in each file")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"it holds {array.dtype}, and numbers are wanted")
    return array


def _check(stored: Stored) -> None:
    """What all layouts must hold.

    Raises:
        UserError: they do not.
    """
    path, count = stored.path, len(stored.lengths)
    if not count:
        raise UserError(f"{path} holds no sequence")
    if not stored.width:
        raise UserError(f"{path}: tokens hold no numbers; make P, the last axis of the values, 1 or more")
    if stored.lengths.min() < 2:
        row = int(stored.lengths.argmin())
        raise UserError(
            f"{stored.name(row)} has {stored.lengths[row]} tokens, and a prediction needs 2; leave such sequences out"
        )
    if (stored.coords is not None or stored.shared is not None) and not 1 <= stored.axes <= 3:
        raise UserError(f"{path}: coordinates have {stored.axes} axes; 1 to 3 are supported")
    if stored.shared is not None and not np.isfinite(stored.shared).all():
        raise UserError(f"{path}: the shared coordinates of token {_first_bad(stored.shared)} are NaN or infinite")


def _checked_labels(stored: Stored) -> Array | None:
    """The labels in int64 or float32.

    Raises:
        UserError: they are no numbers, not one row for each sequence, not finite, or a class is negative.
    """
    path, count, labels = stored.path, len(stored.lengths), stored.labels
    if labels is None:
        return None
    if labels.ndim not in (1, 2) or len(labels) != count or labels.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: label holds {labels.dtype} of shape {list(labels.shape)} for {count} sequences; make it numbers "
            f"[{count}] or [{count}, K]"
        )
    if labels.dtype.kind != "f":
        if labels.size and labels.max() > np.iinfo(np.int64).max:
            raise UserError(f"{path}: a label of {labels.max()} is beyond what classes can be; number them from 0 on")
        labels = labels.astype(np.int64)
        if (below := np.flatnonzero(labels.reshape(count, -1).min(1, initial=0) < 0)).size:
            row = int(below[0])
            raise UserError(
                f"{stored.name(row)} has the class {labels[row]}; number classes from 0 on, make labels to predict as "
                "numbers float, and leave sequences of no class out"
            )
        return labels
    with np.errstate(over="ignore"):
        labels = labels.astype(np.float32)
    if not np.isfinite(labels).all():
        row = int(np.flatnonzero(~np.isfinite(labels.reshape(count, -1)).all(1))[0])
        raise UserError(f"{stored.name(row)} has a label that is NaN or infinite")
    if labels.ndim == 1 and bool((labels == np.floor(labels)).all()) and len(np.unique(labels)) * 2 < count:
        say(
            f"{path}: labels are floating-point and so numbers to predict, though all of them are whole; store them as "
            "integers where they are classes"
        )
    return labels
