"""What is odd, too large, damaged or killed ends in one line that says the cause, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from nepa_core.basics import Batch, UserError
from nepa_core.runtime import data as loading
from nepa_core.runtime.checkpoint import disk_errors, read_json
from nepa_core.runtime.config import nearest_key, shown
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.training import train as training
from tests import tiny
from tests.conftest import ROOT
from tests.tiny import CPU, Waves

TINY, DIGITS = "tests.tiny:recipe", "recipes.vision:digits_2x2"


VALUES = {
    (TINY, "optim.lr=1e30"): "optim.lr=1e+30: input should be less than or equal to",
    (TINY, "model.layer_scale=1e38"): "model.layer_scale=1e+38: input should be less than or equal to",
    (TINY, "model.layer_scale=1e300"): "model.layer_scale=1e+300: input should be less than or equal to",
    (TINY, "optim.betas=[0.9,1.0]"): "optim.betas=1.0: each should be less than 1",
    (TINY, "model.learned_positions=3"): "model.learned_positions=3 is less than the 6 tokens of a sample: raise it",
    (TINY, "model.dim=1000000000"): "model.dim=1000000000: input should be less than or equal to 1048576",
    (TINY, "model.depth=16384 model.dim=1048576"): "the network of model.dim=1048576, model.depth=16384,",
    (TINY, "train.seed=1" + 30 * "0"): "train.seed=1000000000000000000000000000000: input should be less than",
    (DIGITS, "data.order_seed=1" + 30 * "0"): "data.order_seed=1000000000000000000000000000000: input should be less",
    (DIGITS, "data.crop_ratio=1e-300"): "data.crop_ratio=1e-300: input should be greater than or equal to 0.01",
    (DIGITS, "data.patch_order=~nosuchuser/x.npy"): "data.patch_order=~nosuchuser/x.npy: there is no such user",
    (TINY, "out=" + 300 * "x"): "xxx/summary.json can't be read: File name too long",
    (TINY, "steps=3"): "unknown key steps; did you mean train.length.steps or optim.warmup.steps?",
    (TINY, "data.augment=3"): "unknown key data.augment: the adapter Waves has no such setting; it has limit, samples",
    (TINY, "train.nosuchthing=3"): "unknown key train.nosuchthing; train has length.steps, length.epochs,",
    (TINY, "train.batch=" + 500 * "x"): f"train.batch={77 * 'x'}...: input should be a valid integer",
    (TINY, "optim.lr=" + 9999 * "["): "optim.lr=[[[",
}


@pytest.mark.parametrize(("words", "said"), VALUES.items(), ids=[words[1][:40] for words in VALUES])
def test_an_odd_value_is_one_line_before_anything_is_written(
    fails: Callable[..., str], words: tuple[str, str], said: str
) -> None:
    line = fails("pretrain", words[0], *words[1].split())
    assert said in line
    assert len(line) < 600
    assert list(Path().iterdir()) == []


MANY = "9" * 20
ELSEWHERE = {
    ("bench", TINY, f"steps={MANY}"): f"steps={MANY}: input should be less than or equal to 1000000000000",
    ("forecast", "run", f"steps={MANY}"): f"steps={MANY}: input should be less than or equal to 1000000000000",
    ("orders", DIGITS, f"finetune_steps={MANY}"): f"finetune_steps={MANY}: input should be less than or equal to",
    ("objectives", TINY, f"finetune_steps={MANY}"): f"finetune_steps={MANY}: each should be less than or equal to",
    ("ablate", TINY, f"seeds={MANY}"): f"seeds={MANY}: a seed is less than 4611686018427387904",
    ("finetune", TINY, "optim.head_lr=1e30"): "optim.head_lr=1e+30: input should be less than or equal to",
    ("finetune", TINY, "init=~nosuchuser/x"): "init=~nosuchuser/x: there is no such user; give the path without ~",
    ("pretrain", TINY, "out=~nosuchuser/x"): "out=~nosuchuser/x: there is no such user; give the path without ~",
    ("pretrain", TINY, "out=caf\udce9"): "out=caf\\xdce9 is not UTF-8, and checkpoints can't be read there",
    ("pretrain", DIGITS, "data.root="): "data.root= is empty: name a folder, or leave it out",
    ("pretrain", TINY, "out="): "out= is empty: name a folder, or leave it out",
    ("finetune", TINY, "init="): "init= is empty: name a run or folder, or leave it out",
    ("finetune", "recipes.audio:demo", "data.augment.roll=0"): "all of data.augment is 0; set data.augment=null for no",
    ("import", "0", "out=\0"): "out=\\x00: no name of a folder holds a null byte",
    ("pretrain", TINY, "out=/proc/none/x"): "/proc/none/x can't be written: No folder can be made there; name",
    ("ablate", TINY, "out=/proc/none"): "/proc/none can't be written: No folder can be made there",
    ("resize", DIGITS, "out=/proc/none/x"): "/proc/none can't be written: No folder can be made there",
}


@pytest.mark.parametrize(("words", "said"), ELSEWHERE.items(), ids=[" ".join(words)[:40] for words in ELSEWHERE])
def test_an_odd_option_of_any_task_is_one_line(fails: Callable[..., str], words: tuple[str, ...], said: str) -> None:
    line = fails(*words)
    assert said in line
    assert len(line) < 600
    assert list(Path().iterdir()) == []


def test_a_run_that_is_not_there_is_not_asked_of_the_hub_where_its_folder_is(fails: Callable[..., str]) -> None:
    Path("runs").mkdir()
    assert fails("finetune", TINY, "init=runs/none").startswith("init=runs/none: there is no such folder")


def test_a_stopped_check_claims_to_keep_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.tasks.check.main", stopped)
    assert main(["check", TINY]) == 130
    assert capsys.readouterr().err == "nepa: stopped\n"


def test_data_whose_tokens_do_not_fit_the_weights_are_named(fails: Callable[..., str], run: Path) -> None:
    assert fails("probe", str(run), "data.size=1").startswith("data.size=1: the weights of run do not fit the network")


def test_an_order_that_claims_more_than_there_is_memory_is_named(fails: Callable[..., str]) -> None:
    head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
    Path("order.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + head)
    line = fails("pretrain", DIGITS, "data.patch_order=order.npy")
    assert line.startswith("patch_order=order.npy can't be read as a list of whole numbers: ")
    assert [path.name for path in Path().iterdir()] == ["order.npy"]


def test_a_home_directory_stands_for_the_sign_that_some_shells_leave(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert main(["pretrain", TINY, "train.length.steps=1", "out=~/run"]) == 0
    assert Path("home/run/summary.json").exists()
    assert not Path("~").exists()


def test_a_name_that_is_no_text_can_be_printed() -> None:
    """The end of a run must not fail for want of a character."""
    code = "import recipes.cli; recipes.cli.main(['help']); print('caf\\udce9')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"caf\\udce9\n")


def test_keys_are_found_by_a_part_of_their_name() -> None:
    known = ["recipe", "data.root", "optim.lr", "optim.warmup.steps", "train.length.steps", "train.batch", "train.log"]
    told = {
        "optim.lrr": "; did you mean optim.lr?",
        "lr": "; did you mean optim.lr?",
        "train.steps": "; did you mean train.length.steps?",
        "batchsize": "; did you mean train.batch?",
        "steps": "; did you mean train.length.steps or optim.warmup.steps?",
        "zzz.qqq": "; keys begin with recipe, data, optim, train: add --help to see all",
    }
    for key, expected in told.items():
        assert nearest_key(key, known) == expected
    assert nearest_key("train.qqq", known) == "; train has length.steps, batch, log"
    assert shown([1] * 100) == "[" + "1," * 38 + "..."
    assert shown(None) == "null"


def test_numbers_that_are_too_large_for_the_machine_are_not_left_to_the_system(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "memory", lambda: 50_000)
    line = fails("pretrain", TINY)
    assert line.startswith("the network of model.dim=16, model.depth=2, model.mlp_dim=32 needs")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(training, "memory", lambda: 10**12)
    monkeypatch.setattr("recipes.training.pretraining.build_pretrainer", full)
    line = fails("pretrain", TINY, "verdict.test_samples=5000")
    assert line.startswith("out of memory (verdict.test_samples=5000): lower train.micro_batch or train.batch")
    monkeypatch.setattr("recipes.training.pretraining.build_pretrainer", lambda config: [].pop())
    with pytest.raises(IndexError):  # a defect keeps its traceback
        main(["pretrain", TINY])


# ----------------------------------------------------------------------------------------------- damaged folders


@pytest.fixture
def run(fails: Callable[..., str]) -> Path:
    """A finished run."""
    assert main(["pretrain", TINY, "out=run", "train.length.steps=1"]) == 0
    return Path("run")


def lacking(text: str, *names: str) -> str:
    saved = json.loads(text)
    return json.dumps({key: value for key, value in saved.items() if key not in names})


def test_damaged_files_of_a_run_are_named(fails: Callable[..., str], run: Path) -> None:
    summary, metrics = run / "summary.json", run / "metrics.jsonl"
    whole = summary.read_text()
    for text, said in {
        "[]": "run/summary.json holds no figures; delete it",
        "3": "run/summary.json holds no figures; delete it",
        "[" * 100_000: "run/summary.json is not JSON (nested too deeply); delete it",
        lacking(whole, "loss"): "run/summary.json lacks",
        whole.replace('"loss": ', '"loss": "x", "loss_": '): "run/summary.json holds something else than was written",
    }.items():
        summary.write_text(text)
        assert fails("pretrain", "run").startswith(said)
    summary.write_bytes(b"\xff\xfe{")
    assert "run/summary.json is not JSON (" in fails("pretrain", "run")
    summary.unlink()
    os.mkfifo(summary)
    assert "run/summary.json is not JSON (it is no regular file)" in fails("pretrain", "run")
    summary.unlink()
    summary.mkdir()
    assert "run/summary.json is not JSON (it is no file but a folder)" in fails("pretrain", "run")
    summary.rmdir()
    text = metrics.read_bytes()
    metrics.write_bytes(text[:-20] + b"\xff" + text[-19:])
    lines = len(text.splitlines())
    assert fails("pretrain", "run").startswith(f"run/metrics.jsonl, line {lines}, is damaged")
    metrics.write_bytes(text)
    assert main(["pretrain", "run"]) == 0


def test_a_checkpoint_without_a_key_is_damaged(fails: Callable[..., str], run: Path) -> None:
    (file,) = run.glob("checkpoints/*/state.json")
    whole = file.read_text()
    for text in (lacking(whole, "sha256"), lacking(whole, "tally_steps"), "[]", "[" * 100_000):
        file.write_text(text)
        assert fails("probe", "run").startswith("run/checkpoints holds no undamaged checkpoint; run `rm run/summary")
    file.unlink()
    os.mkfifo(file)
    assert fails("probe", "run").startswith("run/checkpoints holds no undamaged checkpoint")


def test_a_checkpoint_that_lacks_what_training_needs_is_said(fails: Callable[..., str], run: Path) -> None:
    from nepa_core.runtime.checkpoint import load_latest, save_checkpoint

    checkpoint, _ = load_latest(run / "checkpoints")
    assert checkpoint is not None
    (run / "summary.json").unlink()
    for name in ("metrics_bytes", "tally_steps", "seconds"):
        state = {key: value for key, value in checkpoint.state.items() if key != name}
        save_checkpoint(run / "checkpoints", checkpoint._replace(state=state), keep=1)
        assert fails("pretrain", "run").startswith(f"run/checkpoints: the newest checkpoint lacks '{name}'")
    tensors = {key: value for key, value in checkpoint.tensors.items() if key != "optimizer"}
    save_checkpoint(run / "checkpoints", checkpoint._replace(tensors=tensors), keep=1)
    line = fails("pretrain", "run")
    assert line.startswith("run holds weights without the optimiser's state")
    assert line.endswith("begin another one with them by init=run")


def test_reading_json_never_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    assert Run(tmp_path / "pipe" / "x").summary() is None


@pytest.mark.parametrize(
    ("number", "said"),
    {
        errno.ENOSPC: "free some space and give the same command again",
        errno.EDQUOT: "free some space and give the same command again",
        errno.EROFS: "name another folder with out=DIR",
        errno.EACCES: "name another folder with out=DIR",
        errno.ENOENT: "another process has removed or moved the folder",
        errno.ENAMETOOLONG: "give a shorter name with out=DIR",
        errno.EIO: "look at the disk",
    }.items(),
)
def test_the_true_cause_of_a_failed_write_is_said(number: int, said: str) -> None:
    with pytest.raises(UserError) as raised, disk_errors(Path("run")):
        raise OSError(number, os.strerror(number))
    assert str(raised.value).startswith(f"run can't be written: {os.strerror(number)}; {said}")


# --------------------------------------------------------------------------------------------- loader processes


class Deadly(Waves):
    """A sample kills the process that loads it, as the system does where memory ends."""

    def dataset(self, split: str) -> Dataset[Batch]:
        return Kills(super().dataset(split))


class Kills(Dataset[Batch]):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Batch:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        sample: Batch = self.inner[index]
        return sample


def deadly() -> PretrainConfig:
    return tiny.recipe().model_copy(update={"data": Deadly()})


def test_a_loader_process_that_the_system_kills_is_one_line(fails: Callable[..., str]) -> None:
    line = fails("pretrain", "tests.house.test_robust:deadly", "train.workers=2")
    assert line.startswith("the system has killed a process that loads data, perhaps for want of memory: lower")
    assert "train.workers=0" in line


def test_without_room_in_shared_memory_batches_come_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(workers: int) -> list[Batch]:
        data = Waves(unreadable=(3,)).dataset("test")
        return list(plain_batches(data, batch=16, device=CPU, workers=workers))

    alone = batches(0)
    sent: list[object] = []
    monkeypatch.setattr(loading.pickle, "loads", lambda found, load=loading.pickle.loads: sent.append(1) or load(found))
    monkeypatch.setattr(loading.os, "statvfs", lambda _: SimpleNamespace(f_bavail=4, f_frsize=512))
    piped = batches(2)
    assert len(sent) == 3
    monkeypatch.setattr(loading, "_no_room_for", lambda workers: "/dev/shm: No space left on device")
    assert [piped[0].keys(), len(piped)] == [alone[0].keys(), len(alone)]
    for found in (piped, batches(2)):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(alone, found, strict=True) for key in a)


def test_control_characters_are_not_sent_to_the_terminal(fails: Callable[..., str]) -> None:
    assert "\\x1b" in fails("pretrain", "\x1b[2J")
