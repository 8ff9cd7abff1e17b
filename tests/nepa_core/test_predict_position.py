"""The target's position as an input: what it reaches, what it must not, and that an order of each sample needs it."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset

from modalities.image import Images, patch_centres
from modalities.orders import Ordered, padding_behind
from nepa_core import NEPA, PredictorConfig, Tokens
from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.model import layers_above
from nepa_core.objective import next_embedding_loss
from nepa_core.rope import rotary_table, rotate
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import Interrupted, StepFunction
from nepa_core.runtime.run import Run
from recipes.configs import PretrainConfig
from recipes.presets import small
from recipes.training.pretraining import make_step, pretrain
from recipes.training.starting import have_one_order, try_order
from recipes.vision import digits_2x2
from tests.tiny import CPU, SHAPE, training

SAMPLES, COUNT, RAW, DIM = 3, 6, 4, SHAPE["dim"]
LENGTHS = (6, 4, 2)
both = pytest.mark.parametrize("how", ["add", "rotate"])


def network(**changes: Any) -> NEPA:
    """A model far from its start, so that every input matters."""
    torch.manual_seed(0)
    model = NEPA(PredictorConfig(**(SHAPE | changes)), nn.Linear(RAW, DIM))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch(*, padded: bool = False) -> Tokens:
    draw = torch.Generator().manual_seed(1)
    values, coords = torch.randn(SAMPLES, COUNT, RAW, generator=draw), torch.rand(COUNT, 2, generator=draw)
    mask = torch.arange(COUNT) < torch.tensor(LENGTHS)[:, None] if padded else None
    return Tokens(values, coords, mask)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """[T], the largest difference at every place."""
    return (a - b).abs().amax((0, 2))


# ---- what a place is told


@both
@pytest.mark.parametrize("bos", [True, False])
def test_a_place_is_told_where_the_next_token_lies_and_nothing_of_those_after(how: str, bos: bool) -> None:
    model, tokens = network(predict_position=how, bos=bos), batch()
    before = model(tokens, causal=True)
    for token in range(1, COUNT):
        coords = tokens.coords.clone()
        coords[token] += 0.2
        after = model(Tokens(tokens.values, coords), causal=True)
        assert torch.equal(after.embeddings, before.embeddings)
        moved = distance(after.predictions, before.predictions)
        place = token - 1 + bos  # predicts this token
        assert (moved[:place] < 1e-6).all()
        if how == "add" or place > 0:  # rotated, a place that attends to one token alone learns nothing
            assert moved[place] > 1e-2


def test_added_the_position_also_reaches_the_first_prediction_and_rotated_it_can_not() -> None:
    tokens, coords = batch(), batch().coords.clone()
    coords[0] += 0.2
    first = {}
    for how in ("off", "add", "rotate"):
        model = network(predict_position=how)
        before, after = (model(Tokens(tokens.values, x), causal=True).predictions for x in (tokens.coords, coords))
        first[how] = distance(before, after)[0].item()
    assert first["add"] > 1e-2
    assert first["off"] == first["rotate"] == 0


@both
def test_the_content_of_the_next_token_stays_unseen(how: str) -> None:
    model, tokens = network(predict_position=how), batch()
    before = model(tokens, causal=True).predictions
    for token in range(COUNT):
        values = tokens.values.clone()
        values[:, token] += 1
        moved = distance(model(Tokens(values, tokens.coords), causal=True).predictions, before)
        assert (moved[: token + 1] < 1e-6).all()
        assert moved[token + 1] > 1e-2


def test_queries_are_turned_by_the_next_position_and_keys_by_their_own() -> None:
    """One layer without BOS against the scores written out."""
    model, tokens = network(predict_position="rotate", bos=False, depth=1, heads=1, attention="eager"), batch()
    attention = model.predictor.blocks[0].attention
    x = model.predictor.blocks[0].norm1(model.embed(tokens.values))
    q, k, v = attention.qkv(x).unflatten(-1, (3, 1, DIM)).permute(2, 0, 3, 1, 4)
    ahead = torch.cat((tokens.coords[1:], tokens.coords[-1:]))
    q = rotate(attention.q_norm(q), rotary_table(ahead, DIM, 100.0, device=CPU))
    k = rotate(attention.k_norm(k), rotary_table(tokens.coords, DIM, 100.0, device=CPU))
    scores = (q @ k.transpose(-2, -1) / DIM**0.5).masked_fill(~torch.ones(COUNT, COUNT).tril().bool(), -torch.inf)
    expected = attention.out((scores.softmax(-1) @ v)[:, 0])
    table = rotary_table(tokens.coords, DIM, 100.0, device=CPU)
    rope = model.predictor._rope(x, tokens.coords, 1.0, None, None)
    found = attention(x, rope, None, causal=True, allowed=None, trace=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    own = attention(x, table, None, causal=True, allowed=None, trace=None)
    assert (own - expected).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bos": False}, {"pack": True}, {"attention": "eager"}, {"qk_norm": "off"}])
@both
def test_padding_changes_nothing(how: str, settings: dict[str, Any], causal: bool) -> None:
    model, tokens = network(predict_position=how, **settings), batch(padded=True)
    together = model(tokens, causal=causal).predictions
    for row, length in enumerate(LENGTHS):
        alone = Tokens(tokens.values[row : row + 1, :length], tokens.coords[:length])
        expected = model(alone, causal=causal).predictions[0]
        torch.testing.assert_close(together[row, : len(expected)], expected, rtol=0, atol=1e-5)


@both
def test_an_order_of_each_sample_is_that_sample_in_its_own_order(how: str) -> None:
    model, tokens = network(predict_position=how), batch()
    orders = torch.stack([torch.randperm(COUNT, generator=torch.Generator().manual_seed(i)) for i in range(SAMPLES)])
    together = model(tokens.reordered(orders), causal=True, coord_scale=1.3).predictions
    for row, order in enumerate(orders):
        alone = Tokens(tokens.values[row : row + 1], tokens.coords * 1.3).reordered(order)
        torch.testing.assert_close(together[row], model(alone, causal=True).predictions[0], rtol=0, atol=1e-5)


# ---- weights


@both
def test_every_parameter_takes_part_also_where_activations_are_recomputed(how: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = network(predict_position=how)
        if recompute:
            model.predictor.recompute_blocks()
        out = model(batch(padded=True), causal=True)
        next_embedding_loss(out.predictions, out.embeddings, out.mask).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-6)


def test_the_other_weights_are_those_of_the_same_seed_without_it() -> None:
    def start(how: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return NEPA(PredictorConfig(**SHAPE, predict_position=how), nn.Linear(RAW, DIM)).state_dict()

    off, add = start("off"), start("add")
    assert add.keys() - off.keys() == {"next_position.weight"}
    assert start("rotate").keys() == off.keys()
    assert all(torch.equal(add[name], value) for name, value in off.items())
    assert layers_above("backbone.next_position.weight", depth=4, head_counts=True) == 5


@pytest.mark.slow
@both
def test_compiled_blocks_agree(how: str) -> None:
    model, tokens = network(predict_position=how), batch(padded=True)
    expected = model(tokens, causal=True).predictions[
        tokens.mask is None or nn.functional.pad(tokens.mask, (1, 0), value=True)
    ]
    model.predictor.compile_blocks()
    found = model(tokens, causal=True).predictions[
        tokens.mask is None or nn.functional.pad(tokens.mask, (1, 0), value=True)
    ]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- settings


def test_settings_from_before_are_off_and_rotating_needs_rope() -> None:
    assert PredictorConfig(**SHAPE).predict_position == "off"
    with pytest.raises(ValidationError, match=r"model\.predict_position=rotate turns queries by RoPE"):
        PredictorConfig(**(SHAPE | {"rope_theta": None}), predict_position="rotate")
    network(predict_position="add", rope_theta=None)(batch(), causal=True)


@pytest.mark.parametrize("order", ["random_per_sample", "random_annealed"])
def test_an_order_drawn_for_each_sample_needs_the_position_unless_it_is_forced(order: str) -> None:
    changes = {"data.patch_order": order}
    with pytest.raises(UserError, match=r"can't know which patch comes next.*objective\.unknown_target=true"):
        override(digits_2x2(), changes)
    for fix in ({"model.predict_position": "add"}, {"objective.unknown_target": True}):
        config = override(digits_2x2(), changes | fix)
        assert isinstance(config.data, Images)
        assert config.data.patch_order == order


def by_contrast(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    return tokens.values.var(-1).argsort(dim=1, descending=True)


def backwards(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    return torch.arange(tokens.values.shape[1]).flip(0).expand(tokens.values.shape[:2])


def test_so_does_a_function_of_ones_own_that_gives_each_sample_another() -> None:
    changes = {"data.patch_order": "tests.nepa_core.test_predict_position:by_contrast"}
    with pytest.raises(UserError, match="can't know which patch comes next"):
        try_order(override(digits_2x2(), changes))
    try_order(override(digits_2x2(), changes | {"model.predict_position": "add"}))
    try_order(override(digits_2x2(), changes | {"objective.unknown_target": True}))
    try_order(override(digits_2x2(), {"data.patch_order": "tests.nepa_core.test_predict_position:backwards"}))


def drawn_for_all(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    return torch.randperm(tokens.values.shape[1])


def drawn_aside(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    """Leaves torch's global generator where it was, so that a second call alone shows nothing."""
    with torch.random.fork_rng(devices=[]):
        return torch.randperm(tokens.values.shape[1])


