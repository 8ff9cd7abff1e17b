"""The checkpoint layout of the authors' release, and how it is read: a Hugging Face folder.

It holds config.json, model.safetensors, where there are averaged weights ema.safetensors with the same names (or the
authors' pytorch_model_ema.bin, a pickle, of which nothing but tensors is read), and where the pixels' statistics are
told preprocessor_config.json. `layout` is the one table of names and shapes: what is read, checked and written all
goes by it. Tensors that are read stay mapped to their file until they are used.
"""

from __future__ import annotations

import pickle
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nepa_core.basics import UserError, file_digest, some
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.checkpoint import read_json
from nepa_core.runtime.config import explain, load_object, validated

CONFIG = "config.json"
RAW = "model.safetensors"
AVERAGED = "ema.safetensors"
AVERAGED_PICKLE = "pytorch_model_ema.bin"
PREPROCESSOR = "preprocessor_config.json"

IMAGES = "modalities.image:Images"
"""The adapter of the release, by the name under which a run has it."""

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
LISTED = 12
"""Most names that one message lists."""

PREFIX = "vit_nepa."
"""Of every name but those of the classification head."""

# our name -> released name, outside the blocks
_TOP = {
    "bos": "embeddings.cls_token",
    "embed.weight": "embeddings.patch_embeddings.projection.weight",
    "embed.bias": "embeddings.patch_embeddings.projection.bias",
    "predictor.norm.weight": "layernorm.weight",
    "predictor.norm.bias": "layernorm.bias",
}
# our name -> released names, inside block i; weight and bias alike
_BLOCK = {
    "norm1": ("layernorm_before",),
    "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.q_norm": ("attention.attention.q_norm",),
    "attention.k_norm": ("attention.attention.k_norm",),
    "attention.out": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.up": ("intermediate.up_proj",),
    "mlp.gate": ("intermediate.gate_proj",),
    "mlp.down": ("output.dense",),
}
SCALES = {"scale1": "layer_scale.lambda1", "scale2": "output.layer_scale.lambda1"}
_HEAD = {"norm": "fc_norm", "classifier": "classifier"}

State = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]


class ReleasedConfig(BaseModel):
    """config.json of the release; fields that this code has no use for are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, coerce_numbers_to_str=True)

    model_type: Literal["vit_nepa"]
    architectures: tuple[str, ...] = ()
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    hidden_act: Literal["gelu", "silu"]
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt]  # a pair is (height, width), as `transformers` has it
    patch_size: PositiveInt
    num_channels: PositiveInt
    layer_norm_eps: PositiveFloat
    layerscale_value: float | None
    rope_theta: PositiveFloat
    pos_embed_rescale: float | None
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    qk_norm: bool
    qk_norm_affine: bool
    qk_norm_bias: Literal[False]
    qkv_bias: Literal[True]
    use_gated_mlp: bool
    is_causal: bool
    drop_path_prob: float
    add_pooling_layer: bool = True
    id2label: dict[int, str] = {0: "LABEL_0", 1: "LABEL_1"}  # the library leaves its own default out of the file

    @model_validator(mode="after")
    def _whole_labels(self) -> Self:
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must number its {len(self.id2label)} classes from 0 without gaps")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in order."""
        return tuple(self.id2label[i] for i in range(len(self.id2label)))

    def predictor(self, *, layer_scale: bool = True) -> PredictorConfig:
        """The network; without `layer_scale` one whose scales have been folded into the maps before them."""
        return PredictorConfig(
            dim=self.hidden_size,
            depth=self.num_hidden_layers,
            heads=self.num_attention_heads,
            mlp_dim=self.intermediate_size,
            activation=self.hidden_act,
            gated=self.use_gated_mlp,
            layer_scale=self.layerscale_value if layer_scale else None,
            qk_norm=("affine" if self.qk_norm_affine else "plain") if self.qk_norm else "off",
            rope_theta=self.rope_theta,
            rope_rescale=self.pos_embed_rescale or 1.0,
            bos=True,
            norm_eps=self.layer_norm_eps,
            drop_path=self.drop_path_prob,
        )


class NetworkState(NamedTuple):
    """State dict of `NEPA` and of the released head, `recipes.networks.heads.MeanHead` (empty after pre-training)."""

    model: State
    head: State


