"""Hundreds of generated commands: whatever is typed or damaged, one line, no hang and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nepa_core.runtime.config import keys
from recipes import presets as finetune_presets
from recipes.cli import TASKS, main
from recipes.generation.generating import GenerateOptions
from recipes.readout.embedding import EmbedOptions
from recipes.readout.inspecting import InspectOptions
from recipes.readout.probing import ProbeOptions
from recipes.tasks import finetune as finetune_finetune
from recipes.tasks import pretrain, segment
from recipes.tasks.evaluate import Options as EvaluateOptions
from tests import tiny, tiny_scenes

pytestmark = pytest.mark.slow

TINY, SCENES = "tests.tiny:recipe", "tests.tiny_scenes:recipe"
SECONDS = 60  # that one command may take on a busy machine

ODD = [
    *("", "0", "-1", "1", "2", "3", "1e3", "1e30", "1e-300", "1e300", "1e400", "-1e30", "10" + 29 * "0", "9" * 5000),
    *("nan", "NaN", "Infinity", "null", "true", "false", "[]", "{}", "[1,2]", "[0.9,1.0]", '{"a":1}', "x" * 300),
    *(
        "é\u202e",
        "a b",
        "~nosuchuser",
        "/nope",
        "/dev/null",
        ".",
        "-",
        "=",
        "os:abort",
        "builtins:input",
        "module:name",
    ),
    *("9223372036854775807", "9223372036854775808", "1000000000", "0.5", "0.0001", "/", "..", "\x01", "[" * 60_000),
]


NUMBERS = [
    *("0", "-1", "1", "2", "3", "1e3", "1e4", "1e30", "1e-300", "1e300", "-1e30", "10" + 29 * "0", "[0.9,1.0]"),
    *("9223372036854775807", "9223372036854775808", "1000000000", "1000000", "0.5", "0.0001", "1e-30", "1e-9"),
]


FEW = {"generate": ("decoder_steps=1", "samples=8", "draws=2")}
"""Task -> words that make it short."""

ELSEWHERE = [("out", place) for place in ("/nope", "/", "..", ".", "a b")]
"""These are folders that can be written to, some of them not the test's."""

LONG = [
    *(("train.length.steps", steps) for steps in ("1000000000", "1000000", "1e4")),
    *(("train.length.epochs", epochs) for epochs in ("1000000000", "1000000", "1e4", "1e3")),
    ("data.tokens", "1e4"),
]
"""These would be done, some day."""


class Command(NamedTuple):
    """Words, and what is done to the folder of the runs before them."""

    words: tuple[str, ...]
    damage: str = ""


def test_keys_with_odd_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    commands = []
    for kind, task, recipe, config, count in (
        (pretrain.Options, "pretrain", TINY, tiny.recipe(), 150),
        (finetune_finetune.Options, "finetune", TINY, finetune_presets.short(tiny.recipe()), 60),
        (segment.Options, "segment", SCENES, tiny_scenes.recipe(), 30),
    ):
        found = keys(config)
        names = [*found, *kind.model_fields, "nokey", "steps", "train", "model", "data.nokey"]
        pairs = [(name, value) for name in names for value in ODD]
        pairs = draw.sample([each for each in pairs if each not in ELSEWHERE], count)
        if task == "pretrain":  # what fits the type goes further than what does not
            numbers = [name for name, value in found.items() if isinstance(value, int | float) or value is None]
            pairs += draw.sample([(name, value) for name in numbers for value in NUMBERS], 150)
        for name, value in pairs:
            short = [] if name.startswith("train.length") else ["train.length.steps=1"]
            if (name, value) not in LONG:
                commands.append(Command((task, recipe, *short, f"{name}={value}")))
    faults = [fault for command in commands if (fault := tried(command, tmp_path, capsys))]
    assert not faults, "\n".join(faults)


def test_words_of_all_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    draw = random.Random(1)
    targets = ["runs/base", "runs/tuned", "nope", "runs", "", ".", "builtins:input", "tests.tiny:Waves", "a:b", *ODD]
    commands = []
    for task in TASKS:
        bad = ["key", "=", "=1", "a=b", "seeds=x", "seeds=-1", "workers=x", "layers=99", "out=\x00", "zz=1", "trust=x"]
        for target in draw.sample(targets, 5):
            commands.append(Command((task, target, draw.choice(bad))))
    for task, target, options in (
        ("probe", "runs/base", ProbeOptions), ("inspect", "runs/base", InspectOptions),
        ("evaluate", "runs/tuned", EvaluateOptions), ("embed", "runs/base", EmbedOptions),
        ("generate", "runs/base", GenerateOptions),
    ):  # fmt: skip
        names = [*options.model_fields, "data.samples", "train.max_unreadable", "data.size", "data.unreadable"]
        pairs = [(name, value) for name in names for value in ODD if (name, value) != ("decoder_steps", "1e3")]
        for name, value in draw.sample(pairs, 18):
            few = [word for word in FEW.get(task, ()) if not word.startswith(f"{name}=")]
            commands.append(Command((task, target, *few, f"{name}={value}")))
    faults = [fault for command in commands if (fault := tried(command, tmp_path, capsys, runs))]
    assert not faults, "\n".join(faults)


DAMAGE: dict[str, Callable[[Path], Any]] = {}


