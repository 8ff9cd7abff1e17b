"""Presets for images. A preset is a function that returns a whole config; its docstring says what to expect."""

from __future__ import annotations

from modalities.image import Images
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import Duration, OptimConfig
from recipes.presets import PAPER_OBJECTIVE, small
from recipes.pretrain import PretrainConfig, VerdictConfig


def digits() -> PretrainConfig:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, in 8 patches of 2 x 4: the embedded default.

    `nepa pretrain recipes.vision:digits`. 1,297 images to train, the last 500 held out. RESULTS.md has the
    measured verdict.
    """
    return small(
        Images(source="digits", size=(8, 8), patch=(2, 4), channels=1, mean=(0.305,), std=(0.376,), in_memory=True)
    )


def digits_2x2() -> PretrainConfig:
    """The digits in 16 patches of 2 x 2, on a 4 x 4 grid: for comparing patch orders.

    `nepa pretrain recipes.vision:digits_2x2`.
    """
    recipe = digits()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"patch": (2, 2)})})


def cifar10() -> PretrainConfig:
    """CIFAR-10 in 64 patches of 4 x 4: width 128, 4 layers, 1,200 steps.

    `nepa pretrain recipes.vision:cifar10 data.root=DIR`, where DIR holds Hugging Face parquet files, an
    image folder (train/CLASS/*, test/CLASS/*) or torchvision's `cifar-10-batches-py`.
    """
    recipe = small(
        Images(
            source="folder",
            root="cifar10",
            size=(32, 32),
            patch=(4, 4),
            channels=3,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            in_memory=True,
        )
    )
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dim": 128, "mlp_dim": 512}),
            "train": recipe.train.model_copy(
                update={"length": recipe.train.length.model_copy(update={"steps": 1200}), "evaluate": 100}
            ),
        }
    )


def base_in1k() -> PretrainConfig:
    """ImageNet-1k, ViT-B/14 at 224, 1,600 epochs: pre-training in the form of the released scripts.

    `torchrun --nproc-per-node 8 -m recipes pretrain recipes.vision:base_in1k data.root=DIR`, DIR an image folder
    (train/CLASS/*, val/CLASS/*). The authors give 3 days on 8 H100; not measured here. Published after
    fine-tuning: 83.8 % top-1 (83.75 with these weights). Not published and chosen here: clipping at norm 1, EMA
    decay 0.9999 also in pre-training, the micro-batch.
    """
    return PretrainConfig(
        data=Images(
            source="folder",
            root="imagenet",
            size=(224, 224),
            patch=(14, 14),
            channels=3,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            augment="crop_flip",
        ),
        model=PredictorConfig(
            dim=768,
            depth=12,
            heads=12,
            mlp_dim=3072,
            activation="gelu",
            gated=False,
            layer_scale=1e-5,
            qk_norm="plain",
            rope_theta=100.0,
            rope_rescale=2.0,
            bos=True,
            norm_eps=1e-12,
        ),
        objective=PAPER_OBJECTIVE,
        optim=OptimConfig(
            lr=3e-4, lr_batch=256, betas=(0.9, 0.95), weight_decay=0.05, warmup=Duration(fraction=0.025), clip=1.0
        ),
        train=TrainConfig(
            length=Duration(epochs=1600),
            batch=4096,
            micro_batch=512,
            ema=0.9999,
            workers=12,
            log=50,
            evaluate=2000,
            checkpoint=2000,
            keep=3,
        ),
        verdict=VerdictConfig(fit_samples=4096, test_samples=1024, health_samples=256),
    )
