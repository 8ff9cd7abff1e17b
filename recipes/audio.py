"""Presets for audio. A preset is a function that returns a whole config; its docstring says what to expect."""

from __future__ import annotations

from modalities.audio import Audio
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def demo() -> PretrainConfig:
    """Synthetic tones, chirps and pulsed tones under noise, in tokens of 4 log-mel frames: nothing is downloaded.

    `nepa pretrain recipes.audio:demo`. 2,000 clips of 0.4 to 0.8 s to train, 512 held out, 4 classes. 40 s
    of one core. Measured: loss -0.872 where -0.927 is the best possible and a linear autoregression has -0.851.
    """
    data = Audio(source="synthetic", seconds=0.8, bands=32, in_memory=True)
    return override(small(data), {"train.length.steps": 600, "verdict.test_samples": 512})


def fsdd() -> PretrainConfig:
    """Spoken digits (FSDD: 3,000 clips at 8 kHz, 6 speakers) in tokens of 4 log-mel frames of 40 bands.

    `nepa pretrain recipes.audio:fsdd data.root=DIR`, where DIR holds `{digit}_{speaker}_{index}.wav`. Recordings 0 to
    4 of each digit and speaker are held out, or one speaker by `data.held_out_speaker=theo`. About a minute of one
    core. Measured over three seeds: next frame identified 66 %, by a linear autoregression 57 %.
    """
    data = Audio(source="folder", root="fsdd", seconds=1.0, sample_rate=8000, bands=40, in_memory=True)
    return override(small(data), {"verdict.test_samples": 512})


def fsdd_patches() -> PretrainConfig:
    """The spoken digits in patches of 8 bands and 8 frames: for comparing patch orders.

    `nepa pretrain recipes.audio:fsdd_patches data.root=DIR data.patch_order=hilbert`. 60 tokens where `fsdd` has 25, so
    minutes; the verdict's linear baseline takes as long as the training. 16 x 16 would leave 3 columns of a word.
    """
    changes = {"data.patch": (8, 8), "data.seconds": 0.96, "train.length.steps": 400}
    return override(fsdd(), changes)
