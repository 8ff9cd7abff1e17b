"""Windows of events as samples, and what is measured on the training events: kinds, usual gap, scale of numbers.

Shapes: E events of a split, W windows, N the most events of a window, C columns of numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.event_process import sequences
from modalities.data.event_tables import EventTable, Named, counted, read_events
from modalities.data.listing import IN_PLACE, Contents, printable, say
from nepa_core.basics import Batch, UnreadableSample, UserError, number_of, some
from nepa_core.tokens import Spans

SourceName = Literal["process", "file"]
Divide = Literal["entity", "time"]
_FEW = 20  # entities below which intervals are made from stretches of their windows
_STRETCH = 16  # windows in a stretch
_KINDS = 4096  # most kinds of events
_SHORTEST = 1e-3  # of the usual gap; shorter ones, as of events at one time, count as that
_GAPS_A_UNIT = 4  # usual gaps in one unit of a coordinate, where nobody says how long that is

Array = np.ndarray[Any, Any]


class Form(NamedTuple):
    """Where events come from and how they are cut; the settings of `modalities.events.Events`."""

    source: SourceName
    root: str | None
    named: Named
    divide: Divide
    held_out: float
    events: int
    span: float | None


class Measures(NamedTuple):
    """What tokens depend on, of the training events.

    Attributes:
        kinds: names, in the order of their numbers. gap: the usual (median) one above 0, in the units of time.
        columns: C names. mean, std: [C] of each column, 0 and 1 where it has no number or does not vary.
    """

    kinds: tuple[str, ...]
    gap: float
    columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Events(NamedTuple):
    """Events of one split, sorted by entity and time.

    Attributes:
        entity, time, kind, numbers: of `EventTable`.
        gap: [E] to the event before of the entity, NaN where there is none.
    """

    entity: Array
    time: Array
    gap: Array
    kind: Array
    numbers: Array


class EventWindows(Dataset[Batch]):
    """Windows of events, padded to N.

    "kind" int64 [N] (K for kinds that training lacks), "gap" float32 [N] (natural logarithm, over the usual gap;
    0 of an entity's first event), "time" float32 [N] since the first event, "numbers" float32 [N, C] (standardised, NaN
    where missing), "count", and "label" where entities have one.
    """

    def __init__(
        self,
        events: _Events,
        measures: Measures,
        rows: Tensor,
        longest: int,
        names: tuple[str, ...],
        labels: Tensor | None,
        broken: dict[int, str] | None = None,
    ) -> None:
        number = {name: place for place, name in enumerate(measures.kinds)}
        self.first, self.count, self.entity = rows.unbind(1)
        self.names, self.labels, self.broken = names, labels, broken or {}
        self.longest = longest
        floor = _SHORTEST * measures.gap
        gap = np.log(np.maximum(np.nan_to_num(events.gap, nan=measures.gap), floor) / measures.gap)
        numbers = (events.numbers - np.array(measures.mean)) / np.array(measures.std)
        self.kind = torch.tensor([number.get(each, len(number)) for each in events.kind.tolist()], dtype=torch.int64)
        self.gap, self.numbers = torch.from_numpy(gap).float(), torch.from_numpy(numbers).float()
        self.time = torch.from_numpy(np.array(events.time))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Batch:
        if index in self.broken:
            raise UnreadableSample(self.broken[index])
        first, count = int(self.first[index]), int(self.count[index])
        rows = torch.arange(first, first + count)

        def padded(values: Tensor) -> Tensor:
            return torch.cat((values, values.new_zeros(self.longest - count, *values.shape[1:])))

        found = {
            "kind": padded(self.kind[rows]),
            "gap": padded(self.gap[rows]),
            "time": padded((self.time[rows] - self.time[first]).float()),
            "numbers": padded(self.numbers[rows]),
            "count": torch.tensor(count),
        }
        return found if self.labels is None else found | {"label": self.labels[self.entity[index]]}

    def name(self, index: int) -> str:
        """The entity, and which of its windows."""
        before = int((self.entity[:index] == self.entity[index]).sum())
        return printable(self.names[int(self.entity[index])]) + (f", window {before + 1}" if before else "")

    def spans(self) -> Spans:
        """Windows of one entity depend on each other; of few entities, those of a stretch."""
        few = len(self.entity.unique()) < _FEW
        place = torch.arange(len(self)) // _STRETCH if few else torch.zeros(len(self), dtype=torch.int64)
        cluster = torch.stack((self.entity, place), 1).unique(dim=0, return_inverse=True)[1]
        return Spans(cluster, self.entity, self.first, self.first + self.count, chained=few)

    def fingerprint(self) -> str:
        """Changes where any event, cut or label does."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.kind, self.gap, self.numbers, self.first, self.count, self.entity, self.labels):
            digest.update(b"" if part is None else part.numpy().tobytes())
        return f"{len(self)} windows, {len(self.kind)} events, {digest.hexdigest()}"

    def contents(self) -> Contents:
        """Kinds, gaps and numbers of every window."""

        def read(index: int) -> bytes:
            rows = slice(int(self.first[index]), int(self.first[index] + self.count[index]))
            return b"".join(part[rows].numpy().tobytes() for part in (self.kind, self.gap, self.numbers))

        return Contents(self.count.numpy() * (12 + 4 * self.numbers.shape[1]), read, self.name, IN_PLACE)


