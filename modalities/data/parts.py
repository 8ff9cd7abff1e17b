"""The data sets of several kinds of data in one: samples of one part each, or pairs of samples of all parts.

A sample holds every part's keys as "PART.KEY". Shapes: S samples of a split, K parts.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Annotated, Any, cast

import torch
from pydantic import BeforeValidator
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.modality import Modality, first_readable, readable
from nepa_core.runtime.config import from_saved, import_path, nearest
from nepa_core.runtime.data import rows_of, spread_out
from nepa_core.tokens import Spans


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Within the block errors name the part that they are of."""
    try:
        yield
    except (UserError, UnreadableSample) as error:
        raise type(error)(f"part {part}: {error}") from error


def crossed(parts: Sequence[str], first: str) -> dict[str, tuple[str, int, int]]:
    """ "B from A" -> (A, its number, that of B): the part that leads and the one behind it, for all that may lead."""
    found = {}
    for source in parts if first == "drawn" else [first]:
        target = next(name for name in parts if name != source)
        found[f"{target} from {source}"] = (source, parts.index(source), parts.index(target))
    return found


def _from_file(parts: Any) -> Any:
    if not isinstance(parts, Mapping):
        raise ValueError("name the parts, each an adapter")
    return {name: from_saved(part, f"data.parts.{name}") for name, part in parts.items()}


Parts = Annotated[dict[str, Modality], BeforeValidator(_from_file)]
"""Adapters by name; a config file holds each with its import path."""


def check_parts(
    parts: Mapping[str, Any], mode: str, weights: Mapping[str, float] | None, named: Mapping[str, str | None]
) -> None:
    """Whether parts are called as they may be, what names them names one, and each has a share where shares are given.

    Args:
        named: key -> the part that it names.

    Raises:
        ValueError: what is wrong with which key.
    """
    if len(parts) < 2:
        raise ValueError(f"data.parts needs two parts or more, and has {', '.join(parts) or 'none'}")
    for name in parts:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in RESERVED:
            raise ValueError(f"data.parts.{name}: call a part by another name, of letters, digits and _")
    for key, part in named.items():
        if part is not None and part not in parts:
            known = [*parts, "drawn"] if key == "data.first" else parts
            raise ValueError(f"{key}={part}: there is no such part{nearest(part, known)}")
    if weights is None:
        return
    if mode == "paired":
        raise ValueError("data.weights is of data.mode=mixed: a pair holds one sample of every part")
    for name, weight in weights.items():
        if name not in parts:
            raise ValueError(f"data.weights.{name}: there is no such part{nearest(name, parts)}")
        if not 1e-6 <= weight <= 1e6:
            raise ValueError(f"data.weights.{name}={weight:g}: a share is a number above 0")
    if missing := [name for name in parts if name not in weights]:
        raise ValueError(f"data.weights.{missing[0]} is missing: give every part its share")


RESERVED = ("part", "label", "target", "drawn")
"""Words that are something else beside the names of parts."""


def opened(parts: Mapping[str, Modality], split: str) -> dict[str, Dataset[Batch]]:
    """The samples of every part.

    Raises:
        UserError: a part can't be opened or has none.
    """
    found = {}
    for name, part in parts.items():
        with naming(name):
            found[name] = part.samples_of(split)
            if not len(cast(Sized, found[name])):
                raise UserError(f"its {split} split is empty; look at data.parts.{name}")
    return found


class _Parts(Dataset[Batch], ABC):
    """What both have in common: which samples of the parts stand at an index, and what is said of them."""

    def __init__(self, sets: Mapping[str, Dataset[Batch]]) -> None:
        self.sets = dict(sets)

    @abstractmethod
    def rows(self, index: int) -> dict[str, int]:
        """Part -> its sample, of those that this one holds."""

    def sample_of(self, part: str, row: int) -> Batch:
        """A part's sample, its keys behind its name."""
        with naming(part):
            return named(part, self.sets[part][row])

    def batch_of(self, part: str, rows: Sequence[int]) -> Batch:
        """Several at once, stacked."""
        whole = getattr(self.sets[part], "__getitems__", None)
        with naming(part):
            found = [self.sets[part][row] for row in rows] if whole is None else whole(list(rows))
            return named(part, default_collate(found) if isinstance(found, list) else found)

    def name(self, index: int) -> str:
        """What a message calls that sample."""
        return " with ".join(self._own_name(part, row) for part, row in self.rows(index).items())

    def _own_name(self, part: str, row: int) -> str:
        own = getattr(self.sets[part], "name", None)
        return f"{part} {f'sample {row}' if own is None else own(row)}"

    def fingerprint(self) -> str:
        """Changes where that of a part does, or its length."""
        own = {
            part: getattr(each, "fingerprint", lambda each=each: len(cast(Any, each))) for part, each in self._each()
        }
        return ", ".join(f"{part} {print_()}" for part, print_ in own.items())

    def _each(self) -> list[tuple[str, Any]]:
        return list(self.sets.items())


