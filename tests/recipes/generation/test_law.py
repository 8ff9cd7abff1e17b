"""The law of the synthetic series, which is known, is what a decoder on a trained network samples."""

from pathlib import Path

import pytest

import nepa_core
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.generation.generating import GenerateOptions, generate
from recipes.timeseries import demo
from recipes.training.pretraining import pretrain
from tests.tiny import CPU


@pytest.mark.slow
def test_the_law_of_a_vector_autoregression_is_recovered(tmp_path: Path) -> None:
    config = demo()
    pretrain(config, Run(tmp_path / "run"), World(0, 1, CPU), show=False)
    options = GenerateOptions(samples=300, decoder_steps=3000, draws=16)
    found = generate(nepa_core.load(tmp_path / "run"), config, options, tmp_path / "decoders", show=False)
    rows = {row["name"]: row["figure"] for row in found.summary["next_token"]}
    print(found.summary["law"], rows)
    mean, half = found.summary["law"]["mean"]
    assert mean is not None
    assert half is not None
    assert abs(mean) < half
    variance, half = found.summary["law"]["variance"]
    assert variance is not None
    assert half is not None
    assert abs(variance - 1) < half
