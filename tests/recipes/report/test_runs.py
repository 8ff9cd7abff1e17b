"""Runs beside each other: what is said of finished, stopped and damaged ones, and that they are only read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nepa_core.runtime.config import override
from nepa_core.runtime.fit import Interrupted
from recipes import pretrain
from recipes.cli import main
from recipes.training import pretraining
from tests import tiny

pytestmark = pytest.mark.pictures

TINY = "tests.tiny:recipe"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and one with another rate that was stopped."""
    folder = tmp_path_factory.mktemp("made")
    config = override(tiny.recipe(), {"recipe": TINY})
    make_step = pretraining.make_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.report.page.Report.write", lambda *_: None)
        pretrain(config, folder / "one", verbose=False)
        patch.setattr(pretraining, "make_step", lambda config: tiny.interrupted_at({7}, make_step(config)))
        with pytest.raises(Interrupted):
            pretrain(override(config, {"optim.lr": 1e-3}), folder / "two", verbose=False)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them in runs/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "runs")


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_table_says_how_far_they_are_and_what_differs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "one" / "probe.json").write_text(json.dumps({"best": {"name": "2, mean", "accuracy": 0.875}}))
    before = files(runs)
    assert main(["runs"]) == 0
    said = capsys.readouterr().out.splitlines()
    summary = json.loads((runs / "one" / "summary.json").read_text())
    lines = [json.loads(line) for line in (runs / "two" / "metrics.jsonl").read_text().splitlines()]
    objective = [line["held_out_objective"] for line in lines if "held_out_objective" in line][-1]
    assert said[0].split() == [
        "run",
        "task",
        "recipe",
        "steps",
        "identified",
        "linear",
        "loss",
        "probe",
        "last",
        "written",
    ]
    assert said[1].startswith(f"runs/one  pretrain  {TINY}  12, finished")
    assert f"{summary['loss']:.3f}" in said[1]
    assert "87.5%" in said[1]
    assert said[2].split()[:4] == ["runs/two", "pretrain", TINY, "6/12"], "the last line, of every three steps"
    assert f"{objective:.3f}*" in said[2]
    assert said[3].startswith("* not finished")
    assert said[5:] == [
        f"What differs among the runs of pretrain {TINY}:",
        "  optim.lr: 0.003; 0.001 in runs/two",
    ]
    assert files(runs) == before, "runs are only read"
    assert main(["runs", "runs/two"]) == 0
    assert "runs/one" not in capsys.readouterr().out


