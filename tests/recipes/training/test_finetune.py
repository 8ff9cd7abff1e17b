"""Fine-tuning: what is trained and what is not, mixing as timm's, figures that do not depend on batches, and init=."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.utils.data import Dataset

from modalities.data.image_augment import ErasedBox, erase
from modalities.image import Images, patchify
from nepa_core import Tokens
from nepa_core.basics import UserError
from nepa_core.runtime.checkpoint import Checkpoint, save_checkpoint
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import load_backbone, read_weights
from nepa_core.verdict.intervals import over_samples
from recipes import vision
from recipes.cli import main
from recipes.configs import FinetuneConfig, MixConfig
from recipes.networks.goals import numbered
from recipes.presets import short
from recipes.report.finetune import scored_samples
from recipes.report.summaries import EvaluateSummary, FinetuneSummary
from recipes.resolve import default_out
from recipes.statistics.worth import sentences, worth_in
from recipes.training.finetuning import (
    build_classifier,
    finetune,
    load_classifier,
    make_step,
    measure,
    raw_and_averaged,
    read_config,
)
from recipes.training.mixing import make_mix
from recipes.training.pretraining import pretrain
from recipes.training.starting import build_model
from tests import tiny
from tests.nepa_core.runtime.test_distributed import torchrun
from tests.summaries import check_summary
from tests.tiny import CPU

ALONE = World(0, 1, CPU)


def tuning(**changes: Any) -> FinetuneConfig:
    """Twelve steps on the tiny recipe's data; a double underscore in a key stands for a dot."""
    keys = {"train.length.steps": 12, **{name.replace("__", "."): value for name, value in changes.items()}}
    return override(short(tiny.recipe()), keys)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(tiny.recipe(), Run(folder), ALONE, show=False)
    return str(folder)


