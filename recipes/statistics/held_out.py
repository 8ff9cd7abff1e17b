"""Which held-out samples are read, and which of them depend on each other.

Shapes: S samples.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nepa_core.basics import Batch
from nepa_core.modality import Modality
from nepa_core.runtime.data import plain_batches
from nepa_core.verdict.drawing import spans_of

NUMBER = "number of the sample"
"""The key under which a batch of `Numbered` says which samples it holds, int64 [B]."""

DRAW_SEED = 0
"""Of every draw of held-out samples, so that all runs of a comparison are read on the same ones."""


def draw_seed(dataset: Dataset[Any], limit: int) -> int | None:
    """The `seed` of `plain_batches` for at most `limit` samples: a fixed draw, or None where all are read, in order.

    The first samples of class folders are of a few classes only, and the first windows of a series lie side by side.
    """
    return DRAW_SEED if len(cast(Sized, dataset)) > limit else None


def drawn_batches(data: Modality, most: int, device: torch.device, *, at_once: int) -> Iterator[Batch]:
    """At most so many held-out samples of an adapter without augmentation, by that draw."""
    held_out = data.samples_of("test")
    seed, size = draw_seed(held_out, most), min(most, at_once)
    return plain_batches(held_out, batch=size, device=device, limit=most, seed=seed, tokenize=data.tokenize)


class Numbered(Dataset[Batch]):
    """The same samples with their number in the data set under `NUMBER`: samples that can't be read leave gaps."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> Batch:
        return self.dataset[index] | {NUMBER: torch.as_tensor(index)}

    def name(self, index: int) -> str:
        """What a message calls that sample."""
        name = getattr(self.dataset, "name", None)
        return f"sample {index}" if name is None else str(name(index))

    def __getitems__(self, indices: list[int]) -> Batch:
        whole = getattr(self.dataset, "__getitems__", None)
        batch = [self.dataset[index] for index in indices] if whole is None else whole(indices)
        return {**(default_collate(batch) if isinstance(batch, list) else batch), NUMBER: torch.tensor(indices)}


def clusters_of(dataset: Dataset[Any], numbers: Tensor) -> Tensor:
    """The cluster of samples, int64 [S] by their numbers [S]: equal where they depend on each other.

    Windows of one stretch of a series and frames of one clip, as `nepa_core.verdict.drawing.spans_of` says; else every
    sample is its own, and several entries of one sample (its tokens) are one cluster.
    """
    spans = spans_of(dataset)
    return numbers.long() if spans is None else spans.cluster[numbers.long()]


def is_chained(dataset: Dataset[Any]) -> bool:
    """Whether clusters are stretches of a series, so that samples of neighbours overlap, too; see `Spans`."""
    spans = spans_of(dataset)
    return spans is not None and spans.chained


def views_of(dataset: Dataset[Any]) -> Tensor | None:
    """The cluster of every sample, int64 [S], where samples of one are views of one thing; else None; see `Spans`."""
    spans = spans_of(dataset)
    return spans.cluster if spans is not None and spans.views else None


class Clusters(NamedTuple):
    """Cluster of each sample, int64 [S], or None where each is its own; chained: see `is_chained`."""

    of: Tensor | None
    chained: bool = False


def pack_clusters(clusters: Tensor, *, chained: bool = False) -> str | None:
    """Clusters int64 [S] as base64 of little-endian uint32, numbered in their order; None where each is its own.

    Chained ones have "chained " before it.
    """
    number = clusters.unique(return_inverse=True)[1]
    if int(number.max()) + 1 == len(number) and not chained:
        return None
    packed = base64.b64encode(number.numpy().astype("<u4").tobytes()).decode("ascii")
    return f"{_CHAINED if chained else ''}{packed}"


def unpack_clusters(packed: str | None) -> Clusters:
    """What `pack_clusters` was given, numbered from 0; None where each sample is its own."""
    if packed is None:
        return Clusters(None)
    raw = base64.b64decode(packed.removeprefix(_CHAINED))
    of = torch.from_numpy(np.frombuffer(raw, "<u4").astype(np.int64))
    return Clusters(of, packed.startswith(_CHAINED))


_CHAINED = "chained "
