import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modalities.data.audio import FSDD_NAME, Clips, FrontEnd, Recordings, log_mel, open_audio, open_source, read_file
from modalities.data.audio_files import KIND
from modalities.data.labelled import folds_of, named_folds
from modalities.data.listing import shared_content
from nepa_core.basics import UnreadableSample, UserError
from tests.sounds import tone, write, write_classes, write_fsdd

FORM = FrontEnd(sample_rate=8000, bands=20, window=200, hop=80, step=2, longest=40)


def names(root: Path, split: str, **options: Any) -> list[str]:
    """Paths of a split, seen from the root."""
    source = open_source("folder", split, root=str(root), **options)
    return [str(Path(source.name(row)).relative_to(root)) for row in range(len(source))]


def clips(root: Path, split: str = "train", **options: Any) -> Clips:
    return open_audio("folder", split, form=FORM, root=str(root), **options)


# ---- log-mel


def test_a_tone_lies_in_the_band_of_its_pitch_and_silence_is_zero() -> None:
    mel = log_mel(torch.from_numpy(tone(0.5, 1000.0)).float(), FORM)
    assert mel.shape == (50, 20)
    # 20 triangles at equal distance on the mel scale up to 4 kHz: the middle of band k is at (k + 1) / 21 of it
    scale = 2595 * np.log10(1 + np.array([1000.0, 4000.0]) / 700)
    assert int(mel[10:40].mean(0).argmax()) == round(float(scale[0] / scale[1] * 21)) - 1
    assert torch.equal(log_mel(torch.zeros(800), FORM), torch.zeros(10, 20))


def test_padding_with_zeros_changes_no_frame() -> None:
    wave = torch.randn(3, 1600)
    torch.testing.assert_close(log_mel(F.pad(wave, (0, 800)), FORM)[:, :20], log_mel(wave, FORM))


# ---- files


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_files_are_mixed_to_one_channel_and_resampled(tmp_path: Path, suffix: str, rate: int) -> None:
    stereo = np.stack([tone(0.5, 440.0, rate), 0 * tone(0.5, 440.0, rate)], axis=1)
    wave = read_file(str(write(tmp_path / f"a{suffix}", stereo, rate)), 8000, 8000)
    assert abs(len(wave) - 4000) <= 1
    expected = torch.from_numpy(tone(0.5, 440.0) / 2).float()[: len(wave)]
    torch.testing.assert_close(wave[200:3800], expected[200:3800], rtol=0, atol=2e-3)


def test_no_more_is_read_of_a_long_file_than_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(5.0, rate=16000), 16000)
    assert len(read_file(str(path), 8000, 800)) == 800


def _with_rate(path: Path, rate: int) -> None:
    header = bytearray(path.read_bytes())
    header[24:28] = struct.pack("<I", rate)
    path.write_bytes(header)


SPOIL: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("no sound"), "Format not recognised"),
    "nothing": (lambda path: path.write_bytes(b""), "Format not recognised"),
    "empty": (lambda path: write(path, np.zeros(0)), "holds no samples"),
    "silent": (lambda path: write(path, np.zeros(4000)), "silent"),
    "nan": (lambda path: write(path, np.r_[tone(0.2), np.nan], subtype="FLOAT"), "NaN"),
    "infinite": (lambda path: write(path, np.r_[tone(0.2), np.inf], subtype="FLOAT"), "infinite"),
    "short": (lambda path: write(path, tone(0.019)), "0.019 s are not more than one token of 0.020 s"),
    "slow": (lambda path: _with_rate(path, 3), "header says 3 samples a second"),
    "odd": (lambda path: _with_rate(path, 16001), "header says 16001 samples a second.*data.sample_rate=8000"),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_a_clip_that_teaches_nothing_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    spoil, words = SPOIL[kind]
    data = clips(write_classes(tmp_path), in_memory=True)
    spoil(tmp_path / "train" / "high" / "1.wav")
    for _ in range(2):  # remembered, too
        with pytest.raises(UnreadableSample, match=words) as caught:
            data[1]
        assert str(caught.value).startswith(str(tmp_path / "train" / "high" / "1.wav: "))
        assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableSample):
        data.__getitems__([0, 1])
    assert data[0]["frames"] > 0


