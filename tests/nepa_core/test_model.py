import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nepa_core import NEPA, PredictorConfig, Tokens
from nepa_core.basics import UserError
from nepa_core.model import draw_coord_scale
from nepa_core.predictor import Trace
from tests import tiny
from tests.tiny import SHAPE

SAMPLES, COUNT, RAW, DIM = 3, 6, 4, 16
SHARED_ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
ORDERS = torch.stack([SHARED_ORDER, SHARED_ORDER.roll(1), torch.arange(COUNT)])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)


def _model(**changes: Any) -> NEPA:
    """A model far from its start, so that every input matters."""
    torch.manual_seed(0)
    model = NEPA(PredictorConfig(**(SHAPE | changes)), nn.Linear(RAW, DIM))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def _tokens(*, per_sample: bool = False, mask: Tensor | None = None) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    coords = torch.rand(*([SAMPLES] if per_sample else []), COUNT, 2, generator=generator)
    return Tokens(torch.randn(SAMPLES, COUNT, RAW, generator=generator), coords, mask)


# ---------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("order", [SHARED_ORDER, ORDERS], ids=["shared", "per sample"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_one_order_moves_values_coordinates_and_mask(per_sample: bool, order: Tensor) -> None:
    tokens = _tokens(per_sample=per_sample, mask=MASK)
    moved = tokens.reordered(order)
    assert moved.mask is not None
    assert moved.coords.ndim == (3 if per_sample or order.ndim == 2 else 2)
    for b in range(SAMPLES):
        for place in range(COUNT):
            token = order[place] if order.ndim == 1 else order[b, place]
            coords = [c if c.ndim == 2 else c[b] for c in (moved.coords, tokens.coords)]
            assert torch.equal(moved.values[b, place], tokens.values[b, token])
            assert torch.equal(coords[0][place], coords[1][token])
            assert moved.mask[b, place] == MASK[b, token]


@pytest.mark.parametrize("order", [SHARED_ORDER, ORDERS], ids=["shared", "per sample"])
def test_canonical_undoes_the_order(order: Tensor) -> None:
    tokens = _tokens()
    moved = tokens.reordered(order)
    assert not torch.equal(moved.values, tokens.values)
    assert torch.equal(moved.canonical(moved.values), tokens.values)
    assert torch.equal(moved.canonical(moved.values[..., 0]), tokens.values[..., 0])
    assert tokens.canonical(tokens.values) is tokens.values


def test_an_order_is_applied_once() -> None:
    tokens = _tokens()
    assert tokens.reordered(None) is tokens
    moved = tokens.reordered(None).reordered(SHARED_ORDER)
    with pytest.raises(ValueError, match="applied once"):
        moved.reordered(SHARED_ORDER)


