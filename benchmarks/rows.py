"""What a row is, and what is kept of it. Needs nothing but Python, so that a missing package is one row's failure."""

from __future__ import annotations

from typing import Literal, NamedTuple, NotRequired, TypedDict

Status = Literal["done", "out of memory", "no data", "failed", "not finished"]

FINAL: frozenset[Status] = frozenset({"done", "out of memory", "no data"})
"""What the same command does not try again."""


class Row(NamedTuple):
    """One figure, or a few that are measured together.

    Attributes:
        name: in the table.
        words: a function of `benchmarks.worker.WORK`, and its arguments.
        seconds: at most.
        seeds: that its values are of.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    seeds: tuple[int, ...] = (0,)


SOURCE = ("nepa_core", "modalities", "recipes", "benchmarks")
"""The folders of source that most figures depend on."""


class Stage(NamedTuple):
    """Rows in order of value, and the folders of source that their figures depend on."""

    name: str
    title: str
    rows: tuple[Row, ...]
    source: tuple[str, ...] = SOURCE


class Kept(TypedDict):
    """A row as a stage's JSON has it: every value that was measured, a list a figure."""

    name: str
    words: list[str]
    seeds: list[int]
    status: Status
    seconds: float
    figures: NotRequired[dict[str, list[float]]]
    error: NotRequired[str]


class Machine(TypedDict):
    """What a figure was measured with."""

    device: str
    memory: float  # GiB, of the device
    cores: int
    versions: dict[str, str]


class StageFile(TypedDict):
    """STAGE-KEY.json."""

    stage: str
    title: str
    key: str  # of source, device, versions and arguments
    command: str
    commit: str
    machine: Machine
    rows: list[Kept]
