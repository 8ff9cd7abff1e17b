"""Vectors from disk: every layout gives the same samples, whatever is wrong is named by file and row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file

import nepa_core
from modalities.data.listing import shared_content
from modalities.data.vectors import open_split
from modalities.features import Features, open_both
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.contract import check_modality
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.run import Run
from recipes import pretrain
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.presets import small
from recipes.readout.probing import subject

SHAPE = (24, 7, 3)
LAYOUTS = ("npy", "safetensors", "parquet", "folder")


def arrays(split: str, axes: int | None = 2, label: str = "class") -> dict[str, np.ndarray]:
    """Values [S, N, P], lengths [S], coords [S, N, A], label: class 1 has the larger first feature."""
    draw = np.random.default_rng(len(split))
    lengths = np.array([7, 2, *draw.integers(2, 8, SHAPE[0] - 2)])
    label_ = draw.integers(0, 2, SHAPE[0])
    values = draw.normal(size=SHAPE).astype(np.float32)
    values[..., 0] += 3 * label_[:, None]
    found = {"values": 5 + 100 * values, "lengths": lengths}
    if axes is not None:
        found["coords"] = draw.uniform(size=(*SHAPE[:2], axes)).astype(np.float32)
    return found | {"class": {"label": label_}, "number": {"label": values.mean((1, 2))}, "none": {}}[label]


def write(root: Path, split: str, layout: str, data: dict[str, np.ndarray]) -> None:
    root.mkdir(exist_ok=True)
    rows = range(len(data["values"]))
    if layout == "npy":
        for key, array in data.items():
            np.save(root / (f"{split}.npy" if key == "values" else f"{split}.{key}.npy"), array)
        return
    if layout == "safetensors":
        save_file(data, root / f"{split}.safetensors")
        return
    keys = [key for key in ("values", "coords") if key in data]
    real = {key: [data[key][i, : data["lengths"][i]] for i in rows] for key in keys}
    label = {"label": data["label"]} if "label" in data else {}
    if layout == "parquet":
        lists: dict[str, Any] = {key: [part.tolist() for part in parts] for key, parts in real.items()}
        pq.write_table(pa.table(lists | label), root / f"{split}.parquet")
    else:
        (root / split).mkdir()
        for i in rows:
            np.save(root / split / f"{i:03}.npy", real["values"][i])
            if "coords" in real:
                np.save(root / split / f"{i:03}.coords.npy", real["coords"][i])
        if "label" in data:
            np.save(root / f"{split}.label.npy", data["label"])


def written(root: Path, layout: str, **options: Any) -> Features:
    for split in ("train", "test"):
        write(root, split, layout, arrays(split, **options))
    return Features(root=str(root))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("axes", "label"),
    [(3, "class"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((None, "number"), (1, "none")))],
)
def test_every_layout_is_sound_and_holds_the_same(tmp_path: Path, layout: str, axes: int | None, label: str) -> None:
    features = written(tmp_path / layout, layout, axes=axes, label=label)
    check_modality(features)
    for order in ("centre_out", "random_per_sample"):
        check_modality(features.model_copy(update={"patch_order": order}))
    assert features.classes() == (("0", "1") if label == "class" else None)
    data = arrays("test", axes=axes, label=label)
    for sample, values, length in zip(
        features.dataset("test"),
        data["values"],
        data["lengths"],
        strict=True,  # type: ignore[call-overload]
    ):
        np.testing.assert_allclose(sample["values"][:length], values[:length], rtol=1e-6)
        assert not sample["values"][length:].any()
        assert ("coords" in sample, "label" in sample) == (axes is not None, label != "none")
        if label != "none":
            assert sample["label"].is_floating_point() == (label == "number")


def test_tokens_are_standardised_masked_and_placed(tmp_path: Path) -> None:
    features = written(tmp_path / "data", "npy", axes=2).model_copy(update={"coord_scale": 0.5})
    samples = features.dataset("train")
    batch = torch.utils.data.default_collate([samples[i] for i in range(24)])
    tokens = features.read(batch)
    assert tokens.mask is not None
    assert torch.equal(tokens.mask.sum(1), batch["length"])
    torch.testing.assert_close(tokens.values[tokens.mask].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.values[tokens.mask].std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert torch.equal(tokens.coords, batch["coords"] / 2)
    raw = features.model_copy(update={"standardise": False}).read(batch)
    assert torch.equal(raw.values, batch["values"])


@pytest.mark.slow
def test_a_trained_run_standardises_by_what_it_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = written(tmp_path / "own", "npy", label="class")
    write(tmp_path / "other", "test", "npy", arrays("test", label="class"))
    scaled = arrays("train", label="class")
    write(tmp_path / "other", "train", "npy", scaled | {"values": 3 * scaled["values"] + 10})
    sizes = {"model.dim": 16, "model.depth": 1, "model.heads": 2, "train.length.steps": 1, "train.batch": 8}
    run, words = tmp_path / "run", [f"data.root={tmp_path / 'other'}"]
    pretrain(override(small(own), sizes | {"verdict.test_samples": 8}), out=run, verbose=False)
    assert "standardise_by" not in (run / "config.json").read_text()
    for name, extra in {"a": [], "b": words, "c": [*words, f"data.standardise_by={tmp_path / 'other'}"]}.items():
        assert main(["embed", str(run), "-q", f"out={tmp_path / name}.npy", *extra]) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    read = subject(str(run), None, {"data.root": str(tmp_path / "other")}, torch.device("cpu")).config.data
    assert (read.root, read.standardise_by) == (str(tmp_path / "other"), str(tmp_path / "own"))  # type: ignore[attr-defined]
    assert subject(str(run), None, {}, torch.device("cpu")).config.data == own
    data = override(load_config(PretrainConfig, run / "config.json"), {"data.root": str(tmp_path / "other")}).data
    assert nepa_core.load(run, data=data).data == read
    assert main(["inspect", str(run), "samples=1", *words]) == 0
    tuned = str(tmp_path / "tuned")
    assert main(["finetune", str(run), "train.length.steps=8", "control=false", "-q", f"out={tuned}"]) == 0
    losses = []
    for extra in ([], words, [*words, f"data.standardise_by={tmp_path / 'other'}"]):
        assert main(["evaluate", tuned, *extra]) == 0
        losses.append(json.loads((tmp_path / "tuned" / "evaluate.json").read_text())["held_out_loss"])
    assert losses[0] == losses[1] != losses[2]
    capsys.readouterr()
    saved = (run / "config.json").read_text()
    (run / "config.json").write_text(saved.replace(str(tmp_path / "own"), "moved"))
    assert nepa_core.load(run, data=data).data == data
    assert "moved, which the network's vectors were standardised by, can't be read" in capsys.readouterr().err
    words.append(f"data.standardise_by={tmp_path / 'own'}")
    assert main(["embed", str(run), "-q", f"out={tmp_path / 'd'}.npy", *words]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_a_tiny_unit_nor_a_large_offset_costs_the_signal(tmp_path: Path, layout: str) -> None:
    """Of what float64 holds; a constant stays 0."""
    wave = np.sin(np.arange(24.0 * 7)).reshape(24, 7)
    values = np.stack([wave, 1e-12 * wave, 1e9 + 10 * wave, np.full_like(wave, 0.1)], 2)
    for split in ("train", "test"):
        write(tmp_path / layout, split, layout, {"values": values, "lengths": np.full(24, 7)})
    features = Features(root=str(tmp_path / layout))
    samples = features.dataset("train")
    tokens = features.read(torch.utils.data.default_collate([samples[i] for i in range(24)])).values
    assert tokens.dtype == torch.float32
    standard = torch.tensor((wave - wave.mean()) / wave.std(), dtype=torch.float32)
    for place in range(3):
        assert torch.allclose(tokens[..., place], standard, atol=1e-6)
    assert float(tokens[..., 3].abs().max()) < 1e-6


def test_values_that_are_edited_in_place_change_the_fingerprint_and_a_copy_does_not(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2000, 8, 4))
    prints = []
    for name in ("first", "copy", "start", "middle", "end"):
        root = tmp_path / name
        root.mkdir()
        edited = values.copy()
        if name in (places := {"start": 0, "middle": 1000, "end": -1}):
            edited[places[name], 0, 0] += 1
        for split in ("train", "test"):
            np.save(root / f"{split}.npy", edited)
        os.utime(root / "train.npy", (0, len(prints)))
        samples: Any = Features(root=str(root)).dataset("train")
        prints.append(samples.fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_integers_are_exact_and_files_of_several_dtypes_make_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "0.npy", 10**9 + np.arange(8).reshape(4, 2))
        np.save(tmp_path / split / "1.npy", np.ones((4, 2), np.float32))
    samples = Features(root=str(tmp_path)).dataset("train")
    assert {samples[i]["values"].dtype for i in range(2)} == {torch.float64}
    assert (samples[0]["values"] - 10**9).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    raw = Features(root=str(tmp_path), standardise=False)
    assert raw.read(torch.utils.data.default_collate([samples[0], samples[1]])).values.dtype == torch.float32


def test_rounding_of_float32_is_no_feature(tmp_path: Path) -> None:
    """A constant that a network computed differs in its last digit from sample to sample."""
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    values[..., 1] = np.where(values[..., 0] > 0, np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1)))
    for split in ("train", "test"):
        write(tmp_path, split, "npy", {"values": values})
    features = Features(root=str(tmp_path))
    batch = torch.utils.data.default_collate([features.dataset("train")[i] for i in range(24)])
    assert batch["values"].dtype == torch.float32
    tokens = features.read(batch).values
    assert float(tokens[..., 1].abs().max()) < 1e-6
    assert float(tokens[..., 0].std()) == pytest.approx(1, rel=0.05)


def test_shared_coordinates_stay_shared_and_whole_sequences_need_no_mask(tmp_path: Path) -> None:
    for split in ("train", "test"):
        data = arrays(split, axes=None)
        shared = np.arange(14, dtype=np.float32).reshape(7, 2)
        write(tmp_path, split, "npy", {"values": data["values"], "coords": shared})
    features = Features(root=str(tmp_path))
    samples = features.dataset("train")
    tokens = features.read(torch.utils.data.default_collate([samples[0], samples[1]]))
    assert tokens.mask is None
    assert tokens.coords.tolist() == shared.tolist()


def spoil(data: dict[str, np.ndarray], key: str, value: Any) -> dict[str, np.ndarray]:
    return data | {key: value(data[key])}


def long(lengths: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(lengths)) == 3, 9, lengths)


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        ("npy", lambda d: spoil(d, "lengths", long), "train.npy: row 3 has length 9, and the array holds 7 tokens"),
        ("npy", lambda d: spoil(d, "lengths", lambda x: 0 * x), "train.npy, row 0 has 0 tokens"),
        ("npy", lambda d: spoil(d, "lengths", lambda x: x * 0.5), "lengths are float64"),
        ("npy", lambda d: spoil(d, "lengths", lambda x: x[:5]), "make them integers [24]"),
        ("npy", lambda d: spoil(d, "coords", lambda x: np.repeat(x, 2, 2)), "coordinates have 4 axes; 1 to 3"),
        ("npy", lambda d: spoil(d, "coords", lambda x: x[:, :5]), "coords have shape [24, 5, 2] for values of"),
        ("npy", lambda d: spoil(d, "coords", lambda x: x[0] / 0), "shared coordinates of token 0 are NaN"),
        ("npy", lambda d: spoil(d, "values", lambda x: x[0]), "values have shape [7, 3]; make them [S, N, P]"),
        ("npy", lambda d: spoil(d, "values", lambda x: x.astype(str)), "numbers are wanted"),
        ("npy", lambda d: spoil(d, "label", lambda x: x[1:]), "for 24 sequences"),
        ("npy", lambda d: spoil(d, "label", lambda x: x / (x - x)), "train.npy, row 0 has a label that is NaN"),
        ("folder", lambda d: spoil(d, "coords", lambda x: np.repeat(x, 2, 2)), "coordinates have 4 axes; 1 to 3"),
        ("parquet", lambda d: spoil(d, "coords", lambda x: np.repeat(x, 2, 2)), "coordinates have 4 axes; 1 to 3"),
        ("safetensors", lambda d: spoil(d, "lengths", long), "train.safetensors: row 3 has length 9"),
        ("safetensors", lambda d: {"vectors": d["values"], "values": d["values"][0]}, "make them [S, N, P]"),
        ("npy", lambda d: {"values": d["values"], "lengths": d["lengths"]}, "differ in coordinate axes: 0 and 2"),
        ("npy", lambda d: spoil(d, "values", lambda x: x[..., :0]), "train.npy: tokens hold no numbers"),
        ("npy", lambda d: spoil(d, "label", lambda x: x[0]), "train.npy: label holds int64 of shape [] for 24"),
        ("folder", lambda d: spoil(d, "label", lambda x: 0 * x - 1), "000.npy has the class -1; number classes"),
        ("safetensors", lambda d: spoil(d, "label", lambda x: np.array(3)), "label holds int64 of shape [] for 24"),
        ("folder", lambda d: spoil(d, "coords", lambda x: x[..., :0]), "coordinates have 0 axes; 1 to 3"),
        ("npy", lambda d: spoil(d, "values", lambda x: x[..., :2]), "differ in numbers in a token: 2 and 3"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_does_not_fit_is_named(tmp_path: Path, layout: str, change: Any, said: str) -> None:
    write(tmp_path, "test", layout, arrays("test"))
    write(tmp_path, "train", layout, change(arrays("train")))
    with pytest.raises(UserError) as raised:
        Features(root=str(tmp_path)).dataset("train")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["values", "coords"])
def test_a_sequence_with_nan_is_skipped_and_named(tmp_path: Path, layout: str, key: str) -> None:
    data = arrays("train")
    data[key][0, 4, 0] = np.nan
    write(tmp_path, "train", layout, data)
    write(tmp_path, "test", layout, arrays("test"))
    features = Features(root=str(tmp_path))
    with pytest.raises(UnreadableSample, match="NaN or infinity in token 4") as raised:
        features.dataset("train")[0]
    assert ("000.npy" if layout == "folder" else "row 0") in str(raised.value)
    check_modality(features)


def test_files_that_are_damaged_missing_or_of_another_width_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=DIR is wanted"):
        Features().dataset("train")
    with pytest.raises(UserError, match=r"has no train split: one of train\.npy"):
        Features(root=str(tmp_path)).dataset("train")
    features = written(tmp_path / "data", "folder")
    (tmp_path / "data" / "train" / "005.npy").write_bytes(b"torn")
    fresh()
    assert len(features.dataset("train")) == 24  # type: ignore[arg-type]
    np.save(tmp_path / "data" / "train" / "005.npy", np.zeros((4, 9)))
    fresh()
    with pytest.raises(UserError, match=r"005\.npy has shape \[4, 9\]; make it \[n, 3\]"):
        features.dataset("train")
    (tmp_path / "data" / "train" / "005.npy").unlink()
    (tmp_path / "data" / "train" / "006.coords.npy").unlink()
    with pytest.raises(UserError, match=r"006\.coords\.npy is missing"):
        features.dataset("train")


def fresh() -> None:
    """Forget what has been opened."""
    open_split.cache_clear()
    open_both.cache_clear()


@pytest.mark.parametrize("key", ["values", "coords"])
@pytest.mark.parametrize("harm", ["text", "nothing", "cut", "head", "npz", "strings"])
def test_a_damaged_file_among_many_is_one_unreadable_sequence_and_the_labels_stay(
    tmp_path: Path, key: str, harm: str
) -> None:
    features = written(tmp_path, "folder")
    file = tmp_path / "train" / f"005{'' if key == 'values' else '.coords'}.npy"
    content = file.read_bytes()
    spoiled = {"text": b"no array", "nothing": b"", "cut": content[:-5], "head": content[:20] + b"(((" + content[23:]}
    if harm == "npz":
        np.savez(tmp_path / "x.npz", a=np.zeros(3))
        spoiled["npz"] = (tmp_path / "x.npz").read_bytes()
    if harm == "strings":
        np.save(file, np.array([["a"]]))
    else:
        file.write_bytes(spoiled[harm])
    samples, data = features.dataset("train"), arrays("train")
    assert len(samples) == 24  # type: ignore[arg-type]
    with pytest.raises(UnreadableSample, match=r"005\.npy: ") as raised:
        samples[5]
    assert "\n" not in str(raised.value)
    assert [int(samples[i]["label"]) for i in range(24) if i != 5] == [
        int(y) for i, y in enumerate(data["label"]) if i != 5
    ]
    for each in (tmp_path / "train").glob("*.npy"):
        each.write_bytes(b"torn")
    fresh()
    with pytest.raises(UserError, match=r"000\.npy can't be read: .*nor can any other file"):
        features.dataset("train")


@pytest.mark.parametrize("name", ["train.npy", "train.label.npy", "train.lengths.npy", "train.coords.npy"])
def test_a_damaged_array_is_named(tmp_path: Path, name: str) -> None:
    features = written(tmp_path, "npy")
    (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(UserError, match=rf"{name} can't be read: it is damaged or no npy file"):
        features.dataset("train")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} can't be read: it is no regular file"):
        features.dataset("train")


def test_numbers_in_names_are_sorted_as_numbers_and_keep_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(12):
            np.save(tmp_path / split / f"{i}.npy", np.full((6, 4), i, np.float32))
        np.save(tmp_path / f"{split}.label.npy", np.arange(12))
    (tmp_path / "train" / "._3.npy").write_bytes(b"\0")
    (tmp_path / "train" / "12.npz").write_bytes(b"\0")
    (tmp_path / "train" / "old").mkdir()
    os.mkfifo(tmp_path / "train" / "13.npy")
    samples = Features(root=str(tmp_path)).dataset("train")
    assert [(int(samples[i]["values"][0, 0]), int(samples[i]["label"])) for i in range(12)] == [
        (i, i) for i in range(12)
    ]
    said = capsys.readouterr().err
    assert "files have their labels in the order of the numbers in their names: 2.npy is number 2" in said
    for what in (
        "1 hidden or made by a system (such as ._3.npy)",
        "1 with the suffix .npz",
        "1 folders",
        "1 no regular",
    ):
        assert what in said


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (lambda x: x % 3 + 5_000_000, "3 classes occur in training, numbered from 5000000 to 5000002, and none is 0"),
        (lambda x: (x % 2) << 40, "2 classes occur in training, numbered from 0 to 1099511627776, and none is 1"),
        (lambda x: x % 3 + 1, "numbered from 1 to 3, and none is 0; number them from 0 to 2"),
        (lambda x: x % 3 - 1, "has the class -1"),
        (lambda x: np.where(x == 3, 2**64 - 1, x % 3).astype(np.uint64), "a label of 18446744073709551615 is beyond"),
        (lambda x: x.astype(str), "holds <U"),
    ],
)
@pytest.mark.parametrize("layout", ["npy", "folder"])
def test_numbers_of_classes_with_a_gap_are_one_line(tmp_path: Path, layout: str, labels: Any, said: str) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, layout, arrays(split, label="none") | {"label": labels(np.arange(24))})
    with pytest.raises(UserError, match=said):
        Features(root=str(tmp_path)).dataset("train")


def test_classes_with_a_gap_in_parquet_are_one_line(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "parquet", spoil(arrays(split), "label", lambda x: x + 7))
    with pytest.raises(UserError, match=r"train\.parquet: label: 2 classes occur in training, numbered from 7 to 8"):
        Features(root=str(tmp_path)).dataset("train")


def test_whole_floating_point_labels_are_said_to_be_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "npy", spoil(arrays(split), "label", lambda x: x.astype(float)))
    assert Features(root=str(tmp_path)).classes() is None
    assert "labels are floating-point and so numbers to predict" in capsys.readouterr().err


def test_of_several_layouts_and_splits_the_one_that_is_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "npy")
    written(tmp_path, "parquet")
    write(tmp_path, "val", "npy", arrays("val"))
    Features(root=str(tmp_path)).dataset("test")
    said = capsys.readouterr().err
    assert "train.npy is read, and train.parquet left aside" in said
    assert "test.npy is read, and test.parquet, val.npy left aside" in said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_in_both_splits_are_found_and_the_list_has_a_fingerprint(tmp_path: Path, layout: str) -> None:
    train, test = arrays("train"), arrays("test")
    for key in ("values", "lengths"):
        test[key][3] = train[key][8]
    write(tmp_path, "train", layout, train)
    write(tmp_path, "test", layout, test)
    samples = [Features(root=str(tmp_path)).dataset(split) for split in ("train", "test")]
    found = shared_content(*(each.contents() for each in samples))  # type: ignore[attr-defined]
    assert found.count == 1
    assert "3" in found.names[0][0]
    before = samples[0].fingerprint()  # type: ignore[attr-defined]
    fresh()
    write(tmp_path / "more", "train", layout, {key: each[:23] for key, each in train.items()})
    write(tmp_path / "more", "test", layout, test)
    assert Features(root=str(tmp_path / "more")).dataset("train").fingerprint() != before  # type: ignore[attr-defined]


def test_rows_of_an_array_are_read_without_a_map_of_the_file(tmp_path: Path) -> None:
    features = written(tmp_path, "npy")
    stored = open_both(str(tmp_path))["train"]
    np.testing.assert_array_equal(stored.values(7), arrays("train")["values"][7])
    row = stored.values(7)
    while row.base is not None:
        row = row.base  # type: ignore[assignment]
    assert not isinstance(row, np.memmap)
    np.save(tmp_path / "train.npy", np.asfortranarray(arrays("train")["values"]))
    fresh()
    np.testing.assert_array_equal(features.dataset("train")[7]["values"][:2], arrays("train")["values"][7][:2])


def ragged_values(first: Any, rows: int = 3) -> dict[str, Any]:
    return {"values": [first, *([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]] * rows)]}


def parquet(root: Path, columns: dict[str, Any]) -> Features:
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), root / f"{split}.parquet")
    return Features(root=str(root))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (ragged_values([[1, 2, 3], [4]]), "token 0 of values has length 3, and most have 2"),
        (ragged_values([[1, 2], [3]]), "token 1 of values has length 1, and most have 2"),
        (ragged_values([[1, 2], None, [3, 4]]), "token 1 of values has length 0"),
        (ragged_values([[1, None], [3, 4]]), "NaN or infinity in token 0"),
        (
            {**ragged_values([[1, 2], [3, 4]]), "coords": [[[1.0], [2.0, 3.0]], *[[[1.0]] * 3] * 3]},
            "token 1 of coords has length 2, and most have 1",
        ),
        ({**ragged_values([[1, 2], [3, 4]]), "coords": [None, *[[[1.0]] * 3] * 3]}, "it has no coords"),
    ],
)
def test_tokens_of_parquet_that_are_ragged_or_missing_are_not_cut_anew(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    samples = parquet(tmp_path, columns).dataset("train")
    with pytest.raises(UnreadableSample, match=f"train.parquet, row 0: {said}"):
        samples[0]
    assert samples[1]["values"].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"values": [1.0] * 4}, "the column 'values' holds double; make every row a list of tokens"),
        ({"values": ["a"] * 4}, "the column 'values' holds string"),
        ({"values": [[1.0, 2.0]] * 4}, "the column 'values' holds list<"),
        ({"values": [[]] * 4}, "the column 'values' holds list<"),
        ({"values": [[["a"], ["b"]]] * 4}, "the column 'values' holds list<"),
        ({"values": [[[1.0], [2.0]]] * 4, "coords": [1.0] * 4}, "the column 'coords' holds double"),
        ({"values": [[[1.0], [2.0]]] * 4, "label": [0, 1, None, 0]}, "row 2 has no label"),
        (
            {"values": [[[1.0], [2.0]]] * 4, "label": [[0.5], [1.0], [2.0, 3.0], [0.0]]},
            "row 2 has a label of 2 numbers, and row 0 one of 1",
        ),
    ],
)
def test_columns_of_parquet_that_hold_something_else_are_named(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"train.parquet: {said}"):
        parquet(tmp_path, columns).dataset("train")


@pytest.mark.parametrize("shape", [(), (4,), (4, 3, 1)])
def test_a_file_of_a_folder_that_is_no_matrix_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    features = written(tmp_path, "folder")
    first = tmp_path / "train" / "000.npy"
    kept = np.load(first)
    np.save(first, np.zeros(shape))
    with pytest.raises(UserError, match=r"000\.npy has shape .*; make it \[n, P\]"):
        features.dataset("train")
    np.save(first, kept)
    np.save(first.with_suffix(".coords.npy"), np.zeros(shape))
    with pytest.raises(UserError, match=r"000\.coords\.npy has shape .*; make it \[7, "):
        features.dataset("train")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (lambda x: np.where(np.arange(24) == 5, 7, x), "test.npy, row 5 has the class 7, which no sequence of .*train"),
        (lambda x: x + 0.5, "test.npy differ in labels: classes and numbers"),
        (lambda x: np.stack([x, x], 1) + 0.5, r"differ in labels: classes and numbers \[2\]"),
    ],
)
def test_held_out_labels_that_training_does_not_know_are_named_at_once(tmp_path: Path, labels: Any, said: str) -> None:
    write(tmp_path, "train", "npy", arrays("train"))
    write(tmp_path, "test", "npy", spoil(arrays("test"), "label", labels))
    with pytest.raises(UserError, match=said):
        Features(root=str(tmp_path)).dataset("train")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float64])
def test_labels_of_any_dtype_are_classes_or_numbers(tmp_path: Path, kind: Any) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "npy", spoil(arrays(split), "label", lambda x: x.astype(kind)))
    label = Features(root=str(tmp_path)).dataset("train")[0]["label"]
    assert label.dtype == (torch.float32 if kind is np.float64 else torch.int64)


def test_half_precision_that_numpy_lacks_is_read(tmp_path: Path) -> None:
    values, coords = torch.randn(4, 5, 3).bfloat16(), torch.rand(4, 5, 2).bfloat16()
    for split in ("train", "test"):
        torch_save_file({"values": values, "coords": coords}, tmp_path / f"{split}.safetensors")
    sample = Features(root=str(tmp_path)).dataset("train")[1]
    assert torch.equal(sample["values"], values[1].float())
    assert torch.equal(sample["coords"], coords[1].float())


@pytest.mark.slow
def test_the_preset_trains_packed_and_is_probed_and_fine_tuned(tmp_path: Path) -> None:
    written(tmp_path / "data", "safetensors", axes=3)
    keys = ["train.length.steps=3", "train.batch=8", "model.dim=24", "model.heads=2"]
    run = str(tmp_path / "run")
    words = ["pretrain", "recipes.presets:features", f"data.root={tmp_path / 'data'}", f"out={run}", *keys]
    assert main(words) == 0
    assert Run(Path(run)).load_config(type(load())).model.pack
    assert main(["probe", run]) == 0
    assert main(["finetune", run, "train.length.steps=2", f"out={tmp_path / 'tuned'}"]) == 0
    summary = Run(tmp_path / "tuned").summary()
    assert summary is not None
    assert summary["classes"] == ["0", "1"]


def load() -> Any:
    from recipes.presets import features

    return features()


def folder_of(root: Path, names: list[str], labels: list[int] | None = None) -> Path:
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for number, name in enumerate(names):
            np.save(root / split / "x.npy", np.full((4, 3), number, np.float32))
            (root / split / "x.npy").rename(root / split / name)
        if labels is not None:
            np.save(root / f"{split}.label.npy", np.array(labels))
    return root


def test_a_suffix_in_large_letters_is_listed(tmp_path: Path) -> None:
    samples = Features(root=str(folder_of(tmp_path, ["0.npy", "1.NPY"], [0, 1])), standardise=False).dataset("train")
    assert [(float(samples[i]["values"][0, 0]), int(samples[i]["label"])) for i in (0, 1)] == [(0.0, 0), (1.0, 1)]


@pytest.mark.parametrize("name", ["labels.csv", "train.labels.npy", "train_targets.npy", "classes.json"])
def test_labels_that_lie_where_none_are_read_are_said(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_of(tmp_path, ["0.npy", "1.npy"])
    (root / name).write_bytes(b"?")
    assert Features(root=str(root)).classes() is None
    assert f"no labels; {name} beside the data is not read" in capsys.readouterr().err
    assert Features(root=str(folder_of(tmp_path / "plain", ["0.npy"]))).classes() is None
    assert capsys.readouterr().err == ""


def test_nobody_is_told_to_unpickle_a_file(tmp_path: Path) -> None:
    root = folder_of(tmp_path, ["0.npy", "1.npy", "2.npy"])
    (root / "train" / "1.npy").write_bytes(b"junk")
    np.save(root / "train" / "2.npy", np.array([{"a": 1}], dtype=object))
    samples = Features(root=str(root)).dataset("train")
    for index in (1, 2):
        with pytest.raises(UnreadableSample, match=rf"{index}\.npy: .*Python objects are never read") as error:
            samples[index]
        assert "pickle" not in str(error.value)


def test_other_labels_of_the_same_sequences_are_other_data(tmp_path: Path) -> None:
    roots = [
        folder_of(tmp_path / str(k), ["0.npy", "1.npy"], labels) for k, labels in enumerate(([0, 1], [0, 1], [1, 0]))
    ]
    one, same, other = (Features(root=str(root)).dataset("train").fingerprint() for root in roots)  # type: ignore[attr-defined]
    assert one == same != other
