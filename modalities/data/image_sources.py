"""Where images come from: scikit-learn's digits, noise, folders in every layout in use, or a Hugging Face hub name.

A source knows the label of every row and gives the row's image undecoded, so that what decodes it
(`modalities.data.images`) is the same for all of them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from modalities.data.hub import load_hub, one_line
from modalities.data.image_arrays import array_file, open_array
from modalities.data.image_columns import (
    holds_images,
    holds_numbers,
    image_bytes,
    images_of,
    labels_of,
    parquet_files,
    parquet_schema,
    read_columns,
    stored_names,
    stored_sizes,
)
from modalities.data.image_decode import SUFFIXES, Pixels
from modalities.data.image_shards import compressed_shards, open_shards, shard_files
from modalities.data.listing import (
    Integers,
    Passed,
    Paths,
    data_folder,
    list_files,
    list_groups,
    printable,
    read_whole,
    say,
    say_left_aside,
    subfolders,
)
from modalities.data.numbering import check_numbering, first_unknown
from modalities.data.remote import at_hand
from nepa_core.basics import UserError, some

if TYPE_CHECKING:
    from datasets import Dataset as Table

SourceName = Literal["digits", "noise", "folder", "hub"]
Size = tuple[int, int]
"""(height, width) in pixels."""
Classes = tuple[str, ...]
"""Names of the classes; place k names label k."""

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
"""What a split may be called where it is stored; the first name found is taken. ImageNet's `test` has no labels."""

NOISE_COUNT = 4096
NOISE_CLASSES = 10
IN_MEMORY = 2**29  # bytes of parquet in a split, up to which it is read whole
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


class Source(Hashable, Protocol):
    """Labels and undecoded images; where all have one size, `one_size` is it, (height, width)."""

    @property
    def labels(self) -> Tensor:
        """[n] int64."""

    @property
    def classes(self) -> Classes | None:
        """Names of the classes, or None where the labels are only numbers."""

    def read(self, row: int) -> bytes | Pixels:
        """The image of a row: an encoded file, or pixels [H, W] or [H, W, 3]; may raise anything."""

    def name(self, row: int) -> str:
        """What a message calls that row."""

    def relative_names(self) -> list[str]:
        """The name of each row below the root of the data: it stays when the data move."""

    def sizes(self) -> Integers:
        """[n] int64, stored bytes of each row: what `read` gives, or -1 where it gives nothing."""


