"""A trained network at a Python prompt: `load`, then `encode`, `surprise` or `predict`.

Shapes: B samples, T places, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction, evaluating
from nepa_core.pooling import Row, read_rows, surprise_of_tokens
from nepa_core.runtime import trust as trusting
from nepa_core.runtime.config import read_saved
from nepa_core.runtime.data import plain_batches, to_device
from nepa_core.runtime.fit import autocast_dtype
from nepa_core.runtime.released import find
from nepa_core.runtime.run import Run, is_run, reading_back
from nepa_core.runtime.weights import network_of, read_weights

Layer = int | Literal["embedding", "final", "best"]
Pooling = Literal["auto", "mean", "last", "bos"] | None
Samples = Batch | Dataset[Batch] | Sequence[Batch]
"""One batch as a data set collates it, a map-style data set, or a list of its samples."""


class Read(NamedTuple):
    """What one forward pass reads of a batch, on the CPU.

    Attributes:
        features: of every row, [B, D] float32, or of single tokens [B, N, D], in canonical order and 0 where not real.
        mask: [B, N] bool in canonical order, True for a real token.
        surprise: [B, N] float32, see `nepa_core.pooling.surprise_of_tokens`; None where it was not asked for.
    """

    features: list[Tensor]
    mask: Tensor
    surprise: Tensor | None


class Reading(NamedTuple):
    """How samples are read: those of the run, see `nepa_core.runtime.fit.TrainConfig`; `batch` is how many at once."""

    batch: int = 64
    workers: int = 0
    precision: str = "auto"


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network and its data, as `load` opens them.

    The methods read no labels and keep no gradients; the results lie on the CPU and are those of evaluation mode,
    whatever mode the model is in. To change how it reads: `dataclasses.replace(net, causal=False)`.

    Attributes:
        source: the folder that was opened; of a name on the hub the one in its cache.
        model: in evaluation mode, on CUDA where there is one; move it as you like.
        data: the adapter without augmentation. `data.dataset("test")` gives held-out samples.
        causal: whether attention looks backwards only, as the network was trained.
        averaged: whether the weights are the average over training.
        labelled: whether it has been trained on labels since: its output then predicts no token.
        shift: whether place t was trained to predict place t + 1, and not itself.
        digest: what tells these weights from others.
        predicts_raw: whether it was trained to predict raw tokens alone.
    """

    source: str
    model: NEPA
    data: Modality
    causal: bool
    averaged: bool
    labelled: bool
    reading: Reading
    shift: bool = True
    digest: str = ""
    predicts_raw: bool = False

    def encode(
        self, samples: Samples, layer: Layer | list[Layer] | tuple[Layer, ...] = "final", pooling: Pooling = "auto"
    ) -> Any:
        """Features of samples, float32, as `nepa probe` reads them.

        Args:
            layer: 0 or "embedding", the output of block 1, 2 ..., "final" (behind the last norm), or "best": what the
                run's probe chose on held-back training samples. A list gives a list.
            pooling: "mean" over the tokens, the "last" token, or "bos"; None for every token, in canonical order and 0
                where it is not real. "auto" is the mean, and with layer="best" the pooling that the probe chose.

        Returns:
            [B, D], or with pooling=None the pair of [B, N, D] and the mask [B, N] bool, True for a real token.

        Raises:
            UserError: there is no such layer, no probe, or a sample can't be read.
        """
        layers = layer if isinstance(layer, list | tuple) else (layer,)
        reads = self._reads(samples, self.rows(layers, pooling))
        whole: list[Any] = [_joined(parts) for parts in zip(*(read.features for read in reads), strict=True)]
        if pooling is None:
            mask = _joined([read.mask for read in reads])
            whole = [(features, mask) for features in whole]
        return whole if isinstance(layer, list | tuple) else whole[0]

    def surprise(self, samples: Samples, *, per_token: bool = False) -> Tensor:
        """How badly the network predicts samples: the loss of pre-training, the mean of -cos(p_t, z_{t+1}) over places.

        Returns:
            [B] float32, from -1 (all foreseen) to 1; or per token [B, N] in canonical order, NaN where nothing predicts
            the token, see `nepa_core.pooling.surprise_of_tokens`.

        Raises:
            UserError: the output of this network predicts no token that it has not seen, or a sample can't be read.
        """
        self.check_surprise()
        found = _joined([cast(Tensor, read.surprise) for read in self._reads(samples, (), surprise=True)])
        return found if per_token else found.nanmean(1)

    def check_surprise(self) -> None:
        """Whether there is a `surprise` at all.

        Raises:
            UserError: the network was trained on labels, attends to what it predicts, was trained to give it back, or
                to predict raw tokens alone.
        """
        self._check_predicts()
        if not self.causal or not self.shift:
            why = "attends to the tokens that it predicts" if self.shift else "was trained to give back what it sees"
            raise UserError(f"{self.source} {why}, so nothing surprises it: take a causal run")
        if self.predicts_raw:
            raise UserError(
                f"{self.source} was trained to predict raw tokens alone, and surprise compares embeddings: take a run "
                "with a term that does, such as objective.terms.cosine=1"
            )

    def rows(self, layers: Sequence[Layer], pooling: Pooling) -> list[Row]:
        """What `encode` reads for these.

        Raises:
            UserError: there is no such layer or pooling, or no probe for "best".
        """
        return [self._row(each, pooling) for each in layers]

    def read(self, batch: Batch, rows: Sequence[Row], *, surprise: bool = False) -> Read:
        """One forward pass over a batch on the model's device, without gradients, in evaluation mode."""
        bos = self.model.config.bos
        with _reading_only(self.model):
            tokens = self.data.read(batch)
            found, mask, out = read_rows(self.model, tokens, rows, causal=self.causal, dtype=self._dtype())
            loss = surprise_of_tokens(out, tokens, bos=bos).cpu() if surprise else None
        return Read([each.cpu() for each in found], tokens.canonical(mask[:, int(bos) :]).cpu(), loss)

    def _reads(self, samples: Samples, rows: Sequence[Row], *, surprise: bool = False) -> list[Read]:
        with _reading_only(self.model):  # loading draws from the global generator, too
            return [self.read(batch, rows, surprise=surprise) for batch in self._batches(samples)]

    def predict(self, samples: Samples) -> Prediction:
        """Embeddings of samples and the predictions of the next ones, float32 [B, T, D] each.

        In the order of prediction, BOS first where there is one: place t predicts the embedding at place t + 1, see
        `nepa_core.model.Prediction`, behind the prediction head of its training. A network without `causal` has seen
        what it predicts.

        Raises:
            UserError: the network has been trained on labels since, or a sample can't be read.
        """
        self._check_predicts()
        dtype, found = self._dtype(), list[Prediction]()
        with _reading_only(self.model):
            for batch in self._batches(samples):
                with torch.autocast(self._device.type, dtype, enabled=dtype is not None):
                    out = self.model(self.data.read(batch), causal=self.causal)
                mask = None if out.mask is None else out.mask.cpu()
                found.append(Prediction(out.embeddings.float().cpu(), out.predictions.float().cpu(), mask))
        masks = [out.mask for out in found if out.mask is not None]
        return Prediction(
            _joined([out.embeddings for out in found]),
            _joined([out.predictions for out in found]),
            _joined(masks) if masks else None,
        )

    def _check_predicts(self) -> None:
        if self.labelled:
            raise UserError(
                f"{self.source} was trained on labels, and its output no longer predicts the next token: load the "
                "pre-trained run, or use encode"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.reading.precision, self._device)

    def _row(self, layer: Layer, pooling: Pooling) -> Row:
        depth = self.model.config.depth
        known = {"embedding": 0, "final": depth + 1} | {each: each for each in range(depth + 1)}
        if pooling not in ("auto", "mean", "last", "bos", None):
            raise UserError(f'pooling={pooling!r}: it is "mean", "last", "bos", or None for every token')
        if pooling == "bos" and not self.model.config.bos:
            raise UserError('pooling="bos": the network has no BOS')
        if layer == "best":
            return self._best(pooling)
        if layer not in known:
            raise UserError(
                f'layer={layer!r}: the network has layers 0 (the "embedding") to {depth}, "final", and "best"'
            )
        return Row(known[layer], {None: "token", "auto": "mean"}.get(pooling, str(pooling)))

    def _best(self, pooling: Pooling) -> Row:
        """The row of probe.json with the best validation figure, of those that this pooling allows."""
        file, depth = Path(self.source) / "probe.json", self.model.config.depth
        probe = Run(Path(self.source)).summary("probe.json")
        if probe is None:
            raise UserError(
                f'layer="best" is what a probe chose, and there is no {file}: `nepa probe {self.source}` makes it'
            )
        kinds = {"auto": ("mean", "last", "bos"), None: ("mean", "last", "bos", "token")}.get(pooling, (str(pooling),))
        rows = {row.name(depth): row for kind in kinds for row in (Row(i, kind) for i in range(depth + 2))}
        with reading_back(file):
            if probe["causal"] != self.causal:
                way = str(self.causal).lower()
                raise UserError(f"{file} was read with another attention: `nepa probe {self.source} causal={way}`")
            read = [row for row in probe["layers"] if row["name"] in rows]
            if not read:
                raise UserError(f"{file} has no row of pooling={pooling!r}: give another pooling, or a layer by number")
            best = rows[max(read, key=lambda row: float(row["validation"]))["name"]]
        return best._replace(pooling="token") if pooling is None else best

    def _batches(self, samples: Samples) -> Iterator[Batch]:
        if isinstance(samples, Mapping):
            yield from self._slices(samples)
            return
        if not hasattr(samples, "__getitem__") or not hasattr(samples, "__len__"):
            raise UserError(
                f"a {type(samples).__name__} can't be read: give a batch (a dictionary of tensors), a data set with "
                "len() and [], or a list of its samples"
            )
        workers = 0 if isinstance(samples, Sequence) else self.reading.workers
        unreadable: set[str] = set()
        options: dict[str, Any] = {"batch": self.reading.batch, "workers": workers, "unreadable": unreadable}
        for batch in plain_batches(cast(Dataset[Batch], samples), device=self._device, **options):
            if not unreadable:
                yield batch
        if unreadable:
            raise UserError(f"{min(unreadable)}; leave it out, by torch.utils.data.Subset or from the list")

    def _slices(self, batch: Mapping[str, Any]) -> Iterator[Batch]:
        counts = [len(x) for x in batch.values() if isinstance(x, Tensor) and x.ndim]
        if not counts:
            raise UserError("the batch holds no tensor with samples along its first axis")
        for start in range(0, counts[0], self.reading.batch):
            some = slice(start, start + self.reading.batch)
            rows = {key: x[some] if isinstance(x, Tensor) and x.ndim else x for key, x in batch.items()}
            yield to_device(rows, self._device)


