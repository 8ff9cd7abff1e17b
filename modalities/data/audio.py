"""Audio as samples: found, read, mixed to one channel, resampled, and turned into log-mel frames.

Shapes: n points of a waveform, T frames, F mel bands, B samples, C classes. Every data set is map-style and gives
{"mel": float32 [T, F], "frames": int64 scalar} and, where there are labels, "label", an int64 scalar (a class), a bool
[C] (several) or a float32 scalar (a number to predict): clips are padded with silence (zeros) at their end, and
"frames" says how many are real. A source knows the label of every row and gives the row's waveform.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from modalities.data.audio_files import KIND, SUFFIXES, listen, read_file
from modalities.data.audio_sets import PIECE, Keywords, SetName, Subset, read_set, set_folds
from modalities.data.labelled import (
    FOLD,
    SPLITS,
    LabelledSource,
    Reading,
    Row,
    folds_of,
    held_fold,
    named_folds,
    of_split,
    read_manifest,
    refuse_fold,
    say_empty,
    say_passed,
    tree,
)
from modalities.data.listing import (
    Contents,
    Passed,
    file_sizes,
    fingerprint,
    is_hidden,
    list_files,
    natural_key,
    printable,
    read_whole,
    say,
    subfolders,
)
from modalities.data.spectrogram_augment import DRAWN, draw
from nepa_core.basics import Batch, UnreadableSample, UserError, some
from nepa_core.samples import some_rows

SourceName = Literal["synthetic", "folder"] | SetName
Padding = Literal["batch", "full"]

FSDD_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<index>\d+)\.wav")
FSDD_TEST = 5
"""Recordings 0 to 4 of each digit and speaker are FSDD's test split."""

FLOOR = 1e-6
"""Mel power that counts as silence, above the rounding of 16 bits (1e-8) and below any microphone's noise."""
HELD_OUT = 0.1
"""The share of clips that is held out where nothing says which."""

_UPDATES = 30  # of the power behind mel bands: then its bands are right to a thousandth
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
def _mel_spectrogram(form: FrontEnd) -> nn.Module:
    from torchaudio.transforms import MelSpectrogram  # slow to import

    mel: nn.Module = MelSpectrogram(
        form.sample_rate, n_fft=form.n_fft, win_length=form.window, hop_length=form.hop, n_mels=form.bands, center=False
    )
    return mel


def empty_bands(form: FrontEnd) -> int:
    """How many mel bands are so narrow that no frequency of the spectrum falls into them."""
    from torchaudio.functional import melscale_fbanks

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


def waveform(frames: Tensor, form: FrontEnd) -> Tensor:
    """A waveform [B, T * hop] float32 between -1 and 1 of which `log_mel` is about `frames` [B, T, F]; no randomness.

    Power that is not negative and gives these mel bands is found by multiplicative updates (Lee and Seung 2001, for
    the Kullback-Leibler divergence), phases by torchaudio's Griffin-Lim. Back in `log_mel`, synthetic clips of 8 kHz
    and 40 bands are off by 0.13 on average; by 0.40 with torchaudio's `InverseMelScale`, which cuts off what is
    negative in a least-squares answer.

    Raises:
        UserError: windows do not overlap, so that a spectrogram says nothing of some points.
    """
    from torchaudio.transforms import GriffinLim  # slow to import

    if form.hop >= form.window:
        raise UserError("data.hop_ms is not less than data.window_ms: no sound can be made of such frames")
    filters = _mel_spectrogram(form).get_buffer("mel_scale.fb").to(frames.device)  # [n_fft / 2 + 1, F]
    loudest = math.log1p(form.n_fft * form.window / FLOOR)  # all power of a waveform between -1 and 1 in one band
    mel = FLOOR * frames.float().clamp(0, loudest).transpose(1, 2).expm1()
    mel = torch.cat((mel, mel[..., -1:]), -1)  # the frame centred on the end, which `log_mel` leaves out
    power, tiny = (filters / filters.sum(0)) @ mel, 1e-12
    for _ in range(_UPDATES):
        power = (
            power
            * (filters @ (mel / (filters.T @ power).clamp(min=tiny)))
            / filters.sum(1, keepdim=True).clamp(min=tiny)
        )
    griffin_lim = GriffinLim(form.n_fft, win_length=form.window, hop_length=form.hop, rand_init=False)
    return cast(Tensor, griffin_lim.to(frames.device)(power)).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------- data sets


