"""Three series of different sampling in one predictor, for docs/results/senses.md: hourly, hourly and weekly.

`nepa transfer several:base`, with ETTh1.csv, weather.csv and co2.csv in this folder. The two tables of packages are
brought to whole hours and weeks, their gaps filled linearly.
"""

from modalities.timeseries import TimeSeries
from modalities.together import Together
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def part(root: str, parts: tuple[float, float, float], stride: int) -> TimeSeries:
    """Windows of 96 steps in 12 tokens, a channel a sample, every window by its own mean and deviation."""
    return TimeSeries(
        source="file",
        root=root,
        window=96,
        patch=8,
        stride=stride,
        channels="independent",
        normalise="window",
        parts=parts,
    )


def base() -> PretrainConfig:
    """1,000 steps of all three."""
    parts = {
        "oil": part("ETTh1.csv", (8640, 2880, 2880), 4),
        "weather": part("weather.csv", (0.6, 0.2, 0.2), 4),  # temp, dewp, humid, wind_speed
        "co2": part("co2.csv", (0.6, 0.2, 0.2), 1),
    }
    mix = Together(parts=parts, mode="mixed")
    return override(small(mix), {"model.parts": 3, "train.length.steps": 1000, "model.pack": True})
