"""Three gradients written by hand, so that LayerScale, QK-Norm and RoPE cost no activation memory and little time.

Autograd would keep every intermediate of the plain formulas; here the backward pass starts from what the
neighbouring operations keep anyway. `tests/nepa_core/kernels/test_fused.py` holds all to the plain formulas. All
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


class AffineNormRotate(Function):
    """The same where queries and keys have a weight each, `q_weight` and `k_weight` [K]: y = norm(x) * weight @ matrix.

    `matrix` [1, T, W, K, K] is that of `rope.norm_rotations` with `centred=False`, for a weight stands between mean and
    rotation. It changes the length and may be 0, so x can't be had from y again: queries and keys are kept, too, as the
    plain formulas keep them, but in the dtype of the projection and already laid out for the product.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, matrix: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, places, _ = qkv.shape
        packed = qkv.view(batch, places, 3, heads, -1)
        kept, turned = [matrix], []
        for which, weight in enumerate((_for_kernel(q_weight), _for_kernel(k_weight))):
            rows = packed[:, :, which].transpose(0, 1).contiguous()  # what one matrix turns stands together
            normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[-1:], weight, None, eps)
            turned.append(_product(normed, matrix, which).permute(1, 2, 0, 3))
            kept += [rows, mean, rstd, weight]
        ctx.save_for_backward(*kept)
        return turned[0], turned[1], packed[:, :, 2].clone().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        matrix, *kept = ctx.saved_tensors
        batch, heads, places, width = d_v.shape
        d_qkv = d_v.new_empty(batch, places, 3, heads, width)
        d_qkv[:, :, 2] = d_v.transpose(1, 2)
        d_weights = []
        for which, grad in enumerate((d_q, d_k)):
            rows, mean, rstd, weight = kept[4 * which : 4 * which + 4]
            d_normed = _product(grad.permute(2, 0, 1, 3).contiguous(), matrix.mT, which)
            wanted = [True, ctx.needs_input_grad[2 + which], False]
            d_normed, rows = d_normed.to(weight.dtype), rows.to(weight.dtype)
            d_rows, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
                d_normed, rows, rows.shape[-1:], mean, rstd, weight, None, wanted
            )
            d_qkv[:, :, which] = d_rows.transpose(0, 1)
            d_weights.append(d_weight if d_weight is None else d_weight.to(d_v.dtype))
        return d_qkv.flatten(2), None, *d_weights, None, None


def _product(rows: Tensor, matrix: Tensor, which: int) -> Tensor:
    """Rows [T, B, H, K] times the matrix of each place, that of the queries (0) or of the keys (1)."""
    matrices = matrix[0, :, min(which, matrix.shape[2] - 1)]
    return (rows.flatten(1, 2) @ matrices).view(rows.shape)


def _for_kernel(weight: Tensor) -> Tensor:
    """torch's kernel for the CPU sums the gradient of a bfloat16 weight in bfloat16, where it stops at 256."""
    return weight.float() if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 else weight
