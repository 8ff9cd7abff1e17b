"""What a recipe returns, and `config.json` holds."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import BaseModel, Field, SerializeAsAny, model_validator

from modalities.scenes import Scenes
from nepa_core.basics import FROZEN, MOST_SEED
from nepa_core.modality import Modality
from nepa_core.predictor import PredictorConfig
from nepa_core.pretrainer import ObjectiveConfig
from nepa_core.runtime.config import load_object
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import OptimConfig
from nepa_core.terms import term
from recipes.networks.upernet import UPerNetConfig
from recipes.networks.windows import EvaluationConfig

UNKNOWN_TARGET = (
    "an order that differs between samples or batches needs model.predict_position=add (or rotate): without it the "
    "network can't know which patch comes next, so the best prediction is close to the mean embedding; "
    "objective.unknown_target=true trains it all the same"
)


class VerdictConfig(BaseModel):
    """How many samples the verdict reads.

    Attributes:
        fit_samples: training samples that the baselines are fitted on; None for the whole split.
        test_samples: held-out samples that are judged; fewer where they would take more than `VERDICT_BYTES`.
        health_samples: held-out samples behind each line of rank, spread and loss while training.
        draw: seed of the draw of held-out samples, whatever the run's own seed is.
    """

    model_config = FROZEN

    fit_samples: int | None = Field(default=None, gt=0)
    test_samples: int = Field(gt=1)
    health_samples: int = Field(gt=1)
    draw: int = Field(default=0, ge=0, lt=MOST_SEED)


class PretrainConfig(BaseModel):
    """A whole pre-training run: what a recipe function returns and `config.json` holds.

    Attributes:
        init: a run, a folder in the released layout or a hub name whose weights it begins with; None for random ones.
    """

    model_config = FROZEN

    task: ClassVar[str] = "pretrain"

    recipe: str = ""
    init: str | None = None
    data: SerializeAsAny[Modality]
    model: PredictorConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    verdict: VerdictConfig

    @model_validator(mode="after")
    def _mask_token(self) -> Self:
        hides = self.objective.input_mask > 0
        if hides and not self.model.mask_token:
            raise ValueError(f"objective.input_mask={self.objective.input_mask} needs model.mask_token=true")
        if self.model.mask_token and not hides:
            raise ValueError("model.mask_token=true needs an objective.input_mask above 0, which alone trains it")
        return self

    @model_validator(mode="after")
    def _target_is_known(self) -> Self:
        known = self.model.predict_position != "off" or not self.objective.shift
        if self.data.draws_order() and not known and not self.objective.unknown_target:
            raise ValueError(UNKNOWN_TARGET)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        own, there = self.model.parts, len(self.data.part_names())
        if own and not there:
            raise ValueError(f"model.parts={own} is for data of several parts: set it to 0")
        if own and own != there:
            raise ValueError(
                f"model.parts={own} and the data have {there} parts: set it to {there}, or to 0 for no vectors"
            )
        return self

    @model_validator(mode="after")
    def _terms_exist(self) -> Self:
        for name in self.objective.terms:  # here, and not where they are computed: a file may have named them
            if ":" in name and not callable(load_object(name)):
                raise ValueError(f"objective.terms.{name} is no function of (predictions, targets, mask)")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        batch, most = self.train.batch, self.train.micro_batch or self.train.batch
        if (lonely := without_another(self.objective, min(most, batch), batch)) is not None:  # however many processes
            raise ValueError(f"objective.terms.{lonely} compares samples: train.batch and train.micro_batch above 1")
        if wrong := [block for block in self.objective.layers if not 0 < block <= self.model.depth]:
            raise ValueError(f"objective.layers={wrong[0]} is no block: they are 1 to model.depth={self.model.depth}")
        return self


def without_another(objective: ObjectiveConfig, own: int, all_own: int) -> str | None:
    """The first term that compares samples and has but one, or None.

    Args:
        own: samples of one forward pass of one process. all_own: of those of all processes together.
    """
    seen = {None: 2, "forward pass": own, "all processes": all_own}
    return next((name for name in objective.terms if seen[term(name).across] < 2), None)


class MixConfig(BaseModel):
    """Mixup and CutMix of a batch, images as timm does it (`timm.data.mixup.Mixup`, mode "batch"), and spectrograms.

    Rectangles of `data.erase` are filled before it, as in timm and in the released scripts, and are mixed, too.

    Attributes:
        mixup, cutmix: alpha of the Beta distribution that the share of an image is drawn from; 0 is off. Where both
            are on, each batch takes one of them with equal chance.
        prob: chance that a batch is mixed at all.
    """

    model_config = FROZEN

    mixup: float = Field(ge=0)
    cutmix: float = Field(ge=0)
    prob: float = Field(default=1.0, gt=0, le=1, exclude_if=lambda prob: prob == 1)

    @model_validator(mode="after")
    def _one_is_on(self) -> Self:
        if self.mixup == self.cutmix == 0:
            raise ValueError("mix.mixup and mix.cutmix are both 0; set mix=null for no mixing")
        return self


Loss = Literal["cross_entropy", "bce"]


class FinetuneConfig(BaseModel):
    """A whole fine-tuning run.

    Attributes:
        init: a run, a folder in the released layout or a hub name to start from; None for random weights.
        data: an adapter whose samples have a "label", or a "target" per token.
        causal: attend backwards only; False is what the paper and the released scripts fine-tune with.
        readout: a linear map on the LayerNorm of the "mean" over tokens (released), or on the "last" token (paper).
            Targets per token have a linear map of every token instead.
        freeze_embedder: leave the embedder as it was pre-trained (paper and released scripts).
        label_smoothing: share of the target spread over all classes, where targets are classes.
        loss: of one class a sample: softmax cross-entropy, or "bce", binary cross-entropy of every class by itself (the
            mean over classes). Several classes a sample always have that.
        mix: mixup and CutMix, for images and spectrograms, or None.
    """

    model_config = FROZEN

    task: ClassVar[str] = "finetune"

    recipe: str = ""
    init: str | None
    data: SerializeAsAny[Modality]
    model: PredictorConfig
    causal: bool
    readout: Literal["mean", "last"]
    freeze_embedder: bool
    label_smoothing: float = Field(ge=0, lt=1)
    loss: Loss = Field(default="cross_entropy", exclude_if=lambda loss: loss == "cross_entropy")
    mix: MixConfig | None
    optim: OptimConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model.mask_token or self.train.probe:
            key = "model.mask_token" if self.model.mask_token else "train.probe"
            raise ValueError(f"{key}=true is of pre-training; set it to false")
        return self


class BesideConfig(BaseModel):
    """Another network, trained as that of a fine-tuning run is, to stand beside it.

    Attributes:
        backbone: `timm:NAME` or `timm:NAME@FILE.safetensors`. pretrained: False starts from random weights.
        data: of the run, with every image as one token of the network's own size, see `Modality.whole_images`.
        label_smoothing, loss, mix, optim, train: of the run.
    """

    model_config = FROZEN

    task: ClassVar[str] = "finetune beside="
    causal: ClassVar[bool] = False

    recipe: str = ""
    backbone: str
    pretrained: bool
    data: SerializeAsAny[Modality]
    label_smoothing: float = Field(ge=0, lt=1)
    loss: Loss = Field(default="cross_entropy", exclude_if=lambda loss: loss == "cross_entropy")
    mix: MixConfig | None
    optim: OptimConfig
    train: TrainConfig


class SegmentConfig(BaseModel):
    """A whole segmentation run.

    Attributes:
        init: a run, a folder in the released layout or a hub name to start from; None for random weights.
        causal: attend backwards only; False is what the paper segments with.
        head: "upernet", or "linear": one linear map of every token's last embedding, scaled up.
        upernet: of head="upernet".
        freeze_embedder: leave the embedder as it was pre-trained.
        evaluation: how held-out images are segmented.
    """

    model_config = FROZEN

    task: ClassVar[str] = "segment"

    recipe: str = ""
    init: str | None
    data: SerializeAsAny[Scenes]
    model: PredictorConfig
    causal: bool
    head: Literal["upernet", "linear"]
    upernet: UPerNetConfig
    freeze_embedder: bool
    optim: OptimConfig
    train: TrainConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _fits(self) -> Self:
        levels, depth = self.upernet.levels, self.model.depth
        if self.head == "upernet" and (sorted(set(levels)) != list(levels) or levels[0] < 0 or levels[-1] != depth - 1):
            raise ValueError(f"upernet.levels={levels} must rise and end with {depth - 1}, the last of {depth} blocks")
        if any(step > side for step, side in zip(self.evaluation.stride, self.data.crop, strict=True)):
            raise ValueError(
                f"evaluation.stride={self.evaluation.stride} leaves gaps between windows of data.crop={self.data.crop}"
            )
        if self.model.mask_token or self.train.probe:
            key = "model.mask_token" if self.model.mask_token else "train.probe"
            raise ValueError(f"{key}=true is of pre-training; set it to false")
        if self.model.learned_positions and self.evaluation.mode == "whole":
            raise ValueError("model.learned_positions knows one size of image; set evaluation.mode=slide")
        return self
