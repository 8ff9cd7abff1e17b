"""Audio sets in their own layouts: what each list says, what is held out, what is left out and said."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities.audio import Audio
from modalities.data.audio import FrontEnd, Recordings, open_audio, open_source
from modalities.data.audio_sets import TEN_WORDS, SetName, hashed_split
from nepa_core.basics import UserError
from nepa_core.contract import check_modality
from tests.sounds import tone, write, write_audioset, write_commands, write_esc50, write_iemocap


def recordings(name: SetName, split: str, root: Path, **options: Any) -> Recordings:
    found = open_source(name, split, root=str(root), **options)
    assert isinstance(found, Recordings)
    return found


def names(found: Recordings) -> list[str]:
    return [Path(path).stem for path in found.paths]


def labels(found: Recordings) -> Any:
    assert found.labels is not None
    return found.labels.tolist()


# ---- AudioSet


def test_audioset_reads_its_lists_and_gives_several_classes_a_clip(tmp_path: Path) -> None:
    write_audioset(tmp_path / "set")
    test = recordings("audioset", "test", tmp_path / "set")
    assert test.classes == ("Speech", "Music", "Dog, bark")
    assert names(test) == [f"Y-eva_{place:06d}" for place in range(8)]
    assert test.labels is not None
    assert test.labels.dtype == torch.bool
    assert labels(test)[:4] == [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("subset", "expected"), [("balanced", {"bal": 4}), ("unbalanced", {"unb": 4}), ("full", {"bal": 4, "unb": 4})]
)
def test_the_subset_decides_what_trains(tmp_path: Path, subset: str, expected: dict[str, int]) -> None:
    write_audioset(tmp_path)
    train = recordings("audioset", "train", tmp_path, subset=subset)
    assert Counter(name[2:5] for name in names(train)) == expected
    assert len(recordings("audioset", "test", tmp_path, subset=subset)) == 8


@pytest.mark.parametrize(
    "name",
    ["{}", "Y{}", "{}_30", "Y{}_30.000", "{}_30_40", "{}_30000_40000", "{}_30.0"],
)
def test_a_clip_is_found_by_its_name_in_any_folder(tmp_path: Path, name: str) -> None:
    write_audioset(tmp_path)
    video = "-eva_000003"
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "eval_segments" / f"Y{video}.wav").rename(tmp_path / "elsewhere" / "deep" / f"{name.format(video)}.wav")
    assert names(recordings("audioset", "test", tmp_path))[3] == name.format(video)


def test_segments_without_a_clip_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audioset(tmp_path)
    (tmp_path / "eval_segments" / "Y-eva_000001.wav").unlink()
    write(tmp_path / "more" / "-eva_000002.wav", tone(0.3))
    test = recordings("audioset", "test", tmp_path)
    assert labels(test)[:2] == [[1, 0, 0], [0, 1, 1]]
    said = capsys.readouterr().err
    assert "eval_segments.csv: 1 of 8 clips are not there and are left out, such as -eva_000001_30.000" in said
    for file in tmp_path.glob("*balanced*/*.wav"):
        file.unlink()
    with pytest.raises(UserError, match="no clip of the training split is there"):
        open_source("audioset", "train", root=f"{tmp_path}/.")


def test_a_file_is_of_one_segment_and_held_out_ones_train_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second segment of a video would read the file that is named by the video alone."""
    write_audioset(tmp_path)
    held, trains = tmp_path / "eval_segments.csv", tmp_path / "balanced_train_segments.csv"
    before = held.read_text()
    row = next(line for line in before.splitlines() if line.startswith("-eva_000001"))
    held.write_text(before + '-eva_000000, 60.000, 70.000, "/m/002"\n' + row + "\n")
    trains.write_text(trains.read_text() + row + "\n")
    assert len(recordings("audioset", "test", tmp_path)) == 8
    said = capsys.readouterr().err
    assert "eval_segments.csv: 2 of 10 clips have a file that is taken, and are left out: -eva_000000_60.000, " in said
    assert "-eva_000001" not in {name[1:] for name in names(recordings("audioset", "train", tmp_path))}
    assert "balanced_train_segments.csv: 1 of 5 clips have a file that is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        '-abcdefghij, 30.000, 40.000, "/m/000,/m/0',
        "-abcdefghij, 30.000, 40.000, /m/000,/m/001",
        "-abcdefghij, 30.000",
        '-abcdefghij, thirty, 40.000, "/m/000"',
        '-abcdefghij, 30.000, 40.000, ""',
    ],
)
def test_a_torn_line_is_one_line_of_error(tmp_path: Path, line: str) -> None:
    write_audioset(tmp_path)
    file = tmp_path / "eval_segments.csv"
    file.write_text(file.read_text() + line)
    with pytest.raises(UserError, match=r"eval_segments.csv, line 12: is torn") as error:
        open_source("audioset", "test", root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_class_that_is_not_in_the_list_of_classes_is_named(tmp_path: Path) -> None:
    write_audioset(tmp_path)
    file = tmp_path / "eval_segments.csv"
    file.write_text(file.read_text() + '-abcdefghij, 0, 10, "/m/000,/m/404"\n')
    with pytest.raises(UserError, match=r"line 12: class_labels_indices.csv has no class /m/404"):
        open_source("audioset", "test", root=str(tmp_path))
    (tmp_path / "eval_segments.csv").unlink()
    with pytest.raises(UserError, match=r"eval_segments.csv: there is no such file"):
        open_source("audioset", "test", root=f"{tmp_path}/.")


# ---- ESC-50


@pytest.mark.parametrize("fold", ["", "one"])
def test_a_fold_of_esc50_that_is_no_number_is_named_with_its_row(tmp_path: Path, fold: str) -> None:
    file = write_esc50(tmp_path) / "meta" / "esc50.csv"
    head, first, *rest = file.read_text().splitlines()
    name, _, behind = first.split(",", 2)
    file.write_text("\n".join([head, f"{name},{fold},{behind}", *rest]))
    with pytest.raises(UserError, match=rf"esc50\.csv, row 2: the fold is '{fold}', and a whole number is wanted"):
        open_source("esc50", "test", root=str(tmp_path))


def test_esc50_holds_one_fold_out_and_names_classes_by_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_esc50(tmp_path)
    train, test = (recordings("esc50", split, tmp_path, fold="4") for split in ("train", "test"))
    assert {name[0] for name in names(test)} == {"4"}
    assert {name[0] for name in names(train)} == set("1235")
    assert test.classes == ("kind_2", "kind_1")
    assert labels(test) == [0, 0, 1, 1]
    assert {name[0] for name in names(recordings("esc50", "test", tmp_path))} == {"1"}
    assert "fold 1 of 5 is held out; data.fold= names another one" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data\.fold=6: the folds of .* are 1, 2, 3, 4"):
        open_source("esc50", "test", root=str(tmp_path), fold="6")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("2-201-A-0.wav,2,0,kind_2,False,2,A", "2-201-A-0.wav,2", r"row 7: is torn, with 2 cells where 7 belong"),
        ("2-201-A-0.wav,2,0,kind_2", '"2-201-A-0.wav,2,0,kind_2', "is torn"),
        ("2-201-A-0.wav,2,0,kind_2", "2-201-A-0.wav,2,0,other", "row 7: class 0 is called 'other', and 'kind_2' above"),
        (
            "2-201-A-0.wav,2,0,kind_2",
            "2-201-A-0.wav,2,-1,kind_2",
            "row 7: a class is numbered '-1'; 0, 1, ... are wanted",
        ),
        (",0,kind_2", ",2,kind_2", "no class has the number 0, and one has 2; number them 0, 1, ..."),
        ("filename,fold", "filename,part", "the first line names no column fold"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, old: str, new: str, expected: str) -> None:
    file = write_esc50(tmp_path) / "meta" / "esc50.csv"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=expected):
        open_source("esc50", "test", root=str(tmp_path))


