"""nepa probe beside=: other networks are read on the same samples, in the same way, and stand in the verdict."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modalities.image import Images
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.configs import PretrainConfig
from recipes.readout import probing as probe
from recipes.report.summaries import ProbeSummary
from recipes.statistics.credits import unpack_credits
from recipes.statistics.worth import worth_in
from recipes.training.starting import build_model
from tests import tiny
from tests.nepa_core.runtime.test_distributed import torchrun
from tests.pictures import encoded, picture, write_tree
from tests.recipes.readout.test_probe import Phases, names
from tests.summaries import check_summary

HERE = "tests.recipes.readout.test_beside"


def flat(batch: dict[str, Any]) -> torch.Tensor:
    """The raw tokens, as the row of that name has them."""
    assert "label" not in batch
    assert "target" not in batch
    return tiny.recipe().data.tokenize(batch).values.flatten(1)


def two_rows(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"ones": torch.ones(len(flat(batch)), 3), "flat": flat(batch)}


def of_tokens(batch: dict[str, Any]) -> Any:
    return batch["values"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["pretrain", "tests.tiny:recipe", f"out={folder}"]) == 0
    return Run(folder)


@pytest.mark.slow
def test_a_function_is_read_as_our_rows_are(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Features that are the raw tokens get their figures, to the last digit: all else is one."""
    words = [f"beside={HERE}:flat,{HERE}:two_rows", "test_samples=40", "classifiers=linear,knn,lars"]
    assert main(["probe", str(finished.path), *words]) == 0
    shown = capsys.readouterr().out
    result = check_summary(finished.path / "probe.json", ProbeSummary)
    one, two = result["beside"]
    raw = {key: value for key, value in result["raw_tokens"].items() if key != "name"}
    assert {key: value for key, value in one["best"].items() if key != "name"} == raw
    assert one["credits"] == result["credits"]["raw_tokens"]
    assert (names(one["layers"]), names(two["layers"])) == (["features"], ["ones", "flat"])
    assert two["best"] == max(two["layers"], key=lambda row: row["validation"]), "never by the test samples"
    worth = worth_in(result)
    assert worth is not None
    found = {each.name: each for each in worth.beside}
    assert list(found) == ["random weights", "raw tokens", f"{HERE}:flat", f"{HERE}:two_rows"]
    assert found[f"{HERE}:flat"].margin == found["raw tokens"].margin
    assert found[f"{HERE}:flat"].ci95 == found["raw tokens"].ci95
    assert probe.EQUAL in shown
    assert all(f"{HERE}:{name}: your function of the batch" in shown for name in ("flat", "two_rows"))


