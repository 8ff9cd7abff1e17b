"""Audio as samples: found, read, mixed to one channel, resampled, and turned into log-mel frames.

Shapes: n points of a waveform, T frames, F mel bands, B samples. Every data set is map-style and gives
{"mel": float32 [T, F], "frames": int64 scalar} and, where there are labels, "label", an int64 scalar (a class) or a
float32 one (a number to predict): clips are padded with silence (zeros) at their end, and "frames" says how many are
real. A source knows the label of every row and gives the row's waveform.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import MelSpectrogram, Resample

from nepa_core.basics import Batch, UnreadableSample, UserError

SourceName = Literal["synthetic", "folder"]
Padding = Literal["batch", "full"]

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
"""What a split may be called where it is stored; the first name found is taken."""

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
FSDD_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<index>\d+)\.wav")
NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
"""Labels of a CSV file that all look like this are numbers to predict."""
FSDD_TEST = 5
"""Recordings 0 to 4 of each digit and speaker are FSDD's test split."""

FLOOR = 1e-6
"""Mel power that counts as silence, above the rounding of 16 bits (1e-8) and below any microphone's noise."""
_LARGEST_KERNEL = 2**24  # numbers in the filters of a resampling; two rates without a common factor need more

HELD_OUT = 0.1
"""The share of clips that is held out where nothing says which."""

Row = tuple[str, str, str]
"""Path, label ("" for none), and "train" or "test"."""

SYNTHETIC_CLASSES = ("tone", "rising", "falling", "pulsed")
SYNTHETIC_COUNT = {"train": 2000, "test": 512}
SYNTHETIC_NOISE = 0.05


class FrontEnd(NamedTuple):
    """How a waveform becomes frames; all lengths are whole numbers.

    Attributes:
        sample_rate: in Hz. bands: F.
        window, hop: in points of the waveform.
        step: frames in a token; a clip is filled up to whole tokens.
        longest: frames of the longest clip, a multiple of `step`; what lies beyond is cut off.
    """

    sample_rate: int
    bands: int
    window: int
    hop: int
    step: int
    longest: int

    @property
    def n_fft(self) -> int:
        """A power of two of at least two windows: the spectrum is interpolated, so narrow low bands aren't empty."""
        return 1 << (2 * self.window - 1).bit_length()


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _mel_spectrogram(form: FrontEnd) -> MelSpectrogram:
    return MelSpectrogram(
        form.sample_rate, n_fft=form.n_fft, win_length=form.window, hop_length=form.hop, n_mels=form.bands, center=False
    )


