"""Trained networks as they lie on the disk: in a run, a folder in the released layout, or the files of a hub name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn

from nepa_core.basics import UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA, PREDICTION_HEAD, HeadKind
from nepa_core.predictor import PredictorConfig
from nepa_core.pretrainer import HEADS, ObjectiveConfig
from nepa_core.runtime.checkpoint import Checkpoint, load_latest
from nepa_core.runtime.config import load_adapter, read_saved, validated
from nepa_core.runtime.released import NetworkState, State, digests, find, new_weights, read_released
from nepa_core.runtime.run import RECORD, Run, is_run, reading_back, refuse_holder, task_of

FREE_SHAPE = ("layer_scale", "rope_rescale", "drop_path", "attention", "pack", "mask_token")
"""Keys of the network that may differ between the weights and the recipe that starts from them: they are starts,
training-time noise, ways to compute the same, or of pre-training alone."""

TOKEN_KEYS = ("patch", "channels", "patch_order", "order_seed")
"""Keys of data that decide what a token of an image is, and which one comes next."""

HEAD, BACKBONE, EMBED = "head.", "backbone.", "embed."


class Weights(NamedTuple):
    """A trained network, as `init=` or a task that reads runs finds it.

    Attributes:
        source: what the user named.
        config: the network's shape and switches.
        causal: the attention it was trained with.
        data: the adapter.
        seed: of the run, which gives the untrained twin; 0 for a released folder.
        model: state dict of `NEPA` with its prediction head, averaged where there is an average.
        head: state dict of the read-out on it; empty after pre-training.
        digest: what tells this checkpoint from others.
        averaged: whether `model` and `head` are averages.
        tokens: the keys of images that decide what a token is, `TOKEN_KEYS`, with their values.
        prediction_head: of pre-training, `objective.head`.
        predicts_raw: its predictions were compared with raw tokens alone, so that they are no embeddings.
    """

    source: str
    config: PredictorConfig
    causal: bool
    data: Modality
    seed: int
    model: dict[str, Tensor]
    head: dict[str, Tensor]
    digest: str
    averaged: bool
    tokens: dict[str, Any]
    prediction_head: HeadKind = "none"
    predicts_raw: bool = False


def network_of(weights: Weights, data: Modality, device: torch.device) -> NEPA:
    """The network in evaluation mode on a device, with its prediction head; it draws nothing from global generators.

    Data that is not there is not needed where the adapter has the embedder that all have by default, or a
    `stored_embedder`.

    Raises:
        UserError: the data have tokens of another size, or the adapter's own embedder looks at data that is not there.
    """
    with torch.random.fork_rng(devices=[]):
        model = NEPA(weights.config, _embedder(weights, data), weights.prediction_head)
    load_backbone(model, weights.config, weights)
    return model.to(device).eval()


def _embedder(weights: Weights, data: Modality) -> nn.Module:
    try:
        return data.embedder(weights.config.dim)
    except UserError:
        state = {name: value for name, value in weights.model.items() if name.startswith(EMBED)}
        without = data.stored_embedder({name.removeprefix(EMBED): value for name, value in state.items()})
        if without is None:
            raise
        return without


class Start(Protocol):
    """The part of a config that says what a network is made for."""

    @property
    def data(self) -> Modality: ...
    @property
    def model(self) -> PredictorConfig: ...
    @property
    def causal(self) -> bool: ...


def read_weights(name: str, key: str = "init") -> Weights:
    """The newest weights of a run of any task, or those of a folder in the released layout; either may lie on the hub.

    Args:
        key: the key that the user gave the name with, for the message.

    Raises:
        UserError: there is nothing of the kind, or it is damaged.
    """
    folder = find(name, key)
    if is_run(str(folder)):
        return _of_run(name, folder)
    refuse_holder(str(folder))
    released = read_released(folder)
    model, head = released.averaged or (released.model, released.head)
    digest, averaged, data = ", ".join(digests(folder).values()), released.averaged is not None, released.adapter()
    tokens = _token_keys(data)
    return Weights(name, released.config, released.causal, data, 0, model, head, digest, averaged, tokens)


def _of_run(name: str, folder: Path) -> Weights:
    run = Run(folder)
    file = run.path / "config.json"
    saved = read_saved(file)
    checkpoint = newest(run)
    try:
        config = validated(PredictorConfig, _part(saved, "model"), "model.")
        objective = (
            validated(ObjectiveConfig, _part(saved, "objective"), "objective.") if "objective" in saved else None
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    data = load_adapter(saved, file)
    if data is None:
        raise UserError(f"{file} names no adapter; it is of a task that trains nothing")
    model, head = split(current_weights(checkpoint))
    causal = bool(_part(saved, "objective").get("causal", saved.get("causal", True)))
    seed = int(_part(saved, "train").get("seed", 0))
    averaged = "ema" in checkpoint.tensors
    return Weights(
        name,
        config,
        causal,
        data,
        seed,
        model | prediction_head_in(checkpoint),
        head,
        checkpoint.digest,
        averaged,
        _token_keys(data),
        "none" if objective is None else objective.head,
        objective is not None and objective.space == "raw",
    )


def _token_keys(data: Modality) -> dict[str, Any]:
    return {key: getattr(data, key) for key in TOKEN_KEYS if hasattr(data, key)}


def newest(run: Run) -> Checkpoint:
    """The newest undamaged checkpoint of a run.

    Raises:
        UserError: there is none; the message has the command that makes one.
    """
    checkpoint, notes = load_latest(run.checkpoints)
    if checkpoint is not None:
        return checkpoint
    record = run.summary(RECORD)
    command = f"nepa {task_of(str(run.path))} {run.path}"
    if record is not None:
        command = f"nepa import {record.get('source', 'SOURCE')} out={run.path}"
    elif run.summary() is not None:  # or the command would only show what was finished
        command = f"rm {run.path / 'summary.json'} && {command}"
    what = "undamaged checkpoint" if notes else "checkpoint"
    cause = f" ({notes[0].removesuffix('; passing over it')})" if notes else ""
    raise UserError(f"{run.checkpoints} holds no {what}; run `{command}` {'again' if notes else 'first'}{cause}")


def class_names(run: Run) -> tuple[str, ...]:
    """Names of the classes that a finished or an imported run tells apart; none where nothing has been written down."""
    with reading_back(run.path / "summary.json"):
        rows = (run.summary() or {}).get("classes") or ()
        names = tuple(str(row["name"] if isinstance(row, dict) else row) for row in rows)
    with reading_back(run.path / RECORD):
        labels = (run.summary(RECORD) or {}).get("config", {}).get("id2label", {})
        return names or tuple(labels[str(number)] for number in range(len(labels)))


def split(state: State) -> NetworkState:
    """The state dict of a run's module, `NEPA` or `Classifier`, in its two parts."""
    head = {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}
    model = {name.removeprefix(BACKBONE): value for name, value in state.items() if not name.startswith(HEAD)}
    return NetworkState(model, head)


