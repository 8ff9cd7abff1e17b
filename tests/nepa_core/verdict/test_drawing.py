"""Which held-out samples are judged, and who is a rival of whom."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.tokens import Spans
from nepa_core.verdict.drawing import RIVALS, apart, draw
from recipes import vision
from recipes.training.judging import verdict_of
from recipes.training.pretraining import load_pretrained, pretrain


class Windows:
    """Windows of `length` rows at every row of `tracks` series of `rows` rows."""

    def __init__(self, rows: int, length: int, tracks: int = 1) -> None:
        first = torch.arange(rows - length + 1).repeat(tracks)
        self.track = torch.arange(tracks).repeat_interleave(rows - length + 1)
        self.first, self.length = first, length

    def __len__(self) -> int:
        return len(self.first)

    def spans(self) -> Spans:
        return Spans(self.first // self.length, self.track, self.first, self.first + self.length, chained=True)


def test_samples_of_class_folders_are_drawn_over_all_of_them() -> None:
    """The first 256 of 20 classes of 100 would be of 3 classes."""
    drawn = draw(range(2000), 256, seed=0)
    assert len(drawn.indices.unique()) == 256
    assert len((drawn.indices // 100).unique()) == 20
    assert drawn.group.tolist() == [i // RIVALS for i in range(256)]
    assert (drawn.cluster.unique(return_counts=True)[1] == 1).all()  # independent


def test_a_draw_is_a_function_of_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = draw(range(500), 100, seed=3)
    torch.manual_seed(2)
    assert torch.equal(one.indices, draw(range(500), 100, seed=3).indices)
    assert not torch.equal(one.indices, draw(range(500), 100, seed=4).indices)


def test_rivals_stay_apart_where_two_windows_just_fit() -> None:
    """Most phases leave room for one alone."""
    windows = Windows(rows=200, length=96)
    drawn = draw(windows, 64, seed=0)
    assert apart(windows)
    assert len(drawn.indices) == 64
    first = windows.first[drawn.indices].view(-1, 2)
    assert (first.diff().abs() >= 96).all()


@pytest.mark.parametrize("tracks", [1, 7])
def test_rivals_hold_none_of_each_others_values(tracks: int) -> None:
    windows = Windows(rows=2880, length=96, tracks=tracks)
    drawn = draw(windows, 2000, seed=0)
    room = tracks * 29  # of 30 windows end to end the phase takes one
    sizes = drawn.group.unique(return_counts=True)[1]
    assert (sizes == min(RIVALS, room)).all()
    assert 2000 - sizes[0] < len(drawn.indices) <= 2000
    for name in drawn.group.unique().tolist():
        rows = drawn.indices[drawn.group == name]
        for track in range(tracks):
            starts = windows.first[rows[windows.track[rows] == track]].sort().values
            assert (starts.diff() >= 96).all()
    assert 29 <= len(drawn.cluster.unique()) <= 30  # of all channels together
    phases = {int(windows.first[i]) % 96 for i in drawn.indices.tolist()}
    assert len(phases) > 20  # every group has its own


def test_where_two_do_not_fit_rivals_overlap_and_it_is_said() -> None:
    windows = Windows(rows=150, length=96)
    assert not apart(windows)
    drawn = draw(windows, 32, seed=0)
    assert len(drawn.indices) == 32
    assert apart(Windows(rows=2880, length=96))
    assert apart(range(3))


@pytest.mark.slow
def test_the_verdicts_of_three_draws_agree_within_their_intervals(tmp_path: Path) -> None:
    """Of one trained network, each on 256 of the 500 held-out digits."""
    config = override(vision.digits(), {"verdict.test_samples": 256, "train.evaluate": 800})
    pretrain(config, Run(tmp_path), World(0, 1, torch.device("cpu")), show=False)
    config, model = load_pretrained(Run(tmp_path), torch.device("cpu"))
    margins = []
    for seed in range(3):
        verdict = verdict_of(override(config, {"verdict.draw": seed}), model, torch.device("cpu"))[0].verdict
        assert verdict.beats_linear
        margins.append(verdict.linear)
    assert len({margin.mean for margin in margins}) == 3  # other samples
    for one, other in combinations(margins, 2):
        assert one.half is not None
        assert other.half is not None
        assert abs(one.mean - other.mean) < math.hypot(one.half, other.half)


def test_samples_that_share_no_values_are_drawn_once_each_whatever_they_are_of() -> None:
    """Also the first and only ones of their recordings; intervals still count by recordings."""

    class Cut(list[int]):
        def spans(self) -> Spans:
            document = torch.arange(200) // 3
            first = torch.arange(200) * 8
            return Spans(document, document, first, first + 8)

    drawn = draw(Cut(range(200)), 1000, 0)
    assert sorted(drawn.indices.tolist()) == list(range(200))
    assert drawn.group.bincount().tolist() == [64, 64, 64, 8]
    assert torch.equal(drawn.cluster, drawn.indices // 3)