def by_contrast_of_the_batch(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    return tokens.values.var(-1).mean(0).argsort(descending=True)


@pytest.mark.parametrize("name", ["drawn_for_all", "drawn_aside", "by_contrast_of_the_batch"])
def test_so_does_one_that_all_samples_of_a_batch_share_but_not_those_of_the_next(name: str) -> None:
    changes = {"data.patch_order": f"tests.nepa_core.test_predict_position:{name}"}
    torch.manual_seed(len(name))  # not what another test has left
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"differs between samples or batches needs model\.predict_position=add"):
        try_order(override(digits_2x2(), changes))
    try_order(override(digits_2x2(), changes | {"model.predict_position": "add"}))
    assert torch.equal(torch.get_rng_state(), state)


def backwards_but_for_padding(tokens: Tokens, grid: tuple[int, ...]) -> Tensor:
    assert tokens.mask is not None
    return padding_behind(torch.arange(tokens.values.shape[1]).flip(0), tokens.mask)  # type: ignore[return-value]


def test_padding_makes_no_other_order_of_a_shared_one() -> None:
    data = Patterns(patch_order="tests.nepa_core.test_predict_position:backwards_but_for_padding")
    values, mask = torch.randn(3, 9, 8), torch.arange(9) < torch.tensor([[9], [5], [9]])
    tokens = Tokens(values, patch_centres(3, 3), mask)
    assert have_one_order([tokens.reordered(data.order(tokens))])
    assert not have_one_order([tokens.reordered(order) for order in (torch.arange(9), torch.arange(9).flip(0))])


