"""Some samples of a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch
from nepa_core.tokens import Spans


def some_rows(count: int, limit: int | None) -> Tensor:
    """The rows to use, int64: all in turn, or the head of a fixed permutation (folders are sorted by class)."""
    if limit is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


class Some(Dataset[Batch]):
    """Chosen samples of a data set, which keep their names and what else the set offers of `Modality.dataset`.

    Its `fingerprint` and `contents` are those of the whole set, so that data that changed or leaks is found as there.

    Args:
        indices: of the samples, in the order wanted.
        kinds: the class of each, where it is known.
    """

    def __init__(self, whole: Dataset[Batch], indices: Sequence[int], kinds: Sequence[int] = ()) -> None:
        self.whole, self.indices, self.kinds = whole, list(indices), list(kinds)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.whole[self.indices[index]]

    def name(self, index: int) -> str:
        """What a message calls that sample."""
        row = self.indices[index]
        own: Callable[[int], str] | None = getattr(self.whole, "name", None)
        return f"sample {row}" if own is None else str(own(row))

    def fingerprint(self) -> str:
        """Of the whole set, or its length."""
        own: Callable[[], str] | None = getattr(self.whole, "fingerprint", None)
        return f"{len(cast(Sized, self.whole))} samples" if own is None else own()

    def __getattr__(self, name: str) -> Any:
        """The optional methods that a caller looks for: there where the whole set has them."""
        if name == "contents":
            return self.whole.contents  # type: ignore[attr-defined]
        if name in ("strata", "every_label"):
            of_all = getattr(self.whole, name)
            return lambda: None if (all_ := of_all()) is None else all_[torch.tensor(self.indices, dtype=torch.int64)]
        if name in ("__getitems__", "raw", "decoded", "spans"):
            return functools.partial(self._of_chosen, getattr(self.whole, name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _of_chosen(self, method: Callable[..., Any], rows: int | Sequence[int] | None = None) -> Any:
        if rows is None:
            spans: Spans = method()
            cluster, track, first, end = (each[self.indices] for each in spans[:4])
            return Spans(cluster, track, first, end, spans.chained, spans.views)
        return method(self.indices[rows] if isinstance(rows, int) else [self.indices[row] for row in rows])
