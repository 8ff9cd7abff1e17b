"""The hand-written gradients of `fused` against the plain formulas, alone and inside the predictor."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import nepa_core.predictor as predictor_module
from nepa_core.kernels.fused import AffineNormRotate, NormRotate, ScaledLinear
from nepa_core.predictor import Predictor, PredictorConfig
from nepa_core.rope import RotaryTable, norm_rotations, rotary_table, rotate

T, B, H, K = 5, 2, 3, 8
D = H * K
EPS = 1e-6


def table(seed: int = 0, *, samples: int | None = None) -> RotaryTable:
    """[T, K/2], or of coordinates of each sample's own [B, T, K/2]."""
    size = (T - 1, 2) if samples is None else (samples, T - 1, 2)
    coords = 2 * torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 1
    return rotary_table(coords, K, 100.0, device=torch.device("cpu"), dtype=torch.float64, bos=True)


TABLES = {
    "shared": [table()],
    "own": [table(samples=B)],
    "shared, two": [table(), table(1)],
    "own, two": [table(samples=B), table(1, samples=B)],
    "keys shared": [table(samples=B), table()],
}


def plain_norm_rotate(
    qkv: Tensor, for_q: RotaryTable, for_k: RotaryTable, q_weight: Tensor | None = None, k_weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    q, k, v = rearrange(qkv, "b t (qkv h k) -> qkv b h t k", qkv=3, h=H)
    q, k = F.layer_norm(q, (K,), q_weight, eps=EPS), F.layer_norm(k, (K,), k_weight, eps=EPS)
    return rotate(q, for_q), rotate(k, for_k), v


def test_scaled_linear_gradcheck() -> None:
    torch.manual_seed(0)
    sizes = ((T, B, 4), (6, 4), (6,), (6,))
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(ScaledLinear.apply, inputs)
    x, weight, bias, scale = inputs
    torch.testing.assert_close(ScaledLinear.apply(*inputs), F.linear(x, weight, bias) * scale)


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_norm_rotate_gradcheck_and_plain_formula(tables: list[RotaryTable]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3 * D, dtype=torch.float64, requires_grad=True)
    matrix = norm_rotations(tables, torch.float64)
    assert torch.autograd.gradcheck(lambda x: NormRotate.apply(x, matrix, H, EPS), qkv)
    fast, plain = NormRotate.apply(qkv, matrix, H, EPS), plain_norm_rotate(qkv, tables[0], tables[-1])
    grads = [torch.randn_like(y) for y in plain]
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, grads)[0] for y in (fast, plain)))


