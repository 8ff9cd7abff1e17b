"""Augmentation and mixing of spectrograms: what each does, within the real frames of clips of unequal length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from modalities.audio import Audio, StandardisedLinear
from modalities.data import standardised
from modalities.data.spectrogram_augment import SpectrogramAugment, augmented, draw, mixed, of_frames
from nepa_core.contract import check_modality
from nepa_core.runtime.config import override
from nepa_core.runtime.data import DrawSampler, TrainingBatches
from recipes.audio import demo
from tests.conftest import ON_BOTH
from tests.tiny import CPU

BANDS, LONGEST = 12, 40
MEAN, STD = torch.arange(2 * BANDS).view(2, BANDS) / 10 + 5, torch.arange(1, 2 * BANDS + 1).view(2, BANDS) / 10


def clips(*frames: int) -> tuple[Tensor, Tensor]:
    """Clips whose every number is another, padded with 0."""
    mel = torch.arange(len(frames) * max(frames) * BANDS).view(len(frames), max(frames), BANDS) + 1000.0
    real = torch.tensor(frames)
    return torch.where((torch.arange(max(frames)) < real[:, None])[..., None], mel, 0.0), real


def changed(mel: Tensor, frames: Tensor, drawn: Tensor | None = None, **asked: Any) -> Tensor:
    drawn = draw(len(mel)) if drawn is None else drawn
    return augmented(mel, frames, drawn, SpectrogramAugment(**asked), MEAN, STD, LONGEST)


def along(frames: Tensor, count: int) -> Tensor:
    return frames.repeat(count, 1)[:count]


@pytest.mark.parametrize(("asked", "axis", "most"), [({"time_mask": 8}, 1, 8), ({"frequency_mask": 5}, 2, 5)])
def test_a_mask_is_one_stretch_of_the_mean_with_every_width_as_often(
    asked: dict[str, int], axis: int, most: int
) -> None:
    torch.manual_seed(0)
    mel, frames = clips(*([40] * 4000))
    found = changed(mel, frames, **asked)
    masked, other = found != mel, 3 - axis
    assert torch.equal(masked.any(other), masked.all(other)), "whole frames or whole bands"
    stretch = masked.any(other).int()
    assert (stretch.diff(dim=1).abs().sum(1) + stretch[:, 0] + stretch[:, -1] <= 2).all(), "one stretch"
    share = stretch.sum(1).bincount(minlength=most + 1) / 4000
    assert len(share) == most + 1
    torch.testing.assert_close(share, torch.full((most + 1,), 1 / (most + 1)), rtol=0, atol=0.025)
    size = mel.shape[axis]
    torch.testing.assert_close(stretch.float().mean(0).sum(), torch.tensor(most / 2), rtol=0.05, atol=0)
    assert (stretch.float().mean(0) > 0).all(), f"every place of {size} may be masked"
    assert torch.equal(found[masked], along(MEAN, 40).expand_as(mel)[masked])


def test_a_mask_in_time_hides_at_most_half_of_a_short_clip_and_no_padding() -> None:
    torch.manual_seed(0)
    mel, frames = clips(*([40, 7] * 2000))
    found = changed(mel, frames, time_mask=30, frequency_mask=4)
    assert (found[1::2, 7:] == 0).all()
    in_time = (found != mel)[1::2, :7].all(2).sum(1)
    assert in_time.max() == 3
    assert (found != mel)[::2].all(2).sum(1).max() == 20


def test_a_roll_turns_each_clip_round_within_its_own_frames() -> None:
    torch.manual_seed(0)
    mel, frames = clips(*([40, 10] * 3000))
    found = changed(mel, frames, roll=0.5)
    assert (found[1::2, 10:] == 0).all()
    for rows, count in ((slice(0, None, 2), 40), (slice(1, None, 2), 10)):
        begins = (found[rows, :count] == mel[rows, :1]).all(2).int().argmax(1)
        for row in range(20):
            own = mel[rows][row, :count]
            assert torch.equal(found[rows][row, :count], own.roll(int(begins[row]), 0))
        share = begins.bincount(minlength=count) / 3000
        torch.testing.assert_close(share, torch.full((count,), 1 / count), rtol=0, atol=0.03)
    begins = (changed(mel, frames, roll=0.1)[::2] == mel[::2, :1]).all(2).int().argmax(1)
    assert set(begins.tolist()) == {0, 1, 2, 3, 4, 36, 37, 38, 39}


def test_noise_has_the_moments_that_were_drawn_and_leaves_padding_silent() -> None:
    torch.manual_seed(0)
    mel, frames = clips(*([40, 10] * 2000))
    drawn = draw(4000)
    noise = (changed(mel * 0, frames, drawn, noise=0.2) / along(STD, 40))[::2]
    assert (changed(mel, frames, drawn, noise=0.2)[1::2, 10:] == 0).all()
    level = noise.flatten(1).std(1)
    torch.testing.assert_close(level, 0.2 * drawn[::2, 5], rtol=0.2, atol=1e-3)
    torch.testing.assert_close(noise.std(), torch.tensor(0.2 / 3**0.5), rtol=0.05, atol=0)
    assert abs(float(noise.mean())) < 0.003
    assert abs(float((noise[::2] * noise[1::2]).mean() / noise.square().mean())) < 0.02, "each clip has its own"


@ON_BOTH
def test_what_is_done_follows_from_the_batch_alone_on_any_device(device: torch.device) -> None:
    mel, frames = clips(40, 7, 22)
    drawn, asked = draw(3), {"time_mask": 6, "frequency_mask": 4, "roll": 0.5, "noise": 0.1}
    there = [x.to(device) for x in (mel, frames, drawn, MEAN, STD)]
    states = torch.get_rng_state()
    found = augmented(*there[:3], SpectrogramAugment(**asked), *there[3:], LONGEST)
    assert torch.equal(torch.get_rng_state(), states), "nothing is drawn"
    torch.testing.assert_close(found.cpu(), changed(mel, frames, drawn, **asked))
    alone = [
        changed(mel[i : i + 1, :n], frames[i : i + 1], drawn[i : i + 1], **asked) for i, n in enumerate([40, 7, 22])
    ]
    for i, own in enumerate(alone):
        torch.testing.assert_close(found[i, : len(own[0])].cpu(), own[0])  # padding of a batch changes no clip


# ---- in the adapter


def adapter(**changes: Any) -> Audio:
    asked = {"time_mask": 10, "frequency_mask": 5, "roll": 0.5, "noise": 0.1}
    settings = {"source": "synthetic", "seconds": 0.64, "sample_rate": 8000, "bands": 16, "frames": 2, "augment": asked}
    return Audio(**(settings | changes))


@pytest.fixture(autouse=True)
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardised, "STATISTICS_CLIPS", 60)


@pytest.mark.parametrize("changes", [{}, {"patch": (4, 2)}, {"patch": (16, 2)}, {"padding": "full"}])
def test_masked_places_are_0_once_the_embedder_has_standardised_them(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    data = adapter(augment={"time_mask": 16, "frequency_mask": 8}, **changes)
    batch = data.dataset("train").__getitems__([0, 1, 2, 3])
    before, after = data.model_copy(update={"augment": None}).tokenize(batch), data.tokenize(batch)
    embed = data.embedder(8)
    assert isinstance(embed, StandardisedLinear)
    hidden = after.values != before.values
    assert hidden.any()
    assert torch.equal(((after.values - embed.mean) / embed.std)[hidden], torch.zeros(int(hidden.sum())))
    assert torch.equal(after.values[~after.mask], before.values[~after.mask])


def test_the_adapter_keeps_its_contract_and_augments_training_clips_alone() -> None:
    data = adapter()
    check_modality(data)
    assert "augment" in data.dataset("train")[0]
    assert "augment" not in data.dataset("test")[0]
    assert "augment" not in data.plain().dataset("train")[0]
    assert data.model_dump()["augment"]["roll"] == 0.5
    assert "augment" not in adapter(augment=None).model_dump(), "off is no key, so that stored digests stay"
    batch = data.dataset("train").__getitems__([0, 1])
    once = data.before_mixing(batch)
    assert "augment" not in once
    assert torch.equal(data.tokenize(batch).values, data.tokenize(once).values)
    same = adapter(augment=None).embedder(8)
    assert torch.equal(data.embedder(8).mean, same.mean), "statistics are those of clips as they are"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_is_augmented_as_its_seed_says_wherever_a_run_goes_on(workers: int) -> None:
    data = adapter(in_memory=True)

    def batches(start: int, rank: int = 0) -> list[Tensor]:
        draws = DrawSampler(len(samples), batch=8, accumulate=1, rank=rank, ranks=2, seed=0, start=start, stop=3)
        loaded = TrainingBatches(samples, draws, workers=workers, max_unreadable=0, device=CPU)
        return [data.tokenize(batch).values for batch in loaded]

    samples = data.dataset("train")
    whole = batches(0)
    torch.manual_seed(9)
    assert all(map(torch.equal, whole[2:], batches(2)))
    draws = [draw(1) for _ in range(2)]
    assert not torch.equal(*draws)
    assert not torch.equal(whole[0][0, :4], batches(0, rank=1)[0][0, :4])


def test_wrong_keys_are_one_line() -> None:
    with pytest.raises(ValidationError, match=r"all of data\.augment is 0; set data\.augment=null"):
        SpectrogramAugment()
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.5"):
        SpectrogramAugment(roll=0.7)
    config = override(demo(), {"data.augment.time_mask": 4})
    assert config.data == override(demo(), {"data.augment": {"time_mask": 4}}).data


# ---- mixing


def test_mixup_weighs_both_and_the_shorter_one_is_silent_from_its_end_on() -> None:
    mel, frames = clips(40, 10, 20, 30)
    both, real, kept = mixed(mel, frames, 0.7, None)
    assert real.tolist() == [40, 20, 20, 40]
    torch.testing.assert_close(both, 0.7 * mel + 0.3 * mel.flip(0))
    torch.testing.assert_close(both[1, 15], 0.3 * mel[2, 15])
    assert kept.tolist() == pytest.approx([0.7] * 4)


def test_cutmix_takes_a_box_of_frames_that_both_have_and_counts_what_it_took() -> None:
    torch.manual_seed(0)
    mel, frames = clips(40, 10, 20, 30)
    areas = []
    for _ in range(200):
        share, centre = float(torch.rand(())), tuple(torch.rand(2).tolist())
        found, real, kept = mixed(mel, frames, share, centre)  # type: ignore[arg-type]
        taken = found != mel
        assert torch.equal(found[taken], mel.flip(0)[taken])
        assert torch.equal(real, frames)
        for i, both in enumerate([30, 10, 10, 30]):
            assert not taken[i, both:].any()
            inside = taken[i].any(1)[:, None] & taken[i].any(0)
            assert torch.equal(taken[i], inside), "one box"
            assert float(kept[i]) == pytest.approx(1 - int(taken[i].sum()) / (int(frames[i]) * BANDS), abs=1e-6)
        areas.append(1 - share - float(1 - kept[1]))
    assert min(areas) > -1e-6, "a box is cut off at the ends, never more than asked for"
    whole, _, kept = mixed(mel, frames, 0.0, (0.5, 0.5))
    assert torch.equal(whole[1, :10], mel[2, :10])
    assert float(kept[1]) == 0


def test_the_numbers_of_a_token_are_laid_along_frames_as_tokens_are_cut() -> None:
    for patch in (None, (4, 2), (16, 2)):
        data = adapter(augment=None, patch=patch)
        token = torch.arange(data.token_dim()).float()
        mel = of_frames(token, 16, patch).repeat(3, 1)[None]
        values = data.tokenize({"mel": mel, "frames": torch.tensor([6])}).values
        assert torch.equal(values, token.expand_as(values))
