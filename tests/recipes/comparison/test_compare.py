"""The comparison engine: every pair once, whatever happens to who works on it; and which differences are real."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.run import Run
from recipes.comparison import engine as compare
from recipes.comparison import objectives
from recipes.comparison.ablate import Nothing
from recipes.comparison.engine import Job, Measure, Variant
from recipes.configs import PretrainConfig
from recipes.report.page import Report, Table
from recipes.report.tables import Column, difference_table, spread_table, text_table
from recipes.statistics.significance import (
    Difference,
    against,
    contrasts,
    differences,
    gains,
    holm,
    shown_p,
    spread,
    verdict,
)
from recipes.vision import digits

FORK = multiprocessing.get_context("fork")  # starts at once; the jobs here need no device


def note(log: Path, name: str, seconds: float = 0.0) -> dict[str, Any]:
    """Work that leaves a line where it was done."""
    with log.open("a") as stream:
        stream.write(f"{name} {os.getpid()}\n")
    time.sleep(seconds)
    return {"name": name}


def make_jobs(folder: Path, count: int, seconds: float = 0.0) -> list[Job]:
    names = [f"job {i}" for i in range(count)]
    return [
        Job(name, folder / name / "r.json", folder / name / ".lock", partial(note, folder / "log", name, seconds))
        for name in names
    ]


def lines(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_what_is_kept_is_not_done_again_when_the_list_grows(tmp_path: Path) -> None:
    compare.work_through(make_jobs(tmp_path, 2))
    compare.work_through(make_jobs(tmp_path, 3))
    assert [line[:5] for line in lines(tmp_path)] == ["job 0", "job 1", "job 2"]
    assert make_jobs(tmp_path, 1)[0].values() == {"name": "job 0"}


def test_processes_share_a_list_and_each_job_is_done_once(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 12, seconds=0.02)
    team = [FORK.Process(target=compare.work_through, args=(jobs,)) for _ in range(3)]
    for process in team:
        process.start()
    for process in team:
        process.join(30)
        assert process.exitcode == 0
    done = lines(tmp_path)
    assert sorted(line.rsplit(" ", 1)[0] for line in done) == sorted(job.name for job in jobs)
    assert len({line.rsplit(" ", 1)[1] for line in done}) > 1, "one process did it all"


def test_the_job_of_a_killed_process_is_taken_up(tmp_path: Path) -> None:
    (slow,) = make_jobs(tmp_path, 1, seconds=60)
    killed = FORK.Process(target=compare.work_through, args=([slow],))
    killed.start()
    deadline = time.monotonic() + 600
    while not (tmp_path / "log").exists() or not lines(tmp_path):  # the file comes before its line
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (quick,) = make_jobs(tmp_path, 1)
    assert not compare.attempt(quick), "it is held, and must not be done twice"
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert compare.attempt(quick)
    assert quick.done
    assert len(lines(tmp_path)) == 2


def test_a_failed_job_leaves_no_result(tmp_path: Path) -> None:
    job = Job("x", tmp_path / "r.json", tmp_path / ".lock", fail)
    with pytest.raises(UserError, match="x: no data"):
        compare.attempt(job)
    assert not job.done
    assert compare.attempt(job._replace(work=dict)), "the lock was let go"


def fail() -> dict[str, Any]:
    raise UserError("no data")


def die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.distributed
def test_workers_tell_what_stopped_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_jobs(tmp_path, 2)
    compare.share([first, second], workers=2)
    assert first.done
    assert second.done
    assert "2 of 2 finished" in capsys.readouterr().err
    failing = Job("raster, seed 3", tmp_path / "failing.json", tmp_path / ".failing", fail)
    with pytest.raises(UserError, match="raster, seed 3: no data"):
        compare.share([first, failing], workers=4)
    dying = Job("dying", tmp_path / "dying.json", tmp_path / ".dying", die)
    with pytest.raises(UserError, match="worker 0 was killed"):
        compare.share([dying], workers=1)
    before = len(lines(tmp_path))
    compare.share([first, second], workers=2)  # nothing is left: no process is started
    assert len(lines(tmp_path)) == before == 2


def measured(config: PretrainConfig, model: Any, run: Any, options: Any) -> dict[str, Any]:
    return {"seed": config.train.seed, "training": model.training, "loss": run.summary()["loss"]}


def test_a_pair_is_found_by_its_config_under_any_name(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    measure = Measure("tiny", measured, Nothing())
    job = compare.pair(Variant("the 1st / arm", tiny_recipe), 3, measure, tmp_path)
    folder = job.result.parent
    assert folder.name.startswith("the-1st-arm-seed3-")
    assert compare.attempt(job)
    assert job.values()["seed"] == 3
    assert not job.values()["training"]
    assert json.loads((folder / "config.json").read_text())["train"]["seed"] == 3

    free = override(tiny_recipe, {"train.checkpoint": 5, "train.workers": 1})  # they don't touch what is computed
    again = compare.pair(Variant("another name", free), 3, measure, tmp_path)
    assert again.name == "another name, seed 3"
    assert again.done
    other = override(tiny_recipe, {"optim.lr": 0.5})
    assert compare.run_folder(Variant("the 1st / arm", other), 3, tmp_path) != folder
    assert compare.run_folder(Variant("the 1st / arm", tiny_recipe), 4, tmp_path) != folder


def test_names_are_given_once(tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Variant("one", tiny_recipe)
    measure = Measure("tiny", measured, Nothing())
    with pytest.raises(UserError, match="one is given twice"):
        compare.compare([one, one], (0,), measure, tmp_path, workers=1)
    with pytest.raises(UserError, match="two is the same setting as one"):
        compare.compare([one, Variant("two", tiny_recipe)], (7,), measure, tmp_path, workers=1)
    with pytest.raises(UserError, match="7 is given twice"):
        compare.compare([one], (7, 7), measure, tmp_path, workers=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not by torchrun"):
        compare.compare([one], (7,), measure, tmp_path, workers=1)


def held(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        ({"task": "orders", "recipe": "my:recipe", "orders": {}}, "`nepa orders my:recipe`"),
        ({"task": "ablate", "recipe": "my:other", "arms": {}}, "`nepa ablate my:other`"),
        ({"seeds": [0], "recipe": "my:recipe", "objectives": {"cosine": {}}}, "`nepa objectives my:recipe`"),
        ({"loss": -0.5, "objective": -0.5}, "no comparison"),
        ([1], "no comparison"),
    ],
)
def test_what_another_command_wrote_is_not_lost(
    summary: Any, told: str, tmp_path: Path, tiny_recipe: PretrainConfig
) -> None:
    Run(tmp_path).write_summary(summary)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/index.html").write_text("another page")
    before = held(tmp_path)
    variant = Variant("one", tiny_recipe.model_copy(update={"recipe": "my:recipe"}))
    with pytest.raises(UserError) as error:
        compare.compare([variant], (0,), Measure("ablate", measured, Nothing()), tmp_path, workers=1)
    assert told in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "out=DIR" in str(error.value)
    assert held(tmp_path) == before


def test_a_folder_of_something_else_is_no_place_for_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report/index.html").write_text("somebody's page")
    (tmp_path / "runs/digits").mkdir(parents=True)  # where runs go by default, of no comparison
    with pytest.raises(UserError, match=f"{tmp_path} holds files and is no comparison of `nepa orders`.*out=DIR"):
        compare.check_folder(tmp_path, "orders", "my:recipe")
    file = tmp_path / "report/index.html"
    for out in (file, file / "below"):
        with pytest.raises(UserError, match=f"^out={out}: {file} is a file; name another folder with out=DIR$"):
            compare.check_folder(out, "orders", "my:recipe")


def test_a_comparison_goes_on_in_its_folder_however_it_was_stopped(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    recipe = tiny_recipe.model_copy(update={"recipe": "my:recipe"})
    new, empty, stopped, early = (tmp_path / name for name in ("new", "empty", "stopped", "early"))
    empty.mkdir()
    job = compare.pair(Variant("one", recipe), 0, Measure("orders", measured, Nothing()), stopped)
    with compare.locked(job.lock):
        (stopped / "report").mkdir()
        (stopped / "notes.txt").write_text("of the user's")
    with compare.locked(objectives.control(recipe, 0, objectives.ObjectivesOptions().care, early).lock):
        pass
    for folder in (new, empty, stopped, early):
        compare.check_folder(folder, "orders", "my:recipe")
    for summary in ({"task": "orders"}, {"seeds": [0], "orders": {"raster": {}}}):  # of now, and of before
        Run(stopped).write_summary(summary | {"recipe": "my:recipe"})
        compare.check_folder(stopped, "orders", "my:recipe")


# ------------------------------------------------------------------------------------------- significance

ROWS = {"a": [0.81, 0.84, 0.80, 0.86], "b": [0.78, 0.80, 0.79, 0.81], "c": [0.80, 0.85, 0.79, 0.85]}


def test_a_comparison_gives_mean_spread_and_interval() -> None:
    found = spread([0.1, 0.2, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["std"] == pytest.approx(0.1)
    assert found["ci95"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # Student's t with 2 degrees of freedom
    assert spread([0.1])["ci95"] is None


@pytest.mark.parametrize("pair", [("a", "b"), ("a", "c"), ("b", "c")])
def test_two_variants_make_the_paired_t_test(pair: tuple[str, str]) -> None:
    (each,) = differences({name: ROWS[name] for name in pair})
    reference = stats.ttest_rel(ROWS[each.better], ROWS[each.worse])
    interval = reference.confidence_interval(0.95)
    assert each.p == each.p_holm == pytest.approx(reference.pvalue)
    assert each.mean == pytest.approx(np.mean(ROWS[each.better]) - np.mean(ROWS[each.worse]))
    assert each.ci95 == each.needed == pytest.approx((interval.high - interval.low) / 2)


def test_variants_of_equal_noise_share_it() -> None:
    """Residuals of size r in a Latin square: worked by hand, variance 1.5 r^2 with 4 degrees of freedom."""
    seeds = np.array([0.0, 0.1, 0.4])
    table = {name: list(0.01 * np.roll([1, -1, 0], i) + 0.2 * i + seeds) for i, name in enumerate("abc")}
    for each in contrasts(table, [("b", "a"), ("c", "a")]):
        assert each.error == pytest.approx(0.01)
        assert each.df == pytest.approx(4)
        assert each.p == pytest.approx(2 * stats.t.sf(each.mean / 0.01, 4))
    assert [each.needed for each in differences(table)] == pytest.approx([stats.t.isf(0.05 / 6, 4) * 0.01] * 3)


def test_a_noisy_variant_is_tested_by_its_own_noise() -> None:
    table = {"a": [0.50, 0.52, 0.51], "b": [0.51, 0.50, 0.52], "c": [0.52, 0.52, 0.5], "noisy": [0.3, 0.8, 0.6]}
    quiet, noisy = contrasts(table, [("a", "b"), ("a", "noisy")])
    assert noisy.error**2 >= np.subtract(table["a"], table["noisy"]).var(ddof=1) / 3
    assert noisy.error > quiet.error
    assert 2 <= noisy.df <= quiet.df < 3, "one variant has nearly all of the noise, and 2 degrees of freedom"


def test_false_claims_are_rare_and_seeds_are_not_wasted() -> None:
    """150 tables of 4 variants x 3 seeds, 500 test samples, a difference of 4 std; paired t-tests find a fifth."""
    draw = np.random.default_rng(0)
    false, found = 0, 0
    for _ in range(150):
        noise = (0.7 + 0.02 * draw.normal(size=3) + 0.01 * draw.normal(size=(4, 3))).round(3)
        table = dict(zip("abcd", (np.round(500 * noise) / 500).tolist(), strict=True))
        false += any(each.real for each in differences(table))
        table["a"] = [value + 0.04 for value in table["a"]]
        found += sum(each.real and each.better == "a" for each in differences(table)) / 3
    assert false / 150 < 0.04
    assert found / 150 > 0.35


def test_gains_are_tested_against_the_control_of_each() -> None:
    tuned = {"a": [0.50, 0.62, 0.55], "b": [0.41, 0.50, 0.47]}
    scratch = {"a": [0.40, 0.50, 0.46], "b": [0.52, 0.62, 0.56]}
    first, second = gains(tuned, scratch, called="random")
    assert {(first.better, first.worse), (second.better, second.worse)} == {("a", "a, random"), ("b, random", "b")}
    assert sorted([first.mean, second.mean]) == pytest.approx([0.31 / 3, 0.32 / 3])
    together = np.random.default_rng(0)
    false = 0
    for _ in range(150):
        scratch = dict.fromkeys("abcdefgh", (0.7 + 0.03 * together.normal(size=3)).tolist())
        tuned = {name: (0.7 + 0.01 * together.normal(size=3)).tolist() for name in scratch}
        false += any(each.real for each in gains(tuned, scratch, called="random"))
    assert false / 150 < 0.09, "controls that are one network are not so many proofs"


def test_holm_multiplies_step_by_step_and_never_reorders() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # worked by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_no_spread_is_not_taken_for_certainty() -> None:
    """Values in steps can agree by rounding: scipy's paired test would say p = 0 here."""
    (each,) = differences({"a": [0.5, 0.5, 0.5], "b": [0.502, 0.502, 0.502]})
    assert each.p == pytest.approx(2 * stats.t.sf(18**0.5, 2))  # standard error step * (2 / (12 * 3))^0.5
    (same,) = differences({"a": [0.3, 0.5, 0.5], "b": [0.3, 0.5, 0.5]})
    assert (same.mean, same.p) == (0.0, 1.0)
    assert [each.p for each in differences({"a": [0.5] * 3, "b": [0.5] * 3})] == [1.0]