def damage(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    DAMAGE[function.__name__] = function
    return function


def _each(file: str) -> None:
    """The ways in which one file of a run folder can be damaged."""
    texts = {
        "empty": b"", "list": b"[]", "number": b"3", "deep": b"[" * 100_000, "not_utf8": b"\xff\xfe\x00{", "half": None,
        "flipped": None, "null": b"null", "string": b'"x"', "object": b"{}",
    }  # fmt: skip
    for name, text in texts.items():

        def write(run: Path, name: str = name, text: bytes | None = text) -> None:
            path = next(run.glob(file))
            whole = path.read_bytes()
            middle = len(whole) // 2
            if name == "half":
                text = whole[:middle]
            elif name == "flipped":
                text = whole[:middle] + bytes([whole[middle] ^ 0x80]) + whole[middle + 1 :]
            assert text is not None
            path.write_bytes(text)

        DAMAGE[f"{file} {name}"] = write

    def folder(run: Path) -> None:
        path = next(run.glob(file))
        path.unlink()
        path.mkdir()

    def pipe(run: Path) -> None:
        path = next(run.glob(file))
        path.unlink()
        os.mkfifo(path)

    def gone(run: Path) -> None:
        next(run.glob(file)).unlink()

    def lacking(run: Path) -> None:
        path = next(run.glob(file))
        if path.suffix == ".json":
            saved = json.loads(path.read_bytes())
            for key in list(saved)[::2]:
                del saved[key]
            path.write_text(json.dumps(saved))

    DAMAGE.update({f"{file} {f.__name__}": f for f in (folder, pipe, gone, lacking)})


for _file in ("config.json", "summary.json", "metrics.jsonl", "timing.jsonl", "checkpoints/*/state.json",
              "checkpoints/*/model.safetensors", "checkpoints/*/optimizer.safetensors"):  # fmt: skip
    _each(_file)


@damage
def checkpoints_are_a_file(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()


@damage
def report_is_a_file(run: Path) -> None:
    shutil.rmtree(run / "report")
    (run / "report").touch()
    (run / "summary.json").unlink()


@damage
def lock_is_a_folder(run: Path) -> None:
    (run / ".lock").mkdir()
    (run / "summary.json").unlink()


@damage
def run_is_a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.touch()


@damage
def values_of_other_kinds(run: Path) -> None:
    saved = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(dict.fromkeys(saved, "x")))


@damage
def config_of_other_kinds(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"model": 3, "train": [], "objective": None}))


@damage
def a_task_that_is_none(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"task": ["x"], "adapter": 3}))


READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "base": (
        ("pretrain", "runs/base"),
        ("pretrain", TINY, "out=runs/base", "train.length.steps=2"),
        ("probe", "runs/base", "layers=0", "poolings=mean", "classifiers=knn"),
        ("inspect", "runs/base", "samples=1"),
        ("embed", "runs/base"),
        ("generate", "runs/base", "decoder_steps=2", "samples=4", "draws=2"),
        ("finetune", "runs/base", "train.length.steps=1"),
        ("finetune", TINY, "init=runs/base", "train.length.steps=1"),
        ("export", "runs/base", "out=released"),
        ("import", "runs/base"),
        ("forecast", "runs/base"),
        ("bench", "runs/base", "steps=1"),
    ),
    "tuned": (
        ("finetune", "runs/tuned"),
        ("evaluate", "runs/tuned"),
        ("probe", "runs/tuned", "layers=0", "poolings=mean", "classifiers=knn"),
        ("inspect", "runs/tuned", "samples=1"),
    ),
}


def test_damaged_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    draw = random.Random(2)
    commands = [Command(words, f"{run}: {name}") for run, each in READERS.items() for words in each for name in DAMAGE]
    commands = [command for command in commands if command.words[0] != "bench" or "config" in command.damage]
    some = draw.sample(commands, 220)
    faults = [fault for command in some if (fault := tried(command, tmp_path, capsys, runs))]
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/base, pre-trained for two steps, and runs/tuned, fine-tuned from it for one."""
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["pretrain", TINY, "out=runs/base", "train.length.steps=2"]) == 0
        assert main(["finetune", "runs/base", "out=runs/tuned", "train.length.steps=1"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """No more than 4 GB beyond what is used: what is too large must not take the machine with it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class Hung(Exception):
    """A command took too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(command: Command, place: Path, capsys: pytest.CaptureFixture[str], runs: Path | None = None) -> str | None:
    """What is wrong with how a command ends, or None."""
    folder = place / "here"
    shutil.rmtree(folder, ignore_errors=True)
    if runs is None:
        folder.mkdir()
    else:
        shutil.copytree(runs, folder)
        if command.damage:
            run, _, name = command.damage.partition(": ")
            DAMAGE[name](folder / "runs" / run)
    before = set(folder.rglob("*"))
    home = Path.cwd()
    os.chdir(folder)
    told = f"{' '.join(word[:60] for word in command.words)!r} {command.damage}"
    try:
        with limited(SECONDS):
            status = main(command.words)
    except Hung:
        return f"{told}: no end after {SECONDS} s"
    except BaseException as error:
        return f"{told}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        os.chdir(home)
        said = capsys.readouterr()
    if status == 0:
        return None
    lines = said.err.splitlines()
    if status != 2:
        return f"{told}: status {status}"
    if not lines or not lines[-1].startswith("nepa: ") or "Traceback" in said.err:
        return f"{told}: {said.err[-300:]}"
    if len(lines[-1]) > 1500:
        return f"{told}: a line of {len(lines[-1])} characters"
    made = {path.relative_to(folder) for path in set(folder.rglob("*")) - before}
    begun = {path.parents[1] for path in made if path.name.startswith("step_")}  # with a checkpoint to go on from
    litter = [path for path in made if not any(path == run or run in (*path.parents, path) for run in begun)]
    litter = [path for path in litter if path not in {parent for run in begun for parent in run.parents}]
    return f"{told}: leaves {sorted(map(str, litter))[:4]} ({lines[-1][:100]})" if litter else None
