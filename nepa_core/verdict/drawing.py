"""Which held-out samples are judged: a seeded draw over the whole split, in groups of rivals that don't overlap.

Class folders come class by class and windows of a series overlap almost wholly, so the first samples of a split, or
its neighbours, say little about the rest.

Shapes: S samples of a split.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.tokens import Spans

RIVALS = 64
"""Next-token identification is a choice among this many samples, or as many as there are without overlap."""


class Drawn(NamedTuple):
    """A draw of samples, one entry each; a sample of overlapping windows may stand in several groups.

    Attributes:
        indices: in the data set. group: number of the rivals that a sample is identified among. cluster, chained: of
            `Spans`.
    """

    indices: Tensor
    group: Tensor
    cluster: Tensor
    chained: bool = False

    def at(self, places: Tensor | slice) -> Drawn:
        """Those entries alone."""
        return Drawn(self.indices[places], self.group[places], self.cluster[places], self.chained)


def spans_of(dataset: Dataset[Any]) -> Spans | None:
    """What the data set says of its samples by a method `spans()`, or None: they are independent."""
    return cast(Spans, dataset.spans()) if hasattr(dataset, "spans") else None


def draw(dataset: Dataset[Any], limit: int, seed: int) -> Drawn:
    """At most `limit` samples of a split, drawn at random over the whole of it.

    Samples that share no values, be they of one recording or not, are drawn once each and cut into groups of 64, the
    last as small as it is. Where they overlap, every group sweeps all tracks from a phase of its own and takes what has
    none of another's values; groups are of one size, 64 or as many as there is room for, and a sample may stand in
    several of them. Where there is no room for two, rivals overlap: see `apart`.
    """
    count = len(cast(Sized, dataset))
    generator = torch.Generator().manual_seed(seed)
    spans = spans_of(dataset)
    if spans is None:
        indices = torch.randperm(count, generator=generator)[:limit]
        return _of_one_kind(dataset, Drawn(indices, torch.arange(len(indices)) // RIVALS, indices))
    tracks = _tracks(spans)
    if all(bool((track.end[:-1] <= track.first[1:]).all()) for track in tracks):
        indices = torch.randperm(count, generator=generator)[:limit]
        return Drawn(indices, torch.arange(len(indices)) // RIVALS, spans.cluster[indices], spans.chained)
    length = int((spans.end - spans.first).max())
    most = min(limit, count)
    widest = _apart(tracks, 0)
    widest = widest if len(widest) > 1 else torch.arange(count)

    def group() -> Tensor:
        found = _apart(tracks, int(torch.randint(length, (), generator=generator)))
        found = found if len(found) > 1 else widest  # a phase may leave no room for the second
        return found[torch.randperm(len(found), generator=generator)][: min(RIVALS, most)]

    groups = [group()]
    groups += [group() for _ in range(most // len(groups[0]) - 1)]
    size = min(map(len, groups))
    indices = torch.cat([each[:size] for each in groups])
    drawn = Drawn(indices, torch.arange(len(indices)) // size, spans.cluster[indices], spans.chained)
    return _of_one_kind(dataset, drawn)


def _of_one_kind(dataset: Dataset[Any], drawn: Drawn) -> Drawn:
    """The draw with rivals of one kind alone, where samples are of several: see `strata` of `Modality.dataset`."""
    if not hasattr(dataset, "strata"):
        return drawn
    kinds, group = dataset.strata()[drawn.indices], torch.empty_like(drawn.group)
    first = 0
    for kind in kinds.unique():
        own = kinds == kind
        places = torch.arange(int(own.sum())) // RIVALS if spans_of(dataset) is None else drawn.group[own]
        names, number = places.unique(return_inverse=True)
        group[own] = first + number
        first += len(names)
    return drawn._replace(group=group)


def apart(dataset: Dataset[Any]) -> bool:
    """Whether two samples at least can be drawn that hold none of each other's values."""
    spans = spans_of(dataset)
    return spans is None or len(_apart(_tracks(spans), 0)) > 1


class _Track(NamedTuple):
    """The samples of a track by their starts: first and end [M], and their places in the data set [M]."""

    first: Tensor
    end: Tensor
    place: Tensor


def _tracks(spans: Spans) -> list[_Track]:
    order = spans.first.argsort(stable=True)
    order = order[spans.track[order].argsort(stable=True)]
    ends = (spans.track[order].diff() != 0).nonzero()[:, 0] + 1
    return [_Track(spans.first[some], spans.end[some], some) for some in order.tensor_split(ends)]


def _apart(tracks: list[_Track], phase: int) -> Tensor:
    """As many samples of each track as go one behind the other, from `phase` behind its beginning on."""
    kept: list[int] = []
    for first, end, places in tracks:
        place = int(torch.searchsorted(first, first[0] + phase))
        while place < len(first):
            kept.append(int(places[place]))
            place = int(torch.searchsorted(first, end[place]))
    return torch.tensor(kept, dtype=torch.int64)
