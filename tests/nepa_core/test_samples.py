"""`data.limit` of any adapter, and what some samples of a data set still say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import Batch
from nepa_core.contract import check_modality
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.fit import fingerprint_of
from nepa_core.samples import Some
from nepa_core.tokens import Spans
from recipes import pretrain
from recipes.configs import PretrainConfig
from recipes.vision import digits
from tests.tiny import Waves, recipe


class Recordings(Dataset[Batch]):
    """Ten samples with every optional method."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Batch:
        return {"values": torch.full((3, 1), float(index))}

    def __getitems__(self, indices: list[int]) -> Batch:
        return {"values": torch.tensor(indices)[:, None, None].expand(-1, 3, 1).float()}

    def name(self, index: int) -> str:
        return f"recording {index}"

    def fingerprint(self) -> str:
        return "ten"

    def contents(self) -> str:
        return "of ten"

    def raw(self, index: int) -> bytes:
        return bytes([index])

    def decoded(self, index: int) -> int:
        return -index

    def spans(self) -> Spans:
        rows = torch.arange(10)
        return Spans(rows // 2, rows * 0, rows * 5, rows * 5 + 7, chained=True, views=True)


def test_some_samples_keep_what_the_whole_set_says_of_them() -> None:
    some = cast(Any, Some(Recordings(), [7, 2, 4]))
    assert [float(some[place]["values"][0]) for place in range(len(some))] == [7, 2, 4]
    assert some.__getitems__([2, 0])["values"][:, 0, 0].tolist() == [4, 7]
    assert (some.name(1), some.raw(0), some.decoded(2)) == ("recording 2", b"\x07", -4)
    assert (some.fingerprint(), some.contents()) == ("ten", "of ten")
    spans = some.spans()
    assert (spans.cluster.tolist(), spans.first.tolist(), spans.end.tolist()) == ([3, 1, 2], [35, 10, 20], [42, 17, 27])
    assert spans.chained
    assert spans.views


def test_some_samples_offer_nothing_that_the_whole_set_lacks() -> None:
    some = Some(cast(Dataset[Batch], [{"values": torch.zeros(3, 1)}] * 9), [5, 1])
    missing = ("__getitems__", "raw", "decoded", "spans", "contents")
    assert [name for name in missing if hasattr(some, name)] == []
    assert some.name(0) == "sample 5"
    # one sample more is other data, although as many are chosen
    assert fingerprint_of(some) == "9 samples"


def test_chosen_samples_cross_to_loader_processes() -> None:
    batches = plain_batches(Some(Recordings(), [7, 2, 4]), batch=2, device=torch.device("cpu"), workers=1)
    assert [value for batch in batches for value in batch["values"][:, 0, 0].tolist()] == [7, 2, 4]


def test_a_limit_leaves_the_held_out_samples_and_takes_a_larger_one_on_from_a_smaller() -> None:
    def rows(limit: int | None, split: str = "train") -> list[Tensor]:
        samples = Waves(limit=limit).samples_of(split)
        return [samples[place]["values"] for place in range(len(cast(Any, samples)))]

    assert len(rows(None)) == len(rows(1000)) == len(rows(8, "test")) == 48
    assert all(map(torch.equal, rows(8), rows(20)))
    assert all(map(torch.equal, rows(1000), rows(None)))


class PerClass(Waves):
    """`limit` counts something else here."""

    limit: int | None = 5


def test_an_adapter_with_a_limit_of_its_own_keeps_to_it_alone() -> None:
    assert len(cast(Any, PerClass().samples_of("train"))) == 48
    assert len(cast(Any, override(digits(), {"data.limit": 9}).data.samples_of("train"))) == 9


def test_an_epoch_of_training_is_of_the_limit_and_the_run_keeps_it(tmp_path: Path) -> None:
    config = override(recipe(), {"data.limit": 12, "train.length.epochs": 1, "train.batch": 4, "train.log": 1})
    run = pretrain(config, out=tmp_path / "run")
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert load_config(PretrainConfig, tmp_path / "run" / "config.json").data.limit == 12


def test_a_config_without_a_limit_is_stored_as_before() -> None:
    assert "limit" not in Waves().model_dump()


class Forgetful(Waves):
    def plain(self) -> Waves:
        return Waves(samples=self.samples)


def test_an_adapter_whose_plain_form_loses_its_limit_is_said_to() -> None:
    check_modality(Waves())
    with pytest.raises(AssertionError, match=r"plain\(\) loses data\.limit"):
        check_modality(Forgetful())
