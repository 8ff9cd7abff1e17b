"""nepa objectives: tuned alike, random weights measured once a seed, and what the page says."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.fit import Diverged
from nepa_core.terms import TERMS
from recipes.cli import main, split_options
from recipes.comparison import downstream, measures, objectives
from recipes.comparison import engine as compare
from recipes.comparison.downstream import Care, Setting, best_setting, fine_tuned, held_back
from recipes.comparison.objectives import ObjectivesOptions as Options
from recipes.comparison.objectives import summarise
from recipes.configs import PretrainConfig
from recipes.objective_names import named
from recipes.report.objectives import RANDOM, render
from recipes.report.summaries import ObjectivesSummary, RunMeasures
from recipes.statistics.credits import pack_credits
from recipes.statistics.protocol import alone
from recipes.statistics.significance import Difference, against
from recipes.training import finetuning as finetune
from recipes.training.starting import build_model
from tests.recipes.readout.test_forecast import recipe as series_recipe
from tests.summaries import check_summary
from tests.tiny import CPU, Waves

PICTURES = ("accuracy", "labels", "layers", "rank")
PARTS = ("answer", "accuracy", "layers", "prediction", "tests", "settings", "commands")
MIXTURE = ['objective.terms={"mse":1,"barlow":0.25}', "objective.stop_gradient=false", "objective.redundancy=0.1"]
WORDS = ["objectives", "tests.tiny:recipe", "objectives=cosine,recipe", "seeds=0", "finetune_steps=3", *MIXTURE]
CARE = ["labels=2,all", "learning_rates=1e-2", "finetune_causal=false"]


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
    summary = check_summary(compared / "summary.json", ObjectivesSummary)
    for file in [*compared.glob("runs/*/objectives-*.json"), *compared.glob("random/*.json")]:
        check_summary(file, RunMeasures)
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


def test_the_page_has_the_formula_and_source_of_every_term(compared: Path) -> None:
    page = (compared / "report/index.html").read_text()
    for name, weight in {"cosine": 1, "mse": 1, "barlow": 0.25}.items():
        each = TERMS[name]
        cells = (f"{weight:g} {name}", each.formula, each.compares, each.source)
        assert re.search(r"</td><td[^>]*>".join(re.escape(html.escape(cell)) for cell in cells), page)


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


class Watched:
    """Which samples every training of a fine-tuning was on, and which were read to choose by."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.trained_on: list[list[int]] = []
        self.chosen_by: list[list[int]] = []
        train, measure = measures.trained, finetune.measure

        def watched_train(tuning: Any, goal: Any, samples: Any, device: torch.device) -> Any:
            self.trained_on.append(indices(samples))
            return train(tuning, goal, samples, device)

        def watched_measure(tuning: Any, model: Any, ranks: Any, samples: Any = None, **more: Any) -> dict[str, float]:
            if samples is not None:
                self.chosen_by.append(indices(samples))
            found: dict[str, float] = measure(tuning, model, ranks, samples, **more)
            return found

        patch.setattr(downstream, "trained", watched_train)
        patch.setattr(finetune, "measure", watched_measure)


def indices(samples: Any) -> list[int]:
    return sorted(int(samples[place]["index"]) for place in range(len(samples)))


