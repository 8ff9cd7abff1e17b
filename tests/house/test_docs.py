"""The pages: their links lead somewhere, their commands exist, and their blocks run, in order and in one folder.

A block is ```sh (commands), ```python (code; one that begins with `# name.py` is a file) or ```text (what is printed).
```sh unrun needs what a test can't have, and is only resolved. What is run is shortened by BUDGETS and FEWER alone.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
from torch.utils.data import default_collate

import recipes
from benchmarks import gpu
from nepa_core import check_modality
from nepa_core.basics import UserError
from nepa_core.runtime.config import load_object, override, parse_assignments
from recipes.cli import TASKS, main, split_options
from recipes.configs import FinetuneConfig, PretrainConfig, SegmentConfig
from tests.conftest import ROOT
from tests.movies import write_movies, write_volumes
from tests.pictures import encoded, picture, write_tree
from tests.sounds import write_fsdd
from tests.tiny_scenes import write_scenes

PAGES = sorted(path for folder in ("*.md", "docs/**/*.md") for path in ROOT.glob(folder))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_PRETRAIN = {
    "train.length.steps": "3",
    "train.batch": "8",
    "train.evaluate": "3",
    "verdict.fit_samples": "32",
    "verdict.test_samples": "32",
    "verdict.health_samples": "16",
}
_COMPARE = _PRETRAIN | {"seeds": "0", "workers": "1"}
BUDGETS: dict[str, dict[str, str]] = {
    "pretrain": _PRETRAIN,
    "probe": {"train_samples": "64", "test_samples": "64", "poolings": "mean"},
    "finetune": {"train.length.steps": "2", "train.batch": "8"},
    "segment": {"train.length.steps": "2", "train.batch": "2", "evaluation.images": "2"},
    "forecast": {"fit_samples": "64", "steps": "2", "flow_steps": "2", "test_windows": "8"},
    "inspect": {"samples": "2"},
    "embed": {"calibrate": "32"},
    "generate": {"samples": "12", "draws": "2", "decoder_steps": "3", "train_samples": "64"},
    "ablate": _COMPARE,
    "orders": _COMPARE | {"finetune_steps": "2", "labels": "2", "cross": "false"},
    "objectives": _COMPARE | {"finetune_steps": "2", "labels": "2", "finetune_causal": "false"},
    "transfer": _COMPARE,
    "bench": {"steps": "2", "repeats": "1"},
}
"""Task -> the keys that its commands are run with, whatever the page says."""

FEWER = {
    "orders": {"orders": "raster,hilbert"},
    "objectives": {"objectives": "cosine", "learning_rates": "1e-3"},
    "forecast": {"horizons": "96"},
}
"""Task -> the keys that its commands are run with where the page does not give them."""


class Block(NamedTuple):
    """A fenced block: the words after the fence, where it begins, and what it holds."""

    language: str
    kind: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that a Python or YAML block is, or None."""
        found = re.match(r"# (\w+\.(?:py|yaml))\n", self.text)
        return found[1] if found and self.language in ("python", "yaml") else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of an sh block."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1], found[2].strip(), text[: found.start()].count("\n") + 1, found[3])
        for found in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    found = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert broken == []