def open_source(source: SourceName, split: str, *, root: str | None = None, size: Size = (32, 32)) -> Source:
    """The undecoded images of a split; what has been opened once is kept.

    Args:
        source: "digits" (1,797 of 8 x 8, the last 500 held out, their values 0 to 16 spread over 0 to 255),
            "noise" (4,096 of `size`, for speed tests and dry runs), "folder" or "hub".
        split: "train" or "test" (held out).
        root: for "folder", a folder that holds one of (where it holds several, the first is read, and that is said)
            - class folders, `train/<class>/*` and `val/<class>/*`, listed as `modalities.data.listing` says; what is
              passed over, and a class of which nothing is left, is said;
            - `cifar-10-batches-py/`, torchvision's copy of CIFAR-10;
            - what `save_to_disk` of the `datasets` library wrote, `train/` and `validation/`; memory-mapped;
            - WebDataset shards, see `modalities.data.image_shards`; class names stand in `classnames.txt`, if anywhere;
            - `train.npy` and `val.npy`, pixels of one size that are read without decoding, see
              `modalities.data.image_arrays`;
            - parquet in the layout of Hugging Face, `train-*.parquet` there or in data/. Up to 512 MiB are read
              into memory, still encoded; of more the `datasets` library makes a memory-mapped Arrow copy, once,
              in its cache (HF_DATASETS_CACHE), because single rows can't be read out of parquet. Shards may differ
              in how they store the two columns, see `modalities.data.image_columns`.
            The held-out split may be called val, validation or test. For "hub", `owner/name`, which the
            `datasets` library downloads into its cache.

    Raises:
        UserError: there is no such data, it is in none of these layouts or damaged, train and held-out classes
            differ, or a label is none of the classes.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    match source:
        case "digits":
            return _open_digits(split)
        case "noise":
            return _open_noise(split, size)
        case "folder":
            if root is None:
                raise UserError("data.source=folder needs data.root=DIR, the folder that holds the images")
            return _with_images(_open_folder(root, split), split, root)
        case "hub":
            if root is None:
                raise UserError("data.source=hub needs data.root=OWNER/NAME, the name of a data set on the hub")
            return _with_images(_open_hub(root, split), split, root)


def _with_images(source: Source, split: str, root: str) -> Source:
    if not len(source.labels):
        raise UserError(f"data.root={root}: the {'training' if split == 'train' else 'held-out'} split holds no image")
    return source


def numbered_classes(train: Source, test: Source, root: str) -> Classes:
    """The names of the classes; where they have none, their numbers, which must run from 0 on without a gap.

    Raises:
        UserError: they don't, or a held-out image has a class that no training image has.
    """
    if train.classes is not None:
        return train.classes
    labels = train.labels.numpy()
    check_numbering(labels, f"data.root={root}", ", or give them names")
    if (row := first_unknown(labels, test.labels.numpy())) is not None:
        raise UserError(
            f"{test.name(row)}: no training image has its class {int(test.labels[row])}; fix the label, or leave such "
            "images out"
        )
    return tuple(str(number) for number in range(int(labels.max()) + 1))


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays in memory, uint8 [n, H, W] or [n, H, W, 3]."""

    title: str
    images: Pixels
    labels: Tensor
    classes: Classes | None

    @property
    def one_size(self) -> Size:
        return self.images.shape[1], self.images.shape[2]

    def read(self, row: int) -> Pixels:
        image: Pixels = self.images[row]
        return image

    def name(self, row: int) -> str:
        return f"{self.title}:{row}"

    def relative_names(self) -> list[str]:
        return [self.name(row) for row in range(len(self.images))]

    def sizes(self) -> Integers:
        return np.full(len(self.images), self.images[:1].nbytes)


@dataclass(frozen=True, eq=False)
class Noise:
    """Random RGB images, made from (seed, row) on access."""

    size: Size
    seed: int
    labels: Tensor
    classes: Classes | None = None

    @property
    def one_size(self) -> Size:
        return self.size

    def read(self, row: int) -> Pixels:
        noise = np.random.default_rng((self.seed, row)).bytes(self.size[0] * self.size[1] * 3)
        return np.frombuffer(noise, dtype=np.uint8).reshape(*self.size, 3)

    def name(self, row: int) -> str:
        return f"noise:{row}"

    def relative_names(self) -> list[str]:
        return [self.name(row) for row in range(len(self.labels))]

    def sizes(self) -> Integers:
        return np.full(len(self.labels), self.size[0] * self.size[1] * 3)


