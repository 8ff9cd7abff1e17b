"""Does it grow? docs/results/growth.md: `python -m benchmarks.growth run|table [--data DIR] [--out DIR]`.

run    Every point that is not finished, the cheapest first: the paper's cosine, the frozen setting and
       random weights of the same width. OUT/TASK has all runs; the same command goes on where it was stopped, and
       points share what they have in common. What a point found is kept in docs/results/growth.json.
table  Makes the tables and the fitted laws of docs/results/growth.md anew from this file alone.

DIR holds cifar10/ and fsdd/.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from torch import Tensor

from benchmarks import declared
from benchmarks.markdown import marked_anew, table_lines
from benchmarks.what_pays import FROZEN, ONE_SETTING, signed, standing, title
from nepa_core.model import NEPA
from nepa_core.runtime.config import override
from nepa_core.runtime.run import Run
from recipes.comparison import objectives
from recipes.comparison.downstream import HORIZON, Care
from recipes.comparison.engine import Job, Measure, Variant, default_workers, pair, read_recipe, share, try_variant
from recipes.comparison.objectives import REFERENCE
from recipes.configs import PretrainConfig
from recipes.objective_names import named
from recipes.report.objectives import RANDOM
from recipes.report.summaries import RunMeasures, finetuned
from recipes.report.tables import Rows, credits_of, groups
from recipes.statistics.significance import LEVEL, Contrast, Credits, contrasts, over_samples_too

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "growth.json"
PAGE = ROOT / "docs" / "results" / "growth.md"
MARKS = "growth"

OBJECTIVES = (REFERENCE, FROZEN)
SEEDS = (0, 1)
STEPS = 1000
"""Of every point that does not differ in them."""

LEAST_POINTS = 3
"""With fewer no law is fitted: two always lie on a line."""


class Point(NamedTuple):
    """Where the gain is measured.

    Attributes:
        task: name of the task. steps, width: of pre-training. samples: that are pre-trained on, without labels.
    """

    task: str
    steps: int
    width: int
    samples: int


class Task(NamedTuple):
    """A data set, and what grows on it.

    Attributes:
        name: of its folder. title: in tables. recipe: that it starts from. root: of its data; all lie in {data}.
        labels: a class, to fine-tune on; None for all.
        base: the point that all axes share, of the recipe's width and all training samples.
        tokens: of a sample, for the order of the points.
        steps, width, samples: values along the axis of that name; all else is as at the base.
    """

    name: str
    title: str
    recipe: str
    root: str
    labels: int | None
    base: Point
    tokens: int
    steps: tuple[int, ...]
    width: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def measures(self) -> tuple[str, str]:
        """What is read: the probe of the layer chosen on held-back samples, and the fine-tuning."""
        return "probe", finetuned(self.labels)

    def along(self, axis: str) -> list[Point]:
        """The points of an axis."""
        values: tuple[int, ...] = getattr(self, axis)
        return [Point(**{**self.base._asdict(), axis: value}) for value in values]


AXES = {"steps": "steps", "width": "width", "samples": "unlabelled samples"}
"""Axis -> what it is called."""

TASKS = (
    Task(
        "fsdd",
        "spoken digits",
        "recipes.audio:fsdd",
        "{data}/fsdd",
        labels=None,
        base=Point("fsdd", STEPS, width=64, samples=2700),
        tokens=25,
        steps=(250, STEPS, 4000, 16_000),
        width=(64, 128, 256),
        samples=(100, 500, 2700),
    ),
    Task(
        "cifar10",
        "CIFAR-10",
        "recipes.vision:cifar10",
        "{data}/cifar10",
        labels=50,
        base=Point("cifar10", STEPS, width=128, samples=50_000),
        tokens=64,
        steps=(250, STEPS, 4000, 16_000),
        width=(64, 128, 256),
        samples=(1000, 5000, 50_000),
    ),
)


def name_of(point: Point) -> str:
    """ "fsdd-base", or "fsdd-steps-250": by what differs from the base."""
    base = next(task.base for task in TASKS if task.name == point.task)
    differs = [f"{axis}-{getattr(point, axis)}" for axis in AXES if getattr(point, axis) != getattr(base, axis)]
    return "-".join([point.task, *(differs or ["base"])])


def points_of(task: Task) -> list[Point]:
    """Every point of a task once, the base first."""
    return list(dict.fromkeys([task.base, *(point for axis in AXES for point in task.along(axis))]))


def work(task: Task, point: Point) -> float:
    """What a point costs, but for a factor: a step of four times the width takes 7 to 10 times as long."""
    return point.steps * task.tokens * point.width * math.sqrt(point.width)


POINTS = {
    name_of(point): point
    for task, point in sorted(((task, each) for task in TASKS for each in points_of(task)), key=lambda one: work(*one))
}
"""Name -> point, the cheapest first."""


class Kept(TypedDict):
    """What was measured at a point: variant or random weights -> one a seed, with what each test sample adds."""

    seeds: list[int]
    rows: dict[str, list[dict[str, Any]]]
    made_with: Any


# --------------------------------------------------------------------------------------------------- runs


def config_of(task: Task, point: Point, data: Path) -> PretrainConfig:
    """The recipe at a point: heads keep their width, the MLP its factor; only the unlabelled samples are limited."""
    recipe = read_recipe("objectives", task.recipe, {"data.root": task.root.format(data=data)})
    shape, width = recipe.model, point.width
    changes = {
        "model.dim": width,
        "model.heads": width * shape.heads // shape.dim,
        "model.mlp_dim": width * shape.mlp_dim // shape.dim,
        "train.length.steps": point.steps,
        "data.limit": None if point.samples == task.base.samples else point.samples,
    }
    return override(recipe, changes)


def care_of(task: Task) -> Care:
    """How everything is fine-tuned: one setting, as in the development rounds of what-pays.md."""
    return Care(labels=(task.labels,), horizon=HORIZON, **ONE_SETTING)


def measure(config: PretrainConfig, model: NEPA, run: Run, care: Care) -> RunMeasures:
    """What `nepa objectives` measures, its read-outs with the labels of the whole training split at every point."""
    return objectives.measure(override(config, {"data.limit": None}), model, run, care)


def variants_of(task: Task, point: Point, data: Path) -> list[Variant]:
    """The objectives at a point."""
    config = config_of(task, point, data)
    return [Variant(name, named(name, config)) for name in OBJECTIVES]


def jobs_of(task: Task, point: Point, data: Path, out: Path) -> dict[str, list[Job]]:
    """Variant or random weights -> a job a seed. The random weights of a width are one job, whatever its points."""
    care, folder = care_of(task), out / task.name
    how = Measure("growth", measure, care)
    jobs = {each.name: [pair(each, seed, how, folder) for seed in SEEDS] for each in variants_of(task, point, data)}
    start = config_of(task, task.base._replace(width=point.width), data)
    return {**jobs, RANDOM: [objectives.control(start, seed, care, folder) for seed in SEEDS]}


def run(task: Task, point: Point, data: Path, out: Path, workers: int | None) -> Kept:
    """Measure a point, as far as that is not done."""
    jobs = jobs_of(task, point, data, out)
    for variant in variants_of(task, point, data):  # so that nothing is written where one does not fit the data
        if not all(job.done for job in jobs[variant.name]):
            try_variant(variant)
    share([job for each in jobs.values() for job in each], workers=workers or default_workers())
    rows = {name: [only(job.values(), task.measures) for job in each] for name, each in jobs.items()}
    return {"seeds": list(SEEDS), "rows": rows, "made_with": declared.made_with()}


def only(row: Mapping[str, Any], measures: Sequence[str]) -> dict[str, Any]:
    """These measures of a row, as `recipes.report.tables` reads them."""
    known = {
        group: {key: row[group][key] for key in measures if key in row[group]} for group in ("credits", "clusters")
    }
    return {**{key: row[key] for key in measures}, **known}


# ---------------------------------------------------------------------------------------------- statistics


class Gains(NamedTuple):
    """A measure minus that of random weights of the same width and seed, at every finished point of a task.

    Attributes:
        of: (point, objective) as `gain_name` has it -> a gain for each seed. credits: what each test sample adds.
    """

    of: dict[str, list[float]]
    credits: Credits | None


def gain_name(point: Point, objective: str) -> str:
    """ "fsdd-base, cosine"."""
    return f"{name_of(point)}, {objective}"


def gains_of(kept: Mapping[str, Kept], task: Task, key: str) -> Gains:
    """All of one task and measure."""
    finished = [point for point in points_of(task) if name_of(point) in kept]
    rows: Rows = {
        gain_name(point, name): kept[name_of(point)]["rows"][name]
        for point in finished
        for name in (*OBJECTIVES, RANDOM)
    }
    values, known = groups(rows, key), credits_of(rows, key) if rows else None
    pairs = {gain_name(p, name): gain_name(p, RANDOM) for p in finished for name in OBJECTIVES}
    of = {own: [a - b for a, b in zip(values[own], values[other], strict=True)] for own, other in pairs.items()}
    if known is None:
        return Gains(of, None)
    apart = {own: known.of[own] - known.of[other] for own, other in pairs.items()}
    return Gains(of, known._replace(of=apart))


def half_width(seeds: Contrast, both: Contrast | None) -> float:
    """Of the 95 % interval: over seeds alone, or over seeds and test samples together, whichever is wider."""
    return max(each.half_width(LEVEL) for each in (seeds, both) if each is not None)


def intervals(gains: Gains) -> dict[str, float]:
    """Half-width of the 95 % interval of every gain.

    Two seeds say little of a noise of their own, so it is that of all points of the table together, and more where
    one shows more (`contrasts`), against a variant that gains nothing as in `significance.gains`. Simulated with two
    seeds, 2,000 tables of 16 gains: such an interval misses the true gain in 0.3 to 2.9 % where random weights are as
    noisy as pre-trained ones, or up to three times as noisy and of three widths, and in 8.7 % where all gains have one
    control that is three times as noisy.
    """
    if not gains.of:
        return {}
    nothing = {"nothing": [0.0] * len(SEEDS)}
    tested = contrasts({**gains.of, **nothing}, [(name, "nothing") for name in gains.of])
    return {
        name: half_width(each, with_samples(each, gains, {name: 1.0}))
        for name, each in zip(gains.of, tested, strict=True)
    }


def with_samples(seeds: Contrast, gains: Gains, weights: Mapping[str, float]) -> Contrast | None:
    """A weighted sum of gains over seeds and test samples together; None where nothing is known of single samples."""
    if gains.credits is None:
        return None
    apart: Tensor = sum(weight * gains.credits.of[name].double() for name, weight in weights.items())  # type: ignore[assignment]
    return over_samples_too(seeds, apart, gains.credits.clusters, chained=gains.credits.chained)


class Law(NamedTuple):
    """gain = a + b * log2(x), by least squares over the points of every seed.

    Attributes:
        a, b: shares of 1; b is what a doubling of x adds. half: half-width of the 95 % interval of b, and df the
            degrees of freedom of its t distribution. p, p_both: of b, over the points alone, and over points and test
            samples together, before any correction. points: how many it is fitted on.
    """

    a: float
    b: float
    half: float
    df: float
    p: float
    p_both: float
    points: int


def law(sizes: Mapping[str, int], gains: Gains) -> Law:
    """The law of some gains.

    Of two intervals the wider one counts: by the residuals of all points and seeds, with points * seeds - 2 degrees of
    freedom, and by those of the means of the points, with points - 2. What both seeds of a point share, such as a bend
    of the curve, would count twice in the first. To its variance that of b over the test samples is added, with
    Satterthwaite's degrees of freedom; of both intervals the wider one counts.

    Args:
        sizes: name of a gain -> its x.
    """
    x = np.log2(list(sizes.values()))
    y = np.array([gains.of[name] for name in sizes])  # [points, seeds]
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    b = float((weights @ y).mean())
    a = float(y.mean() - b * x.mean())
    line, spread = a + b * x, (weights**2).sum()

    def slope(y: np.ndarray) -> Contrast:
        """b by the residuals of y, [points, values of each]."""
        df = y.size - 2
        return Contrast(b, math.sqrt(((y - line[:, None]) ** 2).sum() / df * spread / y.shape[1]), df)

    points = max(slope(y), slope(y.mean(1, keepdims=True)), key=lambda each: each.half_width(LEVEL))
    both = with_samples(points, gains, dict(zip(sizes, weights.tolist(), strict=True)))
    widest = points if both is None else max(points, both, key=lambda each: each.half_width(LEVEL))
    return Law(a, b, half_width(points, both), widest.df, points.p, points.p if both is None else both.p, len(x))


class Cell(NamedTuple):
    """Which law: of a task, a measure, an axis and an objective."""

    task: Task
    key: str
    axis: str
    objective: str

    @property
    def points(self) -> list[Point]:
        return self.task.along(self.axis)

    @property
    def probe(self) -> bool:
        """Whether it is of the probe, not of fine-tuning."""
        return self.key == "probe"


def cells() -> list[Cell]:
    """Every law that was declared, as tables have them."""
    return [
        Cell(task, key, axis, objective)
        for place in range(len(TASKS[0].measures))
        for task in TASKS
        for key in [task.measures[place]]
        for axis in AXES
        for objective in OBJECTIVES
    ]


def laws(kept: Mapping[str, Kept]) -> dict[Cell, Law]:
    """Those of axes with enough finished points."""
    gains = {(task.name, key): gains_of(kept, task, key) for task in TASKS for key in task.measures}
    found = {}
    for cell in cells():
        own = gains[cell.task.name, cell.key]
        sizes = {gain_name(point, cell.objective): getattr(point, cell.axis) for point in cell.points}
        finished = {name: size for name, size in sizes.items() if name in own.of}
        if len(finished) >= LEAST_POINTS:
            found[cell] = law(finished, own)
    return found


def real(found: Mapping[Cell, Law]) -> set[Cell]:
    """The laws that stand: both p below the level, corrected by Holm for all that were declared, finished or not.

    The probe is one family, fine-tuning the other.
    """
    stands: set[Cell] = set()
    for probe in (True, False):
        ps = {cell: (each.p, each.p_both) for cell, each in found.items() if cell.probe == probe}
        stands |= standing(ps, sum(cell.probe == probe for cell in cells()))
    return stands


# ------------------------------------------------------------------------------------------------- the page


def points_table(kept: Mapping[str, Kept], task: Task, key: str) -> list[str]:
    """A line a point, along every axis: accuracies, and the gain over random weights in points."""
    gains = gains_of(kept, task, key)
    halves = intervals(gains)
    lines = [["along", "at", RANDOM, *OBJECTIVES, *(f"{name} gains" for name in OBJECTIVES)]]
    for axis, called in AXES.items():
        for point in task.along(axis):
            first = [called, f"{getattr(point, axis):,}"]
            if name_of(point) not in kept:
                lines.append([*first, "not finished", *[""] * (len(lines[0]) - 3)])
                continue
            values = groups(kept[name_of(point)]["rows"], key)
            names = [gain_name(point, objective) for objective in OBJECTIVES]
            accuracies = [f"{np.mean(values[name]):.3f}" for name in (RANDOM, *OBJECTIVES)]
            lines.append([*first, *accuracies, *(signed(float(np.mean(gains.of[n])), halves[n]) for n in names)])
    return table_lines(lines)


def laws_table(kept: Mapping[str, Kept]) -> list[str]:
    """A line a law."""
    found = laws(kept)
    stands = real(found)
    lines = [["data", "measure", "with", "objective", "points a doubling", "degrees of freedom", "it"]]
    for cell in cells():
        done, every = sum(name_of(point) in kept for point in cell.points), len(cell.points)
        row = [cell.task.title, title(cell.key), AXES[cell.axis], cell.objective]
        if cell not in found:
            lines.append([*row, "", "", f"is not finished: {done} of {every} points"])
            continue
        each = found[cell]
        said = reading(each, stands=cell in stands) + ("" if done == every else f", with {done} of {every} points")
        shown = signed(each.b, each.half)
        lines.append([*row, f"**{shown}**" if cell in stands else shown, f"{each.df:.1f}", said])
    return table_lines(lines)


def reading(fitted: Law, *, stands: bool) -> str:
    """What a law says."""
    if not stands:
        return "shows nothing beyond the noise"
    return f"{'grows' if fitted.b > 0 else 'falls'} beyond the noise"


def block(kept: Mapping[str, Kept]) -> str:
    """What stands between the marks of the page."""
    if not kept:
        return "No point is finished yet."
    missing = [name for name in POINTS if name not in kept]
    parts = ["\n".join(laws_table(kept))]
    for task in TASKS:
        for key in task.measures:
            parts.append(f"**{task.title}, {title(key)}**\n\n" + "\n".join(points_table(kept, task, key)))
    parts.append(f"Not finished: {', '.join(missing)}." if missing else "Every point is finished.")
    return "\n\n".join(parts)


def filled(page: str, kept: Mapping[str, Kept]) -> str:
    """The page with its block made anew."""
    return marked_anew(page, {MARKS: block(kept)})


def read_kept() -> dict[str, Kept]:
    """What was measured so far."""
    return declared.read_kept(KEPT)


def main(words: Sequence[str]) -> None:
    parser = declared.parser_of("growth", __doc__)
    parser.add_argument("--points", help=f"of run: some of {', '.join(POINTS)}; default all")
    asked = declared.asked_of("growth", parser, words, kept=KEPT)
    if asked.what == "table":
        PAGE.write_text(filled(PAGE.read_text(), read_kept()))
        return
    names = declared.some_of(parser, "points", asked.points, list(POINTS))
    data, tasks = declared.folder_of(parser, asked.data), {task.name: task for task in TASKS}

    def measured(name: str) -> Kept:
        point = POINTS[name]
        return run(tasks[point.task], point, data, asked.out, asked.workers)

    declared.measured_and_kept(parser, names, measured, KEPT)


if __name__ == "__main__":
    main(sys.argv[1:])
