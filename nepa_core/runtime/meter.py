"""Progress on the screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_quiet = False


@contextmanager
def kept_quiet(quiet: bool) -> Iterator[None]:
    """Within the block no progress is shown, whoever asks for it, or it is shown."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before


def say_progress(text: str) -> None:
    """A line on stderr that says how far something is."""
    if not _quiet:
        print(text, file=sys.stderr)


class Meter:
    """Progress on the screen: a live bar on a terminal, a line that is written anew in the output of a notebook's cell,
    elsewhere a plain line every `interval` seconds."""

    def __init__(self, total: int, *, enabled: bool, interval: float = 15.0, noun: str = "step") -> None:
        self._console = Console(stderr=True)
        self._live = enabled and not _quiet and self._console.is_terminal
        self._plain = enabled and not _quiet and not self._live
        self._cell: Any = None
        self._interval, self._last = 0.5 if self._console.is_jupyter else interval, time.monotonic()
        self._total, self._done, self._first, self._start = total, 0, 0, time.monotonic()
        self._note, self._noun = "", noun
        self._bar = Progress(
            TextColumn(noun),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("fit", total=total, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        if self._plain and self._console.is_jupyter:
            self._cell = import_module("IPython.display").display({"text/plain": ""}, raw=True, display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._cell is not None:
            self._write()

    def resume(self, step: int) -> None:
        """`step` steps were done in earlier sittings: they don't count for the rate."""
        self._done = self._first = step
        self._start = time.monotonic()
        self._bar.reset(self._task, completed=step)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._done = step
        if self._live:
            self._bar.update(self._task, completed=step)
        elif self._plain and time.monotonic() - self._last > self._interval:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        rate = (self._done - self._first) / max(self._last - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else float("nan")
        text = f"{self._noun} {self._done}/{self._total}  {rate:.1f} a second  {left:.0f} s left"
        if self._cell is None:
            print(text, file=sys.stderr)
        else:
            self._cell.update({"text/plain": f"{text}  {self._note}".strip()}, raw=True)

    def note(self, text: str) -> None:
        """Show the latest figures beside the bar."""
        self._note = text
        if self._live:
            self._bar.update(self._task, note=text)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say what is done instead of steps; its time does not count for the time that is left."""
        began, before = time.monotonic(), self._note
        self.note(f"{before}  {text}".strip())
        try:
            yield
        finally:
            self.note(before)
            self._start += time.monotonic() - began

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._live:
            self._bar.console.print(text, highlight=False)
        elif self._plain:
            print(text, file=sys.stderr)
