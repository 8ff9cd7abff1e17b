"""The verdict in plain words, and the report page of a pre-training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nepa_core.modality import Modality
from nepa_core.runtime.config import shown
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import Origin
from nepa_core.verdict.crossing import Crossed
from nepa_core.verdict.drawing import RIVALS
from nepa_core.verdict.intervals import Interval
from nepa_core.verdict.judge import COLLAPSE_SHARE, Verdict
from recipes.report.page import Answer, Figure, Part, Report, Table, Verbatim, Words
from recipes.report.plots import line_plot, over_training
from recipes.report.provenance import settings_of, unreadable
from recipes.report.summaries import PretrainSummary

SPACES = {
    "projected": "Losses and identification, also those before training and of the baselines, are measured behind the "
    "objective's projector, where prediction and target meet; the rank is that of the embeddings themselves.",
    "raw": "Losses and identification, also those before training and of the baselines, compare with the raw tokens "
    "that the objective predicts; the rank is that of the embeddings.",
    "standardised": "The objective compares with standardised targets; these figures compare with the embeddings as "
    "they are, and so may understate it.",
}
"""What to know where prediction and target don't meet in the space of the embeddings."""


def verdict_in(summary: PretrainSummary) -> Verdict:
    """The verdict part of a summary; those of before lack what was not counted then."""
    return Verdict.model_validate({name: value for name, value in summary.items() if name in Verdict.model_fields})


def strata_in(summary: PretrainSummary) -> dict[str, Verdict]:
    """Kind of samples -> its verdict, where they were judged apart."""
    return {name: Verdict.model_validate(each) for name, each in summary.get("strata", {}).items()}


def crossings_in(summary: PretrainSummary) -> dict[str, Crossed]:
    """ "B from A" -> how often the first token of B is identified from A alone."""
    return {name: Crossed.model_validate(each) for name, each in summary.get("crossings", {}).items()}


class Unbeaten(NamedTuple):
    """A baseline that a prediction should beat: its name, what it is, what it identifies, and the margin over it."""

    name: str
    what: str
    identified: float
    margin: Interval


def baselines(verdict: Verdict) -> list[Unbeaten]:
    """Those of a verdict."""
    linear = Unbeaten("LINEAR", LINEAR, verdict.retrieval_top1_linear, verdict.linear)
    copying = Unbeaten("COPYING", "the current token itself", verdict.retrieval_top1_copy, verdict.copying)
    counts = verdict.counts
    if counts is None:
        return [linear, copying]
    return [linear, copying, Unbeaten("COUNTING", COUNTING, counts.retrieval_top1, counts.interval)]


LINEAR, COUNTING = "a ridge regression on the previous tokens", "a table of what followed the last tokens in training"


def judgement(verdict: Verdict) -> str:
    """A sentence or two: collapsed, not known, nothing learned, behind or level with the best baseline, or ahead."""
    if verdict.collapsed:
        return (
            f"COLLAPSED. The embeddings span {verdict.effective_rank_embedding:.1f} effective dimensions, "
            f"less than {COLLAPSE_SHARE:.0%} of the {verdict.effective_rank_embedding_start:.1f} before training; "
            "whatever the loss says, targets that are all alike are easy to predict."
        )
    if not verdict.has_intervals:
        return (
            "NOT KNOWN. There is no interval: the held-out samples are too few, or all depend on each other, so no "
            "difference can be told from chance."
        )
    if not verdict.beats_untrained:
        return "NOTHING LEARNED. The predictor identifies the next token no better than before training."
    unbeaten = [each for each in baselines(verdict) if not each.margin.above]
    if unbeaten:
        best = max(unbeaten, key=lambda each: each.identified)
        what = f"{best.what[0].upper()}{best.what[1:]}"
        figures = f"{best.identified:.1%} of the next tokens, the predictor {verdict.retrieval_top1:.1%}"
        if best.margin.below:
            return f"LEARNED, BUT LESS THAN {best.name}. {what} identifies {figures}."
        return f"LEARNED, BUT NO MORE THAN {best.name}. {what} identifies {figures}: within the interval."
    if verdict.beats_starved_alone:
        return (
            "LEARNED, BUT THE LINEAR CONTROL IS STARVED. The predictor is ahead of a ridge regression that gains more "
            "from its next samples than that lead."
        )
    rivals = "a linear one and a copy" if verdict.counts is None else "a linear one, a copy and n-gram counts"
    return f"LEARNED. The predictor identifies the next token better than an untrained one, {rivals}."


