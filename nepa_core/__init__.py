"""Next-embedding prediction: the method.

Read in this order: `tokens`, `modality` (what data must say about itself), `rope`, `predictor`, `model`, `objective`,
`terms`, `pretrainer`, `ema`, then `verdict`; for what makes tokens `flow`, `mean_map` and `rollout`. `kernels` change
speed alone. `runtime` holds how it is run; nothing here imports it but `load`, which opens a trained network, when it
is asked for.

Shape legend for the whole package: B samples, N tokens, T places in the sequence (N, or N + 1 with BOS),
D model width, H heads, K head width, P raw token size, A coordinate axes, S samples gathered for a verdict.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.ema import Ema
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction
from nepa_core.objective import next_embedding_loss
from nepa_core.predictor import Predictor, PredictorConfig
from nepa_core.tokens import Signal, Sketch, Spans, Tokens

if TYPE_CHECKING:
    from nepa_core.contract import check_modality
    from nepa_core.pretrainer import ObjectiveConfig, Pretrainer

__all__ = [
    "NEPA",
    "Batch",
    "Ema",
    "Modality",
    "ObjectiveConfig",
    "Prediction",
    "Predictor",
    "PredictorConfig",
    "Pretrainer",
    "Signal",
    "Sketch",
    "Spans",
    "Tokens",
    "UnreadableSample",
    "UserError",
    "__version__",
    "check_modality",
    "load",
    "next_embedding_loss",
]


LATER = {
    "ObjectiveConfig": "pretrainer",
    "Pretrainer": "pretrainer",
    "check_modality": "contract",
    "load": "runtime.load",
}
"""Name -> its module, imported when it is asked for: an adapter needs no objective, a loop of one's own no runtime."""


def __getattr__(name: str) -> Any:
    """What is looked up when it is asked for: the names of `LATER`, and `__version__`."""
    if name in LATER:
        return getattr(import_module(f"nepa_core.{LATER[name]}"), name)
    if name == "__version__":
        return import_module("nepa_core.version").version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
