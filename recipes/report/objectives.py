"""The report of `nepa objectives`: one page and its PNGs, the answer on the first screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas

from nepa_core.terms import term
from recipes.objective_names import OWN
from recipes.report.page import Answer, Figure, Heading, Part, Report, Table, Verbatim, Words
from recipes.report.plots import inside, line_plot, png_of
from recipes.report.summaries import ChosenSetting, ObjectiveFigures, ObjectivesSummary, RunMeasures, Runs, found_at
from recipes.report.tables import (
    TESTED,
    Column,
    difference_table,
    drawn,
    interval_words,
    labels_words,
    margin_cell,
    margin_note,
    spread_cell,
    spread_table,
    text_table,
)
from recipes.statistics.significance import Difference, Spread, interval_of, spread
from recipes.statistics.worth import SHARES

NOT_COMPARABLE = (
    "Losses of different objectives are not comparable, so objectives are ranked by accuracy. Identification is that "
    "of the verdict: behind a projector, where the objective compares there. Rank is the effective rank of the "
    "embeddings."
)
PREDICTION = (
    Column("retrieval_top1", "identified"),
    Column("retrieval_top1_linear", "by linear"),
    Column("retrieval_top1_copy", "by copy"),
    Column("effective_rank_embedding", "rank", ".1f"),
    Column("effective_rank_embedding_start", "before training", ".1f"),
)
RANDOM = "random weights"
FORMERLY = (
    "on up to 1,000 further labelled samples, as all was before it was chosen within the labels that are counted "
    "(delete random/ in this folder to have it measured anew),"
)
_GREY = "#666666"


def title_of(measure: str) -> str:
    """What a measure is called in a sentence."""
    if not measure.startswith("finetuned_"):
        return {"probe": "the probe of the best layer", "probe_final": "the probe of the last layer"}[measure]
    return f"fine-tuning on {_labels(measure)}"


def _labels(measure: str) -> str:
    return labels_words(measure.removeprefix("finetuned_"))


def _head(measure: str) -> str:
    short = {"probe": "probe, best layer", "probe_final": "probe, last layer"}
    return short.get(measure) or f"fine-tuned, {_labels(measure)}"


def render(summary: ObjectivesSummary) -> str:
    """The table of accuracies and the answer as text."""
    return "\n".join([text_table(accuracy_table(summary)), "", *foot(summary), "", *summary["verdict"]])


def accuracy_table(summary: ObjectivesSummary) -> list[list[str]]:
    """A row an objective, the best probe first, then random weights and raw tokens."""
    lines = [["", *map(_head, summary["measures"]), "verdict"]]
    for name in summary["ranking"]:
        found = summary["objectives"][name]
        cells = [spread_cell(found_at(found, key)) for key in summary["measures"]]
        lines.append([name, *cells, _words(found["verdicts"])])
    lines.append([RANDOM, *(spread_cell(found_at(summary["random"], key)) for key in summary["measures"]), ""])
    return [*lines, ["raw tokens", f"{summary['raw_tokens']:.3f}", *[""] * len(summary["measures"])]]


def _words(verdicts: Sequence[str]) -> str:
    """ "learned (2 of 3), collapsed (1 of 3)"."""
    counts = Counter(word.lower() for word in verdicts)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{word} ({count} of {len(verdicts)})" for word, count in counts.items())


def foot(summary: ObjectivesSummary) -> list[str]:
    """What the numbers are."""
    count, choices = len(summary["seeds"]), summary["choices"]
    further = choices.get("extensions")  # None: measured before there were any
    now = further is not None
    rates, steps = (" or ".join(f"{each:g}" for each in choices[key]) for key in ("learning_rates", "finetune_steps"))
    attention = " or ".join("causal" if causal else "both ways" for causal in choices["finetune_causal"])
    interval = interval_words(count, shown_spreads(summary))
    skill = summary["metric"] == "skill"
    read = (
        f"skill of a forecast {choices['horizon']} steps ahead, 1 - MSE / MSE of repeating the last value. The probe "
        "is a ridge regression; its layer is chosen on the validation rows; raw tokens are the linear model on the raw "
        "window."
        if skill
        else f"held-out {summary['metric']}. The probe's layer is chosen on held-back training samples."
    )
    unit = "" if summary["metric"] in SHARES else " A point is 0.01."
    held = "on the validation rows" if skill else "within the labels that are counted" if now else FORMERLY
    return [
        *own_objective(summary),
        f"{interval}, {read}{unit}",
        f"Fine-tuning: learning rate {rates}, then {steps} steps, then attention {attention}, chosen {held} for "
        "every start, seed and number of labels alike; random weights too."
        + (
            f" Rates and steps beyond these are tried while the best lies at an end, {further} times at most."
            if now
            else ""
        ),
        *label_counts(summary),
        *([ends(summary)] if now else []),
    ]


def starts(summary: ObjectivesSummary) -> dict[str, ObjectiveFigures]:
    """Every objective, the best first, and random weights."""
    return {**{name: summary["objectives"][name] for name in summary["ranking"]}, RANDOM: summary["random"]}


def shown_spreads(summary: ObjectivesSummary) -> list[Spread]:
    """Of every cell of the table of accuracies."""
    return [found_at(found, key) for found in starts(summary).values() for key in summary["measures"]]


def label_counts(summary: ObjectivesSummary) -> list[str]:
    """A line on how many labels the fine-tunings used, choosing included."""
    counts = summary["label_counts"]
    if not counts or summary["metric"] == "skill":
        return []
    told = "; ".join(f"{_labels(key)}: {count:,}" for key, count in counts.items())
    return [f"Labelled samples used in all, for choosing and for training: {told}."]


def ends(summary: ObjectivesSummary) -> str:
    """A line on where the best settings lie."""
    settings = [each for found in starts(summary).values() for chosen in found["settings"].values() for each in chosen]
    words = {"lr": "learning rate", "steps": "number of steps"}
    counts = {word: sum(key in each.get("at_end", ()) for each in settings) for key, word in words.items()}
    told = [f"the best {word} at an end of what was tried in {count}" for word, count in counts.items() if count]
    inside = "every best rate and number of steps lies inside what was tried, or was given as the only one"
    return f"Of {len(settings)} fine-tunings: {'; '.join(told) or inside}."


def own_objective(summary: ObjectivesSummary) -> list[str]:
    """A line on what the recipe's own objective is, where it is among them."""
    if OWN not in summary["ranking"]:
        return []
    found = summary["objectives"][OWN]
    mixture = " + ".join(f"{weight:g} {term}" for term, weight in found["terms"].items())
    head = found.get("head", "none")  # of comparisons before there was one
    behind = "" if head == "none" else f", predictions behind the head {head}"
    return [f"{OWN}: {mixture}, {'with' if found['stop_gradient'] else 'without'} stop-gradient{behind}."]