class Clips(Dataset[Batch]):
    """Clips as log-mel frames.

    Args:
        rows: [S] int64, the row of the source behind each sample.
        padding: pad a batch to its longest clip, or every batch to `form.longest`. A single sample always has
            `form.longest` frames, so that any collate can stack it.
        memory: row -> frames of a clip, or why it can't be read; filled on access. None keeps nothing.
        augmented: draw what is done to each on the device, see `modalities.data.spectrogram_augment`.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        form: FrontEnd,
        padding: Padding,
        memory: dict[int, Tensor | str] | None,
        *,
        augmented: bool = False,
    ) -> None:
        self.source, self.rows, self.form, self.augmented = source, rows, form, augmented
        self.labels = source.labels
        if source.labels is not None and not torch.equal(
            rows, torch.arange(len(source))
        ):  # else a copy of 1 GB: AudioSet
            self.labels = source.labels[rows]
        self.padding, self.memory = padding, memory

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        clip = self._frames(index)
        mel = F.pad(clip, (0, 0, 0, self.form.longest - len(clip)))
        return {"mel": mel, "frames": torch.tensor(len(clip))} | self._beside(index)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once; raises UnreadableSample for the first clip in it that can't be read."""
        clips = [self._frames(index) for index in indices]
        mel = pad_sequence(clips, batch_first=True)
        if self.padding == "full":
            mel = F.pad(mel, (0, 0, 0, self.form.longest - mel.shape[1]))
        frames = torch.tensor([len(clip) for clip in clips])
        return {"mel": mel, "frames": frames} | self._beside(torch.as_tensor(indices))

    def _beside(self, place: int | Tensor) -> Batch:
        label = {} if self.labels is None else {"label": self.labels[place]}
        return label | ({DRAWN: draw(*torch.as_tensor(place).shape)} if self.augmented else {})

    def every_label(self) -> Tensor | None:
        """[S], or [S, C] of several classes."""
        return self.labels

    def name(self, index: int) -> str:
        """What a message calls that clip: its file, or where it lies."""
        return self.source.name(int(self.rows[index]))

    def contents(self) -> Contents | None:
        """The stored bytes of every clip; None where there are none."""
        paths = self._paths()
        return None if paths is None else Contents(file_sizes(paths), self._stored, self.name)

    def _stored(self, index: int) -> bytes:
        """The bytes of a clip's file, and of a piece where it begins, too."""
        source, row = cast(Recordings, self.source), int(self.rows[index])
        start = source.start(row)
        return read_whole(str(source.paths[row])) + (b"" if start is None else repr(start).encode())

    def fingerprint(self) -> str:
        """Changes where other files are listed, or one of another size or label."""
        paths = self._paths()
        if paths is None:
            return f"{len(self)} samples"
        top = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        labels = None if self.labels is None else self.labels.numpy()
        return fingerprint((os.path.relpath(path, top) for path in paths), file_sizes(paths), labels)

    def _paths(self) -> list[str] | None:
        return self.source.paths[self.rows.numpy()].tolist() if isinstance(self.source, Recordings) else None

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
    fold: str | None = None,
    subset: Subset = "full",
    keywords: Keywords = "all",
    augmented: bool = False,
) -> Clips:
    """The clips of a split as log-mel frames.

    Args:
        source, root, held_out_speaker, held_out, fold, subset, keywords: see `open_source`.
        split: "train" or "test".
        padding, augmented: see `Clips`.
        in_memory: keep the frames of every clip once it has been read.
        limit: at most this many training clips, drawn by a permutation that never changes.

    Raises:
        UserError: the data can't be found, or are in none of the layouts.
        UnreadableSample: from the data set, on access to a clip that can't be read, is empty, silent, not longer than a
            token, or holds NaN.
    """
    stored = open_source(
        source,
        split,
        root=root,
        held_out_speaker=held_out_speaker,
        held_out=held_out,
        fold=fold,
        subset=subset,
        keywords=keywords,
    )
    rows = some_rows(len(stored), limit if split == "train" else None)
    memory = _memory(stored, form) if in_memory else None
    return Clips(stored, rows, form, padding, memory, augmented=augmented)


