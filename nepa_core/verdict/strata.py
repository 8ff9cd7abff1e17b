"""The verdict over kinds of samples that are judged apart, such as the parts of a mix: each its own, and all together.

Together a figure is the mean over the kinds' held-out samples that were asked. Kinds are independent of each other, and
so are their errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from nepa_core.verdict.judge import Judged, Verdict

_SUMMED = ("samples", "asked", "clusters", "fitted_samples", "training_samples")
_OF_ONE: dict[str, Any] = {"linear_features": 0, "linear_of": 0, "linear_curve": (), "linear_moved": None}


def pooled(judged: Mapping[str, Judged]) -> Judged:
    """The verdict of several as one.

    What only a verdict of one kind can say (how the linear control grows) is left out; there is collapse where one of
    the kinds has collapsed. Losses at a place are of the kinds that have one there.
    """
    verdicts = [each.verdict for each in judged.values()]
    weights = [each.asked / sum(each.asked for each in verdicts) for each in verdicts]
    found: dict[str, Any] = {}
    for name, field in Verdict.model_fields.items():
        values = [getattr(each, name) for each in verdicts]
        if name in _SUMMED:
            found[name] = sum(values)
        elif name.startswith("margin_") and name.endswith("_ci95"):
            known = not any(value is None for value in values)
            found[name] = math.hypot(*(w * x for w, x in zip(weights, values, strict=True))) if known else None
        elif field.annotation is float:
            found[name] = sum(w * x for w, x in zip(weights, values, strict=True))
        elif field.annotation is bool:
            found[name] = any(values)
    found |= {
        "retrieval_candidates": max(each.retrieval_candidates for each in verdicts),
        "loss_per_position": _by_place(verdicts, weights),
    }
    credits = {key: torch.cat([each.credits[key] for each in judged.values()]) for key in ("model", "linear")}
    chained = any(each.chained for each in judged.values())
    return Judged(Verdict.model_validate(_OF_ONE | found), credits, _clusters(list(judged.values())), chained)


def _by_place(verdicts: Sequence[Verdict], weights: Sequence[float]) -> dict[str, list[float | None]]:
    return {
        name: [_weighted(place, weights) for place in zip_longest(*(each.loss_per_position[name] for each in verdicts))]
        for name in verdicts[0].loss_per_position
    }


def _weighted(losses: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The mean of those that there are, None where there is none."""
    there = [(w, x) for w, x in zip(weights, losses, strict=True) if x is not None]
    total = sum(w for w, _ in there)
    return sum(w * x for w, x in there) / total if total else None


def _clusters(judged: Sequence[Judged]) -> Tensor | None:
    """Numbers of their own for each kind's."""
    if all(each.clusters is None for each in judged):
        return None
    found, first = list[Tensor](), 0
    for each in judged:
        count = len(each.credits["model"])
        own = torch.arange(count) if each.clusters is None else each.clusters
        number = own.unique(return_inverse=True)[1]
        found.append(number + first)
        first += int(number.max()) + 1
    return torch.cat(found)