def formula_table(summary: ObjectivesSummary) -> list[list[str]]:
    """What every objective is: a row a term."""
    lines = [["", "term", "formula", "compares", "source"]]
    for name in summary["ranking"]:
        head = summary["objectives"][name].get("head", "none")
        behind = "" if head == "none" else f"; p is behind the head {head}"
        for key, weight in summary["objectives"][name]["terms"].items():
            each = term(key)
            lines.append([name, f"{weight:g} {key}", each.formula, each.compares + behind, each.source])
    return lines


def report(rows: Runs, random: Sequence[RunMeasures], summary: ObjectivesSummary) -> Report:
    """The answer on the first screen, then accuracies, layers, prediction, tests, settings and commands.

    Args:
        rows: objective -> what was measured, a dictionary for each seed. random: the same of random weights.
        summary: of `recipes.comparison.objectives.summarise`, with `recipe`, `runs` and `made_with`.
    """
    title = f"Does pre-training pay? {summary['recipe']}"
    return Report(title, render(summary), summary["made_with"], lambda: _parts(rows, random, summary))


def _parts(rows: Runs, random: Sequence[RunMeasures], summary: ObjectivesSummary) -> Iterator[Part]:
    ranked = {name: rows[name] for name in summary["ranking"]}
    first, *others = summary["verdict"]
    yield Answer(first)
    yield accuracy_figure(summary)
    yield Words(others)
    yield Heading("Accuracy", "accuracy")
    yield Table([line[:-1] for line in accuracy_table(summary)])  # without words
    yield Words(foot(summary))
    yield from label_figures(summary)
    yield Heading("Objectives", "objectives")
    yield Table(formula_table(summary))
    yield Words(["p is a prediction and z its target, the next embedding."])
    yield Heading("Layer by layer", "layers")
    yield layer_figure(ranked, random, summary)
    yield Heading("Prediction", "prediction")
    yield Words([NOT_COMPARABLE])
    yield Table(prediction_table(ranked, summary))
    yield Words([margin_note(summary["margins"])])
    yield rank_figure(ranked)
    yield Heading("Paired tests", "tests")
    yield from tests(summary)
    yield Heading("Settings chosen", "settings")
    yield Table(setting_table(summary))
    yield Words(
        ["Learning rate x steps, one a seed. *: at an end of all that was tried; a longer list may serve better."]
    )
    yield Heading("Commands", "commands")
    yield Verbatim(commands(summary))


