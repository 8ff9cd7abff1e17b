"""Several kinds of data in one predictor: each with its own tokens and embedder, in one batch or in one sequence.

Mixed: samples of one part each. Paired: samples of all parts, in one sequence. A token is padded to the largest of any
part, with the number of its part as one more number, by which the embedder knows whose it is; coordinates are padded by
zeros to the most axes of any.

Shapes: B samples, N tokens, P numbers in a padded token, A axes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_serializer, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from modalities.data.joined import PartEmbedders, one_batch, one_sequence, order_of_batch, order_of_sequence
from modalities.data.parts import Mixed, Paired, by_index, by_label, common_classes, naming, numbered, of_class, opened
from nepa_core.basics import Batch, UserError
from nepa_core.modality import Crossing, Modality, first_sample
from nepa_core.runtime.config import as_saved, from_saved, nearest
from nepa_core.tokens import ImageInput, Signal, Sketch, Tokens

OF_ONE = ("classes", "forecasts", "files", "stored", "whole_images", "image_input", "window_scale", "known_optimum")
"""Methods that are those of one part, where one is chosen."""


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
        if len(self.parts) < 2:
            raise ValueError(f"data.parts needs two parts or more, and has {', '.join(self.parts) or 'none'}")
        for name in self.parts:
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in ("part", "label", "target", "drawn"):
                raise ValueError(f"data.parts.{name}: call a part by another name, of letters, digits and _")
        named = {"data.part": self.part, "data.first": None if self.first == "drawn" else self.first}
        for key, name in [*named.items(), *((f"data.weights.{name}", name) for name in self.weights or ())]:
            if name is not None and name not in self.parts:
                raise ValueError(f"{key if '.weights.' in key else f'{key}={name}'}: no such part{nearest(name, self.parts)}")
        if self.weights is not None:
            if missing := [name for name in self.parts if name not in self.weights]:
                raise ValueError(f"data.weights.{missing[0]} is missing: give every part its share")
            if wrong := [name for name, weight in self.weights.items() if not 1e-6 <= weight <= 1e6]:
                raise ValueError(f"data.weights.{wrong[0]}={self.weights[wrong[0]]:g}: a share is above 0")
            if self.mode == "paired":
                raise ValueError("data.weights is of data.mode=mixed: pairs hold one sample of every part")
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
                return self.parts[self.part].samples_of(split)
        sets = opened(self.parts, split)
        if self.mode == "mixed":
            equal = dict.fromkeys(self.parts, 1.0)
            return Mixed(sets, (self.weights or equal) if training else None)
        if self.pair_by == "index":
            return Paired(sets, by_index(sets), None)
        common = common_classes(self.parts)
        classes = [numbered(part, split, common) for part in self.parts.values()]
        rows = by_label(classes, once=split != "train")
        if not len(rows):
            raise UserError(f"data.pair_by=label: no class has {split} samples of every part")
        partners = [of_class(each) for each in classes[1:]] if training else None
        return Paired(sets, rows, classes[0][rows[:, 0]], partners)

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
        alone = self.mode == "mixed" and self.part is None
        return {name: self.model_copy(update={"part": name}) for name in self.parts if alone}

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
            return common_classes(self.parts) if self.pair_by == "label" else None
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

    def forecasts(self, split: str, horizon: int) -> Dataset[Batch]:
        return self._one.forecasts(split, horizon)

    def window_scale(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._one.window_scale(batch)

    def files(self, paths: Sequence[str]) -> Dataset[Batch]:
        return self._one.files(paths)

    def stored(self, split: str) -> Dataset[Batch]:
        return self._one.stored(split)

    def image_input(self) -> ImageInput:
        return self._one.image_input()


def _keys_of(part: str, batch: Batch) -> Batch:
    return {key.removeprefix(f"{part}."): x for key, x in batch.items() if key.startswith(f"{part}.")}
