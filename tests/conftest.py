"""What all tests share: one thread, the tiny recipe, and a disk that is full. The tiny data is in tests/tiny.py."""

from __future__ import annotations

import atexit
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from recipes.cli import main
from recipes.configs import PretrainConfig
from tests import tiny

ROOT = Path(__file__).parents[1]

os.environ["XDG_CONFIG_HOME"] = _settings = tempfile.mkdtemp(prefix="nepa-tests-")  # notes on runs; never the user's
atexit.register(shutil.rmtree, _settings, ignore_errors=True)

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
torch.set_num_threads(1)  # several processes share few cores; and sums then come out the same everywhere


gc.disable()  # until all tests are collected


def pytest_collection_finish() -> None:
    """What collecting leaves stays to the end: looking through it for garbage would take a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked cuda are skipped where there is no GPU."""
    wants = [item for item in items if item.get_closest_marker("cuda")]
    if wants and not torch.cuda.is_available():
        for item in wants:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


_savefig = Figure.savefig


def _blank(figure: Figure, stream: BinaryIO, **_: object) -> None:
    """A picture of the figure's size, and nothing in it."""
    Image.new("1", figure.canvas.get_width_height()).save(stream, format="png")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Drawing takes three quarters of the time of a tiny run, so a quick test has blank pictures unless it asks."""
    drawn = any(item.get_closest_marker(name) for name in ("pictures", "slow", "distributed", "browser"))
    Figure.savefig = _savefig if drawn else _blank  # type: ignore[method-assign, assignment]


ON_BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
"""For a test that the CPU passes too, so that what it asks of a GPU is known to be right."""


@pytest.fixture
def tiny_recipe() -> PretrainConfig:
    return tiny.recipe()


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command that is refused, in an empty folder: words -> the one line that it says."""
    monkeypatch.chdir(tmp_path)

    def line(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("nepa: ")
        return said.removeprefix("nepa: ")

    return line


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SEEN = """<script>addEventListener("load", () => {
  const data = document.body.dataset, figure = document.querySelector("figure").getBoundingClientRect();
  data.images = [...document.images].filter(image => image.naturalWidth > 100).length;
  data.firstScreen = figure.bottom < innerHeight;
  data.sideways = document.documentElement.scrollWidth > innerWidth;
  data.cut = [...document.querySelectorAll("table")].filter(table => table.scrollWidth > 832).length;
})</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Opens a report in headless Chromium; gives its HTML when all has loaded, with the number of pictures in <body>.

    The first picture must lie on the first screen, and nothing may be wider than the page; `layout=False` asks for
    neither, of a page of hostile names.
    """

    def shown(page: Path, *, layout: bool = True) -> str:
        if BROWSER is None:
            pytest.skip("no Chromium here; apt-get install chromium")
        copy = tmp_path / "page.html"
        copy.write_text(page.read_text() + SEEN)
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,800",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", copy.as_uri(),
        ]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
        body = re.search(r"<body[^>]*>", found)
        assert body is not None
        if not layout:
            return found
        assert 'data-first-screen="true"' in body[0], "the answer and its plot are not on the first screen"
        assert 'data-sideways="false"' in body[0], "the page scrolls sideways"
        assert 'data-cut="0"' in body[0], "a table is wider than the page"
        return found

    return shown
