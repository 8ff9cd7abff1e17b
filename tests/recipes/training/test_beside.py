"""nepa finetune beside=: timm models trained by the same recipe, in their own folders, and in the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.optim import param_groups_layer_decay

from modalities.image import Images
from nepa_core.runtime.config import override
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import FinetuneConfig
from recipes.networks.goals import numbered
from recipes.presets import short
from recipes.report.summaries import FinetuneSummary
from recipes.statistics.worth import Score, judge, worth_in
from recipes.training.finetuning import beside_config, build_beside, finetune, make_step
from tests import tiny
from tests.pictures import encoded, picture, write_tree
from tests.summaries import check_summary
from tests.tiny import CPU

ALONE = World(0, 1, CPU)
HERE = "tests.recipes.training.test_beside"
RESNET, VIT = "timm:test_resnet", "timm:test_vit"


def images(root: str = "imagenet") -> FinetuneConfig:
    """Three steps on images of 24 x 16, read at 8 x 8 with random crops, erasing and mixing."""
    half = (0.5, 0.5, 0.5)
    data = Images(source="folder", root=root, size=(8, 8), patch=(4, 4), channels=3, mean=half, std=half, erase=0.5)
    config = short(tiny.recipe().model_copy(update={"data": data}))
    keys = {"train.length.steps": 3, "train.batch": 4, "mix.mixup": 0.8, "mix.cutmix": 1.0, "data.augment": "crop_flip"}
    return override(config, keys)


@pytest.fixture
def root(tmp_path: Path) -> str:
    files = {f"{s}/{k}/{i}.png": encoded(picture(i, 24, 16)) for s in ("train", "val") for k in "ab" for i in range(4)}
    write_tree(tmp_path / "data", files)
    return str(tmp_path / "data")


@pytest.mark.slow
def test_the_verdict_names_the_network_beside_and_the_run_stays_what_it_is(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", f"{HERE}:images", f"data.root={root}"]
    both, alone = Run(tmp_path / "both"), Run(tmp_path / "alone")
    assert main([*words, f"out={alone.path}"]) == 0
    beside = [f"beside={RESNET}", "pretrained=false", f"out={both.path}"]
    assert main([*words, *beside]) == 0
    said = capsys.readouterr().out
    assert both.metrics_path.read_bytes() == alone.metrics_path.read_bytes()
    rival = Run(both.path / "beside" / "timm_test_resnet_with_random_weights")
    own, other = (check_summary(run.path / "summary.json", FinetuneSummary) for run in (both, rival))
    worth = worth_in(own)
    assert worth is not None
    assert [each.name for each in worth.beside] == ["timm:test_resnet with random weights"]
    assert worth.name == "this network"
    assert worth.beside[0].figure == pytest.approx(other["accuracy_ema"])
    assert worth.beside[0].margin == pytest.approx(own["accuracy_ema"] - other["accuracy_ema"])
    assert worth.samples == 8
    assert worth.verdict in said
    assert worth.verdict in (both.report / "index.html").read_text()
    assert "stand beside another" in (rival.report / "index.html").read_text()
    configs = [json.loads((run.path / "config.json").read_text()) for run in (both, rival)]
    for key in ("optim", "train", "mix", "label_smoothing"):
        assert configs[0][key] == configs[1][key]
    assert (configs[1]["data"]["size"], configs[1]["data"]["augment"]) == ([160, 160], "crop_flip")

    written = [file.stat().st_mtime_ns for file in sorted(rival.path.rglob("*"))]
    assert main([*words, *beside]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines()][-3] == worth.verdict
    assert written == [file.stat().st_mtime_ns for file in sorted(rival.path.rglob("*"))], "nothing is trained twice"


def test_it_stops_and_goes_on_bit_for_bit(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of BatchNorm and all."""
    config = beside_config(images(root), RESNET, pretrained=False)
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    finetune(config, whole, ALONE, show=False)
    with monkeypatch.context() as patch:
        stopped = lambda *given: tiny.interrupted_at({2}, make_step(*given))  # noqa: E731
        patch.setattr("recipes.training.finetuning.make_step", stopped)
        with pytest.raises(Interrupted):
            finetune(config, cut, ALONE, show=False)
    finetune(config, cut, ALONE, show=False)
    assert cut.metrics_path.read_bytes() == whole.metrics_path.read_bytes()


