"""The checkpoint layout of the authors' release (a Hugging Face folder) in this house's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nepa_core.basics import UserError
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.config import explain

PREFIX = "vit_nepa."

# released name -> ours, outside the blocks
_TOP = {
    "embeddings.patch_embeddings.projection.bias": "embed.bias",
    "layernorm.weight": "predictor.norm.weight",
    "layernorm.bias": "predictor.norm.bias",
}
# released name -> ours, inside block i; weight and bias alike
_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attention.out",
    "layernorm_after": "norm2",
    "intermediate.up_proj": "mlp.up",
    "intermediate.gate_proj": "mlp.gate",
    "output.dense": "mlp.down",
    "attention.attention.q_norm": "attention.q_norm",
    "attention.attention.k_norm": "attention.k_norm",
}
_SCALES = {"layer_scale.lambda1": "scale1", "output.layer_scale.lambda1": "scale2"}
_HEAD = {"fc_norm": "norm", "classifier": "classifier"}


class Released(NamedTuple):
    """A released checkpoint, translated.

    Attributes:
        config: the network's shape and switches.
        causal: the attention that the checkpoint was written for.
        patch: side of the square patch in pixels.
        model: state dict of `NEPA`.
        head: state dict of `MeanHead`; empty for a pre-trained checkpoint.
    """

    config: PredictorConfig
    causal: bool
    patch: int
    model: dict[str, Tensor]
    head: dict[str, Tensor]


def read_released(folder: Path | str) -> Released:
    """Read `config.json` and `model.safetensors` of a folder in the released layout.

    Raises:
        UserError: a file is missing or damaged, or holds a tensor or a setting this model has no place for.
    """
    folder = Path(folder)
    facts = _read_config(folder / "config.json")
    model, head = translate(_read_tensors(folder / "model.safetensors"), folder)
    try:
        return Released(_config(facts, folder), bool(facts["is_causal"]), int(facts["patch_size"]), model, head)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: the key {error} is missing") from error
    except ValidationError as error:
        raise UserError(f"{folder / 'config.json'}: {explain(error, '', PredictorConfig)}") from error


def translate(released: dict[str, Tensor], source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename a released state dict into those of `NEPA` and `MeanHead`.

    Query, key and value become one matrix [3D, D]; the patch convolution [D, C, p, p] becomes the equal linear
    map [D, C p p].

    Raises:
        UserError: a name is not of this layout.
    """
    rest = dict(released)
    model: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}

    def move(old: str, new: str, into: dict[str, Tensor]) -> None:
        if old in rest:
            into[new] = rest.pop(old)

    move(f"{PREFIX}embeddings.cls_token", "bos", model)
    if "bos" in model:
        model["bos"] = model["bos"].flatten(0, 1)
    move(f"{PREFIX}embeddings.patch_embeddings.projection.weight", "embed.weight", model)
    if "embed.weight" in model:
        model["embed.weight"] = model["embed.weight"].flatten(1)
    for old, new in _TOP.items():
        move(PREFIX + old, new, model)
    for layer in range(_depth(released)):
        theirs, ours = f"{PREFIX}encoder.layer.{layer}.", f"predictor.blocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [f"{theirs}attention.attention.{name}.{kind}" for name in ("query", "key", "value")]
            if all(part in rest for part in parts):
                model[f"{ours}attention.qkv.{kind}"] = torch.cat([rest.pop(part) for part in parts])
            for old, new in _BLOCK.items():
                move(f"{theirs}{old}.{kind}", f"{ours}{new}.{kind}", model)
        for old, new in _SCALES.items():
            move(theirs + old, ours + new, model)
    for old, new in _HEAD.items():
        for kind in ("weight", "bias"):
            move(f"{old}.{kind}", f"{new}.{kind}", head)
    if rest:
        raise UserError(f"{source}: {len(rest)} tensors are not of the NEPA layout, the first is {min(rest)}")
    return model, head


def _depth(released: dict[str, Tensor]) -> int:
    start = f"{PREFIX}encoder.layer."
    layers = (name[len(start) :].split(".")[0] for name in released if name.startswith(start))
    return 1 + max((int(layer) for layer in layers if layer.isdigit()), default=-1)


def _config(facts: dict[str, Any], folder: Path) -> PredictorConfig:
    for key, only in (("qkv_bias", True), ("qk_norm_bias", False)):
        if facts[key] is not only:
            raise UserError(f"{folder / 'config.json'}: {key}={facts[key]} is not a NEPA this code knows")
    return PredictorConfig(
        dim=facts["hidden_size"],
        depth=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        mlp_dim=facts["intermediate_size"],
        activation=facts["hidden_act"],
        gated=facts["use_gated_mlp"],
        layer_scale=facts["layerscale_value"],
        qk_norm=("affine" if facts["qk_norm_affine"] else "plain") if facts["qk_norm"] else "off",
        rope_theta=facts["rope_theta"],
        rope_rescale=facts["pos_embed_rescale"] or 1.0,
        bos=True,
        norm_eps=facts["layer_norm_eps"],
        drop_path=facts["drop_path_prob"],
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; name a folder that holds config.json and model.safetensors") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    return facts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; name a folder that holds config.json and model.safetensors") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} can't be read ({error}); fetch it again") from error
