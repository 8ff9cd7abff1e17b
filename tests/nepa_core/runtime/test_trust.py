"""Whose code is run: a run that names code is read where this user made it, or says trust=true."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from nepa_core.basics import UserError
from nepa_core.runtime import trust
from recipes.cli import main

MODULE = """
from pathlib import Path
from tests.tiny import Waves, recipe

Path({mark!r}).touch()

class Mine(Waves):
    pass

def base():
    found = recipe()
    return found.model_copy(update={{"data": Mine()}})

def backwards(tokens, grid):
    import torch
    return torch.arange(tokens.values.shape[1]).flip(0)

def squares(predictions, targets, mask):
    return (predictions - targets).square().mean()
"""


class Place:
    """A folder with a module of the user's, which leaves a mark when it is imported, and the command in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.mark = folder, capsys, folder / "imported"

    def write(self, name: str) -> None:
        path = self.folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE.format(mark=str(self.mark)))

    def __call__(self, *words: str) -> str:
        """What a command says that succeeds."""
        self.forget()
        status = main(words)
        said = self.capsys.readouterr()
        assert status == 0, said.err
        return said.err

    def refuses(self, *words: str) -> str:
        """The line of a command that is refused and has imported nothing of the user's."""
        self.forget()
        assert main(words) == 2
        (line,) = self.capsys.readouterr().err.splitlines()
        assert not self.mark.exists(), "the code was run"
        return line

    def forget(self) -> None:
        """As in a new process: nothing of the user's is imported."""
        self.mark.unlink(missing_ok=True)
        for name in [name for name in sys.modules if name.startswith("mine_")]:
            del sys.modules[name]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setattr(trust, "_given", trust.Trust())
    return Place(tmp_path, capsys)


@pytest.fixture
def mine(place: Place) -> Place:
    """The same with a run of the user's own adapter, runs/base."""
    place.write("mine_waves")
    place("pretrain", "mine_waves:base", "out=runs/base", "train.length.steps=1")
    return place


PROBE = ("probe", "runs/base", "layers=0", "poolings=mean", "classifiers=knn")
READING = [
    PROBE,
    ("inspect", "runs/base", "samples=1"),
    ("embed", "runs/base"),
    ("finetune", "runs/base", "train.length.steps=1"),
    ("finetune", "tests.tiny:recipe", "init=runs/base", "train.length.steps=1"),
    ("pretrain", "runs/base", "out=again"),
    ("pretrain", "runs/base"),
    ("export", "runs/base", "out=released"),
    ("export", "runs/base", "format=torch"),
    ("push", "runs/base", "me/base", "dry_run=true"),
    ("bench", "runs/base"),
    ("evaluate", "runs/base-finetune"),
    ("probe", "runs/base", "--help"),
]


def test_a_run_of_a_stranger_is_refused_by_every_task_before_its_code_runs(mine: Place) -> None:
    mine("finetune", "runs/base", "train.length.steps=1")
    shutil.rmtree("settings")
    shutil.rmtree("runs/base/report")
    mine.forget()
    before = sorted(Path().rglob("*"))
    for words in READING:
        line = mine.refuses(*words)
        assert "/config.json: it names mine_waves:Mine, code that would be run" in line
        assert line.endswith("give the same command with trust=true")
        assert sorted(path for path in Path().rglob("*")) == before


def test_trust_true_reads_a_stranger_s_run(mine: Place) -> None:
    shutil.rmtree("settings")
    mine(*PROBE, "trust=true")
    assert mine.mark.exists()
    assert "trust=true" in mine.refuses(*PROBE), "it is said for one command"
    assert "trust=maybe" in mine.refuses(*PROBE, "trust=maybe")


def test_the_user_s_own_run_is_read_wherever_it_lies_until_its_config_is_changed(mine: Place) -> None:
    mine(*PROBE)
    shutil.copytree("runs/base", "elsewhere/copy")
    mine("probe", "elsewhere/copy", *PROBE[2:])
    file = Path("elsewhere/copy/config.json")
    file.write_text(file.read_text().replace('"samples": 48', '"samples": 47'))
    assert "trust=true" in mine.refuses("probe", "elsewhere/copy", *PROBE[2:])


def test_a_run_of_before_there_were_notes_is_noted_when_its_recipe_goes_on_with_it(mine: Place) -> None:
    shutil.rmtree("settings")
    Path("runs/base/summary.json").unlink()
    mine("pretrain", "mine_waves:base", "out=runs/base", "train.length.steps=1")
    mine(*PROBE)