def test_the_verdict_says_which_differences_are_real() -> None:
    words: dict[str, Any] = {"of": "probe accuracy", "noun": "orders"}
    noise = differences({"a": [0.1, 0.5, 0.3], "b": [0.3, 0.1, 0.2]})
    assert verdict(noise, seeds=3, **words).startswith("No difference between orders in probe accuracy is larger than")
    assert verdict(noise, seeds=3, **words).endswith(" points can't be seen with these seeds.")
    clear = [
        Difference("hilbert", "raster", 0.021, 0.009, 0.001, 0.003, 0.011),
        Difference("b", "a", 0.01, 0.02, 0.4, 0.4, 0.03),
    ]
    assert verdict(clear, seeds=5, **words) == (
        "In probe accuracy: hilbert > raster by 2.1 ± 0.9 points, p = 0.003 (2 paired comparisons over 5 seeds, "
        "Holm-corrected). The other difference is within the noise. "
        "With these seeds the surest had to be about 1.1 points to be seen; once it is, less is asked of the others."
    )
    assert verdict(clear[1:], seeds=5, **words) == (
        "No difference between orders in probe accuracy is larger than the noise (5 paired seeds); the only one, b "
        "over a, is 1.0 ± 2.0 points, p = 0.4; differences below about 3.0 points can't be seen with these seeds."
    )
    assert "The other 2 differences are within" in verdict([*clear, clear[1]], seeds=5, **words)
    small = Difference("b", "a", 0.00002, 0.00001, 0.001, 0.003, 0.00001)  # of errors of forecasts, say
    assert verdict([small], seeds=3, **words).startswith("In probe accuracy: b > a by 0.002 ± 0.001 points, p = 0.003")
    assert differences({"a": [0.1, 0.2], "b": [0.9, 0.95]}) == []
    assert "give three or more" in verdict([], seeds=2, **words)


