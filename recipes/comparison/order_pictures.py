"""Paths of orders over a sample, and the maps of their networks there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import read_weights
from recipes.readout.inspecting import InspectOptions, inspect, load_network
from recipes.report.inspect import NEXT, QUERY, map_panels
from recipes.report.page import Figure
from recipes.report.plots import (
    Panel,
    panel_plot,
)
from recipes.training.pretraining import load_pretrained


def pictures(summary: Mapping[str, Any]) -> list[Figure]:
    """The path of every order over a held-out sample, and the attention and similarity maps of its model there."""
    paths, maps = [], []
    noun = "token"
    for name in summary["ranking"]:
        run = Run(Path(summary["runs"][name][0]))
        config, _ = load_pretrained(run, torch.device("cpu"))
        data, causal = config.data.plain(), config.objective.causal
        model, options = (
            load_network(read_weights(str(run.path)), data, torch.device("cpu")),
            InspectOptions(samples=1),
        )
        (reading,) = inspect(model, data, options, causal=causal)
        noun = data.token_name
        paths.append(Panel(name, reading.sketch, path=reading.order))
        maps.append((name, map_panels(reading, noun)))
    return [
        Figure("paths.png", "The path of every order, from the dot on.", panel_plot([("", paths)], across=5)),
        Figure(
            "maps.png",
            f"What the model of each order (seed {summary['seeds'][0]}) makes of one held-out sample: attention of the "
            f"query {noun} ({QUERY} frame), averaged over layers and heads, and the cosine between the "
            f"embedding predicted at its place and every {noun}; the next {noun} has a {NEXT} frame.",
            panel_plot(maps, across=3),
        ),
    ]
