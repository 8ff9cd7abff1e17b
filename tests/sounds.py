"""Small audio files for the tests of audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, pitch: float = 440.0, rate: int = 8000) -> np.ndarray:
    """[n] float64."""
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


def write(path: Path, points: np.ndarray, rate: int = 8000, subtype: str | None = None) -> Path:
    """Write an audio file, whose kind is that of its suffix, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, points, rate, subtype=subtype)
    return path


def write_classes(folder: Path, clips: int = 6) -> Path:
    """Class folders "high" and "low" of tones of 0.1 to 0.3 s: `clips` of each to train, half as many held out."""
    for split, count in (("train", clips), ("val", clips // 2)):
        for name, pitch in (("high", 2000.0), ("low", 300.0)):
            for i in range(count):
                points = tone(0.1 + 0.2 * i / count, pitch * (1 + i / 20))
                write(
                    folder / split / name / f"{i}.wav",
                    points + 0.01 * np.random.default_rng(i).normal(size=len(points)),
                )
    return folder


def write_fsdd(folder: Path, digits: int = 2, speakers: tuple[str, ...] = ("ann", "bob"), recordings: int = 7) -> Path:
    """Files of FSDD's naming."""
    for digit in range(digits):
        for speaker in speakers:
            for index in range(recordings):
                write(folder / f"{digit}_{speaker}_{index}.wav", tone(0.1, 200.0 * (digit + 1)))
    return folder
