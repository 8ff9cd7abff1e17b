"""Features are computed once, found again, and nothing damaged or out of date is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nepa_core.basics import Batch, UserError
from nepa_core.model import NEPA
from nepa_core.pooling import Row
from nepa_core.predictor import Trace
from nepa_core.runtime.config import override
from nepa_core.runtime.data import epoch_order, plain_batches
from nepa_core.runtime.distributed import World
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.readout import features
from recipes.readout.features import Features, Reader, Source, kept_features, network_reader, project, raw_reader
from recipes.training.starting import build_model
from tests.conftest import largest_file
from tests.nepa_core.runtime.test_distributed import torchrun
from tests.tiny import CPU, Waves

ALONE = World(0, 1, CPU)
ROWS = [Row(1, "mean"), Row(3, "last")]


@pytest.fixture
def model(tiny_recipe: PretrainConfig) -> NEPA:
    return build_model(tiny_recipe)


def keep(
    config: PretrainConfig,
    model: NEPA,
    store: Path,
    rows: list[Row] = ROWS,
    *,
    split: str = "train",
    limit: int = 40,
    causal: bool = True,
) -> Features:
    reader = network_reader(config, model, rows, causal=causal)
    return kept_features(Source(config, split, limit), [reader], store, ALONE).features[0]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arrays of every pass that computes any, in order."""
    passes: list[list[str]] = []
    compute = features._compute

    def noting(*arguments: Any) -> None:
        passes.append(sorted(name for names in arguments[4] for name in names))
        compute(*arguments)

    monkeypatch.setattr(features, "_compute", noting)
    return passes


BOTH = ["final norm, last", "labels", "layer 1, mean", "sample"]


def drawn(limit: int, count: int) -> list[int]:
    """The samples of a split that are read."""
    return epoch_order(count, 0, 0)[:limit].tolist()


@pytest.mark.parametrize(("split", "called"), [("train", "training"), ("test", "held-out")])
def test_too_many_unreadable_samples_are_called_by_their_split(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, split: str, called: str
) -> None:
    config = override(tiny_recipe, {"data.unreadable": [0, 9, 10], "train.max_unreadable": 0.01})
    with pytest.raises(UserError, match=f"2 unreadable {called} samples of .*train.max_unreadable=0.01"):
        keep(config, model, tmp_path, split=split)


def same(a: Features, b: Features) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_kept_features_are_what_the_network_gives(tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path) -> None:
    unreadable = {"data.unreadable": [0, 9, 10], "train.max_unreadable": 0.2}
    config = override(tiny_recipe, {"data.ragged": True, "data.samples": 30} | unreadable)
    rows = [Row(0, "mean"), Row(2, "last"), Row(3, "bos"), Row(2, "attentive")]
    kept = keep(config, model, tmp_path, rows, split="test", limit=20, causal=False)
    again = kept_features(
        Source(config, "test", 20), [network_reader(config, model, rows, causal=False)], tmp_path, ALONE
    )
    assert again.unreadable == 3, "also where features are found"
    assert again.messages == ["sample 0: torn", "sample 10: torn", "sample 9: torn"]
    dataset = config.data.dataset("test")
    numbers = [i for i in drawn(20, 30) if i not in (0, 9, 10)]
    assert kept["sample"].tolist() == numbers
    samples = [dataset[i] for i in numbers]
    assert kept["labels"].tolist() == [int(sample["label"]) for sample in samples]
    for i, sample in enumerate(samples):
        length = int(sample["length"])
        tokens = config.data.read({key: value[None] for key, value in sample.items()})
        trace = Trace()
        with torch.no_grad():
            model(tokens, causal=False, trace=trace)
        expected = {
            "embedding, mean": trace.hidden[0][0, 1 : length + 1].mean(0),
            "layer 2, last": trace.hidden[2][0, length],
            "final norm, BOS": trace.hidden[3][0, 0],
        }
        for name, value in expected.items():
            assert kept[name].dtype == np.float32
            assert np.allclose(kept[name][i], value, atol=1e-5), name
        assert kept["layer 2, attentive"].dtype == np.float16
        assert np.allclose(kept["layer 2, attentive"][i], trace.hidden[2][0], rtol=1e-3, atol=1e-3)
        assert kept["mask"][i].tolist() == [place <= length for place in range(7)]


