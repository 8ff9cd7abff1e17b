"""Every task of the command runs for a few steps and says what it must."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core.basics import UserError
from nepa_core.contract import check_modality
from nepa_core.runtime.config import load_object, override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.comparison import ablate, orders
from recipes.configs import PretrainConfig
from recipes.objective_names import NAMED
from recipes.presets import short
from recipes.report.summaries import AblateRow, AblateSummary
from recipes.tasks.bench import read_config
from recipes.training import bench
from recipes.training.finetuning import finetune
from recipes.training.pretraining import load_pretrained, pretrain
from recipes.training.starting import build_pretrainer, try_batch
from recipes.training.workload import network
from tests.conftest import ROOT
from tests.pictures import encoded, picture, write_tree
from tests.summaries import check_summary
from tests.tiny import CPU

ALONE = World(0, 1, CPU)
PROMISED = {  # the house plan's list: others read these names
    *("loss", "baseline_copy", "baseline_mean", "baseline_position_mean", "baseline_linear"),
    *("retrieval_top1", "retrieval_top1_copy", "retrieval_top1_linear", "retrieval_top1_untrained"),
    *("effective_rank_embedding", "effective_rank_prediction", "collapsed"),
    *("tokens_per_second", "seconds", "steps", "parameters"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the tiny recipe through the command."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["pretrain", "tests.tiny:recipe", f"out={folder}"]) == 0
    return Run(folder)


@pytest.mark.pictures
def test_pretrain_leaves_a_whole_run_folder(finished: Run) -> None:
    summary = finished.summary()
    assert summary is not None
    assert set(summary) >= PROMISED
    assert summary["steps"] == 12
    for name in ("rank.png", "spread.png", "learning.png", "position.png", "loss.png"):
        assert (finished.report / name).read_bytes().startswith(b"\x89PNG")
    page = (finished.report / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "identified among" in page
    measured = [line for line in finished.metrics() if "effective_rank_embedding" in line]
    assert [line["step"] for line in measured] == [0, 5, 10, 12]
    assert all({"retrieval_top1", "copy_gap", "held_out_objective"} <= line.keys() for line in measured)


def test_an_objective_that_does_not_fit_the_samples_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ['objective.terms={"horizons":1}', "objective.horizons=50"]
    assert main(["pretrain", "tests.tiny:recipe", *changes, f"out={tmp_path / 'run'}"]) == 2
    assert "objective.horizons=50 reaches beyond sequences of 7 places" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_first_batch_is_tried_without_a_trace(tiny_recipe: PretrainConfig) -> None:
    """Torn samples at the start are passed over; random numbers and the network stay as they were."""
    mixture = {"projected_mse": 1.0, "sigreg_tokens": 20.0}  # draws directions
    changes = {"data.jitter": 0.3, "objective.stop_gradient": False, "objective.terms": mixture}
    config = override(tiny_recipe, changes | {"data.unreadable": tuple(range(20))})
    model = build_pretrainer(config)
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    try_batch(config, model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="none of the 48 training samples can be read; one of them: sample 0: torn"):
        try_batch(override(config, {"data.unreadable": tuple(range(48))}), model)


def test_a_finished_run_is_not_trained_again(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    assert main(["pretrain", str(finished.path)]) == 0
    assert "identified among" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_gives_back_its_averaged_weights(finished: Run) -> None:
    config, model = load_pretrained(finished, CPU)
    from safetensors.torch import load_file

    stored = load_file(finished.checkpoints / "step_00000012" / "ema.safetensors")
    assert not model.training
    assert all((value == stored[name]).all() for name, value in model.named_parameters())
    assert config.recipe == "tests.tiny:recipe"


def test_collapse_is_called_by_its_name(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    """Without shift and stop-gradient nothing holds the embeddings apart but what they are: train it into the wall."""
    config = override(
        tiny_recipe,
        {"objective.stop_gradient": False, "optim.lr": 0.03, "train.length.steps": 150, "train.evaluate": 150},
    )
    summary = pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    assert summary["collapsed"]
    assert summary["loss"] < -0.9
    assert (tmp_path / "run/report/card.txt").read_text().strip().startswith("COLLAPSED")
    warnings = {line["step"]: line["warning"] for line in Run(tmp_path / "run").metrics() if "warning" in line}
    assert list(warnings) == [150]
    assert "below 50% of" in warnings[150]
    assert warnings[150] in (tmp_path / "run/report/index.html").read_text()


def test_ablation_arms_change_what_they_name(tiny_recipe: PretrainConfig) -> None:
    configs = {name: override(tiny_recipe, changes) for name, changes in ablate.ARMS.items()}
    assert configs["base"] == tiny_recipe
    assert not configs["shift off"].objective.shift
    assert not configs["causal mask off"].objective.causal
    assert not configs["stop-gradient off"].objective.stop_gradient
    assert configs["input mask 40 %"].objective.input_mask == 0.4
    assert configs["input mask 60 %"].objective.input_mask == 0.6


@pytest.mark.slow
def test_ablate_runs_every_arm_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ablate", "tests.tiny:recipe", f"out={tmp_path / 'ablation'}", "seeds=[0,1]", "workers=2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    summary = check_summary(tmp_path / "ablation/summary.json", AblateSummary)
    for file in tmp_path.glob("ablation/runs/*/ablate-*.json"):
        check_summary(file, AblateRow)
    assert list(summary["arms"]) == list(ablate.ARMS)
    assert "give three or more" in summary["verdict"]
    assert all(len(arm["probe_best"]["values"]) == 2 for arm in summary["arms"].values())
    assert all(name in shown for name in ablate.ARMS)
    assert (tmp_path / "ablation/report/probe.png").exists()
    metrics = sorted((tmp_path / "ablation").rglob("metrics.jsonl"))
    before = [path.stat().st_mtime_ns for path in metrics]
    assert main(words) == 0  # everything is there: nothing is trained again
    assert [path.stat().st_mtime_ns for path in metrics] == before


@pytest.mark.slow
def test_bench_accounts_for_the_whole_step(tiny_recipe: PretrainConfig) -> None:
    figures = bench.bench(tiny_recipe, bench.BenchOptions(steps=4), ALONE)
    shares = [figures[f"{phase} %"] for phase in bench.PHASES]
    assert sum(shares) == pytest.approx(100)
    assert all(share > 0 for share in shares)
    assert figures["tokens/s"] == pytest.approx(figures["samples/s"] * 6)


@pytest.mark.parametrize("changes", [{}, {"train.recompute": True}])
@pytest.mark.slow
def test_bench_reads_recipes_of_every_task_and_their_runs(tmp_path: Path, changes: dict[str, Any]) -> None:
    tuned = override(short(load_object("tests.tiny:recipe")()), {"train.length.steps": 2, **changes})
    run = Run(tmp_path / "tuned")
    finetune(tuned, run, ALONE, show=False)
    config = read_config(str(run.path), {})
    assert config == tuned
    figures = bench.bench(config, bench.BenchOptions(steps=2), ALONE)
    assert figures["samples/s"] > 0
    scenes = read_config("recipes.vision:camvid_segment", {"train.batch": 2})
    assert network(scenes).backbone.config == scenes.model
    with pytest.raises(UserError, match="against=transformer compares pre-training steps"):
        bench.against_bare_transformer(config, bench.BenchOptions(steps=2), ALONE)
    with pytest.raises(UserError, match="which trains nothing"):
        read_config("tests.recipes.tasks.test_tasks:no_recipe", {})


def no_recipe() -> bench.BenchOptions:
    """A config that no task trains."""
    return bench.BenchOptions()


def test_bench_counts_the_operations_of_a_step(tiny_recipe: PretrainConfig) -> None:
    """Three matrix products (forward, two gradients) for every weight and token, and the attention."""
    flops = bench.step_flops(tiny_recipe, ALONE)
    tokens, dim, hidden, depth = 8 * 7, 16, 32, 2
    weights = depth * (4 * dim * dim + 2 * dim * hidden)
    assert flops >= 6 * weights * tokens
    assert flops <= 2 * 6 * weights * tokens


@pytest.mark.slow
@pytest.mark.parametrize("against", ["loop", "transformer"])
def test_bench_measures_against_references(against: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tests.tiny:recipe", "steps=4", "repeats=2", f"against={against}"]) == 0
    found = re.search(rf"bare {against}, time +(\d+\.\d+)", capsys.readouterr().out, re.IGNORECASE)
    assert found is not None
    assert 0.2 < float(found[1]) < 5


@pytest.mark.slow
def test_bench_measures_every_objective_against_the_cosine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tests.tiny:recipe", "steps=2", "repeats=4", "against=objectives"]) == 0
    ratios = dict(re.findall(r"^(\w+) / cosine, time +(\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE))
    assert ["cosine", *ratios] == list(NAMED)
    assert all(float(ratio) > 0.1 for ratio in ratios.values())


def test_bench_measures_loading_against_bare_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        content = encoded(picture(0, 64, 48), "jpeg")
        write_tree(tmp_path, {f"{split}/a/{row}.jpg": content for row in range(3)} | {f"{split}/a/torn.jpg": b"\xff"})
    words = ["bench", "recipes.vision:base_in1k", f"data.root={tmp_path}", "against=decode", "repeats=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "images/s of an H100 are assumed: twice what the NEPA authors' days come to" in said
    rows = dict(re.findall(r"^(.+?)  +([\d.,]+)$", said, re.MULTILINE))
    figures = {name: float(value.replace(",", "")) for name, value in rows.items()}
    assert 0.05 < figures["ours / bare, images/s"] < 5
    assert figures["images/s per core"] * figures["cores for the 2,000 images/s of an H100"] == pytest.approx(
        2000, 0.01
    )
    assert figures["read / decoded, images/s"] > 1
    ratio = figures["array, images/s per core"] / figures["images/s per core"]
    assert figures["array / JPEG, images/s"] == pytest.approx(ratio, rel=0.01, abs=0.01)
    assert figures[f"augmented on {'cuda' if torch.cuda.is_available() else 'cpu'}, images/s of the device"] > 0
    assert ("JPEG, decoded on the GPU, images/s per core" in figures) == torch.cuda.is_available()
    assert main([*words, "data.augment=none"]) == 0
    assert "on the device" not in capsys.readouterr().out, "nothing is left to it"
    assert main([*words, "data.in_memory=true"]) == 2
    assert "data.in_memory=false" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_run_learns_the_same(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    """The same steps, up to rounding, and the checkpoint loads into a network that is not compiled."""
    plain, compiled = (
        pretrain(override(tiny_recipe, {"train.compile": compile}), Run(tmp_path / str(compile)), ALONE, show=False)
        for compile in (False, True)
    )
    assert compiled["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    load_pretrained(Run(tmp_path / "True"), CPU)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """The recipe of the point clouds, its file copied to an empty folder, which is the current one."""
    shutil.copy(ROOT / "examples" / "my_points.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config: PretrainConfig = load_object("my_points:base")()
    return config


def test_the_example_of_point_clouds_is_short_and_sound(example: PretrainConfig) -> None:
    assert len(Path("my_points.py").read_text().splitlines()) <= 60
    for order in ("morton", "hilbert", "random"):
        check_modality(override(example, {"data.patch_order": order, "data.samples": 20}).data)
    drawn = {"data.patch_order": "random_per_sample", "model.predict_position": "add"}
    check_modality(override(example, drawn | {"data.samples": 20}).data)


def test_of_the_default_orders_those_without_sense_on_point_clouds_are_left_out(
    example: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    few = override(example, {"data.samples": 20})
    variants = [orders.variant_of(few, name, None) for name in orders.DEFAULT]
    kept = [variant.name for variant in variants if orders.fits(variant, named=False)]
    assert set(orders.DEFAULT) - set(kept) == {"spiral_in"}
    assert capsys.readouterr().err.startswith("left out: spiral_in: patch_order=spiral_in and spiral_out are for grids")


@pytest.mark.slow
@pytest.mark.usefixtures("example")
def test_every_task_takes_the_example_of_point_clouds_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["data.samples=80", "train.batch=16"]
    assert main(["pretrain", "my_points:base", "train.length.steps=3", *few]) == 0
    assert "Next group identified among" in capsys.readouterr().out
    assert main(["probe", "runs/my_points-base", "layers=2", "poolings=mean"]) == 0
    assert main(["finetune", "runs/my_points-base", "train.length.steps=2"]) == 0
    assert main(["inspect", "runs/my_points-base", "samples=2"]) == 0
    capsys.readouterr()
    short = ["train.length.steps=2", "labels=2", "finetune_steps=2", "seeds=0", "workers=1", "cross=false"]
    assert main(["orders", "my_points:base", "orders=morton,random", *few, *short]) == 0
    assert "random" in capsys.readouterr().out
    assert main(["bench", "my_points:base", *few, "steps=2", "repeats=1", "against=padding"]) == 0
    assert "packed / padded rows, real tokens/s" in capsys.readouterr().out
