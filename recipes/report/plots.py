"""Plots as PNG bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from modalities.data.listing import printable
from nepa_core.tokens import Sketch
from recipes.statistics.significance import Spread, interval_of
from recipes.statistics.worth import SHARES

matplotlib.rcParams["text.parse_math"] = False  # a class may be called "$\\frac{1"


HEADROOM = 0.08  # of the height, between what is plotted and the frame


def spread_out(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, from the first to the last, equally far apart: neighbours are often alike."""
    shown = min(count, most)
    return [place * (count - 1) // max(shown - 1, 1) for place in range(shown)]


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    *,
    x: str,
    y: str,
    from_zero: bool = False,
    markers: bool = False,
    title: str = "",
) -> bytes:
    """One axes with a line for each named (x values, y values), a dot where that is one point; PNG bytes.

    Where a y value is None there is a gap, and at an end nothing: the axis goes as far as there are values.
    """
    canvas = Canvas(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    for name, (xs, ys) in series.items():
        marker = "o" if markers or len(xs) == 1 else None
        heights = np.array(ys, dtype=float)  # None becomes NaN
        axes.plot(xs, heights, marker=marker, markersize=3 if markers else 5, linewidth=1.6, label=name)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # steps, places, layers
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(y=HEADROOM)
    if from_zero:
        axes.set_ylim(0, max(axes.dataLim.y1, 1e-12) * (1 + HEADROOM) if np.isfinite(axes.dataLim.y1) else None)
    axes.grid(alpha=0.3)
    _plain(canvas.legend(loc="outside right upper", frameon=False, fontsize="small"))
    return png_of(canvas)


def over_training(
    metrics: Sequence[Mapping[str, Any]], curves: Mapping[str, str], *, y: str, title: str, from_zero: bool = False
) -> bytes:
    """A line for each key of metrics.jsonl, over the steps that have it, by its name in the legend; PNG bytes."""
    lines = {name: [line for line in metrics if key in line] for name, key in curves.items()}
    series = {
        name: ([line["step"] for line in found], [line[curves[name]] for line in found])
        for name, found in lines.items()
    }
    return line_plot(series, x="step", y=y, title=title, from_zero=from_zero)


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
    patches = [Patch(color=to_rgb((colour[0], colour[1], colour[2]))) for colour in legend.values()]
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
        path: int, the tokens in an order that is drawn as a line, without padding: N at most.
        at: [N, 2] (down, across) where the tokens of the path lie, unless in the cells of the sketch.
        hidden: [N] bool, tokens whose cells are left white.
    """

    title: str
    sketch: Sketch
    heat: Tensor | None = None
    colours: Tensor | None = None
    marks: Mapping[str, int] | None = None
    path: Tensor | None = None
    at: Tensor | None = None
    hidden: Tensor | None = None


WIDTH, GAP, TITLE, HEADING, BAR, TICKS = 9.0, 0.12, 0.24, 0.22, 0.42, 0.14  # inches, of `panel_plot`


def panel_plot(rows: Sequence[tuple[str, Sequence[Panel]]], *, across: int) -> bytes:
    """For each row a heading and then its panels, `across` to a line of 9 inches; PNG bytes."""
    panels = [panel for _, row in rows for panel in row]
    bar = BAR if any(panel.heat is not None for panel in panels) else 0.0
    cell = WIDTH / across
    wide = cell - bar - GAP
    line = TITLE + wide * max(map(_aspect, panels)) + (TICKS if any(map(_in_one_row, panels)) else 0.0)
    heading = HEADING if any(name for name, _ in rows) else 0.0
    width = cell * min(across, max(len(row) for _, row in rows))
    height = sum(heading + line * -(-len(row) // across) for _, row in rows) + GAP / 2
    canvas = Canvas(figsize=(width, height), dpi=110)

    def axes_at(left: float, top: float, wide: float, high: float) -> Axes:
        return canvas.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    top = 0.0
    for name, row in rows:
        top += heading
        canvas.text(
            GAP / 2 / width, 1 - (top - 0.05) / height, printable(name), fontsize=8, weight="bold", parse_math=False
        )
        for place, panel in enumerate(row):
            left, above = GAP / 2 + place % across * cell, top + place // across * line + TITLE - GAP / 2
            high = wide * _aspect(panel)
            heat = _draw_panel(axes_at(left, above, wide, high), panel)
            if heat is not None:
                beside = axes_at(left + wide + 0.04, above, 0.07, high)
                canvas.colorbar(heat, cax=beside).ax.tick_params(labelsize=6, length=2, pad=1)
        top += line * -(-len(row) // across)
    return png_of(canvas)


def _in_one_row(panel: Panel) -> bool:
    """Whether tokens stand side by side: then they are counted below."""
    return panel.sketch.table[0] == 1 and panel.at is None


def _aspect(panel: Panel) -> float:
    """Height of a panel over its width: the canvas' own within limits, beyond which it is stretched."""
    sketch = panel.sketch
    if panel.at is not None:
        return 1.0
    if sketch.curves:
        return min(1.2, 0.3 + 0.12 * sketch.grid[0])
    return min(max(sketch.canvas.shape[1] / sketch.canvas.shape[2], 0.3), 1.5)


def _draw_panel(axes: Axes, panel: Panel) -> AxesImage | None:
    """Draw in units of tokens, (0, 0) being the top left corner; gives the heat map where there is one."""
    (rows, columns), canvas = panel.sketch.table, panel.sketch.canvas[0].float().cpu()
    cells = panel.sketch.cells()

    def laid(values: Tensor) -> np.ndarray:
        """Numbers of tokens [N, ...] on the table of cells; a cell without a token is NaN."""
        table = values.new_full((rows * columns, *values.shape[1:]), torch.nan)
        table[cells] = values.cpu()
        return np.asarray(table.unflatten(0, (rows, columns)))

    whole: dict[str, Any] = {"extent": (0, columns, rows, 0), "aspect": "auto", "interpolation": "nearest"}
    heat = None
    axes.set_title(
        printable(panel.title), fontsize=7, pad=4, loc="left", parse_math=False
    )  # a frame may stand out by 2
    if panel.colours is not None:
        axes.imshow(np.nan_to_num(laid(panel.colours), nan=1.0), **whole)
    elif not panel.sketch.curves:
        grey = canvas if canvas.ndim == 2 or panel.heat is None else canvas.mean(-1)
        shown, drawn_at = grey.shape[1], axes.get_window_extent().width
        smaller = whole | {"interpolation": "antialiased"}  # "nearest" leaves out strokes of letters
        axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, **(smaller if shown > drawn_at else whole))
    if panel.heat is not None:
        values = laid(panel.heat)
        axes.imshow(np.where(np.isnan(values), 1.0, np.nan), cmap="gray", vmin=0, vmax=1, alpha=0.75, **whole)
        heat = axes.imshow(values, cmap="viridis", alpha=0.75, **whole)
    if panel.hidden is not None:
        white = np.where(laid(panel.hidden.float()) == 1, 1.0, np.nan)
        axes.imshow(white, cmap="gray", vmin=0, vmax=1, **whole)
    if panel.sketch.curves and panel.colours is None:
        _draw_curves(axes, canvas, rows, columns)
    if panel.path is not None:
        axes.imshow(np.ones((1, 1)), cmap="gray", vmin=0, vmax=1, alpha=0.6 if panel.at is None else 1, **whole)
        walked = cells[panel.path]
        at = torch.stack((walked // columns, walked % columns), dim=1) + 0.5
        if panel.at is not None:
            drawn = panel.at[panel.path]
            low, high = drawn.amin(0), drawn.amax(0)
            share = (drawn - low) / (high - low).clamp(min=1e-12)
            at = (0.05 + 0.9 * share) * torch.tensor([rows, columns])
        axes.plot(at[:, 1], at[:, 0], color="C1", linewidth=1)
        axes.plot(at[0, 1], at[0, 0], "o", color="C1", markersize=5)
    for colour, token in (panel.marks or {}).items():
        framed = int(cells[token])
        frame = Rectangle(
            (framed % columns, framed // columns), 1, 1, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False
        )
        frame.set_path_effects([withStroke(linewidth=2.6, foreground="black")])
        axes.add_patch(frame)
    if len(panel.sketch.grid) == 3:  # where one slice ends and the next begins
        _, down, across = panel.sketch.grid
        axes.hlines(range(down, rows, down), 0, columns, color="#d0d0d0", linewidth=0.8)
        axes.vlines(range(across, columns, across), 0, rows, color="#d0d0d0", linewidth=0.8)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    if _in_one_row(panel):
        tokens = range(0, columns, -(-columns // 5))  # equally far apart
        axes.set_xticks([token + 0.5 for token in tokens], [str(token) for token in tokens])
        axes.tick_params("x", labelsize=5, length=2, pad=1)
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
        for value, share in ((top, 0.05), (low, 0.95)):
            axes.text(0, (band + share) * high, f"{float(value):.3g}", fontsize=5, va="center", color="#666666")
        axes.plot((np.arange(length) + 0.5) / length * columns, heights, linewidth=0.8)


def png_of(canvas: Canvas) -> bytes:
    """A drawing as PNG bytes."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in another script
        canvas.savefig(stream, format="png")
    return stream.getvalue()


_ACROSS = 5  # panels


def inside(mean: float, half: float | None, metric: str) -> list[list[float]] | None:
    """The arms of an error bar, [[below], [above]], cut where the metric ends: no accuracy is above 1 or below 0."""
    if half is None:
        return None
    low = 0.0 if metric in SHARES else -math.inf  # R2 and skill end at 1 alone
    return [[max(0.0, min(half, mean - low))], [max(0.0, min(half, 1.0 - mean))]]


def label_of(name: str) -> str:
    """A name as a picture has room for it: of a long one, such as a file's, the end."""
    shown = printable(name)
    return shown if len(shown) < 26 else f"...{shown[-23:]}"


def interval_plot(
    spreads: Mapping[str, Spread],
    *,
    x: str,
    control: Mapping[str, Spread] | None = None,
    control_name: str = "random weights",
    reference: Mapping[str, float] | None = None,
    half: Literal["ci95", "std"] = "ci95",
    metric: str = "accuracy",
) -> bytes:
    """A line a variant, from the best down: mean ± `half`, a dot a seed; PNG bytes.

    Args:
        spreads: variant -> `spread`. control: the same variants without training, drawn in grey below each.
        reference: dashed lines.
        half: "ci95" (over test samples, too, where they are known) or "std". metric: see `inside`.
    """
    ranked = sorted(spreads, key=lambda name: -float(spreads[name]["mean"]))
    canvas = Canvas(figsize=(8, 0.9 + 0.3 * len(ranked)), dpi=110, layout="constrained")
    axes = canvas.subplots()
    drawn = [(spreads, "pre-trained", "#08519c", 0.0 if control is None else -0.14, "o")]
    if control is not None:
        drawn.append((control, control_name, "#888888", 0.16, "s"))
    for group, label, colour, shift, marker in drawn:
        for place, name in enumerate(ranked):
            found = group[name]
            values, width = found["values"], interval_of(found) if half == "ci95" else found[half]
            arms = inside(found["mean"], width, metric)
            axes.plot(values, [place + shift] * len(values), ".", color=colour, alpha=0.35, markersize=5)
            axes.errorbar(
                found["mean"], place + shift, xerr=arms, fmt=marker, color=colour, markersize=5, capsize=3,
                elinewidth=1.4, label=label if place == 0 else None,
            )  # fmt: skip
    for place, (name, value) in enumerate((reference or {}).items()):
        axes.axvline(value, linestyle="--", color=f"C{place + 1}", linewidth=1.2, label=name)
    axes.set_yticks(range(len(ranked)), [label_of(name) for name in ranked])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.set_xlabel(x)
    axes.grid(alpha=0.3, axis="x")
    canvas.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return png_of(canvas)


class Curve(NamedTuple):
    """A line, or markers without one, of `panels_plot`: places, heights, and how matplotlib is to draw them."""

    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any]


def panels_plot(panels: Mapping[str, Sequence[Curve]], *, x: str, y: str) -> bytes:
    """A small panel a variant, all on the same scales; PNG bytes."""
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    canvas = Canvas(figsize=(max(3.2, 1.75 * across), 0.5 + 1.5 * down), dpi=110, layout="constrained")
    grid = canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, (name, curves) in zip(grid, panels.items(), strict=False):
        for curve in curves:
            axes.plot(curve.x, curve.y, **curve.style)
        axes.set_title(label_of(name), fontsize=8, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    canvas.supxlabel(x, fontsize=9)
    canvas.supylabel(y, fontsize=9)
    return png_of(canvas)


class Fan(NamedTuple):
    """What came before, seen [L], and after, truth [H]; and bands [5, H], its quantiles .05, .25, .5, .75 and .95."""

    seen: Tensor
    truth: Tensor
    bands: Tensor


def fan_plot(columns: Mapping[str, Sequence[Fan]]) -> bytes:
    """A column for each named forecaster, a row a window: median, intervals of 50 and 90 %, and the truth; PNG bytes.

    Of what was seen, as much is drawn as twice the horizon.
    """
    down = max(map(len, columns.values()))
    canvas = Canvas(figsize=(4.6 * len(columns), 0.5 + 1.8 * down), dpi=110, layout="constrained")
    grid = canvas.subplots(down, len(columns), sharey="row", squeeze=False)
    for place, (name, fans) in enumerate(columns.items()):
        grid[0][place].set_title(label_of(name), fontsize=9, loc="left", parse_math=False)
        for axes, fan in zip(grid[:, place], fans, strict=False):
            horizon = len(fan.truth)
            seen = fan.seen[-2 * horizon :].numpy()
            ahead, low = np.arange(1, horizon + 1), fan.bands.numpy()
            axes.plot(np.arange(1 - len(seen), 1), seen, color="#888888", linewidth=0.9, label="seen")
            for outer, shade, label in ((0, 0.2, "90 %"), (1, 0.4, "50 %")):
                axes.fill_between(ahead, low[outer], low[-1 - outer], color="C0", alpha=shade, linewidth=0, label=label)
            axes.plot(ahead, low[2], color="C0", linewidth=1.1, label="median")
            axes.plot(ahead, fan.truth.numpy(), color="black", linewidth=0.9, label="truth")
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    canvas.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8
    )
    canvas.supxlabel("steps ahead", fontsize=9)
    return png_of(canvas)


def strip_plot(strips: Mapping[str, Sequence[float]], *, x: str) -> bytes:
    """A row of coloured cells a variant, their colours on one scale; rows may differ in length; PNG bytes."""
    grid = np.full((len(strips), max(map(len, strips.values()))), np.nan)
    for row, values in zip(grid, strips.values(), strict=True):
        row[: len(values)] = values
    canvas = Canvas(figsize=(8, 0.8 + 0.26 * len(strips)), dpi=110, layout="constrained")
    axes = canvas.subplots()
    shown = axes.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(strips)), [label_of(name) for name in strips])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel(x)
    canvas.colorbar(shown, ax=axes, pad=0.02).ax.tick_params(labelsize=8)
    return png_of(canvas)


def matrix_plot(values: Sequence[Sequence[float]], names: Sequence[str], *, x: str, y: str) -> bytes:
    """A square of numbers, rows named on the left and columns on top; PNG bytes."""
    grid = np.asarray(values)
    side = 1.8 + 0.52 * len(names)
    canvas = Canvas(figsize=(side + 0.6, side), dpi=110, layout="constrained")
    axes = canvas.subplots()
    shown = axes.imshow(grid, cmap="viridis")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    names = [label_of(name) for name in names]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    canvas.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    return png_of(canvas)
