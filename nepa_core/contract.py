"""What an adapter must hold to, checked on its own data: `nepa check RECIPE`, or `check_modality` in a test of yours.

The cheap ones of these checks, `check_first_batches`, run before every training, too.

Shapes as in `nepa_core.modality`: B samples, N tokens, P numbers in a raw token, A coordinate axes.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import replace
from itertools import islice
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nepa_core.basics import Batch, UserError, some
from nepa_core.modality import Modality, readable
from nepa_core.model import NEPA
from nepa_core.objective import next_embedding_loss
from nepa_core.predictor import PredictorConfig
from nepa_core.tokens import LARGEST_VALUE, Tokens

BATCH = 8
UNREADABLE = "unreadable"
"""What `looked_at` calls the samples that can't be read."""
TRIED = 256  # samples that are looked at for BATCH that can be read, before training
PROBES = 32  # numbers of a raw sample that are changed to see in which tokens they stand
NETWORK = PredictorConfig(
    dim=48, depth=2, heads=2, mlp_dim=96, activation="gelu", gated=False, layer_scale=None, bos=False, norm_eps=1e-6
)


def check_modality(modality: Modality) -> None:
    """Check an adapter against the contract in `nepa_core.modality`, cheapest checks first.

    Reads the first few samples of each split, and trains a tiny network for two steps on the CPU. The state
    of torch's global generator is left as it was.

    Of tokens that hold parts of each other only those are told that hold the same number, bit for bit. Parts shared
    behind a transform (a spectrogram's window, centring each token, a mean over the sample) are not: whether that
    gives the next token away is yours to judge.

    Raises:
        AssertionError: in plain words, what is wrong and how to fix it.
    """
    for check in CHECKS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(modality)


def check_first_batches(modality: Modality, *, predicts: bool) -> None:
    """The checks that cost next to nothing, on the first samples of each split that can be read: before every training.

    Some samples with NaN among others are no fault of the adapter, and are counted as unreadable where they are met.

    Args:
        predicts: the next token is to be predicted, so that there must be one.

    Raises:
        AssertionError: as `check_modality`.
    """
    widths = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        check_splits_have_samples(modality)
        for split in ("train", "test"):
            dataset = modality.dataset(split)
            samples = _samples(dataset, within=TRIED)
            if not samples:  # what reads them says which they are
                continue
            for sample in samples.values():
                _check_is_dictionary(sample, split)
            tokens = modality.tokenize(_collated(list(samples.values()), split))
            _check_form(tokens)
            _check_coords(tokens)
            _check_mask(tokens)
            if predicts:
                _check_has_pairs(modality, tokens)
            finite = tokens.finite()
            assert 2 * int(finite.sum()) > len(finite), NOT_FINITE if _holds_nan(tokens) else TOO_LARGE
            widths[split] = tokens.values.shape[-1]
            _check_permutation(tokens, modality.order(tokens))
    assert len({*widths.values()}) < 2, (
        f"Tokens.values hold {widths['train']} numbers a token in dataset('train') and {widths['test']} in "
        "dataset('test'): make them the same"
    )


def check_splits_have_samples(modality: Modality) -> None:
    """Both splits have a length and are not empty."""
    for split in ("train", "test"):
        dataset = modality.dataset(split)
        assert hasattr(dataset, "__len__"), (
            f"dataset({split!r}) has no __len__: return a map-style dataset, with __len__ and __getitem__"
        )
        assert len(dataset) > 0, (
            f"dataset({split!r}) is empty: every adapter needs training and held-out samples; check its path"
        )


def check_samples_are_dictionaries(modality: Modality) -> None:
    """Samples are dictionaries of tensors that can be stacked, and of bytes."""
    for split in ("train", "test"):
        for sample in _samples(modality.dataset(split)).values():
            _check_is_dictionary(sample, split)
        _batch(modality, split)


def _check_is_dictionary(sample: object, split: str) -> None:
    assert isinstance(sample, dict), (
        f"a sample of dataset({split!r}) is a {type(sample).__name__}: return a dictionary of tensors"
    )
    for key, value in sample.items():
        assert isinstance(value, Tensor | bytes), (
            f"sample[{key!r}] of dataset({split!r}) is a {type(value).__name__}: make it a tensor"
        )


