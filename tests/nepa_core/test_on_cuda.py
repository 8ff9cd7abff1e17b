"""A GPU computes what the CPU computes: back-ends, precisions, compiled blocks, the cache of a rollout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_core.model import NEPA
from nepa_core.objective import next_embedding_loss
from nepa_core.predictor import Cache
from nepa_core.tokens import Tokens
from tests.conftest import ON_BOTH
from tests.nepa_core.kernels.test_packing import batch, network

SHAPE: dict[str, Any] = {"dim": 64, "heads": 2, "mlp_dim": 128}
PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def on(tokens: Tokens, device: str) -> Tokens:
    mask = None if tokens.mask is None else tokens.mask.to(device)
    return Tokens(tokens.values.to(device), tokens.coords, mask)


def whole() -> Tokens:
    """The same sequences without a mask, their padding made quiet."""
    tokens = batch()
    return Tokens(tokens.values.clamp(-3, 3), tokens.coords)


def outcome(model: NEPA, tokens: Tokens, precision: torch.dtype, *, causal: bool = True) -> list[Tensor]:
    """Predictions where tokens are real, the loss, and all gradients: float32 on the CPU."""
    device = tokens.values.device.type
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        out = model(tokens, causal=causal)
        predictions = out.predictions if out.mask is None else out.predictions[out.mask]
        loss = next_embedding_loss(out.predictions, out.embeddings, mask=out.mask)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [each.detach().float().cpu() for each in (predictions, loss, *gradients)]


def assert_near(found: list[Tensor], expected: list[Tensor], precision: torch.dtype) -> None:
    """Within the rounding of a precision, as a share of the norm of each tensor and of all gradients together."""
    share = 2e-3 if precision == torch.float32 else 0.05
    least = 1e-3 * max(float(value.norm()) for value in expected[2:])
    for left, right in zip(found, expected, strict=True):
        assert (left - right).norm() <= share * right.norm() + share * least


@ON_BOTH
@PRECISIONS
@pytest.mark.parametrize("tokens", [whole(), batch(holes=True)], ids=["whole", "masked"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_every_back_end_agrees_with_eager(
    backend: str, causal: bool, tokens: Tokens, precision: torch.dtype, device: str
) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
        if device == "cpu":
            pytest.skip("xformers runs on CUDA only")
    found, eager = (
        outcome(network(attention=each, **SHAPE).to(device), on(tokens, device), precision, causal=causal)
        for each in (backend, "eager")
    )
    assert_near(found, eager, precision)


@ON_BOTH
@PRECISIONS
@pytest.mark.parametrize("qk_norm", ["plain", "affine", "off"])
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_the_device_computes_what_the_cpu_computes_in_float32(
    pack: bool, qk_norm: str, precision: torch.dtype, device: str
) -> None:
    """Packed in bfloat16 on a GPU: by the kernels for sequences of unequal length."""
    expected = outcome(network(qk_norm=qk_norm, **SHAPE), batch(holes=True), torch.float32)
    model = network(qk_norm=qk_norm, pack=pack, **SHAPE).to(device)
    assert_near(outcome(model, on(batch(holes=True), device), precision), expected, precision)


@pytest.mark.cuda
@PRECISIONS
@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
@pytest.mark.parametrize("tokens", [whole(), batch(holes=True)], ids=["whole", "masked"])
def test_compiled_blocks_compute_the_same_on_a_gpu(tokens: Tokens, qk_norm: str, precision: torch.dtype) -> None:
    torch.compiler.reset()
    plain, compiled = (network(qk_norm=qk_norm, **SHAPE).cuda() for _ in range(2))
    compiled.predictor.compile_blocks()
    expected = outcome(plain, on(tokens, "cuda"), precision)
    assert_near(outcome(compiled, on(tokens, "cuda"), precision), expected, precision)


@ON_BOTH
def test_recomputed_blocks_give_the_same_gradients(device: str) -> None:
    plain, again = (network(drop_path=0.3, **SHAPE).to(device).train() for _ in range(2))
    again.predictor.recompute_blocks()
    found = []
    for model in (plain, again):
        torch.manual_seed(0)
        found.append(outcome(model, on(whole(), device), torch.float32))
    assert_near(found[1], found[0], torch.float32)


@ON_BOTH
def test_a_cache_gives_what_a_whole_pass_gives(device: str) -> None:
    model, tokens = network(**SHAPE).to(device).eval(), on(whole(), device)
    with torch.no_grad():
        embeddings, _ = model.embedded(tokens)
        expected = model.predictor(embeddings, tokens.coords, causal=True)
        cache = Cache(embeddings.shape[1])
        parts = [
            model.predictor(part, tokens.coords, causal=True, cache=cache) for part in embeddings.split([1, 4, 5], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-3)
