"""nepa probe: which rows it reads, what it says of them, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.data import epoch_order
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.readout import classifiers
from recipes.readout import probing as probe
from recipes.report.summaries import ProbeSummary
from recipes.statistics.credits import unpack_credits
from recipes.statistics.held_out import unpack_clusters
from recipes.statistics.ridge import ridge_predictions
from recipes.statistics.worth import sentences, worth_in
from recipes.training.starting import build_model
from tests import tiny
from tests.summaries import check_summary
from tests.tiny import CPU, Waves
from tests.tiny_scenes import scenes, write_scenes

LAYERS = ("embedding", "layer 1", "layer 2", "final norm")
QUICK = probe.ProbeOptions(layers=(1,), poolings=("mean", "last"), classifiers=("knn",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the tiny recipe through the command."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["pretrain", "tests.tiny:recipe", f"out={folder}"]) == 0
    return Run(folder)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def test_every_layer_stands_beside_random_weights_and_raw_tokens(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(finished.path)]) == 0
    shown = capsys.readouterr().out
    result = check_summary(finished.path / "probe.json", ProbeSummary)
    expected = [f"{layer}, {pooling}" for layer in LAYERS for pooling in ("mean", "last")]
    assert names(result["layers"]) == names(result["random_init"]["layers"]) == expected
    for row in (*result["layers"], *result["random_init"]["layers"], result["raw_tokens"]):
        assert list(row["scores"]) == ["linear", "knn"]
        assert row["scores"]["linear"] == {key: row[key] for key in ("accuracy", "validation")}
        assert all(0 <= score["accuracy"] <= 1 for score in row["scores"].values())
    assert all(name in shown for name in [*expected, "raw tokens", "random weights", "linear", "k-NN"])


def test_it_ends_with_a_verdict_beside_random_weights_and_raw_tokens(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["probe", str(finished.path), "test_samples=40", f"out={tmp_path}"]
    assert main(words) == 0
    result = Run(tmp_path).summary("probe.json")
    assert result is not None
    worth = worth_in(result)
    assert worth is not None
    assert capsys.readouterr().out.strip().splitlines()[-3:] == sentences(worth, form=".3f")
    rows = result["layers"], result["random_init"]["layers"], [result["raw_tokens"]]
    chosen = [max((s["validation"], s["accuracy"]) for row in each for s in row["scores"].values()) for each in rows]
    assert worth.figure in {
        score["accuracy"] for row in rows[0] for score in row["scores"].values() if score["validation"] == chosen[0][0]
    }
    assert [each.name for each in worth.beside] == ["random weights", "raw tokens"]
    assert [each.margin for each in worth.beside] == pytest.approx(
        [worth.figure - each.figure for each in worth.beside]
    )
    assert (worth.samples, worth.clusters, worth.unit) == (40, 40, "samples")

    kept = {key: unpack_credits(value) for key, value in result["credits"].items() if value is not None}
    best = {"best": result["best"], "random_init": result["random_init"]["best"], "raw_tokens": result["raw_tokens"]}
    assert {key: float(each.mean()) for key, each in kept.items()} == pytest.approx(
        {key: row["accuracy"] for key, row in best.items()}
    )
    assert "credits" not in json.dumps([*rows, best]), "those of the best rows alone, and in one place"


def test_the_verdict_takes_the_classifier_that_reads_best_on_each_side() -> None:
    """Raw tokens that k-NN alone can read must not look bad because the first classifier is linear."""
    draw = np.random.default_rng(0)
    turn = draw.uniform(0, 2 * np.pi, size=(400, 1))
    labels = (np.floor(turn[:, 0] / np.pi * 4) % 2).astype(np.int64)  # eight sectors in turn
    circle = np.concatenate((np.cos(turn), np.sin(turn)), 1).astype(np.float32)
    weak = (labels[:, None] + draw.normal(size=(400, 1))).astype(np.float32)
    found = []
    for name, x in (("layer 1, mean", weak), ("layer 1, mean", weak[::-1].copy()), ("raw tokens", circle)):
        parts = [{"labels": labels[half], name: x[half]} for half in (slice(300), slice(300, None))]
        found.append(probe.score_rows(split := probe.Split.of(*parts, CPU), ["linear", "knn"]))
    worth = probe.verdict(found, split, torch.arange(100), chained=False, several=True, per_token=False)
    assert worth.headline == "BEHIND RAW TOKENS"
    assert (worth.of, worth.beside[1].of) == ("layer 1, mean, by linear", "by k-NN")
    one = probe.verdict(found, split, torch.arange(100) // 100, chained=False, several=False, per_token=False)
    assert (one.headline, one.of) == ("NOT KNOWN", "layer 1, mean")


def test_the_rows_of_the_paper_are_named_as_in_the_paper(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(finished.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = finished.summary("probe.json")
    assert result is not None
    rows = {row["name"]: row for row in result["layers"]}
    assert result["paper"] == {
        "last embedding": rows["final norm, last"],
        "average embedding": rows["final norm, mean"],
    }
    for name, row in result["paper"].items():
        line = next(line for line in lines if line.startswith(name))
        assert line.removeprefix(name).split() == next(
            line.removeprefix(row["name"]).split() for line in lines if line.startswith(row["name"])
        )


@pytest.mark.slow
def test_no_other_rows_are_named_as_in_the_paper(finished: Run, tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    options = probe.ProbeOptions(layers=("final",), poolings=("mean",), classifiers=("knn",))
    model, both = build_model(tiny_recipe), override(tiny_recipe, {"objective.causal": False})
    assert list(probe.probe(tiny_recipe, model, options)["paper"]) == ["average embedding"]
    for config, causal, tuned in ((tiny_recipe, None, True), (tiny_recipe, False, False), (both, True, False)):
        changed = options.model_copy(update={"causal": causal})
        assert probe.probe(config, model, changed, tuned=tuned)["paper"] == {}
    words = [str(finished.path), f"out={tmp_path / 'tuned'}", "train.length.steps=2", "causal=true"]
    assert main(["finetune", *words]) == 0
    assert probe.subject(str(tmp_path / "tuned"), None, {}, CPU).tuned
    assert probe.subject("tests.tiny:recipe", str(tmp_path / "tuned"), {}, CPU).tuned
    assert not probe.subject(str(finished.path), None, {}, CPU).tuned
    assert not probe.subject("tests.tiny:recipe", str(finished.path), {}, CPU).tuned


class Phases(Waves):
    """Every token has a class, 0 or 1 by the sign of its first number; every third one has none."""

    def dataset(self, split: str) -> Any:
        found = []
        for sample in super().dataset(split):  # type: ignore[attr-defined]
            target = (sample["values"][:, 0] > 0).long().index_fill(0, torch.tensor([1, 4]), -1)
            found.append({**{key: value for key, value in sample.items() if key != "label"}, "target": target})
        return found


@pytest.mark.parametrize("ragged", [False, True])
def test_where_tokens_have_classes_single_tokens_are_read(tiny_recipe: PretrainConfig, ragged: bool) -> None:
    config = tiny_recipe.model_copy(update={"data": Phases(ragged=ragged)})
    result = probe.probe(config, build_model(config), probe.ProbeOptions(test_samples=64))
    assert names(result["layers"]) == [f"{layer}, token" for layer in LAYERS]
    assert result["paper"] == {}

    def counted(split: str, samples: int) -> torch.Tensor:
        found = [s["target"][: s["length"]] for s in config.data.dataset(split)]
        return torch.cat([found[i][found[i] >= 0] for i in epoch_order(48, 0, 0)[:samples].tolist()])

    train, test = counted("train", 48), counted("test", 11)  # 64 tokens at 6 a sample
    assert (result["train_samples"], result["test_samples"]) == (len(train), len(test))
    assert result["majority"] == pytest.approx(float((test == train.mode().values).double().mean()))
    assert result["raw_tokens"]["scores"]["linear"]["accuracy"] > 0.9, "the class is told by the token itself"
    assert "always the most frequent class" in probe.render(result)
    worth = worth_in(result)
    assert worth is not None
    assert [each.name for each in worth.beside] == ["random weights", "raw tokens", "the most frequent class"]
    assert worth.beside[2].figure == pytest.approx(result["majority"])
    assert (worth.samples, worth.clusters, worth.unit) == (len(test), 11, "tokens"), "one cluster a sequence"
    clusters = unpack_clusters(result["credits"]["clusters"]).of
    assert clusters is not None
    assert clusters.bincount().sum() == len(test)
    pooled = probe.probe(config, build_model(config), probe.ProbeOptions(poolings=("attentive",), layers=(1,)))
    assert names(pooled["layers"]) == ["layer 1, token"]
    assert "read, not pooled" in pooled["notes"][0]


def test_a_run_on_scenes_is_probed_by_the_classes_of_its_patches(
    tiny_recipe: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_recipe.model_copy(update={"data": scenes(write_scenes(tmp_path / "scenes"))})
    tiny.training(config, tmp_path / "run", evaluate=lambda _: {})
    assert main(["probe", str(tmp_path / "run"), "layers=0,1", "classifiers=knn"]) == 0
    shown = capsys.readouterr().out
    result = Run(tmp_path / "run").summary("probe.json")
    assert result is not None
    assert names(result["layers"]) == ["embedding, token", "layer 1, token"]
    assert result["layers"][0]["accuracy"] > 0.9 > result["majority"], "patches of one colour each"
    assert "Single tokens are read, not pooled: 16 of each sample" in shown
    again = probe.probe(config, build_model(config), probe.ProbeOptions(layers=(0,)), store=tmp_path / "run/features")
    assert again["raw_tokens"]["scores"]["knn"] == result["raw_tokens"]["scores"]["knn"]


def test_layers_poolings_and_classifiers_are_chosen(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = classifiers.ATTENTIVE._replace(steps=5, epochs=1)
    monkeypatch.setattr(classifiers, "attentive", partial(classifiers.attentive, protocol=short))
    words = ["layers=0,final", "poolings=attentive,mean", "classifiers=knn,linear"]
    assert main(["probe", str(finished.path), *words]) == 0
    result = finished.summary("probe.json")
    assert result is not None
    assert names(result["layers"]) == [
        "embedding, attentive", "embedding, mean", "final norm, attentive", "final norm, mean",
    ]  # fmt: skip
    attentive, mean = result["layers"][:2]
    assert (list(attentive["scores"]), list(mean["scores"])) == (["linear"], ["knn", "linear"])
    assert mean["accuracy"] == mean["scores"]["knn"]["accuracy"]
    assert attentive["effective_rank"] is None
    assert result["raw_tokens_attentive"]["name"] == "raw tokens, attentive"
    assert list(result["paper"]) == ["average embedding"]
    assert "embedding, attentive" in capsys.readouterr().out


def test_bos_is_read_only_where_it_sees_the_tokens(tiny_recipe: PretrainConfig) -> None:
    model = build_model(tiny_recipe)
    options = QUICK.model_copy(update={"layers": (0, 1), "poolings": ("mean", "bos")})
    causal = probe.probe(tiny_recipe, model, options)
    assert names(causal["layers"]) == ["embedding, mean", "layer 1, mean"]
    assert causal["notes"] == ["No BOS rows: under causal attention BOS sees no token (causal=false reads it)."]
    both = probe.probe(tiny_recipe, model, options.model_copy(update={"causal": False}))
    assert names(both["layers"]) == ["embedding, mean", "layer 1, mean", "layer 1, BOS"]
    assert both["layers"][2]["effective_rank"] > 1.01, "a constant vector has rank 1"
    assert both["notes"] == []
    for update in ({}, {"causal": False, "layers": (0,)}):
        alone = options.model_copy(update={"poolings": ("bos",), **update})
        with pytest.raises(UserError, match="poolings=bos leaves nothing to read: "):
            probe.probe(tiny_recipe, model, alone)
    without = override(tiny_recipe, {"model.bos": False})
    assert "no BOS" in probe.probe(without, build_model(without), options)["notes"][0]


def test_the_best_row_is_chosen_without_a_look_at_the_test_samples() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(100) % 2

    def features(signal: float) -> np.ndarray:
        return (draw.normal(size=(100, 3)) + signal * labels[:, None]).astype(np.float32)

    train = {"labels": labels, "weak": features(0.3), "strong": features(3.0), "test only": features(0.0)}
    test = train | {"weak": features(0.3), "strong": features(3.0), "test only": features(9.0)}
    rows = probe.score_rows(probe.Split.of(train, test, CPU), ["linear"])
    assert probe.best_row(rows)["name"] == "strong"
    assert rows[1]["validation"] > 0.9
    turned = test | {"labels": 1 - labels}
    others = probe.score_rows(probe.Split.of(train, turned, CPU), ["linear"])
    assert [row["validation"] for row in others] == [row["validation"] for row in rows]
    assert others[1]["accuracy"] == pytest.approx(1 - rows[1]["accuracy"])


def test_labels_are_numbered_over_both_splits() -> None:
    ten = np.zeros((10, 2), np.float32)
    train = {"labels": np.arange(10) % 2 * 7 + 3, "x": ten}
    split = probe.Split.of(train, {"labels": np.array([10, 11, 3] * 3 + [3]), "x": ten}, CPU)
    assert split.labels.tolist() == [0, 1] * 5
    assert split.test_labels.tolist() == [1, 2, 0] * 3 + [0]
    with pytest.raises(UserError, match=r"'label' holds int64 of shape \(4,\)"):
        probe.Split.of({"labels": np.zeros((10, 4), np.int64)}, {"labels": np.zeros((10, 4), np.int64)}, CPU)


def test_numbers_are_read_by_regressions_of_their_own() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 5)).astype(np.float32)
    told = np.stack((1e3 + 7 * x[:, 0], x[:, 1] - x[:, 2], np.full(200, 4)), 1).astype(np.float32)
    noise = draw.normal(size=(200, 5)).astype(np.float32)
    split = probe.Split.of(
        {"labels": told[:150], "told": x[:150], "noise": noise[:150]},
        {"labels": told[150:], "told": x[150:], "noise": noise[150:]},
        CPU,
    )
    rows = {row["name"]: row["scores"] for row in probe.score_rows(split, ["linear", "knn"])}
    assert rows["told"]["linear"]["r2"] == pytest.approx(2 / 3, abs=1e-3), "the number that never varies gives 0"
    assert 0.2 < rows["told"]["knn"]["r2"] < 2 / 3
    assert rows["noise"]["linear"]["r2"] < 0.05
    assert rows["noise"]["linear"]["validation"] < 0.05
    half = {"labels": told[:, 0], "told": x}
    assert probe.Split.of(half, half, CPU).labels.shape == (200, 1)
    with pytest.raises(UserError, match="NaN or infinity"):
        probe.Split.of(half | {"labels": told[:, 0] * np.inf}, half, CPU)
    for options in (QUICK.model_copy(update={"classifiers": ("lars",)}), probe.ProbeOptions(poolings=("attentive",))):
        with pytest.raises(UserError, match="is for one class a sample, and 'label' holds numbers here"):
            probe.check_readers(split, options)


def test_ridge_is_that_of_the_normal_equations() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, x_test = (torch.randn(shape, generator=draw) for shape in ((40, 3), (40, 2), (9, 3)))
    found = ridge_predictions(x, y, x_test)[0.1]
    mean, std = x.mean(0), x.std(0, correction=0)
    a, b = (x - mean) / std, (x_test - mean) / std
    weights = torch.linalg.solve(a.T @ a / 40 + 0.1 * torch.eye(3), a.T @ (y - y.mean(0)) / 40)
    torch.testing.assert_close(found.float(), b @ weights + y.mean(0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1"], "optim.lr is not one of its options"),
        (["data.sample=9"], "unknown key data.sample; did you mean data.samples?"),
        (["layers=3"], "layers=3: the network has layers 0 (the embedding) to 2, and final"),
        (["layers=last"], "layers=last: each should be a valid integer or 'final'"),
        (["poolings=max"], "poolings=max: each should be 'mean', 'last', 'bos' or 'attentive'"),
        (["poolings=attentive", "classifiers=knn"], "poolings=attentive is trained with its linear layer: add linear"),
        (["data.labelled=false"], "gives no label to probe for; add the key 'label' to its samples"),
    ],
)
def test_a_wrong_word_is_one_line(
    finished: Run, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["probe", str(finished.path), *words]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_a_run_is_probed_on_other_data(finished: Run, tmp_path: Path) -> None:
    words = ["data.samples=30", "train.workers=0", "layers=1", "poolings=mean", f"out={tmp_path / 'out'}"]
    assert main(["probe", str(finished.path), *words]) == 0
    result = Run(tmp_path / "out").summary("probe.json")
    assert result is not None
    assert (result["train_samples"], result["test_samples"]) == (30, 30)


def test_a_recipe_is_probed_with_the_weights_of_a_run(finished: Run, tmp_path: Path) -> None:
    options = ["layers=1,final", "poolings=mean", "test_samples=40"]
    assert main(["probe", str(finished.path), *options, f"out={tmp_path / 'run'}"]) == 0
    words = ["probe", "tests.tiny:recipe", f"init={finished.path}", *options, f"out={tmp_path / 'recipe'}"]
    assert main(words) == 0
    of_run, of_recipe = (Run(tmp_path / name).summary("probe.json") for name in ("run", "recipe"))
    assert of_run is not None
    assert of_recipe is not None
    assert of_run | {"made_with": None} == of_recipe | {"made_with": None}
    assert main(["probe", "tests.tiny:recipe"]) == 2


@pytest.mark.slow
def test_a_fine_tuned_run_is_probed_by_its_name(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own network, read with its own attention: not that of the run it started from."""
    tuned = tmp_path / "tuned"
    assert main(["finetune", str(finished.path), f"out={tuned}", "train.length.steps=12"]) == 0
    words = ["layers=1,final", "poolings=mean,bos", "classifiers=knn"]
    assert main(["probe", str(tuned), *words]) == 0
    result = Run(tuned).summary("probe.json")
    assert result is not None
    assert result["causal"] is False
    assert names(result["layers"]) == ["layer 1, mean", "layer 1, BOS", "final norm, mean", "final norm, BOS"]
    assert main(["probe", str(finished.path), *words, "causal=false"]) == 0
    before = finished.summary("probe.json")
    assert before is not None
    assert before["layers"] != result["layers"]
    assert before["raw_tokens"] == result["raw_tokens"]


def test_small_rows_are_read_side_by_side_as_one_by_one() -> None:
    draw = np.random.default_rng(0)
    train, test = (
        {"labels": np.arange(60) % 3, **{f"row {i}": draw.normal(size=(60, 4)).astype(np.float32) for i in range(8)}}
        for _ in range(2)
    )
    split = probe.Split.of(train, test, CPU)
    one = probe.score_rows(split, ["linear", "knn"])
    torch.set_num_threads(2)
    try:
        assert probe.score_rows(split, ["linear", "knn"]) == one
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert names(one) == [f"row {i}" for i in range(8)]
