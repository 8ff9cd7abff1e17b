"""From a run to the released layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator
from safetensors.torch import save_file

from nepa_core.basics import FROZEN, UserError
from nepa_core.runtime.checkpoint import Checkpoint, disk_errors
from nepa_core.runtime.config import load_config
from nepa_core.runtime.released import (
    AVERAGED,
    CONFIG,
    PREPROCESSOR,
    RAW,
    SCALES,
    NetworkState,
    State,
    layout,
    mismatch,
    to_released,
)
from nepa_core.runtime.run import RECORD, Run, is_run, refuse_holder, task_of
from nepa_core.runtime.weights import class_names, current_weights, newest, split
from nepa_core.tokens import ImageInput
from recipes.configs import FinetuneConfig, PretrainConfig
from recipes.report.summaries import ImportRecord

HEADED, HEADLESS = "ViTNepaForImageClassification", "ViTNepaForPreTraining"
CONFIG_DEFAULTS = {"pos_embed_shift": None, "pos_embed_jitter": None, "add_pooling_layer": True}
PREPROCESSOR_DEFAULTS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
"""What no setting of a run says: of an imported one the original's stays."""

Trained = PretrainConfig | FinetuneConfig
FREE = ("data.",)
"""Keys of the run that may be changed, and for a graph alone: where the samples lie that it is traced with."""


class ExportOptions(BaseModel):
    """Options of `nepa export`."""

    model_config = FROZEN

    format: Literal["released", "onnx", "torch"] = Field(
        default="released", description="a folder in the released layout, or the encoder as a graph: .onnx or .pt2"
    )
    out: str | None = Field(
        default=None,
        description="folder to write, new or empty, must be given; of a graph its file, RUN/export/encoder",
    )
    layer: int | str = Field(default="final", description="of a graph: embedding, the number of a block, final or best")
    pooling: Literal["auto", "mean", "last", "bos", "none"] = Field(
        default="auto", description="of a graph: how tokens become one vector; none: each token; auto: the mean"
    )
    weights: Literal["raw", "ema"] = Field(
        default="raw", description=f"what goes into {RAW}; with raw the averages, where there are any, into {AVERAGED}"
    )
    fold_layer_scale: bool = Field(
        default=False, description="multiply the LayerScale vectors into the maps before them, and leave them out"
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> ExportOptions:
        graph = {"layer", "pooling"}
        wrong = self.model_fields_set & ({"weights", "fold_layer_scale"} if self.format != "released" else graph)
        if wrong:
            kind = "the released layout" if self.format != "released" else "format=onnx and format=torch"
            raise ValueError(f"{sorted(wrong)[0]} is for {kind}; leave it out")
        return self


def read_config(target: str, changes: dict[str, Any]) -> Trained:
    """The config of a run of pretrain or finetune.

    Raises:
        UserError: it is not a run, or of another task.
    """
    if not is_run(target):
        refuse_holder(target)
        raise UserError(f"{target} is not a run folder; name one that pretrain, finetune or import wrote")
    file = Path(target) / "config.json"
    task = task_of(target)
    kinds: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
        kind.task: kind for kind in (PretrainConfig, FinetuneConfig)
    }
    if task not in kinds:
        raise UserError(f"{target} is a run of `nepa {task}`; the released layout has pre-trained and fine-tuned ones")
    return load_config(kinds[task], file)


def export_released(run: Run, out: Path, options: ExportOptions) -> str:
    """Write the newest weights of a run.

    Returns:
        What to tell the user.

    Raises:
        UserError: the run holds something that the layout has no place for, or no weights, or `out` is not empty.
    """
    config = read_config(str(run.path), {})
    seen = input_of(config, run)
    states = network_states(newest(run))
    if options.weights == "ema":
        if AVERAGED not in states:
            raise UserError(f"weights=ema: {run.path} has no averages; leave it out")
        states = {RAW: states[AVERAGED]}
    model = config.model
    if options.fold_layer_scale:
        states = {name: state._replace(model=folded(state.model)) for name, state in states.items()}
        model = model.model_copy(update={"layer_scale": None})
    classes = len(states[RAW].head.get("classifier.bias", ()))
    places = layout(model, patch=seen.patch[0], channels=seen.channels, classes=classes)
    ours = {name: place.ours for table in places for name, place in table.items()}
    for state in states.values():
        if complaint := mismatch(ours, state.model | state.head):
            raise UserError(f"{run.path} is not of a network in the released layout: {complaint}")
    record = run.summary_of(ImportRecord, RECORD) or {}
    imported = record.get("config", {})
    facts = released_facts(config, seen, model.layer_scale, labels_of(run, classes))
    if not imported or options.fold_layer_scale:  # folded maps are float32
        facts["dtype"] = str(states[RAW].model["predictor.blocks.0.mlp.down.weight"].dtype).removeprefix("torch.")
    if imported.get("id2label") == facts.get("id2label"):
        facts.pop("label2id", None)  # the original's stays: some number the classes by strings
    preprocessor = preprocessor_of(seen)
    if imported.get("image_size") != facts["image_size"]:
        preprocessor["size"] = {"height": seen.size[0], "width": seen.size[1]}
    kind = HEADED if classes else HEADLESS
    write_whole_folder(
        out,
        over(CONFIG_DEFAULTS | {"architectures": [kind]} | imported, facts),
        over(PREPROCESSOR_DEFAULTS | record.get("preprocessor", {}), preprocessor),
        {name: to_released(state, places) for name, state in states.items()},
    )
    said = f"{out}: {' and '.join(states)}, {'averaged' if options.weights == 'ema' else 'raw'} weights in {RAW}"
    head = config.objective.head if isinstance(config, PretrainConfig) else "none"
    return said if head == "none" else f"{said}; left out: the prediction head (objective.head={head})"