def test_features_are_kept_until_the_function_gives_others(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    words = ["probe", str(finished.path), f"out={tmp_path}", f"beside={HERE}:flat"]

    def run(scale: float) -> int:
        monkeypatch.setattr(f"{HERE}.flat", counted(scale))
        calls.clear()
        assert main(words) == 0
        return len(calls)

    def counted(scale: float) -> Callable[[dict[str, Any]], torch.Tensor]:
        def given(batch: dict[str, Any]) -> torch.Tensor:
            calls.append(1)
            return scale * tiny.recipe().data.tokenize(batch).values.flatten(1)

        return given

    first = run(1.0)
    assert first > 1
    assert run(1.0) == 1, "the trial on the first samples alone"
    assert run(2.0) == first


def test_a_function_reads_single_tokens_where_these_have_classes(tiny_recipe: PretrainConfig) -> None:
    config = tiny_recipe.model_copy(update={"data": Phases(ragged=False)})
    options = probe.ProbeOptions(test_samples=64, beside=(f"{HERE}:of_tokens",))
    result = probe.probe(config, build_model(config), options)
    assert result["beside"][0]["best"]["scores"] == result["raw_tokens"]["scores"]


def pictures(root: Path, data_size: int) -> PretrainConfig:
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        files = {
            f"{split}/{kind}/{i}.png": encoded(picture(int(draw.integers(99)), 24, 16))
            for kind in "ab"
            for i in range(count)
        }
        write_tree(root, files)
    (root / "val/a/3.png").write_bytes(b"damaged")
    size = (data_size, data_size)
    half = (0.5, 0.5, 0.5)
    data = Images(source="folder", root=str(root), size=size, patch=(4, 4), channels=3, mean=half, std=half)
    recipe = tiny.recipe()
    return recipe.model_copy(update={"data": data, "train": recipe.train.model_copy(update={"max_unreadable": 0.2})})


def test_a_timm_model_reads_the_stored_images_of_the_same_samples(tmp_path: Path) -> None:
    """Whatever their size is for ours; an image that can't be read is left out for all."""
    found = []
    for size in (8, 16):
        config = pictures(tmp_path, size)
        options = probe.ProbeOptions(
            layers=(1,), poolings=("mean",), classifiers=("knn",), beside=("timm:test_resnet",), pretrained=False
        )
        result = probe.probe(config, build_model(config), options)
        assert (result["test_samples"], result["unreadable_held_out"]) == (15, 1)
        found.append(result["beside"][0])
    assert found[0] == found[1]
    assert found[0]["name"] == "timm:test_resnet with random weights"
    assert found[0]["credits"] is not None
    assert len(unpack_credits(found[0]["credits"])) == 15


def test_what_cant_stand_beside_is_one_line(finished: Run, fails: Callable[..., str]) -> None:
    run = str(finished.path)
    assert "samples here have no 'image'" in fails("probe", run, "beside=timm:test_vit", "pretrained=false")
    assert "no model tset_vit; the nearest: test_vit" in fails("probe", run, "beside=timm:tset_vit")
    assert "has no 'of_toknes'; did you mean of_tokens?" in fails("probe", run, f"beside={HERE}:of_toknes")
    assert "is given twice" in fails("probe", run, f"beside={HERE}:flat,{HERE}:flat")
    assert "make it [8, D]" in fails("probe", run, f"beside={HERE}:one_number")
    assert "complex numbers" in fails("probe", run, f"beside={HERE}:complex_numbers")
    assert "numbers above 1e+15" in fails("probe", run, f"beside={HERE}:huge")
    assert "SystemExit: 3" in fails("probe", run, f"beside={HERE}:leaves")
    for name in ("", "timm:", "timm:@file.safetensors"):
        assert "name each network: timm:NAME" in fails("probe", run, f"beside={name}")
    line = fails("probe", run, f"beside={HERE}:breaks")
    assert re.search(r"breaks called with a batch fails, line \d+ of test_beside.py: KeyError: 'nothing'", line)
    for task in ("probe", "finetune"):
        assert "pretrained=false is for beside=timm:NAME" in fails(task, run, "pretrained=false")
    assert "pretrained=false is for" in fails("probe", run, f"beside={HERE}:flat", "pretrained=false")


def complex_numbers(batch: dict[str, Any]) -> torch.Tensor:
    return torch.complex(flat(batch), flat(batch))


def huge(batch: dict[str, Any]) -> torch.Tensor:
    return 1e30 * flat(batch)


def leaves(batch: dict[str, Any]) -> torch.Tensor:
    raise SystemExit(3)


def breaks(batch: dict[str, Any]) -> torch.Tensor:
    return flat(batch | {"values": batch["nothing"]})


def one_number(batch: dict[str, Any]) -> torch.Tensor:
    return flat(batch)[:, 0]


def test_a_function_named_by_a_config_file_is_not_run_unasked(
    finished: Run, fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "my_net.py").write_text("raise SystemExit('it ran')")
    for given in ("my_net:features", "timm:test_vit,my_net:features", "[timm:test_vit, 'my_net:features']"):
        (tmp_path / "my.yaml").write_text(f"recipe: {finished.path}\nbeside: {given}\n")
        assert "line 2: it names my_net:features" in fails("probe", str(tmp_path / "my.yaml"))
    (tmp_path / "my.yaml").write_text(f"recipe: {finished.path}\nbeside: timm:test_vit\npretrained: false\n")
    assert "samples here have no 'image'" in fails("probe", str(tmp_path / "my.yaml"))


@pytest.mark.distributed
def test_two_processes_read_what_one_reads(finished: Run, tmp_path: Path) -> None:
    words = ["probe", str(finished.path), f"beside={HERE}:flat,{HERE}:two_rows"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*words, f"out={one}"]) == 0
    done = torchrun("recipes", *words, f"out={two}")
    assert done.returncode == 0, done.stderr
    found = [Run(folder).summary("probe.json") or {} for folder in (one, two)]
    assert found[0]["beside"] == found[1]["beside"]
