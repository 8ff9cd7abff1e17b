"""python -m benchmarks.gpu: what fails costs its own row, what is done stays, and all stages run at toy size."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import commands, gpu, measures, running
from benchmarks.markdown import cell, page
from benchmarks.rows import Kept, Machine, Row, Stage, StageFile
from benchmarks.running import clock, key_of, left_to_do, run_rows
from benchmarks.stages import LIMIT, NOISE, REAL, TOY, find_cifar10, find_folders, stages
from nepa_core.runtime.config import parse_assignments
from nepa_core.runtime.run import Run
from recipes.cli import split_options
from recipes.comparison.ablate import AblateOptions
from recipes.readout.probing import ProbeOptions
from recipes.training.resizing import ResizeOptions
from recipes.training.workload import read_trained
from tests.conftest import ROOT
from tests.pictures import encoded, picture, write_tree

MACHINE: Machine = {"device": "a card", "memory": 80.0, "cores": 16, "versions": {"torch": "2", "python": "3"}}


def row(name: str, work: str, *words: str, seconds: float = 60.0) -> Row:
    return Row(name, (f"tests.benchmarks.work:{work}", *words), seconds)


def measured(rows: list[Row], folder: Path, seconds: float = 60.0) -> dict[str, Kept]:
    found: dict[str, Kept] = {}
    with (folder / "log").open("a") as log:
        run_rows(rows, clock(seconds), log, os.environ, lambda kept: found.update({kept["name"]: kept}))
    return found


def test_what_fails_dies_or_hangs_costs_its_own_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "START", 0.0)
    file = str(tmp_path / "counted")
    rows = [
        row("first", "count", file, "1", "2"),
        row("fails", "fail", "in two\nlines"),
        row("overflows", "overflow"),
        row("fails in part", "fail_in_part"),
        row("lacks a package", "lack"),
        row("dies", "die"),
        row("hangs", "hang", seconds=1.0),
        row("last", "count", file, "3"),
        row("no such work", "nothing"),
        Row("no data", ("absent", "no data: looked for pictures"), 60.0),
    ]
    found = measured(rows, tmp_path)
    assert {name: kept["status"] for name, kept in found.items()} == {
        "first": "done",
        "fails": "failed",
        "overflows": "out of memory",
        "fails in part": "failed",
        "lacks a package": "failed",
        "dies": "failed",
        "hangs": "not finished",
        "last": "done",
        "no such work": "failed",
        "no data": "no data",
    }
    assert found["first"]["figures"] == {"figure": [1.0, 2.0]}
    assert found["fails in part"]["figures"] == {"passed": [7.0], "failed": [1.0]}
    assert found["fails"]["error"] == "ValueError: in two lines"
    assert found["lacks a package"]["error"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert found["hangs"]["error"] == "stopped when its 1 s were over"
    assert found["hangs"]["seconds"] >= 1.0
    assert found["dies"]["error"] == "its process ended with status 3, see the log"
    assert "in two" in (tmp_path / "log").read_text()


def test_rows_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    found = measured([row("first", "count", "unused"), row("second", "hang")], tmp_path, seconds=0.0)
    assert [(kept["status"], kept["error"]) for kept in found.values()] == 2 * [
        ("not finished", "no time was left for it")
    ]


def run(stage: Stage, folder: Path, seconds: float = 60.0) -> dict[str, Kept]:
    """A stage as the command runs it; its rows by name."""
    file = folder / "stage.json"
    gpu.run_stage(stage, file, MACHINE, "python -m benchmarks.gpu", clock(seconds), os.environ)
    content: StageFile = json.loads(file.read_text())
    return {kept["name"]: kept for kept in content["rows"]}


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    """What is done, or did not fit the memory, stays; what failed or found no time is tried again."""
    file = tmp_path / "counted"
    done, fails = row("done", "count", str(file), "1"), row("fails", "fail", "once")
    stage = Stage("made", "Made", (fails, row("overflows", "overflow"), done))
    assert run(stage, tmp_path, seconds=0.0)["done"]["status"] == "not finished"
    first, second = run(stage, tmp_path), run(stage, tmp_path)
    assert first["done"] == second["done"]
    assert first["overflows"] == second["overflows"]
    assert second["fails"]["error"] == "ValueError: once"
    assert file.read_text() == "once\n"
    assert (tmp_path / "work/logs/made.log").read_text().count("--- fails") == 2
    assert [each.name for each in left_to_do(stage, list(second.values()))] == ["fails"]


def test_figures_of_another_device_or_other_arguments_are_not_taken(tmp_path: Path) -> None:
    stage = Stage("made", "Made", (row("a", "count", str(tmp_path / "counted"), "1"),))
    other = stage._replace(rows=(row("a", "count", str(tmp_path / "counted"), "2"),))
    keys = {key_of(stage, MACHINE), key_of(other, MACHINE), key_of(stage, {**MACHINE, "device": "another"})}
    assert len(keys) == 3
    assert run(stage, tmp_path)["a"]["figures"] == {"figure": [1.0]}
    assert run(other, tmp_path)["a"]["figures"] == {"figure": [2.0]}


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text('{"key": ')
    stage = Stage("made", "Made", (row("a", "count", str(tmp_path / "counted"), "1"),))
    assert run(stage, tmp_path)["a"]["status"] == "done"


def test_ctrl_c_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = running._wait

    def interrupted(process: Any, result: Path, each: Row, *rest: Any) -> Kept:
        if each.name == "second":
            raise KeyboardInterrupt
        return wait(process, result, each, *rest)

    monkeypatch.setattr(running, "_wait", interrupted)
    stage = Stage("made", "Made", (row("first", "count", str(tmp_path / "counted"), "1"), row("second", "hang")))
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path)
    rows = json.loads((tmp_path / "stage.json").read_text())["rows"]
    assert [(kept["name"], kept["status"]) for kept in rows] == [("first", "done"), ("second", "not finished")]


@pytest.mark.slow
def test_a_training_run_that_is_stopped_has_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("nepa", "pretrain", "recipes.vision:digits", "train.checkpoint=100000", "train.log=1", f"out={out}")
    long, short = (Row("run", (*words, f"train.length.steps={steps}"), 300.0) for steps in (100000, 3))
    found: list[Kept] = []
    lines = out / "metrics.jsonl"

    def left() -> float:
        return 0.0 if lines.exists() and len(lines.read_text().splitlines()) > 5 else 60.0

    with (tmp_path / "log").open("a") as log:
        run_rows([long], left, log, os.environ, found.append)
    assert found[0]["status"] == "not finished"
    assert len(list(Run(out).checkpoints.iterdir())) == 1
    assert measured([short], tmp_path)["run"]["status"] == "failed", "a run is lengthened, never shortened"


# ------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "base,fast"], "--stages=fast: there is no such stage; name some of tests, base"),
        (["--stages", ","], "--stages= names no stage"),
        (["--data", "nowhere"], "--data=nowhere: there is no such folder"),
        (["--minutes", "0"], "--minutes=0: give more than 0"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def every_stage(tmp_path: Path) -> dict[str, Stage]:
    files = {
        f"{name}/{split}/{kind}/0.jpg": encoded(picture(0, 64, 64), "jpeg")
        for name in ("cifar10", "small", "large")
        for split in ("train", "val")
        for kind in "ab"
    }
    large = {name: encoded(picture(0, 320, 240), "jpeg") for name in files if name.startswith("large")}
    write_tree(tmp_path / "data", files | large)
    return stages(REAL, data=tmp_path / "data", work=tmp_path / "work", seconds=3600.0)


def configured(words: tuple[str, ...]) -> Iterator[object]:
    """The config, or the options, that the words of a row make."""
    work, *rest = words
    if work in ("fit", "loop", "load", "decode"):
        yield measures.read(rest)
    elif work == "step":
        assert rest[0] in measures.FORMS
        yield measures.read(rest[1:])
    elif work == "train" or (work, rest[0]) == ("nepa", "pretrain"):
        yield read_trained(rest[1], parse_assignments(word for word in rest[2:] if not word.startswith("out=")))
    elif work == "nepa":
        kinds = {"probe": ProbeOptions, "ablate": AblateOptions, "resize": ResizeOptions}
        _, changes = split_options(kinds[rest[0]], rest[2:])
        yield None if rest[0] == "probe" else read_trained(rest[1], changes)


def test_the_rows_for_a_gpu_are_of_keys_that_exist(tmp_path: Path) -> None:
    """They run nowhere here: the dry run has others."""
    found = every_stage(tmp_path)
    assert tuple(found) == gpu.NAMES
    for stage in found.values():
        names = [each.name for each in stage.rows]
        assert len(set(names)) == len(names)
        assert all(each.seconds <= LIMIT for each in stage.rows)
    made = [each for stage in found.values() for row in stage.rows for each in configured(row.words)]
    assert len(made) > 80
    assert len(found["base"].rows) == len(found["large"].rows) == 3 * 8 + 4


def test_folders_are_found_by_their_layout(tmp_path: Path) -> None:
    found, data = every_stage(tmp_path), tmp_path / "data"
    (data / "empty").mkdir()
    assert find_cifar10(data) == data / "cifar10"
    assert [folder.name for folder in find_folders(data)] == ["large", "small"]
    sizes = {row.name: row.words for row in found["folders"].rows}
    assert "data.size=[64,64]" in sizes["small, ViT-S pre-trained"]
    assert "data.size=[224,224]" in sizes["large, ViT-S pre-trained"]
    assert find_folders(data / "large") == [data / "large"]
    (tmp_path / "other/cifar-10-batches-py").mkdir(parents=True)
    assert find_cifar10(tmp_path / "other") == tmp_path / "other"
    nothing = stages(REAL, data=None, work=tmp_path, seconds=60.0)
    assert [nothing[name].rows[0].words[0] for name in ("cifar10", "ablations", "folders")] == 3 * ["absent"]


# ------------------------------------------------------------------------------------------------- figures


def test_the_page_has_median_and_spread_and_what_is_missing() -> None:
    kept: list[Kept] = [
        {
            "name": "a step",
            "words": [],
            "seeds": [0],
            "status": "done",
            "seconds": 1.0,
            "figures": {"images/s": [2500.4, 2400.0, 2600.2], "peak GiB": [31.25]},
        },
        {"name": "no room", "words": [], "seeds": [1], "status": "out of memory", "seconds": 1.0, "error": "80 | GiB"},
    ]
    file: StageFile = {
        "stage": "base",
        "title": "Steps",
        "key": "0",
        "command": "python -m benchmarks.gpu --data /where/it/is",
        "commit": "abc",
        "machine": MACHINE,
        "rows": kept,
    }
    text = page([file], {"/where/it/is": "DIR"})
    assert text.startswith("# Measured on a GPU\n")
    assert page([file], {}, dry_run=True).startswith("# A dry run on a CPU, at toy size: ")
    assert "| row | images/s | peak GiB |\n|---|---|---|\n| a step | 2,500 (2,400 to 2,600) | 31.25 |" in text
    assert "- no room: **out of memory**: 80 / GiB" in text
    assert (
        "`python -m benchmarks.gpu --data DIR`, commit `abc`, a card, 16 cores, torch 2, python 3, seeds 0, 1." in text
    )


def test_figures_keep_four_digits() -> None:
    assert [cell([value]) for value in (3, 0.12345, 12.345, 123.45, 12345.6)] == [
        "3",
        "0.123",
        "12.35",
        "123.5",
        "12,346",
    ]


def test_counts_of_tests_name_what_failed() -> None:
    text = """<testsuites><testsuite><testcase classname="tests.a" name="x"/>
      <testcase classname="tests.a" name="y"><failure>no</failure></testcase>
      <testcase classname="tests.b" name="z"><skipped/></testcase></testsuite></testsuites>"""
    found = commands.counted(ElementTree.fromstring(text))
    assert found == {"passed": [1], "failed": [1], "skipped": [1], "failed: a y": [1]}


def test_the_wheel_leaves_it_out() -> None:
    """tests/house/test_package.py builds one; this looks at what it is built from."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not any(fnmatch("benchmarks", pattern) or fnmatch("benchmarks.gpu", pattern) for pattern in packages)


