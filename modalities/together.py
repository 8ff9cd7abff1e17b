"""Several kinds of data in one predictor: each with its own tokens and embedder, in one batch or in one sequence.

Mixed: samples of one part each. Paired: samples of all parts, in one sequence. A token is padded to the largest of any
part, with the number of its part as one more number, by which the embedder knows whose it is; coordinates are padded by
zeros to the most axes of any.

Shapes: B samples, N tokens, P numbers in a padded token, A axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_serializer, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from modalities.data.joined import PartEmbedders, one_batch, one_sequence, order_of_batch, order_of_sequence
from modalities.data.parts import Mixed, check_names, common_classes, naming, opened, paired
from nepa_core.basics import Batch, UserError
from nepa_core.modality import Crossing, Modality, first_sample
from nepa_core.runtime.config import as_saved, from_saved
from nepa_core.tokens import Signal, Sketch, Tokens

OF_ONE = ("classes", "forecasts", "files", "stored", "whole_images", "image_input", "window_scale", "known_optimum")
"""Methods that are those of one part, where one is chosen."""


def _of_one(method: str) -> Any:
    """A method that is that of the chosen part."""
    return lambda self, *given, **named: getattr(self._one, method)(*given, **named)


class Form(NamedTuple):
    """Numbers in a part's token, and its axes."""

    size: int
    axes: int


