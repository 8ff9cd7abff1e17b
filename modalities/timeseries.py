"""Time series, cut into windows and these into patches of time steps.

Shapes: B samples, T rows of the whole series, L time steps in a window, C channels in a sample (1 where channels are
independent), H time steps to forecast, p steps in a patch, N = L / p tokens, P = p * C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from einops import rearrange
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from modalities.data.listing import Contents, fingerprint, say
from modalities.data.moments import ROUNDING, ColumnMoments
from modalities.data.remote import at_hand
from modalities.data.series import LabelledSeries, read_labelled, read_table
from modalities.orders import Ordered
from nepa_core.basics import Batch, UnreadableSample, UserError, some
from nepa_core.modality import Modality
from nepa_core.runtime.config import listed
from nepa_core.tokens import LARGEST_VALUE, Law, Sketch, Spans, Tokens, cached

SPLITS = ("train", "validation", "test")
VAR_ROWS = 24_000
VAR_CHANNELS = 4
OPTIMUM_WINDOWS, OPTIMUM_DRAWS = 256, 256
"""Held-out windows, and futures drawn for each of their tokens, behind `known_optimum`."""
_RADIUS = 0.98  # of the synthetic transition, which is that times an orthogonal matrix
_SPREAD = (1 - _RADIUS**2) ** -0.5  # standard deviation of what it makes, the same in every direction
_FLAT = 16 * torch.finfo(torch.float32).eps  # of the largest value: a window that varies by less is flat
_LEAST = 1e-18  # for windows of zeros; its square is still a float32
_ROWS = 1 << 16  # that are standardised at a time


class TimeSeries(Ordered, Modality):
    """Windows of a series, z-scored by its training rows; a token holds `patch` steps.

    A token with a missing value is masked. The splits lie one after the other in time, and no window of `dataset`
    reaches over a border. Forecasting reads a third split, "validation", by `forecasts`.

    Attributes:
        source: "file" (a .csv or .parquet table), "labelled" (a folder of the UCR or UEA layout, split as it is), or
            "var": a synthetic vector autoregression of 4 channels, whose best loss is known; 24,000 rows, or as many
            as `parts` count.
        root: the file or folder.
        time, columns: see `modalities.data.series.read_table`.
        window: steps in a sample, the look-back of forecasting. Labelled series are filled up to it at their end.
        patch: steps in a token; it divides the window.
        stride: steps between the starts of two windows. Forecasting scores every window, whatever it is here.
        channels: "independent" makes every channel a sample of its own, "mixing" puts all of them in each token.
        normalise: "window" also takes mean and standard deviation of its own from every channel of every window
            (RevIN without weights). They are of the whole window, so tokens know a little of those after them.
        patch_order, order_seed: the order in which patches are predicted, see `modalities.orders`; "raster" is that of
            time.
        parts: training, validation and test rows, as numbers or as shares; what is left over at the end is unused.
        gaps: "cut" leaves out the windows in which time is missing between two rows (see
            `modalities.data.time_axis.find_gaps`), "bridge" keeps them, for series whose hours are meant to follow each
            other, such as those of trading days.
    """

    token_name: ClassVar[str] = "patch"
    built_in: ClassVar[str] = "var"

    source: Literal["file", "labelled", "var"]
    window: PositiveInt
    patch: PositiveInt
    channels: Literal["independent", "mixing"]
    root: str | None = None
    time: str | None = None
    columns: Annotated[Annotated[tuple[str, ...], Field(min_length=1)] | None, BeforeValidator(listed)] = None
    stride: PositiveInt = 1
    normalise: Literal["none", "window"] = "none"
    parts: tuple[PositiveInt, NonNegativeInt, PositiveInt] | tuple[PositiveFloat, NonNegativeFloat, PositiveFloat]
    gaps: Literal["cut", "bridge"] = "cut"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.patch > self.window:
            raise ValueError(f"data.patch={self.patch} is longer than data.window={self.window}")
        if self.window % self.patch:
            near = self.window // self.patch * self.patch
            raise ValueError(
                f"data.patch={self.patch} does not divide data.window={self.window}; {near} and {near + self.patch} fit"
            )
        if self.window == self.patch:
            raise ValueError(f"data.window={self.window} holds one token: make data.patch smaller")
        if self.source != "var" and self.root is None:
            raise ValueError(f"data.source={self.source} needs data.root=PATH")
        names = (*(self.columns or ()), self.time)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands twice in data.columns (and data.time); name each column once")
        if not all(isinstance(part, int) for part in self.parts) and sum(self.parts) > 1 + 1e-6:
            raise ValueError(f"data.parts={self.parts} are shares that sum to more than 1")
        return self

    def dataset(self, split: str) -> Dataset[Batch]:
        if self.source == "labelled":
            return _labelled_windows(self, split)
        series, window = _series(self), self.window
        start, end = series.borders[split]
        if end - start < window:
            raise UserError(
                f"data.window={window} is longer than the {end - start} rows of the {split} part of "
                f"{self.root or self.source}; shorten it, or move the borders by data.parts"
            )
        starts = torch.arange(start, end - window + 1, self.stride)
        windows = self._windows(series, starts, 0)
        cut = len(starts) - int(windows.unbroken.sum())
        if cut == len(starts):
            raise UserError(
                f"{self.root}: time is missing within every window of the {split} part ({series.gap}); shorten "
                "data.window, write the missing rows with empty cells (they are masked), or set data.gaps=bridge"
            )
        if cut:
            say(f"{self.root}: {cut:,} of {len(starts):,} {split} windows are left out, for time is missing in them")
        if not len(windows):
            raise UserError(
                f"{self.root}: no window of the {split} part has two tokens without a missing value; make data.patch "
                "smaller or fill the gaps"
            )
        return windows

    def _windows(self, series: Series, starts: Tensor, horizon: int) -> Windows:
        breaks = series.breaks if self.gaps == "cut" else ()
        independent = self.channels == "independent"
        return Windows(series.values, starts, self.window, horizon, self.patch, independent=independent, breaks=breaks)

    def forecasts(self, split: str, horizon: int) -> Windows:
        """Every window of `window` steps whose next `horizon` steps lie in the split: "train", "validation", "test".

        See `Modality.forecasts`; values are z-scored. Validation and test windows may look back over the border for
        their input. Windows with a missing value to forecast, a gap in time, or fewer than two whole tokens, are left
        out and counted in `left_out`.

        Raises:
            UserError: the split is too short, no window is left, or series are labelled.
        """
        if self.source == "labelled":
            raise UserError("data.source=labelled has nothing to forecast; use nepa finetune or nepa probe")
        series = _series(self)
        start, end = series.borders[split]
        if start == end:
            raise UserError(
                f"data.parts={list(self.parts)} leaves no {split} rows, which forecasting needs; give it some"
            )
        first = max(start, self.window)  # of the steps to forecast
        if end - first < horizon:
            raise UserError(
                f"horizons: {horizon} steps after data.window={self.window} do not fit in the {end - start} rows of "
                f"the {split} part of {self.root or self.source}; shorten them, or set data.parts"
            )
        starts = torch.arange(first, end - horizon + 1) - self.window
        windows = self._windows(series, starts, horizon)
        if not len(windows):
            raise UserError(
                f"{self.root}: no window of the {split} part has {horizon} steps to forecast without a missing value "
                "or a gap in time; shorten horizons or fill the gaps"
            )
        return windows

    def tokenize(self, batch: Batch) -> Tokens:
        """Patches of batch["series"] [B, L, C]; values within a patch are in order of time, then of channel."""
        series, observed = batch["series"], batch.get("observed")
        mean, std = self.scale(batch)
        values = (series - mean) / std
        mask = None
        if observed is not None:
            values = torch.where(observed, values, 0.0)
            mask = rearrange(observed, "b (n p) c -> b n (p c)", p=self.patch).all(-1)
        tokens = rearrange(values, "b (n p) c -> b n (p c)", p=self.patch)
        return Tokens(tokens, places(tokens.shape[1]), mask)

    def order(self, tokens: Tokens) -> Tensor | None:
        return self.ordered(tokens, (tokens.values.shape[1],))

    def scale(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, 1, C] that each window is normalised by: 0 and 1 with normalise="none".

        The deviation has a floor at the rounding of the window's own values, so a flat window becomes zeros, and what
        is forecast for it in its own units counts for next to nothing in those of the series.
        """
        series: Tensor = batch["series"]
        if self.normalise == "none":
            return torch.zeros_like(series[:, :1]), torch.ones_like(series[:, :1])
        real = torch.ones_like(series) if "observed" not in batch else batch["observed"].to(series.dtype)
        count = real.sum(1, keepdim=True).clamp(min=1)
        mean = (series * real).sum(1, keepdim=True) / count
        variance = ((series - mean).square() * real).sum(1, keepdim=True) / count
        floor = (_FLAT * (series * real).abs().amax(1, keepdim=True)).clamp(min=_LEAST)
        return mean, (variance + floor.square()).sqrt()

    def window_scale(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`scale`, or the 0 and 1 that all channels share."""
        return super().window_scale(batch) if self.normalise == "none" else self.scale(batch)

    def token_dim(self) -> int:
        return self.patch * (1 if self.channels == "independent" else self.channel_count())

    def channel_count(self) -> int:
        """Columns of the series."""
        if self.source == "labelled":
            return int(_labelled(str(self.root), "train").values.shape[-1])
        return int(_series(self).values.shape[-1])

    def classes(self) -> tuple[str, ...] | None:
        """The labels that occur in training, numbers in their order; None where they are numbers to predict."""
        return _classes(str(self.root)) if self.source == "labelled" else None

    def describe(self, tokens: Tokens) -> Sketch:
        """The values as curves, one a channel; gaps where tokens are masked."""
        values = tokens.canonical(tokens.values)
        if tokens.mask is not None:
            values = values.masked_fill(~tokens.canonical(tokens.mask)[..., None], torch.nan)
        curves = rearrange(values, "b n (p c) -> b (n p) c", p=self.patch)
        return Sketch(curves, (1, values.shape[1]), curves=True)

    def known_optimum(self, embed: nn.Module) -> float | None:
        """Of source="var" with channels="mixing", normalise="none" and the order of time, by drawing futures.

        The value before a token says all about it. For draws u of its embedding's direction, the best prediction
        points to E[u], and its expected cosine is |E[u]|. The standard error is below 0.005.
        """
        if not self._known():
            return None
        series, windows = _series(self), self.dataset("test")
        assert isinstance(windows, Windows)
        device = next((value.device for value in embed.parameters()), torch.device("cpu"))
        pick = torch.linspace(0, len(windows) - 1, min(OPTIMUM_WINDOWS, len(windows))).long()
        past = series.values[windows.starts[pick][:, None] + torch.arange(self.window)]  # [S, L, C]
        before = rearrange(past, "s (n p) c -> s n p c", p=self.patch)[:, :-1, -1]  # the value before tokens 1, ...
        draw = torch.Generator().manual_seed(0)
        first = _autoregression(self.patch, OPTIMUM_DRAWS, draw, burn_in=400)
        cosines = [_reachable(embed, self._futures(first[None], series, device)).expand(len(past))]
        for place in range(before.shape[1]):
            last = before[:, place] * series.std + series.mean
            states = last.repeat_interleave(OPTIMUM_DRAWS, 0)
            futures = _autoregression(self.patch, len(states), draw, start=states).view(
                len(past), OPTIMUM_DRAWS, self.patch, -1
            )
            cosines.append(_reachable(embed, self._futures(futures, series, device)))
        return -float(torch.stack(cosines).mean())

    def known_law(self, tokens: Tokens) -> Law | None:
        """Where `known_optimum` is known: of x[t] = A x[t - 1] + e[t], in z-scores; the first token has no past."""
        if not self._known():
            return None
        series, count = _series(self), tokens.values.shape[1]
        powers = torch.stack([torch.linalg.matrix_power(_transition(), step) for step in range(self.patch + 1)])
        ends = tokens.values[:, :-1, -VAR_CHANNELS:] * series.std + series.mean
        before = nn.functional.pad(ends, (0, 0, 1, 0))  # the mean, 0, before the first token
        mean = (torch.einsum("kij,bnj->bnki", powers[1:], before) - series.mean) / series.std
        later = torch.arange(self.patch)[:, None] - torch.arange(self.patch)  # steps from a shock to a value
        shocks = powers[later.clamp(min=0)] * (later >= 0)[..., None, None]  # [p, p, C, C]
        responses = torch.cat((rearrange(shocks, "k m i j -> (k i) (m j)"), powers[1:].flatten(0, 1) * _SPREAD), 1)
        responses = (responses / series.std.repeat(self.patch)[:, None]).double()
        first, rest = (part @ part.T for part in (responses, responses[:, :-VAR_CHANNELS]))
        return Law(mean.flatten(2), torch.stack([first, *[rest] * (count - 1)]))

    def _known(self) -> bool:
        mixing = self.source == "var" and self.channels == "mixing"
        return mixing and self.normalise == "none" and self.patch_order == "raster"

    @staticmethod
    def _futures(futures: Tensor, series: Series, device: torch.device) -> Tensor:
        """Raw tokens [S, K, P] of K futures [S, K, p, C] of S windows."""
        return ((futures - series.mean) / series.std).flatten(2).to(device)


class Series(NamedTuple):
    """A whole series: z-scored values [T, C] float32 (NaN where missing), the mean and std [C] of its training rows
    rounded to float32, and the first and last + 1 row of each split.

    Attributes:
        breaks: rows before which time is missing; gap: one line on them.
    """

    values: Tensor
    mean: Tensor
    std: Tensor
    borders: dict[str, tuple[int, int]]
    breaks: tuple[int, ...] = ()
    gap: str | None = None


class Windows(Dataset[Batch]):
    """Samples {"series": [L, C]}, with "observed" [L, C] bool where anything is missing, which then reads 0.

    Args:
        values: [T, C] z-scored, NaN where missing.
        starts: [W] first rows of windows. Those with fewer than two whole tokens are left out.
        window, patch: steps. horizon: steps of "future" [H, C] behind it, or 0 for none.
        independent: every channel is a sample: (window, channel) number i is channel i % C of window i // C.
        breaks: rows before which time is missing: no window (with its horizon) reaches over one.

    Attributes:
        unbroken: [W] bool, the windows in which no time is missing.
    """

    def __init__(
        self,
        values: Tensor,
        starts: Tensor,
        window: int,
        horizon: int,
        patch: int,
        *,
        independent: bool,
        breaks: Sequence[int] = (),
    ) -> None:
        self.values, self.starts, self.window, self.horizon = values, starts, window, horizon
        self.channels = values.shape[1] if independent else 1
        self.independent = independent
        missing = values.isnan()
        self.gaps = bool(missing.any())
        self.unbroken = self._unbroken(breaks)
        self.kept: Tensor | None = None
        if self.gaps or not self.unbroken.all():
            kept = self.unbroken[:, None].expand(-1, self.channels)
            self.kept = (kept & self._readable(missing, patch)).flatten().nonzero()[:, 0]

    def _unbroken(self, breaks: Sequence[int]) -> Tensor:
        """[W] bool: no break lies behind the first row of a window and not behind its last."""
        rows = torch.tensor(breaks, dtype=torch.int64)
        last = self.starts + self.window + self.horizon - 1
        return torch.searchsorted(rows, self.starts, right=True) == torch.searchsorted(rows, last, right=True)

    def _readable(self, missing: Tensor, patch: int) -> Tensor:
        """[W, C] bool ([W, 1] where channels are mixed): two tokens at least are whole, and so is the future."""
        lost = missing if self.independent else missing.any(1, keepdim=True)
        before = torch.cat((torch.zeros_like(lost[:1], dtype=torch.int32), lost.cumsum(0, dtype=torch.int32)))
        whole = torch.zeros(len(self.starts), lost.shape[1], dtype=torch.int32)
        for place in range(0, self.window, patch):
            whole += before[self.starts + place + patch] == before[self.starts + place]
        end = self.starts + self.window
        return (whole > 1) & (before[end + self.horizon] == before[end])

    def __len__(self) -> int:
        return len(self.starts) * self.channels if self.kept is None else len(self.kept)

    @property
    def left_out(self) -> int:
        """Samples that are none for what is missing in them."""
        return len(self.starts) * self.channels - len(self)

    def name(self, index: int) -> str:
        """What a message calls that window: its rows, 1 the first of the table below its head, and its channel."""
        number = index if self.kept is None else int(self.kept[index])
        first = int(self.starts[number // self.channels]) + 1
        channel = f" of channel {number % self.channels + 1}" if self.independent and self.channels > 1 else ""
        return f"the window of rows {first} to {first + self.window + self.horizon - 1}{channel}"

    def spans(self) -> Spans:
        """Windows overlap; those of one stretch of their length, of whatever channel, are one cluster."""
        numbers = torch.arange(len(self)) if self.kept is None else self.kept
        first = self.starts[numbers // self.channels]
        end = first + self.window + self.horizon
        return Spans(first // (self.window + self.horizon), numbers % self.channels, first, end, chained=True)

    def fingerprint(self) -> str:
        """Changes where the table has other rows, columns or values, or other windows are cut from it."""
        rows, columns = self.values.shape
        return f"{len(self)} samples, {rows} rows, {columns} columns, {_digest(self.values)}"

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        numbers = torch.tensor(indices) if self.kept is None else self.kept[indices]
        rows = self.starts[numbers // self.channels][:, None] + torch.arange(self.window + self.horizon)
        if self.independent:
            values = self.values[rows, (numbers % self.channels)[:, None]][..., None]
        else:
            values = self.values[rows]
        past, future = values[:, : self.window], values[:, self.window :]
        batch = {"series": past.nan_to_num(0.0)}
        if self.gaps:
            batch["observed"] = ~past.isnan()
        return batch | ({"future": future} if self.horizon else {})


class Labelled(Dataset[Batch]):
    """Samples {"series": [L, C], "label": int64 (class) or float32 (number to predict)}, with "observed" [L, C] bool
    where any of the set has an end or gap.

    A series with fewer than two whole tokens is an unreadable sample, so that it is counted.

    Args:
        values: [S, L, C], NaN where missing. labels: [S]. whole: [S] int64, whole tokens of each.
        stored: what the file holds.
    """

    def __init__(self, values: Tensor, labels: Tensor, whole: Tensor, stored: LabelledSeries) -> None:
        self.values, self.labels, self.whole, self.stored = values, labels, whole, stored
        self.gaps = bool(values.isnan().any())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """Raises UnreadableSample for the first series that has no two whole tokens."""
        for index in indices:
            if (whole := int(self.whole[index])) < 2:
                raise UnreadableSample(
                    f"{self.name(index)} has {whole or 'no'} token{'s' if whole != 1 else ''} without a missing value, "
                    "and a prediction needs 2; a smaller data.patch has more"
                )
        values = self.values[indices]
        batch = {"series": values.nan_to_num(0.0), "label": self.labels[indices]}
        return batch | ({"observed": ~values.isnan()} if self.gaps else {})

    def name(self, index: int) -> str:
        """What a message calls that series: file and row."""
        return f"{self.stored.path}, row {self.stored.rows[index]}"

    def contents(self) -> Contents:
        """The values of every series, to find those that stand in both files."""
        values = self.stored.values
        real = ~np.isnan(values).all(2)
        ends = np.where(real, np.arange(1, real.shape[1] + 1), 0).max(1, initial=0)

        def read(index: int) -> bytes:
            return bytes(values[index, : ends[index]].tobytes())

        return Contents(ends.astype(np.int64), read, self.name)

    def fingerprint(self) -> str:
        """Changes where the file has other rows, in another order, or other values or labels."""
        name = f"{Path(self.stored.path).name} {_digest(self.values)}"
        return fingerprint([name], np.array([len(self), int((~self.values.isnan()).sum())]), self.labels.numpy())


def _digest(values: Tensor) -> str:
    return hashlib.blake2b(values.contiguous().numpy().data, digest_size=8).hexdigest()


@cached
def places(count: int) -> Tensor:
    """Time in patches, [N, 1] float32 on the CPU."""
    return torch.arange(count, dtype=torch.float32)[:, None]


def _series(data: TimeSeries) -> Series:
    if data.source == "var":
        return _read(None, None, None, 0, data.parts)
    root = at_hand(str(data.root))
    changed = Path(root).stat().st_mtime_ns if Path(root).exists() else 0
    return _read(root, data.time, data.columns, changed, data.parts)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _read(
    root: str | None,
    time: str | None,
    columns: tuple[str, ...] | None,
    changed: int,  # a part of the key
    parts: tuple[float, float, float],
) -> Series:
    breaks: tuple[int, ...] = ()
    gap: str | None = None
    row: Callable[[int], str] = "row {}".format
    if root is None:
        names = tuple(map(str, range(VAR_CHANNELS)))
        wanted = sum(part for part in parts if isinstance(part, int))
        drawn = _autoregression(max(VAR_ROWS, wanted), 1, torch.Generator().manual_seed(0), burn_in=400)
        values = drawn[0].numpy().astype(np.float64)
    else:
        names, values, breaks, gap, notes, row = read_table(root, time=time, columns=columns)
        for note in notes:
            say(note)
        if gap is not None:
            say(f"{root}: {gap}")
    borders = _borders(len(values), parts, root or "var")
    train = values[slice(*borders["train"])]
    mean, std = _statistics(train, [f"{root or 'var'}: column {name!r}" for name in names])
    flat = [
        name for name, column in zip(names, train.T, strict=True) if np.fmin.reduce(column) == np.fmax.reduce(column)
    ]
    if flat:
        shown = some([repr(name) for name in flat])
        say(f"{root}: constant in the training rows, so that there is nothing to learn from: column {shown}")
    values = standardised(values, mean, std)
    for place, (name, column) in enumerate(zip(names, values.T, strict=True)):
        if max(np.fmax.reduce(column), -np.fmin.reduce(column)) > LARGEST_VALUE:
            far = int(np.nanargmax(np.abs(column)))
            raise UserError(
                f"{root}: {row(far)} of column {name!r} is more than {LARGEST_VALUE:g} standard deviations of the "
                f"training rows ({std[place]:g}) away from their mean; empty the cell if the value is missing"
            )
    return Series(
        torch.from_numpy(values), torch.from_numpy(mean).float(), torch.from_numpy(std).float(), borders, breaks, gap
    )


def standardised(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(values - mean) / std in float64, then rounded to float32; [T, C], with mean and std [C].

    The result takes the place of `values` in its memory, of which half is given back: a series may be as large as the
    memory allows. `values` must own its memory and is of no use afterwards.
    """
    rows, columns = values.shape
    single = values.reshape(-1).view(np.float32)
    for start in range(0, rows, _ROWS):
        block = (values[start : start + _ROWS] - mean) / std
        single[start * columns : start * columns + block.size] = block.reshape(-1)  # never beyond the rows just read
    del single
    values.resize(((rows + 1) // 2, columns), refcheck=False)
    return values.reshape(-1).view(np.float32)[: rows * columns].reshape(rows, columns)


def _borders(rows: int, parts: tuple[float, float, float], name: str) -> dict[str, tuple[int, int]]:
    counts = [part if isinstance(part, int) else round(part * rows) for part in parts]
    if sum(counts) > rows + 1:  # shares may be rounded up
        raise UserError(f"{name} has {rows} rows, data.parts={parts} want {sum(counts)}; lower them")
    ends = [min(sum(counts[: i + 1]), rows) for i in range(3)]
    return dict(zip(SPLITS, zip((0, *ends), ends, strict=False), strict=True))


def _statistics(values: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [C] float64 of what is there, column by column; the deviation of a constant is 1.

    Args:
        names: what a message calls each column.
    """
    moments = ColumnMoments(values.shape[1])
    for start in range(0, len(values), _ROWS):
        moments.add(values[start : start + _ROWS])
    if not moments.count.all():
        name = names[int(np.flatnonzero(moments.count == 0)[0])]
        raise UserError(f"{name} has no value in the training rows; leave it out, or fill it")
    return moments.mean, moments.deviation(ROUNDING)


@lru_cache(maxsize=4)
def _labelled(root: str, split: str) -> LabelledSeries:
    return read_labelled(root, split)


def _classes(root: str) -> tuple[str, ...] | None:
    """Names of the classes, those of numbers in their order; None where labels are numbers to predict."""
    train, test = ({*_labelled(root, split).labels} for split in ("train", "test"))
    kinds = {type(label) for label in train | test}
    if kinds == {float}:
        return None
    if len(kinds) > 1:
        raise UserError(f"{root}: the labels of one file are classes, those of the other numbers to predict; fix them")
    names, alone = {str(name) for name in train}, sorted(map(str, test - train))
    if alone:
        raise UserError(f"{root}: no series of the train file has the class {alone[0]} of the test file; leave it out")
    whole = all(name.lstrip("+-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if whole else None))


def _labelled_windows(data: TimeSeries, split: str) -> Labelled:
    root = str(data.root)
    series, train = _labelled(root, split), _labelled(root, "train")
    count, longest, channels = series.values.shape
    if longest > data.window:
        fit = -(-longest // data.patch) * data.patch
        raise UserError(f"{root}: the longest {split} series has {longest} steps; set data.window={fit} or more")
    if channels != train.values.shape[2]:
        raise UserError(
            f"{root}: {channels} channels in the {split} file and {train.values.shape[2]} in the train file"
        )
    if channels > 1 and data.channels == "independent":
        raise UserError(f"{root}: series of {channels} channels have one label; set data.channels=mixing")
    names = [f"{root}: dimension {c + 1}" for c in range(channels)]
    mean, std = _statistics(train.values.reshape(-1, channels), names)
    values = np.full((count, data.window, channels), np.nan, np.float32)
    values[:, :longest] = (series.values - mean) / std
    whole = (~np.isnan(values)).reshape(count, -1, data.patch * channels).all(-1).sum(1)
    short = int((whole < 2).sum())
    if short == count:
        raise UserError(f"{root}: no {split} series has two whole tokens; make data.patch smaller")
    if short:
        say(
            f"{series.path}: {short:,} of {count:,} series have fewer than two tokens without a missing value and are "
            f"skipped as unreadable; a smaller data.patch (it is {data.patch}) leaves out fewer"
        )
    classes = _classes(root)
    if classes is not None and split == "train" and 2 < len(classes) == count:
        say(f"{series.path}: each of its {count:,} series has a class of its own; is its first column a row number?")
    if classes is None:
        labels = torch.tensor(series.labels, dtype=torch.float32)
    else:
        number = {name: place for place, name in enumerate(classes)}
        labels = torch.tensor([number[str(label)] for label in series.labels])
    return Labelled(torch.from_numpy(values), labels, torch.from_numpy(whole), series)


# ------------------------------------------------------------------------------------ the synthetic source


@cached
def _transition() -> Tensor:
    """A [C, C]: two damped rotations, of 12 and of 40 steps, seen through a random orthogonal map; radius `_RADIUS`."""
    blocks = []
    for steps in (12, 40):
        angle = torch.tensor(2 * torch.pi / steps)
        blocks.append(_RADIUS * torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2))
    mixed = torch.linalg.qr(torch.randn(VAR_CHANNELS, VAR_CHANNELS, generator=torch.Generator().manual_seed(0)))[0]
    rotations = torch.zeros(VAR_CHANNELS, VAR_CHANNELS)
    rotations[:2, :2], rotations[2:, 2:] = blocks
    transition: Tensor = mixed @ rotations @ mixed.T
    return transition


def _autoregression(
    steps: int, count: int, draw: torch.Generator, *, start: Tensor | None = None, burn_in: int = 0
) -> Tensor:
    """x[t] = A x[t - 1] + e[t], e standard normal: steps after `start` [count, C] (default 0), [count, steps, C]."""
    transition, state = _transition(), torch.zeros(count, VAR_CHANNELS) if start is None else start
    noise = torch.randn(burn_in + steps, count, VAR_CHANNELS, generator=draw)
    found = []
    for step, shock in enumerate(noise):
        state = state @ transition.T + shock
        if step >= burn_in:
            found.append(state)
    return torch.stack(found, dim=1)


@torch.no_grad()
def _reachable(embed: nn.Module, tokens: Tensor) -> Tensor:
    """|E[u]| of the directions u of embedded tokens [S, K, P], estimated without the bias of K draws; [S]."""
    draws = tokens.shape[1]
    total = nn.functional.normalize(embed(tokens).float(), dim=-1).sum(1)
    squared = (total.square().sum(-1) - draws) / (draws * (draws - 1))
    return squared.clamp(min=0).sqrt().cpu()
