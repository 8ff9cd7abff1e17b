"""nepa inspect: what a run attends to, what it expects next, and what its layers tell apart, as pictures.

For every sample: the attention of a query token over the input; the similarity map, the cosine between the embedding
predicted at the query's place and every token of the sample; and the tokens in the colours of the first three
principal components of each layer, taken over all samples shown. Below stands how far and how wide each layer
looks. RUN/inspect/ gets the PNGs and one page that holds them. The adapter's `describe` says how its samples
are drawn. Keys that begin with data. may be changed, such as data.root=DIR.

The similarity map and the ranks of the next token are of networks that predict it: they are left out for one that
has been trained on labels, and where attention is bidirectional.

Of a segmentation run the page also has the classes that it gives to the whole images, beside the truth where there is
one. Those of images=[a.jpg] are written as masks/a.png, too: palette images numbered as the annotations are.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, SerializeAsAny, field_validator
from torch import Tensor
from torch.utils.data import default_collate

from modalities.image import Images
from modalities.scene_data import IGNORED
from modalities.scenes import Scenes
from nepa_core.basics import FROZEN, Batch, UnreadableSample, UserError
from nepa_core.drawing import draw
from nepa_core.modality import Modality, Sketch, Tokens
from nepa_core.model import NEPA
from nepa_core.predictor import Trace
from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.config import keys, load_adapter, nearest, override, read_saved
from nepa_core.runtime.data import plain_batches, to_device
from nepa_core.runtime.distributed import world
from nepa_core.runtime.run import Run
from recipes.held_out import NUMBER, Numbered
from recipes.maps import (
    AttentionFigures,
    attention_figures,
    chosen_attention,
    grid_positions,
    next_rank,
    next_similarity,
    pca_colours,
    uniform_attention,
)
from recipes.report import Figure, Panel, page, panel_plot, spread
from recipes.segment import SegmentConfig, load_segmenter, predict_image
from recipes.segment_report import Picture, palette, picture_grid
from recipes.targets import is_run, read_target, task_of
from recipes.training import at_work, provenance
from recipes.weights import Weights, load_backbone, read_weights

QUERY, NEXT = "red", "white"  # frames
FREE = ("data.",)
"""Keys of a run that may be changed here."""


class Options(BaseModel):
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
        max_length=2,
        description="the token that asks: its canonical index or [row,column], from 0; default: the middle one",
    )
    layer: int | None = Field(default=None, ge=1, description="layer of the attention map, from 1; default: their mean")
    head: int | None = Field(default=None, ge=1, description="head of the attention map, from 1; default: their mean")
    causal: bool | None = Field(default=None, description="attend backwards only; default: as the run was trained")

    @field_validator("query", mode="before")
    @classmethod
    def _index(cls, given: Any) -> Any:
        return given if given is None or isinstance(given, list | tuple) else (given,)

    @field_validator("images", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """A shell takes the quotes out of a JSON list, so names may stand in brackets, or alone, without them."""
        return [name.strip() for name in given.strip("[]").split(",")] if isinstance(given, str) else given


class Reading(NamedTuple):
    """What the network makes of one sample; what belongs to tokens is in canonical order.

    Attributes:
        name: what the sample is called.
        sketch: of this sample alone.
        order: [N] int64, the token at each place.
        real: [N] bool, False for padding.
        query, next: tokens; the next one is what is predicted at the query's place, None after the last.
        attention: [N] float, from the query; NaN where it may not look.
        on_bos: the query's attention to BOS.
        similarity: [N] float, NaN for padding.
        rank: of the next token among the tokens of the sample; NaN after the last.
        ranks: the same for every place that has a next token.
        hidden: [N, D] each, as in `Trace.hidden`.
        layers: figures of every layer, and of uniform attention at the end.
    """

    name: str
    sketch: Sketch
    order: Tensor
    real: Tensor
    query: int
    next: int | None
    attention: Tensor
    on_bos: float
    similarity: Tensor
    rank: float
    ranks: Tensor
    hidden: list[Tensor]
    layers: list[AttentionFigures]


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    data = read_config(target, changes).data.plain()
    with world() as ranks, at_work(Run(Path(target)), ranks, trains=False):
        if not ranks.is_main:
            return
        weights = read_weights(target)
        causal = weights.causal if options.causal is None else options.causal
        silent = why_silent(target, weights, data.token_name, causal=causal)
        readings = inspect(load_network(weights, data, ranks.device), data, options, causal=causal)
        pictures = []
        if task_of(target) == SegmentConfig.task:
            pictures = segmented(read_target(SegmentConfig, target, changes), weights, options, ranks.device)
        folder = Path(target) / "inspect"
        with disk_errors(folder):
            write_page(folder, readings, data, options, causal=causal, silent=silent, pictures=pictures)
            if pictures and options.images:
                write_masks(folder / "masks", pictures, cast(Scenes, data))
        print(f"{render(readings, data.token_name, silent)}\n\nReport: {folder / 'index.html'}")


def why_silent(target: str, weights: Weights, noun: str, *, causal: bool) -> str:
    """Why the output of this network says nothing about the next token, as a sentence; "" where it does."""
    left_out = f"No similarity map and no ranks of the next {noun}:"
    if weights.head:
        return f"{left_out} this network was trained on labels, and its output no longer predicts a {noun}."
    if not causal:
        return f"{left_out} attention is bidirectional, so that a place sees the {noun} that it would predict."
    if not read_saved(Path(target) / "config.json").get("objective", {}).get("shift", True):
        return f"{left_out} this network was trained to give back the {noun} that it sees (objective.shift=false)."
    return ""


class InspectConfig(BaseModel):
    """What of a run's config may be changed here: its data, for others whose tokens are of the same form."""

    model_config = FROZEN

    data: SerializeAsAny[Modality]


