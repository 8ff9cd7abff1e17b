"""A trained network at a Python prompt: what `nepa_core.load` opens, and what it reads from samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

import nepa_core
from modalities.features import open_both
from nepa_core.basics import Batch, UserError
from nepa_core.pooling import Row
from nepa_core.predictor import Trace
from nepa_core.runtime import trust
from nepa_core.runtime.checkpoint import load_latest
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.load import Network
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.presets import features
from recipes.readout.features import Source, kept_features, network_reader
from recipes.training.pretraining import load_pretrained, pretrain
from tests import tiny, tiny_scenes
from tests.release import FACTS, random_release, write_release
from tests.tiny import CPU, Waves

ALONE = World(0, 1, CPU)


class Backwards(Waves):
    """The tokens of every sample in the other direction, padding first."""

    def order(self, tokens: Tokens) -> Tensor:
        return torch.arange(tokens.values.shape[1]).flip(0)


def backwards() -> PretrainConfig:
    return override(tiny.recipe(), {"data": Backwards(ragged=True), "model.drop_path": 0.2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an order, padding, dropped paths and an average, on 48 held-out samples in batches of 8."""
    folder = tmp_path_factory.mktemp("runs") / "backwards"
    pretrain(backwards(), Run(folder), ALONE, show=False)
    return folder


@pytest.fixture
def net(folder: Path) -> Network:
    return nepa_core.load(folder)


def samples(net: Network) -> list[Batch]:
    held_out = net.data.dataset("test")
    return [held_out[i] for i in range(48)]


# ------------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("pooling", ["mean", "last", "bos"])
def test_features_are_those_that_the_probe_reads(folder: Path, net: Network, tmp_path: Path, pooling: Any) -> None:
    config, model = load_pretrained(Run(folder), CPU)
    rows = [Row(layer, pooling) for layer in range(4)]
    reader = network_reader(config, model, rows, causal=True)
    kept = kept_features(Source(config, "test", 48), [reader], tmp_path, ALONE).features[0]
    found = net.encode(net.data.dataset("test"), layer=["embedding", 1, 2, "final"], pooling=pooling)
    for name, read in zip(reader.names, found, strict=True):
        assert torch.equal(read, torch.from_numpy(np.array(kept[name]))), name


def test_tokens_come_in_canonical_order_with_their_mask(net: Network) -> None:
    batch, trace = default_collate(samples(net)), Trace()
    with torch.no_grad():
        net.model(net.data.read(batch), causal=True, trace=trace)
    features, mask = net.encode(batch, layer=1, pooling=None)
    assert torch.equal(mask, torch.arange(6) < batch["length"][:, None])
    assert (features[~mask] == 0).all()
    torch.testing.assert_close(features[mask], trace.hidden[1][:, 1:].flip(1)[mask])


def test_a_data_set_a_list_and_a_batch_are_read_alike_whatever_the_mode_of_the_model(net: Network) -> None:
    listed = samples(net)
    expected = net.encode(net.data.dataset("test"))
    net.model.train()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for given in (listed, default_collate(listed), net.data.dataset("test")):
        assert torch.equal(net.encode(given), expected)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert net.model.training
    assert not expected.requires_grad
    whole = dataclasses.replace(net, reading=net.reading._replace(batch=64))
    torch.testing.assert_close(whole.encode(listed), expected)


def test_without_causality_a_token_sees_those_after_it(net: Network) -> None:
    both = dataclasses.replace(net, causal=False)
    assert (net.encode(samples(net)) - both.encode(samples(net))).abs().max() > 1e-3


