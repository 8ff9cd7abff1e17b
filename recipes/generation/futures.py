"""Samples of what a series does next: a roll-out of a frozen network, and point forecasts with resampled residuals.

**Roll-out.** The look-back's tokens are given, and the tokens of the horizon are made behind them, each sampled by a
flow head (`nepa_core.flow`) from the prediction and read in its turn (`nepa_core.rollout`). The head is trained on
windows of `Modality.forecasts("train", H)`, the network reading each with its true future: on the very places that are
forecast, in units of the look-back alone. Windows of `dataset` would be wrong twice: they end where a forecast begins,
and where each is normalised by itself their tokens are a part of that mean and deviation, so that they vary less than
what comes after. The network itself has been trained on no place behind a look-back, and is not here.

**Residuals.** A point forecast plus the errors that it made of a validation window drawn at random, over the whole
horizon at once and of the same channel where channels are independent: a bootstrap of blocks, which keeps how errors
depend on each other in time and grow with it. Where the adapter normalises windows they are in units of each look-back,
as what the flow head samples is. On ETTh1 that makes the stronger rival: the linear model has CRPS .291 for .306 at 96
steps (300 test windows), and .326 for .354 at 336 (200).

Shapes: B windows, L steps of look-back, H to forecast, C channels in a sample, N tokens of the look-back, K to be made,
P numbers in one, S samples of a future, M pairs, V validation windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UserError
from nepa_core.flow import FlowHead
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.objective import pair_up
from nepa_core.rollout import rollout
from nepa_core.runtime.data import fold_seed
from nepa_core.tokens import Tokens
from nepa_core.verdict.drawing import spans_of
from recipes.readout.forecasters import chosen, in_series_units, sound_batches
from recipes.statistics.scores import coverage, crps, pinball, quantiles

Point = Callable[[Batch], Tensor]
"""The futures of a batch [B, H, C], in the units of "series"."""

Sampler = Callable[[Batch, Tensor], Tensor]
"""Samples of the futures [S, B, H, C] of a batch and the track [B] of each window, in the units of "series"."""

FIGURES = ("crps", "pinball_10", "pinball_50", "pinball_90", "coverage_50", "coverage_90")
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of a fan: the ends of the central intervals of 90 and 50 %, and the median."""
FANS = 3  # windows whose fan is kept
SOLVER_STEPS = 8  # of Heun's method, for a token
HEAD_LR = 2e-3  # of the flow head, at which docs/results/etth1.md was measured
_ROLLED = 1024  # sequences at once
_PAIRS = 2**17  # most, to train a head on
_FAR = 100.0  # deviations of a look-back: beyond them it was flat, and says nothing of what follows
_SEASON_WINDOWS = 512


# ------------------------------------------------------------------------------------------- tokens and steps

PATTERNS = ("b (n p) c -> b n (p c)", "b (n p) c -> b n (c p)", "b (n p) c -> b (n c) p")
"""What tokens may hold: some steps of all channels, in order of time or of channel, or of one channel each."""


