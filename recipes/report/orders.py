"""The report of `nepa orders`: one page and its PNGs, the answer on the first screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np

from recipes.report.page import Answer, Figure, Heading, Part, Report, Table, Verbatim, Words
from recipes.report.plots import Curve, interval_plot, line_plot, matrix_plot, panels_plot, strip_plot
from recipes.report.summaries import HeadKey, OrdersSummary, RunMeasures, Runs, finetuned, found_at
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
    spreads,
    text_table,
)
from recipes.statistics.significance import Difference
from recipes.statistics.worth import SHARES

NOT_COMPARABLE = (
    "Losses of different orders are not comparable: each order asks the network other questions, and an easy question "
    "teaches little. So orders are ranked by accuracy, and a lift is read against the baselines of the same order."
)
LEGEND = (
    "Step: mean length of a step, in cells of the grid. Neighbours seen: share of a token's neighbours that were read "
    "before it, over the first half of the places. Alone: share of tokens with no neighbour before them. Locality: "
    "distance of tokens at most 4 places apart over that of any two, about 1 for a random order."
)
PREDICTION = (
    Column("loss", "loss"),
    Column("lift_copy", "lift over copy"),
    Column("lift_mean", "over mean"),
    Column("lift_position_mean", "over mean of the place"),
    Column("lift_linear", "over linear"),
    Column("retrieval_top1", "identified"),
    Column("retrieval_top1_linear", "by linear"),
)
_SHOWN_DIFFERENCES = 12
_UNIFORM: dict[HeadKey, int] = {
    "distance": 0,
    "entropy": 1,
    "on_bos": 2,
    "on_neighbours": 3,
}  # where each stands in `uniform`
_BLUE = "#08519c"
_LINE = {"color": _BLUE, "linewidth": 1}


def accuracy_columns(summary: OrdersSummary) -> list[Column]:
    """Probe and fine-tuning, each beside random weights."""
    columns = [Column("probe", "probe"), Column("probe_random", "random weights")]
    for labels in summary["labels"]:
        columns += [
            Column(finetuned(labels), f"fine-tuned, {labels_words(labels)}"),
            Column(f"{finetuned(labels)}_random", "from random weights"),
        ]
    return columns


def render(summary: OrdersSummary) -> str:
    """The answer and the table of accuracies as text."""
    lines = [["", *(column.title for column in accuracy_columns(summary))]]
    for name in summary["ranking"]:
        found = summary["orders"][name]
        lines.append([name, *(spread_cell(found_at(found, column.key)) for column in accuracy_columns(summary))])
    return "\n".join([text_table(lines), "", foot(summary), "", *summary["verdict"]])


def foot(summary: OrdersSummary) -> str:
    """What the numbers are."""
    every = [summary["orders"][name] for name in summary["ranking"]]
    shown = [found_at(found, column.key) for found in every for column in accuracy_columns(summary)]
    interval = interval_words(len(summary["seeds"]), shown)
    forecast = summary["metric"] == "skill"
    held, attention = (
        ("the validation rows", "as in pre-training") if forecast else ("held-back training samples", "both ways")
    )
    metric = "skill of a forecast (1 - MSE / MSE of repeating the last value)" if forecast else summary["metric"]
    unit = "" if summary["metric"] in SHARES else " A point is 0.01."
    return (
        f"{interval}, held-out {metric}.{unit} The probe's layer is chosen on {held}; raw tokens have "
        f"{summary['raw_tokens']:.3f}. Fine-tuning: {summary['finetune_steps']} steps, attention {attention}."
    )


def report(rows: Runs, summary: OrdersSummary, pictures: Sequence[Figure]) -> Report:
    """The answer on the first screen, then accuracies, paths, prediction, attention, tests and commands.

    Args:
        rows: order -> what was measured, a dictionary for each seed.
        summary: of `recipes.comparison.orders.summarise`, with `recipe`, `runs`, `made_with` and, where asked for,
            `cross`.
        pictures: of `recipes.comparison.order_pictures`.
    """
    title = f"Which order? {summary['recipe']}"
    return Report(title, render(summary), summary["made_with"], lambda: _parts(rows, summary, pictures))


def _parts(rows: Runs, summary: OrdersSummary, pictures: Sequence[Figure]) -> Iterator[Part]:
    ranked = {name: rows[name] for name in summary["ranking"]}
    first, *others = summary["verdict"]
    yield Answer(first)
    yield accuracy_figure(ranked, summary)
    yield Words(others)
    yield Heading("Accuracy", "accuracy")
    yield Table(spread_table(ranked, accuracy_columns(summary)))
    yield Words([foot(summary)])
    yield from fine_tuning_figures(ranked, summary)
    yield Heading("The orders", "paths")
    yield from pictures
    yield Table(order_table(summary))
    yield Words([LEGEND])
    yield from seen_figures(ranked)
    yield Heading("Prediction", "prediction")
    yield Words([NOT_COMPARABLE])
    yield Table(prediction_table(ranked, summary))
    yield Words([margin_note(summary["margins"])])
    yield position_figure(ranked)
    yield Heading("Attention", "attention")
    yield Table(attention_table(ranked))
    yield Words(
        [
            "Means over heads, layers and seeds; distance in cells of the grid, entropy in nats. In brackets equal "
            "attention wherever a token may look under the same order, by which the figures must be read."
        ]
    )
    yield from head_figures(ranked)
    yield from layer_figures(ranked)
    yield from cross_parts(summary)
    yield Heading("Paired tests", "tests")
    yield from tests(summary)
    yield Heading("Commands", "commands")
    yield Verbatim(commands(summary))


def prediction_table(ranked: Runs, summary: OrdersSummary) -> list[list[str]]:
    """Losses, lifts and identification, with its margin over the linear baseline."""
    head, *lines = spread_table(ranked, PREDICTION)
    return [[*head, "points over linear"], *([*line, margin_cell(summary["margins"][line[0]])] for line in lines)]


def accuracy_figure(ranked: Runs, summary: OrdersSummary) -> Figure:
    """The probe, ranked, with random weights and raw tokens."""
    own, control = spreads(ranked, "probe"), spreads(ranked, "probe_random")
    return Figure(
        "accuracy.png",
        f"Linear probe of the best layer, held-out {summary['metric']}: "
        f"{drawn(len(summary['seeds']), [*own.values(), *control.values()])}. Grey: random "
        "weights under the same order. Losses of different orders are not comparable, so orders are ranked by "
        "accuracy.",
        interval_plot(
            own,
            x=f"probe {summary['metric']}",
            metric=summary["metric"],
            control=control,
            reference={"raw tokens": summary["raw_tokens"]},
        ),
    )


def fine_tuning_figures(ranked: Runs, summary: OrdersSummary) -> list[Figure]:
    """One for each number of labels."""
    return [
        Figure(
            f"{finetuned(labels)}.png",
            f"Fine-tuned on {labels_words(labels)} for {summary['finetune_steps']} steps; grey: from random weights.",
            interval_plot(
                spreads(ranked, finetuned(labels)),
                x=f"held-out {summary['metric']}",
                metric=summary["metric"],
                control=spreads(ranked, f"{finetuned(labels)}_random"),
            ),
        )
        for labels in summary["labels"]
    ]


def order_table(summary: OrdersSummary) -> list[list[str]]:
    """What every order is like, whatever is learned from it."""
    lines = [["", "step", "neighbours seen", "alone", "locality"]]
    for name in summary["ranking"]:
        found = summary["orders"][name]["order"]
        figures = (found["step"], found["neighbours_seen"], found["lone"], found["locality"])
        lines.append([name, *(f"{each:.2f}" for each in figures)])
    return lines


def seen_figures(ranked: Runs) -> list[Figure]:
    """Share of neighbours already seen, at each place of each order; nothing of runs measured before there was one."""
    if not all("seen" in seeds[0]["order"] for seeds in ranked.values()):
        return []
    curves = {name: seeds[0]["order"]["seen"] for name, seeds in ranked.items()}
    return [
        Figure(
            "seen.png",
            "Share of a token's neighbours that were read before it, at each place of the order.",
            panels_plot(
                {name: [Curve(range(len(shares)), shares, _LINE)] for name, shares in curves.items()},
                x="place in the order",
                y="share seen",
            ),
        )
    ]


def position_figure(ranked: Runs) -> Figure:
    """Loss at each place, mean over seeds; white where no sample has a token."""
    losses = {
        name: np.mean(np.array([row["loss_per_position"]["model"] for row in seeds], dtype=float), axis=0).tolist()
        for name, seeds in ranked.items()
    }
    return Figure(
        "position.png",
        "Loss at each place of the order (place 0 is predicted from what comes first), mean over seeds: dark is well "
        "predicted.",
        strip_plot(losses, x="place in the order"),
    )


def attention_table(ranked: Runs) -> list[list[str]]:
    """Distance, entropy, share on the neighbours and on BOS, beside equal attention."""
    heads: dict[HeadKey, str]
    heads = {"distance": "distance", "entropy": "entropy", "on_neighbours": "on the neighbours", "on_bos": "on BOS"}
    lines = [["", *heads.values(), "rank of the last layer", "at random weights"]]
    for name, seeds in ranked.items():
        cells = []
        for key in heads:
            form = ".0%" if key.startswith("on_") else ".2f"
            mean = fmean(float(np.mean(row["attention"][key])) for row in seeds)
            equal = fmean(row["attention"]["uniform"][_UNIFORM[key]] for row in seeds)
            cells.append(f"{mean:{form}} ({equal:{form}})")
        ranks = [fmean(row["layers"][key][-1] for row in seeds) for key in ("rank", "rank_random")]
        lines.append([name, *cells, *(f"{rank:.1f}" for rank in ranks)])
    return lines


def head_figures(ranked: Runs) -> list[Figure]:
    """Attention distance and entropy of every head by layer, a panel an order."""
    told: dict[HeadKey, str] = {"distance": "distance, in cells of the grid", "entropy": "entropy, in nats"}
    return [
        Figure(
            f"heads_{key}.png",
            f"Attention {told[key]}, by layer under each order: a dot for every head of every seed, the line their "
            "mean; dashed: equal attention wherever a token may look.",
            panels_plot({name: head_curves(seeds, key) for name, seeds in ranked.items()}, x="layer", y=key),
        )
        for key in told
    ]


def head_curves(seeds: Sequence[RunMeasures], key: HeadKey) -> list[Curve]:
    """One panel of `head_figures`."""
    heads = np.concatenate([row["attention"][key] for row in seeds], axis=1)  # [layers, seeds x heads]
    layers = np.arange(1, len(heads) + 1)
    equal = fmean(row["attention"]["uniform"][_UNIFORM[key]] for row in seeds)
    dots = {"color": _BLUE, "alpha": 0.35, "linestyle": "", "marker": ".", "markersize": 5}
    return [
        Curve(layers.repeat(heads.shape[1]).tolist(), heads.ravel().tolist(), dots),
        Curve(layers.tolist(), heads.mean(1).tolist(), {"color": _BLUE, "linewidth": 1.6}),
        Curve([1, len(heads)], [equal, equal], {"color": "#666666", "linestyle": "--", "linewidth": 1}),
    ]


def layer_figures(ranked: Runs) -> list[Figure]:
    """Attention distance and effective rank by layer."""
    distance, rank = {}, {}
    for name, seeds in ranked.items():
        by_layer = np.mean([np.mean(row["attention"]["distance"], axis=1) for row in seeds], axis=0)
        equal = fmean(row["attention"]["uniform"][0] for row in seeds)
        distance[name] = (list(range(1, len(by_layer) + 1)), (by_layer / equal).tolist())
        ranks = np.mean([row["layers"]["rank"] for row in seeds], axis=0)
        rank[name] = (list(range(len(ranks))), ranks.tolist())
    return [
        Figure(
            "distance.png",
            "Attention distance by layer, as a share of that of equal attention under the same order: below 1 a layer "
            "looks nearer than it must. Mean over heads and seeds.",
            line_plot(distance, x="layer", y="distance / that of equal attention", markers=True),
        ),
        Figure(
            "rank.png",
            "Effective rank of the means over tokens, from the embedding (0) to the final norm; mean over seeds.",
            line_plot(rank, x="layer", y="effective rank", from_zero=True, markers=True),
        ),
    ]


def cross_parts(summary: OrdersSummary) -> Iterator[Part]:
    """The matrix of training order against reading order, where it was measured."""
    if "cross" not in summary:
        return
    cross = summary["cross"]
    chosen = [cross["orders"].index(name) for name in summary["ranking"]]
    values = [[cross["accuracy"][row][column] for column in chosen] for row in chosen]
    yield Heading("Trained with one order, read with another", "cross")
    yield Figure(
        "cross.png",
        f"Probe {summary['metric']} (mean over tokens, best layer) of the models of seed {cross['seed']}, of no "
        "other: its differences are not tested, and those of a few points are noise.",
        matrix_plot(values, summary["ranking"], x="read with", y="trained with"),
    )


def tests(summary: OrdersSummary) -> Iterator[Part]:
    """The surest differences between orders, and every order against random weights."""
    if (foresight := summary.get("foresight")) is not None:
        yield Words([foresight["words"]])
    if not summary["differences"] and not summary["against_random"]:
        yield Words(["No tests: they need three seeds or more."])
        return
    apart, paired = ([Difference(**each) for each in summary[key]] for key in ("differences", "against_random"))
    yield Words(
        [
            "With the same seed all orders start from the same weights and see the same samples at every step. "
            f"{TESTED}",
            f"Orders against each other, {len(apart)} pairs:",
        ]
    )
    if apart:
        yield Table(difference_table(apart[:_SHOWN_DIFFERENCES]))
    if (more := len(apart) - _SHOWN_DIFFERENCES) > 0:
        yield Words([f"The other {more} are in summary.json."])
    yield Words(["Each order against the same network with random weights:"])
    yield Table(difference_table(paired))


def commands(summary: OrdersSummary) -> str:
    """The command of this page, and one for each order to look at its first run."""
    lines: Sequence[str] = [f"nepa inspect {folders[0]}" for folders in summary["runs"].values()]
    return "\n".join([summary["made_with"]["command"], *lines])
