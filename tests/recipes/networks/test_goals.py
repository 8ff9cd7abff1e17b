"""Goals of fine-tuning: told by the samples, blind to padding, and in the unit of the targets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nepa_core.basics import Batch, UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import read_weights
from nepa_core.tokens import Tokens
from recipes.cli import main
from recipes.configs import FinetuneConfig, PretrainConfig
from recipes.networks import goals
from recipes.presets import short
from recipes.readout import probing as probe
from recipes.statistics.worth import worth_in
from recipes.training.finetuning import (
    beside_control,
    build_classifier,
    finetune,
    held_out_credits,
    load_classifier,
    make_step,
    measure,
    of_views,
)
from recipes.training.pretraining import pretrain
from recipes.training.starting import build_model
from tests import tiny
from tests.tiny import CPU
from tests.tiny_scenes import scenes, write_scenes

ALONE = World(0, 1, CPU)


class Taught(tiny.Waves):
    """Waves with another target.

    A number, three numbers, a class per token (the sign of its first value), or several classes: which of fast, loud
    and odd it is.
    """

    teach: Literal["number", "numbers", "tokens", "several", "wide", "nothing", "text", "nan"]
    reverse: bool = False

    def classes(self) -> tuple[str, ...] | None:
        return ("fast", "loud", "odd") if self.teach in ("several", "wide") else super().classes()

    def dataset(self, split: str) -> Dataset[Batch]:
        return cast(Dataset[Batch], [self._taught(sample) for sample in super().dataset(split)])  # type: ignore[attr-defined]

    def _taught(self, sample: Batch) -> Batch:
        speed, values = sample["label"].float(), sample["values"]
        rest = {key: value for key, value in sample.items() if key != "label"}
        return (
            rest
            | {
                "number": {"label": 1000 + 50 * speed},
                "numbers": {"label": torch.stack((1000 + 50 * speed, -speed, torch.tensor(3.0)))},
                "tokens": {"target": (values[:, 0] > 0).long()},
                "several": {"label": torch.stack((speed > 0, values.abs().mean() > 0.6, values[0, 0] > 0))},
                "wide": {"label": torch.zeros(4, dtype=torch.bool)},
                "nan": {"label": torch.tensor(math.nan)},
                "text": {"label": torch.zeros(2, dtype=torch.int64)},
                "nothing": {},
            }[self.teach]
        )

    def order(self, tokens: Tokens) -> Tensor | None:
        return torch.arange(self.tokens - 1, -1, -1) if self.reverse else None


def recipe() -> PretrainConfig:
    return tiny.recipe().model_copy(update={"data": Taught(teach="number")})


def tuning(data: tiny.Waves, **changes: Any) -> FinetuneConfig:
    keys = {"train.length.steps": 12, **{name.replace("__", "."): value for name, value in changes.items()}}
    return override(short(tiny.recipe().model_copy(update={"data": data})), keys)


def batch_of(data: tiny.Waves) -> Batch:
    samples = data.dataset("train")
    batch: Batch = default_collate([samples[i] for i in range(8)])
    return batch


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ({"label": torch.tensor(3)}, "class"),
        ({"label": 3}, "class"),
        ({"label": 0.5}, "numbers"),
        ({"label": torch.zeros(4)}, "numbers"),
        ({"label": torch.zeros(4, 2)}, None),
        ({"label": torch.zeros(4).long()}, None),
        ({"label": torch.zeros(4).bool()}, "classes"),
        ({"label": torch.zeros(4, 2).bool()}, None),
        ({"label": torch.tensor(True)}, "class"),
        ({"target": torch.zeros(4).long()}, "token classes"),
        ({"target": torch.zeros(4).long(), "label": torch.tensor(1)}, "class"),
        ({"target": torch.zeros(4, 4).long()}, None),
        ({"target": torch.zeros(4)}, None),
        ({}, None),
    ],
)
def test_dtype_and_shape_tell_the_kind(sample: Batch, kind: str | None) -> None:
    assert goals.kind_of(sample) == kind


def test_the_scale_of_a_regression_is_that_of_the_training_labels() -> None:
    goal = goals.find_goal(Taught(teach="numbers", samples=200))
    labels = torch.stack([sample["label"] for sample in Taught(teach="numbers", samples=200).dataset("train")])  # type: ignore[attr-defined]
    assert isinstance(goal, goals.Regression)
    torch.testing.assert_close(goal.mean, labels.mean(0))
    torch.testing.assert_close(goal.std, torch.cat((labels.std(0, correction=0)[:2], torch.ones(1))))


@pytest.mark.parametrize(
    ("teach", "said"),
    [
        ("nothing", "gives no class"),
        ("text", "no class"),
        ("nan", "is NaN"),
        ("wide", "names 3 classes, and its 'label' has 4 places"),
    ],
)
def test_what_can_not_be_taught_is_one_line(teach: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        goals.find_goal(Taught(teach=teach))


def test_classes_of_pixels_are_for_another_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Scenes has a class for every pixel: train on them with `nepa segment`"):
        goals.find_goal(scenes(write_scenes(tmp_path)))


@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_figures_of_numbers_are_in_their_own_unit(tmp_path: Path, readout: str, causal: bool) -> None:
    data = Taught(teach="numbers", ragged=True)
    config = tuning(data, readout=readout, causal=causal)
    summary = finetune(config, Run(tmp_path / "run"), ALONE, show=False)
    model = load_classifier(config, read_weights(str(tmp_path / "run")))
    batch = default_collate(list(data.dataset("test")))  # type: ignore[call-overload]
    predicted, truth = model(data.read(batch), causal=causal).detach(), batch["label"]
    assert summary["mse_ema"] == pytest.approx(float((predicted - truth).square().mean()), rel=1e-3)
    assert summary["mae_ema"] == pytest.approx(float((predicted - truth).abs().mean()), rel=1e-3)
    from sklearn.metrics import r2_score

    assert summary["r2_ema"] == pytest.approx(r2_score(truth[:, :2], predicted[:, :2]) * 2 / 3, abs=1e-4)
    assert summary["classes"] is None
    assert "MSE" in (tmp_path / "run" / "report" / "index.html").read_text()


@pytest.mark.slow
def test_numbers_are_learned(tmp_path: Path) -> None:
    data = Taught(teach="numbers", samples=512)
    config = tuning(data, train__length__steps=200, train__evaluate=200, optim__lr=0.002)
    summary = finetune(config, Run(tmp_path / "run"), ALONE, show=False)
    assert summary["r2"] > 0.3, "two thirds is the most: the third number does not vary"


def test_several_classes_start_at_their_shares_and_have_a_binary_loss() -> None:
    data = Taught(teach="several", samples=200)
    goal = goals.find_goal(data)
    assert isinstance(goal, goals.MultiLabel)
    labels = torch.stack([sample["label"] for sample in data.dataset("train")]).float()  # type: ignore[attr-defined]
    torch.testing.assert_close(goal.shares, (labels.sum(0) + 0.5) / 201)
    assert ((labels.mean(0) > 0.1) & (labels.mean(0) < 0.9)).all(), "or the classes teach nothing"
    config = tuning(data, label_smoothing=0.2)
    model, _ = build_classifier(config, goal)
    batch = batch_of(data)
    torch.testing.assert_close(model(data.read(batch), causal=False).sigmoid(), goal.shares.expand(8, 3))
    loss, weight = goal.loss(logits := torch.randn(8, 3), truth := batch["label"].float(), smoothing=0.2)
    wanted = 0.8 * truth + 0.1
    expected = -(wanted * logits.sigmoid().log() + (1 - wanted) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(loss, expected)
    assert weight == 8


def test_the_figures_of_several_classes_are_those_of_other_libraries() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs, truth = torch.randn(60, 5, generator=draw).round(decimals=1), torch.rand(60, 5, generator=draw) > 0.7
    truth[:, 3], truth[:, 4] = False, True  # nothing to rank
    goal = goals.MultiLabel(tuple("abcde"), torch.full((5,), 0.3))
    figures = goal.figures(goal.sums(outputs, truth.float()))
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, right = outputs[:, :3].numpy(), truth[:, :3].numpy()
    assert figures["map"] == pytest.approx(average_precision_score(right, scores, average="macro"), abs=1e-6)
    assert figures["auroc"] == pytest.approx(roc_auc_score(right, scores, average="macro"), abs=1e-6)
    parts = torch.cat([goal.parts(*each) for each in zip(outputs.split(7), truth.float().split(7), strict=True)])
    credits, weights = goal.credits(parts)
    assert float(credits.mean()) == pytest.approx(figures["map"], abs=1e-6)
    assert weights.tolist() == [1] * 60
    with pytest.raises(UserError, match="nothing can be ranked"):
        goal.sums(outputs, truth.float()[:, [3, 4, 3, 4, 3]])


def test_logits_beyond_the_reach_of_a_float32_sigmoid_are_still_ranked_and_paid_for() -> None:
    """Of one clip a sample, and of views, whose mean probability is nearly 1 or nearly 0."""
    goal = goals.MultiLabel(("a",), torch.full((1,), 0.5))
    logits, truth = torch.tensor([[40.0], [30.0], [20.0], [-50.0]]), torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    every = torch.cat((torch.arange(4.0)[:, None], truth, logits), dim=1).double()
    views = torch.arange(4)
    for numbers, right, outputs in (of_views(goal, every, None), of_views(goal, every, views)):
        assert numbers.tolist() == [0, 1, 2, 3]
        figures = goal.figures(goal.sums(outputs, right))
        assert figures["map"] == pytest.approx((1 + 2 / 3) / 2)
        assert figures["auroc"] == pytest.approx(0.75)
        assert figures["held_out_loss"] == pytest.approx(30 / 4, rel=1e-6)
        assert float(goal.credits(goal.parts(outputs, right))[0].mean()) == pytest.approx(figures["map"])


def test_labels_that_are_known_are_counted_without_reading_a_sample() -> None:
    class Known(Dataset[Batch]):
        labels = torch.rand(30_000, 3, generator=torch.Generator().manual_seed(0)) < 0.2

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> Batch:
            raise AssertionError("a sample is read for its label")

        def every_label(self) -> torch.Tensor:
            return self.labels

    shares = goals.class_shares(Known(), "Own", ("a", "b", "c"), limit=10)
    torch.testing.assert_close(shares, ((Known.labels.sum(0) + 0.5) / 30_001).float())


@pytest.mark.slow
def test_several_classes_are_learned_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, keys = tmp_path / "run", ["data.teach=several", "data.samples=256", "train.evaluate=60", "optim.lr=0.01"]
    words = ["finetune", "tests.recipes.networks.test_goals:recipe", *keys, "train.length.steps=60", f"out={run}"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "mAP" in shown
    assert "AUROC" in shown
    summary = json.loads((run / "summary.json").read_text())
    labels = torch.stack([sample["label"] for sample in Taught(teach="several", samples=256).dataset("test")])  # type: ignore[attr-defined]
    assert summary["map"] > float(labels.float().mean()) + 0.1, "by lot, a class has the share of samples it is in"
    assert summary["classes"] == ["fast", "loud", "odd"]
    assert "Held-out mAP" in (run / "report" / "index.html").read_text()
    config = Run(run).load_config(FinetuneConfig)
    credits = held_out_credits(config, Run(run), ALONE)
    assert float(credits.shares.mean()) == pytest.approx(summary["map_ema"], abs=1e-5)
    assert main(["evaluate", str(run)]) == 0
    assert f"{summary['map_ema']:.2%}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_probe_reads_several_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, keys = "tests.recipes.networks.test_goals:recipe", ["data.teach=several", "data.samples=256"]
    words = [name, *keys, "train.length.steps=4", "train.evaluate=4", "train.probe=true", f"out={tmp_path / 'run'}"]
    assert main(["pretrain", *words]) == 0
    assert 0 <= Run(tmp_path / "run").metrics()[-1]["probe_map"] <= 1
    assert main(["probe", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "The figures are mAP" in shown
    found = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert found["raw_tokens"]["map"] > 0.75
    assert set(found["best"]["scores"]) == {"linear", "knn"}
    assert found["worth"]["metric"] == "map"
    assert main(["probe", str(tmp_path / "run"), "classifiers=lars"]) == 2
    assert "classifiers=lars is for one class a sample" in capsys.readouterr().err


def test_a_regression_starts_at_the_mean() -> None:
    data = Taught(teach="number")
    goal = goals.find_goal(data)
    assert isinstance(goal, goals.Regression)
    model, _ = build_classifier(tuning(data), goal)
    batch = batch_of(data)
    assert torch.equal(model(data.read(batch), causal=False), goal.mean.expand(8, 1))
    out = make_step(tuning(data), goal)(model, batch)
    assert out.loss.item() == pytest.approx(float(((batch["label"] - goal.mean) / goal.std).square().mean()))
    assert measure(tuning(data), model, ALONE)["r2"] <= 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_class_per_token_counts_real_tokens_alone_whatever_the_order(causal: bool, reverse: bool) -> None:
    data = Taught(teach="tokens", ragged=True, reverse=reverse)
    goal = goals.find_goal(data)
    assert goal.per_token
    assert goal.names == ("0", "1")
    config = tuning(data, causal=causal, label_smoothing=0.0)
    model, _ = build_classifier(config, goal)
    torch.nn.init.normal_(model.head.linear.weight)
    batch = batch_of(data)
    padding = torch.arange(6) >= batch["length"][:, None]
    unsure = batch["target"].clone()
    unsure[:, 0] = -1
    logits = model.eval()(data.read(batch), causal=causal).double()
    for target in (batch["target"], unsure):
        real = ~padding & (target >= 0)
        out = make_step(config, goal)(model, batch | {"target": target})
        assert out.loss.item() == pytest.approx(F.cross_entropy(logits[real], target[real]).item(), rel=1e-5)
        assert int(out.weight) == int(real.sum())
    other = batch | {
        "values": torch.where(padding[..., None], -55.0, batch["values"]),
        "target": torch.where(padding, 1 - batch["target"], batch["target"]),
    }
    losses = [float(make_step(config, goal)(model, each).loss.detach()) for each in (batch, other)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_frame_labels_are_learned_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["train.length.steps=60", "train.evaluate=60", "optim.lr=0.01", "data.samples=128"]
    words = [
        "finetune",
        "tests.recipes.networks.test_goals:recipe",
        "data.teach=tokens",
        f"out={tmp_path / 'run'}",
        *keys,
    ]
    assert main(words) == 0
    summary = Run(tmp_path / "run").summary()
    assert summary is not None
    assert summary["accuracy"] > 0.9
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert f"top-1 {summary['accuracy_ema']:.2%}" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "data.teach=number"]) == 2
    assert "was trained on 2 classes per token and this data has 1 numbers" in capsys.readouterr().err


def test_sums_of_padded_and_even_batches_agree() -> None:
    data = Taught(teach="tokens", ragged=True, samples=45)
    config = tuning(data)
    model, _ = build_classifier(config, goals.find_goal(data))
    torch.nn.init.normal_(model.head.linear.weight)
    found = measure(config, model, ALONE)
    right = total = 0
    for sample in data.dataset("test"):  # type: ignore[attr-defined]
        length = int(sample["length"])
        alone = Tokens(sample["values"][None, :length], torch.arange(length)[:, None].float())
        logits = model.eval()(alone, causal=False)[0]
        right += int((logits.argmax(-1) == sample["target"][:length]).sum())
        total += length
    assert found["accuracy"] == pytest.approx(right / total)
    assert measure(override(config, {"train.batch": 7}), model, ALONE)["accuracy"] == found["accuracy"]


def test_wrong_targets_are_one_line() -> None:
    data = Taught(teach="tokens")
    goal, tokens, batch = goals.find_goal(data), data.read(batch_of(data)), batch_of(data)
    with pytest.raises(UserError, match=r"'target' has shape \[5\] for 6 tokens"):
        goal.truth(batch | {"target": batch["target"][:, :5]}, tokens)
    with pytest.raises(UserError, match="data holds class 5 and the network tells 2 apart"):
        goal.sums(torch.zeros(1, 2, 2), torch.tensor([[0, 5]]))
    with pytest.raises(UserError, match="no held-out sample has a class"):
        goal.figures(goal.sums(torch.zeros(1, 2, 2), torch.tensor([[-100, -100]])))
    numbers = goals.find_goal(Taught(teach="number"))
    with pytest.raises(UserError, match="'label' holds 2 numbers where 1 are wanted"):
        numbers.truth({"label": torch.zeros(8, 2)}, tokens)
    with pytest.raises(UserError, match="mix is for one class a sample"):
        make_step(tuning(data, mix={"mixup": 0.8, "cutmix": 0}), goal)
    assert numbers.truth({"label": torch.zeros(8)}, replace(tokens, mask=None)).shape == (8, 1)


def test_a_probe_of_numbers_gives_r2_beside_random_weights_and_raw_tokens() -> None:
    config = recipe().model_copy(update={"data": Taught(teach="number", samples=200, ragged=True)})
    options = probe.ProbeOptions(layers=(1, "final"), poolings=("mean",))
    result = probe.probe(config, build_model(config), options)
    for row in (*result["layers"], *result["random_init"]["layers"], result["raw_tokens"]):
        assert {"r2", "validation"} <= set(row)
        assert list(row["scores"]) == ["linear", "knn"]
        assert np.isfinite(row["r2"])
    shown = probe.render(result)
    assert "The figures are R2" in shown
    assert f"raw tokens {result['raw_tokens']['r2']:.3f}" in shown


@pytest.mark.parametrize("teach", ["numbers", "tokens"])
@pytest.mark.slow
def test_the_credits_of_a_run_are_its_figure_and_its_control_stands_beside_it(teach: Any, tmp_path: Path) -> None:
    """Also of numbers, and of a class per token, where a sample is a cluster and counts by its tokens."""
    data = Taught(teach=teach, ragged=True)
    pre = tiny.recipe().model_copy(update={"data": tiny.Waves(ragged=True)})
    pretrain(pre, Run(tmp_path / "pre"), ALONE, show=False)
    config = tuning(data, init=str(tmp_path / "pre"))
    run = Run(tmp_path / "run")
    summary = finetune(config, run, ALONE, show=False)
    key = goals.find_goal(data).headline
    credits = held_out_credits(config, run, ALONE)
    each = credits.shares.repeat_interleave(credits.weights)
    assert float(each.mean()) == pytest.approx(summary[f"{key}_ema"], abs=1e-6)
    assert credits.numbers.tolist() == list(range(48))
    lengths = [int(sample["length"]) for sample in data.dataset("test")]  # type: ignore[attr-defined]
    assert credits.weights.tolist() == (lengths if teach == "tokens" else [1] * 48)

    worth = worth_in(beside_control(config, run, ALONE, summary, show=False))
    control = Run(run.path / "control").summary()
    assert worth is not None
    assert control is not None
    assert worth.metric == key
    assert worth.figure == pytest.approx(summary[f"{key}_ema"], abs=1e-6)
    assert worth.beside[0].figure == pytest.approx(control[f"{key}_ema"], abs=1e-6)
    assert worth.beside[0].margin == pytest.approx(worth.figure - worth.beside[0].figure)
    assert (worth.samples, worth.clusters) == (int(credits.weights.sum()), 48)
    assert worth.unit == ("tokens" if teach == "tokens" else "samples")
