"""Videos as samples: found, decoded by time stamps, cut into clips and brought to one size.

Shapes: n clips, T frames, C channels, h x w pixels as stored, H x W as given. Every data set is map-style and gives
{"video": uint8 [T, C, H, W]} and, where there are labels, "label", an int64 scalar (a class), a bool [C]
(several) or a float32 scalar (a number to predict). A source knows the label of every row and gives a clip of the row's
video.

Files are decoded by PyAV, whose wheels bring FFmpeg. A frame of a clip is the one that is on the screen at its time,
whatever the frame rate of the file, or whether it has one. What a damaged stream still gives is read; where that, or a
whole video, is shorter than a clip, the last frame is repeated. A folder of frames has no clock: its frames are taken
as they are.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.hub import one_line
from modalities.data.image_augment import CentreCrop, Transform
from modalities.data.image_decode import Channels, decode
from modalities.data.labelled import SPLITS, Kind, LabelledSource, of_split, read_layout
from modalities.data.listing import Contents, file_sizes, fingerprint, natural_key, printable, read_whole, say
from nepa_core.basics import Batch, UnreadableSample, UserError, needs
from nepa_core.tokens import Spans

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SourceName = Literal["digits", "folder"]
Label = Literal["class", "direction"]

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
KIND = Kind("video", "video", (*SUFFIXES, *FRAME_SUFFIXES))
FORMATS = "mov,matroska,avi,mpeg,mpegts,ogg"
"""Containers by FFmpeg's names, whatever a suffix says: playlists would open other files, or addresses."""
USUAL_RATE = 25.0  # frames a second, of a stream that says nothing
_LOOKED_AT = 48  # videos of a split whose length is read when it is opened

DIGITS_SIDE, DIGITS_FRAMES = 16, 8
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
"""(y, x) pixels that a digit moves from frame to frame."""


class ClipForm(NamedTuple):
    """What a clip is.

    Attributes:
        frames: T. stride: every so many of the frames that there are at `rate`.
        rate: frames a second; None is that of each file. channels: C.
    """

    frames: int
    rate: float | None
    stride: int
    channels: Channels

    def rows(self, count: int, share: float) -> list[int]:
        """The frames of a clip out of `count` without a clock; the last one again where they are too few.

        Args:
            share: 0 begins at the first frame, 1 ends at the last.
        """
        first = round(share * max(count - (self.frames - 1) * self.stride - 1, 0))
        return [min(first + place * self.stride, count - 1) for place in range(self.frames)]


class Source(LabelledSource, Protocol):
    """Labels and clips."""

    def read(self, row: int, form: ClipForm, share: float) -> Tensor:
        """A clip, uint8 [T, C, h, w], that begins at a share of where it may; may raise anything."""


