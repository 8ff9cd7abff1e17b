import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_core import UserError
from nepa_core.predictor import Predictor, PredictorConfig, Trace
from nepa_core.runtime.config import validated
from tests import tiny

PLACES = 7
SHAPE = tiny.SHAPE | {"dim": 24, "depth": 3, "bos": False}
COORDS = torch.linspace(-1, 1, PLACES)[:, None]
HOLES = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)


def _config(**changes: Any) -> PredictorConfig:
    return PredictorConfig(**(SHAPE | changes))


def _predictor(**changes: Any) -> Predictor:
    """A predictor far from its start, so that attention is uneven and every parameter matters."""
    torch.manual_seed(0)
    predictor = Predictor(_config(**changes))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return predictor


def _inputs(samples: int = 3, places: int = PLACES) -> Tensor:
    return torch.randn(samples, places, SHAPE["dim"], generator=torch.Generator().manual_seed(1))


def _furthest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_no_place_sees_a_later_one_when_causal(backend: str, training: bool, mask: Tensor | None) -> None:
    predictor = _predictor(attention=backend).train(training)
    x = _inputs()
    before = predictor(x, COORDS, causal=True, mask=mask)
    for place in range(1, PLACES):
        changed = x.clone()
        changed[:, place:] = _inputs(6)[3:, place:]
        after = predictor(changed, COORDS, causal=True, mask=mask)
        assert _furthest(after[:, :place], before[:, :place]) < 1e-6
        assert _furthest(after[:, place:], before[:, place:]) > 0.1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_every_place_sees_all_others_when_not_causal(backend: str, training: bool) -> None:
    predictor = _predictor(attention=backend).train(training)
    x = _inputs()
    before = predictor(x, COORDS, causal=False)
    x[:, -1] = _inputs(6)[3:, -1]
    assert (predictor(x, COORDS, causal=False) - before).abs().amax(dim=(0, 2)).min() > 1e-3


# ------------------------------------------------------------------------------------------------ back-ends


def _outputs_and_gradients(predictor: Predictor, causal: bool, mask: Tensor | None) -> list[Tensor]:
    x = _inputs().requires_grad_()
    out = predictor(x, COORDS, causal=causal, mask=mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).mean().backward()
    gradients = [p.grad for p in (x, *predictor.parameters())]
    assert all(g is not None for g in gradients)
    return [out.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "masked"])
@pytest.mark.parametrize("causal", [True, False])
def test_back_ends_agree(causal: bool, mask: Tensor | None) -> None:
    fused = _outputs_and_gradients(_predictor(attention="sdpa"), causal, mask)
    plain = _outputs_and_gradients(_predictor(attention="eager"), causal, mask)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_xformers_off_cuda_says_what_to_do_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^model\.attention=xformers runs on CUDA only; use .*$"):
        _predictor(attention="xformers")(_inputs(), COORDS, causal=True)
    with pytest.raises(UserError, match=r"^model\.attention=xformers runs on CUDA only; use .*$"):
        _predictor(attention="xformers").compile_blocks()  # before a minute of compiling


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "masked"])
@pytest.mark.parametrize("causal", [True, False])
def test_xformers_agrees(causal: bool, mask: Tensor | None, autocast: bool) -> None:
    pytest.importorskip("xformers")
    outputs = []
    for backend in ("sdpa", "xformers"):
        predictor = _predictor(attention=backend, dim=64).cuda()
        x = torch.randn(3, PLACES, 64, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = predictor(x, COORDS, causal=causal, mask=None if mask is None else mask.cuda())
        out.float().square().mean().backward()
        outputs.append((out.float(), x.grad))
    tolerance = 0.1 if autocast else 1e-4
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "masked"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_maps_are_distributions_over_what_may_be_seen(causal: bool, mask: Tensor | None) -> None:
    trace = Trace()
    _predictor(attention="eager")(_inputs(), COORDS, causal=causal, mask=mask, trace=trace)
    assert len(trace.attention) == SHAPE["depth"]
    itself = torch.eye(PLACES, dtype=torch.bool)
    allowed = torch.ones(3, 1, PLACES, PLACES, dtype=torch.bool) if mask is None else mask[:, None, None] | itself
    allowed = allowed.tril() if causal else allowed
    for weights in trace.attention:
        assert weights.shape == (3, SHAPE["heads"], PLACES, PLACES)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, SHAPE["heads"], PLACES))
        assert torch.equal(weights > 0, allowed.expand_as(weights))


