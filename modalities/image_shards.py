"""WebDataset shards as a map-style source: the members of every tar are listed once and then read by offset.

A sample is `KEY.jpg` (jpeg, png, webp) with `KEY.cls`, the label in digits, or `KEY.json` that holds "label". Because
any row can be read at any time, `nepa_core.runtime.data` deals shards out as it deals out everything else: no sample
is repeated or lost, whatever the number of ranks and workers, and a resumed run sees the same ones.
"""

from __future__ import annotations

import json
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

from nepa_core.basics import UserError, cores

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
CLASS_NAMES = "classnames.txt"
"""File beside the shards with the name of a class a line, where they have names."""
WORTH_A_PROCESS = 16  # shards that repay the start of one

Integers = np.ndarray[Any, np.dtype[np.int64]]


class ShardIndex(NamedTuple):
    """Where the images of one shard lie: their keys, first bytes, sizes in bytes, and labels."""

    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]


@dataclass(frozen=True, eq=False)
class Shards:
    """The images of several tar files; some 60 bytes a sample in memory, none of them Python objects.

    Attributes:
        files: the shards, in order.
        shard: [n] the shard of each row; offsets, sizes: [n] its image's first byte there and its number of bytes.
    """

    files: Sequence[str]
    shard: Integers
    offsets: Integers
    sizes: Integers
    keys: pa.Array
    labels: Tensor
    classes: tuple[str, ...] | None

    def read(self, row: int) -> bytes:
        size = int(self.sizes[row])
        with open(self.files[self.shard[row]], "rb", buffering=0) as file:
            file.seek(int(self.offsets[row]))
            content = file.read(size)
        if len(content) < size:
            raise ValueError("the shard has become shorter")
        return content

    def name(self, row: int) -> str:
        return f"{self.files[self.shard[row]]}:{self.keys[row]}"


def shard_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The tar files of a split: those with its name (the first that any has) in theirs, or in a folder of that name."""
    beside = sorted(folder.glob("[!.]*.tar"))
    for name in names:
        word = re.compile(rf"(?<![a-z]){name}(?![a-z])", re.IGNORECASE)  # "val" is not in "trainval"
        found = [file for file in beside if word.search(file.stem)] or sorted((folder / name).glob("[!.]*.tar"))
        if found:
            return found
    return []


def open_shards(files: Sequence[Path], folder: Path) -> Shards:
    """List the members of the shards, in several processes where there are many.

    Raises:
        UserError: a shard is damaged or cut short, a sample has no label, or two images share a key.
    """
    processes = min(cores(), len(files) // WORTH_A_PROCESS)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            found = list(pool.map(index_shard, files))
    else:
        found = [index_shard(file) for file in files]
    if not any(each.keys for each in found):
        raise UserError(f"{files[0]}: no image in this shard or those beside it; a sample is KEY.jpg with KEY.cls")
    return Shards(
        files=[str(file) for file in files],
        shard=np.repeat(np.arange(len(files)), [len(each.keys) for each in found]),
        offsets=np.array([*chain.from_iterable(each.offsets for each in found)], dtype=np.int64),
        sizes=np.array([*chain.from_iterable(each.sizes for each in found)], dtype=np.int64),
        keys=pa.array(chain.from_iterable(each.keys for each in found), pa.large_string()),
        labels=torch.tensor([*chain.from_iterable(each.labels for each in found)], dtype=torch.int64),
        classes=_class_names(folder),
    )


def index_shard(file: Path) -> ShardIndex:
    """Read the headers and the labels of one shard; the images are passed over."""
    from webdataset.tariterators import base_plus_ext

    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                key, kind = base_plus_ext(member.name)
                if key is None or not member.isreg():
                    continue
                if kind.lower() in IMAGE_KINDS:
                    if key in images:
                        raise UserError(f"{file}: two images with the key {key}; keep one of them")
                    images[key] = (member.offset_data, member.size)
                elif kind == "cls" or (kind == "json" and key not in labels):
                    label = _label(kind, _content(tar, member), f"{file}: {member.name}")
                    if label is not None:
                        labels[key] = label
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file}: a damaged or cut tar shard ({error}); copy it again") from error
    bare = next((key for key in images if key not in labels), None)
    if bare is not None:
        raise UserError(
            f"{file}: the image {bare} has no label; a sample is KEY.jpg with KEY.cls, or a json with label"
        )
    offsets, sizes = zip(*images.values(), strict=True) if images else ((), ())
    return ShardIndex(list(images), list(offsets), list(sizes), [labels[key] for key in images])


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return b"" if stream is None else stream.read()


def _label(kind: str, content: bytes, title: str) -> int | None:
    """The label of a member; a json may be about other things."""
    try:
        if kind == "cls":
            return int(content)
        facts = json.loads(content)
        return int(facts["label"]) if isinstance(facts, dict) and "label" in facts else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{title} holds no label: an integer is wanted, not {content[:40]!r}") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes a damaged header, or the end of a file cut between two members, for the end of the archive."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset}")


def _class_names(folder: Path) -> tuple[str, ...] | None:
    file = folder / CLASS_NAMES
    return tuple(file.read_text().splitlines()) if file.is_file() else None
