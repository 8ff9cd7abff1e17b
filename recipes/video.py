"""Presets for video."""

from __future__ import annotations

from modalities.video import Video
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def moving_digits() -> PretrainConfig:
    """Scikit-learn's digits, each moving over a torus of 16 x 16 pixels for 8 frames: the embedded default for video.

    `nepa pretrain recipes.video:moving_digits`. 16 tubelets of 2 x 8 x 8; 1,297 digits in every direction to train, 500
    more held out; `data.label=direction` in place of the class. 35 s of one core. Measured: next tubelet identified
    41.5 %, by a linear autoregression 70.3 %; docs/video-and-volumes.md has the probes.
    """
    data = Video(source="digits", frames=8, size=(16, 16), patch=(2, 8, 8), channels=1, mean=(0.076,), std=(0.23,))
    return override(small(data), {"train.length.steps": 800, "verdict.test_samples": 500})


def folder() -> PretrainConfig:
    """Videos of your own: clips of 16 frames at 8 a second, 112 x 112 pixels, in 392 tubelets of 2 x 16 x 16.

    `nepa pretrain recipes.video:folder data.root=DIR`, where DIR holds class folders in train/ and test/, or is a CSV
    file (docs/video-and-volumes.md). Width 192, 4 layers, 800 steps of 16 clips: a GPU's work, or less with
    `data.size=[64,64]`. Values chosen here, nothing measured.
    """
    data = Video(
        source="folder",
        root="DIR",
        frames=16,
        rate=8.0,
        size=(112, 112),
        patch=(2, 16, 16),
        channels=3,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment="crop",
    )
    return override(small(data), {"model.dim": 192, "model.mlp_dim": 768, "model.heads": 6, "train.batch": 16})
