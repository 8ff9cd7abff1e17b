"""Tables and plots that any comparison can show.

A comparison's rows are: variant -> measured values, a dictionary for each seed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from recipes.report import png_of
from recipes.significance import LEVEL, Difference, points, shown_p, spread

Rows = Mapping[str, Sequence[Mapping[str, Any]]]

TESTED = (
    "Differences are paired over seeds. The noise is that of all variants of a table together, and more where a pair "
    f"shows more. Real is p below {LEVEL} after Holm's correction for all differences of a table; the intervals are "
    "not corrected. Needed: from how many points on this difference alone would have been real."
)
"""How `difference_table` is to be read."""

_WIDE, _LONG = 5, 32  # columns, letters
_ACROSS = 5  # panels


class Column(NamedTuple):
    """A measure in a table: its key, its head, and how numbers are written."""

    key: str
    title: str
    form: str = ".3f"


def spreads(rows: Rows, key: str) -> dict[str, dict[str, Any]]:
    """The spread of one measure over seeds, for every variant."""
    return {name: spread([float(row[key]) for row in seeds]) for name, seeds in rows.items()}


def drawn(seeds: int) -> str:
    """What the plots of a comparison show of every variant."""
    return f"mean and 95 % interval over {seeds} seeds, a dot a seed" if seeds > 1 else "one seed"


def groups(rows: Rows, key: str) -> dict[str, list[float]]:
    """One measure: variant -> a value for each seed."""
    return {name: [float(row[key]) for row in seeds] for name, seeds in rows.items()}


def spread_table(rows: Rows, columns: Sequence[Column], *, half: str = "ci95") -> list[list[str]]:
    """Head and a row a variant, mean ± `half`: "ci95" or "std"."""
    lines = [["", *(column.title for column in columns)]]
    for name, seeds in rows.items():
        line = [name]
        for key, _, form in columns:
            found = spread([float(row[key]) for row in seeds])
            width = "" if found[half] is None or len(seeds) < 2 else f" ± {found[half]:{form}}"
            line.append(f"{found['mean']:{form}}{width}")
        lines.append(line)
    return lines


def difference_table(found: Sequence[Difference]) -> list[list[str]]:
    """Head and a row a paired test, see `TESTED`."""
    head = ["", "difference, 95 % interval", "needed", "p", "p, corrected", ""]
    rows = [
        [
            f"{each.better} > {each.worse}",
            points(each),
            f"{100 * each.needed:.1f}",
            shown_p(each.p),
            shown_p(each.p_holm),
            "real" if each.real else "",
        ]
        for each in found
    ]
    return [head, *rows]


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """As text: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = (
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)


def html_table(lines: Sequence[Sequence[str]]) -> str:
    """As HTML: a wide one is small, its long cells have several lines, and one that is still too wide scrolls."""
    head, *rows = lines
    shown = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"
    shown += "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    wide = len(head) > _WIDE or any(len(cell) > _LONG for row in rows for cell in row)
    small = ' class="small"' if wide else ""
    return f'<div style="overflow-x:auto"><table{small}>{shown}</table></div>'


def _cell(text: str) -> str:
    long = ' class="long"' if len(text) > _LONG else ""
    return f"<td{long}>{html.escape(text)}</td>"


def interval_plot(
    values: Mapping[str, Sequence[float]],
    *,
    x: str,
    control: Mapping[str, Sequence[float]] | None = None,
    control_name: str = "random weights",
    reference: Mapping[str, float] | None = None,
    half: str = "ci95",
) -> bytes:
    """A line a variant, from the best down: mean ± `half` over seeds, a dot a seed; PNG bytes.

    Args:
        control: the same variants without training, drawn in grey below each.
        reference: dashed lines.
        half: "ci95" or "std".
    """
    ranked = sorted(values, key=lambda name: -spread(values[name])["mean"])
    canvas = Canvas(figsize=(8, 0.9 + 0.3 * len(ranked)), dpi=110, layout="constrained")
    axes = canvas.subplots()
    drawn = [(values, "pre-trained", "#08519c", 0.0 if control is None else -0.14, "o")]
    if control is not None:
        drawn.append((control, control_name, "#888888", 0.16, "s"))
    for group, label, colour, shift, marker in drawn:
        for place, name in enumerate(ranked):
            found = spread(group[name])
            axes.plot(group[name], [place + shift] * len(group[name]), ".", color=colour, alpha=0.35, markersize=5)
            axes.errorbar(
                found["mean"], place + shift, xerr=found[half], fmt=marker, color=colour, markersize=5, capsize=3,
                elinewidth=1.4, label=label if place == 0 else None,
            )  # fmt: skip
    for place, (name, value) in enumerate((reference or {}).items()):
        axes.axvline(value, linestyle="--", color=f"C{place + 1}", linewidth=1.2, label=name)
    axes.set_yticks(range(len(ranked)), ranked)
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
        axes.set_title(name if len(name) < 26 else f"...{name[-23:]}", fontsize=8, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    canvas.supxlabel(x, fontsize=9)
    canvas.supylabel(y, fontsize=9)
    return png_of(canvas)


def strip_plot(strips: Mapping[str, Sequence[float]], *, x: str) -> bytes:
    """A row of coloured cells a variant, their colours on one scale; rows may differ in length; PNG bytes."""
    grid = np.full((len(strips), max(map(len, strips.values()))), np.nan)
    for row, values in zip(grid, strips.values(), strict=True):
        row[: len(values)] = values
    canvas = Canvas(figsize=(8, 0.8 + 0.26 * len(strips)), dpi=110, layout="constrained")
    axes = canvas.subplots()
    shown = axes.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(strips)), list(strips))
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
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    canvas.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    return png_of(canvas)
