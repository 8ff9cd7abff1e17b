"""The card and the page of nepa generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nepa_core.tokens import Sketch
from nepa_core.verdict.intervals import Interval
from recipes.report.card import margin
from recipes.report.page import Answer, Figure, Heading, Part, Report, Sound, Table, Words
from recipes.report.plots import Panel, panel_plot
from recipes.report.summaries import GenerateRow, GenerateSummary, ToldApart

HEAD = ("", "completion", "next token", "squared error")
ACROSS = 10  # samples from nothing in a row; half as many where each is wide


class Example(NamedTuple):
    """A held-out sample and what was made of its given part; token by token in canonical order.

    Attributes:
        name: what it is called. truth: the sample. given: [N] bool. mean: completed by the means. drawn: completed by
            samples. nearest: the training sample nearest to the first of these. energy: [N] score of the next token.
    """

    name: str
    truth: Sketch
    given: Tensor
    mean: Sketch
    drawn: list[Sketch]
    nearest: Sketch
    energy: Tensor


class Shown(NamedTuple):
    """What the page shows beside the figures.

    Attributes:
        examples: drawn at random. worst: those that are completed worst. drawn: samples from nothing.
        energy: [N] the mean score of every token, where all samples have as many, over the mean sample; else None.
        sounds: what can be heard.
    """

    examples: list[Example]
    worst: list[Example]
    drawn: list[Sketch]
    energy: tuple[Sketch, Tensor] | None
    sounds: list[Sound]


# ------------------------------------------------------------------------------------------------ words


def rows(summary: GenerateSummary) -> list[tuple[str, str, str, str]]:
    """Energy scores of completions and of next tokens, and the squared error of means: one row for each rival."""
    made, following, error = (
        [f"{row['figure']:.3f}" for row in part]
        for part in (summary["completion"], summary["next_token"], summary["mean_error"])
    )
    return list(zip([row["name"] for row in summary["completion"]], made, following, error, strict=True))


def margins(rivals: Sequence[GenerateRow]) -> str:
    """ "random weights +0.008 ± 0.005, ..."."""
    return ", ".join(f"{row['name']} {_pm([row['margin'], row['ci95']], '+.3f')}" for row in rivals[1:])


def given(summary: GenerateSummary) -> str:
    """What of a sample is given, in words."""
    region, keep = summary["region"], summary["keep"]
    if region is not None:
        return f"all but the region {region}"
    return f"the first {100 * keep:.0f} % of its tokens" if isinstance(keep, float) else f"its first {keep} tokens"


def remarks(summary: GenerateSummary, noun: str) -> list[str]:
    """The sentences under the table."""
    clustered = "" if summary["clusters"] == summary["samples"] else f" in {summary['clusters']:,} independent groups"
    split = "held-out" if summary["split"] == "test" else "training"
    found = [
        f"Energy scores, lower is better: of completions of each sample from {given(summary)}, and of each next "
        f"{noun} from true ones. Squared error: of the mean decoder, a ridge that gives the mean of what may come, not "
        "a sample of it. All in raw tokens, each number over its deviation.",
        f"Above NEPA's: completions {margins(summary['completion'])}; next {noun} {margins(summary['next_token'])} "
        f"(95 %, paired over {summary['samples']:,} {split} samples{clustered}; other seeds of the run and of the "
        "decoders differ, too).",
        f"Next {noun}: {summary['verdict_next']['verdict']}",
        *_readings(summary, noun),
        *_signals(summary, noun),
    ]
    if "fid" in summary:
        found.append(
            f"FID against {split} pictures: {summary['fid']['drawn']:.1f} of drawn ones, "
            f"{summary['fid']['training']:.1f} of training pictures. It falls with their number: compare these two."
        )
    if "psnr" in summary:
        found.append(f"What mean completions make has a PSNR of {summary['psnr']:.1f} dB.")
    found.append(f"An embedding gives its own {noun} back with a squared error of {summary['own_error']:.2g}.")
    if "law" in summary:
        found.append(
            f"The law of the data is known. Mean of the next {noun}: off by {_pm(summary['law']['mean'])} standard "
            f"deviations (0 is right); variance: {_pm(summary['law']['variance'])} of the law's (1 is right)."
        )
    return found + summary["notes"]


def reading_rows(summary: GenerateSummary) -> list[tuple[str, ...]]:
    """What is read of the mean of the next token: a head, and a row for each rival; empty where nothing is."""
    found = summary.get("readings", [])
    if not found:
        return []
    said = [[f"{row['figure']:{_FORMS[each['measure']]}}" for row in each["rows"]] for each in found]
    head = ("", *(f"{each['name']}, {'right' if each['measure'] == 'right' else 'off by'}" for each in found))
    return [head, *zip([row["name"] for row in found[0]["rows"]], *said, strict=True)]


_FORMS = {"right": ".1%", "error": ".3f"}


def _readings(summary: GenerateSummary, noun: str) -> list[str]:
    """Intervals of what is read of the mean of the next token."""
    found = [
        f"{each['name']} " + ", ".join(f"{row['name']} {_margin(each['measure'], row)}" for row in each["rows"][1:])
        for each in summary.get("readings", [])
    ]
    if not found:
        return []
    return [
        f"Read of the mean of the next {noun}: the share of classes that are right, the mean absolute error of "
        f"numbers. Above NEPA's: {'; '.join(found)}."
    ]


def _margin(measure: str, row: GenerateRow) -> str:
    """In the unit of the table: points of a share, or of what a number is off by."""
    if measure == "right":
        return f"{margin(Interval(row['margin'], row['ci95']))} points"
    return _pm([row["margin"], row["ci95"]], "+.3f")


def _signals(summary: GenerateSummary, noun: str) -> list[str]:
    """Whether whole samples can be told from the data."""
    drawn = summary["from_nothing"]
    start = "from nothing" if not summary["first"] else f"from the first {noun} alone"
    levels = (
        f" All were brought to the data's own levels before, {summary['quantised']:,} of their "
        f"{summary['numbers']:,} numbers."
        if summary["quantised"]
        else ""
    )
    return [
        f"Samples drawn {start} are told from held-out ones {_told(drawn)}; completions {_told(summary['completed'])}; "
        f"training samples, which are real, {_told(summary['training'])}. 50 % is perfect; a stronger classifier may "
        f"tell more.{levels}",
        f"Copies of training samples: {_percent(drawn['copies'])} of them, where "
        f"{100 * drawn['copies_held_out']:.1f} % of held-out samples count as such.",
        *([f"Diversity: {_pm(drawn['diversity'])} of the data's."] if "diversity" in drawn else []),
    ]


def _told(told: ToldApart) -> str:
    if "trees" not in told:
        return "by no classifier, for there are too few"
    return f"by boosted trees in {_percent(told['trees'])} and by a linear classifier in {_percent(told['linear'])}"


def _percent(of: list[float | None]) -> str:
    mean, half = of
    return f"{100 * (mean or 0):.1f} %" if half is None else f"{100 * (mean or 0):.1f} ± {100 * half:.1f} %"


def _pm(of: Sequence[float | None], form: str = ".3f") -> str:
    mean, half = of
    return f"{mean:{form}} ± {'unknown' if half is None else format(half, '.3f')}"


def cost(summary: GenerateSummary) -> str:
    """How it was made."""
    return (
        f"Decoders of {summary['train_samples']:,} training samples, flow head of width {summary['width']} in "
        f"{summary['decoder_steps']:,} steps, the same for both networks; {summary['draws']} draws, "
        f"{summary['steps']} solver steps, temperature {summary['temperature']:g}, seed {summary['seed']}; "
        f"{summary['seconds']:.0f} s."
    )


def render(summary: GenerateSummary, noun: str) -> str:
    """The card as text."""
    table = [HEAD, *rows(summary)]
    width = max(len(row[0]) for row in table)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in table]
    if read := reading_rows(summary):
        wide = [max(map(len, column)) for column in zip(*read, strict=True)]
        lines += ["", *("  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]) for row in read)]
    return "\n".join(["", summary["verdict"]["verdict"], "", *lines, "", *remarks(summary, noun), cost(summary)])


# ------------------------------------------------------------------------------------------------- page


def report(folder: Path, summary: GenerateSummary, shown: Shown, noun: str) -> Report:
    """The card, then completions, the worst of them, samples from nothing, the map of scores, and sounds."""

    def parts() -> Iterator[Part]:
        yield Answer(summary["verdict"]["verdict"])
        yield Table([HEAD, *rows(summary)])
        if read := reading_rows(summary):
            yield Table(read)
        yield Words([*remarks(summary, noun), cost(summary)])
        caption = (
            f"Completions from {given(summary)}: the truth, what is given, the mean of what may come, samples, "
            f"the training sample nearest to the first of these, and the energy score of each next {noun}: where it "
            "fails."
        )
        yield Figure("completions.png", caption, _plot(shown.examples))
        start = "nothing" if not summary["first"] else f"the first {noun} of held-out samples"
        across = ACROSS // 2 if _is_wide(shown.drawn[0]) else ACROSS
        plot = panel_plot([("", [Panel("", sketch) for sketch in shown.drawn])], across=across)
        yield Figure("samples.png", f"Samples from {start}; lengths and positions are those of held-out ones.", plot)
        yield Figure("worst.png", "The samples that are completed worst.", _plot(shown.worst))
        if shown.energy is not None:
            sketch, energy = shown.energy
            plot = panel_plot([("", [Panel(f"mean score of each {noun}", sketch, heat=energy)])], across=3)
            yield Figure("energy.png", f"Energy score of every next {noun}, mean over held-out samples.", plot)
        if shown.sounds:
            yield Heading("Listen", "listen")
            yield from shown.sounds

    title = f"Generated by {folder.resolve().name}"
    return Report(title, render(summary, noun), summary["made_with"], parts, "card.txt")


def _plot(examples: Sequence[Example]) -> bytes:
    across = 4 if _is_wide(examples[0].truth) else 8
    return panel_plot([(each.name, panels(each)) for each in examples], across=across)


def _is_wide(sketch: Sketch) -> bool:
    """Tokens in one row, slices side by side, or lines of text."""
    high, wide = sketch.canvas.shape[1:3]
    return sketch.table[0] == 1 or len(sketch.grid) == 3 or (not sketch.curves and wide > 2 * high)


def panels(example: Example) -> list[Panel]:
    """Truth, what is given, mean, samples, nearest training sample, scores."""
    truth, hidden = example.truth, ~example.given
    return [
        Panel("truth", truth),
        Panel("given", _without(truth, hidden), hidden=None if truth.curves else hidden),
        Panel("mean", example.mean),
        *(Panel("sample", sketch) for sketch in example.drawn),
        Panel("nearest", example.nearest),
        Panel("score", truth, heat=example.energy),
    ]


def _without(sketch: Sketch, hidden: Tensor) -> Sketch:
    """Curves with gaps where tokens are hidden: in the columns of the grid, of each curve where it has its own row."""
    if not sketch.curves:
        return sketch
    (rows, columns), (_, length, count) = sketch.table, sketch.canvas.shape
    lost = hidden.view(rows, columns)[:, torch.arange(length) * columns // length]  # [rows, L]
    lost = lost.T if rows == count else lost.all(0)[:, None].expand(length, count)
    return replace(sketch, canvas=sketch.canvas.masked_fill(lost, torch.nan))
