"""Two gradients written by hand, so that LayerScale, QK-Norm and RoPE cost no activation memory and little time.

Autograd would keep every intermediate of the plain formulas; here the backward pass starts from what the
neighbouring operations keep anyway. `tests/nepa_core/kernels/test_fused.py` holds both to the plain formulas. All
inputs of one call have one dtype: the caller casts for autocast. Under torch.compile the plain formulas are used
instead, because the compiler fuses and recomputes by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


class ScaledLinear(Function):
    """scale * (x @ weight.T + bias), without keeping the product for the gradient of `scale`.

    x [..., I], weight [O, I], bias and scale [O]. The gradient of scale[o] is the sum over all places of
    grad * (x @ weight.T + bias); summing over the places first makes it d_weight . weight + d_bias * bias,
    with the gradients d_weight and d_bias of the map without scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        return F.linear(x, weight, bias).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        d_x = (grad * scale) @ weight
        grad = grad.flatten(0, -2)
        d_weight, d_bias = grad.T @ x.flatten(0, -2), grad.sum(0)
        d_scale = torch.linalg.vecdot(d_weight, weight).addcmul_(d_bias, bias)
        return d_x, d_weight.mul_(scale[:, None]), d_bias.mul_(scale), d_scale


class NormRotate(Function):
    """Queries, keys and values [B, H, T, K] of a packed projection [B, T, 3D]; q and k normalised and rotated.

    `matrix` [S, T, W, K, K] of `rope.norm_rotations` takes off the mean and rotates: one matrix product a place instead
    of many passes over memory. S is 1 where all samples share the positions, else B; W is 1 where queries and keys are
    turned alike, else 2. A rotation keeps the length, so the norm can be taken after it:

        y = z / sqrt(mean(z^2) + eps),    z = x @ matrix

    and the backward pass needs only y, which the attention keeps as well, and one number a head.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, matrix: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        batch, places, _ = qkv.shape
        packed = qkv.view(batch, places, 3, heads, -1)
        rows, matrices = packed[:, :, :2], matrix.flatten(0, 2)
        if shared := len(matrix) == 1:
            rows = rows.permute(1, 2, 0, 3, 4)  # what one matrix turns stands together
        y = rows.reshape(len(matrices), -1, rows.shape[-1]) @ matrices
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        rstd = length.square().div(y.shape[-1]).add(eps).rsqrt()
        y.mul_(rstd)
        ctx.save_for_backward(y, rstd, matrices)
        ctx.shared = shared
        q, k = y.view(rows.shape).permute((1, 2, 3, 0, 4) if shared else (2, 0, 3, 1, 4)).unbind()
        # A copy of v, because a view would keep all of qkv alive.
        return q, k, packed[:, :, 2].clone().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        y, rstd, matrices = ctx.saved_tensors
        axes, between = ((2, 0, 1, 3), 1) if ctx.shared else ((0, 2, 1, 3), 2)
        d_rows = torch.stack((d_q.permute(axes), d_k.permute(axes)), dim=between)
        d_y = d_rows.view_as(y).mul_(rstd)
        d_y.addcmul_(y, torch.linalg.vecdot(d_y, y)[..., None], value=-1 / y.shape[-1])
        d_qk = (d_y @ matrices.mT).view_as(d_rows)
        if ctx.shared:
            d_qk = d_qk.permute(2, 0, 1, 3, 4)
        return torch.cat((d_qk, d_v.transpose(1, 2)[:, :, None]), dim=2).flatten(2), None, None, None
