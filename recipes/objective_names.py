"""Objectives by name: what each changes in a pre-training recipe."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.config import nearest, override
from nepa_core.terms import TERMS
from recipes.configs import PretrainConfig

_SIGREG = {"objective.stop_gradient": False}

NAMED: dict[str, dict[str, Any]] = {
    **{name: {"objective.terms": {name: 1.0}} for name, term in TERMS.items() if term.space},
    "sigreg": {"objective.terms": {"projected_mse": 1.0, "sigreg_tokens": 20.0}, **_SIGREG},
    "sigreg_batch": {"objective.terms": {"projected_mse": 1.0, "sigreg_batch": 1.0}, **_SIGREG},
    "intermediate": {"objective.terms": {"cosine": 1.0, "intermediate": 1.0}},
    "cosine_flow": {"objective.terms": {"cosine": 1.0, "flow": 1.0}},
}
"""Name -> the keys it sets: every term that can train the prediction alone, and four mixtures.

`intermediate` also chooses the middle block where no `objective.layers` are given.
Shift, attention and the settings of the terms, such as `objective.temperature`, stay the recipe's.
"""

HEADED = "_head"
"""Behind a name: the same with NAPE's head on the prediction side (`objective.head=simsiam`)."""

OWN = "recipe"
"""The name of the recipe's own objective, with what key=value changes in it: any mixture."""

_OVERRIDDEN = ("objective.terms", "objective.stop_gradient", "objective.head")


def named(name: str, config: PretrainConfig) -> PretrainConfig:
    """The recipe with another objective, whatever it had before, or (`OWN`) as it is.

    Args:
        name: of `NAMED`, also with `HEADED` behind it, or module:function of the user's.

    Raises:
        UserError: there is no objective of this name, or the recipe can't take it.
    """
    if name == OWN:
        return config
    bare = name if ":" in name else name.removesuffix(HEADED)
    if bare not in NAMED and ":" not in name:
        known = (*NAMED, *(each + HEADED for each in NAMED), OWN)
        raise UserError(f"there is no objective {name}{nearest(name, known)}")
    changes = {
        "objective.stop_gradient": True,
        "objective.head": "none" if bare == name else "simsiam",
        **NAMED.get(bare, {"objective.terms": {name: 1.0}}),
    }
    if bare == "intermediate" and not config.objective.layers:
        changes["objective.layers"] = (max(config.model.depth // 2, 1),)
    return override(config, changes)


def check_given(keys: Iterable[str], names: Collection[str]) -> None:
    """Whether an objective among these keeps the keys that the user gave.

    Raises:
        UserError: every one of them would override a key.
    """
    lost = [key for key in keys if key.startswith(_OVERRIDDEN)]
    if lost and OWN not in names:
        raise UserError(
            f"{lost[0]} is overridden by every objective of objectives={','.join(names)}: name {OWN} among them, which "
            f"is the objective that your keys make, such as objectives=cosine,{OWN}"
        )
