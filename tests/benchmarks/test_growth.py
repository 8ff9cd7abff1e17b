"""benchmarks.growth: a law is a least-squares line with an honest interval; the page follows from what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import growth
from benchmarks.growth import (
    OBJECTIVES,
    PAGE,
    POINTS,
    SEEDS,
    TASKS,
    Gains,
    Kept,
    Point,
    Task,
    block,
    cells,
    filled,
    gain_name,
    gains_of,
    intervals,
    law,
    laws,
    laws_table,
    points_table,
    read_kept,
    real,
)
from benchmarks.what_pays import FROZEN
from nepa_core.runtime.config import override
from recipes.comparison import engine, measures
from recipes.comparison.objectives import REFERENCE
from recipes.configs import PretrainConfig
from recipes.report.objectives import RANDOM
from recipes.statistics.credits import pack_credits
from recipes.statistics.significance import Credits
from recipes.vision import digits

FSDD, CIFAR = TASKS
SAMPLES = 1000


def row(right: float, draw: torch.Generator) -> dict[str, object]:
    """What is kept of one run of which so many of the test samples are right."""
    credits = (torch.randperm(SAMPLES, generator=draw) < round(right * SAMPLES)).float()
    keys = (*FSDD.measures, *CIFAR.measures)
    found = dict.fromkeys(keys, pack_credits(credits))
    return {**dict.fromkeys(keys, float(credits.mean())), "credits": found, "clusters": {}}


def made(points: Sequence[Point], gain: Callable[[Point], float]) -> dict[str, Kept]:
    """Points with this gain of both objectives over random weights of 40 %; the second seed has half a point more."""
    draw = torch.Generator().manual_seed(0)
    kept: dict[str, Kept] = {}
    for point in points:
        random = [row(0.4, draw) for _ in SEEDS]
        own = [row(0.4 + gain(point) + 0.005 * seed, draw) for seed in SEEDS]
        rows = {**dict.fromkeys(OBJECTIVES, own), RANDOM: random}
        kept[growth.name_of(point)] = {"seeds": list(SEEDS), "rows": rows, "made_with": {}}
    return kept


def gains(values: Mapping[str, Sequence[float]], credits: Mapping[str, torch.Tensor] | None = None) -> Gains:
    return Gains({name: list(each) for name, each in values.items()}, None if credits is None else Credits(credits))


def test_the_page_is_what_the_kept_figures_make() -> None:
    assert filled(PAGE.read_text(), read_kept()) == PAGE.read_text(), "run python -m benchmarks.growth table"
    assert "old" not in filled("<!-- growth -->\nold\n<!-- end of growth -->\n", {})


def test_every_task_has_its_base_on_every_axis_and_eight_points() -> None:
    for task in TASKS:
        assert all(task.base in task.along(axis) for axis in growth.AXES)
        assert sum(point.task == task.name for point in POINTS.values()) == 8
    assert list(POINTS)[:2] == ["fsdd-steps-250", "fsdd-base"]
    assert list(POINTS)[-1] == "cifar10-steps-16000"
    assert POINTS["cifar10-samples-1000"] == Point("cifar10", 1000, 128, 1000)


SIZES = {"a": 250, "b": 1000, "c": 4000, "d": 16_000}


def lines(values: Mapping[str, Sequence[float]]) -> tuple[Any, Any]:
    """scipy's line through all points and seeds, and that through the means of the points."""
    x = np.log2(list(SIZES.values()))
    y = np.array(list(values.values()))
    return stats.linregress(np.repeat(x, y.shape[1]), y.ravel()), stats.linregress(x, y.mean(1))


