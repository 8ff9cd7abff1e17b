"""Exponential moving average of the parameters, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from nepa_core.basics import HasParameters


class Ema:
    """A float32 copy of a model's parameters that follows them: average += (1 - decay) * (value - average).

    It starts from the parameters after the first update, as in the released scripts, not from those at the start.

    Attributes:
        averages: parameter name -> float32 tensor on the parameter's device. This is all that has to be stored.
        follows: False until the first update, which takes the parameters as they are.
    """

    def __init__(self, model: HasParameters, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.averages: dict[str, Tensor] = {
            name: value.detach().float().clone() for name, value in self._parameters.items()
        }
        self.follows = False

    @torch.no_grad()
    def update(self) -> None:
        """One step, as one fused update over all parameters. Call it after the optimiser."""
        values = [value.float() for value in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), values, 1 - self.decay if self.follows else 1.0)
        self.follows = True

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from averages that were stored, by parameter name."""
        for name, value in averages.items():
            self.averages[name].copy_(value)
        self.follows = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model computes with the averages; afterwards with its own values again."""
        own = {name: value.data for name, value in self._parameters.items()}
        try:
            for name, value in self._parameters.items():
                value.data = self.averages[name].to(value.dtype)
            yield
        finally:
            for name, value in self._parameters.items():
                value.data = own[name]


def applied(ema: Ema | None) -> AbstractContextManager[None]:
    """`ema.applied()`, or nothing where no average is kept."""
    return nullcontext() if ema is None else ema.applied()
