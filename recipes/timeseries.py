"""Presets for time series."""

from __future__ import annotations

from modalities.timeseries import TimeSeries
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def demo() -> PretrainConfig:
    """A synthetic vector autoregression whose best possible loss is known: the embedded default for series.

    `nepa pretrain recipes.timeseries:demo`. Windows of 64 steps of 4 channels in 16 tokens; 16,000 rows to train, 2,000
    to choose a read-out of `nepa forecast` on, 6,000 held out; 40 s of one core. The series is linear, so a linear
    autoregression on the raw values is hard to beat: loss -0.814, the linear autoregression -0.835, the best possible
    -0.841 (seed 0).
    """
    data = TimeSeries(source="var", window=64, patch=4, stride=4, channels="mixing", parts=(16_000, 2_000, 6_000))
    return small(data)


def etth1() -> PretrainConfig:
    """ETTh1, hourly, 7 channels: look-back 336 in 14 tokens of a day, channels independent, width 64, 4 layers.

    `nepa pretrain recipes.timeseries:etth1 data.root=ETTh1.csv`, then `nepa forecast runs/etth1`. The split is the
    usual one: 12, 4 and 4 months of 30 days. Windows are normalised one by one. The verdict of seeds 0 to 2: no
    more, or less, than linear: 23 to 24 % of the next tokens identified among 49, by a linear autoregression a point
    more.
    """
    data = TimeSeries(
        source="file",
        root="ETTh1.csv",
        window=336,
        patch=24,
        channels="independent",
        normalise="window",
        parts=(8640, 2880, 2880),
    )
    return override(small(data), {"train.evaluate": 200})


def labelled() -> PretrainConfig:
    """Labelled series in the UCR or UEA layout: 128 steps in 16 tokens of 8, channels together, width 64, 4 layers.

    `nepa pretrain recipes.timeseries:labelled data.root=DIR`, where DIR holds `*_TRAIN` and `*_TEST` as .ts or .tsv;
    then probe, finetune, inspect. Shorter series are filled up at their end; for longer ones set `data.window` and
    `data.patch`. `nepa objectives recipes.timeseries:labelled data.root=DIR` says what pre-training is worth.
    """
    unused = (0.6, 0.2, 0.2)  # labelled series are split as they are
    return small(TimeSeries(source="labelled", root="DIR", window=128, patch=8, channels="mixing", parts=unused))
