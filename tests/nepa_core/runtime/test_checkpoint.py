"""Checkpoints are whole or not there, are checked before they are believed, and hold no pickle."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nepa_core.basics import UserError
from nepa_core.runtime import checkpoint as module
from nepa_core.runtime.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    load_latest,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from tests.conftest import largest_file


def sample(step: int) -> Checkpoint:
    values = torch.arange(700.0) + step
    weight = values[:600].view(20, 30).T  # not contiguous
    tensors = {"model": {"weight": weight, "count": torch.tensor(step)}, "ema": {"weight": values}}
    return Checkpoint(step, tensors, {"seconds": step / 3, "unreadable": ["a", "é"]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None
    assert (one.step, one.state, one.tensors.keys()) == (other.step, other.state, other.tensors.keys())
    for group, tensors in other.tensors.items():
        assert one.tensors[group].keys() == tensors.keys()
        assert all(torch.equal(one.tensors[group][name], value) for name, value in tensors.items())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, sample(7), keep=1)
    found, notes = load_latest(tmp_path)
    assert path == tmp_path / "step_00000007"
    assert_same(found, sample(7))
    assert notes == []


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "missing") == (None, [])


def test_the_newest_are_kept_and_the_newest_of_them_is_read(tmp_path: Path) -> None:
    for step in (5, 90, 100, 1000):
        save_checkpoint(tmp_path, sample(step), keep=3)
    assert names(tmp_path) == ["step_00000090", "step_00000100", "step_00001000"]
    assert_same(load_latest(tmp_path)[0], sample(1000))


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, sample(7), keep=2)
    again = sample(7)._replace(state={"second": True})
    save_checkpoint(tmp_path, again, keep=2)
    assert names(tmp_path) == ["step_00000007"]
    assert_same(load_latest(tmp_path)[0], again)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path, keep: int) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, sample(step), keep=2)
    (tmp_path / "step_00000020" / "state.json").unlink()
    for step in (12, 14):
        save_checkpoint(tmp_path, sample(step), keep=keep)
    assert names(tmp_path) == ["step_00000012", "step_00000014"][-keep:]


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("size", [0, 1000, 2700])  # in 2,700 bytes there is room for the model, not for the averages
def test_a_failing_disk_is_one_line_and_leaves_the_earlier_checkpoints_whole(tmp_path: Path, size: int) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, sample(step), keep=2)
    with largest_file(size), pytest.raises(UserError) as raised:
        save_checkpoint(tmp_path, sample(3), keep=2)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'step_00000003'} can't be written: ")
    assert "File too large" in message
    assert "\n" not in message
    assert names(tmp_path) == ["step_00000001", "step_00000002"], "and nothing half written"
    assert_same(load_latest(tmp_path)[0], sample(2))


@pytest.mark.parametrize("broken", ["save_file", "_digest", "_flush", "json"])
def test_a_crash_at_any_moment_leaves_the_earlier_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    save_checkpoint(tmp_path, sample(1), keep=1)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.json if broken == "json" else module, "dumps" if broken == "json" else broken, crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, sample(2), keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000001"]
    assert_same(load_latest(tmp_path)[0], sample(1))


def test_what_a_killed_process_left_half_written_is_ignored_and_swept_up(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, sample(1), keep=2)
    half = tmp_path / ".writing_step_00000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert_same(load_latest(tmp_path)[0], sample(1))
    save_checkpoint(tmp_path, sample(3), keep=2)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


# -------------------------------------------------------------------------------------------------- damage


def two_checkpoints(folder: Path) -> Path:
    """Steps 1 and 2; the newer one is returned."""
    save_checkpoint(folder, sample(1), keep=2)
    return save_checkpoint(folder, sample(2), keep=2)


def assert_falls_back(folder: Path, *said: str) -> None:
    found, notes = load_latest(folder)
    assert_same(found, sample(1))
    assert len(notes) == 1
    for text in (str(folder / "step_00000002"), *said, "passing over it"):
        assert text in notes[0]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("end", [0, 10, -3])
def test_a_truncated_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, end: int) -> None:
    file = two_checkpoints(tmp_path) / name
    file.write_bytes(file.read_bytes()[:end])
    assert_falls_back(tmp_path, "is damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json"])
def test_a_missing_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str) -> None:
    (two_checkpoints(tmp_path) / name).unlink()
    assert_falls_back(tmp_path, name)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    file = two_checkpoints(tmp_path) / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 300)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        try:
            found = read_checkpoint(file.parent)
        except UserError as error:
            assert "is damaged" in str(error)  # noqa: PT017
        else:
            assert_same(found, sample(2))  # a blank between two values
            assert whole[place : place + 1].isspace()
    file.write_bytes(whole[:-2])
    assert_falls_back(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"sha256": 1}'])
def test_a_state_file_that_is_json_of_another_kind_is_damage(tmp_path: Path, text: str) -> None:
    (two_checkpoints(tmp_path) / "state.json").write_text(text)
    assert_falls_back(tmp_path)


def test_where_all_are_damaged_there_is_none_and_each_is_named(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    for file in tmp_path.glob("*/model.safetensors"):
        file.write_bytes(b"")
    found, notes = load_latest(tmp_path)
    assert found is None
    assert ["step_00000002" in notes[0], "step_00000001" in notes[1], len(notes)] == [True, True, 2]


def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_checkpoints(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert_same(load_latest(tmp_path)[0], sample(2))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


# ------------------------------------------------------------------------------------------------ optimiser


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_the_optimizer_goes_on_by_names_whatever_the_order_of_its_groups() -> None:
    inputs = torch.randn(6, 5, 3)
    models = [network(), network()]
    first = torch.optim.AdamW(models[0].parameters(), lr=0.1)
    second = torch.optim.AdamW(reversed(list(models[1].parameters())), lr=0.1)
    updates(models[0], first, inputs[:3])
    stored = {
        name: value.clone()
        for name, value in optimizer_tensors(first, {v: k for k, v in models[0].named_parameters()}).items()
    }
    assert {name for name in stored if name.startswith("0.weight/")} == {
        "0.weight/step",
        "0.weight/exp_avg",
        "0.weight/exp_avg_sq",
    }
    models[1].load_state_dict(models[0].state_dict())
    restore_optimizer(second, {v: k for k, v in models[1].named_parameters()}, stored)
    for model, optimizer in zip(models, (first, second), strict=True):
        updates(model, optimizer, inputs[3:])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_optimizer_tensors_survive_the_file(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    updates(model, optimizer, torch.randn(2, 5, 3))
    stored = optimizer_tensors(optimizer, {v: k for k, v in model.named_parameters()})
    save_checkpoint(tmp_path, Checkpoint(2, {"optimizer": stored}, {}), keep=1)
    found = load_latest(tmp_path)[0]
    assert_same(found, Checkpoint(2, {"optimizer": stored}, {}))
    assert json.loads((tmp_path / "step_00000002" / "state.json").read_text())["step"] == 2


# ------------------------------------------------------------------------------------------ in the background


def test_one_is_written_at_a_time_and_the_caller_hears_of_each_when_it_looks(tmp_path: Path) -> None:
    heard, release = list[str](), Event()

    def slow() -> Path:
        assert release.wait(10)
        return save_checkpoint(tmp_path, sample(1), keep=2)

    with BackgroundWriter(lambda path: heard.append(path.name)) as writer:
        writer.write(slow)
        writer.look()
        assert heard == []
        assert names(tmp_path) == []
        release.set()
        writer.write(lambda: save_checkpoint(tmp_path, sample(2), keep=2))
        assert heard == ["step_00000001"]
    assert heard == ["step_00000001", "step_00000002"]
    assert names(tmp_path) == heard


def test_what_the_disk_says_is_raised_where_the_caller_waits_and_hides_no_other_error(tmp_path: Path) -> None:
    def full() -> Path:
        with largest_file(500):
            return save_checkpoint(tmp_path, sample(1), keep=2)

    def left(error: type[Exception] | None) -> None:
        with BackgroundWriter(print) as writer:
            writer.write(full)
            if error is not None:
                raise error

    with pytest.raises(UserError, match=r"can't be written: .*raise the limit"):
        left(None)
    with pytest.raises(ZeroDivisionError):
        left(ZeroDivisionError)
    assert names(tmp_path) == []
