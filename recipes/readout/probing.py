"""Accuracy of every layer, beside random weights and the raw tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from threadpoolctl import threadpool_limits
from torch import Tensor

from nepa_core.basics import FROZEN, UserError
from nepa_core.model import NEPA
from nepa_core.pooling import Row
from nepa_core.runtime.config import listed
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run, task_of
from nepa_core.runtime.weights import load_backbone, read_weights
from nepa_core.verdict.diagnostics import effective_rank
from recipes.configs import FinetuneConfig, PretrainConfig, SegmentConfig
from recipes.networks.average_precision import ranked
from recipes.networks.backbones import Backbone, check_beside
from recipes.options import once
from recipes.presets import small
from recipes.readout import classifiers
from recipes.readout.classifiers import Classifier, TokenFeatures
from recipes.readout.features import (
    BOOKS,
    Features,
    Source,
    backbone_readers,
    kept_features,
    network_reader,
    raw_reader,
    tokens_per_sample,
)
from recipes.report.provenance import unreadable
from recipes.report.summaries import ProbeRow, ProbeScore, ProbeSummary
from recipes.resolve import read_target
from recipes.statistics.credits import pack_credits, unpack_credits
from recipes.statistics.held_out import clusters_of, is_chained, pack_clusters
from recipes.statistics.ridge import ridge
from recipes.statistics.worth import MAJORITY, RANDOM, RAW, Metric, Score, Worth, judge, sentences, worth_in
from recipes.training.pretraining import load_pretrained
from recipes.training.starting import build_model

Pooling = Literal["mean", "last", "bos", "attentive"]
Name = Literal["linear", "knn", "lars"]

CLASSIFIERS: dict[Name, Classifier] = {"linear": classifiers.linear, "knn": classifiers.knn, "lars": classifiers.lars}
REGRESSIONS: dict[Name, Classifier] = {"linear": ridge, "knn": classifiers.knn_regression}
MULTI_LABEL: dict[Name, Classifier] = {"linear": classifiers.linear_multi_label, "knn": classifiers.knn_multi_label}
READERS: dict[Metric, dict[Name, Classifier]] = {"accuracy": CLASSIFIERS, "map": MULTI_LABEL, "r2": REGRESSIONS}
TITLES = {"linear": "linear", "knn": "k-NN", "lars": "LARS"}
PAPER = {"last embedding": "final norm, last", "average embedding": "final norm, mean"}
"""The paper's linear probe: name -> row."""
NOTES: dict[Metric, str] = {
    "map": "The figures are mAP: 1 is perfect; by lot, a class has the share of the samples that it is in.",
    "r2": "The figures are R2: 1 is perfect, 0 the mean of the labels.",
}
EQUAL = (
    "Equal for all networks: samples, labels, classifiers, and how a row is chosen. Each one's own: size, pixels, "
    "and what it was trained on, which may hold these samples."
)
"""What stands below the rows of `beside=`."""
FREE = ("data.", "train.workers", "train.max_unreadable")
"""Keys of a run or recipe that a probe may change: they say where the samples lie and how they are loaded."""
_SMALL = 2**24
"""Rows of fewer numbers are fitted side by side on the CPU, each on one thread: threads within one don't pay."""


def check_free(task: str, changes: Iterable[str], free: tuple[str, ...]) -> None:
    """Whether a task that reads a finished run is given keys that begin like these alone.

    Raises:
        UserError: it is not.
    """
    if refused := [key for key in changes if not key.startswith(free)]:
        raise UserError(
            f"nepa {task} reads a finished run, and {refused[0]} is not one of its options: leave it out, or see "
            f"nepa {task} --help"
        )


