"""Rotary position embedding from continuous coordinates of 1 to 3 axes.

The form of the released NEPA checkpoints (that of DINOv3): the coordinate of each axis turns its own share of
the head, angle = 2 * pi * coordinate / wavelength with wavelengths spaced geometrically from 1 to theta.
Everything is float32; only the finished table is cast to the dtype of the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from nepa_core.basics import UserError

Form = TypeVar("Form")


class RotaryTable(NamedTuple):
    """cos and sin of every angle, each [T, K/2] or [B, T, K/2]."""

    cos: Tensor
    sin: Tensor


class RotaryPair(NamedTuple):
    """Tables for queries and keys that are turned by different positions."""

    queries: RotaryTable
    keys: RotaryTable


def rotary_angles(coords: Tensor, head_dim: int, theta: float, *, bos: bool = False) -> Tensor:
    """Angles of every place, in radians.

    Args:
        coords: [N, A] or [B, N, A] float32, A = 1, 2 or 3.
        head_dim: K, even. Each axis gets K/2 // A of the K/2 pairs; pairs left over are not rotated.
        theta: the longest wavelength, in units of the coordinates (100 in the released checkpoints).
        bos: put a row of zeros in front: the BOS token has no position and is not rotated.

    Returns:
        [N (+1), K/2] or [B, N (+1), K/2] float32, the first axis' angles first.
    """
    axes = coords.shape[-1]
    pairs = head_dim // 2
    per_axis = pairs // axes
    frequencies = theta ** -(torch.arange(per_axis, dtype=torch.float32, device=coords.device) / per_axis)
    angles = (2 * math.pi * coords.float()[..., None] * frequencies).flatten(-2)
    if per_axis == 0:
        raise UserError(
            f"heads of width {head_dim} are too narrow for RoPE on {axes} axes: lower model.heads or set "
            "model.rope_theta=null"
        )
    angles = torch.nn.functional.pad(angles, (0, pairs - axes * per_axis))
    return torch.nn.functional.pad(angles, (0, 0, 1, 0)) if bos else angles


def rotary_table(coords: Tensor, head_dim: int, theta: float, **options: Any) -> RotaryTable:
    """The table for one forward pass; all layers share it. Options as in `rotary_matrices`."""
    return _rotation(_table, coords, head_dim, theta, **options)


def rotary_matrices(coords: Tensor, head_dim: int, theta: float, *, centred: bool = True, **options: Any) -> Tensor:
    """The same as matrices [1, T, 1, K, K] or [B, T, 1, K, K], see `norm_rotations`.

    Shared coordinates on the CPU are recognised by their bytes, so what is made of them (or, with a scale that
    changes each step, their angles) is made once and kept on the device.

    Args:
        device, dtype: of the result; everything before is float32.
        scale: multiplies all coordinates, the training-time augmentation of the released configurations.
        bos: as in `rotary_angles`.
        centred: as in `norm_rotations`.
    """
    return _rotation(_centred_matrices if centred else _matrices, coords, head_dim, theta, **options)


def _rotation(
    make: Callable[[Tensor, torch.dtype], Form],
    coords: Tensor,
    head_dim: int,
    theta: float,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    bos: bool = False,
) -> Form:
    if coords.ndim == 2 and coords.device.type == "cpu" and not torch.compiler.is_exporting():
        key = (coords.contiguous().numpy().tobytes(), coords.shape[-1], coords.dtype, head_dim, theta, bos, device)
        if scale == 1.0:
            return cast(Form, _cached_rotation(make, dtype, *key))
        angles = _cached_angles(*key)
    else:
        angles = rotary_angles(coords.to(device), head_dim, theta, bos=bos)
    return make(angles * scale, dtype)


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn queries or keys [B, H, T, K] by a table of [T, K/2] or [B, T, K/2], in the half-split form.

    Pair i is (x[i], x[i + K/2]).
    """
    cos, sin = (t if t.ndim == 2 else t[:, None] for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def of_next(rows: Tensor, mask: Tensor | None, *, missing: Tensor) -> Tensor:
    """At every place the row of the next token; where there is none (at the end, before padding) that of `missing`.

    Args:
        rows, missing: [T, W] or [B, T, W].
        mask: [B, T] bool, True for a real token, or None.

    Returns:
        The same shape, or [B, T, W] where there is a mask.
    """
    shifted = torch.cat((rows[..., 1:, :], missing[..., -1:, :]), dim=-2)
    if mask is None:
        return shifted
    followed = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    return torch.where(followed[..., None], shifted, missing)


def norm_rotations(tables: Sequence[RotaryTable], dtype: torch.dtype, *, centred: bool = True) -> Tensor:
    """The matrices that `fused.NormRotate` takes, or without `centred` those of `fused.AffineNormRotate`.

    Args:
        tables: one for queries and keys, or one for each; [T, K/2] or [B, T, K/2], float32.
        centred: take off the mean before the rotation.

    Returns:
        [S, T, W, K, K], with S = 1 where no table tells samples apart, else B, and W the number of tables.
    """
    cos, sin = (torch.stack(torch.broadcast_tensors(*each), dim=-2) for each in zip(*tables, strict=True))
    matrices = rotation_matrices(RotaryTable(cos, sin), centred=centred).to(dtype)
    return matrices[None] if matrices.ndim == 4 else matrices


def rotation_matrices(table: RotaryTable, *, centred: bool) -> Tensor:
    """Matrices [..., K, K] for a table of [..., K/2]: x @ matrix rotates x [K], first less its mean where `centred`."""
    cos, sin = table
    pairs = cos.shape[-1]
    # (I - 1/K) @ rotation: the rotation is four diagonals, and from each column its mean is taken.
    means = torch.cat((cos - sin, cos + sin), dim=-1) / (2 * pairs) if centred else cos.new_zeros(2 * pairs)
    matrix = (-means)[..., None, :].expand(*cos.shape[:-1], 2 * pairs, 2 * pairs).contiguous()
    for row, column, entry in ((0, 0, cos), (0, pairs, sin), (pairs, 0, -sin), (pairs, pairs, cos)):
        block = matrix[..., row : row + pairs, column : column + pairs]
        block.diagonal(dim1=-2, dim2=-1).add_(entry)
    return matrix


def _table(angles: Tensor, dtype: torch.dtype) -> RotaryTable:
    return RotaryTable(angles.cos().to(dtype), angles.sin().to(dtype))


def _centred_matrices(angles: Tensor, dtype: torch.dtype) -> Tensor:
    return norm_rotations([_table(angles, angles.dtype)], dtype)


def _matrices(angles: Tensor, dtype: torch.dtype) -> Tensor:
    return norm_rotations([_table(angles, angles.dtype)], dtype, centred=False)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is first made in inference mode must serve training too
def _cached_angles(
    data: bytes, axes: int, dtype: torch.dtype, head_dim: int, theta: float, bos: bool, device: torch.device
) -> Tensor:
    coords = torch.frombuffer(bytearray(data), dtype=dtype).view(-1, axes)
    return rotary_angles(coords, head_dim, theta, bos=bos).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cached_rotation(make: Callable[[Tensor, torch.dtype], Any], dtype: torch.dtype, *key: Any) -> Any:
    return make(_cached_angles(*key), dtype)