def test_a_clip_that_a_table_names_twice_is_taken_once_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in "abc":
        write_esc50(tmp_path / folder)
    tables = [tmp_path / folder / "meta" / "esc50.csv" for folder in "abc"]
    head, first, *rest = tables[0].read_text().splitlines()
    name, fold, *others = first.split(",")
    tables[0].write_text("\n".join([head, first, *rest, first]) + "\n")
    assert len(recordings("esc50", "test", tmp_path / "a", fold="1")) == 4
    assert "esc50.csv: 1 of 21 clips are named again, and are taken once" in capsys.readouterr().err
    tables[1].write_text("\n".join([head, first, *rest, ",".join([name, "2", *others])]) + "\n")
    with pytest.raises(UserError, match=f"names .*{name} twice, with another fold each; leave one out"):
        open_source("esc50", "test", root=str(tmp_path / "b"))
    for wrong in ("", "..", "../meta/esc50.csv"):
        tables[2].write_text("\n".join([head, first, *rest, ",".join([wrong, fold, *others])]) + "\n")
        with pytest.raises(UserError, match=r"row 22: '.*' is no name of a sound file in audio/"):
            open_source("esc50", "test", root=str(tmp_path / "c"))


def test_clips_of_a_table_that_are_not_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_esc50(tmp_path)
    (tmp_path / "audio" / "1-100-A-0.wav").unlink()
    assert len(recordings("esc50", "test", tmp_path, fold="1")) == 3
    assert "1 of 20 clips are not there and are left out" in capsys.readouterr().err