@dataclass(frozen=True, eq=False)
class Files:
    """Image files."""

    paths: Paths
    labels: Tensor
    classes: Classes | None

    def read(self, row: int) -> bytes:
        return read_whole(self.paths.at(row))

    def name(self, row: int) -> str:
        return printable(self.paths.at(row))

    def relative_names(self) -> list[str]:
        return self.paths.relative()

    def sizes(self) -> Integers:
        return self.paths.sizes()


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table of the `datasets` library, memory-mapped unless it is small.

    Attributes:
        table: its one column holds structs of {bytes, path}, the image still encoded.
        titles: what the table was made of, in order: files, or one folder.
        starts: the row at which each of them begins.
    """

    table: Table
    labels: Tensor
    classes: Classes | None
    titles: Sequence[str]
    starts: Sequence[int]

    def read(self, row: int) -> bytes:
        return image_bytes(next(iter(self.table[row].values())))

    def name(self, row: int) -> str:
        place = bisect_right(self.starts, row) - 1
        return f"{self.titles[place]}:{row - self.starts[place]}"

    def relative_names(self) -> list[str]:
        return [os.path.basename(self.name(row)) for row in range(len(self.labels))]

    def sizes(self) -> Integers:
        column = self.table.data.table.column(self.table.column_names[0])  # as it lies on the disk, not copied
        sizes = stored_sizes(images_of(column, self.titles[0]))
        order = self.table._indices  # of a table that was shuffled or cut
        return sizes if order is None else sizes[order.column(0).to_numpy()]


@lru_cache(maxsize=4)
def _open_digits(split: str) -> Arrays:
    from sklearn.datasets import load_digits  # a second to import, for digits alone

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    part = slice(None, -500) if split == "train" else slice(-500, None)
    labels = torch.as_tensor(digits.target[part], dtype=torch.int64)
    return Arrays("digits", images[part], labels, tuple("0123456789"))


@lru_cache(maxsize=4)
def _open_noise(split: str, size: Size) -> Noise:
    return Noise(size, seed=list(SPLITS).index(split), labels=torch.arange(NOISE_COUNT) % NOISE_CLASSES)


@lru_cache(maxsize=4)
def _open_folder(root: str, split: str) -> Source:
    """Tell the layouts of a folder by what it holds, and open a split of the first; the others are said."""
    folder = data_folder(at_hand(root), "the images")
    found = _layouts(folder, split)
    if len(found) > 1 and CLASS_FOLDERS in found and not _any_image(folder):
        del found[CLASS_FOLDERS]
    if not found:
        _refuse_half(folder, root)
        entries = sorted(map(printable, os.listdir(folder)))
        raise UserError(
            f"data.root={root}: looked for train/<class>/* with val/<class>/*, for train/ with validation/ as "
            "save_to_disk writes them, for train-*.parquet with test-*.parquet (there or in data/), for "
            f"*train*.tar with *val*.tar, for train.npy with val.npy as nepa resize writes them, and for {CIFAR10}/, "
            "but found none of them complete; the "
            "held-out split may be called val, validation or test, and shards must not be compressed; the folder "
            f"holds {some(entries, 8) or 'nothing'}"
        )
    chosen, *others = found
    if others:
        say(f"data.root={root}: {chosen} are read; {' and '.join(others)} lie there, too, and are passed over")
    return found[chosen]()


def _refuse_half(folder: Path, root: str) -> None:
    """Say which file is missing of the arrays of pixels, where there are some of their files.

    Raises:
        UserError: one is.
    """
    there = {
        split: [file for name in names for suffix in (".npy", ".npz") if (file := folder / f"{name}{suffix}").is_file()]
        for split, names in SPLITS.items()
    }
    write = "restore it, or write all of them again by nepa resize"
    for file in (file for files in there.values() for file in files):
        other = file.with_suffix(".npz" if file.suffix == ".npy" else ".npy")
        if not other.is_file():
            raise UserError(f"data.root={root}: {other.name} is missing beside {file.name}: {write}")
    for split, other_split in (("train", "test"), ("test", "train")):
        if there[split] and not there[other_split]:
            name = SPLITS[other_split][0]
            raise UserError(f"data.root={root}: {name}.npy is missing beside {there[split][0].name}: {write}")


CLASS_FOLDERS = "the class folders"
CIFAR10 = "cifar-10-batches-py"  # torchvision's name of the folder


def _layouts(folder: Path, split: str) -> dict[str, Callable[[], Source]]:
    """What a folder holds, in words, and how a split of it is opened; the first is the one to read."""
    found: dict[str, Callable[[], Source]] = {}
    train, test = (_subfolder(folder, names) for names in SPLITS.values())
    both = {"train": train, "test": test} if train and test else {}
    saved = bool(both) and all((place / "state.json").is_file() for place in both.values())
    folders = partial(_open_class_folders, train, test, split) if train and test and not saved else None
    if folders and all(subfolders(place) for place in both.values()):
        found[CLASS_FOLDERS] = folders
    if (folder / CIFAR10).is_dir():
        found["torchvision's files of CIFAR-10"] = lambda: _checked(_open_cifar10(folder, split))
    if saved:
        found["tables of save_to_disk"] = lambda: _checked(_open_saved(both, split))
    parquet = {each: parquet_files(folder, names) for each, names in SPLITS.items()}
    if all(parquet.values()):
        found["parquet files"] = lambda: _checked(_open_parquet(parquet, split))
    shards = {each: shard_files(folder, names) for each, names in SPLITS.items()}
    if all(shards.values()):
        found["tar files"] = lambda: _checked(_open_tars(folder, shards[split], split))
    arrays = {each: array_file(folder, names) for each, names in SPLITS.items()}
    if (train_array := arrays["train"]) and (test_array := arrays["test"]):
        found["arrays of pixels"] = lambda: _open_arrays({"train": train_array, "test": test_array}, split)
    if not found and folders:
        found[CLASS_FOLDERS] = folders  # says what is wrong with them
    return found


def _checked(source: Source) -> Source:
    """The source, if all its labels name a class."""
    bound = None if source.classes is None else len(source.classes)
    wrong = source.labels < 0 if bound is None else (source.labels < 0) | (source.labels >= bound)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        allowed = "negative" if bound is None else f"outside 0..{bound - 1}, the classes that have names"
        raise UserError(f"{source.name(row)}: the label {int(source.labels[row])} is {allowed}; fix or remove it")
    return source


def _same_classes(where: str, names: Mapping[str, Sequence[str] | None], kind: str) -> None:
    """Refuse a training and a held-out split (title -> names) that don't have the same classes in the same order."""
    (first, one), (second, other) = names.items()
    if one == other:
        return
    alone = [f"{first}/{printable(name)}" for name in sorted(set(one or ()) - set(other or ()))]
    alone += [f"{second}/{printable(name)}" for name in sorted(set(other or ()) - set(one or ()))]
    if not alone:
        raise UserError(f"{where}: both splits need the same {kind} in the same order; fix the names of {second}")
    raise UserError(f"{where}: both splits need the same {kind}; without a counterpart in the other: {some(alone)}")


