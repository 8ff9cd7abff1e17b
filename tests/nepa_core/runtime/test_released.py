"""The released layout: one table of names and shapes, and what a folder that breaks it is told."""

from __future__ import annotations

import itertools
import json
import pickle
import shlex
import subprocess
import sys
from collections import UserDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from nepa_core import NEPA, Tokens, UserError
from nepa_core.runtime.released import (
    NetworkState,
    Released,
    ReleasedConfig,
    digests,
    find,
    from_released,
    layout,
    new_weights,
    read_released,
    to_released,
)
from recipes.released.exporting import folded
from tests.release import FACTS, random_release, write_release

BIAS = "vit_nepa.embeddings.patch_embeddings.projection.bias"
SWITCHES = list(itertools.product([True, False], repeat=4))
LABELS = {"id2label": {str(i): name for i, name in enumerate(("ant", "bee", "cat"))}}


@pytest.mark.parametrize(("gated", "affine", "scaled", "headed"), SWITCHES)
def test_every_name_and_shape_of_the_layout_there_and_back(
    gated: bool, affine: bool, scaled: bool, headed: bool
) -> None:
    facts = FACTS | {"use_gated_mlp": gated, "qk_norm_affine": affine}
    classes = 3 if headed else 0
    state = random_release(facts, classes=classes, scaled=scaled)
    state = {name: tensor.to(torch.float16 if "dense" in name else torch.float32) for name, tensor in state.items()}
    config = ReleasedConfig.model_validate(facts).predictor(layer_scale=scaled)
    places = layout(config, patch=2, channels=3, classes=classes)
    assert places.shapes == {name: tensor.shape for name, tensor in state.items()}
    back = to_released(from_released(state, places), places)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def _outputs(released: Released, model: dict[str, Tensor], *, layer_scale: float | None) -> Tensor:
    config = released.config.model_copy(update={"layer_scale": layer_scale})
    network = NEPA(config, nn.Linear(3 * released.patch**2, config.dim))
    network.load_state_dict(model)
    values = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    centres = (torch.arange(3) + 0.5) / 3 * 2 - 1
    out: Tensor = network(Tokens(values, torch.cartesian_prod(centres, centres)), causal=True).predictions
    return out


def test_folding_the_scales_into_the_maps_changes_no_output(tmp_path: Path) -> None:
    write_release(tmp_path, FACTS, random_release(FACTS))
    released = read_released(tmp_path)
    kept = _outputs(released, released.model, layer_scale=1.0)
    without = {name: value for name, value in released.model.items() if "scale" not in name}
    state = folded(released.model)
    assert state.keys() == without.keys()
    torch.testing.assert_close(_outputs(released, state, layer_scale=None), kept, rtol=1e-6, atol=1e-5)
    assert (_outputs(released, without, layer_scale=None) - kept).abs().max() > 0.1, "the scales matter here"


def test_a_checkpoint_whose_scales_were_folded_has_none(tmp_path: Path) -> None:
    write_release(tmp_path, FACTS, random_release(FACTS, scaled=False))
    assert read_released(tmp_path).config.layer_scale is None
    write_release(tmp_path, FACTS, random_release(FACTS))
    assert read_released(tmp_path).config.layer_scale == 1e-5


def test_the_labels_come_along_in_order(tmp_path: Path) -> None:
    labels = {"id2label": {"2": "cat", "0": "ant", "1": "bee"}}
    write_release(tmp_path, FACTS | labels, random_release(FACTS, classes=3))
    released = read_released(tmp_path)
    assert released.labels == ("ant", "bee", "cat")
    assert released.head["classifier.weight"].shape == (3, 32)
    write_release(tmp_path, FACTS | labels, random_release(FACTS))
    assert read_released(tmp_path).labels == ()


# ------------------------------------------------------------------------------------------ weights that are new


