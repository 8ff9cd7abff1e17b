"""Volumes are read from .npy and NIfTI files, and what is wrong with one is a line."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from modalities.data import listing
from modalities.data.volumes import SHAPES, Volumes, cropped, open_files, open_source, open_volumes, read_volume, scaled
from modalities.volume import Volume
from nepa_core.basics import UnreadableSample, UserError
from tests.movies import write_volumes

SIZE = (4, 6, 8)


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_said", set())


def files(*paths: Path, channels: int = 1) -> Volumes:
    return open_files([str(path) for path in paths], SIZE, channels, "scale")


def test_a_npy_file_holds_a_volume_with_or_without_channels(tmp_path: Path) -> None:
    stored = np.arange(2 * 4 * 6 * 8, dtype=np.int16).reshape(2, *SIZE)
    np.save(tmp_path / "two.npy", stored)
    np.save(tmp_path / "one.npy", stored[0])
    (two,) = files(tmp_path / "two.npy", channels=2)
    (one,) = files(tmp_path / "one.npy")
    assert one["volume"].dtype == torch.float32
    assert torch.equal(two["volume"], torch.from_numpy(stored).float())
    assert torch.equal(one["volume"], two["volume"][:1])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_is_scaled_and_turned_the_same_whatever_the_scanner_stored(tmp_path: Path, name: str) -> None:
    """Slices from foot to head, rows from front to back, columns from right to left."""
    values = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)  # left to right, back to front, up
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1, 1, 1])), tmp_path / name)
    mirrored = nibabel.Nifti1Image(
        values[::-1].transpose(1, 0, 2), np.array([[0, -1, 0, 7], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    )
    nibabel.save(mirrored, tmp_path / f"b{name}")
    expected = torch.from_numpy(values.transpose(2, 1, 0)[:, ::-1, ::-1].copy())
    assert torch.equal(read_volume(str(tmp_path / name)), expected)
    assert torch.equal(read_volume(str(tmp_path / f"b{name}")), expected)
    image = nibabel.Nifti1Image((10 * values).round().astype(np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, 5.0)
    nibabel.save(image, tmp_path / "scaled.nii")
    assert float(read_volume(str(tmp_path / "scaled.nii")).min()) == 2 * (10 * values).round().min() + 5
    both = nibabel.Nifti1Image(np.stack((values, 2 * values), -1), np.eye(4))
    nibabel.save(both, tmp_path / "both.nii")
    assert torch.equal(read_volume(str(tmp_path / "both.nii")), torch.stack((expected, 2 * expected)))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_what_is_no_volume_is_one_line_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.random.default_rng(0).normal(size=SIZE)
    holey = good.copy()
    holey[0, 0, 0] = np.nan
    made = {
        "flat.npy": (good[0], "has 2 axes, [6, 8], and a volume 3, or 4 with channels"),
        "pair.npy": (np.stack((good, good)), "has 2 channels where data.channels=1"),
        "nan.npy": (holey, "holds NaN or infinity"),
        "one.npy": (np.ones(SIZE), "holds one value alone"),
        "none.npy": (np.ones((0, 6, 8)), "holds no voxel"),
        "words.npy": (np.full(SIZE, "a"), "holds <U1, no real numbers"),
        "complex.npy": (good * 1j, "no real numbers"),
        "pickled.npy": (np.array([Bomb()], dtype=object), "allow_pickle=False"),
    }
    for name, (array, _) in made.items():
        np.save(tmp_path / name, array)
    said = {name: line for name, (_, line) in made.items()}
    np.savez(tmp_path / "several.npz", a=good)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    said["several.npy"] = "holds several arrays (npz)"
    (tmp_path / "empty.npy").write_bytes(b"")
    said["empty.npy"] = ""
    whole = (tmp_path / "nan.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[: len(whole) // 2])
    said["cut.npy"] = ""
    nibabel.save(nibabel.Nifti1Image(good.astype(np.float32), np.eye(4)), tmp_path / "good.nii.gz")
    packed = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "torn.nii.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"nothing of the kind"))
    said |= {"torn.nii.gz": "", "text.nii.gz": "", "gone.npy": "", "folder": ""}
    (tmp_path / "folder").mkdir()
    volumes = files(*(tmp_path / name for name in said))
    for place, (name, line) in enumerate(said.items()):
        with pytest.raises(UnreadableSample) as error:
            volumes[place]
        assert str(error.value).startswith(f"{tmp_path / name}: "), name
        assert "\n" not in str(error.value)
        assert line in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


def test_other_sizes_are_scaled_or_cropped_and_padded() -> None:
    volume = torch.arange(2.0 * 4 * 4).reshape(1, 2, 4, 4)
    small = scaled(volume, (2, 2, 2))
    assert torch.equal(small[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    grown = scaled(volume, (4, 4, 4))
    assert grown.shape == (1, 4, 4, 4)
    assert torch.equal(grown[0, 0], volume[0, 0])
    assert scaled(volume, (1, 8, 4)).shape == (1, 1, 8, 4)
    cut = cropped(volume, (4, 2, 4))
    assert torch.equal(cut[0, 1:3], volume[0, :, 1:3])
    assert (cut[0, [0, 3]] == 4).all()  # the lowest that is left
    assert cropped(volume, (3, 5, 1)).shape == (1, 3, 5, 1)


def test_volumes_of_another_size_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volumes(tmp_path, each=4, side=5)
    np.save(tmp_path / "train" / "flat" / "0.npy", np.random.default_rng(0).normal(size=(5, 7, 5)))
    open_volumes("folder", "test", size=(5, 5, 5), root=str(tmp_path))
    assert capsys.readouterr().err == ""
    open_volumes("folder", "train", size=(5, 5, 5), root=str(tmp_path))
    said = capsys.readouterr().err
    assert "1 of 8 volumes of train looked at, such as" in said
    assert "0.npy, 5 x 7 x 5, are not of data.size=[5, 5, 5]: they are scaled to it (data.fit)" in said


def test_class_folders_and_csv_files_are_read(tmp_path: Path) -> None:
    write_volumes(tmp_path, each=4, side=5)
    train = open_volumes("folder", "train", size=(5, 5, 5), root=str(tmp_path))
    assert train.source.classes == ("flat", "ramp")
    assert [int(train[place]["label"]) for place in range(8)] == [0] * 4 + [1] * 4
    before = train.fingerprint()
    np.save(tmp_path / "train" / "flat" / "0.npy", np.zeros((9, 9, 9)))
    assert train.fingerprint() != before
    contents = train.contents()
    assert contents is not None
    assert len(contents.read(1)) == contents.sizes[1]
    rows = [f"{split}/ramp/{place}.npy,{0.5 * place},{split}" for split in ("train", "test") for place in range(2)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    numbers = open_volumes("folder", "train", size=(5, 5, 5), root=str(tmp_path / "all.csv"))
    assert [float(numbers[place]["label"]) for place in range(2)] == [0.0, 0.5]


def test_folders_of_folds_and_a_column_of_folds(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for fold in ("fold1", "fold2"):
        write_volumes(tmp_path / f"whole of {fold}", each=2, side=5)
        (tmp_path / f"whole of {fold}" / "train").rename(tmp_path / "set" / fold)
    form = {"source": "folder", "size": (5, 5, 5), "patch": (5, 5, 1)}
    data = Volume(**form, root=str(tmp_path / "set"), fold="2")
    assert data.folds() == ("1", "2")
    held_out = data.dataset("test").source
    assert {Path(held_out.name(row)).parts[-3] for row in range(len(held_out))} == {"fold2"}
    assert len(data.holding_out("1").dataset("train")) == 4
    rows = [f"set/fold{fold}/ramp/{place}.npy,x{place},{fold}" for fold in (1, 2) for place in range(2)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,fold", *rows]))
    listed = Volume(**form, root=str(tmp_path / "all.csv"), fold="1")
    assert listed.folds() == ("1", "2")
    assert len(listed.dataset("test")) == 2
    with pytest.raises(ValidationError, match=r"data\.fold is for data\.source=folder"):
        Volume(**form | {"source": "shapes"}, fold="1")


def test_without_nibabel_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nepa_core.basics.importlib.util.find_spec", lambda name: None)
    files(Path("a.npy"))
    with pytest.raises(UserError, match=r"a\.nii\.gz needs nibabel, not installed here: pip install nepa\[volumes\]"):
        files(Path("a.nii.gz"))


def test_shapes_are_the_same_everywhere_and_alike_but_in_form() -> None:
    train, test = (open_source("shapes", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3000, 600)
    assert train.labels is not None
    volumes = torch.stack([train.read(row) for row in range(900)])
    size = [float((volumes[train.labels[:900] == kind] > 0.5).float().mean()) for kind in range(len(SHAPES))]
    assert max(size) - min(size) < 0.005, "how much of a volume is full says little of its class"
    assert float(volumes[0].double().sum()) == pytest.approx(240.617, abs=0.01)
    assert not torch.equal(test.read(0), train.read(0))