def test_layer_decay_is_that_of_timm(root: str) -> None:
    model = build_beside(beside_config(images(root), VIT, pretrained=False), numbered(2))
    groups = param_groups_layer_decay(model.backbone, layer_decay=0.5)
    scales = {id(x): group["lr_scale"] for group in groups for x in group["params"]}
    counted, not_counted = (model.heights(head_counts=each) for each in (True, False))
    for name, x in model.named_parameters():
        assert 0.5 ** counted[name] == scales[id(x)], name
        assert not_counted[name] == max(counted[name] - 1, 0)
    assert model.head_names() == {"backbone.head.weight", "backbone.head.bias"}


def test_it_starts_from_its_weights_with_a_classifier_of_zeros(root: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = timm.create_model("test_vit", num_classes=7).eval()
    save_file(trained.state_dict(), tmp_path / "own.safetensors")
    config = beside_config(images(root), f"{VIT}@{tmp_path / 'own.safetensors'}", pretrained=True)
    model = build_beside(config, numbered(2)).eval()
    start = trained.state_dict()
    for name, x in model.backbone.state_dict().items():
        assert not x.any() if name.startswith("head.") else x.equal(start[name]), name
    batch = next(plain_batches(config.data.plain().dataset("test"), batch=3, device=CPU))
    tokens = config.data.plain().read(batch)
    transform = create_transform(**resolve_model_data_config(trained), is_training=False)
    seen = torch.stack([transform(Image.open(f"{root}/val/a/{i}.png")) for i in range(3)])
    torch.testing.assert_close(tokens.values.view(3, 3, 160, 160), seen)
    with torch.no_grad():
        model.backbone.get_classifier().weight.normal_()
        torch.testing.assert_close(model(tokens, causal=False), model.backbone(seen))


def test_a_file_that_has_other_weights_now_is_said(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "finetune",
        f"{HERE}:images",
        f"data.root={root}",
        "out=run",
        "control=false",
        f"beside={VIT}@own.safetensors",
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=7).state_dict(), "own.safetensors")
        if seed == 0:
            assert main(list(words)) == 0
            assert main(list(words)) == 0
    assert "began with other weights than own.safetensors has now" in fails(*words)


def test_grey_images_are_given_in_three_channels() -> None:
    half = (0.5,)
    grey = Images(source="digits", size=(8, 8), patch=(4, 4), channels=1, mean=half, std=half)
    config = beside_config(short(tiny.recipe().model_copy(update={"data": grey})), VIT, pretrained=False)
    model = build_beside(config, numbered(10))
    batch = next(plain_batches(config.data.plain().dataset("test"), batch=2, device=CPU))
    assert model(config.data.read(batch), causal=False).shape == (2, 10)


def test_what_cant_be_trained_beside_is_one_line(fails: Callable[..., str], tmp_path: Path) -> None:
    words = ["finetune", "tests.tiny:recipe", f"out={tmp_path / 'run'}"]
    assert "beside= trains on images: Waves has no whole_images" in fails(*words, f"beside={VIT}", "pretrained=false")
    assert "the nearest: test_vit" in fails(*words, "beside=timm:tset_vit")
    assert "can't be trained: name a model of timm" in fails(*words, "beside=my_lab:features")
    assert not (tmp_path / "run").exists()


def test_a_verdict_without_a_control_says_who_is_ahead() -> None:
    def score(name: str, right: int) -> Score:
        credits = (torch.arange(100) < right).double()
        return Score(name, "", float(credits.mean()), credits)

    def headline(*rights: int) -> str:
        rivals = [score(f"timm:{i}", right) for i, right in enumerate(rights)]
        return judge(score("this network", 60), rivals, torch.arange(100), metric="accuracy").headline

    found: dict[tuple[int, ...], Any] = {
        (20, 30): "AHEAD OF TIMM:1",
        (20, 60): "NO MORE THAN TIMM:1",
        (90, 20): "BEHIND TIMM:0",
    }
    assert {rights: headline(*rights) for rights in found} == found
