"""Settings that serve any adapter."""

from __future__ import annotations

from modalities.features import Features
from nepa_core.modality import Modality
from nepa_core.predictor import PredictorConfig
from nepa_core.pretrainer import ObjectiveConfig
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import Duration, OptimConfig
from recipes.pretrain import PretrainConfig, VerdictConfig

PAPER_OBJECTIVE = ObjectiveConfig(causal=True, shift=True, stop_gradient=True, input_mask=0.0)
"""Algorithm 1 of the paper."""


def small(data: Modality) -> PretrainConfig:
    """A network of width 64 and 4 layers for data of your own: 800 steps of 64 samples, seconds on two cores.

    A first answer to "does next-embedding prediction learn anything here?". LayerScale starts at 1.0, because
    the paper's 1e-5 starves the branches in runs this short.
    """
    return PretrainConfig(
        data=data,
        model=PredictorConfig(
            dim=64,
            depth=4,
            heads=4,
            mlp_dim=256,
            activation="gelu",
            gated=False,
            layer_scale=1.0,
            qk_norm="plain",
            rope_theta=100.0,
            rope_rescale=1.0,
            bos=True,
            norm_eps=1e-6,
        ),
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
    """Sequences of vectors computed before, in data.root=DIR (`modalities.features_data` has the layouts).

    `nepa pretrain recipes.presets:features data.root=DIR`: the network of `small`, packed, so that sequences of unequal
    length cost no padding.
    """
    config = small(Features())
    return config.model_copy(update={"model": config.model.model_copy(update={"pack": True})})
