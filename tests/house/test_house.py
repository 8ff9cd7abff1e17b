"""The rules of the house that a reader can't see from one file."""

import ast
from pathlib import Path

import pytest

import nepa_core
from tests.structure import PACKAGES, arrows, circles, file_arrows, floors, imports, nodes

ROOT = Path(nepa_core.__file__).parents[1]
CHOOSE = {"vision", "audio", "timeseries", "video", "volumes", "text", "events", "together", "presets", "configs"}
"""Files of recipes/ that know adapters: presets, and the config of `nepa segment`, which is for scenes."""


def _sources(pattern: str) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    assert found, f"no file matches {pattern}"
    return found


def _top(path: Path) -> ast.Module:
    module = nodes(path)[0]
    assert isinstance(module, ast.Module)
    return module


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        ("nepa_core/**/*.py", ("modalities", "recipes", "benchmarks", "tests")),
        ("nepa_core/*.py", ("nepa_core.runtime",)),
        ("modalities/**/*.py", ("recipes", "benchmarks", "tests")),
        ("recipes/**/*.py", ("benchmarks", "tests")),
        ("benchmarks/**/*.py", ("recipes.tasks", "tests")),
        ("nepa_core/verdict/*.py", ("nepa_core.runtime",)),
        ("nepa_core/kernels/*.py", ("nepa_core.runtime",)),
        ("recipes/**/*.py", ("recipes.tasks",)),
        ("tests/*.py", ("recipes.tasks",)),
    ],
)
def test_imports_point_one_way(files: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources(files)
        for name in sorted(imports(path))
        if any(name == package or name.startswith(f"{package}.") for package in forbidden)
    ]
    assert wrong == []


def test_tests_lie_where_their_subject_lies() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in _sources("tests/**/test_*.py")}
    assert {str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == {"house"}


def test_no_task_asks_which_adapter_it_has() -> None:
    """What a task needs is a method of `Modality`, so a user's own adapter can have it."""
    files = [path for path in _sources("modalities/*.py") if path.stem != "__init__"]
    modules = {f"modalities.{path.stem}" for path in files}
    adapters = {
        node.name
        for path in files
        for node in nodes(path)
        if isinstance(node, ast.ClassDef) and "Modality" in map(ast.unparse, node.bases)
    }
    assert {"Images", "TimeSeries"} < adapters
    wrong = []
    for path in [*_sources("nepa_core/**/*.py"), *_sources("recipes/**/*.py")]:
        if path.parent == ROOT / "recipes" and path.stem in CHOOSE:
            continue
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(imports(path) & modules)]
        for node in nodes(path):
            asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "cast")
            named = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} if asks else set()
            named |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno} names {name}" for name in sorted(named & adapters)]
    assert wrong == []


@pytest.mark.parametrize(("package", "most"), [("nepa_core", 6), ("modalities", 3), ("recipes", 8)])
def test_rooms_have_few_floors_and_no_circles(package: str, most: int) -> None:
    """docs/architecture.md has the figures."""
    graph = arrows(ROOT / package)
    assert circles(graph) == []
    assert floors(graph) <= most


def test_no_file_imports_itself_through_others() -> None:
    """Not inside a function either, where Python would let it pass."""
    assert circles(file_arrows(ROOT)) == []


def test_inheritance_within_the_house_is_one_deep() -> None:
    bases: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in _sources(f"{package}/**/*.py"):
            for node in nodes(path):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
    deep = [name for name, above in bases.items() if any(bases[base] & bases.keys() for base in above & bases.keys())]
    assert "NEPA" in bases
    assert deep == []


def test_every_public_function_and_class_of_the_core_says_what_it_is() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in _sources("nepa_core/**/*.py")
        for node in _top(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