def read_config(target: str, changes: Mapping[str, Any]) -> InspectConfig:
    """The adapter of a run of any task, with changes to data.* applied.

    Raises:
        UserError: it is no run, a key is unknown, or a value does not fit.
    """
    if not is_run(target):
        raise UserError(f"{target} is not a run folder; name one, such as `nepa pretrain` or `nepa import` makes")
    file = Path(target) / "config.json"
    if (data := load_adapter(read_saved(file), file)) is None:
        raise UserError(f"{file} names no adapter; it is of a task that trains nothing")
    config = InspectConfig(data=data)
    for key in changes:
        if not key.startswith(FREE):
            raise UserError(f"unknown key {key}{nearest(key, [*Options.model_fields, *keys(config)])}")
    return override(config, changes)


def load_network(weights: Weights, data: Modality, device: torch.device) -> NEPA:
    """The network in evaluation mode, under the "eager" back-end: that alone leaves attention maps in a `Trace`.

    Raises:
        UserError: changed data have tokens of another size.
    """
    config = weights.config.model_copy(update={"attention": "eager"})
    model = NEPA(config, data.embedder(config.dim))
    load_backbone(model, config, weights)
    return model.to(device).eval()


def inspect(model: NEPA, data: Modality, options: Options, *, causal: bool) -> list[Reading]:
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


def chosen_samples(data: Modality, options: Options, device: torch.device) -> Iterator[tuple[str, Batch]]:
    """Name and batch of one of every sample to show."""
    if not options.images:
        samples = data.dataset(options.split)
        places = sorted(draw(samples, options.samples, seed=0).indices.tolist())
        for batch in plain_batches(Numbered(samples), batch=1, device=device, indices=places, tokenize=data.tokenize):
            yield sample_name(data, samples, options.split, int(batch.pop(NUMBER)), batch.get("label")), batch
        return
    if not isinstance(data, Images | Scenes):
        raise UserError(f"images= are for runs on images; {type(data).__name__} shows samples= of a split=")
    files = data.files(options.images)
    for index, path in enumerate(options.images):
        try:
            yield Path(path).name, to_device(default_collate([files[index]]), device)
        except UnreadableSample as error:
            raise UserError(f"images: {error}; name image files") from error


def sample_name(data: Modality, samples: Any, split: str, index: int, label: Tensor | None) -> str:
    """ "test 3, cat, 0004.png": the place in the split, and the class and the file where they are known."""
    parts = [f"{split} {index}"]
    if label is not None and not label.is_floating_point() and label.numel() == 1 and int(label) >= 0:
        named = type(data).classes is not Modality.classes  # by default classes are found by reading all samples
        classes = (data.classes() if named else None) or ()
        word = classes[int(label)] if int(label) < len(classes) else str(int(label))
        parts.append(f"class {word}" if word.isdigit() else word)
    if hasattr(samples, "name"):
        parts.append(Path(samples.name(index)).name)
    return ", ".join(parts)


@torch.no_grad()
def segmented(config: SegmentConfig, weights: Weights, options: Options, device: torch.device) -> list[Picture]:
    """The classes of the pixels of the same samples, each at its stored size; unreadable ones are left out.

    Raises:
        UserError: the weights don't fit the config.
    """
    data, model, pictures = config.data, load_segmenter(config, weights).to(device), []
    scenes = data.whole_files(options.images) if options.images else data.whole(options.split)
    for index in spread(len(scenes), len(options.images) or options.samples):
        with suppress(UnreadableSample):
            scene = scenes[index]
            predicted = predict_image(config, model, scene["image"].to(device)).cpu()
            truth = None if options.images else scene["target"]
            pictures.append(Picture(scene["image"], truth, predicted, Path(scenes.name(index)).name))
    return pictures