# -------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_masked_places_never_reach_real_ones(backend: str, causal: bool) -> None:
    predictor = _predictor(attention=backend)
    x = _inputs()
    before = predictor(x, COORDS, causal=causal, mask=HOLES)
    after = predictor(torch.where(HOLES[..., None], x, 100 * _inputs(6)[3:]), COORDS, causal=causal, mask=HOLES)
    assert _furthest(after[HOLES], before[HOLES]) < 1e-6
    for row, real in enumerate(HOLES):
        alone = predictor(x[row : row + 1, real], COORDS[real], causal=causal)
        torch.testing.assert_close(before[row, real], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_row_that_sees_nobody_is_not_nan(backend: str, causal: bool) -> None:
    left_padded = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * PLACES, [1] * PLACES], dtype=torch.bool)
    predictor = _predictor(attention=backend)
    x = _inputs().requires_grad_()
    out = predictor(x, COORDS, causal=causal, mask=left_padded)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *predictor.parameters()))


# ------------------------------------------------------------------------------- drop path and LayerScale


def test_drop_path_rises_linearly() -> None:
    assert [block.drop_path for block in Predictor(_config(depth=5, drop_path=0.4)).blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


@pytest.mark.parametrize("silenced", ["scale1", "scale2"])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(silenced: str) -> None:
    rate, samples = 0.3, 4000
    predictor = _predictor(depth=2, drop_path=rate)
    getattr(predictor.blocks[1], silenced).data.zero_()  # leaves one branch to look at
    x = _inputs(1)

    def added(samples: int) -> Tensor:
        trace = Trace()
        with torch.no_grad():
            predictor(x.expand(samples, -1, -1), COORDS, causal=True, trace=trace)
        return trace.hidden[2] - trace.hidden[1]

    predictor.eval()
    branch = added(1)
    predictor.train()
    found = added(samples)
    factor = (found * branch).sum((1, 2)) / branch.square().sum()
    torch.testing.assert_close(found, factor[:, None, None] * branch, rtol=0, atol=1e-4)
    dropped = factor.abs() < 1e-3
    torch.testing.assert_close(factor[~dropped], torch.full_like(factor[~dropped], 1 / (1 - rate)), rtol=0, atol=1e-3)
    assert abs(dropped.float().mean().item() - rate) < 5 * (rate * (1 - rate) / samples) ** 0.5


def test_drop_path_is_off_outside_training() -> None:
    dropping, plain = _predictor(drop_path=0.9), _predictor()
    x = _inputs()
    expected = plain(x, COORDS, causal=True)
    assert torch.equal(dropping.eval()(x, COORDS, causal=True), expected)
    assert _furthest(dropping.train()(x, COORDS, causal=True), expected) > 0.1


def test_layer_scale_starts_where_it_is_told() -> None:
    scales = {n: p for n, p in Predictor(_config(layer_scale=1e-5)).named_parameters() if "scale" in n}
    assert len(scales) == 2 * SHAPE["depth"]
    assert all(torch.equal(p, torch.full((SHAPE["dim"],), 1e-5)) for p in scales.values())


def test_layer_scale_multiplies_both_branches() -> None:
    predictor = Predictor(_config(layer_scale=0.0))
    x = _inputs()
    assert torch.equal(predictor(x, COORDS, causal=True), predictor.norm(x))
    for name in ("scale1", "scale2"):
        getattr(predictor.blocks[0], name).data.fill_(1.0)
        assert not torch.equal(predictor(x, COORDS, causal=True), predictor.norm(x))
        getattr(predictor.blocks[0], name).data.zero_()


# ------------------------------------------------------------------------------------------------ recompute


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "masked"])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(mask: Tensor | None, autocast: bool) -> None:
    found = []
    for recompute in (False, True):
        predictor = _predictor(drop_path=0.5)
        if recompute:
            predictor.recompute_blocks()
        torch.manual_seed(5)  # which paths are dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append([*_outputs_and_gradients(predictor, True, mask), torch.rand(1)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for recompute in (False, True):
        predictor, sizes = _predictor(), list[int]()
        if recompute:
            predictor.recompute_blocks()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            predictor(_inputs().requires_grad_(), COORDS, causal=True)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("why", ["traced", "without gradient"])
def test_nothing_is_recomputed_where_nothing_would_be_saved(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, trace = _predictor(attention="eager"), Trace()
    predictor.recompute_blocks()
    monkeypatch.setattr("nepa_core.predictor.checkpoint", None)  # calling it would fail
    with torch.set_grad_enabled(why == "traced"):
        predictor(_inputs(), COORDS, causal=True, trace=trace if why == "traced" else None)
    assert len(trace.attention) == (SHAPE["depth"] if why == "traced" else 0)


# ------------------------------------------------------------------------------------------------- switches

SWITCHES = [*itertools.product([True, False], ["off", "plain", "affine"], [None, 1.0], [None, 100.0], [True, False])]


@pytest.mark.parametrize(("gated", "qk_norm", "layer_scale", "rope_theta", "bos"), SWITCHES)
def test_every_combination_of_switches_trains_all_its_parameters(
    gated: bool, qk_norm: str, layer_scale: float | None, rope_theta: float | None, bos: bool
) -> None:
    predictor = _predictor(
        gated=gated, qk_norm=qk_norm, layer_scale=layer_scale, rope_theta=rope_theta, bos=bos, depth=2
    )
    out = predictor(_inputs(2, PLACES + bos), COORDS, causal=True)
    out.square().mean().backward()
    assert out.shape == (2, PLACES + bos, SHAPE["dim"])
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.any() for p in predictor.parameters())
    names = {name for name, _ in predictor.blocks[0].named_parameters()}
    assert ("mlp.gate.weight" in names) == gated
    assert ("attention.q_norm.weight" in names) == ("attention.k_norm.weight" in names) == (qk_norm == "affine")
    assert not any(name.endswith(("q_norm.bias", "k_norm.bias")) for name in names)
    assert ("scale1" in names) == ("scale2" in names) == (layer_scale is not None)