def test_raw_tokens_are_canonical_and_blank_where_none_is(tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    config = override(tiny_recipe, {"data.ragged": True})
    source = Source(config, "test", 48)
    kept = kept_features(source, [raw_reader(attentive=True)], tmp_path, ALONE).features[0]
    batch = next(plain_batches(config.data.dataset("test"), batch=48, device=CPU))
    values = np.where(kept["mask"][..., None], batch["values"].numpy(), 0)
    assert np.array_equal(kept["raw tokens, attentive"], values)
    assert np.array_equal(kept["raw tokens"], values.reshape(48, -1))


def test_wide_raw_tokens_are_projected_and_keep_their_distances() -> None:
    x = torch.randn(20, 6000, generator=torch.Generator().manual_seed(0))
    small = project(x, 1024)
    assert small.shape == (20, 1024)
    assert small.dtype == torch.float32
    assert torch.equal(small, project(x, 1024))
    assert torch.allclose(torch.pdist(small), torch.pdist(x), rtol=0.1)
    assert torch.equal(project(x[:, :1024], 1024), x[:, :1024])


def test_features_are_found_again(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, computed: list[list[str]]
) -> None:
    first = keep(tiny_recipe, model, tmp_path)
    again = keep(override(tiny_recipe, {"train.workers": 1, "optim.lr": 1.0}), build_model(tiny_recipe), tmp_path)
    assert same(first, again)
    assert computed == [BOTH]
    more = keep(tiny_recipe, model, tmp_path, [*ROWS, Row(2, "mean")])
    assert same(first, {name: array for name, array in more.items() if name != "layer 2, mean"})
    assert computed == [BOTH, ["labels", "layer 2, mean", "sample"]], "only the row that was not there"
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("what", ["weights", "network", "data", "causal", "split", "samples"])
def test_other_features_are_computed_anew(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, computed: list[list[str]], what: str
) -> None:
    first = keep(tiny_recipe, model, tmp_path)
    config, changes = tiny_recipe, {}
    if what == "weights":
        with torch.no_grad():
            model.predictor.blocks[0].mlp.up.weight[0, 0] += 1.0
    elif what == "network":
        config = override(config, {"model.rope_theta": 10.0})
        other = build_model(config)
        other.load_state_dict(model.state_dict())
        model = other
    elif what == "data":
        config = override(config, {"data.samples": 47})
    else:
        changes = {"causal": {"causal": False}, "split": {"split": "test"}, "samples": {"limit": 39}}[what]
    other = keep(config, model, tmp_path, **changes)
    assert computed == [BOTH, BOTH]
    assert not same(first, other)


def test_held_out_samples_are_drawn_from_the_whole_split(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path
) -> None:
    """Not its first, which are of few classes in a folder of classes; the same for every network and every run."""
    some = keep(tiny_recipe, model, tmp_path, split="test", limit=9)
    assert some["sample"].tolist() == drawn(9, 48) != list(range(9))
    other = override(tiny_recipe, {"train.seed": 5, "model.dim": 32})
    again = keep(other, build_model(other), tmp_path, split="test", limit=9)
    assert np.array_equal(again["sample"], some["sample"])
    whole = keep(tiny_recipe, model, tmp_path, split="test", limit=100)
    assert whole["sample"].tolist() == list(range(48)), "all are read in their order"
    labels = [int(sample["label"]) for sample in tiny_recipe.data.dataset("test")]  # type: ignore[attr-defined]
    assert whole["labels"].tolist() == labels


def test_features_of_the_first_samples_kept_by_earlier_versions_are_not_those_of_drawn_ones(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[list[str]]
) -> None:
    """Where all samples are read they are the same, and found again, but for the numbers of the samples."""

    def keep_as_before(limit: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(features, "draw_seed", lambda *_: None)
            patch.setattr(features, "_first_digest", lambda *_: "the same")
            patch.setattr(features, "BOOKS", ("labels",))
            keep(tiny_recipe, model, tmp_path, split="test", limit=limit)

    for limit in (40, 48):
        keep_as_before(limit)
    monkeypatch.setattr(features, "_first_digest", lambda *_: "the same")
    computed.clear()
    assert keep(tiny_recipe, model, tmp_path, split="test", limit=40)["sample"].tolist() == drawn(40, 48)
    assert keep(tiny_recipe, model, tmp_path, split="test", limit=48)["sample"].tolist() == list(range(48))
    assert computed == [BOTH, ["labels", "sample"]]


def test_an_edited_adapter_is_noticed(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[list[str]]
) -> None:
    """Its settings and the weights stay the same, its code doesn't."""
    first = keep(tiny_recipe, model, tmp_path)
    tokenize = Waves.tokenize
    monkeypatch.setattr(Waves, "tokenize", lambda self, batch: tokenize(self, batch | {"values": -batch["values"]}))
    assert not same(keep(tiny_recipe, model, tmp_path), first)
    assert computed == [BOTH, BOTH]


@pytest.mark.parametrize("harm", ["flip", "shorten", "remove", "record", "empty record"])
def test_damaged_features_are_computed_again(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, computed: list[list[str]], harm: str
) -> None:
    first = {name: array.copy() for name, array in keep(tiny_recipe, model, tmp_path).items()}
    file = next(tmp_path.rglob("layer_1_mean.npy"))
    record = file.with_name("features.json")
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif harm == "shorten":
        file.write_bytes(file.read_bytes()[:-7])
    elif harm == "remove":
        file.unlink()
    else:
        record.write_text("" if harm == "empty record" else record.read_text()[:-40])
    assert same(keep(tiny_recipe, model, tmp_path), first)
    assert computed[1:] == [BOTH if "record" in harm else ["labels", "layer 1, mean", "sample"]]
    assert set(json.loads(record.read_text())["arrays"]) == set(BOTH)


def test_what_was_cut_short_is_not_believed(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[list[str]]
) -> None:
    batches = plain_batches

    def killed(*arguments: Any, **others: Any) -> Iterator[Batch]:
        for count, batch in enumerate(batches(*arguments, **others)):
            if count == 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(features, "plain_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            keep(tiny_recipe, model, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with monkeypatch.context() as patch:  # killed so hard that it could not tidy up
        patch.setattr(features._Part, "__exit__", lambda *_: None)
        patch.setattr(features, "plain_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            keep(tiny_recipe, model, tmp_path)
    assert list(tmp_path.rglob(".writing_*"))
    kept = keep(tiny_recipe, model, tmp_path)
    assert same(kept, keep(tiny_recipe, model, tmp_path / "elsewhere"))
    assert not list(tmp_path.rglob(".writing_*"))
    assert computed == [BOTH] * 4


def test_a_full_disk_is_one_line_and_the_next_probe_is_right(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path
) -> None:
    with largest_file(1500), pytest.raises(UserError, match=r"can't be written: File too large; raise the limit"):
        keep(tiny_recipe, model, tmp_path)
    assert same(keep(tiny_recipe, model, tmp_path), keep(tiny_recipe, model, tmp_path / "elsewhere"))


def test_rows_of_other_labels_are_not_put_side_by_side(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that change behind the first samples, which alone are part of the key."""
    keep(tiny_recipe, model, tmp_path, split="test", limit=48)
    dataset = Waves.dataset

    def edited(self: Waves, split: str) -> Any:
        samples = dataset(self, split)
        samples.labels = samples.labels.clone()
        samples.labels[35] += 1
        return samples

    monkeypatch.setattr(Waves, "dataset", edited)
    rows = [Row(1, "mean"), Row(2, "mean")]
    with pytest.raises(UserError, match="differ from those of an earlier pass over the same data"):
        keep(tiny_recipe, model, tmp_path, rows, split="test", limit=48)
    kept = keep(tiny_recipe, model, tmp_path, rows, split="test", limit=48)
    assert same(kept, keep(tiny_recipe, model, tmp_path / "elsewhere", rows, split="test", limit=48))


def test_the_same_weights_twice_are_computed_once(
    tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path, computed: list[list[str]]
) -> None:
    reader = network_reader(tiny_recipe, model, ROWS, causal=True)
    one, two = kept_features(Source(tiny_recipe, "test", 9), [reader, reader], tmp_path, ALONE).features
    assert computed == [BOTH]
    assert same(one, two)


def test_samples_of_unequal_length_are_named(tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    lengths = iter([4, 4, 5])
    reader = Reader({}, ("x",), lambda tokens, _: {"x": torch.zeros(len(tokens.values), next(lengths))})
    with pytest.raises(UserError, match=r"x: batches of shape \[4\] and of shape \[5\].*pad all samples to one length"):
        kept_features(Source(tiny_recipe, "train", 40), [reader], tmp_path, ALONE)


def test_a_probe_holds_no_more_than_a_batch(tiny_recipe: PretrainConfig, model: NEPA, tmp_path: Path) -> None:
    kept = keep(tiny_recipe, model, tmp_path)
    assert all(isinstance(array, np.memmap) for array in kept.values())
    assert kept["layer 1, mean"].shape == (40, tiny_recipe.model.dim)
    assert math.prod(kept["layer 1, mean"].shape) * 4 < next(tmp_path.rglob("layer_1_mean.npy")).stat().st_size


@pytest.mark.distributed
def test_two_processes_keep_the_features_of_one(tmp_path: Path) -> None:
    """Every file, byte for byte, over uneven batches and an unreadable sample."""
    run = str(tmp_path / "run")
    assert main(["pretrain", "tests.tiny:ragged", "train.length.steps=2", f"out={run}"]) == 0
    words = [
        "probe",
        run,
        "poolings=mean,attentive",
        "layers=1",
        "train_samples=43",
        "data.unreadable=[3]",
        "train.max_unreadable=0.1",
    ]
    assert main([*words, f"out={tmp_path / 'one'}"]) == 0
    done = torchrun("recipes", *words, f"out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    one, two = (sorted((tmp_path / name / "features").rglob("*")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    files = [(a, b) for a, b in zip(one, two, strict=True) if a.is_file()]
    assert len(files) > 20
    assert [a.name for a, b in files if a.read_bytes() != b.read_bytes()] == []
    results = [json.loads((tmp_path / name / "probe.json").read_text()) for name in ("one", "two")]
    assert results[0] | {"made_with": None} == results[1] | {"made_with": None}
