"""From the hidden states of a network to features: which layer, and how its places become one vector.

Shapes: B samples, T places, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_core.model import NEPA, Prediction
from nepa_core.objective import negative_cosine, pair_up
from nepa_core.predictor import Trace
from nepa_core.tokens import Tokens


class Row(NamedTuple):
    """One read-out: a layer (0 is the embedding, i the output of block i, depth + 1 the final norm) and a pooling.

    The pooling "token" is none: single tokens are read.
    """

    layer: int
    pooling: str

    def name(self, depth: int) -> str:
        """ "layer 2, mean": the name in the table and in probe.json."""
        layer = {0: "embedding", depth + 1: "final norm"}.get(self.layer, f"layer {self.layer}")
        return f"{layer}, {'BOS' if self.pooling == 'bos' else self.pooling}"


def read_rows(
    model: NEPA, tokens: Tokens, rows: Sequence[Row], *, causal: bool, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Tensor, Prediction]:
    """What each row reads of a batch, which places are real [B, T] bool, and what the network gives.

    Rows of "token" are [B, N, D] float32 in canonical order, the others as `pool` gives them.

    Args:
        tokens: in the order of prediction.
        dtype: of autocast; None for float32 throughout.
    """
    trace, bos = Trace(), model.config.bos
    device = tokens.values.device
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        out = model(tokens, causal=causal, trace=trace)
    found = [
        canonical_tokens(trace.hidden[row.layer].float(), tokens, bos=bos)
        if row.pooling == "token"
        else pool(trace.hidden[row.layer], out.mask, row.pooling, bos=bos)
        for row in rows
    ]
    real = torch.ones(trace.hidden[0].shape[:2], dtype=torch.bool, device=device) if out.mask is None else out.mask
    return found, real, out


def surprise_of_tokens(out: Prediction, tokens: Tokens, *, bos: bool) -> Tensor:
    """How badly every token was predicted from those before it: the loss -cos(p_t, z_{t+1}) of token t + 1.

    Returns:
        [B, N] float32 in canonical order, -1 to 1; NaN where nothing predicted the token: it is not real, or the one
        before it is not, or it is the first and there is no BOS.
    """
    prediction, target, counted = pair_up(out.predictions, out.embeddings, out.mask, shift=True)
    found = negative_cosine(prediction, target)
    found = found if counted is None else found.masked_fill(~counted, torch.nan)
    return tokens.canonical(found if bos else F.pad(found, (1, 0), value=torch.nan))


def pool(hidden: Tensor, mask: Tensor | None, pooling: str, *, bos: bool) -> Tensor:
    """Hidden states [B, T, D] to a vector [B, D] float32; "attentive" keeps the places, in float16."""
    if pooling == "attentive":
        most = torch.finfo(torch.float16).max
        return hidden.float().clamp(-most, most).half()
    if pooling == "bos":
        return hidden[:, 0].float()
    if pooling == "last":
        return last_token(hidden, mask).float()
    return mean_of_tokens(hidden.float(), mask, bos=bos)


def mean_of_tokens(features: Tensor, mask: Tensor | None, *, bos: bool) -> Tensor:
    """Mean over the real tokens, BOS left out; [B, T, D] -> [B, D]."""
    start = int(bos)
    features = features[:, start:]
    if mask is None:
        return features.mean(1)
    real = mask[:, start:, None].to(features.dtype)
    return (features * real).sum(1) / real.sum(1).clamp(min=1)


def last_token(features: Tensor, mask: Tensor | None) -> Tensor:
    """The last real token; [B, T, D] -> [B, D]."""
    if mask is None:
        return features[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(1).clamp(min=0)
    return features[torch.arange(features.shape[0], device=mask.device), last]


def canonical_tokens(features: Tensor, tokens: Tokens, *, bos: bool) -> Tensor:
    """Features without BOS, back in canonical order, zero where a token is not real; [B, T, D] -> [B, N, D]."""
    features = features[:, int(bos) :]
    if tokens.mask is not None:
        features = features * tokens.mask[..., None]
    return tokens.canonical(features)
