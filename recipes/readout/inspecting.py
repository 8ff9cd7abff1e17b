"""What a network makes of single samples: attention, similarity, layers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import lt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, field_validator
from torch import Tensor
from torch.utils.data import default_collate

from modalities.data.scene_masks import IGNORED
from nepa_core.basics import FROZEN, Batch, UnreadableSample, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.pooling import surprise_of_tokens
from nepa_core.predictor import Trace
from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.config import read_saved
from nepa_core.runtime.data import plain_batches, to_device
from nepa_core.runtime.weights import Weights, network_of
from nepa_core.tokens import Tokens
from nepa_core.verdict.drawing import draw
from recipes.configs import SegmentConfig
from recipes.report.plots import spread_out
from recipes.report.segment import Picture, palette
from recipes.statistics.held_out import NUMBER, Numbered, clusters_of, draw_seed
from recipes.statistics.maps import (
    Failure,
    Failures,
    Reading,
    attention_figures,
    chosen_attention,
    grid_positions,
    next_rank,
    next_similarity,
    uniform_attention,
)
from recipes.training.segmentation import load_segmenter, predict_image

SEARCHED = 2000
"""Samples among which the worst-predicted ones are sought, a fixed draw over the whole split."""


AT_ONCE = 32  # samples


class InspectOptions(BaseModel):
    """Options of `nepa inspect`."""

    model_config = FROZEN

    images: tuple[str, ...] = Field(
        default=(), description="image files to show, [a.jpg,b.png]; default: the data's own"
    )
    samples: int = Field(default=4, gt=0, description="how many samples to show, drawn from the whole split")
    split: Literal["train", "test"] = Field(default="test", description="the split they are taken from")
    query: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=3,
        description="the token that asks: its canonical index, [row,column] or [slice,row,column], from 0; default: "
        "the middle one",
    )
    layer: int | None = Field(default=None, ge=1, description="layer of the attention map, from 1; default: their mean")
    head: int | None = Field(default=None, ge=1, description="head of the attention map, from 1; default: their mean")
    causal: bool | None = Field(default=None, description="attend backwards only; default: as the run was trained")
    worst: NonNegativeInt = Field(
        default=0, description=f"so many worst-predicted samples, and tokens, among {SEARCHED:,} of the split"
    )

    @field_validator("query", mode="before")
    @classmethod
    def _index(cls, given: Any) -> Any:
        return given if given is None or isinstance(given, list | tuple) else (given,)

    @field_validator("images", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """A shell takes the quotes out of a JSON list, so names may stand in brackets, or alone, without them."""
        return [name.strip() for name in given.strip("[]").split(",")] if isinstance(given, str) else given


def why_silent(target: str, weights: Weights, noun: str, *, causal: bool) -> str:
    """Why the output of this network says nothing about the next token, as a sentence; "" where it does."""
    left_out = f"No similarity map and no ranks of the next {noun}:"
    if weights.head:
        return f"{left_out} this network was trained on labels, and its output no longer predicts a {noun}."
    if not causal:
        return f"{left_out} attention is bidirectional, so that a place sees the {noun} that it would predict."
    if weights.predicts_raw:
        return f"{left_out} this network was trained to predict raw tokens alone, and no embedding."
    if not read_saved(Path(target) / "config.json").get("objective", {}).get("shift", True):
        return f"{left_out} this network was trained to give back the {noun} that it sees (objective.shift=false)."
    return ""


def load_network(weights: Weights, data: Modality, device: torch.device) -> NEPA:
    """`network_of` under the "eager" back-end: that alone leaves attention maps in a `Trace`."""
    eager = weights.config.model_copy(update={"attention": "eager"})
    return network_of(weights._replace(config=eager), data, device)


def inspect(model: NEPA, data: Modality, options: InspectOptions, *, causal: bool) -> list[Reading]:
    """Read the samples that the options name, one by one, so that all attention maps are never held at once.

    Raises:
        UserError: an image can't be read, or the query, layer or head does not exist.
    """
    for name, given, count in (
        ("layer", options.layer, model.config.depth),
        ("head", options.head, model.config.heads),
    ):
        if given is not None and given > count:
            raise UserError(f"{name}={given}: this network has {name}s 1 to {count}")
    device = next(model.parameters()).device
    return [
        read_sample(model, data, name, batch, options, causal=causal)
        for name, batch in chosen_samples(data, options, device)
    ]


def chosen_samples(data: Modality, options: InspectOptions, device: torch.device) -> Iterator[tuple[str, Batch]]:
    """Name and batch of one of every sample to show."""
    if not options.images:
        places = draw(data.samples_of(options.split), options.samples, seed=0).indices
        yield from named_samples(data, options.split, sorted(places.tolist()), device)
        return
    files = data.files(options.images)
    for index, path in enumerate(options.images):
        try:
            yield Path(path).name, to_device(default_collate([files[index]]), device)
        except UnreadableSample as error:
            raise UserError(f"images: {error}; name image files") from error


def named_samples(
    data: Modality, split: str, places: Sequence[int], device: torch.device
) -> Iterator[tuple[str, Batch]]:
    """Name and batch of one of each of these samples, but for those that can't be read."""
    samples = data.samples_of(split)
    for batch in plain_batches(Numbered(samples), batch=1, device=device, indices=places, tokenize=data.tokenize):
        yield sample_name(data, samples, split, int(batch.pop(NUMBER)), batch.get("label")), batch