def empty_bands(form: FrontEnd) -> int:
    """How many mel bands are so narrow that no frequency of the spectrum falls into them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchaudio warns of what is counted here
        filters = melscale_fbanks(form.n_fft // 2 + 1, 0.0, form.sample_rate / 2, form.bands, form.sample_rate)
    return int((filters.amax(0) == 0).sum())


def log_mel(wave: Tensor, form: FrontEnd) -> Tensor:
    """log(1 + mel power / FLOOR) of a waveform [..., n] between -1 and 1: [..., n // hop, F] float32, silence is 0.

    Frame i is centred on point i * hop, and beyond its ends the clip is silent, so padding a clip with zeros changes
    none of its frames.
    """
    return log_power(_mel_spectrogram(form)(F.pad(wave, (form.n_fft // 2, form.n_fft // 2))))[
        ..., : wave.shape[-1] // form.hop, :
    ]


def log_power(mel: Tensor) -> Tensor:
    """Mel power [..., F, T] to its logarithm [..., T, F]."""
    return (mel.transpose(-1, -2) / FLOOR).log1p()


def framed_log_mel(segments: Tensor, form: FrontEnd) -> Tensor:
    """The frames that lie whole within segments [..., (T - 1) * hop + n_fft]: [..., T, F]."""
    return log_power(_mel_spectrogram(form)(segments))


# ------------------------------------------------------------------------------------------------------- data sets


class Clips(Dataset[Batch]):
    """Clips as log-mel frames.

    Args:
        rows: [S] int64, the row of the source behind each sample.
        padding: pad a batch to its longest clip, or every batch to `form.longest`. A single sample always has
            `form.longest` frames, so that any collate can stack it.
        memory: row -> frames of a clip, or why it can't be read; filled on access. None keeps nothing.
    """

    def __init__(
        self, source: Source, rows: Tensor, form: FrontEnd, padding: Padding, memory: dict[int, Tensor | str] | None
    ) -> None:
        self.source, self.rows, self.form = source, rows, form
        self.labels = None if source.labels is None else source.labels[rows]
        self.padding, self.memory = padding, memory

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        clip = self._frames(index)
        mel = F.pad(clip, (0, 0, 0, self.form.longest - len(clip)))
        return {"mel": mel, "frames": torch.tensor(len(clip))} | self._label(index)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once; raises UnreadableSample for the first clip in it that can't be read."""
        clips = [self._frames(index) for index in indices]
        mel = pad_sequence(clips, batch_first=True)
        if self.padding == "full":
            mel = F.pad(mel, (0, 0, 0, self.form.longest - mel.shape[1]))
        frames = torch.tensor([len(clip) for clip in clips])
        return {"mel": mel, "frames": frames} | self._label(torch.as_tensor(indices))

    def _label(self, place: int | Tensor) -> Batch:
        return {} if self.labels is None else {"label": self.labels[place]}

    def name(self, index: int) -> str:
        """What a message calls that clip: its file, or where it lies."""
        return self.source.name(int(self.rows[index]))

    def _frames(self, index: int) -> Tensor:
        """[T, F] of one clip, T its own."""
        row = int(self.rows[index])
        found = None if self.memory is None else self.memory.get(row)
        if found is None:
            found = _read_frames(self.source, row, self.form)
            if self.memory is not None:
                self.memory[row] = found
        if isinstance(found, str):
            raise UnreadableSample(found)
        return found


def _read_frames(source: Source, row: int, form: FrontEnd) -> Tensor | str:
    """The frames of a clip filled up to whole tokens, or a line that says why there are none."""
    token, most = form.step * form.hop, form.longest * form.hop
    try:
        wave = source.read(row, form.sample_rate, most)[:most]
        if len(wave) <= token:
            seconds = len(wave) / form.sample_rate
            raise ValueError(
                f"{seconds:.3f} s are not more than one token of {token / form.sample_rate:.3f} s, so there is nothing "
                "to predict"
            )
        return log_mel(F.pad(wave, (0, -len(wave) % token)), form)
    except (OSError, ValueError) as error:
        return f"{source.name(row)}: {' '.join(str(error).split())}"


@lru_cache(maxsize=4)
def _memory(source: Source, form: FrontEnd) -> dict[int, Tensor | str]:
    """What has been read of a source; all data sets of it share this."""
    return {}


def open_audio(
    source: SourceName,
    split: str,
    *,
    form: FrontEnd,
    root: str | None = None,
    held_out_speaker: str | None = None,
    held_out: float = HELD_OUT,
    padding: Padding = "batch",
    in_memory: bool = False,
    limit: int | None = None,
) -> Clips:
    """The clips of a split as log-mel frames.

    Args:
        source, root, held_out_speaker, held_out: see `open_source`.
        split: "train" or "test".
        padding: see `Clips`.
        in_memory: keep the frames of every clip once it has been read.
        limit: at most this many training clips, drawn by a permutation that never changes.

    Raises:
        UserError: the data can't be found, or are in none of the layouts.
        UnreadableSample: from the data set, on access to a clip that can't be read, is empty, silent, not longer than a
            token, or holds NaN.
    """
    stored = open_source(source, split, root=root, held_out_speaker=held_out_speaker, held_out=held_out)
    count = len(stored)
    rows = torch.arange(count)
    if limit is not None and split == "train":
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]
    return Clips(stored, rows, form, padding, _memory(stored, form) if in_memory else None)


# --------------------------------------------------------------------------------------------------------- sources


class Source(Hashable, Protocol):
    """Labels and waveforms."""

    @property
    def labels(self) -> Tensor | None:
        """[n] int64, or float32 for numbers to predict; None where there are none."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Place k names label k; None where labels are no classes."""

    def __len__(self) -> int:
        """How many clips there are."""

    def read(self, row: int, sample_rate: int, most: int) -> Tensor:
        """The waveform of a row, one channel, [n] float32 at that rate; no more than about its first `most` points."""

    def name(self, row: int) -> str:
        """What a message calls that row."""


