"""Augmentation and mixing of a batch of spectrograms on whatever device they lie, each within its own real frames.

The data set draws eight numbers a clip, beside the spectrogram under `DRAWN`; what they say is done to the whole
batch on the device, so loader processes only read. It is a function of the batch: no generator of the device is drawn
from, nothing waits for it, and a resumed run is exact. torchaudio's masks draw where they mask, and know one length for
all clips of a batch.

Shapes: B clips, T frames, F mel bands, k frames in a token, P numbers in a token.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field, NonNegativeInt, model_validator
from torch import Tensor

from modalities.data.image_augment import noise_field
from nepa_core.basics import FROZEN

DRAWN = "augment"
DRAWS = 8
"""Numbers drawn for a clip, from 0 to 1: width and start of both masks, roll, loudness of the noise and its place."""


class SpectrogramAugment(BaseModel):
    """What is done to spectrograms in training, in this order: roll, noise, masks. Each is off at 0.

    Attributes:
        time_mask, frequency_mask: SpecAugment (Park et al. 2019, sections 2 and 3): one stretch of frames and one of
            bands read the mean of the training data; each has a width drawn up to this many, and in time up to half of
            a clip.
        roll: a clip is turned round by up to this share of its frames, either way; what leaves it at one end comes in
            at the other. 0.5 lets it begin anywhere.
        noise: normal noise is added; its standard deviation is drawn for each clip up to this many of the training
            data's (AST, Gong et al. 2021, has uniform noise of up to about a twentieth).
    """

    model_config = FROZEN

    time_mask: NonNegativeInt = 0
    frequency_mask: NonNegativeInt = 0
    roll: float = Field(default=0.0, ge=0, le=0.5)
    noise: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_is_on(self) -> SpectrogramAugment:
        if not any((self.time_mask, self.frequency_mask, self.roll, self.noise)):
            raise ValueError("all of data.augment is 0; set data.augment=null for no augmentation")
        return self


def draw(*clips: int) -> Tensor:
    """What is drawn for so many clips, or for one: [*clips, 8] float32 from torch's global generator."""
    return torch.rand(*clips, DRAWS)


def of_frames(token: Tensor, bands: int, patch: tuple[int, int] | None) -> Tensor:
    """A number for every place of a token, as frames that repeat along a clip: [P] -> [k, F].

    Args:
        patch: bands and frames of a patch, its highest band first; all rows of them have the same numbers. None where
            tokens are whole frames.
    """
    if patch is None:
        return token.view(-1, bands)
    return token.view(patch).repeat(bands // patch[0], 1).flip(0).T


def augmented(
    mel: Tensor, frames: Tensor, drawn: Tensor, asked: SpectrogramAugment, mean: Tensor, std: Tensor, longest: int
) -> Tensor:
    """Roll, add noise and mask: [B, T, F] -> [B, T, F]. Padding stays as it is.

    Args:
        frames: [B], the real ones. drawn: [B, 8], see `draw`.
        mean, std: [k, F] of the training data, see `of_frames`.
        longest: frames of the longest clip there may be.
    """
    count, bands = mel.shape[1:]
    drawn = drawn.to(torch.float32)[..., None]
    real, place = frames[:, None], torch.arange(count, device=mel.device)
    inside = place < real
    if asked.roll:
        shift = ((2 * drawn[:, 4] - 1) * asked.roll * real).round().long()
        source = torch.where(inside, (place - shift) % real, place)
        mel = mel.gather(1, source[..., None].expand_as(mel))
    if asked.noise:
        begin, above = (drawn[:, 6] * longest).long(), (drawn[:, 7] * bands).long()
        field = noise_field(1, longest, bands, mel.device)[0]
        loud = asked.noise * drawn[:, 5, None] * _along(std, count)
        noise = field[(begin + place)[..., None], (above + torch.arange(bands, device=mel.device))[:, None]]
        mel = torch.where(inside[..., None], mel + loud * noise, mel)
    masked = torch.zeros((), dtype=torch.bool, device=mel.device)
    if asked.frequency_mask:
        most = torch.full_like(real, min(asked.frequency_mask, bands))
        masked = _stretch(drawn[:, 0], drawn[:, 1], most, torch.full_like(real, bands), bands)[:, None]
    if asked.time_mask:
        most = (real // 2).clamp(max=asked.time_mask)
        masked = masked | _stretch(drawn[:, 2], drawn[:, 3], most, real, count)[..., None]
    return torch.where(masked & inside[..., None], _along(mean, count), mel)


def _stretch(width: Tensor, start: Tensor, most: Tensor, size: Tensor, count: int) -> Tensor:
    """Which of `count` places lie in a stretch of up to `most` of `size`: all [B, 1] -> bool [B, count]."""
    wide = (width * (most + 1)).long()
    first = (start * (size - wide + 1)).long()
    place = torch.arange(count, device=width.device)
    return (place >= first) & (place < first + wide)


def _along(frames: Tensor, count: int) -> Tensor:
    """[k, F] repeated to [count, F]."""
    return frames.repeat(-(-count // len(frames)), 1)[:count]


def mixed(
    mel: Tensor, frames: Tensor, share: float, centre: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each clip with that at the mirrored place of the batch.

    Mixup (Zhang et al. 2018): the weighted mean of both. Where one is shorter it is silent from its end on, and the
    longer one says which frames are real. CutMix (Yun et al. 2019): a box of bands and frames, of those frames that
    both have, is taken from the other; real frames stay those of the first.

    Args:
        mel: [B, T, F], padding 0. frames: [B] int64.
        share: of the first clip. centre: of the box, from 0 to 1 in time and frequency; None for mixup.

    Returns:
        [B, T, F]; [B] int64; and the share of the first clip in what came out, [B] float32: of its own frames.
    """
    other, theirs = mel.flip(0), frames.flip(0)
    if centre is None:
        kept = torch.full(frames.shape, share, device=mel.device)
        return share * mel + (1 - share) * other, torch.maximum(frames, theirs), kept
    sizes = torch.minimum(frames, theirs), torch.full_like(frames, mel.shape[2])
    (begin, end), (low, high) = (_side(size, share, at) for size, at in zip(sizes, centre, strict=True))
    time, band = (torch.arange(side, device=mel.device) for side in mel.shape[1:])
    inside_time = (time >= begin[:, None]) & (time < end[:, None])
    inside_band = (band >= low[:, None]) & (band < high[:, None])
    box = inside_time[:, :, None] & inside_band[:, None]
    kept = 1 - (end - begin) * (high - low) / (frames * mel.shape[2])
    return torch.where(box, other, mel), frames, kept


def _side(size: Tensor, share: float, at: float) -> tuple[Tensor, Tensor]:
    """Begin and end [B] of one side of a box, its ends cut off where they lie outside."""
    wide, middle = (size * (1 - share) ** 0.5).long(), (size * at).long()
    return (middle - wide // 2).clamp(min=0), torch.minimum(middle + (wide + 1) // 2, size)
