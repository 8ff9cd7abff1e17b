"""`check_modality` passes sound adapters, and tells each kind of defect in its own words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from modalities.image import Images
from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.contract import check_modality
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens

LENGTH, CHANNELS = 9, 2


class Signals(Dataset[Batch]):
    """Random signals [LENGTH, CHANNELS] of 5 to 9 real points, padded with zeros."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        length = LENGTH - index % 5
        generator = torch.Generator().manual_seed(index)
        signal = torch.randn(LENGTH, CHANNELS, generator=generator)
        signal[length:] = 0
        return {"signal": signal, "length": torch.tensor(length)}


class Sound(Modality):
    """A sound adapter with padding, coordinates of its own for each sample, and an order for each sample."""

    def dataset(self, split: str) -> Dataset[Batch]:
        return Signals()

    def tokenize(self, batch: Batch) -> Tokens:
        signal, length = batch["signal"], batch["length"]
        places = torch.arange(LENGTH).expand(len(signal), -1)
        coords = (places / length[:, None])[..., None].float()
        return Tokens(values=signal, coords=coords, mask=places < length[:, None])

    def order(self, tokens: Tokens) -> Tensor | None:
        assert tokens.mask is not None
        return tokens.values[..., 0].masked_fill(~tokens.mask, torch.inf).argsort(dim=1)


def images(**changes: Any) -> Images:
    settings = {"source": "digits", "size": (8, 8), "patch": (2, 2), "channels": 1, "mean": (0.3,), "std": (0.35,)}
    return Images(**(settings | changes))


@pytest.mark.parametrize("patch_order", ["raster", "hilbert", "random_per_sample"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_images_are_sound(patch_order: Any, in_memory: bool) -> None:
    state = torch.get_rng_state()
    check_modality(images(patch_order=patch_order, in_memory=in_memory, augment="crop"))
    assert torch.equal(torch.get_rng_state(), state)


def test_padded_sequences_are_sound() -> None:
    check_modality(Sound())


def refuses(modality: Modality, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_modality(modality)


# ---- data sets


class Given(Sound):
    """The sound adapter on another data set."""

    train: Any
    test: Any = Signals()

    def dataset(self, split: str) -> Dataset[Batch]:
        data: Dataset[Batch] = self.train if split == "train" else self.test
        return data


class Empty(Signals):
    def __len__(self) -> int:
        return 0


class Streaming(Dataset[Batch]):
    def __getitem__(self, index: int) -> Batch:
        return {}


class Pairs(Signals):
    def __getitem__(self, index: int) -> Any:
        return tuple(super().__getitem__(index).values())


class Numbers(Signals):
    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "label": 3}


class Ragged(Signals):
    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        return {**sample, "signal": sample["signal"][: sample["length"]]}


class Unreadable(Signals):
    def __getitem__(self, index: int) -> Any:
        raise UnreadableSample(f"row {index}")


class SecondUnreadable(Signals):
    def __getitem__(self, index: int) -> Any:
        if index == 1:
            raise UnreadableSample("row 1")
        return super().__getitem__(index)

    def __getitems__(self, indices: list[int]) -> Batch:
        batch: Batch = default_collate([self[index] for index in indices])
        return batch


class Jittered(Signals):
    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        return {**sample, "signal": sample["signal"] + torch.rand(())}


class Sorted(Signals):
    def __getitems__(self, indices: list[int]) -> Batch:
        batch: Batch = default_collate([self[index] for index in sorted(indices)])
        return batch


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Empty(), r"dataset\('train'\) is empty: every adapter needs"),
        (Streaming(), r"dataset\('train'\) has no __len__: return a map-style"),
        (Pairs(), "is a tuple: return a dictionary"),
        (Numbers(), r"sample\['label'\].* is a int: make it a tensor"),
        (Ragged(), "can't be stacked into a batch.*padding where they differ"),
        (Unreadable(), r"not one sample of the \d+ of dataset\('train'\) can be read; the first: "),
        (Sorted(), r"__getitems__\(indices\) differs from its samples"),
        (Jittered(), r"override plain\(\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_defects_of_a_data_set_are_told(data: Any, words: str) -> None:
    refuses(Given(train=data), words)


class Targeted(Signals):
    """With a target of any shape."""

    def __init__(self, key: str, value: Tensor) -> None:
        self.more = {key: value}

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) | self.more


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Targeted("label", torch.zeros(4, dtype=torch.int64)), r"'label'\] .* has shape \[4\]: make it one integer"),
        (Targeted("label", torch.zeros(4, 2)), r"'label'\] .* has shape \[4, 2\]"),
        (Targeted("target", torch.zeros(4, dtype=torch.int64)), r"'target'\] .* has \[4\] classes for 9 tokens"),
    ],
)
def test_defects_of_targets_are_told(data: Any, words: str) -> None:
    refuses(Given(train=data), words)


