"""A head that samples the next token from what the predictor says of it: flow matching, token by token.

For a raw token y [P], standardised, and noise e ~ N(0, I), the straight path from one to the other is

    x_t = (1 - t) e + t y,    t in [0, 1]

and the head v learns its velocity, given a condition c:

    loss = mean over tokens, t ~ U(0, 1) and e of  mean_p (v(x_t, t, c) - (y - e))^2

(conditional flow matching, Lipman et al. 2023, arXiv 2210.02747, eq. 23 with sigma_min = 0; rectified flow, Liu et al.
2023, arXiv 2209.03003, eq. 1). The best v is the conditional mean of y - e, and dx/dt = v(x, t, c) carries noise at
t = 0 to samples of y given c at t = 1. One small network serves all tokens, and c is the predictor's output with the
coordinates of the token to be made, as in MAR (Li et al. 2024, arXiv 2406.11838, section 3 and appendix A: residual
blocks of a norm and an MLP, adaptive LayerNorm), which has diffusion in place of the flow.

Shapes: M tokens (any leading axes), P numbers in a raw token, D width of the condition, A coordinate axes, W width of
the head.
"""

from __future__ import annotations

from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Generator, Tensor, nn

from nepa_core.basics import FROZEN
from nepa_core.rope import rotary_angles
from nepa_core.tokens import Tokens

Method = Literal["heun", "euler"]

_LONGEST = 100.0  # wavelength of coordinates and time, that of the released checkpoints' RoPE
_TIME = 4.0  # of the shortest wavelength from noise to token


class FlowConfig(BaseModel):
    """Shape of a `FlowHead`.

    Attributes:
        blocks: residual blocks. width: W. MAR has 3 blocks of 1,024.
    """

    model_config = FROZEN

    blocks: int = Field(default=3, gt=0, le=2**10)
    width: int = Field(default=128, ge=8, le=2**16, multiple_of=2)