@pytest.mark.parametrize(("bend", "df"), [(0.0, 6), (0.05, 2)], ids=["a line", "a bend that seeds share"])
def test_the_law_is_the_regression_line_of_the_wider_interval(bend: float, df: int) -> None:
    draw = np.random.default_rng(0)
    values = {
        name: 0.02 * np.log2(size) - 0.1 + bend * (name in "bc") + draw.normal(0, 0.003) * np.array([1, -1])
        for name, size in SIZES.items()
    }
    found = law(SIZES, gains(values))
    line = lines(values)[0 if df == 6 else 1]
    assert found.b == pytest.approx(line.slope)
    assert found.b == pytest.approx(0.02, abs=found.half)
    assert found.a == pytest.approx(line.intercept)
    assert found.half == pytest.approx(stats.t.ppf(0.975, df) * line.stderr)
    assert found.p == found.p_both == pytest.approx(line.pvalue)
    assert (found.df, found.points) == (df, 4)


def test_what_both_seeds_of_a_point_share_is_not_counted_twice() -> None:
    draw, missed = np.random.default_rng(0), 0
    for _ in range(300):
        values = {name: 0.04 * draw.normal() + 0.01 * draw.normal(size=2) for name in SIZES}
        missed += law(SIZES, gains(values)).p < 0.05
    assert 4 <= missed <= 28, "15 are expected; the residuals of all points and seeds alone find some 85"


def test_test_samples_widen_the_law_unless_all_points_share_what_they_add() -> None:
    sizes = {"a": 1, "b": 2, "c": 4}
    values = {"a": (0.1, 0.11), "b": (0.2, 0.21), "c": (0.31, 0.3)}
    draw = torch.Generator().manual_seed(0)
    shared = torch.rand(2, SAMPLES, generator=draw)
    same = law(sizes, gains(values, dict.fromkeys(sizes, shared)))
    alone = law(sizes, gains(values))
    assert same.half == pytest.approx(alone.half)
    noisy = {name: torch.rand(2, SAMPLES, generator=draw) for name in sizes}
    wider = law(sizes, gains(values, noisy))
    assert wider.b == alone.b
    error = float((noisy["c"] - noisy["a"]).double().mean(0).std() / 2 / SAMPLES**0.5)  # b = (c - a) / 2
    assert wider.half > max(alone.half, stats.t.ppf(0.975, SAMPLES - 1) * error)
    assert wider.p_both != wider.p == alone.p


def test_an_interval_of_a_gain_has_the_noise_of_every_point() -> None:
    """Two seeds that agree by chance are not taken for certain."""
    found = intervals(gains({"quiet": (0.1, 0.1), "noisy": (0.0, 0.2)}))
    assert found["quiet"] > 0.05
    assert found["noisy"] > found["quiet"]
    assert intervals(gains({})) == {}


def test_a_law_that_grows_stands_and_one_within_the_noise_does_not() -> None:
    steep = made(CIFAR.along("steps"), lambda point: 0.03 * np.log2(point.steps / 250))
    found = laws(steep)
    assert {cell.axis for cell in found} == {"steps"}  # of the others one point is finished
    assert all(each.b == pytest.approx(0.03, abs=0.001) for each in found.values())
    assert real(found) == set(found)
    assert "| **+3.0 ± 0." in "\n".join(laws_table(steep))
    assert sum("| grows beyond the noise |" in line for line in laws_table(steep)) == 4
    falls = laws_table(made(CIFAR.along("steps"), lambda point: -0.03 * np.log2(point.steps / 250)))
    assert sum("| falls beyond the noise |" in line for line in falls) == 4
    flat = made(CIFAR.along("steps"), lambda point: 0.01 * (point.steps == 1000))
    assert real(laws(flat)) == set()
    assert sum("shows nothing beyond the noise" in line for line in laws_table(flat)) == 4


def test_holm_counts_every_declared_law_of_a_measure_and_both_p_are_needed() -> None:
    (base, *_) = [each for cell, each in laws(made(FSDD.along("steps"), lambda _: 0.0)).items() if cell.probe]
    first, other = cells()[0], cells()[-1]
    assert sum(cell.probe for cell in cells()) == sum(not cell.probe for cell in cells()) == 12
    just, beyond = 0.04 / 12, 0.06 / 12
    assert real({first: base._replace(p=just, p_both=just), other: base._replace(p=just, p_both=just)}) == {
        first,
        other,
    }
    assert real({first: base._replace(p=beyond, p_both=just), other: base._replace(p=just, p_both=beyond)}) == set()