class Layout(NamedTuple):
    """How the steps of a series lie in tokens.

    Attributes:
        pattern: one of `PATTERNS`. patch: steps in a token. abreast: tokens that begin at one step.
        steps, channels: L and C of the look-back. tokens: N.
    """

    pattern: str
    patch: int
    abreast: int
    steps: int
    channels: int
    tokens: int

    def places(self, horizon: int) -> int:
        """K, the tokens that hold so many steps: the last may hold more."""
        return -(-horizon // self.patch) * self.abreast

    def laid(self, steps: Tensor) -> Tensor:
        """Steps [B, n * patch, C] as tokens [B, n * abreast, P]."""
        return rearrange(steps, self.pattern, p=self.patch)

    def steps_of(self, values: Tensor) -> Tensor:
        """The way back."""
        tokens, steps = self.pattern.split(" -> ")[::-1]
        return rearrange(values, f"{tokens} -> {steps}", p=self.patch, c=self.channels)

    def beyond(self, coords: Tensor, places: int) -> Tensor:
        """Coordinates [..., N, A] continued at their own spacing: [..., N + places, A]."""
        last, step = coords[..., -self.abreast :, :], coords[..., -1:, :] - coords[..., -1 - self.abreast, None, :]
        made = [last + step * (k + 1) for k in range(places // self.abreast)]
        return torch.cat((coords, *made), dim=-2)


def layout_of(data: Modality, windows: Dataset[Batch]) -> Layout:
    """Seen on the first windows.

    Raises:
        UserError: patches are predicted in another order than that of time, or tokens are not the steps of the
            look-back one after the other, evenly spaced.
    """
    batch = next(sound_batches(data, windows, torch.device("cpu")))
    batch = {name: value[:8] for name, value in batch.items()}
    series, tokens, kind = batch["series"], data.read(batch), type(data).__name__
    length, channels = series.shape[1:]
    count = tokens.values.shape[1]
    if tokens.order is not None and (tokens.order != torch.arange(count)).any():
        raise UserError(
            "samples= makes the tokens that come after a look-back, and this run predicts its patches in another order "
            "than that of time: pre-train with data.patch_order=raster"
        )
    mean, std = data.window_scale(batch)
    own, seen = (series - mean) / std, batch.get("observed", torch.ones_like(series, dtype=torch.bool))
    for pattern in PATTERNS:
        abreast = channels if pattern == PATTERNS[-1] else 1
        found = Layout(pattern, length * abreast // count, abreast, length, channels, count)
        if found.patch * count != length * abreast or count <= abreast:
            continue
        laid, known = (found.laid(each.float()) for each in (own, seen))
        if laid.shape == tokens.values.shape and torch.allclose(laid * known, tokens.values * known, 1e-3, 1e-3):
            steps = (tokens.coords[..., abreast:, :] - tokens.coords[..., :-abreast, :]).float()
            if torch.allclose(steps, steps[..., -1:, :], 1e-3, 1e-4):
                return found
    raise UserError(
        f"samples= continues tokens that hold the steps of the look-back one after the other, by window_scale and "
        f"evenly spaced; those of {kind} don't, so that nothing says what one behind them holds"
    )


def read_on(data: Modality, layout: Layout, batch: Batch, future: Tensor) -> Tokens:
    """The tokens of windows with those of steps [B, n * patch, C] behind them, both in the units of the look-back.

    Args:
        future: in the units of "series".
    """
    tokens = data.tokenize(batch)
    mean, std = data.window_scale(batch)
    values = torch.cat((tokens.values, layout.laid((future - mean) / std)), 1)
    places = values.shape[1] - tokens.values.shape[1]
    mask = None if tokens.mask is None else F.pad(tokens.mask, (0, places), value=True)
    return Tokens(values, layout.beyond(tokens.coords, places), mask)


# ---------------------------------------------------------------------------------------------- the flow head


class Pairs(NamedTuple):
    """Tokens of the horizon: prediction [M, D] of the place before, values [M, P] and coordinates [M, A]."""

    prediction: Tensor
    values: Tensor
    coords: Tensor


@torch.no_grad()
def pairs_of(
    model: NEPA, data: Modality, layout: Layout, horizon: int, samples: int, device: torch.device, *, causal: bool
) -> Pairs:
    """From training windows, at most `samples` of them, each read with its true future behind it."""
    places = layout.places(horizon)
    steps = places // layout.abreast * layout.patch
    windows = chosen(data, "train", steps, max(1, min(samples, _PAIRS // places)))
    found = []
    for batch in sound_batches(data, windows, device):
        tokens = read_on(data, layout, batch, batch["future"])
        out = model(tokens, causal=causal)
        prediction, _, counted = pair_up(out.predictions, out.embeddings, out.mask, shift=True)
        values = tokens.values[:, -places:]
        used = (values.abs() <= _FAR).all(2)
        used = used if counted is None else used & counted[:, -places:]
        coords = tokens.coords.to(device)[..., -places:, :].expand(*used.shape, -1)
        found.append([each[used] for each in (prediction[:, -places:], values, coords)])
    pairs = Pairs(*map(torch.cat, zip(*found, strict=True)))
    if not len(pairs.values):
        raise UserError("samples= has nothing to learn from: every training window is flat, or missing at its end")
    return pairs


def rolled_out(
    model: NEPA, head: FlowHead, data: Modality, layout: Layout, horizon: int, samples: int, *, causal: bool
) -> Sampler:
    """Look-backs continued token by token. Missing tokens of a look-back are made, too, each from those before it."""
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(fold_seed(0, "futures"))
    places = layout.places(horizon)
    blank = (places // layout.abreast * layout.patch, layout.channels)

    def next_token(prediction: Tensor, coords: Tensor, place: int) -> Tensor:
        return head.restored(head.sample(prediction, coords, steps=SOLVER_STEPS, generator=draw))

    def sample(batch: Batch, _: Tensor) -> Tensor:
        tokens = read_on(data, layout, batch, batch["future"].new_zeros(len(batch["future"]), *blank))
        given = tokens.real & (torch.arange(tokens.values.shape[1], device=tokens.values.device) < layout.tokens)
        rows = torch.arange(len(given), device=given.device).repeat(samples)
        made = rollout(model, next_token, replace(tokens, mask=None).rows(rows), given[rows], causal=causal)
        future = layout.steps_of(made.values[:, -places:])[:, :horizon]
        future = rearrange(future, "(s b) h c -> s b h c", s=samples)
        return torch.stack([in_series_units(data, batch, each) for each in future])

    return sample


# ---------------------------------------------------------------------------------------------- the rivals


def repeat_season(batch: Batch, season: int) -> Tensor:
    """The last `season` steps over and over, [B, H, C]; a missing step counts as the one before it that is there.

    `season` 1 is persistence, for what the look-back has at all.
    """
    series: Tensor = batch["series"]
    observed = batch.get("observed", torch.ones_like(series, dtype=torch.bool))
    steps = torch.arange(series.shape[1], device=series.device)[None, :, None]
    filled = series.gather(1, torch.where(observed, steps, 0).cummax(1).values)
    ahead = torch.arange(batch["future"].shape[1], device=series.device) % season
    return filled[:, series.shape[1] - season + ahead]


def best_season(data: Modality, horizon: int, steps: int, device: torch.device) -> int:
    """The season from 2 to `steps` whose repetition has the lowest squared error on validation windows."""
    windows = chosen(data, "validation", horizon, _SEASON_WINDOWS)
    errors = torch.zeros(steps - 1, dtype=torch.float64)
    for batch in sound_batches(data, windows, device):
        apart = [repeat_season(batch, season) - batch["future"] for season in range(2, steps + 1)]
        errors += torch.tensor([float(each.double().square().sum()) for each in apart])
    return int(errors.argmin()) + 2


def with_residuals(
    data: Modality, point: Point, horizon: int, fitted_on: int, samples: int, device: torch.device
) -> Sampler:
    """The point forecast plus its residuals of validation windows, at most `fitted_on` of them."""
    windows = chosen(data, "validation", horizon, fitted_on)
    blocks = torch.cat(
        [
            (batch["future"] - point(batch)) / data.window_scale(batch)[1]
            for batch in sound_batches(data, windows, device)
        ]
    )
    if (far := (blocks.abs() > _FAR).flatten(1).any(1).cpu()).all():
        raise UserError("samples= has no residuals to draw from: the look-back of every validation window is flat")
    track, every = tracks(windows, len(blocks)).masked_fill(far, -1), (~far).nonzero()[:, 0]
    draw = torch.Generator().manual_seed(fold_seed(0, "residuals"))

    def sample(batch: Batch, of: Tensor) -> Tensor:
        found = []
        for each in of.tolist():
            own = (track == each).nonzero()[:, 0]
            rows = own if len(own) else every
            found.append(rows[torch.randint(len(rows), (samples,), generator=draw)])
        return point(batch) + blocks[torch.stack(found, 1).to(blocks.device)] * data.window_scale(batch)[1]

    return sample


def tracks(windows: Dataset[Batch], count: int) -> Tensor:
    """Which recording each window is of, such as its channel, [count] int64; 0 where the data set does not say."""
    spans = spans_of(windows)
    return torch.zeros(count, dtype=torch.int64) if spans is None else spans.track


# ------------------------------------------------------------------------------------------------------ scores


class Scores(NamedTuple):
    """How good samples are, of windows that are drawn.

    Attributes:
        windows: [6, W] float32, means over the horizon and the channels of each window, by `FIGURES`.
        steps: [H] float32, the CRPS of each step ahead. fans: [5, F, H] float32, the `LEVELS` of the first channel of
            the first windows; seen [F, L] and truth [F, H]: what came before, NaN where missing, and after.
    """

    windows: Tensor
    steps: Tensor
    fans: Tensor
    seen: Tensor
    truth: Tensor


def scores_of(data: Modality, windows: Dataset[Batch], sampler: Sampler, samples: int, device: torch.device) -> Scores:
    """Of every window, by `recipes.statistics.scores`."""
    figures, steps, shown, start = [], [], dict[str, list[Tensor]](), 0
    track = tracks(windows, len(cast(Any, windows)))
    levels, at_once = torch.tensor(LEVELS, dtype=torch.float64), max(1, _ROLLED // samples)
    for whole in sound_batches(data, windows, device):
        for first in range(0, len(whole["future"]), at_once):
            batch = {name: value[first : first + at_once] for name, value in whole.items()}
            truth = batch["future"].cpu()
            drawn = sampler(batch, track[start : start + len(truth)]).cpu()
            ends = quantiles(drawn, levels)
            outer = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
            score = crps(drawn, truth)
            each = [
                score[None],
                pinball(quantiles(drawn, outer), outer, truth),
                *(coverage(drawn, truth, level)[None] for level in (0.5, 0.9)),
            ]
            figures.append(torch.cat(each).mean((2, 3)))
            steps.append(score.mean(2))
            if start < FANS:
                seen = batch["series"].masked_fill(~batch["observed"], torch.nan) if "observed" in batch else None
                kept = {
                    "fans": ends,
                    "seen": (batch["series"] if seen is None else seen).cpu()[None],
                    "truth": truth[None],
                }
                for name, value in kept.items():
                    shown.setdefault(name, []).append(value[..., 0].float())
            start += len(truth)
    fans, seen, truth = (torch.cat(shown[name], 1)[:, :FANS] for name in ("fans", "seen", "truth"))
    return Scores(torch.cat(figures, 1).float(), torch.cat(steps).mean(0).float(), fans, seen[0], truth[0])
