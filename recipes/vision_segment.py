"""Presets for segmentation. A preset is a function that returns a whole config; its docstring says what to expect."""

from __future__ import annotations

from modalities.scenes import Scenes
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import Duration, LayerDecay, OptimConfig
from recipes.presets import small
from recipes.pretrain import PretrainConfig
from recipes.segment import SegmentConfig
from recipes.segment_predict import EvaluationConfig
from recipes.upernet import UPerNetConfig
from recipes.vision import base_in1k

CAMVID_CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist"),
)


def base_ade20k() -> SegmentConfig:
    """ADE20K, ViT-B/14 with UPerNet, 160,000 steps of 16 crops of 518: the paper's 48.3 mIoU, in the field's setting.

    `nepa segment recipes.vision_segment:base_ade20k data.root=DIR` on one GPU (all 16 crops at once; with less memory
    add train.micro_batch=8), `torchrun --nproc-per-node 8 -m recipes segment ...` on 8. DIR is the unpacked
    `ADEChallengeData2016` or a Hugging Face copy. `init=` takes a run of your own instead of the released weights.

    Published: UPerNet, bidirectional, crop 512, batch 16, 160k steps, 48.3 mIoU. Nothing else is, and no code. The
    rest is what MAE and BEiT use for a ViT-B (MAE: 48.1): AdamW 1e-4, layer decay 0.65, drop path 0.1, 1,500 steps of
    warm-up and a linear decay, no clipping. Chosen here: UPerNet of width 768 (BEiT's); the embedder frozen as in the
    paper's fine-tuning; EMA 0.9999, reported beside the raw weights; windows half a crop apart; and the crop.

    Crop 518 = 37 x 14, since 14 does not divide 512. Padding 512 to 518 costs the same 37 x 37 tokens and fills the
    border with nothing; 504 = 36 x 14 would see less than the published crop. Scenes are scaled to a shorter side
    of 518, too, so a crop shows the same part of a scene as 512 of 512 does.

    Time: not measured. By arithmetic 1.2e19 FLOP (2.3e18 in the network, the rest in the head's convolutions on
    148 x 148 maps): at a fifth of the bfloat16 peak 17 hours on one H100, 2 on eight. Reading, augmenting and
    distorting a crop takes 26 ms of one core, measured with 683 x 512 JPEG files.
    """
    crop, patch = (518, 518), (14, 14)
    return SegmentConfig(
        init="SixAILab/nepa-base-patch14-224",
        data=Scenes(
            root="ADEChallengeData2016",
            crop=crop,
            patch=patch,
            short_side=518,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            class_count=150,
            first_label=1,
            ignored_labels=(0,),
        ),
        model=base_in1k().model.model_copy(update={"qk_norm": "affine", "rope_rescale": 1.0, "drop_path": 0.1}),
        causal=False,
        head="upernet",
        upernet=UPerNetConfig(
            levels=(3, 5, 7, 11), channels=768, dropout=0.1, auxiliary_channels=256, auxiliary_weight=0.4
        ),
        freeze_embedder=True,
        optim=OptimConfig(
            lr=1e-4,
            lr_batch=None,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=Duration(steps=1500),
            clip=None,
            decay="linear",
            layer_decay=LayerDecay(start=0.65, end=0.65, staggered_warmup=False),
        ),
        train=TrainConfig(
            length=Duration(steps=160_000),
            batch=16,
            ema=0.9999,
            workers=8,
            log=50,
            evaluate=16_000,
            checkpoint=4000,
            keep=2,
        ),
        evaluation=EvaluationConfig(
            mode="slide", stride=(259, 259), scales=(1.0,), flip=False, windows=16, images=500, pictures=8
        ),
    )


def large_ade20k() -> SegmentConfig:
    """ADE20K, ViT-L/14 with UPerNet: the paper's 54.0 mIoU. As `base_ade20k` but for what is named here.

    `torchrun --nproc-per-node 8 -m recipes segment recipes.vision_segment:large_ade20k data.root=DIR`, or
    `nepa segment ... train.micro_batch=8` on one GPU.

    Levels after blocks 7, 11, 15, 23 and UPerNet of width 1024, as BEiT's. Not published, and taken from the paper's
    and the released fine-tuning of this size: drop path 0.2, layer decay 0.75 (with 0.65 the lowest blocks of 24
    would stand still). Time: not measured; by arithmetic twice that of `base_ade20k`.
    """
    recipe = base_ade20k()
    large = {"dim": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096, "drop_path": 0.2}
    decay = LayerDecay(start=0.75, end=0.75, staggered_warmup=False)
    return recipe.model_copy(
        update={
            "init": "SixAILab/nepa-large-patch14-224",
            "model": recipe.model.model_copy(update=large),
            "upernet": recipe.upernet.model_copy(update={"levels": (7, 11, 15, 23), "channels": 1024}),
            "optim": recipe.optim.model_copy(update={"layer_decay": decay}),
        }
    )


def camvid_scenes() -> Scenes:
    """CamVid at half its size: crops of 96 x 128 in 192 patches of 8 x 8."""
    return Scenes(
        root="camvid",
        crop=(96, 128),
        patch=(8, 8),
        short_side=180,
        mean=(0.412, 0.425, 0.432),
        std=(0.307, 0.311, 0.307),
        class_count=11,
        names=CAMVID_CLASSES,
        first_label=0,
        ignored_labels=(11,),
    )


def camvid() -> PretrainConfig:
    """CamVid without its labels, 367 street scenes: width 128, 4 layers, 300 steps of 32 crops.

    `nepa pretrain recipes.vision_segment:camvid data.root=DIR`, where DIR holds `images/{train,val}` and
    `annotations/{train,val}`. About 4 minutes on one core; RESULTS.md has the verdict.
    """
    recipe = small(camvid_scenes().model_copy(update={"scales": (0.75, 1.5), "distort": False}))
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dim": 128, "mlp_dim": 512}),
            "train": recipe.train.model_copy(
                update={"length": Duration(steps=300), "batch": 32, "evaluate": 100, "checkpoint": 100}
            ),
        }
    )


def camvid_segment() -> SegmentConfig:
    """CamVid, 11 classes, with the network of `camvid` under a UPerNet of width 32: 150 steps of 16 crops.

    `nepa segment recipes.vision_segment:camvid_segment data.root=DIR init=runs/camvid`; without `init=` the control
    from random weights. About 3 minutes on one core; RESULTS.md has both figures. For so short a run the field's
    setting is too much and too slow: no colour distortion, scales 0.75 to 1.5, no layer decay, learning rate 2e-3.
    """
    pretraining = camvid()
    return SegmentConfig(
        init=None,
        data=camvid_scenes().model_copy(update={"scales": (0.75, 1.5), "distort": False}),
        model=pretraining.model.model_copy(update={"drop_path": 0.1}),
        causal=False,
        head="upernet",
        upernet=UPerNetConfig(
            levels=(0, 1, 2, 3), channels=32, dropout=0.1, auxiliary_channels=32, auxiliary_weight=0.4
        ),
        freeze_embedder=False,
        optim=OptimConfig(
            lr=2e-3,
            lr_batch=None,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=Duration(fraction=0.1),
            clip=1.0,
            decay="linear",
        ),
        train=TrainConfig(
            length=Duration(steps=150), batch=16, ema=0.98, workers=0, log=10, evaluate=75, checkpoint=75, keep=1
        ),
        evaluation=EvaluationConfig(
            mode="slide", stride=(96, 128), scales=(1.0,), flip=False, windows=4, images=10, pictures=6
        ),
    )