def test_several_are_drawn_over_each_other(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(runs)
    shutil.copytree(runs / "one", "a<b>&$\\frac{1")
    assert main(["runs", "runs/one", "runs/two", "runs/one", "a<b>&$\\frac{1", "out=page"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Report: page/index.html"
    page = Path("page/index.html").read_text()
    assert "a&lt;b&gt;&amp;$\\frac{1" in page
    assert "a<b>" not in page
    drawn = {path.stem for path in Path("page").glob("*.png")}
    assert drawn == {
        "loss", "held_out_objective", "retrieval_top1", "effective_rank_embedding", "effective_rank_prediction", "lr"
    }  # fmt: skip
    assert "<td>optim.lr</td><td>0.003</td><td>0.001</td><td>0.003</td>" in page
    assert files(runs) == before


def test_what_is_damaged_is_named_and_the_rest_is_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "two", runs / "three")
    (runs / "three" / "config.json").write_text("{")
    with (runs / "three" / "metrics.jsonl").open("a") as stream:
        stream.write('half\n[1]\n{"step": 9, "loss": 1e999, "retrieval_top1": "x"}\n{"step": 1')
    (runs / "one" / "summary.json").write_text("[" * 100_000)
    shutil.copytree(runs / "two", runs / "four")
    (runs / "four" / "config.json").write_text(
        json.dumps({"adapter": "os:no_such", "task": "\x1b[31m", "recipe": ["x"]})
    )
    (runs / "four" / "summary.json").write_text(json.dumps({"loss": 10**400, "retrieval_top1": True, "steps": "x"}))
    (runs / "four" / "probe.json").write_text('{"best": 3}')
    (runs / "notes").mkdir()
    for words in ([], [f"runs/{name}" for name in ("one", "two", "three", "four")]):
        assert main(["runs", *words]) == 0
        said = capsys.readouterr().out
        assert "runs/three/config.json can't be read: " in said
        assert "runs/three/metrics.jsonl, line 5, is damaged\nruns/three/metrics.jsonl, line 6, is damaged\n" in said
        assert "runs/one/summary.json can't be read: nested too deeply" in said
        assert "\\x1b[31m" in said
        assert "\x1b" not in said
        figures = f"runs/four/summary.json is damaged: retrieval_top1 is true, loss is {'1' + 36 * '0'}..."
        assert figures in said
        assert "runs/four/probe.json is damaged: it has no figure of its best row" in said


def test_a_finished_run_has_all_its_lines_and_figures(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = runs / "one"
    lines = (one / "metrics.jsonl").read_text()
    with (runs / "two" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step"')  # is being written
    for change, said in {
        '{"best": {"accuracy": "high"}}': "runs/one/probe.json is damaged: accuracy is high",
        '{"best": {"r2": NaN}}': None,
        '{"best": {}}': "runs/one/probe.json is damaged: it has no figure of its best row",
        '{"layers": []}': "runs/one/probe.json is damaged: it has no figure of its best row",
    }.items():
        (one / "probe.json").write_text(change)
        assert main(["runs"]) == 0
        out = capsys.readouterr().out
        assert (said is None) == ("damaged" not in out)
        assert said is None or said in out
        assert "nan" not in out
    (one / "metrics.jsonl").write_text(lines[:-9])
    assert main(["runs"]) == 0
    assert f"runs/one/metrics.jsonl, line {lines.count(chr(10))}, is damaged" in capsys.readouterr().out
    (one / "metrics.jsonl").unlink()
    assert main(["runs"]) == 0
    assert "runs/one/metrics.jsonl is missing" in capsys.readouterr().out
    summary = json.loads((one / "summary.json").read_text())
    (one / "summary.json").write_text(json.dumps(summary | {"retrieval_top1": float("nan")}))
    assert main(["runs", "runs/one"]) == 0
    assert " NaN " in capsys.readouterr().out


def test_what_has_no_config_of_ours_is_no_run(
    runs: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "other").mkdir()
    (runs / "other" / "config.json").write_text('{"a": 1}')
    assert main(["runs"]) == 0
    assert "runs/other" not in capsys.readouterr().out
    assert fails("runs", "runs/one", "runs/other") == "runs/other is not a run folder"


def test_a_page_needs_two_runs(runs: Path, fails: Callable[..., str]) -> None:
    said = "runs/one is named 2 times: name another run beside it, or it once"
    assert fails("runs", "runs/one", "runs/one") == said
    assert fails("runs", "runs/one", "./runs/one/") == said
    assert fails("runs", "runs", "out=page") == (
        "out=page is for the page of two runs or more: name them, or leave out= away"
    )
    assert not Path("page").exists()


def test_the_names_and_defaults_of_before_are_no_difference(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved: dict[str, Any] = json.loads((runs / "one" / "config.json").read_text())
    saved["optim"]["decay"] = saved["optim"].pop("schedule")
    for group, key in (("optim", "decay_share"), ("train", "probe"), ("model", "pack")):
        del saved[group][key]
    del saved["init"]
    shutil.copytree(runs / "one", runs / "old")
    (runs / "old" / "config.json").write_text(json.dumps(saved))
    shutil.rmtree(runs / "two")
    assert main(["runs"]) == 0
    assert "What differs" not in capsys.readouterr().out


def test_a_folder_without_runs_and_keys_are_refused(fails: Callable[..., str]) -> None:
    assert fails("runs") == "runs: No such file or directory; name the folder that holds your runs, or a run"
    Path("runs").mkdir()
    assert fails("runs") == "runs holds no run; name the folder that holds your runs, or a run"
    assert fails("runs", "runs", "elsewhere") == "runs is not a run folder"
    assert fails("runs", "optim.lr=1") == "nepa runs only reads: optim.lr can't be set; see nepa runs --help"


def test_a_page_does_not_go_into_a_run(runs: Path, fails: Callable[..., str]) -> None:
    assert fails("runs", "runs/one", "runs/two", "out=runs/one").startswith(
        "out=runs/one is a run; name another folder"
    )
    assert not list((runs / "one").glob("*.png"))


def test_a_setting_that_was_changed_midway_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((runs / "one" / "summary.json").read_text())
    summary["changes"] = [{"step": 8, "changed": {"optim.lr": [0.25, 0.5], "train.length.steps": [8, 12]}}, {"step": 9}]
    (runs / "one" / "summary.json").write_text(json.dumps(summary))
    said = "runs/one was trained with optim.lr=0.25, train.length.steps=8 up to step 8"
    assert main(["runs"]) == 0
    assert f"  {said}\n" in capsys.readouterr().out
    assert main(["runs", "runs/one", "runs/two", "out=page"]) == 0
    assert said in Path("page/index.html").read_text()
