"""A command that is refused leaves no folder behind, and nothing of others goes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from nepa_core.basics import Batch, UserError
from nepa_core.runtime import locks
from nepa_core.runtime.config import override
from nepa_core.runtime.locks import holding
from recipes.cli import main
from recipes.comparison import engine as compare
from recipes.configs import PretrainConfig
from recipes.training import train
from tests import tiny
from tests.tiny import Waves

LATE, TINY = "tests.house.test_nothing_left:late", "tests.tiny:recipe"


class Torn(Waves):
    """From some sample on nothing is a number: what a first batch does not show.

    Attributes:
        split: whose samples these are. sound: how many are not among them.
        lacks: such as a file that is gone, instead.
    """

    split: str = "train"
    sound: int = 30
    lacks: bool = False

    def dataset(self, split: str) -> Dataset[Batch]:
        whole = super().dataset(split)
        return Tears(whole, self) if split == self.split else whole


class Tears(Dataset[Batch]):
    def __init__(self, inner: Any, data: Torn) -> None:
        self.inner, self.data = inner, data

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Batch:
        sample: Batch = self.inner[index]
        if index >= self.data.sound:
            if self.data.lacks:
                Path(f"gone/{index}").read_bytes()
            sample["values"] = torch.full_like(sample["values"], torch.nan)
        return sample


def late() -> PretrainConfig:
    config = override(tiny.recipe(), {"train.log": 1, "train.checkpoint": 100})
    return config.model_copy(update={"data": Torn()})


def paths(folder: str = ".") -> set[str]:
    return {str(path) for path in Path(folder).rglob("*")}


MANY = "unreadable samples of 48: more than train.max_unreadable=0.01 of them"


@pytest.mark.parametrize(
    ("words", "said"),
    {
        ("pretrain", LATE): MANY,
        ("pretrain", LATE, "out=a/b/c"): MANY,
        ("finetune", LATE, "train.ema=null"): MANY,
        ("pretrain", LATE, "data.split=test", "data.sound=9"): "held-out sample",
        ("pretrain", LATE, "data.lacks=true", "out=a/b"): "No such file or directory",
        ("probe", LATE, "init=run", "out=other/probe"): "more than train.max_unreadable=0.01 of them",
    }.items(),
)
def test_a_refusal_in_training_leaves_no_folder(fails: Callable[..., str], words: tuple[str, ...], said: str) -> None:
    if "init=run" in words:
        assert main(["pretrain", TINY, "out=run", "train.length.steps=1"]) == 0
    before = paths()
    assert said in fails(*words)
    assert paths() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_refusal_in_a_loader_process_is_the_same_line(fails: Callable[..., str], workers: int) -> None:
    line = fails("pretrain", LATE, "data.lacks=true", f"train.workers={workers}")
    assert line.startswith("gone/"), line
    assert line.endswith(": No such file or directory")
    assert MANY in fails("pretrain", LATE, f"train.workers={workers}")
    assert paths() == set()


class Defective(Torn):
    def dataset(self, split: str) -> Dataset[Batch]:
        return Defect(super().dataset(split), self)


class Defect(Tears):
    def __getitem__(self, index: int) -> Batch:
        if get_worker_info() is not None:
            raise RuntimeError("a defect")
        sample: Batch = self.inner[index]
        return sample


def defective() -> PretrainConfig:
    return late().model_copy(update={"data": Defective(sound=1000)})


def test_a_defect_in_a_loader_process_is_not_called_a_killed_process(tmp_path: Path) -> None:
    words = ("pretrain", "tests.house.test_nothing_left:defective", "train.workers=1", f"out={tmp_path / 'run'}")
    with pytest.raises(RuntimeError, match="a defect"):
        main(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_was_there_before_or_can_be_gone_on_from_stays(fails: Callable[..., str]) -> None:
    Path("empty").mkdir()
    assert MANY in fails("pretrain", LATE, "out=empty")
    assert paths() == {"empty"}
    Path("notes").mkdir()
    Path("notes/.mine").touch()
    assert MANY in fails("pretrain", LATE, "out=notes")
    assert "notes/.mine" in paths()
    words = ("pretrain", LATE, "out=kept", "train.checkpoint=1", "data.sound=47")
    assert "1 unreadable sample of 48" in fails(*words)
    assert list(Path("kept/checkpoints").glob("step_*"))
    assert {"kept/config.json", "kept/metrics.jsonl"} <= paths("kept")
    before = paths("kept")
    assert "1 unreadable sample of 48" in fails(*words)
    assert paths("kept") == before


@pytest.mark.slow
def test_a_control_that_fails_takes_nothing_of_its_run_with_it(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["pretrain", TINY, "out=run", "train.length.steps=1"]) == 0
    words = ("finetune", TINY, "init=run", "out=tuned", "train.length.steps=2")
    real = train.fit

    def fit(**given: Any) -> Any:
        if given["run"].path.name == "control":
            given["run"].log({"step": 0})
            raise UserError("no such luck")
        return real(**given)

    monkeypatch.setattr(train, "fit", fit)
    for _ in range(2):  # the second time the run is finished
        assert fails(*words) == "no such luck"
        assert not Path("tuned/control").exists()
        assert Path("tuned/summary.json").exists()
    with holding(Path("tuned/control"), trains=True):
        assert "tuned/control is in use by" in fails(*words)
    monkeypatch.undo()


def test_an_error_takes_back_only_what_the_block_has_begun(tmp_path: Path) -> None:
    def begin(folder: Path, *names: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "metrics.jsonl", *names):
            (folder / name).touch()
        (folder / "checkpoints").mkdir(exist_ok=True)

    def fail() -> None:
        with holding(old, trains=True):
            begin(new)
            begin(old / "other", "notes.txt")
            begin(old / "stopped")
            (old / "stopped" / "checkpoints" / "step_00000001").mkdir()
            (old / "stopped" / "checkpoints" / "step_00000001" / "state.json").touch()
            (old / "features" / "x").mkdir(parents=True)
            raise UserError("no")

    old, new = tmp_path / "run", tmp_path / "run" / "forecast" / "row"
    begin(old)
    with pytest.raises(UserError):
        fail()
    left = {str(path.relative_to(old)) for path in old.rglob("*")}
    assert {"config.json", "metrics.jsonl", "checkpoints", "other/notes.txt", "other/config.json"} <= left
    assert {"stopped/config.json", "stopped/checkpoints/step_00000001"} <= left
    assert not left & {"forecast", "features"}


def test_who_comes_after_another_removes_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "run", locks.locked

    def locked(file: Path, **given: Any) -> Any:  # after this command has looked, another one has made the folder
        folder.mkdir()
        (folder / "config.json").touch()
        return real(file, **given)

    monkeypatch.setattr(locks, "locked", locked)
    with pytest.raises(UserError), holding(folder, trains=False):
        raise UserError("no")
    assert (folder / "config.json").exists()


COMPARED = {
    "ablate": ("seeds=0",),
    "objectives": (
        "seeds=0", "objectives=cosine,mse", "labels=2", "learning_rates=1e-3", "finetune_steps=1",
        "finetune_causal=false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", COMPARED)
@pytest.mark.slow
def test_a_comparison_that_fails_before_a_checkpoint_leaves_no_folder(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    def share(jobs: Any, *, workers: int) -> None:  # in this process, which starts in no time
        compare.work_through([job for job in jobs if "random" not in str(job.lock.parent.name)])

    monkeypatch.setattr(compare, "share", share)
    assert MANY in fails(task, LATE, *COMPARED[task], f"out=new/{task}")
    assert paths() == set()
    Path("old").mkdir()
    assert MANY in fails(task, LATE, *COMPARED[task], "out=old")
    assert {path.name for path in Path("old").iterdir()} <= {"protocol.json", ".protocol.lock", "runs"}


def test_a_comparison_that_another_command_has_declared_too_stays(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(jobs: Any, *, workers: int) -> None:
        file = Path("out/protocol.json")
        file.with_name("x").write_bytes(file.read_bytes())
        file.with_name("x").rename(file)  # as `declare` of the other one
        raise UserError("no")

    monkeypatch.setattr(compare, "share", share)
    assert fails("ablate", LATE, *COMPARED["ablate"], "out=out") == "no"
    assert Path("out/protocol.json").exists()