# ---- samples and batches


def test_clips_are_padded_to_whole_tokens_then_to_the_batch_or_in_full(tmp_path: Path) -> None:
    write_classes(tmp_path)  # of 0.1 s, 0.133 s and so on: 10, 14 (13.3 filled up to whole tokens), ... frames
    data = clips(tmp_path)
    assert [int(data[i]["frames"]) for i in range(3)] == [10, 14, 18]
    assert data[0]["mel"].shape == (40, 20)
    batch = data.__getitems__([1, 0])
    assert batch["mel"].shape == (2, 14, 20)
    assert batch["frames"].tolist() == [14, 10]
    assert not batch["mel"][1, 10:].any()
    full = clips(tmp_path, padding="full").__getitems__([1, 0])
    assert torch.equal(full["mel"], torch.stack([data[1]["mel"], data[0]["mel"]]))
    torch.testing.assert_close(full["mel"][:, :14], batch["mel"])


def test_clips_beyond_the_longest_are_cut(tmp_path: Path) -> None:
    write_classes(tmp_path)
    short = open_audio("folder", "train", form=FORM._replace(longest=12), root=str(tmp_path))
    assert short[5]["mel"].shape == (12, 20)
    assert short[5]["frames"] == 12


def test_in_memory_every_clip_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path)
    reads: list[int] = []
    read = Recordings.read

    def counted(self: Recordings, row: int, *rest: int) -> torch.Tensor:
        reads.append(row)
        return read(self, row, *rest)

    monkeypatch.setattr(Recordings, "read", counted)
    data = clips(tmp_path, in_memory=True)
    first, second = data[3], clips(tmp_path, in_memory=True).__getitems__([3])
    assert reads == [3]
    assert torch.equal(first["mel"][: int(first["frames"])], second["mel"][0])
    clips(tmp_path)[3]
    assert reads == [3, 3]


def test_limit_draws_training_clips_of_all_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, clips=20)
    few = clips(tmp_path, limit=10)
    assert len(few) == 10
    assert set(few.labels.tolist()) == {0, 1}
    assert len(clips(tmp_path, "test", limit=10)) == 20


# ---- layouts


def test_class_folders(tmp_path: Path) -> None:
    write_classes(tmp_path, clips=2)
    write(tmp_path / "train" / "low" / "deep" / "9.flac", tone(0.1))
    (tmp_path / "train" / "low" / "notes.txt").write_text("not audio")
    write(tmp_path / "train" / "low" / ".hidden.wav", tone(0.1))
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.classes == ("high", "low")
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert "train/low/deep/9.flac" in names(tmp_path, "train")
    assert names(tmp_path, "test") == ["val/high/0.wav", "val/low/0.wav"]


def test_a_csv_manifest_names_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.wav", tone(0.1))
    file = tmp_path / "all.csv"
    file.write_text(
        "split,path,label,extra\ntrain,x/a.wav,dog,1\ntrain,x/b.wav,cat,2\nval,x/c.wav,cat,\nval,d.wav,dog,\n"
    )
    train, test = (open_source("folder", split, root=str(file)) for split in ("train", "test"))
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [1, 0]
    assert [test.name(row) for row in (0, 1)] == [str(tmp_path / "x" / "c.wav"), str(tmp_path / "d.wav")]
    assert len(train.read(0, 8000, 8000)) == 800