def check_whole_batches_agree(modality: Modality) -> None:
    """`__getitems__`, where there is one, gives what single samples give."""
    for split in ("train", "test"):
        dataset = modality.plain().dataset(split)
        if not hasattr(dataset, "__getitems__"):
            continue
        samples = dict(reversed(_samples(dataset).items()))
        whole, single = dataset.__getitems__(list(samples)), default_collate(list(samples.values()))
        whole = default_collate(whole) if isinstance(whole, list) else whole  # as torch's Subset gives it
        same = whole.keys() == single.keys() and all(_equal(whole[key], single[key]) for key in single)
        assert same, (
            f"dataset({split!r}).__getitems__(indices) differs from its samples one by one: "
            "it must return one dictionary, with row k of every tensor belonging to indices[k]"
        )


NOT_FINITE = "Tokens.values holds NaN or infinity: fill such places and mask the tokens"
TOO_LARGE = f"Tokens.values holds numbers beyond {LARGEST_VALUE:g}: standardise them"


def _holds_nan(tokens: Tokens) -> bool:
    return not bool(tokens.values.isfinite().all() and tokens.coords.isfinite().all())


def check_values(modality: Modality) -> None:
    """Raw tokens are finite floating numbers [B, N, P], two tokens or more."""
    tokens = modality.tokenize(_batch(modality))
    _check_form(tokens)
    assert tokens.values.shape[1] > 1, _SINGLE
    assert tokens.values.isfinite().all(), NOT_FINITE
    assert (tokens.values.abs() <= LARGEST_VALUE).all(), TOO_LARGE


_SINGLE = "Tokens.values has a single token: nothing can be predicted; cut samples finer"


def _check_form(tokens: Tokens) -> None:
    values = tokens.values
    assert values.ndim == 3, f"Tokens.values has shape {_shape(values)}: make it [B, N, P]"
    assert values.is_floating_point(), f"Tokens.values is {values.dtype}: scale it and make it float32"
    assert values.dtype != torch.float64, "Tokens.values is torch.float64: make it float32"
    assert 0 not in values.shape, f"Tokens.values has shape {_shape(values)}: there is nothing in it"
    assert tokens.order is None, (
        "tokenize set Tokens.order: return tokens in canonical order and give the permutation in order(tokens)"
    )


def _check_has_pairs(modality: Modality, tokens: Tokens) -> None:
    patch = getattr(modality, "patch", None)
    assert tokens.values.shape[1] > 1, _SINGLE + ("" if patch is None else f" (data.patch={patch})")
    assert tokens.mask is None or (tokens.mask.sum(dim=1) > 1).any(), (
        "Tokens.mask leaves no sample with two real tokens: nothing can be predicted; True must mean real"
    )


def check_coords(modality: Modality) -> None:
    """Coordinates are finite float32 numbers on one to three axes."""
    _check_coords(modality.tokenize(_batch(modality)))


def _check_coords(tokens: Tokens) -> None:
    coords, (samples, count, _) = tokens.coords, tokens.values.shape
    assert coords.shape[:-1] in ((count,), (samples, count)), (
        f"Tokens.coords has shape {_shape(coords)} for {count} tokens: make it [N, A], or [B, N, A] if samples differ"
    )
    assert 1 <= coords.shape[-1] <= 3, f"Tokens.coords has {coords.shape[-1]} axes: 1 to 3 are supported"
    assert coords.dtype == torch.float32, f"Tokens.coords is {coords.dtype}: make it float32"
    assert coords.isfinite().all(), "Tokens.coords holds NaN or infinity: give every token a finite position"


def check_mask(modality: Modality) -> None:
    """A mask is bool [B, N] and leaves two real tokens or more."""
    tokens = modality.tokenize(_batch(modality))
    _check_mask(tokens)
    assert tokens.mask is None or (tokens.mask.sum(dim=1) > 1).all(), (
        "Tokens.mask leaves a sample with fewer than two real tokens: nothing can be predicted; True must mean "
        "real, and such samples should be left out of the dataset"
    )


