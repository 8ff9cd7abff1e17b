"""Events at times of their own: kinds, gaps and numbers, of several entities.

Shapes: B windows, N the most events of a window, K kinds, C columns of numbers, P = K + 1 + 2 C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from modalities.data.event_process import NUMBER_SPREAD, OBSERVED, SPREAD, law, mean_gaps, next_kinds
from modalities.data.event_tables import Named
from modalities.data.event_windows import (
    Divide,
    EventWindows,
    Form,
    Measures,
    SourceName,
    classes_of,
    measures_of,
    open_event_files,
    open_events,
    unit_of,
)
from nepa_core.basics import Batch
from nepa_core.modality import Modality
from nepa_core.runtime.config import listed
from nepa_core.tokens import Law, Signal, Sketch, Tokens

_WIDE, _HIGH, _BAR = 8, 6, 24  # pixels: width of an event, height of a kind, height of a gap or number
_FULL = 2.0  # a gap or number that fills its bar


class Events(Modality):
    """Windows of events; a token is one event, and its coordinate is its time.

    A token holds its kind (one-hot), the logarithm of the time since the event before over the usual (median) gap, and
    for each column of numbers the number, standardised, and whether it is there. The gap is part of what is predicted,
    so the time of the next event is, too; do not give it away by `model.predict_position`.

    Attributes:
        source: "file", or "process": a marked point process whose law is known, see `modalities.data.event_process`.
        root: a .csv or .parquet table, a row for each event.
        entity, time, kind, values, label: its columns, see `modalities.data.event_tables`; without `values` all other
            columns of numbers are, without an entity all events are of one.
        divide: what is held out: entities, or the end of time. held_out: how much of it.
        events: most events of a window. span: how long it lasts at most, in seconds, or as numbers of time are; those
            of an entity lie one behind the other.
        unit: how long one unit of a coordinate is, in seconds, or as numbers of time are; default: four usual gaps.
        measured_on: the table whose kinds, usual gap and scales hold; tasks set it where they read other data by a run.
    """

    token_name: ClassVar[str] = "event"
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv", ".parquet")
    built_in: ClassVar[str] = "process"

    source: SourceName
    events: PositiveInt = Field(ge=2)
    root: str | None = None
    entity: str | None = None
    time: str | None = None
    kind: str | None = None
    values: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    label: str | None = None
    divide: Divide = "entity"
    held_out: float = Field(default=0.2, gt=0, lt=1)
    span: PositiveFloat | None = None
    unit: PositiveFloat | None = None
    measured_on: str | None = Field(default=None, exclude_if=lambda root: root is None)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source == "file" and self.root is None:
            raise ValueError("data.source=file needs data.root=FILE, a table with a row for each event")
        return self

    @property
    def form(self) -> Form:
        """What the windows depend on."""
        named = Named(self.entity, self.time, self.kind, self.values, self.label)
        return Form(self.source, self.root, named, self.divide, self.held_out, self.events, self.span)

    @property
    def by(self) -> Form:
        """That of the data that tokens are measured by."""
        return self.form if self.measured_on is None else self.form._replace(root=self.measured_on)

    @property
    def measures(self) -> Measures:
        """Kinds, usual gap and scales."""
        return measures_of(self.by)

    def dataset(self, split: str) -> EventWindows:
        return open_events(self.form, split, self.by)

    def tokenize(self, batch: Batch) -> Tokens:
        """Values [B, N, P]; an event of a kind that training has not has no kind."""
        kinds, numbers = len(self.measures.kinds), batch["numbers"]
        mask = torch.arange(numbers.shape[1], device=numbers.device) < batch["count"][:, None]
        kind = F.one_hot(batch["kind"], kinds + 1)[..., :kinds].float()
        values = torch.cat((kind, batch["gap"][..., None], numbers.nan_to_num(0.0), numbers.isfinite().float()), -1)
        return Tokens(values * mask[..., None], batch["time"][..., None] / unit_of(self.by, self.unit), mask)

    def placed(self, tokens: Tokens) -> Tensor:
        """The times that the gaps add up to, from the first event on."""
        gaps = tokens.values[..., len(self.measures.kinds)].double().clamp(max=20).exp() * tokens.real
        times = (gaps.cumsum(1) - gaps[:, :1]) * self.measures.gap / unit_of(self.by, self.unit)
        return times[..., None].to(tokens.coords.dtype)

    def readings(self, values: Tensor) -> dict[str, Tensor]:
        """The kind, the logarithm of the gap over the usual one, and each number in its deviations."""
        kinds, columns = len(self.measures.kinds), self.measures.columns
        found = {"kind": values[..., :kinds].argmax(-1), "log gap": values[..., kinds]}
        numbers, there = values[..., kinds + 1 :].chunk(2, -1) if columns else (values[..., :0], values[..., :0])
        said = torch.where(there > 0, numbers / there.clamp(min=0.05), torch.nan)
        return found | {name: said[..., place] for place, name in enumerate(columns)}

    def classes(self) -> tuple[str, ...] | None:
        return classes_of(self.by)

    def as_trained_on(self, trained: Modality) -> Events:
        """With the kinds, usual gap and scales of the events that a network was trained on."""
        by = trained.by.root if isinstance(trained, Events) else self.by.root
        return self if by == self.by.root else self.model_copy(update={"measured_on": by})

    def files(self, paths: Sequence[str]) -> EventWindows:
        """Tables by name, of each the first window of its first entity.

        Raises:
            UnreadableSample: from the data set, on access to a file that is none, or has fewer than two events.
        """
        return open_event_files(self.by, tuple(paths))

    def describe(self, tokens: Tokens) -> Sketch:
        """An event a column: its kind a row (black), below it bars of the log gap and of each number, from the middle.

        What is missing, and padding, is grey.
        """
        values, real = tokens.canonical(tokens.values), tokens.canonical(tokens.real)
        kinds, columns = len(self.measures.kinds), self.measures.columns
        parts = [1 - values[..., :kinds].clamp(0, 1).mT.repeat_interleave(_HIGH, 1)]
        height = torch.linspace(_FULL, -_FULL, _BAR, device=values.device)[:, None]
        for place in range(1 + len(columns)):
            bar = values[:, None, :, kinds + place]
            inside = ((height >= 0) & (height <= bar)) | ((height <= 0) & (height >= bar))
            white = torch.where(inside, 0.0, 1.0)
            if place:
                white = torch.where(values[:, None, :, kinds + len(columns) + place] > 0.5, white, 0.6)
            parts += [torch.full_like(white[:, :2], 0.8), white]
        canvas = torch.where(real[:, None], torch.cat(parts, 1), 0.6)
        return Sketch(canvas.repeat_interleave(_WIDE, 2), (1, values.shape[1]))

    def decode(self, tokens: Tokens) -> Signal:
        """Curves: the number of the kind, the time since the first event, and each number (NaN where missing)."""
        values, real = tokens.canonical(tokens.values), tokens.canonical(tokens.real)
        kinds, measures = len(self.measures.kinds), self.measures
        times = self.placed(tokens)[..., 0] * unit_of(self.by, self.unit)
        read = self.readings(values)
        scales = zip(measures.columns, measures.mean, measures.std, strict=True)
        rest = [read[name] * std + mean for name, mean, std in scales]
        every = torch.stack([values[..., :kinds].argmax(-1).float(), tokens.canonical(times), *rest], -1)
        return Signal("curves", every.float().masked_fill(~real[..., None], torch.nan))

    def known_law(self, tokens: Tokens) -> Law | None:
        """Of the process: the moments of each event given those before it, and draws of it."""
        if self.source != "process":
            return None
        kinds, device = len(self.measures.kinds), tokens.values.device
        seen = tokens.values[..., :kinds].argmax(-1)
        share, gaps = next_kinds(seen), mean_gaps(seen) - torch.tensor(self.measures.gap).log().to(device)
        levels = (law()[2].to(device) - self.measures.mean[0]) / self.measures.std[0]
        spread = NUMBER_SPREAD / self.measures.std[0]
        number = OBSERVED * share @ levels
        there = torch.full_like(number, OBSERVED)
        mean = torch.cat((share, torch.stack((gaps, number, there), -1)), -1)
        square = torch.zeros(*mean.shape, mean.shape[-1], dtype=torch.float64, device=device)  # of uncentred products
        square[..., :kinds, :kinds] = torch.diag_embed(share.double())
        square[..., kinds, :] = square[..., :, kinds] = gaps[..., None] * mean
        square[..., kinds, kinds] = gaps**2 + SPREAD**2
        square[..., kinds + 1, :kinds] = square[..., :kinds, kinds + 1] = OBSERVED * share * levels
        square[..., kinds + 2, :kinds] = square[..., :kinds, kinds + 2] = OBSERVED * share
        square[..., kinds + 1, kinds + 1] = OBSERVED * (share @ levels**2 + spread**2)
        square[..., kinds + 1, kinds + 2] = square[..., kinds + 2, kinds + 1] = number
        square[..., kinds + 2, kinds + 2] = OBSERVED

        def draw(count: int, generator: torch.Generator | None) -> Tensor:
            kind = torch.multinomial(share.flatten(0, 1), count, replacement=True, generator=generator)
            kind = kind.T.view(count, *share.shape[:2])
            noise = torch.randn(2, *kind.shape, generator=generator)
            observed = (torch.rand(kind.shape, generator=generator) < OBSERVED).float()
            parts = (gaps + SPREAD * noise[0], observed * (levels[kind] + spread * noise[1]), observed)
            return torch.cat((F.one_hot(kind, kinds).float(), torch.stack(parts, -1)), -1)

        outer = mean[..., :, None].double() * mean[..., None, :].double()
        return Law(mean, square - outer, draw)
