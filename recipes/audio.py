"""Presets for audio. A preset is a function that returns a whole config; its docstring says what to expect.

`nape_*` are the settings of NAPE ("Listening Forward", arXiv 2608.19863): `nape_small`, `nape_base` and `nape_large`
pre-train on AudioSet, and each size is fine-tuned on six tasks. docs/audio.md has how the folder of each set must look.
Published figures are the paper's, in raster order, of one run each.

Hours of these are derived, not measured: from the operations of the base size that `nepa plan` counts (265 GFLOP a clip
of 10 s; other sizes and lengths by their matrix products), at 14 % of the bfloat16 peak of an H100, which the days of
NEPA's authors come to; small networks may reach less.

What the paper does not say is chosen once for all. LayerScale from 1e-5 and RoPE's wavelengths to 100 are NEPA's, and
so are clipping at norm 1 and the numbering of the layer decay in its released scripts (`recipes.vision`). There is no
BOS, for the loss of the paper begins with the second token. The epsilon of its logarithm and the scale of its power are
unclear: the mean and standard deviation of its table are taken to be those of the natural logarithm of mel power, of
which 1e-6 is silence here (`data.mean=null data.std=null` measures them on your data instead). Of a normal distribution
with its mean and deviation, 10 % of AudioSet, 15 % of Speech Commands and half of IEMOCAP would lie under that, so its
epsilon was smaller, and quiet parts stand higher here. The table of SpecAugment's widths is garbled, they lie between
(24, 16) and (96, 24): here they follow the length of a clip. Roll and noise have no size there: here a clip begins
anywhere, and noise has up to a twentieth of the data's deviation. Mixup and CutMix have one probability in every task,
that a batch is mixed: by the one or the other, with equal chance. Clips are padded to the longest of a batch, and
padding is masked.
"""

from __future__ import annotations

from typing import Any, Literal

from modalities.audio import Audio
from modalities.data.audio_sets import SetName
from modalities.data.spectrogram_augment import SpectrogramAugment
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.config import override
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import Duration, LayerDecay, OptimConfig
from recipes.configs import FinetuneConfig, MixConfig, PretrainConfig, VerdictConfig
from recipes.presets import PAPER_OBJECTIVE, small

Size = Literal["small", "base", "large"]


def demo() -> PretrainConfig:
    """Synthetic tones, chirps and pulsed tones under noise, in tokens of 4 log-mel frames: nothing is downloaded.

    `nepa pretrain recipes.audio:demo`. 2,000 clips of 0.4 to 0.8 s to train, 512 held out, 4 classes. 40 s
    of one core. Measured: loss -0.872 where -0.927 is the best possible and a linear autoregression has -0.851.
    """
    data = Audio(source="synthetic", seconds=0.8, bands=32, in_memory=True)
    return override(small(data), {"train.length.steps": 600, "verdict.test_samples": 512})


def fsdd() -> PretrainConfig:
    """Spoken digits (FSDD: 3,000 clips at 8 kHz, 6 speakers) in tokens of 4 log-mel frames of 40 bands.

    `nepa pretrain recipes.audio:fsdd data.root=DIR`, where DIR holds `{digit}_{speaker}_{index}.wav`. Recordings 0 to
    4 of each digit and speaker are held out, or one speaker by `data.held_out_speaker=theo`. About a minute of one
    core. Measured over three seeds: next frame identified 66 %, by a linear autoregression 57 %.
    """
    data = Audio(source="folder", root="fsdd", seconds=1.0, sample_rate=8000, bands=40, in_memory=True)
    return override(small(data), {"verdict.test_samples": 512})


def fsdd_patches() -> PretrainConfig:
    """The spoken digits in patches of 8 bands and 8 frames: for comparing patch orders.

    `nepa pretrain recipes.audio:fsdd_patches data.root=DIR data.patch_order=hilbert`. 60 tokens where `fsdd` has 25, so
    minutes; the verdict's linear baseline takes as long as the training. 16 x 16 would leave 3 columns of a word.
    """
    changes = {"data.patch": (8, 8), "data.seconds": 0.96, "train.length.steps": 400}
    return override(fsdd(), changes)


# ------------------------------------------------------------------------------------------------ NAPE, pre-training