def test_sound_targets_pass() -> None:
    for data in (
        Targeted("label", torch.tensor(1)),
        Targeted("label", torch.zeros(4)),
        Targeted("target", torch.zeros(LENGTH, dtype=torch.int64)),
    ):
        check_modality(Given(train=data))


def test_the_held_out_split_is_checked_as_well() -> None:
    refuses(Given(train=Signals(), test=Empty()), r"dataset\('test'\) is empty")
    refuses(Given(train=Signals(), test=Pairs()), r"dataset\('test'\) is a tuple")


def test_an_unreadable_sample_is_passed_over() -> None:
    check_modality(Given(train=SecondUnreadable()))


# ---- tokens


class Changed(Sound):
    """The sound adapter, its tokens changed by a function of (values, coords, mask, order)."""

    change: Any

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return Tokens(**(vars(tokens) | self.change(tokens)))

    def order(self, tokens: Tokens) -> Tensor | None:
        return None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"values": t.values[0]}, r"values has shape \[9, 2\]: make it \[B, N, P\]"),
        (lambda t: {"values": t.values.long()}, "values is torch.int64: .* make it float32"),
        (lambda t: {"values": t.values[:, :1]}, "single token"),
        (lambda t: {"values": t.values / 0}, "values holds NaN or infinity: fill"),
        (lambda t: {"order": torch.arange(LENGTH)}, r"tokenize set Tokens.order: .* give the permutation in order"),
        (lambda t: {"coords": t.coords[:, :-1]}, r"coords has shape \[6, 8, 1\] for 9 tokens"),
        (lambda t: {"coords": t.coords.expand(-1, -1, 4)}, "coords has 4 axes: 1 to 3"),
        (lambda t: {"coords": t.coords.double()}, "coords is torch.float64: make it float32"),
        (lambda t: {"coords": t.coords / 0}, "coords holds NaN"),
        (lambda t: {"mask": t.mask.float()}, "mask is torch.float32: make it bool"),
        (lambda t: {"mask": t.mask[0]}, r"mask has shape \[9\] .* make it \[B, N\]"),
        (lambda t: {"mask": ~t.mask}, "fewer than two real tokens"),
        (lambda t: {"values": t.values + torch.randn(())}, "two answers for one batch"),
        (lambda t: {"values": t.values.mul_(0.5)}, "two answers for one batch"),
        (lambda t: {"values": t.values - t.values.mean(0)}, "alone and within a batch"),
        (lambda t: {"mask": t.mask | t.mask.any(0)}, "set Tokens.mask False on the padding"),
        (lambda t: {"coords": t.coords - t.coords.mean((0, 1))}, "alone and within a batch"),
    ],
)
def test_defects_of_tokens_are_told(change: Any, words: str) -> None:
    refuses(Changed(change=change), words)


class Whole(Sound):
    """Sequences [64] without padding, cut into tokens by a function of a batch of them."""

    cut: Any
    scaled: bool = False  # normalised over the sample
    quantised: bool = False

    def dataset(self, split: str) -> Dataset[Batch]:
        draw = torch.Generator().manual_seed(len(split))
        series = torch.randn(8, 64, generator=draw)
        series = (40 * series + 128).clamp(0, 255).to(torch.uint8) if self.quantised else series
        return [{"series": each, "unit": torch.ones(1)} for each in series]  # type: ignore[return-value]

    def tokenize(self, batch: Batch) -> Tokens:
        series = batch["series"].float() / 40
        if self.scaled:
            series = (series - series.mean(1, keepdim=True)) / series.std(1, keepdim=True)
        values = self.cut(series)
        return Tokens(values, torch.arange(values.shape[1])[:, None].float())

    def order(self, tokens: Tokens) -> Tensor | None:
        return None


