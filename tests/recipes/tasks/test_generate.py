"""nepa generate: card, figures and page of any run, and one line where nothing can be generated."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core import Modality, Tokens
from nepa_core.basics import Batch
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.load import load
from nepa_core.runtime.run import Run
from recipes.audio import demo as spoken
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.generation import decoders, showing
from recipes.generation.generating import GenerateOptions
from recipes.generation.generating import generate as generated
from recipes.presets import small
from recipes.report.summaries import GenerateSummary
from recipes.timeseries import demo as series
from recipes.training.pretraining import pretrain
from recipes.vision import digits
from tests import tiny
from tests.summaries import check_summary
from tests.tiny import CPU

ALONE = World(0, 1, CPU)
QUICK = {"samples": 12, "decoder_steps": 3, "width": 16, "draws": 3, "steps": 2, "train_samples": 40}
SHORT = {
    **{"train.length.steps": 1, "train.batch": 4, "verdict.fit_samples": 16, "verdict.test_samples": 8},
    **{"model.dim": 16, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 16, "verdict.health_samples": 4},
}


class Overlapping(Modality):
    """Windows of 4 numbers, 2 apart."""

    def dataset(self, split: str) -> Dataset[Batch]:
        draw = torch.Generator().manual_seed(len(split))
        return [{"series": torch.randn(12, generator=draw)} for _ in range(24)]  # type: ignore[return-value]

    def tokenize(self, batch: Batch) -> Tokens:
        series: Tensor = batch["series"]
        return Tokens(series.unfold(1, 4, 2), torch.arange(5.0)[:, None])


def overlapping() -> PretrainConfig:
    return override(small(Overlapping()), SHORT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(tiny.ragged(), Run(folder), ALONE, show=False)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def trained(folder: Path, config: PretrainConfig, **changes: object) -> Path:
    config = override(config, SHORT | {key.replace("__", "."): value for key, value in changes.items()})
    pretrain(config, Run(folder), ALONE, show=False)
    return folder


def words_of(*words: str) -> list[str]:
    """Quick ones, but for what is given."""
    quick = {key: str(value) for key, value in QUICK.items()} | dict(word.split("=", 1) for word in words)
    return [*(f"{key}={value}" for key, value in quick.items()), "-q"]


def generate(run: Path, *words: str) -> int:
    return main(["generate", str(run), *words_of(*words)])


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in {"EXAMPLES": 2, "WORST": 1, "DRAWN": 3, "HEARD": 1}.items():
        monkeypatch.setattr(showing, name, count)


def figures(run: Path) -> GenerateSummary:
    found: GenerateSummary = json.loads((run / "generate.json").read_text())
    return found


@pytest.mark.pictures
def test_card_figures_and_page_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run) == 0
    said = capsys.readouterr().out
    found = check_summary(run / "generate.json", GenerateSummary)
    assert said.strip().startswith(found["verdict"]["verdict"])
    assert found["verdict"]["headline"] in said
    names = ["NEPA", "random weights", "linear-Gaussian autoregression", "copying"]
    for part in ("completion", "next_token", "mean_error"):
        assert [row["name"] for row in found[part]] == names
        assert all(row["ci95"] > 0 for row in found[part][1:])
        assert all(f"{row['figure']:.3f}" in said for row in found[part])
    for key in ("from_nothing", "completed", "training"):
        assert all(0 <= share <= 1 for share in (found[key]["trees"][0], found[key]["linear"][0]))
    assert "are told from held-out ones by boosted trees in" in said
    assert "from the first 50 % of its tokens" in said
    assert found["samples"] == 12
    page = (run / "generate" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert found["verdict"]["verdict"] in page
    assert (run / "generate" / "card.txt").read_text() == said


@pytest.mark.slow
def test_decoders_are_kept_with_the_run_and_another_runs_are_not_taken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(run) == 0
    first, fitted = figures(run), []
    fit = decoders.fit_decoders
    monkeypatch.setattr(decoders, "fit_decoders", lambda *args, **named: fitted.append(1) or fit(*args, **named))
    assert generate(run, "keep=2", f"out={tmp_path / 'other'}") == 0
    assert not fitted
    assert json.loads((tmp_path / "other/generate.json").read_text())["keep"] == 2
    assert figures(run) == first, "out= is another folder"
    assert generate(run) == 0
    again = figures(run)
    assert [row["figure"] for row in again["completion"]] == [row["figure"] for row in first["completion"]]
    another = trained(tmp_path / "another", tiny.ragged(), train__seed=1)
    shutil.copytree(run / "generate", another / "generate")
    assert generate(another) == 0
    assert fitted == [1]


@pytest.mark.slow
def test_options_change_what_they_say(run: Path) -> None:
    """Each beside the defaults, by what it does to the figures."""
    net, config = load(run), load_config(PretrainConfig, run / "config.json")

    def found(**changes: object) -> dict[str, object]:
        options = GenerateOptions.model_validate(QUICK | changes)
        return {**generated(net, config, options, run / "generate", show=False).summary}

    base = found()
    for key, value, changed in (
        ("temperature", 0.2, "completion"),
        ("steps", 3, "next_token"),
        ("seed", 1, "next_token"),
        ("decoder_steps", 9, "next_token"),
        ("width", 32, "next_token"),
        ("train_samples", 20, "mean_error"),
        ("split", "train", "mean_error"),
        ("draws", 5, "completion"),
    ):
        other = found(**{key: value})
        assert other[changed] != base[changed], key
        assert other[key] == value


@pytest.mark.slow
def test_pictures_have_a_signal_to_noise_ratio_and_levels(tmp_path: Path) -> None:
    run = trained(tmp_path / "digits", digits())
    assert generate(run, "train_samples=400", "keep=6") == 0
    found = check_summary(run / "generate.json", GenerateSummary)
    assert 5 < found["psnr"] < 30
    assert 0 < found["quantised"] <= found["numbers"] == 64
    assert (run / "generate" / "energy.png").exists()


@pytest.mark.slow
def test_a_region_is_made_by_a_network_that_is_told_where(tmp_path: Path) -> None:
    own = {"data__patch_order": "random_per_sample", "model__predict_position": "rotate"}
    run = trained(tmp_path / "digits", digits(), **own)
    assert generate(run, "region=[1,0,3,1]") == 0
    found = check_summary(run / "generate.json", GenerateSummary)
    assert found["region"] == [1, 0, 3, 1]
    assert "all but the region [1, 0, 3, 1]" in (run / "generate" / "card.txt").read_text()


@pytest.mark.slow
def test_sound_can_be_heard(tmp_path: Path) -> None:
    run = trained(tmp_path / "spoken", spoken(), data__bands=16)
    assert generate(run, "samples=6") == 0
    page = (run / "generate" / "index.html").read_text()
    assert page.count('<audio controls src="data:audio/wav;base64,') == 3
    assert (run / "generate" / "completed_0.wav").read_bytes().startswith(b"RIFF")


@pytest.mark.slow
def test_a_known_law_stands_on_the_card_and_is_no_rival(tmp_path: Path) -> None:
    run = trained(tmp_path / "series", series())
    assert generate(run) == 0
    found = check_summary(run / "generate.json", GenerateSummary)
    assert found["next_token"][-1]["name"] == "the best possible"
    assert "possible" not in found["verdict"]["verdict"]
    assert "The law of the data is known" in (run / "generate" / "card.txt").read_text()


@pytest.mark.slow
def test_without_bos_the_first_token_is_given(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny.recipe(), model__bos=False)
    assert generate(run, "keep=0") == 0
    assert "Samples drawn from the first token alone" in (run / "generate" / "card.txt").read_text()


REFUSED = [
    (("keep=6",), r"keep=6 leaves nothing of the 6 tokens of a sequence to make"),
    (("keep=1.0",), r"keep=1.0: give a share below 1, or a whole number of tokens"),
    (("keep=true",), r"keep=true: give a share below 1, or a whole number of tokens"),
    (("keep=0.5", "region=[0,2]"), r"keep= and region= are two ways to say what is given: leave one out"),
    (("region=[0,2]",), r"region= needs a network that was trained on orders of each sample's own"),
    (("region=[0,2,3]",), r"region=\[0, 2, 3\]: give \[y0,x0,y1,x1\], or \[x0,x1\]"),
    (("optim.lr=1",), r"optim.lr can't be set for nepa generate"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=lambda each: each[0] if isinstance(each, tuple) else "")
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Path, words: tuple[str, ...], line: str, fails: Callable[..., str]
) -> None:
    before = sorted(run.rglob("*"))
    assert re.match(line, fails("generate", str(run), *words_of(*words)))
    assert [path for path in sorted(run.rglob("*")) if ".lock" not in path.name] == [
        path for path in before if ".lock" not in path.name
    ]


@pytest.mark.parametrize(
    ("config", "changes", "line"),
    [
        (tiny.recipe(), {"objective__causal": False}, r".*trained with objective\.causal=false"),
        (tiny.recipe(), {"objective__shift": False}, r".*trained with objective\.shift=false"),
        (overlapping(), {}, r"Overlapping: one number of sample\['series'\] stands in 2 tokens"),
    ],
    ids=["causal", "shift", "overlap"],
)
def test_runs_that_generate_nothing_are_one_line(
    config: PretrainConfig, changes: dict[str, object], line: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    run = trained(tmp_path / "run", config, **changes)
    assert re.match(line, fails("generate", str(run), *words_of()))
    assert not [*run.glob("generate*")]


def test_a_run_on_labels_predicts_nothing(tmp_path: Path, fails: Callable[..., str]) -> None:
    words = ["train.length.steps=1", "train.batch=8", "control=false", "-q"]
    assert main(["finetune", "tests.tiny:recipe", *words, f"out={tmp_path / 'tuned'}"]) == 0
    assert re.match(r".* was trained on labels, and its output no longer", fails("generate", str(tmp_path / "tuned")))
    assert not (tmp_path / "tuned" / "generate").exists()


def test_figures_of_generation_stay_with_the_weights_that_they_are_of(run: Path) -> None:
    (run / "generate.json").write_text("{}")
    Run(run).set_aside(12)
    assert (run / "generate_12.json").exists()
    assert not (run / "generate.json").exists()