def accuracy_figure(summary: ObjectivesSummary) -> Figure:
    """Every measure of every objective beside random weights."""
    return Figure(
        "accuracy.png",
        f"Held-out {summary['metric']}: "
        f"{drawn(len(summary['seeds']), shown_spreads(summary))}. Grey: random weights, fine-tuned with the same "
        "care. Dashed: raw tokens. Losses of different objectives are not comparable, so objectives are ranked by "
        "accuracy.",
        accuracy_plot(summary),
    )


def accuracy_plot(summary: ObjectivesSummary) -> bytes:
    """Side by side a panel for every measure, in each a line an objective; PNG bytes."""
    names, measures = summary["ranking"], summary["measures"]
    canvas = Canvas(figsize=(max(8.0, 2 * len(measures)), 1.1 + 0.34 * len(names)), dpi=110, layout="constrained")
    for place, (axes, key) in enumerate(
        zip(canvas.subplots(1, len(measures), squeeze=False)[0], measures, strict=True)
    ):
        control = found_at(summary["random"], key)
        if (arms := inside(control["mean"], interval_of(control), summary["metric"])) is not None:
            ((below,), (above,)) = arms
            axes.axvspan(control["mean"] - below, control["mean"] + above, color=_GREY, alpha=0.2, linewidth=0)
        axes.axvline(control["mean"], color=_GREY, linewidth=1.4)
        if key.startswith("probe"):
            axes.axvline(summary["raw_tokens"], color="C1", linestyle="--", linewidth=1.2)
        for line, name in enumerate(names):
            found = found_at(summary["objectives"][name], key)
            axes.plot(found["values"], [line] * len(found["values"]), ".", color="#08519c", alpha=0.35, markersize=5)
            axes.errorbar(
                found["mean"],
                line,
                xerr=inside(found["mean"], interval_of(found), summary["metric"]),
                fmt="o",
                color="#08519c",
                markersize=5,
                capsize=3,
                elinewidth=1.4,
            )
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(_head(key).replace(", ", ",\n"), fontsize="small")
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(alpha=0.3, axis="x")
    return png_of(canvas)


def label_figures(summary: ObjectivesSummary) -> list[Figure]:
    """Fine-tuning by number of labels, where there are several."""
    tuned = [key for key in summary["measures"] if key.startswith("finetuned_")]
    if len(tuned) < 2:
        return []
    curves = {name: [found_at(found, key) for key in tuned] for name, found in starts(summary).items()}
    return [
        Figure(
            "labels.png",
            "Fine-tuned on few and on all labels; mean and 95 % interval.",
            curves_plot(curves, ticks=[_labels(key) for key in tuned], metric=summary["metric"]),
        )
    ]


def layer_figure(ranked: Runs, random: Sequence[RunMeasures], summary: ObjectivesSummary) -> Figure:
    """The probe by layer, mean over seeds."""
    curves = {
        name: [
            spread(values) | {"ci95": None} for values in zip(*(row["layers"]["probe"] for row in seeds), strict=True)
        ]
        for name, seeds in {**ranked, RANDOM: random}.items()
    }
    return Figure(
        "layers.png",
        f"Held-out {summary['metric']} of the probe of every layer, mean over seeds.",
        curves_plot(curves, ticks=random[0]["layers"]["name"], metric=summary["metric"]),
    )


