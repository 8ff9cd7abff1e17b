"""Audio: log-mel frames, or patches of the spectrogram.

Shapes: B clips, T frames, F mel bands. As frames, N = T / k tokens of k frames, P = k * F. As patches of p bands and q
frames, N = rows * columns = (F / p) * (T / q) tokens, P = p * q; row 0 of the spectrogram holds the highest bands, as
it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from modalities.data.audio import (
    FLOOR,
    HELD_OUT,
    Clips,
    FrontEnd,
    Padding,
    SourceName,
    Synthetic,
    audio_folds,
    empty_bands,
    open_audio,
    open_files,
    open_source,
    waveform,
)
from modalities.data.audio_files import SUFFIXES
from modalities.data.audio_sets import Keywords, Subset
from modalities.data.spectrogram_augment import DRAWN, SpectrogramAugment, augmented, mixed, of_frames
from modalities.data.standardised import StandardisedLinear, token_statistics
from modalities.data.synthetic_audio import redrawn_tokens, unbiased_length
from modalities.image import patchify, unpatchify
from modalities.orders import Ordered, grid_order, is_static, known_order, padding_behind
from nepa_core.basics import Batch
from nepa_core.modality import Modality
from nepa_core.tokens import Signal, Sketch, Tokens, cached

UNIT = 8
"""Tokens to one unit of a coordinate, on both axes."""
OPTIMUM_CLIPS, OPTIMUM_DRAWS = 64, 16


class Audio(Ordered, Modality):
    """Clips of unequal length, padded and masked.

    A token holds log-mel energies as they are (0 is silence); the embedder standardises them by mean and std of the
    training split, which are part of the network's weights: see `embedder`.

    Attributes:
        source, root, held_out_speaker, held_out, fold: where clips come from, and which of them are held out, see
            `modalities.data.audio.open_source`.
        subset, keywords: of AudioSet and of Speech Commands, see `modalities.data.audio_sets.read_set`.
        seconds: of the longest clip; longer ones are cut at their end.
        sample_rate: in Hz, to which every clip is brought.
        bands, window_ms, hop_ms: mel bands, length of the Hann window and distance of two frames in milliseconds.
        frames: frames in a token.
        patch: (bands, frames) of a patch instead, or None for frame tokens. It divides `bands`.
        patch_order, order_seed: "time" (column by column, each from the highest band: no patch lies before those of an
            earlier time), "raster" (row by row: all of the highest bands first), or another of `modalities.orders`. A
            static one is that of the longest clip; a shorter one reads its own patches in the same order.
        mean, std: of the natural logarithm of mel power over the data set, one number for all bands, by which tokens
            are standardised; they are no part of the weights. None measures those of every number in a token instead.
        padding: "batch" pads to the longest clip of a batch, "full" to `seconds`.
        in_memory: keep log-mel frames once computed.
        limit: at most this many training clips.
        augment: of training clips, on the device; None for none.
    """

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    built_in: ClassVar[str] = "synthetic"

    source: SourceName
    seconds: PositiveFloat
    root: str | None = None
    held_out_speaker: str | None = None
    held_out: float = Field(default=HELD_OUT, gt=0, lt=1)
    fold: str | None = Field(default=None, exclude_if=lambda fold: fold is None)
    subset: Subset = Field(default="full", exclude_if=lambda subset: subset == "full")
    keywords: Keywords = Field(default="all", exclude_if=lambda keywords: keywords == "all")
    sample_rate: PositiveInt = 16_000
    bands: PositiveInt = 128
    window_ms: PositiveFloat = 25.0
    hop_ms: PositiveFloat = 10.0
    frames: PositiveInt = 4
    patch: tuple[PositiveInt, PositiveInt] | None = None
    patch_order: Annotated[str, AfterValidator(lambda name: name if name == "time" else known_order(name))] = "time"
    mean: float | None = Field(default=None, exclude_if=lambda mean: mean is None)
    std: PositiveFloat | None = Field(default=None, exclude_if=lambda std: std is None)
    padding: Padding = "batch"
    in_memory: bool = False
    limit: PositiveInt | None = None
    augment: SpectrogramAugment | None = Field(default=None, exclude_if=lambda augment: augment is None)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source != self.built_in and self.root is None:
            raise ValueError(f"data.source={self.source} needs data.root=DIR, the folder (or CSV file) with the clips")
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std are given both, or neither: they are measured then")
        if self.fold is not None and self.source == self.built_in:
            raise ValueError("data.fold is for clips in files")
        for key, value, default, source in (
            ("subset", self.subset, "full", "audioset"),
            ("keywords", self.keywords, "all", "speech_commands"),
        ):
            if value != default and self.source != source:
                raise ValueError(f"data.{key}={value} is for data.source={source}")
        if self.held_out_speaker is not None and self.source != "folder":
            raise ValueError("data.held_out_speaker is for data.source=folder")
        if self.patch is not None and self.bands % self.patch[0]:
            below = self.bands // self.patch[0] * self.patch[0]
            raise ValueError(
                f"data.patch={self.patch} does not divide data.bands={self.bands}; the nearest that it divides: "
                f"{f'{below} and ' if below else ''}{below + self.patch[0]}"
            )
        if self.patch is None and self.patch_order != "time":
            side = next(side for side in (16, 8, 4, 2, 1) if self.bands % side == 0)
            raise ValueError(f"data.patch_order={self.patch_order} is for patches; set data.patch=[{side},{side}]")
        form = self.front_end
        if min(form.hop, form.window) < 2:
            raise ValueError(f"data.window_ms and data.hop_ms must be two samples of {self.sample_rate} Hz or more")
        if form.longest < 2 * form.step:
            raise ValueError(
                f"data.seconds={self.seconds} is less than two tokens of {form.step * form.hop / self.sample_rate} s"
            )
        if empty := empty_bands(form):
            raise ValueError(
                f"data.bands={self.bands} are too many for data.window_ms={self.window_ms}: {empty} of them would be "
                "empty; lower the one or lengthen the other"
            )
        return self

    # pydantic leaves properties alone; which kind of token this is depends on a setting
    @property
    def token_name(self) -> str:  # type: ignore[override]
        return "frame" if self.patch is None else "patch"

    @property
    def front_end(self) -> FrontEnd:
        """The settings in samples and frames."""
        hop, window = (round(ms * self.sample_rate / 1000) for ms in (self.hop_ms, self.window_ms))
        step = self.frames if self.patch is None else self.patch[1]
        longest = int(self.seconds * self.sample_rate / (max(hop, 1) * step) + 1e-6) * step
        return FrontEnd(self.sample_rate, self.bands, window, hop, step, longest)

    @property
    def rows(self) -> int:
        """Rows of patches; 1 for frame tokens."""
        return 1 if self.patch is None else self.bands // self.patch[0]

    def dataset(self, split: str) -> Clips:
        return open_audio(
            self.source,
            split,
            form=self.front_end,
            root=self.root,
            held_out_speaker=self.held_out_speaker,
            held_out=self.held_out,
            padding=self.padding,
            in_memory=self.in_memory,
            limit=self.limit,
            fold=self.fold,
            subset=self.subset,
            keywords=self.keywords,
            augmented=self.augment is not None and split == "train",
        )

    def before_mixing(self, batch: Batch) -> Batch:
        """Do what batch["augment"] says, once; see `modalities.data.spectrogram_augment`."""
        if DRAWN not in batch or self.augment is None:
            return batch
        rest = {name: value for name, value in batch.items() if name != DRAWN}
        mean, std = (of_frames(x, self.bands, self.patch).to(batch["mel"].device) for x in self._statistics())
        longest = self.front_end.longest
        mel = augmented(batch["mel"], batch["frames"], batch[DRAWN], self.augment, mean, std, longest)
        return rest | {"mel": mel}

    def mixed(self, batch: Batch, share: float, centre: tuple[float, float] | None) -> tuple[Batch, Tensor]:
        """See `modalities.data.spectrogram_augment.mixed`; clips may be of unequal length."""
        mel, frames, kept = mixed(batch["mel"], batch["frames"], share, centre)
        return batch | {"mel": mel, "frames": frames}, kept

    def tokenize(self, batch: Batch) -> Tokens:
        """Frames or patches of batch["mel"] [B, T, F], of which batch["frames"] [B] are real: values [B, N, P] float32.

        Coordinates are (time) or (frequency, time) in units of eight tokens.
        """
        batch = self.before_mixing(batch)
        mel, step = batch["mel"], self.front_end.step
        columns = mel.shape[1] // step
        real = torch.arange(columns, device=mel.device) < (batch["frames"] // step)[:, None]
        if self.patch is None:
            values = rearrange(mel, "b (n k) f -> b n (k f)", k=step)
        else:
            values = patchify(_picture(mel)[:, None], self.patch)
        return Tokens(values=values, coords=places(self.rows, columns), mask=real.repeat(1, self.rows))

    def classes(self) -> tuple[str, ...] | None:
        return self.dataset("train").source.classes

    def folds(self) -> tuple[str, ...]:
        return audio_folds(self.source, self.root)

    def plain(self) -> Audio:
        """With every batch padded to `seconds`, so that raw tokens of all batches stand in one array."""
        return self.model_copy(update={"padding": "full", "augment": None})

    def files(self, paths: Sequence[str]) -> Clips:
        """Sound files by name.

        Raises:
            UnreadableSample: from the data set, on access to a file that is no sound, or is silent or too short.
        """
        return open_files(paths, self.front_end, self.padding)

    def token_dim(self) -> int:
        return self.frames * self.bands if self.patch is None else self.patch[0] * self.patch[1]

    def embedder(self, dim: int) -> nn.Module:
        """A linear map of standardised values.

        Mean and std of each of the P numbers are measured on (up to 1,000 clips of) the training split when a network
        is built, and are buffers: they are saved with the weights and come back with them, so a trained network reads
        other data as it read its own. Where `mean` and `std` are given these hold, for this data alone.
        """
        return StandardisedLinear(*self._statistics(), dim, kept=self.mean is None)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std [P] by which tokens are standardised."""
        if self.mean is not None and self.std is not None:
            offset = math.log(FLOOR)  # tokens hold log(1 + power / FLOOR)
            return torch.full((self.token_dim(),), self.mean - offset), torch.full((self.token_dim(),), self.std)
        # All that they depend on; `limit` is not: fewer labels are no other sound.
        whole = {"limit": None, "padding": "batch", "patch_order": "time", "order_seed": 0, "augment": None}
        return token_statistics(self.model_copy(update=whole))

    def stored_embedder(self, weights: Mapping[str, Tensor]) -> nn.Module | None:
        """Mean and std are among the weights, or given."""
        if "mean" not in weights:
            return self.embedder(len(weights["bias"])) if self.mean is not None else None
        return StandardisedLinear(weights["mean"], weights["std"], len(weights["bias"]))

    def order(self, tokens: Tokens) -> Tensor | None:
        """The patch order; one that would scatter padding among the real tokens gets it behind them."""
        if self.patch is None:
            return None
        columns = tokens.values.shape[1] // self.rows
        here = (self.rows, columns)
        if self.patch_order == "time":
            return grid_order("column", here)
        if is_static(self.patch_order):
            longest = self.front_end.longest // self.patch[1]
            order: Tensor | None = shortened_order(self.patch_order, self.rows, longest, columns, self.order_seed)
        else:
            order = self.ordered(tokens, here)
        return padding_behind(grid_order("raster", here) if order is None else order, tokens.mask)

    def describe(self, tokens: Tokens) -> Sketch:
        """The spectrogram, low frequencies at the bottom, each clip up to its loudest; padding is black."""
        picture = self._spectrogram(tokens)
        grid = (self.rows, tokens.values.shape[1] // self.rows)
        loudest = picture.amax((1, 2), keepdim=True).clamp(min=1e-6)
        return Sketch((picture / loudest).clamp(min=0), grid)  # added noise may fall below silence

    def decode(self, tokens: Tokens) -> Signal:
        """Sound, silent where padded; see `modalities.data.audio.waveform` for what is lost.

        Raises:
            UserError: windows do not overlap.
        """
        frames = self._spectrogram(tokens).flip(1).transpose(1, 2)
        return Signal("sound", waveform(frames, self.front_end), self.sample_rate)

    def _spectrogram(self, tokens: Tokens) -> Tensor:
        """[B, F, T] as it is drawn, padding 0."""
        values = tokens.canonical(tokens.values)
        if tokens.mask is not None:
            values = values * tokens.canonical(tokens.mask)[..., None]
        if self.patch is None:
            return _picture(rearrange(values, "b n (k f) -> b (n k) f", k=self.frames))
        columns = values.shape[1] // self.rows
        return unpatchify(values, (self.bands, columns * self.patch[1]), self.patch)[:, 0]

    @torch.no_grad()
    def known_optimum(self, embed: nn.Module) -> float | None:
        """A held-out loss that no predictor of this embedder's embeddings can beat; None but for synthetic frames.

        The best predictor would know each clip's class, pitch, loudness and phase, and every sample of noise that the
        tokens so far have shown (windows overlap); left unknown is the noise after them. So that noise is drawn again
        16 times, and the best cosine at a place is the length of the mean of the unit embeddings over the draws,
        freed of the bias of so few: |mean|^2 counts (1 - |mean|^2) / (draws - 1) less. At BOS nothing is known, and
        the mean is over clips. A predictor must find out from the tokens what this one is told, so the optimum is a
        bound and not quite within reach.
        """
        source = open_source(self.source, "test") if self.source == "synthetic" else None
        if not isinstance(source, Synthetic) or self.patch is not None:
            return None
        device = next(embed.parameters()).device
        draw = torch.Generator().manual_seed(0)
        first: list[Tensor] = []
        best: list[Tensor] = []
        for row in range(OPTIMUM_CLIPS):
            clean, noise = source.parts(row, self.sample_rate)
            values = redrawn_tokens(clean, noise, self.front_end, OPTIMUM_DRAWS, draw)
            units = F.normalize(embed(values.to(device)).float(), dim=-1).cpu()  # [N, draws, D]
            first.append(units[0, 0])
            best.append(unbiased_length(units[1:]))
        start = unbiased_length(torch.stack(first)).expand(OPTIMUM_CLIPS)
        return -float(torch.cat([start, *best]).mean())


def _picture(mel: Tensor) -> Tensor:
    """[B, T, F] -> [B, F, T] with the highest band in row 0."""
    return mel.transpose(1, 2).flip(1)


@cached
def places(rows: int, columns: int) -> Tensor:
    """Coordinates of tokens in units of eight: (time) [N, 1], or (frequency, time) [N, 2] where there are rows."""
    time = torch.arange(columns) / UNIT
    if rows == 1:
        return time[:, None]
    return torch.cartesian_prod(torch.arange(rows).flip(0) / UNIT, time)


@cached
def shortened_order(name: str, rows: int, longest: int, columns: int, seed: int) -> Tensor:
    """The order of a grid of rows x longest, without the patches beyond `columns`: [rows * columns] int64."""
    whole = grid_order(name, (rows, longest), seed)
    row, column = whole // longest, whole % longest
    inside = column < columns
    return row[inside] * columns + column[inside]
