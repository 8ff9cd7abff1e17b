"""The predictor: a pre-norm Transformer whose causality is an argument.

Architecture of the released NEPA checkpoints, with the paper's switches (its Section 3 and its ablation
table): LayerScale, QK-Norm with or without weight, GELU or SwiGLU, RoPE, drop path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nepa_core.basics import FROZEN
from nepa_core.kernels.attention import Allowed, Backend, attend, attention_mask, has_varlen_kernel
from nepa_core.kernels.fused import AffineNormRotate, NormRotate, ScaledLinear
from nepa_core.kernels.packing import Packing, pack_rows
from nepa_core.rope import RotaryPair, RotaryTable, norm_rotations, of_next, rotary_matrices, rotary_table, rotate

Rope = RotaryTable | RotaryPair | Tensor | None
"""How queries and keys are turned; a tensor holds the matrices of `norm_rotations`."""

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`Cache.extended` of a block."""


class PredictorConfig(BaseModel):
    """Shape and switches of the network.

    `PredictorConfig(dim=384, depth=12, heads=6)` is enough: the rest has the paper's values (Section 3 and its best
    ablation), and where it is silent those of the released checkpoints; positions are RoPE's alone, as there.

    Attributes:
        dim, depth, heads, mlp_dim: width D, number of blocks, attention heads, hidden width of the MLP (default 4 D).
        activation, gated: "gelu" and False is the released form; "silu" and True is SwiGLU (the paper's).
        layer_scale: start of the LayerScale vectors, or None for none. 1e-5 in the paper; below some ten
            thousand steps start at 1.0, or the branches starve.
        qk_norm: LayerNorm of queries and keys over the head width: "off", "plain" (no weight) or "affine"
            (a weight, never a bias).
        rope_theta: longest rotary wavelength, or None for no RoPE.
        rope_rescale: in pre-training all coordinates are multiplied by one factor a step, log-uniform in
            [1/rope_rescale, rope_rescale]; 1 is off, 2 is the released setting.
        learned_positions: number of canonical places with a learned vector added to the input (never to a
            target); 0 is off. The paper's text has it, the released checkpoints don't.
        predict_position: whether a place is told where the next token lies, as an order that differs between samples
            needs. "add": a linear map of cos and sin of its coordinates (RoPE's wavelengths, one pair for every two
            numbers of D) is added to the input, BOS included. "rotate": queries are turned by its coordinates, keys by
            their own; the first prediction, which attends to BOS alone, learns nothing from it. Never part of a
            target. A place that no token follows gets nothing, or its own coordinates.
        parts: number of kinds of data whose tokens stand in one sequence or batch (`Tokens.part`), each with a learned
            vector that is added to its inputs (never to a target); 0 is none.
        bos: a learned vector in front of the tokens, from which the first token is predicted.
        mask_token: a learned vector for inputs hidden by `objective.input_mask`.
        drop_path: stochastic depth, rising linearly from 0 to this rate at the last block.
        norm_eps: epsilon of every LayerNorm.
        attention: back-end of `attend`.
        pack: put several short sequences in one row (see `nepa_core.kernels.packing`): the same results in less time
            where much of a batch is padding. Without a mask where `has_varlen_kernel`.
    """

    model_config = FROZEN

    dim: int = Field(gt=0, le=2**20)
    depth: int = Field(gt=0, le=2**14)
    heads: int = Field(gt=0, le=2**14)
    mlp_dim: int = Field(default_factory=lambda shape: 4 * shape.get("dim", 1), gt=0, le=2**22)
    activation: Literal["gelu", "silu"] = "silu"
    gated: bool = True
    layer_scale: float | None = Field(default=1e-5, ge=-1e3, le=1e3)
    qk_norm: Literal["off", "plain", "affine"] = "plain"
    rope_theta: float | None = Field(default=100.0, gt=1e-6, le=1e12)
    rope_rescale: float = Field(default=1.0, ge=1, le=1e6)
    bos: bool = True
    norm_eps: float = Field(default=1e-12, gt=1e-30, le=1)
    learned_positions: int = Field(default=0, ge=0, le=2**24)
    predict_position: Literal["off", "add", "rotate"] = "off"
    parts: int = Field(default=0, ge=0, le=2**12, exclude_if=lambda parts: parts == 0)
    mask_token: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    attention: Backend = "sdpa"
    pack: bool = False

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.dim % (2 * self.heads):
            raise ValueError(f"model.dim={self.dim} must be a multiple of 2 * model.heads={2 * self.heads}")
        if self.predict_position == "rotate" and self.rope_theta is None:
            raise ValueError("model.predict_position=rotate turns queries by RoPE: set model.rope_theta, or use add")
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def weights(self) -> int:
        """How many numbers the blocks and the learned positions hold, known before they are made."""
        mlp = (3 if self.gated else 2) * self.mlp_dim
        return self.depth * self.dim * (4 * self.dim + mlp) + self.learned_positions * self.dim


