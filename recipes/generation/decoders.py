"""Decoders on a frozen network: from its predictions, and its embeddings, back to raw tokens.

Pairs of a prediction at place t and the raw token t + 1, with its coordinates, are taken from training samples. On them
stand `mean`, the conditional mean of a token as a ridge knows it, and `flow`, which samples the token
(`nepa_core.flow`); `own` gives an embedding's own token back. The untrained network gets the same with the same budget.
They are kept beside the run, and found again where weights, data and settings are the same.

Shapes: M pairs, D width, P numbers in a raw token, A coordinate axes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nepa_core.basics import FROZEN, UserError, file_digest
from nepa_core.flow import FlowConfig, FlowHead
from nepa_core.mean_map import fit_mean
from nepa_core.model import NEPA, evaluating
from nepa_core.runtime.checkpoint import disk_errors, read_json, write_whole
from nepa_core.runtime.data import fold_seed
from nepa_core.runtime.meter import Meter
from nepa_core.runtime.optim import lr_factor
from nepa_core.tokens import Tokens
from recipes.generation.reading import scored
from recipes.readout.features import weights_digest

_BYTES = 2**28  # most that the pairs of one network take
_WARMUP, _DECAY = 0.05, 0.01
FILE, RECORD = "decoders.safetensors", "decoders.json"


class DecoderConfig(BaseModel):
    """How the flow head is made and trained: AdamW, 5 % warm-up, a cosine to 0.

    The rate was chosen here on digits: half the steps at it served both networks as well as twice as many at 1e-3.

    Attributes:
        steps, batch: of training, in tokens. lr: the highest rate, of width 128 or less; it falls with the width.
        seed: of weights, draws and noise.
    """

    model_config = FROZEN

    flow: FlowConfig = FlowConfig()
    steps: int = Field(gt=0, le=10**9)
    batch: int = Field(default=256, gt=0)
    lr: float = Field(default=4e-3, gt=0)
    seed: int = Field(default=0, ge=0)


class Read(Protocol):
    """What a flow head reads: predictions [M, D], and coordinates [M, A] and values [M, P] of the next tokens."""

    @property
    def prediction(self) -> Tensor: ...
    @property
    def coords(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...


class Pairs(NamedTuple):
    """Places of training samples: prediction [M, D], and of the next token coords [M, A], values [M, P], its embedding
    [M, D]."""

    prediction: Tensor
    coords: Tensor
    values: Tensor
    embedding: Tensor


class Decoders(NamedTuple):
    """What is fitted on one network, in evaluation mode on its device."""

    mean: nn.Linear
    own: nn.Linear
    flow: FlowHead

    def state(self, name: str) -> dict[str, Tensor]:
        """All tensors, under this name."""
        parts = self._asdict().items()
        return {f"{name}.{part}.{key}": x.cpu() for part, module in parts for key, x in module.state_dict().items()}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], name: str, config: DecoderConfig, axes: int) -> Decoders:
        """The way back of `state`."""
        size, width = state[f"{name}.mean.weight"].shape
        found = cls(nn.Linear(width, size), nn.Linear(width, size), FlowHead(config.flow, size, width, axes))
        for part, module in found._asdict().items():
            start = f"{name}.{part}."
            module.load_state_dict({key.removeprefix(start): x for key, x in state.items() if key.startswith(start)})
        return found

    def to(self, device: torch.device) -> Decoders:
        """Themselves, moved."""
        for each in self:
            each.to(device).eval().requires_grad_(False)
        return self


@torch.no_grad()
def predictions(model: NEPA, tokens: Tokens, *, causal: bool) -> tuple[Tensor, Tensor]:
    """What is predicted of every token, and the embeddings of all: [B, N, D] float32 on the model's device each.

    Nothing is predicted of the first one without BOS: its place holds what is predicted of the second.
    """
    with evaluating(model):
        out = model(tokens.to(next(model.parameters()).device), causal=causal)
    before, embeddings = out.predictions[:, :-1].float(), out.embeddings.float()
    return (before, embeddings[:, 1:]) if model.config.bos else (torch.cat((before[:, :1], before), 1), embeddings)


def collect(model: NEPA, parts: Sequence[Tokens], *, causal: bool, seed: int, told: bool = True) -> Pairs:
    """The pairs of training samples, or so many of them as fit into a quarter of a gibibyte, drawn by the seed.

    Args:
        told: where the next token lies; False puts 0 there, for tokens that say it themselves.

    Raises:
        UserError: the network gives NaN or infinity.
    """
    width, (size, axes) = model.config.dim, (parts[0].values.shape[-1], parts[0].coords.shape[-1])
    places = sum(part.values[..., 0].numel() for part in parts)
    share = _BYTES / (4 * (2 * width + size + axes) * places)
    draw = torch.Generator().manual_seed(fold_seed(seed, "pairs"))
    found = Pairs(*map(torch.cat, zip(*_pairs(model, parts, share, draw, causal=causal), strict=True)))
    if not told:
        found = found._replace(coords=torch.zeros_like(found.coords))
    if not len(found.values):
        raise UserError("no training sample has a token that is predicted from another: nothing can be decoded")
    if not found.prediction.isfinite().all():
        raise UserError("the network gives NaN or infinity on training samples, so that nothing can be decoded")
    return found


def _pairs(
    model: NEPA, parts: Sequence[Tokens], share: float, draw: torch.Generator, *, causal: bool
) -> Iterator[tuple[Tensor, ...]]:
    for part in parts:
        chosen = scored(part, bos=model.config.bos)
        if share < 1:
            chosen &= torch.rand(chosen.shape, generator=draw) < share
        predicted, embeddings = predictions(model, part, causal=causal)
        coords = part.coords.cpu().expand(*chosen.shape, -1)
        yield predicted.cpu()[chosen], coords[chosen], part.values[chosen].float(), embeddings.cpu()[chosen]


def new_flow(pairs: Read, config: DecoderConfig) -> FlowHead:
    """A flow head with the weights of the seed. Not for threads: they share the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(config.seed, "flow"))
        return FlowHead(config.flow, pairs.values.shape[-1], pairs.prediction.shape[-1], pairs.coords.shape[-1])