def test_a_folder_of_files_without_classes_is_divided_by_their_names(tmp_path: Path) -> None:
    first = tmp_path / "a"
    for i in range(20):
        write(first / "deep" / f"{i % 3}" / f"{i}.wav", tone(0.1 + i / 100))
    write(first / ".trash" / "0.wav", tone(0.1))
    held = names(first, "test")
    assert len(held) == 2, "a tenth"
    assert not set(held) & set(names(first, "train"))
    assert len(names(first, "train")) == 18
    shutil.copytree(first, tmp_path / "b")
    assert names(tmp_path / "b", "test") == held, "wherever it lies"
    assert len(names(first, "test", held_out=0.5)) == 10
    assert set(names(first, "test", held_out=0.5)) > set(held)
    assert len(names(first, "test", held_out=0.001)) == 1
    data = clips(first)
    assert data[0].keys() == data.__getitems__([0, 1]).keys() == {"mel", "frames"}
    assert data.source.classes is None


def test_class_folders_that_nobody_divided_are_divided_each(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path / ("high" if i < 20 else "low") / f"{i}.wav", tone(0.1))
    train, test = (open_source("folder", split, root=str(tmp_path), held_out=0.2) for split in ("train", "test"))
    assert train.classes == test.classes == ("high", "low")
    assert test.labels.bincount().tolist() == [4, 2]
    assert train.labels.bincount().tolist() == [16, 8]


def test_train_and_val_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    for name in ("train/a.wav", "train/b.wav", "val/c.wav"):
        write(tmp_path / name, tone(0.1))
    assert (names(tmp_path, "train"), names(tmp_path, "test")) == (["train/a.wav", "train/b.wav"], ["val/c.wav"])
    assert "label" not in clips(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("path,split\na.wav,train\nb.wav,test\nc.wav,train\n", None),
        ("path,label,split\na.wav,,train\nb.wav,,test\nc.wav,,train\n", None),
        ("path,label,split\na.wav,1.5,train\nb.wav,.5,test\nc.wav,-2.0e-1,train\n", [1.5, -0.2]),
        ("path,label,split\na.wav,1,train\nb.wav,1,test\nc.wav,2,train\nb.wav,2,test\n", [0, 1]),
    ],
)
def test_a_manifest_may_have_no_labels_or_numbers(tmp_path: Path, text: str, labels: list[float] | None) -> None:
    (tmp_path / "m.csv").write_text(text)
    write(tmp_path / "a.wav", tone(0.1))
    data = clips(tmp_path / "m.csv")
    assert len(data) == 2
    assert (None if data.labels is None else data.labels.tolist()) == (labels and pytest.approx(labels))
    if labels is not None:
        assert data[0]["label"].dtype == (torch.float32 if labels[0] == 1.5 else torch.int64)
        assert data.source.classes == (None if labels[0] == 1.5 else ("1", "2"))


def test_a_file_that_a_manifest_names_and_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,split\ngone.wav,train\nb.wav,test\n")
    with pytest.raises(UnreadableSample, match=r"gone\.wav: there is no such file"):
        clips(tmp_path / "m.csv")[0]


def test_fsdd_holds_out_five_recordings_of_each_digit_and_speaker_or_a_speaker(tmp_path: Path) -> None:
    write_fsdd(tmp_path / "fsdd")
    test = names(tmp_path, "test")
    assert sorted(test) == sorted(f"fsdd/{d}_{s}_{i}.wav" for d in range(2) for s in ("ann", "bob") for i in range(5))
    assert len(names(tmp_path, "train")) == 8
    held = names(tmp_path, "test", held_out_speaker="bob")
    assert len(held) == 14
    assert all(FSDD_NAME.fullmatch(Path(name).name)["speaker"] == "bob" for name in held)  # type: ignore[index]
    assert not any("bob" in name for name in names(tmp_path, "train", held_out_speaker="bob"))
    assert open_source("folder", "train", root=str(tmp_path)).labels.tolist() == [0] * 4 + [1] * 4


def _csv(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "m.csv").write_text(text)
        return folder / "m.csv"

    return make


def _only_one_class(folder: Path) -> Path:
    write_classes(folder, clips=2)
    (folder / "val" / "low" / "0.wav").rename(folder / "val" / "high" / "9.wav")
    return folder


def _stray(folder: Path) -> Path:
    write(write_fsdd(folder) / "theme.wav", tone(0.1))
    return folder


