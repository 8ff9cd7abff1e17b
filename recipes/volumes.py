"""Presets for volumes."""

from __future__ import annotations

from modalities.volume import Volume
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def shapes() -> PretrainConfig:
    """Ellipsoids, tori and boxes of 16 x 16 x 16 voxels under noise, in 64 cubes of 4 x 4 x 4: the embedded default.

    `nepa pretrain recipes.volumes:shapes`. 3,000 to train, 600 held out; each normalised by itself. A minute of one
    core. Measured: next cube identified 4.4 %, by a linear autoregression 4.6 %; a probe of the form 55 %, of random
    weights 34 %.
    """
    data = Volume(source="shapes", size=(16, 16, 16), patch=(4, 4, 4))
    return override(small(data), {"train.length.steps": 300, "verdict.test_samples": 512})


def folder() -> PretrainConfig:
    """Volumes of your own, scaled to 64 x 64 x 64 voxels, in 64 cubes of 16 x 16 x 16, each normalised by itself.

    `nepa pretrain recipes.volumes:folder data.root=DIR`, where DIR holds class folders in train/ and test/, or is a CSV
    file (docs/video-and-volumes.md). Width 192, 4 layers, 800 steps of 16. Values chosen here, nothing measured.
    """
    data = Volume(source="folder", root="DIR", size=(64, 64, 64), patch=(16, 16, 16))
    return override(small(data), {"model.dim": 192, "model.mlp_dim": 768, "model.heads": 6, "train.batch": 16})