def test_exactly_the_qk_norm_weights_may_be_new() -> None:
    def shapes(**changes: Any) -> dict[str, torch.Size]:
        config = ReleasedConfig.model_validate(FACTS | changes).predictor()
        return {name: place.ours for name, place in layout(config, patch=2, channels=3, classes=0).model.items()}

    expected, plain = shapes(), shapes(qk_norm_affine=False)
    given = {name: torch.zeros(shape) for name, shape in plain.items()}
    new = [f"predictor.blocks.{i}.attention.{kind}_norm.weight" for i in range(2) for kind in "kq"]
    assert new_weights(expected, given, "x") == new
    assert new_weights(plain, given, "x") == []
    assert new_weights(expected, given | {name: torch.ones(16) for name in new}, "x") == []
    with pytest.raises(UserError, match=rf"x is not .* 1 missing: {new[3]}; set"):
        new_weights(expected, given | {name: torch.ones(16) for name in new[:3]}, "x")
    bare = {name: value for name, value in given.items() if name != "bos"}
    with pytest.raises(UserError, match=r"1 missing: bos; 1 extra: more; 1 misshapen: embed\.bias \[1\] instead of"):
        new_weights(expected, bare | {"more": torch.zeros(1), "embed.bias": torch.zeros(1)}, "x")


# ------------------------------------------------------------------------------------------------------- bad input


def _complaint(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_released(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write_release(tmp_path, FACTS, random_release(FACTS))
    (tmp_path / name).unlink()
    assert f"{tmp_path / name} is missing" in _complaint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "ema.safetensors", "preprocessor_config.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    state = random_release(FACTS)
    write_release(tmp_path, FACTS, state, state)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    message = _complaint(tmp_path)
    assert str(tmp_path / name) in message
    assert "fetch it again" in message


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_missing_extra_and_misshapen_tensors_are_all_listed(file: str, tmp_path: Path) -> None:
    state = random_release(FACTS)
    wrong = dict(state)
    del wrong["vit_nepa.layernorm.bias"], wrong["vit_nepa.encoder.layer.1.attention.attention.key.weight"]
    wrong |= {"decoder.weight": torch.zeros(1), "vit_nepa.encoder.layer.x.norm": torch.zeros(1)}
    wrong["vit_nepa.embeddings.cls_token"] = torch.zeros(1, 1, 8)
    if file == "model.safetensors":
        write_release(tmp_path, FACTS, wrong)
    else:
        write_release(tmp_path, FACTS, state, wrong)
    message = _complaint(tmp_path)
    assert message.startswith(str(tmp_path / file))
    layer = "vit_nepa.encoder.layer.1.attention.attention.key.weight"
    assert f"2 missing: {layer}, vit_nepa.layernorm.bias;" in message
    assert "2 extra: decoder.weight, vit_nepa.encoder.layer.x.norm;" in message
    assert "1 misshapen: vit_nepa.embeddings.cls_token [1, 1, 8] instead of [1, 1, 32]" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite_are_named(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in random_release(FACTS).items()}
    sick = {name: value.clone() for name, value in state.items()}
    names = ("vit_nepa.embeddings.cls_token", "vit_nepa.encoder.layer.1.output.dense.weight")
    for name in names:
        sick[name].view(-1)[7] = bad
    write_release(tmp_path, FACTS, state, sick)
    message = _complaint(tmp_path)
    assert f"ema.safetensors: 2 tensors hold NaN or infinite numbers: {', '.join(names)}; fetch" in message
    write_release(tmp_path, FACTS, sick)
    assert "model.safetensors: 2 tensors" in _complaint(tmp_path)


def test_a_long_list_ends_with_the_number_of_the_others(tmp_path: Path) -> None:
    write_release(tmp_path, FACTS | {"num_hidden_layers": 4}, random_release(FACTS))
    message = _complaint(tmp_path)
    assert "44 missing: " in message
    assert " and 32 more" in message
    assert message.count("vit_nepa.encoder") == 12


def test_all_keys_that_the_config_lacks_are_listed(tmp_path: Path) -> None:
    lacking = {"hidden_size", "rope_theta", "is_causal"}
    write_release(tmp_path, {k: v for k, v in FACTS.items() if k not in lacking}, random_release(FACTS))
    message = _complaint(tmp_path)
    assert "3 keys are missing" in message
    assert all(key in message for key in lacking)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qkv_bias", False),
        ("qk_norm_bias", True),
        ("hidden_act", "relu"),
        ("model_type", "vit"),
        ("hidden_size", 33),
        ("patch_size", [2, 2]),
    ],
)
def test_a_setting_this_model_has_no_place_for_is_named(key: str, value: Any, tmp_path: Path) -> None:
    write_release(tmp_path, FACTS | {key: value}, random_release(FACTS))
    assert json.dumps(value, separators=(",", ":")).strip('"') in _complaint(tmp_path)  # as it is typed


