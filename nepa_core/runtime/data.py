"""Which samples come at which step: a function of the seed and the step alone, so a resumed run sees the same.

No state is kept. The order of an epoch is a permutation drawn from (seed, epoch), a rank takes its slice of
the global batch, and torch's global generator is seeded for each batch, in the worker that loads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from nepa_core.basics import Batch, UnreadableSample, UserError, cores
from nepa_core.tokens import LARGEST_VALUE, Tokens


class NothingRead(UserError):
    """Not one sample could be read."""


_SKIPPED = "_unreadable"  # key under which a batch carries the names of its unreadable samples
_ERROR = "_error"  # key of a batch that is a user's error instead
_DRAWN = "_drawn"  # key of the index of every sample of a batch
_LOST = "_lost"  # key of the places in a draw that could not be read, where nothing replaced them


def replace_broken(tokens: Tokens, batch: Batch, *, labels: bool = False) -> tuple[Tokens, Batch, Tensor]:
    """Put another sample of the batch in the place of each whose tokens are not finite, see `Tokens.finite`.

    As where a sample can't be read: its neighbour is trained on once more. Nothing waits for a GPU. Where none is sound
    all stay, and the step is skipped, as its gradient is not finite.

    Args:
        labels: also of each with a float "label" that is not finite.

    Returns:
        Tokens and tensors of the batch, and why samples are broken, [B] uint8 on their device, 0 where they are not
        (a place in `FAULTS`): for `StepOutput.broken`.
    """
    faults = _faults(tokens, batch, labels=labels)
    finite = faults == 0
    if finite.device.type == "cpu" and finite.all():
        return tokens, batch, faults
    places = torch.arange(len(finite), device=finite.device)
    sound_first = (~finite).int().argsort(stable=True)
    index = torch.where(finite, places, sound_first[places % finite.sum().clamp(min=1)])
    rows = {name: x[index] if isinstance(x, Tensor) and x.ndim else x for name, x in batch.items()}
    return tokens.rows(index), rows, faults


FAULTS = (
    "",
    "its tokens hold NaN or infinity",
    f"its tokens hold numbers beyond {LARGEST_VALUE:g}",
    "its label is NaN or infinite",
)
"""What is wrong with a sample that can be read."""


def _faults(tokens: Tokens, batch: Batch, *, labels: bool) -> Tensor:
    """The place in `FAULTS` of each sample, [B] uint8 on the tokens' device; `labels`: look at a float "label", too."""
    large = tokens.values.isfinite().flatten(1).all(1).to(torch.uint8) + 1
    label, sound = batch.get("label"), torch.zeros_like(large)
    if labels and isinstance(label, Tensor) and label.is_floating_point():
        finite = label.isfinite().reshape(len(label), -1).all(1).to(large.device)
        sound = torch.where(finite, sound, 3)
    return torch.where(tokens.finite(), sound, large)