@dataclass
class Trace:
    """What a forward pass leaves for a reader, filled in by `Predictor.forward(trace=...)`.

    Attributes:
        hidden: [B, T, D] each: the input, the output of every block, and the output of the final norm.
        attention: [B, H, T, T] float weights of every block; filled only with the "eager" back-end.
    """

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


class Cache:
    """Keys and values of the places read so far, so that a causal pass over the next ones reads these alone.

    Made empty for one batch of sequences, and handed to every pass over it. Room for the whole sequence is taken at
    once, and rotary tables are made once. It is written in place: not for gradients.

    Attributes:
        places: T, of the whole sequence. read: how many have been.
    """

    def __init__(self, places: int) -> None:
        self.places, self.read = places, 0
        self.rope: Rope = None
        self.allowed: Tensor | None = None
        self._kept: list[Tensor] = []  # of every block, [2, B, H, T, K]

    def following(self, count: int) -> tuple[Rope, Allowed]:
        """The rotation of so many next places, and whom they may look at: [B or 1, 1, count, places until then] bool.

        Raises:
            ValueError: there are not so many.
        """
        until = self.read + count
        if until > self.places:
            raise ValueError(f"{count} places after the first {self.read} are more than the {self.places} of the cache")
        assert self.allowed is not None
        return _rows(self.rope, slice(self.read, until)), self.allowed[:, :, self.read : until, :until]

    def extended(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, all until now, from those of the places being read: [B, H, t, K] each."""
        if block == len(self._kept):
            self._kept.append(k.new_empty(2, *k.shape[:2], self.places, k.shape[3]))
        until = self.read + k.shape[2]
        keys, values = self._kept[block][:, :, :, :until]
        keys[:, :, self.read :], values[:, :, self.read :] = k, v
        return keys, values


class Attention(nn.Module):
    """Multi-head self-attention with QK-Norm and RoPE."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_eps = config.norm_eps
        self.backend: Backend = config.attention
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        if config.qk_norm == "off":
            self.q_norm: nn.Module = nn.Identity()
            self.k_norm: nn.Module = nn.Identity()
        else:
            weight = config.qk_norm == "affine"
            self.q_norm, self.k_norm = (
                nn.LayerNorm(config.head_dim, config.norm_eps, elementwise_affine=weight, bias=False) for _ in range(2)
            )

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        scale: Tensor | None,
        *,
        causal: bool,
        allowed: Allowed,
        trace: Trace | None,
        extend: Extend | None = None,
    ) -> Tensor:
        qkv = self.qkv(x)
        if isinstance(rope, Tensor):
            affine = [weight.to(qkv.dtype) for norm in (self.q_norm, self.k_norm) for weight in norm.parameters()]
            turn = AffineNormRotate if affine else NormRotate
            q, k, v = turn.apply(qkv, rope, *affine, self.heads, self.norm_eps)  # type: ignore[no-untyped-call]
        else:
            q, k, v = rearrange(qkv, "b t (qkv h k) -> qkv b h t k", qkv=3, h=self.heads)
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            if rope is not None:
                for_q, for_k = rope if isinstance(rope, RotaryPair) else (rope, rope)
                q, k = rotate(q, for_q), rotate(k, for_k)
        if extend is not None:
            k, v = extend(k, v)
        mixed, weights = attend(q, k, v, causal=causal, allowed=allowed, backend=self.backend)
        if trace is not None and weights is not None:
            trace.attention.append(weights)
        return scaled_linear(rearrange(mixed, "b h t k -> b t (h k)"), self.out, scale)


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x))."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.activation = F.gelu if config.activation == "gelu" else F.silu
        self.up = nn.Linear(config.dim, config.mlp_dim)
        self.gate = nn.Linear(config.dim, config.mlp_dim) if config.gated else None
        self.down = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        up: Tensor = self.up(x)
        hidden = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return scaled_linear(hidden, self.down, scale)


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor | None) -> Tensor:
    """linear(x) times a LayerScale vector [D], in the dtype of `compute_dtype`."""
    if scale is None:
        out: Tensor = linear(x)
    elif torch.compiler.is_compiling():
        out = linear(x) * scale
    else:
        dtype = compute_dtype(x)
        out = ScaledLinear.apply(*(t.to(dtype) for t in (x, linear.weight, linear.bias, scale)))  # type: ignore
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x here: that of autocast, or x's own."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


