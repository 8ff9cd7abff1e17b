"""Plots, and one self-contained HTML page that holds them."""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from modalities.listing import printable
from nepa_core.modality import Sketch

matplotlib.rcParams["text.parse_math"] = False  # a class may be called "$\\frac{1"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } td + td { font-variant-numeric: tabular-nums; white-space: nowrap }
td:first-child { white-space: nowrap } td.long { white-space: normal } pre.long { white-space: pre-wrap }
.small { font-size: .8em } .small td, .small th { padding: .25rem .4rem } pre { overflow-x: auto }
figure { margin: 2rem 0 } img { max-width: 100% } figcaption { color: #555 } footer { color: #777; font-size: .8rem }
"""


HEADROOM = 0.08  # of the height, between what is plotted and the frame


class Figure(NamedTuple):
    """A finished plot: its file name, what to see in it, and the PNG."""

    name: str
    caption: str
    png: bytes


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, from the first to the last, equally far apart: neighbours are often alike."""
    shown = min(count, most)
    return [place * (count - 1) // max(shown - 1, 1) for place in range(shown)]


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    from_zero: bool = False,
    markers: bool = False,
) -> bytes:
    """One axes with a line for each named (x values, y values), a dot where that is one point; PNG bytes."""
    canvas = Canvas(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    for name, (xs, ys) in series.items():
        marker = "o" if markers or len(xs) == 1 else None
        axes.plot(xs, ys, marker=marker, markersize=3 if markers else 5, linewidth=1.6, label=name)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # steps, places, layers
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(y=HEADROOM)
    if from_zero:
        axes.set_ylim(0, max(axes.dataLim.y1, 1e-12) * (1 + HEADROOM) if np.isfinite(axes.dataLim.y1) else None)
    axes.grid(alpha=0.3)
    _plain(canvas.legend(loc="outside right upper", frameon=False, fontsize="small"))
    return png_of(canvas)


def picture_table(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, heads: Sequence[str], legend: Mapping[str, Sequence[float]]
) -> bytes:
    """Named rows of pictures [H, W, 3] over a legend of named colours (0 to 1); PNG bytes.

    The name stands above the first picture of its row, `heads` above the others of the first row.
    """
    lines = -(-len(legend) // 6)
    wide = 11 / (len(heads) + 1)
    high = sum(wide * min(max(row[0].shape[0] / row[0].shape[1], 0.3), 1.5) + 0.25 for _, row in rows)
    canvas = Canvas(figsize=(11, high + 0.25 * lines + 0.3), dpi=90, layout="constrained")
    for y, line in enumerate(canvas.subplots(len(rows), len(heads) + 1, squeeze=False)):
        name, pictures = rows[y]
        titles = (name, *(heads if y == 0 else [""] * len(heads)))
        for axes, picture, title in zip(line, pictures, titles, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(printable(title), fontsize="medium", parse_math=False)
    patches = [Patch(color=tuple(colour)) for colour in legend.values()]
    _plain(canvas.legend(patches, [*legend], loc="outside lower center", ncols=6, frameon=False, fontsize="small"))
    return png_of(canvas)


def _plain(legend: Legend) -> None:
    """Take names as they are: a class may well be called "$5", or hold what no font has."""
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))


class Panel(NamedTuple):
    """One sample with something laid over it.

    Attributes:
        title: a few words.
        sketch: of one sample, as `Modality.describe` gives it for a batch of one.
        heat: [N] float, a number for each token in canonical order, shown over the canvas beside a colour bar; NaN
            whitens the token.
        colours: [N, 3] RGB between 0 and 1, shown in place of the canvas; NaN is white.
        marks: colour -> the token that gets a frame of it.
        path: [N] int, the tokens in an order that is drawn as a line.
    """

    title: str
    sketch: Sketch
    heat: Tensor | None = None
    colours: Tensor | None = None
    marks: Mapping[str, int] | None = None
    path: Tensor | None = None


WIDTH, GAP, TITLE, HEADING, BAR = 9.0, 0.12, 0.24, 0.22, 0.42  # inches, of `panel_plot`


def panel_plot(rows: Sequence[tuple[str, Sequence[Panel]]], *, across: int) -> bytes:
    """For each row a heading and then its panels, `across` to a line of 9 inches; PNG bytes."""
    panels = [panel for _, row in rows for panel in row]
    bar = BAR if any(panel.heat is not None for panel in panels) else 0.0
    cell = WIDTH / across
    wide = cell - bar - GAP
    line = TITLE + wide * max(_aspect(panel.sketch) for panel in panels)
    heading = HEADING if any(name for name, _ in rows) else 0.0
    width = cell * min(across, max(len(row) for _, row in rows))
    height = sum(heading + line * -(-len(row) // across) for _, row in rows) + GAP / 2
    canvas = Canvas(figsize=(width, height), dpi=110)

    def axes_at(left: float, top: float, wide: float, high: float) -> Axes:
        return canvas.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    top = 0.0
    for name, row in rows:
        top += heading
        place = (GAP / 2 / width, 1 - (top - 0.05) / height)
        canvas.text(*place, printable(name), fontsize=8, weight="bold", parse_math=False)
        for place, panel in enumerate(row):
            left, above = GAP / 2 + place % across * cell, top + place // across * line + TITLE - GAP / 2
            high = wide * _aspect(panel.sketch)
            heat = _draw_panel(axes_at(left, above, wide, high), panel)
            if heat is not None:
                beside = axes_at(left + wide + 0.04, above, 0.07, high)
                canvas.colorbar(heat, cax=beside).ax.tick_params(labelsize=6, length=2, pad=1)
        top += line * -(-len(row) // across)
    return png_of(canvas)


def _aspect(sketch: Sketch) -> float:
    """Height of a panel over its width: the canvas' own within limits, beyond which it is stretched."""
    if sketch.curves:
        return min(1.2, 0.3 + 0.12 * sketch.grid[0])
    return min(max(sketch.canvas.shape[1] / sketch.canvas.shape[2], 0.3), 1.5)


def _draw_panel(axes: Axes, panel: Panel) -> AxesImage | None:
    """Draw in units of tokens, (0, 0) being the top left corner; gives the heat map where there is one."""
    (rows, columns), canvas = panel.sketch.grid, panel.sketch.canvas[0].float().cpu()
    whole: dict[str, Any] = {"extent": (0, columns, rows, 0), "aspect": "auto", "interpolation": "nearest"}
    heat = None
    axes.set_title(
        printable(panel.title), fontsize=7, pad=4, loc="left", parse_math=False
    )  # a frame may stand out by 2
    if panel.colours is not None:
        axes.imshow(panel.colours.nan_to_num(1.0).view(rows, columns, 3).numpy(), **whole)
    elif not panel.sketch.curves:
        grey = canvas if canvas.ndim == 2 or panel.heat is None else canvas.mean(-1)
        axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, **whole)
    if panel.heat is not None:
        values = panel.heat.view(rows, columns).numpy()
        axes.imshow(np.where(np.isnan(values), 1.0, np.nan), cmap="gray", vmin=0, vmax=1, alpha=0.75, **whole)
        heat = axes.imshow(values, cmap="viridis", alpha=0.75, **whole)
    if panel.sketch.curves and panel.colours is None:
        _draw_curves(axes, canvas, rows, columns)
    if panel.path is not None:
        axes.imshow(np.ones((1, 1)), cmap="gray", vmin=0, vmax=1, alpha=0.6, **whole)
        axes.plot(panel.path % columns + 0.5, panel.path // columns + 0.5, color="C1", linewidth=1)
        axes.plot(panel.path[0] % columns + 0.5, panel.path[0] // columns + 0.5, "o", color="C1", markersize=5)
    for colour, token in (panel.marks or {}).items():
        frame = Rectangle(
            (token % columns, token // columns), 1, 1, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False
        )
        frame.set_path_effects([withStroke(linewidth=2.6, foreground="black")])
        axes.add_patch(frame)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    return heat


def _draw_curves(axes: Axes, curves: Tensor, rows: int, columns: int) -> None:
    """Curves [L, C] from their lowest to their highest value, in a row each where there are as many, else together."""
    length, count = curves.shape
    bands = count if rows == count else 1
    high = rows / bands
    for band, together in enumerate(curves.chunk(bands, dim=1)):
        finite = together[together.isfinite()]
        low, top = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        heights = (band + 0.95 - 0.9 * (together - low) / max(float(top - low), 1e-12)) * high
        axes.plot((np.arange(length) + 0.5) / length * columns, heights, linewidth=0.8)


def page(folder: Path, *, title: str, body: str, figures: Sequence[Figure], foot: str) -> None:
    """Write every PNG and an index.html that needs no other file. `body` is HTML, the rest is text."""
    compose(folder, title=title, parts=[body, *figures], foot=foot)


def compose(folder: Path, *, title: str, parts: Sequence[str | Figure], foot: str) -> None:
    """The same with HTML and figures in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for part in parts:
        if isinstance(part, str):
            shown.append(part)
            continue
        (folder / part.name).write_bytes(part.png)
        data = base64.b64encode(part.png).decode()
        caption = html.escape(part.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        shown.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    (folder / "index.html").write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(shown)}"
        f"<footer>{html.escape(foot)}</footer></body></html>\n",
        encoding="utf-8",
        errors="backslashreplace",
    )


def png_of(canvas: Canvas) -> bytes:
    """A drawing as PNG bytes."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in another script
        canvas.savefig(stream, format="png")
    return stream.getvalue()