class Together(Modality):
    """Parts by name, each an adapter of any kind.

    Attributes:
        parts: name -> adapter; their keys are data.parts.NAME.KEY.
        mode: "mixed", samples of one part each; or "paired", samples that hold one of every part.
        weights: of "mixed": the share of each part in every batch; None for equal ones.
        pair_by: of "paired": "label" pairs samples of the same class, in training with partners drawn anew each time
            and else always the same, held-out ones once each; "index" pairs sample i of all parts.
        arrange: of "paired": one part "after" the other, or "interleaved" by the first coordinate, such as time.
        first: of "paired": the part whose tokens come first, or "drawn": anew for each training sample, so that every
            part is predicted from the others; where nothing is drawn the first of `parts` leads.
        part: read the samples of this part alone, as the network of all parts reads them.
    """

    parts: dict[str, Modality]
    mode: Literal["mixed", "paired"]
    weights: dict[str, float] | None = None
    pair_by: Literal["label", "index"] = "label"
    arrange: Literal["after", "interleaved"] = "after"
    first: str = "drawn"
    part: str | None = Field(default=None, exclude_if=lambda part: part is None)
    _drawing: bool = PrivateAttr(False)  # set by `at` alone
    _plain: bool = PrivateAttr(False)  # set by `plain` alone

    @field_validator("parts", mode="before")
    @classmethod
    def _opened(cls, parts: Any) -> Any:
        if not isinstance(parts, Mapping):
            raise ValueError("name the parts: each an adapter")
        return {name: from_saved(part, f"data.parts.{name}") for name, part in parts.items()}

    @field_serializer("parts")
    def _saved(self, parts: dict[str, Modality]) -> dict[str, Any]:
        return {name: as_saved(part) for name, part in parts.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        first = None if self.first == "drawn" else self.first
        check_names(self.parts, self.weights, {"data.part": self.part, "data.first": first})
        if self.weights is not None and self.mode == "paired":
            raise ValueError("data.weights is of data.mode=mixed: a pair holds one sample of every part")
        return self

    # pydantic leaves properties alone; which kind of token this is depends on a setting
    @property
    def token_name(self) -> str:  # type: ignore[override]
        return "token" if self.part is None else self.parts[self.part].token_name

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("",) if self.part is None else self.parts[self.part].suffixes

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Of every part, measured on its first training sample."""
        found = {}
        for name, part in self.parts.items():
            with naming(name):
                tokens = part.tokenize(default_collate([first_sample(part)]))
            found[name] = Form(tokens.values.shape[-1], tokens.coords.shape[-1])
        return found

    def dataset(self, split: str) -> Dataset[Batch]:
        training = split == "train" and not self._plain
        if self.part is not None:
            with naming(self.part):
                return self._one.samples_of(split)
        if self.mode == "paired":
            return paired(self.parts, split, self.pair_by, training=training)
        shares = self.weights or dict.fromkeys(self.parts, 1.0)
        return Mixed(opened(self.parts, split), shares if training else None)

    def tokenize(self, batch: Batch) -> Tokens:
        if self.part is not None:
            return self._padded(self.part, batch)
        if self.mode == "paired":
            return one_sequence([self._padded(name, _keys_of(name, batch)) for name in self.parts])
        rows = {name: (batch["part"] == number).nonzero()[:, 0] for number, name in enumerate(self.parts)}
        found = {
            name: self._padded(name, {key: x[own] for key, x in _keys_of(name, batch).items()})
            for name, own in rows.items()
            if len(own)
        }
        return one_batch(found, rows, len(batch["part"]))

    def _padded(self, name: str, batch: Batch) -> Tokens:
        """A part's tokens in the form of all."""
        with naming(name):
            tokens = self.parts[name].tokenize(batch)
        number, (size, axes) = list(self.parts).index(name), self._largest()
        values = F.pad(tokens.values.float(), (0, size - tokens.values.shape[-1]))
        whose = values.new_full((*values.shape[:2], 1), number)
        coords = F.pad(tokens.coords, (0, axes - tokens.coords.shape[-1]))
        part = torch.full(values.shape[1:2], number, device=values.device)
        return Tokens(torch.cat((values, whose), dim=-1), coords, tokens.mask, part=part)

    def _largest(self) -> Form:
        return Form(max(form.size for form in self.forms.values()), max(form.axes for form in self.forms.values()))

    def _own(self, name: str, tokens: Tokens) -> Tokens:
        """Tokens of one part alone, in its own form."""
        size, axes = self.forms[name]
        return replace(tokens, values=tokens.values[..., :size], coords=tokens.coords[..., :axes], part=None)

    def order(self, tokens: Tokens) -> Tensor | None:
        """Each part in its own order; of pairs one after the other or merged, padding behind.

        Raises:
            UserError: parts are to be merged by time, and one has more axes.
        """
        if self.part is not None:
            return self._one.order(self._own(self.part, tokens))
        names = list(self.parts)

        def own(number: int, some: Tokens) -> Tensor | None:
            return self.parts[names[number]].order(self._own(names[number], some))

        if self.mode == "mixed":
            return order_of_batch(tokens, len(names), own)
        merged = self.arrange == "interleaved"
        if merged and (spatial := [name for name in names if self.forms[name].axes > 1]):
            raise UserError(
                f"data.arrange=interleaved merges by time, and part {spatial[0]} has {self.forms[spatial[0]].axes} axes: "
                "set data.arrange=after"
            )
        lead = torch.tensor([names.index(self.first) if self.first != "drawn" else 0])
        if self._drawing:
            lead = torch.randint(len(names), (len(tokens.values),))
        return order_of_sequence(tokens, len(names), own, lead, merged=merged)

    def embedder(self, dim: int) -> nn.Module:
        own = {name: part.embedder(dim) for name, part in self.parts.items()}
        return PartEmbedders(own, [self.forms[name].size for name in self.parts])

    def token_dim(self) -> int:
        return self._largest().size + 1

    # ------------------------------------------------------------------------- what is done to every part

    def _each(self, change: Callable[[Modality], Modality]) -> Self:
        return self.model_copy(update={"parts": {name: change(part) for name, part in self.parts.items()}})

    def plain(self) -> Self:
        found = self._each(lambda part: part.plain())
        found._plain = True
        return found

    def at(self, progress: float) -> Self:
        found = self._each(lambda part: part.at(progress))
        found._drawing = self.first == "drawn" and self.mode == "paired" and self.part is None
        return found

    def draws_order(self) -> bool:
        return any(part.draws_order() for name, part in self.parts.items() if self.part in (None, name))

    def as_trained_on(self, trained: Modality) -> Self:
        theirs = trained.parts if isinstance(trained, Together) else {}
        parts = {name: part.as_trained_on(theirs.get(name, part)) for name, part in self.parts.items()}
        return self.model_copy(update={"parts": parts})

    def part_names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def strata(self) -> Mapping[str, Modality]:
        if self.part is not None:
            return {self.part: self}
        return {name: self.model_copy(update={"part": name}) for name in self.parts if self.mode == "mixed"}

    def shares(self) -> Mapping[str, float]:
        weights = self.weights or dict.fromkeys(self.parts, 1.0)
        return {name: weights[name] / sum(weights.values()) for name in self.strata()}

    def crossings(self) -> Mapping[str, Crossing]:
        if self.mode == "mixed" or self.part is not None or self.arrange == "interleaved":
            return {}
        names, found = list(self.parts), {}
        for source in names if self.first == "drawn" else [self.first]:
            target = next(name for name in names if name != source)
            data = self.model_copy(update={"first": source})
            found[f"{target} from {source}"] = Crossing(data, names.index(source), names.index(target))
        return found

    # ------------------------------------------------------------------------- what is that of one part

    @property
    def _one(self) -> Modality:
        if self.part is None:
            ways = " or ".join(f"part={name}" for name in self.parts)
            raise UserError(f"samples are of several parts, and one is wanted here: add {ways}")
        return self.parts[self.part]

    def offers(self, method: str) -> bool:
        if method not in OF_ONE:
            return super().offers(method)
        return self._one.offers(method) if self.part is not None else method == "classes" and self.mode == "paired"

    def classes(self) -> tuple[str, ...] | None:
        if self.part is None and self.mode == "paired":
            own = (part.classes() for part in self.parts.values())
            return common_classes(self.parts) if self.pair_by == "label" else next((each for each in own if each), None)
        return self._one.classes()

    def token_targets(self, batch: Batch) -> Tensor | None:
        return None if self.part is None else self._one.token_targets(batch)

    def before_mixing(self, batch: Batch) -> Batch:
        return self._one.before_mixing(batch)

    def held_out_as(self) -> str | None:
        return None if self.part is None else self._one.held_out_as()

    def known_optimum(self, embed: nn.Module) -> float | None:
        known = self.part is not None and isinstance(embed, PartEmbedders)
        return self._one.known_optimum(embed.own[self.part]) if known else None

    def describe(self, tokens: Tokens) -> Sketch:
        return super().describe(tokens) if self.part is None else self._one.describe(self._own(self.part, tokens))

    def decode(self, tokens: Tokens) -> Signal:
        return super().decode(tokens) if self.part is None else self._one.decode(self._own(self.part, tokens))

    forecasts, window_scale = _of_one("forecasts"), _of_one("window_scale")
    files, stored = _of_one("files"), _of_one("stored")
    image_input, whole_images = _of_one("image_input"), _of_one("whole_images")


def _keys_of(part: str, batch: Batch) -> Batch:
    return {key.removeprefix(f"{part}."): x for key, x in batch.items() if key.startswith(f"{part}.")}