def nape_small() -> PretrainConfig:
    """AudioSet-2M, NAPE-S: 25 epochs of predicting the next patch, with a head on the prediction side alone.

    `torchrun --nproc-per-node 8 -m recipes pretrain recipes.audio:nape_small data.root=DIR`; on one GPU
    `nepa pretrain recipes.audio:nape_small data.root=DIR` (the same batch of 256, at once).

    Time, derived: 7 hours of one H100, 67 GFLOP a clip of 10 s. Published after fine-tuning: ESC-50 92.9 %,
    AudioSet-20K mAP 36.2 (those two alone, in its ablation of input masking). Unclear: the paper counts 19 M
    parameters, and blocks of this width, depth and heads hold 21 M.
    """
    return _pretraining("small", epochs=25, batch=256, micro_batch=256)


def nape_base() -> PretrainConfig:
    """AudioSet-2M, NAPE-B: 30 epochs of predicting the next patch, with a head on the prediction side alone.

    `torchrun --nproc-per-node 8 -m recipes pretrain recipes.audio:nape_base data.root=DIR`; on one GPU
    `nepa pretrain recipes.audio:nape_base data.root=DIR` (gradients accumulate to the same batch of 256).

    Time, derived: 33 hours of one H100, 265 GFLOP a clip of 10 s. Published after fine-tuning: mAP 49.6 on AudioSet-2M
    and 39.1 on AudioSet-20K, ESC-50 94.2 %, Speech Commands 97.9 % (v1) and 98.8 % (v2), IEMOCAP 64.9 %. Unclear:
    whether the last, incomplete batch of an epoch counts, and all that the head of this file names.
    """
    return _pretraining("base", epochs=30, batch=256, micro_batch=128)


def nape_large() -> PretrainConfig:
    """AudioSet-2M, NAPE-L: 25 epochs of predicting the next patch, with a head on the prediction side alone.

    `torchrun --nproc-per-node 8 -m recipes pretrain recipes.audio:nape_large data.root=DIR`; on one GPU
    `nepa pretrain recipes.audio:nape_large data.root=DIR` (gradients accumulate to the same batch of 128).

    Time, derived: 4 days of one H100, 930 GFLOP a clip of 10 s. Published after fine-tuning: mAP 50.2 on AudioSet-2M
    and 40.5 on AudioSet-20K, ESC-50 96.0 %, Speech Commands 97.9 % (v1) and 98.8 % (v2), IEMOCAP 68.0 %. Unclear:
    whether the rate is scaled to its smaller batch; here it is, as everywhere, to 2.5e-3.
    """
    return _pretraining("large", epochs=25, batch=128, micro_batch=64)


# ------------------------------------------------------------------------------------------------- NAPE, fine-tuning


def nape_small_audioset() -> FinetuneConfig:
    """AudioSet-2M, NAPE-S: 20 epochs on labels, rare classes drawn as often as common ones.

    `nepa finetune recipes.audio:nape_small_audioset data.root=DIR init=runs/nape_small`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 5 hours of one H100, and as much for the control. Published: no figure of this size. The paper's
    table has no column for S, which takes that of B. Unclear: how many draws an epoch of balanced sampling has; here as
    many as there are clips.
    """
    return _audioset("small")


def nape_base_audioset() -> FinetuneConfig:
    """AudioSet-2M, NAPE-B: 20 epochs on labels, rare classes drawn as often as common ones.

    `nepa finetune recipes.audio:nape_base_audioset data.root=DIR init=runs/nape_base`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 22 hours of one H100, and as much for the control. Published: mAP 49.6. Unclear: how many draws an
    epoch of balanced sampling has; here as many as there are clips.
    """
    return _audioset("base")


def nape_large_audioset() -> FinetuneConfig:
    """AudioSet-2M, NAPE-L: 15 epochs on labels, rare classes drawn as often as common ones.

    `nepa finetune recipes.audio:nape_large_audioset data.root=DIR init=runs/nape_large`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 57 hours of one H100, and as much for the control. Published: mAP 50.2. Unclear: how many draws an
    epoch of balanced sampling has; here as many as there are clips.
    """
    return _audioset("large")


def nape_small_audioset20k() -> FinetuneConfig:
    """AudioSet-20K, the balanced part, NAPE-S: 30 epochs on labels.

    `nepa finetune recipes.audio:nape_small_audioset20k data.root=DIR init=runs/nape_small`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 5 minutes of one H100, and as much for the control. Published: mAP 36.2. The paper's table has no
    column for S, which takes that of B. Unclear: the widths of SpecAugment.
    """
    return _audioset20k("small")