def open_files(paths: Sequence[str], form: FrontEnd, padding: Padding = "batch") -> Clips:
    """Sound files by name, without labels."""
    return Clips(Recordings(np.array(paths), None, None), torch.arange(len(paths)), form, padding, None)


# --------------------------------------------------------------------------------------------------------- sources


class Source(LabelledSource, Protocol):
    """Labels and waveforms."""

    def read(self, row: int, sample_rate: int, most: int) -> Tensor:
        """The waveform of a row, one channel, [n] float32 at that rate; no more than about its first `most` points."""


@dataclass(frozen=True, eq=False)
class Recordings:
    """Audio files, or pieces of `PIECE` seconds that begin at `starts` [n] in them, where that is not negative.

    Their paths are a NumPy array: a list of strings would be copied into every worker.
    """

    paths: np.ndarray[tuple[int], np.dtype[np.str_]]
    labels: Tensor | None
    classes: tuple[str, ...] | None
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int, sample_rate: int, most: int) -> Tensor:
        path, start = str(self.paths[row]), self.start(row)
        if start is None:
            return read_file(path, sample_rate, most)
        return read_file(path, sample_rate, min(most, round(PIECE * sample_rate)), start=start)

    def start(self, row: int) -> float | None:
        """Where in its file a piece begins, in seconds; None of a whole file."""
        return None if self.starts is None or self.starts[row] < 0 else float(self.starts[row])

    def name(self, row: int) -> str:
        return printable(str(self.paths[row]))


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


