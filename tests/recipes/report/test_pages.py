"""Names from data stand in pages as text: no page of any task runs what a class, a file or a folder is called."""

from __future__ import annotations

import html.parser
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipes.cli import main
from recipes.comparison import engine as compare
from recipes.comparison import measures, orders
from recipes.report import objectives as objectives_page
from recipes.report import orders as orders_page
from recipes.report.page import Answer, Figure, Report, Table
from recipes.report.plots import line_plot
from tests.conftest import BROWSER
from tests.tiny_scenes import write_scenes

pytestmark = pytest.mark.pictures

RUNS = "document.body.dataset.pwned=1"
CLASSES = (f'<img src=x onerror="{RUNS}">', f'"><svg onload={RUNS}>', "$\\frac{x$ & <b>", f"'><script>{RUNS}<script>")
FILE = f"<script>{RUNS}<script>"
ORDERS = (f'<img src=x onerror="{RUNS}">$\\frac{{x$ & <b>.npy', f"'\"><svg onload={RUNS}>\udcff\x07.npy")
TINY = (
    "model.dim=16", "model.depth=2", "model.heads=2", "model.mlp_dim=32", "train.batch=8", "train.micro_batch=null",
    "train.length.steps=2", "verdict.test_samples=8", "verdict.health_samples=8", "train.workers=0",
)  # fmt: skip
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "strong", "em", "figure", "figcaption"),
    *("img", "table", "thead", "tbody", "tr", "td", "th", "footer", "div", "span", "pre", "ul", "ol", "li", "a", "br"),
    *("details", "summary", "section", "code", "small", "caption", "b", "i", "sub", "sup", "hr"),
}


class Reader(html.parser.HTMLParser):
    """What a browser would make of a page that could run something."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " ".join(value or "" for name, value in attrs if name == "alt")
        sources = [value or "" for name, value in attrs if name in ("src", "href")]
        bad = [name for name, _ in attrs if name.startswith("on")]
        if tag not in KNOWN or bad or any(not value.startswith(("data:image/", "#")) for value in sources):
            self.faults.append(f"<{tag} {attrs}>"[:200])

    def handle_data(self, data: str) -> None:
        self.text += data


def write_images(root: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{FILE}{number}.png")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The pages of eight tasks over images and two over scenes, all of whose names are hostile."""
    patch = pytest.MonkeyPatch()
    place = tmp_path_factory.mktemp("pages")
    patch.chdir(place)
    write_images(place / "hostile-data")
    run = CLASSES[0]
    words = ("recipes.vision:cifar10", "data.root=hostile-data", "data.limit=null", *TINY)
    assert main(["pretrain", *words, f"out={run}"]) == 0
    assert main(["inspect", run, "samples=2"]) == 0
    assert main(["generate", run, "decoder_steps=2", "samples=6", "draws=2"]) == 0
    found = {
        task: Path(run) / folder
        for task, folder in (("pretrain", "report"), *((t, t) for t in ("inspect", "generate")))
    }
    assert main(["finetune", run, f"out={run}2", "train.length.steps=1"]) == 0
    assert main(["inspect", f"{run}2", f"images=[{next(Path('hostile-data/val').rglob('*.png'))}]"]) == 0
    found |= {"finetune": Path(f"{run}2") / "report", "inspect of files": Path(f"{run}2") / "inspect"}
    write_scenes(place / "hostile-scenes", train=4, test=2)
    for file in sorted((place / "hostile-scenes").rglob("ADE_*")):
        file.rename(file.with_name(file.name.replace("ADE_", FILE)))
    (place / "hostile-scenes" / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{i}\t0\t0\t0\t{name}\n" for i, name in enumerate(CLASSES[:3], 1))
    )
    segment = ("tests.tiny_scenes:recipe", "data.root=hostile-scenes", "train.length.steps=1", f"out={run}3")
    assert main(["segment", *segment]) == 0
    assert main(["inspect", f"{run}3", "samples=1"]) == 0
    found |= {"segment": Path(f"{run}3") / "report", "inspect of scenes": Path(f"{run}3") / "inspect"}
    found |= compared(patch, words, run)
    yield [(place / folder / "index.html") for folder in found.values()]
    patch.undo()


def compared(patch: pytest.MonkeyPatch, words: tuple[str, ...], out: str) -> dict[str, Path]:
    """The pages of the three comparisons, made in this process; of the orders one is a file with a hostile name."""

    def share(jobs: list[compare.Job], *, workers: int) -> None:
        compare.work_through(jobs)

    for module in (compare, orders):
        patch.setattr(module, "share", share)
    patch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 16, "test_samples": 8}))
    places = np.arange(64)[::-1]
    for name in ORDERS:
        np.save(name, places)
        places = np.roll(places, 1)
    recipe, *rest = words
    few = (recipe, "seeds=0", *rest)
    tuned = ("labels=2", "finetune_steps=1")
    listed = json.dumps(["raster", *ORDERS])
    assert main(["orders", *few, *tuned, f"orders={listed}", f"out={out}4"]) == 0
    alone = ("objectives=cosine,mse", "learning_rates=1e-3", "finetune_causal=false")
    assert main(["objectives", *few, *tuned, *alone, f"out={out}5"]) == 0
    assert main(["ablate", *few, f"out={out}6"]) == 0
    return {task: Path(f"{out}{n}") / "report" for n, task in ((4, "orders"), (5, "objectives"), (6, "ablate"))}


@pytest.mark.slow
def test_no_name_becomes_an_element_of_a_page(pages: list[Path]) -> None:
    shown = ""
    for page in pages:
        reader = Reader()
        reader.feed(page.read_text())
        assert reader.faults == [], page
        shown += reader.text
    assert "<img src=x onerror" in shown, "a name stands there as text"


@pytest.mark.browser
def test_a_browser_runs_no_script_in_a_page(pages: list[Path], tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium here; apt-get install chromium")

    def body(page: Path) -> str:
        command: list[Any] = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
        assert "<body" in shown
        return shown[shown.index("<body") :].partition(">")[0]

    trap = tmp_path / "trap.html"
    trap.write_text(f'<!doctype html><body><img src=x onerror="{RUNS}"></body>')
    assert "data-pwned" in body(trap), "the test would see it"
    for page in pages:
        assert "data-pwned" not in body(page), page


@pytest.mark.browser
@pytest.mark.parametrize("report", ["objectives", "orders"])
def test_a_table_with_the_intervals_of_three_seeds_is_not_cut(
    report: str, tmp_path: Path, browse: Callable[[Path], str]
) -> None:
    made: Any = {"objectives": objectives_page, "orders": orders_page}[report]
    names = ("infonce_sample_head", "infonce_position_head", "random_per_sample")
    rows = {name: [{each.key: seed / 9 for each in made.PREDICTION} for seed in range(3)] for name in names}
    verdicts = ["learned, but no more than linear"] * 3
    margin = {"values": [], "mean": -0.12, "std": 0.1, "ci95": 0.1, "both": 0.1}
    found = {name: {"verdicts": verdicts} for name in names}
    summary = {"margins": dict.fromkeys(names, margin), "objectives": found}
    picture = Figure("a.png", "A picture.", line_plot({"a": ([0, 1], [0, 1])}, x="x", y="y"))
    parts = [Answer("An answer."), picture, Table(made.prediction_table(rows, summary))]
    Report("Title", "", {}, lambda: parts).write(tmp_path / "page")
    assert "0.111 ± 0.276" in browse(tmp_path / "page" / "index.html")
