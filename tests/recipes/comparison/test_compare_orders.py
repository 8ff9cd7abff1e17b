"""nepa orders: the answer, the page as a browser shows it, and work that survives whatever stops it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities.orders import grid_order
from nepa_core.basics import Batch, UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.run import Run
from nepa_core.samples import Some
from nepa_core.tokens import Tokens
from recipes.cli import main, split_options
from recipes.comparison import engine as compare
from recipes.comparison import measures, orders
from recipes.comparison.measures import few_labels
from recipes.comparison.orders import MeasureOptions, ordered
from recipes.comparison.orders import OrdersOptions as Options
from recipes.configs import PretrainConfig
from recipes.networks.goals import Classification
from recipes.report.orders import accuracy_figure, head_curves, position_figure, seen_figures
from recipes.report.summaries import OrdersSummary, RunMeasures
from recipes.statistics import protocol
from recipes.statistics.credits import pack_credits
from recipes.statistics.maps import grid_positions, neighbour_share
from recipes.training.pretraining import load_pretrained
from recipes.vision import digits_2x2
from tests import tiny
from tests.conftest import ROOT
from tests.recipes.readout.test_forecast import recipe as series_recipe
from tests.summaries import check_summary
from tests.tiny import CPU, Waves

pytestmark = pytest.mark.pictures

PARTS = ("answer", "accuracy", "paths", "prediction", "attention", "tests", "commands")
PICTURES = (
    *("accuracy", "finetuned_2", "paths", "maps", "seen", "position", "heads_distance", "heads_entropy", "distance"),
    *("rank", "cross"),
)


def small_digits() -> PretrainConfig:
    """Digits under a network of width 16, for three steps."""
    return override(
        digits_2x2(),
        {
            "model.dim": 16, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 16, "train.length.steps": 3,
            "train.batch": 16, "verdict.fit_samples": 64, "verdict.test_samples": 64, "verdict.health_samples": 64,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two orders, one seed, made in this process."""
    out = tmp_path_factory.mktemp("orders")

    def share(jobs: list[compare.Job], *, workers: int) -> None:
        compare.work_through(jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "share", share)
        patch.setattr(orders, "share", share)
        patch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 200, "test_samples": 64}))
        words = [
            "orders",
            "tests.recipes.comparison.test_compare_orders:small_digits",
            "orders=[raster,random:7]",
            "seeds=0",
        ]
        assert main([*words, "labels=2", "finetune_steps=2", f"out={out}"]) == 0
    return out


def test_the_summary_has_accuracies_of_every_order(compared: Path) -> None:
    summary = check_summary(compared / "summary.json", OrdersSummary)
    for file in compared.glob("runs/*/orders-*.json"):
        check_summary(file, RunMeasures)
    assert set(summary["orders"]) == {"raster", "random:7"} == set(summary["ranking"])
    for figures in summary["orders"].values():
        assert len(figures["accuracies"]) == 1
        assert figures["mean"] == figures["accuracies"][0] == figures["probe"]["mean"]
        assert figures["ci95"] is None
        assert {"finetuned_2", "finetuned_2_random", "probe_random", "lift_linear", "retrieval_top1"} <= set(figures)
        assert torch.tensor(figures["attention"]["on_neighbours"]).shape == (1, 2)  # layers x heads
    assert summary["orders"]["raster"]["order"]["step"] < summary["orders"]["random:7"]["order"]["step"]
    assert torch.tensor(summary["cross"]["accuracy"]).shape == (2, 2)
    assert "give three or more" in summary["verdict"][0]
    assert all(Path(folders[0]).is_dir() for folders in summary["runs"].values())
    compare.check_folder(compared, "orders", "tests.recipes.comparison.test_compare_orders:small_digits")
    with pytest.raises(
        UserError, match=r"is of `nepa orders tests\.recipes\.comparison\.test_compare_orders:small_digits`"
    ):
        compare.check_folder(compared, "objectives", "tests.recipes.comparison.test_compare_orders:small_digits")


