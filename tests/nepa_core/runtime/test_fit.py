"""The fit loop: what a step does, what is skipped, and that a resumed run is the uninterrupted one bit for bit."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from nepa_core.basics import Batch, UserError
from nepa_core.ema import Ema
from nepa_core.model import layers_above
from nepa_core.runtime import fit as fit_module
from nepa_core.runtime.checkpoint import Checkpoint, load_latest
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import Interrupted, StepFunction, StepOutput, plan, samples_at_once, update
from nepa_core.runtime.meter import Meter
from nepa_core.runtime.optim import (
    Duration,
    LayerDecay,
    OptimConfig,
    lr_factor,
    make_optimizer,
    parameter_groups,
    set_rates,
)
from nepa_core.runtime.run import Run
from recipes.configs import PretrainConfig
from recipes.training.judging import held_out_health
from recipes.training.pretraining import make_step, pretrain
from recipes.training.starting import build_model
from tests import tiny
from tests.tiny import CPU, Series, interrupted_at, training


def metrics(folder: Path, key: str = "loss") -> dict[int, Any]:
    """Step -> value of the lines that have that key."""
    return {line["step"]: line[key] for line in Run(folder).metrics() if key in line}


def stored(folder: Path) -> dict[str, bytes]:
    """Everything that a resumed run must repeat: the newest checkpoint's tensors, and the metrics."""
    newest = max((folder / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), folder / "metrics.jsonl"]
    assert len(files) == 5
    return {newest.name + "/" + file.name: file.read_bytes() for file in files}


# ---------------------------------------------------------------------------------------------- one step


def test_the_loss_goes_down_on_training_and_held_out_data(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    config = override(tiny_recipe, {"train.length.steps": 40, "data.samples": 96, "optim.lr": 1e-2})
    model, ema, _ = training(config, tmp_path)
    loss, held_out = metrics(tmp_path), metrics(tmp_path, "held_out_objective")
    assert loss[39] < loss[3] - 0.1
    assert held_out[40] < held_out[0]
    untrained = dict(build_model(config).named_parameters())
    for name, value in model.named_parameters():
        assert not torch.equal(value, untrained[name]), f"{name} was trained"
        assert not torch.equal(value, ema.averages[name])


@pytest.mark.parametrize("recipe", [tiny.recipe, tiny.ragged])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_train_as_the_whole_batch_does(
    tmp_path: Path, recipe: Callable[[], PretrainConfig], micro_batch: int
) -> None:
    whole, _, at_once = training(recipe(), tmp_path / "whole")
    config = override(recipe(), {"train.micro_batch": micro_batch})
    parts, _, result = training(config, tmp_path / "parts", step=_held(make_step(config), micro_batch))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    for key in ("loss", "grad_norm"):
        expected = metrics(tmp_path / "whole", key)
        assert metrics(tmp_path / "parts", key) == pytest.approx(expected, rel=1e-4)
    assert result.tokens == at_once.tokens
    if recipe is tiny.recipe:
        assert result.tokens == 12 * 8 * 6


def _held(step: StepFunction, size: int) -> StepFunction:
    """The step function, watching how many samples it is given."""

    def watched(model: nn.Module, batch: Batch) -> StepOutput:
        assert len(batch["values"]) == size
        return step(model, batch)

    return watched


def _two_networks() -> tuple[nn.Module, nn.Module]:
    config = tiny.recipe()
    return build_model(config), build_model(config)


def _set_gradients(model: nn.Module, scale: float) -> None:
    for value in model.parameters():
        value.grad = scale * torch.randn_like(value)


def test_an_update_is_division_clipping_and_adamw() -> None:
    optim = tiny.recipe().optim.model_copy(update={"clip": 2.0, "weight_decay": 0.3})
    fused, plain = _two_networks()
    optimizer = make_optimizer(fused, optim)
    reference = torch.optim.AdamW(parameter_groups(plain, 0.3, lambda _: 0), betas=optim.betas, fused=False)
    parameters = list(fused.parameters())
    for scale, lr in ((1.0, 1e-2), (5.0, 3e-2), (0.001, 2e-2), (0.5, 1e-2)):  # some are clipped, one is not
        _set_gradients(fused, 7 * scale)
        for value, other in zip(parameters, plain.parameters(), strict=True):
            assert value.grad is not None
            other.grad = value.grad / 7
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 2.0)
        for group in reference.param_groups + optimizer.param_groups:
            group["lr"] = lr
        reference.step()
        norm, skipped = update(optimizer, parameters, weight=torch.tensor(7.0), clip=2.0)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert skipped == 0
        assert all(value.grad is None for value in parameters)
    for value, other in zip(parameters, plain.parameters(), strict=True):
        assert torch.allclose(value, other, atol=2e-6)


