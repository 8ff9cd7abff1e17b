"""The loop, loading and slices on a GPU, held to what the CPU gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modalities.data.images import open_images
from nepa_core.runtime import fit as fit_module
from nepa_core.runtime.config import override
from nepa_core.runtime.data import DrawSampler, TrainingBatches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.configs import PretrainConfig
from recipes.training.pretraining import pretrain
from tests.conftest import ON_BOTH
from tests.pictures import encoded, open_folder, picture, write_tree

ALONE = World(0, 1, torch.device("cpu"))


def losses(config: PretrainConfig, folder: Path, ranks: World) -> list[float]:
    """Of every line of a run."""
    pretrain(config, Run(folder), ranks, show=False)
    return [line["loss"] for line in Run(folder).metrics() if "loss" in line]


@ON_BOTH
@pytest.mark.parametrize(
    ("changes", "within"),
    [
        ({"train.precision": "float32"}, 2e-3),
        ({"train.precision": "bfloat16"}, 0.03),
        ({"train.precision": "float32", "train.recompute": True, "train.micro_batch": 4}, 2e-3),
    ],
    ids=["float32", "bfloat16", "recomputed and accumulated"],
)
def test_a_run_learns_what_it_learns_on_the_cpu(
    changes: dict[str, Any], within: float, device: str, tmp_path: Path, tiny_recipe: PretrainConfig
) -> None:
    expected = losses(override(tiny_recipe, {"train.precision": "float32"}), tmp_path / "cpu", ALONE)
    found = losses(override(tiny_recipe, changes), tmp_path / "device", World(0, 1, torch.device(device)))
    assert found == pytest.approx(expected, abs=within)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_run_learns_the_same_on_a_gpu(precision: str, tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    torch.compiler.reset()
    ranks, changes = World(0, 1, torch.device("cuda")), {"train.precision": precision}
    plain, compiled = (
        losses(override(tiny_recipe, changes | {"train.compile": compiled}), tmp_path / str(compiled), ranks)
        for compiled in (False, True)
    )
    assert compiled == pytest.approx(plain, abs=2e-3 if precision == "float32" else 0.03)


@ON_BOTH
@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_arrive_as_they_were_decoded(workers: int, device: str, tmp_path: Path) -> None:
    """Read ahead by other processes, pinned, and sent without waiting."""
    files = {
        f"{split}/{kind}/{i}.jpg": encoded(picture(i, 40, 32), "jpeg")
        for split in ("train", "val")
        for kind in "ab"
        for i in range(8)
    }
    write_tree(tmp_path, files)
    images = open_folder(tmp_path, augment="none")
    sampler = DrawSampler(16, batch=4, accumulate=1, rank=0, ranks=1, seed=0, start=0, stop=8)
    batches = TrainingBatches(images, sampler, workers=workers, max_unreadable=0.0, device=torch.device(device))
    for draw, found in zip(sampler, batches, strict=True):
        assert found["image"].device.type == device
        assert torch.equal(found["image"].cpu(), torch.stack([images[index]["image"] for index in draw.indices]))


@ON_BOTH
def test_batches_that_arrive_while_the_device_works_are_whole(device: str) -> None:
    """Copies run on a stream of their own, and nobody waits."""
    images: Any = open_images("noise", "train", size=(64, 64), channels=3)
    sampler = DrawSampler(4096, batch=32, accumulate=1, rank=0, ranks=1, seed=0, start=0, stop=6)
    batches = TrainingBatches(images, sampler, workers=0, max_unreadable=0.0, device=torch.device(device))
    side = 4096 if device == "cuda" else 64
    busy, sums = torch.randn(side, side, device=device), []
    for batch in batches:
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(batch["image"].long().sum())
        del batch
    expected = [sum(int(images[row]["image"].long().sum()) for row in draw.indices) for draw in sampler]
    assert torch.stack(sums).tolist() == expected


@pytest.fixture
def group(device: str) -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device(device))
    dist.destroy_process_group()


@ON_BOTH
@pytest.mark.slow
def test_slices_of_one_process_train_as_the_whole(
    group: World, device: str, tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.strategy=fsdp, which one process alone does not take, as it holds all anyway."""
    sharded = pytest.importorskip("nepa_core.runtime.sharded")
    config = override(tiny_recipe, {"train.precision": "float32"})
    expected = losses(config, tmp_path / "whole", group)

    def sliced(model: Any, ema: Any, ranks: World, strategy: str) -> Any:
        return sharded.Sharded(model, ema, ranks, sharded.mesh_of(ranks, across_machines=False))

    monkeypatch.setattr(fit_module, "held", sliced)
    assert losses(config, tmp_path / "sliced", group) == pytest.approx(expected, abs=1e-5)