def load(name: str | Path, *, data: Modality | None = None, trust: bool = False) -> Network:
    """Open a trained network: averaged weights where there are any, its adapter, and its attention.

    Args:
        name: the folder of a run of any task, a folder in the released layout, or OWNER/NAME on the Hugging Face hub,
            of either kind (`nepa push`).
        data: the adapter to read samples by, without augmentation, in place of its own.
        trust: import the code that the run names, although it was not made here, see `nepa_core.runtime.trust`.

    Raises:
        UserError: there is nothing of the kind, it is damaged, or names code that is not to be trusted.
    """
    name = str(find(str(name)))
    with trusting.everything() if trust else nullcontext():
        weights = read_weights(name, key="")
    data = (data or weights.data).as_trained_on(weights.data).plain()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network_of(weights, data, device)
    saved = read_saved(Path(name) / "config.json") if is_run(name) else {}
    shift = bool(saved.get("objective", {}).get("shift", True))
    headed, reading = bool(weights.head), _reading(saved.get("train"))
    return Network(
        name,
        model,
        data,
        weights.causal,
        weights.averaged,
        headed,
        reading,
        shift=shift,
        digest=weights.digest,
        predicts_raw=weights.predicts_raw,
    )


def _reading(train: dict[str, Any] | None) -> Reading:
    if train is None:
        return Reading()
    batch = min(train.get("micro_batch") or train.get("batch", 64), 256)
    return Reading(batch, train.get("workers", 0), train.get("precision", "auto"))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError("batches have different numbers of tokens: pad all samples to one length, or give pooling=")
    return torch.cat(list(parts))


@contextmanager
def _reading_only(model: NEPA) -> Iterator[None]:
    """Within the block the model is in evaluation mode; its mode and the global generator are then as before."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