def test_runs_and_pictures_lie_where_they_are_told_to(compared: Path) -> None:
    assert {folder.name.rsplit("-", 1)[0] for folder in (compared / "runs").iterdir()} == {
        "raster-seed0",
        "random-7-seed0",
    }
    for name in PICTURES:
        assert (compared / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (compared / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "not comparable" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"


def test_random_weights_that_were_measured_before_give_the_same_row(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(compared.glob("random/seed0-*.json"))) == 2
    (row,) = compared.glob("runs/raster-*/orders-*.json")
    monkeypatch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 200, "test_samples": 64}))
    monkeypatch.setattr(orders, "control_name", lambda *_: "none.json")
    run = Run(row.parent)
    again = orders.measure(*load_pretrained(run, CPU), run, MeasureOptions(labels=(2,), finetune_steps=2))
    assert json.dumps(again, indent=1) + "\n" == row.read_text()


def test_of_one_seed_it_is_said_that_the_spread_is_not_known(compared: Path) -> None:
    told = json.loads((compared / "summary.json").read_text())["foresight"]
    assert (told["spread"], told["sees"], told["needs"]) == (None, None, None)
    assert told["words"].startswith("With one seed of 2 orders the spread over seeds is not known")
    assert told["words"] in (compared / "report" / "index.html").read_text()


def made_up(config: PretrainConfig, care: Any) -> RunMeasures:
    """Random weights of which four of ten test samples are right, by seed and order."""
    order = config.data.patch_order  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(100 * config.train.seed + len(order))
    credits = (torch.rand(50, generator=draw) < 0.4).float()
    figures = {"probe": measures.Figure(float(credits.mean()), pack_credits(credits))}
    return measures.as_row(figures | {"probe_final": figures["probe"]}) | {"probe_row": "embedding", "settings": {}}


def test_how_many_seeds_see_two_points_is_said_before_the_first_pre_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at the first pre-training; then again, with one seed more, and with one alone."""
    measured: list[str] = []

    def share(jobs: list[compare.Job], *, workers: int) -> None:
        if any("random weights" not in job.name for job in jobs):
            raise KeyboardInterrupt
        measured.extend(job.name for job in jobs if not job.done)
        compare.work_through(jobs)

    def told(*seeds: int) -> str:
        options = Options(orders=("raster", "snake", "column"), seeds=seeds, labels=(2,))
        with pytest.raises(KeyboardInterrupt):
            orders.orders(small_digits(), options, tmp_path)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setattr(compare, "share", share)
    monkeypatch.setattr(orders, "untrained", made_up)
    first = told(0, 1, 2)
    assert re.match(r"3 seeds see a difference of \d+\.\d points or more between two orders in the probe \(80 %", first)
    assert first.endswith("From the spread of random weights; that of trained networks may be another.")
    assert len(measured) == 9
    assert measured[0] == "random weights under raster, seed 0"
    assert told(0, 1, 2) == first
    assert len(measured) == 9, "random weights are measured once"
    assert told(0, 1, 2, 3).startswith("4 seeds see a difference of ")
    assert len(measured) == 12
    declared = protocol.read(tmp_path)
    assert declared is not None
    assert [look.seeds for look in declared.looks] == [(0, 1, 2, 3)], "before a run is finished more seeds are no look"
    assert told(0).startswith("With one seed of 3 orders")
    assert told(0, 1).startswith("2 seeds see no difference between orders in the probe")


def test_of_runs_that_are_done_random_weights_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of comparisons made before random weights were measured first."""
    variant = orders.variant_of(small_digits(), "raster", None)
    measured = compare.Measure("orders", orders.measure, MeasureOptions(labels=(2,), finetune_steps=1))
    row = compare.pair(variant, 0, measured, tmp_path).result
    row.parent.mkdir(parents=True)
    row.write_text(json.dumps({"probe_random": 0.25}))
    assert orders.random_row(variant, 0, measured, tmp_path)["probe_random"] == 0.25
    asked: list[str] = []
    monkeypatch.setattr(compare, "share", lambda jobs, *, workers: asked.extend(job.name for job in jobs))
    monkeypatch.setattr(orders, "random_row", lambda *_: {"probe_random": 0.25})
    options = Options(orders=("raster",), seeds=(0, 1), labels=(2,), finetune_steps=1)
    with pytest.raises(AssertionError):  # nothing was run
        orders.orders(small_digits(), options, tmp_path)
    assert asked == ["random weights under raster, seed 1", "raster, seed 0", "raster, seed 1"]


def test_runs_measured_before_there_were_curves_still_make_a_page() -> None:
    shares = {"order": {"seen": [0.0, 0.5, 1.0]}}
    assert [figure.name for figure in seen_figures({"raster": [shares]})] == ["seen.png"]
    assert seen_figures({"raster": [shares], "kept": [{"order": {"step": 1.0}}]}) == []


