"""Fine-tuning over folds: one command trains each, goes on where it stopped, and says mean and spread."""

import json
import statistics
from pathlib import Path

import pytest

from modalities.audio import Audio
from nepa_core.runtime.config import override
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.optim import Duration
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import FinetuneConfig
from recipes.presets import short, small
from recipes.report.summaries import FinetuneSummary, FoldsSummary
from recipes.training import folds
from tests.sounds import write_esc50
from tests.summaries import check_summary


def recipe() -> FinetuneConfig:
    """Two steps of a tiny network on ESC-50 in the working folder."""
    data = Audio(source="esc50", root="esc50", seconds=0.3, sample_rate=8000, bands=16, patch=(8, 8), in_memory=True)
    network = {"model.dim": 16, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 16}
    schedule = {"train.length": Duration(steps=2), "train.batch": 8, "train.evaluate": 2, "train.checkpoint": 1}
    return override(short(small(data)), network | schedule)


NAME = f"{__name__}:recipe"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_esc50(tmp_path / "esc50")
    monkeypatch.chdir(tmp_path)


def test_every_fold_is_a_run_and_one_report_stands_over_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", NAME, "folds=all", "out=run"]) == 0
    whole = check_summary(Path("run/summary.json"), FoldsSummary)
    assert whole["folds"] == list("12345")
    assert whole["samples"] == [4] * 5
    own = [check_summary(Path(f"run/fold-{fold}/summary.json"), FinetuneSummary) for fold in whole["folds"]]
    for key in ("accuracy", "accuracy_ema", "held_out_loss"):
        values = [each[key] for each in own]
        assert whole["figures"][key] == {
            "values": values,
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values),
        }
    held = [json.loads(Path(f"run/fold-{fold}/config.json").read_text())["data"]["fold"] for fold in "12345"]
    assert held == list("12345")
    said = capsys.readouterr().out
    accuracy = whole["figures"]["accuracy_ema"]
    assert f"averaged weights: {accuracy['mean']:.2%} ± {accuracy['std']:.2%} over 5 folds" in said
    page = Path("run/report/index.html").read_text()
    assert page.count("<tr>") == 8
    assert "±" in page


def test_it_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["finetune", NAME, "folds=1,2", "out=whole"]) == 0
    train, trained = folds.finetune, list[str]()

    def stops(config: FinetuneConfig, run: Run, *args: object, **options: object) -> FinetuneSummary:
        if run.path.name == "fold-2" and "stopped" not in trained:
            trained.append("stopped")
            raise Interrupted("stopped", 143)
        trained.append(run.path.name)
        return train(config, run, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(folds, "finetune", stops)
    assert main(["finetune", NAME, "folds=1,2", "out=run"]) != 0
    first = Path("run/fold-1/summary.json").read_bytes()
    assert not Path("run/summary.json").exists()
    assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 0
    assert Path("run/fold-1/summary.json").read_bytes() == first
    for fold in ("fold-1", "fold-2"):
        assert Path(f"run/{fold}/metrics.jsonl").read_bytes() == Path(f"whole/{fold}/metrics.jsonl").read_bytes()
    before = Path("run/summary.json").read_bytes()
    assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 0
    assert Path("run/summary.json").read_bytes() == before


def test_the_control_of_every_fold_stands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", NAME, "data.fold=1", "out=start"]) == 0
    assert main(["finetune", NAME, "folds=2,3", "init=start", "out=run"]) == 0
    whole = check_summary(Path("run/summary.json"), FoldsSummary)
    for place, fold in enumerate("23"):
        (rival,) = json.loads(Path(f"run/fold-{fold}/summary.json").read_text())["worth"]["beside"]
        assert whole["margins"]["random weights"]["values"][place] == rival["margin"]
    assert "beside random weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["folds=all", "data.fold=2"], "leave data.fold out"),
        (["folds=7"], "folds=7: the folds of the data are 1, 2, 3, 4"),
        (["folds=2"], "hold it out by data.fold=2 instead"),
        (["folds=1,1"], "is given twice"),
        (["folds=all", "out=esc50"], "esc50 exists and holds no folds"),
        (["folds=all", "data.source=folder"], "finds none there"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["finetune", NAME, *words]) == 2
    assert expected in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_the_folder_of_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", NAME, "data.fold=1", "out=run"]) == 0
    assert main(["finetune", NAME, "folds=all", "out=run"]) == 2
    assert "run holds a run; name another folder for the runs of folds= with out=DIR" in capsys.readouterr().err
