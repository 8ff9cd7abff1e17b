"""Mixed batches and what is taught of them, for images of several classes and for spectrograms; and loss=bce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn

from modalities.audio import Audio
from modalities.data import standardised
from modalities.image import Images
from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.run import Run
from nepa_core.tokens import Tokens
from recipes.audio import demo
from recipes.cli import main
from recipes.configs import FinetuneConfig, MixConfig
from recipes.networks.goals import Classification, MultiLabel, Regression, numbered, taught_by
from recipes.presets import short
from recipes.report.summaries import FinetuneSummary
from recipes.training.finetuning import finetune, make_step
from recipes.training.mixing import check_pairs, draw, make_mix
from tests import tiny
from tests.sounds import write_classes
from tests.summaries import check_summary
from tests.tiny import CPU

ALONE = World(0, 1, CPU)
AUGMENT = {"time_mask": 10, "frequency_mask": 6, "roll": 0.5, "noise": 0.1}


@pytest.fixture(autouse=True)
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardised, "STATISTICS_CLIPS", 20)


def tuning(**changes: Any) -> FinetuneConfig:
    """Six steps on synthetic clips of unequal length, augmented, mixed and balanced."""
    keys = {"data.augment": AUGMENT, "mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.prob": 0.8, "train.sampling": "balanced"}
    keys |= {"data.limit": 40, "model.dim": 16, "model.heads": 2, "model.depth": 1, "train.batch": 8}
    keys |= {"train.length.steps": 6, "train.log": 2, "train.checkpoint": 2, "train.evaluate": 6}
    return override(short(demo()), keys | {name.replace("__", "."): value for name, value in changes.items()})


class Seen(nn.Module):
    """A network that keeps the tokens it is shown, and answers with fixed logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = torch.linspace(-1, 1, 8 * classes).view(8, classes)

    def forward(self, tokens: Tokens, **_: Any) -> Tensor:
        self.tokens = tokens
        return self.logits[: len(tokens.values)]


def clips(data: Audio, count: int = 8) -> dict[str, Tensor]:
    return data.dataset("train").__getitems__(list(range(count)))


def test_the_step_mixes_augmented_clips_and_teaches_both_by_their_shares() -> None:
    config, model = tuning(mix__prob=1.0), Seen(4)
    goal = numbered(4)
    data = config.data
    assert isinstance(data, Audio)
    torch.manual_seed(0)
    batch = clips(data)
    assert len(batch["frames"].unique()) > 1
    kinds, step = set(), make_step(config, goal)
    for seed in range(8):
        torch.manual_seed(seed)
        loss = step(model, batch).loss
        torch.manual_seed(seed)
        share, centre = draw(config.mix)  # type: ignore[misc, arg-type]
        both, kept = data.mixed(data.before_mixing(batch), share, centre)
        assert torch.equal(model.tokens.canonical(model.tokens.values), data.tokenize(both).values)
        hot = F.one_hot(batch["label"], 4) * 0.9 + 0.1 / 4
        soft = kept[:, None] * hot + (1 - kept)[:, None] * hot.flip(0)
        torch.testing.assert_close(loss, F.cross_entropy(model.logits, soft))
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        kinds.add(centre is None)
    assert kinds == {True, False}


def test_clips_of_one_length_are_mixed_as_timm_mixes_images() -> None:
    data = Audio(source="synthetic", seconds=0.8, bands=32)
    mel = torch.rand(6, 40, 32)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for cutmix in (False, True):
        theirs = Mixup(mixup_alpha=0.0 if cutmix else 0.8, cutmix_alpha=1.0 if cutmix else 0.0, num_classes=3)
        theirs.label_smoothing = 0.1
        np.random.seed(1)
        image, target = theirs(mel[:, None].clone(), labels)
        np.random.seed(1)
        np.random.rand()
        share = np.random.beta(1.0, 1.0) if cutmix else np.random.beta(0.8, 0.8)
        place = (np.random.randint(40) + 0.5, np.random.randint(32) + 0.5) if cutmix else None
        centre = None if place is None else (place[0] / 40, place[1] / 32)
        batch, kept = data.mixed({"mel": mel, "frames": torch.full((6,), 40)}, share, centre)
        torch.testing.assert_close(batch["mel"], image[:, 0])
        soft = numbered(3).soft(labels, 0.1)
        torch.testing.assert_close(kept[:, None] * soft + (1 - kept)[:, None] * soft.flip(0), target)


def test_a_batch_is_mixed_with_the_chance_that_is_asked_for_and_one_way_as_often_as_the_other() -> None:
    torch.manual_seed(0)
    found = [draw(MixConfig(mixup=0.8, cutmix=1.0, prob=0.8)) for _ in range(2000)]
    mixed = [each for each in found if each is not None]
    assert len(mixed) / 2000 == pytest.approx(0.8, abs=0.03)
    assert np.mean([centre is None for _, centre in mixed]) == pytest.approx(0.5, abs=0.04)
    shares = torch.tensor([share for share, centre in mixed if centre is None])
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1), "of Beta(0.8, 0.8)"
    assert all(each is None or each[1] for each in (draw(MixConfig(mixup=0, cutmix=1.0)) for _ in range(20)))
    assert MixConfig(mixup=0.8, cutmix=1.0).model_dump() == {"mixup": 0.8, "cutmix": 1.0}, "stored digests stay"


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_several_classes_are_mixed_too_of_images_and_of_clips(prob: float) -> None:
    goal, config = MultiLabel(("a", "b", "c"), torch.full((3,), 0.5)), MixConfig(mixup=0.8, cutmix=1.0, prob=prob)
    images = Images(source="noise", size=(8, 8), patch=(4, 4), channels=1, mean=(0.5,), std=(0.5,))
    sound = Audio(source="synthetic", seconds=0.8, bands=32)
    label = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]).bool()
    batches = {images: {"image": torch.full((4, 1, 8, 8), 100)}, sound: clips(sound, 4)}
    for data, batch in batches.items():
        torch.manual_seed(0)
        seen = [make_mix(config, data, goal, 0.1)(batch | {"label": label})[1] for _ in range(20)]
        hot = label * 0.9 + 0.05
        for soft in seen:
            low, high = torch.minimum(hot, hot.flip(0)), torch.maximum(hot, hot.flip(0))
            assert ((soft >= low - 1e-6) & (soft <= high + 1e-6)).all()
        assert any(torch.allclose(soft, hot) for soft in seen) == (prob < 1)


