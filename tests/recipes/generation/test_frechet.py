"""The Fréchet inception distance: only by weights that the user has, and of pictures alone."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes.cli import main
from recipes.generation.frechet import frechet

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="pip install nepa[fid]")


def test_weights_that_are_not_there_or_hold_code_are_refused_before_anything(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    assert main(["pretrain", "tests.tiny:recipe", f"out={tmp_path / 'run'}"]) == 0
    run = str(tmp_path / "run")
    assert "there is no such file" in fails("generate", run, "fid=nowhere.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print))
    torch.save({}, tmp_path / "other.pth")
    for name in ("code.pth", "other.pth"):
        assert "holds no Inception weights" in fails("generate", run, f"fid={tmp_path / name}")
    assert not (tmp_path / "run" / "generate").exists()


@pytest.mark.slow
def test_only_pictures_have_one(fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.generation.generating.check_weights", lambda file: None)
    run, short = str(tmp_path / "run"), ("train.length.steps=1", "verdict.fit_samples=16", "verdict.test_samples=8")
    assert main(["pretrain", "recipes.timeseries:demo", f"out={run}", *short]) == 0
    assert "samples of TimeSeries are curves: leave it out" in fails("generate", run, "fid=own.pth", "samples=8")


@pytest.mark.slow
def test_it_is_torch_fidelitys_and_sees_what_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By random weights: the same pictures have none, others some."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save({}, tmp_path / "own.pth")
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: torch.manual_seed(0))
    pictures = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    found = frechet(pictures, 255 - pictures // 4, torch.cat((pictures, pictures)), str(tmp_path / "own.pth"))
    assert found.training == pytest.approx(0, abs=1e-2)
    assert found.drawn > 10 * abs(found.training)
