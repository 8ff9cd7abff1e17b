"""nepa push: the folder, its card, and what a pushed run is to those who name it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects

import nepa_core
from nepa_core.basics import UserError
from nepa_core.runtime import trust
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.audio import fsdd
from recipes.cli import main
from recipes.training.pretraining import pretrain
from tests import tiny
from tests.sounds import write_fsdd
from tests.tiny import CPU

QUICK = ("layers=final", "poolings=mean", "classifiers=knn")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average, and its probe."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    pretrain(tiny.recipe(), Run(folder), World(0, 1, CPU), show=False)
    assert main(["probe", str(folder), *QUICK, "-q"]) == 0
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of repositories, of which a download gives what it asks for."""

    def download(name: str, allow_patterns: list[str]) -> str:
        if not (tmp_path / "hub" / name).is_dir():
            raise FileNotFoundError("no network")
        cache = tmp_path / "cache" / name
        for file in filter_repo_objects((tmp_path / "hub" / name).rglob("*"), allow_patterns=allow_patterns, key=str):
            if file.is_file():
                (place := cache / file.relative_to(tmp_path / "hub" / name)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def push(run: Path, hub: Path, *words: str, to: str = "me/waves") -> Path:
    assert main(["push", str(run), to, "dry_run=true", f"out={hub / to}", *words]) == 0
    return hub / to


def head_of(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_folder_holds_weights_config_figures_and_a_card(made: Path, hub: Path) -> None:
    folder = push(made, hub, "license=apache-2.0")
    (step,) = (folder / "checkpoints").iterdir()
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    weights = {f"checkpoints/{step.name}/{name}" for name in ("ema.safetensors", "model.safetensors", "state.json")}
    assert files == {"README.md", "config.json", "summary.json", "probe.json"} | weights
    assert (folder / "config.json").read_bytes() == (made / "config.json").read_bytes()
    card, summary, probe = (folder / "README.md").read_text(), *read(folder)
    head = head_of(card)
    assert (head["license"], head["library_name"]) == ("apache-2.0", "nepa")
    assert "&" not in card.split("---")[1]  # an alias of YAML
    table = card.partition("What the features are worth")[2].splitlines()[3:5]
    assert table[0].startswith("   ")  # above the names of the rows
    assert len(table[0]) == len(table[1])
    figures = [result["metrics"][0]["value"] for result in head["model-index"][0]["results"]]
    assert figures == [round(summary["retrieval_top1"], 4), round(probe["best"]["accuracy"], 4)]
    assert huggingface_hub.ModelCard(card).data.eval_results is not None  # as the hub reads it
    assert (made / "report/card.txt").read_text().splitlines()[1] in card
    assert "random weights" in card.partition("What the features are worth")[2]
    for figure in (summary, probe):
        assert figure["made_with"]["command"] in card
    assert f"torch {torch.__version__}" in card
    assert "no probe was run" not in card


def read(folder: Path) -> list[Any]:
    return [json.loads((folder / name).read_text()) for name in ("summary.json", "probe.json")]


def test_a_card_says_what_is_not_known(made: Path, hub: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "again")
    (run / "probe.json").unlink()
    (run / "summary.json").unlink()
    card = (push(run, hub) / "README.md").read_text()
    assert "license" not in head_of(card)
    assert "None is stated: ask the author" in card
    assert "no probe was run" in card
    assert "has no verdict of its own" in card


@pytest.mark.slow
def test_a_pushed_run_is_read_by_its_name(made: Path, hub: Path) -> None:
    push(made, hub)
    own, named = nepa_core.load(made), nepa_core.load("me/waves")
    samples = [own.data.dataset("test")[i] for i in range(5)]
    assert torch.equal(own.encode(samples, layer="best"), named.encode(samples, layer="best"))
    assert named.averaged
    words = ["tests.tiny:recipe", "init=me/waves", "control=false", "train.length.steps=1", "out=tuned"]
    assert main(["finetune", *words]) == 0
    assert main(["probe", "cache/me/waves", *QUICK, "-q"]) == 0  # a run folder, as any other
    with pytest.raises(UserError, match="the hub does not give it"):
        nepa_core.load("me/nothing")


def test_the_code_that_a_pushed_run_names_is_not_run_unasked(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "from tests import tiny\nclass Mine(tiny.Waves): pass\n"
    code += "def base(): return tiny.override(tiny.recipe(), {'data': Mine()})\n"
    (tmp_path / "pushed_waves.py").write_text(code)
    assert main(["pretrain", "pushed_waves:base", "out=run", "train.length.steps=1", "-q"]) == 0
    card = (push(tmp_path / "run", hub) / "README.md").read_text()
    assert "It needs `pushed_waves:Mine`, which is not in this repository" in card
    assert 'nepa_core.load("me/waves", trust=True)' in card
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "of another user"))
    monkeypatch.setattr(trust, "_given", trust.Trust())
    del sys.modules["pushed_waves"]
    with pytest.raises(UserError, match="names pushed_waves:Mine, code that would be run"):
        nepa_core.load("me/waves")
    assert "pushed_waves" not in sys.modules
    assert type(nepa_core.load("me/waves", trust=True).data).__name__ == "Mine"


@pytest.mark.slow
def test_a_pushed_run_of_sound_is_read_where_its_clips_are_not(hub: Path, tmp_path: Path) -> None:
    write_fsdd(tmp_path / "fsdd")
    few = {"verdict.fit_samples": 8, "verdict.test_samples": 8, "verdict.health_samples": 4}
    short = {"data.root": str(tmp_path / "fsdd"), "train.length.steps": 1, "train.batch": 4, **few}
    pretrain(override(fsdd(), short), Run(tmp_path / "run"), World(0, 1, CPU), show=False)
    net = nepa_core.load(tmp_path / "run")
    samples = [net.data.dataset("test")[i] for i in range(2)]
    wanted = net.encode(samples)
    push(tmp_path / "run", hub)
    shutil.rmtree(tmp_path / "fsdd")
    torch.testing.assert_close(nepa_core.load("me/waves").encode(samples), wanted)


def test_what_goes_to_the_hub_is_that_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create(self: Any, name: str, **options: Any) -> None:
        seen.update(name=name, **options)

    def upload(self: Any, **options: Any) -> str:
        files = sorted(file.name for file in Path(options["folder_path"]).rglob("*") if file.is_file())
        seen.update(files=files, repo=options["repo_id"], gone=options["delete_patterns"])
        return "there"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert main(["push", str(made), "me/waves", "private=true"]) == 0
    assert (seen["name"], seen["repo"], seen["private"]) == ("me/waves", "me/waves", True)
    assert seen["files"] == [
        "README.md", "config.json", "ema.safetensors", "model.safetensors", "probe.json", "state.json", "summary.json",
    ]  # fmt: skip
    assert "checkpoints/*" in seen["gone"]  # of an earlier push


def test_a_push_is_refused_in_one_line(made: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self: Any, name: str, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    run = str(made)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    said = fails("push", run, "me/waves")
    assert said.startswith("me/waves can't be pushed: no route to host; look at the network")
    assert "OWNER/NAME" in fails("push", run)
    assert "not one" in fails("push", run, "waves")
    assert "dry_run=true" in fails("push", run, "me/waves", "out=x")
    assert "optim.lr is not one of its options" in fails("push", run, "me/waves", "optim.lr=1")
    assert "released layout" in fails("push", run, "me/waves", "layout=released", "dry_run=true")
    Path("full").mkdir()
    Path("full/file").touch()
    assert "not an empty folder" in fails("push", run, "me/waves", "dry_run=true", "out=full")
    assert sorted(path.name for path in Path().iterdir()) == ["full"]


@pytest.mark.slow
def test_the_released_layout_goes_with_a_card(hub: Path, tmp_path: Path) -> None:
    few = ("train.length.steps=2", "verdict.fit_samples=32", "verdict.test_samples=16", "-q")
    assert main(["pretrain", "recipes.vision:digits", "data.patch=[2,2]", "out=run", *few]) == 0
    folder = push(tmp_path / "run", hub, "layout=released", to="me/digits")
    names = {file.name for file in folder.iterdir()}
    assert names == {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "ema.safetensors"}
    own, named = nepa_core.load("run"), nepa_core.load("me/digits")
    samples = [own.data.dataset("test")[i] for i in range(3)]
    torch.testing.assert_close(named.encode(samples), own.encode(samples))
