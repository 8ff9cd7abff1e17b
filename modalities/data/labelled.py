"""Files with labels: class folders in train/ and a held-out folder, or a CSV file that names them.

A sample is a file, or what a kind of data makes of several, such as a folder of frames.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from modalities.data.listing import (
    Passed,
    data_folder,
    file_sizes,
    list_files,
    list_groups,
    natural_key,
    printable,
    say,
    say_left_aside,
    subfolders,
)
from modalities.data.text_files import read_lines
from nepa_core.basics import UserError, number_of, some

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
"""What a split may be called where it is stored; the first name found is taken."""

NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
"""Labels of a CSV file that all look like this are numbers to predict."""

COLUMNS = {
    "path": ("path", "file", "filename", "file_name"),
    "split": ("split", "set", "subset"),
    "label": ("label", "class", "category"),
    "labels": ("labels", "classes", "categories"),
    "fold": ("fold",),
}
"""What the columns of a manifest may be called, in any case."""

BETWEEN = ";"
"""Stands between the classes of a sample in a column of several."""

FOLD = re.compile(r"(fold|split|part)[ _-]?(?P<number>\d+)", re.IGNORECASE)
"""Folders of this name divide a data set for cross-validation; they are no classes."""

Reading = Literal["class", "classes", "numbers"]
"""What labels are: one class a sample, any number of them, or a number to predict."""

Row = tuple[str, str, str]
"""Path, label ("" for none; of several classes all, with `BETWEEN` between them), and "train" or "test"."""


class Kind(NamedTuple):
    """What samples are called, as in "2 clips", and what their files are, as in "no audio file (.wav) in ..."."""

    noun: str
    file: str
    suffixes: tuple[str, ...]

    @property
    def sought(self) -> str:
        """The files with their suffixes, in words."""
        return f"{self.file} ({', '.join(self.suffixes)})"


class LabelledSource(Hashable, Protocol):
    """What labelled samples come from; a kind of data adds how one is read."""

    @property
    def labels(self) -> Tensor | None:
        """[n] int64, bool [n, C] where each has any number of C classes, or float32 for numbers to predict; None where
        there are none."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Place k names label k, or column k; None where labels are no classes."""

    def __len__(self) -> int:
        """How many samples there are."""

    def name(self, row: int) -> str:
        """What a message calls that row."""


class Labelled(NamedTuple):
    """Samples of a split.

    Attributes:
        paths: of each.
        labels: [n] int64, bool [n, C], or float32 for numbers to predict; None where there are none.
        classes: place k names label k, or column k; None where labels are no classes.
    """

    paths: list[str]
    labels: Tensor | None
    classes: tuple[str, ...] | None


def read_layout(
    root: str,
    kind: Kind,
    items: Callable[[list[str]], list[str]] = lambda paths: paths,
    *,
    fold: str | None = None,
) -> tuple[list[Row], Reading]:
    """The rows of both splits, and what their labels are, of a folder or of a CSV file.

    Args:
        items: the samples that files make, all of one folder and below.
        fold: of `folds_of`, to hold out; None holds out the first where nothing else divides the samples.

    Raises:
        UserError: there is no such folder or file, it is in none of the layouts, or has no such fold.
    """
    place = Path(root).expanduser()
    if place.is_file():
        return read_manifest(place, kind, fold)
    data_folder(root, f"{kind.noun}s, or a CSV file that names them")
    passed = Passed()
    if folds := fold_folders(place):
        held = held_fold(root, list(folds), fold)
        rows = [
            (path, label, "test" if name == held else "train")
            for name, folder in folds.items()
            for path, label in tree(folder, kind, passed, items)
        ]
        say_passed(root, passed)
        return rows, "class"
    refuse_fold(root, fold)
    folders = {each: [place / name for name in names if (place / name).is_dir()] for each, names in SPLITS.items()}
    if not all(folders.values()):
        raise UserError(
            f"data.root={root}: looked for train/<class>/* or train/* with the same in val/ (or validation/, test/), "
            f"each with {kind.sought}, but found none complete; a CSV file of path,label,split is given as "
            "data.root=FILE.csv"
        )
    rows = [
        (path, label, each) for each, found in folders.items() for path, label in tree(found[0], kind, passed, items)
    ]
    say_passed(root, passed, [folder.name for folder in folders["test"]])
    return rows, "class"