# ---- Speech Commands


def test_a_clip_of_both_lists_is_held_out_and_said_and_windows_may_have_written_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_commands(tmp_path)
    both, testing = (tmp_path / f"{name}_list.txt" for name in ("validation", "testing"))
    twice = both.read_text().split()[0]
    testing.write_text(testing.read_text().rstrip().replace("/", "\\") + f"\n{twice}\n")
    before = len(testing.read_text().split())
    assert len(recordings("speech_commands", "test", tmp_path)) == before
    assert f"1 clips are in validation_list.txt, too, and are held out, such as {twice}" in capsys.readouterr().err


def test_speech_commands_keeps_its_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_commands(tmp_path)
    train, test = (recordings("speech_commands", split, tmp_path) for split in ("train", "test"))
    assert {name[7] for name in names(test)} == {"1", "2"}
    assert {name[7] for name in names(train)} == set("34567")
    assert train.classes == test.classes == ("bed", "cat", "no", "yes")
    assert "8 clips of the validation split are left aside" in capsys.readouterr().err


def test_without_lists_the_hash_of_the_speaker_divides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_commands(tmp_path, words=("yes", "no"), speakers=40, lists=False)
    train, test = (recordings("speech_commands", split, tmp_path) for split in ("train", "test"))
    for found, part in ((train, "training"), (test, "testing")):
        assert {_by_the_rule(path) for path in found.paths} == {part}
    assert len(train) > len(test) > 0
    assert "clips are divided by the set's hash of their names" in capsys.readouterr().err
    shares = Counter(hashed_split(f"{number:08x}_nohash_3.wav") for number in range(2000))
    assert [round(shares[part] / 200) for part in ("validation", "testing", "training")] == [1, 1, 8]


@pytest.mark.parametrize(
    ("part", "published"),
    [
        ("testing", "bed/0c40e715 bed/0ea0e2f4 bird/42beb5eb down/022cd682 off/096456f9 stop/0c40e715 zero/37dca74f"),
        ("validation", "bed/fde2dee7 bird/099d52ad cat/66cff190 down/364c0853 go/0ab3b47d on/1657c9fa zero/7c1d8533"),
    ],
)
def test_the_hash_gives_the_splits_that_the_set_was_published_with(part: str, published: str) -> None:
    """Lines of its testing_list.txt and validation_list.txt."""
    assert {hashed_split(f"{name}_nohash_{take}.wav") for name in published.split() for take in (0, 4)} == {part}


def _by_the_rule(path: str) -> str:
    """`which_set` of the set's README, in whole numbers."""
    speaker = Path(path).name.split("_nohash_")[0]
    share = 100 * (int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27) / (2**27 - 1)
    return "validation" if share < 10 else "testing" if share < 20 else "training"


def test_one_list_alone_is_refused(tmp_path: Path) -> None:
    (write_commands(tmp_path) / "testing_list.txt").unlink()
    with pytest.raises(UserError, match=r"testing_list.txt: there is no such file, and the other list is there"):
        open_source("speech_commands", "train", root=str(tmp_path))


def test_ten_words_with_unknown_and_silence(tmp_path: Path) -> None:
    write_commands(tmp_path, speakers=18)
    train, test = (recordings("speech_commands", split, tmp_path, keywords="ten") for split in ("train", "test"))
    assert train.classes == (*TEN_WORDS, "unknown", "silence")
    assert Counter(labels(test)) == {0: 4, 1: 4, 10: 1, 11: 1}  # a tenth of 8, rounded up
    assert Counter(labels(train)) == {0: 30, 1: 30, 10: 60, 11: 6}  # all unknown words to train
    again = recordings("speech_commands", "test", Path(f"{tmp_path}/."), keywords="ten")
    assert names(again) == names(test)
    assert again.starts is not None
    assert torch.equal(again.starts, test.starts)
    row = labels(test).index(11)
    piece = test.read(row, 8000, 10**6)
    assert len(piece) == 8000
    start = test.start(row)
    assert start is not None
    assert 4.8 <= start <= 5.0  # of 6 s, the last fifth is held out
    starts = [train.start(row) for row, label in enumerate(labels(train)) if label == 11]
    assert all(each is not None and each <= 3.8 for each in starts)
    assert train.start(0) is None


