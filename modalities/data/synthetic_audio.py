"""What a synthetic clip leaves uncertain: its tokens with the noise drawn again that nothing heard before tells.

Shapes: N tokens of a clip, P numbers in a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.data.audio import SYNTHETIC_NOISE, FrontEnd, framed_log_mel


def redrawn_tokens(clean: Tensor, noise: Tensor, form: FrontEnd, draws: int, generator: torch.Generator) -> Tensor:
    """Every token of a clip with the noise that no earlier token has seen drawn again: [N, draws, P]."""
    token = form.step * form.hop
    length = min(len(clean), form.longest * form.hop)
    count = -(-length // token)
    side, width = form.n_fft // 2, (form.step - 1) * form.hop + form.n_fft
    pad = (side, (count - 1) * token + width - side - length)
    clip, known = F.pad(clean[:length], pad), F.pad(noise[:length], pad)
    sounding = F.pad(torch.ones(length), pad)
    point = torch.arange(len(clip)) - side
    fresh = SYNTHETIC_NOISE * torch.randn(count, draws, width, generator=generator)
    windows = [x.unfold(0, width, token) for x in (clip, known, sounding, point)]
    clean_, known_, sounding_, point_ = (x[:count, None] for x in windows)
    seen = torch.arange(count)[:, None, None] * token - form.hop + form.window // 2  # end of the last window before
    mixed = clean_ + torch.where(point_ < seen, known_, fresh * sounding_)
    return framed_log_mel(mixed, form).flatten(-2)


def unbiased_length(units: Tensor) -> Tensor:
    """Length of the expectation of unit vectors, from draws of them: [..., draws, D] -> [...]."""
    draws = units.shape[-2]
    square = units.mean(-2).square().sum(-1)
    return ((draws * square - 1) / (draws - 1)).clamp(min=0).sqrt()