def pieces(series: Tensor) -> Tensor:
    return series.view(len(series), 8, 8)


def with_the_next(series: Tensor) -> Tensor:
    return torch.cat([pieces(series), pieces(series).roll(-1, 1)], -1)


def with_the_mean(series: Tensor) -> Tensor:
    """A legitimate number that all tokens share."""
    return torch.cat([pieces(series), series.mean(1)[:, None, None].expand(-1, 8, 1)], -1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_tokens_that_hold_parts_of_others_are_told(scaled: bool, quantised: bool) -> None:
    how = {"scaled": scaled, "quantised": quantised}
    for cut in (lambda series: series.unfold(1, 16, 8), lambda series: series.unfold(1, 16, 12), with_the_next):
        refuses(
            Whole(cut=cut, **how), r"one number of sample\['series'\] stands in 2 tokens \(\d, \d in canonical order\)"
        )
    for cut in (pieces, with_the_mean):
        check_modality(Whole(cut=cut, **how))


# ---- orders


def test_an_order_drawn_outside_at_is_told() -> None:
    data = images(patch_order="random_per_sample")
    with pytest.raises(AssertionError, match=r"draw it under at\(progress\) alone"):
        check_modality(data.at(0.5))


class Shuffled(Sound):
    """Its order depends on where in a batch a sample stands."""

    def order(self, tokens: Tokens) -> Tensor | None:
        order = torch.arange(LENGTH).expand(len(tokens.values), -1).clone()
        order[1:] = order[1:].flip(1)
        return order


def test_an_order_that_hangs_on_the_batch_is_told() -> None:
    with pytest.raises(AssertionError, match="a sample alone and within a batch is read in different orders"):
        check_modality(Shuffled())


class Ordered(Sound):
    by: Any

    def order(self, tokens: Tokens) -> Tensor | None:
        order: Tensor = self.by(*tokens.values.shape[:2])
        return order


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (lambda b, n: torch.arange(n).float(), "is torch.float32: make it int64"),
        (lambda b, n: torch.arange(n - 1), r"shape \[8\] for 6 samples of 9 tokens"),
        (lambda b, n: torch.arange(n).clamp(min=1), "not a permutation: it must name each of the 9 tokens once"),
        (lambda b, n: torch.stack([*[torch.arange(n)] * (b - 1), torch.ones(n).long()]), "not a permutation"),
    ],
)
def test_defects_of_an_order_are_told(by: Any, words: str) -> None:
    refuses(Ordered(by=by), words)


class Drawn(Sound):
    by: Any

    def describe(self, tokens: Tokens) -> Sketch:
        sketch: Sketch = self.by(tokens, super().describe(tokens))
        return sketch


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (lambda t, s: replace(s, canvas=s.canvas[:1]), r"shape \[1, 2, 9\] for 6 samples: make it \[B, H, W\] or"),
        (lambda t, s: replace(s, canvas=s.canvas[..., None]), r"shape \[6, 2, 9, 1\]"),
        (lambda t, s: replace(s, canvas=s.canvas[..., None], curves=True), r"make it \[B, L, C\] for curves"),
        (lambda t, s: replace(s, canvas=2 * s.canvas), "beyond 0 to 1"),
        (lambda t, s: replace(s, grid=(2, 4)), "2 x 4 cells for 9 tokens: make it one cell a token"),
        (lambda t, s: Sketch(t.values, (1, 9), curves=True), "reordered tokens where they do not lie"),
    ],
)
def test_defects_of_a_sketch_are_told(by: Any, words: str) -> None:
    refuses(Drawn(by=by), words)