def joined(state: NetworkState) -> State:
    """The way back of `split`: of `Classifier` where there is a head, else of `NEPA`."""
    if not state.head:
        return state.model
    parts = {BACKBONE: state.model, HEAD: state.head}
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


def _part(saved: dict[str, Any], key: str) -> dict[str, Any]:
    value = saved.get(key, {})
    return value if isinstance(value, dict) else {}


def current_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors, averaged where there is an average (of parameters only: buffers have none)."""
    return checkpoint.tensors["model"] | checkpoint.tensors.get("ema", {})


def prediction_head_in(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the prediction head, averaged where there is an average; none where it has no such head."""
    heads = checkpoint.tensors.get("model_heads", {}) | checkpoint.tensors.get("ema_heads", {})
    return {name: value for name, value in heads.items() if name.startswith(PREDICTION_HEAD)}


def start_from(init: str, model: nn.Module, config: Start) -> list[str]:
    """Load what `init=` names into a `NEPA` built by `config.model`, see `load_backbone`.

    Returns:
        The names of the weights that are new.

    Raises:
        UserError: the tokens, their order (where attention is causal) or the networks differ; all keys are listed.
    """
    weights = read_weights(init)
    mine, theirs = _token_keys(config.data), weights.tokens
    looked = ["patch", "channels"]
    if config.causal:
        looked += ["patch_order", *(["order_seed"] if mine.get("patch_order") == "random" else [])]
    differing = [name for name in looked if name in mine and name in theirs and mine[name] != theirs[name]]
    if differing:
        told = "; ".join(f"data.{name} is {mine[name]} in the recipe and {theirs[name]} there" for name in differing)
        fix = "set the recipe's keys to fit" + (", or causal=false" if "order" in differing[0] else "")
        raise UserError(f"init={init} was trained on other tokens: {told}; {fix}")
    return load_backbone(model, config.model, weights)


