"""How tokens of several parts become those of one network: padded to one form, embedded each by its own map, ordered.

Shapes: B samples, N tokens, P numbers in a padded token, n tokens of one part, K parts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from modalities.data.parts import known_by, naming
from nepa_core.basics import UserError
from nepa_core.modality import Modality, first_sample
from nepa_core.tokens import Tokens

Own = Callable[[int, Tokens], Tensor | None]
"""(number of a part, its tokens) -> their order, [n] or [B, n] int64 or None."""


class Form(NamedTuple):
    """Numbers in a part's token, and its axes."""

    size: int
    axes: int


class Layout(dict[str, Form]):
    """The form of every part's tokens, by its name, in the order of their numbers."""

    @classmethod
    def measured(cls, parts: Mapping[str, Modality]) -> Self:
        """On the first training sample of each.

        Raises:
            UserError: a part has none that can be read.
        """
        found = cls()
        for name, part in parts.items():
            with naming(name):
                found[name] = _form(part)
        return found

    @property
    def largest(self) -> Form:
        return Form(max(form.size for form in self.values()), max(form.axes for form in self.values()))

    def padded(self, name: str, tokens: Tokens) -> Tokens:
        """A part's tokens in the form of all, the number of the part behind the others."""
        number, (size, axes) = list(self).index(name), self.largest
        values = F.pad(tokens.values.float(), (0, size - tokens.values.shape[-1]))
        whose = values.new_full((*values.shape[:2], 1), number)
        coords = F.pad(tokens.coords, (0, axes - tokens.coords.shape[-1]))
        part = torch.full(values.shape[1:2], number, device=values.device)
        return Tokens(torch.cat((values, whose), dim=-1), coords, tokens.mask, part=part)

    def own(self, name: str, tokens: Tokens) -> Tokens:
        """The way back of `padded`, also in another order."""
        size, axes = self[name]
        return Tokens(tokens.values[..., :size], tokens.coords[..., :axes], tokens.mask, tokens.order)

    def of_part(self, name: str, given: Any) -> Any:
        """What a method of one part is given: its own tokens, or values [..., P]; all else as it is."""
        if isinstance(given, Tokens):
            return self.own(name, given)
        return given[..., : self[name].size] if isinstance(given, Tensor) else given

    def placed(self, coords: Tensor) -> Tensor:
        """A part's coordinates [B, N, A] with as many axes as all have."""
        return F.pad(coords, (0, self.largest.axes - coords.shape[-1]))

    def check_merged(self) -> None:
        """Whether time alone orders the tokens of all parts.

        Raises:
            UserError: a part has more axes.
        """
        for name, form in self.items():
            if form.axes > 1:
                raise UserError(
                    f"data.arrange=interleaved merges by time, and part {name} has {form.axes} axes: set it to after"
                )


_FORMS: dict[str, Form] = {}


def _form(part: Modality) -> Form:
    """Measured once in a process, for adapters are copied often and opening their data may take long."""
    if (key := known_by(part)) not in _FORMS:
        tokens = part.tokenize(default_collate([first_sample(part)]))
        _FORMS[key] = Form(tokens.values.shape[-1], tokens.coords.shape[-1])
    return _FORMS[key]


class PartEmbedders(nn.Module):
    """Each token by the embedder of its part; zero for padding that is of none.

    Args:
        own: name -> raw tokens [1, m, size] -> [1, m, D], in the order of their numbers. sizes: of the raw tokens.
    """

    def __init__(self, own: Mapping[str, nn.Module], sizes: Sequence[int]) -> None:
        super().__init__()
        self.own, self.sizes = nn.ModuleDict(own), list(sizes)

    def of(self, name: str) -> nn.Module:
        """The map of one part, of its own raw tokens."""
        return self.own[name]

    def forward(self, values: Tensor) -> Tensor:
        """[B, N, P], the number of the part last -> [B, N, D]."""
        which = values[..., -1].round().long()
        found: Tensor | None = None
        for number, (embed, size) in enumerate(zip(self.own.values(), self.sizes, strict=True)):
            places = which == number
            made = embed(values[places][None, :, :size])[0]  # also of no token: every weight has a gradient
            found = made.new_zeros(*which.shape, made.shape[-1]) if found is None else found
            found[places] = made.to(found.dtype)
        assert found is not None
        return found