def _one_sound(folder: Path) -> Path:
    write(folder / "a.wav", tone(0.1))
    return folder


def _only_train(folder: Path) -> Path:
    shutil.rmtree(write_classes(folder, clips=2) / "val")
    return folder


def _half_labelled(folder: Path) -> Path:
    shutil.rmtree(write_classes(folder, clips=2) / "val")
    write(folder / "val" / "a.wav", tone(0.1))
    return folder


def test_a_manifest_may_have_several_labels_a_clip(tmp_path: Path) -> None:
    rows = "a.wav,speech; music,train\nb.wav,,train\nc.wav,music;;dog,train\nd.wav,dog,test\n"
    (tmp_path / "m.csv").write_text("path,labels,split\n" + rows)
    write(tmp_path / "a.wav", tone(0.1))
    write(tmp_path / "b.wav", tone(0.1))
    train, test = (clips(tmp_path / "m.csv", split) for split in ("train", "test"))
    assert train.source.classes == test.source.classes == ("dog", "music", "speech")
    assert train.labels is not None
    assert train.labels.dtype == torch.bool
    assert train.labels.int().tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert train.__getitems__([0, 1])["label"].tolist() == [[False, True, True], [False] * 3]
    assert test.labels is not None
    assert test.labels.tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda folder: folder / "gone", {}, "gone: there is no such folder or CSV file"),
        (lambda folder: folder, {}, "looked for train/"),
        (_only_one_class, {}, "only one has low"),
        (_stray, {}, "theme.wav: beside files named"),
        (write_fsdd, {"held_out_speaker": "eve"}, "held_out_speaker=eve: the speakers are ann, bob"),
        (write_classes, {"held_out_speaker": "eve"}, "needs files of FSDD's naming"),
        (_csv("path,label\n"), {}, "m.csv: the first line.*no split"),
        (_csv("path,label,split\n,x,train\n"), {}, "m.csv, row 2: .*'', 'train'"),
        (_csv("path,label,split\na.wav,x,train\nb.wav,,val\n"), {}, "m.csv, row 3: no label, and other rows"),
        (_one_sound, {}, "holds one audio file"),
        (_only_train, {}, "looked for train/"),
        (_half_labelled, {}, "clips of one split have labels"),
        (_csv("path,label,split\na.wav,x,dev\n"), {}, "m.csv, row 2: .*'dev'"),
        (_csv("path,label,split\na.wav\n"), {}, "m.csv, row 2"),
        (_csv("path,label,labels,split\na.wav,x,x,train\n"), {}, "has the columns label and labels; rename one"),
        (_csv("path,labels,split\na.wav,x;y,train\nb.wav,z;x,val\n"), {}, "held-out classes z; add some"),
        (_csv("path,labels,split\na.wav,x,train\nb.wav,x,val\n"), {}, "training samples have 1 class; two"),
        (_csv("path,label,split\na.wav,x,train\n"), {}, "no audio file .* in the held-out split"),
    ],
)
def test_data_that_are_not_there_are_named(
    tmp_path: Path, make: Callable[[Path], Path], options: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        open_source("folder", "train", root=str(make(tmp_path)), **options)


# ---- what was lost without a word


def _open_both(root: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[Recordings, Recordings, str]:
    train, test = (open_source("folder", split, root=str(root), **options) for split in ("train", "test"))
    assert isinstance(train, Recordings)
    assert isinstance(test, Recordings)
    return train, test, capsys.readouterr().err


def test_a_loose_file_and_a_class_of_one_clip_cost_no_other_its_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(12):
        write(tmp_path / ("high" if i < 8 else "low") / f"{i}.wav", tone(0.1))
    write(tmp_path / "noise.wav", tone(0.1))
    write(tmp_path / "once" / "31.wav", tone(0.1))
    write(tmp_path / "low" / "deep" / "12.wav", tone(0.1))
    train, test, said = _open_both(tmp_path, capsys)
    assert train.classes == ("high", "low")
    assert train.labels is not None
    assert (train.labels.bincount().tolist(), len(test)) == ([7, 4], 2)
    assert "left out: 1 beside the class folders, such as" in said
    assert "noise.wav" in said
    assert "left out, for one file can't be in both splits: once" in said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"{i}.wav" for i in range(5)] + ["a/1.wav", "a/2.wav", "b/1.wav", "b/2.wav"], "5 of 9 files lie beside them"),
        (["a/1.wav", "b/1.wav", "c/1.wav"], "all but 0 hold one file"),
        (
            [f"speaker{s}/chapter{c}/{i}.wav" for s in range(2) for c in range(2) for i in range(2)],
            "lie deeper in them",
        ),
    ],
)
def test_labels_are_not_given_up_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], said: str
) -> None:
    for name in names:
        write(tmp_path / name, tone(0.1))
    train, test, heard = _open_both(tmp_path, capsys)
    assert train.labels is None
    assert len(train) + len(test) == len(names)
    assert f"no labels, though there are {len({n.split('/')[0] for n in names if '/' in n})} folders" in heard
    assert said in heard