def folds_of(root: str, kind: Kind) -> tuple[str, ...]:
    """Names of the folds of a folder or of a CSV file in their order; () where it is divided into none.

    Those are the numbers of folders called `fold1`, `fold2` and so on (see `FOLD`; whole names where two have one
    number), or what stands in a column called fold.

    Raises:
        UserError: the CSV file can't be read.
    """
    place = Path(root).expanduser()
    if not place.is_file():
        return tuple(fold_folders(place))
    places, rows = _read_table(place, kind)
    return _folds_in(place, places, rows)


def fold_folders(folder: Path) -> dict[str, Path]:
    """Fold -> its folder, where the folders in this one are all called so; in an only folder they are looked for."""
    names = subfolders(folder)
    while len(names) == 1 and not FOLD.fullmatch(names[0]):
        folder /= names[0]
        names = subfolders(folder)
    if len(names) < 2 or not all(map(FOLD.fullmatch, names)):
        return {}
    return {fold: folder / name for fold, name in named_folds(names).items()}


def named_folds(folders: Sequence[str]) -> dict[str, str]:
    """Fold -> name of its folder, in their order; a fold is called by its number where no two have the same."""
    ordered = sorted(folders, key=natural_key)
    numbers = [str(int(found["number"])) for name in ordered if (found := FOLD.fullmatch(name))]
    return dict(zip(numbers if len(set(numbers)) == len(ordered) else ordered, ordered, strict=True))


def held_fold(where: str, folds: Sequence[str], fold: str | None) -> str:
    """The fold that is held out: that one, or of None the first, which is said.

    Raises:
        UserError: there is no such fold, or only one in all.
    """
    if len(folds) < 2:
        raise UserError(f"{where}: holds one fold, {some(list(map(printable, folds)))}; one of two or more is held out")
    if fold is None:
        say(f"{where}: fold {printable(folds[0])} of {len(folds)} is held out; data.fold= names another one")
        return folds[0]
    if fold not in folds:
        raise UserError(f"data.fold={fold}: the folds of {where} are {some(list(map(printable, folds)))}")
    return fold


def refuse_fold(where: str, fold: str | None) -> None:
    """Raise a `UserError` where a fold is named of what has none."""
    if fold is not None:
        raise UserError(
            f"data.fold={fold}: {where} has no folds; a CSV file names them in a column fold, and folders are called "
            "fold1, fold2, ..."
        )


def of_split(root: str, rows: Sequence[Row], split: str, kind: Kind, reading: Reading = "class") -> Labelled:
    """A split of (path, label or "", "train" or "test"); classes are numbered in the order of their names.

    Raises:
        UserError: a split is empty, or the two have other classes.
    """
    names = {each: sorted({label for _, label, part in rows if part == each}) for each in SPLITS}
    for each, found in names.items():
        if not found:
            raise UserError(
                f"data.root={root}: no {kind.sought} in the {'training' if each == 'train' else 'held-out'} split"
            )
    mine = [(path, label) for path, label, part in rows if part == split]
    paths = [path for path, _ in mine]
    if reading == "classes":
        return _several(root, paths, [label for _, label in mine], names)
    if names["train"] == names["test"] == [""]:
        return Labelled(paths, None, None)
    if reading == "numbers":
        return Labelled(paths, torch.tensor([float(label) for _, label in mine]), None)
    alone = sorted(set(names["test"]) ^ set(names["train"]))
    if "" in alone:
        raise UserError(
            f"data.root={root}: {kind.noun}s of one split have labels, and those of the other none; give both, or none"
        )
    if alone:
        raise UserError(f"data.root={root}: both splits need the same classes; only one has {', '.join(alone[:6])}")
    classes = names["train"]
    number = {label: place for place, label in enumerate(classes)}
    return Labelled(paths, torch.tensor([number[label] for _, label in mine]), tuple(map(printable, classes)))


def _several(root: str, paths: list[str], labels: Sequence[str], cells: dict[str, list[str]]) -> Labelled:
    """Samples of several classes each; those of the held-out split must be among those of the training split."""
    known = {split: {name for cell in found for name in classes_in(cell)} for split, found in cells.items()}
    classes = sorted(known["train"])
    if alone := sorted(known["test"] - known["train"]):
        raise UserError(
            f"data.root={root}: no training sample has the held-out classes {some(alone)}; add some, or leave them out"
        )
    if len(classes) < 2:
        raise UserError(
            f"data.root={root}: training samples have {number_of(len(classes), 'class', 'classes')}; two or more are "
            "wanted"
        )
    column = {name: place for place, name in enumerate(classes)}
    found = torch.zeros(len(paths), len(classes), dtype=torch.bool)
    for row, cell in enumerate(labels):
        found[row, [column[name] for name in classes_in(cell)]] = True
    return Labelled(paths, found, tuple(map(printable, classes)))