def nape_base_audioset20k() -> FinetuneConfig:
    """AudioSet-20K, the balanced part, NAPE-B: 30 epochs on labels.

    `nepa finetune recipes.audio:nape_base_audioset20k data.root=DIR init=runs/nape_base`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 21 minutes of one H100, and as much for the control. Published: mAP 39.1. Unclear: the widths of
    SpecAugment.
    """
    return _audioset20k("base")


def nape_large_audioset20k() -> FinetuneConfig:
    """AudioSet-20K, the balanced part, NAPE-L: 20 epochs on labels.

    `nepa finetune recipes.audio:nape_large_audioset20k data.root=DIR init=runs/nape_large`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 50 minutes of one H100, and as much for the control. Published: mAP 40.5. Unclear: the widths of
    SpecAugment.
    """
    return _audioset20k("large")


def nape_small_esc50() -> FinetuneConfig:
    """ESC-50, NAPE-S: 100 epochs on labels, five folds.

    `nepa finetune recipes.audio:nape_small_esc50 data.root=DIR init=runs/nape_small folds=all`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 3 minutes of one H100 for all folds, and as much for the control. Published: 92.9 %. The paper's
    table has no column for S, which takes that of B. Unclear: the widths of SpecAugment, and whether the last epoch is
    reported or the best; here it is the last.
    """
    return _esc50("small")


def nape_base_esc50() -> FinetuneConfig:
    """ESC-50, NAPE-B: 100 epochs on labels, five folds.

    `nepa finetune recipes.audio:nape_base_esc50 data.root=DIR init=runs/nape_base folds=all`; on several GPUs `torchrun
    --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 13 minutes of one H100 for all folds, and as much for the control. Published: 94.2 %. Unclear: the
    widths of SpecAugment, and whether the last epoch is reported or the best; here it is the last.
    """
    return _esc50("base")


def nape_large_esc50() -> FinetuneConfig:
    """ESC-50, NAPE-L: 100 epochs on labels, five folds.

    `nepa finetune recipes.audio:nape_large_esc50 data.root=DIR init=runs/nape_large folds=all`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 45 minutes of one H100 for all folds, and as much for the control. Published: 96.0 %. Unclear: the
    widths of SpecAugment, and whether the last epoch is reported or the best; here it is the last.
    """
    return _esc50("large")


def nape_small_speech_commands_v1() -> FinetuneConfig:
    """Speech Commands v1, NAPE-S: 12 classes (ten words, unknown, silence), 50 epochs, each class by itself.

    `nepa finetune recipes.audio:nape_small_speech_commands_v1 data.root=DIR init=runs/nape_small`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 2 minutes of one H100, and as much for the control. Published: no figure of this size. The paper's
    table has no column for S, which takes that of B. Unclear: which clips of unknown words and of silence it has; here
    those of `modalities.data.audio_sets`, of which silence to train is drawn by the set's rule, and all unknown words
    train, as sampling is balanced.
    """
    return _speech_commands_v1("small")


def nape_base_speech_commands_v1() -> FinetuneConfig:
    """Speech Commands v1, NAPE-B: 12 classes (ten words, unknown, silence), 50 epochs, each class by itself.

    `nepa finetune recipes.audio:nape_base_speech_commands_v1 data.root=DIR init=runs/nape_base`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 9 minutes of one H100, and as much for the control. Published: 97.9 %. Unclear: which clips of
    unknown words and of silence it has; here those of `modalities.data.audio_sets`, of which silence to train is drawn
    by the set's rule, and all unknown words train, as sampling is balanced.
    """
    return _speech_commands_v1("base")


def nape_large_speech_commands_v1() -> FinetuneConfig:
    """Speech Commands v1, NAPE-L: 12 classes (ten words, unknown, silence), 50 epochs, each class by itself.

    `nepa finetune recipes.audio:nape_large_speech_commands_v1 data.root=DIR init=runs/nape_large`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 32 minutes of one H100, and as much for the control. Published: 97.9 %. Unclear: which clips of
    unknown words and of silence it has; here those of `modalities.data.audio_sets`, of which silence to train is drawn
    by the set's rule, and all unknown words train, as sampling is balanced.
    """
    return _speech_commands_v1("large")


