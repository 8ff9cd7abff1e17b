"""HTML pages of results with their PNGs."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } td + td { font-variant-numeric: tabular-nums; white-space: nowrap }
td:first-child { white-space: nowrap } td.long { white-space: normal } pre.long { white-space: pre-wrap }
.small { font-size: .8em } .small td, .small th { padding: .25rem .4rem } pre { overflow-x: auto }
figure { margin: 2rem 0 } img { max-width: 100% } figcaption { color: #555 } footer { color: #777; font-size: .8rem }
"""


class Figure(NamedTuple):
    """A finished plot: its file name, what to see in it, and the PNG."""

    name: str
    caption: str
    png: bytes


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