def load_backbone(
    model: nn.Module, config: PredictorConfig, weights: Weights, fresh: Collection[str] = ()
) -> list[str]:
    """Load weights into a `NEPA` built by `config`.

    QK-norm weights that the checkpoint lacks start at 1 (the released base has none, its fine-tuned form has), and
    what only pre-training uses (a mask token, a prediction head) is left out where the network has no place for it.

    Args:
        fresh: names that are not taken.

    Returns:
        The names of the weights that are new.

    Raises:
        UserError: the two networks differ; every differing key or tensor is listed.
    """
    check_shape(config, weights)
    mine = model.state_dict()
    expected = {name: value.shape for name, value in mine.items() if name not in fresh}
    given = {name: value for name, value in weights.model.items() if name not in fresh}
    spare = ("mask_token", PREDICTION_HEAD)
    given = {name: value for name, value in given.items() if not name.startswith(spare) or name in expected}
    new = new_weights(expected, given, f"init={weights.source}")
    model.load_state_dict(given, strict=False)  # what strictness would find has been listed above
    return sorted({*new, *(name for name in fresh if name in mine)})


class Origin(TypedDict):
    """What a run of pre-training began with, and what `init=` could not give it."""

    init: str
    digest: str  # of that checkpoint
    weights: str  # "raw" or "ema": which were taken
    taken: list[str]
    new: list[str]


def begin_from(init: str, model: nn.Module, config: PredictorConfig, data: Modality) -> Origin:
    """Load into a `NEPA`, or one with heads, what `init=` has for pre-training that goes on with other data.

    The predictor must be the same. New are heads, a mask token that is not there, and the embedder where its tensors
    have other names or shapes or tokens are cut otherwise (`data.patch`, `data.channels`).

    Raises:
        UserError: there are no such weights, or the networks differ; all keys are listed.
    """
    weights, mine = read_weights(init), model.state_dict()
    own, other = (
        {name: x.shape for name, x in part.items() if name.startswith(EMBED)} for part in (mine, weights.model)
    )
    cut = [(_token_keys(data).get(key), weights.tokens.get(key)) for key in TOKEN_KEYS[:2]]
    fits = own == other and all(a == b or a is None or b is None for a, b in cut)
    fresh = {name for name in mine if name.startswith(HEADS) or (name == "mask_token" and name not in weights.model)}
    new = load_backbone(model, config, weights, fresh if fits else fresh | own.keys() | other.keys())
    return {
        "init": init,
        "digest": weights.digest,
        "weights": "ema" if weights.averaged else "raw",
        "taken": sorted(mine.keys() - new),
        "new": new,
    }


def check_shape(config: PredictorConfig, weights: Weights) -> None:
    """Compare the recipe's network with that of the weights.

    Raises:
        UserError: keys that decide what the network computes differ; all are listed.
    """
    differing = []
    for name in PredictorConfig.model_fields:
        mine, theirs = getattr(config, name), getattr(weights.config, name)
        if name == "layer_scale":
            mine, theirs = ("none" if value is None else "some" for value in (mine, theirs))
        elif name in FREE_SHAPE or (name, mine, theirs) == ("qk_norm", "affine", "plain"):
            continue
        if mine != theirs:
            differing.append(f"model.{name} is {mine} in the recipe and {theirs} in the weights")
    if differing:
        raise UserError(
            f"init={weights.source} is another network: {'; '.join(differing)}; set the recipe's keys to fit"
        )
