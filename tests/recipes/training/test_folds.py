"""Fine-tuning over folds: one command trains each, goes on where it stopped, and says mean and spread."""

import json
import os
import re
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from modalities.audio import Audio
from nepa_core.runtime.config import override
from nepa_core.runtime.fit import Interrupted
from nepa_core.runtime.optim import Duration
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import FinetuneConfig
from recipes.presets import short, small
from recipes.report.folds import answer, rows
from recipes.report.summaries import FinetuneSummary, FoldSpread, FoldsSummary
from recipes.training import finetuning, folds
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
    assert f"averaged weights: {100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f} % over 5 folds" in said
    finished(Path("run"), "12345")


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


@pytest.mark.slow
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


def finished(run: Path, folds: str) -> FoldsSummary:
    """The summary of a folder of folds, and that its page has a row and a link for each of them."""
    whole = check_summary(run / "summary.json", FoldsSummary)
    assert whole["folds"] == list(folds)
    page = (run / "report/index.html").read_text()
    assert page.count("<tr>") == len(folds) + 3
    links = re.findall('href="([^"]+)"', page)
    assert links == [f"../fold-{fold}/report/index.html" for fold in folds]
    assert all((run / "report" / link).is_file() for link in links)
    return whole


def test_some_folds_in_a_folder_of_more_are_shown_with_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", NAME, "folds=1,4", "out=run"]) == 0
    finished(Path("run"), "14")
    assert main(["finetune", NAME, "folds=2,3", "out=run"]) == 0
    before = finished(Path("run"), "1234")
    capsys.readouterr()
    assert main(["finetune", NAME, "folds=3,4", "out=run"]) == 0
    assert finished(Path("run"), "1234") == before
    assert "over 4 folds" in capsys.readouterr().out
    kept = Path("run/summary.json").read_bytes()
    assert main(["finetune", NAME, "folds=3,5", "out=run", "optim.lr=0.5"]) == 2
    assert "run/fold-1 holds a run with another config: optim.lr" in capsys.readouterr().err
    assert Path("run/summary.json").read_bytes() == kept
    assert not Path("run/fold-5").exists()


