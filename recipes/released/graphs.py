"""A run's encoder as a graph that needs this package no more: an ONNX file, or torch.export's .pt2.

The graph goes from the tensors of a batch to features where the adapter's `tokenize` and `order` can be traced, else
from tokens. It counts as done once it gives what the network gives on other samples, in other numbers, and where the
length may differ on shorter ones.

Shapes: B samples, N tokens, L places of a batch's tensors along their second axis, D width.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from nepa_core.basics import Batch, UserError, needs
from nepa_core.pooling import Row, read_rows
from nepa_core.runtime.checkpoint import disk_errors, write_whole
from nepa_core.runtime.config import import_path, shown
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.load import Network
from nepa_core.tokens import Tokens
from recipes.report.provenance import provenance
from recipes.report.summaries import GraphRecord, GraphTensor

TOLERANCE = 1e-4
"""The largest difference from the run; where features are larger than 1, as a share of the largest."""
OUTPUTS = ["features", "mask"]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TRACED, SAMPLES = 3, 8
"""How many samples the graph is traced with, and how many are read: it is checked on the others."""
SHORTEST = 3
"""Tokens of the shortest input of a graph of any length: tracing takes the lengths before for cases of their own."""
LARGEST_ONNX = 2**31 - 2**20
"""Bytes of weights; one file of ONNX holds no more than 2 GiB."""
OF_TOKENS = (
    "Tokens in the order of prediction. values: their content, float32. coords: where they lie. mask: true for a real "
    "one. order: the canonical index of each."
)


class Way(NamedTuple):
    """One way to cut the encoder off from what comes before it.

    Attributes:
        tokens: the inputs are those of `Tokens`, else tensors of the batch.
        axes: input -> the axes that may have any length, by their number.
        cut: L of a shorter sample, for the check; 0 where the length is fixed.
    """

    tokens: bool
    axes: dict[str, dict[int, Any]]
    cut: int

    @property
    def said(self) -> str:
        return f"from {'tokens' if self.tokens else 'a batch'} of {'any' if self.cut else 'one'} length"


class Encoder(nn.Module):
    """A row of a network as a function of plain tensors, by formulas that any graph has."""

    def __init__(self, net: Network, row: Row, way: Way) -> None:
        super().__init__()
        self.model = copy.deepcopy(net.model)
        self.model.predictor.fused = False
        for block in self.model.predictor.blocks:
            cast(Any, block).attention.backend = "sdpa"
        self.net, self.row, self.way = replace(net, model=self.model), row, way

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Features [B, D], or of every token [B, N, D] and, where there is a mask, that [B, N]."""
        given = dict(zip(self.way.axes, inputs, strict=True))
        return features(self.net, self.row, Tokens(**given) if self.way.tokens else self.net.data.read(given))


def features(net: Network, row: Row, tokens: Tokens) -> list[Tensor]:
    """What `net.encode` reads of tokens, in float32."""
    found, real, _ = read_rows(net.model, tokens, [row], causal=net.causal)
    with_mask = row.pooling == "token" and tokens.mask is not None
    return [*found, tokens.canonical(real[:, int(net.model.config.bos) :])] if with_mask else found


def export_graph(net: Network, row: Row, kind: str, file: Path) -> GraphRecord:
    """Write the graph of a network, which goes to the CPU for it, and what it takes and gives to FILE.json.

    Args:
        row: what is read. kind: "onnx" or "torch".

    Raises:
        UserError: there is such a file, a package is missing, no sample can be read, there is no way to make the graph,
            or it does not give what the run gives.
    """
    if file.exists():
        raise UserError(f"{file} exists: remove it, or name another one with out=FILE")
    if kind == "onnx":
        needs("format=onnx", "onnx", "onnxscript", "onnxruntime", extra="onnx")
        if sum(x.numel() * x.element_size() for x in net.model.state_dict().values()) > LARGEST_ONNX:
            raise UserError("format=onnx: these weights are more than the 2 GiB that one file holds; use format=torch")
    net.model.cpu()
    batch, keys = held_out(net)
    draft, notes = file.with_name(f".writing_{file.name}"), list[str]()
    with disk_errors(file), torch.no_grad():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            for way in ways(net, batch, keys):
                encoder = Encoder(net, row, way)
                try:
                    with quiet():
                        run, opset = written(encoder, batch, kind, draft)
                    off = difference(encoder, net, batch, run)
                except (OSError, UserError):
                    raise
                except Exception as error:  # tracing code that anyone wrote fails in as many ways as there are
                    notes.append(f"{way.said}: {reason(error)}")
                    continue
                if off <= TOLERANCE:
                    record = described(encoder, batch, kind, opset, off, notes)
                    draft.rename(file)
                    write_whole(file.with_name(f"{file.name}.json"), json.dumps(record, indent=2) + "\n")
                    return record
                notes.append(f"{way.said}: it differs from the run by {off:.1e}, more than {TOLERANCE}, and is removed")
        finally:
            draft.unlink(missing_ok=True)
    raise UserError(f"format={kind}: no graph of {net.source} can be made. {'; '.join(notes)}")