def test_a_run_is_recipe_and_start_at_once(pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned"
    words = ["finetune", pretrained, f"out={out}", "train.length.steps=12"]
    assert main(words) == 0
    said, told = capsys.readouterr()
    assert told.splitlines() == [
        f"Fine-tuning from {pretrained} with the preset recipes.presets:short.",
        f"Fine-tuning from random weights with the same settings, as the control in {out / 'control'}; control=false "
        "leaves it out.",
    ]
    assert f"started from {pretrained}" in said
    assert "Figures on 48 held-out samples after the last of 12 steps" in said
    summary = Run(out).summary()
    assert summary is not None
    assert set(summary) >= {"accuracy", "accuracy_ema", "samples", "new_weights", "classes", "init", "steps"}
    assert summary["classes"] == ["0", "1"]
    assert json.loads((out / "config.json").read_text())["task"] == "finetune"
    assert (out / "report" / "index.html").read_text().count("data:image/png;base64,") == 2
    assert main(words) == 0, "a finished run only shows its result"
    assert capsys.readouterr().out == said
    assert main(["finetune", str(out)]) == 0, "and can be named itself"
    assert [line["step"] for line in Run(out).metrics() if "accuracy" in line] == [12], "nothing is measured untrained"
    capsys.readouterr()
    assert main(["finetune", str(out), f"out={tmp_path / 'again'}", "control=false"]) == 0
    assert capsys.readouterr().err == f"Fine-tuning from {pretrained}.\n", "its own start, and its own settings"
    assert main(["pretrain", str(out)]) == 2
    assert "is of a run of `nepa finetune`" in capsys.readouterr().err


def test_the_control_is_the_same_training_from_random_weights(
    pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of its own, byte for byte what init=null gives; the verdict is the difference, sample by sample."""
    words = ["finetune", pretrained, "train.length.steps=12"]
    assert main([*words, "freeze_embedder=true", f"out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert main([*words, "init=null", f"out={tmp_path / 'alone'}"]) == 0
    assert "NO VERDICT: these are random weights, the control itself" in capsys.readouterr().out
    control, alone = Run(tmp_path / "run" / "control"), Run(tmp_path / "alone")
    assert control.metrics_path.read_bytes() == alone.metrics_path.read_bytes()
    assert json.loads((control.path / "config.json").read_text()) == json.loads(
        (alone.path / "config.json").read_text()
    )
    assert not (alone.path / "control").exists(), "random weights need no control"

    summary = check_summary(tmp_path / "run" / "summary.json", FinetuneSummary)
    of_control = check_summary(control.path / "summary.json", FinetuneSummary)
    worth = worth_in(summary)
    assert worth is not None
    (beside,) = worth.beside
    assert (worth.figure, beside.figure) == (summary["accuracy_ema"], of_control["accuracy_ema"])
    samples = _all(tiny.Waves())
    right = []
    for run in (tmp_path / "run", control.path):
        model = load_classifier(tuning(), read_weights(str(run)))
        found = [model(tiny.Waves().read({k: v[None] for k, v in each.items()}), causal=False) for each in samples]
        right.append([float(out.argmax() == each["label"]) for out, each in zip(found, samples, strict=True)])
    apart = over_samples(torch.tensor(right[0]) - torch.tensor(right[1]))
    assert (beside.margin, beside.ci95) == (pytest.approx(apart.mean), pytest.approx(apart.half))
    assert (worth.samples, worth.clusters, worth.covers) == (48, 48, "these test samples of one seed, not other seeds")
    last = said.strip().splitlines()[-3:]
    assert last == sentences(worth, form=".2%")
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert all(html.escape(line) in page for line in last)


def test_a_finished_run_without_its_control_trains_it_when_asked_again(
    pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run & co")
    words = ["finetune", pretrained, "train.length.steps=12", f"out={run.path}"]
    assert main([*words, "control=false"]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("NO VERDICT: the control from random weights is missing")
    assert f"`nepa finetune '{run.path}'` trains it" in said
    assert html.escape(said) in (run.report / "index.html").read_text()
    before = run.summary()
    assert before is not None
    assert "worth" not in before
    assert not (run.path / "control").exists()

    with monkeypatch.context() as patch:  # Ctrl-C in the middle of the control
        patch.setattr(
            "recipes.training.finetuning.make_step", lambda *given: tiny.interrupted_at({5}, make_step(*given))
        )
        assert main(words) == 130
    shown = capsys.readouterr()
    assert "top-1" in shown.out, "the run's own figures are shown before its control is trained"
    assert "stopped after step 5 of 12; the same command goes on from there" in shown.err
    assert run.summary() == before
    assert main(["finetune", str(run.path)]) == 0, "by its own name, too"
    assert "going on after step 5" in capsys.readouterr().err
    after = run.summary()
    assert after is not None
    assert after.pop("worth")
    assert after == before, "what a summary had it keeps"
    monkeypatch.setattr("recipes.training.finetuning.measure", None)
    assert main([*words, "control=false"]) == 0, "and a verdict that was made is shown"
    assert "over random weights" in capsys.readouterr().out


@pytest.mark.distributed
def test_two_processes_train_the_control_and_give_the_verdict_of_one(pretrained: str, tmp_path: Path) -> None:
    """Over an uneven number of batches, of uneven size, with a sample that can't be read."""
    keys = ["train.length.steps=12", "data.samples=53", "data.unreadable=[3]", "train.max_unreadable=0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["finetune", pretrained, *keys, f"out={one}"]) == 0
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("control"))
    whole = Run(one).summary()
    assert whole is not None
    Run(two).write_summary({key: value for key, value in whole.items() if key != "worth"})
    done = torchrun("recipes", "finetune", str(two))
    assert done.returncode == 0, done.stderr
    both = Run(two).summary()
    assert both is not None
    assert both["worth"] == whole["worth"]
    assert both["worth"]["samples"] == 52
    assert done.stdout.count("over random weights") == 1
    steps = [line["step"] for line in Run(two / "control").metrics()]
    assert steps == [line["step"] for line in Run(one / "control").metrics()]
    assert not list(two.rglob(".*"))


def test_every_start_of_a_fine_tuning_is_the_averaged_network_of_the_run(pretrained: str) -> None:
    start, _ = build_classifier(tuning(init=pretrained), numbered(2))
    averages = read_weights(pretrained).model
    for name, value in start.backbone.state_dict().items():
        assert torch.equal(value, averages[name]), name
    other, _ = build_classifier(tuning(), numbered(2))
    assert not torch.equal(start.backbone.embed.weight, other.backbone.embed.weight)


@pytest.mark.parametrize("step", [2, 7])
def test_a_stopped_fine_tuning_goes_on_to_the_same_bytes(
    step: int, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the first line of metrics: none is written before the first step."""
    config = tuning(init=pretrained, train__evaluate=5, data__jitter=0.2)
    finetune(config, Run(tmp_path / "whole"), ALONE, show=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            "recipes.training.finetuning.make_step", lambda *given: tiny.interrupted_at({step}, make_step(*given))
        )
        with pytest.raises(Interrupted):
            finetune(config, Run(tmp_path / "parts"), ALONE, show=False)
    finetune(config, Run(tmp_path / "parts"), ALONE, show=False)
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole
    assert [line["step"] for line in Run(tmp_path / "whole").metrics() if "accuracy" in line] == [5, 10, 12]


def test_a_recipe_that_is_named_after_its_task_gives_a_folder_of_its_name(pretrained: str, tmp_path: Path) -> None:
    assert default_out("recipes.vision:base_in1k_finetune", "finetune") == "runs/base_in1k_finetune"
    assert default_out("recipes.vision:large_in1k_finetune_paper", "finetune") == "runs/large_in1k_finetune_paper"
    assert default_out("recipes.vision:camvid_segment", "segment") == "runs/camvid_segment"
    assert default_out("recipes.vision:digits", "finetune") == "runs/digits-finetune"
    assert default_out("recipes.vision:digits", "pretrain") == "runs/digits"
    assert default_out("recipes.audio:demo", "pretrain") == "runs/audio-demo"
    assert default_out("my_lab.seismic:base", "pretrain") == "runs/my_lab.seismic-base"
    assert default_out("my_lab.seismic:base", "orders") == "runs/my_lab.seismic-base-orders"
    assert default_out("finetune:base", "finetune") == "runs/finetune-base-finetune"
    assert default_out("my_lab.seismic:base_finetune", "finetune") == "runs/my_lab.seismic-base_finetune"
    assert default_out(f"{pretrained}/", "finetune") == f"{pretrained}-finetune"


@pytest.mark.slow
def test_two_classes_that_differ_in_speed_are_learned(tmp_path: Path) -> None:
    config = tuning(train__length__steps=220, train__evaluate=220, optim__lr=0.003, data__samples=512)
    summary = finetune(config, Run(tmp_path / "run"), ALONE, show=False)
    assert summary["accuracy"] > 0.85
    assert summary["accuracy_ema"] > 0.85


def test_the_head_gives_zeros_at_the_start() -> None:
    model, _ = build_classifier(tuning(), numbered(5))
    tokens = tiny.Waves().read(_batch())
    assert torch.equal(model(tokens, causal=False), torch.zeros(8, 5))
    out = make_step(tuning(label_smoothing=0.0), numbered(5))(model, _batch())
    assert out.loss.item() == pytest.approx(math.log(5))
    assert out.weight == 8


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_a_frozen_embedder_stays_and_all_else_moves(pretrained: str, tmp_path: Path, readout: str) -> None:
    config = tuning(init=pretrained, freeze_embedder=True, readout=readout, optim__warmup__steps=0)
    before, _ = build_classifier(config, numbered(2))
    finetune(config, Run(tmp_path / "run"), ALONE, show=False)
    after = load_classifier(config, read_weights(str(tmp_path / "run")))
    still = [n for n, v in after.state_dict().items() if torch.equal(v, before.state_dict()[n])]
    assert still == ["backbone.embed.weight", "backbone.embed.bias"]


def test_causal_fine_tuning_reads_no_later_token() -> None:
    """With the last-token read-out of a shorter sequence, what follows it must not matter under a causal mask."""
    model, _ = build_classifier(tuning(), numbered(3))
    torch.nn.init.normal_(model.head.classifier.weight)
    model.eval()
    batch = _batch()
    tokens = tiny.Waves().read(batch)
    changed = tiny.Waves().read(batch | {"values": batch["values"].clone().index_fill_(1, torch.tensor([5]), 9.0)})
    for causal, equal in ((True, True), (False, False)):
        seen = [model.backbone(each, causal=causal).predictions[:, :6] for each in (tokens, changed)]
        assert torch.equal(*seen) is equal
    assert not torch.equal(model(tokens, causal=True), model(tokens, causal=False))


def test_padding_does_not_reach_the_logits() -> None:
    data = tiny.Waves(ragged=True)
    config = override(short(tiny.ragged()), {})
    model, _ = build_classifier(config, numbered(3))
    torch.nn.init.normal_(model.head.classifier.weight)
    model.eval()
    batch = _batch(data)
    hidden = torch.arange(6) >= batch["length"][:, None]
    other = batch | {"values": torch.where(hidden[..., None], -55.0, batch["values"])}
    logits = [model(data.read(each), causal=False) for each in (batch, other)]
    assert torch.equal(*logits)


def of_noise() -> Images:
    return Images(source="noise", size=(8, 8), patch=(4, 4), channels=3, mean=(0.5, 0.4, 0.3), std=(0.5, 0.3, 0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_that_of_timm_and_follows_the_seed_of_the_step(smoothing: float) -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    mix = make_mix(MixConfig(mixup=0.8, cutmix=1.0), of_noise(), numbered(3), smoothing)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=3)
    seen = []
    for seed in range(6):
        torch.manual_seed(seed)
        batch, soft = mix({"image": images, "label": labels})
        torch.manual_seed(seed)
        np.random.seed(int(torch.randint(2**32, ())))
        image, target = theirs(images.float(), labels)
        assert torch.equal(batch["image"], image)
        assert torch.equal(soft, target)
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        seen.append(image)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(images, images.clone()), "the stored images are left alone"


class Seen(nn.Module):
    """A network of three classes that keeps the tokens it is shown."""

    def forward(self, tokens: Tokens, **_: Any) -> Tensor:
        self.values = tokens.values
        return torch.zeros(len(tokens.values), 3)


def test_rectangles_are_erased_before_images_are_mixed() -> None:
    """timm's order and that of the released scripts, written out in standardised pixels: erase, then mix."""
    data = of_noise()
    torch.manual_seed(0)
    boxes = torch.stack([ErasedBox(1.0, (8, 8))() for _ in range(6)])
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    batch = {"image": images, "erase": boxes, "label": torch.tensor([0, 1, 2, 0, 1, 2])}
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    erased = erase((images / 255 - mean) / std, boxes)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)
    config = override(short(tiny.recipe()).model_copy(update={"data": data}), {"mix.mixup": 0.8, "mix.cutmix": 1.0})
    model = Seen()
    for seed in range(6):
        torch.manual_seed(seed)
        make_step(config, numbered(3))(model, batch)
        torch.manual_seed(seed)
        np.random.seed(int(torch.randint(2**32, ())))
        mixed, _ = theirs(erased.clone(), batch["label"])
        torch.testing.assert_close(model.values, patchify(mixed, data.patch), rtol=0, atol=2e-6)
        assert (mixed - erased).abs().max() > 0.1
    assert torch.equal(batch["image"], images), "the stored images are left alone"


def test_label_smoothing_without_mixing_is_the_formula() -> None:
    model, _ = build_classifier(tuning(), numbered(4))
    torch.nn.init.normal_(model.head.classifier.weight)
    batch = _batch()
    logits = model(tiny.Waves().read(batch), causal=False).double()
    soft = 0.8 * F.one_hot(batch["label"], 4) + 0.2 / 4
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    found = make_step(tuning(label_smoothing=0.2), numbered(4))(model, batch).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_accuracy_counts_every_sample_once_whatever_the_batch_and_the_ranks() -> None:
    data = tiny.Waves(samples=45, unreadable=(3, 4))
    config = override(tuning().model_copy(update={"data": data}), {"train.max_unreadable": 0.05})
    model, _ = build_classifier(config, numbered(2))
    torch.nn.init.normal_(model.head.classifier.weight)
    alone = measure(config, model, ALONE)
    assert alone["accuracy"] * 43 == pytest.approx(round(alone["accuracy"] * 43))
    assert (alone["samples"], alone["unreadable_held_out"]) == (43, 2)
    assert "top5" not in alone, "of two classes both are among the first five"
    by_hand = _by_hand(config, model)
    assert alone["accuracy"] == pytest.approx(by_hand)
    assert measure(override(config, {"train.batch": 5}), model, ALONE)["accuracy"] == alone["accuracy"]


class Unlabelled(Dataset[dict[str, Tensor]]):
    """Samples of which every third has no class."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return sample | {"label": torch.where(torch.tensor(index % 3 == 0), -1, sample["label"])}


def test_held_out_samples_left_out_are_named_in_the_summary_and_on_the_screen(
    pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["data.unreadable=[3,7]", "train.max_unreadable=0.1", "train.length.steps=6"]
    assert main(["finetune", pretrained, *bad, f"out={tmp_path}"]) == 0
    named = ["sample 3: torn", "sample 7: torn"]
    assert json.loads((tmp_path / "summary.json").read_text())["unreadable_held_out_messages"] == named
    assert capsys.readouterr().out.count("\n  sample 7: torn\n") == 2, "once for training"
    assert main(["evaluate", str(tmp_path)]) == 0
    assert "\n  sample 3: torn\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluate.json").read_text())["unreadable_held_out_messages"] == named


def test_a_fine_tuning_that_is_stopped_at_its_end_still_names_what_it_left_out(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ["data.unreadable=[3,7]", "train.max_unreadable=0.1", "train.length.steps=6", "control=false"]
    measured = raw_and_averaged

    def stopped(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return measured(*given)

    assert main(["finetune", pretrained, *bad, f"out={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("recipes.training.finetuning.raw_and_averaged", stopped)
        assert main(["finetune", pretrained, *bad, f"out={tmp_path / 'parts'}"]) == 143
    assert not (tmp_path / "parts/summary.json").exists()
    assert main(["finetune", pretrained, *bad, f"out={tmp_path / 'parts'}"]) == 0
    whole, parts = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts"))
    assert parts["unreadable_held_out_messages"] == ["sample 3: torn", "sample 7: torn"]
    timed = {"seconds", "tokens_per_second", "data_wait_share", "made_with"}
    assert {key: value for key, value in parts.items() if key not in timed} == {
        key: value for key, value in whole.items() if key not in timed
    }
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_samples_without_a_class_are_counted_apart() -> None:
    config = tuning()
    model, _ = build_classifier(config, numbered(2))
    figures = measure(config, model, ALONE, Unlabelled(config.data.dataset("test")))
    assert (figures["samples"], figures["without_class"]) == (48, 16)
    assert scored_samples(figures, "samples") == "32 of 48 samples (16 have no class)"
    torn = figures | {"unreadable_held_out": 2}
    assert scored_samples(torn, "samples") == "32 of 50 samples (16 have no class, 2 could not be read)"
    assert scored_samples(figures | {"without_class": 0}, "samples") == "48 samples"


def _by_hand(config: FinetuneConfig, model: torch.nn.Module) -> float:
    model.eval()
    samples = [sample for i, sample in enumerate(_all(config.data)) if i not in (3, 4)]
    right = [
        model(config.data.read({k: v[None] for k, v in sample.items()}), causal=False).argmax().item()
        == sample["label"]
        for sample in samples
    ]
    return float(np.mean(right))


def _all(data: Any) -> list[dict[str, Tensor]]:
    whole = data.model_copy(update={"unreadable": ()}).dataset("test")
    return [whole[i] for i in range(len(whole))]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__dim": 32}, "model.dim is 32 in the recipe and 16 in the weights"),
        (
            {"model__gated": True, "model__bos": False},
            "model.gated is True in the recipe and False in the weights; model.bos",
        ),
        ({"model__layer_scale": None}, "model.layer_scale is none in the recipe and some in the weights"),
        ({"data__size": 5}, "1 misshapen: embed.weight [16, 4] instead of [16, 5]"),
        ({"init": "nowhere/at/all"}, "init=nowhere/at/all: there is no such folder"),
    ],
)
def test_a_start_that_does_not_fit_is_told_key_by_key(pretrained: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        build_classifier(tuning(**{"init": pretrained} | changes), numbered(2))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.patch": (4, 4)}, "data.patch is (4, 4) in the recipe and (2, 4) there; set the recipe's keys to fit"),
        (
            {"data.channels": 3, "data.mean": (0.5,) * 3, "data.std": (0.5,) * 3},
            "data.channels is 3 in the recipe and 1 there; set",
        ),
        (
            {"data.patch_order": "hilbert", "causal": True},
            "data.patch_order is hilbert in the recipe and raster there; set the recipe's keys to fit, or causal=false",
        ),
        ({"data.patch_order": "hilbert"}, None),
        ({"model.dim": 32}, "model.dim is 32 in the recipe and 64 in the weights"),
    ],
)
def test_a_start_on_other_patches_is_told_by_the_keys_of_the_data(
    tmp_path: Path, changes: dict[str, Any], said: str | None
) -> None:
    """Without causal attention the order of the patches says nothing: their places do."""
    config = vision.digits()
    run = Run(tmp_path / "run")
    run.open(config)
    save_checkpoint(run.checkpoints, Checkpoint(0, {"model": build_model(config).state_dict()}, {}), keep=1)
    tuned = override(short(config, str(run.path)), changes)
    if said is None:
        build_classifier(tuned, numbered(10))
        return
    with pytest.raises(UserError) as raised:
        build_classifier(tuned, numbered(10))
    assert said in str(raised.value)


def test_only_qk_norm_weights_may_be_new(pretrained: str) -> None:
    config = tuning(init=pretrained, model__qk_norm="affine")
    model, new = build_classifier(config, numbered(2))
    assert new == [
        f"predictor.blocks.{block}.attention.{kind}_norm.weight" for block in range(2) for kind in ("k", "q")
    ]
    assert all(torch.equal(model.backbone.state_dict()[name], torch.ones(8)) for name in new)
    weights = read_weights(pretrained)
    bare = weights._replace(model={k: v for k, v in weights.model.items() if k not in ("bos", "embed.bias")})
    with pytest.raises(UserError, match=r"2 missing: bos, embed\.bias"):
        load_backbone(model.backbone, config.model, bare)
    more = weights._replace(model=weights.model | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match="1 extra: extra"):
        load_backbone(model.backbone, config.model, more)


def test_a_fine_tuned_run_can_start_another_and_keeps_its_head_for_itself(pretrained: str, tmp_path: Path) -> None:
    config = tuning(init=pretrained)
    finetune(config, Run(tmp_path / "run"), ALONE, show=False)
    weights = read_weights(str(tmp_path / "run"))
    assert set(weights.head) == {"norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}
    assert weights.causal is False
    again, _ = build_classifier(tuning(init=str(tmp_path / "run")), numbered(7))
    assert torch.equal(again.backbone.embed.weight, weights.model["embed.weight"])
    with pytest.raises(UserError, match="has no head"):
        load_classifier(config, read_weights(pretrained))
    with pytest.raises(UserError, match="does not fit readout=last"):
        load_classifier(config.model_copy(update={"readout": "last"}), weights)


def test_evaluate_finds_the_averaged_accuracy_of_the_run(
    tmp_path: Path, pretrained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = finetune(tuning(init=pretrained), Run(tmp_path / "run"), ALONE, show=False)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"Held out: top-1 {summary['accuracy_ema']:.2%}, 48 samples, averaged weights.\n"
    found = check_summary(tmp_path / "run" / "evaluate.json", EvaluateSummary)
    assert {name: found[name] for name in ("accuracy", "held_out_loss")} == {
        name: summary[f"{name}_ema"] for name in ("accuracy", "held_out_loss")
    }
    assert main(["evaluate", pretrained]) == 2
    assert main(["evaluate", "tests.tiny:recipe"]) == 2
    said = capsys.readouterr().err
    assert "was pre-trained only and has no head to evaluate" in said
    assert "tests.tiny:recipe is not a run folder" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["freeze_embedder=true"], "freeze_embedder=true would keep a random embedder"),
        (['mix={"mixup":0,"cutmix":0}'], "both 0"),
        (['mix={"mixup":0.8,"cutmix":0}', "train.length.steps=1"], "mix is for images"),
        (["data.labelled=false"], "Waves gives no class to train on"),
        (["train.sampling=balanced", "data.labelled=false"], "Waves gives no class to train on"),
        (["label_smothing=0.1"], "did you mean label_smoothing?"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["finetune", "tests.tiny:recipe", f"out={tmp_path / 'run'}", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "run").exists()


def test_a_setting_for_many_accelerators_is_cut_to_one_for_a_laptop() -> None:
    config = read_config("recipes.vision:base_in1k", {})
    assert (config.train.batch, config.train.micro_batch) == (64, 16)
    assert config.train.evaluate == config.train.checkpoint == 200
    own = read_config("tests.tiny:recipe", {}).train
    assert (own.batch, own.micro_batch, own.checkpoint) == (8, None, 4), "a small recipe keeps its own"


def test_a_recipe_of_pre_training_gives_data_and_network() -> None:
    config = read_config("tests.tiny:random", {"train.seed": 3})
    assert config.init is None
    assert config.model.mask_token is False
    assert config.model.drop_path == 0.3
    assert config.recipe == "tests.tiny:random"
    assert config.train.seed == 3


def _batch(data: tiny.Waves | None = None) -> dict[str, Tensor]:
    samples = (data or tiny.Waves()).dataset("train")
    return torch.utils.data.default_collate([samples[i] for i in range(8)])


def test_a_group_that_may_be_left_out_is_switched_off_by_null() -> None:
    config = read_config("recipes.vision:base_in1k_finetune", {"mix": None, "optim.layer_decay": None})
    assert (config.mix, config.optim.layer_decay) == (None, None)
    with pytest.raises(UserError, match="optim=null"):
        read_config("recipes.vision:base_in1k_finetune", {"optim": None})
