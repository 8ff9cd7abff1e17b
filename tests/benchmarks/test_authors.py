"""The step that ours is timed against computes what the authors' model computes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.authors import AuthorsNetwork
from nepa_core import NEPA, next_embedding_loss
from nepa_core.runtime.released import read_released
from recipes.training.bench import BareTransformer
from tests import tiny
from tests.nepa_core.test_parity import _patches
from tests.release import FIXTURES

APART = ("query", "key", "value")


def weights_from(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `NEPA` by the names of an `AuthorsNetwork`."""
    found: dict[str, Tensor] = {}
    for name, value in ours.items():
        name = name.removeprefix("predictor.").replace("attention.", "").replace("mlp.", "")
        if ".qkv." in name:
            found |= {name.replace("qkv", each): part for each, part in zip(APART, value.chunk(3), strict=True)}
        else:
            found[name] = value
    return found


def test_the_authors_outputs_and_loss() -> None:
    released = read_released(FIXTURES / "pretrain")
    expected = load_file(FIXTURES / "pretrain" / "expected.safetensors")
    model = AuthorsNetwork(released.config, nn.Linear(3 * released.patch**2, released.config.dim))
    model.load_state_dict(weights_from(released.model))
    out = model(_patches(expected["pixel_values"], released.patch), causal=True)
    torch.testing.assert_close(out.predictions, expected["causal.last_hidden_state"], rtol=0, atol=1e-5)
    loss = next_embedding_loss(out.predictions, out.embeddings)
    torch.testing.assert_close(loss, expected["causal.loss"].view_as(loss).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
def test_it_has_as_many_parameters_as_ours(qk_norm: str) -> None:
    config = tiny.recipe().model.model_copy(update={"qk_norm": qk_norm})
    counts = [
        sum(value.numel() for value in kind(config, nn.Linear(4, config.dim)).parameters())
        for kind in (NEPA, AuthorsNetwork, BareTransformer)
    ]
    assert counts[0] == counts[1] > counts[2]