def test_a_home_that_can_t_be_written_to_is_said_and_stops_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write("mine_waves")
    Path("file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.folder / "file"))
    assert "commands that read it will need trust=true" in place("pretrain", "mine_waves:base", "train.length.steps=1")


def test_an_order_of_the_user_s_in_a_built_in_adapter_s_config_is_code_too(place: Place) -> None:
    place.write("mine_orders")
    place("pretrain", "recipes.vision:digits_2x2", "data.patch_order=mine_orders:backwards", "train.length.steps=1")
    run = "runs/digits_2x2"
    read = ("probe", run, "layers=0", "poolings=mean", "classifiers=knn", "train_samples=50", "test_samples=50")
    place(*read)
    shutil.rmtree("settings")
    assert "it names mine_orders:backwards" in place.refuses(*read)
    assert "it names mine_orders:backwards" in place.refuses("pretrain", "recipes.vision:digits_2x2", f"out={run}")


def test_a_term_of_the_user_s_in_an_objective_is_code_too(place: Place) -> None:
    place.write("mine_package.losses")
    term = "objective.terms.mine_package.losses:squares=0.5"
    place("pretrain", "tests.tiny:recipe", term, "out=runs/recipe", "train.length.steps=1")
    assert place.mark.exists()
    read = ("probe", "runs/recipe", *PROBE[2:])
    place(*read)
    shutil.rmtree("settings")
    for words in (read, ("pretrain", "runs/recipe", "out=again"), ("pretrain", "tests.tiny:recipe", "out=runs/recipe")):
        assert "it names mine_package.losses:squares, code that would be run" in place.refuses(*words)
    place(*read, "trust=true")


def test_a_run_of_built_in_adapters_needs_no_note(place: Place) -> None:
    place("pretrain", "tests.tiny:recipe", "out=runs/recipe", "train.length.steps=1")
    assert not Path("settings").exists()
    place("inspect", "runs/recipe", "samples=1")


def test_nothing_is_imported_from_inside_a_run_folder(mine: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("mine_waves.py", "runs/base/mine_inside.py")
    mine.write("mine_package.__init__")
    file = Path("runs/base/config.json")
    text = file.read_text()
    file.write_text(text.replace("mine_waves:Mine", "runs.base.mine_inside:Mine"))
    line = mine.refuses(*PROBE, "trust=true")
    assert "nothing is imported from inside a run folder" in line
    assert "nothing is imported" in mine.refuses("pretrain", "runs.base.mine_inside:base", "out=other")
    file.write_text(text.replace("mine_waves:Mine", "mine_inside:Mine"))
    for folder in ("runs/base", "runs/base/checkpoints"):
        monkeypatch.chdir(mine.folder / folder)
        up = "." if folder == "runs/base" else ".."
        assert "nothing is imported from inside a run folder" in mine.refuses("probe", up, "trust=true")
        assert "" not in sys.path
        monkeypatch.chdir(mine.folder)
    shutil.rmtree("settings")
    monkeypatch.chdir("runs/base")
    assert "it names mine_inside:Mine" in mine.refuses("probe", ".")


def test_a_package_of_the_name_of_ours_elsewhere_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.is_ours("tests.tiny")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert not trust.is_ours("tests.tiny")


def test_what_the_user_s_own_code_names_is_trusted_where_a_file_names_it_too(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    with trust.reading(file), pytest.raises(UserError, match="trust=true"):
        trust.check("colorsys:rgb_to_yiq")
    trust.check("colorsys:rgb_to_yiq")
    with trust.reading(file):
        trust.check("colorsys:hls_to_rgb")


@pytest.mark.parametrize(
    "recipe",
    ["builtins:input", "os:abort", "os:getcwd", "builtins:dict", "tests.tiny:Waves", "pathlib:Path", "this:d",
     "code:interact", "tests.tiny:SHAPE", "recipes.cli:main", "recipes.cli:list_recipes",
     "recipes.comparison.engine:default_workers", f"{__name__}:bad_annotation", f"{__name__}:re_exported"],
)  # fmt: skip
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_what_can_t_be_a_recipe_is_refused_before_it_is_called(place: Place, recipe: str, task: str) -> None:
    line = place.refuses(task, recipe)
    assert recipe.partition(":")[2] in line
    assert sorted(path.name for path in Path().iterdir()) == []


def bad_annotation() -> int:
    raise AssertionError("it was called")


re_exported = shutil.get_terminal_size  # no annotation, of another module


def test_recipes_may_be_partials_caches_and_objects(place: Place) -> None:
    Path("mine_kinds.py").write_text(
        "from __future__ import annotations\n"
        "import functools\n"
        "from tests import tiny\n"
        "def made(dim=16):\n    return tiny.recipe()\n"
        "partial = functools.partial(made, dim=16)\n"
        "cached = functools.cache(tiny.recipe)\n"
        "class Kind:\n    def __call__(self) -> PretrainConfig:\n        return tiny.recipe()\n"
        "thing = Kind()\n"
        "def annotated() -> PretrainConfig | None:\n    return tiny.recipe()\n"
    )
    for name in ("made", "partial", "cached", "thing", "annotated"):
        place("pretrain", f"mine_kinds:{name}", "--help")
