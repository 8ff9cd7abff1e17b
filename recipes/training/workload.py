"""The network and the step function of any training recipe, for `nepa bench`."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel
from torch import nn

from nepa_core.basics import UserError
from nepa_core.predictor import Predictor
from nepa_core.runtime.fit import StepFunction
from nepa_core.runtime.run import is_run, task_of
from recipes.configs import FinetuneConfig, PretrainConfig, SegmentConfig
from recipes.networks.goals import find_goal, taught_by
from recipes.resolve import read_target
from recipes.training import finetuning, pretraining, segmentation, starting

Trained = PretrainConfig | FinetuneConfig | SegmentConfig
KINDS: dict[str, type[Trained]] = {kind.task: kind for kind in (PretrainConfig, FinetuneConfig, SegmentConfig)}


def read_trained(target: str, changes: dict[str, Any]) -> Trained:
    """The config of a recipe or run of any task that trains.

    Raises:
        UserError: there is no such recipe or run, or a change does not fit.
    """
    if is_run(target):
        if task_of(target) not in KINDS:
            raise UserError(f"{target} is a run of `nepa {task_of(target)}`; name one of {', '.join(KINDS)}")
        return read_target(KINDS[task_of(target)], target, changes)
    config = read_target(BaseModel, target, changes)
    if not isinstance(config, Trained):
        raise UserError(f"{target} gives a {type(config).__name__}, which trains nothing")
    return config


def network(config: Trained) -> nn.Module:
    """The network with random weights, whatever `init` says: the time of a step does not depend on it."""
    if isinstance(config, PretrainConfig):
        return starting.build_pretrainer(config)
    start = config.model_copy(update={"init": None})
    if isinstance(start, FinetuneConfig):
        return finetuning.build_classifier(start, taught_by(find_goal(start.data), start.loss))[0]
    return segmentation.build_segmenter(start)[0]


def predictor_in(model: nn.Module) -> Predictor:
    """The predictor of a network that `network` built."""
    return cast(Predictor, getattr(model, "backbone", model).predictor)


def step_function(config: Trained) -> StepFunction:
    """What `fit` calls for every micro-batch of that task."""
    if isinstance(config, PretrainConfig):
        return pretraining.make_step(config)
    if isinstance(config, FinetuneConfig):
        return finetuning.make_step(config, taught_by(find_goal(config.data), config.loss))
    return segmentation.make_step(config)
