"""Small random checkpoints in the released layout, written down from its description alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures" / "official_gelu"

# A small network with every feature that the fixtures lack; the names are those of the released config.json.
FACTS: dict[str, Any] = {
    "model_type": "vit_nepa",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "image_size": 6,
    "patch_size": 2,
    "num_channels": 3,
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


def random_release(facts: dict[str, Any], *, classes: int = 0, scaled: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """A random state dict in the released layout; every tensor matters to the output."""
    generator = torch.Generator().manual_seed(seed)
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
        if scaled:
            state |= {f"{layer}{name}.lambda1": around(0.5, d) for name in ("layer_scale", "output.layer_scale")}
    for name, shape in maps.items():
        state |= {f"{name}.weight": around(0, *shape), f"{name}.bias": around(0, shape[0])}
    for name, width in norms.items():
        state |= {f"{name}.weight": around(1, width), f"{name}.bias": around(0, width)}
    state = {f"vit_nepa.{name}": tensor for name, tensor in state.items()}
    if classes:
        state |= {"fc_norm.weight": around(1, d), "fc_norm.bias": around(0, d)}
        state |= {"classifier.weight": around(0, classes, d), "classifier.bias": around(0, classes)}
    return state


def write_release(
    folder: Path, facts: dict[str, Any], state: dict[str, Tensor], averaged: dict[str, Tensor] | None = None
) -> None:
    """Write a folder in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(state, folder / "model.safetensors")
    if averaged is not None:
        save_file(averaged, folder / "ema.safetensors")