@dataclass(frozen=True, eq=False)
class Recordings:
    """Audio files. Their paths are a NumPy array: a list of strings would be copied into every worker."""

    paths: np.ndarray[tuple[int], np.dtype[np.str_]]
    labels: Tensor | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int, sample_rate: int, most: int) -> Tensor:
        return read_file(self.name(row), sample_rate, most)

    def name(self, row: int) -> str:
        return str(self.paths[row])


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Tones, rising and falling chirps and pulsed tones of 0.4 to 0.8 s under white noise, made from (seed, row).

    Pitch (200 to 1,600 Hz), loudness and length are drawn for each clip whatever its class, so that only what happens
    over time tells the class.
    """

    seed: int
    labels: Tensor
    classes: tuple[str, ...] = SYNTHETIC_CLASSES

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int, sample_rate: int, most: int) -> Tensor:
        clean, noise = self.parts(row, sample_rate)
        return clean + noise

    def parts(self, row: int, sample_rate: int) -> tuple[Tensor, Tensor]:
        """The clip without its noise, and the noise of standard deviation SYNTHETIC_NOISE; [n] float32 each."""
        draw = np.random.default_rng((self.seed, row))
        kind = SYNTHETIC_CLASSES[int(self.labels[row])]
        time = np.arange(int(draw.uniform(0.4, 0.8) * sample_rate)) / sample_rate
        octaves = {"rising": 1.0, "falling": -1.0}.get(kind, 0.0) * time
        pitch = 200 * 8 ** draw.uniform() * 2**octaves
        wave = draw.uniform(0.2, 0.8) * np.sin(2 * np.pi * (np.cumsum(pitch) / sample_rate + draw.uniform()))
        if kind == "pulsed":
            wave *= 0.5 + 0.5 * np.sin(2 * np.pi * (5 * time + draw.uniform()))
        noise = SYNTHETIC_NOISE * draw.standard_normal(len(time))
        return torch.from_numpy(wave.astype(np.float32)), torch.from_numpy(noise.astype(np.float32))

    def name(self, row: int) -> str:
        return f"synthetic:{row}"


def read_file(path: str, sample_rate: int, most: int) -> Tensor:
    """The first `most` points of an audio file, its channels averaged, resampled; [n] float32.

    Raises:
        OSError, ValueError: it can't be read, or there is nothing in it to learn from.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = int(file.samplerate)
            _check_rate(rate, sample_rate)
            points = file.read(math.ceil(most * rate / sample_rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if not os.path.isfile(path):
            raise ValueError("there is no such file") from error
        raise ValueError(error.error_string) from error
    wave = torch.from_numpy(points.mean(1))
    if not len(wave):
        raise ValueError("holds no samples")
    if not wave.isfinite().all():
        raise ValueError("holds NaN or infinite samples")
    if wave.min() == wave.max():
        raise ValueError("is silent: all of its samples are equal")
    resampled: Tensor = wave if rate == sample_rate else _resampling(rate, sample_rate)(wave)
    return resampled


def _check_rate(rate: int, wanted: int) -> None:
    common = math.gcd(rate, wanted)
    if not 1000 <= rate <= 1_000_000 or (wanted // common) * (rate // common) > _LARGEST_KERNEL:
        raise ValueError(
            f"its header says {rate} samples a second, which can't be brought to data.sample_rate={wanted}; "
            "mend the header"
        )


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _resampling(rate: int, wanted: int) -> Resample:
    return Resample(rate, wanted)


def open_source(
    source: SourceName,
    split: str,
    *,
    root: str | None = None,
    held_out_speaker: str | None = None,
    held_out: float = HELD_OUT,
) -> Source:
    """Where the clips of a split come from; what has been opened once is kept.

    Args:
        source: "synthetic" (see `Synthetic`) or "folder".
        split: "train" or "test" (held out).
        root: for "folder",
            - a folder with class folders, `train/<class>/*` and `val/<class>/*`, or with `train/*` and `val/*` for
              clips without labels;
            - a folder with files of FSDD's naming, `{digit}_{speaker}_{index}.wav` (there, in fsdd/ or in recordings/),
              whose recordings 0 to 4 of each digit and speaker are held out;
            - a CSV file with the columns path (seen from its folder) and split and, where clips have labels, label:
              classes, or numbers to predict where every one of them is written with a decimal point;
            - `<class>/*` alone, two or more files in each of two or more class folders: a share of each is held out;
            - any other folder with audio files in it, at any depth: clips without labels, of which a share is held out.
            The held-out split may be called val, validation or test.
        held_out_speaker: with FSDD's naming, hold out all recordings of this speaker instead.
        held_out: the share of clips that is held out where nothing else says which, those whose paths (seen from
            `root`) have the lowest hashes: moving the folder changes nothing, and a new file hardly anything. Where
            several files are of one recording, divide them yourself, or the same sound is in both splits.

    Raises:
        UserError: there is no such data, or they are in none of these layouts, or the classes of the splits differ.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    if source == "synthetic":
        return _open_synthetic(split)
    if root is None:
        raise UserError("data.source=folder needs data.root=DIR, the folder that holds the audio files")
    return _open_folder(root, split, held_out_speaker, held_out)


@lru_cache(maxsize=2)
def _open_synthetic(split: str) -> Synthetic:
    return Synthetic(list(SPLITS).index(split), torch.arange(SYNTHETIC_COUNT[split]) % len(SYNTHETIC_CLASSES))


@lru_cache(maxsize=4)
def _open_folder(root: str, split: str, held_out_speaker: str | None, held_out: float) -> Recordings:
    place = Path(root).expanduser()
    if not place.exists():
        raise UserError(f"data.root={root}: there is no such folder or CSV file; give the one that holds the audio")
    fsdd = None if place.is_file() else _fsdd_files(place)
    if fsdd:
        return _open_fsdd(root, fsdd, split, held_out_speaker)
    if held_out_speaker is not None:
        raise UserError(f"data.held_out_speaker needs files of FSDD's naming, and data.root={root} holds none")
    if place.is_file():
        rows = _manifest_rows(place)
        return _recordings(root, rows, split, numbers=all(NUMBER.fullmatch(label) for _, label, _ in rows))
    folders = {each: next((place / n for n in names if (place / n).is_dir()), None) for each, names in SPLITS.items()}
    if all(folders.values()):
        rows = [(path, label, each) for each, folder in folders.items() if folder for path, label in _tree(folder)]
        return _recordings(root, rows, split)
    if not any(folders.values()) and (files := _sounds(place)):
        return _recordings(root, _divided(root, place, files, held_out), split)
    raise UserError(
        f"data.root={root}: looked for train/<class>/* or train/* with the same in val/ (or validation/, test/), for "
        "files named {digit}_{speaker}_{index}.wav, and for a folder of audio files without train/ and val/, but found "
        "none complete; a CSV manifest is given as data.root=FILE.csv"
    )


def _recordings(root: str, rows: Sequence[Row], split: str, *, numbers: bool = False) -> Recordings:
    """A split of (path, label or "", "train" or "test"); classes are numbered in the order of their names."""
    names = {each: sorted({label for _, label, part in rows if part == each}) for each in SPLITS}
    for each, found in names.items():
        if not found:
            raise UserError(
                f"data.root={root}: no audio file ({', '.join(SUFFIXES)}) in the "
                f"{'training' if each == 'train' else 'held-out'} split"
            )
    mine = [(path, label) for path, label, part in rows if part == split]
    paths = np.array([path for path, _ in mine])
    if names["train"] == names["test"] == [""]:
        return Recordings(paths, None, None)
    if numbers:
        return Recordings(paths, torch.tensor([float(label) for _, label in mine]), None)
    alone = sorted(set(names["test"]) ^ set(names["train"]))
    if "" in alone:
        raise UserError(f"data.root={root}: clips of one split have labels, and those of the other none; mend that")
    if alone:
        raise UserError(f"data.root={root}: both splits need the same classes; only one has {', '.join(alone[:6])}")
    classes = names["train"]
    number = {label: place for place, label in enumerate(classes)}
    return Recordings(paths, torch.tensor([number[label] for _, label in mine]), tuple(classes))


def _tree(folder: Path) -> list[tuple[str, str]]:
    """(path, class) of all audio files in the class folders, sorted; without class folders those there, of class ""."""
    labels = [entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    found = sorted((path, label) for label in labels for path in _sounds(folder / label))
    return found or [(path, "") for path in _sounds(folder)]


def _sounds(folder: Path) -> list[str]:
    """Paths of the audio files at any depth, sorted; hidden files and folders are left out."""
    return sorted(
        path
        for parent, _, files in os.walk(folder, followlinks=True)
        for path in (os.path.join(parent, file) for file in files if file.lower().endswith(SUFFIXES))
        if not any(part.startswith(".") for part in Path(os.path.relpath(path, folder)).parts)
    )


def _divided(root: str, folder: Path, files: Sequence[str], held_out: float) -> list[Row]:
    """Files that nobody divided: of every class those whose paths have the lowest hashes are held out.

    Their folders are their classes where all lie one folder below `folder`, two or more in each of two or more; else
    there are no labels.
    """
    if len(files) < 2:
        raise UserError(f"data.root={root} holds one audio file; two are wanted, for one of them is held out")
    seen = {path: Path(os.path.relpath(path, folder)) for path in files}
    counts = Counter(path.parts[0] for path in seen.values() if len(path.parts) == 2)
    classes = len(counts) > 1 and counts.total() == len(files) and min(counts.values()) > 1
    alike: dict[str, list[str]] = {}
    for path in sorted(files, key=lambda path: hashlib.sha256(str(seen[path]).encode()).digest()):
        alike.setdefault(seen[path].parts[0] if classes else "", []).append(path)
    held = {path for each in alike.values() for path in each[: min(max(round(held_out * len(each)), 1), len(each) - 1)]}
    return [(path, seen[path].parts[0] if classes else "", "test" if path in held else "train") for path in files]


def _manifest_rows(file: Path) -> list[Row]:
    known = {name: each for each, names in SPLITS.items() for name in names}
    rows: list[Row] = []
    bare = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            missing = [name for name in ("path", "split") if name not in (table.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{file}: the first line must name the columns path and split, and label where clips have labels; "
                    f"no {missing[0]}"
                )
            for number, row in enumerate(table, 2):
                path, label, split = (row.get(name) or "" for name in ("path", "label", "split"))
                if not path or split not in known:
                    raise UserError(
                        f"{file}, row {number}: needs a path and a split of {', '.join(known)}, not {path!r}, {split!r}"
                    )
                bare += [number] * (not label)
                rows.append((str(file.parent / path), label, known[split]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a readable CSV file ({error}); save it as UTF-8") from error
    if 0 < len(bare) < len(rows):
        raise UserError(f"{file}, row {bare[0]}: no label, and other rows have one; give every row one, or none")
    return rows


def _fsdd_files(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    for place in (folder, folder / "fsdd", folder / "recordings"):
        files = sorted(place.glob("*.wav"))
        named = [(file, match) for file in files if (match := FSDD_NAME.fullmatch(file.name))]
        if named:
            other = set(files) - {file for file, _ in named}
            if other:
                raise UserError(
                    f"{min(other)}: beside files named {{digit}}_{{speaker}}_{{index}}.wav; rename or remove"
                )
            return named
    return []


def _open_fsdd(
    root: str, files: Sequence[tuple[Path, re.Match[str]]], split: str, held_out_speaker: str | None
) -> Recordings:
    speakers = sorted({match["speaker"] for _, match in files})
    if held_out_speaker is not None and held_out_speaker not in speakers:
        raise UserError(f"data.held_out_speaker={held_out_speaker}: the speakers are {', '.join(speakers)}")
    rows = []
    for file, match in files:
        index_held = held_out_speaker is None and int(match["index"]) < FSDD_TEST
        held = index_held or match["speaker"] == held_out_speaker
        rows.append((str(file), match["digit"], "test" if held else "train"))
    return _recordings(root, rows, split)
