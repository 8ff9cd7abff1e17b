"""What generates: a network with its decoders, and what stands beside it. All say and draw raw tokens.

`mean` and `following` are of every token given the true ones before it, `complete` of those that are not given, made
one after the other. Tokens are in the order of prediction, on the CPU.

Shapes: K draws, B samples, N tokens, P numbers in a raw token, M rows, D width, A coordinate axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.rollout import Placed, rollout
from nepa_core.tokens import Law, Tokens
from recipes.generation.decoders import Decoders, predictions
from recipes.generation.linear_gaussian import LinearGaussian
from recipes.generation.reading import untold

_ROWS = 2**14  # tokens that are sampled at once


class Rival(Protocol):
    """Something that generates."""

    def mean(self, tokens: Tokens) -> Tensor:
        """The mean of every token, [B, N, P]."""

    def following(self, tokens: Tokens, draws: int) -> Tensor:
        """Every token, drawn so many times: [K, B, N, P]."""

    def complete(self, tokens: Tokens, given: Tensor, draws: int) -> Tensor:
        """All of them with those made that are not given [B, N]: [K, B, N, P]; given ones bit for bit."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """A network whose predictions are decoded.

    Attributes:
        steps, temperature: of `FlowHead.sample`. draw: on the model's device.
        placed: of the adapter. Where tokens say where they lie, the flow head is not told, and sees 0.
    """

    model: NEPA
    decoders: Decoders
    steps: int
    temperature: float
    draw: torch.Generator
    causal: bool = True
    placed: Placed = lambda tokens: None

    def mean(self, tokens: Tokens) -> Tensor:
        said: Tensor = self.decoders.mean(predictions(self.model, tokens, causal=self.causal)[0])
        return said.cpu()

    def following(self, tokens: Tokens, draws: int) -> Tensor:
        said, _ = predictions(self.model, tokens, causal=self.causal)
        coords = tokens.coords.to(said.device).expand(*said.shape[:2], -1).flatten(0, 1)
        if self.placed(tokens) is not None:
            coords = torch.zeros_like(coords)
        rows = zip(said.flatten(0, 1).split(_ROWS // draws + 1), coords.split(_ROWS // draws + 1), strict=True)
        drawn = [self._sample(x, place, draws).cpu() for x, place in rows]
        return torch.cat(drawn, 1).view(draws, *tokens.values.shape)

    def complete(self, tokens: Tokens, given: Tensor, draws: int) -> Tensor:
        return self._rolled(tokens, given, draws, self._sample)

    def completed_by_mean(self, tokens: Tokens, given: Tensor) -> Tensor:
        """Each made token the mean of what may come, given the means before it: [B, N, P]."""
        return self._rolled(tokens, given, 1, lambda prediction, _: self.decoders.mean(prediction))[0]

    def _rolled(self, tokens: Tokens, given: Tensor, draws: int, draw: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = torch.arange(len(given)).repeat(draws)
        device = next(self.model.parameters()).device
        told = float(self.placed(tokens) is None)
        made = rollout(
            self.model,
            lambda x, place, _: draw(x, told * place),
            tokens.rows(rows).to(device),
            given[rows],
            placed=self.placed,
        )
        return made.values.cpu().view(draws, *tokens.values.shape)

    def _sample(self, prediction: Tensor, coords: Tensor, draws: int | None = None) -> Tensor:
        flow = self.decoders.flow
        drawn = flow.sample(
            prediction, coords, steps=self.steps, temperature=self.temperature, generator=self.draw, draws=draws
        )
        return flow.restored(drawn)


@dataclass(frozen=True, eq=False)
class Linear:
    """The linear-Gaussian autoregression; `model` is the network that it stands beside."""

    fitted: LinearGaussian
    model: NEPA
    draw: torch.Generator

    def mean(self, tokens: Tokens) -> Tensor:
        return self.fitted.law(untold(tokens, self.model)).mean

    def following(self, tokens: Tokens, draws: int) -> Tensor:
        return self.fitted.law(untold(tokens, self.model)).draw(draws, self.draw)

    def complete(self, tokens: Tokens, given: Tensor, draws: int) -> Tensor:
        rows = torch.arange(len(given)).repeat(draws)
        made = self.fitted.complete(untold(tokens, self.model).rows(rows), given[rows], self.draw)
        return made.values.view(draws, *tokens.values.shape)


@dataclass(frozen=True, eq=False)
class Copy:
    """The token before, or the mean token [P] where there is none; one answer, so that all draws are the same."""

    first: Tensor

    def mean(self, tokens: Tokens) -> Tensor:
        values, real = tokens.values, tokens.real
        before = torch.cat((self.first.expand(len(values), 1, -1), values[:, :-1]), 1)
        behind = torch.cat((torch.zeros_like(real[:, :1]), real[:, :-1]), 1)
        return torch.where(behind[..., None], before, self.first)

    def following(self, tokens: Tokens, draws: int) -> Tensor:
        return self.mean(tokens).expand(draws, -1, -1, -1)

    def complete(self, tokens: Tokens, given: Tensor, draws: int) -> Tensor:
        values = tokens.values.clone()
        for place in range(values.shape[1]):
            said = self.mean(replace(tokens, values=values))[:, place]
            values[:, place] = torch.where(given[:, place, None], values[:, place], said)
        return values.expand(draws, -1, -1, -1)


@dataclass(frozen=True, eq=False)
class Always:
    """One token [P] whatever came before; its mean alone."""

    token: Tensor

    def mean(self, tokens: Tokens) -> Tensor:
        return self.token.expand_as(tokens.values)


@dataclass(frozen=True, eq=False)
class Known:
    """The best possible, where an adapter knows the law of its data."""

    data: Modality
    draw: torch.Generator

    def mean(self, tokens: Tokens) -> Tensor:
        return self.law(tokens).mean

    def following(self, tokens: Tokens, draws: int) -> Tensor:
        return self.law(tokens).draw(draws, self.draw)

    def complete(self, tokens: Tokens, given: Tensor, draws: int) -> Tensor:
        rows = torch.arange(len(given)).repeat(draws)
        read, kept = tokens.rows(rows), given[rows]
        values = read.values.clone()
        for place in (~given).any(0).nonzero()[:, 0].tolist():
            law = self.law(replace(read, values=values))
            if law.drawn is not None:
                drawn = law.draw(1, self.draw)[0, :, place]
            else:
                drawn = Law(law.mean[:, place], law.covariance[..., place, :, :]).draw(1, self.draw)[0]
            values[:, place] = torch.where(kept[:, place, None], values[:, place], drawn)
        return values.view(draws, *tokens.values.shape)

    def law(self, tokens: Tokens) -> Law:
        found = self.data.known_law(tokens)
        assert found is not None
        return found
