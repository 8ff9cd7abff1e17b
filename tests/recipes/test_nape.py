"""The presets of NAPE: every number of the paper's tables, and two steps of each on small data in its layout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from modalities.audio import Audio
from nepa_core.model import prediction_head
from nepa_core.runtime.optim import Duration
from recipes import audio
from recipes.cli import main
from recipes.configs import FinetuneConfig, PretrainConfig
from recipes.report.summaries import FinetuneSummary, FoldsSummary, PretrainSummary
from tests.sounds import write_audioset, write_commands, write_esc50, write_iemocap
from tests.summaries import check_summary

SIZES = ("small", "base", "large")


def pretraining(size: str) -> PretrainConfig:
    config: PretrainConfig = getattr(audio, f"nape_{size}")()
    return config


def finetuning(size: str, task: str) -> FinetuneConfig:
    config: FinetuneConfig = getattr(audio, f"nape_{size}_{task}")()
    return config


class Task(NamedTuple):
    """A column of the paper's table; pairs are B and L."""

    epochs: tuple[float, float]
    warmup: tuple[float, float]
    decay: tuple[float, float]
    loss: str
    smoothing: float
    mixed: float
    roll: bool
    balanced: bool
    ema: float | None
    mean: float
    std: float
    seconds: float


TASKS = {
    "audioset": Task((20, 15), (4, 3), (0.7, 0.9), "cross_entropy", 0, 1.0, True, True, 0.99995, -6.84, 5.38, 10.08),
    "audioset20k": Task((30, 20), (6, 5), (0.8, 0.9), "cross_entropy", 0, 0.8, True, False, 0.999, -6.84, 5.38, 10.08),
    "esc50": Task((100, 100), (10, 10), (0.7, 0.9), "cross_entropy", 0.1, 0.5, True, False, None, -6.84, 5.38, 5.12),
    "speech_commands_v1": Task((50, 50), (5, 5), (0.7, 0.8), "bce", 0.1, 0.8, False, True, None, -9.11, 4.53, 1.12),
    "speech_commands_v2": Task((50, 50), (5, 5), (0.7, 0.8), "bce", 0, 0.8, False, False, None, -9.16, 4.61, 1.12),
    "iemocap": Task((50, 50), (5, 5), (0.7, 0.9), "cross_entropy", 0.1, 0.5, True, False, None, -13.74, 3.88, 10.08),
}
"""The table of fine-tuning, and the length of a clip in whole patches of 160 ms.

The loss of AudioSet's several classes is binary cross-entropy whatever `loss` says.
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_has_every_number_of_the_table(task: str, size: str) -> None:
    config, wanted, place = finetuning(size, task), TASKS[task], int(size == "large")
    assert config.train.length == Duration(epochs=wanted.epochs[place])
    assert config.optim.warmup == Duration(epochs=wanted.warmup[place])
    decay = config.optim.layer_decay
    assert decay is not None
    assert decay.start == decay.end == wanted.decay[place]
    assert not decay.staggered_warmup
    assert not decay.head_counts
    assert not config.freeze_embedder
    assert (config.loss, config.label_smoothing, config.train.ema) == (wanted.loss, wanted.smoothing, wanted.ema)
    assert config.mix is not None
    assert (config.mix.mixup, config.mix.cutmix, config.mix.prob) == (0.8, 1.0, wanted.mixed)
    assert config.train.sampling == ("balanced" if wanted.balanced else "shuffled")
    data = config.data
    assert isinstance(data, Audio)
    assert (data.mean, data.std, data.seconds) == (wanted.mean, wanted.std, wanted.seconds)
    assert (data.patch, data.patch_order, config.model.bos) == ((16, 16), "rising", False)
    assert data.augment is not None
    assert (data.augment.roll > 0) == wanted.roll
    assert data.augment.noise > 0
    assert 24 <= data.augment.time_mask <= 96
    assert 16 <= data.augment.frequency_mask <= 24
    assert (config.optim.betas, config.optim.weight_decay, config.optim.schedule) == ((0.9, 0.999), 0.05, "cosine")
    assert config.optim.peak(config.train.batch) == pytest.approx(1.25e-3 * 64 / 256)
    assert (config.train.batch, config.model.drop_path) == (64, 0.1)
    assert (config.causal, config.readout) == (False, "mean")


@pytest.mark.parametrize(
    ("size", "shape", "batch", "epochs"),
    [("small", (384, 12, 6), 256, 25), ("base", (768, 12, 12), 256, 30), ("large", (1024, 24, 16), 128, 25)],
)
def test_pre_training_has_every_number_of_the_table(
    size: str, shape: tuple[int, int, int], batch: int, epochs: int
) -> None:
    config = pretraining(size)
    network = config.model
    assert (network.dim, network.depth, network.heads) == shape
    assert network.mlp_dim == 4 * network.dim
    assert (network.qk_norm, network.learned_positions, network.mask_token) == ("plain", 0, False)
    assert network.layer_scale is not None
    assert not network.bos
    assert config.objective.head == "simsiam"
    assert (config.objective.causal, config.objective.shift, config.objective.stop_gradient) == (True, True, True)
    assert (config.train.batch, config.train.length) == (batch, Duration(epochs=epochs))
    assert config.optim.peak(batch) == pytest.approx(5e-3 * batch / 256)
    assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.05)
    assert (config.optim.warmup, config.optim.schedule) == (Duration(fraction=0.1), "cosine")
    assert config.train.ema == 0.9999
    data = config.data
    assert isinstance(data, Audio)
    assert (data.sample_rate, data.bands, data.window_ms, data.hop_ms, data.patch) == (16_000, 128, 25, 10, (16, 16))
    assert (data.front_end.longest, data.rows) == (1008, 8)
    assert data.rows * data.front_end.longest // 16 == 504
    assert (data.subset, data.augment, data.patch_order) == ("full", None, "rising")


def test_the_head_has_the_papers_size_and_the_network_too() -> None:
    head = prediction_head(pretraining("base").objective.head, 768)
    assert head is not None
    assert sum(value.numel() for value in head.parameters()) == pytest.approx(1.8e6, rel=0.02)
    for size, millions in (("base", 85), ("large", 303)):
        assert pretraining(size).model.weights == pytest.approx(millions * 1e6, rel=0.01)


def test_what_trains_is_as_the_name_says() -> None:
    assert finetuning("base", "audioset20k").data.model_dump()["subset"] == "balanced"
    assert finetuning("base", "speech_commands_v1").data.model_dump()["keywords"] == "ten"
    for task in TASKS:
        assert finetuning("large", task).model.model_copy(update={"drop_path": 0.0}) == pretraining("large").model


@pytest.mark.parametrize("task", ["", *(f"_{task}" for task in TASKS)])
@pytest.mark.parametrize("size", SIZES)
def test_a_docstring_has_command_hours_figure_and_doubt(size: str, task: str) -> None:
    text = getattr(audio, f"nape_{size}{task}").__doc__
    for wanted in (rf"recipes\.audio:nape_{size}{task} data\.root=DIR", "Time, derived: ", "Published", "Unclear: "):
        assert re.search(wanted, " ".join(text.split())), wanted


# ---- two steps of each

TINY = [
    *("model.dim=16", "model.depth=2", "model.heads=2", "model.mlp_dim=16", "data.seconds=0.33"),
    *("train.length.epochs=null", "train.length.steps=2", "train.batch=8", "train.micro_batch=4"),
    *("train.workers=0", "train.evaluate=2", "train.checkpoint=2"),
]
TUNED = ["optim.warmup.epochs=null", "optim.warmup.steps=1", "control=false"]
MADE: dict[str, Callable[[Path], Path]] = {
    "audioset": partial(write_audioset, clips=8),
    "audioset20k": partial(write_audioset, clips=8),
    "esc50": write_esc50,
    "speech_commands_v1": write_commands,
    "speech_commands_v2": write_commands,
    "iemocap": write_iemocap,
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A size -> its run of two steps on small data in the layout of AudioSet."""
    folder = tmp_path_factory.mktemp("nape")
    write_audioset(folder / "set")

    def run(size: str) -> Path:
        out = folder / size
        if not out.exists():
            words = [f"data.root={folder / 'set'}", f"out={out}", "verdict.fit_samples=8", *TINY]
            assert main(["pretrain", f"recipes.audio:nape_{size}", *words]) == 0
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_two_steps_of_pre_training(size: str, started: Callable[[str], Path]) -> None:
    summary = check_summary(started(size) / "summary.json", PretrainSummary)
    assert summary["steps"] == 2
    assert math.isfinite(summary["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", SIZES)
def test_two_steps_of_fine_tuning(
    size: str, task: str, started: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MADE[task](tmp_path / "set")
    out, folds = tmp_path / "run", ["folds=1,2"] if task in ("esc50", "iemocap") else []
    words: list[Any] = [f"data.root={tmp_path / 'set'}", f"init={started(size)}", f"out={out}", *TINY, *TUNED, *folds]
    assert main(["finetune", f"recipes.audio:nape_{size}_{task}", *words]) == 0
    if folds:
        assert check_summary(out / "summary.json", FoldsSummary)["folds"] == ["1", "2"]
    else:
        summary = check_summary(out / "summary.json", FinetuneSummary)
        assert ("map" in summary) == task.startswith("audioset")
        assert summary["new_weights"] == []
    assert "Traceback" not in capsys.readouterr().err
