"""Runs that go on: longer, in another cycle of the rate, with settings taken anew; stops in between change nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from nepa_core.basics import UserError
from nepa_core.runtime.checkpoint import _record_digest
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.locks import holding
from nepa_core.runtime.optim import OptimConfig, lr_factor
from nepa_core.runtime.run import Run
from recipes import pretrain
from recipes.configs import PretrainConfig
from recipes.report.summaries import PretrainSummary
from recipes.training import pretraining
from tests import tiny
from tests.summaries import check_summary

WSD = {"optim.schedule": "wsd", "optim.decay_share": 0.25, "train.log": 1, "train.checkpoint": 2, "train.keep": 1}


@pytest.fixture(autouse=True)
def _without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plots take most of the time of a run this short."""
    monkeypatch.setattr("recipes.report.page.Report.write", lambda *_: None)


def run(target: Any, out: Path | None = None, **changes: Any) -> Path:
    """`nepa pretrain TARGET out=OUT key=value ...`, with __ for the dots of keys."""
    return pretrain(target, out, changes={k.replace("__", "."): v for k, v in changes.items()}, verbose=False).path


def rates(folder: Path) -> list[float]:
    """The learning rate of each step."""
    return [line["lr"] for line in Run(folder).metrics() if "lr" in line]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())