def named(part: str, sample: Batch) -> Batch:
    """A sample or a batch with the part's name before its keys."""
    return {f"{part}.{key}": value for key, value in sample.items()}


def keys_of(part: str, batch: Batch, rows: Tensor | None = None) -> Batch:
    """The way back, of some samples or all."""
    own = {key.removeprefix(f"{part}."): x for key, x in batch.items() if key.startswith(f"{part}.")}
    return own if rows is None else rows_of(own, rows.tolist())


class Mixed(_Parts):
    """Samples of one part each, every part as often as its share asks.

    "part" is the number of the part; the keys of the others are zeros, or no bytes.

    Args:
        weights: the share of each part; an epoch then holds all samples of each once at least. None: once exactly.
    """

    def __init__(self, sets: Mapping[str, Dataset[Batch]], weights: Mapping[str, float] | None) -> None:
        super().__init__(sets)
        self.counts = {part: len(cast(Sized, each)) for part, each in sets.items()}
        total = 0 if weights is None else sum(weights.values())
        shares = {} if weights is None else {part: weights[part] / total for part in sets}
        epoch = max((self.counts[part] / share for part, share in shares.items()), default=0.0)
        taken = self.counts if weights is None else {part: round(share * epoch) for part, share in shares.items()}
        part = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([taken[part] for part in sets]))
        row = torch.cat([torch.arange(taken[part]) % self.counts[part] for part in sets])
        laid = spread_out(torch.arange(len(part)), part)  # so that the first few samples are of all parts
        self.part, self.row = part[laid], row[laid]
        self.names = list(sets)
        if any(hasattr(each, "spans") for each in sets.values()):
            self.spans = self._spans  # only then, for samples are else independent

    def __len__(self) -> int:
        return len(self.part)

    def strata(self) -> Tensor:
        """[S] int64, the part of each sample."""
        return self.part

    def rows(self, index: int) -> dict[str, int]:
        return {self.names[int(self.part[index])]: int(self.row[index])}

    def __getitem__(self, index: int) -> Batch:
        ((part, row),) = self.rows(index).items()
        own, others = self.sample_of(part, row), [name for name in self.names if name != part]
        blank = {
            key: b"" if isinstance(x, bytes) else torch.zeros_like(x)
            for name in others
            for key, x in self._like(name).items()
        }
        return {**blank, **own, "part": self.part[index]}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch; the rows of each part are read at once."""
        which, batch = self.part[indices], dict[str, Any]()
        for number, name in enumerate(self.names):
            places = (which == number).nonzero()[:, 0]
            rows = self.row[indices][places].tolist()
            own = self.batch_of(name, rows) if rows else {}
            for key, like in self._like(name).items():
                if isinstance(like, bytes):
                    found = dict(zip(places.tolist(), own.get(key, ()), strict=True))
                    batch[key] = [found.get(place, b"") for place in range(len(indices))]
                    continue
                x = own.get(key, like[None])
                batch[key] = x.new_zeros(len(indices), *x.shape[1:])
                if rows:
                    batch[key][places] = x
        return {**batch, "part": which}

    @functools.cache  # noqa: B019  (as long-lived as the data set)
    def _like(self, part: str) -> Batch:
        """The first sample of a part that can be read: what the others are shaped like."""
        with naming(part):
            found = first_readable(self.sets[part], "not one of its samples")
        return named(part, {key: x if isinstance(x, bytes) else torch.as_tensor(x) for key, x in found.items()})

    def _spans(self) -> Spans:
        """Those of the parts, on tracks and in clusters of their own."""
        found, first = list[Spans](), torch.zeros(2, dtype=torch.int64)
        for name in self.names:
            own: Any = self.sets[name]
            rows = torch.arange(self.counts[name])
            spans = own.spans() if hasattr(own, "spans") else Spans(rows, rows, 0 * rows, 0 * rows + 1)
            taken = self.row[self.part == self.names.index(name)]
            cluster, track = spans.cluster[taken] + first[0], spans.track[taken] + first[1]
            found.append(Spans(cluster, track, spans.first[taken], spans.end[taken], spans.chained))
            first = torch.stack((cluster.max(), track.max())) + 1
        back = self.part.argsort(stable=True).argsort()  # from part by part to the order of the samples
        cluster, track, begin, end = (torch.cat(list(each))[back] for each in zip(*(s[:4] for s in found), strict=True))
        return Spans(cluster, track, begin, end, chained=any(each.chained for each in found))


class Paired(_Parts):
    """Samples that hold one of every part, and a "label" where they are paired by it or the first part has one.

    Args:
        rows: [S, K] int64, the sample of every part.
        label: [S] int64, or None: samples are paired by their number.
        partners: for each part but the first, class -> samples to draw a partner from anew at every access, by torch's
            global generator; None: pairs are as `rows` has them.
    """

    def __init__(
        self,
        sets: Mapping[str, Dataset[Batch]],
        rows: Tensor,
        label: Tensor | None,
        partners: Sequence[Mapping[int, Tensor]] | None = None,
    ) -> None:
        super().__init__(sets)
        self.table, self.label, self.partners = rows, label, partners
        source = next((part for part, each in sets.items() if hasattr(each, "spans")), None)
        if source is not None:
            self.spans = functools.partial(self._spans, source)

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, index: int) -> dict[str, int]:
        return dict(zip(self.sets, self.table[index].tolist(), strict=True))

    def _drawn(self, indices: Sequence[int]) -> Tensor:
        """[B, K] samples of the parts."""
        table = self.table[list(indices)].clone()
        if self.partners is None or self.label is None:
            return table
        for column, of_class in enumerate(self.partners, 1):
            for place, label in enumerate(self.label[list(indices)].tolist()):
                own = of_class[label]
                table[place, column] = own[int(torch.randint(len(own), ()))]
        return table

    def _labelled(self, found: Batch, index: Any) -> Batch:
        """With the label that the parts have in common, or else that of the first part that has one."""
        if self.label is not None:
            return found | {"label": self.label[index]}
        own = (found[f"{part}.label"] for part in self.sets if f"{part}.label" in found)
        label = next(own, None)
        return found if label is None else found | {"label": label}

    def __getitem__(self, index: int) -> Batch:
        (rows,) = self._drawn([index]).tolist()
        found: Batch = {}
        for part, row in zip(self.sets, rows, strict=True):
            found |= self.sample_of(part, row)
        return self._labelled(found, index)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once."""
        table, found = self._drawn(indices), dict[str, Any]()
        for column, part in enumerate(self.sets):
            found |= self.batch_of(part, table[:, column].tolist())
        return self._labelled(found, indices)

    def _spans(self, source: str) -> Spans:
        """Those of the first part that has any: pairs depend on each other as its samples do."""
        spans: Spans = cast(Any, self.sets[source]).spans()
        taken = self.table[:, list(self.sets).index(source)]
        cluster, track, first, end = (each[taken] for each in spans[:4])
        return Spans(cluster, track, first, end, spans.chained)