def test_every_head_of_every_seed_is_drawn() -> None:
    attention = {"entropy": [[1.0, 2.0], [3.0, 4.0]], "uniform": [9.0, 5.0, 0.0, 0.0]}  # layers x heads
    later = attention | {"entropy": [[3.0, 2.0], [1.0, 0.0]]}
    dots, mean, equal = head_curves([{"attention": attention}, {"attention": later}], "entropy")
    assert list(zip(dots.x, dots.y, strict=True)) == [(1, 1), (1, 2), (1, 3), (1, 2), (2, 3), (2, 4), (2, 1), (2, 0)]
    assert (mean.x, mean.y) == ([1, 2], [2.0, 2.0])
    assert equal.y == [5.0, 5.0]


@pytest.mark.browser
def test_a_browser_shows_the_answer_on_its_first_screen(compared: Path, browse: Callable[[Path], str]) -> None:
    shown = browse(compared / "report" / "index.html")
    assert f'data-images="{len(PICTURES)}"' in shown, "a picture did not load"
    assert [part for part in (*PARTS, "cross") if f'id="{part}"' not in shown] == []


# ----------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    "words", [["orders=raster,random:3", "seeds=0,2"], ["orders=[raster,random:3]", "seeds=[0,2]"]]
)
def test_lists_are_read_as_a_shell_leaves_them(words: list[str]) -> None:
    options, rest = split_options(Options, [*words, "labels=10,all", "optim.lr=1"])
    assert options.orders == ("raster", "random:3")
    assert options.seeds == (0, 2)
    assert options.labels == (10, None)
    assert rest == {"optim.lr": 1}


def test_an_order_is_a_name_a_seed_or_a_function() -> None:
    assert ordered(digits_2x2(), "hilbert", None).data.patch_order == "hilbert"  # type: ignore[attr-defined]
    drawn = ordered(digits_2x2(), "random:3", None).data
    assert (drawn.patch_order, drawn.order_seed) == ("random", 3)  # type: ignore[attr-defined]
    own = ordered(digits_2x2(), "tests.recipes.comparison.test_compare_orders:backwards", None).data
    assert own.patch_order == "tests.recipes.comparison.test_compare_orders:backwards"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="hilbrt"):
        ordered(digits_2x2(), "hilbrt", None)


@pytest.mark.parametrize(
    "base", ["hilbert", "random_annealed", "tests.recipes.comparison.test_compare_orders:backwards"]
)
def test_a_seed_is_for_orders_that_hang_on_one(base: str) -> None:
    with pytest.raises(UserError, match=f"^orders={base}:2: {base} depends on no seed .*; name {base}$"):
        ordered(digits_2x2(), f"{base}:2", "add")
    for seed in ("x", "-1", ""):
        with pytest.raises(UserError, match=f"^orders=random:{seed}: '{seed}' is no seed, .* such as random:1$"):
            ordered(digits_2x2(), f"random:{seed}", None)
    assert ordered(digits_2x2(), "random_per_sample:2", "add").data.order_seed == 2  # type: ignore[attr-defined]


def test_every_order_is_told_the_same_of_the_next_position() -> None:
    with pytest.raises(UserError, match="needs model"):
        ordered(digits_2x2(), "random_per_sample", None)
    for name in ("random_per_sample", "raster"):
        assert ordered(digits_2x2(), name, "add").model.predict_position == "add"


def backwards(tokens: Any, grid: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(tokens.values.shape[1]).flip(0)


def test_what_can_not_be_compared_is_refused(tiny_recipe: PretrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="Waves takes no"):
        ordered(tiny_recipe, "raster", None)
    few = "data.parts=[0.994,0.003,0.003]"
    assert main(["orders", "recipes.timeseries:demo", "orders=raster,reverse", few]) == 2
    assert "do not fit in the" in capsys.readouterr().err
    assert main(["orders", "tests.recipes.comparison.test_compare_orders:small_digits", "labels=2,2"]) == 2
    assert "2 is given twice" in capsys.readouterr().err


@pytest.mark.slow
def test_a_series_without_targets_is_forecast_under_every_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "share", lambda jobs, *, workers: compare.work_through(jobs))
    monkeypatch.setattr(orders, "share", compare.share)
    config = override(series_recipe(), {"train.length.steps": 2, "data.parts": (600, 240, 240)})
    options = Options(orders=("raster", "reverse"), seeds=(0,), finetune_steps=2, workers=1)
    summary = orders.orders(config, options, tmp_path)
    assert (summary["metric"], summary["labels"]) == ("skill", ["all"])
    for figures in summary["orders"].values():
        assert 0 < figures["mean"] < 1, "a ridge forecast beats repeating the last value"
        assert figures["finetuned_all"]["values"] != figures["finetuned_all_random"]["values"]
        ranks = figures["layers"]["rank"]
        assert len(ranks) == len(figures["layers"]["probe"]) == config.model.depth + 2
        assert all(1 <= rank <= config.model.dim for rank in ranks)
    assert torch.tensor(summary["cross"]["accuracy"]).shape == (2, 2)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "skill of a forecast (1 - MSE / MSE of repeating the last value). A point is 0.01." in page


