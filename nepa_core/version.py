"""Which version of this program this is. Imports nothing of it, so that `nepa --version` need not import torch."""

import tomllib
from importlib import metadata
from pathlib import Path


def version() -> str:
    """That of pyproject.toml in a checkout, else that of the installed package."""
    file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text()).get("project", {}) if file.is_file() else {}
    return str(project["version"]) if project.get("name") == "nepa" else metadata.version("nepa")
