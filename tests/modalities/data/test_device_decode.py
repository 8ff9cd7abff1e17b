"""Decoding on the device: the pixels of the CPU's decoder, whatever nvJPEG refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from modalities.data import device_decode
from modalities.data.device_decode import ENCODED, JPEG, Counted, as_ppm, decoded
from modalities.data.image_decode import decode
from modalities.image import Images
from nepa_core.basics import UserError
from nepa_core.contract import check_modality
from nepa_core.runtime.data import DrawSampler, TrainingBatches, plain_batches, replace_broken
from tests.conftest import ON_BOTH
from tests.pictures import encoded, picture, write_tree


def smooth(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    return picture(seed, 4, 4).resize((width, height), Image.Resampling.BICUBIC)


def turned(way: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = way
    return encoded(smooth(way), "jpeg", exif=exif)


FILES = {
    "0.jpg": encoded(smooth(0), "jpeg"),
    "1.jpg": encoded(smooth(1, 31, 60), "jpeg", subsampling=0),
    "2.jpg": encoded(smooth(2).convert("L"), "jpeg"),
    "3.jpg": turned(3),
    "4.jpg": turned(6),
    "5.jpg": encoded(smooth(5), "jpeg", progressive=True),
    "6.jpg": encoded(smooth(6).convert("CMYK"), "jpeg"),
    "7.png": encoded(smooth(7), "png"),
}
TAKEN = ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Whatever device there is may decode."""
    found = Counted()
    monkeypatch.setattr(device_decode, "COUNTED", found)
    monkeypatch.setattr("modalities.data.device_decode.check_cuda", lambda: None)
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Images]:
    write_tree(tmp_path, {f"{split}/a/{name}": each for split in ("train", "val") for name, each in FILES.items()})

    def made(**changes: Any) -> Images:
        settings: dict[str, Any] = {"source": "folder", "root": str(tmp_path), "size": (16, 24), "patch": (4, 4)}
        look: dict[str, Any] = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3, "augment": "crop_flip"}
        return Images(**(settings | look | changes))

    return made


@ON_BOTH
@pytest.mark.parametrize("changes", [{}, {"augment": "randaugment", "erase": 0.5}], ids=["crop_flip", "all"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_that_of_the_cpu(
    changes: dict[str, Any], workers: int, device: str, adapter: Callable[..., Images], counted: Counted
) -> None:
    def batches(**where: str) -> list[Tensor]:
        data = adapter(**changes, **where)
        sampler = DrawSampler(8, batch=8, accumulate=1, rank=0, ranks=1, seed=0, start=0, stop=2)
        loader = TrainingBatches(
            data.dataset("train"), sampler, workers=workers, max_unreadable=0.0, device=torch.device(device)
        )
        return [data.tokenize(batch).values.cpu() for batch in loader]

    cpu, gpu = batches(augment_on="device"), batches(decode_on="gpu")
    for ours, theirs in zip(gpu, cpu, strict=True):
        if device == "cpu":
            assert torch.equal(ours, theirs)
        else:  # another inverse transform, and chroma scaled in another way
            assert ((ours - theirs).abs() * 127.5).mean() < 4
    assert (counted.seen, counted.fallen) == (16, 6)


def test_what_the_device_can_not_take_is_decoded_where_it_is_read(
    adapter: Callable[..., Images], counted: Counted
) -> None:
    dataset: Any = adapter(decode_on="gpu").dataset("train")
    names = [Path(dataset.name(row)).name for row in range(len(dataset))]
    sent = {name: dataset[row][ENCODED] for row, name in enumerate(names)}
    assert {name for name, each in sent.items() if each.startswith(JPEG)} == set(TAKEN)
    assert all(sent[name] == FILES[name] for name in TAKEN)
    assert sent["7.png"] == as_ppm(decode(FILES["7.png"], 3))


def test_a_jpeg_that_the_device_refuses_costs_neither_the_batch_nor_itself(
    monkeypatch: pytest.MonkeyPatch, counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision.io

    files, does = [FILES[name] for name in TAKEN], torchvision.io.decode_jpeg

    def picky(given: list[Tensor], *rest: Any) -> list[Tensor]:
        if any(bytes(each.tolist()) == files[1] for each in given):
            raise RuntimeError("Failed to decode")
        found: list[Tensor] = does(given, *rest)
        return found

    monkeypatch.setattr(torchvision.io, "decode_jpeg", picky)
    turns = torch.tensor([1, 1, 1, 3, 6]).numpy()
    found = decoded(files, turns, torch.device("cpu"))
    for pixels, stored in zip(found, files, strict=True):
        assert pixels is not None
        assert torch.equal(pixels, decode(stored, 3))
    assert (counted.seen, counted.fallen) == (5, 1)
    assert "data.decode_on=gpu: 1 of 5 images so far were decoded on the CPU" in capsys.readouterr().err

    def lacking(*_: Any) -> list[Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", lacking)
    with pytest.raises(UserError, match=r"built without nvJPEG; install its CUDA build, or give data.decode_on=cpu"):
        decoded(files, turns, torch.device("cpu"))


def test_damaged_files_are_counted_and_named(adapter: Callable[..., Images], counted: Counted, tmp_path: Path) -> None:
    """By their head where they are read, and by what comes of them where they are decoded."""
    write_tree(tmp_path / "train/a", {"8.jpg": b"torn", "9.jpg": FILES["0.jpg"][:-300]})
    data = adapter(decode_on="gpu")
    sampler = DrawSampler(10, batch=10, accumulate=1, rank=0, ranks=1, seed=0, start=0, stop=1)
    batches = TrainingBatches(data.dataset("train"), sampler, workers=0, max_unreadable=0.5, device=torch.device("cpu"))
    batch = next(iter(batches))
    tokens, _, broken = replace_broken(data.tokenize(batch), batch)
    assert tokens.values.isfinite().all()
    batches.suspect(broken)
    batches.settle()
    said = sorted(name.rpartition("/")[2] for name in batches.unreadable)
    assert said == ["8.jpg: not an image of a known format", "9.jpg: its tokens hold NaN or infinity"]


def test_the_contract_is_kept_and_held_out_images_are_read_as_ever(
    adapter: Callable[..., Images], counted: Counted
) -> None:
    data = adapter(decode_on="gpu")
    check_modality(data)
    assert data.plain() == adapter(augment="none")
    batch = next(plain_batches(data.dataset("test"), batch=8, device=torch.device("cpu")))
    assert batch.keys() == {"image", "label"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "data.decode_on=gpu decodes by nvJPEG on a CUDA device, and there is none here; leave it out, or give"),
        (("data.augment=none",), "it needs data.augment=crop, crop_flip or randaugment, data.channels=3"),
        (("data.in_memory=true",), "data.channels=3 and data.in_memory=false"),
    ],
)
def test_without_a_gpu_it_is_one_line(
    words: tuple[str, ...], said: str, adapter: Callable[..., Images], fails: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = str(adapter().root)
    line = fails("pretrain", "recipes.vision:base_in1k", f"data.root={root}", "data.decode_on=gpu", "out=x", *words)
    assert said in line
    assert not (tmp_path / "x").exists()
