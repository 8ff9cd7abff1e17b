"""How the source is built, in figures: `python -m tests.structure [FOLDER]`, for docs/architecture.md.

A room is an entry of a package: a file, or a folder with all that it holds. An arrow is an import of one room by
another, at the top of a file or inside a function. Floors are the rooms on the longest chain of arrows; rooms that
import each other in a circle are one.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGES = ("nepa_core", "modalities", "recipes")
Arrows = dict[str, set[str]]


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree, the module first; read once."""
    return tuple(ast.walk(ast.parse(path.read_text(), str(path))))


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def rooms(package: Path) -> list[str]:
    """The entries of a package, "recipes.cli" for a file and "recipes.report" for a folder."""
    folders = [each for each in package.iterdir() if (each / "__init__.py").exists()]
    files = [each for each in package.glob("*.py") if each.stem != "__init__"]
    return sorted(f"{package.name}.{each.stem}" for each in (*folders, *files))


def arrows(package: Path) -> Arrows:
    """Room -> the other rooms of the same package that it imports."""
    found: Arrows = {room: set() for room in rooms(package)}
    for path in package.rglob("*.py"):
        own = _room(".".join(path.relative_to(package.parent).with_suffix("").parts), found)
        if own is not None:
            found[own] |= {room for name in imports(path) if (room := _room(name, found)) not in (None, own)}
    return found


def file_arrows(root: Path) -> Arrows:
    """File -> the files of all packages that it imports, by their dotted names."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: set(imports(path)) & names.keys() - {name} for name, path in names.items()}


def floors(graph: Arrows) -> int:
    """Rooms on the longest chain of arrows, a circle counting as one."""
    reach = {room: _reached(room, graph) for room in graph}
    depth: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in depth:
            below = [each for each in reach[room] if room not in reach[each]]
            depth[room] = 1 + max(map(height, below), default=0)
        return depth[room]

    return max(map(height, graph), default=0)


def circles(graph: Arrows) -> list[str]:
    """Rooms that import themselves through others."""
    return [room for room in graph if room in _reached(room, graph)]


def _reached(room: str, graph: Arrows) -> set[str]:
    found: set[str] = set()
    waiting = set(graph[room])
    while waiting:
        found.add(each := waiting.pop())
        waiting |= graph[each] - found
    return found


def _room(name: str, known: Arrows) -> str | None:
    room = ".".join(name.split(".")[:2])
    return room if room in known else None


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for package in PACKAGES:
        graph = arrows(root / package)
        print(
            f"{package}: {len(graph)} rooms, {sum(map(len, graph.values()))} arrows, {floors(graph)} floors, "
            f"{len(circles(graph))} in circles"
        )
