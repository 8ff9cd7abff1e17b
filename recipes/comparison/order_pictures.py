"""Paths of orders over a sample, and the maps of their networks there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import read_weights
from nepa_core.tokens import Sketch, Tokens
from recipes.readout.inspecting import InspectOptions, chosen_samples, inspect, load_network
from recipes.report.inspect import NEXT, QUERY, map_panels
from recipes.report.page import Figure
from recipes.report.plots import Panel, panel_plot
from recipes.report.summaries import OrdersSummary
from recipes.training.pretraining import load_pretrained


def own_grid(tokens: Tokens, sketch: Sketch) -> Tensor | None:
    """[N, 2] (down, across) where tokens lie by the last two axes of their coordinates; None where the sketch says it.

    Of one sample in canonical order, whose tokens have several axes and are drawn in one row.
    """
    coords = tokens.coords if tokens.coords.ndim == 2 else tokens.coords[0]
    in_one_row = len(sketch.grid) == 2 and sketch.grid[0] == 1
    return coords[:, -2:].float() if coords.shape[-1] > 1 and in_one_row else None


def pictures(summary: OrdersSummary) -> list[Figure]:
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
        ((_, batch),) = chosen_samples(data, options, torch.device("cpu"))
        paths.append(Panel(name, reading.sketch, path=reading.path, at=own_grid(data.tokenize(batch), reading.sketch)))
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