def fold_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_step(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of this device; `torch.manual_seed` asks every other device too."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Draw(NamedTuple):
    """What a worker is asked for: sample indices, and the seed of everything random in the batch."""

    indices: list[int]
    seed: int


class DrawSampler(Sampler[Draw]):
    """The draws of one rank from step `start` to step `stop`; every step holds `accumulate` of them.

    Args:
        strata: [S], see `spread_out`. weights: [S], see `drawn_order`; None takes each sample once in an epoch.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch: int,
        accumulate: int,
        rank: int,
        ranks: int,
        seed: int,
        start: int,
        stop: int,
        strata: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.weights = weights
        self.samples, self.batch, self.accumulate, self.strata = samples, batch, accumulate, strata
        self.rank, self.ranks, self.seed, self.start, self.stop = rank, ranks, seed, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[Draw]:
        per_epoch = self.samples // self.batch
        micro = self.batch // (self.ranks * self.accumulate)
        known, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            if epoch != known:
                known, order = epoch, self._order(epoch)
                order = order if self.strata is None else spread_out(order, self.strata)
            for part in range(self.accumulate):
                first = place * self.batch + (part * self.ranks + self.rank) * micro
                yield Draw(order[first : first + micro].tolist(), fold_seed(self.seed, "data", step, part, self.rank))

    def _order(self, epoch: int) -> Tensor:
        if self.weights is None:
            return epoch_order(self.samples, self.seed, epoch)
        return drawn_order(self.weights, self.seed, epoch)


@lru_cache(maxsize=2)
def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of the samples in an epoch."""
    generator = torch.Generator().manual_seed(fold_seed(seed, "order", epoch))
    return torch.randperm(samples, generator=generator)


def drawn_order(weights: Tensor, seed: int, epoch: int) -> Tensor:
    """As many samples as there are, each drawn anew in proportion to the weights: [S] float64 -> [S] int64."""
    generator = torch.Generator().manual_seed(fold_seed(seed, "drawn", epoch))
    reach = weights.cumsum(0)
    places = torch.rand(len(weights), dtype=torch.float64, generator=generator) * reach[-1]
    return torch.searchsorted(reach, places, right=True).clamp(max=int(weights.nonzero()[-1]))


def spread_out(order: Tensor, strata: Tensor) -> Tensor:
    """An order in which every stretch holds each kind of sample in its share, give or take one.

    Within a kind the order stays as it is.

    Args:
        order: [S] int64, a permutation. strata: [S] int64, the kind of each sample.
    """
    kind = strata[order]
    when = torch.empty(len(order), dtype=torch.float64)
    for each in kind.unique():
        own = kind == each
        count = int(own.sum())
        when[own] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return order[when.argsort(stable=True)]


class _Batches(Dataset[Batch | bytes]):
    """Loads whole draws. Unreadable samples are named; the next readable neighbour replaces them, or nothing.

    What is random in a draw comes of its seed alone; the random numbers of who asks go on as if nothing had been read.

    Args:
        weights: [S], see `drawn_order`: a sample of weight 0 replaces none.
    """

    def __init__(self, dataset: Dataset[Batch], *, replace: bool, weights: Tensor | None = None) -> None:
        self.dataset, self.replace, self.weights = dataset, replace, weights

    def __getitem__(self, draw: Draw) -> Batch | bytes:
        try:
            with torch.random.fork_rng(devices=[]):
                seed_step(draw.seed, torch.device("cpu"))
                batch = self._load(draw.indices)
        except UserError as error:  # crosses the worker boundary as data, to stay one line
            return {_ERROR: UserError(str(error))}
        except (OSError, MemoryError, OverflowError, RecursionError) as error:  # so do those that the command explains
            if isinstance(error, OSError) and error.errno is None:
                raise
            return {_ERROR: error}
        return batch if _fits_shared_memory([batch]) else pickle.dumps(batch)

    def _load(self, indices: list[int]) -> Batch:
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is not None:
            try:
                batch = whole(indices)
                if isinstance(batch, list):  # of samples, as torch's Subset gives them
                    batch = _stacked(batch, shared=_fits_shared_memory(batch))
                return {**batch, _DRAWN: indices}
            except UnreadableSample:
                pass  # find out below which ones they are
        skipped: list[str] = []
        found = [self._readable(index, skipped) for index in indices]
        samples = [each[1] for each in found if each is not None]
        drawn = [each[0] for each in found if each is not None]
        batch = {**(_stacked(samples, shared=_fits_shared_memory(samples)) if samples else {}), _DRAWN: drawn}
        lost = [place for place, each in enumerate(found) if each is None]
        return batch | {_SKIPPED: skipped, _LOST: lost} if skipped else batch

    def _readable(self, index: int, skipped: list[str]) -> tuple[int, Batch] | None:
        """A sample and its own index, or that of the next one that can be read."""
        count = len(cast(Sized, self.dataset))
        for offset in range(count if self.replace else 1):
            place = (index + offset) % count
            if offset and self.weights is not None and not self.weights[place]:
                continue
            try:
                return place, self.dataset[place]
            except UnreadableSample as error:
                skipped.append(str(error))
        if self.replace:
            raise UserError(f"no sample can be read; the first: {skipped[0]}")
        return None


def _stacked(samples: list[Batch], *, shared: bool) -> Batch:
    try:
        if shared:
            batch: Batch = default_collate(samples)
        else:
            batch = collate(samples, collate_fn_map={**default_collate_fn_map, Tensor: _stack})
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"samples can't be stacked into a batch ({error}): dataset(split) must give all of them the same keys, "
            "tensors and shapes; pad where they differ"
        ) from error
    return batch


def _stack(tensors: list[Tensor], **_: object) -> Tensor:
    """Where torch's own would allocate shared memory."""
    return torch.stack(tensors)


def _fits_shared_memory(samples: list[Batch]) -> bool:
    """Whether /dev/shm has room for these samples and what other loader processes put there meanwhile.

    Where it has not (containers give 64 MB, or less), a batch goes through a pipe: writing beyond its end would kill
    the process.
    """
    info = get_worker_info()
    if info is None:  # no other process gets them
        return True
    size = sum(x.nbytes for sample in samples for x in sample.values() if isinstance(x, Tensor))
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return False
    return (2 * info.num_workers + 2) * size < found.f_bavail * found.f_frsize


