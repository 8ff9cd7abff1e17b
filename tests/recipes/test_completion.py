"""Shell completion, as the shells themselves do it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.cli import TASKS, main

LINES = {
    "nepa pretr": {"pretrain"},
    "nepa pretrain recipes.vision:digits_": {"recipes.vision:digits_2x2"},
    "nepa pretrain recipes.vision:digits optim.lr": {"optim.lr=", "optim.lr_batch="},
    "nepa bench x against=t": {"against=transformer"},
    "nepa probe runs/x optim": set(),  # not to be set in a finished run
    "nepa probe runs/x --he": {"--help"},
    "nepa nonsense x ": set(),
    "nepa completion ": {"bash", "zsh", "fish"},
    "nepa embed recipes.vision:di": set(),  # it takes a run
    "nepa embed runs/x data.lim": {"data.limit="},
    "nepa probe runs/x data.lim": {"data.limit="},
    "nepa push runs/x data.lim": set(),
    "nepa runs runs/x runs/y o": {"out="},
}
FOLDERS = {
    **{f"nepa {task} ": {"kept/", "made here/"} for task in ("embed", "export", "push", "probe", "runs")},
    "nepa embed kept/": {"kept/a/", "kept/b:c/"},
    "nepa runs kept/a ma": {"made here/"},
    "nepa completion k": set(),
}
"""With the folders that are offered where there are some: line -> those."""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made(shell: str) -> Path:
        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        return tmp_path_factory.mktemp("shells") / shell

    return made


def _written(path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", path.name]) == 0
    path.write_text(capsys.readouterr().out)
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("kept/a", "kept/b:c", "made here"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "file").touch()
    return tmp_path


def _said(*command: str, where: Path | None = None) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=where).stdout.splitlines()


def test_bash_completes_tasks_recipes_and_keys(
    scripts: Callable[[str], Path], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    script = _written(scripts("bash"), capsys)
    ask = f'source {script}; COMP_LINE="$0"; COMP_POINT=${{#0}}; _nepa; printf "%s\\n" "${{COMPREPLY[@]}}"'
    for line, wanted in LINES.items():
        begun = line.rpartition(" ")[2]
        behind = max(begun.rfind("="), begun.rfind(":")) + 1  # bash itself keeps what lies before
        found = {word for word in _said("bash", "-c", ask, line) if word}
        assert found == {word[behind:] for word in wanted}, line
    for line, wanted in FOLDERS.items():
        found = {word for word in _said("bash", "-c", ask, line, where=here) if word}
        assert found == {word.removesuffix("/") for word in wanted}, line  # bash itself adds the slash
    everything = set(_said("bash", "-c", ask, "nepa "))
    assert everything == {*TASKS, "recipes", "runs", "completion", "--help", "--version"}


def test_fish_completes_tasks_recipes_and_keys(
    scripts: Callable[[str], Path], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    script = _written(scripts("fish"), capsys)
    empty = script.parent / "empty"  # of files, which fish offers where nothing else is known
    empty.mkdir()
    for line, wanted in LINES.items():
        assert set(_said("fish", "-c", f"source {script}; complete -C '{line}'", where=empty)) == wanted, line
    for line, wanted in FOLDERS.items():
        found = {
            word.partition("\t")[0]
            for word in _said("fish", "-c", f"source {script}; complete -C '{line}'", where=here)
        }
        assert found == wanted, line


def test_zsh_completes_tasks_recipes_and_keys(
    scripts: Callable[[str], Path], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    script = _written(scripts("zsh"), capsys)
    ask = (  # what the function offers; which of it fits is the shell's own affair
        f'compdef() {{ }}; _files() {{ [[ "$1" == -/ ]] && print folders }}; source {script}; '
        'compadd() { print -rl -- "$@" }; '
        'words=("${(@s: :)1}"); CURRENT=${#words}; _nepa'
    )
    for line, wanted in LINES.items():
        begun = line.rpartition(" ")[2]
        found = {word for word in _said("zsh", "-f", "-c", ask, "x", line) if word not in ("-S", "--", "", "folders")}
        assert {word for word in found if word.startswith(begun)} == wanted, line
    for line, wanted in FOLDERS.items():
        assert ("folders" in _said("zsh", "-f", "-c", ask, "x", line)) == bool(wanted), line


def test_another_shell_is_refused_with_those_that_are_known(fails: Callable[..., str]) -> None:
    assert fails("completion", "tcsh") == "nepa completion needs the name of a shell after it: bash, zsh, fish"
    assert fails("completion") == "nepa completion needs the name of a shell after it: bash, zsh, fish"
