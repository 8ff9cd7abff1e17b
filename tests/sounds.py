"""Small audio files for the tests of audio."""

from __future__ import annotations

from collections.abc import Sequence
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


def write_audioset(
    folder: Path, clips: int = 4, seconds: float = 0.3, classes: Sequence[str] = ("Speech", "Music", "Dog, bark")
) -> Path:
    """AudioSet's lists and clips: `clips` in each training part and twice as many held out, of changing classes."""
    mids = [f"/m/{place:03d}" for place in range(len(classes))]
    lines = [f'{place},{mid},"{name}"' for place, (mid, name) in enumerate(zip(mids, classes, strict=True))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_labels_indices.csv").write_text("\n".join(["index,mid,display_name", *lines]) + "\n")
    for part, count in (("balanced_train", clips), ("unbalanced_train", clips), ("eval", 2 * clips)):
        rows = [
            "# Segments csv created Sun Mar  5 10:54:31 2017",
            "# num_ytids=9",
            "# YTID, start_seconds, end_seconds",
        ]
        for place in range(count):
            video = f"-{part[:3]}_{place:06d}"
            own = sorted({place % len(mids), place // 2 % len(mids)})
            rows.append(f'{video}, 30.000, 40.000, "{",".join(mids[each] for each in own)}"')
            points = sum(tone(seconds, 300.0 * (1 + each)) for each in own) / 2
            write(folder / f"{part}_segments" / f"Y{video}.wav", points + _hiss(place, len(points)))
        (folder / f"{part}_segments.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_esc50(folder: Path, classes: int = 2, takes: int = 2, seconds: float = 0.3) -> Path:
    """ESC-50's table and clips: in each of five folds so many takes of every class."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target in range(classes):
            for take in range(takes):
                name = f"{fold}-{100 * fold + take}-A-{target}.wav"
                points = tone(seconds, 300.0 * (1 + target) + 10 * fold)
                write(folder / "audio" / name, points + _hiss(fold + take, len(points)))
                rows.append(f"{name},{fold},{target},kind_{classes - target},False,{fold},A")
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_commands(
    folder: Path, words: Sequence[str] = ("yes", "no", "bed", "cat"), speakers: int = 8, lists: bool = True
) -> Path:
    """Speech Commands: two takes of every word by every speaker; the lists name speaker 0 and speakers 1 and 2."""
    named: dict[str, list[str]] = {"validation": [], "testing": []}
    for place, word in enumerate(words):
        for speaker in range(speakers):
            for take in range(2):
                name = f"{word}/{speaker:08x}_nohash_{take}.wav"
                points = tone(0.3, 250.0 * (1 + place) + 5 * speaker)
                write(folder / name, points + _hiss(speaker, len(points)))
                if speaker < 3:
                    named["testing" if speaker else "validation"].append(name)
    for place, name in enumerate(("pink_noise", "white_noise")):
        write(folder / "_background_noise_" / f"{name}.wav", _hiss(place, 8000 * 6))
    (folder / "_background_noise_" / "README.md").write_text("noise")
    for part, names in named.items() if lists else ():
        (folder / f"{part}_list.txt").write_text("\n".join(names) + "\n")
    return folder


def write_iemocap(folder: Path, takes: int = 1, seconds: float = 0.4) -> Path:
    """IEMOCAP: a dialogue in every session, with so many turns of each emotion of its lists, some of them left out."""
    for session in range(1, 6):
        top, dialogue = folder / f"Session{session}", f"Ses{session:02d}F_impro01"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for place, emotion in enumerate(("neu", "hap", "exc", "sad", "ang", "fru", "xxx") * takes):
            name = f"{dialogue}_F{place:03d}"
            lines += [
                f"[{place}.2901 - {place}.9000]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.0000]",
                "C-E2:\tNeutral;\t()",
            ]
            points = tone(seconds, 200.0 * (1 + place))
            write(top / "sentences" / "wav" / dialogue / f"{name}.wav", points + _hiss(place, len(points)))
        lists = top / "dialog" / "EmoEvaluation"
        (lists / "Categorical").mkdir(parents=True)
        (lists / f"{dialogue}.txt").write_text("\n".join(lines) + "\n")
        (lists / "Categorical" / f"{dialogue}_e2_cat.txt").write_text("another form\n")
        write(top / "dialog" / "wav" / f"{dialogue}.wav", tone(seconds))
    return folder


def _hiss(seed: int, count: int) -> np.ndarray:
    return 0.01 * np.random.default_rng(seed).normal(size=count)