class TrainingBatches:
    """An iterator over the batches of one rank, on its device, from any step on.

    Attributes:
        unreadable: name and cause of every sample skipped so far.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        sampler: DrawSampler,
        *,
        workers: int,
        max_unreadable: float,
        device: torch.device,
    ) -> None:
        self.unreadable: set[str] = set()
        self._samples, self._max_unreadable = sampler.samples, max_unreadable
        self._dataset, self._drawn = dataset, list[int]()
        self._suspects: list[tuple[list[int], Tensor]] = []
        self._device = device
        self._sampler, self._workers = sampler, workers

    def __iter__(self) -> Iterator[Batch]:
        send = Courier(self._device)
        batches = _Batches(self._dataset, replace=True, weights=self._sampler.weights)
        for batch in _loaded(batches, self._sampler, self._workers, self._device):
            batch.pop(_LOST, None)
            self._note(_raise_error(batch).pop(_SKIPPED, []))
            self._drawn = batch.pop(_DRAWN)
            yield send(batch)

    def suspect(self, broken: Tensor) -> None:
        """What is wrong with the samples of the batch given last, as `replace_broken` gives it; read by `settle`."""
        self._suspects.append((self._drawn, broken))

    def settle(self) -> None:
        """Count the broken samples as unreadable (waits for the device).

        Raises:
            UserError: too many are unreadable.
        """
        if not self._suspects:
            return
        which = torch.cat([broken for _, broken in self._suspects]).tolist()
        drawn = [index for indices, _ in self._suspects for index in indices]
        self._suspects.clear()
        found = {(index, fault) for index, fault in zip(drawn, which, strict=True) if fault}
        self._note([_broken(self._dataset, index, fault) for index, fault in found])

    def _note(self, skipped: list[str]) -> None:
        self.unreadable |= set(skipped)
        _refuse_many(self.unreadable, self._samples, self._max_unreadable)


def _broken(dataset: Dataset[Batch], index: int, fault: int) -> str:
    name = getattr(dataset, "name", None)
    return f"{f'sample {index}' if name is None else name(index)}: {FAULTS[fault]}"


def _refuse_many(unreadable: set[str], samples: int, share: float, of: str = "") -> None:
    """Stop where more than this share of the samples can't be read."""
    if len(unreadable) > share * samples:
        what = f"1 unreadable {of}sample" if len(unreadable) == 1 else f"{len(unreadable)} unreadable {of}samples"
        raise UserError(
            f"at least {what} of {samples}: more than train.max_unreadable={share} of them, and no more were read; one "
            f"is {min(unreadable)}; fix or remove them, or allow a larger share (train.max_unreadable=1 reads on and "
            "names all)"
        )


