"""Scaled dot-product attention by several back-ends, one form for them all: who may look at whom is an argument.

Shapes: B samples, H heads, T places, K numbers a head.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nepa_core.kernels.packing import Sequences

Backend = Literal["sdpa", "xformers", "eager"]
Allowed = Tensor | Sequences | None
"""Who may look at whom: a mask [B, 1, T, T] bool, or the sequences of one flat row, or no limit but causality."""


def attention_mask(mask: Tensor, *, causal: bool) -> Tensor:
    """Who may look at whom when some tokens are not real.

    Args:
        mask: [B, T] bool, True for a real token.

    Returns:
        [B, 1, T, T] bool. Nobody looks at a token that is not real, except itself: a softmax over nothing
        would be NaN.
    """
    places = mask.shape[1]
    allowed = mask[:, None, None, :].expand(-1, 1, places, places)
    if causal:
        allowed = allowed & mask.new_ones(places, places).tril()
    return allowed | torch.eye(places, dtype=torch.bool, device=mask.device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, allowed: Allowed, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention.

    Args:
        q, k, v: [B, H, T, K]; with a mask queries may be fewer than keys.
        causal: attend backwards only. Ignored where `allowed` is a mask, which then holds it already.
        allowed: bool of `attention_mask`, [B or 1, 1, queries, keys], or None when all tokens are real; or the
            sequences of the one row of a flat `Packing`, where `has_varlen_kernel`.

    Returns:
        The mixed values [B, H, T, K], and the weights [B, H, T, T] with the "eager" back-end.

    Raises:
        UserError: the xformers back-end was asked for where it is not installed or not on CUDA.
    """
    if isinstance(allowed, Sequences):
        return attend_sequences(q, k, v, allowed, causal=causal, backend=backend), None
    if backend == "sdpa":
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)
        return mixed, None
    if backend == "xformers":
        from nepa_core.kernels.xformers import attend_xformers  # here, as it imports the compiler

        return attend_xformers(q, k, v, causal=causal, allowed=allowed), None
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if allowed is None and causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


def has_varlen_kernel(backend: Backend, head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_sequences` runs here.

    xformers brings kernels for CUDA; torch's own (Flash Attention) wants half precision, a GPU no older than Ampere
    and heads of 8, 16, ..., 192 numbers, the widest that every such GPU trains.
    """
    if backend == "eager" or device.type != "cuda":
        return False
    flash = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 192
    return backend == "xformers" or (flash and torch.cuda.get_device_capability(device) >= (8, 0))


def attend_sequences(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, *, causal: bool, backend: Backend
) -> Tensor:
    """Attention within each sequence of one flat row, without a mask: q, k, v [1, H, L, K] -> [1, H, L, K]."""
    if backend == "xformers":
        from nepa_core.kernels.xformers import attend_xformers_sequences

        out: Tensor = attend_xformers_sequences(q, k, v, sequences.lengths, causal)
        return out
    from torch.nn.attention import varlen  # imports the compiler, which takes as long as half of torch

    q, k, v = (rearrange(x, "1 h l k -> l h k") for x in (q, k, v))
    bounds, longest = sequences.cu_seqlens, sequences.longest
    window = (-1, 0) if causal else (-1, -1)  # how far to look back and ahead; -1 is no limit
    mixed = cast(Tensor, varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window))
    return rearrange(mixed, "l h k -> 1 h l k")