class Clips(Dataset[Batch]):
    """Clips of videos.

    Args:
        fit: from uint8 [T, C, h, w] to [T, C, H, W], the same for every frame.
        clips: of each video, evenly spread over it; None for one at a place drawn from torch's global generator.
    """

    def __init__(self, source: Source, form: ClipForm, fit: Transform, clips: int | None) -> None:
        self.source, self.form, self.fit, self.clips, self.each = source, form, fit, clips, clips or 1
        if self.each > 1:
            self.spans = self._spans

    def __len__(self) -> int:
        return len(self.source) * self.each

    def __getitem__(self, index: int) -> Batch:
        video, clip = divmod(index, self.each)
        share = float(torch.rand(())) if self.clips is None else (clip + 0.5) / self.each
        try:
            frames = self.source.read(video, self.form, share)
        except Exception as error:  # FFmpeg and PIL have dozens of kinds for a damaged file
            raise UnreadableSample(f"{self.source.name(video)}: {one_line(error)}") from error
        labels = self.source.labels
        return {"video": self.fit(frames)} | ({} if labels is None else {"label": labels[video]})

    def name(self, index: int) -> str:
        """What a message calls that clip: its file, and which of several it is."""
        video, clip = divmod(index, self.each)
        name = self.source.name(video)
        return name if self.each == 1 else f"{name} (clip {clip + 1} of {self.each})"

    def _spans(self) -> Spans:
        """Clips of one video may overlap, and are views of one thing; only where a video has several."""
        video = torch.arange(len(self)) // self.each
        return Spans(video, video, torch.zeros_like(video), torch.ones_like(video), views=True)

    def fingerprint(self) -> str:
        """Changes where other files are listed, or one of another size or label."""
        paths = self._paths()
        if paths is None:
            return f"{len(self)} samples"
        top = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        labels = None if self.source.labels is None else self.source.labels.numpy()
        return fingerprint((os.path.relpath(path, top) for path in paths), stored_sizes(paths), labels)

    def contents(self) -> Contents | None:
        """The stored bytes of every video; None where there are none."""
        paths = self._paths()
        if paths is None:
            return None
        return Contents(stored_sizes(paths).repeat(self.each), lambda i: stored_bytes(paths[i // self.each]), self.name)

    def _paths(self) -> list[str] | None:
        if not isinstance(self.source, Videos):
            return None
        return [str(path) for path in self.source.paths]


def open_video(
    source: SourceName,
    split: str,
    *,
    form: ClipForm,
    size: tuple[int, int],
    crop_ratio: float = 1.0,
    augment: Transform | None = None,
    root: str | None = None,
    label: Label = "class",
    clips: int | None = 1,
    fold: str | None = None,
) -> Clips:
    """The clips of a split, scaled (bicubic, antialiased) to cover `size` / `crop_ratio`, then cropped at the centre.

    Args:
        source, root, label, fold: see `open_source`.
        split: "train" or "test".
        augment: what is done to clips instead.
        clips: of each video, see `Clips`.

    Raises:
        UserError: the data can't be found, are in none of the layouts, or PyAV is not installed.
        UnreadableSample: from the data set, on access to a video of which no frame can be read.
    """
    stored = open_source(source, split, root=root, label=label, fold=fold)
    if isinstance(stored, Videos):
        _say_short(root or "", split, stored, form)
    return Clips(stored, form, augment or Fitted(size, crop_ratio), clips)


def open_files(paths: Sequence[str], form: ClipForm, size: tuple[int, int], crop_ratio: float) -> Clips:
    """The middle clip of each of some video files, or folders of frames, by name, without labels; see `open_video`."""
    _check_decoder(paths)
    files = Videos(np.array(list(paths)), None, None)
    return Clips(files, form, Fitted(size, crop_ratio), clips=1)


class Fitted:
    """Every frame of [T, C, h, w] as `CentreCrop` fits an image."""

    def __init__(self, size: tuple[int, int], crop_ratio: float) -> None:
        self.crop = CentreCrop(size, crop_ratio)

    def __call__(self, frames: Tensor) -> Tensor:
        if frames.shape[-2:] == self.crop.size and self.crop.size == tuple(self.crop.frame):
            return frames
        return torch.stack([self.crop(frame) for frame in frames])


# --------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, eq=False)
class Videos:
    """Video files and folders of frames. Paths are a NumPy array: a list would be copied into every worker."""

    paths: np.ndarray[Any, Any]
    labels: Tensor | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int, form: ClipForm, share: float) -> Tensor:
        path = str(self.paths[row])
        return (read_frames if os.path.isdir(path) else read_video)(path, form, share)

    def name(self, row: int) -> str:
        return printable(str(self.paths[row]))


@dataclass(frozen=True, eq=False)
class MovingDigits:
    """Digits that move on a torus, uint8 [n, T, 1, H, W]: no frame alone tells where to."""

    videos: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, row: int, form: ClipForm, share: float) -> Tensor:
        frames = self.videos[row, form.rows(self.videos.shape[1], share)]
        return frames.expand(-1, form.channels, -1, -1)

    def name(self, row: int) -> str:
        return f"moving digit:{row}"


def open_source(
    source: SourceName, split: str, *, root: str | None = None, label: Label = "class", fold: str | None = None
) -> Source:
    """Where the videos of a split come from; what has been opened once is kept.

    Args:
        source: "digits" or "folder".
            digits: scikit-learn's digits, 8 x 8 pixels, on a torus of 16 x 16: 8 frames, one pixel a frame to the
            right, the left, down or up; the first 1,297 in every direction to train, the last 500 in one each.
        split: "train" or "test" (held out).
        root: a folder or a CSV file, see `modalities.data.labelled.read_layout`, of video files and of folders that
            hold frames, in the order of the numbers in their names.
        fold: of a folder or CSV file, see `modalities.data.labelled.folds_of`, to hold out.
        label: of the digits: which one it is, or where it moves.

    Raises:
        UserError: there is no such data, it is in none of the layouts, or PyAV is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f'split is "train" or "test", not {split!r}')
    if source == "digits":
        return _moving_digits(split, label)
    if root is None:
        raise UserError("data.source=folder needs data.root=DIR, the folder (or CSV file) with the videos")
    return _open_folder(root, split, fold)


@lru_cache(maxsize=4)
def _moving_digits(split: str, label: Label) -> MovingDigits:
    from sklearn.datasets import load_digits  # a second to import, for digits alone

    stored = load_digits()
    part = slice(None, -500) if split == "train" else slice(-500, None)
    digits = (stored.images[part] * (255 / 16)).round().astype(np.uint8)
    draw, turns = np.random.default_rng(list(SPLITS).index(split)), len(DIRECTIONS) if split == "train" else 1
    heading = np.arange(len(digits) * turns) % len(DIRECTIONS)
    digits, kinds = digits.repeat(turns, 0), stored.target[part].repeat(turns)
    start = draw.integers(0, DIGITS_SIDE, (len(digits), 1, 2))
    at = start + np.array([*DIRECTIONS.values()])[heading][:, None] * np.arange(DIGITS_FRAMES)[:, None]
    y, x = ((at[..., axis, None] + np.arange(8)) % DIGITS_SIDE for axis in (0, 1))  # [n, T, 8]
    videos = np.zeros((len(digits), DIGITS_FRAMES, DIGITS_SIDE, DIGITS_SIDE), np.uint8)
    n, t = np.ogrid[: len(digits), :DIGITS_FRAMES]
    videos[n[..., None, None], t[..., None, None], y[..., None], x[:, :, None]] = digits[:, None]
    labels, classes = (kinds, tuple("0123456789")) if label == "class" else (heading, tuple(DIRECTIONS))
    return MovingDigits(torch.from_numpy(videos)[:, :, None], torch.as_tensor(labels, dtype=torch.int64), classes)


@lru_cache(maxsize=4)
def _open_folder(root: str, split: str, fold: str | None) -> Videos:
    rows, reading = read_layout(root, KIND, videos_of, fold=fold)
    _check_decoder([path for path, *_ in rows])
    found = of_split(root, rows, split, KIND, reading)
    return Videos(np.array(found.paths), found.labels, found.classes)


def videos_of(paths: Sequence[str]) -> list[str]:
    """The videos that files make: each file of a video, and each folder that holds frames."""
    return [*dict.fromkeys(os.path.dirname(path) if _is_frame(path) else path for path in paths)]


def _is_frame(name: str) -> bool:
    return name.lower().endswith(FRAME_SUFFIXES)


def _check_decoder(paths: Sequence[str]) -> None:
    file = next((path for path in paths if not os.path.isdir(path)), None)
    if file is not None:
        needs(f"{printable(file)} (PyAV)", "av", extra="video")


@lru_cache(maxsize=8)  # a run opens its data many times
def _say_short(root: str, split: str, videos: Videos, form: ClipForm) -> None:
    """Say how many of a few videos, evenly spread over the list, are shorter than a clip."""
    count = len(videos)
    rows = range(count) if count <= _LOOKED_AT else [place * count // _LOOKED_AT for place in range(_LOOKED_AT)]
    found, read = [], 0
    for row in rows:
        with suppress(Exception):  # is named when it is read as a sample
            found += [videos.name(row)] * _is_short(str(videos.paths[row]), form)
            read += 1
    if found:
        say(
            f"{root}: {len(found)} of {read} videos of {split} looked at, such as {found[0]}, are shorter than a clip "
            f"of {form.frames} frames: their last frame is repeated (data.frames, data.rate and data.stride say what a "
            "clip is)"
        )


def _is_short(path: str, form: ClipForm) -> bool:
    if os.path.isdir(path):
        return len(frame_files(path)) < (form.frames - 1) * form.stride + 1
    with opened(path) as (container, stream):
        length, rate = seconds(container, stream), nominal_rate(stream)
    return length is not None and length < (form.frames - 1) * form.stride / (form.rate or rate) - 1e-6


def stored_sizes(paths: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Bytes of each video, those of a folder's frames together: [n] int64."""
    sizes = file_sizes(paths)
    for place, path in enumerate(paths):
        if os.path.isdir(path):
            sizes[place] = file_sizes(frame_files(path)).sum()
    return sizes


def stored_bytes(path: str) -> bytes:
    """What a video file or a folder of frames holds."""
    return b"".join(map(read_whole, frame_files(path) if os.path.isdir(path) else [path]))


# -------------------------------------------------------------------------------------------------------- decoding


def frame_files(folder: str) -> list[str]:
    """The frames in a folder, in the order of the numbers in their names."""
    names = [name for name in os.listdir(folder) if _is_frame(name) and not name.startswith(".")]
    return [os.path.join(folder, name) for name in sorted(names, key=natural_key)]


def read_frames(folder: str, form: ClipForm, share: float) -> Tensor:
    """A clip of a folder of frames, uint8 [T, C, h, w].

    Raises:
        ValueError: there is none in it, one can't be read, or they differ in size.
    """
    files = frame_files(folder)
    if not files:
        raise ValueError(f"holds no frame ({', '.join(FRAME_SUFFIXES)})")
    rows = form.rows(len(files), share)
    found: dict[int, Tensor] = {}
    for row in dict.fromkeys(rows):
        try:
            found[row] = decode(read_whole(files[row]), form.channels)
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            raise ValueError(f"its frame {printable(os.path.basename(files[row]))}: {one_line(error)}") from error
    if len(sizes := {tuple(frame.shape) for frame in found.values()}) > 1:
        raise ValueError(f"its frames differ in size: {' and '.join(f'{w} x {h}' for _, h, w in sorted(sizes)[:2])}")
    return torch.stack([found[row] for row in rows])


def read_video(path: str, form: ClipForm, share: float) -> Tensor:
    """A clip of a video file, uint8 [T, C, h, w].

    Raises:
        ValueError: as `opened`, or no frame of it can be decoded.
    """
    with opened(path) as (container, stream):
        frame = 1 / nominal_rate(stream)
        step = form.stride / form.rate if form.rate else form.stride * frame
        length = seconds(container, stream)
        if length is None:
            length = measured_seconds(container, stream)
        picked = _picked(container, stream, _times(length, form.frames, step, frame, share))
        if picked.missed:  # the header promises more than there is
            length = measured_seconds(container, stream)
            picked = _picked(container, stream, _times(length, form.frames, step, frame, share), seek=False)
        if not picked.frames:
            raise ValueError("no frame of it can be decoded")
        pixels = {id(each): _pixels(each, form.channels) for each in picked.frames}
    return torch.stack([pixels[id(each)] for each in picked.frames])


def _times(length: float, frames: int, step: float, frame: float, share: float) -> list[float]:
    """When each frame of a clip is on the screen, in seconds from the first of the video on."""
    start = share * max(length - (frames - 1) * step - frame, 0.0)
    return [start + place * step for place in range(frames)]


class Picked(NamedTuple):
    """The frames that are on the screen at some times; missed: some of these lie behind the end, or before a seek."""

    frames: list[VideoFrame]
    missed: bool


def _picked(container: InputContainer, stream: VideoStream, times: list[float], *, seek: bool = True) -> Picked:
    """Decode from the key frame before the first time on."""
    from av.error import FFmpegError

    origin, frame = float((stream.start_time or 0) * (stream.time_base or 1)), 1 / nominal_rate(stream)
    with suppress(FFmpegError):  # what can't seek is read from where it stands
        to = times[0] + origin if seek else origin
        container.seek(math.floor(to / float(stream.time_base or 1)), stream=stream)
    chosen: list[VideoFrame] = []
    last, at, first = None, -frame, None
    for each in _decoded(container, stream):
        at = at + frame if each.time is None else each.time - origin
        first = at if first is None else first
        while last is not None and len(chosen) < len(times) and times[len(chosen)] < at - 1e-4:
            chosen.append(last)
        if len(chosen) == len(times):
            break
        last = each
    ended = len(chosen) < len(times)
    chosen += [last] * (len(times) - len(chosen)) if last is not None else []
    late = first is None or first > times[0] + frame
    return Picked(chosen, seek and times[0] > 0 and (late or (ended and at + frame / 2 < times[-1])))


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames that a stream still gives; packets that can't be decoded are passed over."""
    from av.error import FFmpegError

    with suppress(FFmpegError):  # the file ends in the midst of a packet
        for packet in container.demux(stream):
            with suppress(FFmpegError):
                yield from packet.decode()


def _pixels(frame: VideoFrame, channels: Channels) -> Tensor:
    """uint8 [C, h, w], as a player turns it."""
    rgb = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    if channels == 1:
        from torchvision.transforms.v2.functional import rgb_to_grayscale  # as slow to import as torch

        rgb = rgb_to_grayscale(rgb)
    return rgb.rot90(round(frame.rotation / 90), (1, 2)).contiguous()


def _container(file: BinaryIO) -> InputContainer:
    """Raises ValueError where FFmpeg can't tell what is in it; its own words have a number and the path again."""
    import av  # an extra
    from av.error import FFmpegError

    try:
        return av.open(file, "r", container_options={"format_whitelist": FORMATS})
    except FFmpegError as error:
        raise ValueError(f"damaged or no video ({error.strerror}); replace or remove it") from error


@contextmanager
def opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and its first stream of pictures, covers of songs left aside.

    Raises:
        ValueError: it is no regular file, empty, none of `FORMATS`, or damaged at its beginning, or holds no video.
    """
    from av.stream import Disposition

    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("no regular file")
    if not facts.st_size:
        raise ValueError("it is empty, 0 bytes; replace or remove it")
    with open(path, "rb") as file, _container(file) as container:
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("holds no video" + (", but sound" if container.streams.audio else ""))
        yield container, streams[0]


def nominal_rate(stream: VideoStream) -> float:
    """Frames a second that the file says, on average."""
    return float(stream.average_rate or stream.guessed_rate or 0) or USUAL_RATE


def seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """How long the pictures last by the header, or None where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def measured_seconds(container: InputContainer, stream: VideoStream) -> float:
    """How long the pictures last by their packets, none of which is decoded."""
    from av.error import FFmpegError

    origin, end = stream.start_time or 0, 0
    with suppress(FFmpegError):
        container.seek(origin, stream=stream)
    with suppress(FFmpegError):
        for packet in container.demux(stream):
            if packet.is_corrupt:  # cut off in its midst
                continue
            end = max(end, (packet.pts or packet.dts or origin) - origin + (packet.duration or 0))
    return float(end * (stream.time_base or 1))