# --------------------------------------------------------------------------------- class folders, CIFAR-10, shards


def _subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if os.path.isdir(folder / name)), None)


def _any_image(folder: Path) -> bool:
    bases = (_subfolder(folder, names) for names in SPLITS.values())
    return all(
        any(list_files(base / name, SUFFIXES, within=base).paths for name in subfolders(base))
        for base in bases
        if base is not None
    )


def _open_class_folders(train: Path, test: Path, split: str) -> Files:
    """A tree of class folders; labels number them in the order of their names."""
    base, passed = train if split == "train" else test, Passed()
    classes = subfolders(base, passed)
    pair = {train.name: subfolders(train), test.name: subfolders(test)}
    _same_classes(f"data.root={train.parent}", pair, "class folders")
    groups = list_groups(base, [base / name for name in classes], SUFFIXES)
    for group in groups:
        passed.merge(group.passed)
    counts = [len(group.paths) for group in groups]
    line = passed.line(str(base))
    if not any(counts):
        raise UserError(f"data.root={base.parent}: no image file in {base}/<class>/" + (f"; {line}" if line else ""))
    if line:
        say(line)
    if split == "test":
        say_left_aside(test.parent, [name for name in SPLITS["test"] if os.path.isdir(test.parent / name)])
    _say_empty(base, {name: group.passed for name, group in zip(classes, groups, strict=True) if not group.paths})
    _say_nested(base, {name: group.paths for name, group in zip(classes, groups, strict=True)})
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    paths = [path for group in groups for path in group.paths]
    return Files(Paths.of(paths, str(base.parent)), labels, tuple(map(printable, classes)))


def _say_empty(base: Path, empty: Mapping[str, Passed]) -> None:
    if not empty:
        return
    shown = some([f"{printable(name)} ({passed.total():,} passed over)" for name, passed in empty.items()])
    say(f"{base}: classes without an image that can be read: {shown}; they stay classes, without one")


