"""Pairs of a prediction and the next token, decoders on them, and when an earlier command's are taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core import NEPA
from nepa_core.flow import FlowConfig
from recipes.generation import decoders
from recipes.generation.decoders import FILE, RECORD, DecoderConfig, collect, fit_decoders, kept_decoders, predictions
from recipes.generation.reading import Kept, read_samples
from recipes.training.starting import build_model
from tests import tiny
from tests.tiny import Waves

QUICK = DecoderConfig(flow=FlowConfig(blocks=1, width=16), steps=4, batch=16)


def network(seed: int = 0) -> NEPA:
    return build_model(
        tiny.recipe().model_copy(update={"train": tiny.recipe().train.model_copy(update={"seed": seed})})
    )


def parts(**changes: Any) -> Any:
    return read_samples(Waves(**changes), "train", 48, 16, Kept(0), bos=True, seed=0).parts


@pytest.mark.parametrize("ragged", [False, True])
def test_a_pair_is_a_prediction_and_the_token_after_it(ragged: bool) -> None:
    model, read = network().eval(), parts(ragged=ragged)
    pairs = collect(model, read, causal=True, seed=0)
    assert len(pairs.values) == sum(int(part.real.sum()) for part in read)
    row = 0
    for part in read:
        out = model(part, causal=True)
        for sample, real in enumerate(part.real):
            for token in real.nonzero()[:, 0].tolist():
                torch.testing.assert_close(pairs.prediction[row], out.predictions[sample, token])  # BOS is place 0
                torch.testing.assert_close(pairs.embedding[row], out.embeddings[sample, token + 1])
                assert torch.equal(pairs.values[row], part.values[sample, token])
                assert torch.equal(pairs.coords[row], part.coords[token])
                row += 1


def test_pairs_beyond_the_memory_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = network(), parts()
    whole = collect(model, read, causal=True, seed=0)
    monkeypatch.setattr(decoders, "_BYTES", 4 * (2 * 16 + 4 + 1) * 100)
    some, again = (collect(model, read, causal=True, seed=0) for _ in range(2))
    assert 60 < len(some.values) < 140
    assert torch.equal(some.values, again.values)
    assert {tuple(row) for row in some.values.tolist()} < {tuple(row) for row in whole.values.tolist()}


def test_without_bos_the_first_token_is_predicted_from_nothing_and_is_no_pair() -> None:
    config = tiny.recipe()
    config = config.model_copy(update={"model": config.model.model_copy(update={"bos": False})})
    model, read = build_model(config).eval(), parts()
    said, embeddings = predictions(model, read[0], causal=True)
    out = model(read[0], causal=True)
    torch.testing.assert_close(said[:, 1:], out.predictions[:, :-1])
    torch.testing.assert_close(embeddings, out.embeddings)
    assert len(collect(model, read, causal=True, seed=0).values) == 48 * 5


def test_an_embedding_gives_its_own_token_back() -> None:
    """A linear embedder wider than a token loses nothing."""
    model, read = network(), parts()
    found = fit_decoders({"NEPA": model}, read, QUICK, causal=True, show=False)["NEPA"]
    _, embeddings = predictions(model, read[0], causal=True)
    torch.testing.assert_close(found.own(embeddings), read[0].values, rtol=0, atol=1e-3)
    real = torch.cat([part.values.flatten(0, 1) for part in read])
    torch.testing.assert_close(found.flow.mean, real.mean(0), rtol=0, atol=1e-5)


def test_side_by_side_gives_what_one_after_the_other_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    models, read = {"a": network(0), "b": network(1)}, parts()
    one = fit_decoders(models, read, QUICK, causal=True, show=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    two = fit_decoders(models, read, QUICK, causal=True, show=False)
    for name in models:
        assert all(torch.equal(x, two[name].state(name)[key]) for key, x in one[name].state(name).items())


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often decoders are fitted."""
    calls, fit = [], fit_decoders

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return fit(*args, **named)

    monkeypatch.setattr(decoders, "fit_decoders", counted)
    return calls


def test_decoders_of_the_same_weights_data_and_settings_are_found_again(tmp_path: Path, fits: list[int]) -> None:
    models, read = {"NEPA": network(), "random": network(1)}, parts()

    def kept(config: DecoderConfig = QUICK, of: str = "these", **others: NEPA) -> Any:
        return kept_decoders(tmp_path, models | others, read, config, {"of": of}, causal=True, show=False)

    first, again = kept(), kept()
    assert len(fits) == 1
    for name, found in first.items():
        assert all(torch.equal(x, again[name].state(name)[key]) for key, x in found.state(name).items())
    kept(of="other samples")
    kept(QUICK.model_copy(update={"steps": 5}))
    kept(NEPA=network(2))  # a head of another run
    assert len(fits) == 4
    kept(NEPA=network(2))
    assert len(fits) == 4
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-1] + b"x")
    kept(NEPA=network(2))
    assert len(fits) == 5
    (tmp_path / RECORD).write_text(json.dumps([]))
    kept(NEPA=network(2))
    assert len(fits) == 6
