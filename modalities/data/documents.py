"""Documents as they lie on the disk: folders of text files, tables with a column of text, FASTA, and one long text.

Under `data.root`:

  train/ and test/ (val/, validation/)   folders; in each, class folders of files, or files without labels
  train.SUFFIX and test.SUFFIX           two tables or FASTA files
  any other folder                       class folders of files, or files without labels: of each class a share is held
                                         out, those whose names have the lowest hashes
  FILE.csv .tsv .jsonl .parquet          a row is a document; a column "split" says what is held out, else a share
  FILE.fasta .fa .fna .faa               a record is a document, in capital letters; a share is held out
  any other file                         one document, of which the last share is held out

A text file in a folder is a document, a FASTA file there as many as it has records.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from modalities.data.csv_files import find_out, read_rows
from modalities.data.hub import one_line
from modalities.data.listing import Passed, data_folder, list_files, list_groups, printable, read_whole, say, subfolders
from modalities.data.remote import at_hand
from modalities.data.text_files import LARGEST_TEXT, check_file, decoded
from nepa_core.basics import UserError, number_of, some
from nepa_core.runtime.config import closest

TEXT, FASTA = (".txt", ".text", ".md"), (".fasta", ".fa", ".fna", ".faa", ".fas")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
"""What a split may be called; the first name found is taken."""
HELD_OUT = 0.1
"""The share of documents that is held out where nothing says which."""
COLUMNS = {
    "text": ("text", "sentence", "sequence", "content", "document"),
    "label": ("label", "class", "category"),
    "split": ("split", "set", "subset"),
}
"""What the columns of a table may be called, in any case."""
_PART_OF_A_FILE = "one document, cut in two"


Odd = dict[str, list[str]]
"""Files that are no whole UTF-8, by the words for how they are read."""


class Document(NamedTuple):
    """A text, what a message calls it, its class ("" for none), and "train", "test" or "" (not said)."""

    name: str
    text: str
    label: str = ""
    split: str = ""


@lru_cache(maxsize=4)
def read_documents(
    root: str, held_out: float = HELD_OUT, text: str | None = None, label: str | None = None
) -> dict[str, tuple[Document, ...]]:
    """The documents of both splits, as the head of this file says.

    Args:
        text, label: columns of a table; default: those called as `COLUMNS` has them.

    Raises:
        UserError: naming the file, and row or line: there is none, a column is missing, FASTA begins without a header,
            a table can't be read, a split is empty, or the splits differ in their classes.
    """
    place, odd = Path(at_hand(root)).expanduser(), Odd()
    if place.is_dir():
        found = _of_folder(root, place, text, label, odd)
    else:
        check_file(str(place), "give a folder of texts, a table or a FASTA file by data.root")
        found = _of_file(place, text, label, odd)
    _say_odd(odd)
    if not place.is_dir() and place.suffix.lower() not in (*TABLES, *FASTA):
        return _checked(root, _cut(found[0], held_out))
    return _checked(root, found if all(each.split for each in found) else _divided(root, found, held_out))


def read_files(paths: Sequence[str]) -> Iterator[Document | str]:
    """A document of each file by name (of FASTA the first record), or a line that says why there is none."""
    odd = Odd()
    for path in paths:
        try:
            yield next(iter(_of_file(Path(path), None, None, odd)))
        except (UserError, StopIteration) as error:
            yield str(error) or f"{printable(path)}: it holds no text"
    _say_odd(odd)


def _say_odd(odd: Odd) -> None:
    for how, paths in odd.items():
        more = f", the first of {len(paths):,} such files" if len(paths) > 1 else ""
        say(f"{printable(paths[0])}{more}: {how}")


def _of_folder(root: str, place: Path, text: str | None, label: str | None, odd: Odd) -> list[Document]:
    passed = Passed()
    pairs = {split: [each for name in names for each in _called(place, name)] for split, names in SPLITS.items()}
    if all(pairs.values()):
        folders = {split: found[0] for split, found in pairs.items()}
        found = [
            each._replace(split=split)
            for split, path in folders.items()
            for each in (_tree(path, passed, odd) if path.is_dir() else _of_file(path, text, label, odd))
        ]
    else:
        data_folder(str(place))
        found = _tree(place, passed, odd)
    if line := passed.line(root):
        say(line)
    if not found:
        raise UserError(f"data.root={root}: no file ({', '.join((*TEXT, *FASTA))}) in it, nor train and test tables")
    return found


def _called(place: Path, name: str) -> list[Path]:
    """A folder, a table or a FASTA file of this name."""
    found = [place / name, *(place / f"{name}{suffix}" for suffix in (*TABLES, *FASTA))]
    return [each for each in found if (each.is_file() if each.suffix else each.is_dir())]


def _tree(folder: Path, passed: Passed, odd: Odd) -> list[Document]:
    """Documents of class folders; without any, of the files right there, of no class."""
    beside = Passed()
    labels = subfolders(folder, beside)
    groups = list_groups(folder, [folder / label for label in labels], (*TEXT, *FASTA))
    pairs = [(path, label) for label, group in zip(labels, groups, strict=True) for path in group.paths]
    if len({label for _, label in pairs}) < 2:
        listed = list_files(folder, (*TEXT, *FASTA))
        passed.merge(listed.passed)
        pairs = [(path, "") for path in listed.paths]
    else:
        passed.merge(beside)
        for group in groups:
            passed.merge(group.passed)
    return [
        each._replace(label=label) for path, label in sorted(pairs) for each in _of_file(Path(path), None, None, odd)
    ]


# ------------------------------------------------------------------------------------------------- one file


def _of_file(path: Path, text: str | None, label: str | None, odd: Odd) -> list[Document]:
    suffix = path.suffix.lower()
    if suffix in FASTA:
        return list(_fasta(path, odd))
    if suffix in TABLES:
        return _table(path, text, label, odd)
    return [Document(str(path), _read(path, odd))]


def _read(path: Path, odd: Odd) -> str:
    try:
        text, how = decoded(read_whole(str(path), LARGEST_TEXT))
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(path))}: {one_line(error)}") from error
    if how is not None:
        odd.setdefault(how, []).append(str(path))
    return text


def _fasta(path: Path, odd: Odd) -> Iterator[Document]:
    name, parts = "", list[str]()
    for number, line in enumerate(_read(path, odd).splitlines(), 1):
        line = line.strip()
        if line.startswith(">"):
            if name:
                yield Document(name, "".join(parts).upper())
            name, parts = f"{path}, {line[1:].split(maxsplit=1)[0] if line[1:].strip() else f'line {number}'}", []
        elif line and not line.startswith(";"):
            if not name:
                raise UserError(
                    f"{printable(str(path))}, line {number}: no header above it; a FASTA record begins with >NAME"
                )
            parts.append(line)
    if name:
        yield Document(name, "".join(parts).upper())


def _table(path: Path, text: str | None, label: str | None, odd: Odd) -> list[Document]:
    try:
        names, rows = _rows(path, odd)
        places = {
            "text": _column(path, names, text, "text", needed=True),
            "label": _column(path, names, label, "label"),
            "split": _column(path, names, None, "split"),
        }
        known = {name: each for each, also in SPLITS.items() for name in also}
        found = []
        for row, cells in rows:
            where = f"{path}, row {row}"
            content, kind, split = (
                "" if place is None or place >= len(cells) else cells[place] or "" for place in places.values()
            )
            if split and split.strip().lower() not in known:
                raise UserError(f"{where}: the split {split!r} is none of {', '.join(known)}")
            found.append(Document(where, content, kind.strip(), known.get(split.strip().lower(), "")))
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    _check_filled(path, "label", [each.label for each in found])
    _check_filled(path, "split", [each.split for each in found])
    return found


def _rows(path: Path, odd: Odd) -> tuple[tuple[str, ...], Iterable[tuple[int, list[str]]]]:
    """Names of columns, and (row or line, cells) of every row."""
    if path.suffix.lower() == ".parquet":
        table = pq.read_table(path)
        names = tuple(table.column_names)
        columns = [["" if each is None else str(each) for each in column.to_pylist()] for column in table.columns]
        return names, ((row, list(cells)) for row, cells in enumerate(zip(*columns, strict=True), 1))
    if path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(_read(path, odd).splitlines(), 1) if line.strip()]
        objects = [(number, _object(path, number, line)) for number, line in lines]
        names = tuple(dict.fromkeys(name for _, each in objects for name in each))
        return names, ((number, [each.get(name, "") for name in names]) for number, each in objects)
    form = find_out(str(path))
    for note in form.notes:
        say(note)
    return form.names, read_rows(form)


def _object(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: no JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}, line {number}: no JSON object with a field for the text")
    return {str(name): "" if each is None else str(each) for name, each in found.items()}


def _column(path: Path, names: Sequence[str], wanted: str | None, key: str, *, needed: bool = False) -> int | None:
    """The place of a column; None where nobody named it and it is not there."""
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{path}: no column {wanted!r} (data.{key}){closest(wanted, names)}; it has {some(names)}")
        return names.index(wanted)
    lower = [name.lower() for name in names]
    place = next((lower.index(name) for name in COLUMNS[key] if name in lower), None)
    if place is None and needed:
        raise UserError(
            f"{path}: no column is called {', '.join(COLUMNS[key])}; name that of the documents by data.{key}; it has "
            f"{some(names)}"
        )
    return place


def _check_filled(path: Path, key: str, cells: Sequence[str]) -> None:
    empty = [place for place, cell in enumerate(cells) if not cell]
    if 0 < len(empty) < len(cells):
        raise UserError(
            f"{path}: {number_of(len(empty), 'row has', 'rows have')} no {key}, and others have; give "
            "every row one, or none"
        )


# --------------------------------------------------------------------------------------------------- splits


def _divided(root: str, documents: Sequence[Document], held_out: float) -> list[Document]:
    """Of every class those whose names and texts have the lowest hashes are held out; a class of one is left out."""
    counts = Counter(each.label for each in documents)
    single = sorted(label for label, count in counts.items() if count == 1)
    if len(documents) < 2 or len(single) == len(counts):
        raise UserError(f"data.root={root}: one document (of each class); two are wanted, for one of them is held out")
    if single:
        say(f"{root}: left out, for one document can't be in both splits: {some(list(map(printable, single)))}")
    base = os.path.expanduser(at_hand(root))

    def key(each: Document) -> bytes:
        return hashlib.sha256(f"{each.name.removeprefix(base)}\0{each.text}".encode("utf-8", "replace")).digest()

    taken: Counter[str] = Counter()
    held = {label: min(max(round(held_out * count), 1), count - 1) for label, count in counts.items()}
    found = dict.fromkeys(range(len(documents)), "train")
    for place in sorted(range(len(documents)), key=lambda place: key(documents[place])):
        label = documents[place].label
        if taken[label] < held[label]:
            found[place] = "test"
            taken[label] += 1
    return [each._replace(split=found[place]) for place, each in enumerate(documents) if counts[each.label] > 1]


def _cut(whole: Document, held_out: float) -> list[Document]:
    """One long text: its end is held out, from the beginning of a line on."""
    place = round((1 - held_out) * len(whole.text))
    place = whole.text.find("\n", place) + 1 or place
    return [
        whole._replace(text=whole.text[:place], split="train"),
        whole._replace(text=whole.text[place:], split="test"),
    ]


def _checked(root: str, documents: Sequence[Document]) -> dict[str, tuple[Document, ...]]:
    found = {split: tuple(each for each in documents if each.split == split) for split in SPLITS}
    for split, mine in found.items():
        if not any(each.text for each in mine):
            raise UserError(
                f"data.root={root}: no text in the {'training' if split == 'train' else 'held-out'} split: its files, "
                f"rows or records are empty; fill them in, or give other data"
            )
    train, test = ({each.label for each in found[split]} for split in ("train", "test"))
    if alone := sorted(test - train):
        named = ", ".join(map(printable, alone[:6])) if alone != [""] else "none: give both splits labels, or none"
        raise UserError(f"data.root={root}: no training document has the classes of held-out ones: {named}")
    return found
