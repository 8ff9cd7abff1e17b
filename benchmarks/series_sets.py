"""Many sets of series in one predictor, for docs/results/series-sets.md: `python -m benchmarks.series_sets run|table`.

run    Pre-trains each set of `SETS` alone and all together, by the functions of `nepa transfer`, and probes both and
       random weights. OUT has all runs; the same command goes on where it was stopped. What is found is kept in
       docs/results/series-sets.json.
table  Makes the table of docs/results/series-sets.md anew from this file alone; with --classic FILE, which is of
       benchmarks.classic_series, its baselines are kept there first.

DIR holds a folder for each set with its one _TRAIN.ts and its one _TEST.ts.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

from benchmarks import classic_series, declared
from benchmarks.classic_series import ClassicFile
from benchmarks.markdown import marked_anew, table_lines
from benchmarks.what_pays import (
    FROZEN,
    TASKS,
    Task,
    Test,
    config_of,
    counted,
    ps_of,
    standing,
    tested,
    written,
)
from modalities.together import Together
from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.verdict.intervals import over_samples
from recipes.comparison import engine, transfer
from recipes.comparison.downstream import HORIZON
from recipes.comparison.engine import Measure
from recipes.comparison.transfer import OWN_STEPS, RANDOM, SAME_COST, Reading, arms
from recipes.configs import PretrainConfig
from recipes.objective_names import named
from recipes.presets import small
from recipes.report.summaries import MadeWith, RunMeasures, Runs, TransferRow
from recipes.report.tables import credits_of, groups, spread_cell, spreads
from recipes.statistics.significance import Contrast, Spread, beside_samples, contrasts, error_of

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "series-sets.json"
PAGE = ROOT / "docs" / "results" / "series-sets.md"
MARK = "series-sets"

SETS = tuple(task for task in TASKS if task.name in classic_series.SETS)
SEEDS = (0, 1, 2)
STEPS = 800
"""Of each set alone; together there are as many for each set."""

ALONE, TOGETHER = "alone", "together"
RIVALS = (ALONE, RANDOM)
MEAN = "mean over sets"


class Found(TypedDict):
    """What was found on a set, or of the mean over sets: column -> spread of the probe, and rival -> test."""

    spreads: dict[str, Spread]
    tests: dict[str, Test]
    raw_tokens: float


class Kept(TypedDict, total=False):
    """docs/results/series-sets.json.

    Attributes:
        found: set, or `MEAN`, -> what was found. classic: of benchmarks.classic_series.
        seconds: of training, `ALONE` over all sets and `TOGETHER`, over all seeds.
    """

    found: dict[str, Found]
    seconds: dict[str, float]
    seeds: list[int]
    made_with: MadeWith
    classic: ClassicFile


# -------------------------------------------------------------------------------------------------- measured


def mixed(data: Path, sets: Sequence[Task] = SETS) -> PretrainConfig:
    """All sets in one predictor, trained for the steps of one set alone."""
    own = {task.name: config_of(task, data) for task in sets}
    (batch,) = {each.train.batch for each in own.values()}
    mix = Together(parts={name: each.data for name, each in own.items()}, mode="mixed")
    changes = {
        "model.parts": len(own),
        "model.pack": True,  # their series have 12 to 32 tokens
        "train.batch": batch,
        "train.length.steps": STEPS,
        "train.evaluate": STEPS,
        "train.checkpoint": STEPS,
        "train.max_unreadable": 0.05,  # of the 50 of PickupGestureWiimoteZ one is shorter than two tokens
    }
    return named(FROZEN, override(small(mix), changes))


def run(config: PretrainConfig, out: Path, workers: int | None) -> Kept:
    """Train and measure everything that is not yet."""
    variants = {name: each for name, each in arms(config).items() if name != SAME_COST}
    reading = Reading(horizon=HORIZON)

    def controls(seeds: Sequence[int]) -> list[engine.Job]:
        return [transfer.control(config, seed, reading, out) for seed in seeds]

    rows, look = engine.compare(
        list(variants.values()),
        SEEDS,
        Measure("series-sets", transfer.measure, reading),
        out,
        workers=workers or engine.default_workers(),
        also=controls,
    )
    random = [cast(TransferRow, job.values()) for job in controls(look.seeds)]
    of_set = {name: rows_of(name, rows, random) for name in config.data.strata()}
    raw = random[0]["raw_tokens"]
    summaries = engine.run_summaries(list(variants.values()), look.seeds, out)
    seconds = {name: sum(each["seconds"] for each in seeds) for name, seeds in summaries.items()}
    return {
        "found": {
            **{name: found_on(own, raw[name]) for name, own in of_set.items()},
            MEAN: found_over(list(of_set.values()), statistics.fmean(raw.values())),
        },
        "seconds": {
            ALONE: round(sum(seconds.values()) - seconds[OWN_STEPS], 1),
            TOGETHER: round(seconds[OWN_STEPS], 1),
        },
        "seeds": list(look.seeds),
        "made_with": declared.made_with(),
    }


def rows_of(
    name: str, rows: Mapping[str, Sequence[TransferRow]], random: Sequence[TransferRow]
) -> dict[str, list[RunMeasures]]:
    """Column -> what was measured of it on one set, one a seed."""
    columns = {RANDOM: random, ALONE: rows[transfer.alone(name)], TOGETHER: rows[OWN_STEPS]}
    return {column: [row["parts"][name] for row in seeds] for column, seeds in columns.items()}


def found_on(rows: Runs, raw_tokens: float) -> Found:
    """What one set says."""
    return {
        "spreads": spreads(rows, "probe"),
        "tests": {rival: tested(rows, "probe", TOGETHER, rival) for rival in RIVALS},
        "raw_tokens": raw_tokens,
    }


# ------------------------------------------------------------------------------------------ the mean over sets


def found_over(sets: Sequence[Runs], raw_tokens: float) -> Found:
    """What the mean over sets says, which are taken as they are: seeds and test samples may be others, sets not.

    As for one set (`spreads`, `tested`), with the mean over sets for each seed; its variance over test samples is that
    of a mean of independent sets.
    """
    every = [groups(rows, "probe") for rows in sets]
    means = {
        column: [statistics.fmean(values) for values in zip(*(each[column] for each in every), strict=True)]
        for column in every[0]
    }
    tests = contrasts(means, [(TOGETHER, rival) for rival in RIVALS])
    return {
        "spreads": {column: _spread(values, _noise(sets, column)) for column, values in means.items()},
        "tests": {rival: _test(each, _noise(sets, TOGETHER, rival)) for rival, each in zip(RIVALS, tests, strict=True)},
        "raw_tokens": raw_tokens,
    }


def _noise(sets: Sequence[Runs], column: str, rival: str | None = None) -> tuple[float, float]:
    """Variance over test samples of the mean over sets of a column, or of a column minus its rival; and its degrees of
    freedom (Satterthwaite)."""
    variances, dfs = [], []
    for rows in sets:
        known = credits_of(rows, "probe")
        assert known is not None, "a probe of classes keeps what every sample adds"
        apart = known.of[column] if rival is None else known.of[column] - known.of[rival]
        found = over_samples(apart.double().mean(0), known.clusters, chained=known.chained)
        variances.append((error_of(found) / len(sets)) ** 2)
        dfs.append(found.df)
    total = sum(variances)
    share = sum(variance**2 / df for variance, df in zip(variances, dfs, strict=True))
    return total, total**2 / share if share else sum(dfs)


def _spread(values: Sequence[float], noise: tuple[float, float]) -> Spread:
    count, std = len(values), statistics.stdev(values)
    seeds = Contrast(statistics.fmean(values), std / math.sqrt(count), count - 1)
    alone = seeds.half_width(0.05)
    both = max(alone, beside_samples(seeds, *noise).half_width(0.05))
    return {"values": list(values), "mean": seeds.mean, "std": std, "ci95": alone, "both": both}


def _test(seeds: Contrast, noise: tuple[float, float]) -> Test:
    both = beside_samples(seeds, *noise)
    half = max(seeds.half_width(0.05), both.half_width(0.05))
    return {"mean": seeds.mean, "half": half, "p": seeds.p, "p_both": both.p}


# ------------------------------------------------------------------------------------------------- the page


def lines(kept: Kept) -> list[str]:
    """What stands between the marks of the page."""
    found = kept.get("found", {})
    tests = {(name, rival): each["tests"][rival] for name, each in found.items() for rival in RIVALS}
    stands = standing(ps_of(tests), len(RIVALS) * (len(SETS) + 1))
    said = [
        counted(f"{TOGETHER} against {rival}", {key: test for key, test in tests.items() if key[1] == rival}, stands)
        for rival in RIVALS
    ]
    if "seconds" in kept:
        alone, together = (round(kept["seconds"][column] / 60) for column in (ALONE, TOGETHER))
        said.append(f"Training took {alone} minutes alone, all sets and seeds, and {together} together.")
    head = [
        "set",
        RANDOM,
        ALONE,
        TOGETHER,
        "raw tokens",
        *CLASSIC.values(),
        *(f"{TOGETHER} minus {rival}" for rival in RIVALS),
    ]
    table = [head]
    for name in (*(task.name for task in SETS), MEAN):
        if name in found:
            own = found[name]
            networks = [spread_cell(own["spreads"][column]) for column in (RANDOM, ALONE, TOGETHER)]
            networks.append(f"{own['raw_tokens']:.3f}")
            apart = [written(own["tests"][rival], stands=(name, rival) in stands) for rival in RIVALS]
        else:
            networks, apart = ["not finished", "", "", ""], ["", ""]
        table.append([name, *networks, *classic_cells(kept, name), *apart])
    return [" ".join(said), "", *table_lines(table)]


CLASSIC = {"euclidean": "1-NN Euclidean", "dtw": "1-NN DTW", "rocket": "ROCKET"}
"""Columns of benchmarks.classic_series and what they are called."""


def classic_cells(kept: Kept, name: str) -> list[str]:
    """Means over seeds, of a set or over all sets; nothing where one is not finished."""
    sets = kept["classic"]["sets"] if "classic" in kept else {}
    names = [task.name for task in SETS] if name == MEAN else [name]
    cells = []
    for baseline in CLASSIC:
        known = [sets[each][baseline] for each in names if baseline in sets.get(each, {})]
        whole = len(known) == len(names)
        cells.append(f"{statistics.fmean(statistics.fmean(values) for values in known):.3f}" if whole else "")
    return cells


def filled(page: str, kept: Kept) -> str:
    """The page with the block between its marks made anew."""
    return marked_anew(page, {MARK: "\n".join(lines(kept))})


def read_kept() -> Kept:
    """What was measured so far."""
    return cast(Kept, declared.read_kept(KEPT))


def keep(more: Kept) -> None:
    """Write what was found beside what was kept."""
    declared.keep(KEPT, dict(more))


def main(words: Sequence[str]) -> None:
    parser = declared.parser_of("series_sets", __doc__)
    parser.add_argument("--classic", type=Path, help="of table: the file that benchmarks.classic_series wrote")
    asked = declared.asked_of("series_sets", parser, words, kept=KEPT, table=("classic",))
    if asked.what == "run":
        data = declared.folder_of(parser, asked.data)
        try:
            keep(run(mixed(data), asked.out, asked.workers))
        except UserError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            declared.stopped(parser, MARK)
        return
    if asked.classic is not None:
        if not asked.classic.is_file():
            parser.error(f"--classic={asked.classic} is no file; python -m benchmarks.classic_series writes one")
        try:
            keep({"classic": classic_series.read_kept(asked.classic)})
        except ValueError as error:
            parser.error(str(error))
    PAGE.write_text(filled(PAGE.read_text(), read_kept()))


if __name__ == "__main__":
    main(sys.argv[1:])
