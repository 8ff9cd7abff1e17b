"""benchmarks.series_sets and benchmarks.classic_series: equal cost, one declared family, a page from kept figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import classic_series, series_sets
from benchmarks.classic_series import ClassicFile, Split, both_filled, euclidean, nearest
from benchmarks.series_sets import (
    ALONE,
    KEPT,
    MEAN,
    PAGE,
    RANDOM,
    RIVALS,
    SETS,
    TOGETHER,
    Kept,
    filled,
    found_on,
    found_over,
    lines,
    mixed,
    read_kept,
)
from recipes.comparison import engine, measures
from recipes.comparison.transfer import OWN_STEPS, arms
from recipes.statistics.credits import pack_credits


def made(p: float, mean: float = 0.05) -> Any:
    spread = {"values": [0.5, 0.6], "mean": 0.55, "std": 0.07, "ci95": 0.6, "both": 0.7}
    test = {"mean": mean, "half": 0.01, "p": p, "p_both": p}
    return {
        "spreads": dict.fromkeys((RANDOM, ALONE, TOGETHER), spread),
        "tests": dict.fromkeys(RIVALS, test),
        "raw_tokens": 0.4,
    }


def classic(names: list[str]) -> ClassicFile:
    figures = {"euclidean": [0.9], "rocket": [0.8, 0.9, 1.0], "dtw": [0.7]}
    return {"versions": {}, "sets": {name: dict(figures) for name in names}, "seconds": {}}


def drawn(shares: dict[str, float], samples: int, seed: int) -> Any:
    """What three seeds measure of each column, right at so many of the test samples."""
    draw = torch.Generator().manual_seed(seed)
    rows: dict[str, list[dict[str, Any]]] = {}
    for column, share in shares.items():
        rights = [(torch.rand(samples, generator=draw) < share).float() for _ in range(3)]
        rows[column] = [
            {"probe": float(r.mean()), "credits": {"probe": pack_credits(r)}, "clusters": {}} for r in rights
        ]
    return rows


# -------------------------------------------------------------------------------------------- what is declared


def test_alone_and_together_cost_the_same(tmp_path: Path) -> None:
    every = {name: each.config for name, each in arms(mixed(tmp_path)).items()}
    together = every.pop(OWN_STEPS)
    alone = [every[f"{task.name} alone"] for task in SETS]
    series = [each.train.batch * (each.train.length.steps or 0) for each in alone]
    assert series == [800 * 32] * 8
    assert together.train.batch * (together.train.length.steps or 0) == sum(series)
    assert set(together.data.shares().values()) == {1 / 8}
    assert {each.objective.head for each in (*alone, together)} == {"simsiam"}
    assert {each.model for each in alone} == {together.model}


def test_the_baselines_are_of_the_same_sets() -> None:
    assert tuple(task.name for task in SETS) == classic_series.SETS
    assert classic_series.BASELINES.keys() == series_sets.CLASSIC.keys()


# ------------------------------------------------------------------------------------------------ the mean


def test_the_mean_over_one_set_is_that_set() -> None:
    rows = drawn({RANDOM: 0.5, ALONE: 0.6, TOGETHER: 0.8}, 60, 0)
    own, mean = found_on(rows, 0.4), found_over([rows], 0.4)
    for column in (RANDOM, ALONE, TOGETHER):
        for key in ("values", "mean", "std", "ci95", "both"):
            assert mean["spreads"][column][key] == pytest.approx(own["spreads"][column][key], abs=1e-6)
    for rival in RIVALS:
        assert mean["tests"][rival] == pytest.approx(own["tests"][rival], abs=1e-6)
        assert own["tests"][rival]["p_both"] < 0.9


def test_the_interval_of_the_mean_is_that_of_independent_sets() -> None:
    shares = {RANDOM: 0.5, ALONE: 0.5, TOGETHER: 0.5}
    sets = [drawn(shares, 40, seed) for seed in range(8)]
    one, eight = series_sets._noise(sets[:1], TOGETHER, ALONE), series_sets._noise(sets, TOGETHER, ALONE)
    assert eight[0] == pytest.approx(one[0] / 8, rel=0.5)
    assert eight[1] > 4 * one[1]
    means = [np.mean([each[TOGETHER][k]["probe"] for each in sets]) for k in range(3)]
    assert found_over(sets, 0.4)["spreads"][TOGETHER]["values"] == pytest.approx(means)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_is_what_the_kept_figures_make() -> None:
    assert filled(PAGE.read_text(), read_kept()) == PAGE.read_text(), "run python -m benchmarks.series_sets table"


def test_the_table_names_what_is_not_finished_and_keeps_its_baselines() -> None:
    kept: Kept = {"found": {"GunPoint": made(0.5)}, "classic": classic(["GunPoint", "ACSF1"])}
    rows = {line.split(" | ")[0].strip("| "): line for line in lines(kept)}
    assert rows["GunPoint"].endswith("| 0.400 | 0.900 | 0.700 | 0.900 | +5.0 ± 1.0 | +5.0 ± 1.0 |")
    assert rows["ACSF1"] == "| ACSF1 | not finished |  |  |  | 0.900 | 0.700 | 0.900 |  |  |"
    assert rows["OSULeaf"] == "| OSULeaf | not finished |  |  |  |  |  |  |  |  |"
    assert rows[MEAN] == f"| {MEAN} | not finished |  |  |  |  |  |  |  |  |"
    whole: Kept = {"classic": classic(list(classic_series.SETS))}
    assert f"| {MEAN} | not finished |  |  |  | 0.900 | 0.700 | 0.900 |  |  |" in lines(whole)


def test_all_eighteen_declared_tests_count() -> None:
    assert "**+5.0 ± 1.0**" in "".join(lines({"found": {"GunPoint": made(0.04 / 18)}}))
    assert "**" not in "".join(lines({"found": {"GunPoint": made(0.06 / 18)}}))
    assert "together against alone: 1 tests, 0 better and 1 worse beyond the noise, 0 open." in "".join(
        lines({"found": {MEAN: made(1e-9, mean=-0.1)}})
    )


def test_table_keeps_the_baselines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_sets, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(series_sets, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("before\n<!-- series-sets -->\n<!-- end of series-sets -->\nbehind\n")
    (tmp_path / "kept.json").write_text(json.dumps({"found": {"ACSF1": made(0.5)}}))
    (tmp_path / "classic.json").write_text(json.dumps(classic(["GunPoint"])))
    series_sets.main(["table", "--classic", str(tmp_path / "classic.json")])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["found"].keys() == {"ACSF1"}
    assert kept["classic"]["sets"]["GunPoint"]["rocket"] == [0.8, 0.9, 1.0]
    page = (tmp_path / "page.md").read_text()
    assert "| GunPoint | not finished |  |  |  | 0.900 | 0.700 | 0.900 |  |  |" in page
    assert page.startswith("before\n")
    assert page.endswith("behind\n")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("{", "is no file of benchmarks.classic_series"),
        ('{"sets": {"GunPoint": {"dtw": [93.0]}}}', "dtw of GunPoint is [93.0]"),
        ('{"sets": {"Gunpoint": {"dtw": [0.9]}}}', "dtw of Gunpoint"),
        ('{"sets": {}}', "versions"),
        (None, "is no file; python -m benchmarks.classic_series writes one"),
    ],
)
def test_a_wrong_file_of_baselines_is_named(
    file: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = tmp_path / "classic.json", KEPT.read_bytes() if KEPT.exists() else None
    if file is not None:
        path.write_text(file)
    with pytest.raises(SystemExit) as stopped:
        series_sets.main(["table", "--classic", str(path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert str(path) in error
    assert says in error
    assert before == (KEPT.read_bytes() if KEPT.exists() else None)


def test_run_needs_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        series_sets.main(["run", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert str(tmp_path / "ArrowHead") in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "nan"])
def test_no_time_for_baselines_is_refused(minutes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        classic_series.main(["--data", str(tmp_path), "--out", str(tmp_path / "x.json"), "--minutes", minutes])
    assert stopped.value.code == 2
    assert f"--minutes={minutes} is no time to begin one in" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- the baselines


def split(lengths: list[int], classes: list[str], channels: int = 2) -> Split:
    series = [np.full((channels, length), float(place)) for place, length in enumerate(lengths)]
    return Split(series, np.array(classes))


def test_series_are_filled_by_zeros_up_to_the_longest_of_both_files() -> None:
    known, asked = both_filled(split([3, 2], ["a", "b"]), split([5], ["a"]))
    assert known.shape == (2, 2, 5)
    assert asked.shape == (1, 2, 5)
    assert known[1].tolist() == [[1, 1, 0, 0, 0]] * 2


def test_the_nearest_training_series_gives_the_class() -> None:
    train, test = split([4, 4, 4], ["a", "b", "c"]), split([4, 4], ["a", "c"])
    assert euclidean(train, test) == [0.5]  # the second is nearest to the second, which is "b"
    assert nearest(np.array([[1.0, 2, 3], [3, 2, 1]]), train, test) == [1.0]


def test_baselines_stop_when_time_is_over_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def baseline(train: Any, test: Any) -> list[float]:
        asked.append(train)
        return [0.5]

    monkeypatch.setattr(classic_series, "BASELINES", {"euclidean": baseline})
    monkeypatch.setattr(classic_series, "read", lambda folder: (folder.name, None))
    monkeypatch.setattr(classic_series, "versions", lambda: {"aeon": "1.6.0"})
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(classic_series.time, "monotonic", lambda: next(clock))
    file = tmp_path / "classic.json"
    classic_series.measure(tmp_path, file, minutes=2)
    assert asked == list(classic_series.SETS[:2])
    classic_series.measure(tmp_path, file, minutes=20)
    assert asked == list(classic_series.SETS)
    assert classic_series.read_kept(file)["sets"] == {name: {"euclidean": [0.5]} for name in asked}
    kept = file.read_bytes()
    monkeypatch.setattr(classic_series, "versions", lambda: {"aeon": "2.0"})
    with pytest.raises(ValueError, match=r"has figures of aeon 1\.6\.0, and these are aeon 2\.0; name another"):
        classic_series.measure(tmp_path, file, minutes=20)
    assert file.read_bytes() == kept


# ------------------------------------------------------------------------------------------------- a whole run


def write_set(folder: Path, channels: int, steps: int) -> None:
    folder.mkdir()
    draw = np.random.default_rng(steps)
    for name in ("TRAIN", "TEST"):
        rows = ["@data"]
        for place in range(40):
            waves = np.sin(np.arange(steps) / (2 + place % 2)) + 0.1 * draw.normal(size=(channels, steps))
            rows.append(":".join([*(",".join(map("{:.3f}".format, wave)) for wave in waves), str(place % 2)]))
        (folder / f"{folder.name}_{name}.ts").write_text("\n".join(rows))


@pytest.mark.slow
def test_two_sets_are_measured_alone_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_sets, "STEPS", 4)
    monkeypatch.setattr(engine, "share", lambda jobs, workers: engine.work_through(jobs))
    monkeypatch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 40, "test_samples": 40}))
    two = [task for task in SETS if task.name in ("ItalyPowerDemand", "BasicMotions")]
    write_set(tmp_path / "ItalyPowerDemand", 1, 24)
    write_set(tmp_path / "BasicMotions", 6, 100)
    kept = series_sets.run(mixed(tmp_path, two), tmp_path / "out", workers=1)
    assert kept["found"].keys() == {"ItalyPowerDemand", "BasicMotions", MEAN}
    assert kept["seeds"] == [0, 1, 2]
    for found in kept["found"].values():
        means = {column: found["spreads"][column]["mean"] for column in (RANDOM, ALONE, TOGETHER)}
        for rival in RIVALS:
            assert found["tests"][rival]["mean"] == pytest.approx(means[TOGETHER] - means[rival], abs=1e-6)
    of_sets = [kept["found"][task.name]["spreads"][TOGETHER]["mean"] for task in two]
    assert kept["found"][MEAN]["spreads"][TOGETHER]["mean"] == pytest.approx(sum(of_sets) / 2)
    assert all(seconds > 0 for seconds in kept["seconds"].values())
