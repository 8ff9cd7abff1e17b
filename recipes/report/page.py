"""A result as text for the screen and as an HTML page with PNGs: what is escaped is escaped here alone."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from nepa_core.runtime.checkpoint import disk_errors
from recipes.report.summaries import MadeWith

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right } td + td { font-variant-numeric: tabular-nums; white-space: nowrap }
td:first-child { white-space: nowrap } td.long { white-space: normal } pre { white-space: pre-wrap }
h1, h2, h3, p, footer { overflow-wrap: anywhere }
.wide { overflow-x: auto } .small { font-size: .8em } .small td, .small th { padding: .25rem .4rem }
.full { font-size: .7em } .full td, .full th { padding: .25rem }
figure { margin: 2rem 0 } img { max-width: 100% } figcaption { color: #555 } footer { color: #777; font-size: .8rem }
"""

_WIDE, _FULL, _LONG = 5, 7, 32  # columns, columns, letters: beyond, a table is small, smaller; a cell has several lines


class Answer(NamedTuple):
    """The verdict, first on the page."""

    text: str


class Heading(NamedTuple):
    """A heading, and the name by which a link finds it."""

    text: str
    anchor: str


class Words(NamedTuple):
    """Paragraphs."""

    lines: Sequence[str]


class Table(NamedTuple):
    """A head and rows of cells."""

    rows: Sequence[Sequence[str]]
    anchor: str = ""


class Verbatim(NamedTuple):
    """Text whose lines stay as they are, under a title to click on where there is one."""

    text: str
    title: str = ""


class Links(NamedTuple):
    """A paragraph that leads to other pages: what it begins with, and name -> address, from this page's folder."""

    text: str
    pages: Mapping[str, str]


class Figure(NamedTuple):
    """A finished plot: its file name, what to see in it, and the PNG."""

    name: str
    caption: str
    png: bytes


class Sound(NamedTuple):
    """A player: its file name, what is heard, and the WAV."""

    name: str
    caption: str
    wav: bytes


Part = Answer | Heading | Words | Table | Verbatim | Links | Figure | Sound


@dataclass(frozen=True)
class Report:
    """What a task found.

    Attributes:
        title: of the page. said: the result as text. made_with: command, commit, device and versions.
        parts: what the page holds, in reading order; asked for when it is written, as plots take their time.
        text_file: the name of a file beside the page that gets the text; "" for none.
    """

    title: str
    said: str
    made_with: MadeWith
    parts: Callable[[], Iterable[Part]]
    text_file: str = ""

    def text(self, folder: Path) -> str:
        """For the screen, with where the page lies."""
        return f"{self.said}\nReport: {folder / 'index.html'}"

    def write(self, folder: Path) -> None:
        """Write every PNG and WAV, and an index.html that needs no other file.

        Raises:
            UserError: the disk is full or may not be written.
        """
        shown = "".join(map(_shown, parts := list(self.parts())))
        foot = ", ".join(f"{name} {value}" for name, value in self.made_with.items())
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for part in parts:
                if isinstance(part, Figure | Sound):
                    (folder / part.name).write_bytes(part[-1])
            if self.text_file:
                (folder / self.text_file).write_text(
                    self.text(folder) + "\n", encoding="utf-8", errors="backslashreplace"
                )
            (folder / "index.html").write_text(
                f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
                f"<style>{STYLE}</style></head><body><h1>{escape(self.title)}</h1>{shown}"
                f"<footer>{escape(foot)}</footer></body></html>\n",
                encoding="utf-8",
                errors="backslashreplace",
            )


def _shown(part: Part) -> str:
    """A part as HTML."""
    match part:
        case Answer(text):
            return f'<div id="answer"><h2>{escape(text)}</h2></div>'
        case Heading(text, anchor):
            return f'<h2 id="{escape(anchor)}">{escape(text)}</h2>'
        case Words(lines):
            return "".join(f"<p>{escape(line)}</p>" for line in lines)
        case Table():
            return _table(part)
        case Verbatim(text, title):
            text = f"<pre>{escape(text)}</pre>"
            return f"<details><summary>{escape(title)}</summary>{text}</details>" if title else text
        case Links(text, pages):
            links = ", ".join(f'<a href="{escape(quote(to))}">{escape(name)}</a>' for name, to in pages.items())
            return f"<p>{escape(text)} {links}</p>"
        case Figure(_, caption, png):
            caption, data = escape(caption), base64.b64encode(png).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        case Sound(_, caption, wav):
            data = base64.b64encode(wav).decode()
            return f'<p>{escape(caption)}<br><audio controls src="data:audio/wav;base64,{data}"></audio></p>'


def _table(table: Table) -> str:
    """A wide one is small, its long cells have several lines, and one that is still too wide scrolls."""
    head, *rows = table.rows
    shown = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    shown += "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    wide = len(head) > _WIDE or any(len(cell) > _LONG for row in rows for cell in row)
    anchor = f' id="{escape(table.anchor)}"' if table.anchor else ""
    small = ' class="small full"' if len(head) > _FULL else ' class="small"' if wide else ""
    return f'<div class="wide"{anchor}><table{small}>{shown}</table></div>'


def _cell(text: str) -> str:
    long = ' class="long"' if len(text) > _LONG else ""
    return f"<td{long}>{escape(text)}</td>"