def test_an_order_in_a_file_is_known_by_what_the_file_holds(tmp_path: Path) -> None:
    def key(name: str) -> str:
        return compare.run_folder(orders.variant_of(digits_2x2(), name, None), 0, tmp_path).name.rpartition("-")[2]

    path = tmp_path / "path.txt"
    found = []
    for order in (range(16), range(15, -1, -1), range(16)):
        path.write_text(" ".join(map(str, order)))
        found.append(key(str(path)))
    assert found[0] == found[2] != found[1]
    assert key("hilbert") == compare.config_digest(compare.seeded(ordered(digits_2x2(), "hilbert", None), 0))


def test_the_summary_ranks_by_accuracy_and_names_what_is_real() -> None:
    row = {
        "metric": "accuracy", "raw_tokens": 0.9, "probe_row": "layer 1, mean", "finetuned_50": 0.5, "order": {},
        "attention": {}, "layers": {}, "loss_per_position": {}, "collapsed": False,
    }  # fmt: skip
    rows = {
        name: [
            row | {"probe": value + noise, "probe_random": 0.5 - noise, "finetuned_50_random": 0.7 + 0.5 * noise}
            for noise in (0.0, 0.01, 0.02)
        ]
        for name, value in {"low": 0.3, "high": 0.7}.items()
    }
    rows["high"][2]["probe"] += 0.01  # a spread to test by
    summary = orders.summarise(rows, Options(labels=(50,)))
    assert summary["ranking"] == ["high", "low"]
    assert summary["verdict"][0].startswith("In probe accuracy: high > low by 40.3 ± ")
    assert summary["verdict"][1].startswith("In what pre-training adds to the probe of random weights: high > low by")
    assert summary["orders"]["high"]["probe_gain"]["values"] == pytest.approx([0.2, 0.22, 0.25])
    assert "better than random weights in the probe under high." in summary["verdict"][2]
    assert "worse than random weights in the probe under low." in summary["verdict"][2]
    assert summary["verdict"][3].startswith("No difference between orders in fine-tuning on 50 labels a class")
    worse = "worse than random weights in fine-tuning on 50 labels a class under low, high."
    assert worse in summary["verdict"][4], "told also where it speaks against pre-training"


def test_of_one_seed_the_page_says_once_that_nothing_is_told_and_speaks_of_no_interval() -> None:
    row = {
        "metric": "accuracy", "raw_tokens": 0.9, "probe_row": "layer 1, mean", "order": {}, "attention": {},
        "layers": {}, "loss_per_position": {}, "probe": 0.5, "probe_random": 0.4, "finetuned_50": 0.6,
        "finetuned_50_random": 0.5,
    }  # fmt: skip
    for count, once, drawn in ((1, "With one seed", "one seed."), (2, "With 2 seeds", "interval over 2 seeds")):
        rows = {name: [row] * count for name in ("raster", "snake")}
        summary = orders.summarise(rows, Options(labels=(50,), seeds=tuple(range(count))))
        assert sum(sentence.startswith(once) for sentence in summary["verdict"]) == 1
        assert drawn in accuracy_figure(rows, summary).caption


def test_few_labels_are_so_many_of_every_class_and_the_same_for_every_variant() -> None:
    data = digits_2x2().data
    goal = Classification(tuple("0123456789"))
    chosen = few_labels(data.dataset("train"), goal, 3, seed=1)
    labels = [int(chosen[i]["label"]) for i in range(len(chosen))]
    assert sorted(labels) == sorted([*range(10)] * 3)
    assert chosen.indices == few_labels(data.dataset("train"), goal, 3, seed=1).indices
    assert chosen.indices != few_labels(data.dataset("train"), goal, 3, seed=2).indices
    whole = Some(data.dataset("train"), [4, 2])
    assert len(whole) == 2
    assert torch.equal(whole[1]["image"], data.dataset("train")[2]["image"])


