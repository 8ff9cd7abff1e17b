"""Next-embedding prediction: the method.

Read in this order: `modality` (what data must say about itself), `rope`, `packing`, `predictor`, `model`,
`objective`, `pretrainer`, `ema`, `diagnostics`. `nepa_core.runtime` holds how it is run; nothing here imports it.

Shape legend for the whole package: B samples, N tokens, T places in the sequence (N, or N + 1 with BOS),
D model width, H heads, K head width, P raw token size, A coordinate axes, S samples gathered for a verdict.
"""

from nepa_core.basics import Batch, UnreadableSample, UserError
from nepa_core.contract import check_modality
from nepa_core.ema import Ema
from nepa_core.modality import Modality
from nepa_core.model import NEPA, Prediction
from nepa_core.objective import next_embedding_loss
from nepa_core.predictor import Predictor, PredictorConfig
from nepa_core.pretrainer import ObjectiveConfig, Pretrainer
from nepa_core.tokens import Sketch, Tokens

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
    "Sketch",
    "Tokens",
    "UnreadableSample",
    "UserError",
    "check_modality",
    "next_embedding_loss",
]