class ProbeOptions(BaseModel):
    """Options of `nepa probe`."""

    model_config = FROZEN

    init: str | None = Field(default=None, description="weights for a recipe: a run, a released folder, a hub name")
    out: str | None = Field(
        default=None, description="folder of probe.json and features/; default the run, or runs/RECIPE-probe"
    )
    causal: bool | None = Field(default=None, description="attention of the read-out; default: as in pre-training")
    layers: Annotated[tuple[int | Literal["final"], ...] | None, BeforeValidator(listed)] = Field(
        default=None, description="such as 0,3,final: embedding, third block, final norm; default: all", min_length=1
    )
    poolings: Annotated[tuple[Pooling, ...], BeforeValidator(listed)] = Field(
        default=("mean", "last", "bos"),
        description="how the tokens of a layer become one vector; attentive is slower",
        min_length=1,
    )
    classifiers: Annotated[tuple[Name, ...], BeforeValidator(listed)] = Field(
        default=("linear", "knn"), description="what reads the rows; the first chooses the best one", min_length=1
    )
    train_samples: int = Field(default=5000, gt=4, description="most training samples the classifiers are fitted on")
    test_samples: int = Field(
        default=10_000, gt=0, description="most held-out samples they are scored on, drawn from all"
    )
    beside: Annotated[tuple[str, ...], BeforeValidator(listed), AfterValidator(once)] = Field(
        default=(), description="others, read the same: timm:NAME, timm:NAME@FILE.safetensors, or module:function"
    )
    pretrained: bool = Field(default=True, description="timm's weights; false: random ones where no file is named")

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if "attentive" in self.poolings and "linear" not in self.classifiers:
            raise ValueError("poolings=attentive is trained with its linear layer: add linear to classifiers")
        check_beside(self.beside, pretrained=self.pretrained)
        return self


class Subject(NamedTuple):
    """What is probed; `tuned` tells whether its network has been trained on labels since it was pre-trained."""

    config: PretrainConfig
    model: NEPA
    tuned: bool


def subject(target: str, init: str | None, changes: dict[str, Any], device: torch.device) -> Subject:
    """What is probed: a run with its own weights, or the data of a recipe (or run) with the weights of `init`.

    Raises:
        UserError: there is no such run, recipe or checkpoint, or the weights do not fit the data.
    """
    if init is None and task_of(target) == PretrainConfig.task:
        config, model = load_pretrained(Run(Path(target)), device, changes)
        trained = Run(Path(target)).load_config(PretrainConfig).data
        return Subject(config.model_copy(update={"data": config.data.as_trained_on(trained)}), model, tuned=False)
    config = read_target(PretrainConfig, target, changes, convert={FinetuneConfig: _around, SegmentConfig: _around})
    weights = read_weights(init or target)
    config = config.model_copy(
        update={
            "data": config.data.as_trained_on(weights.data),
            "model": weights.config,
            "objective": config.objective.model_copy(update={"causal": weights.causal}),
            "train": config.train.model_copy(update={"seed": weights.seed}),
        }
    )
    model = build_model(config)
    load_backbone(model, weights.config, weights)
    return Subject(config, model.to(device).eval(), tuned=bool(weights.head))


def _around(tuned: FinetuneConfig | SegmentConfig, _: str | None) -> PretrainConfig:
    """Data and network of a run on labels, in the form in which a probe reads those of a pre-trained one."""
    return small(tuned.data).model_copy(update={"recipe": tuned.recipe, "model": tuned.model, "train": tuned.train})


