"""Videos are read by their time stamps, whatever is wrong with them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modalities.data import labelled, listing
from modalities.data.video import (
    DIRECTIONS,
    ClipForm,
    Clips,
    open_files,
    open_source,
    open_video,
    read_frames,
    read_video,
)
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.verdict.drawing import draw
from tests.movies import grey, ramp, write_frames, write_movies, write_sound, write_video

FORM = ClipForm(frames=4, rate=None, stride=1, channels=1)


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_said", set())


def numbers(clip: Tensor) -> list[int]:
    """Which frames of a `ramp` a clip holds."""
    return (clip[:, 0, 20:, 30:].float().mean((1, 2)) / 8).round().int().tolist()


@pytest.mark.parametrize("suffix", ["mp4", "avi", "webm", "mkv"])
def test_a_clip_begins_where_it_is_asked_to_and_has_the_frames_behind(tmp_path: Path, suffix: str) -> None:
    file = write_video(tmp_path / f"a.{suffix}", ramp(20))
    for share, first in ((0.0, 0), (0.5, 8), (1.0, 16)):
        clip = read_video(str(file), FORM, share)
        assert clip.shape == (4, 1, 32, 48)
        assert clip.dtype == torch.uint8
        assert numbers(clip) == [first + place for place in range(4)]
    assert read_video(str(file), FORM._replace(channels=3), 0.5).shape == (4, 3, 32, 48)


def test_stride_and_rate_say_how_far_apart_frames_are(tmp_path: Path) -> None:
    file = write_video(tmp_path / "a.mp4", ramp(20), rate=10)
    assert numbers(read_video(str(file), FORM._replace(stride=3), 0.0)) == [0, 3, 6, 9]
    assert numbers(read_video(str(file), FORM._replace(rate=5.0), 0.0)) == [0, 2, 4, 6]
    assert numbers(read_video(str(file), FORM._replace(rate=5.0, stride=2), 1.0)) == [7, 11, 15, 19]
    assert numbers(read_video(str(file), FORM._replace(rate=20.0), 0.0)) == [0, 0, 1, 1]


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_of_a_variable_frame_rate_the_frame_on_the_screen_is_taken(tmp_path: Path, suffix: str) -> None:
    at = [0, 100, 200, 300, 1000, 1050, 1100, 1900, 2000, 2100]  # milliseconds
    file = write_video(tmp_path / f"a.{suffix}", ramp(10), at=at)
    form = FORM._replace(frames=5, rate=2.0)
    assert numbers(read_video(str(file), form, 0.0)) == [0, 3, 4, 6, 8]  # at 0, 500, 1000, 1500 and 2000


def test_a_video_of_fewer_frames_repeats_its_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        write_video(tmp_path / split / "a" / "short.mp4", ramp(2))
        write_video(tmp_path / split / "b" / "long.mp4", ramp(9))
    clips = opened(tmp_path, "train")
    assert numbers(clips[0]["video"]) == [0, 1, 1, 1]
    assert "1 of 2 videos of train looked at" in (said := capsys.readouterr().err)
    assert "short.mp4, are shorter than a clip of 4 frames: their last frame is repeated" in said
    assert numbers(read_frames(str(write_frames(tmp_path / "few", ramp(2))), FORM, 0.5)) == [0, 1, 1, 1]


def opened(root: Path, split: str, **changes: object) -> Clips:
    settings: dict[str, object] = {"form": FORM, "size": (32, 48), "root": str(root)}
    return open_video("folder", split, **(settings | changes))  # type: ignore[arg-type]


def test_a_folder_of_frames_is_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "a", ramp(12))
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    assert numbers(read_frames(str(folder), FORM._replace(stride=3), 1.0)) == [2, 5, 8, 11]
    (folder / "5.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"its frame 5\.png: not an image"):
        read_frames(str(folder), FORM._replace(frames=12), 0.0)
    write_frames(tmp_path / "b", [grey(1), grey(2, 16, 16)])
    with pytest.raises(ValueError, match="its frames differ in size: 16 x 16 and 48 x 32"):
        read_frames(str(tmp_path / "b"), FORM, 0.0)


def test_what_is_no_video_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("nothing of the kind\n" * 50)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nother.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)  # which would open other files, or addresses
    write_video(tmp_path / "other.mp4", ramp(8))
    write_sound(tmp_path / "sound.mp4")
    whole = (tmp_path / "other.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, is lost
    (tmp_path / "folder").mkdir()
    names = ["empty.mp4", "text.mp4", "playlist.mp4", "sound.mp4", "half.mp4", "gone.mp4", "folder"]
    files = open_files([str(tmp_path / name) for name in names], FORM, (32, 48), 1.0)
    said = []
    for place, name in enumerate(names):
        with pytest.raises(UnreadableSample) as error:
            files[place]
        said.append(str(error.value))
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(error.value)
    assert "it is empty, 0 bytes; replace or remove it" in said[0]
    assert "holds no video, but sound" in said[3]
    assert "holds no frame" in said[6]


@pytest.mark.parametrize("suffix", ["avi", "webm", "mkv"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_left_of_a_broken_stream_is_read(tmp_path: Path, suffix: str, share: float) -> None:
    """The header promises three seconds; a clip is taken out of what there is."""
    draw = np.random.default_rng(0)
    frames = [np.clip(frame + draw.integers(0, 64, frame.shape), 0, 255).astype(np.uint8) for frame in ramp(30)]
    whole = write_video(tmp_path / f"a.{suffix}", frames).read_bytes()
    (tmp_path / f"b.{suffix}").write_bytes(whole[: 2 * len(whole) // 3])
    clip = read_video(str(tmp_path / f"b.{suffix}"), FORM, share)
    found = clip[:, 0, 20:, 30:].float().mean((1, 2)) / 8
    assert (found.diff() > 0.5).all(), "frames one after the other, and no frozen one"


def test_damage_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    file = write_video(tmp_path / "a.avi", ramp(30))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    file.write_bytes(content)
    assert read_video(str(file), FORM._replace(stride=7), 0.0).shape == (4, 1, 32, 48)


def test_a_video_stands_as_a_player_turns_it(tmp_path: Path) -> None:
    """The matrix in a track's header: the white corner, upper left as stored, is upper right when seen."""
    file = write_video(tmp_path / "a.mp4", ramp(4))
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    quarter = [0, 1, 0, -1, 0, 0, 0, 0, 1]  # clockwise
    scale = [2**16, 2**16, 2**30] * 3
    content[matrix : matrix + 36] = b"".join(
        (each * by).to_bytes(4, "big", signed=True) for each, by in zip(quarter, scale, strict=True)
    )
    file.write_bytes(content)
    clip = read_video(str(file), FORM, 0.0)
    assert clip.shape == (4, 1, 48, 32)
    assert clip[0, 0, 2, -2] > 200
    assert clip[0, 0, 2, 2] < 50


