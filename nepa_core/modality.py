"""The adapter contract: what a kind of data must say about itself before the method can learn from it.

Shapes: B samples, N tokens, P numbers in a raw token, A coordinate axes (1, 2 or 3), D model width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import ClassVar, NamedTuple, Self, cast

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from nepa_core.basics import FROZEN, Batch, UnreadableSample, UserError
from nepa_core.predictor import init_weights
from nepa_core.samples import Some, some_rows
from nepa_core.tokens import ImageInput, Law, Signal, Sketch, Tokens


class Crossing(NamedTuple):
    """Two parts of a sample, of which a network may predict the one from the other.

    Attributes:
        data: an adapter whose order has all tokens of the first before those of the second.
        source, target: their numbers in `Tokens.part`.
    """

    data: Modality
    source: int
    target: int


class Modality(BaseModel, ABC):
    """An adapter: frozen settings plus `dataset` and `tokenize`; the other methods have defaults.

    Four more open a task: `forecasts` (nepa forecast), `files` (nepa embed files=), `stored` (nepa resize) and
    `image_input` (nepa export). By default each raises a `UserError` that names the method to write.

    Subclass it in your own module, write a function there that returns a whole recipe around it, and name
    that function on the command line as `my_lab.seismic:base`. `nepa check my_lab.seismic:base` tells you what is
    wrong with an adapter.
    """

    model_config = FROZEN

    changed: bool = Field(default=False, exclude=True)
    """Go on although the training data is not what it was when the run stopped: for one command, never stored."""

    limit: PositiveInt | None = Field(default=None, exclude_if=lambda limit: limit is None)
    """At most this many training samples, drawn by a permutation that never changes; see `samples_of`."""

    token_name: ClassVar[str] = "token"
    """What one token is called on the verdict card."""

    suffixes: ClassVar[tuple[str, ...]] = ("",)
    """How the names of files end that `files` takes out of a folder, in small letters; default: as they like."""

    built_in: ClassVar[str | None] = None
    """The `source` that needs no files: what `nepa plan` names where those of the recipe are not here."""

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Batch]:
        """The samples of a split as a map-style dataset (with `__len__`) of dictionaries of tensors.

        `split` is "train" or "test" (held out). Supervised tasks look for the key "label" (an integer is a class,
        float32 [] or [K] are numbers to predict) or "target" (integers [N], the class of every token in canonical
        order); a negative class is none. A value may also be bytes: a batch then has a list of them, which stays on the
        CPU, for what `before_mixing` and `tokenize` must know there to do a batch on the device. A data set may raise
        `UnreadableSample` for a sample, and may have

          __getitems__(list of int)  a whole batch as one dictionary (or a list of samples), faster for data in memory
          name(int)      what a picture or a message calls that sample, such as its file
          spans()        `nepa_core.tokens.Spans`, where samples overlap or are cut from one recording: a verdict then
                         keeps rivals apart and makes its intervals from recordings, not from samples
          strata()       [S] int64, of which kind each sample is, where kinds are told apart at sight: every batch of
                         training then holds them in their shares, and rivals are of one kind
          fingerprint()  a short text such as the number and digest of the files. It is part of a checkpoint: data that
                         changed between a stop and its resumption is then refused
          every_label()  a tensor [S] or [S, C] of the "label" of each: train.sampling=balanced then reads no sample
          contents()     `modalities.data.listing.Contents`: samples that are in both splits are then counted
          raw(int)       of images decoded on access: the bytes of that file, or pixels
          decoded(int)   of images: that one at its stored size, uint8 [C, h, w]

        Random augmentation belongs here and must draw from torch's global generator, which the loader
        seeds for every batch: this is what makes a resumed run exact.
        """

    def samples_of(self, split: str) -> Dataset[Batch]:
        """`dataset(split)`, of "train" no more than `limit` samples: what everything reads that trains or measures.

        An adapter that declares a field `limit` of its own, as where it saves reading the rest, keeps to it in
        `dataset`.
        """
        whole = self.dataset(split)
        own = any("limit" in inspect.get_annotations(kind) for kind in type(self).__mro__ if kind is not Modality)
        if split != "train" or self.limit is None or own or len(cast(Sized, whole)) <= self.limit:
            return whole
        return Some(whole, some_rows(len(cast(Sized, whole)), self.limit).tolist())

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
        found: set[int] = set()
        for _, sample in readable(self.dataset("train")):
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

    def token_targets(self, batch: Batch) -> Tensor | None:
        """The class of every token that `nepa probe` reads out, where samples have no "label".

        Default: "target", where it holds integers [B, N].

        Returns:
            Integers [B, N] in canonical order, negative where a token has none; or None: tokens have no classes.
        """
        target: Tensor | None = batch.get("target")
        return None if target is None or target.is_floating_point() or target.ndim != 2 else target

    def folds(self) -> tuple[str, ...]:
        """Names of the folds that the samples are divided into for cross-validation, in their order.

        An adapter that has some has a field `fold` as well: the one whose samples are held out. Default: none.
        """
        return ()

    def holding_out(self, fold: str) -> Modality:
        """This adapter with that one of `folds` held out, and the others to train. Default: by its field `fold`."""
        return self.model_copy(update={"fold": fold})

    def plain(self) -> Modality:
        """This adapter without augmentation: what probes and baselines read. Default: itself."""
        return self

    def as_trained_on(self, trained: Modality) -> Modality:
        """This adapter as a network reads it that was trained on `trained`, which may be the same. Default: itself.

        For what `tokenize` measures on the training data: other data are then read by the measures of those.
        """
        return self

    def before_mixing(self, batch: Batch) -> Batch:
        """What is done to a training batch, on the device, before `nepa finetune` mixes its samples.

        For augmentation that belongs to one sample but waits for the device, such as crops of a whole batch or random
        erasing; `tokenize` does it where nothing mixes. A function of the batch: what is random in it was drawn by the
        data set, so that a resumed run is exact. Default: nothing.
        """
        return batch

    def mixed(self, batch: Batch, share: float, centre: tuple[float, float] | None) -> tuple[Batch, Tensor]:
        """Every sample of a training batch mixed with that at the mirrored place, for `nepa finetune mix=`.

        Batches with an "image" never come here: timm mixes them. Labels are mixed by the caller.

        Args:
            share: of the sample itself, 0 to 1. centre: of the box that CutMix takes from the other sample, 0 to 1 on
                both axes; None for mixup, the weighted mean of both.

        Returns:
            The batch, and the share of each sample itself in what came out, [B] float32.

        Raises:
            UserError: this adapter's samples can't be mixed (the default).
        """
        raise self._lacks("mixed(batch, share, centre)", "mix is for images and spectrograms")

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

    def part_names(self) -> tuple[str, ...]:
        """The kinds of data that `Tokens.part` numbers from 0, or none (the default)."""
        return ()

    def strata(self) -> Mapping[str, Modality]:
        """What a verdict judges apart: name -> an adapter of those samples alone, whose tokens fit the same network.

        Where one of several kinds was chosen, that one alone. Default: nothing, kinds have no names.
        """
        return {}

    def shares(self) -> Mapping[str, float]:
        """The share of each of `strata` in a training batch; they add up to 1. Default: equal ones."""
        names = self.strata()
        return dict.fromkeys(names, 1 / len(names)) if names else {}

    def crossings(self) -> Mapping[str, Crossing]:
        """Which parts of a sample a verdict predicts from which: "B from A" -> these two. Default: none."""
        return {}

    def token_dim(self) -> int:
        """P, the size of a raw token. Default: measured on the first training sample that can be read.

        Raises:
            UserError: none can be read.
        """
        return int(self.tokenize(default_collate([first_sample(self)])).values.shape[-1])

    def symbols(self, values: Tensor) -> Tensor | None:
        """Which of finitely many tokens each one is, where tokens are discrete: n-gram counts then join the verdict.

        Args:
            values: [B, N, P] raw tokens.

        Returns:
            [B, N] int64, equal for equal tokens alone; or None, tokens are not discrete (the default).
        """
        return None

    def embedder(self, dim: int) -> nn.Module:
        """The map from raw tokens [B, N, P] to embeddings [B, N, dim], initialised. Default: one Linear.

        For images in non-overlapping patches this equals the strided patch convolution.
        """
        linear = nn.Linear(self.token_dim(), dim)
        init_weights(linear)
        return linear

    def stored_embedder(self, weights: Mapping[str, Tensor]) -> nn.Module | None:
        """An embedder to load trained weights into where the data is not there, at which `embedder` looks.

        Args:
            weights: its state dict.

        Returns:
            Default: one Linear; None, there is no way, where `embedder` is an adapter's own.
        """
        if self.offers("embedder"):
            return None
        dim, size = weights["weight"].shape
        return nn.Linear(size, dim)

    def order(self, tokens: Tokens) -> Tensor | None:
        """The order in which to predict, [N] or [B, N] int64, or None for the canonical one."""
        return None

    def describe(self, tokens: Tokens) -> Sketch:
        """How the samples are drawn by `nepa inspect`, from tokens in any order (see `Tokens.canonical`).

        Default: the raw tokens as a grey picture of P rows and N columns, each sample from its lowest to its
        highest number; padding is black.
        """
        values, drawn = tokens.canonical(tokens.values), tokens.canonical(tokens.real)[..., None]
        low = values.masked_fill(~drawn, torch.inf).amin((1, 2), keepdim=True)
        high = values.masked_fill(~drawn, -torch.inf).amax((1, 2), keepdim=True)
        grey = torch.where(drawn, (values - low) / (high - low).clamp(min=1e-12), 0.0)
        return Sketch(grey.transpose(1, 2), grid=(1, values.shape[1]))

    def decode(self, tokens: Tokens) -> Signal:
        """The samples themselves, from tokens in any order, such as generated ones; masked tokens are left empty.

        Default: what `describe` draws, pictures rounded to 256 levels. So images come back exactly as they were.
        """
        sketch = self.describe(tokens)
        if sketch.curves:
            return Signal("curves", sketch.canvas)
        levels = (255 * sketch.canvas.clamp(0, 1)).round().to(torch.uint8)
        return Signal("picture", levels[:, None] if levels.ndim == 3 else levels.permute(0, 3, 1, 2))

    def placed(self, tokens: Tokens) -> Tensor | None:
        """Where tokens lie by what they hold, for adapters whose tokens say it, as an event its time.

        Such positions are part of what is predicted: what decodes a prediction is then not told them, and generated
        tokens lie where they say.

        Returns:
            [B, N, A] coordinates of the tokens in the order in which they stand, each by itself and those before it;
            or None: positions are known beforehand (the default).
        """
        return None

    def readings(self, values: Tensor) -> dict[str, Tensor]:
        """What one would ask of the next token by name, for the card of `nepa generate`.

        Args:
            values: [B, N, P] raw tokens, true ones or the means of what may come.

        Returns:
            name -> [B, N], int64 classes (of a mean the likeliest), or numbers, NaN where a true token has none.
            Default: nothing.
        """
        return {}

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

    def known_law(self, tokens: Tokens) -> Law | None:
        """The law of every token given those before it, which a generator should find; tokens as `read` gives them.

        For synthetic sources, whose distribution is known. Default: None.
        """
        return None

    def forecasts(self, split: str, horizon: int) -> Dataset[Batch]:
        """Windows of a series with what comes after them, for `nepa forecast`.

        Args:
            split: "train", "validation" (a read-out is chosen on it) or "test".
            horizon: H, steps to forecast.

        Returns:
            A data set as `dataset` gives, whose samples have what `tokenize` needs and "series", float32 [L, C], the L
            steps that are seen, and "future", float32 [H, C], the H steps after them, none of it missing: both in the
            units that errors are reported in, such as z-scores by the training rows. Where values are missing,
            "observed", bool [L, C], is False and the series reads 0. L and the number of tokens are the same in all.
            Its `spans()` says where windows begin and end, for the intervals; without it every window is taken to
            begin one step after the one before. It may offer `values`, the tensor that windows are cut from, of which
            finished rows are known (else by all windows), and `left_out`, how many windows missing values cost.

        Raises:
            UserError: the split is too short for the horizon; or this adapter offers no forecasts (the default).
        """
        raise self._lacks("forecasts(split, horizon)", "forecast is for series")

    def window_scale(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation that `tokenize` takes out of each window of `forecasts`.

        A forecast of a network is in units of the window, (series - mean) / std, and brought back by them.

        Returns:
            Two tensors [B, 1, C] in the units of "series", or [B, 1, 1] where channels share them; every number of
            the second is above 0. Default: 0 and 1.
        """
        first: Tensor = batch["series"][:, :1, :1]
        return torch.zeros_like(first), torch.ones_like(first)

    def files(self, paths: Sequence[str]) -> Dataset[Batch]:
        """Samples from files by name, as held-out ones of `dataset`, without a label or with -1.

        For `nepa embed files=` and `nepa inspect images=`.

        Raises:
            UnreadableSample: from the data set, on access to a file that can't be read.
            UserError: this adapter reads no files by name (the default).
        """
        raise self._lacks("files(paths)", "files= and images= are for adapters that read files")

    def stored(self, split: str) -> Dataset[Batch]:
        """The images of a split at their stored sizes, for `nepa resize`.

        Returns:
            A map-style data set of {"image": uint8 [C, H, W], "label": a class}, with `name(int)`; its `raw(int)`, if
            any, is that of `dataset`.

        Raises:
            UnreadableSample: from the data set, on access to an image that can't be decoded.
            UserError: this adapter has no stored images (the default).
        """
        raise self._lacks("stored(split)", "nepa resize takes a recipe of images")

    def whole_images(
        self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], *, crop_ratio: float, squash: bool
    ) -> Modality:
        """These images, augmentation and all, for another network: `nepa finetune beside=`.

        Args:
            size: (height, width). mean, std: of each of three channels, pixels being between 0 and 1.
            crop_ratio, squash: how held-out images are scaled and cropped, as of `modalities.image.Images`.

        Returns:
            An adapter of the same samples, whose one token is the standardised image, [C * H * W].

        Raises:
            UserError: samples are no images (the default).
        """
        raise self._lacks("whole_images(...)", "beside= trains on images")

    def image_input(self) -> ImageInput:
        """What must be done to an image before the network reads it, for the layout that `nepa export` writes.

        Raises:
            UserError: samples are no images (the default).
        """
        name = type(self).__name__
        raise self._lacks("image_input()", f"the released layout holds images, not {name}")

    def offers(self, method: str) -> bool:
        """Whether this adapter has an optional method of its own, in place of the default."""
        return getattr(type(self), method) is not getattr(Modality, method)

    def _lacks(self, method: str, why: str) -> UserError:
        return UserError(f"{why}: {type(self).__name__} has no {method}; see nepa_core.modality.Modality")

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


def readable(
    samples: Dataset[Batch], most: int | None = None, torn: list[str] | None = None
) -> Iterator[tuple[int, Batch]]:
    """Those samples of a data set, or of its first `most`, that can be read, with their indices.

    Args:
        torn: gets name and cause of those that can't.
    """
    for index in range(len(cast(Sized, samples)))[:most]:
        try:
            sample = samples[index]
        except UnreadableSample as error:
            if torn is not None:
                torn.append(str(error))
            continue
        yield index, sample


def first_sample(data: Modality) -> Batch:
    """The first training sample that can be read.

    Raises:
        UserError: there is none.
    """
    return first_readable(data.dataset("train"), f"{type(data).__name__}: no training sample")


def first_readable(samples: Dataset[Batch], none: str) -> Batch:
    """The first sample that can be read.

    Args:
        none: what a message says there is not, such as "no training image".

    Raises:
        UserError: there is none; it has the cause of the first.
    """
    torn: list[str] = []
    for _, sample in readable(samples, torn=torn):
        return sample
    raise UserError(f"{none} can be read; the first: {torn[0] if torn else 'there is none'}")
