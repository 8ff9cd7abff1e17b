"""One flat row and a kernel for sequences of unequal length: what a padded batch gives, nothing crosses sequences.

The kernels want CUDA. Elsewhere a loop over the sequences stands in for them, so that all around them is tested; the
last test holds the kernels themselves to the dense mask.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from nepa_core import predictor
from nepa_core.kernels import attention, xformers
from nepa_core.kernels.attention import Backend, attend_sequences, has_varlen_kernel
from nepa_core.kernels.packing import pack_rows
from nepa_core.kernels.xformers import block_diagonal_bias
from nepa_core.model import NEPA
from nepa_core.objective import next_embedding_loss
from nepa_core.predictor import Trace
from nepa_core.tokens import Tokens
from tests.nepa_core.kernels.test_packing import LENGTHS, batch, network

kernels = pytest.mark.parametrize("kernel", ["sdpa", "xformers"], indirect=True)
VARLEN = varlen.varlen_attn


def by_sequence(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], causal: bool) -> Tensor:
    """q, k, v [L, H, K], a sequence at a time."""
    assert bounds[-1] == len(q) == len(k) == len(v), "there is no padding"
    parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in pairwise(bounds)]
    assert all(part[0].shape[1] for part in parts), "no sequence is empty"
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=causal).transpose(0, 1) for part in parts])


def stand_in_for_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window_size: tuple[int, int]
) -> Tensor:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max_k == int(cu_q.diff().max())
    assert window_size in ((-1, 0), (-1, -1))
    return by_sequence(q, k, v, cu_q.tolist(), causal=window_size == (-1, 0))


def stand_in_for_xformers() -> SimpleNamespace:
    """Of `xformers.ops` what the predictor takes; tensors are [1, L, H, K] there."""

    def mask(causal: bool) -> SimpleNamespace:
        return SimpleNamespace(from_seqlens=lambda lengths, *, device: (list(lengths), causal))

    def attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: tuple[list[int], bool]) -> Tensor:
        bounds = [0, *torch.tensor(attn_bias[0]).cumsum(0).tolist()]
        return by_sequence(q[0], k[0], v[0], bounds, causal=attn_bias[1])[None]

    masks = SimpleNamespace(BlockDiagonalMask=mask(False), BlockDiagonalCausalMask=mask(True))
    return SimpleNamespace(fmha=SimpleNamespace(attn_bias=masks), memory_efficient_attention=attention)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A back-end as it is where it has a kernel, with a stand-in for that; it may see no mask."""

    def dense(*_: Any, **__: Any) -> None:
        raise AssertionError("a dense mask was made")

    block_diagonal_bias.cache_clear()
    monkeypatch.setattr(predictor, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(predictor.Packing, "allowed", dense)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in_for_torch)
    monkeypatch.setattr(xformers, "_ops", stand_in_for_xformers)
    yield request.param
    block_diagonal_bias.cache_clear()


def models(kernel: Backend, **changes: Any) -> tuple[NEPA, NEPA]:
    """Padded and packed, far from their start, so that every input matters."""
    pair = network(**changes), network(pack=True, attention=kernel, **changes)
    draw = torch.Generator().manual_seed(1)
    for one, other in zip(*(model.parameters() for model in pair), strict=True):
        one.data += 0.2 * torch.randn(one.shape, generator=draw)
        other.data.copy_(one.data)
    return pair


def results(model: NEPA, tokens: Tokens, *, causal: bool) -> list[Tensor]:
    """Predictions at the real places, loss, and gradients."""
    torch.manual_seed(1)
    out = model(tokens, causal=causal)
    loss = next_embedding_loss(out.predictions, out.embeddings, out.mask)
    weight = torch.linspace(-1, 1, out.predictions.numel()).view_as(out.predictions).to(out.predictions.device)
    (loss + (out.predictions * weight)[out.mask].sum() / 100).backward()
    zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return [out.predictions[out.mask].detach(), loss.detach(), *zeros]


def same(kernel: Backend, tokens: Tokens, *, causal: bool = True, recompute: bool = False, **changes: Any) -> None:
    padded, packed = models(kernel, **changes)
    if recompute:
        packed.predictor.recompute_blocks()
    one, other = (results(model.train(), tokens, causal=causal) for model in (padded, packed))
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- equal to padding


@kernels
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("predict_position", ["off", "add", "rotate"])
@pytest.mark.parametrize("shared", [True, False])
def test_predictions_and_gradients_are_those_of_the_padded_batch(
    kernel: Backend, causal: bool, bos: bool, predict_position: str, shared: bool
) -> None:
    same(kernel, batch(shared=shared, holes=True), causal=causal, bos=bos, predict_position=predict_position)


@kernels
@pytest.mark.parametrize("changes", [{"drop_path": 0.5}, {"qk_norm": "affine"}, {"rope_theta": None}])
@pytest.mark.parametrize("recompute", [False, True])
def test_switches_work_as_on_the_padded_batch(kernel: Backend, changes: dict[str, Any], recompute: bool) -> None:
    same(kernel, batch(), recompute=recompute, **changes)


@kernels
@pytest.mark.parametrize(
    "lengths", [(5,), (9,), (4, 4, 4), (9, 9), (3, 0, 7)], ids=["one", "one full", "equal", "full", "an empty one"]
)
@pytest.mark.parametrize("bos", [True, False])
def test_unusual_batches_give_what_the_padded_ones_give(kernel: Backend, lengths: tuple[int, ...], bos: bool) -> None:
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    whole = batch()
    same(kernel, Tokens(whole.values[: len(lengths)], whole.coords, mask), bos=bos)