class Decoded(Sound):
    by: Any

    def decode(self, tokens: Tokens) -> Signal:
        signal: Signal = self.by(tokens, super().decode(tokens))
        return signal


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (lambda t, s: Signal("smell", s.data), "the kind 'smell': make it one of picture, sound, curves"),
        (
            lambda t, s: Signal("picture", s.data[:1]),
            r"uint8 \[1, 1, 2, 9\] for 6 samples: make it uint8 \[B, C, H, W\]",
        ),
        (lambda t, s: Signal("curves", s.data[:, 0]), r"curves as torch.uint8 .* make it float32 \[B, L, C\]"),
        (lambda t, s: Signal("sound", torch.zeros(6, 9)), "sound without its rate: add it, in Hz"),
        (lambda t, s: Signal("curves", t.values), "reordered tokens where they do not lie"),
    ],
)
def test_defects_of_a_signal_are_told(by: Any, words: str) -> None:
    refuses(Decoded(by=by), words)


class Reversed(Sound):
    def read(self, batch: Batch) -> Tokens:
        tokens = self.tokenize(batch)
        return Tokens(tokens.values.flip(1), tokens.coords, tokens.mask)


@pytest.mark.parametrize("axes", [0, 4])
def test_coordinates_of_the_wrong_axis_count_are_told_while_training_too(axes: int) -> None:
    class Skewed(Sound):
        def tokenize(self, batch: Batch) -> Tokens:
            tokens = super().tokenize(batch)
            return replace(tokens, coords=tokens.coords.repeat(1, 1, axes))

    with pytest.raises(UserError, match=rf"Skewed.tokenize gives coords of shape \[6, 9, {axes}\]"):
        Skewed().read(default_collate([Signals()[index] for index in range(6)]))


def test_an_order_that_can_not_be_undone_is_told() -> None:
    refuses(Reversed(), "don't override read")


# ---- embedders


class Pooling(nn.Module):
    """Adds the mean over all tokens, masked and future ones alike."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, dim)

    def forward(self, values: Tensor) -> Tensor:
        x = self.linear(values)
        return x + x.mean(1, keepdim=True)


class Next(Pooling):
    """Adds to each token its successor."""

    def forward(self, values: Tensor) -> Tensor:
        x = self.linear(values)
        return x + nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


class Previous(Pooling):
    """Adds to each token its predecessor, which a causal embedder may."""

    def forward(self, values: Tensor) -> Tensor:
        x = self.linear(values)
        return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class BatchNormed(Pooling):
    """Normalises over all tokens of the batch, in training only."""

    def forward(self, values: Tensor) -> Tensor:
        x = self.linear(values)
        return nn.functional.batch_norm(x.flatten(0, 1), None, None, training=self.training).view_as(x)


class Detached(Pooling):
    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values).detach()


class Overflowing(Pooling):
    def forward(self, values: Tensor) -> Tensor:
        return (self.linear(values) * 1e30).exp()


class Flattening(Pooling):
    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values).flatten(0, 1)


class RootOfZero(Pooling):
    """Finite itself, with an infinite derivative."""

    def forward(self, values: Tensor) -> Tensor:
        x = self.linear(values)
        return x + (x - x).sqrt()


class Embedded(Sound):
    kind: Any

    def embedder(self, dim: int) -> nn.Module:
        module: nn.Module = self.kind(dim)
        return module

    def order(self, tokens: Tokens) -> Tensor | None:
        return None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda dim: nn.Linear(CHANNELS + 1, dim), r"can't take values of shape \[6, 9, 2\]"),
        (Flattening, r"gives shape \[54, 48\] .* make it \[B, N, dim\]"),
        (Pooling, "token read at place 1 changes predictions before it, which leaks the target"),
        (Next, "token read at place 1 changes predictions before it, which leaks the target"),
        (BatchNormed, "token read at place 1 changes predictions before it, which leaks the target"),
        (Detached, "no gradient reaches the embedder"),
        (Overflowing, "loss of training step 0 is nan"),
        (RootOfZero, "gradient of the embedder holds NaN"),
    ],
)
def test_defects_of_an_embedder_are_told(kind: Any, words: str) -> None:
    refuses(Embedded(kind=kind), words)


class Gapped(Embedded):
    """With a token missing in the middle."""

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        assert tokens.mask is not None
        return replace(tokens, mask=tokens.mask & (torch.arange(LENGTH) != 2))


def test_an_embedder_may_look_back_but_not_at_a_masked_token() -> None:
    check_modality(Embedded(kind=Previous))
    refuses(Gapped(kind=Previous), "masked tokens changes predictions at real ones: the embedder")