def test_an_order_that_does_not_fit_leaves_no_folder_behind(tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.arange(5))
    for name in (str(tmp_path / "short.npy"), "tests.nepa_core.test_predict_position:patterns"):
        config = patterns(data__patch_order=name)
        with pytest.raises(UserError, match=f"patch_order={name} "):
            pretrain(config, Run(tmp_path / "run"), World(0, 1, CPU), show=False)
        assert not (tmp_path / "run").exists()


# ---- training


class Patterns(Ordered, Modality):
    """Four patterns on a grid of 3 x 3, a random vector a cell, and noise: some tokens tell the pattern, and with the
    position of the next one that tells the next one."""

    def dataset(self, split: str) -> Dataset[Batch]:
        draw = torch.Generator().manual_seed(len(split))
        patterns = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0))
        noise = 0.3 * torch.randn(256, 9, 8, generator=draw)
        return [{"cells": patterns[i % 4] + noise[i]} for i in range(256)]  # type: ignore[return-value]

    def tokenize(self, batch: Batch) -> Tokens:
        return Tokens(batch["cells"], patch_centres(3, 3))

    def order(self, tokens: Tokens) -> Tensor | None:
        return self.ordered(tokens, (3, 3))


def patterns(**changes: Any) -> PretrainConfig:
    short = {
        "model.dim": 48,
        "model.depth": 2,
        "model.mlp_dim": 64,
        "optim.lr": 8e-3,
        "train.batch": 32,
        "train.ema": None,
        "train.evaluate": 1000,
        "verdict.health_samples": 16,
    }
    return override(small(Patterns()), short | {key.replace("__", "."): value for key, value in changes.items()})


def lift(folder: Path, **changes: Any) -> float:
    """Share of the way from the better mean (one for all, or one for each position of a target) to a perfect loss."""
    config = patterns(**changes, data__patch_order="random_per_sample", train__length__steps=300)
    found = pretrain(config, Run(folder), World(0, 1, CPU), show=False)
    baseline = min(found["baseline_mean"], found["baseline_position_mean"])
    return float((baseline - found["loss"]) / (1 + baseline))


@pytest.mark.slow
def test_per_sample_random_order_learns_with_the_targets_position_and_not_without(tmp_path: Path) -> None:
    """Without it a little is left: which pattern it is, which positions are to come. Measured .58, .56, .18."""
    assert lift(tmp_path / "add", model__predict_position="add") > 0.4
    assert lift(tmp_path / "rotate", model__predict_position="rotate") > 0.4
    assert lift(tmp_path / "off", objective__unknown_target=True) < 0.25


def annealed() -> PretrainConfig:
    return patterns(
        data__patch_order="random_annealed",
        model__predict_position="add",
        train__length__steps=8,
        train__checkpoint=3,
    )


def test_an_annealed_run_in_two_sittings_is_the_uninterrupted_run(tmp_path: Path) -> None:
    config, shares = annealed(), []

    def interrupted(progress: float) -> StepFunction:
        shares.append(progress)
        if len(shares) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return make_step(config, progress)

    step_at = partial(make_step, config)
    whole, *_ = training(config, tmp_path / "whole", step_at=step_at)
    with pytest.raises(Interrupted, match="after step 5"):
        training(config, tmp_path / "parts", step_at=interrupted)
    parts, *_ = training(config, tmp_path / "parts", step_at=interrupted)
    assert shares == [step / 8 for step in range(8)]
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    constant, *_ = training(config, tmp_path / "constant", step_at=lambda progress: make_step(config, 0.0))
    assert any(not torch.equal(value, constant.state_dict()[name]) for name, value in whole.state_dict().items())
