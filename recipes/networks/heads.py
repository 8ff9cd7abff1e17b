"""Read-outs that sit on the predictor's output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_core.pooling import last_token, mean_of_tokens


class MeanHead(nn.Module):
    """LayerNorm of the mean over tokens, then one linear map (the released classification head).

    The linear map starts at zero, as both the paper and the released scripts do.
    """

    def __init__(self, dim: int, classes: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.classifier = _zero_linear(dim, classes)

    def forward(self, features: Tensor, mask: Tensor | None, *, bos: bool) -> Tensor:
        """[B, T, D] -> logits [B, classes]."""
        logits: Tensor = self.classifier(self.norm(mean_of_tokens(features, mask, bos=bos)))
        return logits


class LastHead(nn.Module):
    """One linear map, which starts at zero, on the last token (the paper's read-out)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.classifier = _zero_linear(dim, classes)

    def forward(self, features: Tensor, mask: Tensor | None, *, bos: bool) -> Tensor:
        """[B, T, D] -> logits [B, classes]."""
        logits: Tensor = self.classifier(last_token(features, mask))
        return logits


class RegressionHead(nn.Module):
    """A pooling head whose outputs are standardised numbers, brought to the unit of the targets.

    Args:
        head: features -> [B, K].
        mean, std: [K] of the training targets; they are stored with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, head: MeanHead | LastHead, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, features: Tensor, mask: Tensor | None, *, bos: bool) -> Tensor:
        """[B, T, D] -> numbers [B, K] float32."""
        numbers: Tensor = self.head(features, mask, bos=bos).float()
        return numbers * self.std + self.mean


class MultiLabelHead(nn.Module):
    """A pooling head whose outputs are added to the log-odds of the classes among the training samples.

    Args:
        head: features -> [B, C].
        shares: [C] of the training samples, above 0 and below 1; they are stored with the weights.
    """

    shares: Tensor

    def __init__(self, head: MeanHead | LastHead, shares: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("shares", shares.clone())

    def forward(self, features: Tensor, mask: Tensor | None, *, bos: bool) -> Tensor:
        """[B, T, D] -> logits [B, C] float32."""
        logits: Tensor = self.head(features, mask, bos=bos).float()
        return logits + self.shares.logit()


class AttentiveHead(nn.Module):
    """Attentive probe: one learned query attends over the tokens (cross-attention), then one linear map.

    The pooling of CAE (arXiv 2202.03026) and AIM (arXiv 2401.08541, Section 3). Some 64 channels a head, as in the
    trunk. BOS, where there is one, is a token like the others.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.heads = math.gcd(dim, max(dim // 64, 1))
        self.query = nn.Parameter(torch.zeros(dim))  # starts as the mean over the tokens
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] and mask [B, T] bool (True = a real token) -> logits [B, classes]."""
        batch, _, dim = features.shape
        query = self.query.expand(batch, 1, dim)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, self.key(features), self.value(features))
        )
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        logits: Tensor = self.classifier(pooled.transpose(1, 2).flatten(1))
        return logits


class DenseHead(nn.Module):
    """One linear map of every token, which starts at zero: the plainest dense read-out, for any modality."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.linear = _zero_linear(dim, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, outputs]."""
        out: Tensor = self.linear(features)
        return out


def _zero_linear(dim: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(dim, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