def write_masks(folder: Path, pictures: Sequence[Picture], data: Scenes) -> None:
    """A palette image for every picture, of the same size: class k is stored as data.first_label + k."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = np.zeros((IGNORED + 1, 3), dtype=np.uint8)
    colours[data.first_label : data.first_label + data.class_count] = palette(data.class_count)
    stems = [Path(picture.name).stem for picture in pictures]
    for place, (stem, picture) in enumerate(zip(stems, pictures, strict=True)):
        mask = Image.fromarray((picture.prediction + data.first_label).to(torch.uint8).numpy())
        mask.putpalette(colours.flatten().tolist())
        mask.save(folder / (f"{stem}.png" if stems.count(stem) == 1 else f"{stem}_{place}.png"))


@torch.no_grad()
def read_sample(model: NEPA, data: Modality, name: str, batch: Batch, options: Options, *, causal: bool) -> Reading:
    """Run the network on one sample; `model` has the "eager" back-end."""
    tokens = data.read(batch)
    check_count(model, tokens)
    sketch, trace = data.describe(tokens), Trace()
    out = model(tokens, causal=causal, trace=trace)
    bos, count = int(model.bos is not None), tokens.values.shape[1]
    if sketch.grid[0] * sketch.grid[1] != count:
        raise UserError(f"{type(data).__name__}.describe gives a grid of {sketch.grid} for {count} tokens; mend it")
    canonical = torch.arange(count, device=tokens.values.device)
    order = canonical if tokens.order is None else tokens.order.to(canonical.device).expand(1, -1)[0]
    mask = torch.ones_like(canonical, dtype=torch.bool)[None] if tokens.mask is None else tokens.mask
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


def chosen_query(given: tuple[int, ...] | None, grid: tuple[int, int], real: Tensor, name: str) -> int:
    """The canonical index of the query; by default the middle of the grid, or of the real tokens.

    Raises:
        UserError: there is no such token in this sample.
    """
    rows, columns = grid
    if given is None:
        found = real.nonzero()[:, 0].tolist()
        if not found:
            raise UserError(f"{name} has no real token to ask; name other samples")
        return rows // 2 * columns + columns // 2 if real.all() else found[len(found) // 2]
    row, column = given if len(given) == 2 else divmod(given[0], columns)
    named = "query=" + json.dumps(given[0] if len(given) == 1 else given).replace(" ", "")
    if row >= rows or column >= columns:
        raise UserError(f"{named}: the tokens lie on {rows} rows and {columns} columns, counted from 0")
    if not real[row * columns + column]:
        raise UserError(f"{named}: {name} has padding there, {int(real.sum())} real tokens; name another")
    return row * columns + column


# --------------------------------------------------------------------------------------------------- page


def write_page(
    folder: Path,
    readings: Sequence[Reading],
    data: Modality,
    options: Options,
    *,
    causal: bool,
    silent: str,
    pictures: Sequence[Picture],
) -> None:
    """index.html, maps.png, layers.png, order.png unless the order is the canonical one, and classes.png of `pictures`.

    Args:
        silent: see `why_silent`. pictures: see `segmented`.
    """
    noun = data.token_name
    layer = "averaged over layers" if options.layer is None else f"layer {options.layer}"
    head = "averaged over heads" if options.head is None else f"head {options.head}"
    blind = "; whitened: what it may not see" if causal else ""
    similarity = (
        f" Similarity: cosine between the embedding predicted at the query's place and every {noun}; the one to be "
        f"predicted has a {NEXT} frame."
    )
    maps = Figure(
        "maps.png",
        f"Attention of the query {noun} ({QUERY} frame), {layer}, {head}{blind}.{'' if silent else similarity}",
        panel_plot([(reading.name, map_panels(reading, noun, silent)) for reading in readings], across=3),
    )
    layers = Figure(
        "layers.png",
        "The input and every layer: the first three principal components as red, green and blue, taken for each layer "
        "over all samples shown. Like colours are like features.",
        panel_plot(_layer_panels(readings), across=8),
    )
    figures = [maps, layers]
    (folder / "order.png").unlink(missing_ok=True)  # of an earlier call, perhaps with another order
    if orders := _order_panels(readings):
        plot = panel_plot([("", orders)], across=4)
        figures.append(Figure("order.png", "The order of prediction, from the dot on.", plot))
    (folder / "classes.png").unlink(missing_ok=True)
    if pictures:
        plot = picture_grid(pictures, cast(Scenes, data).class_names())
        figures.insert(
            0, Figure("classes.png", "The class of every pixel, by the averaged weights if there are any.", plot)
        )
    foot = ", ".join(f"{name} {value}" for name, value in provenance().items())
    title = f"Inside {folder.parent.resolve().name}"
    page(folder, title=title, body=_body(readings, noun, silent), figures=figures, foot=foot)


def map_panels(reading: Reading, noun: str, silent: str = "") -> list[Panel]:
    """The sample, the attention of the query and, unless `silent` says why not, its similarity map, side by side."""
    query = {QUERY: reading.query}
    both = query if reading.next is None or silent else query | {NEXT: reading.next}
    found = "" if reading.next is None else f", next {noun} ranked {reading.rank:g} of {int(reading.real.sum())}"
    on_bos = f", {reading.on_bos:.0%} on BOS" if reading.on_bos else ""
    panels = [
        Panel("input", reading.sketch, marks=both),
        Panel(f"attention{on_bos}", reading.sketch, heat=reading.attention, marks=query),
    ]
    if silent:
        return panels
    return [*panels, Panel(f"similarity{found}", reading.sketch, heat=reading.similarity, marks=both)]


def _layer_panels(readings: Sequence[Reading]) -> list[tuple[str, list[Panel]]]:
    depth = len(readings[0].hidden)
    names = ["embedding", *(f"layer {i}" for i in range(1, depth - 1)), "final norm"]
    rows = [(reading.name, [Panel("input", reading.sketch)]) for reading in readings]
    for level, name in enumerate(names):
        colours = pca_colours(torch.cat([reading.hidden[level][reading.real] for reading in readings]))
        shares = colours.split([int(reading.real.sum()) for reading in readings])
        for reading, share, (_, panels) in zip(readings, shares, rows, strict=True):
            shown = torch.full((len(reading.real), 3), torch.nan)
            shown[reading.real] = share
            panels.append(Panel(name, reading.sketch, colours=shown))
    return rows


def _order_panels(readings: Sequence[Reading]) -> list[Panel]:
    """A panel for every different order among the samples, but none for the canonical one."""
    orders = {tuple(reading.order.tolist()): reading for reading in readings}
    return [
        Panel(reading.name if len(orders) > 1 else "", reading.sketch, path=reading.order)
        for order, reading in orders.items()
        if list(order) != sorted(order)
    ]


def layer_table(readings: Sequence[Reading]) -> list[tuple[str, str, str, str]]:
    """Rows of (layer, attention distance, entropy, share on BOS): means over heads and samples."""
    depth = len(readings[0].layers) - 1
    rows = []
    for level, name in enumerate([*(f"layer {i}" for i in range(1, depth + 1)), "uniform attention"]):
        means = [
            float(torch.stack([each.mean() for each in figures]).mean())
            for figures in zip(*(reading.layers[level] for reading in readings), strict=True)
        ]
        rows.append((name, f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:.1%}"))
    return rows


def next_token_line(readings: Sequence[Reading], noun: str) -> str:
    """How the predictions at all places rank the token that comes next."""
    ranks = torch.cat([reading.ranks for reading in readings])
    guess = torch.cat([(reading.real.sum() + 1) / 2 * torch.ones_like(reading.ranks) for reading in readings])
    return (
        f"The true next {noun} among all of its sample: mean rank {ranks.mean():.1f} (a guess has {guess.mean():.1f}), "
        f"first at {(ranks == 1).float().mean():.0%} of {len(ranks)} places."
    )


HEADER = ("", "distance", "entropy", "on BOS")


def _body(readings: Sequence[Reading], noun: str, silent: str) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in layer_table(readings)
    )
    heads = "".join(f"<th>{name}</th>" for name in HEADER)
    line, noun = html.escape(silent or next_token_line(readings, noun)), html.escape(noun)
    return (
        f"<p>{line}</p><table><tr>{heads}</tr>{cells}</table>"
        f"<p>Means over heads and the samples shown. Distance: from a {noun} to those it attends to, in units of the "
        f"{noun} grid, BOS left out. Entropy in nats. The last line is equal attention wherever it may look.</p>"
    )


def render(readings: Sequence[Reading], noun: str, silent: str) -> str:
    """The table and the line about the next token, or why there is none, as text."""
    rows = [HEADER, *layer_table(readings)]
    lines = [f"{row[0]:<18}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, "", silent or next_token_line(readings, noun)])