@torch.no_grad()
def worst_predicted(model: NEPA, data: Modality, options: InspectOptions) -> Failures:
    """The samples with the highest loss, and those with the worst single token, among a draw of `SEARCHED`.

    The mean of a sample is its `surprise` (`nepa_core.load`). The first token, which none comes before, counts there
    alone: it is hard to predict in any sample. Of samples that depend on each other, such as windows of one stretch of
    a series, the worst one stands for all.
    """
    device, samples = next(model.parameters()).device, data.samples_of(options.split)
    numbers, means, peaks = [], [], []
    for batch in plain_batches(
        Numbered(samples),
        batch=AT_ONCE,
        device=device,
        limit=SEARCHED,
        seed=draw_seed(samples, SEARCHED),
        tokenize=data.tokenize,
    ):
        numbers += batch.pop(NUMBER).tolist()
        losses, later = token_losses(model, data.read(batch))
        means.append(losses.nanmean(1))
        peaks.append(later.nan_to_num(-torch.inf).amax(1))
    mean, clusters = torch.cat(means), clusters_of(samples, torch.tensor(numbers)).tolist()

    def failures(scores: Tensor) -> list[Failure]:
        ranked = scores.argsort(descending=True, stable=True).cpu()
        worst = dict[int, int]()
        for row in ranked.tolist():
            worst.setdefault(clusters[row], numbers[row])
        found = []
        for name, batch in named_samples(data, options.split, [*worst.values()][: options.worst], device):
            tokens = data.read(batch)
            losses, later = token_losses(model, tokens)
            token = int(later[0].nan_to_num(-torch.inf).argmax())
            found.append(Failure(name, data.describe(tokens), losses[0].cpu(), token))
        return found

    by_sample, by_token = failures(mean.nan_to_num(-torch.inf)), failures(torch.cat(peaks))
    return Failures(len(numbers), options.split, float(mean.nanmean()), by_sample, by_token)