def lines(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


def stopped(target: Any, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A run that Ctrl-C stops after a step, counted from where it starts."""
    make_step = pretraining.make_step
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "make_step", lambda config: tiny.interrupted_at({step}, make_step(config)))
        with pytest.raises(Interrupted):
            run(target, folder, **changes)
    return folder


def killed(target: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that ends without warning before its next checkpoint."""

    class Cut(Exception):
        pass

    def cut(*_: Any, **__: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("nepa_core.runtime.fit.save_checkpoint", cut)
        with pytest.raises(Cut):
            run(target, **changes)


# ---------------------------------------------------------------------------------------------- schedules


def test_wsd_rises_stays_and_falls_by_one_minus_a_root() -> None:
    optim = override(tiny.recipe(), WSD).optim
    steady = optim.steady(2, 20)
    assert steady == 15
    found = [lr_factor(step, warmup=2, total=20, schedule="wsd", steady=steady) for step in range(21)]
    assert found[:3] == [0.0, 0.5, 1.0]
    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([1 - math.sqrt(share) for share in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert [lr_factor(step, warmup=2, total=20, schedule="constant") for step in (0, 1, 2, 19)] == [0, 0.5, 1, 1]


@pytest.mark.parametrize(("warmup", "total", "steady"), [(0, 1, 0), (9, 10, 9), (1, 3, 2)])
def test_a_short_run_decays_for_at_least_a_step_and_never_before_its_warmup_is_over(
    warmup: int, total: int, steady: int
) -> None:
    optim = override(tiny.recipe(), WSD).optim
    assert optim.steady(warmup, total) == steady
    for step in range(total + 1):
        assert 0 <= lr_factor(step, warmup=warmup, total=total, schedule="wsd", steady=steady) <= 1


def test_the_name_of_before_is_read(tmp_path: Path) -> None:
    class Saved(BaseModel):
        optim: OptimConfig

    values = tiny.recipe().optim.model_dump(mode="json")
    values["decay"] = {**values, "schedule": "linear"}["schedule"]
    del values["schedule"], values["decay_share"]
    (tmp_path / "config.json").write_text(json.dumps({"optim": values}))
    assert load_config(Saved, tmp_path / "config.json").optim.schedule == "linear"


# ---------------------------------------------------------------------------------------------- lengthening


@pytest.mark.slow
def test_a_longer_wsd_run_is_the_one_that_was_as_long_from_the_start(tmp_path: Path) -> None:
    """Byte for byte, though the shorter one had decayed, and its last checkpoint and lines are of that."""
    config = override(tiny.random(), WSD)
    whole = run(config, tmp_path / "whole", train__length__steps=20, optim__warmup__steps=1)
    short = run(config, tmp_path / "run")
    assert checkpoints(short) == [9, 12], "the end of the stable phase stays"
    assert run(short, train__length__steps=20) == short
    assert lines(short) == lines(whole)
    assert checkpoints(short) == checkpoints(whole) == [15, 20]
    newest = "checkpoints/step_00000020"
    for file in (whole / newest).glob("*.safetensors"):
        assert file.read_bytes() == (short / newest / file.name).read_bytes(), file.name
    summary = check_summary(short / "summary.json", PretrainSummary)
    assert summary["changes"] == [{"step": 9, "changed": {"train.length.steps": [12, 20]}}]
    assert check_summary(short / "summary_12.json", PretrainSummary)["steps"] == 12
    assert "From step 9 on: train.length.steps 12 -> 20." in pretrain(short.as_posix(), verbose=False).verdict
    before = lines(short)
    run(short)
    run(short, train__length__steps=20)
    assert lines(short) == before, "and it is finished"


@pytest.mark.slow
def test_the_same_where_it_is_killed_after_it_was_lengthened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(tiny.recipe(), WSD)
    whole = run(config, tmp_path / "whole", train__length__steps=20)
    short = run(config, tmp_path / "run")
    killed(short, monkeypatch, train__length__steps=20)
    assert checkpoints(short) == [9, 12]
    assert not (short / "summary.json").exists()
    run(short)
    assert lines(short) == lines(whole)


@pytest.mark.slow
def test_a_wsd_run_is_lengthened_before_and_within_its_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(tiny.recipe(), WSD)
    whole = run(config, tmp_path / "whole", train__length__steps=20)
    for step in (5, 11):
        folder = stopped(config, tmp_path / str(step), step, monkeypatch)
        assert lines(run(folder, train__length__steps=20)) == lines(whole)


def test_without_a_checkpoint_of_the_stable_phase_nothing_is_touched(tmp_path: Path) -> None:
    folder = run(override(tiny.recipe(), WSD), tmp_path / "run")
    (folder / "checkpoints/step_00000009/model.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no undamaged checkpoint up to step 9, the end of the stable phase"):
        run(folder, train__length__steps=20)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_constant_run_goes_on_and_may_be_given_a_decay(tmp_path: Path) -> None:
    config = override(tiny.recipe(), WSD | {"optim.schedule": "constant"})
    folder = run(config, tmp_path / "run")
    assert rates(run(folder, train__length__steps=16)) == [0.0, *[3e-3] * 15]
    with pytest.raises(UserError, match=r"up to step 15, the end of the stable phase, .*; lengthen it further"):
        run(folder, train__length__steps=20, optim__schedule="wsd")
    run(folder, train__length__steps=24, optim__schedule="wsd")
    factors = [1.0, 1.0, 1.0, *(1 - math.sqrt(share / 6) for share in range(1, 6))]
    assert rates(folder)[16:] == pytest.approx([3e-3 * factor for factor in factors])


@pytest.mark.parametrize("before", [False, True], ids=["now", "a run of before"])
def test_a_finished_cosine_run_begins_a_second_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: bool
) -> None:
    folder = run(override(tiny.recipe(), {"train.log": 1}), tmp_path / "run")
    first = rates(folder)
    if before:
        _keep_no_settings(folder)
        killed(folder, monkeypatch, train__length__steps=32, optim__lr=1e-3)
    else:
        stopped(folder, folder, 1, monkeypatch, train__length__steps=32, optim__lr=1e-3)
    run(folder)
    assert rates(folder)[:12] == first
    assert rates(folder)[12:] == pytest.approx([1e-3 * lr_factor(step, warmup=1, total=20) for step in range(20)])
    changed = {"optim.lr": [3e-3, 1e-3], "train.length.steps": [12, 32]}
    recorded = json.loads((folder / "summary.json").read_text())["changes"]
    assert recorded == ([] if before else [{"step": 12, "changed": changed}])
    pretrain(folder.as_posix(), changes={"train.length.steps": 34})
    said = capsys.readouterr().err
    assert "was finished at step 32, where its rate had come to its end (optim.schedule=cosine): a second cycle" in said
    assert "begins at step 32, 1 steps of warm-up and cosine to step 34" in said


def test_figures_of_other_tasks_stay_with_the_weights_that_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(tiny.recipe(), tmp_path / "run", 6, monkeypatch)
    for command in ({}, {"train__length__steps": 20}):
        (folder / "probe.json").write_text("{}")
        run(folder, **command)
        run(folder)  # finished: nothing changes
    kept = {path.name for path in folder.glob("*.json")}
    assert kept == {"config.json", "summary.json", "summary_12.json", "probe_6.json", "probe_12.json"}


def _keep_no_settings(folder: Path) -> None:
    """Make the checkpoints those of an earlier version."""
    for path in (folder / "checkpoints").iterdir():
        record = json.loads((path / "state.json").read_text())
        for key in ("cycle", "settings", "changes", "sha256"):
            del record[key]
        record["sha256"] = _record_digest(record)
        (path / "state.json").write_text(json.dumps(record))


def test_a_finished_run_that_another_command_lengthens_is_in_use(tmp_path: Path) -> None:
    folder = run(tiny.recipe(), tmp_path / "run")
    with holding(folder, trains=True):
        run(folder)
        with pytest.raises(UserError, match="is in use by"):
            run(folder, train__length__steps=20)


def test_what_the_steps_that_are_done_do_not_allow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped(tiny.recipe(), tmp_path / "run", 6, monkeypatch)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changes, said in (
        (
            {"train__length__steps": 20},
            r"has done 6 of 12 steps, whose rates depend on its length and schedule \(optim",
        ),
        ({"optim__schedule": "wsd"}, "has done 6 of 12 steps"),
        ({"train__length__steps": 6}, "has done 6 steps, and train.length comes to 6; lengthen it"),
        ({"train__length__steps": 20, "data__jitter": 0.5}, r"another config: data\.jitter 0\.0 -> 0\.5; give it back"),
    ):
        with pytest.raises(UserError, match=said):
            run(folder, **changes)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------- settings midway


@pytest.mark.slow
def test_a_rate_that_was_changed_midway_is_kept_and_recorded_and_a_kill_after_it_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anew = {"optim__lr": 1e-3, "optim__weight_decay": 0.2, "optim__clip": None, "train__log": 1, "train__workers": 1}
    config = override(tiny.random(), {"train.checkpoint": 4})
    folders = [stopped(config, tmp_path / name, 6, monkeypatch) for name in ("whole", "killed")]
    whole = run(folders[0], **anew)
    killed = stopped(folders[1], folders[1], 3, monkeypatch, **anew)  # at step 9
    run(killed)
    assert lines(killed) == lines(whole)
    assert rates(whole)[:3] == pytest.approx(
        [3e-3 * lr_factor(2, warmup=1, total=12), rates(whole)[1], rates(whole)[2]]
    )
    line = {step: 1e-3 * lr_factor(step - 1, warmup=1, total=12) for step in range(7, 13)}
    assert {each["step"]: each["lr"] for each in Run(whole).metrics() if each.get("lr") and each["step"] > 6} == line
    for folder in (whole, killed):
        (change,) = json.loads((folder / "summary.json").read_text())["changes"]
        assert change["step"] == 6
        assert change["changed"]["optim.lr"] == [3e-3, 1e-3]
        assert change["changed"].keys() == {key.replace("__", ".") for key in anew}
        assert Run(folder).load_config(PretrainConfig).optim.lr == 1e-3


def test_only_the_folder_itself_takes_settings_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's command that forgets a key must not change the run; and a finished one needs a length."""
    folder = stopped(override(tiny.recipe(), {"optim.lr": 1e-3}), tmp_path / "run", 6, monkeypatch)
    with pytest.raises(UserError, match=r"another config: optim\.lr 0\.001 -> 0\.003"):
        run(tiny.recipe(), folder)
    run(folder)
    with pytest.raises(UserError, match=r"another config: optim\.lr 0\.001 -> 0\.002"):
        run(folder, optim__lr=2e-3)


def test_the_name_of_the_recipe_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped(tiny.recipe(), tmp_path / "run", 6, monkeypatch)
    assert run("tests.tiny:recipe", folder) == folder, "made in Python, without a name"
    assert run(tiny.recipe(), folder) == folder
