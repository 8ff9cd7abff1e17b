"""Where sequences of vectors lie: npy, a folder of npy files, safetensors or parquet, a split each.

Under the root, SPLIT being `train`, and `test`, `val` or `validation`:

  SPLIT.npy           values [S, N, P]; beside it, where there is one: SPLIT.lengths.npy [S], SPLIT.label.npy [S] or
                      [S, K], SPLIT.coords.npy [N, A] or [S, N, A]
  SPLIT/*.npy         a file [n, P] for each sequence, in the order of their names; NAME.coords.npy [n, A] beside
                      NAME.npy, and SPLIT.label.npy beside the folder
  SPLIT.safetensors   the keys values, lengths, label, coords, as above
  SPLIT.parquet       the columns values and coords (lists of lists) and label

npy and safetensors stay on the disk and are read a sequence at a time. Values of more than float32 holds (float64,
integers of 32 bits or more) are kept in float64, so that a small signal on a large offset is there until the adapter
has taken the mean off.

Shapes: S sequences, N tokens in the longest, n in one of them, P numbers in a token, A = 1 to 3 axes, K numbers.
"""

from __future__ import annotations

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
        values: number of a sequence -> [>= n, P].
        dtype: float32 or float64, in which values are given.
        lengths: [S] int64, the n of each. width: P.
        coords: number of a sequence -> [>= n, A], or None. shared: [N, A] that all sequences share, or None.
        axes: A, 0 without coordinates.
        labels: [S] int64, or [S] or [S, K] float32, or None.
    """

    path: Path
    name: Callable[[int], str]
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

    def _padded(self, read: Read, index: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> Tensor:
        name = self.stored.name(index)
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
    folder = Path(root)
    for name in SPLITS[split]:
        for suffix, opener in _OPENERS.items():
            path = folder / f"{name}{suffix}"
            if path.exists():
                stored = _opened(opener, path)
                _check(stored)
                return replace(stored, labels=_checked_labels(stored))
    wanted = ", ".join(f"{SPLITS[split][0]}{suffix or '/'}" for suffix in _OPENERS)
    raise UserError(f"data.root={root} has no {split} split: one of {wanted} is wanted there")


def _opened(opener: Callable[[Path], Stored], path: Path) -> Stored:
    try:
        return opener(path)
    except (OSError, ValueError, EOFError, KeyError, SafetensorError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def _npy(path: Path) -> Stored:
    values = _array(path)
    beside = {key: path.with_suffix(f".{key}.npy") for key in ("lengths", "coords", "label")}
    return _of_arrays(path, values, {key: _array(file) for key, file in beside.items() if file.exists()})


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
    files = sorted(file for file in path.glob("*.npy") if not file.name.endswith(".coords.npy"))
    if not files:
        raise UserError(f"{path} holds no npy file")
    arrays = [(array.shape, array.dtype) for array in map(_array, files)]
    shapes = [shape for shape, _ in arrays]
    for file, shape in zip(files, shapes, strict=True):
        if len(shape) != 2:
            raise UserError(f"{file} has shape {list(shape)}; make it [n, P], a row for each token")
        if shape[1] != shapes[0][1]:
            raise UserError(f"{file} has shape {list(shape)}; make it [n, {shapes[0][1]}], as {files[0].name}")
    beside = [file.with_suffix(".coords.npy") for file in files]
    given = [file.exists() for file in beside]
    if any(given) and not all(given):
        raise UserError(f"{beside[given.index(False)]} is missing, and other sequences have coordinates")
    axes = 0
    if all(given):
        kinds = [_array(file).shape for file in beside]
        axes = kinds[0][-1] if kinds[0] else 1
        for file, kind, shape in zip(beside, kinds, shapes, strict=True):
            if kind != (shape[0], axes):
                raise UserError(f"{file} has shape {list(kind)}; make it [{shape[0]}, {axes}]")
    labels = path.with_name(f"{path.name}.label.npy")
    return Stored(
        path,
        lambda index: str(files[index]),
        lambda index: _array(files[index]),
        _kept(*{dtype for _, dtype in arrays}),
        np.array([shape[0] for shape in shapes]),
        shapes[0][1],
        (lambda index: _array(beside[index])) if all(given) else None,
        None,
        axes,
        _array(labels) if labels.exists() else None,
    )


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
    """A memory map of an npy file; ValueError where it is damaged or holds no numbers."""
    array: Array = np.load(path, mmap_mode="r")
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
    return labels