def answers(summary: PretrainSummary) -> list[str]:
    """The judgement, or that of each kind of samples; and whether parts of a sample predict each other."""
    strata = strata_in(summary)
    found = [f"{name}: {judgement(each)}" for name, each in strata.items()] or [judgement(verdict_in(summary))]
    return found + [crossing_words(name, each) for name, each in crossings_in(summary).items()]


def crossing_words(name: str, crossed: Crossed) -> str:
    """Whether the one part predicts the other."""
    target, _, source = name.partition(" from ")
    if crossed.margin_shuffled_ci95 is None:
        return f"NOT KNOWN whether {source} predicts {target}: the held-out samples are too few."
    if not crossed.predicts:
        return f"{source.upper()} DOES NOT PREDICT {target.upper()}, as far as these samples show."
    beside = "better than" if crossed.linear.above else "less well than" if crossed.linear.below else "no better than"
    return f"{source.upper()} PREDICTS {target.upper()}, {beside} a linear map."


def headline(verdict: Verdict, noun: str) -> str:
    """Next-token identification beside its baselines."""
    counts = (
        "" if verdict.counts is None else f"{verdict.counts.tokens}-gram counts {verdict.counts.retrieval_top1:.1%}, "
    )
    return (
        f"Next {noun} identified among {verdict.retrieval_candidates}: NEPA {verdict.retrieval_top1:.1%}, "
        f"linear autoregression {verdict.retrieval_top1_linear:.1%}, {counts}copy {verdict.retrieval_top1_copy:.1%}, "
        f"untrained {verdict.retrieval_top1_untrained:.1%}, chance {verdict.chance:.1%}."
    )


def table(verdict: Verdict, noun: str) -> list[tuple[str, str, str]]:
    """Rows of (predictor, held-out loss, identified)."""
    rows = [
        ("NEPA", verdict.loss, verdict.retrieval_top1),
        ("linear autoregression", verdict.baseline_linear, verdict.retrieval_top1_linear),
        ("mean embedding of the position", verdict.baseline_position_mean, verdict.retrieval_top1_position_mean),
        ("mean embedding", verdict.baseline_mean, verdict.retrieval_top1_mean),
        (f"copy of the current {noun}", verdict.baseline_copy, verdict.retrieval_top1_copy),
    ]
    lines = [(name, f"{loss:.3f}", f"{top1:.1%}") for name, loss, top1 in rows]
    if verdict.counts is not None:
        lines.insert(2, (f"{verdict.counts.tokens}-gram counts", "", f"{verdict.counts.retrieval_top1:.1%}"))
    return [*lines, ("NEPA before training", "", f"{verdict.retrieval_top1_untrained:.1%}")]


STRATA_HEAD = ("", "NEPA", "linear autoregression", "copy", "untrained", "NEPA minus linear")


def strata_table(summary: PretrainSummary) -> list[tuple[str, ...]]:
    """Rows of identification, a kind of samples each."""
    return [
        (
            name,
            *(f"{x:.1%}" for x in (v.retrieval_top1, v.retrieval_top1_linear, v.retrieval_top1_copy)),
            f"{v.retrieval_top1_untrained:.1%}",
            margin(v.linear),
        )
        for name, v in strata_in(summary).items()
    ]


CROSSINGS_HEAD = (
    "first token of",
    "NEPA",
    "linear map",
    "shuffled pairs",
    "untrained",
    "minus linear",
    "minus shuffled",
)


