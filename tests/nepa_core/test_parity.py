"""The released checkpoints, loaded, compute what the authors' model computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from nepa_core import NEPA, Tokens, next_embedding_loss
from nepa_core.runtime.released import Released, read_released
from recipes.networks.heads import MeanHead
from tests.release import FACTS, FIXTURES, random_release, write_release

ALL_FOUND: tuple[list[str], list[str]] = ([], [])  # missing and unexpected keys of a released checkpoint


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
    state = random_release(facts)
    write_release(tmp_path, facts, state)
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