# ------------------------------------------------------------------------------------------------ opening


@lru_cache(maxsize=4)
def open_events(form: Form, split: str, by: Form) -> EventWindows:
    """The windows of a split.

    Args:
        by: of the data whose training events the tokens are measured by.

    Raises:
        UserError: of `read_events`; one entity can't be divided; a split is empty, or has a class that training lacks.
    """
    table, events = _table(form), _split(form, split)
    measures = measures_of(by)
    where = f"{form.root or form.source}, {'training' if split == 'train' else 'held-out'} split"
    _say_unknown(where, events, measures)
    rows = _windows(form, events)
    single = np.flatnonzero(np.bincount(events.entity, minlength=1) == 1)
    if len(single):
        shown = some([printable(table.names[place]) for place in single.tolist()], 2)
        say(f"{where}: left out, with a single event: {number_of(len(single), 'entity', 'entities')} ({shown})")
    if not rows:
        raise UserError(f"{where}: no entity has two events in a window; check data.entity, or lengthen data.span")
    classes, labels = classes_of(form), None
    if classes is not None and table.labels is not None:
        number = {name: place for place, name in enumerate(classes)}
        if missing := sorted({table.labels[each] for each in np.unique(events.entity).tolist()} - set(classes)):
            raise UserError(f"{where}: no training entity has the labels {some(list(map(printable, missing)), 4)}")
        labels = torch.tensor([number.get(label, -1) for label in table.labels])
    return EventWindows(events, measures, torch.tensor(rows), form.events, table.names, labels)


def open_event_files(form: Form, paths: tuple[str, ...]) -> EventWindows:
    """The first window of the first entity of each file by name, without labels."""
    parts, rows, broken, total = list[_Events](), list[tuple[int, int, int]](), dict[int, str](), 0
    measures = measures_of(form)
    for number, path in enumerate(paths):
        try:
            table = read_events(path, _for_files(form.named, measures.columns))
            events = _rows(_whole(table), table.entity == 0)
            first, count, _ = next(iter(_windows(form, events)), (0, 0, 0))
            if not count:
                raise UserError(f"{printable(path)}: fewer than two events of one entity in a window")
        except UserError as error:
            broken[number], count, first = str(error), 1, 0
            events = _nothing(1, len(measures.columns))
        parts.append(events)
        rows.append((total + first, count, number))
        total += len(events.time)
    parts = parts or [_nothing(0, len(measures.columns))]
    joined = _Events(*map(np.concatenate, zip(*parts, strict=True)))
    return EventWindows(joined, measures, torch.tensor(rows), form.events, paths, None, broken)


def _nothing(count: int, columns: int) -> _Events:
    """So many events without content, which stand for what can't be read."""
    entity, time, gap, kind = (np.zeros(count) for _ in range(4))
    return _Events(entity, time, gap, kind, np.zeros((count, columns)))


def _for_files(named: Named, columns: tuple[str, ...]) -> Named:
    """The same columns of numbers as the training data has; files need no label."""
    return named._replace(values=columns, label=None)


def classes_of(form: Form) -> tuple[str, ...] | None:
    """The labels of training entities by their names; None where they have none."""
    labels = _table(form).labels
    if labels is None:
        return None
    return tuple(sorted({labels[each] for each in np.unique(_split(form, "train").entity).tolist()}))


@lru_cache(maxsize=8)
def measures_of(form: Form) -> Measures:
    """See `Measures`.

    Raises:
        UserError: there are too many kinds.
    """
    events, columns = _split(form, "train"), _table(form).columns
    kinds = tuple(sorted(set(events.kind.tolist())))
    if len(kinds) > _KINDS:
        raise UserError(f"data.kind: {len(kinds):,} kinds of events, more than {_KINDS:,}; is that the right column?")
    gaps = events.gap[np.nan_to_num(events.gap) > 0]
    known = np.isfinite(events.numbers).any(0) if len(columns) else np.zeros(0, bool)
    mean, std = np.zeros(len(columns)), np.ones(len(columns))
    mean[known], std[known] = np.nanmean(events.numbers[:, known], 0), np.nanstd(events.numbers[:, known], 0)
    std[~(std > 1e-12 * np.abs(mean).clip(1e-12))] = 1.0
    usual = float(np.median(gaps)) if len(gaps) else 1.0
    return Measures(kinds, usual, columns, tuple(mean.tolist()), tuple(std.tolist()))