@pytest.mark.slow
def test_few_labels_are_all_that_a_setting_is_chosen_on(
    tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No label beside the stated ones is read, but for the test samples at the end; and all of them are trained on."""
    watched = Watched(monkeypatch)
    care = care_of((30,), finetune_steps=(30,), learning_rates=(1e-9, 1e-2), finetune_causal=(False,), extensions=0)
    config = override(tiny_recipe, {"data.samples": 200, "train.batch": 32})
    found = fine_tuned(config, None, CPU, 30, care)
    assert found.chosen.setting.lr == 1e-2, "1e-9 learns nothing"
    assert found.labels == 60  # thirty of each of two classes
    *folds_trained, last = watched.trained_on
    assert len(last) == 60
    assert len(folds_trained) == 2 * 3  # two rates, three parts
    assert all(set(rest) < set(last) and len(rest) == 40 for rest in folds_trained)
    assert sorted(index for part in watched.chosen_by[:3] for index in part) == last, (
        "every label is read once for each rate"
    )
    assert all(not set(a) & set(b) for a, b in zip(folds_trained, watched.chosen_by, strict=True))


def test_of_all_labels_a_part_is_held_back_and_trained_on_in_the_end(
    tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    care = care_of((None,), finetune_steps=(3,), learning_rates=(1e-3, 1e-2), finetune_causal=(False,), extensions=0)
    found = fine_tuned(tiny_recipe, None, CPU, None, care)
    assert found.labels == 48 == len(watched.trained_on[-1])
    assert [len(each) for each in watched.chosen_by] == [48 // 5] * 2
    assert not set(watched.chosen_by[0]) & set(watched.trained_on[0])


def test_one_setting_is_taken_without_choosing(tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    one = care_of((4,), finetune_steps=(2,), learning_rates=(1e-3,), finetune_causal=(True,))
    assert fine_tuned(tiny_recipe, None, CPU, 4, one).chosen.setting == Setting(1e-3, 2, True)
    several = care_of((1,), finetune_steps=(2, 3), learning_rates=(1e-4, 1e-3, 1e-2), finetune_causal=(False,))
    of_one = fine_tuned(tiny_recipe, None, CPU, 1, several)  # a label a class: nothing to choose by
    assert of_one.chosen.setting == Setting(1e-3, 2, False)
    assert (len(watched.trained_on), watched.chosen_by) == (2, [])


@pytest.mark.parametrize("per_class", [(1, 1), (2, 2), (2, 1, 5), (7, 7, 7), (1, 2), (30, 3)])
def test_folds_score_every_label_once_and_keep_a_sample_of_every_class(per_class: tuple[int, ...]) -> None:
    kinds = [kind for kind, count in enumerate(per_class) for _ in range(count)]
    kinds = kinds[::2] + kinds[1::2]
    parts = downstream.folds(kinds, 3)
    scored = sorted(place for _, part in parts for place in part)
    assert scored == [place for place, kind in enumerate(kinds) if per_class[kind] > 1]
    assert len(parts) == (0 if max(per_class) == 1 else min(3, len(scored)))
    for rest, part in parts:
        assert sorted([*rest, *part]) == list(range(len(kinds)))
        assert {kinds[place] for place in rest} == set(kinds)
        assert part


# A made score: best where the logarithm of the rate is nearest a number, and where steps are.
@pytest.mark.parametrize(
    ("best_lr", "best_steps", "chosen", "at_end"),
    [
        (1e-3, 170, (1e-3, 100), ()),
        (9e-5, 300, (9e-5, 300), ()),  # below the list
        (1e-2, 1000, (9e-3, 900), ()),  # above it
        (1e-9, 30, (2.7e-5, 33), ("lr",)),  # below the stated end
        (1e3, 10**6, (2.7e-2, 2700), ("lr", "steps")),  # above it: no optimum within reach
        (1e-3, 1, (1e-3, 11), ("steps",)),
    ],
)
def test_lists_grow_until_the_best_lies_inside(
    best_lr: float, best_steps: int, chosen: tuple[float, int], at_end: tuple[str, ...]
) -> None:
    care = care_of((), learning_rates=(3e-4, 3e-3, 1e-3), finetune_steps=(100, 300), finetune_causal=(False, True))
    tried: list[Setting] = []

    def at(setting: Setting) -> tuple[float, None]:
        tried.append(setting)
        near = abs(math.log(setting.lr / best_lr)) + abs(math.log(setting.steps / best_steps))
        return -near + 0.1 * setting.causal, None

    found = best_setting(care, at)
    assert (found.setting, found.at_end) == (Setting(*chosen, True), at_end)
    assert len(tried) == len(set(tried)), "every setting is tried once"
    assert min(each.lr for each in tried) >= 2.7e-5
    assert max(each.lr for each in tried) <= 2.7e-2


def test_equal_scores_take_the_middle_and_a_list_of_one_is_taken_as_it_is() -> None:
    care = care_of((), learning_rates=(1.0, 2.0, 4.0), finetune_steps=(7,), finetune_causal=(False,))
    assert best_setting(care, lambda setting: (0.5, None)).setting == Setting(2.0, 7, False)
    one = care_of((), learning_rates=(1.0,), finetune_steps=(7,), finetune_causal=(False,))
    assert best_setting(one, lambda setting: (0.5, "kept")) == (Setting(1.0, 7, False), "kept", ())


def test_a_training_that_diverges_is_passed_over() -> None:
    care = care_of((), learning_rates=(1.0, 2.0), finetune_steps=(7,), finetune_causal=(False,))

    def at(setting: Setting, most: float = 2.0) -> tuple[float, None]:
        if setting.lr > most:
            raise Diverged("not finite")
        return setting.lr, None

    assert best_setting(care, at) == (Setting(2.0, 7, False), None, ())
    with pytest.raises(Diverged, match=r"every learning rate from 0\.25 on"):
        best_setting(care, lambda setting: at(setting, 0.0))


def test_steps_and_attention_are_chosen_at_the_best_learning_rate() -> None:
    """Each setting is tried once, and one that diverges is never the best."""
    care = care_of(
        (), learning_rates=(1.0, 2.0, 3.0), finetune_steps=(10, 20), finetune_causal=(False, True), extensions=0
    )
    tried: list[Setting] = []

    def at(setting: Setting) -> tuple[float, str]:
        tried.append(setting)
        score = {1.0: 0.5, 2.0: 0.6, 3.0: float("nan")}[setting.lr] + setting.steps / 100 - 0.3 * setting.causal
        return score, f"kept of {setting.lr:g}, {setting.steps}"

    assert best_setting(care, at) == (Setting(2.0, 20, False), "kept of 2, 20", ("steps",))
    assert tried == [
        *(Setting(lr, 10, False) for lr in (1.0, 2.0, 3.0)), Setting(2.0, 20, False), Setting(2.0, 20, True)
    ]  # fmt: skip


def test_a_fifth_or_a_thousand_is_held_back_by_seed() -> None:
    rest, kept = held_back(100, 1)
    assert sorted([*rest, *kept]) == list(range(100))
    assert len(kept) == 20
    assert held_back(100, 1) == (rest, kept) != held_back(100, 2)
    assert len(held_back(20_000, 0)[1]) == 1000
    assert [len(held_back(count, 0)[1]) for count in (1, 2, 3, 4, 5, 9, 10)] == [0, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_fewer_than_five_samples_are_divided_too(
    tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """One is chosen by, and all are trained on in the end."""
    watched = Watched(monkeypatch)
    care = care_of((None,), finetune_steps=(2,), learning_rates=(1e-3, 1e-2), finetune_causal=(False,), extensions=0)
    found = fine_tuned(override(tiny_recipe, {"data.samples": samples}), None, CPU, None, care)
    assert found.labels == samples == len(watched.trained_on[-1])
    assert [len(each) for each in watched.chosen_by] == [1, 1]


def test_of_a_single_sample_nothing_is_chosen(tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    care = care_of((None,), finetune_steps=(2,), learning_rates=(1e-3, 1e-2), finetune_causal=(False,))
    found = fine_tuned(override(tiny_recipe, {"data.samples": 1}), None, CPU, None, care)
    assert (found.labels, len(watched.trained_on), watched.chosen_by) == (1, 1, [])


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
        (["objectives=cosine", "train.batch=4096"], "cosine: train.batch=4096 is more than the 48 training samples"),
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


def test_results_kept_by_the_former_rule_open_as_a_whole_or_not_at_all(
    tiny_recipe: PretrainConfig, tmp_path: Path
) -> None:
    options, variants = Options(objectives=("cosine",), seeds=(0, 1)), [compare.Variant("cosine", tiny_recipe)]
    before = downstream.CareBefore.of(options.care)
    former = compare.Measure("objectives", objectives.measure, before)
    for seed in (0, 1):
        jobs = (
            compare.pair(variants[0], seed, former, tmp_path),
            objectives.control(tiny_recipe, seed, before, tmp_path),
        )
        for job in jobs:
            job.result.parent.mkdir(parents=True, exist_ok=True)
            job.result.write_text("{}")
    assert objectives.care_of(variants, tiny_recipe, options, tmp_path) == before
    more = options.model_copy(update={"seeds": (0, 1, 2)})
    assert objectives.care_of(variants, tiny_recipe, more, tmp_path) == options.care, "two rules are never mixed"
    jobs[1].result.unlink()
    assert objectives.care_of(variants, tiny_recipe, options, tmp_path) == options.care


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


def test_what_is_real_is_so_over_test_samples_too() -> None:
    """A gain that all seeds agree on is real on 1,000 test samples and not on 20; of results of before seeds decide."""

    def rows_of(gain: float, samples: int, *, kept: bool) -> list[dict[str, Any]]:
        found = []
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            credits = (torch.rand(samples, generator=draw) < 0.5 + gain).float()
            value = 0.5 + gain + 0.001 * seed * (-1) ** (gain > 0)
            figures = {"probe": value, "probe_final": value, "finetuned_50": value}
            packed = {"credits": dict.fromkeys(figures, pack_credits(credits)), "clusters": {}} if kept else {}
            found.append(row(value) | figures | packed | {"raw_tokens": 0.4, "label_counts": {"finetuned_50": 500}})
        return found

    for samples, kept, real in ((1000, True, True), (20, True, False), (20, False, True)):
        options = Options(objectives=("cosine",), labels=(50,))
        summary = summarise({"cosine": rows_of(0.1, samples, kept=kept)}, rows_of(0.0, samples, kept=kept), options)
        (test,) = summary["against_random"]["probe"]
        assert (test["p_both"] is None) == (not kept)
        assert Difference(**test).real is real
        assert ("both" in summary["random"]["probe"]) == kept
        over = "over seeds and test samples together" if kept else "over seeds alone"
        assert any(over in line for line in summary["verdict"])
        shown = summary | {"recipe": "my:recipe", "margins": {"cosine": None}}
        assert "Labelled samples used in all, for choosing and for training: 50 labels a class: 500." in render(shown)


def test_the_headline_answers_for_the_probe_and_for_fine_tuning() -> None:
    def pair(better: str, worse: str, p: float) -> Difference:
        return Difference(better, worse, 0.03, 0.01, p, p, 0.02)

    pays = {
        "probe": [pair("InfoNCE", RANDOM, 0.01), pair("b", RANDOM, 0.02), pair(RANDOM, "c", 0.01)],
        "probe_final": [pair("b", RANDOM, 0.01)],
        "finetuned_10": [pair("b", RANDOM, 0.5), pair(RANDOM, "c", 0.06)],
        "finetuned_all": [pair("b", RANDOM, 0.5), pair(RANDOM, "c", 0.01)],
    }
    assert objectives.sentences(pays, {}, alone(4, (0, 1, 2)))[0] == (
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
