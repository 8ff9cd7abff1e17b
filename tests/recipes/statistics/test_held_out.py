"""Draws of held-out samples, their numbers, and which of them depend on each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from nepa_core.basics import Batch
from nepa_core.runtime.data import epoch_order, plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.tokens import Spans
from recipes.comparison import downstream, measures, orders
from recipes.statistics.held_out import NUMBER, Numbered, clusters_of, draw_seed, pack_clusters, unpack_clusters
from recipes.training import bench
from recipes.training.starting import build_model
from tests import tiny
from tests.tiny import CPU, Series, Waves


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
    assert (None if read.of is None else read.of.tolist()) == expected
    assert not read.chained
    chain = unpack_clusters(pack_clusters(torch.tensor(clusters), chained=True))
    assert chain.chained
    assert chain.of is not None, "neighbours overlap though each is its own"


@pytest.mark.parametrize("measure", ["attention", "ranks", "order", "batch"])
def test_what_is_measured_of_some_samples_is_of_drawn_ones(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and the order of `nepa orders`, ranks of forecasts, the batch of `nepa bench`: not of the first few."""
    config, read = tiny.recipe(), list[int]()
    model, sample = build_model(config).eval(), Series.__getitem__

    def noting(self: Series, index: int) -> Batch:
        read.append(index)
        return sample(self, index)

    monkeypatch.setattr(Series, "__getitem__", noting)
    monkeypatch.setattr(orders, "_ORDER_SAMPLES", 5)
    monkeypatch.setattr(downstream, "PROBE", downstream.PROBE.model_copy(update={"test_samples": 5}))
    {
        "attention": lambda: measures.attention_by_layer(config, model, CPU, 5),
        "ranks": lambda: downstream.layer_ranks(config, model),
        "order": lambda: orders.measured_order(config, CPU),
        "batch": lambda: bench.one_batch(config, World(0, 1, CPU), 5),
    }[measure]()
    assert read[-5:] == epoch_order(48, 0, 0)[:5].tolist() != list(range(5))
