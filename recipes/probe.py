"""nepa probe: what a linear classifier reads from every layer of a run, beside the same network untrained.

Features are computed without augmentation and with the attention the run was trained with, unless `causal=` says
otherwise. For every layer and pooling a logistic regression (L-BFGS on standardised features) is fitted on the
training samples. The best row is chosen on a fifth of the training samples held back, never on the test
samples. Standardised features hide collapse, so the effective rank stands beside every accuracy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from nepa_core.basics import FROZEN, Batch, UserError
from nepa_core.diagnostics import effective_rank
from nepa_core.model import NEPA
from nepa_core.predictor import Trace
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.distributed import world
from nepa_core.runtime.run import Run
from recipes.heads import last_token, mean_of_tokens
from recipes.pretrain import PretrainConfig, build_model, load_pretrained, provenance
from recipes.targets import is_run

POOLINGS = ("mean", "last")


class Options(BaseModel):
    """Options of `nepa probe`."""

    model_config = FROZEN

    causal: bool | None = Field(default=None, description="attention of the read-out; default: as in pre-training")
    train_samples: int = Field(default=5000, gt=0, description="most training samples the classifiers are fitted on")
    test_samples: int = Field(default=10_000, gt=0, description="most held-out samples they are scored on")


class Features(NamedTuple):
    """Pooled features of a split.

    Attributes:
        rows: row name ("layer 2, mean") -> [S, D] float32.
        labels: [S] int64.
    """

    rows: dict[str, np.ndarray]
    labels: np.ndarray


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    if changes:
        raise UserError(f"nepa probe reads a finished run; {next(iter(changes))} is not one of its options")
    if not is_run(target):
        raise UserError(f"{target} is not a run folder; run `nepa pretrain` first and name its folder")
    with world() as ranks:
        if not ranks.is_main:
            return
        run = Run(Path(target))
        config, model = load_pretrained(run, ranks.device)
        summary = probe(config, model, options) | {"made_with": provenance()}
        run.write_summary(summary, "probe.json")
        print(render(summary))


def probe(config: PretrainConfig, model: NEPA, options: Options) -> dict[str, Any]:
    """Score every layer x pooling of a network, of the same network with random weights, and the raw tokens.

    Returns:
        `layers`: a list of rows {name, accuracy, validation, effective_rank}; `best`: the row with the best
        validation accuracy; `random_init`: the same two for the untrained network; `raw_tokens`: its row;
        `final_layer`, the last row of `layers` under the mean.
    """
    causal = config.objective.causal if options.causal is None else options.causal
    device = next(model.parameters()).device
    untrained = build_model(config).to(device).eval()

    def score(network: NEPA | None) -> list[dict[str, Any]]:
        train = features(config, network, "train", options.train_samples, causal=causal, device=device)
        test = features(config, network, "test", options.test_samples, causal=causal, device=device)
        return [score_row(name, train, test) for name in train.rows]

    layers, random_init, raw = score(model), score(untrained), score(None)
    return {
        "layers": layers,
        "best": best_row(layers),
        "random_init": {"layers": random_init, "best": best_row(random_init)},
        "raw_tokens": raw[0],
        "causal": causal,
        "seed": config.train.seed,
    }


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the best validation accuracy."""
    return max(rows, key=lambda row: float(row["validation"]))


@torch.no_grad()
def features(
    config: PretrainConfig, model: NEPA | None, split: str, limit: int, *, causal: bool, device: torch.device
) -> Features:
    """Pooled features of every layer, or of the raw tokens where there is no model.

    Raises:
        UserError: the adapter's samples have no "label".
    """
    rows: dict[str, list[Tensor]] = {}
    labels = []
    for batch in labelled_batches(config, split, limit, device):
        labels.append(batch["label"].cpu())
        tokens = config.data.read(batch)
        if model is None:
            flat = tokens.canonical(tokens.values)
            if tokens.mask is not None:
                flat = flat * tokens.canonical(tokens.mask)[..., None]
            rows.setdefault("raw tokens", []).append(flat.flatten(1).float().cpu())
            continue
        trace = Trace()
        mask = model(tokens, causal=causal, trace=trace).mask
        for name, hidden in zip(layer_names(len(trace.hidden)), trace.hidden, strict=True):
            pooled = (mean_of_tokens(hidden, mask, bos=config.model.bos), last_token(hidden, mask))
            for pooling, value in zip(POOLINGS, pooled, strict=True):
                rows.setdefault(f"{name}, {pooling}", []).append(value.float().cpu())
    return Features({name: torch.cat(parts).numpy() for name, parts in rows.items()}, torch.cat(labels).numpy())


def layer_names(count: int) -> list[str]:
    """Names of `Trace.hidden`: the embedding, every block, the final norm."""
    return ["embedding", *(f"layer {i}" for i in range(1, count - 1)), "final norm"]


def labelled_batches(config: PretrainConfig, split: str, limit: int, device: torch.device) -> Iterator[Batch]:
    """Batches of a split without augmentation; of the training split a random choice, of the test split the first."""
    data = config.data.plain()
    size = min(config.train.micro_batch or config.train.batch, 256)
    for batch in plain_batches(
        data.dataset(split),
        batch=size,
        device=device,
        workers=config.train.workers,
        limit=limit,
        seed=0 if split == "train" else None,
    ):
        if "label" not in batch:
            raise UserError(f"{type(data).__name__} gives no label to probe for; add the key 'label' to its samples")
        yield batch


def score_row(name: str, train: Features, test: Features) -> dict[str, Any]:
    """Fit one logistic regression on all training samples, and one on four fifths to choose rows by."""
    x, y = train.rows[name], train.labels
    split = len(x) - len(x) // 5  # the training samples come in random order
    return {
        "name": name,
        "accuracy": linear_accuracy(x, y, test.rows[name], test.labels),
        "validation": linear_accuracy(x[:split], y[:split], x[split:], y[split:]),
        "effective_rank": effective_rank(torch.from_numpy(test.rows[name])),
    }


def linear_accuracy(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """Accuracy of logistic regression (L2, C = 1) on features standardised by the training samples."""
    scaler = StandardScaler().fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 iterations are enough to compare rows
        classifier = LogisticRegression(max_iter=200).fit(scaler.transform(x), y)
    return float(classifier.score(scaler.transform(x_test), y_test))


def render(summary: dict[str, Any]) -> str:
    """The table as text."""
    lines = [f"{'':<22}  {'accuracy':>8}  {'random weights':>14}  {'rank':>6}  {'random':>6}"]
    for row, random in zip(summary["layers"], summary["random_init"]["layers"], strict=True):
        lines.append(
            f"{row['name']:<22}  {row['accuracy']:>8.3f}  {random['accuracy']:>14.3f}  "
            f"{row['effective_rank']:>6.1f}  {random['effective_rank']:>6.1f}"
        )
    raw, best, best_random = summary["raw_tokens"], summary["best"], summary["random_init"]["best"]
    lines += [f"{'raw tokens':<22}  {raw['accuracy']:>8.3f}  {'':>14}  {raw['effective_rank']:>6.1f}", ""]
    lines.append(
        f"Chosen on held-back training samples: {best['name']} {best['accuracy']:.3f}; "
        f"random weights {best_random['name']} {best_random['accuracy']:.3f}; raw tokens {raw['accuracy']:.3f}."
    )
    return "\n".join(lines)