@pytest.mark.slow
def test_what_some_folds_stand_beside_and_others_do_not_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", NAME, "data.fold=1", "out=start"]) == 0
    assert main(["finetune", NAME, "folds=2,3", "init=start", "out=run"]) == 0
    assert main(["finetune", NAME, "folds=1,4", "init=start", "out=run", "control=false"]) == 0
    whole = finished(Path("run"), "1234")
    assert whole["margins"] == {}
    assert whole["lacking"] == {"random weights": ["1", "4"]}
    assert "No margin over random weights is shown, as folds 1, 4 have none." in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_at_the_end_of_a_fold_begins_no_other(
    how: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = finetuning.raw_and_averaged

    def stopped(*given: Any) -> Any:
        os.kill(os.getpid(), how)
        return measured(*given)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "raw_and_averaged", stopped)
        assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 128 + how
    assert "nepa: fold 1 held out: stopped after the last of 2 steps" in capsys.readouterr().err
    assert [path.name for path in Path("run").glob("[!.]*")] == ["fold-1"]
    assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 0
    assert main(["finetune", NAME, "folds=1,2", "out=whole"]) == 0
    for fold in ("fold-1", "fold-2"):
        assert Path(f"run/{fold}/metrics.jsonl").read_bytes() == Path(f"whole/{fold}/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("where", ["recipes.training.folds.report", "recipes.training.finetuning.report"])
def test_ctrl_c_between_two_fits_is_one_line(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the report of a fold and in that over folds; the same command ends what is left."""
    with monkeypatch.context() as patch:
        patch.setattr(where, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("nepa: stopped; finished parts are kept, and the same command goes on")
    assert "Traceback" not in said
    assert not Path("run/summary.json").exists()
    assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 0
    finished(Path("run"), "12")


def test_a_class_that_a_later_fold_lacks_is_found_before_any_fold_trains(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["path,fold,label"]
    for path in sorted(Path("esc50/audio").iterdir()):  # FOLD-10TAKE-A-CLASS.wav
        fold, take, _, kind = path.stem.split("-")
        lines.append(f"{path},{fold},{'odd' if take.endswith('1') and fold != '5' else kind}")
    Path("clips.csv").write_text("\n".join(lines) + "\n")
    words = ["data.source=folder", "data.root=clips.csv", "out=run"]
    for asked in ("all", "4,5"):
        assert main(["finetune", NAME, *words, f"folds={asked}"]) == 2
        said = capsys.readouterr().err
        assert "nepa: fold 5 held out: data.root=clips.csv: both splits need the same classes; only one has odd" in said
        assert not Path("run").exists()


def test_a_class_of_one_fold_alone_is_found_where_the_table_of_the_set_names_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Path("esc50").rename("odd50") / "meta" / "esc50.csv"  # what is read of a root is kept
    head, *rows = [line.split(",") for line in table.read_text().splitlines()]
    column, fold, target = (head.index(name) for name in ("category", "fold", "target"))
    rows[[row[fold] for row in rows].index("3")][column] = "odd"
    rows[[row[column] for row in rows].index("odd")][target] = "2"
    table.write_text("\n".join(",".join(row) for row in [head, *rows]) + "\n")
    assert main(["finetune", NAME, "data.root=odd50", "folds=all", "out=run"]) == 2
    assert "no training sample has the class odd where fold 3 is held out" in capsys.readouterr().err
    assert not Path("run").exists()
    assert main(["finetune", NAME, "data.root=odd50", "data.fold=3", "out=run"]) == 0
    assert "no training sample has odd: 1 of 3 classes can't be learned" in capsys.readouterr().err


def test_names_of_folds_are_in_any_script_and_one_without_anything_to_rank_is_found_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clips = sorted(Path("esc50/audio").iterdir())

    def asked(file: str, **labels: list[str]) -> list[str]:  # another file each time: what is read of one is kept
        rows = [
            f"{clip},{list(labels)[k % 2]},{labels[list(labels)[k % 2]][k // 2 % 3]}" for k, clip in enumerate(clips)
        ]
        Path(file).write_text("\n".join(["path,fold,labels", *rows]) + "\n")
        return ["finetune", NAME, "data.source=folder", f"data.root={file}", "folds=all", "out=run"]

    assert main(asked("alike.csv", ä=["0", "1", "0;1"], б=["0;1", "0;1", "0;1"])) == 2
    said = capsys.readouterr().err
    assert "nepa: fold б held out: no class is of some held-out samples and not of others" in said
    assert not Path("run").exists()
    assert main(asked("clips.csv", ä=["0", "1", "0;1"], б=["0;1", "1", "0"])) == 0
    assert {path.name for path in Path("run").glob("fold-*")} == {"fold-ä", "fold-б"}


class Own(Audio):
    """An adapter that counts its classes in what it trains on."""

    def classes(self) -> tuple[str, ...] | None:
        return ("0", "1") if self.fold != "3" else ("0",)


def own() -> FinetuneConfig:
    whole = recipe()
    return whole.model_copy(update={"data": Own(**whole.data.model_dump())})


def test_classes_that_differ_among_folds_are_found_before_any_fold_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", f"{__name__}:own", "folds=all", "out=run"]) == 2
    assert "no training sample has the class 1 where fold 3 is held out" in capsys.readouterr().err
    assert not Path("run").exists()
    assert main(["finetune", f"{__name__}:recipe", "folds=all", "train.batch=17", "out=run"]) == 2
    assert "fold 1 held out: train.batch=17 is more than the 16 training samples" in capsys.readouterr().err
    assert not Path("run").exists()


def spread_of(*values: float) -> FoldSpread:
    return {"values": list(values), "mean": statistics.fmean(values), "std": statistics.stdev(values)}


def test_a_column_has_one_unit_as_many_digits_and_no_sign_on_its_spread() -> None:
    classes: FoldsSummary = {
        "init": "start",
        "folds": ["1", "2"],
        "samples": [1000, 20],
        "unreadable_held_out": 0,
        "figures": {"accuracy": spread_of(0.8, 0.9), "accuracy_ema": spread_of(0.85, 0.95)},
        "margins": {"random weights": spread_of(0.0, -0.00001)},
        "metric": "accuracy",
    }
    assert rows(classes) == [
        ["fold", "samples", "top-1, %", "top-1, averaged weights, %", "more than random weights, points"],
        ["1", "1,000", "80.00", "85.00", "+0.00"],
        ["2", "20", "90.00", "95.00", "+0.00"],
        ["mean", "", "85.00", "90.00", "+0.00"],
        ["spread", "", "7.07", "7.07", "0.00"],
    ]
    assert answer(classes) == (
        "top-1, averaged weights: 90.00 ± 7.07 % over 2 folds, mean and spread; "
        "+0.00 ± 0.00 points beside random weights."
    )
    numbers: FoldsSummary = classes | {
        "figures": {"mse": spread_of(0.012345, 1.5), "mae": spread_of(123.4, 8.0), "r2": spread_of(0.5, -0.25)},
        "margins": {"random weights": spread_of(0.125, -0.5)},
        "metric": "r2",
    }
    assert rows(numbers) == [
        ["fold", "samples", "MSE", "MAE", "R2", "more than random weights"],
        ["1", "1,000", "0.012", "123.4", "0.500", "+0.125"],
        ["2", "20", "1.500", "8.0", "-0.250", "-0.500"],
        ["mean", "", "0.756", "65.7", "0.125", "-0.188"],
        ["spread", "", "1.052", "81.6", "0.530", "0.442"],
    ]


def test_a_folder_of_folds_is_no_run_and_its_runs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", NAME, "folds=1,2", "out=run"]) == 0
    commands = [[task, "run"] for task in ("finetune", "pretrain", "probe", "inspect", "evaluate", "embed", "import")]
    commands += [["export", "run", "out=there"], ["forecast", "run"], ["finetune", NAME, "data.fold=1", "init=run"]]
    commands += [["runs", "run", "run/fold-1"]]
    capsys.readouterr()
    for words in commands:
        assert main(words) == 2, words
        said = capsys.readouterr().err.splitlines()[-1]
        assert (
            said == "nepa: run holds the runs fold-1, fold-2 and is none itself: name one of them, such as run/fold-1"
        )
    assert main(["evaluate", "run/fold-1"]) == 0