def crossings_table(summary: PretrainSummary) -> list[tuple[str, ...]]:
    """Rows of identification, a direction each."""
    return [
        (
            name,
            *(f"{x:.1%}" for x in (c.retrieval_top1, c.retrieval_top1_linear, c.retrieval_top1_shuffled)),
            f"{c.retrieval_top1_untrained:.1%}",
            margin(c.linear),
            margin(c.shuffled),
        )
        for name, c in crossings_in(summary).items()
    ]


def crossings_words(summary: PretrainSummary) -> list[str]:
    """What the table of directions shows."""
    found = list(crossings_in(summary).values())
    if not found:
        return []
    few, most = min(each.samples for each in found), max(each.samples for each in found)
    count = f"{few:,}" if few == most else f"{few:,} to {most:,}"
    return [
        f"Across parts: the first token of one part is identified among {found[0].retrieval_candidates} by what is "
        f"predicted of it after the other part alone, on {count} held-out samples (chance "
        f"{1 / found[0].retrieval_candidates:.1%}). Shuffled pairs: the other part is that of another sample. Linear "
        f"map: a ridge regression from that part's raw tokens, fitted on {found[0].fitted_samples:,} training pairs. "
        "Margins are in points, 95 %, paired over samples.",
    ]


def text_rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A table as text, or nothing of no rows."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(f"{cell:{'<' if place == 0 else '>'}{widths[place]}}" for place, cell in enumerate(row))
        for row in [head, *rows]
    ]
    return ["", *lines]


def margin(of: Interval) -> str:
    """ "+6.0 ± 1.4", in points."""
    half = "unknown" if of.half is None else f"{100 * of.half:.1f}"
    return f"{100 * of.mean:+.1f} ± {half}"


PROBES = ("probe_accuracy", "probe_map", "probe_r2")
"""What `train.probe` adds to the lines of metrics.jsonl."""

FEW = 5
"""Groups below which an interval covers too little where they are of unequal size: 86 % with three, simulated."""


def covered(verdict: Verdict) -> str:
    """What the intervals are over."""
    if not verdict.clusters:  # of a summary of before
        return "95 %, paired over samples alone"
    several = verdict.clusters < (verdict.asked or 0.8 * verdict.samples)
    groups = f"{verdict.clusters:,} independent group{'' if verdict.clusters == 1 else 's'} of these samples"
    few = " (few for an interval)" if several and verdict.clusters < FEW else ""
    return f"95 %, paired over {groups if several else 'these samples'} alone{few}; other seeds of the run differ, too"


def linear_control(verdict: Verdict) -> list[str]:
    """On how many samples the linear control was fitted, what it reads, and whether more would make it stronger."""
    if not verdict.linear_of:
        return []
    whole = verdict.fitted_samples >= verdict.training_samples
    fitted = (
        f"all {verdict.fitted_samples:,}" if whole else f"{verdict.fitted_samples:,} of {verdict.training_samples:,}"
    )
    read = "" if verdict.linear_features >= verdict.linear_of else f" of {verdict.linear_of:,}"
    text = f"The linear control reads {verdict.linear_features:,}{read} numbers a sequence"
    if verdict.linear_reads_near:
        text += " for each target, of the tokens next to it (all would take too much memory)"
    text += f", fitted on {fitted} samples"
    curve = verdict.linear_curve
    if len(curve) > 1:
        steps = ", ".join(f"{point.retrieval_top1:.1%} on {point.samples:,}" for point in curve)
        text += f" (identified {steps})"
    if verdict.linear_is_starved:
        assert verdict.linear_moved is not None
        text += (
            f". It is starved: the last doubling of its samples moved it by {100 * verdict.linear_moved:+.1f} points, "
            f"and another such would leave a margin of {100 * verdict.starved_margin:+.1f}; raise verdict.fit_samples"
        )
    elif verdict.linear_gains:
        assert verdict.linear_moved is not None
        text += (
            f". It has all that the network had, and more would still make it stronger: the last doubling moved it by "
            f"{100 * verdict.linear_moved:+.1f} points"
        )
    return [f"{text}."]