def curves_plot(curves: Mapping[str, Sequence[Spread]], *, ticks: Sequence[str], metric: str) -> bytes:
    """A line of means and intervals (see `spread`) for every start, random weights grey and dashed; PNG bytes."""
    canvas = Canvas(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    for number, (name, found) in enumerate(curves.items()):
        arms = [bar for each in found if (bar := inside(each["mean"], interval_of(each), metric)) is not None]
        beside = 0.0 if not arms else (number - (len(curves) - 1) / 2) * 0.05
        axes.errorbar(
            [place + beside for place in range(len(found))], [each["mean"] for each in found],
            yerr=np.hstack(arms) if arms else None,
            marker="s" if name == RANDOM else "o", markersize=4, capsize=2, linewidth=1.6, elinewidth=1,
            linestyle="--" if name == RANDOM else "-", color=_GREY if name == RANDOM else f"C{number}", label=name,
        )  # fmt: skip
    axes.set_xticks(range(len(ticks)), ticks)
    if len(ticks) > 7:
        axes.tick_params("x", rotation=45, labelsize="small")
    axes.set_ylabel(f"held-out {metric}")
    axes.grid(alpha=0.3)
    canvas.legend(loc="outside right upper", frameon=False, fontsize="small")
    return png_of(canvas)


def rank_figure(ranked: Runs) -> Figure:
    """Effective rank of the embeddings over training."""
    curves = {}
    for name, seeds in ranked.items():
        steps, ranks = np.mean([row["rank_over_training"] for row in seeds], axis=0).T
        curves[name] = (steps.tolist(), ranks.tolist())
    return Figure(
        "rank.png",
        "Effective rank of the embeddings over training, mean over seeds: collapse shows here, not in the loss.",
        line_plot(curves, x="step", y="effective rank", from_zero=True),
    )


def prediction_table(ranked: Runs, summary: ObjectivesSummary) -> list[list[str]]:
    """The words of the verdict and its figures."""
    (corner, *head), *lines = spread_table(ranked, PREDICTION)
    rows = [
        [name, _words(summary["objectives"][name]["verdicts"]), *cells, margin_cell(summary["margins"][name])]
        for name, *cells in lines
    ]
    return [[corner, "verdict", *head, "points over linear"], *rows]


def setting_table(summary: ObjectivesSummary) -> list[list[str]]:
    """The chosen settings of every start; a rate or number of steps at an end of what was tried is marked."""
    tuned = [key for key in summary["measures"] if key.startswith("finetuned_")]

    def cell(setting: ChosenSetting) -> str:
        rate, steps = (f"{setting[key]:g}{'*' if key in setting.get('at_end', ()) else ''}" for key in ("lr", "steps"))
        told = f"{rate} x {steps}{' causal' if setting['causal'] else ''}"
        return told.replace(" ", "\N{NO-BREAK SPACE}")

    rows = [
        [name, *("; ".join(map(cell, found["settings"][key])) for key in tuned)]
        for name, found in starts(summary).items()
    ]
    return [["", *(_labels(key) for key in tuned)], *rows]


def tests(summary: ObjectivesSummary) -> Iterator[Part]:
    """Every objective against random weights and against the cosine, a family of tests for each measure."""
    if not any(summary["against_random"].values()):
        yield Words(["No tests: they need three seeds or more."])
        return
    yield Words(
        [
            "With the same seed all objectives start from the same weights, see the same samples at every step, and "
            f"are fine-tuned on the same ones. {TESTED}"
        ]
    )
    for rival, families in {RANDOM: summary["against_random"], "the cosine": summary["against_cosine"]}.items():
        for key, found in families.items():
            yield Words([f"Against {rival}, {title_of(key)}:"])
            yield Table(difference_table([Difference(**each) for each in found]))


def commands(summary: ObjectivesSummary) -> str:
    """The command of this page, and one for each objective to look at its first run."""
    lines: Sequence[str] = [f"nepa inspect {folders[0]}" for folders in summary["runs"].values()]
    return "\n".join([summary["made_with"]["command"], *lines])
