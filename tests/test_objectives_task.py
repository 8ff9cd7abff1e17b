"""nepa objectives: tuned alike, random weights measured once a seed, and what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from recipes import compare, downstream, finetune, measures, objectives
from recipes.cli import main, split_options
from recipes.downstream import Care, Setting, best_setting, fine_tuned, held_back
from recipes.objective_names import named
from recipes.objectives import Options, summarise
from recipes.objectives_report import RANDOM, render
from recipes.pretrain import PretrainConfig, build_model
from recipes.significance import Difference, against
from tests.test_forecast import recipe as series_recipe
from tests.tiny import CPU, Waves

PICTURES = ("accuracy", "labels", "layers", "rank")
PARTS = ("answer", "accuracy", "layers", "prediction", "tests", "settings", "commands")
MIXTURE = ['objective.terms={"mse":1,"barlow":0.25}', "objective.stop_gradient=false", "objective.redundancy=0.1"]
WORDS = ["objectives", "tests.tiny:recipe", "objectives=cosine,recipe", "seeds=0", "finetune_steps=3", *MIXTURE]
CARE = ["labels=2,all", "learning_rates=1e-3,1e-2", "finetune_causal=false"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All work in this process, on few samples; gives the names of the jobs that were left to do."""
    return in_this_process(monkeypatch)


def in_this_process(patch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def share(jobs: list[compare.Job], *, workers: int) -> None:
        done.extend(job.name for job in jobs if not job.done)
        compare.work_through(jobs)

    patch.setattr(compare, "share", share)
    patch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 48, "test_samples": 48}))
    return done


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two objectives, one seed."""
    out = tmp_path_factory.mktemp("objectives")
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        assert main([*WORDS, *CARE, f"out={out}"]) == 0
    return out


def test_the_summary_has_every_measure_and_its_gain_over_random_weights(compared: Path) -> None:
    summary = json.loads((compared / "summary.json").read_text())
    assert set(summary["objectives"]) == {"cosine", "recipe"} == set(summary["ranking"])
    assert summary["measures"] == ["probe", "probe_final", "finetuned_2", "finetuned_all"]
    assert summary["labels"] == [2, "all"]
    for figures in summary["objectives"].values():
        assert figures["accuracies"] == figures["probe"]["values"]
        assert figures["mean"] == figures["accuracies"][0]
        assert figures["ci95"] is None
        for key in summary["measures"]:
            gain = figures[key]["mean"] - summary["random"][key]["mean"]
            assert figures["gain"][key]["mean"] == pytest.approx(gain)
        assert all(len(chosen) == 1 for chosen in figures["settings"].values())
        assert {"retrieval_top1", "retrieval_top1_linear", "retrieval_top1_copy", "effective_rank_embedding"} <= set(
            figures
        )
        assert figures["verdicts"][0].isupper()
        assert Path(summary["runs"]["cosine"][0]).is_dir()
    assert "give three or more" in summary["verdict"][0]


def test_the_page_holds_its_pictures_and_needs_no_other_file(compared: Path) -> None:
    for name in PICTURES:
        assert (compared / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (compared / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert [part for part in PARTS if f'id="{part}"' not in page] == []
    assert page.index('id="answer"') < page.index("data:image/png") < page.index("<table>")
    assert "not comparable" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_mixture_of_the_users_own_is_trained_beside_the_named_ones(compared: Path) -> None:
    summary = json.loads((compared / "summary.json").read_text())
    trained = {
        name: json.loads((Path(folders[0]) / "config.json").read_text())["objective"]
        for name, folders in summary["runs"].items()
    }
    assert trained["recipe"]["terms"] == {"mse": 1.0, "barlow": 0.25} == summary["objectives"]["recipe"]["terms"]
    assert not trained["recipe"]["stop_gradient"]
    assert (trained["cosine"]["terms"], trained["cosine"]["stop_gradient"]) == ({"cosine": 1.0}, True)
    assert {each["redundancy"] for each in trained.values()} == {0.1}
    told = "recipe: 1 mse + 0.25 barlow, without stop-gradient."
    assert told in render(summary).splitlines()
    assert told in (compared / "report/index.html").read_text()


@pytest.mark.browser
def test_a_browser_shows_the_answer_on_its_first_screen(compared: Path, browse: Callable[[Path], str]) -> None:
    shown = browse(compared / "report" / "index.html")
    assert f'data-images="{len(PICTURES)}"' in shown, "a picture did not load"
    assert [part for part in PARTS if f'id="{part}"' not in shown] == []


def test_random_weights_are_measured_once_a_seed_for_all_objectives(
    compared: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list((compared / "random").glob("*.json"))) == 1
    assert main([*WORDS[:2], "objectives=recipe", *WORDS[3:], *CARE, f"out={compared}"]) == 0
    assert here == []
    shown = capsys.readouterr().out
    assert re.search(r"^random weights +0\.\d+", shown, re.MULTILINE)
    assert re.search(r"^raw tokens +0\.\d+", shown, re.MULTILINE)


def test_named_objectives_keep_every_key_but_those_that_name_them(tiny_recipe: PretrainConfig) -> None:
    config = override(tiny_recipe, {"objective.layers": (1, 2), "objective.terms": {"mse": 1}, "objective.slices": 3})
    assert named("recipe", config) == config
    assert named("intermediate", config).objective.layers == (1, 2)
    assert named("intermediate", tiny_recipe).objective.layers == (1,)
    assert named("cosine", config).objective.terms == {"cosine": 1.0}
    assert named("cosine", config).objective.slices == 3


def test_a_comparison_is_not_written_over_by_one_of_another_kind_or_recipe(
    compared: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (compared / "summary.json").read_bytes()
    assert main(["ablate", "tests.tiny:recipe", f"out={compared}"]) == 2
    assert main(["objectives", "tests.tiny:ragged", *WORDS[2:], *CARE, f"out={compared}"]) == 2
    told = capsys.readouterr().err
    assert told.count("is of `nepa objectives tests.tiny:recipe` and would be lost; name another folder with out=") == 2
    assert here == []
    assert (compared / "summary.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------- tuning


def test_the_learning_rate_is_chosen_on_held_back_training_samples(
    tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read while choosing is never trained on and never a test sample."""
    trained_on, chosen_by = [], []
    train, measure = measures.trained, finetune.measure

    def watched_train(tuning: Any, goal: Any, samples: Any, device: torch.device) -> Any:
        trained_on.append([int(samples[place]["index"]) for place in range(len(samples))])
        return train(tuning, goal, samples, device)

    def watched_measure(tuning: Any, model: Any, ranks: Any, samples: Any = None) -> dict[str, float]:
        if samples is not None:
            chosen_by.append([int(samples[place]["index"]) for place in range(len(samples))])
        found: dict[str, float] = measure(tuning, model, ranks, samples)
        return found

    monkeypatch.setattr(downstream, "trained", watched_train)
    monkeypatch.setattr(finetune, "measure", watched_measure)
    care = care_of((60,), finetune_steps=(60,), learning_rates=(1e-9, 1e-2), finetune_causal=(False,))
    config = override(tiny_recipe, {"data.samples": 400, "train.batch": 32})
    found = fine_tuned(config, None, CPU, 60, care)
    assert found.setting.lr == 1e-2, "1e-9 learns nothing"
    assert found.figure > 0.6
    assert [len(each) for each in trained_on] == [120, 120]  # sixty of each of two classes
    assert trained_on[0] == trained_on[1]
    assert chosen_by[0] == chosen_by[1]
    assert len(chosen_by[0]) == 400 // 5
    assert not set(trained_on[0]) & set(chosen_by[0])


