"""Attention by xformers, which a CUDA machine may have; imported where it is asked for.

Shapes: B samples, H heads, T places, K numbers a head, L places of a flat row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nepa_core.basics import UserError


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the lengths are other constants in every batch
def attend_xformers_sequences(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
    """`nepa_core.kernels.attention.attend_sequences`, by the lengths on the host."""
    return _attend(q, k, v, block_diagonal_bias(lengths, causal, q.device))


@lru_cache(maxsize=2)  # all blocks share it
@torch.inference_mode(False)  # what is first made in inference mode must serve training too
def block_diagonal_bias(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    """xformers' bias for sequences of these lengths, one behind the other."""
    masks = _ops().fmha.attn_bias
    kind = masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask
    return kind.from_seqlens(lengths, device=device)


def refuse_off_cuda(device: torch.device) -> None:
    """Say so before anything is compiled, which takes a minute."""
    if device.type != "cuda":
        raise UserError("model.attention=xformers runs on CUDA only; use model.attention=sdpa here")


def attend_xformers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, allowed: Tensor | None) -> Tensor:
    """Mixed values [B, H, T, K], see `nepa_core.kernels.attention.attend`."""
    refuse_off_cuda(q.device)
    bias = _ops().LowerTriangularMask() if causal else None
    if allowed is not None:
        batch, heads, places, _ = q.shape
        seen = k.shape[2]
        padded = -(-seen // 8) * 8  # xformers wants the bias' rows aligned to 8 elements
        bias = q.new_full((batch, 1, places, padded), float("-inf"))[..., :seen]
        bias = bias.masked_fill(allowed, 0.0).expand(-1, heads, -1, -1)
    return _attend(q, k, v, bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    q, k, v = (rearrange(x, "b h t k -> b t h k") for x in (q, k, v))
    mixed: Tensor = _ops().memory_efficient_attention(q, k, v, attn_bias=bias)
    return rearrange(mixed, "b t h k -> b h t k")


def _ops() -> Any:
    try:
        import xformers.ops
    except ImportError as error:
        raise UserError("model.attention=xformers needs the package: pip install -e '.[xformers]'") from error
    return xformers.ops