def count_control(verdict: Verdict, noun: str) -> list[str]:
    """Of discrete tokens: how n-grams were counted, and how many candidates are the same token."""
    if verdict.counts is None:
        return []
    return [
        f"The counts are of up to {verdict.counts.tokens} {noun}s in a row, chosen on training samples held back, over "
        f"{verdict.counts.fitted:,} {noun}s. On average {verdict.counts.same:.1f} of the other candidates are the "
        f"true {noun} itself and share its credit: knowing it would identify {verdict.counts.possible:.1%}."
    ]


def remarks(summary: PretrainSummary, noun: str) -> list[str]:
    """The sentences under the table."""
    verdict = verdict_in(summary)
    counts = "" if verdict.counts is None else f"minus counts: {margin(verdict.counts.interval)}; "
    found = [
        f"NEPA minus linear: {margin(verdict.linear)} points; {counts}minus copy: {margin(verdict.copying)}; minus "
        f"untrained: {margin(verdict.untrained)} ({covered(verdict)}).",
        *linear_control(verdict),
        *count_control(verdict, noun),
        f"Effective rank of the embeddings {verdict.effective_rank_embedding:.1f} "
        f"(before training {verdict.effective_rank_embedding_start:.1f}), of the predictions "
        f"{verdict.effective_rank_prediction:.1f} ({verdict.effective_rank_prediction_start:.1f}).",
        f"Best constant direction: cosine {verdict.shared_direction_embedding:.2f} with the embeddings "
        f"(before training {verdict.shared_direction_embedding_start:.2f}).",
        f"Copying the current {noun} would have beaten the prediction at {verdict.copy_wins:.0%} of the places.",
    ]
    if verdict.rivals_overlap:
        found.append("The held-out split has no room for two samples without common values: rivals are near-copies.")
    if "optimum" in summary:
        found.append(
            f"The best possible loss here is {summary['optimum']:.3f}; NEPA reached {verdict.loss:.3f}, the linear "
            f"autoregression {verdict.baseline_linear:.3f}, the copy baseline {verdict.baseline_copy:.3f}."
        )
    if abs(summary["objective"] - verdict.loss) > 1e-6:
        found.append(
            f"The run's own objective on held-out data is {summary['objective']:.3f}; it is not the loss above."
        )
    if summary.get("space") in SPACES:
        found.append(SPACES[summary["space"]])
    if not summary["causal"]:
        found.append("Attention was bidirectional: each prediction could see its target, so these figures flatter it.")
    if "origin" in summary:
        found += [
            origin_line(summary["origin"]),
            "'Untrained' and 'before training' above are random weights. Of the samples watched while training, "
            f"{summary['retrieval_top1_first']:.1%} of the places were identified by the weights it began with, and "
            f"{summary['retrieval_top1_last']:.1%} after the last step.",
        ]
    return found + changes(summary) + unreadable(summary)


def origin_line(origin: Origin) -> str:
    """Which tensors `init=` gave, and which are new."""
    taken, new, kind = len(origin["taken"]), origin["new"], "averaged " if origin["weights"] == "ema" else ""
    return (
        f"init={origin['init']}: {taken} of {taken + len(new)} {kind}tensors taken; "
        f"{'new: ' + ', '.join(new) if new else 'none is new'}."
    )


def changes(summary: PretrainSummary) -> list[str]:
    """Settings that were taken anew midway, a line a step."""
    return [
        f"From step {each['step']} on: "
        + ", ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in each["changed"].items())
        + "."
        for each in summary.get("changes", [])
    ]


def render(summary: PretrainSummary, data: Modality) -> str:
    """The card as text."""
    verdict, noun = verdict_in(summary), data.token_name
    rows = [("", "loss", "identified"), *table(verdict, noun)]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {loss:>7}  {top1:>10}" for name, loss, top1 in rows]
    cost = (
        f"{summary['steps']} steps, {summary['seconds']:.0f} s, {summary['parameters']:,} parameters; judged on "
        f"{verdict.samples} held-out samples with the {summary['weights']} weights."
    )
    return "\n".join(
        [
            "",
            *answers(summary),
            headline(verdict, noun),
            *tries(summary),
            *text_rows(CROSSINGS_HEAD, crossings_table(summary)),
            *text_rows(STRATA_HEAD, strata_table(summary)),
            "",
            *lines,
            "",
            *crossings_words(summary),
            *remarks(summary, noun),
            cost,
        ]
    )