def classes_in(cell: str) -> list[str]:
    """The classes that a cell of a column of several names."""
    return [name for part in cell.split(BETWEEN) if (name := part.strip())]


def tree(
    folder: Path, kind: Kind, passed: Passed, items: Callable[[list[str]], list[str]] = lambda paths: paths
) -> list[tuple[str, str]]:
    """(path, class) of all samples in the class folders, sorted; without class folders those there, of class ""."""
    beside = Passed()
    labels = subfolders(folder, beside)
    groups = list_groups(folder, [folder / label for label in labels], kind.suffixes)
    made = [items(group.paths) for group in groups]
    found = sorted((path, label) for label, paths in zip(labels, made, strict=True) for path in paths)
    if all(path == str(folder / label) for path, label in found):  # folders that are samples themselves, or none
        listed = list_files(folder, kind.suffixes)
        passed.merge(listed.passed)
        return [(path, "") for path in items(listed.paths)]
    passed.merge(beside)
    for group in groups:
        passed.merge(group.passed)
    say_empty(folder, [printable(label) for label, group in zip(labels, groups, strict=True) if not group.paths], kind)
    return found


def say_empty(folder: Path, empty: Sequence[str], kind: Kind) -> None:
    """Say which folders hold none of the files, so that they are no classes."""
    if empty:
        say(f"{folder}: no {kind.sought} in the folders {some(empty)}, so they are no classes")


def say_passed(root: str, passed: Passed, held_out: Sequence[str] = ()) -> None:
    """Say what a listing passed over, and which of several held-out splits is taken."""
    if line := passed.line(root):
        say(line)
    say_left_aside(root, held_out)


def read_manifest(file: Path, kind: Kind, fold: str | None = None) -> tuple[list[Row], Reading]:
    """What a CSV file says with the columns path, split or fold and, where there are any, label or labels.

    `COLUMNS` has their names. Every label is a number to predict where all are written with a decimal point. Under
    "labels" stand any number of classes, with `BETWEEN` between them. Under "fold" stands the name of one; without a
    split the first is held out.

    Args:
        fold: to hold out, whatever a column "split" says.

    Raises:
        UserError: it is no such file, names a sample in both splits, or has no such fold.
    """
    places, table = _read_table(file, kind)
    known = {name: each for each, names in SPLITS.items() for name in names}
    held = None
    if fold is not None or places["split"] is None:
        held = held_fold(str(file), folds, fold) if (folds := _folds_in(file, places, table)) else None
    if held is None:
        refuse_fold(str(file), fold)
    found: list[tuple[int, str, str, str]] = []
    for number, row in table:
        path, label, split = (_cell(row, places[key]) for key in ("path", "label", "split"))
        if held is not None:
            split = "test" if _cell(row, places["fold"]) == held else "train"
        if not path or "\0" in path or split.lower() not in known:
            raise UserError(
                f"{file}, row {number}: needs a path and a split of {', '.join(known)}, not {path!r}, {split!r}"
            )
        found.append((number, _beside(file, path), label, split.lower()))
    held_out = [name for name in SPLITS["test"] if any(split == name for *_, split in found)]
    say_passed(str(file), Passed(), held_out)
    rows = [each for each in found if each[3] not in held_out[1:]]
    _check_once(file, kind.noun, [(number, path, known[split], label) for number, path, label, split in rows])
    plain = [(path, label, known[split]) for _, path, label, split in rows]
    if places["several"] is not None:  # a sample without a class is one of none
        return plain, "classes"
    bare = [number for number, _, label, _ in rows if not label]
    if 0 < len(bare) < len(rows):
        raise UserError(f"{file}, row {bare[0]}: no label, and other rows have one; give every row one, or none")
    _check_kind(file, [(number, label) for number, _, label, _ in rows])
    return plain, "numbers" if all(NUMBER.fullmatch(label) for _, label, _ in plain) else "class"


Places = dict[str, int | None]
"""Where the columns of a manifest stand: those of `COLUMNS`, "label" for several, too, and "several", if they are."""


