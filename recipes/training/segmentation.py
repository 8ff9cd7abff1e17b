"""Training on pixel labels: the network, its step, its held-out scores."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modalities.data.scene_masks import IGNORED
from modalities.data.scenes import padded
from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.ema import Ema, applied
from nepa_core.model import NEPA, draw_coord_scale, evaluating
from nepa_core.pooling import canonical_tokens
from nepa_core.predictor import Trace
from nepa_core.runtime.data import fold_seed, plain_batches, replace_broken
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import StepFunction, StepOutput, autocast_dtype
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import Weights, load_backbone, start_from
from nepa_core.tokens import Tokens
from recipes.configs import SegmentConfig
from recipes.networks.heads import DenseHead
from recipes.networks.upernet import UPerNet, resize
from recipes.networks.windows import WindowLogits, predict
from recipes.report.plots import spread_out
from recipes.report.segment import Picture, report
from recipes.report.summaries import EvaluateSummary, SegmentSummary
from recipes.statistics.segment_metrics import ClassIou, Scores, SegmentFigures, confusion, scores
from recipes.training.train import cost, opened, train


class SegmentLogits(NamedTuple):
    """Logits [B, C, r, c] at the resolution of the head, and those of the auxiliary head where asked for."""

    logits: Tensor
    auxiliary: Tensor | None


class Segmenter(nn.Module):
    """A network and a dense head on it.

    Args:
        backbone: the pre-trained network.
        head: four maps or the last tokens -> logits.
        levels: the blocks that the maps are taken from, see `UPerNetConfig`.
    """

    def __init__(self, backbone: NEPA, head: UPerNet | DenseHead, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.levels = levels

    def forward(
        self, tokens: Tokens, grid: tuple[int, int], *, causal: bool, auxiliary: bool, coord_scale: float = 1.0
    ) -> SegmentLogits:
        """Logits of every cell.

        Args:
            tokens: in any order. grid: (rows, columns) of the tokens in canonical order.
            auxiliary: compute the auxiliary logits, too (of `UPerNet`).
        """
        trace = Trace() if isinstance(self.head, UPerNet) else None
        out = self.backbone(tokens, causal=causal, coord_scale=coord_scale, trace=trace)
        if not isinstance(self.head, UPerNet):
            return SegmentLogits(self._map(self.head(self._canonical(out.predictions, tokens)), grid), None)
        assert trace is not None
        hidden = [trace.hidden[level + 1] for level in self.levels[:-1]]  # the input of the blocks comes first
        maps = [self._map(self._canonical(x, tokens), grid) for x in (*hidden, out.predictions)]
        return SegmentLogits(self.head(maps), self.head.auxiliary_logits(maps) if auxiliary else None)

    def _canonical(self, features: Tensor, tokens: Tokens) -> Tensor:
        return canonical_tokens(features, tokens, bos=self.backbone.config.bos)

    def _map(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        return rearrange(features, "b (r c) d -> b d r c", r=grid[0], c=grid[1])


def segment(config: SegmentConfig, run: Run, ranks: World, *, show: bool = True) -> SegmentSummary:
    """Train, measure, write summary.json and report/; a finished run is not trained again.

    Returns:
        The summary (empty on the other ranks).
    """
    if config.freeze_embedder and config.init is None:
        raise UserError("freeze_embedder=true would keep a random embedder: name weights by init=, or set it to false")
    check_batch(config, ranks)
    if (finished := opened(config, run, ranks, SegmentSummary)) is not None:
        return finished
    model, new = build_segmenter(config)
    model = model.to(ranks.device)
    if ranks.size > 1 and ranks.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def held_out(ema: Ema | None, limit: int | None) -> RawAndAveraged:
        average_statistics(model, ranks)
        return raw_and_averaged(config, model, ema, ranks, limit)

    result, ema = train(
        model,
        model.backbone.predictor,
        config,
        run,
        ranks,
        step_function=make_step(config),
        evaluate=lambda ema: headline(*held_out(ema, config.evaluation.images)),
        untrained=False,
        show=show,
    )
    measured = held_out(ema, None)
    if not ranks.is_main:
        return {}
    summary: SegmentSummary = {
        **figures(config, *measured),
        "unreadable_held_out": len(measured.raw.unreadable),
        "unreadable_held_out_messages": measured.raw.unreadable,
        "init": config.init,
        "new_weights": new,
        "head": config.head,
        "causal": config.causal,
        "evaluation": config.evaluation.model_dump(),
        **cost(result, model),
    }
    with applied(ema):
        shown = pictures(config, model, ranks.device)
    report(run, summary, shown).write(run.report)
    run.write_summary(summary)  # last: its presence says that the run is finished
    return summary


def check_batch(config: SegmentConfig, ranks: World) -> None:
    """BatchNorm of a pooled 1 x 1 map needs more than one crop.

    Raises:
        UserError: a micro-batch holds one.
    """
    share = max(config.train.batch // ranks.size, 1)
    crops = min(config.train.micro_batch or share, share) * (ranks.size if ranks.device.type == "cuda" else 1)
    if config.head == "upernet" and crops < 2:
        raise UserError("head=upernet has BatchNorm, which needs 2 crops at a time: raise train.micro_batch or batch")


def build_segmenter(config: SegmentConfig) -> tuple[Segmenter, list[str]]:
    """The network with the weights of `init` (or the seed's) under a new head; and the names of its new weights."""
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    backbone = NEPA(config.model, config.data.embedder(config.model.dim))
    new = [] if config.init is None else start_from(config.init, backbone, config)
    head: UPerNet | DenseHead
    if config.head == "upernet":
        head = UPerNet(config.upernet, config.model.dim, config.data.class_count)
    else:
        head = DenseHead(config.model.dim, config.data.class_count)
    backbone.embed.requires_grad_(not config.freeze_embedder)
    return Segmenter(backbone, head, config.upernet.levels), new


def load_segmenter(config: SegmentConfig, weights: Weights) -> Segmenter:
    """The network of a segmentation run, in evaluation mode.

    Raises:
        UserError: the weights have another network, head or number of classes than the config.
    """
    model, _ = build_segmenter(config.model_copy(update={"init": None}))
    load_backbone(model.backbone, config.model, weights)
    try:
        model.head.load_state_dict(weights.head)
    except RuntimeError as error:
        raise UserError(f"the head of {weights.source} does not fit: {error}") from error
    return model.eval()


def evaluate(config: SegmentConfig, weights: Weights, ranks: World) -> EvaluateSummary:
    """Scores of a segmentation run on all held-out images, as `config.evaluation` says."""
    found = measure(config, load_segmenter(config, weights).to(ranks.device), ranks)
    return {
        **figures(config, found),
        "unreadable_held_out": len(found.unreadable),
        "unreadable_held_out_messages": found.unreadable,
        "evaluation": config.evaluation.model_dump(),
    }


def make_step(config: SegmentConfig) -> StepFunction:
    """The step function of segmentation: batch -> cross-entropy of the labelled pixels, with the auxiliary head's."""
    data = config.data

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        tokens, batch, broken = replace_broken(data.read(batch), batch)
        target = batch["target"].long()
        out = model(
            tokens,
            data.grid((target.shape[1], target.shape[2])),
            causal=config.causal,
            auxiliary=True,
            coord_scale=draw_coord_scale(config.model.rope_rescale),
        )
        labelled = (target != IGNORED).sum()
        with torch.autocast(target.device.type, enabled=False):
            loss = pixel_loss(out.logits, target, labelled)
            if out.auxiliary is not None:
                loss = loss + config.upernet.auxiliary_weight * pixel_loss(out.auxiliary, target, labelled)
        return StepOutput(loss, labelled, tokens.real_count(), broken)

    return step


def pixel_loss(logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels of target [B, h, w], logits [B, C, r, c] being scaled up to it."""
    full = resize(logits.float(), target)
    return F.cross_entropy(full, target, ignore_index=IGNORED, reduction="sum") / labelled.clamp(min=1)


class Measured(NamedTuple):
    """Scores on held-out images, how many could be read, and name and cause of those that could not."""

    scores: Scores
    images: int
    unreadable: list[str]


class RawAndAveraged(NamedTuple):
    """Of the weights as they are and, where there is one, of their average."""

    raw: Measured
    averaged: Measured | None


def raw_and_averaged(
    config: SegmentConfig, model: Segmenter, ema: Ema | None, ranks: World, limit: int | None
) -> RawAndAveraged:
    """`measure` of both."""
    raw = measure(config, model, ranks, limit)
    with applied(ema):
        return RawAndAveraged(raw, None if ema is None else measure(config, model, ranks, limit))


@torch.no_grad()
def measure(config: SegmentConfig, model: Segmenter, ranks: World, limit: int | None = None) -> Measured:
    """Segment the held-out images, each alone and at its stored size; the same result on every rank.

    Every rank takes its share of the images and integer counts are summed, so the number of processes changes nothing.

    Args:
        limit: most images, drawn once; None for all.
    """
    counts = torch.zeros(config.data.class_count, config.data.class_count, dtype=torch.int64, device=ranks.device)
    images = torch.zeros((), dtype=torch.int64, device=ranks.device)
    unreadable: set[str] = set()
    batches = plain_batches(
        config.data.whole("test"),
        batch=1,
        device=ranks.device,
        workers=config.train.workers,
        limit=limit,
        seed=None if limit is None else 0,
        rank=ranks.rank,
        ranks=ranks.size,
        unreadable=unreadable,
        max_unreadable=config.train.max_unreadable,
        tokenize=partial(whole_tokens, config),
    )
    with evaluating(model):
        for batch in batches:
            predicted = predict_image(config, model, batch["image"][0])
            counts += confusion(predicted, batch["target"][0], config.data.class_count)
            images += 1
    return Measured(scores(ranks.sum(counts)), int(ranks.sum(images)), ranks.union(unreadable))


def whole_tokens(config: SegmentConfig, batch: Batch) -> Tokens:
    """The tokens of images uint8 [B, 3, H, W] of any size, filled up to whole patches, to see that they are sound."""
    size = batch["image"].shape[-2:]
    height, width = (-(-side // step) * step for side, step in zip(size, config.data.patch, strict=True))
    return config.data.tokenize({**batch, "image": padded(batch["image"], (height, width))})


def predict_image(config: SegmentConfig, model: Segmenter, image: Tensor) -> Tensor:
    """The most probable class of every pixel of an image uint8 [3, H, W] on the model's device, int64 [H, W]."""
    data = config.data
    return predict(
        image,
        window_logits(config, model),
        config.evaluation,
        short_side=data.short_side,
        window=data.crop,
        patch=data.patch,
    )


def window_logits(config: SegmentConfig, model: Segmenter) -> WindowLogits:
    """The model as a function from windows of pixels to float32 logits at their resolution."""
    data = config.data

    def logits_of(windows: Tensor, real: Tensor | None) -> Tensor:
        dtype = autocast_dtype(config.train.precision, windows.device)
        batch = {"image": windows} if real is None else {"image": windows, "real": real}
        with torch.autocast(windows.device.type, dtype, enabled=dtype is not None):
            grid = data.grid((windows.shape[2], windows.shape[3]))
            logits = model(data.read(batch), grid, causal=config.causal, auxiliary=False).logits
        return resize(logits.float(), windows)

    return logits_of


def average_statistics(model: nn.Module, ranks: World) -> None:
    """Replace BatchNorm's running statistics, which CPU processes gather apart, by their mean over the ranks."""
    if ranks.size == 1 or ranks.device.type == "cuda":
        return
    for value in model.buffers():
        if value.is_floating_point():
            value.copy_(ranks.sum(value.clone()) / ranks.size)


def headline(raw: Measured, averaged: Measured | None) -> SegmentFigures:
    """The scores of all classes together."""
    found: SegmentFigures = {"mIoU": raw.scores.miou, "mAcc": raw.scores.macc, "aAcc": raw.scores.aacc}
    if averaged is not None:
        of = averaged.scores
        found |= {"mIoU_ema": of.miou, "mAcc_ema": of.macc, "aAcc_ema": of.aacc}
    return found


def figures(config: SegmentConfig, raw: Measured, averaged: Measured | None = None) -> SegmentFigures:
    """`headline`, and the IoU of every class."""
    names = config.data.class_names()
    rows: list[ClassIou] = [{"name": name, "iou": iou} for name, iou in zip(names, raw.scores.iou, strict=True)]
    for row, iou in zip(rows, [] if averaged is None else averaged.scores.iou, strict=averaged is not None):
        row["iou_ema"] = iou
    return {**headline(raw, averaged), "classes": rows, "classes_in_truth": raw.scores.present, "images": raw.images}


@torch.no_grad()
def pictures(config: SegmentConfig, model: Segmenter, device: torch.device) -> list[Picture]:
    """Held-out images from the first to the last of the split, equally far apart; unreadable ones are left out."""
    scenes = config.data.whole("test")
    shown = []
    with evaluating(model):
        for index in spread_out(len(scenes), config.evaluation.pictures):
            with suppress(UnreadableSample):
                scene = scenes[index]
                if not whole_tokens(config, {"image": scene["image"][None]}).finite():
                    continue
                predicted = predict_image(config, model, scene["image"].to(device))
                name = Path(scenes.name(index)).name
                shown.append(Picture(scene["image"], scene["target"], predicted.cpu(), name))
    return shown
