"""WebDataset shards as a map-style source: the members of every tar are listed once and then read by offset.

A sample is `KEY.jpg` (or another kind of image, see `modalities.data.image_decode`) with `KEY.cls`, the label in
digits, or `KEY.json` that holds "label". KEY is the name up to its last dot; an image whose KEY has no label belongs to
the sample of its name up to the first dot (`KEY.rgb.png`), unless that has an image of its own (`KEY.seg.png`), and is
then passed over. What is passed over is counted and said. Because any row can be read at any time,
`nepa_core.runtime.data` deals shards out as it deals out everything else: no sample is repeated or lost, whatever the
number of ranks and workers, and a resumed run sees the same ones.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from modalities.data.image_decode import SUFFIXES
from modalities.data.listing import (
    HIDDEN,
    ODD,
    Integers,
    Passed,
    anew,
    check_size,
    is_hidden,
    is_hidden_path,
    printable,
    say,
)
from nepa_core.basics import UserError, cores

CLASS_NAMES = "classnames.txt"
"""File beside the shards with the name of a class a line, where they have names."""
WORTH_A_PROCESS = 16  # shards that repay the start of one
LARGEST_LABEL = 2**24  # bytes of a cls or json
ARCHIVES = "with the suffix .tar"  # as `Passed` counts members that are tars themselves
SPARSE = -1  # the size of a member with holes, which may claim any number of bytes

Found = dict[str, tuple[int, int]]
"""Key of an image -> its first byte and its size."""


class ShardIndex(NamedTuple):
    """Where the images of one shard lie: their keys, first bytes, sizes in bytes, and labels; what is passed over."""

    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    passed: Passed


@dataclass(frozen=True, eq=False)
class Shards:
    """The images of several tar files; some 60 bytes a sample in memory, none of them Python objects.

    Attributes:
        files: the shards, in order.
        shard: [n] the shard of each row; offsets, lengths: [n] its image's first byte there and its number of bytes.
    """

    files: Sequence[str]
    shard: Integers
    offsets: Integers
    lengths: Integers
    keys: pa.Array
    labels: Tensor
    classes: tuple[str, ...] | None

    def read(self, row: int) -> bytes:
        size = int(self.lengths[row])
        if size == SPARSE:
            raise ValueError("a sparse member of a tar; write the shard without --sparse")
        check_size(size)
        with open(self.files[self.shard[row]], "rb", buffering=0) as file:
            file.seek(int(self.offsets[row]))
            content = file.read(size)
        if len(content) < size:
            raise ValueError("the shard has become shorter")
        return content

    def name(self, row: int) -> str:
        return f"{self.files[self.shard[row]]}:{self.keys[row]}"

    def relative_names(self) -> list[str]:
        files = [os.path.basename(file) for file in self.files]
        return [f"{files[shard]}:{key}" for shard, key in zip(self.shard.tolist(), self.keys.to_pylist(), strict=True)]

    def sizes(self) -> Integers:
        return self.lengths


def shard_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The tar files of a split: those with its name (the first that any has) in theirs, or in a folder of that name."""
    return _shards(folder, names, re.compile(r"\.tar$", re.IGNORECASE))


def compressed_shards(folder: Path, names: Sequence[str]) -> list[Path]:
    """The same of compressed tar files, which can't be read by offset."""
    return _shards(folder, names, re.compile(r"\.(tar\.\w+|t[gbx]z\d?)$", re.IGNORECASE))


def _shards(folder: Path, names: Sequence[str], kind: re.Pattern[str]) -> list[Path]:
    beside = _of_kind(folder, kind)
    for name in names:
        word = re.compile(rf"(?<![a-z]){name}(?![a-z])", re.IGNORECASE)  # "val" is not in "trainval"
        found = [file for file in beside if word.search(file.stem)] or _of_kind(folder / name, kind)
        if found:
            return found
    return []


def _of_kind(folder: Path, kind: re.Pattern[str]) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [file for file in entries if kind.search(file.name) and not is_hidden(file.name) and file.is_file()]