class FlowHead(nn.Module):
    """The velocity v and what is sampled by it, in float32 whatever autocast says.

    The network adds to the best velocity for independent standard normal numbers, (2 t - 1) x_t / (t^2 + (1 - t)^2), so
    that a head narrower than a token loses none of it. Predictions trained by the cosine have no scale, so a LayerNorm
    without weight takes that out of the condition. Time and coordinates enter as cos and sin of their RoPE angles. A
    block adds gate * MLP((1 + scale) * norm(x) + shift): all three are linear in the condition, and the gate is 0 at
    the start, as is the output.

    Args:
        size: P. condition: D. axes: A.

    Attributes:
        mean, std: [P] of raw tokens, for `standardised` and `restored`; 0 and 1 until `measure`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FlowConfig, size: int, condition: int, axes: int) -> None:
        super().__init__()
        width, self.size, self.axes = config.width, size, axes
        self.condition = nn.Linear(condition, width)
        self.place, self.time = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.mix = nn.Linear(width, width)
        self.enter, self.leave = nn.Linear(size, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.blocks))
        for weight in self.leave.parameters():
            nn.init.zeros_(weight)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def measure(self, tokens: Tokens) -> Self:
        """Take mean and standard deviation of each of the P numbers from these tokens, padding left out."""
        for buffer, found in zip((self.mean, self.std), moments(tokens), strict=True):
            buffer.copy_(found)
        return self

    def standardised(self, values: Tensor) -> Tensor:
        """Raw tokens [..., P] by `mean` and `std`."""
        return in_deviations(values, self.mean, self.std)

    def restored(self, values: Tensor) -> Tensor:
        """The way back: numbers that never vary become their mean."""
        return values * self.std + self.mean

    def loss(self, values: Tensor, condition: Tensor, coords: Tensor, generator: Generator | None = None) -> Tensor:
        """The mean over all tokens, a scalar; see `pairs`."""
        velocity, wanted = self.pairs(values, condition, coords, generator)
        return (velocity - wanted).square().mean()

    def pairs(
        self, values: Tensor, condition: Tensor, coords: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """v(x_t, t, c) and y - e, whose mean square difference is the loss, at a time and a noise drawn for each token.

        Args:
            values: y [..., P], standardised. condition: [..., D]. coords: [..., A], of the tokens themselves.
            generator: on the device of the values; default: torch's global one.
        """
        with torch.autocast(values.device.type, enabled=False):
            values = values.float()
            time = torch.rand(values.shape[:-1], generator=generator, device=values.device)[..., None]
            noise = torch.randn(values.shape, generator=generator, device=values.device)
            given = self._given(condition, coords)
            return self._velocity(time * values + (1 - time) * noise, time, given), values - noise

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        coords: Tensor,
        *,
        steps: int,
        temperature: float = 1.0,
        method: Method = "heun",
        generator: Generator | None = None,
        draws: int | None = None,
    ) -> Tensor:
        """Standardised tokens [..., P], by the steps of an ODE solver from noise to token.

        Args:
            condition: [..., D]. coords: [..., A].
            draws: so many tokens for each condition, [draws, ..., P], in less time than of repeated conditions.
            steps: from t = 1 - (1 - i / steps)^2 to the next, shorter towards the token, where v changes fastest: 8
                of them give what takes 24 of equal length (digits, by a two-sample test). "heun", of second order,
                evaluates v twice in each, "euler" once.
            temperature: factor on the noise at the start; 0 gives one token near the middle of its distribution.
            generator: on the device of the condition; default: torch's global one.
        """
        with torch.autocast(condition.device.type, enabled=False):
            several = () if draws is None else (draws,)
            given, shape = self._given(condition, coords), (*several, *condition.shape[:-1], self.size)
            x = temperature * torch.randn(shape, generator=generator, device=condition.device)
            times = 1 - (1 - torch.arange(steps + 1, device=x.device) / steps).square()
            for now, then in zip(times[:-1, None], times[1:, None], strict=True):
                slope = self._velocity(x, now, given)
                if method == "heun":
                    slope = (slope + self._velocity(x + (then - now) * slope, then, given)) / 2
                x = x + (then - now) * slope
            return x

    def _given(self, condition: Tensor, coords: Tensor) -> Tensor:
        """The condition but for the time, [..., W]."""
        seen = F.layer_norm(condition.float(), condition.shape[-1:])
        told = _waves(coords.to(condition.device), self.place.in_features)
        return cast(Tensor, self.condition(seen) + self.place(told))

    def _velocity(self, x: Tensor, time: Tensor, given: Tensor) -> Tensor:
        """[..., P] at a time [..., 1]."""
        given = given + self.time(_waves(_TIME * time, self.time.in_features))
        given = F.silu(self.mix(F.silu(given)))
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, given)
        return cast(Tensor, self.leave(hidden) + x * (2 * time - 1) / (time.square() + (1 - time).square()))


def moments(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [P] float64 of each of the P numbers of these tokens, padding left out."""
    real = tokens.values[tokens.real].double()
    return real.mean(0), real.std(0, correction=0)


def in_deviations(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Raw tokens [..., P] less their mean, over their deviation, float32; numbers that never vary become 0."""
    return (values.float() - mean) / torch.where(std > 0, std, torch.inf)


class _Block(nn.Module):
    """x + gate * down(silu(up((1 + scale) * norm(x) + shift)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        for weight in self.modulate.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        scale, shift, gate = self.modulate(given).chunk(3, dim=-1)
        hidden = (1 + scale) * F.layer_norm(x, x.shape[-1:]) + shift
        return cast(Tensor, x + gate * self.down(F.silu(self.up(hidden))))


def _waves(coords: Tensor, width: int) -> Tensor:
    """cos and sin of the RoPE angles of coordinates: [..., A] -> [..., width]."""
    angles = rotary_angles(coords, width, _LONGEST)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
