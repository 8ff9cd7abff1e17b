"""Texts that the Python distribution carries: the code and the docstrings of modules of the standard library.

They differ a little from one version of Python to the next: a module that is not there, or not as text, is left out.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from modalities.data.documents import Document
from nepa_core.basics import UserError

TRAIN = (
    *("abc", "argparse", "ast", "base64", "calendar", "codecs", "configparser", "contextlib", "copy", "csv"),
    *("dataclasses", "difflib", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "heapq", "inspect"),
    *("ipaddress", "mailbox", "optparse", "os", "pickle", "pprint", "random", "shutil", "smtplib", "socket"),
    *("statistics", "string", "subprocess", "tarfile", "threading"),
)
TEST = (
    *("bisect", "bz2", "cProfile", "fnmatch", "glob", "linecache", "locale", "ntpath", "plistlib", "profile", "pstats"),
    *("socketserver", "stat", "tabnanny", "textwrap", "timeit", "traceback", "warnings", "weakref", "webbrowser"),
)
_LEAST = 48
CODE, DOCSTRING = "code", "docstring"


@lru_cache(maxsize=1)
def stdlib_documents() -> dict[str, tuple[Document, ...]]:
    """A document for every docstring, and one for the code of every function; of `_LEAST` characters or more.

    Modules of the one split are not in the other, and no two texts begin with the same `_LEAST` characters.

    Raises:
        UserError: this Python has no library as text.
    """
    seen: set[str] = set()
    found = {}
    for split, modules in (("train", TRAIN), ("test", TEST)):
        mine = [each for module in modules for each in _of_module(module) if len(each.text) >= _LEAST]
        first = {_key(each): each._replace(split=split) for each in reversed(mine) if _key(each) not in seen}
        found[split] = tuple(reversed(first.values()))
        seen.update(first)
        if not found[split]:
            raise UserError("this Python carries no library as text; give texts of yours by recipes.text:folder")
    return found


def _key(document: Document) -> str:
    return document.text[:_LEAST]


def _of_module(name: str) -> Iterator[Document]:
    path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError):
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{name}.{getattr(node, 'name', '')}".rstrip(".")
        if text := ast.get_docstring(node):
            yield Document(f"docstring of {where}", _ascii(text), DOCSTRING)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if text else node.body
            if body:
                yield Document(
                    f"code of {where}", _ascii(_dedented(lines[body[0].lineno - 1 : body[-1].end_lineno])), CODE
                )


def _dedented(lines: list[str]) -> str:
    least = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[least:] if not line[:least].strip() else line for line in lines)


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()
