"""Networks beside ours: what is read of a timm model, how it sees an image, whose weights it has, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from nepa_core.basics import UserError
from recipes.networks.backbones import (
    VIEW,
    Viewed,
    check_rows,
    function_backbone,
    pixels_of,
    timm_backbone,
    timm_model,
    timm_rows,
)
from tests.pictures import encoded, open_folder, picture, write_tree
from tests.tiny import CPU

VIT = "timm:test_vit"


def test_rows_are_the_layers_the_final_norm_and_what_the_classifier_reads() -> None:
    model, x = timm_model(VIT, pretrained=False, seed=0).eval(), torch.randn(2, 3, 160, 160)
    hidden: list[torch.Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, __, out: hidden.append(out))
    with torch.no_grad():
        final = model.forward_features(x)  # type: ignore[operator]
        expected = {}
        for number, each in enumerate(hidden, 1):
            expected |= {f"layer {number}, mean": each[:, 1:].mean(1), f"layer {number}, CLS": each[:, 0]}
        expected |= {"final norm, mean": final[:, 1:].mean(1), "final norm, CLS": final[:, 0], "head input": model(x)}
        found = timm_rows(model, x)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_a_convolution_network_has_the_means_of_its_stages() -> None:
    model, x = timm_model("timm:test_resnet", pretrained=False, seed=0).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = timm_rows(model, x)
        torch.testing.assert_close(found["head input"], model(x))
        torch.testing.assert_close(found["layer 5, mean"], model.forward_features(x).mean((2, 3)))  # type: ignore[operator]
    assert list(found) == [*(f"layer {i}, mean" for i in range(1, 6)), "head input"]


@pytest.mark.parametrize("changes", [{}, {"in_memory": True}, {"limit": 3}, {"channels": 1}])
def test_an_image_is_seen_as_it_is_stored_by_the_models_own_transform(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_tree(tmp_path, {f"{s}/a/{i}.png": encoded(picture(i, 40, 24)) for s in ("train", "val") for i in range(5)})
    samples = open_folder(tmp_path, **changes)
    first = {"image": torch.stack([samples[i]["image"] for i in range(3)])}
    backbone = timm_backbone(VIT, samples, first, pretrained=False, seed=0, device=CPU, dtype=None)
    assert "160 x 160 pixels from the stored images, bicubic, crop 0.95, own mean and std" in backbone.about
    assert backbone.view is not None
    model = timm.create_model("test_vit", num_classes=0)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    seen = Viewed(samples, {f"{VIEW}{backbone.name}": backbone.view})
    for index in range(3):
        with Image.open(samples.name(index)) as stored:
            grey = stored.convert("L").convert("RGB") if changes.get("channels") == 1 else stored
            expected = transform(grey)
        sample = seen[index]
        assert sample["image"].equal(samples[index]["image"]), "ours stays"
        found = pixels_of(model).standardised(sample[f"{VIEW}{backbone.name}"][None])[0]
        torch.testing.assert_close(found, expected)


def test_random_weights_are_those_of_the_seed_and_draw_nothing() -> None:
    before = torch.get_rng_state()
    a, b, c = (timm_model(VIT, pretrained=False, seed=seed).state_dict()["pos_embed"] for seed in (0, 0, 1))
    assert a.equal(b)
    assert not a.equal(c)
    assert torch.get_rng_state().equal(before)


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = timm.create_model("test_vit", num_classes=7)
    file = tmp_path / "own.safetensors"
    save_file(trained.state_dict(), file)
    found = timm_model(f"{VIT}@{file}", pretrained=True, seed=0).state_dict()
    assert all(value.equal(trained.state_dict()[name]) for name, value in found.items())
    torch.save(trained.state_dict(), tmp_path / "own.pt")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    for name, word in {
        "own.pt": ".safetensors alone",
        "cut.safetensors": "can't be read",
        "no.safetensors": "No such",
    }.items():
        with pytest.raises(UserError, match=word):
            timm_model(f"{VIT}@{tmp_path / name}", pretrained=True, seed=0)
    with pytest.raises(UserError, match=r"of another model: .* missing: .* extra: .*"):
        timm_model(f"timm:test_resnet@{file}", pretrained=True, seed=0)


def test_a_name_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no model resnt18; the nearest: resnet18, "):
        timm_model("timm:resnt18", pretrained=False, seed=0)


def test_weights_that_cant_be_had_are_one_line_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(
        UserError, match=r"not known\); fetch .* timm:test_vit@FILE.safetensors, or give pretrained=false"
    ):
        timm_model(VIT, pretrained=True, seed=0)
    with pytest.raises(UserError, match="timm has no weights for it"):
        timm_model("timm:vit_base_patch32_plus_256", pretrained=True, seed=0)


def first_only(batch: dict[str, Any]) -> Any:
    return batch["image"][:1].flatten(1)


def test_a_function_that_gives_no_features_is_refused() -> None:
    batch = {"image": torch.ones(4, 3), "label": torch.zeros(4)}
    rows = function_backbone("tests.recipes.networks.test_backbones:first_only").rows(batch)
    with pytest.raises(UserError, match=r"features has shape \[1, 3\] for a batch of 4; make it \[4, D\]"):
        check_rows("my:f", rows, [4])
    wrong = {
        r"shape \[4\] for": {"x": torch.ones(4)},
        "holds NaN": {"x": torch.full((4, 2), torch.nan)},
        "gives the rows": {},
    }
    for words, given in wrong.items():
        with pytest.raises(UserError, match=words):
            check_rows("my:f", given, [4])
    with pytest.raises(UserError, match=r"the rows .'y'. for a batch, and .'x'. are wanted"):
        check_rows("my:f", {"y": torch.ones(4, 2)}, [4], ["x"])


@pytest.mark.parametrize(("given", "words"), [([1.0], "gives list"), ({"a/b": torch.ones(1, 1)}, "can't name a row")])
def test_rows_of_a_function_are_tensors_with_plain_names(
    given: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.recipes.networks.test_backbones.first_only", lambda batch: given)
    with pytest.raises(UserError, match=words):
        function_backbone("tests.recipes.networks.test_backbones:first_only").rows({})