def test_files_and_folders_of_frames_lie_in_class_folders(tmp_path: Path) -> None:
    write_movies(tmp_path)
    train, test = (opened(tmp_path, split) for split in ("train", "test"))
    assert train.source.classes == ("bright", "dark")
    assert (len(train), len(test)) == (12, 6)
    assert [int(train[place]["label"]) for place in range(12)] == [0] * 6 + [1] * 6
    assert [Path(train.name(place)).name for place in range(4)] == ["0", "1.avi", "2.mp4", "3"]
    assert train[0]["video"].shape == train[1]["video"].shape == (4, 1, 32, 48)
    contents = train.contents()
    assert contents is not None
    assert (contents.sizes > 0).all()
    assert len(contents.read(0)) == contents.sizes[0]
    before = train.fingerprint()
    (tmp_path / "train" / "bright" / "0" / "5.png").unlink()
    assert train.fingerprint() != before


def test_folders_of_frames_without_classes_are_videos(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in "ab":
            write_frames(tmp_path / split / name, ramp(5))
    clips = opened(tmp_path, "train")
    assert len(clips) == 2
    assert "label" not in clips[0]


def test_a_csv_file_names_videos_labels_and_splits(tmp_path: Path) -> None:
    for name in "abcd":
        write_video(tmp_path / f"{name}.mp4", ramp(6))
    write_frames(tmp_path / "e", ramp(6))
    rows = ["path,label,split", "a.mp4,x,train", "b.mp4,y,train", "c.mp4,x,test", "d.mp4,y,test", "e,x,train"]
    (tmp_path / "all.csv").write_text("\n".join(rows))
    train = opened(tmp_path / "all.csv", "train")
    assert [int(train[place]["label"]) for place in range(3)] == [0, 1, 0]
    (tmp_path / "all.csv").write_text("\n".join([*rows, "a.mp4,x,test"]))
    with pytest.raises(UserError, match=r"row 7: .*a\.mp4 is held out here or in row 2"):
        labelled.read_manifest(tmp_path / "all.csv", labelled.Kind("video", "video", ()))


def test_data_in_no_layout_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"looked for train/<class>/\* .* each with video \(\.mp4, "):
        opened(tmp_path, "train")


