"""The released checkpoints, loaded, compute what the authors' model computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nepa_core import NEPA, Tokens, UserError, next_embedding_loss
from recipes.heads import MeanHead
from recipes.released import Released, read_released

FIXTURES = Path(__file__).parent / "fixtures" / "official_gelu"
ALL_FOUND: tuple[list[str], list[str]] = ([], [])  # missing and unexpected keys of a released checkpoint

# A small network with every feature that the fixtures lack; the names are those of the released config.json.
FACTS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "patch_size": 2,
    "layer_norm_eps": 1e-12,
    "layerscale_value": 1e-5,
    "rope_theta": 100.0,
    "pos_embed_rescale": 2.0,
    "qk_norm": True,
    "qk_norm_affine": True,
    "qk_norm_bias": False,
    "qkv_bias": True,
    "use_gated_mlp": True,
    "is_causal": True,
    "drop_path_prob": 0.0,
}


def _patches(pixels: Tensor, patch: int) -> Tokens:
    values = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
    centres = (torch.arange(pixels.shape[2] // patch) + 0.5) / (pixels.shape[2] // patch) * 2 - 1
    return Tokens(values, torch.cartesian_prod(centres, centres))


def _model(released: Released) -> NEPA:
    model = NEPA(released.config, nn.Linear(3 * released.patch**2, released.config.dim))
    assert model.load_state_dict(released.model, strict=False) == ALL_FOUND
    return model


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype).view_as(ours), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("causal", "name"), [(True, "causal"), (False, "bidirectional")])
def test_the_authors_outputs_and_losses(causal: bool, name: str) -> None:
    released = read_released(FIXTURES / "pretrain")
    expected = load_file(FIXTURES / "pretrain" / "expected.safetensors")
    assert released.causal
    assert released.head == {}
    out = _model(released)(_patches(expected["pixel_values"], released.patch), causal=causal)
    _close(out.embeddings, expected["input_embedding"])
    _close(out.predictions, expected[f"{name}.last_hidden_state"])
    _close(next_embedding_loss(out.predictions, out.embeddings), expected[f"{name}.loss"])
    _close(next_embedding_loss(out.predictions, out.embeddings, shift=False), expected[f"{name}.loss_no_shift"])


def test_the_authors_gradients() -> None:
    released = read_released(FIXTURES / "pretrain")
    expected = load_file(FIXTURES / "pretrain" / "expected.safetensors")
    model = _model(released)
    out = model(_patches(expected["pixel_values"], released.patch), causal=True)
    next_embedding_loss(out.predictions, out.embeddings).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    _close(torch.nn.utils.get_total_norm(list(gradients.values())), expected["causal.grad_norm"])
    _close(gradients["embed.weight"], expected["causal.grad.patch_weight"], 1e-7)
    query = gradients["predictor.blocks.0.attention.qkv.weight"][: released.config.dim]
    _close(query, expected["causal.grad.layer0_query_weight"], 1e-7)


def test_the_authors_class_logits() -> None:
    released = read_released(FIXTURES / "classify")
    expected = load_file(FIXTURES / "classify" / "expected.safetensors")
    assert not released.causal
    model, head = _model(released), MeanHead(released.config.dim, 10, released.config.norm_eps)
    assert head.load_state_dict(released.head, strict=False) == ALL_FOUND
    out = model(_patches(expected["pixel_values"], released.patch), causal=released.causal)
    _close(head(out.predictions, out.mask, bos=True), expected["logits"])


# --------------------------------------------------------- gated MLP and QK-norm weights, which the fixtures lack


def _random_release(facts: dict[str, Any]) -> dict[str, Tensor]:
    """A random state dict in the released layout; every tensor matters to the output."""
    generator = torch.Generator().manual_seed(0)
    d, m, p = facts["hidden_size"], facts["intermediate_size"], facts["patch_size"]

    def around(centre: float, *shape: int) -> Tensor:
        return centre + 0.3 * torch.randn(shape, generator=generator)

    state = {"embeddings.cls_token": around(0, 1, 1, d)}
    norms, maps = {"layernorm": d}, {"embeddings.patch_embeddings.projection": (d, 3, p, p)}
    for i in range(facts["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        norms |= {f"{layer}layernorm_before": d, f"{layer}layernorm_after": d}
        maps |= {f"{layer}attention.attention.{name}": (d, d) for name in ("query", "key", "value")}
        maps |= {f"{layer}attention.output.dense": (d, d), f"{layer}intermediate.up_proj": (m, d)}
        maps |= {f"{layer}output.dense": (d, m)}
        if facts["use_gated_mlp"]:
            maps[f"{layer}intermediate.gate_proj"] = (m, d)
        if facts["qk_norm_affine"]:
            head = d // facts["num_attention_heads"]
            state |= {f"{layer}attention.attention.{name}.weight": around(1, head) for name in ("q_norm", "k_norm")}
        state |= {f"{layer}{name}.lambda1": around(0.5, d) for name in ("layer_scale", "output.layer_scale")}
    for name, shape in maps.items():
        state |= {f"{name}.weight": around(0, *shape), f"{name}.bias": around(0, shape[0])}
    for name, width in norms.items():
        state |= {f"{name}.weight": around(1, width), f"{name}.bias": around(0, width)}
    return {f"vit_nepa.{name}": tensor for name, tensor in state.items()}


def _write(folder: Path, facts: dict[str, Any], state: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(state, folder / "model.safetensors")


def _released_forward(
    facts: dict[str, Any], state: dict[str, Tensor], pixels: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The released model from its description, in float64: the embeddings and the last hidden state."""
    w = {name.removeprefix("vit_nepa."): tensor.double() for name, tensor in state.items()}
    heads, eps = facts["num_attention_heads"], facts["layer_norm_eps"]
    width = facts["hidden_size"] // heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, weight: Tensor | float, bias: Tensor | float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    projection = "embeddings.patch_embeddings.projection"
    maps = F.conv2d(pixels.double(), w[f"{projection}.weight"], w[f"{projection}.bias"], stride=facts["patch_size"])
    side = maps.shape[-1]
    x = torch.cat([w["embeddings.cls_token"].expand(len(pixels), 1, -1), maps.flatten(2).transpose(1, 2)], dim=1)
    embeddings = x

    centres = (torch.arange(side).double() + 0.5) / side * 2 - 1
    coords = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).view(-1, 2)
    inverse = facts["rope_theta"] ** -torch.arange(0, 1, 4 / width).double()
    angles = (2 * math.pi * coords[:, :, None] * inverse).flatten(1).repeat(1, 2)

    def rotated(q: Tensor) -> Tensor:
        bos, patches = q[:, :, :1], q[:, :, 1:]
        a, b = patches.chunk(2, -1)
        return torch.cat([bos, patches * angles.cos() + torch.cat([-b, a], -1) * angles.sin()], dim=2)

    for i in range(facts["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        y = layer_norm(x, f"{layer}layernorm_before")
        q, k, v = (
            linear(y, f"{layer}attention.attention.{name}").unflatten(-1, (heads, width)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        q = rotated(norm(q, w.get(f"{layer}attention.attention.q_norm.weight", 1.0), 0.0))
        k = rotated(norm(k, w.get(f"{layer}attention.attention.k_norm.weight", 1.0), 0.0))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
        if causal:
            scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w[f"{layer}layer_scale.lambda1"] * linear(mixed, f"{layer}attention.output.dense")
        y = layer_norm(x, f"{layer}layernorm_after")
        up = linear(y, f"{layer}intermediate.up_proj")
        act = F.silu if facts["hidden_act"] == "silu" else F.gelu
        inner = act(linear(y, f"{layer}intermediate.gate_proj")) * up if facts["use_gated_mlp"] else act(up)
        x = x + w[f"{layer}output.layer_scale.lambda1"] * linear(inner, f"{layer}output.dense")
    return embeddings, layer_norm(x, "layernorm")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_and_affine_checkpoints_load_by_the_same_code(gated: bool, affine: bool, tmp_path: Path) -> None:
    facts = FACTS | {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu", "qk_norm_affine": affine}
    state = _random_release(facts)
    _write(tmp_path, facts, state)
    released = read_released(tmp_path)
    model = _model(released)
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in state.values())
    pixels = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for causal in (True, False):
        embeddings, hidden = _released_forward(facts, state, pixels, causal=causal)
        out = model(_patches(pixels, released.patch), causal=causal)
        _close(out.embeddings, embeddings)
        _close(out.predictions, hidden)


def test_a_checkpoint_without_qk_norm_weights_leaves_exactly_those_at_one() -> None:
    released = read_released(FIXTURES / "pretrain")
    config = released.config.model_copy(update={"qk_norm": "affine"})
    model = NEPA(config, nn.Linear(3 * released.patch**2, config.dim))
    missing, unexpected = model.load_state_dict(released.model, strict=False)
    weights = {f"predictor.blocks.{i}.attention.{n}_norm.weight" for i in range(config.depth) for n in "qk"}
    assert set(missing) == weights
    assert unexpected == []
    assert all((model.state_dict()[name] == 1).all() for name in weights)


# ------------------------------------------------------------------------------------------------------- errors


def _complaint(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_released(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    _write(tmp_path, FACTS, _random_release(FACTS))
    (tmp_path / name).unlink()
    assert f"{tmp_path / name} is missing" in _complaint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_named(name: str, tmp_path: Path) -> None:
    _write(tmp_path, FACTS, _random_release(FACTS))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    message = _complaint(tmp_path)
    assert str(tmp_path / name) in message
    assert "fetch it again" in message


@pytest.mark.parametrize(
    "name", ["vit_nepa.encoder.layer.0.attention.surprise.weight", "vit_nepa.encoder.layer.x.norm", "decoder.weight"]
)
def test_a_tensor_of_another_layout_is_named(name: str, tmp_path: Path) -> None:
    _write(tmp_path, FACTS, _random_release(FACTS) | {name: torch.zeros(1)})
    assert name in _complaint(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "is_causal", "patch_size"])
def test_a_missing_setting_is_named(key: str, tmp_path: Path) -> None:
    _write(tmp_path, {k: v for k, v in FACTS.items() if k != key}, _random_release(FACTS))
    assert key in _complaint(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("qkv_bias", False), ("qk_norm_bias", True), ("hidden_act", "relu")])
def test_a_setting_this_model_has_no_place_for_is_named(key: str, value: Any, tmp_path: Path) -> None:
    _write(tmp_path, FACTS | {key: value}, _random_release(FACTS))
    assert str(value) in _complaint(tmp_path)