def fit_flow(
    head: FlowHead, pairs: Read, config: DecoderConfig, device: torch.device, meter: Meter | None = None
) -> FlowHead:
    """The head trained on the pairs; a function of these, its weights and the config alone."""
    count, dtype = len(pairs.values), torch.float32
    head = head.measure(Tokens(pairs.values[None], pairs.coords)).to(device)
    values = head.standardised(pairs.values.to(device, dtype))
    prediction, coords = pairs.prediction.to(device), pairs.coords.to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=_DECAY, betas=(0.9, 0.99), fused=True)
    draw = torch.Generator(device).manual_seed(fold_seed(config.seed, "noise"))
    peak, warmup = config.lr * min(1.0, 128 / config.flow.width), round(_WARMUP * config.steps)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * lr_factor(step, warmup=warmup, total=config.steps)
        rows = torch.randint(count, (config.batch,), generator=draw, device=device)
        loss = head.loss(values[rows], prediction[rows], coords[rows], generator=draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if meter is not None:
            meter.advance(step + 1)
    return head


def fit_decoders(
    models: Mapping[str, NEPA],
    parts: Sequence[Tokens],
    config: DecoderConfig,
    *,
    causal: bool,
    show: bool,
    told: bool = True,
) -> dict[str, Decoders]:
    """All three for every network, trained with the same budget on the same places; on a CPU side by side."""
    device = next(next(iter(models.values())).parameters()).device
    pairs = {name: collect(model, parts, causal=causal, seed=config.seed, told=told) for name, model in models.items()}
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    beside = min(threads, len(models))
    heads = [new_flow(each, config) for each in pairs.values()]
    with Meter(config.steps, enabled=show, noun="decoder step") as meter:

        def fitted(head: FlowHead, each: Pairs) -> FlowHead:
            return fit_flow(head, each, config, device, meter)

        if beside == 1:
            flows = list(map(fitted, heads, pairs.values()))
        else:
            single = partial(torch.set_num_threads, 1)
            with ThreadPoolExecutor(beside, initializer=single) as pool:
                flows = list(pool.map(fitted, heads, pairs.values()))
    return {
        name: Decoders(fit_mean(each.prediction, each.values), fit_mean(each.embedding, each.values), flow).to(device)
        for (name, each), flow in zip(pairs.items(), flows, strict=True)
    }


def kept_decoders(
    folder: Path,
    models: Mapping[str, NEPA],
    parts: Sequence[Tokens],
    config: DecoderConfig,
    of: Mapping[str, Any],
    *,
    causal: bool,
    show: bool,
    told: bool = True,
) -> dict[str, Decoders]:
    """Those that an earlier command left in the folder, if they are of these weights, data and settings; else new ones.

    Args:
        of: what the training samples are, plain values. told: see `collect`.
    """
    device = next(next(iter(models.values())).parameters()).device
    digests = {name: weights_digest(model) for name, model in models.items()}
    settings = {"weights": digests, "of": dict(of), "decoders": config.model_dump(mode="json"), "causal": causal}
    settings |= {} if told else {"told": told}
    if (state := _found(folder, settings)) is not None:
        axes = parts[0].coords.shape[-1]
        return {name: Decoders.of(state, name, config, axes).to(device) for name in models}
    found = fit_decoders(models, parts, config, causal=causal, show=show, told=told)
    state = {key: x.contiguous() for name, each in found.items() for key, x in each.state(name).items()}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / f".{FILE}")
        (folder / f".{FILE}").replace(folder / FILE)
        record = {"settings": settings, "sha256": file_digest(folder / FILE)}
        write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
    return found


def _found(folder: Path, settings: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of an earlier command with the same settings, whole; else None."""
    try:
        record = read_json(folder / RECORD)
        same = record["settings"] == settings and record["sha256"] == file_digest(folder / FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return load_file(folder / FILE) if same else None