class Released(NamedTuple):
    """A released checkpoint, translated.

    Attributes:
        facts: config.json.
        config: the network's shape and switches.
        model: state dict of `NEPA`, in the dtype of the file.
        head: state dict of the head; empty for a pre-trained checkpoint.
        averaged: the same two of the averaged weights, or None where there are none, see `averages`.
        preprocessor: preprocessor_config.json, or empty where there is no such file.
    """

    facts: ReleasedConfig
    config: PredictorConfig
    model: State
    head: State
    averaged: NetworkState | None
    preprocessor: dict[str, Any]

    @property
    def causal(self) -> bool:
        """The attention that the checkpoint was written for."""
        return self.facts.is_causal

    @property
    def patch(self) -> int:
        """Side of the square patch in pixels."""
        return self.facts.patch_size

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that the head tells apart; empty for a pre-trained checkpoint."""
        return self.facts.labels if self.head else ()

    @property
    def settings(self) -> dict[str, Any]:
        """Of the adapter, what the checkpoint says; mean and std are the release's 0.5 where it does not say them."""
        facts, seen = self.facts, self.preprocessor
        found = {"size": facts.size, "patch": (facts.patch_size, facts.patch_size), "channels": facts.num_channels}
        found |= {key: seen.get(f"image_{key}", [0.5] * facts.num_channels) for key in ("mean", "std")}
        if "crop_pct" in seen:
            found |= {"crop_ratio": seen["crop_pct"], "squash": seen.get("crop_mode") == "squash"}
        return found

    def adapter(self) -> Modality:
        """The adapter of images that the checkpoint reads; the folder they lie in is for the user to set.

        Raises:
            UserError: a setting of the checkpoint does not fit it.
        """
        named = {"source": "folder", "root": "imagenet", **self.settings}
        return cast(Modality, validated(load_object(IMAGES), named, "data."))


# ------------------------------------------------------------------------------------------------------- the layout


class Place(NamedTuple):
    """Where the release keeps a parameter: the names that make it up when stacked, and the shape of each there."""

    names: tuple[str, ...]
    shape: torch.Size
    ours: torch.Size