def tries(summary: PretrainSummary) -> list[str]:
    """What to try where the verdict is not what one hoped for."""
    return [f"To try: {text}" for text in summary.get("advice", [])]


def report(run: Run, summary: PretrainSummary, data: Modality) -> Report:
    """The card, then loss.png, learning.png, probe.png, rank.png, spread.png and position.png, then the settings."""
    said, title = render(summary, data), f"Pre-training: {run.path.name}"
    return Report(title, said, summary["made_with"], lambda: _parts(run, summary, data.token_name), "card.txt")


def _parts(run: Run, summary: PretrainSummary, noun: str) -> Iterator[Part]:
    verdict, metrics = verdict_in(summary), run.metrics()
    yield Answer(" ".join(answers(summary)))
    yield Words([headline(verdict, noun), *tries(summary)])
    if crossed := crossings_table(summary):
        yield Table([CROSSINGS_HEAD, *crossed])
        yield Words(crossings_words(summary))
    if apart := strata_table(summary):
        yield Table([STRATA_HEAD, *apart])
    yield Table([("predictor", "held-out loss", "identified"), *table(verdict, noun)])
    yield Words(remarks(summary, noun))
    yield Words([f"Step {line['step']}: {line['warning']}." for line in metrics if "warning" in line])
    objective = {"training batches": "loss", "held out": "held_out_objective"}
    plot = over_training(metrics, objective, y="objective", title="Objective")
    yield Figure("loss.png", "The objective over training.", plot)
    learned = {"identified": "retrieval_top1", "copy gap": "copy_gap"}
    yield Figure(
        "learning.png",
        f"Share of places where the next {noun} is identified among up to {RIVALS} while training, and by how "
        f"much the cosine of the prediction with the next {noun} exceeds that of the current one.",
        over_training(metrics, learned, y="share; cosine", title=f"Next {noun}"),
    )
    for name in PROBES:
        if any(name in line for line in metrics):
            said = name.replace("_", " ")
            yield Figure(
                "probe.png",
                "Held-out labels read by a small ridge from the last layer while training; at step 0 from random "
                "weights, or those of init. nepa probe reads every layer, beside the raw tokens.",
                over_training(metrics, {said: name}, y=said, title="Small probe"),
            )
    ranks = {"embedding": "effective_rank_embedding", "prediction": "effective_rank_prediction"}
    yield Figure(
        "rank.png",
        "Effective rank over training: collapse shows here, not in the loss.",
        over_training(metrics, ranks, y="effective rank", from_zero=True, title="Effective rank"),
    )
    spreads = {
        "spread, embedding": "spread_embedding",
        "spread, prediction": "spread_prediction",
        "shared direction, embedding": "shared_direction_embedding",
        "shared direction, prediction": "shared_direction_prediction",
    }
    yield Figure(
        "spread.png",
        "Spread per dimension (1 is isotropic, 0 collapsed), and the cosine of the best constant direction.",
        over_training(metrics, spreads, y="share", from_zero=True, title="Spread and shared direction"),
    )
    yield Figure(
        "position.png",
        f"Held-out loss of the prediction made at each place (its target is the next {noun}); lower is better.",
        line_plot(
            {
                {"model": "NEPA"}.get(name, name.replace("_", " ")): (list(range(len(values))), values)
                for name, values in verdict.loss_per_position.items()
            },
            x="place in the sequence", y="negative cosine", markers=True, title="Loss by place",
        ),
    )  # fmt: skip
    if "origin" in summary:
        yield Verbatim("\n".join(summary["origin"]["taken"]), "Tensors taken from init")
    yield Verbatim(settings_of(run), "Settings and data")
