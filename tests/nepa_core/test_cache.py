"""Reading place by place with kept keys and values gives what one pass over the whole sequence gives."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nepa_core import NEPA, Predictor, PredictorConfig, Tokens
from nepa_core.ema import Ema
from nepa_core.predictor import Cache, Trace
from tests import tiny

COUNT, SAMPLES, RAW = 7, 3, 4
SHAPE = tiny.SHAPE | {"dim": 24, "depth": 3}
LAST = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
HOLES = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
ORDERS = {
    "canonical": None,
    "shared": torch.randperm(COUNT, generator=torch.Generator().manual_seed(3)),
    "own": torch.rand(SAMPLES, COUNT, generator=torch.Generator().manual_seed(4)).argsort(1),
}
MASKS = {"whole": None, "end": LAST, "holes": HOLES}


def network(**changes: Any) -> NEPA:
    """Far from its start, so that every parameter matters."""
    torch.manual_seed(0)
    model = NEPA(PredictorConfig(**(SHAPE | changes)), nn.Linear(RAW, SHAPE["dim"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def sequences(mask: Tensor | None = None, order: Tensor | None = None) -> Tokens:
    draw = torch.Generator().manual_seed(1)
    values, coords = torch.randn(SAMPLES, COUNT, RAW, generator=draw), torch.rand(COUNT, 2, generator=draw)
    return Tokens(values, coords, mask).reordered(order)


@torch.no_grad()
def in_pieces(model: NEPA, tokens: Tokens, sizes: list[int]) -> Tensor:
    """The predictions of a cached pass over so many places at a time, the rest one by one."""
    x, mask = model.embedded(tokens)
    for vectors in model.positional(tokens, mask):
        x = x + vectors
    sizes = sizes + [1] * (x.shape[1] - sum(sizes))
    cache = Cache(x.shape[1])
    parts = [model.predictor(part, tokens.coords, causal=True, mask=mask, cache=cache) for part in x.split(sizes, 1)]
    return torch.cat(parts, 1)


def check(model: NEPA, tokens: Tokens, sizes: list[int]) -> None:
    whole = model(tokens, causal=True)
    real = torch.ones(whole.predictions.shape[:2], dtype=torch.bool) if whole.mask is None else whole.mask
    torch.testing.assert_close(in_pieces(model, tokens, sizes)[real], whole.predictions[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])
def test_the_same_as_one_pass_in_every_order_under_every_mask(order: str, mask: str, bos: bool) -> None:
    tokens = sequences(MASKS[mask], ORDERS[order])
    for how, learned in itertools.product(("off", "add", "rotate"), (0, COUNT)):
        model = network(bos=bos, predict_position=how, learned_positions=learned)
        for sizes in ([], [3], [2, 4]):
            check(model, tokens, sizes)


SWITCHES = list(
    itertools.product(("off", "plain", "affine"), (None, 100.0), (None, 0.5), (False, True), ("sdpa", "eager"))
)


@pytest.mark.parametrize(("qk_norm", "theta", "scale", "gated", "backend"), SWITCHES)
def test_the_same_as_one_pass_with_every_switch(
    qk_norm: str, theta: float | None, scale: float | None, gated: bool, backend: str
) -> None:
    changes = {"qk_norm": qk_norm, "rope_theta": theta, "layer_scale": scale, "gated": gated, "attention": backend}
    for mask, pack in ((None, False), (HOLES, True)):
        check(network(pack=pack, **changes), sequences(mask), [3])


def test_the_same_with_averaged_weights_in_training_mode_and_without_the_fused_path() -> None:
    model = network()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.predictor.blocks[0].mlp.up.weight.mul_(2)
    with ema.applied():
        check(model, sequences(), [3])
    model.predictor.fused = False
    check(model.train(), sequences(), [3])
    check(model.eval(), sequences(), [3])


@torch.no_grad()
def test_a_trace_of_the_pieces_has_what_a_trace_of_the_whole_has() -> None:
    model, tokens, cache = network(attention="eager"), sequences(), Cache(COUNT + 1)
    whole = Trace()
    model(tokens, causal=True, trace=whole)
    x, traces = whole.hidden[0], [Trace(), Trace()]
    for part, trace in zip(x.split([3, COUNT - 2], 1), traces, strict=True):
        model.predictor(part, tokens.coords, causal=True, cache=cache, trace=trace)
    for ours, *parts in zip(whole.hidden, *(each.hidden for each in traces), strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), ours, rtol=0, atol=1e-5)
    for ours, last in zip(whole.attention, traces[1].attention, strict=True):
        torch.testing.assert_close(last, ours[:, :, 3:], rtol=0, atol=1e-5)


def test_what_a_cache_cannot_do_is_refused() -> None:
    predictor = Predictor(PredictorConfig(**SHAPE)).eval()
    x, coords = torch.randn(2, 3, SHAPE["dim"]), torch.rand(3, 1)
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        predictor(x, coords, causal=False, cache=Cache(3))
    cache = Cache(3)
    with torch.no_grad():
        predictor(x, coords, causal=True, cache=cache)
        with pytest.raises(ValueError, match="1 places after the first 3 are more than the 3 of the cache"):
            predictor(x[:, :1], coords, causal=True, cache=cache)
