"""Objectives by name: what each changes in a pre-training recipe."""

from __future__ import annotations

from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.config import nearest, override
from recipes.pretrain import PretrainConfig

NAMED: dict[str, dict[str, Any]] = {
    "cosine": {"objective.terms": {"cosine": 1.0}},
    "mse": {"objective.terms": {"mse": 1.0}},
    "mse_normalised": {"objective.terms": {"mse_normalised": 1.0}},
    "standardised": {"objective.terms": {"standardised": 1.0}},
    "infonce_sample": {"objective.terms": {"infonce_sample": 1.0}},
    "infonce_position": {"objective.terms": {"infonce_position": 1.0}},
    "barlow": {"objective.terms": {"barlow": 1.0}},
    "sigreg": {"objective.terms": {"projected_mse": 1.0, "sigreg_tokens": 20.0}, "objective.stop_gradient": False},
    "sigreg_batch": {"objective.terms": {"projected_mse": 1.0, "sigreg_batch": 1.0}, "objective.stop_gradient": False},
    "projected_cosine": {"objective.terms": {"projected_cosine": 1.0}},
    "horizons": {"objective.terms": {"horizons": 1.0}},
    "intermediate": {"objective.terms": {"cosine": 1.0, "intermediate": 1.0}},
}
"""Name -> the keys it sets; `intermediate` also chooses the middle block. Shift and attention stay the recipe's."""


def named(name: str, config: PretrainConfig) -> PretrainConfig:
    """The recipe with an objective of `NAMED`, whatever objective it had before.

    Raises:
        UserError: there is no objective of this name, or the recipe can't take it.
    """
    if name not in NAMED:
        raise UserError(f"there is no objective {name}{nearest(name, NAMED)}")
    changes = {"objective.stop_gradient": True, **NAMED[name]}
    if name == "intermediate":
        changes["objective.layers"] = (max(config.model.depth // 2, 1),)
    return override(config, changes)
