"""The authors' network as they write it, in plain torch: what a step of ours is timed against.

Queries, keys and values by a linear map each, QK-norm as a LayerNorm, RoPE by halves that are concatenated, tables made
anew in every pass, LayerScale as a product, the exact GELU: the description of the released model
(arXiv 2512.16922 and its configurations), with names of our own. Attention is torch's `scaled_dot_product_attention`.
`tests/benchmarks/test_authors.py` holds it to the authors' own outputs.

Shapes: B samples, T places, D width, H heads, K numbers a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nepa_core.model import Prediction
from nepa_core.predictor import PredictorConfig, init_weights
from nepa_core.tokens import Tokens


class AuthorsNetwork(nn.Module):
    """Takes what `NEPA` takes in pre-training, and predicts what it predicts."""

    def __init__(self, config: PredictorConfig, embed: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embed = embed
        self.bos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, config.dim), std=0.02))
        self.blocks = nn.ModuleList(AuthorsBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks.apply(init_weights)

    def forward(self, tokens: Tokens, *, causal: bool, coord_scale: float = 1.0, **_: Any) -> Prediction:
        x = self.embed(tokens.values).float()
        x = embeddings = torch.cat((self.bos.expand(len(x), 1, -1), x), dim=1)
        cos, sin = rotary(tokens.coords.to(x.device) * coord_scale, self.config)
        for block in self.blocks:
            x = block(x, cos, sin, causal)
        return Prediction(embeddings, self.norm(x), None)


class AuthorsBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled by a vector before it is added."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, config.norm_eps), nn.LayerNorm(dim, config.norm_eps)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        weight = config.qk_norm == "affine"
        self.q_norm, self.k_norm = (
            nn.LayerNorm(config.head_dim, config.norm_eps, elementwise_affine=weight, bias=False) for _ in range(2)
        )
        self.up, self.down = nn.Linear(dim, config.mlp_dim), nn.Linear(config.mlp_dim, dim)
        start = 1.0 if config.layer_scale is None else config.layer_scale
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), start)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: bool) -> Tensor:
        hidden = self.norm1(x)
        q, k, v = (self._heads(each(hidden)) for each in (self.query, self.key, self.value))
        q, k = (rotated(norm(each), cos, sin).to(v.dtype) for norm, each in ((self.q_norm, q), (self.k_norm, k)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(rearrange(mixed, "b h t k -> b t (h k)")) * self.scale1
        after: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)))) * self.scale2
        return after

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, K]."""
        return rearrange(x, "b t (h k) -> b h t k", h=self.heads)


def rotary(coords: Tensor, config: PredictorConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of [N, 2] coordinates, each [N, K] float32: K/4 frequencies for y, as many for x, and both again."""
    count = config.head_dim // 4
    theta = config.rope_theta or 100.0
    frequencies = theta ** -(torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    angles = (2 * math.pi * coords.float()[..., None] * frequencies).flatten(-2).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every place of [B, H, T, K] but BOS, the first, turned by its angles."""
    bos, patches = x[:, :, :1], x[:, :, 1:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((bos, turned.to(bos.dtype)), dim=2)
