"""What generates keeps what is given, and says of the next token what it must."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nepa_core import Tokens
from nepa_core.runtime.config import override
from recipes.generation.decoders import DecoderConfig, FlowConfig, fit_decoders, predictions
from recipes.generation.judging import OWN, at_levels, law_recovered, of_made, score, table, verdict
from recipes.generation.linear_gaussian import fit_linear_gaussian
from recipes.generation.reading import Kept, Samples, read_samples
from recipes.generation.rivals import Copy, Decoded, Known, Linear, Rival
from recipes.statistics.generated import levels
from recipes.timeseries import demo
from recipes.training.starting import build_model
from recipes.vision import digits_2x2
from tests import tiny

QUICK = DecoderConfig(flow=FlowConfig(blocks=1, width=16), steps=3, batch=16)
CHANGES: dict[str, Any] = {"model.dim": 16, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 16}
OWN_ORDERS = {"data.patch_order": "random_per_sample", "model.predict_position": "rotate", "data.limit": 60}


def generators(config: Any, kept: Kept) -> tuple[Samples, dict[str, Rival]]:
    """Everything that generates, of an untrained network, and a few held-out samples."""
    model, data = build_model(override(config, CHANGES)).eval(), config.data.plain()
    held_out = read_samples(data, "test", 6, 4, kept, bos=True, seed=0)
    train = read_samples(data, "train", 60, 32, Kept(0), bos=True, seed=0)
    found = fit_decoders({OWN: model}, train.parts, QUICK, causal=True, show=False)[OWN]
    draw = torch.Generator().manual_seed(0)
    fitted = fit_linear_gaussian(train.parts, total=60, length=max(train.longest, held_out.longest))
    rivals: dict[str, Rival] = {
        OWN: Decoded(model, found, 2, 1.0, draw),
        "linear": Linear(fitted, model, draw),
        "copy": Copy(found.flow.mean),
    }
    if data.known_law(held_out.parts[0]) is not None:
        rivals["law"] = Known(data, draw)
    return held_out, rivals


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (tiny.ragged(), Kept(0.4)),
        (override(digits_2x2(), OWN_ORDERS), Kept(region=(1, 1, 3, 3))),
        (demo(), Kept(3)),
    ],
    ids=["ragged", "region", "law"],
)
def test_given_tokens_stay_bit_for_bit_and_the_rest_is_made(config: Any, kept: Kept) -> None:
    held_out, rivals = generators(config, kept)
    for part, given in zip(held_out.parts, held_out.given, strict=True):
        unknown = replace(part, values=torch.where(given[..., None], part.values, 1e3))
        for name, rival in rivals.items():
            made = rival.complete(unknown, given, 3)
            assert made.shape == (3, *part.values.shape)
            for each in made:
                assert torch.equal(each[given].view(torch.int32), part.values[given].view(torch.int32)), name
            assert (made[:, ~given] < 1e3).all(), name
            drawn = rival.following(part, 3)
            assert drawn.shape == (3, *part.values.shape)
            assert rival.mean(part).shape == part.values.shape
            if name != "copy":
                assert not torch.equal(made[0][~given], made[1][~given]), name
                assert not torch.equal(drawn[0], drawn[1]), name


def test_a_network_makes_the_next_token_from_what_it_predicts() -> None:
    """Draws without noise and the mean are functions of the prediction before the token."""
    held_out, rivals = generators(tiny.recipe(), Kept(2))
    decoded, part, given = rivals[OWN], held_out.parts[0], held_out.given[0]
    assert isinstance(decoded, Decoded)
    decoded = replace(decoded, temperature=0.0)
    said, _ = predictions(decoded.model, part, causal=True)
    coords = part.coords.expand(*said.shape[:2], -1)
    expected = decoded.decoders.flow.restored(decoded.decoders.flow.sample(said, coords, steps=2, temperature=0.0))
    torch.testing.assert_close(decoded.following(part, 2), expected.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.complete(part, given, 1)[0, :, 2], expected[:, 2], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded.mean(part), decoded.decoders.mean(said))
    torch.testing.assert_close(
        decoded.completed_by_mean(part, given)[:, 2], decoded.mean(part)[:, 2], rtol=0, atol=1e-4
    )


def test_a_copy_is_the_token_before_or_the_mean_token() -> None:
    values = torch.arange(8.0).view(1, 4, 2)
    mask = torch.tensor([[True, True, False, True]])
    tokens, first = Tokens(values, torch.arange(4.0)[:, None], mask), torch.tensor([9.0, 9.0])
    assert Copy(first).mean(tokens)[0].tolist() == [[9, 9], [0, 1], [2, 3], [9, 9]]
    given = torch.tensor([[True, False, False, False]])
    whole = Tokens(values, torch.arange(4.0)[:, None])
    assert Copy(first).complete(whole, given, 2).tolist() == [[[[0, 1]] * 4]] * 2


def test_scores_are_of_what_is_made_and_the_law_is_best() -> None:
    held_out, rivals = generators(demo(), Kept(0.5))
    scores = {name: score(rival, held_out, 32, lambda x: x, bos=True) for name, rival in rivals.items()}
    assert all(scores["law"].following.mean() < scores[name].following.mean() for name in rivals if name != "law")
    torch.testing.assert_close(scores["law"].of(5).nanmean(), scores["law"].following[5])
    law = rivals["law"]
    assert isinstance(law, Known)
    found = law_recovered(law, law, held_out, 64)
    for (mean, half), truth in ((found["mean"], 0.0), (found["variance"], 1.0)):
        assert mean is not None
        assert half is not None
        assert abs(mean - truth) < 2 * half + 0.02
    rows = table(
        {OWN: scores[OWN], "copying": scores["copy"], "the best possible": scores["law"]}, "completion", held_out
    )
    assert rows[0]["margin"] == 0
    assert rows[0]["ci95"] is None
    assert rows[2]["margin"] < 0 < rows[1]["margin"] + 1
    assert "copying" in verdict(rows)["verdict"]
    assert "possible" not in verdict(rows)["verdict"]


def test_the_score_of_a_completion_is_over_what_is_made() -> None:
    """A point that is off by 2 everywhere has 2, whatever else is given."""
    truth = torch.randn(2, 5, 3)
    given = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    made = torch.where(given[..., None], truth + 7, truth + 2).expand(3, -1, -1, -1)
    torch.testing.assert_close(of_made(made, truth, given), torch.full((2,), 2.0).double())


def test_levels_are_those_of_the_position_whatever_the_order() -> None:
    draw = torch.Generator().manual_seed(0)
    train = torch.cat((torch.randint(3, (64, 2), generator=draw), torch.randint(3, (64, 2), generator=draw) + 10), 1)
    found = levels(train.float())
    assert found is not None
    made = Tokens(torch.tensor([[[10.6, 11.3], [0.4, 1.8]]]), torch.arange(2.0)[:, None], order=torch.tensor([1, 0]))
    near = at_levels(made, torch.tensor([[False, False]]), found, 2)
    assert near.values.tolist() == [[[11, 11], [0, 2]]]
    kept = at_levels(made, torch.tensor([[True, False]]), found, 2)
    assert kept.values[0, 0].tolist() == made.values[0, 0].tolist()