def probe(
    config: PretrainConfig,
    model: NEPA,
    options: ProbeOptions,
    *,
    tuned: bool = False,
    store: Path | None = None,
    ranks: World | None = None,
    show: bool = False,
) -> ProbeSummary:
    """Score every layer x pooling of a network, of the same network with random weights, the raw tokens, and `beside`.

    Args:
        tuned: the network has been trained on labels since; the paper's rows are then not named.
        store: folder that keeps the features; a temporary one where there is none.
        ranks: all processes, which share the features out among them and need a `store`; default: this one alone.
        show: progress on the screen.

    Returns:
        What probe.json holds, but for `made_with`. Empty on the other ranks.
    """
    device = next(model.parameters()).device
    ranks = ranks or World(0, 1, device)
    causal = config.objective.causal if options.causal is None else options.causal
    per_sample = tokens_per_sample(config.data.plain())
    if per_sample:
        rows, notes = token_rows(options, depth=config.model.depth, per_sample=per_sample)
    else:
        check_count(len(cast(Sized, config.data.plain().samples_of("train"))))
        rows, notes = chosen_rows(options, depth=config.model.depth, bos=config.model.bos, causal=causal)
    untrained = build_model(config).to(device).eval()
    readers = [
        network_reader(config, model, rows, causal=causal),
        network_reader(config, untrained, rows, causal=causal),
        raw_reader(attentive="attentive" in options.poolings and not per_sample, per_token=per_sample > 0),
        *(others := backbone_readers(config, options.beside, pretrained=options.pretrained, ranks=ranks)),
    ]
    backbones = [each.backbone for each in others if each.backbone is not None]
    with nullcontext(str(store)) if store is not None else tempfile.TemporaryDirectory() as folder:
        train, test = (
            kept_features(
                Source(config, split, -(-limit // max(per_sample, 1))), readers, Path(folder), ranks, show=show
            )
            for split, limit in (("train", options.train_samples), ("test", options.test_samples))
        )
        if not ranks.is_main:
            return {}
        splits = [Split.of(*pair, device) for pair in zip(train.features, test.features, strict=True)]
        check_readers(splits[0], options)
        found = [score_rows(split, options.classifiers) for split in splits]
        numbers = torch.from_numpy(np.array(test.features[0]["sample"]))
    summary = _worth_of(
        found,
        splits[0],
        held_out=config.data.plain().samples_of("test"),
        numbers=numbers,
        backbones=backbones,
        several=len(options.classifiers) > 1,
        per_token=per_sample > 0,
    )
    as_published = not tuned and causal and config.objective.causal
    return summary | {
        "paper": paper_rows(summary["layers"]) if as_published else {},
        "causal": causal,
        "seed": config.train.seed,
        "unreadable_samples": train.unreadable,
        "unreadable_messages": train.messages,
        "unreadable_held_out": test.unreadable,
        "unreadable_held_out_messages": test.messages,
        "notes": [*notes, *[EQUAL] * bool(backbones)],
    }


def _worth_of(
    found: Sequence[Sequence[ProbeRow]],
    split: Split,
    *,
    held_out: Any,
    numbers: Tensor,
    backbones: Sequence[Backbone],
    several: bool,
    per_token: bool,
) -> ProbeSummary:
    """The part of a summary that tells what the scores are worth.

    Args:
        found: rows of the network, of random weights, of the raw tokens and of `backbones`, as `score_rows` gives them.
        split: of the network. held_out: the samples that it is scored on; numbers: [S] int64, which of them.
        several, per_token: see `verdict`.
    """
    clusters, chained = clusters_of(held_out, numbers), is_chained(held_out)
    names = [each.name for each in backbones]
    worth = verdict(found, split, clusters, chained=chained, several=several, per_token=per_token, beside=names)
    layers, random_init, raw, *rivals = found
    plain, plain_random, plain_raw, *plain_rivals = (list(map(without_credits, rows)) for rows in found)
    summary: ProbeSummary = {
        "layers": plain,
        "best": best_row(plain),
        "random_init": {"layers": plain_random, "best": best_row(plain_random)},
        "raw_tokens": plain_raw[0],
        "worth": worth.model_dump(mode="json"),
        "credits": {
            "best": best_row(layers)["credits"],
            "random_init": best_row(random_init)["credits"],
            "raw_tokens": raw[0]["credits"],
            "clusters": pack_clusters(clusters, chained=chained),
        },
        "train_samples": len(split.labels),
        "test_samples": len(split.test_labels),
    }
    if len(raw) > 1:
        summary["raw_tokens_attentive"] = plain_raw[1]
    if backbones:
        summary["beside"] = [
            {
                "name": each.name,
                "about": each.about,
                "layers": rows,
                "best": best_row(rows),
                "credits": best_row(scored)["credits"],
            }
            for each, rows, scored in zip(backbones, plain_rivals, rivals, strict=True)
        ]
    if per_token:
        summary["majority"] = float(majority_credits(split).mean())
    return summary


def paper_rows(layers: Sequence[ProbeRow]) -> dict[str, ProbeRow]:
    """Those that are the paper's linear probe, by its names."""
    return {name: row for name, wanted in PAPER.items() for row in layers if row["name"] == wanted}


def majority_credits(split: Split) -> Tensor:
    """Credits [S] of always naming the most frequent class of the training samples."""
    return (split.test_labels == split.labels.bincount().argmax()).double()


def verdict(
    found: Sequence[Sequence[ProbeRow]],
    split: Split,
    clusters: Tensor,
    *,
    chained: bool = False,
    several: bool,
    per_token: bool,
    beside: Sequence[str] = (),
) -> Worth:
    """The best reading of the network beside the best of random weights, of the raw tokens and of other networks.

    Of every classifier's rows: what is beside the network must not look worse for the choice of a classifier.

    Args:
        found: rows of the network, of random weights, of the raw tokens and of those that `beside` names, as
            `score_rows` gives them.
        clusters, chained: of the held-out samples, see `recipes.statistics.held_out`.
        several: name the classifiers.
    """
    own, *rivals = (
        best_reading(rows, name, several=several)
        for rows, name in zip(found, ("this network", RANDOM, RAW, *beside), strict=True)
    )
    if per_token:
        always = majority_credits(split).cpu()
        rivals.append(Score(MAJORITY, "", float(always.mean()), always))
    return judge(
        own,
        rivals,
        clusters,
        chained=chained,
        metric=split.metric,
        unit="tokens" if per_token else "samples",
    )


def best_reading(rows: Sequence[ProbeRow], name: str, *, several: bool) -> Score:
    """The row and the classifier with the best validation figure."""
    row, key = max(
        ((row, key) for row in rows for key in row["scores"]), key=lambda each: each[0]["scores"][each[1]]["validation"]
    )
    score, of = row["scores"][key], "" if name == row["name"] else row["name"]
    by = f"by {TITLES[key]}" if several else ""
    credits = None if score["credits"] is None else unpack_credits(score["credits"])
    return Score(name, ", ".join(filter(None, (of, by))), score[metric_of(score)], credits)


def without_credits(row: ProbeRow) -> ProbeRow:
    """A row as it stands in probe.json, where only the best rows keep their credits."""
    plain = row | {"scores": {name: score.copy() for name, score in row["scores"].items()}}
    for each in (plain, *plain["scores"].values()):
        each.pop("credits")
    return plain


def check_readers(split: Split, options: ProbeOptions) -> None:
    """Whether numbers, or several classes a sample, can be read as the options say.

    Raises:
        UserError: they can't.
    """
    wrong = [f"classifiers={name}" for name in options.classifiers if name not in READERS[split.metric]]
    wrong += ["poolings=attentive"] * ("attentive" in options.poolings)
    if split.metric != "accuracy" and wrong:
        holds = "numbers" if split.metric == "r2" else "several classes a sample"
        raise UserError(f"{wrong[0]} is for one class a sample, and 'label' holds {holds} here; leave it out")


def chosen_rows(options: ProbeOptions, *, depth: int, bos: bool, causal: bool) -> tuple[list[Row], list[str]]:
    """The rows to read, and a note on those that can't be.

    Raises:
        UserError: a layer that the network hasn't, or nothing is left to read.
    """
    layers = range(depth + 2) if options.layers is None else [_layer(name, depth) for name in options.layers]
    poolings, notes = list(options.poolings), []
    if "bos" in poolings and (causal or not bos):
        poolings.remove("bos")
        why = "under causal attention BOS sees no token (causal=false reads it)" if bos else "the network has no BOS"
        notes.append(f"No BOS rows: {why}.")
    rows = [Row(layer, pooling) for layer in layers for pooling in poolings if layer > 0 or pooling != "bos"]
    if not rows:
        why = notes[0] if notes else "layer 0 has BOS as it was learned, the same for all samples."
        raise UserError(f"poolings={','.join(options.poolings)} leaves nothing to read: {why}")
    return rows, notes


def token_rows(options: ProbeOptions, *, depth: int, per_sample: int) -> tuple[list[Row], list[str]]:
    """The rows that read single tokens, and a note that says so.

    Raises:
        UserError: a layer that the network hasn't.
    """
    layers = range(depth + 2) if options.layers is None else [_layer(name, depth) for name in options.layers]
    note = f"Single tokens are read, not pooled: {per_sample} of each sample, drawn from those that have a class."
    return [Row(layer, "token") for layer in layers], [note]


def _layer(name: int | str, depth: int) -> int:
    if isinstance(name, str):
        return depth + 1
    if not 0 <= name <= depth:
        raise UserError(f"layers={name}: the network has layers 0 (the embedding) to {depth}, and final")
    return name


class Split(NamedTuple):
    """Features of the training and the test samples of one reader, and their labels: numbered from 0 [S] int64, or the
    numbers of a regression [S, K] float32, or the classes that each has, bool [S, C]."""

    train: Features
    test: Features
    labels: Tensor
    test_labels: Tensor

    @classmethod
    def of(cls, train: Features, test: Features, device: torch.device) -> Split:
        """Number the classes; the labels end on the device.

        Raises:
            UserError: a label is neither a class index nor finite numbers, or there is none, or all are of one class.
        """
        both = np.concatenate((train["labels"], test["labels"]))
        if not len(train["labels"]) or not len(test["labels"]):
            raise UserError("no sample of a split has a class; every 'target' there is negative or padding")
        if both.dtype.kind == "f" and both.ndim <= 2:
            if not np.isfinite(both).all():
                raise UserError("the key 'label' holds NaN or infinity; leave such samples out")
            numbers = torch.from_numpy(both.astype(np.float32).reshape(len(both), -1)).to(device)
            return cls(train, test, numbers[: len(train["labels"])], numbers[len(train["labels"]) :])
        if both.ndim == 2 and both.dtype.kind == "b":
            several = torch.from_numpy(both).to(device)
            count = len(train["labels"])
            if not all(bool(ranked(part).any()) for part in (several[:count], several[count:])):
                raise UserError("no class is of some samples that were read and not of others: nothing can be ranked")
            return cls(train, test, several[:count], several[count:])
        if both.ndim != 1 or both.dtype.kind not in "iub":
            raise UserError(
                f"the key 'label' holds {both.dtype} of shape {both.shape[1:]}; a probe needs one class index a "
                "sample, bool [C] for several classes, or float numbers to predict"
            )
        if both.dtype.kind == "i" and both.min() < 0:
            raise UserError(
                "the key 'label' holds negative classes, which are none; leave such samples out of the probe"
            )
        kinds, numbered = np.unique(both, return_inverse=True)
        if len(kinds) == 1:
            raise UserError(
                f"all samples that were read have one class, {kinds[0]}, so that there is nothing to tell apart; give "
                "others, or raise train_samples and test_samples"
            )
        labels = torch.from_numpy(numbered).long().to(device)
        return cls(train, test, labels[: len(train["labels"])], labels[len(train["labels"]) :])

    @property
    def metric(self) -> Metric:
        """What its rows are scored by: accuracy, map of several classes a sample, or r2 of a regression."""
        return "r2" if self.labels.is_floating_point() else "map" if self.labels.dtype == torch.bool else "accuracy"


def score_rows(split: Split, names: Sequence[Name]) -> list[ProbeRow]:
    """The rows of one reader, in their order; a row is in memory only while it is read.

    Each holds `credits` beside its figures, as does each of its `scores`: see `scores_of`.
    """
    rows = [name for name in split.train if name not in (*BOOKS, "mask")]
    small = all(split.train[name].size < _SMALL for name in rows) and split.labels.device.type == "cpu"
    score = partial(score_row, split, names=names)
    if not small:
        return [score(name) for name in rows]
    threads = torch.get_num_threads()
    single = partial(torch.set_num_threads, 1)  # it belongs to the Python thread, that of SciPy's BLAS to the process
    try:
        with threadpool_limits(1), ThreadPoolExecutor(threads, initializer=single) as pool:
            return list(pool.map(score, rows))
    finally:
        torch.set_num_threads(threads)


def score_row(split: Split, name: str, *, names: Sequence[Name]) -> ProbeRow:
    """Fit every classifier on all training samples, and on four fifths of them to choose rows by."""
    parts = split.train, split.test
    if name.endswith(", attentive"):
        tokens, tokens_test = (TokenFeatures(part[name], part["mask"]) for part in parts)
        scores: dict[str, ProbeScore] = {"linear": scores_of(split, classifiers.attentive, tokens, tokens_test)}
        rank = None
    else:
        x, x_test = (torch.from_numpy(np.array(part[name])).to(split.labels.device) for part in parts)
        scores = {key: scores_of(split, READERS[split.metric][key], x, x_test) for key in names}
        rank = effective_rank(x_test)
    return {"name": name, **(scores.get(names[0]) or scores["linear"]), "scores": scores, "effective_rank": rank}


def check_count(samples: int) -> None:
    """Whether there are training samples enough to hold a fifth of them back.

    Raises:
        UserError: there are fewer than 5.
    """
    if samples < 5:
        raise UserError(f"{samples} training samples are too few: a fifth of them chooses the layer; give 5 or more")


def scores_of(split: Split, classifier: Callable[..., Tensor], x: Any, x_test: Any) -> ProbeScore:
    """Scores of one classifier on one row; `validation` is on the last fifth of the training samples by the rest."""
    y, kept = split.labels, len(x) - len(x) // 5  # the training samples come in random order
    check_count(len(x))
    credits = classifier(x, y, x_test, split.test_labels)
    figure = float(credits.mean())
    found: dict[Metric, ProbeScore] = {"accuracy": {"accuracy": figure}, "map": {"map": figure}, "r2": {"r2": figure}}
    return {
        **found[split.metric],
        "validation": float(classifier(x[:kept], y[:kept], x[kept:], y[kept:]).mean()),
        "credits": pack_credits(credits) if bool(credits.isfinite().all()) else None,
    }


def metric_of(row: ProbeRow | ProbeScore) -> Metric:
    """What a row is scored by, see `Split.metric`."""
    return next(metric for metric in READERS if metric in row)


def best_row(rows: Sequence[ProbeRow]) -> ProbeRow:
    """The row with the best validation accuracy."""
    return max(rows, key=lambda row: row["validation"])


def render(summary: ProbeSummary) -> str:
    """The table as text, each classifier with its random-weights twin; other networks; the verdict."""
    names = list(dict.fromkeys(key for row in summary["layers"] for key in row["scores"]))
    metric = metric_of(summary["raw_tokens"])
    raw, best, best_random = summary["raw_tokens"], summary["best"], summary["random_init"]["best"]
    twins = {row["name"]: row for row in summary["random_init"]["layers"]}
    rows: list[tuple[str, ProbeRow, ProbeRow | None]]
    rows = [(row["name"], row, twins[row["name"]]) for row in summary["layers"]]
    rows += [(row["name"], row, None) for row in (raw, summary.get("raw_tokens_attentive")) if row is not None]
    rows += [(name, row, twins[row["name"]]) for name, row in summary["paper"].items()]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':<{width}}" + "".join(f"  {TITLES[name]:>8}  {'random':>6}" for name in names) + "    rank  random"]
    for name, row, twin in rows:
        cells = [_cell(row, key, 8) + _cell(twin, key, 6) for key in names]
        lines.append(f"{name:<{width}}" + "".join(cells) + _rank(row, 6) + _rank(twin, 6))
    for other in (others := summary.get("beside", [])):
        lines += ["", f"{other['name']}: {other['about']}"]
        wide = max(width, *(len(row["name"]) for row in other["layers"]))
        for row in other["layers"]:
            cells = [_cell(row, key, 8) + _cell(None, key, 6) for key in names]
            lines.append(f"{row['name']:<{wide}}" + "".join(cells) + _rank(row, 6))
    of_paper = [f"{name} is {PAPER[name]}" for name in summary["paper"]]
    notes = [f"The paper's probe: {'; '.join(of_paper)}."] if of_paper else []
    notes += [NOTES[metric]] if metric in NOTES else []
    notes += [*summary["notes"], *unreadable(summary, "probe.json")]
    chosen = (
        f"Chosen on held-back training samples, by {TITLES[names[0]]}: {best['name']} {best[metric]:.3f}; "
        f"random weights {best_random['name']} {best_random[metric]:.3f}; raw tokens {raw[metric]:.3f}"
        + "".join(f"; {each['name']} {each['best']['name']} {each['best'][metric]:.3f}" for each in others)
        + (f"; always the most frequent class {summary['majority']:.3f}." if "majority" in summary else ".")
    )
    worth = worth_in(summary)
    closing = [] if worth is None else ["", *sentences(worth, form=".3f")]
    return "\n".join([*(line.rstrip() for line in lines), "", *notes, chosen, *closing])


def _cell(row: ProbeRow | None, classifier: str, width: int) -> str:
    found = None if row is None else row["scores"].get(classifier)
    return "  " + (f"{found[metric_of(found)]:>{width}.3f}" if found else " " * width)


def _rank(row: ProbeRow | None, width: int) -> str:
    found = None if row is None else row["effective_rank"]
    return "  " + (f"{found:>{width}.1f}" if found else " " * width)
