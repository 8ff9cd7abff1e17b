"""Sound files: reading one, its channels mixed to one, resampled; and what is odd about the sound of a few.

Shapes: n points of a waveform.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from modalities.data.labelled import Kind
from modalities.data.listing import printable, say

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
KIND = Kind("clip", "audio file", SUFFIXES)

_LARGEST_KERNEL = 2**24  # numbers in the filters of a resampling; two rates without a common factor need more
_ROUNDING = 1e-4  # of samples of 16 bits, three steps of them
_LISTENED = 48  # clips of a split that are looked at when it is opened, for _LISTENED_SECONDS each
_LISTENED_SECONDS = 5


def read_file(path: str, sample_rate: int, most: int, *, start: float = 0.0) -> Tensor:
    """The first `most` points of an audio file, its channels averaged, resampled; [n] float32. From `start` seconds on.

    Raises:
        OSError, ValueError: it can't be read, or there is nothing in it to learn from.
    """
    rate, points, _ = _read_points(path, sample_rate, most, start)
    wave = torch.from_numpy(points.mean(1))
    if not len(wave):
        raise ValueError("holds no samples")
    if not wave.isfinite().all():
        raise ValueError("holds NaN or infinite samples")
    if wave.abs().max() < _ROUNDING and _cancels(points):
        raise ValueError("is silent: its channels cancel each other, for one is the other upside down")
    if wave.min() == wave.max():
        raise ValueError("is silent: all of its samples are equal")
    resampled: Tensor = wave if rate == sample_rate else _resampling(rate, sample_rate)(wave)
    return resampled


def _read_points(path: str, sample_rate: int, most: int, start: float = 0.0) -> tuple[int, np.ndarray, str]:
    """Rate, the first points [n, channels] float32 that make `most` at `sample_rate`, and how they are stored."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("no regular file")  # a pipe might never end
        with soundfile.SoundFile(os.fsencode(path)) as file:
            rate = int(file.samplerate)
            _check_rate(rate, sample_rate)
            if start:
                file.seek(min(round(start * rate), len(file)))
            points = file.read(math.ceil(most * rate / sample_rate), dtype="float32", always_2d=True)
            return rate, points, str(file.subtype)
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string) from error


def _cancels(points: np.ndarray) -> bool:
    """Whether the mean of the channels [n, channels] has less than a thousandth of their power (30 dB)."""
    if points.shape[1] < 2:
        return False
    apart = points - points.mean(0)
    return bool(1000 * np.square(apart.mean(1)).mean() < np.square(apart).mean())


def listen(root: str, paths: Sequence[str]) -> None:
    """Say what is odd about the sound of a few clips, evenly spread over the list."""
    chosen = paths if len(paths) <= _LISTENED else [paths[i * len(paths) // _LISTENED] for i in range(_LISTENED)]
    found: dict[str, list[str]] = {}
    read = 0
    for path in chosen:
        try:
            _, points, kind = _read_points(path, 16_000, _LISTENED_SECONDS * 16_000)
        except (OSError, ValueError):
            continue  # is named when it is read as a sample
        if not len(points) or not np.isfinite(points).all():
            continue
        read += 1
        peak = float(np.abs(points).max())
        if kind in ("FLOAT", "DOUBLE") and peak > 8:
            what = (
                f"have numbers up to {2 ** math.ceil(math.log2(peak)):,}, as integers have, in a file of "
                "floating-point samples, which should lie between -1 and 1; divide them"
            )
            found.setdefault(what, []).append(path)
        if _cancels(points):
            what = "have channels that cancel each other when they are averaged; keep one of them"
            found.setdefault(what, []).append(path)
        flat = (points[1:] == points[:-1]) & (np.abs(points[1:]) > 0.99)  # a loud tone touches full scale, and turns
        if kind not in ("FLOAT", "DOUBLE") and len(flat) and flat.mean() > 0.005:
            found.setdefault("are clipped: they stay at full scale for several samples at a time", []).append(path)
    for what, named in found.items():
        say(f"{root}: {len(named)} of {read} clips listened to, such as {printable(min(named))}, {what}")


def _check_rate(rate: int, wanted: int) -> None:
    common = math.gcd(rate, wanted)
    if not 1000 <= rate <= 1_000_000 or (wanted // common) * (rate // common) > _LARGEST_KERNEL:
        raise ValueError(
            f"its header says {rate} samples a second, which can't be brought to data.sample_rate={wanted}; "
            "fix the header"
        )


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _resampling(rate: int, wanted: int) -> nn.Module:
    from torchaudio.transforms import Resample

    resample: nn.Module = Resample(rate, wanted)
    return resample
