"""Hooks and logging libraries: what they hear, that a run does not depend on them, and what they keep."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nepa_core.runtime import trust
from recipes.cli import main
from tests.nepa_core.runtime.test_distributed import torchrun

TINY = ("tests.tiny:recipe", "verdict.test_samples=16")
heard: list[tuple[str, Any]] = []


def hears(event: str, what: Any) -> None:
    heard.append((event, dict(what) if isinstance(what, dict) else what))
    if event == "log":
        what.clear()  # what it gets is its own


def breaks(event: str, what: Any) -> None:
    raise OSError("the disk\nof the hook")


def leaves(event: str, what: Any) -> None:
    sys.exit(3)


def stops(event: str, what: Any) -> None:
    """Ctrl-C with the line of step 6, after which a checkpoint is written."""
    if event == "log" and what["step"] == 6:
        os.kill(os.getpid(), signal.SIGINT)


def counts(event: str, what: Any) -> None:
    """Leaves its rank for every line in the folder that the command names."""
    if event == "log":
        out = next(word.removeprefix("out=") for word in sys.argv if word.startswith("out="))
        with open(f"{out}/heard.txt", "a") as file:
            file.write(f"{os.environ['RANK']}\n")


def here(*names: str) -> str:
    return "train.hooks=" + ",".join(f"{__name__}:{name}" for name in names)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    heard.clear()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any listener."""
    run = tmp_path_factory.mktemp("plain") / "run"
    assert main(["pretrain", *TINY, f"out={run}", "-q"]) == 0
    return run


def test_hooks_hear_of_every_line_checkpoint_and_the_end_and_change_nothing(
    folder: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *TINY, here("hears", "breaks", "leaves"), "out=run", "-q"]) == 0
    assert [what for event, what in heard if event == "log"] == lines(folder / "run")
    saved = [what for event, what in heard if event == "checkpoint"]
    assert saved == [f"run/checkpoints/step_{step:08d}" for step in (4, 8, 12)]
    assert heard[-1] == ("end", "run")
    assert (folder / "run/metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.hooks=")]
    of = f"train.hooks={__name__}:breaks failed on "
    assert [line for line in said if line.startswith(of)] == [
        f"{of}'{event}', and the run goes on: OSError: the disk of the hook" for event in ("log", "checkpoint", "end")
    ]
    assert sum("leaves failed on" in line for line in said) == 3


def test_hooks_may_change_while_a_run_is_stopped(folder: Path, plain: Path) -> None:
    assert main(["pretrain", *TINY, here("stops"), "out=run", "-q"]) == 130
    assert main(["pretrain", *TINY, here("hears"), "out=run", "-q"]) == 0
    assert ("checkpoint", "run/checkpoints/step_00000008") in heard
    assert (folder / "run/metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


def test_hooks_of_a_stranger_are_not_imported(
    folder: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "lab_hooks.py").write_text("def heard(event, what): pass\n")
    assert main(["pretrain", *TINY, "train.hooks=[lab_hooks:heard]", "out=run", "train.length.steps=1", "-q"]) == 0
    assert main(["embed", "run", "-q"]) == 0  # by its maker
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "of another user"))
    monkeypatch.setattr(trust, "_given", trust.Trust())
    del sys.modules["lab_hooks"]
    assert "it names lab_hooks:heard, code that would be run" in fails("embed", "run", "out=x.npy")
    assert "lab_hooks" not in sys.modules


def test_what_is_wrong_with_them_is_said_before_training(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"{__name__} has no 'herd'; did you mean here?" in fails("pretrain", *TINY, "out=run", here("hears", "herd"))
    assert "is no function of (event, what)" in fails("pretrain", *TINY, "out=run", here("TINY"))
    assert "'tensorboard', 'wandb', 'mlflow' or 'trackio'" in fails("pretrain", *TINY, "out=run", "train.logger=tb")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    said = fails("pretrain", *TINY, "out=run", "train.logger=wandb")
    assert said == "train.logger=wandb needs wandb, not installed here: pip install nepa[wandb], or pip install wandb"
    assert not Path("run").exists()


@pytest.mark.distributed
def test_one_process_of_several_calls_the_hooks(tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = torchrun("recipes", "pretrain", *TINY, here("counts"), f"out={out}", "-q")
    assert found.returncode == 0, found.stderr
    assert (out / "heard.txt").read_text().split() == ["0"] * len(lines(out))


def installed(library: str) -> Any:
    """Skips where a library is not there."""
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"pip install nepa[{library}]")


def stopped_and_ended(library: str, plain: Path, pause: float = 0.0) -> list[dict[str, Any]]:
    """A run in two sittings under a logger, with so many seconds between them; its lines."""
    words = ("pretrain", *TINY, f"train.logger={library}", "out=run", "-q")
    assert main([*words, here("stops")]) == 130
    time.sleep(pause)
    assert main([*words]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    return lines(Path("run"))


def curve(found: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line[key], rel=1e-5)) for line in found if key in line]


CURVES = ("loss", "lr", "effective_rank_embedding")


@installed("tensorboard")
def test_tensorboard_has_the_curves_the_pictures_and_the_card(folder: Path, plain: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = stopped_and_ended("tensorboard", plain)
    events = EventAccumulator("run/tensorboard").Reload()
    for key in CURVES:
        assert [(each.step, each.value) for each in events.Scalars(key)] == curve(found, key)
    assert set(events.Tags()["images"]) == {file.stem for file in Path("run/report").glob("*.png")}
    (card,) = events.Tensors("card/text_summary")
    assert Path("run/report/card.txt").read_text() in card.tensor_proto.string_val[0].decode()


@pytest.mark.slow
@installed("mlflow")
def test_mlflow_goes_on_in_the_same_run(folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    store = f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    found = stopped_and_ended("mlflow", plain)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("nepa").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.003"
    for key in CURVES:
        points = {each.step: each.value for each in client.get_metric_history(run.info.run_id, key)}
        assert list(points.items()) == curve(found, key)
    files = {Path(each.path).name for each in client.list_artifacts(run.info.run_id, "report")}
    assert files == {"card.txt", *(file.name for file in Path("run/report").glob("*.png"))}


@pytest.mark.slow
@installed("wandb")
def test_wandb_writes_offline_under_one_name(folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stopped_and_ended("wandb", plain, pause=1.1)  # the library names its folders by the second
    name = json.loads(Path("run/logger.json").read_text())["wandb"]
    files = sorted(Path("run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    stored = b"".join(file.read_bytes() for file in files)
    for word in (*CURVES, "optim.lr", "NEPA before training"):
        assert word.encode() in stored
    pictures = {file.name.partition("_")[0] for file in Path("run/wandb").rglob("*.png")}
    assert pictures == {file.stem for file in Path("run/report").glob("*.png")}


@pytest.mark.slow
@installed("trackio")
def test_trackio_has_all_in_its_store(folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported, here
    stopped_and_ended("trackio", plain)
    name = json.loads(Path("run/logger.json").read_text())["trackio"]
    with sqlite3.connect(folder / "trackio" / "nepa.db") as store:
        rows = store.execute("select step, metrics from metrics where run_name = ?", (f"run-{name}",)).fetchall()
    points = {step: json.loads(values)["loss"] for step, values in rows if b"grad_norm" in bytes(values)}
    assert list(points.items()) == curve(lines(Path("run")), "loss")
    assert any(b"NEPA before training" in bytes(values) for _, values in rows)
    assert any(b"trackio.image" in bytes(values) for _, values in rows)
