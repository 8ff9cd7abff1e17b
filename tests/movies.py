"""Small videos and volumes for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

CODECS = {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9", ".mkv": "mpeg4"}


def grey(value: int, height: int = 32, width: int = 48) -> np.ndarray[Any, Any]:
    """A frame of one grey, with its upper left corner white: [h, w, 3] uint8."""
    frame = np.full((height, width, 3), value, np.uint8)
    frame[: height // 4, : width // 4] = 255
    return frame


def ramp(count: int) -> list[np.ndarray[Any, Any]]:
    """Frames whose grey is 8 times their number."""
    return [grey(8 * place) for place in range(count)]


def write_video(
    file: Path, frames: Sequence[np.ndarray[Any, Any]], *, rate: int = 10, at: Sequence[int] | None = None
) -> Path:
    """A video of frames [h, w, 3], of the codec that its suffix stands for.

    Args:
        at: when each is shown, in milliseconds, from the first on; default: at an even rate.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(CODECS[file.suffix], rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.bit_rate = 4_000_000
        if at is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for place, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if at is not None:
                frame.pts, frame.time_base = at[place], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def write_frames(folder: Path, frames: Sequence[np.ndarray[Any, Any]], kind: str = "png") -> Path:
    """A folder of frames called 0, 1, ... 10, ..., as few programs sort them."""
    folder.mkdir(parents=True)
    for place, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"{place}.{kind}")
    return folder


def write_sound(file: Path) -> Path:
    """An mp4 file that holds sound alone."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def write_movies(folder: Path, each: int = 6, kinds: tuple[str, str] = ("bright", "dark")) -> Path:
    """Class folders of bright and of dark videos of 12 frames: files, and folders of frames; half as many held out."""
    for split, count in (("train", each), ("test", each // 2)):
        for kind, base in zip(kinds, (150, 40), strict=True):
            for place in range(count):
                noise = np.random.default_rng(place + (split == "test") * 100).integers(0, 40, (12, 32, 48, 3))
                frames = [*(base + noise).astype(np.uint8)]
                if place % 3:
                    write_video(folder / split / kind / f"{place}.{('mp4', 'avi')[place % 2]}", frames)
                else:
                    write_frames(folder / split / kind / f"{place}", frames)
    return folder


def write_volumes(folder: Path, each: int = 6, side: int = 12) -> Path:
    """Class folders "flat" and "ramp" of noisy .npy volumes."""
    for split, count in (("train", each), ("test", each // 2)):
        for kind in ("flat", "ramp"):
            (folder / split / kind).mkdir(parents=True)
            for place in range(count):
                noise = np.random.default_rng(place + (split == "test") * 100).normal(size=(side, side, side))
                rise = np.arange(side)[:, None, None] * (kind == "ramp")
                np.save(folder / split / kind / f"{place}.npy", (noise + rise).astype(np.float32))
    return folder