def unit_of(form: Form, unit: float | None) -> float:
    """Length of one unit of a coordinate: the one given, or four usual gaps."""
    return _GAPS_A_UNIT * measures_of(form).gap if unit is None else unit


@lru_cache(maxsize=4)
def _table(form: Form) -> EventTable:
    if form.source == "file":
        assert form.root is not None
        return read_events(form.root, form.named)
    parts = [sequences(split) for split in ("train", "test")]
    kept = [torch.arange(each.kinds.shape[1]) < each.lengths[:, None] for each in parts]
    entity = [place.expand(kept_.shape[1], -1).T[kept_] for kept_, place in zip(kept, _numbered(parts), strict=True)]
    times = [each.gaps.double().exp().cumsum(1)[kept_] for each, kept_ in zip(parts, kept, strict=True)]
    kinds = torch.cat([each.kinds[kept_] for each, kept_ in zip(parts, kept, strict=True)])
    numbers = torch.cat([each.numbers[kept_] for each, kept_ in zip(parts, kept, strict=True)]).double()
    labels = torch.cat([each.labels for each in parts]).tolist()
    return EventTable(
        "process",
        tuple(f"sequence {place}" for place in range(len(labels))),
        torch.cat(entity).numpy(),
        torch.cat(times).numpy(),
        np.array([chr(ord("a") + each) for each in kinds.tolist()], dtype=object),
        ("level",),
        numbers[:, None].numpy(),
        tuple(("forwards", "backwards")[each] for each in labels),
    )


def _numbered(parts: list[Any]) -> list[Tensor]:
    sizes = [len(each.labels) for each in parts]
    return [torch.arange(size) + before for size, before in zip(sizes, (0, sizes[0]), strict=True)]


def _whole(table: EventTable) -> _Events:
    begins = np.diff(table.entity, prepend=-1) != 0
    gap = np.where(begins, np.nan, np.diff(table.time, prepend=0.0))
    return _Events(table.entity, table.time, gap, table.kind, table.numbers)


def _rows(events: _Events, chosen: Array) -> _Events:
    return _Events(*(each[chosen] for each in events))


@lru_cache(maxsize=4)
def _split(form: Form, split: str) -> _Events:
    """The events of a split: those of some entities, or of a stretch of time."""
    table = _table(form)
    events = _whole(table)
    if form.source == "process":
        first = table.time[np.diff(table.entity, prepend=-1) != 0]  # counted from the beginning of the observation
        begins = np.isnan(events.gap)
        events.gap[begins] = first
        return _rows(events, (table.entity < len(sequences("train").labels)) == (split == "train"))
    if form.divide == "time":
        border = np.quantile(table.time, 1 - form.held_out)
        return _rows(events, (table.time < border) == (split == "train"))
    held = _held_out(form, table)
    return _rows(events, np.isin(table.entity, held) == (split == "test"))


def _held_out(form: Form, table: EventTable) -> Array:
    """Of every class the entities whose names have the lowest hashes."""
    if len(table.names) < 2:
        raise UserError(
            f"data.root={form.root}: one entity, and a share of them is held out; name their column by data.entity, or "
            "hold out the end by data.divide=time"
        )
    labels = table.labels or ("",) * len(table.names)
    held, counts, taken = list[int](), Counter(labels), Counter[str]()
    order = sorted(range(len(table.names)), key=lambda place: hashlib.sha256(table.names[place].encode()).digest())
    for place in order:
        count = counts[labels[place]]
        if taken[labels[place]] < min(max(round(form.held_out * count), 1), count - 1):
            held.append(place)
            taken[labels[place]] += 1
    return np.array(held)


def _windows(form: Form, events: _Events) -> list[tuple[int, int, int]]:
    """(first event, number of events, entity) of windows of two events or more, one behind the other."""
    found, ends = list[tuple[int, int, int]](), np.flatnonzero(np.diff(events.entity, append=-1)) + 1
    start = 0
    for stop in ends.tolist():
        while start < stop:
            end = min(stop, start + form.events)
            if form.span is not None:
                end = min(end, start + int(np.searchsorted(events.time[start:end], events.time[start] + form.span)))
            end = max(end, start + 1)
            if end - start > 1:
                found.append((start, end - start, int(events.entity[start])))
            start = end
    return found


def _say_unknown(where: str, events: _Events, measures: Measures) -> None:
    known = set(measures.kinds)
    if unknown := [each for each in events.kind.tolist() if each not in known]:
        kinds = counted(unknown)
        say(f"{where}: {number_of(len(unknown), 'event')} of kinds that training has not, read as none: {kinds}")
