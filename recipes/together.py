"""Presets for several kinds of data in one predictor."""

from __future__ import annotations

from modalities.audio import Audio
from modalities.image import Images
from modalities.timeseries import TimeSeries
from modalities.together import Together
from modalities.tones import Tones
from nepa_core.modality import Modality
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def digits_and_tones() -> PretrainConfig:
    """Pairs of a handwritten digit and a melody of its class: does one sense predict the other?

    `nepa pretrain recipes.together:digits_and_tones`. 1,297 digits in 4 patches of 4 x 4, 1,500 melodies of 8 tones,
    484 held-out pairs. 40 s of one core. Measured (seeds 0, 1, 2): the first tone after the digit identified 8.5, 10.9,
    9.4 % among 64, by a linear map 6.0, 6.5, 5.8 %, with shuffled pairs 1.1 to 1.3 %; docs/together.md has both ways.
    """
    data = Together(parts={"image": _digits(), "tone": Tones()}, mode="paired")
    return override(_parts(data), {"train.length.steps": 1000})


def digits_and_series() -> PretrainConfig:
    """Handwritten digits and windows of a synthetic series, unpaired, in one predictor.

    `nepa pretrain recipes.together:digits_and_series`, then `nepa probe runs/digits_and_series part=image`. Half of
    every batch are digits. 40 s of one core. Measured (seed 0): next patch identified 17.9 %, by linear autoregression
    16.1 %; next piece of the series, which is linear, 59.6 and 62.0 %.
    """
    series = TimeSeries(source="var", window=64, patch=4, stride=4, channels="mixing", parts=(16_000, 2_000, 6_000))
    data = Together(parts={"image": _digits(), "series": series}, mode="mixed")
    return override(_parts(data), {"train.length.steps": 1000, "model.pack": True})


def spoken_digits() -> PretrainConfig:
    """Handwritten digits with recordings of the same digit (FSDD), paired by class.

    `nepa pretrain recipes.together:spoken_digits data.parts.sound.root=DIR`, where DIR holds
    `{digit}_{speaker}_{index}.wav`; with `data.mode=mixed` unpaired, and then
    `nepa transfer recipes.together:spoken_digits data.mode=mixed data.parts.sound.root=DIR`.
    """
    sound = Audio(source="folder", root="fsdd", seconds=1.0, sample_rate=8000, bands=40, padding="full", in_memory=True)
    data = Together(parts={"image": _digits(), "sound": sound}, mode="paired")
    return override(_parts(data), {"train.length.steps": 1600})


def _digits() -> Images:
    """The embedded digits from the centre outwards, for their first patch in raster order is a corner."""
    return Images(
        source="digits",
        size=(8, 8),
        patch=(4, 4),
        channels=1,
        mean=(0.305,),
        std=(0.376,),
        in_memory=True,
        patch_order="spiral_out",
    )


def _parts(data: Modality) -> PretrainConfig:
    return override(small(data), {"model.parts": len(data.part_names())})
