"""What nepa finetune shows: figures, verdict, curves."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from nepa_core.runtime.run import Run
from recipes.networks.goals import AVERAGED, FIGURES, GOALS, AveragedKey, FigureKey
from recipes.report.page import Answer, Figure, Part, Report, Verbatim, Words
from recipes.report.plots import over_training
from recipes.report.provenance import settings_of, unreadable
from recipes.report.summaries import FinetuneSummary, HeldOutFigures
from recipes.statistics.worth import sentences, without_control, worth_in


def verdict(summary: FinetuneSummary, run: Run) -> list[str]:
    """The closing sentences: the run beside its control, or that this is missing."""
    worth = worth_in(summary)
    if worth is None and "backbone" in summary:
        return ["NO VERDICT: this network was trained to stand beside another, whose report compares the two."]
    if worth is None:
        return [without_control(summary["init"], f"nepa finetune {shlex.quote(str(run.path))}")]
    return sentences(worth, form=".3f" if worth.metric == "r2" else ".2%")


def start_of(init: str | None) -> str:
    """Where the weights come from, in words."""
    return "random weights" if init is None else init


def render(summary: FinetuneSummary) -> str:
    """The result as text."""
    shown = [figure for figure in FIGURES if figure.key in summary]
    rows: dict[str, list[FigureKey | AveragedKey]] = {"raw weights": [figure.key for figure in shown]}
    if AVERAGED[shown[0].key] in summary:
        rows["averaged weights"] = [AVERAGED[figure.key] for figure in shown]
    lines = [f"{'':<18}" + "".join(f"  {figure.title:>7}" for figure in shown)]
    for name, keys in rows.items():
        cells = (f"  {format(summary[key], figure.form):>7}" for figure, key in zip(shown, keys, strict=True))
        lines.append(f"{name:<18}" + "".join(cells))
    where = f"on {scored_samples(summary, 'held-out samples')}"
    start = start_of(summary["init"])
    lines += ["", f"Figures {where} after the last of {summary['steps']} steps, started from {start}."]
    if summary["new_weights"]:
        lines.append(f"New, not in those weights: {', '.join(summary['new_weights'])}.")
    return "\n".join([*lines, *unreadable(summary)])


def scored_samples(summary: HeldOutFigures, noun: str) -> str:
    """ "40 samples", or "30 of 40 samples (10 have no class, 2 could not be read)": on how many the figures are."""
    without, unread = summary.get("without_class", 0), summary.get("unreadable_held_out", 0)
    if "samples" not in summary:
        return f"all {noun}"
    scored, every = summary["samples"] - without, summary["samples"] + unread
    lost = [f"{without} have no class"] * bool(without) + [f"{unread} could not be read"] * bool(unread)
    return f"{scored} of {every} {noun} ({', '.join(lost)})" if lost else f"{scored} {noun}"


def report(run: Run, summary: FinetuneSummary) -> Report:
    """The verdict and the figures, the loss and the goal's first figure over training, the settings."""
    title, said = f"Fine-tuning: {run.path.name}", render(summary)
    return Report(title, said, summary["made_with"], lambda: _parts(run, summary), "card.txt")


def _parts(run: Run, summary: FinetuneSummary) -> Iterator[Part]:
    goal = next(goal for goal in GOALS if goal.headline in summary)
    metrics, key = run.metrics(), goal.headline
    curves = {"raw weights": key, "averaged weights": AVERAGED[key]}
    losses = {"held out": "held_out_loss", "held out, averaged weights": "held_out_loss_ema"}
    title = next(figure.title for figure in goal.shown if figure.key == key)
    loss = "binary cross-entropy" if summary.get("criterion") == "bce" else goal.loss_name
    first, *rest = verdict(summary, run)
    yield Answer(first)
    yield Words(rest)
    yield Verbatim(render(summary))
    yield Figure(
        "loss.png",
        f"{loss.capitalize()} over training; that of the training batches includes mixing and label smoothing.",
        over_training(
            metrics,
            {"training batches": "loss"} | {name: each for name, each in losses.items() if each in summary},
            y=loss,
            title=loss.capitalize(),
        ),
    )
    shown = {name: each for name, each in curves.items() if each in summary}
    yield Figure(
        f"{key}.png",
        f"Held-out {title} over training.",
        over_training(metrics, shown, y=title, from_zero=key != "r2", title=f"Held-out {title}"),
    )
    yield Verbatim(settings_of(run), "Settings and data")