def test_the_averaged_weights_are_read(folder: Path, net: Network) -> None:
    stored, _ = load_latest(Run(folder).checkpoints)
    assert stored is not None
    assert net.averaged
    own = net.model.predictor.norm.weight
    assert torch.equal(own, stored.tensors["ema"]["predictor.norm.weight"])
    assert not torch.equal(own, stored.tensors["model"]["predictor.norm.weight"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a layer": ({"layer": 9}, r'^layer=9: .* layers 0 \(the "embedding"\) to 2, "final", and "best"$'),
    "a name": ({"layer": "last"}, r"^layer='last': "),
    "a pooling": ({"pooling": "max"}, r'^pooling=\'max\': it is "mean", "last", "bos", or None'),
    "no probe": (
        {"layer": "best"},
        r"^layer=\"best\" is what a probe chose, and there is no .*probe\.json",
    ),
    "a loader": ({"samples": DataLoader([])}, r"^a DataLoader can't be read: give a batch"),
    "no tensor": ({"samples": {"name": "x"}}, r"^the batch holds no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_t_be_read_is_said_in_one_line(net: Network, case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(UserError, match=message):
        net.encode(**({"samples": samples(net)} | options))


def test_a_sample_that_can_t_be_read_is_named_and_not_left_out(net: Network) -> None:
    torn = Waves(ragged=True, unreadable=(3,)).dataset("test")
    with pytest.raises(UserError, match=r"^sample 3: torn; leave it out"):
        net.encode(torn)


def test_best_is_the_row_that_the_probe_chose(folder: Path, net: Network, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    net = dataclasses.replace(net, source=str(tmp_path / "run"))
    rows = {"embedding, mean": 0.3, "layer 2, attentive": 0.9, "layer 1, last": 0.8, "layer 2, mean": 0.5}
    probe = {"causal": True, "layers": [{"name": name, "validation": value} for name, value in rows.items()]}
    file = tmp_path / "run" / "probe.json"
    file.write_text(json.dumps(probe))
    read = samples(net)
    assert torch.equal(net.encode(read, layer="best"), net.encode(read, layer=1, pooling="last"))
    assert torch.equal(net.encode(read, layer="best", pooling="mean"), net.encode(read, layer=2))
    assert torch.equal(net.encode(read, layer="best", pooling=None)[0], net.encode(read, layer=1, pooling=None)[0])
    with pytest.raises(UserError, match=r"has no row of pooling='bos'"):
        net.encode(read, layer="best", pooling="bos")
    with pytest.raises(UserError, match=r"read with another attention: `nepa probe .* causal=false`"):
        dataclasses.replace(net, causal=False).encode(read, layer="best")
    file.write_text("{}")
    with pytest.raises(UserError, match=r"probe\.json lacks 'causal'"):
        net.encode(read, layer="best")


def test_predictions_are_the_networks_own_in_the_order_of_prediction(net: Network) -> None:
    batch = default_collate(samples(net))
    with torch.no_grad():
        out = net.model(net.data.read(batch), causal=True)
    found = net.predict(samples(net))
    torch.testing.assert_close(found.predictions, out.predictions)
    torch.testing.assert_close(found.embeddings, out.embeddings)
    assert out.mask is not None
    assert found.mask is not None
    assert torch.equal(found.mask, out.mask)


# --------------------------------------------------------------------------------------------------------- load


def test_a_run_trained_on_labels_gives_features_and_no_predictions(tmp_path: Path) -> None:
    main(["finetune", "tests.tiny:recipe", "train.length.steps=1", f"out={tmp_path / 'tuned'}"])
    net = nepa_core.load(tmp_path / "tuned")
    assert not net.causal
    assert net.encode(samples(net)).shape == (48, 16)
    with pytest.raises(UserError, match=r"was trained on labels, and its output no longer predicts"):
        net.predict(samples(net))


def test_a_segmentation_run_gives_features_of_scenes(tmp_path: Path) -> None:
    root = tiny_scenes.write_scenes(tmp_path / "scenes")
    command = ["segment", "tests.tiny_scenes:recipe", f"data.root={root}", "train.length.steps=1", "head=linear"]
    assert main([*command, f"out={tmp_path / 'run'}"]) == 0
    net = nepa_core.load(tmp_path / "run")
    features, mask = net.encode(net.data.dataset("test"), layer=2, pooling=None)
    assert (features.shape, mask.shape) == ((5, 24, 16), (5, 24))


@pytest.mark.parametrize("averaged", [False, True])
def test_a_released_folder_and_the_run_it_becomes_give_the_same(tmp_path: Path, averaged: bool) -> None:
    side = random_release(FACTS, seed=1) if averaged else None
    write_release(tmp_path / "release", FACTS, random_release(FACTS), side)
    assert main(["import", str(tmp_path / "release"), f"out={tmp_path / 'run'}"]) == 0
    released, run = (nepa_core.load(tmp_path / name) for name in ("release", "run"))
    assert released.averaged == run.averaged == averaged
    assert released.causal
    batch = {"image": torch.randint(256, (3, 3, 6, 6), dtype=torch.uint8)}
    assert torch.equal(released.encode(batch), run.encode(batch))
    assert released.encode(batch).shape == (3, 32)
    with pytest.raises(UserError, match=r"^nowhere: there is no such folder"):
        nepa_core.load("nowhere")


def test_a_run_whose_data_is_gone_still_reads_other_samples(tmp_path: Path) -> None:
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", np.random.default_rng(0).normal(size=(16, 5, 3)).astype(np.float32))
    config = override(features(), {"data.root": str(tmp_path), "train.length.steps": 1, "train.batch": 4})
    pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    net = nepa_core.load(tmp_path / "run")
    read = [net.data.dataset("test")[i] for i in range(16)]
    (tmp_path / "train.npy").unlink()
    open_both.cache_clear()
    assert torch.equal(nepa_core.load(tmp_path / "run").encode(read), net.encode(read))


def test_code_that_a_strangers_run_names_is_imported_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "mine_strange.py").write_text("from tests.tiny import Waves\n\nclass Mine(Waves):\n    pass\n")
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace("tests.nepa_core.test_load:Backwards", "mine_strange:Mine"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trust, "_given", trust.Trust())
    with pytest.raises(UserError, match=r"it names mine_strange:Mine, code that would be run"):
        nepa_core.load(tmp_path / "run")
    assert "mine_strange" not in sys.modules
    assert type(nepa_core.load(tmp_path / "run", trust=True).data).__name__ == "Mine"
    assert not trust.given().everything