def test_tables_have_what_is_finished_and_name_what_is_not() -> None:
    kept = made([*FSDD.along("steps")[:3], FSDD.along("width")[1]], lambda _: 0.05)
    lines = points_table(kept, FSDD, "probe")[2:]
    assert len(lines) == 4 + 3 + 3
    assert sum("not finished" in line for line in lines) == 1 + 1 + 2
    assert lines[1].startswith("| steps | 1,000 | 0.400 | 0.45")
    assert lines[1].split("|")[3:] == lines[4].split("|")[3:] == lines[9].split("|")[3:]  # the base, on every axis
    said = laws_table(kept)
    assert sum(line.endswith("| shows nothing beyond the noise, with 3 of 4 points |") for line in said) == 4
    assert sum(line.endswith("| is not finished: 2 of 3 points |") for line in said) == 4
    assert sum("is not finished" in line for line in said) == 20
    text = block(kept)
    assert "Not finished: fsdd-samples-100, fsdd-samples-500, cifar10-steps-250" in text
    assert "Every point is finished." in block(made(list(POINTS.values()), lambda _: 0.05))


def test_gains_are_over_the_random_weights_of_the_same_point_and_seed() -> None:
    kept = made(FSDD.along("width"), lambda point: 0.1)
    found = gains_of(kept, FSDD, "probe")
    assert found.of[gain_name(FSDD.base, FROZEN)] == pytest.approx([0.1, 0.105])
    assert found.credits is not None
    apart = found.credits.of[gain_name(FSDD.base, FROZEN)]
    assert apart.mean(1).tolist() == pytest.approx([0.1, 0.105])


def few_digits() -> PretrainConfig:
    """A recipe whose unlabelled samples can be limited, and which trains in a blink."""
    small = {"model.depth": 1, "train.batch": 8, "train.checkpoint": 4, "train.evaluate": 4}
    verdict = {"verdict.fit_samples": 32, "verdict.test_samples": 32, "verdict.health_samples": 16}
    return override(digits(), small | verdict)


@pytest.mark.slow
def test_points_share_random_weights_and_runs_and_read_with_all_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Point("toy", 4, width=64, samples=1297)
    task = Task(
        "toy", "toy", "tests.benchmarks.test_growth:few_digits", "{data}", None, root, 8, (4,), (32, 64), (100, 1297)
    )
    few = growth.care_of(task).model_copy(update={"finetune_steps": (3,)})
    monkeypatch.setattr(growth, "care_of", lambda _: few)
    monkeypatch.setattr(growth, "share", lambda jobs, workers: engine.work_through(jobs))
    monkeypatch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 48, "test_samples": 48}))
    fewer = root._replace(samples=100)
    found = growth.run(task, fewer, tmp_path, tmp_path, workers=1)
    assert {name: len(rows) for name, rows in found["rows"].items()} == {REFERENCE: 2, FROZEN: 2, RANDOM: 2}
    (cosine, _), (random, _) = (growth.jobs_of(task, fewer, tmp_path, tmp_path)[name] for name in (REFERENCE, RANDOM))
    assert cosine.values()["label_counts"] == random.values()["label_counts"] == {"finetuned_all": 1297}
    assert '"limit": 100' in (cosine.result.parent / "config.json").read_text()
    at_base, narrow = (growth.jobs_of(task, each, tmp_path, tmp_path) for each in (root, root._replace(width=32)))
    assert all(job.done for job in at_base[RANDOM])
    assert not any(job.done for jobs in (at_base[REFERENCE], narrow[RANDOM]) for job in jobs)
    monkeypatch.setattr(growth, "share", lambda jobs, workers: None)  # all that there is was kept
    assert growth.run(task, fewer, tmp_path, tmp_path, workers=1)["rows"] == found["rows"]


def test_a_point_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        growth.main(["run", "--points=fsdd-steps-7", "--data=."])
    assert stopped.value.code == 2
    assert "--points=fsdd-steps-7: there is no such point" in capsys.readouterr().err
