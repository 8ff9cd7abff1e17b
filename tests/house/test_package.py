"""The wheel: what is in it, and that it works where nothing else of this house is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("nepa_core", "modalities", "recipes")
SCRATCH = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info")


@pytest.mark.slow
def test_the_wheel_holds_the_packages_alone_and_works_from_another_folder(tmp_path: Path) -> None:
    """Built without a network, installed alone; what it depends on is that of this environment."""
    source, home = tmp_path / "source", tmp_path / "home"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*SCRATCH))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    _done([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)], tmp_path)
    (wheel,) = tmp_path.glob("nepa-*.whl")

    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()}
    assert held == {file.as_posix() for file in files if file.suffix == ".py" or file.name == "py.typed"}

    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    _done([*pip[:3], "--python", str(python), *pip[3:], "install", *offline, str(wheel)], tmp_path)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    installed = Path(sysconfig.get_path("purelib", "posix_prefix", vars=paths))
    others = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (installed / "heavy.pth").write_text("\n".join(others))  # whose own .pth files are not read: no editable nepa

    home.mkdir()
    (waves,) = re.findall(r"```python\n(# my_waves\.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (home / "my_waves.py").write_text(waves)
    where = "import nepa_core, modalities, recipes; print(nepa_core.__file__, modalities.__file__, recipes.__file__)"
    found = [Path(file) for file in _done([str(python), "-c", where], home).split()]
    assert found == [installed / package / "__init__.py" for package in PACKAGES]

    nepa = str(python.with_name("nepa"))
    short = ["train.length.steps=3", "verdict.fit_samples=200", "verdict.test_samples=100"]
    assert "Next patch identified" in _done([nepa, "pretrain", "recipes.vision:digits", *short], home)
    assert "Waves passes all" in _done([nepa, "check", "my_waves:base"], home)
    assert "Next token identified" in _done([nepa, "pretrain", "my_waves:base", *short], home)
    assert {folder.name for folder in (home / "runs").iterdir()} == {"digits", "my_waves-base"}


def _done(command: list[str], folder: Path) -> str:
    """What a command prints, run in a folder without this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
