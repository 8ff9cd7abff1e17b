"""What nepa segment shows: the scores as text, predictions beside the truth, and the page that holds them."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from shlex import quote
from typing import Final, Literal, NamedTuple

import numpy as np
from torch import Tensor

from nepa_core.runtime.run import Run
from recipes.report.page import Figure, Part, Report, Table, Verbatim
from recipes.report.plots import over_training, picture_table
from recipes.report.provenance import settings_of, unreadable
from recipes.report.summaries import SegmentSummary
from recipes.statistics.segment_metrics import ScoreKey, classes_in_truth, lonely, score_text

MEASURES: Final = ("mIoU", "mAcc", "aAcc")


class Keys(NamedTuple):
    """Where the `MEASURES` of some weights stand in the summary, and their IoU in its rows of classes."""

    scores: tuple[ScoreKey, ScoreKey, ScoreKey]
    iou: Literal["iou", "iou_ema"]


KEYS = {"raw weights": Keys(MEASURES, "iou"), "averaged weights": Keys(("mIoU_ema", "mAcc_ema", "aAcc_ema"), "iou_ema")}


class Picture(NamedTuple):
    """One image, uint8 [3, H, W]; its truth, if known, and prediction, integers [H, W], black from C on."""

    image: Tensor
    truth: Tensor | None
    prediction: Tensor
    name: str


def palette(classes: int) -> np.ndarray:
    """A colour for every class, uint8 [C, 3]; class k has the same one in every report.

    Hues go round by the golden ratio, so that neighbours in number are far apart in colour.
    """
    colours = [
        colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.5, 0.7)[k % 3], (0.95, 0.8, 0.55)[k // 3 % 3])
        for k in range(classes)
    ]
    return (np.array(colours) * 255).round().astype(np.uint8)


def picture_grid(pictures: Sequence[Picture], names: Sequence[str]) -> bytes:
    """Rows of image, truth where it is known, and prediction over a legend of the classes that occur; PNG bytes."""
    colours = np.concatenate([palette(len(names)), np.zeros((256 - len(names), 3), dtype=np.uint8)])
    rows, present = [], set()
    for shown in pictures:
        maps = [shown.prediction] if shown.truth is None else [shown.truth, shown.prediction]
        rows.append((shown.name, [shown.image.permute(1, 2, 0).numpy(), *(colours[each] for each in maps)]))
        present |= {int(k) for each in maps for k in each.unique()}
    heads = ["prediction"] if pictures[0].truth is None else ["truth (black: not labelled)", "prediction"]
    legend = {names[k]: colours[k] / 255 for k in sorted(present) if k < len(names)}
    return picture_table(rows, heads=heads, legend=legend)


def render(summary: SegmentSummary, run: Run) -> str:
    """The result as text."""
    lines, present = [f"{'':<18}" + "".join(f"  {name:>6}" for name in MEASURES)], classes_in_truth(summary)
    for weights, keys in _kinds(summary).items():
        cells = (score_text(summary[key], present) for key in keys.scores)
        lines.append(f"{weights:<18}" + "".join(f"  {cell:>6}" for cell in cells))
    start = "random weights" if summary["init"] is None else summary["init"]
    lines += ["", f"On {summary['images']} held-out images after the last of {summary['steps']} steps, from {start}."]
    if summary["new_weights"]:
        lines.append(f"New, not in those weights: {', '.join(summary['new_weights'])}.")
    return "\n".join([*lines, *lonely(summary), *unreadable(summary), *_no_control(summary, run)])


def _no_control(summary: SegmentSummary, run: Run) -> list[str]:
    """A line with the command for the control, where the run needs one and its folder does not stand beside the run."""
    control = run.path.with_name(f"{run.path.name}-control")
    if summary["init"] is None or (control / "summary.json").exists():
        return []
    command = f"nepa segment {quote(str(run.path))} init=null freeze_embedder=false out={quote(str(control))}"
    return [f"No control was run: `{command}` trains random weights in the same way."]


def _kinds(summary: SegmentSummary) -> dict[str, Keys]:
    return {weights: keys for weights, keys in KEYS.items() if keys.scores[0] in summary}


def report(run: Run, summary: SegmentSummary, pictures: Sequence[Picture]) -> Report:
    """The scores, predictions.png, the IoU of every class, the loss and mIoU over training, the settings."""
    title, said = f"Segmentation: {run.path.name}", render(summary, run)
    return Report(title, said, summary["made_with"], lambda: _parts(run, summary, pictures), "card.txt")


def _parts(run: Run, summary: SegmentSummary, pictures: Sequence[Picture]) -> Iterator[Part]:
    metrics, kinds = run.metrics(), _kinds(summary)
    yield Verbatim(render(summary, run))
    if pictures:
        caption = f"Held-out images, with the {list(kinds)[-1]}."
        yield Figure("predictions.png", caption, picture_grid(pictures, [row["name"] for row in summary["classes"]]))
    yield Table(_class_table(summary))
    yield Figure(
        "loss.png",
        "Cross-entropy of the training crops, with that of the auxiliary head.",
        over_training(metrics, {"training crops": "loss"}, y="cross-entropy", from_zero=True, title="Cross-entropy"),
    )
    scores = {weights: keys.scores[0] for weights, keys in kinds.items()}
    yield Figure(
        "miou.png",
        f"mIoU over training, on {summary['evaluation']['images']} held-out images at most.",
        over_training(metrics, scores, y="mIoU", from_zero=True, title="Held-out mIoU"),
    )
    yield Verbatim(settings_of(run), "Settings and data")


def _class_table(summary: SegmentSummary) -> list[list[str]]:
    kinds, present = _kinds(summary), classes_in_truth(summary)
    rows = [
        [row["name"], *(score_text(row[keys.iou], present, ".1%") for keys in kinds.values())]
        for row in summary["classes"]
    ]
    return [["class", *(f"IoU, {weights}" for weights in kinds)], *rows]