@pytest.mark.parametrize("tables", ["shared", "shared, two"])
def test_affine_norm_rotate_gradcheck_and_plain_formula(tables: str) -> None:
    """With weights of any sign, of which one is 0: from what they give nothing could be had back."""
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3 * D, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(K, dtype=torch.float64) for _ in range(2)]
    weights[1][2] = 0
    inputs = [qkv, *(weight.requires_grad_() for weight in weights)]
    matrix = norm_rotations(TABLES[tables], torch.float64, centred=False)

    def fused(x: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        return AffineNormRotate.apply(x, matrix, q_weight, k_weight, H, EPS)

    assert torch.autograd.gradcheck(fused, inputs)
    fast, plain = fused(*inputs), plain_norm_rotate(qkv, TABLES[tables][0], TABLES[tables][-1], *weights)
    grads = [torch.randn_like(y) for y in plain]
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(y, inputs, grads) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_the_weights_are_summed_in_float32() -> None:
    """Of 15,000 rows in bfloat16, all of one sign: a sum in bfloat16 would stop at 256."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 5_000, 3 * D)
    weights = [torch.rand(K).add(0.5).requires_grad_() for _ in range(2)]
    tables = [rotary_table(torch.rand(5_000, 1), K, 100.0, device=torch.device("cpu"))]
    q, k, _ = plain_norm_rotate(qkv, tables[0], tables[0], *weights)
    grads = [q.detach(), k.detach()]
    expected = torch.autograd.grad((q, k), weights, grads)
    half = torch.bfloat16
    narrow = [weight.detach().to(half).requires_grad_() for weight in weights]
    matrix = norm_rotations(tables, half, centred=False)
    q, k, _ = AffineNormRotate.apply(qkv.to(half).requires_grad_(), matrix, *narrow, H, EPS)
    found = torch.autograd.grad((q, k), narrow, [grad.to(half) for grad in grads])
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.float(), right, rtol=0.01, atol=0)


def test_second_derivatives_are_refused() -> None:
    x, weight, bias, scale = (torch.ones(size, requires_grad=True) for size in ((1, 2), (3, 2), (3,), (3,)))
    (grad,) = torch.autograd.grad(ScaledLinear.apply(x, weight, bias, scale).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def config(**changes: object) -> PredictorConfig:
    values: dict[str, object] = {
        "dim": D,
        "depth": 2,
        "heads": H,
        "mlp_dim": 32,
        "activation": "gelu",
        "gated": False,
        "layer_scale": 0.5,
        "qk_norm": "plain",
        "rope_theta": 100.0,
        "rope_rescale": 1.0,
        "bos": True,
        "norm_eps": EPS,
    }
    return PredictorConfig.model_validate(values | changes)


def build(**changes: object) -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(config(**changes))
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.3)
    return predictor


INPUT = torch.randn(4, T, D, generator=torch.Generator().manual_seed(1))
COORDS = torch.linspace(-1, 1, 2 * (T - 1)).view(T - 1, 2)
OWN_COORDS = torch.stack([COORDS[torch.randperm(T - 1, generator=torch.Generator().manual_seed(i))] for i in range(4)])
MASK = torch.tensor([[True] * T, [True] * 3 + [False] * (T - 3)] * 2)


def results(predictor: Predictor, coords: Tensor = COORDS, **changes: object) -> list[Tensor]:
    x = INPUT.clone().requires_grad_()
    out = predictor(x, coords, **{"causal": True, **changes})
    return [out, *torch.autograd.grad((out * INPUT.cos()).sum(), (x, *predictor.parameters()))]


def assert_all_close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(
            left.float(), right.float(), rtol=tolerance, atol=tolerance * right.abs().max().item()
        )


@pytest.mark.parametrize("settings", [{}, {"predict_position": "rotate"}, {"attention": "eager"}, {"pack": True}])
@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
@pytest.mark.parametrize("coords", [COORDS, OWN_COORDS], ids=["shared", "own"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [True, False])
def test_predictor_equals_the_plain_formulas(
    monkeypatch: pytest.MonkeyPatch,
    causal: bool,
    mask: Tensor | None,
    coords: Tensor,
    qk_norm: str,
    settings: dict[str, object],
) -> None:
    predictor, calls = build(qk_norm=qk_norm, **settings), []
    function = AffineNormRotate if qk_norm == "affine" else NormRotate
    told, packed = settings.get("predict_position") == "rotate", "pack" in settings
    own = coords.ndim == 3 or (mask is not None and (told or packed))
    blocks = 0 if own and qk_norm == "affine" else len(predictor.blocks)
    run = function.apply
    monkeypatch.setattr(function, "apply", lambda *args: calls.append(1) or run(*args))
    fast = results(predictor, coords, causal=causal, mask=mask, coord_scale=1.3)
    assert len(calls) == blocks
    predictor.fused = False
    monkeypatch.setattr(predictor_module, "scaled_linear", lambda x, linear, scale: linear(x) * scale)
    expected = results(predictor, coords, causal=causal, mask=mask, coord_scale=1.3)
    assert len(calls) == blocks
    assert_all_close(fast, expected, 1e-5)


def test_affine_norm_of_ones_is_the_plain_norm() -> None:
    affine = build(qk_norm="affine")
    fast = build()
    for block in affine.blocks:
        nn.init.ones_(block.attention.q_norm.weight)
        nn.init.ones_(block.attention.k_norm.weight)
    affine.load_state_dict(fast.state_dict(), strict=False)
    torch.testing.assert_close(affine(INPUT, COORDS, causal=True), fast(INPUT, COORDS, causal=True))


@pytest.mark.parametrize("coords", [COORDS, OWN_COORDS], ids=["shared", "own"])
@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
@pytest.mark.parametrize(("layer_scale", "told"), [(1e-5, "off"), (0.5, "off"), (0.5, "rotate")])
def test_bfloat16_autocast_stays_near_float32(layer_scale: float, told: str, qk_norm: str, coords: Tensor) -> None:
    predictor = build(predict_position=told, qk_norm=qk_norm)
    for block in predictor.blocks:
        nn.init.constant_(block.scale1, layer_scale)
        nn.init.constant_(block.scale2, layer_scale)
    expected = results(predictor, coords)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(predictor, coords)
    near = 0.03 if qk_norm == "plain" else 0.05  # the gradient of a weight is a small sum of large numbers
    for left, right in zip(found, expected, strict=True):
        assert (left.float() - right).norm() < near * right.norm()


@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
def test_no_grad_frozen_parameters_and_copies_give_the_same(qk_norm: str) -> None:
    predictor = build(qk_norm=qk_norm)
    expected = predictor(INPUT, COORDS, causal=True)
    with torch.no_grad():
        torch.testing.assert_close(predictor(INPUT, COORDS, causal=True), expected)
    torch.testing.assert_close(copy.deepcopy(predictor).eval()(INPUT, COORDS, causal=True), expected)
    predictor.requires_grad_(False)
    x = INPUT.clone().requires_grad_()
    predictor(x, COORDS, causal=True).sum().backward()
    assert x.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
def test_compiled_blocks_give_the_same(qk_norm: str) -> None:
    expected = results(build(qk_norm=qk_norm))
    predictor = build(qk_norm=qk_norm)
    predictor.compile_blocks()
    assert_all_close(results(predictor), expected, 1e-5)