# ------------------------------------------------------------------------------------------------------- pairs


def paired(parts: Mapping[str, Modality], split: str, pair_by: str, *, training: bool) -> Paired:
    """Pairs of a split, see `Together`.

    Raises:
        UserError: they can't be paired so.
    """
    sets = opened(parts, split)
    if pair_by == "index":
        return Paired(sets, by_index(sets), None)
    common = common_classes(parts)
    classes = [numbered(part, split, common) for part in parts.values()]
    rows = by_label(classes, once=split != "train")
    if not len(rows):
        raise UserError(
            f"data.pair_by=label: no class has {split} samples of every part: add some, or set data.pair_by=index "
            "where sample i of every part belongs together"
        )
    partners = [of_class(each) for each in classes[1:]] if training else None
    return Paired(sets, rows, classes[0][rows[:, 0]], partners)


def by_index(sets: Mapping[str, Dataset[Batch]]) -> Tensor:
    """[S, K]: sample i of every part.

    Raises:
        UserError: the parts are not equally many.
    """
    counts = {part: len(cast(Sized, each)) for part, each in sets.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        raise UserError(f"data.pair_by=index needs as many samples of every part ({told}): pair_by=label takes any")
    return torch.arange(next(iter(counts.values())))[:, None].expand(-1, len(counts)).contiguous()


def by_label(classes: Sequence[Tensor], *, once: bool) -> Tensor:
    """[S, K]: sample i of the first part with one of the same class of each of the others, by a seeded permutation.

    Args:
        classes: of every part, [S_k] int64, negative where a sample has none that all parts have.
        once: no sample stands in two pairs, so that pairs are independent: as many of a class as the part with the
            fewest has. Else every sample of the first part, the others as often as it takes.
    """
    found = []
    for label in classes[0].unique().tolist():
        own = [(each == label).nonzero()[:, 0] for each in classes]
        if label < 0 or not all(map(len, own)):
            continue
        count = min(map(len, own)) if once else len(own[0])
        draw = torch.Generator().manual_seed(label)
        columns = [own[0][:count], *(_cycled(each, count, draw) for each in own[1:])]
        found.append(torch.stack(columns, dim=1))
    rows = torch.cat(found) if found else torch.empty(0, len(classes), dtype=torch.int64)
    return rows[rows[:, 0].argsort(stable=True)]


def _cycled(own: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """So many of these samples in random order, all once before any twice."""
    rounds = [own[torch.randperm(len(own), generator=draw)] for _ in range(-(-count // len(own)))]
    return torch.cat(rounds)[:count]


def of_class(classes: Tensor) -> dict[int, Tensor]:
    """Class -> its samples."""
    return {label: (classes == label).nonzero()[:, 0] for label in classes.unique().tolist()}


def common_classes(parts: Mapping[str, Modality]) -> tuple[str, ...]:
    """The names of the classes that all parts have, in the order of the first part's.

    Raises:
        UserError: there is none, or samples of a part have no class.
    """
    names: dict[str, tuple[str, ...]] = {}
    for part, each in parts.items():
        with naming(part):
            names[part] = each.classes() or ()
        if not names[part]:
            raise UserError(
                f"data.pair_by=label needs an integer label of every sample, and part {part} has none: give it class "
                f"folders or a column label, or set data.pair_by=index where sample i of every part belongs together"
            )
    first, *others = names.values()
    if not (common := tuple(name for name in first if all(name in other for other in others))):
        told = "; ".join(
            f"{part} has {', '.join(each[:4])}{', ...' if each[4:] else ''}" for part, each in names.items()
        )
        raise UserError(f"data.pair_by=label: no class is common to all parts ({told}): name them alike")
    return common


def numbered(part: Modality, split: str, common: Sequence[str]) -> Tensor:
    """[S] int64, the place of each sample's class among the common ones, -1 where it has none of these."""
    names = part.classes() or ()
    places = torch.tensor([common.index(name) if name in common else -1 for name in names] + [-1])
    labels = _labels(known_by(part), split, part)
    return places[torch.where((labels < 0) | (labels >= len(names)), len(names), labels)]


def known_by(part: Modality) -> str:
    """Tells an adapter and its settings from others."""
    return f"{import_path(type(part))} {part.model_dump_json(serialize_as_any=True)}"


_READ: dict[tuple[str, str], Tensor] = {}


def _labels(key: str, split: str, part: Modality) -> Tensor:
    """[S] int64, read once in a process; -1 of a sample that can't be read."""
    if (key, split) not in _READ:
        samples = part.plain().samples_of(split)
        found = torch.full((len(cast(Sized, samples)),), -1)
        for index, sample in readable(samples):
            found[index] = int(sample["label"])
        _READ[key, split] = found
    return _READ[key, split]