@pytest.mark.parametrize("above", ["", "audio/"])
@pytest.mark.parametrize("inner", ["", "dog/", "cat/"])
def test_folds_are_no_classes_and_held_out_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], above: str, inner: str
) -> None:
    classes = ("dog/", "cat/") if inner else ("",)
    for fold in (1, 2, 10):
        for name in classes:
            write(tmp_path / f"{above}fold{fold}/{name}{fold}.wav", tone(0.1))
    train, test, said = _open_both(tmp_path, capsys)
    assert train.classes == (("cat", "dog") if inner else None)
    assert {Path(test.name(row)).name for row in range(len(test))} == {"1.wav"}
    assert len(train) == 2 * len(classes)
    assert "fold1 to fold10 are folds and no classes; fold1 held out" in said


def test_classes_that_vanish_and_what_is_passed_over_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path, clips=2)
    for name in ("train/bird/1.m4a", "train/bird/2.m4a", "train/.ipynb_checkpoints/1.wav", "train/high/x.opus"):
        write(tmp_path / "x.wav", tone(0.1))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x.wav").rename(tmp_path / name)
    write(tmp_path / "train" / "loose.wav", tone(0.1))
    (tmp_path / "train" / "high" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "train" / "low" / "pipe.wav")
    train, _, said = _open_both(tmp_path, capsys)
    assert (train.classes, len(train)) == (("high", "low"), 4)
    assert "in the folders bird, so they are no classes" in said
    assert "2 with the suffix .m4a" in said
    assert "1 with the suffix .opus" in said
    assert "loose.wav" in said
    assert ".ipynb_checkpoints" in said
    assert "pipe.wav" in said


def test_of_several_held_out_splits_the_first_is_taken_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path, clips=2)
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    assert "val is held out, and test left aside" in _open_both(tmp_path, capsys)[2]
    text = "".join(f"{i}.wav,{'ab'[i // 3 % 2]},{('train', 'test', 'Val')[i % 3]}\n" for i in range(6))
    (tmp_path / "m.csv").write_text("Path,LABEL,Split\n" + text)
    _, test, said = _open_both(tmp_path / "m.csv", capsys)
    assert [Path(name).name for name in test.paths] == ["2.wav", "5.wav"]
    assert "val is held out, and test left aside" in said
    assert "4 of 4 clips are not there and are skipped as unreadable" in said


