"""What comparisons measure of a finished run: read-outs, fine-tuning on few labels, attention.

Each stands beside the same figure of the same network with random weights, or of equal attention. Plain values come
back, so that they can be kept as JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UnreadableSample
from nepa_core.model import NEPA
from nepa_core.predictor import Trace
from nepa_core.runtime.data import epoch_order, fold_seed
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import fit
from nepa_core.runtime.optim import Duration
from nepa_core.runtime.run import Run
from nepa_core.samples import Some
from recipes import configs, presets
from recipes.configs import PretrainConfig
from recipes.networks.goals import Classification, Goal
from recipes.readout import probing
from recipes.readout.features import Reader, Source, kept_features, tokens_per_sample
from recipes.report.summaries import HeadFigures, PretrainSummary, ProbeRow, RunMeasures, Runs
from recipes.report.tables import spreads
from recipes.statistics.credits import pack_credits
from recipes.statistics.held_out import clusters_of, drawn_batches, is_chained, pack_clusters
from recipes.statistics.maps import attention_figures, neighbour_share, token_positions, uniform_attention
from recipes.statistics.significance import Spread
from recipes.training import finetuning

PROBE = probing.ProbeOptions(poolings=("mean", "last"), classifiers=("linear",))
"""The same rows for every variant: BOS can be read in some of them only."""


class Figure(NamedTuple):
    """A held-out figure and what every test sample adds to it.

    Attributes:
        value: the figure. credits: its credits, packed by `recipes.statistics.credits`, whose mean it is; None where
            one is not finite. clusters: of samples that depend on each other, packed by `recipes.statistics.held_out`;
            None: each is its own.
    """

    value: float
    credits: str | None = None
    clusters: str | None = None


def as_row(figures: Mapping[str, Figure]) -> RunMeasures:
    """Values by name and, also by name, under "credits" and "clusters" what is known of single samples."""
    row: RunMeasures = {
        "credits": {name: each.credits for name, each in figures.items() if each.credits is not None},
        "clusters": {name: each.clusters for name, each in figures.items() if each.clusters is not None},
    }
    return cast(RunMeasures, {name: each.value for name, each in figures.items()}) | row


def joined(one: RunMeasures, other: RunMeasures) -> RunMeasures:
    """Measured values as one dictionary; their credits and clusters too."""
    credits, clusters = one["credits"] | other["credits"], one["clusters"] | other["clusters"]
    return one | other | {"credits": credits, "clusters": clusters}


def every_spread(rows: Runs) -> dict[str, dict[str, Spread]]:
    """`spreads` of every number that was measured."""
    first = next(iter(rows.values()))[0]
    return {key: spreads(rows, key) for key, value in first.items() if isinstance(value, float | int)}


def of_variant(found: Mapping[str, Mapping[str, Spread]], name: str) -> dict[str, Any]:
    """Of `every_spread` what a summary holds of one variant: that of the probe flat, and all by their names."""
    probe = found["probe"][name]
    flat = {key: value for key, value in probe.items() if key != "values"}
    return {"accuracies": probe["values"], **flat, **{key: each[name] for key, each in found.items()}}


def by_layer(rows: Sequence[ProbeRow]) -> RunMeasures:
    """What is kept of the rows of a probe: `metric`, `probe`, `probe_row`, `probe_final`, `layers`."""
    best = probing.best_row(rows)
    metric = probing.metric_of(best)
    means = [row for row in rows if row["name"].endswith((", mean", ", token"))]
    read = {"probe": best, "probe_final": means[-1]}
    figures = {key: Figure(row[metric], row.get("credits"), row.get("clusters")) for key, row in read.items()}
    return as_row(figures) | {
        "metric": metric,
        "probe_row": best["name"],
        "layers": {
            "name": [row["name"].partition(",")[0] for row in means],
            "probe": [row[metric] for row in means],
            "rank": [rank for row in means if (rank := row["effective_rank"]) is not None],
        },
    }


def predicted(run: Run) -> RunMeasures:
    """Loss, lift over the baselines (how much lower the loss is), identification, and loss at each place."""
    summary = run.summary_of(PretrainSummary)
    assert summary is not None
    loss = summary["loss"]
    return {
        "loss": loss,
        "lift_copy": summary["baseline_copy"] - loss,
        "lift_mean": summary["baseline_mean"] - loss,
        "lift_position_mean": summary["baseline_position_mean"] - loss,
        "lift_linear": summary["baseline_linear"] - loss,
        "retrieval_top1": summary["retrieval_top1"],
        "retrieval_top1_linear": summary["retrieval_top1_linear"],
        "retrieval_top1_copy": summary["retrieval_top1_copy"],
        "retrieval_top1_mean": summary["retrieval_top1_mean"],
        "retrieval_top1_position_mean": summary["retrieval_top1_position_mean"],
        "retrieval_top1_untrained": summary["retrieval_top1_untrained"],
        "effective_rank_embedding": summary["effective_rank_embedding"],
        "effective_rank_embedding_start": summary["effective_rank_embedding_start"],
        "effective_rank_prediction": summary["effective_rank_prediction"],
        "effective_rank_prediction_start": summary["effective_rank_prediction_start"],
        "collapsed": summary["collapsed"],
        "loss_per_position": summary["loss_per_position"],
    }


def rank_over_training(run: Run) -> list[list[float]]:
    """[step, effective rank of the embeddings] at every evaluation of a run."""
    name = "effective_rank_embedding"
    return [[line["step"], line[name]] for line in run.metrics() if name in line]


def score_readers(config: PretrainConfig, readers: Sequence[Reader], ranks: World) -> list[list[ProbeRow]]:
    """The rows of every reader, scored as `PROBE` says; see `probing.score_rows`. Each has its `clusters`, packed."""
    per_sample = tokens_per_sample(config.data.plain())
    with tempfile.TemporaryDirectory() as store:
        train, test = (
            kept_features(Source(config, split, -(-limit // max(per_sample, 1))), readers, Path(store), ranks)
            for split, limit in (("train", PROBE.train_samples), ("test", PROBE.test_samples))
        )
        splits = [probing.Split.of(*pair, ranks.device) for pair in zip(train.features, test.features, strict=True)]
        scored = [probing.score_rows(split, PROBE.classifiers) for split in splits]
        numbers = torch.from_numpy(np.array(test.features[0]["sample"]))
    held_out = config.data.plain().samples_of("test")
    clusters = pack_clusters(clusters_of(held_out, numbers), chained=is_chained(held_out))
    return [[row | {"clusters": clusters} for row in rows] for rows in scored]


# ------------------------------------------------------------------------------------------- fine-tuning


def few_labels(whole: Dataset[Batch], goal: Goal, labels: int, seed: int) -> Some:
    """`labels` samples of every class, drawn by `seed`; where targets are not one class a sample, so many in all.

    Their classes come as `kinds`: 0 where targets are not one class a sample.
    """
    per_class = isinstance(goal, Classification) and not goal.per_token
    classes = goal.outputs if per_class else 1
    chosen: list[int] = []
    kinds: list[int] = []
    counts = [0] * classes
    for index in epoch_order(len(cast(Any, whole)), fold_seed(seed, "labels"), 0).tolist():
        try:
            kind = int(whole[index]["label"]) if per_class else 0
        except UnreadableSample:
            continue
        if kind >= 0 and counts[kind] < labels:
            counts[kind] += 1
            chosen.append(index)
            kinds.append(kind)
        if min(counts) == labels:
            break
    return Some(whole, chosen, kinds)


def short_tuning(
    config: PretrainConfig, init: Path | None, samples: Dataset[Batch], *, whole: bool, steps: int
) -> configs.FinetuneConfig:
    """`presets.short` without layer decay and averages, for so many steps on these samples.

    Args:
        whole: they are not so few that a batch fits in memory at once.
    """
    tuning = presets.short(config, None if init is None else str(init))
    train = tuning.train.model_copy(
        update={
            "length": Duration(steps=steps),
            "batch": min(tuning.train.batch, len(cast(Any, samples))),
            "micro_batch": tuning.train.micro_batch if whole else None,
            "ema": None,
            "checkpoint": steps,
        }
    )
    optim = tuning.optim.model_copy(update={"layer_decay": None})
    return tuning.model_copy(update={"train": train, "optim": optim})


def trained(
    tuning: configs.FinetuneConfig, goal: Goal, samples: Dataset[Batch], device: torch.device
) -> finetuning.Classifier:
    """A classifier after its training on these samples, by this process alone; nothing of the run is kept."""
    model, _ = finetuning.build_classifier(tuning, goal)
    model = model.to(device)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model=model,
            step_function=finetuning.make_step(tuning, goal),
            dataset=samples,
            config=tuning.train,
            optim=tuning.optim,
            run=Run(Path(folder)),
            world=World(0, 1, device),
            show=False,
        )
    return model


def tested(tuning: configs.FinetuneConfig, model: finetuning.Classifier, device: torch.device) -> Figure:
    """The goal's headline over all held-out samples, with what each adds."""
    parts: list[Tensor] = []
    goal = model.goal
    value = finetuning.measure(tuning, model, World(0, 1, device), parts=parts)[goal.headline]
    every = torch.cat(parts)
    shares, weights = goal.credits(every[:, 1:])
    credits = shares.repeat_interleave(weights)
    held_out = tuning.data.plain().samples_of("test")
    clusters = clusters_of(held_out, every[:, 0]).repeat_interleave(weights)
    packed = pack_credits(credits) if bool(credits.isfinite().all()) else None
    return Figure(value, packed, pack_clusters(clusters, chained=is_chained(held_out)))