def _check_mask(tokens: Tokens) -> None:
    mask, shape = tokens.mask, tokens.values.shape[:2]
    if mask is None:
        return
    assert mask.dtype == torch.bool, f"Tokens.mask is {mask.dtype}: make it bool, True for a real token"
    assert mask.shape == shape, (
        f"Tokens.mask has shape {_shape(mask)} for values of {_shape(tokens.values)}: make it [B, N]"
    )


def check_targets(modality: Modality) -> None:
    """Labels and classes of tokens have the shapes that supervised tasks read."""
    for split in ("train", "test"):
        batch = _batch(modality, split)
        label, target = batch.get("label"), batch.get("target")
        assert label is None or label.ndim == 1 or (label.ndim == 2 and not _counts(label)), (
            f"sample['label'] of dataset({split!r}) has shape {_shape(label[0])}: make it one integer, the class, or "
            "bool [C], several classes, or float32 [] or [K], numbers to predict; classes per token belong in 'target'"
        )
        count = modality.tokenize(batch).values.shape[1]
        assert target is None or target.ndim != 2 or target.shape[1] == count, (
            f"sample['target'] of dataset({split!r}) has {_shape(target[0])} classes for {count} tokens: make it [N]"
        )


def _counts(label: Tensor) -> bool:
    """Whether labels are integers, neither bool nor float."""
    return not label.is_floating_point() and label.dtype != torch.bool


def check_both_splits(modality: Modality) -> None:
    """What every training asks before it starts holds in both splits, and their tokens are of one size."""
    check_first_batches(modality, predicts=True)


def check_tokenize_is_deterministic(modality: Modality) -> None:
    """`tokenize` gives one answer for one batch."""
    batch = _batch(modality)
    first = _copies(modality.tokenize(batch))
    second = _copies(modality.tokenize(batch))
    assert all(map(_equal, first, second)), (
        "tokenize gives two answers for one batch: it must not draw random numbers or write to its input; "
        "move augmentation to the dataset"
    )


def check_plain_is_repeatable(modality: Modality) -> None:
    """Without augmentation a sample is the same each time, and `data.limit` stays."""
    assert modality.model_copy(update={"limit": 2}).plain().limit == 2, (
        "plain() loses data.limit: return self.model_copy(update={...}), which keeps all other settings"
    )
    dataset = modality.plain().dataset("train")
    for index, sample in _samples(dataset).items():
        again = dataset[index]
        assert all(_equal(sample[key], again[key]) for key in sample), (
            "plain().dataset gives two answers for one sample: override plain() to return the adapter without "
            "augmentation"
        )


def check_samples_do_not_mix(modality: Modality) -> None:
    """A sample has the same tokens alone and within a batch."""
    batch = _batch(modality)
    together = modality.tokenize(batch)
    for row in range(len(together.values)):
        alone = modality.tokenize({key: value[row : row + 1] for key, value in batch.items()})
        assert _same_real_tokens(_only(together, row), _only(alone, 0)), (
            "tokenizing a sample alone and within a batch gives different tokens: take no statistics over the "
            "batch, and where samples are padded to the longest, set Tokens.mask False on the padding"
        )


