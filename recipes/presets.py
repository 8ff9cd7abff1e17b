"""Settings that serve any adapter."""

from __future__ import annotations

from typing import Any

from modalities.features import Features
from nepa_core.modality import Modality
from nepa_core.predictor import PredictorConfig
from nepa_core.pretrainer import ObjectiveConfig
from nepa_core.runtime.config import override
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import Duration, LayerDecay, OptimConfig
from recipes.configs import FinetuneConfig, PretrainConfig, VerdictConfig

PAPER_OBJECTIVE = ObjectiveConfig(causal=True, shift=True, stop_gradient=True, input_mask=0.0)
"""Algorithm 1 of the paper."""


def small(data: Modality) -> PretrainConfig:
    """A network of width 64 and 4 layers for data of your own: 800 steps of 64 samples, seconds on two cores.

    A first answer to "does next-embedding prediction learn anything here?". LayerScale starts at 1.0, because
    the paper's 1e-5 starves the branches in runs this short.
    """
    return PretrainConfig(
        data=data,
        model=PredictorConfig(dim=64, depth=4, heads=4, activation="gelu", gated=False, layer_scale=1.0, norm_eps=1e-6),
        objective=PAPER_OBJECTIVE,
        optim=OptimConfig(
            lr=1e-3, lr_batch=None, betas=(0.9, 0.95), weight_decay=0.05, warmup=Duration(fraction=0.05), clip=1.0
        ),
        train=TrainConfig(
            length=Duration(steps=800), batch=64, ema=0.99, workers=0, log=20, evaluate=100, checkpoint=200, keep=2
        ),
        verdict=VerdictConfig(test_samples=4096, health_samples=192),
    )


def features() -> PretrainConfig:
    """Sequences of vectors computed before, in data.root=DIR (`modalities.data.vectors` has the layouts).

    `nepa pretrain recipes.presets:features data.root=DIR`: the network of `small`, packed, so that sequences of unequal
    length cost no padding.
    """
    return override(small(Features()), {"model.pack": True})


SHORT = "the preset recipes.presets:short"
LARGE_BATCH = 256
"""A larger batch than this, as those of the paper, belongs to a setting for many accelerators."""


def short(recipe: PretrainConfig | FinetuneConfig, init: str | None = None) -> FinetuneConfig:
    """The preset for the data and network of another recipe: 20 epochs, seconds to minutes on small data.

    Bidirectional (an imported classifier stays causal if it was), mean over tokens, no mixing. Batches are the
    recipe's, but 64 in parts of 16 where those are larger than 256. Meant for LayerScale 1.0. Chosen here and not
    tuned, neither for pre-trained nor for random weights.
    """
    values: dict[str, Any] = {
        "length": Duration(epochs=20),
        "ema": 0.99,
        "evaluate": 200,
        "compile": False,
        "probe": False,
    }
    if recipe.train.batch > LARGE_BATCH:
        values |= {"batch": 64, "micro_batch": 16, "log": 20, "checkpoint": 200, "keep": 2}
    return FinetuneConfig(
        recipe=recipe.recipe,
        init=init,
        data=recipe.data,
        model=recipe.model.model_copy(update={"mask_token": False, "rope_rescale": 1.0}),
        causal=isinstance(recipe, FinetuneConfig) and recipe.causal,
        readout="mean",
        freeze_embedder=False,
        label_smoothing=0.1,
        mix=None,
        optim=OptimConfig(
            lr=1e-3,
            lr_batch=None,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=Duration(fraction=0.1),
            clip=1.0,
            layer_decay=LayerDecay(start=0.65, end=0.65, staggered_warmup=False, head_counts=False),
        ),
        train=recipe.train.model_copy(update=values),
    )
