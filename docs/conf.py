"""Builds the site: `make docs`, or `sphinx-build -W -c docs . site`.

The pages are plain Markdown, so that they read well on a forge. What only a site has (the table of contents, the API
reference from the docstrings) is added while they are read.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "NEPA"
html_title = "NEPA"
author = copyright = "the NEPA framework contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "site", "docs/site", "build", "runs"]
html_theme = "furo"
html_additional_pages = {"index": "home.html"}
templates_path = ["site"]
html_static_path = ["site/static"]
html_css_files = ["wide.css"]
html_copy_source = html_show_copyright = False

suppress_warnings = ["ref.python"]  # attributes of one name in several classes

myst_heading_anchors = 4
default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"exclude-members": "model_config, PatchOrder"}
napoleon_use_ivar = True

CONTENTS = {
    "Start": ("../README", "tutorial", "your-own-data", "python", "embed", "generate", "commands"),
    "Recipes": ("vision-recipe", "audio", "series", "video-and-volumes", "text-and-events", "together"),
    "Questions": ("beside", "objectives", "orders", "troubleshooting", "glossary"),
    "Results": ("../RESULTS", "results/index"),
    "Runs": ("going-on", "many-gpus", "logging", "export"),
    "More": ("architecture", "reference", "../CONTRIBUTING", "../CHANGELOG"),
}
"""Caption of the side bar -> its pages."""

RESULTS = Path(__file__).parent / "results"

REFERENCE = {
    "The core": ("nepa_core", "nepa_core.runtime.load"),
    "Objective": ("nepa_core.objective", "nepa_core.terms"),
    "Adapters": ("modalities.image", "modalities.scenes", "modalities.audio", "modalities.timeseries",
                 "modalities.features", "modalities.video", "modalities.volume", "modalities.text", "modalities.events",
                 "modalities.tones", "modalities.together", "modalities.orders"),
    "Recipes": ("recipes.training.door", "recipes.presets", "recipes.vision", "recipes.audio", "recipes.timeseries",
                "recipes.video", "recipes.volumes", "recipes.text", "recipes.events", "recipes.together",
                "recipes.configs", "recipes.report.summaries"),
    "Settings of a run": ("nepa_core.runtime.fit", "nepa_core.runtime.optim"),
}  # fmt: skip
"""Heading of the reference -> the modules whose public names it lists."""


def setup(app: Sphinx) -> None:
    for names in REFERENCE.values():  # before autodoc writes into the annotations of the classes that ours inherit from
        for name in names:
            import_module(name)
    app.connect("source-read", _complete)
    app.connect("autodoc-process-docstring", _as_written)


def _as_written(*rest: Any) -> None:
    """Lines of a docstring, in which |x| is a length and x* a name, and indented lines are a table: no markup."""
    lines: list[str] = rest[-1]
    found: list[str] = []
    text = table = False
    for before, line in zip(["", *lines], lines, strict=False):
        if not before.strip() and text and line.startswith(" "):
            found += ["::", ""]
            table = True
        if line.strip() and not line.startswith(" "):
            table, text = False, not line.startswith((":", "-", ".."))
        parts = line.split("`")
        parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
        found.append(line if table else "`".join(parts))
    lines[:] = found


def _complete(_: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] += "".join(_contents(caption, pages) for caption, pages in CONTENTS.items())
    if page == "docs/results/index":
        source[0] += _contents("", tuple(path.stem for path in sorted(RESULTS.glob("[!i]*.md"))))
    if page == "docs/reference":
        source[0] += "".join(_modules(heading, names) for heading, names in REFERENCE.items())


def _contents(caption: str, pages: tuple[str, ...]) -> str:
    named = f":caption: {caption}\n" if caption else ""
    return f"\n```{{toctree}}\n:hidden:\n{named}\n" + "\n".join(pages) + "\n```\n"


def _modules(heading: str, names: tuple[str, ...]) -> str:
    body = "".join(f".. automodule:: {name}\n   :members:\n\n" for name in names)
    return f"\n## {heading}\n\n```{{eval-rst}}\n{body}```\n"