def folded(model: State) -> State:
    """The LayerScale vectors of `NEPA` multiplied into the linear maps before them, in float32; none are left."""
    state = dict(model)
    for name in model:
        block, _, last = name.rpartition(".")
        if last in SCALES:
            scale = state.pop(name).float()
            linear = f"{block}.{'attention.out' if last == 'scale1' else 'mlp.down'}"
            state[f"{linear}.weight"] = state[f"{linear}.weight"].float() * scale[:, None]
            state[f"{linear}.bias"] = state[f"{linear}.bias"].float() * scale
    return state


def input_of(config: Trained, run: Run) -> ImageInput:
    """What the images of a run are that has a place in the layout.

    Raises:
        UserError: it has none; all the keys that stand in the way are listed.
    """
    seen, model = config.data.image_input(), config.model
    wrong = {
        f"data.patch={seen.patch}": seen.patch[0] != seen.patch[1],
        f"data.patch_order={seen.order}": seen.order != "raster",
        f"model.rope_theta={model.rope_theta}": model.rope_theta is None,
        f"model.bos={model.bos}": not model.bos,
        f"model.mask_token={model.mask_token}": model.mask_token,
        f"model.learned_positions={model.learned_positions}": model.learned_positions > 0,
        f"model.predict_position={model.predict_position}": model.predict_position != "off",
        "readout=last": isinstance(config, FinetuneConfig) and config.readout != "mean",
    }
    if any(wrong.values()):
        listed = ", ".join(key for key, stands in wrong.items() if stands)
        raise UserError(f"{run.path}: the released layout has no place for {listed}")
    return seen


def network_states(checkpoint: Checkpoint) -> dict[str, NetworkState]:
    """The weights as they are and, where there are averages, the averaged ones, by the file they go to."""
    states = {RAW: split(checkpoint.tensors["model"])}
    if "ema" in checkpoint.tensors:
        states[AVERAGED] = split(current_weights(checkpoint))
    return states


def labels_of(run: Run, classes: int) -> list[str]:
    """Names of the classes, numbers where the run holds none."""
    found = class_names(run)
    return list(found) if len(found) == classes else [f"LABEL_{i}" for i in range(classes)]


def released_facts(config: Trained, seen: ImageInput, layer_scale: float | None, labels: list[str]) -> dict[str, Any]:
    """config.json of the release for a run."""
    model = config.model
    causal = config.causal if isinstance(config, FinetuneConfig) else config.objective.causal
    facts = {
        "model_type": "vit_nepa",
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": model.activation,
        "image_size": seen.size[0] if seen.size[0] == seen.size[1] else list(seen.size),
        "patch_size": seen.patch[0],
        "num_channels": seen.channels,
        "layer_norm_eps": model.norm_eps,
        "layerscale_value": layer_scale,
        "rope_theta": model.rope_theta,
        "pos_embed_rescale": model.rope_rescale if model.rope_rescale != 1 else None,
        "qk_norm": model.qk_norm != "off",
        "qk_norm_affine": model.qk_norm == "affine",
        "qk_norm_bias": False,
        "qkv_bias": True,
        "use_gated_mlp": model.gated,
        "is_causal": causal,
        "drop_path_prob": model.drop_path,
    }
    if labels:
        facts["id2label"] = {str(i): name for i, name in enumerate(labels)}
        facts["label2id"] = {name: i for i, name in enumerate(labels)}
    return facts


def preprocessor_of(seen: ImageInput) -> dict[str, Any]:
    """preprocessor_config.json for a run, but for the size."""
    crop = {"crop_pct": seen.crop_ratio, "crop_mode": "squash" if seen.squash else "center"}
    return {"image_mean": list(seen.mean), "image_std": list(seen.std)} | crop


def over(original: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The original with the facts that differ; what is equal keeps its form."""
    return original | {key: value for key, value in facts.items() if key not in original or original[key] != value}


def write_whole_folder(out: Path, facts: dict[str, Any], preprocessor: dict[str, Any], files: dict[str, State]) -> None:
    """Write both JSON files and each state dict under its file name: the folder whole, or not at all.

    Raises:
        UserError: something stands there already, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder; name another one")
    building = out.with_name(f".writing_{out.name}")
    with disk_errors(out):
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir(parents=True)
            for name, values in {CONFIG: facts, PREPROCESSOR: preprocessor}.items():
                (building / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            for name, state in files.items():
                save_file(state, building / name, metadata={"format": "pt"})
            building.rename(out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