def test_a_sample_without_a_class_counts_in_no_mixed_loss() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(4, 3), torch.tensor([0, -1, 2, 1])
    for goal in (Classification(("a", "b", "c")), Classification(("a", "b", "c"), binary=True)):
        soft = goal.soft(label, 0.1)
        loss, weight = goal.loss(logits, soft, smoothing=0.0)
        rest, count = goal.loss(logits[[0, 2, 3]], soft[[0, 2, 3]], smoothing=0.0)
        assert int(weight) == int(count) == 3
        torch.testing.assert_close(loss, rest)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_of_one_class_a_sample_is_the_formula(smoothing: float) -> None:
    goal = taught_by(numbered(4), "bce")
    torch.manual_seed(0)
    logits, label = torch.randn(6, 4), torch.tensor([0, 1, -100, 2, 3, 0])
    loss, weight = goal.loss(logits, label, smoothing=smoothing)
    kept = label >= 0
    hot = torch.full((5, 4), smoothing / 4).scatter_(1, label[kept][:, None], 1 - smoothing + smoothing / 4)
    each = -(hot * logits[kept].sigmoid().log() + (1 - hot) * (1 - logits[kept].sigmoid()).log())
    torch.testing.assert_close(loss, each.mean())
    assert int(weight) == 5
    figures = goal.figures(goal.sums(logits, label))
    assert figures["accuracy"] == int((logits.argmax(1) == label)[kept].sum()) / 5, "as of any classes"
    if not smoothing:
        assert figures["held_out_loss"] == pytest.approx(float(loss))
    views = goal.averaged(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(views, torch.zeros(1, 2))


def test_binary_cross_entropy_is_for_classes_of_samples() -> None:
    several = MultiLabel(("a", "b"), torch.full((2,), 0.5))
    assert taught_by(several, "bce") is several, "it is theirs already"
    for goal in (numbered(3, per_token=True), Regression(torch.zeros(1), torch.ones(1))):
        with pytest.raises(UserError, match="loss=bce is for classes of samples"):
            taught_by(goal, "bce")
    assert "loss" not in short(tiny.recipe()).model_dump(), "the usual loss is no key, so that stored digests stay"


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({"train.batch": 6}, 1, None),
        ({"train.batch": 9}, 1, 9),
        ({"train.batch": 6}, 2, 3),
        ({"train.batch": 6, "train.micro_batch": 3}, 1, 3),
        ({"train.batch": 9, "mix": None}, 1, None),
    ],
)
def test_an_odd_batch_cannot_be_mixed(changes: dict[str, Any], ranks: int, said: int | None) -> None:
    config = override(tuning(), changes)
    if said is None:
        check_pairs(config, ranks)
        return
    with pytest.raises(UserError, match=rf"mix pairs the samples of a batch, and {said} at once are an odd number"):
        check_pairs(config, ranks)


# ---- through the commands


@pytest.mark.slow
def test_a_stopped_fine_tuning_of_clips_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmented, mixed and balanced, with a loader process for the part that goes on."""
    config = tuning(loss="bce")
    finetune(config, Run(tmp_path / "whole"), ALONE, show=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            "recipes.training.finetuning.make_step", lambda *given: tiny.interrupted_at({3}, make_step(*given))
        )
        with pytest.raises(Interrupted):
            finetune(config, Run(tmp_path / "parts"), ALONE, show=False)
    finetune(override(config, {"train.workers": 1}), Run(tmp_path / "parts"), ALONE, show=False)
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole


def test_clips_in_folders_are_fine_tuned_with_all_of_it_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = write_classes(tmp_path / "clips", clips=8), tmp_path / "run"
    data = [f"data.root={root}", "data.seconds=0.3", "data.bands=32", "train.length.steps=4"]
    small = ["model.dim=16", "model.heads=2", "model.depth=1", "data.augment.time_mask=6", "data.augment.noise=0.1"]
    mix = ["mix.mixup=0.8", "mix.cutmix=1", "train.sampling=balanced", "loss=bce"]
    words = ["finetune", "recipes.audio:fsdd", *data, *small, *mix]
    assert main([*words, "train.batch=4", f"out={run}"]) == 0
    summary = check_summary(run / "summary.json", FinetuneSummary)
    assert summary["criterion"] == "bce"
    assert main(["runs", str(tmp_path)]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert "Binary cross-entropy over training" in (run / "report" / "index.html").read_text()
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()
    assert main([*words, "train.batch=3", f"out={tmp_path / 'odd'}"]) == 2
    assert capsys.readouterr().err.startswith("nepa: mix pairs the samples of a batch"), "before anything else is said"
