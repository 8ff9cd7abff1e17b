"""What pre-training is worth on labels: the closing verdict of `nepa probe` and `nepa finetune`, in plain words.

A score stands beside its rivals: random weights first, then raw tokens and what else costs nothing. Each margin is
paired over held-out samples, and its 95 % interval is made from the spread between clusters of samples that depend on
each other (`nepa_core.verdict.intervals.over_samples`).

Shapes: S credits, one for each held-out sample or single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from nepa_core.basics import FROZEN
from nepa_core.verdict.intervals import Interval, over_samples

Metric = Literal["accuracy", "map", "r2"]
SHARES = ("accuracy", "map")
"""Those from 0 to 1."""
COVERS = "these test samples of one seed, not other seeds"
RANDOM, RAW, MAJORITY = "random weights", "raw tokens", "the most frequent class"

_MEASURED = ConfigDict(**FROZEN | {"allow_inf_nan": True})  # a regression on a network that diverged


class Score(NamedTuple):
    """Something that was scored.

    Attributes:
        name: what was scored, such as "random weights". of: which part of it, such as "layer 2, mean", or "".
        credits: [S], floating; their mean is the score (see `recipes.statistics.credits`). None where it is not finite.
    """

    name: str
    of: str
    figure: float
    credits: Tensor | None


class Beside(BaseModel):
    """One rival and how far it is exceeded.

    Attributes:
        name, of, figure: as of `Score`.
        margin: the score that is judged minus this one, the mean of the paired differences.
        ci95: half-width of the margin's 95 % interval; None where it can't be known.
    """

    model_config = _MEASURED

    name: str
    of: str
    figure: float
    margin: float
    ci95: float | None

    @property
    def state(self) -> Literal["beaten", "level", "ahead", "unknown"]:
        """Whether the whole interval says so."""
        if self.ci95 is None:
            return "unknown"
        apart = Interval(self.margin, self.ci95)
        return "beaten" if apart.above else "ahead" if apart.below else "level"


class Worth(BaseModel):
    """The verdict, as summary.json and probe.json hold it under "worth".

    Attributes:
        headline: a few words in capitals. verdict: the sentence that begins with them.
        name, of, figure: what is judged. metric: of all figures.
        beside: the rivals, random weights first where they are one.
        samples: how many credits were paired. unit: what each is of. clusters: how many are independent.
        covers: what the intervals say something about.
    """

    model_config = _MEASURED

    headline: str
    verdict: str
    name: str
    of: str
    figure: float
    metric: Metric
    beside: tuple[Beside, ...]
    samples: int
    unit: Literal["samples", "tokens"]
    clusters: int
    covers: str


def judge(
    own: Score,
    rivals: Sequence[Score],
    clusters: Tensor,
    *,
    chained: bool = False,
    metric: Metric,
    unit: Literal["samples", "tokens"] = "samples",
) -> Worth:
    """Compare a score with its rivals, on the same samples in the same order.

    Args:
        rivals: the control, called `RANDOM`, where there is one, and others.
        clusters: int64 [S], equal where samples depend on each other. chained: see `over_samples`.
    """
    beside = tuple(_beside(own, rival, clusters, chained=chained) for rival in rivals)
    headline, verdict = words(beside)
    return Worth(
        headline=headline,
        verdict=verdict,
        name=own.name,
        of=own.of,
        figure=own.figure,
        metric=metric,
        beside=beside,
        samples=len(clusters),
        unit=unit,
        clusters=len(clusters.unique()),
        covers=COVERS,
    )


def _beside(own: Score, rival: Score, clusters: Tensor, *, chained: bool) -> Beside:
    half = None
    if own.credits is not None and rival.credits is not None:
        half = over_samples(own.credits.double() - rival.credits.double(), clusters, chained=chained).half
    margin = own.figure - rival.figure  # packed credits are rounded
    return Beside(name=rival.name, of=rival.of, figure=rival.figure, margin=margin, ci95=half)


CLAUSES = {"ahead": "beaten by {}", "level": "no difference from {} is seen", "beaten": "better than {}"}
"""State of rivals -> what the verdict says of them, in this order."""


def words(beside: Sequence[Beside]) -> tuple[str, str]:
    """The headline, and the sentence: what beats the score is named first, the best of it before the rest."""
    if any(each.state == "unknown" for each in beside):
        why = "the held-out samples are too few, or all depend on each other, or a figure is not finite"
        return "NOT KNOWN", f"NOT KNOWN: there is no interval; {why}."
    by_state = {
        state: sorted((each for each in beside if each.state == state), key=lambda each: -each.figure)
        for state in CLAUSES
    }
    control = next((each.state for each in beside if each.name == RANDOM), None)
    best = max(beside, key=lambda each: each.figure).name.upper()
    ahead, level = ([each.name.upper() for each in by_state[state]] for state in ("ahead", "level"))
    if control == "ahead":
        headline = "DOES NOT PAY"
    elif ahead:
        headline = f"BEHIND {ahead[0]}"
    elif control == "level":
        headline = "NOT SEEN TO PAY"
    else:
        headline = f"NO MORE THAN {level[0]}" if level else "PAYS" if control else f"AHEAD OF {best}"
    parts = [CLAUSES[state].format(_listed(some)) for state, some in by_state.items() if some]
    return headline, f"{headline}: {'; '.join(parts)}."


def _listed(beside: Sequence[Beside]) -> str:
    *most, last = [each.name for each in beside]
    return f"{', '.join(most)} and {last}" if most else last


def sentences(worth: Worth, *, form: str) -> list[str]:
    """The verdict, the figures it was made from, and their intervals.

    Args:
        form: of a figure, such as ".3f".
    """
    scored = [(worth.name, worth.of, worth.figure), *((each.name, each.of, each.figure) for each in worth.beside)]
    shown = "; ".join(f"{name}{f' ({of})' if of else ''} {figure:{form}}" for name, of, figure in scored)
    margins = ", ".join(f"over {each.name} {_margin(each, worth.metric)}" for each in worth.beside)
    several = len(worth.beside) > 1
    clustered = f" in {worth.clusters:,} independent groups" if worth.clusters != worth.samples else ""
    return [
        worth.verdict,
        f"{shown[0].upper()}{shown[1:]}.",
        f"{'Margins' if several else 'Margin'}: {margins} (95 %, paired over {worth.samples:,} held-out "
        f"{worth.unit}{clustered}). {'The intervals cover' if several else 'The interval covers'} {worth.covers}.",
    ]


def _margin(beside: Beside, metric: Metric) -> str:
    scale, digits, unit = (1, 3, "of R2") if metric == "r2" else (100, 1, "points")
    half = None if beside.ci95 is None else scale * beside.ci95
    digits += half is not None and half < 10 ** (1 - digits)  # two digits of a small interval
    return f"{scale * beside.margin:+.{digits}f} ± {'unknown' if half is None else f'{half:.{digits}f}'} {unit}"


def without_control(init: str | None, command: str) -> str:
    """What stands in the verdict's place where no control was trained.

    Args:
        init: what the run started from. command: what trains the control.
    """
    if init is None:
        return (
            "NO VERDICT: these are random weights, the control itself; the same command with init=RUN trains "
            "pre-trained weights and such a control beside them."
        )
    return (
        f"NO VERDICT: the control from random weights is missing, so these figures don't say what {init} is worth; "
        f"`{command}` trains it."
    )


class MayHaveWorth(TypedDict, total=False):
    """The part of a summary that `worth_in` reads."""

    worth: dict[str, Any]


def worth_in(summary: MayHaveWorth) -> Worth | None:
    """The verdict part of a summary, or None where it has none."""
    return Worth.model_validate(summary["worth"]) if summary.get("worth") else None