def open_source(
    source: SourceName,
    split: str,
    *,
    root: str | None = None,
    held_out_speaker: str | None = None,
    held_out: float = HELD_OUT,
    fold: str | None = None,
    subset: Subset = "full",
    keywords: Keywords = "all",
) -> Source:
    """Where the clips of a split come from; what has been opened once is kept.

    Args:
        source: "synthetic" (see `Synthetic`), "folder", or a set in its own layout, see `modalities.data.audio_sets`.
        split: "train" or "test" (held out).
        root: of a set the folder it came in; for "folder",
            - a folder with class folders, `train/<class>/*` and `val/<class>/*`, or with `train/*` and `val/*` for
              clips without labels;
            - a folder with files of FSDD's naming, `{digit}_{speaker}_{index}.wav` (there, in fsdd/ or in recordings/),
              whose recordings 0 to 4 of each digit and speaker are held out;
            - a CSV file with the columns path (seen from its folder) and split and, where clips have labels, label:
              classes, or numbers to predict where every one of them is written with a decimal point; or labels,
              any number of classes with ";" between them. A column fold may stand in place of split, or beside it;
            - `<class>/*` alone, two or more class folders: a share of each is held out. A class of one file and the
              few files that lie beside the folders (a tenth at most) are left out;
            - folders fold1, fold2, ... (or split1, part1), with class folders in them or without: whole folds are held
              out, the first ones, or the one that `fold` names;
            - any other folder with audio files in it, at any depth: clips without labels, of which a share is held out.
            The held-out split may be called val, validation or test; of several the first in this order, and the rest
            are left aside. What is passed over (`modalities.data.listing`) or left out is said.
        held_out_speaker: with FSDD's naming, hold out all recordings of this speaker instead.
        held_out: the share of clips that is held out where nothing else says which, those whose paths (seen from
            `root`) have the lowest hashes: moving the folder changes nothing, and a new file hardly anything. Where
            several files are of one recording, divide them yourself, or the same sound is in both splits.
        fold: of `audio_folds`, to hold out.
        subset, keywords: of AudioSet and of Speech Commands, see `modalities.data.audio_sets.read_set`.

    Raises:
        UserError: there is no such data, or they are in none of these layouts, the classes of the splits differ, or a
            manifest has one clip in both of them.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    if source == "synthetic":
        return _open_synthetic(split)
    if root is None:
        raise UserError(f"data.source={source} needs data.root=DIR, the folder that holds the audio files")
    if source != "folder":
        return _open_set(source, root, split, fold, subset, keywords)
    return _open_folder(root, split, held_out_speaker, held_out, fold)


def audio_folds(source: SourceName, root: str | None) -> tuple[str, ...]:
    """Names of the folds that clips are divided into, in their order; () for none.

    Raises:
        UserError: there is no such data.
    """
    if source == "synthetic" or root is None:
        return ()
    return folds_of(root, KIND) if source == "folder" else set_folds(source, root)


@lru_cache(maxsize=4)
def _open_set(name: SetName, root: str, split: str, fold: str | None, subset: Subset, keywords: Keywords) -> Recordings:
    found = read_set(name, root, split, fold=fold, subset=subset, keywords=keywords)
    listen(root, found.paths)
    return Recordings(np.array(found.paths), found.labels, found.classes, found.starts)


@lru_cache(maxsize=2)
def _open_synthetic(split: str) -> Synthetic:
    return Synthetic(list(SPLITS).index(split), torch.arange(SYNTHETIC_COUNT[split]) % len(SYNTHETIC_CLASSES))


@lru_cache(maxsize=4)
def _open_folder(root: str, split: str, held_out_speaker: str | None, held_out: float, fold: str | None) -> Recordings:
    place = Path(root).expanduser()
    if not place.exists():
        raise UserError(f"data.root={root}: there is no such folder or CSV file; give the one that holds the audio")
    fsdd = None if place.is_file() else _fsdd_files(place)
    if fsdd:
        refuse_fold(root, fold)
        return _open_fsdd(root, fsdd, split, held_out_speaker)
    if held_out_speaker is not None:
        raise UserError(f"data.held_out_speaker needs files of FSDD's naming, and data.root={root} holds none")
    if place.is_file():
        rows, reading = read_manifest(place, KIND, fold)
        return _recordings(root, rows, split, reading)
    passed = Passed()
    folders = {each: [place / n for n in names if (place / n).is_dir()] for each, names in SPLITS.items()}
    if all(folders.values()):
        refuse_fold(root, fold)
        rows = [(path, label, each) for each, found in folders.items() for path, label in tree(found[0], KIND, passed)]
        say_passed(root, passed, [folder.name for folder in folders["test"]])
        return _recordings(root, rows, split)
    if not any(folders.values()):
        files, passed = list_files(place, SUFFIXES)
        say_passed(root, passed)
        if files:
            rows = _divided(root, place, files, held_out, fold)
            _say_without_files(place, files, rows)
            return _recordings(root, rows, split)
    raise UserError(
        f"data.root={root}: looked for train/<class>/* or train/* with the same in val/ (or validation/, test/), for "
        "files named {digit}_{speaker}_{index}.wav, and for a folder of audio files without train/ and val/, but found "
        "none complete; a CSV manifest is given as data.root=FILE.csv"
    )


def _say_without_files(folder: Path, files: Sequence[str], rows: Sequence[Row]) -> None:
    """Name the folders that would be classes if they held a file that is read."""
    held = {os.path.relpath(path, folder).split(os.sep)[0] for path in files}
    empty = [printable(name) for name in subfolders(folder) if name not in held]
    if {label for _, label, _ in rows} <= held:
        say_empty(folder, empty, KIND)


def _recordings(root: str, rows: Sequence[Row], split: str, reading: Reading = "class") -> Recordings:
    """A split of (path, label or "", "train" or "test")."""
    found = of_split(root, rows, split, KIND, reading)
    listen(root, found.paths)
    return Recordings(np.array(found.paths), found.labels, found.classes)


def _divided(root: str, folder: Path, files: Sequence[str], held_out: float, fold: str | None) -> list[Row]:
    """Files that nobody divided: of every class those whose paths have the lowest hashes are held out.

    `open_source` says what becomes a class.
    """
    if len(files) < 2:
        raise UserError(f"data.root={root} holds one audio file; two are wanted, for one of them is held out")
    seen = {path: os.path.relpath(path, folder) for path in files}
    parts = {path: name.split(os.sep) for path, name in seen.items()}
    lowest = parts  # seen from the lowest folder that holds all files
    while len({each[0] for each in lowest.values()}) == 1 and all(len(each) > 1 for each in lowest.values()):
        lowest = {path: each[1:] for path, each in lowest.items()}
    tops = sorted({each[0] for each in lowest.values() if len(each) > 1}, key=natural_key)
    if len(tops) > 1 and all(map(FOLD.fullmatch, tops)):
        return _by_folds(root, lowest, tops, held_out, fold)
    refuse_fold(root, fold)
    label = _classes_of(root, parts)
    alike: dict[str, list[str]] = {}
    for path in sorted(label, key=lambda path: hashlib.sha256(os.fsencode(seen[path])).digest()):
        alike.setdefault(label[path], []).append(path)
    held = {path for each in alike.values() for path in each[: min(max(round(held_out * len(each)), 1), len(each) - 1)]}
    return [(path, label[path], "test" if path in held else "train") for path in files if path in label]


def _by_folds(
    root: str, parts: dict[str, list[str]], folds: Sequence[str], held_out: float, fold: str | None
) -> list[Row]:
    """Whole folds are held out, a share of them or the one that is named: clips of one recording lie in one of them."""
    inner = {path: each for path, each in parts.items() if len(each) > 1}
    names = {each[1] for each in inner.values() if len(each) > 2}
    classes = len(names) > 1 and all(len(each) > 2 for each in inner.values())
    named = named_folds(folds)
    some_of = folds[: min(max(round(held_out * len(folds)), 1), len(folds) - 1)]
    held = some_of if fold is None else [named[held_fold(root, list(named), fold)]]
    lost = len(parts) - len(inner)
    say(
        f"{root}: {folds[0]} to {folds[-1]} are folds and no classes; {some(held)} held out, "
        + ("classes are the folders in them" if classes else "no labels: no class folders are in all of them")
        + (f"; {lost} files beside them are left out" if lost else "")
    )
    return [(path, each[1] if classes else "", "test" if each[0] in held else "train") for path, each in inner.items()]


def _classes_of(root: str, parts: dict[str, list[str]]) -> dict[str, str]:
    """path -> class of the files that count; "" for all of them where folders are no classes.

    Args:
        parts: path -> folders and name, seen from the root.
    """
    inner = {path: each for path, each in parts.items() if len(each) > 1}
    counts = Counter(each[0] for each in inner.values())
    if len(counts) < 2:
        return dict.fromkeys(parts, "")
    loose = sorted(path for path, each in parts.items() if len(each) == 1)
    single = sorted(name for name, count in counts.items() if count == 1)
    deep = sum(len(each) > 2 for each in inner.values())
    none = f"{root}: no labels, though there are {len(counts)} folders:"
    if 2 * deep > len(inner):
        say(f"{none} most files lie deeper in them; name classes by a CSV file")
    elif len(loose) > max(len(parts) // 10, 1):
        say(f"{none} {len(loose):,} of {len(parts):,} files lie beside them; move these away, or into folders")
    elif len(counts) - len(single) < 2:
        say(f"{none} all but {len(counts) - len(single)} hold one file, and one of each class is held out")
    else:
        if loose:
            say(f"{root}: left out: {len(loose)} beside the class folders, such as {printable(loose[0])}")
        if single:
            say(f"{root}: left out, for one file can't be in both splits: {some(list(map(printable, single)))}")
        return {path: each[0] for path, each in inner.items() if counts[each[0]] > 1}
    return dict.fromkeys(parts, "")


def _fsdd_files(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    for place in (folder, folder / "fsdd", folder / "recordings"):
        files = [file for file in sorted(place.glob("*.wav")) if not is_hidden(file.name) and file.is_file()]
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