def _say_nested(base: Path, paths: Mapping[str, Sequence[str]]) -> None:
    """Name a class whose images all lie in subfolders of their own: those may be what was meant as classes."""
    for name, files in paths.items():
        start = len(str(base / name)) + 1
        if not files or not all(os.sep in file[start:] for file in files):
            continue
        deeper = sorted({file[start:].split(os.sep)[0] for file in files})
        if len(deeper) > 1:
            shown = ", ".join(map(printable, deeper[:4])) + (", ..." if len(deeper) > 4 else "")
            say(
                f"{base}: the folders right in it are the classes; all images of {printable(name)} lie in the "
                f"subfolders {shown}, which are none: move them up if they should be"
            )
            return


def _open_cifar10(folder: Path, split: str) -> Arrays:
    """torchvision's copy. It is unpickled by torchvision, once the MD5 sums of its files are found right."""
    from torchvision import datasets  # as slow to import as torch

    try:
        data = datasets.CIFAR10(folder, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"data.root={folder}: {CIFAR10}/ is incomplete or damaged; download it again") from error
    return Arrays(f"CIFAR-10 {split}", data.data, torch.tensor(data.targets), tuple(data.classes))


def _open_arrays(files: Mapping[str, Path], split: str) -> Source:
    arrays = {each: open_array(file) for each, file in files.items()}
    _same_classes(
        f"data.root={files['train'].parent}", {each: found.classes for each, found in arrays.items()}, "classes"
    )
    return _checked(arrays[split])


def _open_tars(folder: Path, files: Sequence[Path], split: str) -> Source:
    if packed := compressed_shards(folder, SPLITS[split]):
        raise UserError(
            f"{packed[0]}: a compressed shard beside {files[0].name} can't be read by offset; decompress it, or move "
            "it away"
        )
    return open_shards(files, folder)


# ---------------------------------------------------------------------------------- tables of the datasets library


def _open_parquet(files: Mapping[str, list[Path]], split: str) -> Rows:
    where = f"data.root={files['train'][0].parent}"
    if split == "test":
        folder = files["train"][0].parent
        say_left_aside(folder, [name for name in SPLITS["test"] if any(folder.glob(f"{name}-*.parquet"))])
    heads = {each: [parquet_schema(file) for file in files[each]] for each in files}
    columns = {each: _one_pair(files[each], [schema for schema, _ in heads[each]]) for each in files}
    names = {
        each: _one_naming(files[each], [stored_names(schema, columns[each][1]) for schema, _ in heads[each]])
        for each in files
    }
    _same_classes(where, names, "classes")
    starts = np.cumsum([0, *(count for _, count in heads[split][:-1])]).tolist()
    table = _parquet_table(files[split], columns[split])
    return _rows(table, [str(file) for file in files[split]], starts, names[split])


def _one_pair(files: Sequence[Path], schemas: Sequence[pa.Schema]) -> list[str]:
    found = [_columns(schema, str(file)) for file, schema in zip(files, schemas, strict=True)]
    for file, each in zip(files, found, strict=True):
        if each != found[0]:
            raise UserError(
                f"{file}: images and labels are in the columns {' and '.join(each)}, those of {files[0].name} in "
                f"{' and '.join(found[0])}; give them the same names"
            )
    return found[0]


def _one_naming(files: Sequence[Path], names: Sequence[Classes | None]) -> Classes | None:
    """The names of the classes; files without any take those of the others."""
    given = [(file, each) for file, each in zip(files, names, strict=True) if each is not None]
    for file, each in given:
        if each != given[0][1]:
            raise UserError(f"{file}: names its classes otherwise than {given[0][0].name}; write both anew")
    return tuple(map(printable, given[0][1])) if given else None


