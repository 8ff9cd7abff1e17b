"""Mistakes in an adapter are one line before any training; NaN in single samples is counted, named and limited."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.utils.data import Dataset

from nepa_core.basics import Batch, UserError
from nepa_core.contract import CHECKS, check_modality
from nepa_core.modality import Modality
from nepa_core.runtime.config import override
from nepa_core.runtime.data import plain_batches, replace_broken
from nepa_core.tokens import Tokens
from recipes.cli import main
from recipes.configs import PretrainConfig
from tests import tiny
from tests.tiny import CPU, Waves


class Samples(Modality):
    """The samples of `Waves` changed by what a subclass says."""

    samples: int = 64

    def dataset(self, split: str) -> Dataset[Batch]:
        waves = Waves(samples=self.samples).dataset(split)
        return cast(Dataset[Batch], [self.altered(index, waves[index], split) for index in range(self.samples)])

    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        return sample

    def tokenize(self, batch: Batch) -> Tokens:
        return Waves().tokenize(batch)


class Unequal(Samples):
    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        return {**sample, "values": sample["values"][: 6 - index % 2]}


class UnequalLater(Samples):
    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        return {**sample, "values": sample["values"][: 5 if index == 40 else 6]}


class AllNan(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return replace(tokens, values=tokens.values / 0 * 0)


class Bytes(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return replace(tokens, values=tokens.values.to(torch.uint8))


class Doubles(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        tokens = super().tokenize(batch)
        return replace(tokens, values=tokens.values.double())


class Flat(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        return replace(super().tokenize(batch), values=batch["values"].flatten(1))


class Single(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        return Tokens(batch["values"].flatten(1)[:, None], torch.zeros(1, 1))


class Coords(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        return replace(super().tokenize(batch), coords=torch.zeros(5, 1))


class Widths(Samples):
    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        return {**sample, "values": sample["values"][:, : 4 if split == "train" else 3]}


class Twice(Samples):
    def order(self, tokens: Tokens) -> torch.Tensor:
        return torch.zeros(6, dtype=torch.int64)


class Strings(Samples):
    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        return {**sample, "name": "wave"}


class Broken(Samples):
    """Sample 3 of training and 5 of the held-out ones hold NaN."""

    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        values = sample["values"].clone()
        if index == (3 if split == "train" else 5):
            values[2, 1] = torch.nan
        return {**sample, "values": values}


MISTAKES: dict[type[Samples], str] = {
    Unequal: "samples of dataset('train') can't be stacked into a batch",
    UnequalLater: "samples can't be stacked into a batch",
    AllNan: "Tokens.values holds NaN or infinity: fill such places and mask the tokens",
    Bytes: "Tokens.values is torch.uint8: scale it and make it float32",
    Doubles: "Tokens.values is torch.float64: make it float32",
    Flat: "Tokens.values has shape [8, 24]: make it [B, N, P]",
    Single: "Tokens.values has a single token: nothing can be predicted; cut samples finer",
    Coords: "Tokens.coords has shape [5, 1] for 6 tokens",
    Widths: "Tokens.values hold 4 numbers a token in dataset('train') and 3 in dataset('test')",
    Twice: "is not a permutation",
    Strings: "sample['name'] of dataset('train') is a str: make it a tensor",
}


def recipe(data: Modality) -> PretrainConfig:
    config = override(tiny.recipe(), {"verdict.test_samples": 64, "verdict.health_samples": 64})
    return config.model_copy(update={"data": data})


for _kind in (*MISTAKES, Broken):  # `tests.nepa_core.test_adapter_mistakes:unequal` is a recipe

    def _recipe(kind: type[Samples] = _kind) -> PretrainConfig:
        return recipe(kind())

    globals()[_kind.__name__.lower()] = _recipe


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def line(*words: str) -> str:
        assert main(words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return line


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize(("kind", "said"), MISTAKES.items(), ids=[kind.__name__ for kind in MISTAKES])
def test_a_mistake_is_one_line_before_any_training(
    fails: Callable[..., str], kind: type[Samples], said: str, task: str
) -> None:
    if (kind, task) == (Single, "finetune"):
        return  # a class can be told from one token
    assert said in fails(task, f"tests.nepa_core.test_adapter_mistakes:{kind.__name__.lower()}")
    if kind is not UnequalLater:
        assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", MISTAKES, ids=[kind.__name__ for kind in MISTAKES])
def test_the_check_tells_the_same(fails: Callable[..., str], kind: type[Samples]) -> None:
    if kind is UnequalLater:
        return  # it reads the first samples alone
    assert MISTAKES[kind] in fails("check", f"tests.nepa_core.test_adapter_mistakes:{kind.__name__.lower()}")
    assert list(Path().iterdir()) == []


class Absent(Samples):
    def tokenize(self, batch: Batch) -> Tokens:
        return replace(super().tokenize(batch), values=batch["value"])


def absent() -> PretrainConfig:
    return recipe(Absent())


def test_the_check_names_the_line_of_an_adapter_s_own_error(fails: Callable[..., str]) -> None:
    line = (
        Path(__file__)
        .read_text()
        .splitlines()
        .index('        return replace(super().tokenize(batch), values=batch["value"])')
        + 1
    )
    said = fails("check", "tests.nepa_core.test_adapter_mistakes:absent")
    assert said == f"nepa: Absent: KeyError at test_adapter_mistakes.py:{line}: 'value'"


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (
            "tests.tiny:recipe",
            (),
            ["train      48 samples, the first 8 read: values float32 [6, 4], ", "mask       none"],
        ),
        ("tests.tiny:recipe", ("data.ragged=true",), ["tokens     6 of 4 numbers, ", "% of the tokens are real"]),
        ("tests.tiny:random", (), ["positions  on 1 axis, from ", "order      "]),
        ("recipes.vision:digits_2x2", ("data.patch_order=spiral_in",), ["order      one for all samples"]),
    ],
)
def test_of_a_sound_adapter_the_check_says_what_it_read_and_what_holds(
    capsys: pytest.CaptureFixture[str], recipe: str, changes: tuple[str, ...], said: list[str]
) -> None:
    assert main(["check", recipe, *changes]) == 0
    out = capsys.readouterr().out
    assert f"passes all {len(CHECKS)} checks.\n" in out
    for text in (*said, *(check.__name__.removeprefix("check_") for check in CHECKS)):
        assert (text if text[0] == "%" else f"\n{text}") in out


def test_one_patch_a_sample_is_said_before_training_with_its_key(fails: Callable[..., str]) -> None:
    line = fails("pretrain", "recipes.vision:digits", "data.patch=[8,8]")
    assert "has a single token: nothing can be predicted; cut samples finer (data.patch=(8, 8))" in line
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_broken_samples_are_counted_named_and_trained_without(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        task,
        "tests.nepa_core.test_adapter_mistakes:broken",
        f"out={tmp_path / 'run'}",
        "train.max_unreadable=0.05",
    ]
    assert main(words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["unreadable_messages"] == ["sample 3: its tokens hold NaN or infinity"]
    assert summary["unreadable_held_out_messages"] == ["sample 5: its tokens hold NaN or infinity"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["skipped_steps"] for line in lines if "lr" in line} == {0.0}
    assert "1 training and 1 held-out samples could not be read" in capsys.readouterr().out


def test_too_many_broken_samples_end_the_run_by_name(fails: Callable[..., str]) -> None:
    line = fails("pretrain", "tests.nepa_core.test_adapter_mistakes:broken", "train.max_unreadable=0.01")
    assert "1 unreadable held-out sample of 64" in line
    assert "sample 5: its tokens hold NaN or infinity" in line


def test_a_probe_leaves_broken_samples_out(tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    share = "train.max_unreadable=0.05"
    assert main(["pretrain", "tests.nepa_core.test_adapter_mistakes:broken", out, share, "train.length.steps=1"]) == 0
    assert main(["probe", str(tmp_path / "run"), "layers=0", "classifiers=knn"]) == 0
    probed = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert all(0 <= row["accuracy"] <= 1 for row in probed["layers"])
    assert "its tokens hold NaN" in json.dumps(probed)


def test_a_broken_sample_is_replaced_by_a_sound_one_and_nothing_else_moves() -> None:
    values = torch.randn(4, 3, 2)
    values[1, 0, 0], values[3, 2, 1] = torch.nan, torch.inf
    order = torch.stack([torch.arange(3).roll(row) for row in range(4)])
    tokens = Tokens(values, torch.zeros(3, 1), torch.ones(4, 3, dtype=torch.bool), order)
    made, batch, broken = replace_broken(tokens, {"label": torch.arange(4), "size": 7})
    assert broken.tolist() == [False, True, False, True]
    assert torch.equal(made.values[[0, 2]], values[[0, 2]])
    assert torch.isfinite(made.values).all()
    for row in (1, 3):
        source = int(batch["label"][row])
        assert source in (0, 2)
        assert torch.equal(made.values[row], values[source])
        assert made.order is not None
        assert torch.equal(made.order[row], order[source])
    sound = Tokens(values[[0, 2]], torch.zeros(3, 1))
    again, _, broken = replace_broken(sound, {})
    assert again is sound
    assert not broken.any()
    assert not replace_broken(Tokens(values[[1, 3]], torch.zeros(3, 1)), {})[0].finite().any(), "the step is skipped"


def test_held_out_samples_that_are_broken_are_left_out_in_their_places() -> None:
    data, kept, named = Broken(), list[int](), set[str]()
    batches = list(
        plain_batches(
            data.dataset("test"), batch=4, device=CPU, limit=8, kept=kept, unreadable=named, tokenize=data.tokenize
        )
    )
    assert kept == [0, 1, 2, 3, 4, 6, 7]
    assert [len(batch["label"]) for batch in batches] == [4, 3]
    assert named == {"sample 5: its tokens hold NaN or infinity"}
    with pytest.raises(UserError, match="1 unreadable held-out sample of 8"):
        list(
            plain_batches(
                data.dataset("test"), batch=4, device=CPU, limit=8, max_unreadable=0.1, tokenize=data.tokenize
            )
        )


class Gaps(Samples):
    """Raw samples with NaN that tokenize masks: sound."""

    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        values = sample["values"].clone()
        values[4:, 0] = torch.nan
        return {**sample, "values": values}

    def tokenize(self, batch: Batch) -> Tokens:
        values = batch["values"]
        return Tokens(values.nan_to_num(), torch.arange(6.0)[:, None], ~values.isnan().any(-1))


def test_nan_in_raw_samples_is_not_taken_for_randomness() -> None:
    check_modality(Gaps())


class Alike(Samples):
    """All samples are of one class."""

    def altered(self, index: int, sample: Batch, split: str) -> Batch:
        return {**sample, "label": torch.tensor(0)}

    def classes(self) -> tuple[str, ...]:
        return ("wave",)


def alike() -> PretrainConfig:
    return recipe(Alike())


def test_one_class_alone_is_refused_and_not_a_hundred_per_cent(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "Alike has one class alone, 'wave'" in fails("finetune", "tests.nepa_core.test_adapter_mistakes:alike")
    assert list(Path().iterdir()) == []
    run = str(tmp_path / "run")
    assert main(["pretrain", "tests.nepa_core.test_adapter_mistakes:alike", f"out={run}", "train.length.steps=1"]) == 0
    assert "all samples that were read have one class, 0" in fails("probe", run, "layers=0", "classifiers=knn")
