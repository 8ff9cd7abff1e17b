"""How one process, or one of several that share gradients, holds a network: whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nepa_core.ema import Ema
from nepa_core.runtime.distributed import World


class Whole:
    """The network as it is, in one process or in torch's DistributedDataParallel: every process holds all of it.

    Attributes:
        ema: the average that follows it, or None.
    """

    def __init__(self, model: nn.Module, ema: Ema | None, world: World) -> None:
        self.ema = ema
        self._model, self._world = model, world
        self._shared = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser and the average work on: the parameters by their names."""
        return self._model.named_parameters()

    def begin(self) -> nn.Module:
        """The network as a step calls it. What was restored is final from here on."""
        self._shared = self._world.wrap(self._model)
        return self._shared

    def micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: ranks exchange gradients with the last micro-batch of a step."""
        if not last and isinstance(self._shared, DistributedDataParallel):
            return cast(AbstractContextManager[None], self._shared.no_sync())
        return nullcontext()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together, the same on every rank."""
        return norm_here(gradients)

    def collect(self) -> None:
        """Bring the gradients to what `named_parameters` gives."""

    def state(self) -> dict[str, Tensor]:
        """The tensors of the network by name; in slices those that `gathered` brings together."""
        return self._model.state_dict()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor that is shaped as the parameter of this name."""
        return whole

    def gathered(self, name: str, part: Tensor) -> Tensor:
        """The way back of `part`, and a tensor of another name as it is; called on every rank."""
        return part

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the network and the average that were given hold their values; entered on every rank."""
        return nullcontext()

    def end(self) -> None:
        """The network and the average that were given hold their values from here on; called on every rank."""


def norm_here(gradients: list[Tensor]) -> Tensor:
    """The norm of all these tensors together."""
    return nn.utils.get_total_norm(gradients, foreach=True)