@pytest.mark.slow
def test_a_step_of_every_form_and_the_loop_are_timed() -> None:
    words = (*NOISE, *TOY.network, "train.batch=4", "train.micro_batch=4", "train.workers=0", *TOY.timed)
    for form in measures.FORMS:
        found = measures.step(form, "recipes.vision:large_in1k", *words)
        assert len(found["images/s"]) == len(found["% of the ceiling"]) == 2
        assert all(value > 0 for values in found.values() for value in values)
    found = measures.fit("recipes.vision:base_in1k", *words)
    assert 0 <= found["waits for data, %"][0] <= 100
    assert found["images/s"][0] > 0


@pytest.mark.slow
def test_the_dry_run_runs_all_stages(tmp_path: Path) -> None:
    """Every row is done but those that want a GPU."""
    start = cpu_of("-c", "import benchmarks.worker, recipes.vision")[1]
    said, took = cpu_of("-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path))
    files = {file.name.rpartition("-")[0]: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert set(files) == set(gpu.NAMES), said
    rows: list[Kept] = [kept for file in files.values() for kept in file["rows"]]
    wrong = {kept["name"]: kept.get("error") for kept in rows if kept["status"] != "done"}
    assert set(wrong.values()) == {
        "model.attention=xformers runs on CUDA only; use model.attention=sdpa here",
        "data.decode_on=gpu decodes by nvJPEG on a CUDA device, and there is none here; leave it out, or give "
        "data.decode_on=cpu",
    }, wrong
    assert len(rows) >= 40
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {file['title']}" in text for file in files.values())
    assert text.startswith("# A dry run on a CPU")
    assert str(tmp_path) not in text
    assert took < 95 * start, (
        "three minutes on a core where an import of the package takes 1.9 seconds; 74 were measured"
    )


def cpu_of(*words: str) -> tuple[str, float]:
    """What python with these words says, and the seconds of CPU that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    said = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return said, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