def check_tokens_do_not_overlap(modality: Modality) -> None:
    """A number of a raw sample stands in one token alone.

    Numbers are changed one by one, and the token where most changes is found. That the same values before and after
    stand in another is no chance, as the sample has a little noise; and what every token is normalised by, such as a
    mean, changes less.
    """
    batch = {key: value[:1] for key, value in _batch(modality).items()}
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    raw = {key: value for key, value in tensors.items() if value.is_floating_point() or value.dtype == torch.uint8}
    if not raw:
        return
    key = max(raw, key=lambda name: raw[name].numel())
    places = torch.randperm(raw[key].numel())[:PROBES]
    often = 1 + len(places)
    rows = {
        name: value.repeat(often, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * often
        for name, value in batch.items()
    }
    rows[key] = _changed_one_by_one(raw[key], places)
    tokens = modality.tokenize(rows)
    values, mask = tokens.values, tokens.real
    before, after, real = values[:1], values[1:], (mask[:1] & mask[1:])[..., None]
    change = ((after - before).abs() * real).flatten(1)  # [places, N * P]
    size, most = change.max(1)
    old, new = before.flatten()[most, None, None], after.flatten(1).gather(1, most[:, None])[..., None]
    holds = ((before == old) & (after == new) & real).any(-1) & (size > 0)[:, None]  # [places, N]
    twice = holds[holds.sum(1) > 1]
    assert len(twice) < 2, (
        f"one number of sample[{key!r}] stands in {int(twice[0].sum())} tokens ({_listed(twice[0])} in canonical "
        "order): tokens overlap or hold parts of others, so that a prediction is partly a copy of what was read; cut "
        "samples into tokens that share nothing"
    )


def check_order_is_a_permutation(modality: Modality) -> None:
    """An order names each token once."""
    tokens = modality.tokenize(_batch(modality))
    _check_permutation(tokens, modality.order(tokens))


def _check_permutation(tokens: Tokens, order: Tensor | None) -> None:
    if order is None:
        return
    samples, count, _ = tokens.values.shape
    assert order.dtype == torch.int64, f"order(tokens) is {order.dtype}: make it int64"
    assert order.shape in ((count,), (samples, count)), (
        f"order(tokens) has shape {_shape(order)} for {samples} samples of {count} tokens: make it [N] or [B, N]"
    )
    assert (order.sort(dim=-1).values == torch.arange(count, device=order.device)).all(), (
        f"order(tokens) is not a permutation: it must name each of the {count} tokens once"
    )


def check_order_can_be_undone(modality: Modality) -> None:
    """Tokens come back from the order to the canonical one."""
    batch = _batch(modality)
    canonical, read = modality.tokenize(batch), modality.read(batch)
    assert _equal(read.canonical(read.values), canonical.values), (
        "bringing the tokens of read(batch) back to canonical order does not give tokenize(batch): "
        "don't override read; give the permutation in order(tokens)"
    )


def check_order_is_the_samples_own(modality: Modality) -> None:
    """The order of a sample does not depend on the others of its batch."""
    batch = _batch(modality)
    together, again = modality.read(batch), modality.read(batch)
    assert _equal(together.values, again.values), (
        "order(tokens) gives two answers for one batch: make it a function of the sample; where training is to have "
        "random orders, draw it under at(progress) alone"
    )
    for row in range(len(together.values)):
        alone = modality.read({key: value[row : row + 1] for key, value in batch.items()})
        assert _same_real_tokens(_only(together, row), _only(alone, 0)), (
            "a sample alone and within a batch is read in different orders: order(tokens) must depend on the sample, "
            "not on the others or on padding"
        )


def check_windows(modality: Modality) -> None:
    """Windows to forecast, where the adapter offers any, are what `Modality.forecasts` says, two steps ahead."""
    try:
        for split in ("train", "validation", "test") if modality.offers("forecasts") else ():
            check_forecasts(modality, split, 2)
    except UserError:  # settings or samples of an adapter that leave nothing to forecast
        return


def check_forecasts(modality: Modality, split: str, horizon: int) -> Dataset[Batch]:
    """Check the first window of a split that can be read.

    Returns:
        All windows of the split.

    Raises:
        AssertionError: what is wrong with it.
        UserError: the adapter has none.
    """
    windows, called = modality.forecasts(split, horizon), f"forecasts({split!r}, {horizon})"
    samples = _samples(windows, within=TRIED)
    assert samples, f"{called} gives no window that can be read: move the borders of the splits, or shorten horizons"
    sample = next(iter(samples.values()))
    _check_is_dictionary(sample, split)
    for key in ("series", "future"):
        assert key in sample, f"a sample of {called} has no {key!r}: add it, float32 [steps, channels]"
        shape = _shape(sample[key])
        assert (len(shape), sample[key].dtype) == (2, torch.float32), (
            f"sample[{key!r}] of {called} is {sample[key].dtype} {shape}: make it float32 [steps, channels]"
        )
        assert sample[key].isfinite().all(), (
            f"sample[{key!r}] of {called} holds NaN or infinity: leave out windows with a missing value to forecast, "
            "and name missing values of the series in 'observed'"
        )
    shape, wanted = _shape(sample["future"]), [horizon, sample["series"].shape[1]]
    assert shape == wanted, f"sample['future'] of {called} has shape {shape}: make it {wanted}"
    batch = _collated(list(samples.values()), split)
    tokens = modality.tokenize(batch)
    _check_form(tokens)
    for each in modality.window_scale(batch):
        assert _shape(each) in ([len(samples), 1, wanted[1]], [len(samples), 1, 1]), (
            f"window_scale(batch) gives shape {_shape(each)} for {len(samples)} windows of {wanted[1]} channels: make "
            "it [B, 1, C] or [B, 1, 1]"
        )
    return windows


def check_sketch(modality: Modality) -> None:
    """A drawing has the shapes that `nepa inspect` needs."""
    batch = _batch(modality)
    tokens = modality.read(batch)
    samples, count, _ = tokens.values.shape
    sketch = modality.describe(tokens)
    canvas, cells = sketch.canvas, math.prod(sketch.grid)
    dims, form = ((3,), "[B, L, C] for curves") if sketch.curves else ((3, 4), "[B, H, W] or [B, H, W, 3]")
    fits = len(canvas) == samples and canvas.ndim in dims and (canvas.ndim == 3 or canvas.shape[-1] == 3)
    assert fits, f"describe(tokens) gives a canvas of shape {_shape(canvas)} for {samples} samples: make it {form}"
    assert sketch.curves or (canvas.min() >= 0 and canvas.max() <= 1), (
        "describe(tokens) gives a canvas beyond 0 to 1: scale the pictures"
    )
    assert cells == count, (
        f"describe(tokens) gives a grid of {' x '.join(map(str, sketch.grid))} cells for {count} tokens: make it one "
        "cell a token"
    )
    straight = modality.describe(modality.tokenize(batch)).canvas
    assert torch.allclose(canvas, straight, atol=1e-4, equal_nan=True), (
        "describe(tokens) draws reordered tokens where they do not lie: bring them back with tokens.canonical(...)"
    )


SIGNALS = {
    "picture": (4, torch.uint8, "uint8 [B, C, H, W]"),
    "sound": (2, torch.float32, "float32 [B, n]"),
    "curves": (3, torch.float32, "float32 [B, L, C]"),
    "symbols": (2, torch.int64, "int64 [B, n]"),
}
"""Kind of a `Signal` -> axes and numbers of its data, and both in words."""


def check_signal(modality: Modality) -> None:
    """A signal is what `nepa_core.tokens.Signal` says, whatever the order of the tokens."""
    batch = _batch(modality)
    tokens = modality.read(batch)
    try:
        kind, data, rate = modality.decode(tokens)
    except UserError:  # settings that leave nothing to decode
        return
    assert kind in SIGNALS, f"decode(tokens) gives the kind {kind!r}: make it one of {', '.join(SIGNALS)}"
    axes, numbers, form = SIGNALS[kind]
    samples = len(tokens.values)
    assert (len(data), data.ndim, data.dtype) == (samples, axes, numbers), (
        f"decode(tokens) gives a {kind} as {data.dtype} {_shape(data)} for {samples} samples: make it {form}"
    )
    assert kind != "sound" or rate, "decode(tokens) gives sound without its rate: add it, in Hz"
    straight = modality.decode(modality.tokenize(batch)).data
    rounding = 1.0 if kind == "picture" else 1e-4
    assert torch.allclose(data.float(), straight.float(), rtol=0, atol=rounding, equal_nan=True), (
        "decode(tokens) lays reordered tokens where they do not lie: bring them back with tokens.canonical(...)"
    )


def check_embedder(modality: Modality) -> None:
    """The embedder maps raw tokens one by one to [B, N, dim]."""
    values = modality.read(_batch(modality)).values
    try:
        embeddings = modality.embedder(NETWORK.dim)(values)
    except RuntimeError as error:
        raise AssertionError(
            f"embedder(dim) can't take values of shape {_shape(values)} and {values.dtype}: make them float32 "
            f"in tokenize, and token_dim() their last size ({error})"
        ) from error
    assert embeddings.shape == (*values.shape[:2], NETWORK.dim), (
        f"embedder({NETWORK.dim}) gives shape {_shape(embeddings)} for values of {_shape(values)}: make it [B, N, dim]"
    )


def check_future_is_hidden(modality: Modality) -> None:
    """Under causal attention no prediction sees its target."""
    tokens = modality.read(_batch(modality))
    count = tokens.values.shape[1]
    before = _predictions(modality, tokens)
    for place in sorted({1, count // 2, count - 1}):
        values = tokens.values.clone()
        values[:, place] = _other(values[:, place])
        after = _predictions(modality, replace(tokens, values=values))
        assert _close(before[:, :place], after[:, :place]), (
            f"changing the token read at place {place} changes predictions before it, which leaks the target: "
            "the embedder must not look at later tokens, nor take statistics over tokens (batch norm)"
        )


def check_masked_tokens_are_ignored(modality: Modality) -> None:
    """What stands behind a False of the mask changes nothing."""
    tokens = modality.read(_batch(modality))
    if tokens.mask is None:
        return
    filled = torch.where(tokens.mask[..., None], tokens.values, _other(tokens.values))
    before, after = _predictions(modality, tokens), _predictions(modality, replace(tokens, values=filled))
    assert _close(before[tokens.mask], after[tokens.mask]), (
        "changing the values of masked tokens changes predictions at real ones: the embedder must not look from "
        "one token at another"
    )


def check_training(modality: Modality) -> None:
    """Two steps of training give a finite loss and gradients."""
    tokens = modality.read(_batch(modality))
    model = _model(modality)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        out = model(tokens, causal=True)
        loss = next_embedding_loss(out.predictions, out.embeddings, out.mask)
        assert loss.isfinite(), f"the loss of training step {step} is {loss.item()}: standardise Tokens.values"
        loss.backward()
        _check_gradients(model.embed)
        optimizer.step()


def _check_gradients(embed: torch.nn.Module) -> None:
    trained = [p for p in embed.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients), (
        "the gradient of the embedder holds NaN or infinity: standardise Tokens.values, and guard divisions"
    )
    assert not trained or any(g.any() for g in gradients), (
        "no gradient reaches the embedder: remove detach() or no_grad() from it, and check that values vary"
    )


CHECKS = (
    check_splits_have_samples,
    check_samples_are_dictionaries,
    check_whole_batches_agree,
    check_values,
    check_coords,
    check_mask,
    check_targets,
    check_both_splits,
    check_tokenize_is_deterministic,
    check_plain_is_repeatable,
    check_samples_do_not_mix,
    check_tokens_do_not_overlap,
    check_order_is_a_permutation,
    check_order_can_be_undone,
    check_order_is_the_samples_own,
    check_sketch,
    check_signal,
    check_windows,
    check_embedder,
    check_future_is_hidden,
    check_masked_tokens_are_ignored,
    check_training,
)
"""All of them, cheapest first; the first line of each one's docstring says what holds where it passes."""


def looked_at(modality: Modality) -> dict[str, str]:
    """What the checks read of an adapter that passes them, a line each: the splits, the tokens of a first batch.

    Samples that can't be read are counted and named under UNREADABLE, where there are any.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found, lost = {}, list[str]()
        for split in ("train", "test"):
            torn: list[str] = []
            samples = _samples(dataset := modality.dataset(split), torn=torn)
            if torn:
                tried = len(torn) + len(samples)
                lost.append(f"{len(torn):,} of the {tried:,} tried of {split} can't be read: {some(torn)}")
            first = ", ".join(
                f"{key} {str(x.dtype)[6:]} {_shape(x)}" for key, x in next(iter(samples.values())).items()
            )
            found[split] = (
                f"{len(cast(Sized, dataset)):,} samples, {'the first ' if not torn else ''}{len(samples)} read: {first}"
            )
        tokens = modality.tokenize(_batch(modality))
        order = modality.order(tokens)
    values, low, high = tokens.values[tokens.real], tokens.coords.amin(), tokens.coords.amax()
    (_, count, size), axes = tokens.values.shape, tokens.coords.shape[-1]
    found["tokens"] = f"{count} of {size} numbers, mean {values.mean():.2f}, standard deviation {values.std():.2f}"
    found["positions"] = f"on {axes} {'axis' if axes == 1 else 'axes'}, from {low:.4g} to {high:.4g}"
    found["mask"] = "none" if tokens.mask is None else f"{tokens.mask.float().mean():.0%} of the tokens are real"
    each = "canonical" if order is None else "one for all samples" if order.ndim == 1 else "one for each sample"
    found["order"] = each
    return found | ({UNREADABLE: "; ".join(lost)} if lost else {})


def _samples(dataset: Dataset[Batch], within: int | None = None, torn: list[str] | None = None) -> dict[int, Batch]:
    """The first BATCH samples that can be read, by their index; of no more than so many. torn: see `readable`."""
    return dict(islice(readable(dataset, within, torn), BATCH))


def _batch(modality: Modality, split: str = "train") -> Batch:
    torn: list[str] = []
    samples = list(_samples(modality.dataset(split), torn=torn).values())
    assert samples, (
        f"not one sample of the {len(torn):,} of dataset({split!r}) can be read; the first: {torn[0] if torn else ''}"
    )
    return _collated(samples, split)


def _collated(samples: list[Batch], split: str) -> Batch:
    try:
        batch: Batch = default_collate(samples)
    except (RuntimeError, KeyError) as error:
        raise AssertionError(
            f"samples of dataset({split!r}) can't be stacked into a batch: give all of them the same keys and "
            f"shapes, padding where they differ ({error})"
        ) from error
    return batch


def _equal(one: Tensor, other: Tensor) -> bool:
    """The same in every number; NaN is the same as NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _model(modality: Modality) -> NEPA:
    """The same tiny network at every call; in training mode, where a batch norm would leak."""
    torch.manual_seed(0)
    return NEPA(NETWORK, modality.embedder(NETWORK.dim)).train()


@torch.no_grad()
def _predictions(modality: Modality, tokens: Tokens) -> Tensor:
    """[B, N, D]; equal tokens give equal predictions, since network and dropout are drawn from one seed."""
    predictions: Tensor = _model(modality)(tokens, causal=True).predictions
    return predictions


def _changed_one_by_one(raw: Tensor, places: Tensor) -> Tensor:
    """The sample [1, ...] with a little noise, and after it copies of that with another number at each place."""
    if raw.is_floating_point():
        scale = raw.nan_to_num(0, 0, 0).std(correction=0)
        sample = raw + 0.1 * scale * torch.randn_like(raw)
        other = sample.flatten()[places] + (1 + scale)
    else:  # whole numbers stay among those of the sample, which may be codes
        sample = raw.flatten()[torch.randint(raw.numel(), raw.shape)]
        other = raw.min() + (raw.max() - sample.flatten()[places])
    copies = sample.repeat(1 + len(places), *[1] * (raw.ndim - 1))
    copies[1:].view(len(places), -1)[torch.arange(len(places)), places] = other
    return copies


def _listed(places: Tensor) -> str:
    """ "2, 3": where a row is True, the first few."""
    found = [str(place) for place in places.nonzero()[:, 0].tolist()]
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")


def _other(values: Tensor) -> Tensor:
    """Values of the same scale that differ everywhere."""
    return values + (1 + values.std()) * torch.randn_like(values).sign()


def _close(before: Tensor, after: Tensor) -> bool:
    """Equal up to rounding; NaN is left to `check_training`."""
    return torch.allclose(before, after, atol=1e-4, equal_nan=True)


def _copies(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.values.clone(), tokens.coords.clone(), tokens.real.clone()


def _only(tokens: Tokens, row: int) -> tuple[Tensor, Tensor]:
    """Values [n, P] and coordinates [n, A] of the n real tokens of one sample."""
    real = tokens.real[row]
    coords = tokens.coords if tokens.coords.ndim == 2 else tokens.coords[row]
    return tokens.values[row, real], coords[real]


def _same_real_tokens(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