def test_pieces_of_one_file_are_told_apart(tmp_path: Path) -> None:
    form = FrontEnd(8000, 16, 200, 80, 4, 100)
    write_commands(tmp_path, words=TEN_WORDS, speakers=4)
    clips = open_audio("speech_commands", "train", form=form, root=str(tmp_path), keywords="ten")
    contents = clips.contents()
    assert contents is not None
    stored = [contents.read(row) for row, label in enumerate(labels(clips.source)) if label == 11]  # type: ignore[arg-type]
    assert len(set(stored)) == len(stored) == 2
    assert clips[len(clips) - 1]["frames"] == 100


def test_silence_needs_the_noise(tmp_path: Path) -> None:
    write_commands(tmp_path)
    for file in (tmp_path / "_background_noise_").glob("*.wav"):
        write(file, tone(2.0))
    with pytest.raises(UserError, match="none there is 5 s long"):
        open_source("speech_commands", "test", root=str(tmp_path), keywords="ten")


# ---- IEMOCAP


def test_iemocap_has_four_classes_and_holds_a_session_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_iemocap(tmp_path)
    train, test = (recordings("iemocap", split, tmp_path, fold="5") for split in ("train", "test"))
    assert test.classes == ("neutral", "happy", "sad", "angry")
    assert labels(test) == [0, 1, 1, 2, 3]  # excited counts as happy
    assert {name[:5] for name in names(test)} == {"Ses05"}
    assert len(train) == 20
    assert "10 turns of other emotions are left out: 5 fru, 5 xxx" in capsys.readouterr().err


def test_a_torn_turn_is_named(tmp_path: Path) -> None:
    write_iemocap(tmp_path)
    file = tmp_path / "Session2" / "dialog" / "EmoEvaluation" / "Ses02F_impro01.txt"
    file.write_text(file.read_text() + "[12.1 - 13.2]\tSes02F_impro01_F0")
    with pytest.raises(UserError, match=r"Ses02F_impro01.txt, line 17: is torn"):
        open_source("iemocap", "test", root=str(tmp_path))


# ---- the adapter


@pytest.mark.parametrize(
    ("source", "make", "folds", "changes"),
    [
        ("audioset", write_audioset, (), {"subset": "balanced"}),
        ("esc50", write_esc50, tuple("12345"), {"fold": "2"}),
        ("speech_commands", write_commands, (), {"keywords": "ten"}),
        ("iemocap", write_iemocap, tuple("12345"), {"fold": "2"}),
    ],
)
def test_every_layout_keeps_the_contract(
    tmp_path: Path, source: SetName, make: Any, folds: tuple[str, ...], changes: dict[str, Any]
) -> None:
    make(tmp_path / "set")
    root = str(tmp_path / "set")
    augment = {"time_mask": 8, "noise": 0.5}
    form = {"seconds": 0.3, "sample_rate": 8000, "bands": 16, "patch": (8, 8), "augment": augment}
    data = Audio(source=source, root=root, **form, **changes)
    check_modality(data)
    assert data.folds() == folds
    assert [data.holding_out(fold).fold for fold in folds] == list(folds)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"source": "esc50"}, r"data\.source=esc50 needs data\.root=DIR"),
        (
            {"source": "folder", "root": "x", "subset": "balanced"},
            r"data\.subset=balanced is for data\.source=audioset",
        ),
        (
            {"source": "esc50", "root": "x", "keywords": "ten"},
            r"data\.keywords=ten is for data\.source=speech_commands",
        ),
    ],
)
def test_keys_of_another_set_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Audio(seconds=1.0, **settings)


def test_a_set_without_folds_refuses_one(tmp_path: Path) -> None:
    write_commands(tmp_path)
    with pytest.raises(UserError, match=r"data\.fold=1: speech_commands in .* has no folds"):
        open_source("speech_commands", "test", root=str(tmp_path), fold="1")