@pytest.mark.parametrize("other", ["0.wav", "./0.wav", "x/../0.wav"])
def test_a_clip_in_both_splits_of_a_manifest_is_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / "m.csv").write_text(f"path,split\n0.wav,train\n1.wav,val\n\n{other},val\n")
    with pytest.raises(UserError, match=r"m\.csv, row 5: .*0\.wav is held out here or in row 2, and trained on"):
        open_source("folder", "train", root=str(tmp_path / "m.csv"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_manifests_of_any_encoding_and_separator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str, separator: str
) -> None:
    rows = ["Split,,File,Class", "Train,0,ä\\1.wav,hü", "VAL,1,b.wav,hü"]
    write(tmp_path / "ä" / "1.wav", tone(0.1))
    (tmp_path / "m.csv").write_bytes("\r\n".join(rows).replace(",", separator).encode(encoding))
    train = open_source("folder", "train", root=str(tmp_path / "m.csv"))
    assert train.classes == ("hü",)
    said = "m.csv: no UTF-8; its text is read as Windows-1252"
    assert (said in capsys.readouterr().err) == (encoding == "latin-1")
    assert len(train.read(0, 8000, 8000)) == 800


@pytest.mark.parametrize(
    ("points", "subtype", "said"),
    [
        (np.round(20000 * tone(0.3)), "FLOAT", "have numbers up to 16,384, as integers have"),
        (np.stack([tone(0.3), -0.99 * tone(0.3)], 1), None, "have channels that cancel each other"),
        (np.clip(8 * tone(0.3), -1, 1), None, "are clipped"),
        (2 * tone(0.3), None, None),
        (np.stack([tone(0.3), 0 * tone(0.3)], 1), None, None),
    ],
)
def test_odd_sound_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], points: np.ndarray, subtype: str | None, said: str | None
) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.wav", points, subtype=subtype)
    heard = _open_both(tmp_path, capsys)[2]
    if said is None:
        assert not heard
    else:
        assert f"1 of 1 clips listened to, such as {tmp_path / 'a.wav'}, {said}" in heard


def test_channels_that_cancel_each_other_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.stack([tone(0.2), -tone(0.2)], 1))
    with pytest.raises(ValueError, match="is silent: its channels cancel each other"):
        read_file(str(path), 8000, 8000)


def test_names_that_are_no_utf8_are_read_and_shown_escaped(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / "a" / f"{i}.wav", tone(0.1))
        write(tmp_path / "b" / f"{i}.wav", tone(0.1))
    (tmp_path / "a").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.classes == ("b", "caf\\xe9")
    assert len(source.read(len(source) - 1, 8000, 8000)) == 800
    source.name(len(source) - 1).encode()


def test_clips_in_both_splits_are_found_and_the_list_has_a_fingerprint(tmp_path: Path) -> None:
    write_classes(tmp_path, clips=4)
    shutil.copy(tmp_path / "train" / "low" / "1.wav", tmp_path / "val" / "low" / "copy.wav")
    train, test = clips(tmp_path).contents(), clips(tmp_path, "test").contents()
    assert train is not None
    assert test is not None
    found = shared_content(train, test)
    assert found.names[-1][0].endswith("copy.wav")
    before = clips(tmp_path).fingerprint()
    shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    assert clips(tmp_path.with_name("moved")).fingerprint() == before
    write(tmp_path.with_name("moved") / "train" / "low" / "new.wav", tone(0.1))
    shutil.move(tmp_path.with_name("moved"), tmp_path.with_name("again"))
    assert clips(tmp_path.with_name("again")).fingerprint() != before
    assert clips(tmp_path, limit=3).fingerprint() != before