@kernels
def test_nothing_real_gives_zeros(kernel: Backend) -> None:
    whole, model = batch(), models(kernel, bos=False)[1]
    out = model(Tokens(whole.values, whole.coords, torch.zeros(8, 9, dtype=torch.bool)), causal=True)
    assert not out.predictions.any()


@kernels
@pytest.mark.parametrize("causal", [True, False])
def test_no_place_sees_another_sequence(kernel: Backend, causal: bool) -> None:
    """The gradient of one sequence's predictions reaches its own tokens, and only those before under causality."""
    model, tokens = models(kernel)[1], batch()
    values = tokens.values.requires_grad_()
    for sample, length in enumerate(LENGTHS):
        place = length // 2
        out = model(Tokens(values, tokens.coords, tokens.mask), causal=causal).predictions
        (reached,) = torch.autograd.grad(out[sample, 1 + place, 0], values)
        expected = torch.zeros(8, 9, dtype=torch.bool)
        expected[sample, : place + 1 if causal else length] = True
        assert torch.equal(reached.abs().sum(-1) > 0, expected)


@kernels
def test_a_trace_is_of_the_padded_batch(kernel: Backend) -> None:
    padded, packed = models("sdpa")
    seen = Trace()
    assert packed.config.pack
    torch.testing.assert_close(
        packed(batch(), causal=True, trace=seen).predictions, padded(batch(), causal=True).predictions
    )
    assert seen.hidden[0].shape == (8, 10, 16)


@pytest.mark.slow
@kernels
def test_compiled_blocks_agree_and_are_not_compiled_for_every_batch(
    kernel: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own operator, of which only the kernel is replaced; that of xformers stays outside the graph."""

    def on_cpu(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = by_sequence(q, k, v, cu_q.tolist(), causal=rest[3])
        return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu", on_cpu)  # where there was none
    monkeypatch.setattr(varlen, "varlen_attn", VARLEN)
    padded, packed = models(kernel, depth=1)
    packed.predictor.fused = False
    torch._dynamo.reset()
    packed.predictor.blocks[0].compile(backend="eager", fullgraph=kernel == "sdpa")
    graphs = []
    for seed in range(5):
        whole = batch(seed=seed)
        lengths = torch.randint(1, 10, (8, 1), generator=torch.Generator().manual_seed(seed))
        tokens = Tokens(whole.values, whole.coords, torch.arange(9) < lengths)
        with torch.no_grad():
            one, other = (model(tokens, causal=True) for model in (padded, packed))
        torch.testing.assert_close(other.predictions[one.mask], one.predictions[one.mask], atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert 0 < graphs[0] < graphs[1] == graphs[-1], "one for the first lengths, then one for any"


# ------------------------------------------------------------------------------------------- the kernels


def test_torch_takes_what_it_is_given() -> None:
    """Without a device: the operator's own checks of types, and the shapes of its results and gradients."""
    sequences = pack_rows(batch().mask, flat=True).sequences
    assert sequences is not None
    total = sum(LENGTHS)
    assert sequences.cu_seqlens.tolist() == [0, 9, 18, 24, 29, 33, 36, 38, 39]
    assert (sequences.longest, sum(sequences.lengths)) == (9, total)
    q, k, v = torch.randn(3, 1, 2, total, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    moved = sequences._replace(cu_seqlens=sequences.cu_seqlens.to("meta"))
    out = attend_sequences(q, k, v, moved, causal=True, backend="sdpa")
    assert (out.shape, out.dtype) == ((1, 2, total, 8), torch.bfloat16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape] * 3


@pytest.mark.parametrize("causal", [True, False])
def test_xformers_bias_is_the_dense_mask(causal: bool) -> None:
    pytest.importorskip("xformers.ops")
    packing = pack_rows(batch(holes=True).mask, flat=True)
    assert packing.sequences is not None
    total = packing.sequences.cu_seqlens[-1]
    bias = block_diagonal_bias(packing.sequences.lengths, causal, torch.device("cpu"))
    assert torch.equal(bias.materialize((total, total)) == 0, packing.allowed(causal=causal)[0, 0])
    assert torch.equal(bias.q_seqinfo.seqstart, packing.sequences.cu_seqlens)


def test_where_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu, half, single = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert has_varlen_kernel("sdpa", 64, cuda, half)
    assert has_varlen_kernel("sdpa", 192, cuda, torch.float16)
    assert has_varlen_kernel("xformers", 64, cuda, single)
    assert not has_varlen_kernel("xformers", 64, cpu, half), "the dense path says that it wants CUDA"
    assert not has_varlen_kernel("eager", 64, cuda, half)
    assert not has_varlen_kernel("sdpa", 64, cpu, half)
    assert not has_varlen_kernel("sdpa", 64, cuda, single)
    assert not has_varlen_kernel("sdpa", 60, cuda, half)
    assert not has_varlen_kernel("sdpa", 256, cuda, half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not has_varlen_kernel("sdpa", 64, cuda, half)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_kernels_agree_with_the_dense_mask(
    backend: Backend, causal: bool, drop_path: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
    tokens = batch(holes=True)
    assert tokens.mask is not None
    tokens = Tokens(tokens.values.cuda(), tokens.coords, tokens.mask.cuda())
    calls: list[int] = []
    kernel = attend_sequences

    def watched(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(attention, "attend_sequences", watched)
    found = []
    for used, pack in (("sdpa", False), (backend, True)):
        model = network(attention=used, pack=pack, dim=64, heads=2, mlp_dim=64, drop_path=drop_path).cuda().train()
        with torch.autocast("cuda", torch.bfloat16):
            found.append([x.float() for x in results(model, tokens, causal=causal)])
    assert len(calls) == 2, "each block of the packed one"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03)
