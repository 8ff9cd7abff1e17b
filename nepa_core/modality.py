"""The adapter contract: what a kind of data must say about itself before the method can learn from it.

Shapes: B samples, N tokens, P numbers in a raw token, A coordinate axes (1, 2 or 3), D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sized
from contextlib import suppress
from typing import ClassVar, Self, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from nepa_core.basics import FROZEN, Batch, UnreadableSample, UserError
from nepa_core.predictor import init_weights
from nepa_core.tokens import Sketch, Tokens


class Modality(BaseModel, ABC):
    """An adapter: frozen settings plus `dataset` and `tokenize`; the other methods have defaults.

    Subclass it in your own module, write a function there that returns a whole recipe around it, and name
    that function on the command line as `my_lab.seismic:base`. `nepa check my_lab.seismic:base` tells you what is
    wrong with an adapter.
    """

    model_config = FROZEN

    changed: bool = Field(default=False, exclude=True)
    """Go on although the training data is not what it was when the run stopped: for one command, never stored."""

    token_name: ClassVar[str] = "token"
    """What one token is called on the verdict card."""

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Batch]:
        """The samples of a split as a map-style dataset (with `__len__`) of dictionaries of tensors.

        `split` is "train" or "test" (held out). Supervised tasks look for the key "label" (an integer is a class,
        float32 [] or [K] are numbers to predict) or "target" (integers [N], the class of every token in canonical
        order); a negative class is none. A dataset may raise `UnreadableSample` for a sample, and may offer
        `__getitems__(list of int)` that returns a whole batch as one dictionary, which is faster for data in memory,
        and `name(int)`, what a picture of that sample is called, such as its file. Where samples overlap or are cut
        from one recording, its `spans()` says so (`nepa_core.drawing.Spans`): a verdict then keeps rivals apart and
        makes its intervals from recordings, not from samples. Its `fingerprint()`, a short text such as the number and
        digest of the files, is part of a checkpoint: data that changed between a stop and its resumption is then
        refused. Its `contents()` (`modalities.data.listing.Contents`) lets samples that are in both splits be counted.

        Random augmentation belongs here and must draw from torch's global generator, which the loader
        seeds for every batch: this is what makes a resumed run exact.
        """

    @abstractmethod
    def tokenize(self, batch: Batch) -> Tokens:
        """Split a collated batch, already on the device, into tokens in canonical order. Deterministic."""

    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that "label" or "target" numbers from 0, or None where they are none.

        Default: the numbers themselves, found by reading the training labels one by one; override it where reading
        a sample is slow.

        Raises:
            UserError: the default finds ids in place of classes: far larger numbers than there are different ones.
        """
        samples = self.dataset("train")
        found: set[int] = set()
        for index in range(len(cast(Sized, samples))):
            with suppress(UnreadableSample):
                sample = samples[index]
                label = torch.as_tensor(sample["label"] if "label" in sample else sample.get("target", 0.0))
                if label.is_floating_point() or label.ndim != ("label" not in sample):
                    return None
                found.update(label.flatten().tolist())
        highest = max(found, default=-1)
        if highest > 1000 + 10 * len(found):
            raise UserError(
                f"{type(self).__name__}: training samples have {len(found)} classes with numbers up to {highest}; "
                "number them from 0 on without gaps"
            )
        return tuple(str(number) for number in range(highest + 1)) or None

    def plain(self) -> Modality:
        """This adapter without augmentation: what probes and baselines read. Default: itself."""
        return self

    def before_mixing(self, batch: Batch) -> Batch:
        """What is done to a training batch, on the device, before `nepa finetune` mixes its samples.

        For augmentation that belongs to one sample but waits for the device, such as random erasing; `tokenize` does
        it where nothing mixes. A function of the batch. Default: nothing.
        """
        return batch

    def held_out_as(self) -> str | None:
        """How held-out samples are read, in one line for `nepa evaluate`, where a figure depends on it.

        Default: None, there is nothing to say.
        """
        return None

    def at(self, progress: float) -> Self:
        """This adapter as pre-training reads it when this share of the run is done, 0 to 1. Default: itself.

        For an `order` that is drawn for each sample: here it may draw from torch's global generator, which is seeded
        for every step; outside `at` it must be a function of the sample.
        """
        return self

    def draws_order(self) -> bool:
        """Whether `order` is drawn anew for each sample, so that nothing seen tells which token comes next."""
        return False

    def token_dim(self) -> int:
        """P, the size of a raw token. Default: measured on the first training sample that can be read.

        Raises:
            UserError: none can be read.
        """
        samples = self.dataset("train")
        for index in range(len(cast(Sized, samples))):
            with suppress(UnreadableSample):
                return int(self.tokenize(default_collate([samples[index]])).values.shape[-1])
        raise UserError(f"{type(self).__name__}: no training sample can be read; look at what dataset('train') gives")

    def embedder(self, dim: int) -> nn.Module:
        """The map from raw tokens [B, N, P] to embeddings [B, N, dim], initialised. Default: one Linear.

        For images in non-overlapping patches this equals the strided patch convolution.
        """
        linear = nn.Linear(self.token_dim(), dim)
        init_weights(linear)
        return linear

    def order(self, tokens: Tokens) -> Tensor | None:
        """The order in which to predict, [N] or [B, N] int64, or None for the canonical one."""
        return None

    def describe(self, tokens: Tokens) -> Sketch:
        """How the samples are drawn by `nepa inspect`, from tokens in any order (see `Tokens.canonical`).

        Default: the raw tokens as a grey picture of P rows and N columns, each sample from its lowest to its
        highest number; padding is black.
        """
        real = torch.ones_like(tokens.values[..., 0], dtype=torch.bool) if tokens.mask is None else tokens.mask
        values, drawn = tokens.canonical(tokens.values), tokens.canonical(real)[..., None]
        low = values.masked_fill(~drawn, torch.inf).amin((1, 2), keepdim=True)
        high = values.masked_fill(~drawn, -torch.inf).amax((1, 2), keepdim=True)
        grey = torch.where(drawn, (values - low) / (high - low).clamp(min=1e-12), 0.0)
        return Sketch(grey.transpose(1, 2), grid=(1, values.shape[1]))

    def known_optimum(self, embed: nn.Module) -> float | None:
        """The best next-token loss (negative cosine) that any causal predictor can expect on held-out data.

        For synthetic sources, whose distribution is known. Averaged over every token, the first (predicted from BOS)
        too. Draws from generators of its own.

        Args:
            embed: the trained embedder, raw tokens [B, N, P] -> embeddings [B, N, D].

        Returns:
            The loss, or None where it is not known (the default).
        """
        return None

    def read(self, batch: Batch) -> Tokens:
        """Tokenize a batch and put the tokens into this adapter's order.

        Raises:
            UserError: the coordinates have no axis, or more than 3.
        """
        tokens = self.tokenize(batch)
        if not 1 <= tokens.coords.shape[-1] <= 3:
            raise UserError(
                f"{type(self).__name__}.tokenize gives coords of shape {list(tokens.coords.shape)}; their last axis "
                "holds 1 to 3 numbers"
            )
        return tokens.reordered(self.order(tokens))
