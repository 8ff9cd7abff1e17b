"""Progress on the screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Meter:
    """Progress on the screen: a live bar on a terminal, else a plain line every `interval` seconds."""

    def __init__(self, total: int, *, enabled: bool, interval: float = 15.0, noun: str = "step") -> None:
        self._console = Console(stderr=True)
        self._live = enabled and self._console.is_terminal
        self._plain = enabled and not self._live
        self._interval, self._last = interval, time.monotonic()
        self._total, self._first, self._start = total, 0, time.monotonic()
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
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def resume(self, step: int) -> None:
        """`step` steps were done in earlier sittings: they don't count for the rate."""
        self._first, self._start = step, time.monotonic()
        self._bar.reset(self._task, completed=step)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._live:
            self._bar.update(self._task, completed=step)
        elif self._plain and time.monotonic() - self._last > self._interval:
            self._last = time.monotonic()
            rate = (step - self._first) / (self._last - self._start)
            left = (self._total - step) / rate if rate else float("nan")
            print(f"{self._noun} {step}/{self._total}  {rate:.1f} a second  {left:.0f} s left", file=sys.stderr)

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