# --------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def attention_by_layer(config: PretrainConfig, model: NEPA, device: torch.device, samples: int) -> HeadFigures:
    """Means over drawn held-out samples for every layer and head; distances in units of `token_positions`."""
    eager = config.model.model_copy(update={"attention": "eager"})
    network = NEPA(eager, config.data.embedder(eager.dim), config.objective.head).to(device).eval()
    network.load_state_dict(model.state_dict())
    data, bos, causal = config.data.plain(), int(config.model.bos), config.objective.causal
    total, count = torch.zeros(4, config.model.depth + 1, config.model.heads, device=device), 0
    for batch in drawn_batches(data, samples, device, at_once=64):
        tokens, trace = data.read(batch), Trace()
        network(tokens, causal=causal, trace=trace)
        mask = tokens.real
        positions = token_positions(tokens, data.describe(tokens).grid)
        uniform = uniform_attention(F.pad(mask, (bos, 0), value=True), causal=causal)
        for layer, weights in enumerate([*trace.attention, uniform]):
            figures = [*attention_figures(weights, positions, mask), neighbour_share(weights, positions, mask)]
            total[:, layer] += torch.stack([x.sum(0).expand(config.model.heads) for x in figures])
        count += int(mask.any(1).sum())  # a sample without a real token has no figures
    means: Tensor = total / count
    distance, entropy, on_bos, on_neighbours = means[:, :-1].tolist()
    return {
        "distance": distance,
        "entropy": entropy,
        "on_bos": on_bos,
        "on_neighbours": on_neighbours,
        "uniform": means[:, -1].mean(-1).tolist(),
    }
