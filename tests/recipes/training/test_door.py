"""Pre-training from Python and how it is shown: the same run as the command's, in any folder."""

from __future__ import annotations

import builtins
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nepa_core
from nepa_core.basics import UserError
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.meter import Meter, say_progress
from recipes import pretrain
from recipes.cli import main
from recipes.training import pretraining
from tests import tiny
from tests.conftest import ROOT

TINY = "tests.tiny:recipe"


def test_a_run_from_python_is_that_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", TINY, "optim.lr=1e-3", "out=runs/command"]) == 0
    capsys.readouterr()
    run = pretrain(TINY, changes={"optim.lr": 1e-3}, verbose=False)
    assert capsys.readouterr() == ("", "")
    assert run.path == Path("runs/tests.tiny-recipe")
    assert (run.path / "metrics.jsonl").read_bytes() == Path("runs/command/metrics.jsonl").read_bytes()
    assert run.summary == json.loads((run.path / "summary.json").read_text())
    assert repr(run) == run.verdict
    assert "Next token identified among" in run.verdict
    assert "runs/tests.tiny-recipe/report/index.html" in run.verdict
    assert run.load().averaged
    again = pretrain(tiny.recipe(), "runs/tests.tiny-recipe", changes={"optim.lr": 1e-3, "recipe": TINY})
    assert again.verdict == run.verdict, "a finished run is only shown"


def test_a_config_without_a_name_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give out=DIR"):
        pretrain(tiny.recipe())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_cell_keeps_a_checkpoint_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(tiny.recipe(), tmp_path / "whole", verbose=False)
    make_step = pretraining.make_step
    monkeypatch.setattr(pretraining, "make_step", lambda config: tiny.interrupted_at({6}, make_step(config)))
    with pytest.raises(Interrupted, match="stopped after step 6 of 12"):
        pretrain(tiny.recipe(), tmp_path / "run", verbose=False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if "6" in path.name]
    monkeypatch.undo()
    gone_on = pretrain(tiny.recipe(), tmp_path / "run", verbose=False)
    for run in (whole, gone_on):
        assert (run.path / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_an_adapter_that_was_typed_at_the_prompt_runs_and_opens(tmp_path: Path) -> None:
    """Its import path is __main__, which no other process has."""
    code = """
from recipes import pretrain
from tests.tiny import Waves, recipe
class Mine(Waves): ...
run = pretrain(recipe(), "run", changes={"data": Mine()})
print(run.load().encode(Mine().dataset("test")).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "torch.Size([48, 16])\n"
    with pytest.raises(UserError, match=r"__main__:Mine"):
        nepa_core.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- progress


def test_in_a_notebook_one_line_is_written_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    cell = SimpleNamespace(update=lambda shown, raw: written.append(shown["text/plain"]))
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: kernel, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=lambda *_, **__: cell))
    with Meter(30, enabled=True) as meter:
        meter.note("loss -0.5")
        for step in range(30):
            meter.advance(step + 1)
    assert len(written) == 1, "not a line for every step"
    assert written[-1].startswith("step 30/30  ")
    assert written[-1].endswith("loss -0.5")
    with Meter(30, enabled=False) as meter:
        meter.advance(30)
    assert len(written) == 1
    assert capsys.readouterr() == ("", "")


def test_quiet_shows_the_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain(TINY, verbose=False)
    probe = ["probe", "runs/tests.tiny-recipe", "layers=0", "poolings=mean", "classifiers=knn"]
    for words, shown in ((["-q", *probe], False), ([*probe, "-q"], False), (probe, True)):
        assert main(words) == 0
        said = capsys.readouterr()
        assert "Chosen on held-back training samples" in said.out
        assert ("features of the train split" in said.err) == bool(said.err) == shown
    assert main(["-q", "probe", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("nepa: nowhere is not a run folder")
    say_progress("heard")
    assert capsys.readouterr().err == "heard\n", "-q is of one command, and not of what follows in Python"


# ---------------------------------------------------------------------------------------------- on the core alone


def test_a_loop_of_ones_own_learns(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = runpy.run_path(str(ROOT / "tests/fixtures/own_loop.py"))
    assert float(capsys.readouterr().out.removeprefix("held out: ")) < -0.7
    assert found["out"].predictions.shape == (64, 17, 64)


def test_three_numbers_make_a_network_with_the_papers_settings() -> None:
    config = PredictorConfig(dim=384, depth=12, heads=6)
    assert config.model_dump(include={"mlp_dim", "activation", "gated", "layer_scale", "qk_norm", "rope_theta"}) == {
        "mlp_dim": 1536,
        "activation": "silu",
        "gated": True,
        "layer_scale": 1e-5,
        "qk_norm": "plain",
        "rope_theta": 100.0,
    }
    assert PredictorConfig.model_validate(config.model_dump()) == config
