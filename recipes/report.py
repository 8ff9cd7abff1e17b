"""Plots, and one self-contained HTML page that holds them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } td + td { font-variant-numeric: tabular-nums }
figure { margin: 2rem 0 } img { max-width: 100% } figcaption { color: #555 } footer { color: #777; font-size: .8rem }
"""


class Figure(NamedTuple):
    """A finished plot: its file name, what to see in it, and the PNG."""

    name: str
    caption: str
    png: bytes


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    from_zero: bool = False,
    markers: bool = False,
) -> bytes:
    """One axes with a line for each named (x values, y values); PNG bytes."""
    canvas = Canvas(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o" if markers else None, markersize=3, linewidth=1.6, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    canvas.legend(loc="outside right upper", frameon=False, fontsize="small")
    return _png(canvas)


def bar_plot(groups: Mapping[str, Sequence[float]], *, y: str, reference: Mapping[str, float] | None = None) -> bytes:
    """A bar at the mean of each group and a dot for every value; dashed lines at the references; PNG bytes."""
    canvas = Canvas(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    for place, values in enumerate(groups.values()):
        axes.bar(place, sum(values) / len(values), width=0.6, color="#9ecae1")
        axes.plot([place] * len(values), values, "o", color="#08519c", markersize=4)
    for place, (name, value) in enumerate((reference or {}).items()):
        axes.axhline(value, linestyle="--", color=f"C{place + 1}", linewidth=1.2, label=name)
    axes.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, axis="y")
    if reference:
        axes.legend(frameon=False, fontsize="small")
    return _png(canvas)


def picture_table(
    rows: Sequence[Sequence[np.ndarray]], *, heads: Sequence[str], legend: Mapping[str, Sequence[float]]
) -> bytes:
    """Pictures [H, W, 3] in rows and columns under their heads, over a legend of named colours (0 to 1); PNG bytes."""
    lines = -(-len(legend) // 6)
    canvas = Canvas(figsize=(11, 2.9 * len(rows) + 0.25 * lines + 0.4), dpi=90, layout="constrained")
    for y, line in enumerate(canvas.subplots(len(rows), len(heads), squeeze=False)):
        for axes, picture, head in zip(line, rows[y], heads, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(head if y == 0 else "")
    patches = [Patch(color=tuple(colour), label=name) for name, colour in legend.items()]
    canvas.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    return _png(canvas)


def page(folder: Path, *, title: str, body: str, figures: Sequence[Figure], foot: str) -> None:
    """Write every PNG and an index.html that needs no other file. `body` is HTML, the rest is text."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for figure in figures:
        (folder / figure.name).write_bytes(figure.png)
        data = base64.b64encode(figure.png).decode()
        caption = html.escape(figure.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        shown.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    (folder / "index.html").write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}{''.join(shown)}"
        f"<footer>{html.escape(foot)}</footer></body></html>\n"
    )


def _png(canvas: Canvas) -> bytes:
    stream = io.BytesIO()
    canvas.savefig(stream, format="png")
    return stream.getvalue()