def test_steps_and_attention_are_chosen_at_the_best_learning_rate() -> None:
    """Each setting is tried once, and one that diverges is never the best."""
    care = Care(
        labels=(), learning_rates=(1.0, 2.0, 3.0), finetune_steps=(10, 20), finetune_causal=(False, True), horizon=1
    )
    tried: list[Setting] = []

    def at(setting: Setting) -> tuple[float, str]:
        tried.append(setting)
        score = {1.0: 0.5, 2.0: 0.6, 3.0: float("nan")}[setting.lr] + setting.steps / 100 - 0.3 * setting.causal
        return score, f"kept of {setting.lr:g}, {setting.steps}"

    assert best_setting(care, at) == (Setting(2.0, 20, False), "kept of 2, 20")
    assert tried == [
        *(Setting(lr, 10, False) for lr in (1.0, 2.0, 3.0)), Setting(2.0, 20, False), Setting(2.0, 20, True)
    ]  # fmt: skip


def test_a_fifth_or_a_thousand_is_held_back_by_seed() -> None:
    rest, kept = held_back(100, 1)
    assert sorted([*rest, *kept]) == list(range(100))
    assert len(kept) == 20
    assert held_back(100, 1) == (rest, kept) != held_back(100, 2)
    assert len(held_back(20_000, 0)[1]) == 1000


