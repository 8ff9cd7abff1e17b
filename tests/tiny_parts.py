"""Recipes of two small kinds of data in one predictor, that train in a blink: `tests.tiny_parts:mixed` and `paired`."""

from __future__ import annotations

from typing import Any

from modalities.together import Together
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small
from tests.tiny import Waves

TINY: dict[str, Any] = {
    "model.parts": 2,
    "model.dim": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp_dim": 32,
    "train.length.steps": 4,
    "train.batch": 16,
    "verdict.test_samples": 64,
    "verdict.health_samples": 64,
}


def together(mode: Any, **settings: Any) -> Together:
    """Waves of 6 tokens of 4 numbers, and ragged ones of up to 5 tokens of 3."""
    parts = {"fast": Waves(samples=80), "slow": Waves(samples=64, tokens=5, size=3, ragged=True)}
    return Together(parts=parts, mode=mode, **settings)


def mixed() -> PretrainConfig:
    """Samples of one part each."""
    return override(small(together("mixed")), TINY)


def paired() -> PretrainConfig:
    """Samples of both parts, of the same class."""
    return override(small(together("paired")), TINY)