def one_sequence(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of all parts of every sample, one part after the other."""
    samples, masked = len(parts[0].values), any(each.mask is not None for each in parts)
    shared = all(each.coords.ndim == 2 for each in parts)
    coords = [each.coords if shared else each.coords.expand(samples, -1, -1) for each in parts]
    device = parts[0].values.device
    return Tokens(
        torch.cat([each.values for each in parts], dim=1),
        torch.cat(coords if shared else [each.to(device) for each in coords], dim=-2),
        torch.cat([each.real for each in parts], dim=1) if masked else None,
        part=torch.cat([each.part for each in parts if each.part is not None]),
    )


def one_batch(parts: Mapping[str, Tokens], rows: Mapping[str, Tensor], samples: int) -> Tokens:
    """Samples of one part each, padded to the longest.

    Args:
        rows: [b] int64 for each part, the samples of the batch that are its.
    """
    first = next(iter(parts.values()))
    count = max(each.values.shape[1] for each in parts.values())
    values = first.values.new_zeros(samples, count, first.values.shape[-1])
    values[..., -1] = -1
    coords = torch.zeros(samples, count, first.coords.shape[-1], device=values.device)
    mask = torch.zeros(samples, count, dtype=torch.bool, device=values.device)
    part = torch.full((samples, count), -1, device=values.device)
    for name, each in parts.items():
        own, n = rows[name], each.values.shape[1]
        assert each.part is not None
        values[own, :n], coords[own, :n] = each.values, each.coords.to(values.device)
        mask[own, :n], part[own, :n] = each.real, each.part
    return Tokens(values, coords, None if n == count and bool(mask.all()) else mask, part=part)


def order_of_batch(tokens: Tokens, count: int, own: Own) -> Tensor | None:
    """The order of samples of one part each, [B, N]; None where every part is read in canonical order.

    Args:
        tokens: of `one_batch`. count: K.
    """
    assert tokens.part is not None
    samples, places = tokens.part.shape
    order = torch.arange(places, device=tokens.part.device).repeat(samples, 1)
    moved = False
    for number in range(count):
        rows = (tokens.part == number).any(1).nonzero()[:, 0]
        if len(rows):
            n = int((tokens.part[rows] == number).sum(1).max())
            found = own(number, _cut(tokens.rows(rows), slice(n)))
            if found is not None:
                order[rows, :n], moved = found.to(order.device), True
    return order if moved else None


def order_of_sequence(tokens: Tokens, count: int, own: Own, lead: Tensor, *, merged: bool) -> Tensor:
    """The order of samples that hold all parts, [N] or [B, N].

    Args:
        tokens: of `one_sequence`. count: K.
        lead: [1] or [B] int64, the part whose tokens come first, or of equal coordinates; the others follow as they are
            numbered.
        merged: by the first coordinate, in place of one part after the other. Within a part its own order stays.
    """
    assert tokens.part is not None
    pieces: list[Tensor] = []
    for number in range(count):
        places = (tokens.part == number).nonzero()[:, 0]
        start, n = int(places[0]), len(places)
        found = own(number, _cut(tokens, slice(start, start + n)))
        pieces.append(places if found is None else found.to(places.device) + start)
    rows = max((each.ndim for each in pieces), default=1)
    if rows == 2:
        pieces = [each.expand(len(tokens.values), -1) for each in pieces]
    of_lead = {first: _laid(tokens, pieces, first, merged) for first in sorted(set(lead.tolist()))}
    if len(lead) == 1:
        return of_lead[int(lead)]
    shape = tokens.values.shape[:2]
    order = torch.empty(shape, dtype=torch.int64, device=tokens.values.device)
    for first, each in of_lead.items():
        chosen = (lead == first).to(order.device)
        order[chosen] = each.to(order.device).expand(shape)[chosen]
    return order


def _laid(tokens: Tokens, pieces: Sequence[Tensor], first: int, merged: bool) -> Tensor:
    order = torch.cat([pieces[first], *(each for number, each in enumerate(pieces) if number != first)], dim=-1)
    if not merged:
        return order
    time = tokens.coords[..., 0].to(order.device)
    if time.ndim == 2 or order.ndim == 2:
        shape = tokens.values.shape[:2]
        time, order = time.expand(shape), order.expand(shape)
        pieces = [each.expand(shape[0], -1) for each in pieces]
    own = [time.gather(-1, each).cummax(-1).values for each in pieces]  # its own order stays, however it runs
    when = torch.cat([own[first], *(each for number, each in enumerate(own) if number != first)], dim=-1)
    return order.gather(-1, when.argsort(dim=-1, stable=True))


def _cut(tokens: Tokens, some: slice) -> Tokens:
    """Some places of every sample."""
    part = tokens.part if tokens.part is None else tokens.part[..., some]
    mask = None if tokens.mask is None else tokens.mask[:, some]
    return Tokens(tokens.values[:, some], tokens.coords[..., some, :], mask, part=part)
