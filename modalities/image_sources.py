"""Where images come from: scikit-learn's digits, noise, folders in every layout in use, or a Hugging Face hub name.

A source knows the label of every row and gives the row's image undecoded, so that what decodes it
(`modalities.image_data`) is the same for all of them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from modalities.hub import load_hub, one_line
from modalities.image_shards import open_shards, shard_files
from nepa_core.basics import UserError

if TYPE_CHECKING:
    from datasets import Dataset as Table

SourceName = Literal["digits", "noise", "folder", "hub"]
Size = tuple[int, int]
"""(height, width) in pixels."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
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
    """Labels and undecoded images."""

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


def open_source(source: SourceName, split: str, *, root: str | None = None, size: Size = (32, 32)) -> Source:
    """The undecoded images of a split; what has been opened once is kept.

    Args:
        source: "digits" (1,797 of 8 x 8, the last 500 held out, their values 0 to 16 spread over 0 to 255),
            "noise" (4,096 of `size`, for speed tests and dry runs), "folder" or "hub".
        split: "train" or "test" (held out).
        root: for "folder", a folder that holds one of
            - class folders, `train/<class>/*` and `val/<class>/*`;
            - what `save_to_disk` of the `datasets` library wrote, `train/` and `validation/`; memory-mapped;
            - WebDataset shards, see `modalities.image_shards`; class names stand in `classnames.txt`, if anywhere;
            - parquet in the layout of Hugging Face, `train-*.parquet` there or in data/. Up to 512 MiB are read
              into memory, still encoded; of more the `datasets` library makes a memory-mapped Arrow copy, once,
              in its cache (HF_DATASETS_CACHE), because single rows can't be read out of parquet;
            - torchvision's copy of CIFAR-10.
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
            return _open_folder(root, split)
        case "hub":
            if root is None:
                raise UserError("data.source=hub needs data.root=OWNER/NAME, the name of a data set on the hub")
            return _open_hub(root, split)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays in memory, uint8 [n, H, W] or [n, H, W, 3]."""

    title: str
    images: Pixels
    labels: Tensor
    classes: Classes | None

    def read(self, row: int) -> Pixels:
        image: Pixels = self.images[row]
        return image

    def name(self, row: int) -> str:
        return f"{self.title}:{row}"


@dataclass(frozen=True, eq=False)
class Noise:
    """Random RGB images, made from (seed, row) on access."""

    size: Size
    seed: int
    labels: Tensor
    classes: Classes | None = None

    def read(self, row: int) -> Pixels:
        noise = np.random.default_rng((self.seed, row)).bytes(self.size[0] * self.size[1] * 3)
        return np.frombuffer(noise, dtype=np.uint8).reshape(*self.size, 3)

    def name(self, row: int) -> str:
        return f"noise:{row}"


@dataclass(frozen=True, eq=False)
class Files:
    """Image files. Their paths are an Arrow array: a list of strings would be copied into every worker."""

    paths: pa.Array
    labels: Tensor
    classes: Classes | None

    def read(self, row: int) -> bytes:
        with open(self.name(row), "rb") as file:
            return file.read()

    def name(self, row: int) -> str:
        return str(self.paths[row])


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
        encoded = next(iter(self.table[row].values()))
        if encoded is not None and encoded["bytes"] is not None:
            return bytes(encoded["bytes"])
        if encoded is None or encoded["path"] is None:
            raise ValueError("the row holds no image bytes")
        return Path(encoded["path"]).read_bytes()

    def name(self, row: int) -> str:
        place = bisect_right(self.starts, row) - 1
        return f"{self.titles[place]}:{row - self.starts[place]}"


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
    """Tell the layout of a folder by what it holds, and open a split of it."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.root={root}: there is no such folder; give the one that holds the images")
    if (folder / CIFAR10.base_folder).is_dir():
        return _checked(_open_cifar10(folder, split))
    parquet = {each: _parquet_files(folder, names) for each, names in SPLITS.items()}
    if all(parquet.values()):
        return _checked(_open_parquet(parquet, split))
    shards = {each: shard_files(folder, names) for each, names in SPLITS.items()}
    if all(shards.values()):
        return _checked(open_shards(shards[split], folder))
    train, test = (_subfolder(folder, names) for names in SPLITS.values())
    if train and test:
        if all((place / "state.json").is_file() for place in (train, test)):
            return _checked(_open_saved({"train": train, "test": test}, split))
        return _open_class_folders(train, test, split)
    raise UserError(
        f"data.root={root}: looked for train/<class>/* with val/<class>/*, for train/ with validation/ as "
        "save_to_disk writes them, for train-*.parquet with test-*.parquet (there or in data/), for "
        f"*train*.tar with *val*.tar, and for {CIFAR10.base_folder}/, but found none of them complete; the "
        "held-out split may be called val, validation or test"
    )


def _checked(source: Source) -> Source:
    """The source, if all its labels name a class."""
    bound = None if source.classes is None else len(source.classes)
    wrong = source.labels < 0 if bound is None else (source.labels < 0) | (source.labels >= bound)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        allowed = "negative" if bound is None else f"outside 0..{bound - 1}, the classes that have names"
        raise UserError(f"{source.name(row)}: the label {int(source.labels[row])} is {allowed}; mend or remove it")
    return source


def _same_classes(where: str, names: Mapping[str, Sequence[str] | None], kind: str) -> None:
    """Refuse a training and a held-out split (title -> names) that don't have the same classes in the same order."""
    (first, one), (second, other) = names.items()
    if one == other:
        return
    alone = [f"{first}/{name}" for name in sorted(set(one or ()) - set(other or ()))]
    alone += [f"{second}/{name}" for name in sorted(set(other or ()) - set(one or ()))]
    if not alone:
        raise UserError(f"{where}: both splits need the same {kind} in the same order; mend the names of {second}")
    more = f" and {len(alone) - 6} more" if len(alone) > 6 else ""
    raise UserError(
        f"{where}: both splits need the same {kind}; without a counterpart in the other: {', '.join(alone[:6])}{more}"
    )