@pytest.mark.parametrize(
    ("facts", "classes", "said"),
    [
        (LABELS, 4, "id2label names 3 classes, but the classifier of model.safetensors has 4"),
        ({}, 3, "id2label names 2 classes, but the classifier of model.safetensors has 3"),
        ({"id2label": {"1": "ant", "2": "bee", "3": "cat"}}, 3, "id2label must number its 3 classes from 0"),
        (LABELS | {"add_pooling_layer": False}, 3, "add_pooling_layer=false is not a head this code knows"),
        (
            LABELS | {"architectures": ["ViTNepaForImageClassification"]},
            0,
            "4 missing: classifier.bias, classifier.weight, fc_norm.bias, fc_norm.weight",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_told(facts: dict[str, Any], classes: int, said: str, tmp_path: Path) -> None:
    write_release(tmp_path, FACTS | facts, random_release(FACTS, classes=classes))
    assert said in _complaint(tmp_path)


def test_half_a_head_is_told(tmp_path: Path) -> None:
    state = random_release(FACTS, classes=3)
    del state["fc_norm.bias"], state["classifier.bias"]
    write_release(tmp_path, FACTS | LABELS, state)
    assert "2 missing: classifier.bias, fc_norm.bias;" in _complaint(tmp_path)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    write_release(tmp_path, FACTS, random_release(FACTS))
    (tmp_path / "model.safetensors").unlink()
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    message = _complaint(tmp_path)
    assert "pytorch_model.bin can run code" in message
    assert "save_file(torch.load(FILE, weights_only=True), OUT)" in message
    with pytest.raises(UserError, match=r"is a file: give the folder .* pytorch_model\.bin can run code"):
        find(str(weights))
    assert not (tmp_path / "sprung").exists()


def sprung(file: Path) -> bool:
    """Whether the trap went off; it would again, if it were set again."""
    gone = file.exists()
    file.unlink(missing_ok=True)
    return gone


def malicious(path: Path, trap: Trap, state: dict[str, Tensor], kind: str) -> None:
    """Averages that write a file when they are unpickled without care, in each form that torch.load knows."""
    contents: dict[str, Any] = {"bare": trap, "value": state | {"more": trap}, "zip": state | {"more": trap}}
    if kind == "zip":
        torch.save(contents[kind], path)
    else:
        path.write_bytes(pickle.dumps(contents[kind], protocol=2))


@pytest.mark.parametrize("kind", ["bare", "value", "zip"])
def test_averages_that_would_run_code_are_refused_unread(kind: str, tmp_path: Path) -> None:
    """Issue: read by a weights-only loader, or refused with the one command that converts it."""
    folder, trap = tmp_path / "source", Trap(tmp_path / "gone-off")
    state = random_release(FACTS)
    write_release(folder, FACTS, state)
    file = folder / "pytorch_model_ema.bin"
    malicious(file, trap, state, kind)
    message = _complaint(folder)
    assert not sprung(trap.file)
    assert f"{file} holds more than tensors, which can run code when read, and is left unread" in message
    with suppress(RuntimeError):  # torch looks for a magic number in a bare pickle, having read it
        torch.load(file, weights_only=False)
    assert sprung(trap.file), "it is a trap"


@pytest.mark.slow
def test_the_command_of_a_refusal_converts_what_is_trusted(tmp_path: Path) -> None:
    folder, averaged = tmp_path / "it's here", random_release(FACTS, seed=1)
    write_release(folder, FACTS, random_release(FACTS))
    (folder / "pytorch_model_ema.bin").write_bytes(b"")
    assert "pytorch_model_ema.bin can't be read" in _complaint(folder)
    torch.save(UserDict(averaged), folder / "pytorch_model_ema.bin")
    command = shlex.split(_complaint(folder).partition("convert it with `")[2].partition("`")[0])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=600)
    released = read_released(folder)
    assert released.averaged is not None
    assert torch.equal(released.averaged.model["embed.bias"], averaged[BIAS])


@pytest.mark.parametrize("zipped", [True, False])
def test_averages_in_a_plain_pickle_are_read_and_safetensors_go_first(zipped: bool, tmp_path: Path) -> None:
    raw, averaged, other = (random_release(FACTS, seed=seed) for seed in (0, 1, 2))
    write_release(tmp_path, FACTS, raw)
    torch.save(averaged, tmp_path / "pytorch_model_ema.bin", _use_new_zipfile_serialization=zipped)
    found = read_released(tmp_path).averaged
    assert found is not None
    assert torch.equal(found.model["embed.bias"], averaged[BIAS])
    assert set(digests(tmp_path)) == {"config.json", "model.safetensors", "pytorch_model_ema.bin"}
    write_release(tmp_path, FACTS, raw, other)
    found = read_released(tmp_path).averaged
    assert found is not None
    assert torch.equal(found.model["embed.bias"], other[BIAS])
    assert set(digests(tmp_path)) == {"config.json", "model.safetensors", "ema.safetensors"}
    (tmp_path / "ema.safetensors").unlink()
    torch.save({name: value for name, value in averaged.items() if name != BIAS}, tmp_path / "pytorch_model_ema.bin")
    assert f"pytorch_model_ema.bin is not the network of its config.json: 1 missing: {BIAS}" in _complaint(tmp_path)


# ------------------------------------------------------------------------------------------------------- the hub


def test_a_hub_name_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find("SixAILab/nepa") == tmp_path / "snapshot"
    names = ["*.json", "*.safetensors", "pytorch_model_ema.bin"]
    assert asked == [("SixAILab/nepa", names)], "and of pickles the averages alone, of which tensors are read"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SixAILab/nepa").mkdir(parents=True)
    assert find("SixAILab/nepa") == Path("SixAILab/nepa"), "a folder of that name goes first"
    assert len(asked) == 1


def test_a_hub_name_without_network_is_one_line_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more of it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
        find("SixAILab/nepa", "init")
    message = str(error.value)
    assert message.startswith("init=SixAILab/nepa: no such folder here")
    assert "(no connection)" in message
    assert "`hf download SixAILab/nepa --local-dir DIR`" in message
    for name in ("nowhere", "/no/where", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="there is no such folder"):
            find(name)


def test_state_dicts_are_split_as_they_were_joined() -> None:
    """A run keeps one matrix for query, key and value: their rows must not be mixed."""
    facts = FACTS | {"num_hidden_layers": 1}
    places = layout(ReleasedConfig.model_validate(facts).predictor(), patch=2, channels=3, classes=0)
    state = random_release(facts)
    joined = from_released(state, places).model["predictor.blocks.0.attention.qkv.weight"]
    for i, name in enumerate(("query", "key", "value")):
        part = state[f"vit_nepa.encoder.layer.0.attention.attention.{name}.weight"]
        assert torch.equal(joined[32 * i : 32 * (i + 1)], part)
    again = to_released(NetworkState(from_released(state, places).model, {}), places)
    assert json.dumps(sorted(again)) == json.dumps(sorted(state))
