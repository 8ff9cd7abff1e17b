"""A sequence gives the same predictions, loss and gradients alone, padded and packed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nepa_core.basics import Batch, UserError
from nepa_core.kernels.packing import pack_rows
from nepa_core.model import NEPA
from nepa_core.objective import next_embedding_loss
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import StepOutput
from nepa_core.tokens import Tokens
from recipes.training import bench
from recipes.training.pretraining import make_step
from recipes.training.starting import build_model
from tests import tiny

LENGTHS = (2, 9, 5, 1, 3, 4, 9, 6)


def batch(*, shared: bool = True, holes: bool = False, seed: int = 0) -> Tokens:
    """Sequences of unequal length, with loud padding."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    if holes:
        mask[1, 3] = mask[6, 0] = False
    values = torch.where(mask[..., None], torch.randn(8, 9, 4, generator=draw), 77.0)
    coords = torch.rand((9, 2) if shared else (8, 9, 2), generator=draw)
    return Tokens(values, coords, mask)


def network(**changes: Any) -> NEPA:
    config = tiny.recipe().model.model_copy(update={"pack": False, **changes})
    torch.manual_seed(0)
    return NEPA(config, nn.Linear(4, config.dim))


def alone(tokens: Tokens, sample: int) -> Tokens:
    """One sequence without its padding and the tokens it lacks."""
    assert tokens.mask is not None
    real = tokens.mask[sample]
    coords = tokens.coords if tokens.coords.ndim == 2 else tokens.coords[sample]
    return Tokens(tokens.values[sample, real][None], coords[real])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": "affine"}, {"attention": "eager"}, {"rope_theta": None}])
def test_alone_padded_and_packed_predict_the_same(
    causal: bool, bos: bool, shared: bool, changes: dict[str, Any]
) -> None:
    tokens = batch(shared=shared, holes=True)
    padded, packed = (network(bos=bos, pack=pack, **changes) for pack in (False, True))
    one, other = (model(tokens, causal=causal) for model in (padded, packed))
    assert one.mask is not None
    torch.testing.assert_close(other.predictions[one.mask], one.predictions[one.mask], atol=1e-5, rtol=1e-5)
    assert not other.predictions[~one.mask].any()
    for sample in range(len(LENGTHS)):
        single = packed(alone(tokens, sample), causal=causal).predictions[0]
        torch.testing.assert_close(other.predictions[sample, one.mask[sample]], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"drop_path": 0.5}, {"learned_positions": 9}])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_the_padded_batch(changes: dict[str, Any], recompute: bool) -> None:
    found = []
    for pack in (False, True):
        model = network(pack=pack, **changes).train()
        if recompute:
            model.predictor.recompute_blocks()
        torch.manual_seed(1)
        out = model(batch(), causal=True)
        loss = next_embedding_loss(out.predictions, out.embeddings, out.mask)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_real_predictions_of_the_sequences_alone() -> None:
    model, tokens = network(pack=True), batch()
    out = model(tokens, causal=True)
    together = next_embedding_loss(out.predictions, out.embeddings, out.mask)
    total = torch.zeros(())
    for sample, length in enumerate(LENGTHS):
        single = model(alone(tokens, sample), causal=True)
        total = total + length * next_embedding_loss(single.predictions, single.embeddings)  # BOS predicts, too
    torch.testing.assert_close(together, total / sum(LENGTHS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_no_place_of_a_row_sees_another_sequence(causal: bool) -> None:
    """The gradient of one sequence's predictions reaches its own tokens, and only those before under causality."""
    model = network(pack=True)
    tokens = batch()
    values = tokens.values.requires_grad_()
    for sample, length in enumerate(LENGTHS):
        place = length // 2
        out = model(Tokens(values, tokens.coords, tokens.mask), causal=causal).predictions
        (reached,) = torch.autograd.grad(out[sample, 1 + place, 0], values)
        seen = reached.abs().sum(-1) > 0
        expected = torch.zeros_like(seen)
        expected[sample, : place + 1 if causal else length] = True
        assert torch.equal(seen, expected)


def test_rows_hold_every_real_token_once_and_in_order() -> None:
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(61) < torch.randint(4, 62, (256, 1), generator=draw)
    packing = pack_rows(mask)
    real = packing.owner >= 0
    assert int(real.sum()) == int(mask.sum())
    assert real.float().mean() > 0.95, "hardly any padding is left"
    places = torch.arange(256 * 61).view(256, 61, 1).float()
    assert torch.equal(packing.unpack(packing.pack(places))[mask], places[mask])
    for owners, sources in zip(packing.owner.tolist(), packing.source.tolist(), strict=True):
        for (a, x), (b, y) in pairwise(zip(owners, sources, strict=True)):
            assert b == -1 or a != b or y == x + 1
    assert pack_rows(torch.ones(3, 5, dtype=torch.bool)).owner.shape == (3, 5)
    assert pack_rows(torch.zeros(2, 5, dtype=torch.bool)).owner.shape == (1, 1)


def test_rows_of_unequal_lengths_hold_far_less_padding() -> None:
    """What packing saves at lengths of 4 to 60, whatever the machine: the places that are computed."""
    lengths = torch.randint(4, 61, (64, 1), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(int(lengths.max())) < lengths
    packed = pack_rows(mask).owner
    assert mask.numel() / packed.numel() > 1.5
    assert packed.shape[1] == lengths.max()


def test_a_recipe_is_packed_by_one_key() -> None:
    padded, packed = (override(tiny.ragged(), {"model.pack": pack}) for pack in (False, True))
    samples = padded.data.dataset("train")
    data = torch.utils.data.default_collate([samples[i] for i in range(8)])
    widths: list[torch.Size] = []
    losses: list[Tensor] = []
    for config in (padded, packed):
        model = build_model(config)
        model.predictor.norm.register_forward_hook(lambda _, args, out: widths.append(out.shape))
        losses.append(make_step(config)(model, data).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    assert widths[1].numel() < widths[0].numel()


def test_bench_measures_packing_against_padding() -> None:
    ranks = World(0, 1, tiny.CPU)
    config = override(tiny.ragged(), {"data.tokens": 40, "train.batch": 48, "model.drop_path": 0.2})
    figures = bench.against_padding(config, bench.BenchOptions(repeats=2), ranks)
    assert 40 < figures["real tokens %"] < 70
    rate = "packed / padded rows, real tokens/s"
    assert figures[f"{rate}, lowest"] <= figures[rate] <= figures[f"{rate}, highest"]
    assert abs(figures["packed - padded rows, loss"]) < 1e-5
    with pytest.raises(UserError, match="no token of a batch is padding here"):
        bench.against_padding(tiny.recipe(), bench.BenchOptions(), ranks)


@pytest.mark.parametrize("pack", [False, True])
def test_the_rate_counts_real_tokens_only(tmp_path: Path, pack: bool) -> None:
    config = override(tiny.ragged(), {"model.pack": pack, "train.micro_batch": 4})
    masks: list[Tensor] = []
    step = make_step(config)

    def watched(model: nn.Module, samples: Batch) -> StepOutput:
        mask = config.data.read(samples).mask
        assert mask is not None
        masks.append(mask)
        return step(model, samples)

    result = tiny.training(config, tmp_path / "run", step=watched)[2]
    assert result.tokens == sum(int(mask.sum()) for mask in masks)
    assert result.tokens < sum(mask.numel() for mask in masks)
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert timing[-1]["tokens"] == result.tokens