def _parquet_table(files: list[Path], columns: Sequence[str]) -> Table:
    import datasets

    image, label = columns
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        features = datasets.Features({image: datasets.Image(decode=False), label: datasets.Value("int64")})
        try:
            return datasets.Dataset.from_parquet(
                [str(file) for file in files], columns=[image, label], features=features
            )
        except (datasets.exceptions.DatasetsError, OSError) as error:
            raise UserError(
                f"data.root={files[0].parent}: the Arrow copy of the parquet files can't be made in "
                f"{datasets.config.HF_DATASETS_CACHE} ({one_line(error.__cause__ or error)}); fix that, or name "
                "another folder in HF_DATASETS_CACHE"
            ) from error
    tables = []
    for file in files:
        stored = read_columns(file, columns)
        unified = [images_of(stored[image], str(file)), labels_of(stored[label], str(file))]
        tables.append(pa.table(dict(zip(columns, unified, strict=True))))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables)))


def _open_saved(places: Mapping[str, Path], split: str) -> Rows:
    """What `save_to_disk` wrote: a DatasetDict, or a data set for each split."""
    import datasets

    tables: dict[str, Table] = {}
    for each, place in places.items():
        try:
            tables[each] = datasets.load_from_disk(str(place))
        except Exception as error:  # JSON, Arrow and the library's own errors for a damaged folder
            raise UserError(f"{place}: save_to_disk did not write this ({one_line(error)}); save it again") from error
    titles = {each: str(place) for each, place in places.items()}
    return _one_of(tables, titles, split, f"data.root={places[split].parent}")


@lru_cache(maxsize=4)
def _open_hub(root: str, split: str) -> Source:
    stored = load_hub(root)
    found = {each: next((name for name in names if name in stored), None) for each, names in SPLITS.items()}
    if None in found.values():
        raise UserError(
            f"data.source=hub data.root={root}: needs a split train and one called val, validation or test; it has "
            f"{', '.join(stored)}"
        )
    titles = {each: f"{root}/{name}" for each, name in found.items()}
    tables = {each: stored[name] for each, name in found.items()}
    return _checked(_one_of(tables, titles, split, f"data.source=hub data.root={root}"))


def _one_of(tables: Mapping[str, Table], titles: Mapping[str, str], split: str, where: str) -> Rows:
    for each, table in tables.items():
        _columns(table.features.arrow_schema, titles[each])
    names = {each: _class_names(table.features) for each, table in tables.items()}
    _same_classes(where, {Path(titles[each]).name: names[each] for each in tables}, "classes")
    return _rows(tables[split], [titles[split]], [0], names[split])


def _rows(table: Table, titles: Sequence[str], starts: Sequence[int], classes: Classes | None) -> Rows:
    """Read the labels of a table and leave its images where they are."""
    from datasets import Image

    image, label = _columns(table.features.arrow_schema, titles[0])
    images = table.select_columns([image]).cast_column(image, Image(decode=False))
    stored = labels_of(table.select_columns([label]).with_format("arrow")[:][label], titles[0])
    labels = torch.from_numpy(stored.fill_null(0).to_numpy().astype(np.int64))
    rows = Rows(images, labels, classes, titles, starts)
    if stored.null_count:
        gap = stored.is_null().to_pylist().index(True)
        raise UserError(f"{rows.name(gap)}: the row has no label; remove it, or give it one")
    return rows


def _columns(schema: pa.Schema, title: str) -> list[str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is not None and label is not None:
        kinds = schema.field(image).type, schema.field(label).type
        if holds_images(kinds[0]) and holds_numbers(kinds[1]):
            return [image, label]
    found = printable(", ".join(f"{field.name}: {field.type}" for field in schema))
    raise UserError(
        f"{title}: needs a column image (or img) of structs with bytes, and a column label (or labels, fine_label) "
        f"of integers; it has {found}"
    )


def _class_names(features: Any) -> Classes | None:
    """The names that the feature of the labels carries."""
    names = next((getattr(features[name], "names", None) for name in LABEL_COLUMNS if name in features), None)
    return None if names is None else tuple(map(printable, names))