def test_a_real_difference_may_be_smaller_than_what_the_surest_had_to_be() -> None:
    """Holm's later steps are more lenient: what is said of the first must not be denied by the second."""
    values = {"base": [0.50, 0.51, 0.52], "much": [0.6, 0.62, 0.621], "some": [0.53, 0.53, 0.53]}
    found = differences(values, [("much", "base"), ("some", "base")])
    assert all(each.real for each in found)
    assert found[1].mean < found[0].needed
    told = f"With these seeds the surest had to be about {100 * found[0].needed:.1f} points to be seen; once it is,"
    assert told in verdict(found, of="it", noun="arms", seeds=3)
    assert "With these seeds it had to be about" in verdict(found[:1], of="it", noun="arms", seeds=3)


@pytest.mark.parametrize(
    ("p", "told"),
    [(0.0549, "0.055"), (0.0504, "0.0504"), (0.04996, "0.04996"), (0.05, "0.05"), (1.0, "1"), (0.00312, "0.0031")],
)
def test_p_is_written_so_that_it_agrees_with_what_is_called_real(p: float, told: str) -> None:
    each = Difference("b", "a", 0.01, 0.02, p, p, 0.03)
    assert shown_p(p) == told
    assert told in difference_table([each])[1]
    assert f"p = {told}" in verdict([each], of="it", noun="arms", seeds=3)
    assert f"p = {told}" in against([each], "a", "it", called="a") or each.real


def test_tables_show_means_and_intervals(tmp_path: Path) -> None:
    rows = {"a": [{"x": 0.1}, {"x": 0.3}], "<b>": [{"x": 0.5}, {"x": 0.5}]}
    table = spread_table(rows, [Column("x", "accuracy", ".2f")])
    assert table[0] == ["", "accuracy"]
    assert table[1][1].startswith("0.20 ± 1.27")
    assert text_table(table).splitlines()[1].startswith("a ")
    Report("a & <b>", "", {}, lambda: [Table(table)]).write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert difference_table(differences(ROWS))[1][0] == "a > b"


def test_a_saved_comparison_is_found_again_by_its_digest() -> None:
    """As of commit 390fdf6; a key that is new since must not have the same run trained once more."""
    assert compare.config_digest(digits()) == "71bb522a49c4"
    assert compare.config_digest(override(digits(), {"train.probe": True})) == compare.config_digest(digits())
    headed, fed = ({"objective.head": "simsiam"}, {"data.augment_on": "device", "data.augment": "crop_flip"})
    found = {
        compare.config_digest(override(digits(), each)) for each in (headed, fed, {"data.augment": "crop_flip"}, {})
    }
    assert len(found) == 4, "a later key that is in use tells runs apart"
