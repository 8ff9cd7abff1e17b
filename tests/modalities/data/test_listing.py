"""The one listing rule, what it passes over, names from data, and what two splits share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from modalities.data import listing
from modalities.data.listing import (
    Contents,
    Passed,
    data_folder,
    fingerprint,
    list_files,
    list_groups,
    natural_key,
    printable,
    read_whole,
    shared_content,
    subfolders,
)
from nepa_core.basics import UserError


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(found: list[str], folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in found]


@pytest.mark.parametrize(
    "clutter",
    [".hidden.png", "._0.png", ".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png/x.png", "__MACOSX/._0.png",
     "a/.git/0.png", "a/@eaDir/0.png", "#recycle/0.png", "lost+found/0.png", "System Volume Information/0.png"],
)  # fmt: skip
def test_what_systems_leave_behind_is_no_data(tmp_path: Path, clutter: str) -> None:
    put(tmp_path / "0.png")
    put(tmp_path / clutter)
    found, passed = list_files(tmp_path, [".png"])
    assert names(found, tmp_path) == ["0.png"]
    assert passed.counts == {listing.HIDDEN: 1}  # a hidden folder counts once and is not entered


def test_suffixes_in_any_case_and_those_passed_over_are_counted(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.png", "deep/er/c.Png", "d.heic", "e.HEIC", "f", "Thumbs.db", "png"):
        put(tmp_path / name)
    found, passed = list_files(tmp_path, [".png"])
    assert names(found, tmp_path) == ["a.PNG", "b.png", "deep/er/c.Png"]
    assert passed.counts == {"with the suffix .heic": 2, "without a suffix": 2, listing.HIDDEN: 1}
    line = passed.line("train")
    assert line is not None
    assert line.startswith("train: passed over 5 files or folders: 2 with the suffix .heic (such ")
    assert "d.heic" in line
    assert "\n" not in line
    assert Passed().line("train") is None


def test_links_never_multiply_samples(tmp_path: Path) -> None:
    for place in ("train/cat/0.png", "train/dog/1.png", "elsewhere/2.png", "val/cat/3.png"):
        put(tmp_path / place)
    cat = tmp_path / "train" / "cat"
    (cat / "up").symlink_to("..", target_is_directory=True)
    (cat / "root").symlink_to(tmp_path, target_is_directory=True)
    (cat / "self").symlink_to("self")
    (cat / "gone.png").symlink_to("nowhere.png")
    (cat / "more").symlink_to("../../elsewhere", target_is_directory=True)
    (cat / "again").symlink_to("../../elsewhere", target_is_directory=True)
    (cat / "a_dog").symlink_to("../dog", target_is_directory=True)  # sorts before the dogs themselves
    cats, dogs = list_groups(tmp_path / "train", [cat, tmp_path / "train" / "dog"], [".png"])
    assert names(cats.paths, cat)[0] == "0.png"
    assert len(cats.paths) == 2
    assert names(dogs.paths, tmp_path) == ["train/dog/1.png"]
    assert cats.passed.counts[listing.AGAIN] == 4
    assert cats.passed.counts[listing.BROKEN] == 1


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    put(tmp_path / "store" / "cats" / "0.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "store" / "cats", target_is_directory=True)
    assert subfolders(tmp_path / "train") == ["cat"]
    assert len(list_files(tmp_path / "train" / "cat", [".png"], within=tmp_path / "train").paths) == 1


def test_pipes_and_devices_are_passed_over_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    found, passed = list_files(tmp_path, [".png"])
    assert not found
    assert passed.counts == {listing.ODD: 2}
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_whole(str(path))
    with pytest.raises(ValueError, match="5 bytes, more than the 4"):
        read_whole(str(put(tmp_path / "large", b"12345")), most=4)


def test_a_folder_that_is_closed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "closed" / "b.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, passed = list_files(tmp_path, [".png"])
    assert len(found) == 1
    assert passed.counts == {listing.CLOSED: 1}


def test_names_are_shown_whole_and_harmless(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(b"x")
    found, _ = list_files(tmp_path, [".png"])
    assert os.fsencode(found[0]) == path
    assert read_whole(found[0]) == b"x"
    assert printable(os.path.basename(found[0])) == r"caf\xe9.png"
    assert printable("Käse 写真\u3000x.png") == "Käse 写真\u3000x.png"
    assert printable("a\nb\x1b[31m\u2028\u202e\ud800") == r"a\nb\x1b[31m\u2028\u202e\ud800"
    printable("\ud800").encode()  # what a JSON file or a page needs


def test_natural_order() -> None:
    assert sorted(["10.npy", "2.npy", "a1b10", "a1b9", "01.npy", "1.npy"], key=natural_key) == [
        "01.npy", "1.npy", "2.npy", "10.npy", "a1b9", "a1b10",
    ]  # fmt: skip


@pytest.mark.parametrize("root", ["nowhere", "~nosuchuser/x", "x" * 5000, "a\0b", "caf\udce9"])
def test_a_folder_that_is_not_there_is_one_line(root: str) -> None:
    with pytest.raises(UserError, match="there is no such folder") as caught:
        data_folder(root)
    assert len(str(caught.value)) < 250
    assert str(caught.value).encode()


def contents(samples: list[bytes], name: str) -> Contents:
    return Contents(np.array([len(each) for each in samples]), lambda row: samples[row], lambda row: f"{name}{row}")


def test_the_same_content_in_both_splits_is_counted() -> None:
    train = [b"a", b"bb", b"cc", b"dd", b"e"]
    shared = shared_content(contents(train, "train"), contents([b"cc", b"xx", b"e", b"long one", b"e"], "test"))
    assert shared.count == 3
    assert shared.complete
    assert shared.held_out == 5
    assert shared.names == [("test0", "train2"), ("test2", "train4"), ("test4", "train4")]
    line = shared.line()
    assert line is not None
    assert line.startswith("leak: 3 of 5 held-out samples")
    assert "such as test0 and train2;" in line
    twice = shared_content(contents([b"a"], "clip"), contents([b"a"], "clip")).line()
    assert twice is not None
    assert "such as clip0, which is listed in both;" in twice
    assert shared_content(contents(train, "train"), contents([b"z"], "test")).line() is None
    assert shared_content(contents([], "train"), contents([], "test")).count == 0


def test_only_samples_of_equal_size_are_read_and_no_more_than_the_budget() -> None:
    read: list[int] = []

    def reading(row: int) -> bytes:
        read.append(row)
        return bytes(1000)

    train = Contents(np.array([1000] * 50 + [7] * 50), reading, str)
    test = Contents(np.array([1000] * 10 + [9] * 10), reading, str)
    whole = shared_content(train, test)
    assert whole.count == 10
    assert whole.complete
    assert sorted(set(read)) == list(range(50))
    assert len(read) == 60
    read.clear()
    part = shared_content(train, test, budget=20 * (1000 + listing.OPENING))
    assert len(read) == 20
    assert not part.complete
    assert 0 < part.count <= 10
    line = part.line()
    assert line is not None
    assert "at least" in line


def test_a_sample_that_cannot_be_read_is_no_leak() -> None:
    def broken(row: int) -> bytes:
        raise OSError("gone")

    lost = Contents(np.array([3, 3]), broken, str)
    assert shared_content(lost, lost).count == 0


def test_a_fingerprint_changes_with_names_sizes_and_order() -> None:
    one = fingerprint(["a", "b"], np.array([1, 2]))
    assert one.startswith("2 samples, 3 bytes, ")
    others = [(["a", "c"], [1, 2]), (["b", "a"], [2, 1]), (["a", "b"], [2, 1]), (["ab", ""], [1, 2])]
    assert len({one, *(fingerprint(name, np.array(size)) for name, size in others)}) == 5
    assert fingerprint(["caf\udce9"], np.array([1]))


def test_said_once_and_by_the_first_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing.say("a line of this test")
    listing.say("a line of this test")
    monkeypatch.setenv("RANK", "1")
    listing.say("a line of another process")
    assert capsys.readouterr().err == "a line of this test\n"
