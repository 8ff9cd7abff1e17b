"""The data order, the random numbers in it, and samples that can't be read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.contract import check_modality
from nepa_core.runtime import data
from nepa_core.runtime.data import DrawSampler, TrainingBatches, fold_seed, plain_batches
from tests.tiny import CPU, Waves

SAMPLES, BATCH = 20, 8  # two steps an epoch, four samples of it left over


def sampler(**changes: int) -> DrawSampler:
    settings = {"batch": BATCH, "accumulate": 1, "rank": 0, "ranks": 1, "seed": 3, "start": 0, "stop": 6}
    return DrawSampler(SAMPLES, **{**settings, **changes})


def batches(data: Waves, *, workers: int = 0, max_unreadable: float = 1.0, **changes: int) -> TrainingBatches:
    draws = DrawSampler(
        data.samples,
        **{"batch": BATCH, "accumulate": 1, "rank": 0, "ranks": 1, "seed": 3, "start": 0, "stop": 6, **changes},
    )
    return TrainingBatches(data.dataset("train"), draws, workers=workers, max_unreadable=max_unreadable, device=CPU)


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("data", [Waves(), Waves(ragged=True, jitter=0.1, unreadable=(1,))])
def test_the_tiny_data_keeps_the_adapter_contract(data: Waves) -> None:
    check_modality(data)


# ------------------------------------------------------------------------------------------------- order


def test_the_order_from_any_step_on_is_the_tail_of_the_whole_order() -> None:
    whole = list(sampler())
    for start in range(7):
        assert list(sampler(start=start)) == whole[start:]
        assert len(sampler(start=start)) == 6 - start


def test_an_epoch_visits_each_sample_at_most_once_and_epochs_differ() -> None:
    steps = [draw.indices for draw in sampler()]
    epochs = [steps[i] + steps[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 2 * BATCH for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set().union(*epochs) == set(range(SAMPLES)), "what one epoch leaves over comes in another"


def test_another_seed_gives_another_order() -> None:
    assert [draw.indices for draw in sampler()] != [draw.indices for draw in sampler(seed=4)]


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_partition_the_global_batch(ranks: int, accumulate: int) -> None:
    whole = [draw.indices for draw in sampler()]
    draws = [list(sampler(rank=rank, ranks=ranks, accumulate=accumulate)) for rank in range(ranks)]
    for step, expected in enumerate(whole):
        parts = [draws[rank][step * accumulate + part].indices for part in range(accumulate) for rank in range(ranks)]
        assert {len(part) for part in parts} == {BATCH // ranks // accumulate}
        assert list(itertools.chain(*parts)) == expected


def test_every_draw_has_a_seed_of_its_own() -> None:
    seeds = [draw.seed for rank in range(2) for draw in sampler(rank=rank, ranks=2, accumulate=2)]
    assert len(set(seeds)) == len(seeds) == 24


def test_folded_seeds_depend_on_every_part_and_fit_torch() -> None:
    parts: list[tuple[Any, ...]] = [(0, "data", 1), (0, "data", 2), (0, "step", 1), (1, "data", 1), (0, "data", 1, 0)]
    seeds = [fold_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert fold_seed(0, "data", 1) == 6769683688136725807, "stored runs rely on it"
    torch.manual_seed(max(seeds))


# ---------------------------------------------------------------------------------------------- randomness


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    data = Waves(jitter=1.0)
    whole = list(batches(data))
    torch.manual_seed(99)
    torch.randn(5)
    tail = list(batches(data, start=3))
    assert all(map(same, whole[3:], tail))
    assert not torch.equal(*_noise(data, whole[0], whole[1]))


def _noise(data: Waves, *found: Batch) -> list[Tensor]:
    clean = data.plain().dataset("train")
    return [batch["values"] - torch.stack([clean[i]["values"] for i in batch["index"]]) for batch in found]


def test_workers_give_the_batches_of_the_main_process() -> None:
    data = Waves(jitter=1.0, unreadable=(0, 7))
    alone, helped = batches(data, start=1), batches(data, start=1, workers=2)
    assert all(map(same, list(alone), list(helped)))
    assert alone.unreadable == helped.unreadable != set()


def test_loading_does_not_depend_on_what_was_drawn_between_batches() -> None:
    data = Waves(jitter=1.0)
    quiet = list(batches(data))
    for batch, expected in zip(batches(data), quiet, strict=True):
        torch.randn(17)
        assert same(batch, expected)


def test_loading_leaves_the_random_numbers_of_who_asks() -> None:
    data = Waves(jitter=1.0)
    for loaded in (batches(data), plain_batches(data.dataset("train"), batch=3, device=CPU)):
        torch.manual_seed(99)
        drawn = torch.stack([torch.rand(()) for _ in loaded])
        torch.manual_seed(99)
        assert torch.equal(drawn, torch.stack([torch.rand(()) for _ in drawn]))


# ------------------------------------------------------------------------------------------------ unreadable


def test_an_unreadable_sample_is_replaced_by_its_neighbour_and_counted_once() -> None:
    data = Waves(samples=16, unreadable=(4, 5, 15))
    expected = [[{4: 6, 5: 6, 15: 0}.get(i, i) for i in draw.indices] for draw in DrawSampler(
        16, batch=BATCH, accumulate=1, rank=0, ranks=1, seed=3, start=0, stop=6
    )]  # fmt: skip
    stream = batches(data)
    assert [batch["index"].tolist() for batch in stream] == expected
    assert stream.unreadable == {"sample 4: torn", "sample 5: torn", "sample 15: torn"}


def test_more_unreadable_samples_than_allowed_stop_the_run_with_the_key_and_a_file() -> None:
    data = Waves(samples=16, unreadable=(4, 5))
    with pytest.raises(UserError, match=r"^at least 2 unreadable samples .*train.max_unreadable=0.1 .*sample 4: torn"):
        list(batches(data, max_unreadable=0.1))
    assert len(list(batches(data, max_unreadable=0.125))) == 6, "two of sixteen are an eighth"


def test_more_workers_than_cores_are_not_started_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def loader(dataset: Any, *, num_workers: int, **settings: Any) -> DataLoader[Batch]:
        started.append(num_workers)
        return DataLoader(dataset, num_workers=0, **settings)

    monkeypatch.setattr(data, "DataLoader", loader)
    monkeypatch.setattr(data, "cores", lambda: 2)
    waves = Waves(jitter=0.2)
    expected = list(batches(waves))
    for workers, used in ((1, 1), (2, 2), (64, 2)):
        assert all(map(same, batches(waves, workers=workers), expected))
        list(plain_batches(waves.dataset("test"), batch=8, device=CPU, workers=workers))
        assert started[-2:] == [used, used]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_without_one_readable_sample_is_one_line(workers: int) -> None:
    data = Waves(samples=8, unreadable=tuple(range(8)))
    with pytest.raises(UserError, match=r"^no sample can be read; the first: sample \d: torn$"):
        list(batches(data, workers=workers))


class WholeBatches(torch.utils.data.Dataset[Batch]):
    """Gives whole batches, and refuses those that hold sample 2."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Batch:
        if index == 2:
            raise UnreadableSample("sample 2: torn")
        return {"index": torch.tensor(index), "whole": torch.tensor(False)}

    def __getitems__(self, indices: list[int]) -> Batch:
        if 2 in indices:
            raise UnreadableSample("sample 2: torn")
        return {"index": torch.tensor(indices), "whole": torch.ones(len(indices), dtype=torch.bool)}


