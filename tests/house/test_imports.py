"""What importing costs: what is imported before it is needed, and the time."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAVY = ("torch._dynamo", "sympy", "triton", "scipy", "sklearn", "torchvision", "torchaudio", "timm", "matplotlib")


def python(*words: str) -> str:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_core_and_the_list_of_recipes_import_nothing_heavy() -> None:
    """Beyond what torch itself imports."""
    code = f"""
import sys, torch
before = set(sys.modules)
def heavy(names): return [name for name in names if name in set(sys.modules) - before]
import nepa_core
print(heavy({HEAVY} + ("rich", "pyarrow", "numpy.random", "nepa_core.runtime", "modalities", "recipes")))
from recipes.cli import list_recipes
assert "recipes.vision:digits" in list_recipes()
print(heavy({HEAVY} + ("datasets", "huggingface_hub", "recipes.tasks")))
"""
    assert python("-c", code) == "[]\n[]\n"


@pytest.mark.parametrize("words", ["--help", "--version", ""])
def test_help_and_version_import_no_torch(words: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["nepa", *{words.split()}]
try:
    runpy.run_module("recipes", run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in ("torch", "pydantic", "numpy") if name in sys.modules])
"""
    assert python("-c", code).splitlines()[-1] == "0 []"


@pytest.mark.slow
def test_the_version_is_that_of_the_checkout() -> None:
    (line,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = ")]
    found = line.split('"')[1]
    code = "import nepa_core; print(nepa_core.__version__)"
    assert (python("-m", "recipes", "--version"), python("-c", code)) == (f"nepa {found}\n", f"{found}\n")


def seconds(*words: str) -> float:
    """Of CPU time, which other processes hardly change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_what_is_imported_takes_little_time() -> None:
    """Beside torch in one process, the least of seven each: what else runs on the machine only adds."""
    code = """
from time import process_time
start = process_time()
import torch
middle = process_time()
import nepa_core
print(middle - start, process_time() - middle)
"""
    bare, core = (
        min(column) for column in zip(*(map(float, python("-c", code).split()) for _ in range(7)), strict=True)
    )
    assert core <= 0.1 * bare
    torch, help_, listing = (
        min(column)
        for column in zip(
            *(
                (seconds("-c", "import torch"), seconds("-m", "recipes", "--help"), seconds("-m", "recipes", "recipes"))
                for _ in range(5)
            ),
            strict=True,
        )
    )
    assert help_ < 0.2 * torch
    assert listing < 1.6 * torch