def token_losses(model: NEPA, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """`surprise_of_tokens` under the causal mask, [B, N]; and the same without the first token of each sample."""
    check_count(model, tokens)
    losses = surprise_of_tokens(model(tokens, causal=True), tokens, bos=model.bos is not None)
    first = torch.zeros_like(losses, dtype=torch.bool)
    first[torch.arange(len(first)), tokens.real.to(first.device).int().argmax(1)] = True
    return losses, losses.masked_fill(tokens.canonical(first), torch.nan)


def sample_name(data: Modality, samples: Any, split: str, index: int, label: Tensor | None) -> str:
    """ "test 3, cat, 0004.png": the place in the split, and the class and the file where they are known."""
    parts = [f"{split} {index}"]
    if label is not None and not label.is_floating_point() and label.numel() == 1 and int(label) >= 0:
        # by default classes are found by reading all samples
        classes = (data.classes() if data.offers("classes") else None) or ()
        word = classes[int(label)] if int(label) < len(classes) else str(int(label))
        parts.append(f"class {word}" if word.isdigit() else word)
    if hasattr(samples, "name"):
        parts.append(Path(samples.name(index)).name)
    return ", ".join(parts)


@torch.no_grad()
def segmented(config: SegmentConfig, weights: Weights, options: InspectOptions, device: torch.device) -> list[Picture]:
    """The classes of the pixels of the same samples, each at its stored size; unreadable ones are left out.

    Raises:
        UserError: the weights don't fit the config.
    """
    data, model, pictures = config.data, load_segmenter(config, weights).to(device), []
    scenes = data.whole_files(options.images) if options.images else data.whole(options.split)
    for index in spread_out(len(scenes), len(options.images) or options.samples):
        with suppress(UnreadableSample):
            scene = scenes[index]
            predicted = predict_image(config, model, scene["image"].to(device)).cpu()
            truth = None if options.images else scene["target"]
            pictures.append(Picture(scene["image"], truth, predicted, Path(scenes.name(index)).name))
    return pictures


def write_masks(folder: Path, pictures: Sequence[Picture], config: SegmentConfig) -> None:
    """A palette image for every picture, of the same size: class k is stored as data.first_label + k."""
    data = config.data
    colours = np.zeros((IGNORED + 1, 3), dtype=np.uint8)
    colours[data.first_label : data.first_label + data.class_count] = palette(data.class_count)
    stems = [Path(picture.name).stem for picture in pictures]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for place, (stem, picture) in enumerate(zip(stems, pictures, strict=True)):
        mask = Image.fromarray((picture.prediction + data.first_label).to(torch.uint8).numpy())
        mask.putpalette(colours.flatten().tolist())
        with disk_errors(folder):
            mask.save(folder / (f"{stem}.png" if stems.count(stem) == 1 else f"{stem}_{place}.png"))


@torch.no_grad()
def read_sample(
    model: NEPA, data: Modality, name: str, batch: Batch, options: InspectOptions, *, causal: bool
) -> Reading:
    """Run the network on one sample; `model` has the "eager" back-end."""
    tokens = data.read(batch)
    check_count(model, tokens)
    sketch, trace = data.describe(tokens), Trace()
    out = model(tokens, causal=causal, trace=trace)
    bos, count = int(model.bos is not None), tokens.values.shape[1]
    if math.prod(sketch.grid) != count:
        raise UserError(f"{type(data).__name__}.describe gives a grid of {sketch.grid} for {count} tokens; fix it")
    canonical = torch.arange(count, device=tokens.values.device)
    order = canonical if tokens.order is None else tokens.order.to(canonical.device).expand(1, -1)[0]
    mask = tokens.real
    real = tokens.canonical(mask)[0]
    query = chosen_query(options.query, sketch.grid, real, name)
    place = int(order.argsort()[query])

    similarity = next_similarity(out.predictions, out.embeddings, bos=bool(bos))
    ranks = next_rank(similarity, mask)[0]
    last = bos + place == len(ranks) or ranks[bos + place].isnan()
    attention = chosen_attention(trace.attention, layer=options.layer, head=options.head)[:, bos + place]
    uniform = uniform_attention(F.pad(mask, (bos, 0), value=True), causal=causal)
    seen = uniform[:, 0, bos + place, bos:] > 0
    positions = grid_positions(sketch.grid).to(order.device)[order]

    def drawn(values: Tensor, shown: Tensor) -> Tensor:
        return tokens.canonical(values.masked_fill(~shown, torch.nan))[0].float().cpu()

    return Reading(
        name=name,
        sketch=sketch,
        order=order.cpu(),
        real=real.cpu(),
        query=query,
        next=None if last else int(order[place + 1]),
        attention=drawn(attention[:, bos:], seen),
        on_bos=float(attention[0, :bos].sum()),
        similarity=drawn(similarity[:, bos + place], mask),
        rank=float("nan") if last else float(ranks[bos + place]),
        ranks=ranks[~ranks.isnan()].cpu(),
        hidden=[tokens.canonical(x[:, bos:])[0].float().cpu() for x in trace.hidden],
        layers=[attention_figures(weights, positions, mask) for weights in [*trace.attention, uniform]],
    )


def check_count(model: NEPA, tokens: Tokens) -> None:
    """Changed data may have more tokens than there are learned positions.

    Raises:
        UserError: they have.
    """
    count = tokens.values.shape[1]
    if 0 < model.config.learned_positions < count:
        raise UserError(f"{count} tokens are more than model.learned_positions={model.config.learned_positions}")


def chosen_query(given: tuple[int, ...] | None, grid: tuple[int, ...], real: Tensor, name: str) -> int:
    """The canonical index of the query; by default the middle of the grid, or of the real tokens.

    Raises:
        UserError: there is no such token in this sample.
    """
    if given is None:
        found = real.nonzero()[:, 0].tolist()
        if not found:
            raise UserError(f"{name} has no real token to ask; name other samples")
        middle = int(np.ravel_multi_index([side // 2 for side in grid], grid))
        return middle if real.all() else found[len(found) // 2]
    named = "query=" + json.dumps(given[0] if len(given) == 1 else given).replace(" ", "")
    inside = given[0] < len(real) if len(given) == 1 else len(given) == len(grid) and all(map(lt, given, grid))
    if not inside:
        sides = [f"{side} {axis}" for side, axis in zip(grid, ("slices", "rows", "columns")[-len(grid) :], strict=True)]
        raise UserError(f"{named}: the tokens lie on {', '.join(sides[:-1])} and {sides[-1]}, counted from 0")
    place = given[0] if len(given) == 1 else int(np.ravel_multi_index(list(given), grid))
    if not real[place]:
        raise UserError(f"{named}: {name} has padding there, {int(real.sum())} real tokens; name another")
    return place
