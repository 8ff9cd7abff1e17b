"""The one table of terms: what it says is so, all that lists terms is made from it, and a user's own is taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_core import ObjectiveConfig, Prediction, UserError, next_embedding_loss, terms
from nepa_core.pretrainer import objective_loss
from nepa_core.runtime import trust
from nepa_core.runtime.config import imports_of, override, parse_assignments
from nepa_core.terms import TERMS, Term
from recipes.cli import main
from recipes.objective_names import NAMED, named
from recipes.presets import PAPER_OBJECTIVE
from recipes.training.starting import build_pretrainer, try_batch
from tests import tiny

DOCS = Path(__file__).parents[2] / "docs/objectives.md"
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)


def _sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 6, 5).requires_grad_(), torch.randn(3, 6, 5).requires_grad_()


def _value(term: Term, prediction: Tensor, target: Tensor) -> float:
    torch.manual_seed(1)  # SIGReg draws directions
    settings: dict[str, Any] = {key: getattr(PAPER_OBJECTIVE, key) for key in term.settings}
    if term.across == "all processes":
        settings["gather"] = lambda x: x
    return float(term.function(prediction.detach(), target.detach(), None, **settings))


# ---------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("name", TERMS)
def test_a_term_looks_across_the_samples_that_the_table_says(name: str) -> None:
    """Where it looks at no other sample, the term of a batch is the mean over the samples alone."""
    prediction, target = _sequences()
    whole = _value(TERMS[name], prediction, target)
    alone = [_value(TERMS[name], p[None], z[None]) for p, z in zip(prediction, target, strict=True)]
    same = whole == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert same == (TERMS[name].across is None)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_knows_no_prediction_where_the_table_says_that_it_shapes_targets(name: str) -> None:
    prediction, target = _sequences()
    same = _value(TERMS[name], prediction, target) == _value(TERMS[name], torch.randn_like(prediction), target)
    assert same == TERMS[name].shapes_targets
    assert not (same and TERMS[name].space), "what knows no prediction trains none"


def test_the_documentation_has_the_table() -> None:
    assert f"\n{terms.table()}\n" in DOCS.read_text()


@pytest.mark.parametrize("task", ["pretrain", "objectives"])
def test_the_help_has_every_term_with_its_formula(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([task, "--help"]) == 0
    said = capsys.readouterr().out
    for name, each in TERMS.items():
        assert re.search(rf"^  {name} +{re.escape(each.formula)}\n +{re.escape(each.compares)}$", said, re.MULTILINE)
    assert "  module:function " in said


def test_every_term_that_trains_the_prediction_is_an_objective_by_its_name() -> None:
    for name, each in TERMS.items():
        alone = name in NAMED and NAMED[name] == {"objective.terms": {name: 1.0}}
        assert alone == (each.space is not None)


# ---------------------------------------------------------------------------------------------- the user's own


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of the documentation, and functions that give no loss."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    wrong = "\n\ndef wide(p, z, mask):\n    return p - z\n\n\ndef number(p, z, mask):\n    return 1.0\n"
    wrong += (
        "\n\ndef fails(p, z, mask):\n    return p @ z\n\n\ndef two(p, z):\n    return p.mean()\n\n\nWORD = 'huber'\n"
    )
    (tmp_path / "my_package").mkdir()
    for file in ("my_losses.py", "my_package/losses.py"):
        (tmp_path / file).write_text(block + wrong)
    for name in ("my_losses", "my_package", "my_package.losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(trust, "_given", trust.Trust())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return "my_losses:huber"


def objective(**changes: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(PAPER_OBJECTIVE.model_dump() | changes)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_a_term_of_the_users_is_given_pairs_and_what_counts(
    mine: str, mask: Tensor | None, stop_gradient: bool
) -> None:
    predictions, embeddings = _sequences()
    config = objective(terms={"cosine": 2.0, mine: 0.5}, stop_gradient=stop_gradient)
    loss = objective_loss(config, Prediction(embeddings, predictions, mask))
    values = []
    for b in range(3):
        for t in range(5):
            if mask is None or (mask[b, t] and mask[b, t + 1]):
                p, z = (x / x.norm() for x in (predictions[b, t], embeddings[b, t + 1]))
                away = (p - z).abs()
                values.append(torch.where(away < 0.1, away**2 / 2, 0.1 * (away - 0.05)).mean())
    expected = 2 * next_embedding_loss(predictions, embeddings, mask) + torch.stack(values).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert (embeddings.grad is not None and bool(embeddings.grad.any())) != stop_gradient


def test_a_term_of_the_users_gets_float32_under_autocast(mine: str) -> None:
    predictions, embeddings = (x.detach().bfloat16() for x in _sequences())
    value = partial(objective_loss, objective(terms={mine: 1.0}))
    with torch.autocast("cpu", torch.bfloat16):
        inside = value(Prediction(embeddings, predictions, None))
    assert inside.dtype == torch.float32
    assert inside.item() == value(Prediction(embeddings.float(), predictions.float(), None)).item()


@pytest.mark.parametrize(
    "word",
    ["objective.terms.my_package.losses:huber=0.5", 'objective.terms={"my_package.losses:huber":0.5,"cosine":1}'],
)
def test_a_term_of_the_users_is_set_like_any_other(mine: str, word: str) -> None:
    config = override(tiny.recipe(), parse_assignments([word]))
    assert config.objective.terms == {"cosine": 1.0, "my_package.losses:huber": 0.5}
    assert not config.objective.has_heads
    assert config.objective.space == "embedding"
    assert "my_package.losses:huber" in imports_of(config)


def test_a_function_of_the_users_is_an_objective(mine: str) -> None:
    assert named(mine, tiny.recipe()).objective.terms == {mine: 1.0}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("my_losses:hubr", "my_losses has no hubr; did you mean huber?"),
        ("my_loses:huber", "no module my_loses here"),
        ("my_losses:", "not of the form module:function"),
        ("my_losses:WORD", "objective.terms.my_losses:WORD is no function of (predictions, targets, mask)"),
        ("my_losses:wide", "gives a tensor of shape [8, 6, 16], and a loss is a tensor of one number"),
        ("my_losses:number", "objective.terms.my_losses:number gives float, and a loss is a tensor"),
        ("my_losses:fails", "called with (predictions, targets, mask) fails, line "),
        ("my_losses:two", "fails: TypeError: two() takes 2 positional arguments but 3 were given"),
    ],
)
def test_a_function_that_is_no_term_is_one_line_before_training(mine: str, path: str, said: str) -> None:
    def begin() -> None:
        config = named(path, tiny.recipe())
        try_batch(config, build_pretrainer(config))

    with pytest.raises(UserError) as raised:
        begin()
    assert path in str(raised.value)
    assert said.replace("'", "") in str(raised.value).replace("'", "")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_function_of_the_users_is_compared_with_named_objectives(mine: str) -> None:
    """In workers, which are processes of their own."""
    few = ["seeds=0", "labels=2", "learning_rates=1e-2", "finetune_steps=3", "finetune_causal=false", "workers=2"]
    words = ["objectives", "tests.tiny:recipe", f"objectives=cosine,{mine}", *few, "out=compared"]
    root = {"PYTHONPATH": str(DOCS.parents[1])}
    subprocess.run([sys.executable, "-m", "recipes", *words], check=True, env=os.environ | root)
    assert mine in Path("compared/report/index.html").read_text()