class Asked(dict[str, Any]):
    """A batch that remembers which of its keys were asked for."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.asked = set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def held_out(net: Network) -> tuple[Batch, list[str]]:
    """The tensors of the first held-out samples that can be read, and which of them the tokens are made of.

    Raises:
        UserError: none can be read.
    """
    samples = net.data.samples_of("test")
    options: dict[str, Any] = {"limit": 64 * SAMPLES, "unreadable": set(), "tokenize": net.data.tokenize}
    batch = next(plain_batches(samples, batch=SAMPLES, device=torch.device("cpu"), **options))
    batch = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim}
    rows = torch.arange(SAMPLES) % min(map(len, batch.values()))
    asked = Asked({name: x[rows] for name, x in batch.items()})
    net.data.read(asked)
    return dict(asked), [name for name in batch if name in asked.asked] or list(batch)


def ways(net: Network, batch: Batch, keys: Sequence[str]) -> Iterator[Way]:
    """From the batch before from tokens, and of any length, where samples have several, before of one."""
    tokens = net.data.read(batch)
    count, most = tokens.values.shape[1], net.model.config.learned_positions or None
    batches, length = Dim("batch"), Dim("tokens", min=SHORTEST, max=most)
    for of_tokens, inputs in (
        (False, {key: batch[key] for key in keys}),
        (True, of_each(tokens)),
    ):
        places = max((x.shape[1] for x in inputs.values() if x.ndim > 1), default=0)
        places, unit = (count, 1) if of_tokens else (places, places // count)
        uneven = (
            tokens.mask is not None and tokens.order is None and count >= 2 * SHORTEST and places == unit * count > 0
        )
        for free in (True, False) if uneven else (False,):
            axes: dict[str, dict[int, Any]] = {}
            for name, x in inputs.items():
                axes[name] = {0: batches}
                if free and x.ndim > 1 and x.shape[1] == places:
                    axes[name][1] = length if unit == 1 else unit * length
            yield Way(of_tokens, axes, unit * (count // 2) if free else 0)


def inputs(net: Network, way: Way, batch: Batch, rows: slice, cut: int = 0) -> tuple[list[Tensor], Tokens]:
    """What a graph takes of these samples, of `cut` places each where that is not 0, and their tokens."""
    some = {name: x[rows] for name, x in batch.items()}
    if cut and not way.tokens:
        some |= {name: some[name][:, :cut] for name, axes in way.axes.items() if 1 in axes}
    tokens = net.data.read(some)
    if cut and way.tokens:
        assert tokens.mask is not None
        whole = replace(tokens, values=tokens.values[:, :cut], mask=tokens.mask[:, :cut])
        tokens = replace(whole, coords=tokens.coords[..., :cut, :])
    given = of_each(tokens) if way.tokens else some
    return [given[name] for name in way.axes], tokens


def of_each(tokens: Tokens) -> dict[str, Tensor]:
    """What tokens are made of, with a row for every sample also of what they share."""
    samples = len(tokens.values)
    order = None if tokens.order is None else tokens.order.expand(samples, -1)
    coords = tokens.coords.expand(samples, -1, -1)
    parts = {"values": tokens.values, "coords": coords, "mask": tokens.mask, "order": order}
    return {name: x.contiguous() for name, x in parts.items() if x is not None}


def written(
    encoder: Encoder, batch: Batch, kind: str, draft: Path
) -> tuple[Callable[[list[Tensor]], list[Tensor]], int | None]:
    """Trace and write; what the file gives when it is read again, and its opset where it is of ONNX."""
    way = encoder.way
    given, _ = inputs(encoder.net, way, batch, slice(TRACED))
    shapes = (tuple(way.axes.values()),)
    program = torch.export.export(encoder, tuple(given), dynamic_shapes=shapes)
    if kind == "torch":
        torch.export.save(program, draft)
        loaded = torch.export.load(draft).module()
        return lambda given: list(loaded(*given)), None
    import onnxruntime

    names, outputs = list(way.axes), OUTPUTS[: len(program.graph_signature.user_outputs)]
    options: dict[str, Any] = {"input_names": names, "output_names": outputs, "dynamic_shapes": shapes}
    graph: Any = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    graph.save(draft, external_data=False)
    session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])

    def run(given: list[Tensor]) -> list[Tensor]:
        named = {name: x.numpy() for name, x in zip(names, given, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, named)]

    return run, graph.model.opset_imports[""]


def difference(encoder: Encoder, net: Network, batch: Batch, run: Callable[[list[Tensor]], list[Tensor]]) -> float:
    """The largest between a graph and the network on samples that it was not traced with, see `TOLERANCE`."""
    way, found = encoder.way, [0.0]
    for rows, cut in ((slice(TRACED, None), 0), (slice(1), 0), (slice(TRACED, None), way.cut)):
        given, tokens = inputs(net, way, batch, rows, cut)
        for mine, theirs in zip(run(given), features(net, encoder.row, tokens), strict=True):
            off = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1)
            found.append(float(off) if mine.shape == theirs.shape else torch.inf)
    return float(torch.tensor(found).max())  # NaN, if there is any


def described(
    encoder: Encoder, batch: Batch, kind: str, opset: int | None, off: float, notes: list[str]
) -> GraphRecord:
    """What the graph takes and gives, and where it is from."""
    net, row, way = encoder.net, encoder.row, encoder.way
    given, tokens = inputs(net, way, batch, slice(None))
    free = {i: axis for axes in way.axes.values() for i, axis in axes.items() if i}
    count = "tokens" if free else tokens.values.shape[1]
    width = net.model.config.dim
    gives: list[GraphTensor] = [{"name": "features", "dtype": "float32", "shape": ["batch", width]}]
    if row.pooling == "token":
        gives[0]["shape"] = ["batch", count, width]
        if tokens.mask is not None:
            gives.append({"name": "mask", "dtype": "bool", "shape": ["batch", count]})
    packages = ("torch", "onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ("torch",)
    return {
        "run": net.source,
        "weights": "ema" if net.averaged else "raw",
        "digest": net.digest,
        "layer": row.name(net.model.config.depth),
        "causal": net.causal,
        "format": kind,
        "opset": opset,
        "inputs": [
            {
                "name": name,
                "dtype": str(x.dtype).removeprefix("torch."),
                "shape": [axes[i].__name__ if i in axes else size for i, size in enumerate(x.shape)],
            }
            for (name, axes), x in zip(way.axes.items(), given, strict=True)
        ],
        "outputs": gives,
        "about": OF_TOKENS if way.tokens else inspect.getdoc(type(net.data).tokenize) or "",
        "adapter": import_path(type(net.data)),
        "settings": net.data.model_dump(mode="json"),
        "held_out_as": net.data.held_out_as(),
        "largest_difference": off,
        "notes": notes,
        "versions": {name: version(name) for name in packages},
        "made_with": provenance(),
    }


def render(record: GraphRecord, file: Path) -> str:
    """What was written, on the screen."""

    def named(tensors: list[GraphTensor]) -> str:
        return ", ".join(f"{x['name']} {x['dtype']} [{', '.join(map(str, x['shape']))}]" for x in tensors)

    lines = [
        f"{file}: {named(record['inputs'])} -> {named(record['outputs'])} ({record['layer']}, {record['weights']})"
    ]
    if record["notes"]:
        lines.append(f"This is not the first choice: {'; '.join(record['notes'])}.")
    checked = "onnxruntime" if record["format"] == "onnx" else "torch.export"
    lines.append(
        f"Checked by {checked} on other samples: the largest difference is {record['largest_difference']:.1e}."
    )
    return "\n".join([*lines, f"{file}.json says what goes in."])


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block the exporters keep to themselves what they think of it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def reason(error: BaseException) -> str:
    """One line: the operator that ONNX lacks, or the first line of an error."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    if lacks := next(
        filter(
            None,
            (re.search(r"No ONNX function found for <?(?:OpOverload\(op=')?([\w.:]+)", str(each)) for each in chain),
        ),
        None,
    ):
        return f"ONNX has no operator for {lacks[1]}"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return shown(lines[1 if "Constraints violated" in lines[0] and lines[1:] else 0].partition(". ")[0], 200)
