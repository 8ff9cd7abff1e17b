"""Presets for images. A preset is a function that returns a whole config; its docstring says what to expect."""

from __future__ import annotations

from modalities.image import Images
from recipes.presets import small
from recipes.pretrain import PretrainConfig


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
