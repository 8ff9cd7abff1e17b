"""Audio data sets in the layouts in which they are published: AudioSet, ESC-50, Speech Commands, IEMOCAP.

Shapes: n clips of a split, C classes. What a list of a set names and is not on the disk is left out, counted and said.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from modalities.data.audio_files import SUFFIXES
from modalities.data.labelled import held_fold, refuse_fold
from modalities.data.listing import (
    data_folder,
    file_sizes,
    list_files,
    list_groups,
    natural_key,
    printable,
    say,
    subfolders,
)
from modalities.data.text_files import read_lines
from nepa_core.basics import UserError, some

SetName = Literal["audioset", "esc50", "speech_commands", "iemocap"]
Subset = Literal["balanced", "unbalanced", "full"]
Keywords = Literal["all", "ten"]

AUDIOSET_PARTS: dict[Subset, tuple[str, ...]] = {
    "balanced": ("balanced_train_segments",),
    "unbalanced": ("unbalanced_train_segments",),
    "full": ("balanced_train_segments", "unbalanced_train_segments"),
}
AUDIOSET_EVAL = "eval_segments"

TEN_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
NOISE = "_background_noise_"
PIECE = 1.0
"""Seconds of a piece of background noise."""
_TENTH = 10  # clips of the ten words to one of silence, and held out to one unknown word
_HELD_NOISE = 0.2  # the share of each noise file, at its end, that pieces of the held-out split are cut from
_VALIDATION, _TESTING = 10.0, 10.0  # per cent
_HASHES = 2**27 - 1

EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry"}
IEMOCAP_CLASSES = ("neutral", "happy", "sad", "angry")
_TURN = re.compile(r"\[\s*[\d.]+ - [\d.]+\s*\]\t(?P<name>[^\t/\\]+)\t(?P<emotion>\w+)\t\[[^\]]*\]\s*")
_SESSION = re.compile(r"Session(?P<number>\d+)")


class Found(NamedTuple):
    """The clips of a split.

    Attributes:
        paths: of their files.
        labels: [n] int64, or bool [n, C] where a clip has several classes.
        classes: place k names label k, or column k.
        starts: [n] float64, where in its file a piece of `PIECE` seconds begins, negative for a whole file; None where
            all are whole.
    """

    paths: list[str]
    labels: Tensor
    classes: tuple[str, ...]
    starts: Tensor | None = None


def read_set(
    name: SetName,
    root: str,
    split: str,
    *,
    fold: str | None = None,
    subset: Subset = "full",
    keywords: Keywords = "all",
) -> Found:
    """The clips of a split of a set, read from its folder as it came.

    Args:
        name:
            - "audioset": the set's own `balanced_train_segments.csv`, `unbalanced_train_segments.csv`,
              `eval_segments.csv` and `class_labels_indices.csv`, and clips anywhere below, in folders of any name: what
              a file is called says which segment it is. That is YTID, or YTID_START, or YTID_START_END, with a Y in
              front or without; times are seconds ("30", "30.0", "30.000") or milliseconds ("30000"), as they stand in
              the CSV file. A clip has several classes; held out is eval.
            - "esc50": `meta/esc50.csv` and `audio/*.wav`; one of its five folds is held out.
            - "speech_commands": class folders with `testing_list.txt` (held out) and `validation_list.txt` (left
              aside). Where there is neither list, the set's own rule divides the clips: by the SHA-1 of a file's name
              up to `_nohash_`, 10 % to validation and 10 % to testing.
            - "iemocap": `Session1` to `Session5`, each with `dialog/EmoEvaluation/*.txt` and `sentences/wav/*/*.wav`.
              Four classes: neutral, happy (with excited), sad, angry; other emotions are left out. One session is held
              out.
        fold: of `set_folds`, to hold out; None takes the first.
        subset: of AudioSet, what trains.
        keywords: of Speech Commands, "all" words, each a class, or the "ten" (`TEN_WORDS`) with "unknown" (all other
            words) and "silence" (pieces of a second of `_background_noise_`), the 12 classes of its first version. Of
            silence there is, in each split, one clip to ten of these words, and held out of unknown, too: so many as
            in the set's own test set (Warden 2018, arXiv 1804.03209). Both are drawn with a fixed seed, and held-out
            pieces come from the last fifth of every noise file, training ones from the rest.

    Raises:
        UserError: there is no such folder, a list is missing or has a torn line, no clip is there, or no such fold.
    """
    if name == "audioset":
        refuse_fold(f"{name} in {root}", fold)
        return _audioset(root, split, subset)
    if name == "speech_commands":
        refuse_fold(f"{name} in {root}", fold)
        return _speech_commands(root, split, keywords)
    rows = _folded(name, root)
    held = held_fold(root, _folds_of(rows), fold)
    mine = [row for row in rows.clips if (row.fold == held) == (split == "test")]
    return Found([row.path for row in mine], torch.tensor([row.label for row in mine]), rows.classes)


def set_folds(name: SetName, root: str) -> tuple[str, ...]:
    """The folds of a set in their order: of ESC-50, and the sessions of IEMOCAP by their numbers; else ().

    Raises:
        UserError: as of `read_set`.
    """
    return _folds_of(_folded(name, root)) if name in ("esc50", "iemocap") else ()


class _Clip(NamedTuple):
    path: str
    label: int
    fold: str


class _Folded(NamedTuple):
    """A set that is divided into folds."""

    clips: list[_Clip]
    classes: tuple[str, ...]


def _folded(name: SetName, root: str) -> _Folded:
    return _esc50(root) if name == "esc50" else _iemocap(root)


def _folds_of(rows: _Folded) -> tuple[str, ...]:
    return tuple(sorted({row.fold for row in rows.clips}, key=natural_key))


def _there(where: str, clips: list[_Clip]) -> list[_Clip]:
    """Those whose file is there; what is missing is counted and said."""
    sizes = file_sizes([clip.path for clip in clips])
    gone = [clip.path for clip, size in zip(clips, sizes, strict=True) if size < 0]
    _say_gone(where, len(clips), gone)
    if len(gone) == len(clips):
        raise UserError(
            f"{where}: none of its {len(clips):,} clips is there, such as {printable(clips[0].path)}"
            if clips
            else f"{where}: names no clip"
        )
    return _once(where, [clip for clip, size in zip(clips, sizes, strict=True) if size >= 0])


def _once(where: str, clips: list[_Clip]) -> list[_Clip]:
    """Each clip once; how many are named again is said.

    Raises:
        UserError: it is named again with another class or fold.
    """
    found: dict[str, _Clip] = {}
    for clip in clips:
        first = found.setdefault(clip.path, clip)
        if first != clip:
            what = "class" if first.label != clip.label else "fold"
            raise UserError(f"{where}: names {printable(clip.path)} twice, with another {what} each; leave one out")
    if again := len(clips) - len(found):
        say(f"{where}: {again:,} of {len(clips):,} clips are named again, and are taken once")
    return list(found.values())


def _say_gone(where: str | Path, count: int, gone: Sequence[str]) -> None:
    if gone:
        say(f"{where}: {len(gone):,} of {count:,} clips are not there and are left out, such as {printable(gone[0])}")


def _table(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Number in the file and cells of the rows of a CSV file, of the columns that its first line names.

    Raises:
        UserError: it is not there, a column is missing, or a row has more or fewer cells than the first line.
    """
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; data.root is the folder that holds the set as it came")
    table = csv.reader((f"{line}\n" for line in read_lines(file)), strict=True)
    try:
        head = [name.strip() for name in next(table, [])]
        if not head:
            raise UserError(f"{file}: is empty")
        if missing := [name for name in columns if name not in head]:
            raise UserError(f"{file}: the first line names no column {missing[0]}")
        for row in table:
            if row and len(row) != len(head):
                raise UserError(
                    f"{file}, row {table.line_num}: is torn, with {len(row)} cells where {len(head)} belong"
                )
            if row:
                yield table.line_num, dict(zip(head, map(str.strip, row), strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, row {table.line_num}: is torn ({error})") from error


def _numbered(file: Path, rows: Iterable[tuple[int, str, str]]) -> tuple[str, ...]:
    """Names of classes by their numbers, which are 0, 1, ... without gaps and have one name each.

    Args:
        rows: number in the file, number of the class, its name.
    """
    names: dict[int, str] = {}
    for line, number, name in rows:
        if not number.isdecimal():
            raise UserError(f"{file}, row {line}: a class is numbered {printable(number)!r}; 0, 1, ... are wanted")
        if (known := names.setdefault(int(number), name)) != name:
            raise UserError(
                f"{file}, row {line}: class {number} is called {printable(name)!r}, and {printable(known)!r} above"
            )
    gap = next((number for number in range(len(names)) if number not in names), None)
    if gap is not None:
        raise UserError(f"{file}: no class has the number {gap}, and one has {max(names)}; number them 0, 1, ...")
    return tuple(printable(names[number]) for number in sorted(names))


# -------------------------------------------------------------------------------------------------------- AudioSet


class _Segment(NamedTuple):
    """A line of a CSV file: the video, where the segment begins and ends as it is written, and its classes."""

    video: str
    start: str
    end: str
    classes: list[int]

    @property
    def name(self) -> str:
        return f"{self.video}_{self.start}"

    def names(self) -> Iterator[str]:
        """What its file may be called, without the suffix; the first that is there is taken."""
        yield from (self.video, f"Y{self.video}")
        for start, end in zip(_written(self.start), _written(self.end), strict=True):
            for name in (f"{self.video}_{start}", f"{self.video}_{start}_{end}"):
                yield from (name, f"Y{name}")


def _written(seconds: str) -> tuple[str, ...]:
    value = float(seconds)
    return f"{value:g}", f"{value:.1f}", f"{value:.3f}", f"{1000 * value:.0f}"


def _audioset(root: str, split: str, subset: Subset) -> Found:
    folder = data_folder(root, "AudioSet's CSV files and clips")
    names, number = _audioset_classes(folder / "class_labels_indices.csv")
    files = _sounds_by_name(root)
    paths: list[str] = []
    rows, columns = array("q"), array("q")  # where a clip has a class: four million in all
    taken: dict[str, str] = {}  # file -> the list that has it
    if split == "train":
        taken = {path: AUDIOSET_EVAL for _, path in _files_of(folder / f"{AUDIOSET_EVAL}.csv", number, files) if path}
    for part in AUDIOSET_PARTS[subset] if split == "train" else (AUDIOSET_EVAL,):
        file, count, gone, again = folder / f"{part}.csv", 0, list[str](), list[str]()
        for segment, path in _files_of(file, number, files):
            count += 1
            if path is None:
                gone.append(segment.name)
            elif path in taken:
                again.append(f"{segment.name}, whose file {printable(path)} is in {taken[path]}.csv")
            else:
                taken[path] = part
                rows.extend([len(paths)] * len(segment.classes))
                columns.extend(segment.classes)
                paths.append(path)
        _say_gone(file, count, gone)
        if again:
            say(f"{file}: {len(again):,} of {count:,} clips have a file that is taken, and are left out: {again[0]}")
    if not paths:
        raise UserError(
            f"data.root={root}: no clip of {'the training' if split == 'train' else 'the held-out'} split is there; "
            "it lies anywhere below and is called YTID.wav, YTID_START.wav or the like, such as --PJHxphWEs_30.wav"
        )
    labels = torch.zeros(len(paths), len(names), dtype=torch.bool)
    labels[torch.frombuffer(rows, dtype=torch.int64), torch.frombuffer(columns, dtype=torch.int64)] = True
    return Found(paths, labels, names)


def _files_of(file: Path, number: Mapping[str, int], files: Mapping[str, str]) -> Iterator[tuple[_Segment, str | None]]:
    """The segments of a list, and the file of each, or None."""
    for segment in _segments(file, number):
        yield segment, next((files[name] for name in segment.names() if name in files), None)


def _audioset_classes(file: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of the classes, and the number of each by the id that the lists of segments use."""
    rows = list(_table(file, ("index", "mid", "display_name")))
    names = _numbered(file, ((line, row["index"], row["display_name"]) for line, row in rows))
    return names, {row["mid"]: int(row["index"]) for _, row in rows}


def _segments(file: Path, number: Mapping[str, int]) -> Iterator[_Segment]:
    """The lines of a list of segments; those that begin with # are comments.

    Raises:
        UserError: the list is not there, a line is torn, or names a class that is none.
    """
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; it is one of the lists that AudioSet comes with")
    for line, text in enumerate(read_lines(file), 1):
        if not text.strip() or text.startswith("#"):
            continue
        try:
            cells = next(csv.reader([text.strip()], skipinitialspace=True, strict=True))
        except csv.Error:  # a quotation that does not end
            cells = []
        if len(cells) != 4 or not all(map(_is_time, cells[1:3])) or not cells[0] or not cells[3]:
            raise UserError(f'{file}, line {line}: is torn; a line is YTID, start, end, "labels"')
        mids = cells[3].split(",")
        if unknown := [mid for mid in mids if mid not in number]:
            raise UserError(f"{file}, line {line}: class_labels_indices.csv has no class {printable(unknown[0])}")
        yield _Segment(cells[0], cells[1], cells[2], [number[mid] for mid in mids])


def _is_time(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None


@lru_cache(maxsize=1)
def _sounds_by_name(root: str) -> dict[str, str]:
    """Name without suffix -> path of the sound files at any depth; of two with one name the first in their order."""
    listed = list_files(data_folder(root), SUFFIXES)
    found: dict[str, str] = {}
    for path in listed.paths:
        found.setdefault(os.path.splitext(os.path.basename(path))[0], path)
    if twice := len(listed.paths) - len(found):
        say(f"{root}: {twice:,} clips have the name of another one, and the first in the order of their paths is read")
    return found


# ---------------------------------------------------------------------------------------------------------- ESC-50


@lru_cache(maxsize=2)
def _esc50(root: str) -> _Folded:
    folder = data_folder(root, "ESC-50, with meta/esc50.csv and audio/")
    file = folder / "meta" / "esc50.csv"
    rows = list(_table(file, ("filename", "fold", "target", "category")))
    for line, row in rows:
        if not row["fold"].isdecimal():
            raise UserError(f"{file}, row {line}: the fold is {row['fold']!r}, and a whole number is wanted")
        if "/" in row["filename"] or not row["filename"].lower().endswith(SUFFIXES):
            raise UserError(f"{file}, row {line}: {printable(row['filename'])!r} is no name of a sound file in audio/")
    classes = _numbered(file, ((line, row["target"], row["category"]) for line, row in rows))
    clips = [_Clip(str(folder / "audio" / row["filename"]), int(row["target"]), row["fold"]) for _, row in rows]
    return _Folded(_there(str(file), clips), classes)


# -------------------------------------------------------------------------------------------------- Speech Commands


def _speech_commands(root: str, split: str, keywords: Keywords) -> Found:
    folder, clips = data_folder(root, "Speech Commands"), _spoken(root)
    wanted = "testing" if split == "test" else "training"
    if aside := sum(each == "validation" for *_, each in clips):
        say(f"{root}: {aside:,} clips of the validation split are left aside")
    mine = [(path, word) for path, word, each in clips if each == wanted]
    if not mine:
        raise UserError(f"data.root={root}: no clip of the {wanted} split of Speech Commands is there")
    if keywords == "all":
        words = tuple(sorted({word for _, word, _ in clips}))
        return Found([path for path, _ in mine], torch.tensor([words.index(word) for _, word in mine]), words)
    return _ten_words(root, folder, mine, held_out=split == "test")


@lru_cache(maxsize=2)
def _spoken(root: str) -> list[tuple[str, str, str]]:
    """Path, word and "training", "validation" or "testing" of every clip."""
    folder = data_folder(root, "Speech Commands")
    words = [name for name in subfolders(folder) if name != NOISE]
    groups = list_groups(folder, [folder / word for word in words], SUFFIXES)
    paths = {
        f"{word}/{Path(path).name}": path for word, group in zip(words, groups, strict=True) for path in group.paths
    }
    lists = {each: folder / f"{each}_list.txt" for each in ("validation", "testing")}
    missing = [file for file in lists.values() if not file.is_file()]
    if len(missing) == 1:
        raise UserError(
            f"{missing[0]}: there is no such file, and the other list is there; bring it back, or move both"
        )
    if missing:
        say(f"{root}: no validation_list.txt and testing_list.txt; clips are divided by the set's hash of their names")
        part = {name: hashed_split(name) for name in paths}
    else:
        part = dict.fromkeys(paths, "training")
        for each, file in lists.items():
            named = [line.strip().replace("\\", "/") for line in read_lines(file) if line.strip()]
            _say_gone(file, len(named), [name for name in named if name not in paths])
            if both := [name for name in named if part.get(name) == "validation"]:
                say(f"{file}: {len(both):,} clips are in validation_list.txt, too, and are held out, such as {both[0]}")
            part |= {name: each for name in named if name in paths}
    return [(path, name.split("/")[0], part[name]) for name, path in paths.items()]


def hashed_split(name: str) -> str:
    """Which split a clip of Speech Commands belongs to, by its name: the rule in the set's README.

    What comes behind `_nohash_` counts the takes of one speaker, so that all of these are in one split.
    """
    speaker = re.sub(r"_nohash_.*$", "", os.path.basename(name))
    number = int(hashlib.sha1(speaker.encode("utf-8", "surrogateescape")).hexdigest(), 16)
    share = number % (_HASHES + 1) * (100.0 / _HASHES)
    return "validation" if share < _VALIDATION else "testing" if share < _VALIDATION + _TESTING else "training"


def _ten_words(root: str, folder: Path, clips: list[tuple[str, str]], *, held_out: bool) -> Found:
    """The twelve classes of `read_set`: clips of the ten words, of others, and pieces of noise."""
    words = [(path, TEN_WORDS.index(word)) for path, word in clips if word in TEN_WORDS]
    others = [path for path, word in clips if word not in TEN_WORDS]
    if not words:
        raise UserError(
            f"data.root={root}: data.keywords=ten, and none of the folders is one of {some(list(TEN_WORDS))}"
        )
    few, draw = math.ceil(len(words) / _TENTH), np.random.default_rng(int(held_out))
    if held_out:
        others = [others[place] for place in sorted(draw.permutation(len(others))[:few])]
    pieces = _noise(folder / NOISE, few, draw, held_out=held_out)
    found = [*words, *((path, len(TEN_WORDS)) for path in others), *((path, len(TEN_WORDS) + 1) for path, _ in pieces)]
    starts = [-1.0] * (len(words) + len(others)) + [start for _, start in pieces]
    return Found(
        [path for path, _ in found],
        torch.tensor([label for _, label in found]),
        (*TEN_WORDS, "unknown", "silence"),
        torch.tensor(starts, dtype=torch.float64),
    )


def _noise(folder: Path, count: int, draw: np.random.Generator, *, held_out: bool) -> list[tuple[str, float]]:
    """File and start in seconds of so many pieces, each file as often as it is long."""
    rooms: list[tuple[str, float, float]] = []  # file, and between which seconds a piece may begin
    for path in list_files(folder, SUFFIXES).paths:
        try:
            seconds = soundfile.info(os.fsencode(path)).duration
        except (OSError, soundfile.LibsndfileError) as error:
            raise UserError(f"{printable(path)}: can't be read: {' '.join(str(error).split())}") from error
        cut = seconds * (1 - _HELD_NOISE)
        first, last = (cut, seconds - PIECE) if held_out else (0.0, cut - PIECE)
        if last >= first:
            rooms.append((path, first, last))
    if not rooms:
        raise UserError(
            f"{folder}: silence is cut from the sound files in this folder, and none there is "
            f"{PIECE / _HELD_NOISE:.0f} s long; bring them back, or set data.keywords=all"
        )
    length = np.array([last - first + PIECE for _, first, last in rooms])
    chosen = draw.choice(len(rooms), count, p=length / length.sum())
    return [(rooms[place][0], float(draw.uniform(*rooms[place][1:]))) for place in chosen]


# --------------------------------------------------------------------------------------------------------- IEMOCAP


@lru_cache(maxsize=2)
def _iemocap(root: str) -> _Folded:
    folder = data_folder(root, "IEMOCAP, with the folders Session1 to Session5")
    sessions = {found["number"]: name for name in subfolders(folder) if (found := _SESSION.fullmatch(name))}
    if not sessions:
        raise UserError(f"data.root={root}: holds no folder Session1; give the one that holds Session1 to Session5")
    clips, other = list[_Clip](), Counter[str]()
    for number, name in sessions.items():
        place = folder / name / "dialog" / "EmoEvaluation"
        files = [Path(path) for path in list_files(place, (".txt",)).paths if Path(path).parent == place]
        if not files:
            raise UserError(f"{place}: holds no list of turns (.txt); is the set whole?")
        for file in files:
            wavs = folder / name / "sentences" / "wav" / file.stem
            for turn, emotion in _turns(file):
                if emotion in EMOTIONS:
                    label = IEMOCAP_CLASSES.index(EMOTIONS[emotion])
                    clips.append(_Clip(str(wavs / f"{turn}.wav"), label, number))
                else:
                    other[emotion] += 1
    if other:
        told = ", ".join(f"{count:,} {emotion}" for emotion, count in other.most_common())
        say(f"{root}: {sum(other.values()):,} turns of other emotions are left out: {told}")
    return _Folded(_there(root, clips), IEMOCAP_CLASSES)


def _turns(file: Path) -> Iterator[tuple[str, str]]:
    """Name and emotion of every turn: the lines that begin with a bracket, among those of single listeners."""
    for line, text in enumerate(read_lines(file), 1):
        if not text.startswith("["):
            continue
        found = _TURN.fullmatch(text)
        if found is None:
            raise UserError(f"{file}, line {line}: is torn; a turn is [start - end], name, emotion, [v, a, d]")
        yield found["name"], found["emotion"]
