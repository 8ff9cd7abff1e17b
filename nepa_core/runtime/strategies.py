"""Where the weights of a network lie while several processes train it: `whole` on each, or in slices (`sharded`)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from nepa_core.ema import Ema
from nepa_core.runtime.distributed import World
from nepa_core.runtime.whole import Whole

Strategy = Literal["ddp", "fsdp", "hsdp"]


def held(model: nn.Module, ema: Ema | None, world: World, strategy: Strategy) -> Whole:
    """How the processes hold a network; one alone holds it whole, whatever the strategy.

    Raises:
        UserError: the network or the machines don't fit the strategy.
    """
    if world.size == 1 or strategy == "ddp":
        return Whole(model, ema, world)
    from nepa_core.runtime.sharded import Sharded, mesh_of  # half a second to import, for this alone

    return Sharded(model, ema, world, mesh_of(world, across_machines=strategy == "hsdp"))
