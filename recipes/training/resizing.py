"""Images once more, small, in shards that load faster."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as resize_image
from torchvision.transforms.v2.functional import to_pil_image

from modalities.data.hub import one_line
from modalities.data.image_shards import CLASS_NAMES
from modalities.data.image_sources import SPLITS
from nepa_core.basics import FROZEN, UnreadableSample, UserError, cores
from nepa_core.modality import Modality
from nepa_core.runtime.checkpoint import disk_errors, read_json, write_whole
from nepa_core.runtime.meter import say_progress

JPEG = b"\xff\xd8\xff"
SETTINGS = "resize.json"
DONE = "shards"  # folder of finished shards while others are missing


class ResizeOptions(BaseModel):
    """Options of `nepa resize`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="folder of the shards; default runs/NAME-resize")
    size: int = Field(default=256, gt=0, description="the shorter side in pixels; default 256")
    quality: int = Field(default=90, ge=1, le=100, description="of the JPEG, up to 100; default 90")
    images: int = Field(default=4096, gt=0, description="in a shard; default 4096")
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core")


class Shard(NamedTuple):
    """One tar to write: rows `first` to `last` of a split."""

    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{SPLITS[self.split][0]}-{self.number:06d}.tar"


def resize(data: Modality, options: ResizeOptions, out: Path) -> list[str]:
    """Write both splits into `out`: tar files, `classnames.txt`, `resize.json` and `unreadable.txt`.

    The tar files appear in `out` when all are there, so a reader never takes a part of the data for the whole.

    Returns:
        Name and cause of every image that was left out.

    Raises:
        UserError: the adapter has no stored images, they can't be opened, `out` holds something else, or can't be
            written.
    """
    counts = {split: len(cast(Sized, data.stored(split))) for split in SPLITS}
    shards = [shard for split, count in counts.items() for shard in _shards(split, count, options)]
    classes = data.classes() or ()
    settings = data.plain().model_dump(mode="json") | options.model_dump(include={"size", "quality", "images"})
    if _is_claimed(out, settings):
        return _write(data, options, out, shards)
    new = not out.exists()
    try:
        _claim(out, settings, classes)
        return _write(data, options, out, shards)
    except Exception:
        if not any((out / shard.file).exists() or (out / DONE / shard.file).exists() for shard in shards):
            _take_back(out, new=new)
        raise


def _write(data: Modality, options: ResizeOptions, out: Path, shards: list[Shard]) -> list[str]:
    missing = [shard for shard in shards if not any((place / shard.file).exists() for place in (out, out / DONE))]
    workers = min(options.workers or cores(), max(1, len(missing)))
    with ProcessPoolExecutor(workers, initializer=_quiet) as pool:
        try:
            for count, shard in enumerate(pool.map(partial(write_shard, data, options, out), missing), 1):
                say_progress(f"{count}/{len(missing)}  {shard.file}")
        except BaseException:  # Ctrl-C: the shards in work are finished, no further one is begun
            pool.shutdown(cancel_futures=True)
            raise
    return _deliver(out, shards)


def write_shard(data: Modality, options: ResizeOptions, out: Path, shard: Shard) -> Shard:
    """Write one shard whole, beside it the names of the images that could not be read."""
    from webdataset import TarWriter

    images: Any = data.stored(shard.split)
    draft = out / DONE / f".writing_{shard.file}"
    unreadable = []
    with disk_errors(out):
        with draft.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            for row in range(shard.first, shard.last):
                try:
                    sample = images[row]
                    content = smaller(sample["image"], getattr(images, "raw", None), row, options)
                except UnreadableSample as error:
                    unreadable.append(str(error))
                except Exception as error:  # PIL can't write every size
                    unreadable.append(f"{images.name(row)}: {one_line(error)}")
                else:
                    label = str(int(sample.get("label", -1))).encode()
                    tar.write({"__key__": f"{row:08d}", "jpg": content, "cls": label})
        write_whole(_note(out, shard), "".join(f"{line}\n" for line in unreadable))
        draft.rename(out / DONE / shard.file)
    return shard


def smaller(pixels: Tensor, raw: Callable[[int], Any] | None, row: int, options: ResizeOptions) -> bytes:
    """An image uint8 [C, H, W] as JPEG whose shorter side is at most `options.size` pixels.

    Args:
        raw: what is stored of the image, by its row; a JPEG that is small enough is taken as it is.
    """
    image = to_pil_image(pixels)
    if min(image.size) > options.size:
        image = resize_image(image, [options.size], interpolation=InterpolationMode.BICUBIC)
    elif raw is not None and isinstance(stored := raw(row), bytes) and stored[:3] == JPEG:
        return stored
    file = io.BytesIO()
    image.save(file, "JPEG", quality=options.quality)
    return file.getvalue()


def _shards(split: str, rows: int, options: ResizeOptions) -> Iterator[Shard]:
    for number, first in enumerate(range(0, rows, options.images)):
        yield Shard(split, number, first, min(first + options.images, rows))


def _is_claimed(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds shards of these settings.

    Raises:
        UserError: it holds others, or something else.
    """
    file = out / SETTINGS
    if file.exists():
        try:
            before = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); name another out=DIR") from error
        if other := {key: value for key, value in before.items() if settings.get(key) != value}:
            raise UserError(f"{file} tells of other settings, {other}; give those again, or name another out=DIR")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no resized images; name another folder with out=DIR")
    return False


def _claim(out: Path, settings: dict[str, Any], classes: Sequence[str]) -> None:
    with disk_errors(out):
        (out / DONE).mkdir(parents=True)
        write_whole(out / CLASS_NAMES, "".join(f"{name}\n" for name in classes))
        write_whole(out / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _take_back(out: Path, *, new: bool) -> None:
    """Remove what a command that failed before its first shard has made."""
    shutil.rmtree(out / DONE, ignore_errors=True)
    for name in (CLASS_NAMES, SETTINGS):
        (out / name).unlink(missing_ok=True)
    if new:
        with suppress(OSError):  # there is none, or it holds something
            out.rmdir()


def _deliver(out: Path, shards: list[Shard]) -> list[str]:
    """Move finished shards to where they are looked for; the list of unreadable images goes with them."""
    listed = out / "unreadable.txt"
    with disk_errors(out):
        if not listed.exists():
            write_whole(listed, "".join(_note(out, shard).read_text() for shard in shards))
        for shard in shards:
            if not (out / shard.file).exists():
                (out / DONE / shard.file).rename(out / shard.file)
        shutil.rmtree(out / DONE, ignore_errors=True)
    return listed.read_text().splitlines()


def _note(out: Path, shard: Shard) -> Path:
    return (out / DONE / shard.file).with_suffix(".unreadable")


def _quiet() -> None:
    """In a worker: one thread, and no traceback on Ctrl-C, which the main process answers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