def test_labels_of_a_manifest_are_all_classes_or_all_numbers(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.wav", tone(0.1))
    for number, odd in enumerate(("2", "nan", "1e3")):
        file = tmp_path / f"{number}.csv"
        file.write_text(f"path,label,split\na.wav,1.5,train\nb.wav,{odd},test\nc.wav,2.5,train\n")
        with pytest.raises(
            UserError, match=rf"{number}\.csv, row 3: the label '{odd}' has no decimal point, and others have"
        ):
            open_source("folder", "train", root=str(file))


def test_a_clip_with_two_labels_and_a_folder_without_clips_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1", "a/2", "b/1", "b/2"):
        write(tmp_path / "tree" / f"{name}.wav", tone(0.1))
    (tmp_path / "tree" / "c").mkdir()
    (tmp_path / "tree" / "c" / "1.aiff").write_bytes(b"FORM")
    assert open_source("folder", "train", root=str(tmp_path / "tree")).classes == ("a", "b")
    said = capsys.readouterr().err
    assert "passed over 1 file or folder: 1 with the suffix .aiff" in said
    assert "no audio file (.wav, .flac, .ogg, .mp3) in the folders c, so they are no classes" in said
    file = tmp_path / "tree" / "m.csv"
    file.write_text(
        "path,label,split\na/1.wav,a,train\nb/1.wav,b,train\na/1.wav,b,train\na/2.wav,a,val\nb/2.wav,b,val\n"
    )
    open_source("folder", "train", root=str(file))
    said = capsys.readouterr().err
    assert (
        f"1 row gives a clip another label than a row above: {tmp_path}/tree/a/1.wav in row 2, a, and row 4, b" in said
    )


def test_other_labels_of_the_same_clips_are_other_data(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.wav", tone(0.1))
    prints = []
    for number, labels in enumerate(("xyxy", "xyxy", "yxxy")):
        file = tmp_path / f"{number}.csv"
        rows = zip("abcd", labels, ("train", "train", "val", "val"), strict=True)
        file.write_text("path,label,split\n" + "".join(f"{name}.wav,{label},{split}\n" for name, label, split in rows))
        prints.append(clips(file).fingerprint())
    assert prints[0] == prints[1] != prints[2]


# ---- folds


def _held(root: Path, fold: str | None) -> list[str]:
    source = open_source("folder", "test", root=str(root), fold=fold)
    return [Path(source.name(row)).name for row in range(len(source))]


@pytest.mark.parametrize("with_split", [True, False])
def test_a_column_of_folds_says_what_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], with_split: bool
) -> None:
    rows = [("train", "a.wav", "x", "1"), ("train", "b.wav", "y", "1"), ("val", "c.wav", "x", "2")]
    rows += [("val", "d.wav", "y", "2"), ("train", "e.wav", "x", "10"), ("train", "f.wav", "y", "10")]
    file = tmp_path / "all.csv"
    head = ("split", "path", "label", "fold")
    file.write_text("\n".join(",".join(row[not with_split :]) for row in (head, *rows)))
    assert folds_of(str(file), KIND) == ("1", "2", "10")
    assert _held(file, "10") == ["e.wav", "f.wav"]
    assert _held(file, None) == (["c.wav", "d.wav"] if with_split else ["a.wav", "b.wav"])
    assert ("fold 1 of 3 is held out" in capsys.readouterr().err) == (not with_split)
    with pytest.raises(UserError, match=r"data\.fold=3: the folds of .* are 1, 2"):
        _held(file, "3")


def test_a_fold_is_wanted_in_every_row_and_two_in_all(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    file.write_text("path,label,fold\na.wav,x,1\nb.wav,y\n")
    with pytest.raises(UserError, match="row 3: no fold, and other rows have one"):
        _held(file, "1")
    file.write_text("path,label,fold\na.wav,x,1\nb.wav,y,1\n")
    with pytest.raises(UserError, match="holds one fold, 1; one of two or more is held out"):
        _held(file.rename(tmp_path / "other.csv"), None)


def test_folders_called_folds_are_held_out_one_by_one(tmp_path: Path) -> None:
    for fold in (1, 2, 10):
        for label in ("x", "y"):
            write(tmp_path / "in" / f"fold{fold}" / label / f"{fold}.wav", tone(0.1, 300.0 + fold))
    assert folds_of(str(tmp_path), KIND) == ("1", "2", "10")
    assert _held(tmp_path, "10") == ["10.wav", "10.wav"]
    assert _held(tmp_path, None) == ["1.wav", "1.wav"]
    assert set(named_folds(["fold1", "split 1"])) == {"fold1", "split 1"}


@pytest.mark.parametrize("make", [write_classes, write_fsdd])
def test_a_fold_of_data_without_any_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=r"data\.fold=1: .* has no folds"):
        _held(tmp_path, "1")