def _read_table(file: Path, kind: Kind) -> tuple[Places, list[tuple[int, list[str]]]]:
    """Where the columns stand, and the number in the file and the cells of every row.

    Raises:
        UserError: it is no CSV file with the columns that are needed.
    """
    lines = [f"{line}\n" for line in read_lines(file)]
    separator = max(",;\t|", key=next((line for line in lines if line.strip()), "").count)
    try:
        table = csv.reader(lines, delimiter=separator)
        head = next((row for row in table if any(row)), [])
        rows = [(table.line_num, row) for row in table if any(row)]
    except csv.Error as error:
        raise UserError(f"{file}: not a readable CSV file ({error})") from error
    names = [name.strip().lower() for name in head]
    places: Places = {
        key: next((names.index(name) for name in also if name in names), None) for key, also in COLUMNS.items()
    }
    several, one = places.pop("labels"), places["label"]
    if several is not None and one is not None:
        raise UserError(
            f"{file}: has the columns {names[one]} and {names[several]}; rename one, for a {kind.noun} has one class "
            "or several"
        )
    missing = [name for name in ("path", "split") if places[name] is None and (name == "path" or not _divides(places))]
    if missing:
        raise UserError(
            f"{file}: the first line must name the columns path and split (or fold), and label where {kind.noun}s have "
            f"labels; no {missing[0]}"
        )
    return places | {"label": one if several is None else several, "several": several}, rows


def _divides(places: Places) -> bool:
    return places["split"] is not None or places["fold"] is not None


def _cell(row: Sequence[str], place: int | None) -> str:
    return row[place].strip() if place is not None and place < len(row) else ""


def _folds_in(file: Path, places: Places, rows: Sequence[tuple[int, Sequence[str]]]) -> tuple[str, ...]:
    """The names in the column fold, 2 before 10; () where there is no such column."""
    if places["fold"] is None:
        return ()
    names = {_cell(row, places["fold"]): number for number, row in reversed(rows)}
    if "" in names:
        raise UserError(f"{file}, row {names['']}: no fold, and other rows have one; give every row one")
    return tuple(sorted(names, key=natural_key))


def _beside(file: Path, path: str) -> str:
    """A path of a manifest, seen from its folder; one with the separators of Windows too."""
    if "\\" in path and "/" not in path and not (file.parent / path).exists():
        path = path.replace("\\", "/")
    return os.path.normpath(file.parent / path)


def _check_kind(file: Path, rows: Sequence[tuple[int, str]]) -> None:
    """See that labels are all classes or all numbers to predict, which have a decimal point each.

    Args:
        rows: number in the file and label of each.
    """
    numbers = [bool(NUMBER.fullmatch(label)) for _, label in rows]
    if any(numbers) and not all(numbers) and all(_reads_as_number(label) for _, label in rows):
        number, label = rows[numbers.index(False)]
        raise UserError(
            f"{file}, row {number}: the label {label!r} has no decimal point, and others have; write numbers to "
            "predict with one (2.0), classes without"
        )


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_once(file: Path, noun: str, rows: Sequence[tuple[int, str, str, str]]) -> None:
    """See that no sample is in both splits; say how many are named twice, with two labels, and how many are not there.

    Args:
        rows: number in the file, path, split and label of each.
    """
    first: dict[str, tuple[int, str, str]] = {}
    twice, other_label = 0, list[str]()
    for number, path, split, label in rows:
        before, other, known = first.setdefault(path, (number, split, label))
        if other != split:
            raise UserError(
                f"{file}, row {number}: {printable(path)} is held out here or in row {before}, and trained on in the "
                "other; name it once"
            )
        if known != label:
            other_label.append(
                f"{printable(path)} in row {before}, {printable(known)}, and row {number}, {printable(label)}"
            )
        twice += before != number
    if other_label:
        gives = number_of(len(other_label), "row gives", "rows give")
        say(f"{file}: {gives} a {noun} another label than a row above: {other_label[0]}")
    if twice:
        say(f"{file}: {number_of(twice, 'row names', 'rows name')} a {noun} that a row above has named")
    gone = [path for path, size in zip(first, file_sizes(list(first)), strict=True) if size < 0]
    if gone:
        say(
            f"{file}: {len(gone):,} of {len(first):,} {noun}s are not there and are skipped as unreadable, such as "
            f"{printable(gone[0])}"
        )
