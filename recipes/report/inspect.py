"""The page of nepa inspect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nepa_core.modality import Modality
from recipes.report.page import Figure, Heading, Part, Report, Table, Words
from recipes.report.plots import Panel, panel_plot
from recipes.report.provenance import provenance
from recipes.report.segment import Picture, picture_grid
from recipes.statistics.maps import Failure, Failures, Reading, pca_colours

QUERY, NEXT = "red", "white"  # frames


# --------------------------------------------------------------------------------------------------- page


def report(
    folder: Path,
    readings: Sequence[Reading],
    data: Modality,
    layer: int | None,
    head: int | None,
    *,
    causal: bool,
    silent: str,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    failures: Failures | None = None,
) -> Report:
    """maps.png, layers.png, order.png unless the order is the canonical one, and classes.png of `pictures`.

    And worst_samples.png and worst_tokens.png of `failures`.

    Args:
        folder: of the run. silent: see `why_silent`. pictures: see `segmented`. classes: names of those of their
        pixels.
    """
    noun = data.token_name
    which = "averaged over layers" if layer is None else f"layer {layer}"
    which += ", averaged over heads" if head is None else f", head {head}"
    blind = "; whitened: what it may not see" if causal else ""
    similarity = (
        f" Similarity: cosine between the embedding predicted at the query's place and every {noun}; the one to be "
        f"predicted has a {NEXT} frame."
    )

    def parts() -> Iterator[Part]:
        yield Words([silent or next_token_line(readings, noun)])
        yield Table([HEADER, *layer_table(readings)])
        yield Words(
            [
                f"Means over heads and the samples shown. Distance: from each {noun} to those it attends to, in units "
                f"of the {noun} grid, BOS left out. Entropy in nats. The last line is equal attention wherever it may "
                "look."
            ]
        )
        if pictures:
            plot = picture_grid(pictures, classes)
            yield Figure("classes.png", "The class of every pixel, by the averaged weights if there are any.", plot)
        yield Figure(
            "maps.png",
            f"Attention of the query {noun} ({QUERY} frame), {which}{blind}.{'' if silent else similarity}",
            panel_plot([(reading.name, map_panels(reading, noun, silent)) for reading in readings], across=3),
        )
        yield Figure(
            "layers.png",
            "The input and every layer: the first three principal components as red, green and blue, taken for each "
            "layer over all samples shown. Like colours are like features.",
            panel_plot(_layer_panels(readings), across=8),
        )
        if orders := _order_panels(readings):
            plot = panel_plot([("", orders)], across=4)
            yield Figure("order.png", "The order of prediction, from the dot on.", plot)
        if failures:
            yield from failure_parts(failures, noun)

    title, said = f"Inside {folder.resolve().name}", f"{render(readings, noun, silent)}\n"
    if failures:
        said += f"\n{failure_text(failures, noun)}\n"
    return Report(title, said, provenance(), parts)


def failure_parts(failures: Failures, noun: str) -> Iterator[Part]:
    """The section of the worst-predicted samples and tokens."""
    yield Heading("Predicted worst", "worst")
    yield Words(
        [
            f"Of {failures.searched:,} {failures.split} samples, whose mean loss is {failures.mean:.3f}. The loss of a "
            f"{noun} is -cos between its embedding and what was predicted from those before it: -1 is perfect, 1 the "
            f"worst. The first {noun} of a sample, which none comes before, counts in the sample's loss alone."
        ]
    )
    for kind, found in (("samples", failures.samples), (f"{noun}s", failures.tokens)):
        name = "worst_samples.png" if kind == "samples" else "worst_tokens.png"
        rows = [
            (
                each.name,
                [
                    Panel("input", each.sketch, marks={QUERY: each.token}),
                    Panel(f"loss, mean {each.losses.nanmean():.3f}", each.sketch, heat=each.losses),
                ],
            )
            for each in found
        ]
        caption = f"The {kind} with the highest loss; the worst {noun} has a {QUERY} frame."
        yield Table([FAILED, *failure_table(found)])
        yield Figure(name, caption, panel_plot(rows, across=3))


FAILED = ("", "loss", "worst at", "loss there")


def failure_table(failures: Sequence[Failure]) -> list[tuple[str, str, str, str]]:
    """Rows of (sample, its loss, the worst token by its canonical index, the loss of that)."""
    return [
        (each.name, f"{each.losses.nanmean():.3f}", str(each.token), f"{each.losses[each.token]:.3f}")
        for each in failures
    ]


def failure_text(failures: Failures, noun: str) -> str:
    """Both tables as text."""
    lines = [f"Predicted worst of {failures.searched:,} {failures.split} samples (mean loss {failures.mean:.3f}):"]
    for head, found in (("by sample", failures.samples), (f"by {noun}", failures.tokens)):
        rows = [(head, *FAILED[1:]), *failure_table(found)]
        width = max(len(name) for name, *_ in rows)
        lines += [f"{name:<{width}}" + "".join(f"  {cell:>10}" for cell in cells) for name, *cells in rows]
    return "\n".join(lines)


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
    orders = {tuple(reading.path.tolist()): reading for reading in readings}
    return [
        Panel(reading.name if len(orders) > 1 else "", reading.sketch, path=reading.path)
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


def render(readings: Sequence[Reading], noun: str, silent: str) -> str:
    """The table and the line about the next token, or why there is none, as text."""
    rows = [HEADER, *layer_table(readings)]
    lines = [f"{row[0]:<18}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, "", silent or next_token_line(readings, noun)])
