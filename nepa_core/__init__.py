"""Next-embedding prediction: the method.

Read in this order: `tokens`, `modality` (what data must say about itself), `rope`, `predictor`, `model`, `objective`,
`terms`, `pretrainer`, `ema`, then `verdict`; for what makes tokens `flow`, `mean_map` and `rollout`. `kernels` change
speed alone. `runtime` holds how it is run; nothing here imports it but `load`, which opens a trained network, when it
is asked for.

Shape legend for the whole package: B samples, N tokens, T places in the sequence (N, or N + 1 with BOS),
D model width, H heads, K head width, P raw token size, A coordinate axes, S samples gathered for a verdict.
"""

from importlib import import_module
from typing import Any

from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.contract import check_modality
from nepa_core.ema import Ema
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction
from nepa_core.objective import next_embedding_loss
from nepa_core.predictor import Predictor, PredictorConfig
from nepa_core.pretrainer import ObjectiveConfig, Pretrainer
from nepa_core.tokens import Signal, Sketch, Spans, Tokens

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


def __getattr__(name: str) -> Any:
    """`load` and `__version__`, looked up when they are asked for: a loop of one's own needs no runtime."""
    if name == "load":
        return import_module("nepa_core.runtime.load").load
    if name == "__version__":
        return import_module("nepa_core.version").version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