@pytest.mark.parametrize("order", [SHARED_ORDER, ORDERS], ids=["shared", "per sample"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "changes", [{}, {"bos": False}, {"learned_positions": COUNT}], ids=["bos", "no bos", "learned"]
)
def test_without_causality_the_order_does_not_matter(
    changes: dict[str, Any], mask: Tensor | None, order: Tensor
) -> None:
    """Rotary and learned positions, mask and content travel together, or this would break."""
    model, tokens = _model(**changes), _tokens(mask=mask)
    first = int(model.config.bos)
    moved = tokens.reordered(order)
    expected = model(tokens, causal=False).predictions[:, first:]
    found = moved.canonical(model(moved, causal=False).predictions[:, first:])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    causal = moved.canonical(model(moved, causal=True).predictions[:, first:])
    assert (causal - model(tokens, causal=True).predictions[:, first:]).abs().max() > 0.1


def test_orders_per_sample_equal_each_sample_in_its_own_order() -> None:
    model, tokens = _model(learned_positions=COUNT), _tokens()
    together = model(tokens.reordered(ORDERS), causal=True)
    for row, order in enumerate(ORDERS):
        alone = model(Tokens(tokens.values[row : row + 1], tokens.coords).reordered(order), causal=True)
        torch.testing.assert_close(together.predictions[row], alone.predictions[0], rtol=0, atol=1e-5)
        assert torch.equal(together.embeddings[row], alone.embeddings[0])


def test_shared_coordinates_stay_when_tokens_move_to_a_device() -> None:
    for per_sample in (False, True):
        moved = _tokens(per_sample=per_sample, mask=MASK).reordered(SHARED_ORDER).to(torch.device("meta"))
        assert moved.mask is not None
        assert moved.order is not None
        assert {moved.values.device.type, moved.mask.device.type, moved.order.device.type} == {"meta"}
        assert moved.coords.device.type == ("meta" if per_sample else "cpu")


# ------------------------------------------------------------------------------------------------- targets


def test_targets_are_content_alone() -> None:
    model, tokens = _model(learned_positions=COUNT), _tokens()
    before = model(tokens, causal=True)
    assert torch.equal(before.embeddings[:, 1:], model.embed(tokens.values))
    moved = model(Tokens(tokens.values, tokens.coords * 1.5), causal=True)
    scaled = model(tokens, causal=True, coord_scale=1.5)
    assert torch.equal(moved.embeddings, before.embeddings)
    assert torch.equal(scaled.embeddings, before.embeddings)
    assert (moved.predictions - before.predictions).abs().max() > 1e-3
    torch.testing.assert_close(scaled.predictions, moved.predictions, rtol=0, atol=1e-5)
    model.positions.data += torch.randn(COUNT, DIM)
    shifted = model(tokens, causal=True)
    assert torch.equal(shifted.embeddings, before.embeddings)
    assert (shifted.predictions - before.predictions).abs().max() > 0.1


def test_learned_positions_follow_the_canonical_index_and_skip_bos() -> None:
    model, tokens = _model(learned_positions=COUNT + 2), _tokens()
    for moved in (tokens, tokens.reordered(SHARED_ORDER), tokens.reordered(ORDERS)):
        trace = Trace()
        out = model(moved, causal=True, trace=trace)
        added = trace.hidden[0] - out.embeddings
        assert not added[:, 0].any()
        expected = model.positions[:COUNT].expand(SAMPLES, -1, -1)
        torch.testing.assert_close(moved.canonical(added[:, 1:]), expected, rtol=0, atol=1e-5)


def test_more_tokens_than_learned_positions_is_an_error_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.learned_positions=5 is less than the 6 tokens"):
        _model(learned_positions=5)(_tokens(), causal=True)


def test_bos_stands_in_front_and_is_always_real() -> None:
    model = _model()
    out = model(_tokens(mask=MASK), causal=True)
    assert torch.equal(out.embeddings[:, 0], model.bos.expand(SAMPLES, -1))
    assert out.mask is not None
    assert out.mask[:, 0].all()
    assert torch.equal(out.mask[:, 1:], MASK)
    without = _model(bos=False)(_tokens(mask=MASK), causal=True)
    assert without.predictions.shape == without.embeddings.shape == (SAMPLES, COUNT, DIM)
    assert without.mask is not None
    assert torch.equal(without.mask, MASK)


def test_padding_does_not_reach_real_tokens() -> None:
    model, tokens = _model(), _tokens(mask=MASK)
    out = model(tokens, causal=False)
    assert out.mask is not None
    values = torch.where(MASK[..., None], tokens.values, 100.0)
    garbage = model(Tokens(values, tokens.coords, MASK), causal=False).predictions
    torch.testing.assert_close(garbage[out.mask], out.predictions[out.mask], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- input masking


@pytest.mark.parametrize("bos", [True, False])
def test_hiding_replaces_inputs_and_never_targets(bos: bool) -> None:
    model, tokens, trace = _model(bos=bos, mask_token=True), _tokens(), Trace()
    hidden = torch.zeros(SAMPLES, COUNT, dtype=torch.bool)
    hidden[0, 2] = hidden[1, 0] = hidden[2, 3:] = True
    out = model(tokens, causal=False, hidden=hidden, trace=trace)
    inputs = trace.hidden[0][:, int(bos) :]
    assert torch.equal(out.embeddings, model(tokens, causal=False).embeddings)
    assert torch.equal(inputs[hidden], model.mask_token.expand(int(hidden.sum()), -1))
    assert torch.equal(inputs[~hidden], model.embed(tokens.values)[~hidden])
    if bos:
        assert torch.equal(trace.hidden[0][:, 0], model.bos.expand(SAMPLES, -1))
    other = Tokens(torch.where(hidden[..., None], torch.randn_like(tokens.values), tokens.values), tokens.coords)
    torch.testing.assert_close(model(other, causal=False, hidden=hidden).predictions, out.predictions)


def test_hiding_without_a_mask_token_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"model\.mask_token=true"):
        _model()(_tokens(), causal=True, hidden=MASK)


# ------------------------------------------------------------------------------------------------- the rest


def test_coordinate_scales_are_log_uniform() -> None:
    torch.manual_seed(0)
    drawn = [draw_coord_scale(2.0) for _ in range(4000)]
    assert 0.5 <= min(drawn) < 0.51
    assert 1.96 < max(drawn) <= 2.0
    assert statistics.quantiles(drawn, n=4) == pytest.approx([2**-0.5, 1.0, 2**0.5], rel=0.05)


def test_coordinate_scaling_off_draws_nothing() -> None:
    state = torch.get_rng_state()
    assert draw_coord_scale(1.0) == 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_embedder_and_learned_vectors_start_as_released() -> None:
    torch.manual_seed(0)
    config = _model(dim=256, learned_positions=64, mask_token=True).config
    model = NEPA(config, tiny.Waves(size=64).embedder(256))
    assert not model.embed.bias.any()
    for vectors in (model.embed.weight, model.bos, model.mask_token, model.positions):
        assert vectors.std().item() == pytest.approx(0.02, rel=0.15)
        assert abs(vectors.mean().item()) < 0.005