def test_every_page_of_the_docs_is_named_in_the_contents() -> None:
    named = set(re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/*.md")} - {"index.md"} <= named
    side_bar = (ROOT / "docs/conf.py").read_text()  # where Sphinx is missing, too
    assert [page.stem for page in ROOT.glob("docs/*.md") if f'"{page.stem}"' not in side_bar] == []
    named = set(re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs/results/index.md").read_text()))
    assert {page.name for page in ROOT.glob("docs/results/*.md")} - {"index.md"} == named


def test_readme_and_results_stay_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500
    assert len((ROOT / "RESULTS.md").read_text().splitlines()) <= 40


def test_the_readme_has_one_adapter_of_twenty_lines() -> None:
    found = [block for block in blocks(ROOT / "README.md") if block.file]
    assert [block.file for block in found] == ["my_waves.py"]
    assert len([line for line in found[0].text.splitlines()[1:] if line.strip()]) <= 20


@pytest.mark.usefixtures("folder")
def test_what_refuses_the_orders_of_an_adapter_says_the_lines_that_it_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Followed to the letter, they make `nepa orders` work on the adapter of the README."""
    file = next(block for block in blocks(ROOT / "README.md") if block.file)
    Path("my_waves.py").write_text(file.text)
    assert main(["pretrain", "my_waves:base", "data.patch_order=reverse"]) == 2
    assert "it has where it inherits Ordered" in capsys.readouterr().err
    assert main(["orders", "my_waves:base", "orders=canonical,reverse", "seeds=0"]) == 2
    code = re.findall(r"`([^`]+)`", capsys.readouterr().err)
    assert code[:2] == ["from modalities.orders import Ordered", "class Waves(Ordered, Modality):"]
    text = file.text.replace("class Waves(Modality):", f"{code[1]}\n    {code[2].replace('GRID', '(16,)')}\n")
    Path("my_ordered_waves.py").write_text(f"{code[0]}\n{text}")
    check_modality(load_object("my_ordered_waves:base")().data)
    changed = override(load_object("my_ordered_waves:base")(), {"data.patch_order": "reverse"}).data
    assert changed.read(default_collate(changed.dataset("test")[:2])).order.tolist() == list(range(15, -1, -1))


@pytest.mark.usefixtures("folder")
@pytest.mark.slow
def test_the_readme_example_keeps_the_contract_and_trains() -> None:
    """And every command that the README gives for it; the rest of the README runs with the slow tests."""
    found = blocks(ROOT / "README.md")
    file = next(block for block in found if block.file)
    Path(str(file.file)).write_text(file.text)
    check_modality(load_object("my_waves:base")().data)
    commands = next(block.commands for block in found if "my_waves:base" in block.text and block.commands)
    assert [words[1] for words in commands] == ["check", "pretrain", "probe", "finetune", "inspect"]
    for words in commands:
        assert main(shortened(words)[1:]) == 0


def test_every_recipe_on_the_pages_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = {name for page in PAGES for name in re.findall(r"\brecipes\.\w+:\w+", page.read_text())}
    assert main(["recipes"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert named - listed == {"recipes.presets:small", "recipes.presets:short"} & named  # of an adapter, of a recipe


# ---------------------------------------------------------------------------------- commands, resolved


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, which is the current one, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


KINDS = {("sh", ""), ("sh", "unrun"), ("python", ""), ("yaml", ""), ("text", "")}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_of_a_kind_and_every_command_exists(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert (block.language, block.kind) in KINDS, where
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.file:
            Path(block.file).write_text(block.text)
    for block in blocks(page):
        for words in block.commands:
            resolve(words, f"{page.name}:{block.line}", capsys)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_in_the_prose_exists(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those in single backticks, whose capitals stand for what the reader has."""
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, folder)
    stands_for = {"RUN": "run", "S": "1", "TERM": "mse"}
    for found in re.findall(r"`(nepa [^`]+)`", prose(page)):
        shown = re.sub(r"\[([\w.]+=[^\s\]]+)\]", r"\1", found)
        words = [word for word in shlex.split(shown) if "..." not in word]
        if len(words) < 3 or words[1].isupper():  # a task alone, or `nepa TASK`
            continue
        stands_for["RECIPE"] = f"recipes.vision:{'camvid_segment' if words[1] == 'segment' else 'digits'}"
        words = [re.sub(r"\b(RECIPE|RUN|S|TERM)\b", lambda x: stands_for[x[0]], word.split("|")[0]) for word in words]
        resolve(words, f"{page.name}: {found[:60]}", capsys)


def resolve(words: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fail where a command, its recipe or one of its keys does not exist."""
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in words[1:]), where
        return
    if words[0] in ("export", "pip") or words[:3] == ["python", "-m", "pip"]:
        return
    if words[:3] == ["python", "-m", "benchmarks.gpu"]:
        gpu.make_parser().parse_args(words[3:])
        return
    if words[0] == "torchrun":  # its own options are those of `test_distributed`
        assert words[words.index("-m") + 1] == "recipes", where
        words = ["nepa", *words[words.index("-m") + 2 :]]
    if words[0] == "sbatch" and words[1] in ("examples/slurm.sh", "examples/slurm_array.sh"):
        words = ["nepa", *words[2:]]
    assert words[0] == "nepa", f"{where}: no test knows the command {words[0]}"
    task, rest = words[1], words[2:]
    if task in ("recipes", "runs", "completion", "--version"):
        return
    assert task in TASKS, f"{where}: there is no task {task}"
    if ":" in rest[0]:
        status = main([task, *rest, "--help"])
        assert status == 0, f"{where}: {capsys.readouterr().err}"
        return
    _, changes = split_options(load_object(f"{TASKS[task].module}:Options"), [w for w in rest[1:] if "=" in w])
    for key in changes:
        assert key.partition(".")[0] in ("data", "trust") or any(has(kind, key) for kind in CONFIGS), where


CONFIGS = (PretrainConfig, FinetuneConfig, SegmentConfig)


def has(kind: Any, key: str) -> bool:
    """Whether a config has this dotted key."""
    name, _, rest = key.partition(".")
    field = getattr(kind, "model_fields", {}).get(name)
    if field is None or not rest:
        return field is not None
    kinds = (field.annotation, *get_args(field.annotation))  # "or None"
    return any(has(each, rest) for each in kinds) or rest in str(field.annotation)


# ----------------------------------------------------------------------------------------- blocks, run


def images(folder: Path) -> None:
    for split in ("train", "test"):
        write_tree(folder, {f"{split}/{kind}/{i}.png": encoded(picture(i, 32, 32)) for kind in "ab" for i in range(24)})


def photos(folder: Path) -> None:
    for split in ("train", "val"):
        files = {f"{split}/{kind}/{i}.jpg": encoded(picture(i, 64, 48), "jpeg") for kind in "ab" for i in range(6)}
        write_tree(folder, files)


def table(file: Path) -> None:
    """14,400 hours of 7 channels, as ETTh1 has them."""
    hours = np.datetime64("2016-07-01T00", "h") + np.arange(14_400)
    values = np.sin(np.arange(14_400)[:, None] / 24 * np.arange(1, 8))
    values += np.random.default_rng(0).normal(0, 0.1, values.shape)
    rows = [",".join([f"{hour}:00", *map("{:.3f}".format, row)]) for hour, row in zip(hours, values, strict=True)]
    file.write_text("\n".join(["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT", *rows]))


def labelled(folder: Path) -> None:
    folder.mkdir()
    for split in ("TRAIN", "TEST"):
        rows = [[row % 2, *np.sin(np.arange(128) / (3 + row % 2) + row).round(3)] for row in range(24)]
        (folder / f"Made_{split}.tsv").write_text("\n".join("\t".join(map(str, row)) for row in rows))


def vectors(folder: Path) -> None:
    folder.mkdir()
    for split in ("train", "test"):
        np.save(folder / f"{split}.npy", np.random.default_rng(0).normal(size=(64, 8, 4)).astype(np.float32))
        np.save(folder / f"{split}.lengths.npy", np.arange(64) % 6 + 3)


def movies(folder: Path) -> None:
    """Class folders "a" and "b"."""
    write_movies(folder, kinds=("a", "b"))


def scans(folder: Path) -> None:
    write_volumes(folder, side=8)


def texts(folder: Path) -> None:
    for kind in ("prose", "verse"):
        (folder / kind).mkdir(parents=True)
        for i in range(12):
            (folder / kind / f"{i}.txt").write_text(f"{kind} number {i}, \u00fcber " * 20)


def genes(file: Path) -> None:
    letters = np.random.default_rng(0).choice(list("ACGT"), (40, 300))
    file.write_text("\n".join(f">gene{i}\n{''.join(row)}" for i, row in enumerate(letters)))


def events(file: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [
        f"u{i % 40},2024-01-{1 + i // 40:02}T{draw.integers(24):02}:00,{'abc'[i % 3]},{i % 7},{i % 2}"
        for i in range(800)
    ]
    file.write_text("\n".join(["user,when,what,amount,label", *rows]))


DATA: dict[str, Callable[[Path], object]] = {
    "cifar10": images,
    "camvid": lambda folder: write_scenes(folder, splits=("train", "val")),
    "a.jpg": lambda file: picture(0, 64, 48).save(file),
    "fsdd": write_fsdd,
    "ETTh1.csv": table,
    "ucr": labelled,
    "vectors": vectors,
    "imagenet": photos,
    "movies": movies,
    "scans": scans,
    "texts": texts,
    "genes.fasta": genes,
    "events.csv": events,
}
"""What `data.root=` and `images=` name on the pages -> what makes it, small."""


COMPARED = [
    words for block in blocks(ROOT / "README.md") for words in block.commands if words[1] in ("orders", "objectives")
]
"""Comparisons that the README runs: minutes each, and nothing on a page goes on from them."""


def runs(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind != "unrun" and block.language in ("sh", "python", "yaml")]


def shortened(words: list[str]) -> list[str]:
    """The words of a command with the keys that make it short."""
    given = dict(word.partition("=")[::2] for word in words[2:] if "=" in word)
    plain = [word for word in words if "=" not in word]
    found = FEWER.get(words[1], {}) | given | BUDGETS.get(words[1], {})
    if "train.length.steps" in found:
        found = {key: value for key, value in found.items() if key != "train.length.epochs"}
    if "train.length.steps" in given and ":" not in words[2]:  # a run that is lengthened
        found["train.length.steps"] = "6"
    return [*plain, *(f"{key}={value}" for key, value in found.items())]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(block.text for block in runs(page))
    for name, make in DATA.items():
        if re.search(rf"(root=|\[){re.escape(name)}\b", text):
            make(folder / name)
    if "import pretrain" in text:
        train, budget = recipes.pretrain, parse_assignments([f"{key}={value}" for key, value in _PRETRAIN.items()])
        monkeypatch.setattr(
            recipes,
            "pretrain",
            lambda *args, changes=None, **rest: train(*args, changes=(changes or {}) | budget, **rest),
        )
    names: dict[str, Any] = {"__name__": "page"}
    for block in runs(page):
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
        for words in block.commands:
            if words[0] == "make" or (page.name != "README.md" and words in COMPARED):
                continue  # what the tests themselves are run by; what the README's run has shown
            try:
                status = main(shortened(words)[1:])
            except UserError as error:
                pytest.fail(f"{page.name}: {' '.join(words)}: {error}")
            assert status == 0, f"{page.name}: {' '.join(words)}: {capsys.readouterr().err[-600:]}"
