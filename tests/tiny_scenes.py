"""Scenes of coloured squares on disk, and a segmentation recipe for them: what the tests of segmentation run on.

The recipe is named as `tests.tiny_scenes:recipe` on the command line, with data.root=DIR.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modalities.scenes import Scenes
from nepa_core.runtime.config import override
from nepa_core.runtime.optim import Duration, LayerDecay, OptimConfig
from recipes.configs import SegmentConfig
from recipes.networks.upernet import UPerNetConfig
from recipes.networks.windows import EvaluationConfig
from tests import tiny

COLOURS = np.array([[40, 40, 200], [200, 60, 40], [60, 200, 60]], dtype=np.uint8)
"""Of the three classes; they are stored as 1 to 3, and 0 is what has no class."""
SIZES = ((24, 32), (30, 26), (21, 40), (24, 24))


def scene(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Squares of 8 pixels: the image uint8 [H, W, 3] with some noise, and the stored labels uint8 [H, W]."""
    draw = np.random.default_rng(seed)
    cells = draw.integers(0, 4, (5, 5)).repeat(8, 0).repeat(8, 1)[: size[0], : size[1]].astype(np.uint8)
    colours = np.concatenate([[[128, 128, 128]], COLOURS])[cells]
    noisy = (colours + draw.normal(0, 12, colours.shape)).clip(0, 255).astype(np.uint8)
    return noisy, cells


def write_scenes(root: Path, *, train: int = 8, test: int = 5, splits: tuple[str, str] = ("training", "validation")):
    """A tree in ADE20K's layout, scenes of several sizes; returns its root."""
    for place, (split, count) in enumerate(zip(splits, (train, test), strict=True)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            image, labels = scene(100 * place + k, SIZES[k % len(SIZES)])
            Image.fromarray(image).save(root / "images" / split / f"ADE_{k:04}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"ADE_{k:04}.png")
    return root


def scenes(root: Path | str, **changes: Any) -> Scenes:
    """The adapter: crops of 16 x 24 in 24 patches of 4 x 4."""
    settings: dict[str, Any] = {
        "root": str(root),
        "crop": (16, 24),
        "patch": (4, 4),
        "short_side": 24,
        "mean": (0.4, 0.4, 0.4),
        "std": (0.3, 0.3, 0.3),
        "class_count": 3,
        "first_label": 1,
        "ignored_labels": (0,),
    }
    return Scenes(**(settings | changes))


def recipe() -> SegmentConfig:
    """Six steps of four crops with a UPerNet of width 8."""
    pretraining = override(tiny.recipe(), {"model.depth": 4})
    return SegmentConfig(
        init=None,
        data=scenes("scenes"),
        model=pretraining.model,
        causal=False,
        head="upernet",
        upernet=UPerNetConfig(levels=(0, 1, 2, 3), channels=8, dropout=0.0, auxiliary_channels=8, auxiliary_weight=0.4),
        freeze_embedder=False,
        optim=OptimConfig(
            lr=3e-3,
            lr_batch=None,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=Duration(steps=2),
            clip=1.0,
            schedule="linear",
            layer_decay=LayerDecay(start=0.65, end=0.65, staggered_warmup=False),
        ),
        train=pretraining.train.model_copy(update={"length": Duration(steps=6), "batch": 4, "evaluate": 6}),
        evaluation=EvaluationConfig(
            mode="slide", stride=(8, 12), scales=(1.0,), flip=False, windows=3, images=2, pictures=2
        ),
    )
