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

RIVALS = 64
"""Next-token identification is a choice among this many samples, or as many as there are without overlap."""


class Spans(NamedTuple):
    """Where samples come from, of a data set that cuts several from one recording (`Modality.dataset`).

    Attributes:
        cluster: [S] int64, equal for samples that depend on each other, such as those of one clip or of one stretch
            of a series: intervals are made from the spread between clusters.
        track: [S] int64. first, end: [S] int64. Samples of one track overlap where their [first, end) do.
    """

    cluster: Tensor
    track: Tensor
    first: Tensor
    end: Tensor


class Drawn(NamedTuple):
    """A draw of samples, one entry each; a sample of overlapping windows may stand in several groups.

    Attributes:
        indices: in the data set. group: number of the rivals that a sample is identified among. cluster: of `Spans`.
    """

    indices: Tensor
    group: Tensor
    cluster: Tensor

    def at(self, places: Tensor) -> Drawn:
        """Those entries alone."""
        return Drawn(self.indices[places], self.group[places], self.cluster[places])


def spans_of(dataset: Dataset[Any]) -> Spans | None:
    """What the data set says of its samples by a method `spans()`, or None: they are independent."""
    return cast(Spans, dataset.spans()) if hasattr(dataset, "spans") else None


def draw(dataset: Dataset[Any], limit: int, seed: int) -> Drawn:
    """At most `limit` samples of a split, drawn at random, each once where they don't overlap.

    Independent samples are shuffled and cut into groups of 64, the last as small as it is. Where they overlap, every
    group starts at a place of its own and takes samples with none of another's values, each at the first place that
    is free; all groups are of one size, 64 where the split has room for as many, and at least 2.
    """
    count = len(cast(Sized, dataset))
    generator = torch.Generator().manual_seed(seed)
    spans = spans_of(dataset)
    if spans is None:
        indices = torch.randperm(count, generator=generator)[:limit]
        return Drawn(indices, torch.arange(len(indices)) // RIVALS, indices)
    size = min(RIVALS, limit, max(2, *(len(_apart(spans, at)) for at in range(0, count, max(1, count // 8)))))
    groups = []
    for _ in range(max(1, min(limit, count) // size)):
        found = _apart(spans, int(torch.randint(count, (), generator=generator)))
        shuffled = found[torch.randperm(len(found), generator=generator)]
        if len(found) < 2:  # no two are apart: rivals overlap
            shuffled = torch.randperm(count, generator=generator)
        groups.append(shuffled[:size])
    indices = torch.cat(groups)
    number = torch.cat([torch.full((len(group),), i) for i, group in enumerate(groups)])
    return Drawn(indices, number, spans.cluster[indices])


def overlap_free(dataset: Dataset[Any]) -> bool:
    """Whether at least two samples can be drawn that hold none of each other's values."""
    spans = spans_of(dataset)
    return spans is None or len(_apart(spans, 0)) > 1


def _apart(spans: Spans, start: int) -> Tensor:
    """As many samples as go without overlap when the tracks are swept from a phase that sample `start` sets."""
    first, end = spans.first, spans.end
    order = torch.argsort(first, stable=True)
    order = order[torch.argsort(spans.track[order], stable=True)]
    phase = int(first[start])
    length = int((end - first).max())
    kept: list[int] = []
    track, free = None, 0
    # a phase within one length: sweeping from `phase` modulo the length uses the whole track
    begin = {int(t): int(first[spans.track == t].min()) for t in spans.track.unique()}
    for index in order.tolist():
        if spans.track[index] != track:
            track = spans.track[index]
            low = begin[int(track)]
            free = low + (phase - low) % length
        if first[index] >= free:
            kept.append(index)
            free = int(end[index])
    return torch.tensor(kept)
