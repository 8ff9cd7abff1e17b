"""Several kinds of data in one predictor: each with its own tokens and embedder, in one batch or in one sequence.

A token is padded to the largest of any part, with the number of its part as one more number, by which the embedder
knows whose it is; coordinates are padded by zeros to the most axes of any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_serializer, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from modalities.data.joined import Layout, PartEmbedders, one_batch, one_sequence, order_of_batch, order_of_sequence
from modalities.data.parts import Mixed, Parts, check_parts, common_classes, crossed, keys_of, naming, opened, paired
from modalities.orders import padding_behind
from nepa_core.basics import Batch, UserError
from nepa_core.modality import Crossing, Modality
from nepa_core.runtime.config import as_saved
from nepa_core.tokens import Tokens

# Of the part that is chosen.
OF_ONE = ("forecasts", "window_scale", "files", "stored", "image_input", "whole_images", "mixed")
OR_DEFAULT = ("describe", "decode", "before_mixing", "held_out_as", "symbols", "readings")  # or else as of any adapter


def _of_one(method: str) -> Any:
    def call(self: Together, *given: Any, **named: Any) -> Any:
        if self.part is None and method in OR_DEFAULT:
            return getattr(super(Together, self), method)(*given, **named)
        own = (self.layout.of_part(str(self.part), each) for each in given)
        return getattr(self.chosen, method)(*own, **named)

    return call


class Together(Modality):
    """Parts by name, each an adapter of any kind.

    Attributes:
        parts: name -> adapter; their keys are data.parts.NAME.KEY.
        mode: "mixed", samples of one part each; or "paired", samples that hold one of every part.
        weights: of "mixed": the share of each part in every batch; None for equal ones.
        pair_by: of "paired": "label" pairs samples of the same class, in training with partners drawn anew each time
            and else always the same, held-out ones once each; "index" pairs sample i of all parts.
        arrange: of "paired": one part "after" the other, or "interleaved" by the first coordinate, such as time.
        first: of "paired": the part whose tokens come first; or "drawn", anew for each training sample, and elsewhere
            the first of `parts`.
        part: read the samples of this part alone, as the network of all parts reads them.
    """

    parts: Parts
    mode: Literal["mixed", "paired"]
    weights: dict[str, float] | None = None
    pair_by: Literal["label", "index"] = "label"
    arrange: Literal["after", "interleaved"] = "after"
    first: str = "drawn"
    part: str | None = Field(default=None, exclude_if=lambda part: part is None)
    _drawing: bool = PrivateAttr(False)  # set by `at` alone
    _plain: bool = PrivateAttr(False)  # set by `plain` alone

    @field_serializer("parts")
    def _saved(self, parts: dict[str, Modality]) -> dict[str, Any]:
        return {name: as_saved(part) for name, part in parts.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        first = None if self.first == "drawn" else self.first
        check_parts(self.parts, self.mode, self.weights, {"data.part": self.part, "data.first": first})
        return self

    @cached_property
    def layout(self) -> Layout:
        return Layout.measured(self.parts)

    def dataset(self, split: str) -> Dataset[Batch]:
        training = split == "train" and not self._plain
        if self.part is not None:
            return opened({self.part: self.chosen}, split)[self.part]
        if self.mode == "paired":
            return paired(self.parts, split, self.pair_by, training=training)
        return Mixed(opened(self.parts, split), self.shares() if training else None)

    def tokenize(self, batch: Batch) -> Tokens:
        if self.part is not None:
            return self._padded(self.part, batch)
        if self.mode == "paired":
            return one_sequence([self._padded(name, keys_of(name, batch)) for name in self.parts])
        rows = {name: (batch["part"] == number).nonzero()[:, 0] for number, name in enumerate(self.parts)}
        there = {name: keys_of(name, batch, own) for name, own in rows.items() if len(own)}
        return one_batch({name: self._padded(name, own) for name, own in there.items()}, rows, len(batch["part"]))

    def _padded(self, name: str, batch: Batch) -> Tokens:
        with naming(name):
            return self.layout.padded(name, self.parts[name].tokenize(batch))

    def order(self, tokens: Tokens) -> Tensor | None:
        """Each part in its own order; of pairs one after the other or merged, padding behind."""
        names = list(self.parts)

        def own(number: int, some: Tokens) -> Tensor | None:
            return self.parts[names[number]].order(self.layout.own(names[number], some))

        if self.part is not None:
            return own(names.index(self.part), tokens)
        if self.mode == "mixed":
            return padding_behind(order_of_batch(tokens, len(names), own), tokens.mask)
        if merged := self.arrange == "interleaved":
            self.layout.check_merged()
        lead = torch.tensor([0 if self.first == "drawn" else names.index(self.first)])
        if self._drawing:
            lead = torch.randint(len(names), (len(tokens.values),))
        return padding_behind(order_of_sequence(tokens, len(names), own, lead, merged=merged), tokens.mask)

    def embedder(self, dim: int) -> nn.Module:
        own = {name: part.embedder(dim) for name, part in self.parts.items()}
        return PartEmbedders(own, [self.layout[name].size for name in self.parts])

    def _each(self, change: Callable[[str, Modality], Modality]) -> Self:
        return self.model_copy(update={"parts": {name: change(name, part) for name, part in self.parts.items()}})

    def plain(self) -> Self:
        found = self._each(lambda _, part: part.plain())
        found._plain = True
        return found

    def at(self, progress: float) -> Self:
        found = self._each(lambda _, part: part.at(progress))
        found._drawing = self.first == "drawn"
        return found

    def as_trained_on(self, trained: Modality) -> Self:
        theirs = trained.parts if isinstance(trained, Together) else {}
        return self._each(lambda name, part: part.as_trained_on(theirs.get(name, part)))

    def draws_order(self) -> bool:
        return any(self.parts[name].draws_order() for name in ([self.part] if self.part else self.parts))

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
        found = crossed(list(self.parts), self.first)
        return {name: Crossing(self.model_copy(update={"first": a}), *pair) for name, (a, *pair) in found.items()}

    @property
    def chosen(self) -> Modality:
        """The part that is read alone; a `UserError` where there is none."""
        if self.part is None:
            ways = " or ".join(f"part={name}" for name in self.parts)
            raise UserError(f"samples are of several parts, and one is wanted here: add {ways}")
        return self.parts[self.part]

    @property
    def token_name(self) -> str:  # type: ignore[override]
        return "token" if self.part is None else self.chosen.token_name

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("",) if self.part is None else self.chosen.suffixes

    forecasts, window_scale, files, stored, image_input, whole_images, mixed = map(_of_one, OF_ONE)
    describe, decode, before_mixing, held_out_as, symbols, readings = map(_of_one, OR_DEFAULT)

    def placed(self, tokens: Tokens) -> Tensor | None:
        found = None if self.part is None else self.chosen.placed(self.layout.own(self.part, tokens))
        return None if found is None else self.layout.placed(found)

    def offers(self, method: str) -> bool:
        if method not in (*OF_ONE, "classes"):
            return super().offers(method)
        return self.mode == "paired" and method == "classes" if self.part is None else self.chosen.offers(method)

    def classes(self) -> tuple[str, ...] | None:
        if self.part is not None or self.mode == "mixed":
            return self.chosen.classes()
        own = (part.classes() for part in self.parts.values())
        return common_classes(self.parts) if self.pair_by == "label" else next((each for each in own if each), None)

    def token_targets(self, batch: Batch) -> Tensor | None:
        return None if self.part is None and self.mode == "paired" else self.chosen.token_targets(batch)

    def known_optimum(self, embed: nn.Module) -> float | None:
        if self.part is None or not isinstance(embed, PartEmbedders):
            return None
        return self.chosen.known_optimum(embed.of(self.part))