def nape_small_speech_commands_v2() -> FinetuneConfig:
    """Speech Commands v2, NAPE-S: 35 words, 50 epochs, each class by itself.

    `nepa finetune recipes.audio:nape_small_speech_commands_v2 data.root=DIR init=runs/nape_small`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 4 minutes of one H100, and as much for the control. Published: no figure of this size. The paper's
    table has no column for S, which takes that of B. Unclear: whether noise is added; here it is, as in v1.
    """
    return _speech_commands_v2("small")


def nape_base_speech_commands_v2() -> FinetuneConfig:
    """Speech Commands v2, NAPE-B: 35 words, 50 epochs, each class by itself.

    `nepa finetune recipes.audio:nape_base_speech_commands_v2 data.root=DIR init=runs/nape_base`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 15 minutes of one H100, and as much for the control. Published: 98.8 %. Unclear: whether noise is
    added; here it is, as in v1.
    """
    return _speech_commands_v2("base")


def nape_large_speech_commands_v2() -> FinetuneConfig:
    """Speech Commands v2, NAPE-L: 35 words, 50 epochs, each class by itself.

    `nepa finetune recipes.audio:nape_large_speech_commands_v2 data.root=DIR init=runs/nape_large`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 53 minutes of one H100, and as much for the control. Published: 98.8 %. Unclear: whether noise is
    added; here it is, as in v1.
    """
    return _speech_commands_v2("large")


def nape_small_iemocap() -> FinetuneConfig:
    """IEMOCAP, NAPE-S: four emotions, 50 epochs, five sessions.

    `nepa finetune recipes.audio:nape_small_iemocap data.root=DIR init=runs/nape_small folds=all`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 9 minutes of one H100 for all folds, and as much for the control. Published: no figure of this size.
    The paper's table has no column for S, which takes that of B. Unclear: how long a clip may be; here 10 s, and longer
    turns are cut. Unclear, too: whether excited turns count as happy, as is usual; here they do. Its mean is so low
    that much of it would lie under the 1e-6 that counts as silence here: the logarithm there has a smaller epsilon.
    """
    return _iemocap("small")


def nape_base_iemocap() -> FinetuneConfig:
    """IEMOCAP, NAPE-B: four emotions, 50 epochs, five sessions.

    `nepa finetune recipes.audio:nape_base_iemocap data.root=DIR init=runs/nape_base folds=all`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 35 minutes of one H100 for all folds, and as much for the control. Published: 64.9 %. Unclear: how
    long a clip may be; here 10 s, and longer turns are cut. Unclear, too: whether excited turns count as happy, as is
    usual; here they do. Its mean is so low that much of it would lie under the 1e-6 that counts as silence here: the
    logarithm there has a smaller epsilon.
    """
    return _iemocap("base")


def nape_large_iemocap() -> FinetuneConfig:
    """IEMOCAP, NAPE-L: four emotions, 50 epochs, five sessions.

    `nepa finetune recipes.audio:nape_large_iemocap data.root=DIR init=runs/nape_large folds=all`; on several GPUs
    `torchrun --nproc-per-node 8 -m recipes` in place of `nepa`.

    Time, derived: 2 hours of one H100 for all folds, and as much for the control. Published: 68.0 %. Unclear: how long
    a clip may be; here 10 s, and longer turns are cut. Unclear, too: whether excited turns count as happy, as is usual;
    here they do. Its mean is so low that much of it would lie under the 1e-6 that counts as silence here: the logarithm
    there has a smaller epsilon.
    """
    return _iemocap("large")


# -------------------------------------------------------------------------------------------- what they are made of


def _pretraining(size: Size, *, epochs: int, batch: int, micro_batch: int) -> PretrainConfig:
    return PretrainConfig(
        data=_clips("audioset", seconds=10.08, mean=-6.84, std=5.38),
        model=_network(size),
        objective=PAPER_OBJECTIVE.model_copy(update={"head": "simsiam"}),
        optim=OptimConfig(
            lr=5e-3, lr_batch=256, betas=(0.9, 0.95), weight_decay=0.05, warmup=Duration(fraction=0.1), clip=1.0
        ),
        train=_train(epochs=epochs, batch=batch, micro_batch=micro_batch, ema=0.9999, evaluate=5000),
        verdict=VerdictConfig(fit_samples=16_384, test_samples=1024, health_samples=256),
    )