def test_without_the_decoder_the_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_frames(tmp_path / "train" / "a", ramp(5))
    write_frames(tmp_path / "test" / "a", ramp(5))
    monkeypatch.setattr("nepa_core.basics.importlib.util.find_spec", lambda name: None)
    assert len(opened(tmp_path, "train")) == 1  # frames need none
    with pytest.raises(UserError, match=r"a\.mp4 \(PyAV\) needs av, not installed here: pip install nepa\[video\]"):
        open_files(["a.mp4"], FORM, (32, 48), 1.0)


def test_training_clips_begin_anywhere_by_the_global_generator_and_held_out_ones_are_spread(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_video(tmp_path / split / "a.mp4", ramp(28))
    anywhere = opened(tmp_path, "train", clips=None)

    def starts() -> list[int]:
        torch.manual_seed(3)
        return [numbers(anywhere[0]["video"])[0] for _ in range(8)]

    assert starts() == starts()
    assert len(set(starts())) > 3
    spread = opened(tmp_path, "test", clips=3)
    assert [numbers(spread[place]["video"])[0] for place in range(3)] == [4, 12, 20]
    assert spread.name(1).endswith("a.mp4 (clip 2 of 3)")
    middle = opened(tmp_path, "test")
    assert numbers(middle[0]["video"])[0] == 12
    assert not hasattr(middle, "spans")


def test_clips_of_one_video_are_one_cluster_and_no_rivals() -> None:
    clips = Clips(open_source("digits", "test"), ClipForm(4, None, 1, 1), torch.nn.Identity(), 2)
    spans = clips.spans()
    assert spans.views
    assert spans.cluster[:4].tolist() == [0, 0, 1, 1]
    drawn = draw(clips, 128, seed=0)
    for group in drawn.group.unique():
        assert drawn.cluster[drawn.group == group].unique().numel() == int((drawn.group == group).sum())


def test_moving_digits_are_the_same_everywhere_and_move_as_their_label_says() -> None:
    train, test = (open_source("digits", split, label="direction") for split in ("train", "test"))
    assert (len(train), len(test)) == (5188, 500)
    clips = torch.stack([test.read(row, ClipForm(8, None, 1, 1), 0.0) for row in range(40)])[:, :, 0]
    for clip, label in zip(clips, test.labels[:40], strict=True):  # type: ignore[index]
        for before, after in pairwise(clip):
            assert torch.equal(before.roll([*DIRECTIONS.values()][int(label)], (0, 1)), after)
    assert test.classes == ("right", "left", "down", "up")
    kinds = open_source("digits", "test")
    assert kinds.classes == tuple("0123456789")
    assert int(clips.long().sum()) == 1555464