class Block(nn.Module):
    """x += drop_path(ls1 * attention(norm1(x))); x += drop_path(ls2 * mlp(norm2(x)))."""

    def __init__(self, config: PredictorConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = Mlp(config)
        self.drop_path = drop_path
        if config.layer_scale is None:
            self.scale1 = self.scale2 = None
        else:
            self.scale1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.scale2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        *,
        causal: bool,
        allowed: Allowed,
        trace: Trace | None,
        packing: Packing | None = None,
        extend: Extend | None = None,
    ) -> Tensor:
        branch = self.attention(
            self.norm1(x), rope, self.scale1, causal=causal, allowed=allowed, trace=trace, extend=extend
        )
        x = x + self._dropped(branch, packing)
        return x + self._dropped(self.mlp(self.norm2(x), self.scale2), packing)

    def _dropped(self, branch: Tensor, packing: Packing | None) -> Tensor:
        """Stochastic depth: in training, drop the branch of whole samples and scale up the others."""
        if not self.training or self.drop_path == 0:
            return branch
        samples = len(branch if packing is None else packing.mask)
        keep = torch.rand(samples, 1, 1, device=branch.device) >= self.drop_path
        if packing is not None:
            keep = keep[packing.owner, 0]
        return branch * (keep / (1 - self.drop_path)).to(branch.dtype)


