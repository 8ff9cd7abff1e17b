"""Draws of held-out samples, their numbers, and which of them depend on each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from nepa_core.basics import Batch
from nepa_core.drawing import Spans
from nepa_core.runtime.data import plain_batches
from recipes.held_out import NUMBER, Numbered, clusters_of, draw_seed, pack_clusters, unpack_clusters
from tests.tiny import CPU, Waves


class Together(Dataset[Batch]):
    """Whole batches at once, of four windows each of three series."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Batch:
        return {"x": torch.tensor(index)}

    def __getitems__(self, indices: list[int]) -> Batch:
        return {"x": torch.tensor(indices)}

    def spans(self) -> Spans:
        first = torch.arange(12) % 4
        return Spans(torch.arange(12) // 4, torch.arange(12) // 4, first, first + 2)


def test_a_split_is_drawn_from_only_where_it_has_more_samples() -> None:
    assert draw_seed(Together(), 12) is None
    assert draw_seed(Together(), 11) == 0


@pytest.mark.parametrize("seed", [None, 0])
def test_every_sample_brings_its_number_and_torn_ones_leave_gaps(seed: int | None) -> None:
    torn = Waves(samples=20, unreadable=(4, 7)).dataset("test")
    for dataset, key, left in ((torn, "index", 18), (Together(), "x", 12)):
        batches = list(plain_batches(Numbered(dataset), batch=5, device=CPU, seed=seed))
        numbers = torch.cat([batch[NUMBER] for batch in batches])
        assert torch.equal(numbers, torch.cat([batch[key] for batch in batches]))
        assert len(numbers) == left


def test_samples_are_their_own_cluster_unless_the_data_say_otherwise() -> None:
    numbers = torch.tensor([9, 2, 9, 3])
    assert clusters_of(Waves().dataset("test"), numbers).tolist() == [9, 2, 9, 3]
    assert clusters_of(Together(), numbers).tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize(("clusters", "expected"), [([5, 3, 9], None), ([7, 2, 7, 2, 5], [2, 0, 2, 0, 1])])
def test_clusters_come_back_unless_each_sample_is_its_own(clusters: list[int], expected: Any) -> None:
    read = unpack_clusters(pack_clusters(torch.tensor(clusters)))
    assert (None if read is None else read.tolist()) == expected
