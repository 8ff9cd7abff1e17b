"""nepa export format=torch and format=onnx: a graph gives what the network gives, or is not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nepa_core
from modalities.features import Features
from nepa_core.basics import Batch, UserError
from nepa_core.pooling import Row
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.load import Network, Reading
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes import audio, timeseries, vision
from recipes.cli import main as nepa_main
from recipes.configs import PretrainConfig
from recipes.presets import small
from recipes.released import graphs
from recipes.released.graphs import export_graph
from recipes.report.summaries import GraphRecord
from recipes.training.pretraining import pretrain
from recipes.training.starting import build_model
from tests import tiny
from tests.summaries import check_summary
from tests.tiny import CPU, Waves
from tests.tiny_scenes import scenes, write_scenes

MEAN, EACH = Row(3, "mean"), Row(3, "token")
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="pip install nepa[onnx]")


class Counted(Waves):
    """Its `tokenize` looks at numbers, which no graph can."""

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return tokens if tokens.values.sum().item() < 1e9 else tokens.to(CPU)


class Bessel(nn.Module):
    """An operator that ONNX lacks, on the way from tokens to embeddings."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.linear(x))


class Odd(Waves):
    def embedder(self, dim: int) -> nn.Module:
        return Bessel(super().embedder(dim))


def network(config: PretrainConfig, changes: dict[str, Any] | None = None) -> Network:
    """With random weights: what a graph computes does not depend on training."""
    config = override(config, changes or {})
    with torch.random.fork_rng(devices=[]):
        model = build_model(config).eval()
    return Network("runs/x", model, config.data.plain(), config.objective.causal, False, False, Reading())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / "run"
    pretrain(tiny.ragged(), Run(folder), World(0, 1, CPU), show=False)
    return folder


def nepa(*words: object) -> int:
    return nepa_main([str(word) for word in words])


@pytest.mark.slow
def test_a_graph_of_torch_takes_any_number_and_length_of_samples(run: Path, tmp_path: Path) -> None:
    net, file = nepa_core.load(run), tmp_path / "x.pt2"
    record = export_graph(net, EACH, "torch", file)
    shapes = {x["name"]: x["shape"] for x in (*record["inputs"], *record["outputs"])}
    assert shapes == {
        "values": ["batch", "tokens", 4],
        "length": ["batch"],
        "features": ["batch", "tokens", 16],
        "mask": ["batch", "tokens"],
    }
    assert record["largest_difference"] < 1e-5
    assert record["weights"] == "ema"
    check_summary(tmp_path / "x.pt2.json", GraphRecord)
    program = torch.export.load(file).module()
    values, length = torch.randn(5, 4, 4), torch.tensor([4, 3, 2, 4, 1])
    features, mask = program(values, length)
    wanted, real = net.encode({"values": values, "length": length}, layer="final", pooling=None)
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)
    assert torch.equal(mask, real)


CASES: dict[str, tuple[Callable[[Path], PretrainConfig], dict[str, Any], list[Any]]] = {
    "images": (lambda folder: vision.digits(), {"data.patch_order": "hilbert"}, ["batch", 1, 8, 8]),
    "frames": (lambda folder: audio.demo(), {}, ["batch", "4*tokens", 32]),
    "patches": (
        lambda folder: audio.demo(), {"data.patch": [8, 8], "data.patch_order": "hilbert"}, ["batch", 80, 32]
    ),
    "series": (lambda folder: timeseries.demo(), {}, ["batch", 64, 4]),
    "vectors": (lambda folder: small(Features(root=str(vectors(folder)))), {}, ["batch", "tokens", 4]),
    "scenes": (lambda folder: small(scenes(pictures(folder))), {}, ["batch", 3, 16, 24]),
    "positions": (
        lambda folder: tiny.ragged(),
        {"model.learned_positions": 6, "model.pack": True, "model.predict_position": "rotate", "model.bos": False},
        ["batch", "tokens", 4],
    ),
}  # fmt: skip