def _ignore_ctrl_c(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops cleanly; its workers end with it


class Courier:
    """Sends batches to a device: to CUDA on a stream of its own, so that the copy runs beside the step before.

    What is computed from then on waits for the copy, and the host for nothing. Only from pinned memory is it so.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return to_device(batch, self.device)
        with torch.cuda.stream(self._stream):
            sent = to_device(batch, self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for value in sent.values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # or its memory would be used again before that stream has read it
        return sent


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; other values stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some samples of a batch, whose values are tensors or lists of bytes."""
    return {name: x[rows] if isinstance(x, Tensor) else [x[row] for row in rows] for name, x in batch.items()}


def plain_batches(
    dataset: Dataset[Batch],
    *,
    batch: int,
    device: torch.device,
    workers: int = 0,
    limit: int | None = None,
    seed: int | None = None,
    indices: Sequence[int] | None = None,
    rank: int = 0,
    ranks: int = 1,
    unreadable: set[str] | None = None,
    kept: list[int] | None = None,
    max_unreadable: float = 1.0,
    tokenize: Callable[[Batch], Tokens] | None = None,
    labels: bool = False,
    of: Literal["training", "held-out"] = "held-out",
) -> Iterator[Batch]:
    """Batches for evaluation: every sample once, unreadable ones left out, the last batch as small as it is.

    Args:
        limit: most samples. seed: take a random choice of them instead of the first.
        indices: take these samples instead, in this order.
        rank, ranks: every `ranks`-th batch, from this one on. The batches are those of one process, so sums over all
            ranks are too, to the last digit.
        unreadable: gets name and cause of every sample left out.
        kept: gets the place of every sample that is given, counted from the first of all.
        max_unreadable: share of the samples that may be.
        tokenize: of the adapter; samples whose tokens are not finite are then left out as unreadable, too.
        labels: and those with a float "label" that is not.
        of: what an error calls the samples.

    Raises:
        NothingRead: no sample could be read.
        UserError: too few could.
    """
    count = len(cast(Sized, dataset))
    if indices is None:
        indices = list(range(count)) if seed is None else epoch_order(count, seed, 0).tolist()
    indices = list(indices)[:limit]
    starts = range(0, len(indices), batch)[rank::ranks]
    draws = [Draw(indices[i : i + batch], fold_seed(seed or 0, "plain", i)) for i in starts]
    loader = _loaded(_Batches(dataset, replace=False), draws, workers, device)
    skipped: set[str] = set()
    empty, send = True, Courier(device)
    for start, draw, loaded in zip(starts, draws, loader, strict=True):
        found, lost = _raise_error(loaded).pop(_SKIPPED, []), loaded.pop(_LOST, [])
        places = [place for place in range(len(draw.indices)) if place not in lost]
        drawn = loaded.pop(_DRAWN)
        loaded = send(loaded)
        if tokenize is not None and loaded:
            faults = _faults(tokenize(loaded), loaded, labels=labels)
            sound = faults == 0
            if not sound.all():
                found = [*found, *(_broken(dataset, i, int(k)) for i, k in zip(drawn, faults, strict=True) if k)]
                loaded = rows_of(loaded, sound.nonzero()[:, 0].tolist()) if sound.any() else {}
                places = [place for place, good in zip(places, sound.tolist(), strict=True) if good]
        if kept is not None:
            kept += [start + place for place in places]
        skipped.update(found)
        if unreadable is not None:
            unreadable.update(found)
        _refuse_many(skipped, len(indices), max_unreadable, f"{of} ")
        if loaded:
            empty = False
            yield loaded
    if empty and (draws or rank == 0):
        raise NothingRead(f"no {of} sample can be read: {min(skipped) if skipped else 'the split is empty'}")


KILLED = "DataLoader worker (pid"
"""How torch begins to say that; of an exception in such a process it says "Caught ... in DataLoader worker process"."""

LOADER_DIED = (
    "the system has killed a process that loads data, perhaps for want of memory: lower train.batch, or load in the "
    "main process with train.workers=0; checkpoints are kept"
)


def _loaded(
    batches: _Batches, draws: Sequence[Draw] | DrawSampler, workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of these draws, loaded by other processes where there is room for them.

    Raises:
        UserError: one of these processes was killed.
    """
    settings: dict[str, Any] = {
        "batch_size": None,  # a draw is a whole batch already
        "sampler": draws,
        "worker_init_fn": _ignore_ctrl_c,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),  # or the loader would draw from the global one
    }
    workers = min(workers, cores())  # more only take turns; batches are the same from any number
    if workers and (cause := _no_room_for(workers)):
        _say_once(f"No processes to load data can be started ({cause}): loading in the main process.")
        workers = 0
    stream = iter(DataLoader(batches, num_workers=workers, **settings))
    while True:
        try:
            found = next(stream)
        except StopIteration:
            return
        except RuntimeError as error:
            if KILLED in str(error):
                raise UserError(LOADER_DIED) from error
            raise
        yield _unpickled(found, pinned=settings["pin_memory"]) if isinstance(found, bytes) else found


def _unpickled(found: bytes, *, pinned: bool) -> Batch:
    """A batch that came through a pipe, which the loader could not pin."""
    batch: Batch = pickle.loads(found)
    return {key: x.pin_memory() if pinned and isinstance(x, Tensor) else x for key, x in batch.items()}


def _no_room_for(workers: int) -> str:
    """Why the locks between so many processes can't be made, as where /dev/shm holds a few pages; "" if they can."""
    try:
        locks = [torch.multiprocessing.get_context().Lock() for _ in range(3 * workers + 10)]  # three a queue
    except OSError as error:
        return f"/dev/shm: {error.strerror}"
    del locks
    return ""


@lru_cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _raise_error(batch: Batch) -> Batch:
    if _ERROR in batch:
        raise batch[_ERROR]
    return batch


def give_back_memory() -> None:
    """Give memory that has been freed back to the system, which glibc alone must be asked to do (measured: 400 MB)."""
    with suppress(OSError, TypeError, AttributeError):  # another library of C
        ctypes.CDLL(None).malloc_trim(0)
