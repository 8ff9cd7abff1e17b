"""Roll-out: what is given stays, what is made is made from what the network predicts of the tokens before it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_core import NEPA, Tokens, UserError
from nepa_core.rollout import check_generates, rollout
from tests.nepa_core.test_cache import COUNT, HOLES, LAST, ORDERS, RAW, SAMPLES, SHAPE, network, sequences

READ = torch.randn(SHAPE["dim"] + 2, RAW, generator=torch.Generator().manual_seed(5)) / 5


def say(prediction: Tensor, coords: Tensor, token: int) -> Tensor:
    """A draw without chance: [B, D], [B, 2] -> [B, P]."""
    return torch.cat((prediction, coords), 1) @ READ + token


def said_by_one_pass(model: NEPA, tokens: Tokens) -> Tensor:
    """What `say` makes of a pass over the finished sequences, for every token: [B, N, P]; the first has no source."""
    predictions = model(tokens, causal=True).predictions
    before = predictions[:, :-1] if model.bos is not None else torch.cat((predictions[:, :1], predictions[:, :-1]), 1)
    coords = tokens.coords.expand(SAMPLES, -1, -1)
    return torch.stack([say(before[:, t], coords[:, t], t) for t in range(COUNT)], 1)


@pytest.mark.parametrize("mask", [None, LAST], ids=["whole", "end"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])
def test_every_token_is_made_from_a_pass_over_those_before_it(order: str, bos: bool, mask: Tensor | None) -> None:
    tokens = replace(sequences(None, ORDERS[order]), mask=mask)
    keep = torch.tensor([2, 5, 1])
    given = torch.arange(COUNT) < keep[:, None]
    unknown = Tokens(torch.where(given[..., None], tokens.values, torch.nan), tokens.coords, tokens.mask, tokens.order)
    for how in ("off", "add", "rotate"):
        model = network(bos=bos, predict_position=how, learned_positions=COUNT).eval()
        made = rollout(model, say, unknown, keep)
        kept = given | ~tokens.real
        assert torch.equal(made.values[kept].view(torch.int32), unknown.values[kept].view(torch.int32))
        whole = Tokens(made.values.nan_to_num(), made.coords, made.mask, made.order)
        torch.testing.assert_close(made.values[~kept], said_by_one_pass(model, whole)[~kept], rtol=0, atol=1e-4)
        again = rollout(model, say, unknown, keep, cache=False)
        torch.testing.assert_close(made.values, again.values, rtol=0, atol=1e-4, equal_nan=True)
        assert torch.equal(rollout(model, say, unknown, given).values[~kept], made.values[~kept])


def test_a_token_behind_padding_is_made_from_the_tokens_before_it() -> None:
    """As if padding were not there."""
    tokens, model = sequences(HOLES, ORDERS["own"]), network(predict_position="add", learned_positions=COUNT).eval()
    places: list[int] = []

    def draw(prediction: Tensor, coords: Tensor, token: int) -> Tensor:
        places.append(token)
        return say(prediction, coords, token)

    made = rollout(model, draw, tokens, 0)
    assert places == list(range(COUNT - 1)), "the longest has so many tokens"
    assert tokens.order is not None
    assert tokens.mask is not None
    assert torch.equal(made.values[~tokens.mask], tokens.values[~tokens.mask])
    for sample, real in enumerate(tokens.mask):
        coords, order = tokens.coords[sample : sample + 1, real], tokens.order[sample : sample + 1, real]
        alone = rollout(model, say, Tokens(torch.zeros(1, int(real.sum()), RAW), coords, None, order), 0)
        torch.testing.assert_close(made.values[sample, real], alone.values[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_a_region_in_the_middle_is_made_and_what_follows_it_is_kept(cache: bool) -> None:
    tokens, model = sequences(None, ORDERS["own"]), network(predict_position="rotate").eval()
    given = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.bool) | (torch.arange(SAMPLES) == 1)[:, None]
    places: list[int] = []

    def draw(prediction: Tensor, coords: Tensor, token: int) -> Tensor:
        places.append(token)
        return say(prediction, coords, token)

    made = rollout(model, draw, tokens, given, cache=cache)
    assert places == [1, 2, 5]
    assert torch.equal(made.values[given], tokens.values[given])
    torch.testing.assert_close(made.values[~given], said_by_one_pass(model, made)[~given], rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep", [COUNT, torch.ones(SAMPLES, COUNT, dtype=torch.bool)], ids=["number", "mask"])
def test_nothing_is_drawn_where_all_is_kept(keep: Any) -> None:
    tokens = sequences()

    def draw(*_: Any) -> Tensor:
        raise AssertionError

    assert torch.equal(rollout(network(bos=False).eval(), draw, tokens, keep).values, tokens.values)


def test_what_cannot_be_rolled_out_is_one_line() -> None:
    tokens, model = sequences(), network(bos=False).eval()
    for said, keep, causal in (
        ("keep=8 is not within the 7 tokens of a sequence: give 0 to 7", 8, True),
        ("keep=-1 is not within the 7 tokens", torch.tensor([3, -1, 9]), True),
        ("model.bos=false leaves nothing to predict the first token from: keep one or more", 0, True),
        ("objective.causal=false", 3, False),
    ):
        with pytest.raises(UserError, match=said):
            rollout(model, say, tokens, keep, causal=causal)
    check_generates(causal=True, shift=True)
    with pytest.raises(UserError, match=r"^trained with objective\.shift=false, it predicts the token that it reads: "):
        check_generates(causal=True, shift=False)