def test_random_weights_are_those_every_objective_starts_from(tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    care = Options(seeds=(3,)).care
    key = objectives.control(tiny_recipe, 3, care, tmp_path).result
    for name in ("sigreg", "horizons", "intermediate"):
        config = named(name, tiny_recipe)
        assert objectives.control(config, 3, care, tmp_path).result == key
        ours, theirs = build_model(tiny_recipe).state_dict(), build_model(config).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    other = override(tiny_recipe, {"model.layer_scale": 0.5})
    assert objectives.control(other, 3, care, tmp_path).result != key
    assert objectives.control(tiny_recipe, 3, Options(finetune_steps=(7,)).care, tmp_path).result != key


def test_a_series_without_classes_is_forecast() -> None:
    config = series_recipe()
    downstream.check(config, 4)
    with pytest.raises(UserError, match="horizon"):
        downstream.check(config, 4000)
    care = Care(
        labels=(10, None), finetune_steps=(3, 2), learning_rates=(1e-9, 1e-3), finetune_causal=(True,), horizon=4
    )
    found = downstream.downstream(config, build_model(config).eval(), None, care)
    assert found["metric"] == "skill"
    assert 0 < found["probe"] < 1, "a ridge forecast beats repeating the last value"
    assert found["layers"]["probe"][-1] == found["probe_final"]
    assert list(found["settings"]) == ["finetuned_all"]
    assert found["settings"]["finetuned_all"]["causal"]
    assert downstream.raw_figure(config, CPU, 4) > 0


# ------------------------------------------------------------------------------------------------ the words


def test_options_are_read_as_a_shell_leaves_them() -> None:
    words = ["objectives=[cosine,barlow]", "seeds=4", "labels=[10,all]", "learning_rates=1e-4,0.01", "workers=1"]
    options, rest = split_options(
        Options, [*words, "finetune_steps=7,9", "finetune_causal=true", "out=x", "optim.lr=1"]
    )
    assert options.objectives == ("cosine", "barlow")
    assert (options.seeds, options.workers, options.out) == ((4,), 1, "x")
    assert options.care == Care(
        labels=(10, None), finetune_steps=(7, 9), learning_rates=(1e-4, 0.01), finetune_causal=(True,), horizon=96
    )
    assert rest == {"optim.lr": 1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["objectives=cosin"], "there is no objective cosin; did you mean cosine"),
        (["labels=0"], "labels"),
        (["learning_rates=-1"], "learning_rates"),
        (["objectives=cosine,cosine"], "cosine is given twice"),
        (["labels=10,50,10"], "labels=10,50,10: 10 is given twice"),
        (["labels=all,all"], "all is given twice"),
        (["learning_rates=1e-3,0.001"], "0.001 is given twice"),
        (["finetune_steps=100,100"], "100 is given twice"),
        (["finetune_causal=true,true"], "true is given twice"),
        (['objective.terms={"mse":1}'], "objective.terms is overridden by every objective of objectives=cosine,mse_n"),
        (["objectives=mse", "objective.terms.barlow=1"], "name recipe among them"),
        (["objectives=mse,cosine", "objective.stop_gradient=false"], "objective.stop_gradient is overridden"),
        (["objectives=cosine,recipe"], "recipe is the same setting as cosine"),
    ],
)
def test_what_can_not_be_compared_is_refused_in_one_line(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["objectives", "tests.tiny:recipe", *words, f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_every_objective_is_tried_before_the_first_is_trained(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    """Random weights are tuned first, and the cosine fits."""
    config = override(tiny_recipe, {"objective.horizons": 50})
    with pytest.raises(UserError, match=r"^horizons: objective\.horizons=50 reaches beyond sequences of 7 places"):
        objectives.objectives(config, Options(objectives=("cosine", "horizons"), seeds=(0,)), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_samples_without_targets_are_refused_before_training(tiny_recipe: PretrainConfig, tmp_path: Path) -> None:
    config = tiny_recipe.model_copy(update={"data": Waves(labelled=False)})
    with pytest.raises(UserError, match="gives no class to train on"):
        objectives.objectives(config, Options(), tmp_path)
    assert not list(tmp_path.iterdir())


def care_of(labels: tuple[int | None, ...], **choices: Any) -> Care:
    return Care(labels=labels, horizon=4, **choices)


def row(value: float) -> dict[str, Any]:
    measured = {"probe": value, "probe_final": value, "finetuned_50": value}
    return measured | {
        "metric": "accuracy", "probe_row": "layer 1, mean", "verdict": "LEARNED",
        "settings": {"finetuned_50": Setting(1e-3, 100, False)._asdict()},
    }  # fmt: skip


def test_the_verdict_says_whether_pre_training_pays() -> None:
    noise = (0.0, 0.01, 0.02)
    rows = {
        "cosine": [row(0.5 + each) for each in (0.01, 0.0, 0.02)],
        "good": [row(0.7 + each) for each in noise],
        "bad": [row(0.3 + each) for each in noise],
    }
    rows["good"][2] = row(0.73)
    random = [row(0.5 + each) | {"raw_tokens": 0.4} for each in noise]
    summary = summarise(rows, random, Options(objectives=("cosine", "good", "bad"), labels=(50,)))
    assert summary["ranking"] == ["good", "cosine", "bad"]
    assert summary["verdict"][0] == (
        "Better than random weights? In the probe of the best layer yes (good); in fine-tuning on 50 labels a class "
        "yes (good)."
    )
    assert summary["verdict"][1].startswith(
        "Pre-training with good beats random weights in the probe of the best layer by 20.3 ± "
    )
    tuned = "Pre-training with good beats tuned random weights in fine-tuning on 50 labels a class by 20.3 ± "
    assert any(line.startswith(tuned) for line in summary["verdict"])
    assert summary["objectives"]["good"]["gain"]["probe"]["values"] == pytest.approx([0.2, 0.2, 0.21])
    assert {each["better"] for each in summary["against_random"]["probe"]} >= {"good"}
    assert all("cosine" in (each["better"], each["worse"]) for each in summary["against_cosine"]["probe"])
    assert any("with good beats the cosine in" in line for line in summary["verdict"])
    assert any("beats random weights in the probe of the last layer" in line for line in summary["verdict"])
    alone = summarise({"good": rows["good"]}, random, Options(objectives=("good",), labels=(50,)))
    assert alone["against_cosine"] == {}
    assert not any("cosine" in line for line in alone["verdict"])


def test_the_headline_answers_for_the_probe_and_for_fine_tuning() -> None:
    def pair(better: str, worse: str, p: float) -> Difference:
        return Difference(better, worse, 0.03, 0.01, p, p, 0.02)

    pays = {
        "probe": [pair("InfoNCE", RANDOM, 0.01), pair("b", RANDOM, 0.02), pair(RANDOM, "c", 0.01)],
        "probe_final": [pair("b", RANDOM, 0.01)],
        "finetuned_10": [pair("b", RANDOM, 0.5), pair(RANDOM, "c", 0.06)],
        "finetuned_all": [pair("b", RANDOM, 0.5), pair(RANDOM, "c", 0.01)],
    }
    assert objectives.sentences(pays, {}, seeds=3)[0] == (
        "Better than random weights? In the probe of the best layer yes (InfoNCE, b); in fine-tuning on 10 labels a "
        "class not beyond the noise; in fine-tuning on all labels no, worse (c)."
    )


def test_sentences_name_who_wins_who_loses_and_what_is_noise() -> None:
    def pair(better: str, worse: str, p: float) -> Difference:
        return Difference(better, worse, 0.031, 0.012, p, p, 0.02 + p)

    won = [pair("a", RANDOM, 0.01), pair("b", RANDOM, 0.02), pair(RANDOM, "c", 0.01), pair(RANDOM, "d", 0.5)]
    needed = (
        "With these seeds the surest had to be about 3.0 points to be seen; once it is, less is asked of the others."
    )
    assert against(won, RANDOM, "the probe", called=RANDOM) == (
        "Pre-training beats random weights in the probe with a by 3.1 ± 1.2 points, b by 3.1 ± 1.2 points. "
        "Pre-training with c does worse than random weights in the probe by 3.1 ± 1.2 points. "
        f"The other difference is within the noise. {needed}"
    )
    assert against(won[:1], RANDOM, "the probe", called=RANDOM) == (
        "Pre-training with a beats random weights in the probe by 3.1 ± 1.2 points. "
        "With these seeds it had to be about 3.0 points to be seen."
    )
    noise = [*won[3:], pair("e", RANDOM, 0.6), pair("f", RANDOM, 0.7)]
    assert "The other 3 differences are within the noise." in against([*won[:2], *noise], RANDOM, "", called=RANDOM)
    assert against(noise, RANDOM, "the probe", called="them") == (
        "In the probe no objective differs from them by more than the noise; d, which differs most, is 3.1 ± 1.2 "
        "points below, p = 0.5 after Holm's correction; differences below about 52.0 points can't be seen with these "
        "seeds."
    )
    assert against(noise[1:2], RANDOM, "the probe", called="them") == (
        "In the probe e does not differ from them by more than the noise; it is 3.1 ± 1.2 points above, p = 0.6; "
        "differences below about 62.0 points can't be seen with these seeds."
    )
