"""The cards of text and of events: n-gram counts, and kinds and times read from what is generated."""

import json
import re
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.report.summaries import GenerateSummary, PretrainSummary
from tests.summaries import check_summary

pytestmark = pytest.mark.slow

_SMALL = (
    *("data.limit=64", "model.dim=16", "model.depth=2", "model.heads=2", "model.mlp_dim=32", "train.batch=8"),
    *("train.length.steps=3", "train.evaluate=3", "train.checkpoint=3"),
    *("verdict.fit_samples=80", "verdict.test_samples=32", "verdict.health_samples=16"),
)


KEYS = {"text": ("data.letters=etaoin", "data.patch=4", "data.window=96"), "events": ()}


@pytest.fixture(scope="module", params=KEYS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The recipe of a demo, and a run of it."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    assert main(["pretrain", f"recipes.{request.param}:demo", *_SMALL, *KEYS[request.param], f"out={run}"]) == 0
    return request.param, run


def test_the_card_counts_n_grams_where_tokens_are_symbols(trained: tuple[str, Path]) -> None:
    name, run = trained
    found = check_summary(run / "summary.json", PretrainSummary)
    card = (run / "report" / "card.txt").read_text()
    assert ("counts" in found) == ("-gram counts" in card) == (name == "text")
    if name == "text":
        assert 0 < found["counts"]["retrieval_top1"] < found["counts"]["possible"] <= 1


def test_it_generates_and_is_judged(trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, run = trained
    assert main(["generate", str(run), "samples=8", "draws=2", "decoder_steps=3", "train_samples=32"]) == 0
    found = check_summary(run / "generate.json", GenerateSummary)
    assert "psnr" not in found
    assert [each["name"] for each in found.get("readings", [])] == (
        ["kind", "log gap", "level"] if name == "events" else []
    )
    assert ("law" in found) == (name == "events")
    assert (run / "generate" / "completions.png").is_file()
    if name == "events":
        best = {each["name"]: {row["name"]: row["figure"] for row in each["rows"]} for each in found["readings"]}
        assert best["log gap"]["the best possible"] < best["log gap"]["always the mean"]
        assert best["kind"]["the best possible"] > best["kind"]["always the mean"]
        (above,) = re.findall(
            r"Above NEPA's: kind random weights ([+-][\d.]+) ± [\d.]+ points", capsys.readouterr().out
        )
        margin = 100 * (best["kind"]["random weights"] - best["kind"]["NEPA"])
        assert float(above) == pytest.approx(margin, abs=0.06), "in the unit of the table"


def test_generated_json_is_whole(trained: tuple[str, Path]) -> None:
    assert json.loads((trained[1] / "summary.json").read_text())["samples"] == 32
