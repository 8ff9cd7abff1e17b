"""Which tokens of a sample are given, and which a network can make from the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_core import NEPA, Tokens, UserError
from nepa_core.predictor import PredictorConfig
from nepa_core.runtime.config import override
from recipes.generation.reading import Kept, arranged, check_region, read_samples, scored, signals, untold
from recipes.vision import digits_2x2
from tests import tiny
from tests.tiny import Waves

LENGTHS = torch.tensor([6, 3, 2])
REAL = torch.arange(6) < LENGTHS[:, None]


def ragged(mask: Tensor | None = REAL) -> Tokens:
    return Tokens(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6.0)[:, None], mask)


@pytest.mark.parametrize(
    ("keep", "bos", "counts"),
    [
        (0.5, True, [3, 1, 1]),
        (0.0, True, [0, 0, 0]),
        (0.2, False, [1, 1, 1]),
        (2, True, [2, 2, 2]),
        (0, False, [1] * 3),
    ],
)
def test_a_share_or_a_number_of_the_first_real_tokens_is_given(keep: float, bos: bool, counts: list[int]) -> None:
    tokens, given = arranged(Waves(), ragged(), Kept(keep), bos=bos)
    assert (given & tokens.real).sum(1).tolist() == counts
    assert given[~REAL].all(), "padding is not made"
    assert all(row[:count].all() for row, count in zip(given, counts, strict=True))


def test_missing_tokens_in_the_middle_count_for_nothing() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 1, 1]] * 3, dtype=torch.bool)
    _, given = arranged(Waves(), ragged(mask), Kept(0.5), bos=True)
    assert given[0].tolist() == [True, True, True, True, False, False]


def test_samples_of_which_nothing_is_made_are_left_out() -> None:
    data = Waves(ragged=True)
    found = read_samples(data, "test", 48, 16, Kept(3), bos=True, seed=0)
    lengths = data.dataset("test").lengths  # type: ignore[attr-defined]
    assert sorted(found.numbers.tolist()) == (lengths > 3).nonzero()[:, 0].tolist()
    assert all((~given).any(1).all() for given in found.given)
    tokens, given = found.one(17)
    assert torch.equal(tokens.values[0], data.dataset("test")[int(found.numbers[17])]["values"])
    assert given.shape == (1, 6)
    with pytest.raises(UserError, match="keep=6 leaves nothing of the 6 tokens of a sequence to make"):
        read_samples(data, "test", 48, 16, Kept(6), bos=True, seed=0)


def own_orders() -> tuple[Any, Tokens]:
    data = override(digits_2x2(), {"data.patch_order": "random_per_sample", "model.predict_position": "rotate"}).data
    batch = {"image": torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)}
    return data, data.tokenize(batch)


def test_a_region_comes_behind_the_rest_in_the_order_of_each_sample() -> None:
    data, tokens = own_orders()
    read, given = arranged(data, tokens, Kept(region=(1, 1, 3, 3)), bos=True)
    inside, before = {5, 6, 9, 10}, data.order(tokens)
    assert read.order is not None
    for row, own, known in zip(read.order.tolist(), before.tolist(), given, strict=True):
        assert row == [each for each in own if each not in inside] + [each for each in own if each in inside]
        assert known.tolist() == [True] * 12 + [False] * 4
    torch.testing.assert_close(read.canonical(read.values), tokens.values, rtol=0, atol=0)


@pytest.mark.parametrize("region", [(1, 1, 5, 3), (2, 2, 2, 3), (0, 3), (-1, 0, 2, 2)])
def test_a_region_that_is_not_on_the_grid_is_one_line(region: tuple[int, ...]) -> None:
    data, tokens = own_orders()
    with pytest.raises(UserError, match=r"the tokens lie on 4 rows and 4 columns; give \[y0,x0,y1,x1\]"):
        arranged(data, tokens, Kept(region=region), bos=True)


def test_tokens_in_one_row_have_regions_of_two_numbers() -> None:
    read, given = arranged(Waves(), ragged(), Kept(region=(1, 3)), bos=True)
    assert read.order is not None
    assert read.order.tolist() == [[0, 3, 4, 5, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert (~given).sum(1).tolist() == [2, 2, 1]


def test_a_network_that_knows_one_order_makes_no_region() -> None:
    told, untold_ = (
        NEPA(PredictorConfig(**tiny.SHAPE | {"predict_position": how}), torch.nn.Linear(4, 16))
        for how in ("rotate", "off")
    )
    data, tokens = own_orders()
    check_region(data, told)
    for wrong, model in ((data, untold_), (Waves(), told)):
        with pytest.raises(UserError, match=r"data\.patch_order=random_per_sample model\.predict_position=rotate"):
            check_region(wrong, model)
    own = tokens.reordered(data.order(tokens))
    assert untold(own, told).order is own.order
    assert untold(own, untold_).order is None


def test_only_what_a_real_token_or_bos_comes_before_is_predicted() -> None:
    mask = torch.tensor([[1, 0, 1, 1]], dtype=torch.bool)
    tokens = Tokens(torch.zeros(1, 4, 2), torch.arange(4.0)[:, None], mask)
    assert scored(tokens, bos=True).tolist() == [[True, False, False, True]]
    assert scored(tokens, bos=False).tolist() == [[False, False, False, True]]


def test_signals_are_canonical_and_padded_with_zeros() -> None:
    tokens = ragged()
    turned = tokens.reordered(torch.tensor([5, 4, 3, 2, 1, 0]))
    expected = torch.where(REAL[..., None], tokens.values, 0.0)
    for each in (tokens, turned):
        assert torch.equal(signals([each], 8)[:, :24], expected.flatten(1))
        assert not signals([each], 8)[:, 24:].any()