def open_shards(files: Sequence[Path], folder: Path) -> Shards:
    """List the members of the shards, in several processes where there are many.

    Raises:
        UserError: a shard is damaged or cut short, a sample has no label or several images, or there is no image.
    """
    processes = min(cores(), len(files) // WORTH_A_PROCESS)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            found = list(pool.map(index_shard, files))
    else:
        found = [index_shard(file) for file in files]
    passed = Passed()
    for each in found:
        passed.merge(each.passed)
    where = f"{files[0]}" + (f" and {len(files) - 1} beside it" if len(files) > 1 else "")
    line = passed.line(where)
    if not any(each.keys for each in found):
        nested = any(each.passed.counts.get(ARCHIVES) for each in found)
        cure = "it holds tars, as ILSVRC's own does: unpack these into class folders, train/<class>/ and val/<class>/"
        raise UserError(
            f"{files[0]}: no image in this shard or those beside it; "
            + (cure if nested else "a sample is KEY.jpg with KEY.cls")
            + (f"; {line}" if line else "")
        )
    if line:
        say(line)
    return Shards(
        files=[str(file) for file in files],
        shard=np.repeat(np.arange(len(files)), [len(each.keys) for each in found]),
        offsets=np.array([*chain.from_iterable(each.offsets for each in found)], dtype=np.int64),
        lengths=np.array([*chain.from_iterable(each.sizes for each in found)], dtype=np.int64),
        keys=pa.array(chain.from_iterable(each.keys for each in found), pa.large_string()),
        labels=torch.tensor([*chain.from_iterable(each.labels for each in found)], dtype=torch.int64),
        classes=_class_names(folder),
    )


def index_shard(file: Path) -> ShardIndex:
    """Read the headers and the labels of one shard; the images are passed over."""
    images: Found = {}
    labels: dict[str, dict[str, int | UserError]] = {"cls": {}, "json": {}}
    passed = Passed()
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                name = member.name.removeprefix("./")
                key, suffix = os.path.splitext(name)
                kind = suffix.lower()
                if member.isdir():
                    continue
                if is_hidden_path(name):
                    passed.add(HIDDEN, name)
                elif not member.isreg():
                    passed.add(ODD, name)
                elif kind in SUFFIXES:
                    if key in images:
                        raise UserError(f"{file}: two images with the key {printable(key)}; keep one of them")
                    images[key] = (member.offset_data, SPARSE if member.issparse() else member.size)
                elif kind[1:] in labels:
                    label = _label(kind[1:], tar, member, f"{file}: {printable(name)}")
                    if label is not None:
                        before = labels[kind[1:]].setdefault(key, label)
                        if isinstance(before, int) and isinstance(label, int) and before != label:
                            raise UserError(
                                f"{file}: two labels with the key {printable(key)}, {before} and {label}; keep one"
                            )
                else:
                    passed.add(f"with the suffix {printable(kind[:16])}" if kind else "without a suffix", name)
                vars(tar)["members"] = []  # of a million members, the list that tarfile keeps would take a gigabyte
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: a damaged or cut tar shard ({error}); {anew(file)}") from error
    for key in labels["json"].keys() & labels["cls"].keys():
        if labels["json"][key] != labels["cls"][key]:
            passed.add("json files with another label than the cls of their sample", key)
    return _samples(file, images, labels["json"] | labels["cls"], passed)


def _samples(file: Path, images: Found, labels: dict[str, int | UserError], passed: Passed) -> ShardIndex:
    index = ShardIndex([], [], [], [], passed)
    used: dict[str, str] = {}
    for key, (offset, size) in images.items():
        sample = key if key in labels or (short := _up_to_first_dot(key)) not in labels else short
        if sample != key and sample in images:
            passed.add("of another kind than the image of their sample", key)
            continue
        if sample in used:
            raise UserError(
                f"{file}: two images with the key {printable(sample)}, {printable(used[sample])} and "
                f"{printable(key)}; keep one of them"
            )
        used[sample] = key
        label = labels.get(sample)
        if isinstance(label, UserError):
            raise label
        if label is None:
            raise UserError(
                f"{file}: the image {printable(key)} has no label; a sample is KEY.jpg with KEY.cls, or a json with "
                "label"
            )
        index.keys.append(printable(key))
        index.offsets.append(offset)
        index.sizes.append(size)
        index.labels.append(label)
    for key in labels.keys() - used.keys():
        passed.add("labels without an image", key)
    return index


def _up_to_first_dot(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _label(kind: str, tar: tarfile.TarFile, member: tarfile.TarInfo, title: str) -> int | UserError | None:
    """The label of a member; a json may be about other things. An error counts where there is an image with it."""
    if member.issparse() or member.size > LARGEST_LABEL:
        return UserError(f"{title} holds no label: {member.size:,} bytes, or a sparse member; write the shard anew")
    stream = tar.extractfile(member)
    content = b"" if stream is None else stream.read()
    try:
        if kind == "cls":
            return _class_number(content)
        facts = json.loads(content)
        return _class_number(facts["label"]) if isinstance(facts, dict) and "label" in facts else None
    except (ValueError, TypeError, OverflowError, RecursionError):
        return UserError(f"{title} holds no label: an integer is wanted, not {content[:40]!r}")


def _class_number(stored: Any) -> int:
    """Raises ValueError or TypeError where it is none that fits into 64 bits, such as a fraction."""
    number = int(stored)
    if (isinstance(stored, float) and stored != number) or abs(number) >= 2**63:
        raise ValueError
    return number


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes a damaged header, or the end of a file cut between two members, for the end of the archive."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset}")


def _class_names(folder: Path) -> tuple[str, ...] | None:
    file = folder / CLASS_NAMES
    if not file.is_file():
        return None
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "backslashreplace")
    return tuple(map(printable, text.rstrip().splitlines()))
