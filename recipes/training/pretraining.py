"""Pre-training: from a config to a run folder with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nepa_core.basics import Batch, UserError
from nepa_core.ema import Ema, applied
from nepa_core.model import NEPA, draw_coord_scale
from nepa_core.objective import pair_count
from nepa_core.pretrainer import objective_loss
from nepa_core.runtime.checkpoint import load_latest
from nepa_core.runtime.config import override, shown
from nepa_core.runtime.data import replace_broken
from nepa_core.runtime.distributed import World, gather_samples
from nepa_core.runtime.fit import StepFunction, StepOutput
from nepa_core.runtime.meter import say_progress
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import Origin, begin_from, current_weights, newest, prediction_head_in
from nepa_core.tokens import Tokens
from recipes.configs import PretrainConfig
from recipes.report import card
from recipes.report.card import origin_line
from recipes.report.summaries import PretrainSummary
from recipes.training.advice import advice
from recipes.training.judging import (
    best_possible,
    crossings_of,
    held_out_health,
    packed,
    rank_warning,
    summarise,
    verdict_of,
)
from recipes.training.online_probe import online_probe, probe_figure
from recipes.training.starting import build_model, build_pretrainer, check_held_out, check_samples, try_batch
from recipes.training.train import opened, train


def pretrain(
    config: PretrainConfig, run: Run, ranks: World, *, midway: bool = False, show: bool = True
) -> PretrainSummary:
    """Train, judge, write summary.json and report/; a finished run is not trained again.

    Args:
        midway: the run may take settings anew and be lengthened, see `Run.open`.
        show: progress on the screen.

    Returns:
        The summary (empty on the other ranks).
    """
    if (finished := opened(config, run, ranks, PretrainSummary, midway=midway)) is not None:
        return finished
    check_samples(config, ranks.size)
    check_held_out(config.data)
    model = build_pretrainer(config).to(ranks.device)
    origin = weights_of_init(config, model, run, say=show and ranks.is_main)
    try_batch(config, model)
    probe = online_probe(config)

    def health(ema: Ema | None) -> dict[str, Any]:
        if not ranks.is_main:
            return {}
        figures = held_out_health(config, model, ranks, ema)
        labels = {} if probe is None else probe_figure(probe, config, model, ema)
        return figures | labels | rank_warning(run, figures)

    result, ema = train(
        model,
        model.predictor,
        config,
        run,
        ranks,
        step_function=make_step(config),
        step_at=partial(make_step, config) if config.data.draws_order() else None,
        evaluate=health,
        midway=midway,
        origin=origin,
        show=show,
    )
    if not ranks.is_main:
        return {}
    with applied(ema):
        judged, objective, unreadable, strata = verdict_of(config, model, ranks.device, show=show)
        crossings = crossings_of(config, model, ranks.device, show=show)
        optimum = best_possible(config, model)
    summary = summarise(judged.verdict, objective, config, model, result)
    summary |= {"unreadable_held_out": len(unreadable), "unreadable_held_out_messages": sorted(unreadable)}
    summary |= {"credits": packed(judged), "advice": advice(judged.verdict, config, run.metrics())}
    if result.origin is not None:
        first, last = (line for line in run.metrics() if "retrieval_top1" in line and line["step"] in (0, result.steps))
        summary["origin"] = cast(Origin, result.origin)
        summary |= {"retrieval_top1_first": first["retrieval_top1"], "retrieval_top1_last": last["retrieval_top1"]}
    if strata:
        summary["strata"] = {name: each.verdict.model_dump() for name, each in strata.items()}
    if crossings:
        summary["crossings"] = {name: each.model_dump() for name, each in crossings.items()}
    if optimum is not None:
        summary["optimum"] = optimum
    card.report(run, summary, config.data).write(run.report)
    run.write_summary(summary)  # last: its presence says that the run is finished
    return summary


def weights_of_init(config: PretrainConfig, model: NEPA, run: Run, *, say: bool) -> Origin | None:
    """Begin with the weights of `init=`; a run that has a checkpoint goes on with that, whatever became of those.

    Args:
        say: which tensors were taken.
    """
    if config.init is None or load_latest(run.checkpoints)[0] is not None:
        return None
    found = begin_from(config.init, model, config.model, config.data)
    if say:
        say_progress(origin_line(found))
    return found


def load_pretrained(
    run: Run, device: torch.device, changes: Mapping[str, Any] | None = None
) -> tuple[PretrainConfig, NEPA]:
    """The config of a run and its network in evaluation mode, with the averaged weights where there are any.

    What it predicts is behind the prediction head of the run, if any; hidden states are those before it.

    Args:
        changes: to the config, such as where the data lies now.

    Raises:
        UserError: the folder holds no run, or a run without an undamaged checkpoint, or a change does not fit.
    """
    config = override(run.load_config(PretrainConfig), changes or {})
    checkpoint = newest(run)
    model = build_model(config, predicts=True)
    try:
        model.load_state_dict(current_weights(checkpoint) | prediction_head_in(checkpoint))
    except RuntimeError as error:
        data = "".join(f"{key}={shown(value)}: " for key, value in (changes or {}).items() if key.startswith("data."))
        raise UserError(
            f"{data}the weights of {run.path} do not fit the network that its config builds now: "
            f"{' '.join(str(error).split())[:300]}; leave the change out, or give the earlier code back"
        ) from error
    return config, model.to(device).eval()


def make_step(config: PretrainConfig, progress: float = 0.0) -> StepFunction:
    """The step function of pre-training: batch -> loss of the configured objective.

    Args:
        progress: share of the run that is done, see `Modality.at`.
    """
    objective, rescale, data = config.objective, config.model.rope_rescale, config.data.at(progress)

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        tokens, _, broken = replace_broken(data.read(batch), batch)
        out = model(
            tokens,
            causal=objective.causal,
            hidden=draw_hidden(tokens, objective.input_mask),
            coord_scale=draw_coord_scale(rescale),
        )
        loss = objective_loss(objective, out, gather=gather_samples)
        count = pair_count(out.predictions, out.mask, shift=objective.shift)
        return StepOutput(loss, count, tokens.real_count(), broken)

    return step


def draw_hidden(tokens: Tokens, share: float) -> Tensor | None:
    """Which inputs the mask token replaces, [B, N] bool, each independently with this probability; None for none."""
    if share == 0:
        return None
    return torch.rand(tokens.values.shape[:2], device=tokens.values.device) < share
