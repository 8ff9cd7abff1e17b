"""Presets for events."""

from __future__ import annotations

from modalities.events import Events
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small


def demo() -> PretrainConfig:
    """A marked point process of 5 kinds whose law is known, in sequences of 24 to 32 events: nothing is downloaded.

    `nepa pretrain recipes.events:demo`. 2,000 sequences to train, 1,000 held out, 2 classes. 55 s of one core. Measured
    (seed 0): next event identified among 64 13.6 %, by a linear autoregression 7.6 %; `nepa generate` reads the kind of
    the next event right in 64.9 %, as the best possible does, and a linear model in 53.4 %.
    """
    return override(small(Events(source="process", events=32)), {"verdict.test_samples": 1000})


def table() -> PretrainConfig:
    """Events of your own: a table with a row for each, in windows of 64 events of one entity.

    `nepa pretrain recipes.events:table data.root=FILE.csv`, with columns called entity, time and kind, or those that
    `data.entity=`, `data.time=` and `data.kind=` name; every other column of numbers is part of an event. A fifth of
    the entities is held out, with `data.divide=time` the last fifth of the events.
    """
    return small(Events(source="file", root="FILE.csv", events=64))
