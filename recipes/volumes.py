"""Presets for volumes."""

from __future__ import annotations

from modalities.volume import Volume
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def shapes() -> PretrainConfig:
    """Ellipsoids, tori and boxes of 16 x 16 x 16 voxels under noise, in 64 cubes of 4 x 4 x 4: the embedded default.

    `nepa pretrain recipes.volumes:shapes`.
    """
    data = Volume(source="shapes", size=(16, 16, 16), patch=(4, 4, 4))
    return override(small(data), {"train.length.steps": 300, "verdict.test_samples": 512})


def folder() -> PretrainConfig:
    """Volumes of your own, scaled to 64 x 64 x 64 voxels, in 64 cubes of 16 x 16 x 16, each normalised by itself.

    `nepa pretrain recipes.volumes:folder data.root=DIR`.
    """
    data = Volume(source="folder", root="DIR", size=(64, 64, 64), patch=(16, 16, 16))
    return override(small(data), {"model.dim": 192, "model.mlp_dim": 768, "model.heads": 6, "train.batch": 16})