def test_without_clip_large_gradients_are_left_alone() -> None:
    states = []
    for clip in (None, 1.0):
        model, _ = _two_networks()
        optimizer = make_optimizer(model, tiny.recipe().optim)
        torch.manual_seed(0)
        _set_gradients(model, 100.0)
        update(optimizer, list(model.parameters()), weight=torch.tensor(1.0), clip=clip)
        states.append(optimizer.state[next(model.parameters())]["exp_avg"].norm().item())
    assert states[0] > 10 * states[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad: float, clip: float | None) -> None:
    model, _ = _two_networks()
    optimizer = make_optimizer(model, tiny.recipe().optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    parameters = list(model.parameters())
    _set_gradients(model, 1.0)
    update(optimizer, parameters, weight=torch.tensor(1.0), clip=clip)
    before = _copy(model, optimizer)
    _set_gradients(model, 1.0)
    gradient = parameters[3].grad
    assert gradient is not None
    gradient.view(-1)[0] = bad
    _, skipped = update(optimizer, parameters, weight=torch.tensor(1.0), clip=clip)
    assert skipped == 1
    assert all(map(torch.equal, before, _copy(model, optimizer)))
    _set_gradients(model, 1.0)
    update(optimizer, parameters, weight=torch.tensor(1.0), clip=clip)
    assert not any(map(torch.equal, before, _copy(model, optimizer))), "and the next step works again"


def _copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [value.detach().clone() for value in [*model.parameters(), *state]]


def _broken_at(calls: set[int], step: StepFunction) -> StepFunction:
    """The step function, with a loss that is not a number at these calls (from 1)."""
    count = 0

    def breaking(model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal count
        count += 1
        out = step(model, batch)
        return out._replace(loss=out.loss * math.nan) if count in calls else out

    return breaking


def test_broken_steps_are_counted_and_stay_out_of_the_means(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    training(tiny_recipe, tmp_path / "whole")
    model, ema, _ = training(tiny_recipe, tmp_path / "broken", step=_broken_at({5, 6}, make_step(tiny_recipe)))
    assert metrics(tmp_path / "broken", "skipped_steps") == {3: 0, 6: 2, 9: 0, 12: 0}
    whole, broken = metrics(tmp_path / "whole"), metrics(tmp_path / "broken")
    assert whole[3] == broken[3]
    assert all(math.isfinite(value) for value in broken.values())
    assert all(value.isfinite().all() for value in [*model.parameters(), *ema.averages.values()])


def test_a_whole_interval_of_broken_steps_stops_the_run(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    step = _broken_at({7, 8, 9}, make_step(tiny_recipe))
    with pytest.raises(UserError, match=r"the last 3 steps up to step 9 .* not finite: lower optim.lr"):
        training(tiny_recipe, tmp_path, step=step)
    checkpoint, _ = load_latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert all(value.isfinite().all() for tensors in checkpoint.tensors.values() for value in tensors.values())


def test_measurements_come_at_their_steps(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    """Before the first step, every five, and after the last."""
    own: list[Tensor] = []
    seen: list[Tensor] = []

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        own.append(next(model.parameters()).detach().clone())
        return make_step(tiny_recipe)(model, batch)

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(next(model.parameters()).detach().clone())
        return {"measured": len(seen)}

    model, _, _ = training(tiny_recipe, tmp_path, step=step, evaluate=evaluate)
    own.append(next(model.parameters()).detach())
    assert metrics(tmp_path, "measured") == {0: 1, 5: 2, 10: 3, 12: 4}
    assert all(torch.equal(value, own[done]) for value, done in zip(seen, (0, 5, 10, 12), strict=True))


def test_the_health_of_a_run_is_that_of_the_averaged_weights(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    model, ema, _ = training(tiny_recipe, tmp_path)
    world = World(0, 1, torch.device("cpu"))
    before = next(model.parameters()).clone()
    averaged, raw = (held_out_health(tiny_recipe, model, world, each) for each in (ema, None))
    assert torch.equal(next(model.parameters()), before)
    assert averaged != raw
    for name, value in model.named_parameters():
        value.data = ema.averages[name]
    assert held_out_health(tiny_recipe, model, world, None) == averaged
    assert held_out_health(tiny_recipe, model, world._replace(rank=1), None) == {}


# ---------------------------------------------------------------------------------------------- the plan


OPTIM = OptimConfig(
    lr=0.5, lr_batch=None, betas=(0.9, 0.95), weight_decay=0.1, warmup=Duration(fraction=0.25), clip=None
)


def test_the_schedule_rises_linearly_and_falls_along_a_cosine_to_zero() -> None:
    factors = [lr_factor(step, warmup=4, total=12) for step in range(13)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0], "the first step is at rate 0, as in the released scripts"
    assert factors[8] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0.5 - 0.5 * math.sqrt(0.5))
    assert factors[12] == pytest.approx(0.0)
    assert sorted(factors[4:], reverse=True) == factors[4:]
    assert lr_factor(0, warmup=0, total=1) == 1.0


@pytest.mark.parametrize(("schedule", "halfway"), [("linear", 0.5), ("poly", 0.5**0.9)])
def test_other_decays_fall_from_the_peak_to_zero(schedule: str, halfway: float) -> None:
    factors = [lr_factor(step, warmup=4, total=12, schedule=schedule) for step in range(13)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert factors[8] == pytest.approx(halfway)
    assert factors[12] == 0.0


def test_layer_decay_follows_the_number_of_layers_above() -> None:
    """Written out for a network of two blocks: the paper's rate rises to 1, the released one stays.

    Here in the numbering of BEiT and MAE; tests/house/test_recipe_rates.py has that of the released scripts.
    """
    model = nn.ModuleDict({"backbone": build_model(tiny.random()), "head": nn.Linear(2, 2)})
    heights = {name: layers_above(name, 2, head_counts=True) for name, _ in model.named_parameters()}
    below = {name: layers_above(name, 2, head_counts=False) for name in heights}
    assert below == {name: max(height - 1, 0) for name, height in heights.items()}
    assert {name: height for name, height in heights.items() if height not in (1, 2)} == {
        "backbone.bos": 3,
        "backbone.mask_token": 3,
        "backbone.embed.weight": 3,
        "backbone.embed.bias": 3,
        "backbone.predictor.norm.weight": 0,
        "backbone.predictor.norm.bias": 0,
        "head.weight": 0,
        "head.bias": 0,
    }
    assert {height for name, height in heights.items() if ".blocks.0." in name} == {2}
    assert {height for name, height in heights.items() if ".blocks.1." in name} == {1}
    for name in ("embed.blocks.0.weight", "backbone.embed.blocks.14.bias", "embed.blocks.conv.weight"):
        assert layers_above(name, 2, head_counts=True) == 3, "an embedder may have blocks of its own"

    def rates(decay: LayerDecay, step: int, warmup: int) -> dict[int, float]:
        optim = OPTIM.model_copy(update={"layer_decay": decay, "schedule": "linear"})
        optimizer = make_optimizer(model, optim, lambda name: layers_above(name, 2, head_counts=True))
        assert len(optimizer.param_groups) == 8, "four heights, matrices and vectors"
        top = set_rates(optimizer, optim, peak=2.0, step=step, total=11, warmup=warmup)
        found = {group["height"]: group["lr"] for group in optimizer.param_groups}
        assert top == found[0], "what is logged is the rate of the topmost layers"
        return found

    rising = LayerDecay(start=0.5, end=1.0, staggered_warmup=False)
    assert rates(rising, 0, 0) == pytest.approx({0: 2.0, 1: 1.0, 2: 0.5, 3: 0.25})
    third = 0.75 - 0.25 * math.cos(math.pi * 4 / 11)  # half a cosine from 0.5 to 1.0
    assert rates(rising, 4, 0) == pytest.approx({h: 2 * (1 - 4 / 11) * third**h for h in range(4)})
    last = 0.75 + 0.25 * math.cos(math.pi / 11)
    assert rates(rising, 10, 0) == pytest.approx({h: 2 * (1 - 10 / 11) * last**h for h in range(4)})
    staggered = LayerDecay(start=0.5, end=0.5, staggered_warmup=True)
    steps = {0: 1, 1: 4, 2: 6, 3: 7}  # 8 * (1 - 0.5 ** height), at least one
    expected = {h: 2 * 0.5**h * lr_factor(3, warmup=w, total=11, schedule="linear") for h, w in steps.items()}
    assert rates(staggered, 3, 8) == pytest.approx(expected)
    assert expected[3] == pytest.approx(2 * 0.125 * 3 / 7)
    assert rates(staggered, 0, 0) == pytest.approx({h: 2 * 0.5**h for h in range(4)}), "no warm-up is none"


def test_the_run_uses_the_schedule_and_the_scaled_peak(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    config = override(tiny_recipe, {"optim.lr_batch": 4, "optim.warmup.steps": 5, "train.log": 1})
    training(config, tmp_path)
    expected = {step + 1: 2 * 3e-3 * lr_factor(step, warmup=5, total=12) for step in range(12)}
    assert metrics(tmp_path, "lr") == pytest.approx(expected)
    assert metrics(tmp_path, "epoch") == pytest.approx({step: step / 6 for step in range(1, 13)})


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [
        (Duration(steps=7), 7),
        (Duration(epochs=1.5), 15),
        (Duration(fraction=0.25), 10),
        (Duration(fraction=0.251), 11),
        (Duration(steps=0), 0),
        (Duration(epochs=50), 40),
    ],
)
def test_warmup_in_any_unit_becomes_steps_and_is_never_longer_than_the_run(warmup: Duration, steps: int) -> None:
    train = tiny.recipe().train.model_copy(update={"length": Duration(epochs=4)})
    found = plan(train, OPTIM.model_copy(update={"warmup": warmup}), samples=87, ranks=1)
    assert (found.total, found.warmup, found.per_epoch, found.accumulate) == (40, steps, 10, 1)


@pytest.mark.parametrize(("lr_batch", "peak"), [(None, 0.5), (8, 0.5), (256, 0.5 / 32)])
def test_the_peak_rate_follows_the_global_batch_where_it_is_meant_for_one(lr_batch: int | None, peak: float) -> None:
    optim = OPTIM.model_copy(update={"lr_batch": lr_batch})
    assert plan(tiny.recipe().train, optim, samples=80, ranks=1).peak_lr == peak


@pytest.mark.parametrize(("micro_batch", "ranks", "accumulate"), [(None, 1, 1), (2, 1, 4), (2, 2, 2), (99, 2, 1)])
def test_accumulation_follows_from_the_micro_batch(micro_batch: int | None, ranks: int, accumulate: int) -> None:
    train = tiny.recipe().train.model_copy(update={"micro_batch": micro_batch})
    assert plan(train, OPTIM, samples=80, ranks=ranks).accumulate == accumulate


@pytest.mark.parametrize(
    ("changes", "samples", "ranks", "said"),
    [
        ({}, 7, 1, "train.batch=8 is more than the 7 training samples"),
        ({}, 80, 3, "train.batch=8 is not a multiple of the 3 processes; set train.batch=6 or 9"),
        ({}, 80, 9, "train.batch=8 is not a multiple of the 9 processes; set train.batch=9"),
        (
            {"micro_batch": 3},
            80,
            1,
            "train.micro_batch=3 does not divide the 8 samples each process gets; set train.micro_batch=2",
        ),
        (
            {"micro_batch": 3},
            80,
            2,
            "train.micro_batch=3 does not divide the 4 samples each process gets; set train.micro_batch=2",
        ),
        ({"length": Duration(fraction=0.5)}, 80, 1, "train.length is the whole run"),
        ({"length": Duration(steps=0)}, 80, 1, "train.length is 0 steps"),
        ({"length": Duration(epochs=0.01)}, 80, 1, "train.length is 0 steps"),
    ],
)
def test_a_plan_that_does_not_fit_names_its_key(changes: dict[str, Any], samples: int, ranks: int, said: str) -> None:
    with pytest.raises(UserError) as raised:
        plan(tiny.recipe().train.model_copy(update=changes), OPTIM, samples=samples, ranks=ranks)
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "near"),
    [(4096, None, 7, (4095, 4102)), (4096, 512, 7, (3584, 7168)), (10, 4, 3, (9, 12)), (4, 2, 5, (5,))],
)
def test_the_batches_that_are_named_instead_fit(
    batch: int, micro_batch: int | None, ranks: int, near: tuple[int, ...]
) -> None:
    train = tiny.recipe().train.model_copy(update={"batch": batch, "micro_batch": micro_batch})
    with pytest.raises(UserError, match=f"set train.batch={' or '.join(map(str, near))}$"):
        samples_at_once(train, ranks=ranks)
    for each in near:
        assert samples_at_once(train.model_copy(update={"batch": each}), ranks=ranks) > 0


def test_vectors_do_not_decay_and_matrices_do() -> None:
    model = build_model(tiny.random())
    groups = parameter_groups(model, 0.3, lambda _: 0)
    names = {value: name for name, value in model.named_parameters()}
    found = {group["weight_decay"]: {names[value] for value in group["params"]} for group in groups}  # type: ignore
    assert found.keys() == {0.3, 0.0}
    assert found[0.3] | found[0.0] == set(names.values())
    block = "predictor.blocks.0."
    assert found[0.0] >= {f"{block}scale1", f"{block}norm1.weight", f"{block}attention.qkv.bias", "embed.bias"}
    assert found[0.3] >= {f"{block}attention.qkv.weight", "embed.weight", "bos"}


# -------------------------------------------------------------------------------------------- exact resume


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(
    tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(tiny_recipe, tmp_path / "plain")
    steps, lengths, save, make = 0, list[int](), fit_module.save_checkpoint, make_step(tiny_recipe)

    def counted(model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal steps
        steps += 1
        return make(model, batch)

    def slow(*given: Any, **how: Any) -> Path:
        began = steps
        while steps < min(began + 3, 12):
            time.sleep(0.001)
        lengths.append(steps - began)
        return save(*given, **how)

    monkeypatch.setattr(fit_module, "save_checkpoint", slow)
    training(tiny_recipe, tmp_path / "slow", step=counted)
    assert lengths[0] >= 3
    assert stored(tmp_path / "slow") == stored(tmp_path / "plain")
    found, expected = (load_latest(tmp_path / name / "checkpoints", 8)[0] for name in ("slow", "plain"))
    assert found is not None
    assert expected is not None
    for group, tensors in expected.tensors.items():
        assert all(torch.equal(found.tensors[group][key], value) for key, value in tensors.items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    training(tiny.random(), folder)
    return stored(folder)


def in_sittings(config: PretrainConfig, folder: Path, sittings: list[int]) -> dict[str, bytes]:
    """Train with a Ctrl-C in the last of that many calls of the step function, then to the end."""
    done = 0
    for calls in sittings:
        done += calls * (config.train.micro_batch or config.train.batch) // config.train.batch
        with pytest.raises(Interrupted, match=f"stopped after step {done} of 12; the same command") as raised:
            training(config, folder, step=interrupted_at({calls}, make_step(config)))
        assert raised.value.status == 130
        assert (folder / "checkpoints" / f"step_{done:08d}").exists()
    training(config, folder)
    return stored(folder)


@pytest.mark.parametrize("sittings", [[7], [1, 4, 2, 4]])
def test_a_run_in_sittings_is_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, uninterrupted: dict[str, bytes], sittings: list[int]
) -> None:
    assert in_sittings(tiny.random(), tmp_path, sittings) == uninterrupted


def test_a_run_in_sittings_with_other_workers_checkpoints_and_recomputing_is_still_the_same(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    with pytest.raises(Interrupted):
        training(tiny.random(), tmp_path, step=interrupted_at({5}, make_step(tiny.random())))
    free = {
        "train.workers": 2,
        "train.checkpoint": 5,
        "train.keep": 1,
        "train.max_unreadable": 0.5,
        "train.recompute": True,
    }
    training(override(tiny.random(), free), tmp_path)
    assert stored(tmp_path) == uninterrupted


def test_sittings_may_break_off_between_micro_batches(tmp_path: Path) -> None:
    config = override(tiny.random(), {"train.micro_batch": 2, "train.ema": 0.5})
    training(config, tmp_path / "whole")
    folder = tmp_path / "parts"
    for calls, done in ((7, 2), (10, 5)):  # in the third of four, and in the second
        with pytest.raises(Interrupted, match=f"stopped after step {done} of 12"):
            training(config, folder, step=interrupted_at({calls}, make_step(config)))
    training(config, folder)
    assert stored(folder) == stored(tmp_path / "whole")


def test_a_stop_asked_for_while_measuring_comes_after_the_next_step(
    tmp_path: Path, tiny_recipe: PretrainConfig
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def evaluate(_: nn.Module) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted, match="stopped after step 1 of 12") as raised:
        training(tiny_recipe, tmp_path, evaluate=evaluate)
    assert raised.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before, "the handlers of before are back"


@pytest.mark.parametrize("last", ["step", "evaluation", "checkpoint"])
def test_a_stop_asked_for_at_the_end_is_not_lost(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """In the last step, in the measuring after it and while its checkpoint is written: what follows is not begun."""
    config, before = tiny.random(), signal.getsignal(signal.SIGINT)
    save, health = fit_module.save_checkpoint, held_out_health
    measured = 0

    def stopped_saving(folder: Path, checkpoint: Checkpoint, **how: Any) -> Path:
        if checkpoint.step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return save(folder, checkpoint, **how)

    def stopped_measuring(*given: Any) -> Any:
        nonlocal measured
        measured += 1
        if measured == 4:  # at 0, 5, 10 and 12
            os.kill(os.getpid(), signal.SIGINT)
        return health(*given)

    step = None
    if last == "step":
        step = interrupted_at({12}, make_step(config))
    elif last == "evaluation":
        monkeypatch.setattr(tiny, "held_out_health", stopped_measuring)
    else:
        monkeypatch.setattr(fit_module, "save_checkpoint", stopped_saving)
    with pytest.raises(Interrupted, match="after the last of 12 steps, which are kept") as raised:
        training(config, tmp_path, step=step)
    assert raised.value.status == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert stored(tmp_path) == uninterrupted
    monkeypatch.undo()
    _, _, result = training(config, tmp_path)
    assert result.steps == 12
    assert stored(tmp_path) == uninterrupted


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    def step(model: nn.Module, batch: Batch) -> StepOutput:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        training(tiny_recipe, tmp_path, step=step)


def test_a_stop_is_told_from_one_process_to_another() -> None:
    told = pickle.loads(pickle.dumps(Interrupted("stopped after step 3", 143)))
    assert (str(told), told.status) == ("stopped after step 3", 143)


class PowerCut(Exception):
    pass


def cut_at(call: int, step: StepFunction) -> StepFunction:
    """The step function, ending without warning at a call (from 1)."""
    count = 0

    def cutting(model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal count
        count += 1
        if count == call:
            raise PowerCut
        return step(model, batch)

    return cutting


@pytest.mark.parametrize(("calls", "refused"), [(1, 5), (2, 10), (3, 12)])
def test_steps_before_held_out_data_that_can_not_be_read_are_kept(
    tmp_path: Path,
    uninterrupted: dict[str, bytes],
    calls: int,
    refused: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And measured first of all, once they can: with the data mended the run is the uninterrupted one."""
    measured: list[int] = []

    def refusing(*given: Any) -> Any:
        measured.append(1)
        if len(measured) > calls:
            raise UserError("at least 1 unreadable held-out sample")
        return health(*given)

    health = tiny.held_out_health
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "held_out_health", refusing)
        for _ in range(2):  # the second time at once
            with pytest.raises(UserError, match="unreadable held-out"):
                training(tiny.random(), tmp_path)
            assert max((tmp_path / "checkpoints").iterdir()).name == f"step_{refused:08d}"
    assert len(measured) == calls + 2
    assert capsys.readouterr().err.count(f"the {refused} steps so far are kept") == 1
    training(tiny.random(), tmp_path)
    assert stored(tmp_path) == uninterrupted


def test_lines_written_after_the_last_checkpoint_are_computed_again(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    with pytest.raises(PowerCut):
        training(tiny.random(), tmp_path, step=cut_at(12, make_step(tiny.random())))
    assert max(metrics(tmp_path)) == 9, "one line more than the checkpoint of step 8 knows"
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "he')
    training(tiny.random(), tmp_path)
    assert stored(tmp_path) == uninterrupted


def test_a_cut_before_the_first_checkpoint_starts_again(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    with pytest.raises(PowerCut):
        training(tiny.random(), tmp_path, step=cut_at(4, make_step(tiny.random())))
    training(tiny.random(), tmp_path)
    assert stored(tmp_path) == uninterrupted


def test_a_finished_training_stays_as_it_is(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    first, _, result = training(tiny.random(), tmp_path)
    again, ema, resumed = training(tiny.random(), tmp_path, step=cut_at(1, make_step(tiny.random())))
    assert stored(tmp_path) == uninterrupted
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert (resumed.steps, resumed.tokens) == (result.steps, result.tokens) == (12, 12 * 8 * 6)
    assert isinstance(ema, Ema)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, uninterrupted: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        training(tiny.random(), tmp_path, step=interrupted_at({10}, make_step(tiny.random())))
    damaged = tmp_path / "checkpoints" / "step_00000010"
    (damaged / "ema.safetensors").write_bytes(b"")
    training(tiny.random(), tmp_path)
    assert stored(tmp_path) == uninterrupted
    said = capsys.readouterr().err.splitlines()
    assert f"checkpoint {damaged} is damaged: ema.safetensors is not as it was written" in said[-2]
    assert said[-1] == "going on after step 8"


def test_where_every_checkpoint_is_damaged_none_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        training(tiny.random(), tmp_path, step=interrupted_at({10}, make_step(tiny.random())))
    damaged = sorted((tmp_path / "checkpoints").iterdir())
    for folder in damaged:
        (folder / "ema.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint of .* can be read.* put the damaged files back, name another"):
        training(tiny.random(), tmp_path)
    said = capsys.readouterr().err
    assert all(f"checkpoint {folder} is damaged" in said for folder in damaged)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- the run folder


def test_another_config_in_the_same_folder_lists_every_key_that_differs(
    tmp_path: Path, tiny_recipe: PretrainConfig
) -> None:
    training(tiny_recipe, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = override(tiny_recipe, {"optim.lr": 1e-3, "data.jitter": 0.5, "train.workers": 1})
    with pytest.raises(UserError) as raised:
        training(other, tmp_path)
    assert str(raised.value).startswith(
        f"{tmp_path} holds a run with another config: data.jitter 0.0 -> 0.5, optim.lr 0.003 -> 0.001; give it back"
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_that_computed_nothing_yet_takes_the_mended_config(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    with pytest.raises(UserError, match=r"train\.batch=500 is more than"):
        training(override(tiny_recipe, {"train.batch": 500}), tmp_path)
    training(tiny_recipe, tmp_path)
    assert Run(tmp_path).load_config(PretrainConfig) == tiny_recipe


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(UserError, match=f"{path} exists and is not a run folder"):
            Run(path).open(tiny_recipe)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "empty").open(tiny_recipe)


def test_metrics_that_lost_lines_are_not_filled_up(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    training(tiny_recipe, tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(UserError, match=f"{file} has lost lines"):
        training(tiny_recipe, tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        training(tiny_recipe, tmp_path)


def test_checkpoints_of_another_network_are_one_line(
    tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(tiny_recipe, tmp_path)
    monkeypatch.setattr(tiny.Waves, "embedder", lambda self, dim: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, dim)))
    with pytest.raises(UserError, match=f"the checkpoints of {tmp_path} are of another network"):
        training(tiny_recipe, tmp_path)


def test_unreadable_samples_count_over_all_sittings(tmp_path: Path, tiny_recipe: PretrainConfig) -> None:
    changes = {"data.unreadable": list(range(1, 9)), "train.max_unreadable": 0.5, "train.length.epochs": 1}
    config = override(tiny_recipe, changes)
    _, _, whole = training(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        training(config, tmp_path / "parts", step=interrupted_at({4}, make_step(config)))
    _, _, parts = training(config, tmp_path / "parts")
    assert whole.unreadable == parts.unreadable == [f"sample {i}: torn" for i in range(1, 9)]


def test_a_summary_is_none_until_it_is_written_whole(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.summary() is None
    run.write_summary({"loss": -0.5})
    assert run.summary() == {"loss": -0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").write_text('{"loss"')
    with pytest.raises(UserError, match=r"summary.json is not JSON .* delete it"):
        run.summary()


def test_the_bar_says_that_held_out_data_is_read_and_then_the_loss_again(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = functools.partial(Console, file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("nepa_core.runtime.meter.Console", lambda **_: console())
    with Meter(10, enabled=True) as meter:
        meter.note("loss 0.5")
        for busy in (True, False):
            screen.truncate(0)
            with meter.busy("held-out data") if busy else nullcontext():
                meter._bar.refresh()
            assert ("loss 0.5  held-out data" in screen.getvalue()) is busy
            assert "loss 0.5" in screen.getvalue()


def test_metrics_hold_no_wall_clock(uninterrupted: dict[str, bytes]) -> None:
    lines = [json.loads(line) for line in uninterrupted["step_00000012/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 5, 6, 9, 10, 12, 12]
    assert {key for line in lines for key in line if "second" in key or "time" in key} == set()


# ------------------------------------------------------------------------------- data that changed meanwhile


def test_data_that_changed_between_a_stop_and_its_resumption_is_refused(
    tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files were added: the order of the samples would be another. `data.changed=true` goes on."""
    with pytest.raises(Interrupted):
        training(tiny_recipe, tmp_path, step=interrupted_at({5}, make_step(tiny_recipe)))
    assert load_latest(tmp_path / "checkpoints")[0].state["data"] == "48 samples"
    monkeypatch.setattr(Series, "fingerprint", lambda self: "49 samples, 7 bytes", raising=False)
    with pytest.raises(UserError, match=r"changed since step 5 \(then 48 samples; now 49 .*data.changed=true"):
        pretrain(tiny_recipe, Run(tmp_path), World(0, 1, CPU), show=False)
    allowed = override(tiny_recipe, {"data.changed": True})
    assert pretrain(allowed, Run(tmp_path), World(0, 1, CPU), show=False)["steps"] == 12
    assert "changed" not in json.loads((tmp_path / "config.json").read_text())["data"]


def test_checkpoints_of_before_contents_were_looked_at_go_on(
    tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        training(tiny_recipe, tmp_path, step=interrupted_at({5}, make_step(tiny_recipe)))
    monkeypatch.setattr(Series, "fingerprint", lambda self: "48 samples; 0123", raising=False)
    assert training(tiny_recipe, tmp_path)[2].steps == 12


def test_checkpoints_of_before_say_nothing_of_the_data_and_go_on(
    tmp_path: Path, tiny_recipe: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(fit_module, "fingerprint_of", lambda dataset: None)
        with pytest.raises(Interrupted):
            training(tiny_recipe, tmp_path, step=interrupted_at({5}, make_step(tiny_recipe)))
    assert training(tiny_recipe, tmp_path)[2].steps == 12
