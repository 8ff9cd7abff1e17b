"""Images once more, small, in shards or as arrays of pixels, which load faster."""

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
from typing import Any, Literal, cast

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
from recipes.training.resized_arrays import Part, channels_of, deliver, make_room, write_rows

JPEG = b"\xff\xd8\xff"
SETTINGS = "resize.json"
DONE = "shards"  # folder of what is finished while other parts are missing
LEFT_OUT = "unreadable.txt"


class ResizeOptions(BaseModel):
    """Options of `nepa resize`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="folder of what is written; default runs/NAME-resize")
    format: Literal["shards", "array"] = Field(
        default="shards",
        description="shards: JPEG in WebDataset tars (the default); array: pixels, one file a split, which are read "
        "without decoding: squares, cropped at the centre",
    )
    size: int = Field(default=256, gt=0, description="the shorter side in pixels; default 256")
    quality: int = Field(default=90, ge=1, le=100, description="of the JPEG, up to 100; default 90")
    images: int = Field(default=4096, gt=0, description="in a shard, or written at once; default 4096")
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core")


def resize(data: Modality, options: ResizeOptions, out: Path) -> list[str]:
    """Write both splits into `out`, with `resize.json` and `unreadable.txt`.

    Shards are tar files, with `classnames.txt`; arrays are as `modalities.data.image_arrays` says. They appear in `out`
    when all are there, so a reader never takes a part of the data for the whole.

    Returns:
        Name and cause of every image that was left out.

    Raises:
        UserError: the adapter has no stored images, they can't be opened, `out` holds something else, or can't be
            written.
    """
    counts = {split: len(cast(Sized, data.stored(split))) for split in SPLITS}
    parts = [part for split, count in counts.items() for part in _parts(split, count, options)]
    classes = data.classes() or ()
    own = {"size", "images", "format"} | ({"quality"} if options.format == "shards" else set())
    settings = data.plain().model_dump(mode="json") | options.model_dump(include=own)
    if _is_claimed(out, settings):
        return _write(data, options, out, parts, classes)
    new = not out.exists()
    try:
        _claim(out, settings, classes if options.format == "shards" else None)
        return _write(data, options, out, parts, classes)
    except Exception:
        if not any(_is_done(out, part, options) for part in parts):
            _take_back(out, new=new)
        raise


def _write(data: Modality, options: ResizeOptions, out: Path, parts: list[Part], classes: Sequence[str]) -> list[str]:
    missing = [part for part in parts if not _is_done(out, part, options)]
    if options.format == "array":
        if missing:
            make_room(data, options.size, out / DONE, {part.name: part.last for part in parts})
        write: Callable[[Part], None] = partial(write_rows, data, options.size, out / DONE)
    else:
        write = partial(write_shard, data, options, out)
    workers = min(options.workers or cores(), max(1, len(missing)))
    with ProcessPoolExecutor(workers, initializer=_quiet) as pool:
        try:
            for count, (part, _) in enumerate(zip(missing, pool.map(write, missing), strict=True), 1):
                say_progress(f"{count}/{len(missing)}  {part.shard if options.format == 'shards' else part.name}")
        except BaseException:  # Ctrl-C: the parts in work are finished, no further one is begun
            pool.shutdown(cancel_futures=True)
            raise
    return _deliver_arrays(data, options, out, parts, classes) if options.format == "array" else _deliver(out, parts)


def _is_done(out: Path, part: Part, options: ResizeOptions) -> bool:
    if options.format == "array":
        return (out / f"{part.name}.npy").exists() or (out / DONE / part.done).exists()
    return any((place / part.shard).exists() for place in (out, out / DONE))


def write_shard(data: Modality, options: ResizeOptions, out: Path, shard: Part) -> None:
    """Write one shard whole, beside it the names of the images that could not be read."""
    from webdataset import TarWriter

    images: Any = data.stored(shard.split)
    draft = out / DONE / f".writing_{shard.shard}"
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
        draft.rename(out / DONE / shard.shard)


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


def _parts(split: str, rows: int, options: ResizeOptions) -> Iterator[Part]:
    for number, first in enumerate(range(0, rows, options.images)):
        yield Part(split, SPLITS[split][0], number, first, min(first + options.images, rows))


def _is_claimed(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds resized images of these settings.

    Raises:
        UserError: it holds others, or something else.
    """
    file = out / SETTINGS
    if file.exists():
        try:
            before = {"format": "shards"} | dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); name another out=DIR") from error
        if other := {key: value for key, value in before.items() if settings.get(key) != value}:
            raise UserError(f"{file} tells of other settings, {other}; give those again, or name another out=DIR")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no resized images; name another folder with out=DIR")
    return False


def _claim(out: Path, settings: dict[str, Any], classes: Sequence[str] | None) -> None:
    with disk_errors(out):
        (out / DONE).mkdir(parents=True)
        if classes is not None:
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


def _deliver(out: Path, shards: list[Part]) -> list[str]:
    """Move finished shards to where they are looked for; the list of unreadable images goes with them."""
    listed = out / LEFT_OUT
    with disk_errors(out):
        if not listed.exists():
            write_whole(listed, "".join(_note(out, shard).read_text() for shard in shards))
        for shard in shards:
            if not (out / shard.shard).exists():
                (out / DONE / shard.shard).rename(out / shard.shard)
        shutil.rmtree(out / DONE, ignore_errors=True)
    return listed.read_text().splitlines()


def _deliver_arrays(
    data: Modality, options: ResizeOptions, out: Path, parts: list[Part], classes: Sequence[str]
) -> list[str]:
    """The same of arrays: the held-out one comes last, and without it a reader takes nothing."""
    listed, names = out / LEFT_OUT, dict.fromkeys(part.name for part in parts)
    if not listed.exists():
        notes = [read_json(out / DONE / part.done)["unreadable"] for part in parts]
        with disk_errors(out):
            write_whole(listed, "".join(f"{line}\n" for note in notes for line in note))
    for name in names:
        if not (out / f"{name}.npy").exists():
            own = [part for part in parts if part.name == name]
            shape = (own[-1].last, options.size, options.size, channels_of(data))
            deliver(out / DONE, out, name, own, classes, shape)
    shutil.rmtree(out / DONE, ignore_errors=True)
    return listed.read_text().splitlines()


def _note(out: Path, shard: Part) -> Path:
    return (out / DONE / shard.shard).with_suffix(".unreadable")


def _quiet() -> None:
    """In a worker: one thread, and no traceback on Ctrl-C, which the main process answers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