def _audioset(size: Size) -> FinetuneConfig:
    large = size == "large"
    config = _tuning(
        size,
        _clips("audioset", seconds=10.08, mean=-6.84, std=5.38, augment=_augment(96, 24)),
        epochs=15 if large else 20,
        warmup=3 if large else 4,
        decay=0.9 if large else 0.7,
        mixed=1.0,
        ema=0.99995,
        evaluate=20_000,
    )
    return override(config, {"train.sampling": "balanced"})


def _audioset20k(size: Size) -> FinetuneConfig:
    large = size == "large"
    return _tuning(
        size,
        _clips("audioset", seconds=10.08, mean=-6.84, std=5.38, subset="balanced", augment=_augment(96, 24)),
        epochs=20 if large else 30,
        warmup=5 if large else 6,
        decay=0.9 if large else 0.8,
        mixed=0.8,
        ema=0.999,
    )


def _esc50(size: Size) -> FinetuneConfig:
    config = _tuning(
        size,
        _clips("esc50", seconds=5.12, mean=-6.84, std=5.38, augment=_augment(48, 24)),
        epochs=100,
        warmup=10,
        decay=0.9 if size == "large" else 0.7,
        mixed=0.5,
        evaluate=500,
    )
    return override(config, {"label_smoothing": 0.1})


def _speech_commands_v1(size: Size) -> FinetuneConfig:
    config = _speech_commands(size, mean=-9.11, std=4.53, keywords="ten")
    return override(config, {"label_smoothing": 0.1, "train.sampling": "balanced"})


def _speech_commands_v2(size: Size) -> FinetuneConfig:
    return _speech_commands(size, mean=-9.16, std=4.61)


def _speech_commands(size: Size, **settings: Any) -> FinetuneConfig:
    config = _tuning(
        size,
        _clips("speech_commands", seconds=1.12, augment=_augment(24, 16, roll=0.0), **settings),
        epochs=50,
        warmup=5,
        decay=0.8 if size == "large" else 0.7,
        mixed=0.8,
    )
    return override(config, {"loss": "bce"})


def _iemocap(size: Size) -> FinetuneConfig:
    config = _tuning(
        size,
        _clips("iemocap", seconds=10.08, mean=-13.74, std=3.88, augment=_augment(96, 24)),
        epochs=50,
        warmup=5,
        decay=0.9 if size == "large" else 0.7,
        mixed=0.5,
        evaluate=500,
    )
    return override(config, {"label_smoothing": 0.1})


def _tuning(
    size: Size,
    data: Audio,
    *,
    epochs: int,
    warmup: int,
    decay: float,
    mixed: float,
    ema: float | None = None,
    evaluate: int = 2000,
) -> FinetuneConfig:
    """What all fine-tuning shares."""
    return FinetuneConfig(
        init=None,
        data=data,
        model=_network(size, drop_path=0.1),
        causal=False,
        readout="mean",
        freeze_embedder=False,
        label_smoothing=0.0,
        mix=MixConfig(mixup=0.8, cutmix=1.0, prob=mixed),
        optim=OptimConfig(
            lr=1.25e-3,
            lr_batch=256,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup=Duration(epochs=warmup),
            clip=1.0,
            layer_decay=LayerDecay(start=decay, end=decay, staggered_warmup=False, head_counts=False),
        ),
        train=_train(epochs=epochs, batch=64, micro_batch=32 if size == "large" else 64, ema=ema, evaluate=evaluate),
    )


def _clips(source: SetName, *, seconds: float, **settings: Any) -> Audio:
    """A set in the folder of its name: 128 bands of 16 kHz in patches of 16 x 16, low bands first."""
    return Audio(source=source, root=source, seconds=seconds, patch=(16, 16), patch_order="rising", **settings)


def _augment(time: int, frequency: int, *, roll: float = 0.5) -> SpectrogramAugment:
    return SpectrogramAugment(time_mask=time, frequency_mask=frequency, roll=roll, noise=0.05)


def _network(size: Size, *, drop_path: float = 0.0) -> PredictorConfig:
    dim, depth, heads = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    return PredictorConfig(
        dim=dim, depth=depth, heads=heads, activation="gelu", gated=False, bos=False, drop_path=drop_path
    )


def _train(*, epochs: int, batch: int, micro_batch: int, ema: float | None, evaluate: int) -> TrainConfig:
    return TrainConfig(
        length=Duration(epochs=epochs),
        batch=batch,
        micro_batch=micro_batch,
        ema=ema,
        workers=12,
        log=50,
        evaluate=evaluate,
        checkpoint=2000,
        keep=3,
    )
