"""Config files say what the command line says, and an error names the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nepa_core.runtime import trust
from nepa_core.runtime.config import keys, override
from recipes.cli import main
from recipes.config_files import as_text, read_config_file
from tests import tiny

HEAD = "recipe: tests.tiny:recipe\n"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("my.yaml").write_text(text)
        return Path("my.yaml")

    return write


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.lr: 3e-4", {"optim.lr": 3e-4}),
        ("optim: {lr: 3e-4, clip: null}", {"optim.lr": 3e-4, "optim.clip": None}),
        ("optim:\n  lr: 1\nout: runs/x", {"optim.lr": 1, "out": "runs/x"}),
        ("a: no\nb: off\nc: 010", {"a": "no", "b": "off", "c": "010"}),
        ("a: 1_000\nb: 12:30:00\nc: 2020-01-31", {"a": "1_000", "b": "12:30:00", "c": "2020-01-31"}),
        ("a: '1'\nb: \"true\"\nc: true\nd:", {"a": "1", "b": "true", "c": True, "d": None}),
        ("a: [1, x, [2]]", {"a": [1, "x", [2]]}),
        ("a: {}", {"a": {}}),
    ],
)
def test_keys_and_values_are_those_of_the_command_line(
    written: Callable[..., Path], text: str, values: dict[str, Any]
) -> None:
    found = read_config_file(written(HEAD + text))
    assert (found.target, found.values) == ("tests.tiny:recipe", values)


def test_what_print_config_prints_is_the_same_config(
    written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "tests.tiny:recipe", "optim.lr=5e-5", "out=runs/x", "--print-config"]) == 0
    found = read_config_file(written(capsys.readouterr().out))
    assert found.values.pop("out") == "runs/x"
    wanted = override(tiny.recipe(), {"optim.lr": 5e-5})
    assert override(tiny.recipe(), found.values) == wanted
    assert not Path("runs").exists()
    path = written(as_text("tests.tiny:recipe", keys(wanted)))
    assert main(["pretrain", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_a_run_is_made_of_a_file_and_the_command_line_goes_before_it(written: Callable[..., Path]) -> None:
    path = written(f"{HEAD}train: {{length: {{steps: 3}}, seed: 5}}\nout: runs/a\n")
    assert main(["pretrain", str(path), "train.seed=6", "-q"]) == 0
    text = Path("runs/a/config.json").read_text()
    assert '"seed": 6' in text
    assert '"steps": 3' in text
    assert '"recipe": "tests.tiny:recipe"' in text
    assert main(["probe", str(written("recipe: runs/a\nclassifiers: knn\n")), "-q"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD}optim:\n  lr: 1e-3\n  lrr: 2", "my.yaml, line 4: unknown key optim.lrr; did you mean optim.lr?"),
        (f"{HEAD}\noptim.lr: fast", "my.yaml, line 3: optim.lr=fast: input should be a valid number"),
        (f"{HEAD}stepz: 3", "my.yaml, line 2: unknown key stepz"),
        (f"{HEAD}optim.lr: 1\noptim: {{lr: 2}}", "my.yaml, line 3: optim.lr is given twice, here and in line 2"),
        (f"{HEAD}optim: [1", "my.yaml, line 2: no YAML: "),
        (f"{HEAD}? [1]\n: 2", "my.yaml, line 2: a key must be a name"),
        (f"{HEAD}a: &x 1\nb: *x", "my.yaml: aliases are not read; write out what *x stands for"),
        ("optim.lr: 1", "my.yaml names no recipe: write a line such as `recipe: recipes.vision:digits`"),
        ("", "my.yaml holds no keys"),
        ("- 1", "my.yaml holds no keys"),
        (f"{HEAD}trust: true", "my.yaml, line 2: unknown key trust"),
        ("recipe: os:abort", "my.yaml, line 1: it names os:abort, code that would be run"),
        (f"{HEAD}data.order: some_lab.orders:mine", "my.yaml, line 2: it names some_lab.orders:mine, code that"),
        (f"{HEAD}objective.terms: {{'lab:term': 1}}", "my.yaml, line 2: it names objective.terms.lab:term, code that"),
        (f"{HEAD}{'a: {' * 2000}", "my.yaml"),
        (
            f"{HEAD}out: runs/x\ntrain:\n  length:\n    steps: 3\n    epochs: 1",
            "my.yaml, lines 5 and 6: train.length: a duration needs exactly one of steps, epochs, fraction",
        ),
        (f"{HEAD}'optim.lr ': 1", "my.yaml, line 2: the key 'optim.lr ' has blanks; take them out"),
        (f"{HEAD}optim:\n  ' lr': 1", "my.yaml, line 3: the key ' lr' has blanks; take them out"),
        (f"{HEAD}optim lr: 1", "my.yaml, line 2: the key 'optim lr' has blanks; take them out"),
        (f"{HEAD}\nmodel.heads: 3", "my.yaml, line 3: model.dim=16 must be a multiple of 2 * model.heads=6"),
        (f"{HEAD}a=b: 3", "my.yaml, line 2: unknown key a=b"),
        ("optim.lr: 1\nrecipe: tests.tiny:no", "my.yaml, line 2: tests.tiny:no: tests.tiny has no 'no'"),
        ("recipe: nowhere", "my.yaml, line 1: 'nowhere' is neither a run folder nor a recipe"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_number(
    fails: Callable[..., str], written: Callable[..., Path], text: str, said: str
) -> None:
    path = written(text)
    assert fails("pretrain", str(path)).startswith(said)
    assert sorted(each.name for each in Path().iterdir()) == ["my.yaml"]


def test_a_key_of_the_command_line_has_no_line(fails: Callable[..., str], written: Callable[..., Path]) -> None:
    path = written(f"{HEAD}optim.lr: 1e-3")
    assert fails("pretrain", str(path), "optim.lr=fast").startswith("optim.lr=fast: ")
    assert fails("pretrain", str(path), "model.heads=3").startswith("model.dim=16 must be a multiple")
    assert fails("pretrain", str(path), "train.length.steps=2", "train.length.epochs=2").startswith("train.length: ")
    assert fails("pretrain", "absent.yml").startswith("absent.yml: No such file")


def test_code_that_a_file_names_runs_where_the_user_says_so(
    fails: Callable[..., str],
    written: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trust, "_given", trust.given())  # what the command trusts, no later test does
    path = written("recipe: lab_of_a_file:mine")
    Path("lab_of_a_file.py").write_text(
        "from tests import tiny\nprint('it ran')\ndef mine():\n    return tiny.recipe()\n"
    )
    assert "trust=true" in fails("pretrain", str(path))
    assert "it ran" not in capsys.readouterr().out
    assert main(["pretrain", str(path), "trust=true", "--print-config"]) == 0
    assert "it ran" in capsys.readouterr().out