# ------------------------------------------------------------------------------------------ class folders, CIFAR-10


def _subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _open_class_folders(train: Path, test: Path, split: str) -> Files:
    """A tree of class folders; labels number them in the order of their names."""
    classes = _subfolders(train)
    _same_classes(f"data.root={train.parent}", {train.name: classes, test.name: _subfolders(test)}, "class folders")
    base = train if split == "train" else test
    files = [_image_files(base / name) for name in classes]
    if not any(files):
        raise UserError(f"data.root={base.parent}: no image file in {base}/<class>/")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(each) for each in files]))
    return Files(pa.array([path for each in files for path in each]), labels, tuple(classes))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _image_files(folder: Path) -> list[str]:
    """Paths at any depth whose suffix is that of an image, sorted; hidden files are left out."""
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(IMG_EXTENSIONS) and file[0] != "."
    )


def _open_cifar10(folder: Path, split: str) -> Arrays:
    """torchvision's copy. It is unpickled by torchvision, once the MD5 sums of its files are found right."""
    try:
        data = CIFAR10(folder, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(
            f"data.root={folder}: {CIFAR10.base_folder}/ is incomplete or damaged; download it again"
        ) from error
    return Arrays(f"CIFAR-10 {split}", data.data, torch.tensor(data.targets), tuple(data.classes))


# ---------------------------------------------------------------------------------- tables of the datasets library


def _parquet_files(folder: Path, names: Sequence[str]) -> list[Path]:
    places = [(place, name) for name in names for place in (folder, folder / "data")]
    found = (sorted(place.glob(f"{name}-*.parquet")) for place, name in places)
    return next((files for files in found if files), [])


def _open_parquet(files: Mapping[str, list[Path]], split: str) -> Rows:
    from datasets import Features

    heads = {each: [_parquet_head(file) for file in files[each]] for each in files}
    features = {each: Features.from_arrow_schema(heads[each][0].schema.to_arrow_schema()) for each in files}
    where = f"data.root={files['train'][0].parent}"
    _same_classes(where, {each: _class_names(each_features) for each, each_features in features.items()}, "classes")
    counts = [head.num_rows for head in heads[split]]
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    return _rows(_parquet_table(files[split]), [str(file) for file in files[split]], starts)


def _parquet_head(file: Path) -> pq.FileMetaData:
    """Number of rows and schema, once the columns are found to be right."""
    try:
        head = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({one_line(error)}); copy it again") from error
    _columns(head.schema.to_arrow_schema(), str(file))
    return head


def _parquet_table(files: list[Path]) -> Table:
    import datasets

    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        try:
            return datasets.Dataset.from_parquet([str(file) for file in files])
        except (datasets.exceptions.DatasetsError, OSError) as error:
            raise UserError(
                f"data.root={files[0].parent}: the Arrow copy of the parquet files can't be made in "
                f"{datasets.config.HF_DATASETS_CACHE} ({one_line(error.__cause__ or error)}); mend that, or name "
                "another folder in HF_DATASETS_CACHE"
            ) from error
    tables = []
    for file in files:
        try:
            with pq.ParquetFile(file) as stored:
                tables.append(stored.read(columns=_columns(stored.schema_arrow, str(file))))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable parquet file ({one_line(error)}); copy it again") from error
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
    _same_classes(where, {Path(titles[each]).name: _class_names(tables[each].features) for each in tables}, "classes")
    return _rows(tables[split], [titles[split]], [0])


def _rows(table: Table, titles: Sequence[str], starts: Sequence[int]) -> Rows:
    """Read the labels of a table and leave its images where they are."""
    from datasets import Image

    image, label = _columns(table.features.arrow_schema, titles[0])
    images = table.select_columns([image]).cast_column(image, Image(decode=False))
    stored = table.select_columns([label]).with_format("arrow")[:][label]
    classes = _class_names(table.features)
    labels = torch.from_numpy(stored.fill_null(0).to_numpy().astype(np.int64))
    rows = Rows(images, labels, classes, titles, starts)
    if stored.null_count:
        gap = stored.is_null().to_pylist().index(True)
        raise UserError(f"{rows.name(gap)}: the row has no label; remove it, or give it one")
    return rows


def _columns(schema: pa.Schema, title: str) -> list[str]:
    """The names of the column of images and of the column of labels."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is not None and label is not None:
        kind = schema.field(image).type
        encoded = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if encoded and pa.types.is_integer(schema.field(label).type):
            return [image, label]
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise UserError(
        f"{title}: needs a column image (or img) of structs with bytes, and a column label (or labels, fine_label) "
        f"of integers; it has {found}"
    )


def _class_names(features: Any) -> Classes | None:
    """The names that the feature of the labels carries."""
    names = next((getattr(features[name], "names", None) for name in LABEL_COLUMNS if name in features), None)
    return None if names is None else tuple(names)
