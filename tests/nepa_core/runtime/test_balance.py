"""train.sampling=balanced: the weights of samples, and draws that are the same after a stop and over ranks."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.runtime.balance import balanced_weights
from nepa_core.runtime.data import DrawSampler, TrainingBatches, drawn_order
from nepa_core.samples import Some

CLASSES = torch.tensor([0] * 90 + [1] * 9 + [2])
SEVERAL = torch.tensor([[1, 0, 0]] * 6 + [[1, 1, 0]] * 3 + [[0, 0, 0]]).bool()


class Labelled(Dataset[Batch]):
    def __init__(self, label: torch.Tensor | None, broken: int | None = None) -> None:
        self.label, self.broken = label, broken

    def __len__(self) -> int:
        return 4 if self.label is None else len(self.label)

    def __getitem__(self, index: int) -> Batch:
        if index == self.broken:
            raise UnreadableSample(f"sample {index}")
        return {"values": torch.zeros(3, 1)} | ({} if self.label is None else {"label": self.label[index]})


class Told(Labelled):
    def __getitem__(self, index: int) -> Batch:
        raise AssertionError("no sample is read")

    def every_label(self) -> torch.Tensor | None:
        return self.label


@pytest.mark.parametrize("kind", [Labelled, Told])
def test_a_sample_weighs_1_over_its_class_and_the_sum_of_that_over_several(kind: type[Labelled]) -> None:
    each = balanced_weights(kind(CLASSES))
    assert each[[0, 95, 99]].tolist() == pytest.approx([1 / 90, 1 / 9, 1])
    several = balanced_weights(kind(SEVERAL))
    assert several.tolist() == pytest.approx([1 / 9] * 6 + [1 / 9 + 1 / 3] * 3 + [0])
    none = balanced_weights(kind(torch.tensor([0, -1, 0, 1])))
    assert none.tolist() == [0.5, 0, 0.5, 1]
    some = balanced_weights(Some(kind(CLASSES), [99, 0, 1]))
    assert some.tolist() == [1, 0.5, 0.5]


def test_what_cannot_be_read_is_not_drawn() -> None:
    assert balanced_weights(Labelled(torch.tensor([1, 0, 1, 1]), broken=2)).tolist() == [0.5, 1, 0, 0.5]
    assert balanced_weights(Labelled(SEVERAL, broken=9))[9] == 0


def test_a_sample_of_no_weight_replaces_none() -> None:
    labels = torch.tensor([0, 1, -1, -1, 0])

    class Numbered(Told):
        def __getitem__(self, index: int) -> Batch:
            if index == 1:
                raise UnreadableSample("sample 1")
            return {"values": torch.full((3, 1), float(index))}

    data = Numbered(labels)
    weights = balanced_weights(data)
    sampler = DrawSampler(5, batch=5, accumulate=1, rank=0, ranks=1, seed=0, start=0, stop=20, weights=weights)
    batches = TrainingBatches(data, sampler, workers=0, max_unreadable=1.0, device=torch.device("cpu"))
    read = torch.cat([batch["values"][:, 0, 0] for batch in batches]).int()
    assert set(read.tolist()) == {0, 4}
    assert batches.unreadable == {"sample 1"}


class Kinds(Labelled):
    def strata(self) -> torch.Tensor:
        return CLASSES


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (Labelled(None), "these have no labels"),
        (Told(None), "these have no labels"),
        (Labelled(torch.rand(4)), "these have other labels"),
        (Labelled(torch.rand(4, 2)), "these have other labels"),
        (Labelled(torch.zeros(4, 2, dtype=torch.int64)), "these have other labels"),
        (Labelled(torch.tensor([-1, -1])), "no training sample has one"),
        (Labelled(torch.zeros(4, 3, dtype=torch.bool)), "no training sample has one"),
        (Kinds(CLASSES), "these are of several kinds"),
    ],
)
def test_without_classes_there_is_nothing_to_balance(samples: Labelled, said: str) -> None:
    with pytest.raises(UserError, match=f"train.sampling=balanced is for samples with classes; leave it out: {said}"):
        balanced_weights(samples)


def sampler(**changes: Any) -> DrawSampler:
    given = {"batch": 20, "accumulate": 1, "rank": 0, "ranks": 1, "seed": 3, "start": 0, "stop": 200}
    return DrawSampler(100, **cast(Any, {**given, **changes}), weights=balanced_weights(Labelled(CLASSES)))


def test_rare_classes_come_as_often_as_common_ones_and_samples_of_one_alike() -> None:
    drawn = torch.tensor([index for draw in sampler() for index in draw.indices])
    share = CLASSES[drawn].bincount() / len(drawn)
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    each = drawn.bincount(minlength=100)[:90].double()
    assert 0.2 * each.mean() < each.min() < each.max() < 2 * each.mean()
    weights = torch.tensor([0.0, 1, 0, 1, 0], dtype=torch.float64)
    assert {i for epoch in range(200) for i in drawn_order(weights, 0, epoch).tolist()} == {1, 3}


def test_draws_go_on_and_are_shared_out_as_those_of_one_process() -> None:
    whole = list(sampler())
    assert list(sampler(start=7)) == whole[7:]
    assert [draw.indices for draw in sampler(seed=4)] != [draw.indices for draw in whole]
    parts = [list(sampler(rank=rank, ranks=2, accumulate=2)) for rank in range(2)]
    for step, draw in enumerate(whole):
        own = [parts[rank][2 * step + part].indices for part in range(2) for rank in range(2)]
        assert [index for each in own for index in each] == draw.indices