class Layout(NamedTuple):
    """Our parameter name -> its place, for `NEPA` and for the head."""

    model: dict[str, Place]
    head: dict[str, Place]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Every name of the release with its shape."""
        places = (*self.model.values(), *self.head.values())
        return {name: place.shape for place in places for name in place.names}


def layout(config: PredictorConfig, *, patch: int, channels: int, classes: int) -> Layout:
    """Names and shapes of a network in the release; 0 classes is a pre-trained one, without a head.

    Query, key and value are one matrix [3D, D] here and three there; the linear patch embedder [D, C p p] is a
    convolution [D, C, p, p] there.
    """
    with torch.device("meta"):
        model = NEPA(config, nn.Linear(channels * patch**2, config.dim)).state_dict()
        parts = {"norm": nn.LayerNorm(config.dim), "classifier": nn.Linear(config.dim, classes)} if classes else {}
        head = nn.ModuleDict(parts).state_dict()

    def place(names: tuple[str, ...], tensor: Tensor) -> Place:
        return Place(names, torch.Size((len(tensor) // len(names), *tensor.shape[1:])), tensor.shape)

    places = {name: place(released_names(name), tensor) for name, tensor in model.items()}
    places["bos"] = places["bos"]._replace(shape=torch.Size((1, 1, config.dim)))
    places["embed.weight"] = places["embed.weight"]._replace(shape=torch.Size((config.dim, channels, patch, patch)))
    return Layout(places, {name: place((head_name(name),), tensor) for name, tensor in head.items()})


def released_names(name: str) -> tuple[str, ...]:
    """What the release calls a parameter of `NEPA`."""
    if name in _TOP:
        return (PREFIX + _TOP[name],)
    _, _, layer, inner = name.split(".", 3)  # predictor.blocks.LAYER.INNER
    block = f"{PREFIX}encoder.layer.{layer}."
    if inner in SCALES:
        return (block + SCALES[inner],)
    part, _, kind = inner.rpartition(".")
    return tuple(f"{block}{theirs}.{kind}" for theirs in _BLOCK[part])


def head_name(name: str) -> str:
    """What the release calls a parameter of the head."""
    part, _, kind = name.partition(".")
    return f"{_HEAD[part]}.{kind}"


def to_released(weights: NetworkState, places: Layout) -> State:
    """Rename, split and reshape into the state dict of the release; the tensors share the memory of the given ones."""
    return {
        theirs: part.reshape(place.shape)
        for state, table in zip(weights, places, strict=True)
        for name, place in table.items()
        for theirs, part in zip(place.names, state[name].chunk(len(place.names)), strict=True)
    }


def from_released(state: State, places: Layout) -> NetworkState:
    """The way back of `to_released`; only query, key and value are copied, to lie behind one another."""

    def parameter(place: Place) -> Tensor:
        parts = [state[name] for name in place.names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(place.ours)

    return NetworkState(*({name: parameter(place) for name, place in table.items()} for table in places))


# ------------------------------------------------------------------------------------------------------- comparing


def mismatch(expected: Shapes, given: Mapping[str, Tensor]) -> str:
    """Every missing, extra and misshapen tensor in one line; empty where all fit."""
    wrong = [
        f"{name} {list(given[name].shape)} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & given.keys())
        if given[name].shape != expected[name]
    ]
    kinds = {
        "missing": sorted(expected.keys() - given.keys()),
        "extra": sorted(given.keys() - expected.keys()),
        "misshapen": wrong,
    }
    return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its extremes tell, and need no room of its size."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def listed(names: Sequence[str]) -> str:
    """The names, of many only the first and the number of the others."""
    return some(names, LISTED)


def new_weights(expected: Shapes, given: Mapping[str, Tensor], source: str) -> list[str]:
    """What a model starts anew when it takes its weights from a checkpoint that has no QK-norm weights.

    The released base-size network is pre-trained without them and fine-tuned with them, from 1.

    Args:
        expected: names and shapes of the model's parameters.
        given: the checkpoint's tensors by the same names.
        source: what a message calls the checkpoint.

    Returns:
        The names of the QK-norm weights, or none where the checkpoint has them.

    Raises:
        UserError: anything else is missing, extra or misshapen.
    """
    new = {name for name in expected if name.endswith(("attention.q_norm.weight", "attention.k_norm.weight"))}
    if new & given.keys():
        new = set()
    if complaint := mismatch({name: shape for name, shape in expected.items() if name not in new}, given):
        raise UserError(
            f"{source} is not of the network that this config builds: {complaint}; set data.* and model.* to fit"
        )
    return sorted(new)


# ------------------------------------------------------------------------------------------------------- reading


def find(name: str, key: str = "") -> Path:
    """The folder that a name stands for: itself, or the files of that repository on the Hugging Face hub, in its cache.

    Args:
        key: the key that the user gave the name with, for the message.

    Raises:
        UserError: there is no such folder, and no such repository within reach.
    """
    asked = f"{key}={name}" if key else name
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{asked} is a file: give the folder that holds {CONFIG} and {RAW}{_pickle_fix([Path(name)])}")
    owner, _, rest = name.partition("/")
    if name.count("/") != 1 or name[0] in "./~" or not rest or Path(owner).is_dir():
        raise UserError(f"{asked}: there is no such folder, and a name on the hub is of the form OWNER/NAME")
    import huggingface_hub  # half a second to import

    try:
        files = ["*.json", "*.safetensors", AVERAGED_PICKLE]  # of the release or, in its folders, of a pushed run
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{asked}: no such folder here, and the hub does not give it ({_first_line(error)}); fetch it on a machine "
            f"with network by `hf download {name} --local-dir DIR` and give that folder"
        ) from error


def read_released(folder: Path | str) -> Released:
    """Read a folder in the released layout.

    Raises:
        UserError: a file is missing or damaged, or a pickle of more than tensors; config.json lacks a key or holds a
            setting this model has no place for; tensors are missing, extra or misshapen, or not finite (all are
            listed).
    """
    folder = Path(folder)
    facts = _read_config(folder / CONFIG)
    raw = _read_tensors(folder / RAW)
    classes = _classes(facts, raw, folder)
    scaled = any(name.endswith(".lambda1") for name in raw)
    try:
        config = facts.predictor(layer_scale=scaled)
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG}: {explain(error, '', PredictorConfig)}") from error
    places = layout(config, patch=facts.patch_size, channels=facts.num_channels, classes=classes)

    def translated(state: State, file: str) -> NetworkState:
        if complaint := mismatch(places.shapes, state):
            raise UserError(f"{folder / file} is not the network of its {CONFIG}: {complaint}; fetch both again")
        if broken := [name for name, tensor in state.items() if not all_finite(tensor)]:
            raise UserError(
                f"{folder / file}: {len(broken)} tensors hold NaN or infinite numbers: {listed(sorted(broken))}; fetch "
                "it again, or ask who trained it for sound weights"
            )
        return from_released(state, places)

    side = averages(folder)
    return Released(
        facts,
        config,
        *translated(raw, RAW),
        None if side is None else translated(_read_tensors(side), side.name),
        _read_preprocessor(folder / PREPROCESSOR),
    )


def averages(folder: Path) -> Path | None:
    """The file of the averaged weights: ema.safetensors, else pytorch_model_ema.bin; None where there is neither."""
    files = (folder / name for name in (AVERAGED, AVERAGED_PICKLE))
    return next((file for file in files if file.exists()), None)


def _classes(facts: ReleasedConfig, raw: State, folder: Path) -> int:
    """How many classes the checkpoint tells apart: 0 for a pre-trained one."""
    headed = any(name.startswith(tuple(f"{part}." for part in _HEAD.values())) for name in raw)
    if not headed and not any("ImageClassification" in name for name in facts.architectures):
        return 0
    if not facts.add_pooling_layer:
        raise UserError(f"{folder / CONFIG}: add_pooling_layer=false is not a head this code knows")
    rows = len(raw["classifier.bias"]) if "classifier.bias" in raw else len(facts.labels)
    if rows != len(facts.labels):
        raise UserError(
            f"{folder / CONFIG}: id2label names {len(facts.labels)} classes, but the classifier of {RAW} has {rows}; "
            "give id2label a name for each"
        )
    return rows


def _read_config(path: Path) -> ReleasedConfig:
    try:
        return ReleasedConfig.model_validate(_read_json(path))
    except ValidationError as error:
        missing = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing"]
        if missing:
            raise UserError(f"{path}: {len(missing)} keys are missing: {', '.join(missing)}; fetch it again") from error
        raise UserError(f"{path} is not of a NEPA this code knows: {explain(error, '', ReleasedConfig)}") from error


def _read_preprocessor(path: Path) -> dict[str, Any]:
    told = _read_json(path) if path.exists() else {}
    if not isinstance(told, dict):
        raise UserError(f"{path} holds no settings; fetch it again")
    return told


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give a folder that holds {CONFIG} and {RAW}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error


def _read_tensors(path: Path) -> State:
    try:
        return load_file(path) if path.suffix not in PICKLES else _read_pickle(path)
    except FileNotFoundError as error:
        fix = _pickle_fix(pickles(path.parent))
        raise UserError(f"{path} is missing; give a folder that holds {CONFIG} and {RAW}{fix}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} can't be read ({error}); fetch it again") from error


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that `read_released` reads, by name."""
    files = (folder / CONFIG, folder / PREPROCESSOR, folder / RAW, averages(folder))
    return {file.name: file_digest(file) for file in files if file is not None and file.exists()}


def _read_pickle(path: Path) -> State:
    """The tensors of a pickled state dict by torch's weights-only loader, which runs no code of the file.

    Raises:
        UserError: it holds something else, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path)) from error
    except Exception as error:  # a damaged archive raises a dozen kinds
        raise UserError(f"{path} can't be read ({_first_line(error)}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(_refusal(path))
    return dict(state)


def _refusal(path: Path) -> str:
    out = path.with_name(AVERAGED)
    code = (
        "import torch, safetensors.torch as s; "
        f"state = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in state.items()}}, {str(out)!r})"
    )
    return (
        f"{path} holds more than tensors, which can run code when read, and is left unread; where you trust it, "
        f"convert it with `python -c {shlex.quote(code)}`, else remove it"
    )


def pickles(folder: Path) -> list[Path]:
    """Files of a folder that only an unpickler reads, and so can run code of their author."""
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLES)


def _pickle_fix(files: list[Path]) -> str:
    unsafe = [path.name for path in files if path.suffix in PICKLES]
    if not unsafe:
        return ""
    return (
        f"; {listed(unsafe)} can run code when read and is left alone: where you trust it, convert it with "
        "safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