def test_whole_batches_are_used_where_they_can_be_read() -> None:
    found = list(plain_batches(WholeBatches(), batch=2, device=CPU))
    assert [batch["index"].tolist() for batch in found] == [[0, 1], [3], [4, 5]]
    assert [batch["whole"].all().item() for batch in found] == [True, False, True]


def test_plain_batches_hold_every_readable_sample_once_in_order() -> None:
    data = Waves(samples=11, unreadable=(0, 7, 8, 9))
    found = list(plain_batches(data.dataset("test"), batch=3, device=CPU))
    assert [batch["index"].tolist() for batch in found] == [[1, 2], [3, 4, 5], [6], [10]]
    assert all(set(batch) == {"values", "length", "label", "index"} for batch in found)


def test_a_batch_of_unreadable_samples_is_left_out() -> None:
    found = list(plain_batches(Waves(samples=6, unreadable=(2, 3)).dataset("test"), batch=2, device=CPU))
    assert [batch["index"].tolist() for batch in found] == [[0, 1], [4, 5]]


def test_held_out_samples_left_out_are_named_and_too_many_are_an_error() -> None:
    data = Waves(samples=10, unreadable=(2, 7)).dataset("test")
    named: set[str] = set()
    assert len(_indices(plain_batches(data, batch=4, device=CPU, unreadable=named, max_unreadable=0.2))) == 8
    assert named == {"sample 2: torn", "sample 7: torn"}
    with pytest.raises(UserError, match=r"2 unreadable held-out samples of 10: .*train.max_unreadable=0.1 .*sample 2"):
        _indices(plain_batches(data, batch=4, device=CPU, max_unreadable=0.1))


def test_a_limit_takes_the_first_samples_or_a_random_choice() -> None:
    data = Waves(samples=20).dataset("test")
    first = _indices(plain_batches(data, batch=4, device=CPU, limit=6))
    chosen = _indices(plain_batches(data, batch=4, device=CPU, limit=6, seed=0))
    assert first == list(range(6))
    assert len(set(chosen)) == 6
    assert chosen != first
    assert chosen == _indices(plain_batches(data, batch=5, device=CPU, limit=6, seed=0)), "whatever the batch"


def _indices(stream: Any) -> list[int]:
    return [index for batch in stream for index in batch["index"].tolist()]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_batches_of_one_process(ranks: int) -> None:
    data = Waves(samples=11, unreadable=(0,)).dataset("test")
    alone = [batch["index"].tolist() for batch in plain_batches(data, batch=3, device=CPU)]
    shares = [list(plain_batches(data, batch=3, device=CPU, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for rank, share in enumerate(shares):
        assert [batch["index"].tolist() for batch in share] == alone[rank::ranks]


def test_nothing_to_evaluate_on_is_an_error() -> None:
    data = Waves(samples=3, unreadable=(0, 1, 2)).dataset("test")
    with pytest.raises(UserError, match="no held-out sample can be read: sample 0: torn"):
        list(plain_batches(data, batch=2, device=CPU))