@pytest.mark.parametrize(("qk_norm", "changes"), [("off", True), ("plain", False), ("affine", False)])
def test_qk_norm_takes_the_size_out_of_queries_and_keys(qk_norm: str, changes: bool) -> None:
    predictor = _predictor(qk_norm=qk_norm)
    x = _inputs()
    before = predictor(x, COORDS, causal=True)
    for block in predictor.blocks:
        for parameter in (block.attention.qkv.weight, block.attention.qkv.bias):
            parameter.data[: 2 * SHAPE["dim"]] *= 5.0
    assert (_furthest(predictor(x, COORDS, causal=True), before) > 1e-3) == changes


@pytest.mark.parametrize("qk_norm", ["off", "plain", "affine"])
def test_positions_enter_through_rope_alone_and_only_their_differences(qk_norm: str) -> None:
    x, stretched = _inputs(), COORDS * 1.7
    still = _predictor(rope_theta=None, qk_norm=qk_norm)
    assert torch.equal(still(x, COORDS, causal=True), still(x, stretched, causal=True))
    turning = _predictor(qk_norm=qk_norm)
    moved = turning(x, stretched, causal=True)
    assert _furthest(turning(x, COORDS, causal=True), moved) > 1e-2
    torch.testing.assert_close(turning(x, COORDS, causal=True, coord_scale=1.7), moved, rtol=0, atol=1e-5)
    torch.testing.assert_close(turning(x, stretched + 0.3, causal=True), moved, rtol=0, atol=1e-5)
    per_sample = stretched + torch.tensor([0.3, -0.2, 0.7])[:, None, None]
    torch.testing.assert_close(turning(x, per_sample, causal=True), moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("qk_norm", ["plain", "affine"])
def test_far_positions_stay_apart_under_bfloat16_autocast(qk_norm: str) -> None:
    predictor, x, far = _predictor(qk_norm=qk_norm), _inputs(), 300 + 0.1 * torch.arange(PLACES)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        out = predictor(x, far, causal=True)
    assert (out.float() - predictor(x, far, causal=True)).square().mean().sqrt() < 0.05


def test_linear_maps_start_as_released() -> None:
    torch.manual_seed(0)
    predictor = Predictor(_config(dim=96, mlp_dim=256, gated=True))
    linear = [module for module in predictor.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 5 * SHAPE["depth"]
    for module in linear:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not module.bias.any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 44, "heads": 4}, ["model.dim=44", "model.heads=8"]),
        ({"depth": 0}, ["model.depth=0"]),
        ({"drop_path": 1.0}, ["model.drop_path=1.0"]),
        ({"norm_eps": 0.0}, ["model.norm_eps=0.0"]),
        ({"rope_rescale": 0.5}, ["model.rope_rescale=0.5"]),
        ({"layer_scale": float("nan")}, ["model.layer_scale=nan"]),
        ({"qk_norm": "rms"}, ["model.qk_norm=rms", "affine"]),
        ({"dept": 3}, ["model.dept", "did you mean depth?"]),
    ],
)
def test_a_bad_setting_is_named_in_one_line(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        validated(PredictorConfig, SHAPE | changes, "model.")
    assert all(word in str(error.value) for word in named)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- trace


def test_the_trace_holds_the_input_every_block_and_the_output() -> None:
    predictor, trace, x = _predictor(), Trace(), _inputs()
    out = predictor(x, COORDS, causal=True, trace=trace)
    assert len(trace.hidden) == SHAPE["depth"] + 2
    assert torch.equal(trace.hidden[0], x)
    assert torch.equal(trace.hidden[-1], out)
    assert trace.attention == []
    blocks = predictor.blocks
    for depth in range(SHAPE["depth"] + 1):
        predictor.blocks = blocks[:depth]
        shallow = predictor(x, COORDS, causal=True)
        torch.testing.assert_close(predictor.norm(trace.hidden[depth]), shallow, rtol=0, atol=1e-6)