def vectors(folder: Path) -> Path:
    for split in ("train", "test"):
        np.save(folder / f"{split}.npy", np.random.default_rng(0).normal(size=(12, 8, 4)).astype(np.float32))
        np.save(folder / f"{split}.lengths.npy", np.arange(12) % 6 + 3)
    return folder


def pictures(folder: Path) -> Path:
    write_scenes(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("case", CASES)
def test_every_adapter_goes_out_from_its_batch(case: str, kind: str, tmp_path: Path) -> None:
    recipe, changes, shape = CASES[case]
    net = network(recipe(tmp_path), changes)
    record = export_graph(net, MEAN._replace(layer=net.model.config.depth + 1), kind, tmp_path / f"x.{kind}")
    assert record["notes"] == []
    assert record["inputs"][0]["shape"] == shape
    assert record["largest_difference"] < 1e-5


@pytest.mark.slow
def test_what_cannot_be_traced_begins_at_the_tokens(tmp_path: Path) -> None:
    net = network(override(tiny.recipe(), {"data": Counted(ragged=True)}))
    record = export_graph(net, MEAN, "torch", tmp_path / "x.pt2")
    assert [x["name"] for x in record["inputs"]] == ["values", "coords", "mask"]
    assert record["inputs"][0]["shape"] == ["batch", "tokens", 4]
    assert record["notes"][0].startswith("from a batch of any length: ")
    assert "in the order of prediction" in record["about"]


@pytest.mark.slow
@needs_onnx
def test_onnx_runs_without_this_package(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "encoder.onnx"
    assert nepa("export", run, "format=onnx", "layer=1", f"out={file}") == 0
    values = np.random.default_rng(0).normal(size=(7, 5, 4)).astype(np.float32)
    length = np.array([5, 4, 3, 2, 5, 1, 2])
    np.savez(tmp_path / "in.npz", values=values, length=length)
    code = (
        "import sys, numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession('encoder.onnx')\n"
        "np.save('out.npy', session.run(None, dict(np.load('in.npz')))[0])\n"
        "assert not {'torch', 'nepa_core', 'recipes'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={})
    batch = {"values": torch.from_numpy(values), "length": torch.from_numpy(length)}
    wanted = nepa_core.load(run).encode(batch, layer=1)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@needs_onnx
def test_an_operator_that_onnx_lacks_is_one_line(tmp_path: Path) -> None:
    net = network(override(tiny.recipe(), {"data": Odd()}))
    with pytest.raises(UserError, match=r"ONNX has no operator for prims.bessel_j0") as found:
        export_graph(net, MEAN, "onnx", tmp_path / "x.onnx")
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []
    assert export_graph(net, MEAN, "torch", tmp_path / "x.pt2")["notes"] == []


def test_a_graph_that_differs_from_the_run_is_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(encoder: graphs.Encoder, batch: Batch, kind: str, draft: Path) -> Any:
        draft.touch()
        return lambda given: [x + 1e-3 for x in encoder(*given)], None

    monkeypatch.setattr(graphs, "written", written)
    with pytest.raises(UserError, match=r"differs from the run by \d\.\de-04, more than 0\.0001, and is removed"):
        export_graph(nepa_core.load(run), MEAN, "torch", tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_is_refused_in_one_line(run: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = ("export", str(run), "format=torch")
    assert fails(*graph, "weights=ema") == "weights is for the released layout; leave it out"
    assert fails("export", str(run), "out=x", "layer=2") == "layer is for format=onnx and format=torch; leave it out"
    assert fails(*graph, "out=x.onnx") == "out=x.onnx: a graph of format=torch is a file that ends in .pt2"
    assert "the network has layers 0" in fails(*graph, "layer=9", "out=x.pt2")
    assert "optim.lr can't be set for nepa export" in fails(*graph, "optim.lr=1")
    Path("x.pt2").touch()
    assert fails(*graph, "out=x.pt2") == "x.pt2 exists: remove it, or name another one with out=FILE"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    said = fails("export", str(run), "format=onnx", "out=x.onnx")
    assert said.startswith(
        "format=onnx needs onnx and onnxscript and onnxruntime, not installed here: pip install nepa[onnx]"
    )
    assert sorted(path.name for path in Path().iterdir()) == ["x.pt2"]