def test_attention_on_neighbours_is_that_on_the_eight_around() -> None:
    order = grid_order("random", (3, 3), 1)
    positions = grid_positions((3, 3))[order]
    weights = torch.full((1, 1, 10, 10), 0.1)  # BOS first; the middle token has 8 neighbours, a corner 3, an edge 5
    mask = torch.ones(1, 9, dtype=torch.bool)
    assert neighbour_share(weights, positions)[0, 0] == pytest.approx(0.1 * (8 + 4 * 3 + 4 * 5) / 9)
    only = torch.zeros_like(mask)
    only[0, (order == 4).nonzero()[0, 0]] = True
    assert neighbour_share(weights, positions, only)[0, 0] == pytest.approx(0.8)


def test_what_the_order_is_like_is_told_of_the_samples_that_are_read() -> None:
    straight = orders.measured_order(ordered(digits_2x2(), "snake", None), CPU)
    assert straight["step"] == 1.0
    assert len(straight["seen"]) == 16


class Lone(Waves):
    """Half of the samples have one real token, whose order has no step."""

    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return replace(tokens, mask=(batch["label"] == 0)[:, None] | (torch.arange(self.tokens) < 1))


def test_samples_without_a_step_do_not_shorten_the_steps_of_an_order() -> None:
    recipe = tiny.recipe()
    assert orders.measured_order(recipe.model_copy(update={"data": Lone()}), CPU)["step"] == 1.0


def test_the_loss_at_a_place_without_tokens_is_white(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("recipes.report.orders.strip_plot", lambda strips, **_: drawn.update(strips))
    rows: Any = [{"loss_per_position": {"model": [loss, None]}} for loss in (-0.5, -0.7)]
    position_figure({"raster": rows})
    assert drawn["raster"][0] == pytest.approx(-0.6)
    assert math.isnan(drawn["raster"][1])
    assert MeasureOptions(labels=(None,), finetune_steps=1).labels == (None,)


# ------------------------------------------------------------------------------------------ interruptions

WORDS = ["orders=raster,column", "seeds=0,1", "labels=2", "finetune_steps=2", "cross=false", "workers=2"]
KEYS = ["train.length.steps=60", "train.checkpoint=5", "train.log=5"]


def start(out: Path, **settings: Any) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        "-m",
        "recipes",
        "orders",
        "tests.recipes.comparison.test_compare_orders:small_digits",
        *WORDS,
        *KEYS,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, f"out={out}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
        **settings,
    )  # fmt: skip


def wait_for(pattern: str, count: int, out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while len(list(out.glob(pattern))) < count:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def accuracies(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    return {name: (order["accuracies"], order["finetuned_2"]["values"]) for name, order in summary["orders"].items()}


def assert_nothing_twice(out: Path) -> None:
    runs = list((out / "runs").iterdir())
    assert len(runs) == 4
    for run in runs:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert len(list(run.glob("orders-*.json"))) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_commands_in_one_folder_share_it_and_survive_a_kill(tmp_path: Path) -> None:
    """Two at once; and one that is killed, then stopped by Ctrl-C, then by SIGTERM: the same numbers."""
    team = [start(tmp_path / "shared") for _ in range(2)]
    broken = tmp_path / "broken"
    stops = (
        (signal.SIGKILL, "runs/*/checkpoints/step_*", 1),
        (signal.SIGINT, "runs/*/orders-*.json", 1),
        (signal.SIGTERM, "runs/*/orders-*.json", 2),
    )
    for number, pattern, count in stops:
        process = start(broken, start_new_session=True)
        wait_for(pattern, count, broken, process)
        kept = {file: file.stat().st_mtime_ns for file in broken.glob("runs/*/orders-*.json")}
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            os.kill(process.pid, number)
        told = process.communicate(timeout=600)[1].splitlines()
        assert {file: file.stat().st_mtime_ns for file in kept} == kept
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert told[-1] == "nepa: stopped; finished parts are kept, and the same command goes on from there"
            assert not any("Traceback" in line for line in told)
    assert start(broken).wait(600) == 0
    assert [process.wait(600) for process in team] == [0, 0]
    for out in (broken, tmp_path / "shared"):
        assert_nothing_twice(out)
    assert accuracies(broken) == accuracies(tmp_path / "shared")
