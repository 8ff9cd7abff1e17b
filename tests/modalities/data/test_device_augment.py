"""Augmentation of whole batches on the device: the draws of the CPU's, and its pixels within a level."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from modalities.data import device_augment
from modalities.data.device_augment import OPERATIONS, augmented, resize_weights
from modalities.data.drawn_images import RECORD, Drawing, records
from modalities.data.image_augment import RandAugment, augmentation
from modalities.image import Images
from nepa_core.contract import check_modality
from nepa_core.runtime.config import override
from nepa_core.runtime.data import DrawSampler, TrainingBatches, plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes import vision
from recipes.training.pretraining import pretrain
from tests.conftest import ON_BOTH
from tests.pictures import encoded, picture, write_tree

MEAN = (0.485, 0.456, 0.406)
MODES = pytest.mark.parametrize("augment", ["crop", "crop_flip", "randaugment"])


def smooth(seed: int, width: int, height: int) -> Image.Image:
    return picture(seed, 4, 4).resize((width, height), Image.Resampling.BICUBIC)


def adapter(**changes: Any) -> Images:
    settings: dict[str, Any] = {"source": "noise", "size": (16, 24), "patch": (4, 4), "channels": 3}
    return Images(**(settings | {"mean": MEAN, "std": (0.3, 0.3, 0.3), "augment": "crop_flip"} | changes))


def arguments() -> Iterator[tuple[str, float]]:
    """The name of every operation with arguments as timm draws them."""
    for op in RandAugment((16, 16), MEAN).transform.ops:
        for strength in (9.0, 8.2, 9.7):
            given = () if op.level_fn is None else op.level_fn(strength, op.hparams)
            yield op.name, float(given[0]) if given else 0.0


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("noisy", [True, False])
@ON_BOTH
def test_every_operation_gives_the_pixels_of_pillow(noisy: bool, mode: str, device: str) -> None:
    random.seed(0)
    image = (picture(1, 53, 37) if noisy else smooth(1, 53, 37)).convert(mode)
    mean = MEAN[: len(image.getbands())]
    ops = RandAugment((37, 53), mean).transform.ops
    assert len(ops) == len(OPERATIONS)
    fill = [round(255 * each) for each in mean]
    stored = pil_to_tensor(image)[None].to(device)
    for name, amount in arguments():
        place = [op.name for op in ops].index(name)
        exact = int(amount) if name.startswith(("Posterize", "Solarize")) else amount
        given = () if ops[place].level_fn is None else (exact,)
        expected = pil_to_tensor(ops[place].aug_fn(image, *given, **ops[place].kwargs)).int()
        found = OPERATIONS[place](stored, torch.tensor([amount]), fill)[0].cpu().int()
        differ = (found - expected).abs()
        assert differ.max() <= 1, name
        assert (differ > 0).float().mean() < 0.02, name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@ON_BOTH
def test_crops_are_scaled_as_torchs_antialiased_resize(interpolation: Any, device: str) -> None:
    drawn = np.zeros(6, RECORD)
    drawn["box"] = [(0, 0, 60, 80), (3, 5, 50, 40), (10, 20, 9, 7), (0, 79, 60, 1), (7, 7, 16, 24), (0, 0, 31, 80)]
    drawn["flip"], drawn["ops"] = [0, 1, 0, 1, 0, 1], -1
    images = torch.stack([pil_to_tensor(picture(seed, 80, 60)) for seed in range(6)])
    found = augmented(images.to(device), drawn, (16, 24), MEAN, interpolation).cpu()
    mode = v2.InterpolationMode(interpolation)
    for image, record, one in zip(images, drawn, found, strict=True):
        expected = resized_crop(image, *map(int, record["box"]), [16, 24], mode, antialias=True)
        expected = expected.flip(-1) if record["flip"] else expected
        assert (one.int() - expected.int()).abs().max() <= 1
    weights = resize_weights(torch.tensor([3.0]), torch.tensor([50.0]), 16, 80, interpolation)
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    assert (weights[..., :3] == 0).all()
    assert (weights[..., 53:] == 0).all()


@MODES
def test_the_draws_are_those_of_the_cpu(augment: Any) -> None:
    """So the distribution is, too; sample for sample, the same pixels within the rounding of every step."""
    image = pil_to_tensor(smooth(5, 60, 48))
    on_the_cpu, drawing = augmentation(augment, (16, 24), MEAN), Drawing(augment, (16, 24), MEAN)
    assert on_the_cpu is not None
    expected, drawn = list[Tensor](), list[np.ndarray[Any, Any]]()
    for seed in range(120):
        torch.manual_seed(seed)
        expected.append(on_the_cpu(image))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        drawn.append(drawing(48, 60))
        assert torch.equal(torch.get_rng_state(), after)
    found = augmented(image.expand(120, -1, -1, -1), np.concatenate(drawn), (16, 24), MEAN, "bicubic")
    differ = (found.int() - torch.stack(expected).int()).abs().flatten(1).float()
    assert differ.mean() < 0.5
    assert differ.mean(1).quantile(0.9) < 0.6, "but for equalised ones, where a level may become many"


@MODES
def test_boxes_and_moments_are_distributed_as_on_the_cpu(augment: Any) -> None:
    """Over independent draws: a test of the drawing that does not rely on equal seeds."""
    count, image = 800, pil_to_tensor(smooth(6, 48, 48))
    on_the_cpu, drawing = augmentation(augment, (12, 12), MEAN), Drawing(augment, (12, 12), MEAN)
    assert on_the_cpu is not None
    torch.manual_seed(1)
    expected = torch.stack([on_the_cpu(image) for _ in range(count)]).float()
    torch.manual_seed(2)
    drawn = np.concatenate([drawing(48, 48) for _ in range(count)])
    found = augmented(image.expand(count, -1, -1, -1), drawn, (12, 12), MEAN, "bicubic").float()
    moments = [(x.mean((1, 2, 3)), x.std((1, 2, 3)), x[..., 0].mean((1, 2))) for x in (found, expected)]
    for ours, theirs in zip(*moments, strict=True):
        assert abs(ours.mean() - theirs.mean()) < 4 * ((ours.var() + theirs.var()) / count).sqrt()
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.15)
    crop = v2.RandomResizedCrop((12, 12))
    theirs = np.array([list(crop.make_params([image]).values()) for _ in range(count)])
    for ours, other in zip(drawn["box"].T.astype(float), theirs.T, strict=True):  # top, left, height and width
        assert abs(ours.mean() - other.mean()) < 4 * np.sqrt((ours.var() + other.var()) / count)
        assert ours.std() == pytest.approx(other.std(), rel=0.15)
    areas = [np.sort(box[:, 2] * box[:, 3]) for box in (drawn["box"], theirs)]
    assert np.abs(areas[0] - areas[1]).max() < 0.12 * 48**2, "their quantiles"
    assert drawn["flip"].mean() == pytest.approx(0.5 if augment != "crop" else 0.0, abs=0.06)
    share = (drawn["ops"] >= 0).mean()
    assert share == pytest.approx(0.5 if augment == "randaugment" else 0.0, abs=0.04)


@pytest.mark.parametrize("changes", [{}, {"in_memory": True}, {"augment": "randaugment", "erase": 0.5}], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_that_of_the_cpu(changes: dict[str, Any], workers: int) -> None:
    """Also the boxes of random erasing, through processes that load, from a step in the middle on."""

    def batches(where: str, start: int = 0, rank: int = 1) -> list[Tensor]:
        data = adapter(augment_on=where, **changes)
        sampler = DrawSampler(4096, batch=16, accumulate=1, rank=rank, ranks=2, seed=0, start=start, stop=3)
        loader = TrainingBatches(
            data.dataset("train"), sampler, workers=workers, max_unreadable=0.0, device=torch.device("cpu")
        )
        return [data.tokenize(batch).values for batch in loader]

    cpu, device = batches("cpu"), batches("device")
    for ours, theirs in zip(device, cpu, strict=True):
        assert ((ours - theirs).abs() * 255 * 0.3).mean() < 1.5
    assert all(map(torch.equal, batches("device", start=1), device[1:])), "not a function of seed and step"


def test_images_of_several_sizes_are_cropped_where_they_are_decoded(tmp_path: Path) -> None:
    files = {
        f"{split}/a/{row}.jpg": encoded(smooth(row, 40 + row, 30 + 3 * row), "jpeg")
        for split in ("train", "val")
        for row in range(6)
    }
    write_tree(tmp_path, files | {"train/a/9.jpg": b"torn"})
    both = [adapter(source="folder", root=str(tmp_path), augment_on=where) for where in ("cpu", "device")]
    found = []
    for data in both:
        named: set[str] = set()
        dataset: Any = data.dataset("train")
        batch = next(plain_batches(dataset, batch=7, device=torch.device("cpu"), unreadable=named))
        found.append(data.before_mixing(batch))
        assert [name.rpartition("/")[2] for name in named] == ["9.jpg: not an image of a known format"]
        assert dataset.fingerprint() == both[0].dataset("train").fingerprint()  # type: ignore[attr-defined]
        assert isinstance(dataset.raw(0), bytes)
    assert found[0].keys() == found[1].keys()
    assert torch.equal(found[0]["image"], found[1]["image"]), "one and the same crop, and a flip"
    assert torch.equal(found[0]["label"], found[1]["label"])


def test_the_adapter_keeps_its_contract_and_reads_held_out_images_as_ever() -> None:
    data = adapter(augment="randaugment", erase=0.5, augment_on="device")
    check_modality(data)
    assert data.plain() == adapter(augment="none")
    assert data.dataset("test")[0].keys() == {"image", "label"}
    batch = default_collate([data.dataset("train")[row] for row in range(4)])
    before = batch["image"].clone()
    once, again = (data.before_mixing(batch) for _ in range(2))
    assert torch.equal(once["image"], again["image"])
    assert torch.equal(batch["image"], before), "the batch itself is left as it was"
    assert once.keys() == {"image", "label"}
    assert len(records(batch)) == 4


def test_autocast_does_not_round_the_pixels() -> None:
    data = adapter(augment_on="device")
    batch = default_collate([data.dataset("train")[row] for row in range(4)])
    plain = data.before_mixing(batch)["image"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(data.before_mixing(batch)["image"], plain)


def test_parts_of_together_may_augment_on_the_device() -> None:
    from modalities.data.parts import Mixed, keys_of

    data = adapter(augment_on="device")
    mixed = Mixed({"a": data.dataset("train"), "b": adapter(augment="none").dataset("train")}, None)
    whole = mixed.__getitems__([0, 1, 2, 3])
    one_by_one = default_collate([mixed[index] for index in range(4)])
    for batch in (whole, one_by_one):
        rows = (batch["part"] == 0).nonzero()[:, 0]
        own = keys_of("a", batch, rows)
        assert data.before_mixing(own)["image"].shape == (2, 3, 16, 24)


def test_many_images_are_scaled_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = adapter(augment_on="device")
    batch = default_collate([data.dataset("train")[row] for row in range(5)])
    whole = data.before_mixing(batch)["image"]
    monkeypatch.setattr(device_augment, "AT_ONCE", 2)
    assert torch.equal(data.before_mixing(batch)["image"], whole)


@pytest.mark.slow
def test_a_run_is_resumed_byte_for_byte(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data.augment": "randaugment",
        "data.augment_on": "device",
        "data.erase": 0.25,
        "model.depth": 1,
        "train.batch": 8,
        "train.length.steps": 4,
        "train.log": 1,
        "train.evaluate": 4,
        "train.checkpoint": 2,
        "verdict.fit_samples": 32,
        "verdict.test_samples": 32,
        "verdict.health_samples": 16,
    }
    config, alone = override(vision.digits(), changes), World(0, 1, torch.device("cpu"))
    pretrain(config, Run(tmp_path / "whole"), alone, show=False)
    stopped = Run(tmp_path / "stopped")
    events = iter(range(100))

    class Stop(Exception):
        pass

    log = Run.log

    def stopping(self: Run, line: Any) -> None:
        log(self, line)
        if line.get("step") == 3 and next(events) == 0:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", stopping)
        with pytest.raises(Stop):
            pretrain(config, stopped, alone, show=False)
    pretrain(config, stopped, alone, show=False)
    assert stopped.metrics_path.read_bytes() == Run(tmp_path / "whole").metrics_path.read_bytes()
