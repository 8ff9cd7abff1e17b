"""What a network in slices refuses; that it trains as a whole one does is in `test_distributed`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nepa_core.basics import UserError
from nepa_core.ema import Ema
from nepa_core.runtime.distributed import World
from nepa_core.runtime.sharded import Sharded, mesh_of
from nepa_core.runtime.strategies import held
from nepa_core.runtime.whole import Whole
from tests.tiny import CPU


def test_one_process_holds_the_network_whole_whatever_the_strategy() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    for strategy in ("ddp", "fsdp", "hsdp"):
        found = held(model, ema, World(0, 1, CPU), strategy)  # type: ignore[arg-type]
        assert type(found) is Whole
        assert found.begin() is model
        assert found.ema is ema


def test_a_single_number_can_not_be_cut() -> None:
    model = nn.Module()
    model.gain = nn.Parameter(torch.tensor(1.0))
    mesh: Any = None
    with pytest.raises(UserError, match=r"gain is a single number .* make it \[1\], or train.strategy=ddp"):
        Sharded(model, None, World(0, 2, CPU), mesh)


def test_machines_with_unequal_numbers_of_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "union", lambda self, names: ["1", "2"])
    with pytest.raises(UserError, match="as many processes on each machine, and they have 1 and 2"):
        mesh_of(World(0, 3, CPU, per_machine=2), across_machines=True)
