"""Fine-tuning on labels: the classifier, its training beside a control, its held-out figures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UserError, some
from nepa_core.ema import Ema, applied
from nepa_core.modality import Modality
from nepa_core.model import NEPA, draw_coord_scale, evaluating
from nepa_core.pooling import canonical_tokens
from nepa_core.predictor import Predictor
from nepa_core.runtime.balance import known_labels
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.data import fold_seed, plain_batches, replace_broken
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import StepFunction, StepOutput, autocast_dtype
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run, is_imported, is_run, task_of
from nepa_core.runtime.weights import Weights, current_weights, load_backbone, newest, read_weights, start_from
from nepa_core.tokens import Tokens
from recipes.configs import BesideConfig, FinetuneConfig, PretrainConfig
from recipes.networks.backbones import TIMM, TimmClassifier, pixels_of, shown_name, timm_model
from recipes.networks.goals import (
    AVERAGED,
    Classification,
    Goal,
    MultiLabel,
    Regression,
    find_goal,
    numbered,
    rankable,
    taught_by,
)
from recipes.networks.heads import DenseHead, LastHead, MeanHead, MultiLabelHead, RegressionHead
from recipes.presets import short
from recipes.report.finetune import report, start_of
from recipes.report.summaries import FinetuneSummary, HeldOutFigures
from recipes.resolve import read_target
from recipes.statistics.held_out import NUMBER, Numbered, clusters_of, is_chained, views_of
from recipes.statistics.worth import RANDOM, Metric, Score, Worth, judge, worth_in
from recipes.training.mixing import check_pairs, make_mix
from recipes.training.train import cost, opened, train

Head = MeanHead | LastHead | MultiLabelHead | RegressionHead | DenseHead


class Classifier(nn.Module):
    """A network and the read-out on it.

    Args:
        backbone: the pre-trained network.
        head: features [B, T, D] -> outputs.
        goal: what the outputs say.
    """

    def __init__(self, backbone: NEPA, head: Head, goal: Goal) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.goal = goal

    @property
    def predictor(self) -> Predictor:
        """That of the backbone."""
        return self.backbone.predictor

    def forward(self, tokens: Tokens, *, causal: bool, coord_scale: float = 1.0) -> Tensor:
        """Logits [B, C], numbers [B, K] or, per token and in canonical order, logits [B, N, C]."""
        out = self.backbone(tokens, causal=causal, coord_scale=coord_scale)
        bos = self.backbone.config.bos
        if isinstance(self.head, DenseHead):
            outputs: Tensor = self.head(canonical_tokens(out.predictions, tokens, bos=bos))
        else:
            outputs = self.head(out.predictions, out.mask, bos=bos)
        return outputs


def read_config(target: str, changes: dict[str, Any]) -> FinetuneConfig:
    """The fine-tuning that a recipe or a run stands for; see `short` for one of pre-training and an imported one."""
    if is_run(target) and is_imported(target) and task_of(target) == FinetuneConfig.task:
        return override(short(load_config(FinetuneConfig, Path(target) / "config.json"), target), changes)
    return read_target(FinetuneConfig, target, changes, convert={PretrainConfig: short})


def beside_config(config: FinetuneConfig, backbone: str, *, pretrained: bool) -> BesideConfig:
    """The same training of a timm model, at its own image size; see `recipes.networks.backbones.timm_model`.

    Raises:
        UserError: there is no such model, its weights can't be had, or the data can't be trained on so.
    """
    if not backbone.startswith(TIMM):
        raise UserError(f"beside={backbone} can't be trained: name a model of timm by beside=timm:NAME")
    pixels = pixels_of(timm_model(backbone, pretrained=pretrained, seed=config.train.seed))
    data = config.data.whole_images(
        pixels.size, pixels.mean, pixels.std, crop_ratio=pixels.crop_ratio, squash=pixels.squash
    )
    if (headline := find_goal(config.data).headline) != "accuracy":
        raise UserError(f"beside={backbone} learns classes, and the figure of these labels is {headline}; leave it out")
    same = {name: getattr(config, name) for name in ("recipe", "label_smoothing", "loss", "mix", "optim", "train")}
    return BesideConfig(backbone=backbone, pretrained=pretrained, data=data, **same)


def finetune(
    config: FinetuneConfig | BesideConfig, run: Run, ranks: World, *, setting: str = "", show: bool = True
) -> FinetuneSummary:
    """Train, measure, write summary.json and report/; a finished run is not trained again.

    Args:
        setting: what the line at the start calls the settings, where they are not those of the recipe.
        show: that line and progress on the screen.

    Returns:
        The summary (empty on the other ranks).

    Raises:
        UserError: the run was imported: its weights stay as they came.
    """
    if is_imported(str(run.path)):
        raise UserError(f"{run.path} was imported and stays as it came; name another folder with out=DIR")
    if isinstance(config, FinetuneConfig) and config.freeze_embedder and config.init is None:
        raise UserError("freeze_embedder=true would keep a random embedder: name weights by init=, or set it to false")
    if (finished := opened(config, run, ranks, FinetuneSummary)) is not None:
        return finished
    check_pairs(config, ranks.size)
    check_ranked(config.data)
    goal = taught_by(find_goal(config.data), config.loss)
    model: Classifier | TimmClassifier
    if isinstance(config, FinetuneConfig):
        (model, new), init, height_of, head_of = build_classifier(config, goal), config.init, None, None
    else:
        model = build_beside(config, goal)
        init = shown_name(config.backbone, pretrained=config.pretrained)
        new, decay = sorted(model.head_names()), config.optim.layer_decay
        heights = {} if decay is None else model.heights(head_counts=decay.head_counts)
        setting += ", but no layer decay: timm has none for it" if decay is not None and not heights else ""
        height_of, head_of = partial(_height_in, heights), model.head_names().__contains__
    model = model.to(ranks.device)
    left_out: set[str] = set()
    result, _ = train(
        model,
        model.predictor,
        config,
        run,
        ranks,
        step_function=make_step(config, goal),
        evaluate=lambda ema: raw_and_averaged(config, model, ema, ranks, left_out),
        untrained=False,
        height_of=height_of,
        head_of=head_of,
        announce=f"Fine-tuning from {start_of(init)}{f' with {setting}' if setting else ''}.",
        show=show,
    )
    last = run.metrics()[-1] if ranks.is_main else {}  # measured after the last step, by all ranks
    if ranks.any(
        last.get("unreadable_held_out", 0) > len(left_out)
    ):  # that was in another sitting: their names are lost
        measure(config, model, ranks, left_out=left_out)
    if not ranks.is_main:
        return {}
    summary: FinetuneSummary = {
        **cast(HeldOutFigures, {name: value for name, value in last.items() if name != "step"}),
        "unreadable_held_out_messages": sorted(left_out),
        "init": init,
        "new_weights": new,
        "classes": None if goal.names is None else list(goal.names),
        "causal": config.causal,
        **cost(result, model),
    }
    if isinstance(config, BesideConfig):
        summary["backbone"] = config.backbone
    if config.loss != "cross_entropy":
        summary["criterion"] = config.loss
    report(run, summary).write(run.report)
    run.write_summary(summary)  # last: its presence says that the run is finished
    return summary


def _height_in(heights: dict[str, int], name: str) -> int:
    return heights.get(name, 0)


CONTROL, BESIDE = "control", "beside"
"""The folders of the control and of other networks, in that of their run."""


def beside_control(
    config: FinetuneConfig,
    run: Run,
    ranks: World,
    summary: FinetuneSummary,
    *,
    control: bool = True,
    others: Sequence[BesideConfig] = (),
    show: bool = True,
) -> FinetuneSummary:
    """Train what stands beside a finished run, compare, and write the verdict into summary.json and report/.

    Each is a run of its own, the control in RUN/control, which stops and goes on like any other. Nothing is trained or
    measured where the summary has a verdict on all of them.

    Args:
        summary: of the run; of the main process's alone is read.
        control: the same from random weights; there is none where the run itself started from these.
        others: see `beside_config`.

    Returns:
        The summary with `worth`, see `recipes.statistics.worth.Worth` (empty on the other ranks).

    Raises:
        UserError: one of them can't be trained; the run is not touched.
    """
    rivals: list[tuple[str, FinetuneConfig | BesideConfig, Run, str]] = []
    if control and config.init is not None:
        same, folder = config.model_copy(update={"init": None, "freeze_embedder": False}), Run(run.path / CONTROL)
        said = f"the same settings, as the control in {folder.path}; control=false leaves it out"
        rivals.append((RANDOM, same, folder, said))
    for each in others:
        name = shown_name(each.backbone, pretrained=each.pretrained)
        folder = Run(run.path / BESIDE / re.sub(r"[^\w.-]+", "_", name))
        rivals.append((name, each, folder, f"the same settings, to stand beside it in {folder.path}"))
    worth = worth_in(summary) if ranks.is_main else None
    known = set() if worth is None else {each.name for each in worth.beside}
    if ranks.any(ranks.is_main and known >= {name for name, *_ in rivals}):
        for _, other, folder, _ in rivals:
            opened(other, folder, ranks, FinetuneSummary)  # refuses those that began with other weights
        return summary
    for _, other, folder, said in rivals:
        with at_work(folder, ranks, trains=True):  # the run's own lock is not taken once that is finished
            finetune(other, folder, ranks, setting=said, show=show)
    ranks.barrier()  # the last checkpoints are there
    own, *found = (held_out_credits(each, of, ranks) for _, each, of, _ in [("", config, run, ""), *rivals])
    if not all(torch.equal(own.numbers, rival.numbers) for rival in found):
        raise UserError(f"the held-out samples changed while they were read; {_again(run)}")
    if not ranks.is_main:
        return {}
    worth = compared(own, {name: each for (name, *_), each in zip(rivals, found, strict=True)}, config)
    summary = summary | {"worth": worth.model_dump(mode="json")}
    report(run, summary).write(run.report)
    run.write_summary(summary)
    return summary


def compared(own: HeldOutCredits, rivals: Mapping[str, HeldOutCredits], config: FinetuneConfig) -> Worth:
    """The verdict on a run beside its control and others, of the credits of all on the same samples."""
    held_out = config.data.plain().samples_of("test")
    clusters = clusters_of(held_out, own.numbers).repeat_interleave(own.weights)

    def score(name: str, credits: HeldOutCredits) -> Score:
        each = credits.shares.repeat_interleave(credits.weights)
        return Score(name, "", float(each.mean()), each if bool(each.isfinite().all()) else None)

    return judge(
        score(f"started from {config.init}" if config.init else "this network", own),
        [score(name, credits) for name, credits in rivals.items()],
        clusters,
        chained=is_chained(held_out),
        metric=own.metric,
        unit="tokens" if own.per_token else "samples",
    )


class HeldOutCredits(NamedTuple):
    """What each held-out sample adds to the goal's headline figure, in the order of the split.

    Attributes:
        shares: [S] float64. weights: [S] int64, how many classes of the sample count; the figure is the mean of the
            shares so weighted. numbers: [S] int64, the samples in the data set; those that can't be read are left out.
        metric: the figure. per_token: samples have a class a token.
    """

    shares: Tensor
    weights: Tensor
    numbers: Tensor
    metric: Metric
    per_token: bool


def held_out_credits(config: FinetuneConfig | BesideConfig, run: Run, ranks: World) -> HeldOutCredits:
    """The credits of a finished run, of its averaged weights where there are any, the same on every rank."""
    model: Classifier | TimmClassifier
    if isinstance(config, FinetuneConfig):
        model = load_classifier(config, read_weights(str(run.path)))
    else:
        model = build_beside(config, taught_by(find_goal(config.data), config.loss), trained=False)
        model.load_state_dict(current_weights(newest(run)))
    model = model.to(ranks.device)
    if config.train.compile and model.predictor is not None:
        model.predictor.compile_blocks()
    parts: list[Tensor] = []
    measure(config, model, ranks, parts=parts)
    every = torch.cat(ranks.in_order(parts))
    shares, weights = model.goal.credits(every[:, 1:])
    return HeldOutCredits(shares, weights, every[:, 0].long(), model.goal.headline, model.goal.per_token)


def _again(run: Run) -> str:
    return f"give `nepa finetune {shlex.quote(str(run.path))}` once more"


def trained_classes(data: Modality) -> tuple[str, ...]:
    """Names of the classes of some training sample, where labels are known unread; else all that the data name."""
    names = data.classes() or ()
    labels = known_labels(data.plain().samples_of("train"))
    if labels is None or labels.is_floating_point():
        return names
    there = labels.any(0) if labels.dtype == torch.bool else torch.isin(torch.arange(len(names)), labels)
    return tuple(name for name, has in zip(names, there.tolist(), strict=True) if has)


def check_ranked(data: Modality) -> None:
    """Whether held-out samples of several classes can be judged, where labels are known unread.

    Raises:
        UserError: all have the same classes, so that mAP and AUROC are of nothing.
    """
    truth = known_labels(data.plain().samples_of("test"))
    if truth is not None and truth.dtype == torch.bool:
        rankable(truth)


def untaught(data: Modality) -> str | None:
    """A line on classes that no training sample has; None where all have one."""
    names, taught = data.classes() or (), set(trained_classes(data))
    missing = [name for name in names if name not in taught]
    if not missing:
        return None
    return f"no training sample has {some(missing)}: {len(missing)} of {len(names)} classes can't be learned"


def build_classifier(config: FinetuneConfig, goal: Goal) -> tuple[Classifier, list[str]]:
    """The network with the weights of `init` (or the seed's) under a head that gives zeros; and its new weights.

    Numbers start at their mean over the training labels instead.
    """
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    backbone = NEPA(config.model, config.data.embedder(config.model.dim))
    new = [] if config.init is None else start_from(config.init, backbone, config)
    backbone.embed.requires_grad_(not config.freeze_embedder)
    return Classifier(backbone, build_head(config, goal), goal), new


def build_beside(config: BesideConfig, goal: Goal, *, trained: bool = True) -> TimmClassifier:
    """The timm model of a config with its weights, or with random ones where it is not to start as `trained`."""
    asked = config.backbone if trained else config.backbone.partition("@")[0]
    model = timm_model(asked, pretrained=trained and config.pretrained, seed=config.train.seed)
    size = pixels_of(model).size
    if config.train.recompute:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        return TimmClassifier(model, size, goal)


def build_head(config: FinetuneConfig, goal: Goal) -> Head:
    """The read-out for a goal."""
    if goal.per_token:
        return DenseHead(config.model.dim, goal.outputs)
    if config.readout == "mean":
        pooled: MeanHead | LastHead = MeanHead(config.model.dim, goal.outputs, config.model.norm_eps)
    else:
        pooled = LastHead(config.model.dim, goal.outputs)
    if isinstance(goal, Regression):
        return RegressionHead(pooled, goal.mean, goal.std)
    return MultiLabelHead(pooled, goal.shares) if isinstance(goal, MultiLabel) else pooled


def load_classifier(config: FinetuneConfig, weights: Weights) -> Classifier:
    """The network of a fine-tuned run or of a fine-tuned checkpoint in the released layout, in evaluation mode.

    Raises:
        UserError: the weights have no head, or one for other features or another number of classes.
    """
    if not weights.head:
        raise UserError(f"{weights.source} was pre-trained only and has no head; fine-tune it first")
    goal = taught_by(goal_of(weights.head), config.loss)
    model, _ = build_classifier(config.model_copy(update={"init": None}), goal)
    load_backbone(model.backbone, config.model, weights)
    try:
        model.head.load_state_dict(weights.head)
    except RuntimeError as error:
        raise UserError(f"the head of {weights.source} does not fit readout={config.readout}: {error}") from error
    return model.eval()


def goal_of(head: dict[str, Tensor]) -> Goal:
    """What a stored head was trained to say, told by its tensors; classes are numbered."""
    if "mean" in head:
        return Regression(head["mean"], head["std"])
    if "shares" in head:
        return MultiLabel(tuple(map(str, range(len(head["shares"])))), head["shares"])
    per_token = "linear.bias" in head
    bias = head["linear.bias" if per_token else "classifier.bias"]
    return numbered(len(bias), per_token=per_token)


def make_step(config: FinetuneConfig | BesideConfig, goal: Goal) -> StepFunction:
    """The step function of fine-tuning: batch -> loss of the goal, with mixing and label smoothing where asked for."""
    mix = None if config.mix is None else make_mix(config.mix, config.data, goal, config.label_smoothing)

    rescale = config.model.rope_rescale if isinstance(config, FinetuneConfig) else 1.0

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        mixed, smoothing = None, config.label_smoothing
        if mix is None:
            tokens, batch, broken = replace_broken(config.data.read(batch), batch, labels=True)
        else:
            batch = config.data.before_mixing(batch)  # a broken sample would break the one that it is mixed with
            _, batch, broken = replace_broken(config.data.tokenize(batch), batch)
            batch, mixed = mix(batch)
            smoothing = 0.0  # it is in the mixed labels
            tokens = config.data.read(batch)
        outputs = model(tokens, causal=config.causal, coord_scale=draw_coord_scale(rescale))
        truth = goal.truth(batch, tokens) if mixed is None else mixed
        with torch.autocast(outputs.device.type, enabled=False):
            loss, weight = goal.loss(outputs.float(), truth, smoothing=smoothing)
        return StepOutput(loss, weight, tokens.real_count(), broken)

    return step


def raw_and_averaged(
    config: FinetuneConfig | BesideConfig,
    model: Classifier | TimmClassifier,
    ema: Ema | None,
    ranks: World,
    left_out: set[str],
) -> HeldOutFigures:
    """Held-out figures of the weights as they are and, under names with "_ema", of their average; see `measure`."""
    figures = measure(config, model, ranks, left_out=left_out)
    if ema is not None:
        with applied(ema):
            found = measure(config, model, ranks)
        for raw, averaged in AVERAGED.items():
            if raw in found:
                figures[averaged] = found[raw]
    return figures


def of_views(goal: Goal, every: Tensor, views: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What was said of samples, averaged over the views of one thing.

    Args:
        every: [S, 1 + truth + outputs] float64: number in the data set, truth and outputs of each sample that was read.
        views: the cluster of every sample of the data set, int64; None where each is a thing of its own.

    Returns:
        Number of the first view [V] int64, truth [V] or [V, K] and outputs [V, C], V things in their order.
    """
    numbers, outputs = every[:, 0].long(), every[:, -goal.outputs :].float()
    _, group = (numbers if views is None else views[numbers]).unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")
    truth = every[first, 1 : -goal.outputs].float()
    if isinstance(goal, Classification):
        truth = truth[:, 0].long()
    return numbers[first], truth, outputs[first] if views is None else goal.averaged(outputs, group)


@torch.no_grad()
def measure(
    config: FinetuneConfig | BesideConfig,
    model: Classifier | TimmClassifier,
    ranks: World,
    samples: Dataset[Batch] | None = None,
    *,
    left_out: set[str] | None = None,
    parts: list[Tensor] | None = None,
) -> HeldOutFigures:
    """The figures of the model's goal over all held-out samples, and the counts of these, the same on every rank.

    Every rank takes its share of the batches and the sums are added up, so the number of processes changes nothing; a
    goal that needs the `whole` gets what all ranks said. Where samples are views of one thing
    (`nepa_core.tokens.Spans`), that counts once, by the mean of the predictions.

    Args:
        samples: read in place of the held-out ones; without augmentation.
        left_out: gets name and cause of every sample that could not be read.
        parts: gets, of every batch of this rank, the samples' numbers and `Goal.parts`, [B, 1 + parts] float64.
    """
    goal, samples = model.goal, config.data.plain().samples_of("test") if samples is None else samples
    sums = torch.zeros(goal.sums_shape, dtype=torch.float64, device=ranks.device)
    seen, scored = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    unreadable: set[str] = set()
    dtype = autocast_dtype(config.train.precision, ranks.device)
    data, views, said = config.data.plain(), None if goal.per_token else views_of(samples), list[Tensor]()
    at_once = goal.whole or views is not None
    batches = plain_batches(
        Numbered(samples) if at_once or parts is not None else samples,
        batch=min(config.train.micro_batch or config.train.batch, 256),
        device=ranks.device,
        workers=config.train.workers,
        rank=ranks.rank,
        ranks=ranks.size,
        unreadable=unreadable,
        max_unreadable=config.train.max_unreadable,
        tokenize=data.tokenize,
        labels=True,
    )
    with evaluating(model):
        for batch in batches:
            tokens = data.read(batch)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype is not None):
                outputs = model(tokens, causal=config.causal).float()
            truth = goal.truth(batch, tokens)
            if at_once:
                each = (batch[NUMBER][:, None], truth.reshape(len(truth), -1), outputs)
                said.append(torch.cat([x.double() for x in each], dim=1).cpu())
                continue
            sums += goal.sums(outputs, truth)
            if parts is not None:
                parts.append(torch.cat((batch[NUMBER][:, None].double(), goal.parts(outputs, truth)), dim=1).cpu())
            seen += len(outputs)
            scored += goal.scored(truth)
    if at_once:
        numbers, truth, outputs = of_views(goal, torch.cat(ranks.in_order(said)), views)
        found = goal.sums(outputs, truth).to(sums)  # on every rank, so that each refuses what one does
        if ranks.is_main:  # the sums are added up below
            sums += found
            seen += len(outputs)
            scored += goal.scored(truth)
            if parts is not None:
                parts.append(torch.cat((numbers[:, None].double(), goal.parts(outputs, truth)), dim=1))
    named = ranks.union(unreadable)
    if left_out is not None:
        left_out.update(named)
    return {
        **goal.figures(ranks.sum(sums)),
        "samples": int(ranks.sum(seen)),
        "without_class": int(ranks.sum(seen - scored)),
        "unreadable_held_out": len(named),
    }
