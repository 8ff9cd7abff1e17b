"""Small random images and the layouts in which image data lie on disks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from modalities.data.images import open_images


def open_folder(root: Path, split: str = "train", **changes: Any) -> Any:
    settings: dict[str, Any] = {"size": (8, 8), "channels": 3}
    return open_images("folder", split, root=str(root), **(settings | changes))


def picture(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "png", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image.convert("RGB"))), "h w c -> c h w")


def write_tree(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_parquet(file: Path, images: list[bytes | None], labels: list[int | None], column: str = "image") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({column: pa.array(rows, kind), "label": labels, "other": labels}), file)


def write_shard(file: Path, members: Sequence[Mapping[str, Any]]) -> None:
    """A tar of samples such as {"__key__": "0", "png": bytes, "cls": b"1"}."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream, TarWriter(stream, encoder=False) as tar:
        for sample in members:
            tar.write(dict(sample))


def sample(key: str, image: bytes, label: int, kind: str = "png") -> dict[str, Any]:
    return {"__key__": key, kind: image, "cls": str(label).encode()}