class Predictor(nn.Module):
    """Blocks and the final LayerNorm. Sequence in, sequence out; knows nothing of BOS, targets or data."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.fused = True
        self.recompute = False
        self.apply(init_weights)

    def compile_blocks(self) -> None:
        """Run every block through torch.compile; from then on it gets the plain formulas, which it fuses itself.

        Raises:
            UserError: the back-end does not run where the network is.
        """
        if self.config.attention == "xformers":
            from nepa_core.kernels.xformers import refuse_off_cuda  # here, as it imports the compiler

            refuse_off_cuda(next(self.parameters()).device)
        self.fused = False
        for block in self.blocks:
            block.compile()

    def recompute_blocks(self) -> None:
        """Keep only the input of every block for the backward pass, which then runs the block's forward pass again.

        The same gradients, dropped paths included; less memory for about a third more time. A pass that traces
        attention maps keeps all.
        """
        self.recompute = True

    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        coord_scale: float = 1.0,
        trace: Trace | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Predict the next embedding at every place.

        Args:
            x: [B, T, D] input embeddings. With BOS in front T is one more than the coordinates have rows. With a cache
                only those of the next places, one or more; coordinates and mask are those of the whole sequence, the
                same in every pass.
            coords: [N, A] or [B, N, A] float32 positions of the tokens (without BOS).
            causal: attend backwards only.
            mask: [B, T] bool, True for a real token, or None.
            coord_scale: factor on all coordinates (the rotary augmentation of pre-training).
            trace: filled with hidden states, and with attention maps by the "eager" back-end.
            cache: of this batch; the result is that of a pass over the whole sequence, but for rounding.

        Returns:
            [B, T, D], the output of the final LayerNorm (with `config.pack`, zero where no token is real).

        Raises:
            ValueError: a cache without `causal`: places read before would have to see those of now.
        """
        packing = self._packing(x, mask) if trace is None and cache is None else None
        if cache is not None:
            if not causal:
                raise ValueError("what later places change can't be kept: a cache needs causal=True")
            if cache.read == 0:
                whole = x[:, :1].expand(-1, cache.places, -1)  # for its shape
                cache.rope = self._rope(whole, coords, coord_scale, mask, None, tables_alone=True)
                real = torch.ones_like(whole[:1, :, 0], dtype=torch.bool) if mask is None else mask
                cache.allowed = attention_mask(real, causal=True)
            rope, allowed = cache.following(x.shape[1])
        else:
            rope = self._rope(x, coords, coord_scale, mask, packing)
            allowed = None if mask is None or packing is not None else attention_mask(mask, causal=causal)
        if packing is not None:
            allowed = packing.sequences or packing.allowed(causal=causal)
            x = packing.pack(x)
        maps = trace is not None and self.config.attention == "eager"  # a second pass would add them again
        recompute = self.recompute and not maps and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            if trace is not None:
                trace.hidden.append(x)
            run = partial(block, causal=causal, allowed=allowed, trace=trace if maps else None, packing=packing)
            if cache is not None:
                run.keywords["extend"] = partial(cache.extended, number)
            x = checkpoint(run, x, rope, use_reentrant=False) if recompute else run(x, rope)
        if cache is not None:
            cache.read += x.shape[1]
        out: Tensor = self.norm(x)
        if trace is not None:
            trace.hidden += [x, out]
        return out if packing is None else packing.unpack(out)

    def _packing(self, x: Tensor, mask: Tensor | None) -> Packing | None:
        if not self.config.pack or mask is None:
            return None
        flat = has_varlen_kernel(self.config.attention, self.config.head_dim, x.device, compute_dtype(x))
        return pack_rows(mask, flat=flat)

    def _rope(
        self,
        x: Tensor,
        coords: Tensor,
        coord_scale: float,
        mask: Tensor | None,
        packing: Packing | None,
        *,
        tables_alone: bool = False,
    ) -> Rope:
        """The rotation in the form `Attention` wants: matrices where the norm can join in, else tables.

        Args:
            tables_alone: as a cache wants it: matrices of all places and samples would take much memory.
        """
        if self.config.rope_theta is None:
            return None
        ahead = self.config.predict_position == "rotate"
        # With a weight for the norm, matrices of each sample's own take more memory than the plain formulas keep.
        shared = coords.ndim == 2 and packing is None and not (ahead and mask is not None)
        centred = self.config.qk_norm == "plain"
        matrices = self.fused and not tables_alone and (centred or (shared and self.config.qk_norm == "affine"))
        dtype = compute_dtype(x)
        where = (coords, self.config.head_dim, self.config.rope_theta)
        options: dict[str, Any] = {"device": x.device, "scale": coord_scale, "bos": x.shape[1] == coords.shape[-2] + 1}
        if matrices and not ahead and packing is None:
            return rotary_matrices(*where, centred=centred, dtype=dtype, **options)
        table = rotary_table(*where, dtype=torch.float32 if matrices else dtype, **options)
        tables = [table]
        if ahead:
            tables.insert(0, RotaryTable(*(of_next(angle, mask, missing=angle) for angle in table)))
        if packing is not None:
            tables = [_packed(each, packing, len(x)) for each in tables]
        if matrices:
            return norm_rotations(tables, dtype, centred=centred)
        return RotaryPair(*tables) if ahead else tables[0]


def _rows(rope: Any, places: slice) -> Any:
    """These places of the tables."""
    if isinstance(rope, Tensor):
        return rope[..., places, :]
    return None if rope is None else type(rope)(*(_rows(each, places) for each in rope))


def _packed(table: RotaryTable, packing: Packing, samples: int) -> RotaryTable:
    """The table of a batch as that of its packed rows."""
    return RotaryTable(*(packing.pack(x.expand(samples, -1, -1)) for x in table))


def init_weights(module: nn.Module) -> None:
    """Linear maps: truncated normal, std 0.02, biases 0 (the released initialisation)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
