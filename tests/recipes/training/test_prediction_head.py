"""A run with a head on its predictions: what is kept of it, what sees it, and what reads before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

import nepa_core
from nepa_core import UserError
from nepa_core.pooling import surprise_of_tokens
from nepa_core.predictor import Trace
from nepa_core.rollout import rollout
from nepa_core.runtime.checkpoint import load_latest
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import begin_from, read_weights
from recipes import vision
from recipes.cli import main
from recipes.comparison.measures import attention_by_layer
from recipes.configs import PretrainConfig
from recipes.objective_names import named
from recipes.readout.inspecting import why_silent
from recipes.released.exporting import ExportOptions, export_released
from recipes.released.pushing import PushOptions, write_folder
from recipes.report.card import SPACES
from recipes.training.pretraining import load_pretrained, pretrain
from recipes.training.starting import build_pretrainer
from tests import tiny
from tests.tiny import CPU

HEADED = {"objective.head": "simsiam"}
FEW = {"train.length.steps": 3, "train.evaluate": 3, "train.checkpoint": 3, "train.log": 1}


@pytest.fixture(scope="module", autouse=True)
def without_reports() -> object:
    """Plots take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.report.page.Report.write", lambda *_: None)
        yield


def trained(config: PretrainConfig, folder: Path) -> Path:
    pretrain(config, Run(folder), World(0, 1, CPU), show=False)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(override(tiny.ragged(), HEADED | FEW), tmp_path_factory.mktemp("headed") / "run")


def test_a_run_predicts_behind_its_head_and_is_read_before_it(run: Path) -> None:
    net = nepa_core.load(run)
    samples = [net.data.dataset("test")[i] for i in range(48)]
    tokens, trace = net.data.read(default_collate(samples)), Trace()
    with torch.no_grad():
        out = net.model(tokens, causal=True, trace=trace)
    hidden, predicted = trace.hidden[-1], net.predict(samples)
    torch.testing.assert_close(predicted.predictions, out.predictions)
    torch.testing.assert_close(predicted.predictions, net.model.predicted(hidden))
    assert not torch.allclose(predicted.predictions, hidden, atol=0.1)
    torch.testing.assert_close(net.surprise(samples), surprise_of_tokens(out, tokens, bos=True).nanmean(1))
    features, mask = net.encode(samples, pooling=None)
    torch.testing.assert_close(features[mask], tokens.canonical(hidden[:, 1:])[mask])
    config, model = load_pretrained(Run(run), CPU)
    assert config.objective.head == "simsiam"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in net.model.state_dict().items())
    assert attention_by_layer(config, model, CPU, 4)["distance"]


def test_a_rollout_draws_from_what_the_head_predicts(run: Path) -> None:
    net = nepa_core.load(run)
    tokens = net.data.read(default_collate([net.data.dataset("test")[0]]))
    seen: list[Tensor] = []

    def draw(prediction: Tensor, coords: Tensor, token: int) -> Tensor:
        seen.append(prediction)
        return tokens.values[:, token]

    with torch.no_grad():
        rollout(net.model, draw, tokens, 0)
        out = net.model(tokens, causal=True)
    torch.testing.assert_close(torch.stack(seen, 1), out.predictions[:, : len(seen)], atol=1e-5, rtol=1e-4)


def test_checkpoints_hold_it_beside_the_network_averages_too(run: Path) -> None:
    checkpoint, _ = load_latest(Run(run).checkpoints)
    assert checkpoint is not None
    names = {name for name, _ in build_pretrainer(load_config(PretrainConfig, run / "config.json")).named_parameters()}
    heads = {name for name in names if name.startswith("prediction_head.")}
    assert len(heads) == 10
    for group in ("model", "ema"):
        assert checkpoint.tensors[f"{group}_heads"].keys() == heads
        assert checkpoint.tensors[group].keys() == names - heads
    weights = read_weights(str(run))
    assert weights.prediction_head == "simsiam"
    assert weights.model.keys() == names
    average = checkpoint.tensors["ema_heads"]["prediction_head.0.weight"]
    assert torch.equal(weights.model["prediction_head.0.weight"], average)
    counted = sum(value.numel() for value in checkpoint.tensors["model"].values())
    summary = Run(run).summary()
    assert summary is not None
    assert summary["parameters"] == counted, "what is thrown away does not count"


def test_other_training_starts_without_it_or_with_a_new_one(run: Path) -> None:
    for changes in ({}, HEADED, {"objective.head": "mlp"}):
        config = override(tiny.ragged(), changes)
        model = build_pretrainer(config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        heads = {name for name in before if name.startswith("prediction_head.")}
        assert set(begin_from(str(run), model, config.model, config.data)["new"]) == heads
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in heads)


@pytest.mark.parametrize(
    "words",
    [
        ["probe", "RUN", "poolings=mean"],
        ["inspect", "RUN", "samples=1"],
        ["embed", "RUN", "split=test", "surprise=true"],
        pytest.param(["generate", "RUN", "samples=8", "train_samples=16", "decoder_steps=2"], marks=pytest.mark.slow),
    ],
)
def test_tasks_take_a_run_with_it(run: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.replace("RUN", str(run)) for word in words]) == 0, capsys.readouterr().err


def test_a_pushed_run_predicts_and_an_exported_one_says_what_is_left_out(tmp_path: Path) -> None:
    few = FEW | {"data.limit": 128, "model.depth": 1, "data.patch": [4, 4]}
    few |= {"verdict.fit_samples": 64, "verdict.test_samples": 64, "objective.terms.horizons": 1.0}
    config = override(vision.digits(), few | HEADED)
    run = Run(trained(config, tmp_path / "run"))
    write_folder(run, config, "owner/name", PushOptions(to="owner/name"), {}, tmp_path / "pushed")
    net, pushed = nepa_core.load(run.path), nepa_core.load(tmp_path / "pushed")
    samples = [net.data.dataset("test")[0]]
    assert torch.equal(net.predict(samples).predictions, pushed.predict(samples).predictions)
    held, _ = load_latest(tmp_path / "pushed/checkpoints")
    assert held is not None
    assert held.tensors.keys() == {"model", "ema", "model_heads"}
    assert all(name.startswith("prediction_head.") for name in held.tensors["model_heads"])
    said = export_released(run, tmp_path / "out", ExportOptions(out=str(tmp_path / "out")))
    assert said.endswith("; left out: the prediction head (objective.head=simsiam)")
    released = nepa_core.load(tmp_path / "out")
    assert released.model.prediction_head is None
    assert torch.equal(released.encode(samples), net.encode(samples))


def test_a_run_of_before_there_was_a_head_is_one_without_and_raw_tokens_alone_surprise_nobody(tmp_path: Path) -> None:
    run = trained(override(named("raw_token", tiny.ragged()), FEW), tmp_path / "run")
    assert "head" not in json.loads((run / "config.json").read_text())["objective"]
    weights, net = read_weights(str(run)), nepa_core.load(run)
    assert (weights.prediction_head, net.model.prediction_head) == ("none", None)
    summary = Run(run).summary()
    assert summary is not None
    assert summary["space"] == "raw"
    assert summary["space"] in SPACES
    with pytest.raises(UserError, match="was trained to predict raw tokens alone, and surprise compares embeddings"):
        net.surprise([net.data.dataset("test")[0]])
    assert "predict raw tokens alone" in why_silent(str(run), weights, "token", causal=True)
