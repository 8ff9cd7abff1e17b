"""Sequences of vectors computed before: CNN features, patch vectors of a foundation model, embeddings of sensors.

Shapes: B samples, N tokens, P numbers in a token, A coordinate axes.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.listing import is_hidden, printable, say
from modalities.data.moments import ROUNDING, ROUNDING_SINGLE, ColumnMoments
from modalities.data.numbering import check_numbering, first_unknown
from modalities.data.vectors import Sequences, Stored, open_split
from modalities.orders import Ordered, padding_behind
from nepa_core.basics import Batch, UnreadableSample, UserError, some
from nepa_core.modality import Modality
from nepa_core.tokens import Tokens, cached

_MEASURED = 1024  # training sequences that the scale of the features is measured on


class Features(Ordered, Modality):
    """Vectors from disk, a token each; sequences may differ in length.

    Attributes:
        root: a folder in one of the layouts of `modalities.data.vectors`.
        standardise: shift and scale every feature by its mean and deviation over (1,024) training sequences.
        standardise_by: the folder whose training sequences those are, in place of `root`. Tasks that read a trained run
            with another `root` set it to that of the run: the same vectors then have the same features.
        coord_scale: multiplies stored coordinates. Neighbours should be about a quarter apart, for one unit is the
            wavelength of the fastest rotary angle; without stored coordinates they are: token i lies at i / 4.
        patch_order, order_seed: the order in which vectors are predicted, see `modalities.orders`; "raster" is that in
            which they are stored, whatever their coordinates. One that would scatter padding gets it behind the rest.
    """

    token_name: ClassVar[str] = "vector"

    root: str | None = None
    standardise: bool = True
    standardise_by: str | None = Field(default=None, exclude_if=lambda root: root is None)
    coord_scale: float = Field(default=1.0, gt=1e-9, le=1e9)

    def dataset(self, split: str) -> Dataset[Batch]:
        return Sequences(self._stored(split), self._tokens())

    def tokenize(self, batch: Batch) -> Tokens:
        values: Tensor = batch["values"]
        if self.standardise:
            mean, std = (each.to(values.device, values.dtype) for each in statistics(self.standardise_by or self.root))
            values = (values - mean) / std
        values = values.float()  # not before: float64 holds a small signal on a large offset
        stored, count = self._stored("train"), values.shape[1]
        mask = None
        if self._ragged():
            mask = torch.arange(count, device=values.device) < batch["length"][:, None]
            values = torch.where(mask[..., None], values, 0.0)
        if "coords" in batch:
            coords = batch["coords"] * self.coord_scale
        elif stored.shared is not None:
            coords = torch.as_tensor(np.array(stored.shared[:count], np.float32)) * self.coord_scale
        else:
            coords = torch.arange(count)[:, None] / 4
        return Tokens(values, coords, mask)

    def as_trained_on(self, trained: Modality) -> Features:
        """With the mean and deviation of the vectors that a network was trained on, where these are still there."""
        if not isinstance(trained, Features) or self.standardise_by or not (self.standardise and trained.standardise):
            return self
        by = trained.standardise_by or trained.root
        if by == self.root:
            return self
        try:
            statistics(by)
        except (UserError, OSError):
            say(
                f"{by}, which the network's vectors were standardised by, can't be read: {self.root} stands in for it, "
                "and if its training split differs, so do the features; data.standardise_by=DIR says where it is now"
            )
            return self
        return self.model_copy(update={"standardise_by": by})

    def order(self, tokens: Tokens) -> Tensor | None:
        return padding_behind(self.ordered(tokens, (tokens.values.shape[1],)), tokens.mask)

    def classes(self) -> tuple[str, ...] | None:
        """The numbers that occur in the training labels."""
        labels = self._stored("train").labels
        if labels is None or labels.dtype.kind == "f" or labels.ndim > 1:
            return None
        return tuple(str(number) for number in range(int(labels.max()) + 1))

    def token_dim(self) -> int:
        return self._stored("train").width

    def _stored(self, split: str) -> Stored:
        """A split, once both are known to fit together."""
        if self.root is None:
            raise UserError("data.root=DIR is wanted: the folder that holds train.npy and test.npy, or the like")
        return open_both(self.root)[split]

    def _tokens(self) -> int:
        """N, the longest sequence of both splits."""
        return max(self._stored(split).longest for split in ("train", "test"))

    def _ragged(self) -> bool:
        return any(self._stored(split).lengths.min() < self._tokens() for split in ("train", "test"))


@lru_cache(maxsize=4)
def open_both(root: str) -> dict[str, Stored]:
    """Both splits.

    Raises:
        UserError: they don't fit together, training classes are not numbered from 0 on without gaps, or held-out
            sequences have a class that no training sequence has.
    """
    train, test = (open_split(root, name) for name in ("train", "test"))
    if train.labels is None and test.labels is None:
        _say_unread_labels(root, train)
    for what, mine, others in (
        ("numbers in a token", train.width, test.width),
        ("coordinate axes", train.axes, test.axes),
        ("coordinates per sequence", train.coords is not None, test.coords is not None),
        ("labels", _kind(train), _kind(test)),
    ):
        if mine != others:
            raise UserError(f"{train.path} and {test.path} differ in {what}: {mine} and {others}")
    if train.shared is not None and len(train.shared) < max(train.longest, test.longest):
        raise UserError(f"{test.path} has longer sequences than {train.path} has coordinates for")
    if train.labels is not None and test.labels is not None and _kind(train) == "classes":
        check_numbering(train.labels, f"{train.path}: label", ", or store numbers to predict in floating point")
        if (row := first_unknown(train.labels, test.labels)) is not None:
            raise UserError(
                f"{test.name(row)} has the class {test.labels[row]}, which no sequence of {train.path} has; fix the "
                "labels, or leave such sequences out"
            )
    return {"train": train, "test": test}


def _say_unread_labels(root: str, train: Stored) -> None:
    """Say which files beside the data look like labels, where none were found."""
    endings = (".csv", ".tsv", ".txt", ".json", ".jsonl")
    names = [entry.name for entry in os.scandir(train.path.parent) if entry.is_file() and not is_hidden(entry.name)]
    odd = sorted(
        name
        for name in names
        if name.lower().endswith(endings) or (name != train.path.name and re.search("label|target|class", name.lower()))
    )
    if odd:
        say(
            f"{root}: no labels; {some(list(map(printable, odd)), 4)} beside the data "
            f"{'is' if len(odd) == 1 else 'are'} not read. Labels of arrays and folders are train.label.npy and "
            "test.label.npy, a number for each sequence"
        )


def _kind(stored: Stored) -> str:
    """What its labels are, in words."""
    if stored.labels is None:
        return "none"
    kind = "numbers" if stored.labels.dtype.kind == "f" else "classes"
    return kind if stored.labels.ndim == 1 else f"{kind} [{stored.labels.shape[1]}]"


@cached
def statistics(root: str | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [P] float64 of the tokens of training sequences drawn by a seed; 1 for a constant.

    Raises:
        UserError: none of them can be read.
    """
    features = Features(root=root)
    samples = Sequences(features._stored("train"), features._tokens())
    moments = ColumnMoments(samples.stored.width)
    draw = torch.Generator().manual_seed(0)
    first = ""
    for index in torch.randperm(len(samples), generator=draw)[:_MEASURED].tolist():
        try:
            sample = samples[index]
        except UnreadableSample as error:
            first = first or str(error)
            continue
        moments.add(sample["values"][: sample["length"]].numpy())
    if not moments.count.any():
        raise UserError(f"no training sequence can be read; the first: {first}")
    rounding = ROUNDING if samples.stored.dtype == np.float64 else ROUNDING_SINGLE
    return torch.from_numpy(moments.mean), torch.from_numpy(moments.deviation(rounding))
