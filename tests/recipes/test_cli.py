"""The nepa command: help, what it writes, and one line for everything a user can get wrong."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from pydantic import BaseModel, Field

from nepa_core.runtime import checkpoint
from recipes import vision
from recipes.cli import TASKS, main
from recipes.options import describe_fields
from recipes.report.provenance import provenance
from recipes.report.summaries import PretrainSummary
from tests.conftest import ROOT, largest_file
from tests.summaries import check_summary
from tests.tiny import Waves

TINY = "tests.tiny:recipe"


class Said(NamedTuple):
    status: int
    out: str
    err: str


class Nepa:
    """The command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> Said:
        status = main(words)
        return Said(status, *self.capsys.readouterr())

    def fails(self, *words: str) -> str:
        """The one line that a bad command prints, without its beginning."""
        said = self(*words)
        assert said.status == 2, said
        return one_line(said)


def one_line(said: Said) -> str:
    (line,) = said.err.splitlines()
    assert line.startswith("nepa: "), line
    assert said.out == ""
    return line.removeprefix("nepa: ")


@pytest.fixture
def nepa(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nepa:
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Nepa(capsys)


# ------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_help_names_every_task_and_exits_with_success(nepa: Nepa, words: list[str]) -> None:
    said = nepa(*words)
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith("usage: nepa TASK")
    for name, task in TASKS.items():
        assert f"{name} {task.takes}" in said.out
        assert task.gives in said.out


@pytest.mark.parametrize("name", TASKS)
def test_the_help_of_a_task_says_what_it_takes_and_describes_every_option(nepa: Nepa, name: str) -> None:
    said = nepa(name, "--help")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(f"usage: nepa {name} {TASKS[name].takes}")
    module = importlib.import_module(TASKS[name].module)
    assert (module.__doc__ or "").splitlines()[0] in said.out
    for option, field in module.Options.model_fields.items():
        assert f"{option}=" in said.out
        assert field.description
        assert field.description in said.out


@pytest.mark.parametrize("name", TASKS)
def test_a_task_without_its_target_points_to_its_help(nepa: Nepa, name: str) -> None:
    expected = f"nepa {name} needs a {TASKS[name].takes} after it; see nepa {name} --help"
    assert nepa.fails(name) == expected
    assert nepa.fails(name, "out=x") == expected


def test_the_help_of_a_recipe_lists_every_key_with_its_value(nepa: Nepa) -> None:
    said = nepa("pretrain", TINY, "optim.lr=0.5", "--help")
    assert said.status == 0
    for line in ("recipe=tests.tiny:recipe", "data.tokens=6", "optim.lr=0.5", "train.length.steps=12"):
        assert f"  {line}\n" in said.out
    assert list(Path().iterdir()) == [], "asking for help writes nothing"


def test_the_help_of_a_recipe_prints_what_the_recipe_says_of_itself(nepa: Nepa) -> None:
    said = nepa("pretrain", "recipes.vision:base_in1k", "--help").out
    assert "torchrun --nproc-per-node 8 -m recipes pretrain recipes.vision:base_in1k data.root=DIR" in said
    assert "83.8 % top-1" in said


@pytest.mark.parametrize(
    "name", [name for name, function in vars(vision).items() if re.match("(base|large)_(in1k|ade20k)", name)]
)
def test_every_preset_for_eight_gpus_says_how_it_is_run_how_long_it_takes_and_what_was_published(name: str) -> None:
    said = " ".join((vars(vision)[name].__doc__ or "").split())
    task = "segment" if "ade20k" in name else "finetune" if "finetune" in name else "pretrain"
    for command in ("torchrun --nproc-per-node 8 -m recipes", "nepa"):
        assert f"`{command} {task} recipes.vision:{name} data.root=DIR" in said
    assert re.search(r"Time.* on 8|on eight", said)
    assert re.search(r"derived|[Bb]y arithmetic", said)
    assert re.search(r"\d\d\.\d\d? (%|mIoU)", said)
    assert re.search(r"[Nn]ot published", said) or "Nothing else is" in said


def test_help_lists_the_keys_that_the_task_takes_and_no_others(nepa: Nepa) -> None:
    assert nepa("pretrain", TINY, "out=run", "train.length.steps=2").status == 0
    assert nepa("finetune", "run", "out=tuned", "train.length.steps=2").status == 0
    listed = {}
    for task, run in (("probe", "run"), ("export", "run"), ("inspect", "tuned"), ("evaluate", "tuned")):
        lines = nepa(task, run, "--help").out.splitlines()
        start = next(
            i for i, line in enumerate(lines) if line.startswith((f"keys of {run}:", f"nepa {task} takes {run}"))
        )
        listed[task] = [line.strip().partition("=")[0] for line in lines[start + 1 :]]
    data = [*(f"data.{key}" for key in Waves.model_fields if key != "changed"), "data.changed"]  # never stored: last
    assert listed["probe"] == [*data, "train.workers", "train.max_unreadable"]
    assert listed["export"] == data  # of a graph
    assert listed["inspect"] == data
    assert listed["evaluate"] == [
        *data, "model.attention", "causal", "train.batch", "train.micro_batch", "train.precision", "train.workers",
        "train.max_unreadable",
    ]  # fmt: skip
    assert "optim.lr can't be set for nepa evaluate" in nepa.fails("evaluate", "tuned", "optim.lr=1")


def test_options_show_their_choices_and_defaults() -> None:
    class Some(BaseModel):
        kind: Literal["a", "b"] = Field(default="b", description="which one")
        kinds: tuple[Literal["a", "b"], ...] | None = Field(default=None, description="which ones")
        sizes: tuple[int, ...] = Field(default=(1, 2), description="some sizes")
        on: bool = Field(default=False, description="or off")
        told: int = Field(default=3, description="a number; default three")
        out: str | None = Field(default=None, description="a folder")

    assert [line.split(maxsplit=1)[1] for line in describe_fields(Some).splitlines()] == [
        "which one (one of a, b; default b)",
        "which ones (some of a, b)",
        "some sizes (default [1,2])",
        "or off (one of true, false; default false)",
        "a number; default three",
        "a folder",
    ]


def test_every_built_in_recipe_is_listed_with_a_line_and_can_be_read(nepa: Nepa) -> None:
    listed = nepa("recipes").out.splitlines()
    assert any(line.startswith("recipes.vision:digits ") for line in listed)
    for line in listed:
        name, task, *text = line.split()
        assert len(text) > 3
        assert f"  recipe={name}\n" in nepa(task, name, "--help").out


# -------------------------------------------------------------------------------------------- a whole run


@pytest.mark.pictures
def test_a_run_folder_holds_what_the_readme_says_and_is_not_computed_twice(nepa: Nepa) -> None:
    said = nepa("pretrain", TINY, "train.length.steps=2")
    assert (said.status, said.err) == (0, "")
    assert "identified among 32" in said.out
    run = Path("runs/tests.tiny-recipe")
    expected = {"config.json", "metrics.jsonl", "timing.jsonl", "summary.json", "checkpoints", "report"}
    assert {path.name for path in run.iterdir()} == expected
    page = (run / "report" / "index.html").read_text()
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in run.glob("report/*.png"))
    assert page.count("data:image/png") == len(list(run.glob("report/*.png"))) > 2
    summary = check_summary(run / "summary.json", PretrainSummary)
    assert summary.keys() >= {
        *("loss", "baseline_copy", "baseline_mean", "baseline_position_mean", "baseline_linear", "retrieval_top1"),
        *("retrieval_top1_copy", "retrieval_top1_linear", "retrieval_top1_untrained", "effective_rank_embedding"),
        *("effective_rank_prediction", "collapsed", "tokens_per_second", "seconds", "steps", "parameters"),
    }
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = nepa("pretrain", TINY, "train.length.steps=2")
    assert (again.status, again.out) == (0, said.out)
    assert nepa("pretrain", str(run)).out == said.out, "and by the name of the run"
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


