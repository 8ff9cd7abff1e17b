"""The confirmation of docs/results/what-pays.md: `python -m benchmarks.what_pays run|table [--data DIR] [--out DIR]`.

run    Every task that is not finished, by the functions of `nepa objectives`: the paper's cosine, the frozen
       setting and random weights. OUT/TASK has all runs; the same command goes on where it was stopped. What a task
       found is kept in docs/results/what-pays.json.
table  Makes the table of docs/results/what-pays.md and that of the README anew from this file alone.

DIR holds cifar10/ and fsdd/, and a folder for each set of series with its _TRAIN.ts and _TEST.ts.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

from benchmarks import declared
from benchmarks.markdown import marked_anew, table_lines
from recipes.comparison.engine import read_recipe
from recipes.comparison.objectives import REFERENCE, ObjectivesOptions, measured
from recipes.configs import PretrainConfig
from recipes.report.objectives import RANDOM
from recipes.report.tables import credits_of, groups, spread_cell, spreads
from recipes.statistics.significance import LEVEL, Correction, Spread, differences, holm

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "what-pays.json"
PAGES = {"what-pays": ROOT / "docs" / "results" / "what-pays.md", "what-pays-short": ROOT / "README.md"}
"""Name of a block -> the page that holds it."""

FROZEN = "cosine_head"
"""Leads the development tasks by the rule that was declared before; frozen on 29 November 2026."""

SEEDS = (0, 1, 2, 3, 4)
RIVALS = (REFERENCE, RANDOM)

CARE: dict[str, Any] = {"learning_rates": (1e-3, 3e-3), "finetune_steps": (300,), "finetune_causal": (False, True)}
"""What a fine-tuning chooses from."""

ONE_SETTING: dict[str, Any] = {"learning_rates": (1e-3,), "finetune_steps": (300,), "finetune_causal": (False,)}
"""Nothing to choose, as on the development tasks: for CIFAR-10, by the amendment on the page."""


class Task(NamedTuple):
    """One row of the table.

    Attributes:
        name: of its folder. title: in tables. recipe: that it starts from. changes: of the recipe; {data} in them
            stands for the folder of all data. labels: training labels a class, None for all.
        care: how it is fine-tuned.
    """

    name: str
    title: str
    recipe: str
    changes: Mapping[str, Any]
    labels: tuple[int | None, ...] = (None,)
    care: Mapping[str, Any] = CARE

    @property
    def measures(self) -> tuple[str, ...]:
        """What is tested: the probe of the layer chosen on held-back samples, and every fine-tuning."""
        return ("probe", *(f"finetuned_{'all' if each is None else each}" for each in self.labels))


def _series(name: str, window: int, patch: int) -> Task:
    changes = {"data.root": f"{{data}}/{name}", "data.window": window, "data.patch": patch, "train.batch": 32}
    return Task(name, name, "recipes.timeseries:labelled", changes)


TASKS = (
    _series("ArrowHead", 256, 16),
    _series("GunPoint", 152, 8),
    _series("ItalyPowerDemand", 24, 2),
    _series("OSULeaf", 432, 16),
    _series("BasicMotions", 100, 5),
    _series("JapaneseVowels", 30, 2),
    _series("ACSF1", 1472, 46),
    _series("PickupGestureWiimoteZ", 368, 16),
    Task("moving_digits", "moving digits", "recipes.video:moving_digits", {}),
    Task("points", "point clouds", "examples.my_points:base", {}),
    Task(
        "speaker",
        "spoken digits, a new speaker",
        "recipes.audio:fsdd",
        {"data.root": "{data}/fsdd", "data.held_out_speaker": "theo"},
    ),
    Task(
        "cifar10",
        "CIFAR-10, 50,000 images",
        "recipes.vision:cifar10",
        {"data.root": "{data}/cifar10"},
        labels=(10, 250),
        care=ONE_SETTING,
    ),
)
"""As declared, the quickest first."""


class Test(TypedDict):
    """The frozen setting against a rival, in one measure: mean difference, and its p before any correction.

    `half` is half of the 95 % interval over seeds and test samples together; p is over seeds, p_both over both.
    """

    mean: float
    half: float
    p: float
    p_both: float


class Found(TypedDict):
    """What a task found: measure -> variant -> its spread, and measure -> rival -> test."""

    frozen: str
    seeds: list[int]
    spreads: dict[str, dict[str, Spread]]
    tests: dict[str, dict[str, Test]]
    raw_tokens: float
    made_with: Any


def config_of(task: Task, data: Path) -> PretrainConfig:
    """What a task pre-trains, before an objective is named."""
    changes = {key: value.format(data=data) if isinstance(value, str) else value for key, value in task.changes.items()}
    return read_recipe("objectives", task.recipe, changes)


def run(task: Task, data: Path, out: Path, workers: int | None) -> Found:
    """Measure a task, as far as that is not done."""
    config = config_of(task, data)
    options = ObjectivesOptions(
        objectives=(REFERENCE, FROZEN),
        seeds=SEEDS,
        labels=task.labels,
        workers=workers,
        **task.care,
    )
    result = measured(config, options, out / task.name)
    rows = {**result.rows, RANDOM: result.random}
    return {
        "frozen": FROZEN,
        "seeds": list(result.look.seeds),
        "spreads": {key: spreads(rows, key) for key in task.measures},
        "tests": {key: {rival: tested(rows, key, FROZEN, rival) for rival in RIVALS} for key in task.measures},
        "raw_tokens": result.random[0]["raw_tokens"],
        "made_with": declared.made_with(),
    }


def tested(rows: Mapping[str, Sequence[Any]], key: str, own: str, rival: str) -> Test:
    """`own` minus the rival."""
    (found,) = differences(groups(rows, key), [(own, rival)], credits=credits_of(rows, key))
    sign = 1 if found.better == own else -1
    p_both = found.p if found.p_both is None else found.p_both
    return {"mean": sign * found.mean, "half": found.half, "p": found.p, "p_both": p_both}


Cell = tuple[str, str, str]
"""Task, measure and rival."""


def real(kept: Mapping[str, Found]) -> set[Cell]:
    """The tests that stand: both p below the level, corrected by Holm for all that were declared, finished or not."""
    tests = {
        (task.name, key, rival): kept[task.name]["tests"][key][rival]
        for task in TASKS
        if task.name in kept
        for key in task.measures
        for rival in RIVALS
    }
    return standing(ps_of(tests), len(RIVALS) * sum(len(task.measures) for task in TASKS))


Name = TypeVar("Name", bound=Hashable)


def ps_of(tests: Mapping[Name, Test]) -> dict[Name, tuple[float, float]]:
    """For `standing`."""
    return {name: (test["p"], test["p_both"]) for name, test in tests.items()}


def standing(ps: Mapping[Name, tuple[float, float]], declared: int) -> set[Name]:
    """Those of a family whose p are both below the level, corrected by Holm for so many tests.

    Args:
        ps: name of a test -> p over seeds, and over seeds and test samples together.
    """
    if not ps:
        return set()
    family = Correction(tests=declared)
    both = (holm(each, family) for each in zip(*ps.values(), strict=True))
    return {name for name, *each in zip(ps, *both, strict=True) if max(each) < LEVEL}


def signed(value: float, half: float) -> str:
    """ "+2.1 ± 0.9": points, of shares of 1."""
    return f"{100 * value:+z.1f} ± {100 * half:.1f}"


def written(test: Test, *, stands: bool) -> str:
    """ "**+2.1 ± 0.9**": points."""
    text = signed(test["mean"], test["half"])
    return f"**{text}**" if stands else text


def title(key: str) -> str:
    """Of a measure."""
    labels = key.removeprefix("finetuned_")
    return "probe" if key == "probe" else f"fine-tuned, {'all labels' if labels == 'all' else f'{labels} a class'}"


def full_table(kept: Mapping[str, Found]) -> list[str]:
    """A line a task and measure."""
    stands = real(kept)
    head = ["task", "", "random weights", REFERENCE, FROZEN, "raw tokens", f"minus {REFERENCE}", "minus random weights"]
    lines = [head]
    for task in TASKS:
        if task.name not in kept:
            lines.append([task.title, "not finished", *[""] * (len(head) - 2)])
            continue
        found = kept[task.name]
        for key in task.measures:
            raw = f"{found['raw_tokens']:.3f}" if key == "probe" else ""
            values = [spread_cell(found["spreads"][key][name]) for name in (RANDOM, REFERENCE, FROZEN)]
            tests = [written(found["tests"][key][rival], stands=(task.name, key, rival) in stands) for rival in RIVALS]
            lines.append([task.title if key == "probe" else "", title(key), *values, raw, *tests])
    return table_lines(lines)


def short_table(kept: Mapping[str, Found]) -> list[str]:
    """A line a task: what pre-training with the frozen setting is worth there."""
    stands = real(kept)
    lines = [["data", "frozen read-out over random weights", "over raw tokens", "fine-tuned over random weights"]]
    for task in TASKS:
        if task.name not in kept:
            continue
        found = kept[task.name]
        gain = [
            written(found["tests"][key][RANDOM], stands=(task.name, key, RANDOM) in stands) for key in task.measures
        ]
        raw = 100 * (found["spreads"]["probe"][FROZEN]["mean"] - found["raw_tokens"])
        tuned = gain[1:]
        if len(tuned) > 1:
            tuned = [f"{each} ({labels} a class)" for each, labels in zip(tuned, task.labels, strict=True)]
        lines.append([task.title, gain[0], f"{raw:+.1f}", "; ".join(tuned)])
    return table_lines(lines)


def sentences(kept: Mapping[str, Found]) -> list[str]:
    """What the tests say, in one line for each rival."""
    stands = real(kept)
    said = []
    for rival in RIVALS:
        tests = {
            (name, key, rival): found["tests"][key][rival] for name, found in kept.items() for key in found["tests"]
        }
        said.append(counted(f"{FROZEN} against {rival}", tests, stands))
    return said


def counted(what: str, tests: Mapping[Name, Test], stands: Set[Name]) -> str:
    """How many of the tests stand, and for whom."""
    better = sum(name in stands and test["mean"] > 0 for name, test in tests.items())
    worse = sum(name in stands and test["mean"] < 0 for name, test in tests.items())
    return (
        f"{what}: {len(tests)} tests, {better} better and {worse} worse beyond the noise, "
        f"{len(tests) - better - worse} open."
    )


def blocks(kept: Mapping[str, Found]) -> dict[str, str]:
    """Name -> what stands between its marks in the pages."""
    said = " ".join(sentences(kept))
    return {
        "what-pays": "\n".join([said, "", *full_table(kept)]),
        "what-pays-short": "\n".join(short_table(kept)),
    }


def filled(page: str, name: str, kept: Mapping[str, Found]) -> str:
    """The page with the block of that name between its marks made anew."""
    return marked_anew(page, {name: blocks(kept)[name]})


def read_kept() -> dict[str, Found]:
    """What was measured so far."""
    return declared.read_kept(KEPT)


def main(words: Sequence[str]) -> None:
    known = {task.name: task for task in TASKS}
    parser = declared.parser_of("what_pays", __doc__)
    parser.add_argument("--tasks", help=f"of run: some of {', '.join(known)}; default all")
    asked = declared.asked_of("what_pays", parser, words, kept=KEPT)
    if asked.what == "table":
        for name, page in PAGES.items():
            page.write_text(filled(page.read_text(), name, read_kept()))
        return
    names = declared.some_of(parser, "tasks", asked.tasks, list(known))
    data = declared.folder_of(parser, asked.data)
    declared.measured_and_kept(parser, names, lambda name: run(known[name], data, asked.out, asked.workers), KEPT)


if __name__ == "__main__":
    main(sys.argv[1:])
