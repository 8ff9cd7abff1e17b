"""Tokens that say where they lie: made ones lie where they say, and decoders are not told it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from modalities.events import Events
from nepa_core.model import NEPA
from nepa_core.predictor import PredictorConfig
from nepa_core.rollout import rollout
from nepa_core.tokens import Tokens
from recipes.generation.decoders import collect, predictions
from tests.tiny import SHAPE


def read() -> tuple[Events, Tokens, NEPA]:
    data = Events(source="process", events=32)
    windows = data.dataset("test")
    torch.manual_seed(0)
    model = NEPA(PredictorConfig(**SHAPE), data.embedder(SHAPE["dim"])).eval()
    return data, data.read(default_collate([windows[i] for i in range(4)])), model


def test_a_made_event_is_read_at_the_time_that_its_gap_says() -> None:
    """Each prediction of a roll-out is that of a pass over what was made, at the times that were made."""
    data, tokens, model = read()
    seen: list[Tensor] = []

    def draw(prediction: Tensor, _: Tensor, token: int) -> Tensor:
        seen.append(prediction)
        values = torch.zeros(len(prediction), tokens.values.shape[-1])
        values[:, token % 5] = 1.0
        values[:, 5] = 2.0 - 0.1 * token
        return values

    made = rollout(model, draw, tokens, 6, placed=data.placed)
    moved = replace(made, coords=torch.where(torch.arange(32)[:, None] < 6, tokens.coords, data.placed(made)))
    again = predictions(model, moved, causal=True)[0]
    new = slice(6, 6 + len(seen))  # no sample is as long as the window
    real, now = tokens.real[:, new], again[:, new]
    torch.testing.assert_close(torch.stack(seen, 1)[real], now[real], rtol=1e-4, atol=1e-5)
    stale = predictions(model, replace(made, coords=tokens.coords), causal=True)[0]
    assert not torch.allclose(stale[:, new][real], now[real], atol=1e-3)


def test_decoders_are_not_told_when_the_next_event_is() -> None:
    _, tokens, model = read()
    told: dict[bool, Any] = {each: collect(model, [tokens], causal=True, seed=0, told=each) for each in (True, False)}
    assert told[True].coords.std() > 0
    assert (told[False].coords == 0).all()
    assert torch.equal(told[True].prediction, told[False].prediction)