# --------------------------------------------------------------------------------------------- bad words


BAD = {
    "unknown task": (["pretrian", TINY], "there is no task 'pretrian'; did you mean pretrain?"),
    "unknown key": (["pretrain", TINY, "optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
    "unknown option of a plan": (["plan", TINY, "devces=2"], "unknown key devces; did you mean devices?"),
    "unknown option like a key": (["ablate", TINY, "seds=1"], "unknown key seds; did you mean seeds?"),
    "unknown option of a readout": (["probe", TINY, "laers=1"], "unknown key laers; did you mean layers?"),
    "unknown key of a group in the adapter": (
        ["pretrain", "recipes.audio:nape_small", "data.augment.pitch=1"],
        "unknown key data.augment.pitch; data.augment has time_mask, frequency_mask, roll, noise",
    ),
    "a value of several types": (
        ["pretrain", "recipes.audio:demo", "data.source=demo"],
        "data.source=demo: input should be 'synthetic', 'folder', 'audioset', 'esc50', 'speech_commands' or 'iemocap'",
    ),
    "unknown key of the adapter": (["pretrain", TINY, "data.token=4"], "unknown key data.token; did you mean data."),
    "unknown option": (["bench", TINY, "step=3"], "unknown key step"),
    "wrong type": (["pretrain", TINY, "train.batch=many"], "train.batch=many: input should be a valid integer"),
    "wrong type of an option": (["bench", TINY, "steps=many"], "steps=many: input should be a valid integer"),
    "a wrong element of a list": (
        ["ablate", TINY, "seeds=0,a"], "seeds=a: each should be a valid integer (such as 0,1,2; default 0,1)"
    ),
    "no element": (["ablate", TINY, "seeds=[]"], "seeds=[]: name at least one"),
    "a wrong element of several kinds": (
        ["probe", TINY, "layers=foo"], "layers=foo: each should be a valid integer or 'final' (such as 0,3,final"
    ),
    "a number that is too small in a list": (
        ["objectives", TINY, "labels=10,0"], "labels=0: each should be greater than 0 (training labels a class"
    ),
    "nothing to read out": (["ablate", TINY, "data.labelled=false"], "Waves gives no class to train on"),
    "a negative seed": (["ablate", TINY, "seeds=0,-1"], "seeds=-1: a seed is a whole number from 0"),
    "out of range": (["pretrain", TINY, "train.ema=2"], "train.ema=2: input should be less than 1"),
    "no value": (["pretrain", TINY, "train.batch"], "'train.batch' is not of the form key=value"),
    "twice": (["pretrain", TINY, "train.seed=1", "train.seed=2"], "train.seed is given twice"),
    "no such module": (["pretrain", "no_such:recipe"], "no_such:recipe: no module 'no_such' here; run the"),
    "no such recipe": (["pretrain", "tests.tiny:recip"], "tests.tiny has no 'recip'; did you mean recipe?"),
    "no recipe": (["pretrain", "tests.tiny:CPU"], "tests.tiny:CPU must be a function without arguments"),
    "recipe with arguments": (["pretrain", "recipes.presets:small"], "must be a function without arguments"),
    "recipe of something else": (["pretrain", "recipes.cli:list_recipes"], "recipes.cli:list_recipes gives a str"),
    "recipe of another task": (
        ["segment", "recipes.vision:digits"],
        "recipes.vision:digits is a recipe of `nepa pretrain`; name a recipe of `nepa segment`, as `nepa recipes`",
    ),
    "no decoding to time": (
        ["bench", TINY, "against=decode"],
        "against=decode times Images whose files are decoded on access; a recipe of Waves can't be timed so",
    ),
    "no run": (["pretrain", "runs/mine"], "'runs/mine' is neither a run folder nor a recipe"),
    "no run to probe": (["probe", "runs/mine"], "runs/mine is not a run folder; run `nepa pretrain` first"),
    "missing data": (["pretrain", "recipes.vision:cifar10", "data.root=/nope"], "data.root=/nope: there is no such"),
    "data of no known layout": (["pretrain", "recipes.vision:cifar10", "data.root=."], "data.root=.: looked for"),
    "patch that does not divide": (
        ["pretrain", "recipes.vision:digits", "data.patch=[3,3]"],
        "data.patch=(3, 3) does not divide data.size=(8, 8); the nearest sizes that it divides: (6, 6) and (9, 9)",
    ),
    "batch too large": (["pretrain", TINY, "train.batch=99"], "train.batch=99 is more than the 48 training samples"),
    "too many unreadable": (["pretrain", TINY, "data.unreadable=[1]"], "more than train.max_unreadable=0.01 of them"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_a_bad_command_prints_one_line_that_names_the_thing(nepa: Nepa, words: list[str], said: str) -> None:
    assert said in nepa.fails(*words)


def test_another_process_leaves_the_word_to_the_first_and_speaks_where_it_says_nothing(
    nepa: Nepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("recipes.cli.time.sleep", waited.append)
    assert nepa.fails("pretrain", "tests.tiny:nothing").startswith("process 1: ")
    assert waited == [15.0], "torchrun ends it before, where the first process has failed, too"


def test_a_mended_command_runs_where_the_bad_one_failed(nepa: Nepa) -> None:
    nepa.fails("pretrain", "recipes.vision:cifar10", "data.root=/nope")
    assert "data.root=/none" in nepa.fails("pretrain", "recipes.vision:cifar10", "data.root=/none")
    nepa.fails("pretrain", TINY, "train.batch=99")
    assert nepa("pretrain", TINY, "train.length.steps=1").status == 0


FIRST_INPUT = {
    "weights to fine-tune": ["finetune", TINY, "init=nope"],
    "data to fine-tune": ["finetune", "recipes.vision:cifar10", "data.root=/nope"],
    "batch to fine-tune": ["finetune", TINY, "train.batch=99"],
    "weights to segment with": ["segment", "tests.tiny_scenes:recipe", "data.root=/nope", "init=nope"],
    "data to segment": ["segment", "tests.tiny_scenes:recipe", "data.root=/nope"],
    "data to pre-train on": ["pretrain", "recipes.vision:cifar10", "data.root=/nope"],
    "batch to pre-train with": ["pretrain", TINY, "train.batch=99"],
    "weights to probe": ["probe", TINY, "init=nope"],
    "checkpoint to import": ["import", "nope"],
    "images to resize": ["resize", "recipes.vision:cifar10", "data.root=/nope"],
}


@pytest.mark.parametrize("words", FIRST_INPUT.values(), ids=FIRST_INPUT.keys())
def test_a_command_that_fails_on_what_it_reads_first_leaves_nothing_behind(nepa: Nepa, words: list[str]) -> None:
    nepa.fails(*words)
    assert list(Path().iterdir()) == []


# ---------------------------------------------------------------------------------------- bad run folders


@pytest.fixture
def run(nepa: Nepa) -> Path:
    """A run that was stopped before it was finished."""
    from tests.tiny import recipe, training

    training(recipe().model_copy(update={"recipe": TINY}), Path("run"))
    return Path("run")


def test_the_adapter_of_a_run_is_checked_and_the_run_left_alone(nepa: Nepa, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = nepa("check", str(run))
    assert said.status == 0
    assert said.out.startswith("Waves passes all 22 checks.")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_two_recipes_of_one_name_have_folders_of_their_own(nepa: Nepa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("")
    for module in ("mine_one", "mine_two"):
        Path(f"{module}.py").write_text("from tests.tiny import recipe\n\n\ndef base():\n    return recipe()\n")
        assert nepa("pretrain", f"{module}:base", "train.length.steps=1").status == 0
    saved = {run.name: json.loads((run / "config.json").read_text())["recipe"] for run in Path("runs").iterdir()}
    assert saved == {"mine_one-base": "mine_one:base", "mine_two-base": "mine_two:base"}


def test_a_run_with_another_config_is_left_alone(nepa: Nepa, run: Path) -> None:
    line = nepa.fails("pretrain", TINY, "out=run", "optim.lr=0.5", "data.jitter=1")
    assert line == (
        "run holds a run with another config: data.jitter 0.0 -> 1.0, optim.lr 0.003 -> 0.5; give it back, or name "
        "another folder with out=DIR"
    )
    assert not (run / "summary.json").exists()


def test_a_run_of_another_recipe_is_named_and_not_compared_key_by_key(nepa: Nepa, run: Path) -> None:
    line = nepa.fails("pretrain", "tests.tiny:random", "out=run")
    assert line == f"run holds a run of {TINY}; name another folder for tests.tiny:random with out=DIR"


def test_what_was_only_pretrained_is_not_evaluated(nepa: Nepa, run: Path) -> None:
    line = nepa.fails("evaluate", "run")
    assert line == (
        "run was pre-trained only and has no head to evaluate: `nepa probe run` reads it out, `nepa finetune run` "
        "trains one"
    )


def test_a_run_is_neither_imported_nor_taken_for_the_folder_of_a_comparison(nepa: Nepa, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert nepa.fails("import", "run").startswith("run is a run already; name a folder that `nepa export` wrote")
    for words in (["ablate", TINY], ["orders", "recipes.vision:digits"], ["objectives", TINY]):
        line = nepa.fails(*words, "seeds=0", "out=run")
        assert line == "run is a run, and its summary and report would be lost; name another folder with out=DIR"
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("words", [["pretrain", TINY, "out=run"], ["pretrain", "run"], ["probe", "run"]])
@pytest.mark.parametrize("text", ["", '{"recipe": ', "[1, 2]", '{"adapter": "tests.tiny:Waves", "data": {"toks": 1}}'])
def test_a_corrupt_config_is_named(nepa: Nepa, run: Path, words: list[str], text: str) -> None:
    (run / "config.json").write_text(text)
    assert nepa.fails(*words).startswith("run/config.json")


def test_a_corrupt_summary_is_named(nepa: Nepa, run: Path) -> None:
    (run / "summary.json").write_text('{"loss": ')
    assert nepa.fails("pretrain", "run").startswith("run/summary.json is not JSON")


def test_a_run_without_a_whole_checkpoint_is_not_probed(nepa: Nepa, run: Path) -> None:
    for file in run.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    assert nepa.fails("probe", "run").startswith("run/checkpoints holds no undamaged checkpoint; run `nepa pretrain")


def test_a_folder_that_is_no_run_is_not_written_to(nepa: Nepa) -> None:
    Path("photos").mkdir()
    Path("photos/me.jpg").write_text("me")
    assert nepa.fails("pretrain", TINY, "out=photos").startswith("photos exists and is not a run folder")
    assert nepa.fails("pretrain", TINY, "out=photos/me.jpg").startswith("photos/me.jpg exists and is not a run folder")
    assert [path.name for path in Path("photos").iterdir()] == ["me.jpg"]


# ---------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(nepa: Nepa, monkeypatch: pytest.MonkeyPatch) -> None:
    save, files = checkpoint.save_file, 0

    def fill_up(*arguments: Any, **others: Any) -> None:
        nonlocal files
        files += 1
        if files > 6:  # in the second checkpoint, which has four files like the first
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fill_up)
        line = nepa.fails("pretrain", TINY, "out=run")
    assert line.startswith("run/checkpoints/step_00000008 can't be written: No space left on device; free some space")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_00000004"]
    said = nepa("pretrain", TINY, "out=run")
    assert (said.status, said.err) == (0, "going on after step 4\n")


@pytest.mark.parametrize(
    ("size", "file"),
    [(500, "run"), (2300, "run/metrics.jsonl"), (20_000, "run/checkpoints/step_00000004")],
)
def test_wherever_the_disk_is_full_the_same_command_goes_on(nepa: Nepa, size: int, file: str) -> None:
    words = ["pretrain", TINY, "out=run", "train.length.steps=5", "train.log=1", "train.evaluate=1"]
    with largest_file(size):
        line = nepa.fails(*words)
    assert line.startswith(f"{file} can't be written: ")
    assert "File too large" in line
    assert nepa(*words).status == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 11


# ---------------------------------------------------------------------------------------- real processes


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "recipes", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_the_exit_status_of_the_process_and_its_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command("pretrain", TINY, "optim.lrr=1"), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nepa: unknown key optim.lrr; did you mean optim.lr?\n"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_ctrl_c_stops_after_a_checkpoint_and_the_same_command_finishes(nepa: Nepa, workers: int) -> None:
    words = ["pretrain", TINY, "out=run", "train.length.steps=150", "train.checkpoint=100", f"train.workers={workers}"]
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not Path("run/timing.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    line = one_line(Said(130, out, err))
    assert line.startswith("stopped after step ")
    assert line.endswith(" of 150; the same command goes on from there")
    step = int(line.split()[3])
    assert [path.name for path in Path("run/checkpoints").iterdir()] == [f"step_{step:08d}"]
    said = nepa(*words)
    assert (said.status, said.err) == (0, f"going on after step {step}\n")
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 150


def test_the_command_that_is_kept_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["objectives", "my:recipe", 'objective.terms={"mse": 1}']
    for program in (str(ROOT / "recipes/__main__.py"), "/opt/venv/bin/nepa"):
        monkeypatch.setattr(sys, "argv", [program, *words])
        assert provenance()["command"] == "nepa objectives my:recipe 'objective.terms={\"mse\": 1}'"
    monkeypatch.setattr(sys, "argv", ["/home/me/__main__.py", "x"])
    assert provenance()["command"] == "__main__.py x"
