"""Pre-training that begins with the weights of another run: what is taken, what is new, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core.basics import UserError
from nepa_core.runtime.checkpoint import load_latest
from nepa_core.runtime.config import override
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import begin_from, read_weights
from recipes import pretrain
from recipes.cli import main
from recipes.comparison.engine import config_digest
from recipes.report.summaries import PretrainSummary
from recipes.training import pretraining
from recipes.training.starting import build_pretrainer
from tests import tiny
from tests.summaries import check_summary


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to begin with."""
    return pretrain(tiny.recipe(), tmp_path_factory.mktemp("first") / "run", verbose=False).path


def test_all_of_the_same_network_and_tokens_is_taken_and_said(
    tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The averaged weights, for other training samples, with an optimiser that starts anew."""
    config = override(tiny.recipe(), {"init": str(first), "data.jitter": 0.5, "optim.warmup.steps": 12})
    run = pretrain(config, tmp_path / "run")
    count = len(build_pretrainer(config).state_dict())
    line = f"init={first}: {count} of {count} averaged tensors taken; none is new."
    assert line in capsys.readouterr().err
    assert line in run.verdict
    assert "'Untrained' and 'before training' above are random weights." in run.verdict
    page = (run.path / "report/index.html").read_text()
    assert "Tensors taken from init" in page
    summary = check_summary(run.path / "summary.json", PretrainSummary)
    assert len(summary["origin"]["taken"]) == count
    health = [line for line in Run(run.path).metrics() if "retrieval_top1" in line]
    assert summary["retrieval_top1_first"] == health[0]["retrieval_top1"]
    assert summary["retrieval_top1_last"] == health[-1]["retrieval_top1"]
    learned = [line for line in Run(first).metrics() if "retrieval_top1" in line][-1]
    assert health[0] == learned | {"step": 0}, "it begins with what was learned"
    checkpoint, _ = load_latest(run.path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.tensors["optimizer"]["embed.weight/step"] == 12


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"data.size": 5}, {"embed.weight", "embed.bias"}),
        ({"model.mask_token": True, "objective.input_mask": 0.2}, {"mask_token"}),
        ({"objective.terms": {"horizons": 1.0}}, {"heads."}),
        ({"model.qk_norm": "affine"}, {"q_norm.weight", "k_norm.weight"}),
    ],
)
def test_what_does_not_fit_is_new_and_the_rest_is_taken(first: Path, changes: dict[str, Any], new: set[str]) -> None:
    config = override(tiny.recipe(), changes)
    model, weights = build_pretrainer(config), read_weights(str(first)).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    origin = begin_from(str(first), model, config.model, config.data)
    assert {part for part in new for name in origin["new"] if part in name} == new
    assert all(any(part in name for part in new) for name in origin["new"])
    assert {*origin["new"], *origin["taken"]} == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in origin["new"] else weights[name]), name


def test_patches_of_another_shape_with_as_many_numbers_get_a_new_embedder() -> None:
    from nepa_core.runtime.weights import Weights
    from recipes.vision import digits

    config = digits()
    model = build_pretrainer(config)
    weights = Weights(
        "there", config.model, True, config.data, 0, dict(model.state_dict()), {}, "", False, {"patch": (4, 2)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nepa_core.runtime.weights.read_weights", lambda name: weights)
        assert begin_from("there", model, config.model, config.data)["new"] == ["embed.bias", "embed.weight"]


def test_another_network_and_a_folder_that_is_not_there_leave_nothing(fails: Callable[..., str], first: Path) -> None:
    line = fails("pretrain", "tests.tiny:recipe", f"init={first}", "model.dim=32")
    assert line == (
        f"init={first} is another network: model.dim is 32 in the recipe and 16 in the weights; "
        "set the recipe's keys to fit"
    )
    assert fails("pretrain", "tests.tiny:recipe", "init=nowhere").startswith("init=nowhere: there is no such folder")
    assert not Path("runs").exists()


def test_a_stopped_run_goes_on_without_what_it_began_with(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = shutil.copytree(first, tmp_path / "gone")
    config = override(tiny.recipe(), {"init": str(gone), "train.checkpoint": 3})
    whole = pretrain(config, tmp_path / "whole", verbose=False)
    make_step = pretraining.make_step
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "make_step", lambda config: tiny.interrupted_at({6}, make_step(config)))
        with pytest.raises(Interrupted):
            pretrain(config, tmp_path / "run", verbose=False)
    shutil.rmtree(gone)
    run = pretrain(tmp_path.joinpath("run").as_posix(), verbose=False)
    assert (run.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    assert run.summary["origin"] == whole.summary["origin"]
    shutil.rmtree(run.path / "checkpoints")
    (run.path / "summary.json").unlink()
    with pytest.raises(UserError, match="there is no such folder"):
        pretrain(tmp_path.joinpath("run").as_posix(), verbose=False)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_finished_run_is_not_shown_for_other_weights_than_it_began_with(
    task: str, tmp_path: Path, first: Path, fails: Callable[..., str]
) -> None:
    start = shutil.copytree(first, tmp_path / "start")
    words = [task, "tests.tiny:recipe", f"init={start}", f"out={tmp_path / 'run'}", "train.length.steps=3"]
    assert main(words) == main(words) == 0
    pretrain(str(start), changes={"train.length.steps": 14}, verbose=False)
    assert f"is finished and began with other weights than {start} has now" in fails(*words)
    shutil.rmtree(start)
    assert main(words) == 0, "whatever became of those"


def test_comparisons_do_not_begin_with_other_weights(first: Path) -> None:
    with pytest.raises(UserError, match="comparisons pre-train from random weights; leave init out"):
        config_digest(override(tiny.recipe(), {"init": str(first)}))
    assert json.loads((first / "config.json").read_text())["init"] is None
