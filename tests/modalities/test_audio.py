import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils.data import default_collate

from modalities import audio
from modalities.audio import Audio, StandardisedLinear, token_statistics
from modalities.data import audio as audio_data
from modalities.data import standardised, synthetic_audio
from modalities.data.audio import Synthetic, open_source
from modalities.data.synthetic_audio import redrawn_tokens, unbiased_length
from nepa_core.basics import UserError
from nepa_core.contract import check_modality
from nepa_core.objective import negative_cosine
from nepa_core.runtime.config import override
from nepa_core.tokens import Tokens
from recipes.audio import demo
from recipes.cli import main
from recipes.configs import PretrainConfig
from tests.sounds import tone, write, write_classes
from tests.tiny import recipe


@pytest.fixture(autouse=True)
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardised, "STATISTICS_CLIPS", 60)


def adapter(**changes: Any) -> Audio:
    settings = {"source": "synthetic", "seconds": 0.64, "sample_rate": 8000, "bands": 16, "frames": 2}
    return Audio(**(settings | changes))


def mels(*frames: int) -> dict[str, torch.Tensor]:
    """A batch of random clips of so many frames, padded to the longest."""
    mel = torch.rand(len(frames), max(frames), 16)
    for row, count in enumerate(frames):
        mel[row, count:] = 0
    return {"mel": mel, "frames": torch.tensor(frames)}


# ---- tokens


def test_a_frame_token_holds_its_frames_and_padding_is_masked() -> None:
    batch = mels(8, 4)
    tokens = adapter().tokenize(batch)
    assert tokens.values.shape == (2, 4, 32)
    assert torch.equal(tokens.values[0, 1], batch["mel"][0, 2:4].flatten())
    assert tokens.mask is not None
    assert tokens.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(tokens.coords, torch.arange(4)[:, None] / 8)


def test_patches_lie_on_the_spectrogram_as_it_is_drawn() -> None:
    batch = mels(12, 8)
    data = adapter(patch=(8, 4))
    tokens = data.tokenize(batch)
    assert tokens.values.shape == (2, 6, 32)
    highest = batch["mel"][0, 4:8, 8:].flip(1)  # second column, top row
    assert torch.equal(tokens.values[0, 1].view(8, 4), highest.T)
    assert tokens.coords.tolist() == [[f / 8, t / 8] for f in (1, 0) for t in (0, 1, 2)]
    assert tokens.mask is not None
    assert tokens.mask[1].tolist() == [True, True, False] * 2


@pytest.mark.parametrize("settings", [{}, {"patch": (8, 4)}, {"patch": (8, 4), "patch_order": "hilbert"}])
def test_the_sketch_is_the_spectrogram_with_low_frequencies_at_the_bottom(settings: dict[str, Any]) -> None:
    data, batch = adapter(**settings), mels(12, 8)
    sketch = data.describe(data.read(batch))
    peak = batch["mel"].amax((1, 2), keepdim=True)
    torch.testing.assert_close(sketch.canvas, (batch["mel"] / peak).transpose(1, 2).flip(1))
    assert sketch.grid == ((2, 3) if data.patch else (1, 6))
    assert data.token_name == ("patch" if data.patch else "frame")


@pytest.mark.parametrize(
    "settings",
    [{"frames": 4}, {"patch": (8, 4)}, {"patch": (8, 4), "patch_order": "hilbert"}, {"bands": 40}],
    ids=str,
)
def test_the_sound_of_a_clip_has_its_spectrogram(settings: dict[str, Any]) -> None:
    """Its log-mel, which varies by 2, is some 0.1 off, but at the end, where frames stop at once. Padding is silent."""
    data = adapter(**settings)
    batch = data.dataset("test").__getitems__([0, 1, 2, 3])
    kind, sound, rate = data.decode(data.read(batch))
    count = batch["mel"].shape[1]
    assert (kind, rate, sound.dtype, tuple(sound.shape)) == ("sound", 8000, torch.float32, (4, 80 * count))
    assert sound.abs().max() <= 1
    real = torch.arange(count) < batch["frames"][:, None] - 4
    found = audio_data.log_mel(sound, data.front_end)
    assert (found - batch["mel"])[real].abs().mean() < 0.15
    assert batch["mel"][real].std() > 1.8
    shortest = int(batch["frames"].argmin())
    silent = 80 * (int(batch["frames"][shortest]) + 2)  # the last window reaches that far
    assert silent < sound.shape[1]
    assert (sound[shortest, silent:] == 0).all()
    assert torch.equal(data.decode(data.read(batch)).data, sound)


def test_sound_of_whatever_numbers_is_finite_and_silence_is_silent() -> None:
    data = adapter()
    tokens = data.tokenize(mels(8, 8))
    assert (data.decode(replace(tokens, values=torch.zeros(2, 4, 32))).data == 0).all()
    wild = data.decode(replace(tokens, values=1000 * torch.randn(2, 4, 32))).data
    assert wild.isfinite().all()
    assert wild.abs().max() == 1
    with pytest.raises(UserError, match=r"data\.hop_ms is not less than data\.window_ms"):
        adapter(hop_ms=30.0).decode(tokens)


def real_values(tokens: Tokens, row: int) -> torch.Tensor:
    assert tokens.mask is not None
    return tokens.values[row, tokens.mask[row]]


@pytest.mark.parametrize(
    "order", ["time", "raster", "column", "hilbert", "random", "random_per_sample", "random_annealed"]
)
def test_a_clip_is_read_in_one_order_whatever_it_is_padded_to_and_padding_comes_last(order: Any) -> None:
    data, batch = adapter(patch=(4, 4), patch_order=order), mels(12, 32)
    alone = {"mel": batch["mel"][:1, :12], "frames": batch["frames"][:1]}
    together, single = data.read(batch), data.read(alone)
    assert torch.equal(real_values(together, 0), real_values(single, 0))
    assert together.mask is not None
    assert together.mask[0].tolist() == [True] * 12 + [False] * 20
    assert together.order is not None


def test_time_order_ends_a_column_before_the_next_and_raster_ends_a_row() -> None:
    batch = mels(8)
    order = {name: adapter(patch=(8, 4), patch_order=name).read(batch).order for name in ("time", "raster")}
    assert order["time"] is not None
    assert order["raster"] is not None
    assert order["time"].tolist() == [0, 2, 1, 3]
    assert order["raster"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("settings", [{}, {"patch": (4, 4)}, {"patch": (4, 4), "patch_order": "random_per_sample"}])
def test_the_adapter_keeps_the_contract(settings: dict[str, Any]) -> None:
    check_modality(adapter(**settings))


def test_two_token_kinds_read_whole_batches_as_they_read_samples() -> None:
    for settings in ({}, {"patch": (4, 4)}):
        data = adapter(**settings).plain()
        clips = data.dataset("test")
        whole = data.tokenize(clips.__getitems__([3, 1, 2]))
        stacked = data.tokenize(default_collate([clips[3], clips[1], clips[2]]))
        assert torch.equal(whole.values, stacked.values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": (5, 4)}, r"data.patch=\(5, 4\) does not divide data.bands=16; .*: 15 and 20"),
        ({"patch": (32, 4)}, r"nearest that it divides: 32"),
        ({"patch_order": "hilbert"}, r"data.patch_order=hilbert is for patches; set data.patch=\[16,16\]"),
        ({"patch_order": "hilbert", "bands": 40}, r"is for patches; set data.patch=\[8,8\]"),
        ({"source": "folder"}, "data.root=DIR"),
        ({"held_out_speaker": "ann"}, "data.held_out_speaker is for data.source=folder"),
        ({"seconds": 0.03}, "data.seconds=0.03 is less than two tokens of 0.02 s"),
        ({"hop_ms": 0.1}, "data.hop_ms must be two samples"),
        ({"bands": 200}, "data.bands=200 are too many for data.window_ms=25.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        adapter(**changes)


# ---- statistics


def test_the_embedder_standardises_the_training_tokens(tmp_path: Path) -> None:
    data = adapter(source="folder", root=str(write_classes(tmp_path)))
    embed = data.embedder(8)
    assert isinstance(embed, StandardisedLinear)
    train = data.dataset("train")
    tokens = data.tokenize(train.__getitems__(list(range(len(train)))))
    assert tokens.mask is not None
    standard = (tokens.values[tokens.mask] - embed.mean) / embed.std
    torch.testing.assert_close(standard.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(32), rtol=0, atol=1e-3)
    expected = standard @ embed.weight.T + embed.bias
    torch.testing.assert_close(embed(tokens.values)[tokens.mask], expected)


def test_fewer_labels_another_order_or_padding_leave_the_statistics_alone(tmp_path: Path) -> None:
    root = str(write_classes(tmp_path))
    one = adapter(source="folder", root=root, patch=(4, 4))
    other = adapter(source="folder", root=root, patch=(4, 4), limit=3, patch_order="hilbert", padding="full")
    for name in ("mean", "std"):
        assert torch.equal(getattr(one.embedder(4), name), getattr(other.embedder(4), name))


def test_a_band_that_was_not_recorded_is_not_made_loud(tmp_path: Path) -> None:
    """Files of 8 kHz read at 16 kHz: nothing lies above 4 kHz."""
    data = adapter(source="folder", root=str(write_classes(tmp_path)), sample_rate=16000)
    _, std = token_statistics(data)
    assert std.min() >= 0.09 * std.mean()


def test_statistics_of_nothing_readable_name_a_file(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "x.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"no training clip can be read; the first: .*x\.wav: "):
        adapter(source="folder", root=str(tmp_path)).embedder(4)


# ---- the synthetic source and its optimum


def synthetic(split: str = "test") -> Synthetic:
    source = open_source("synthetic", split)
    assert isinstance(source, Synthetic)
    return source


def test_synthetic_clips_are_the_same_each_time_and_differ_between_splits() -> None:
    test, train = synthetic(), synthetic("train")
    assert torch.equal(test.read(5, 8000, 8000), test.read(5, 8000, 8000))
    assert not torch.equal(test.read(5, 8000, 8000)[:3000], train.read(5, 8000, 8000)[:3000])
    _, noise = test.parts(5, 8000)
    assert float(noise.std()) == pytest.approx(audio_data.SYNTHETIC_NOISE, rel=0.05)


def test_redrawing_keeps_what_earlier_tokens_have_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fresh noise the draws are the clip's own tokens but for the noise that is new to each."""
    data = adapter(frames=1, hop_ms=10.0, window_ms=10.0)  # windows that don't overlap: all noise is new
    monkeypatch.setattr(synthetic_audio, "SYNTHETIC_NOISE", 0.0)
    clean, noise = (x[:4000] for x in synthetic().parts(0, 8000))
    draws = redrawn_tokens(clean, noise, data.front_end, 2, torch.Generator())
    expected = data.tokenize({"mel": audio_data.log_mel(clean, data.front_end)[None], "frames": torch.tensor([50])})
    assert draws.shape == (50, 2, 16)
    torch.testing.assert_close(draws[1:, 0], expected.values[0, 1:], rtol=1e-4, atol=1e-3)
    wide = adapter(frames=1, window_ms=25.0)  # frame 10 shares 15 of its 25 ms with the frame before
    heard = redrawn_tokens(clean, noise, wide.front_end, 2, torch.Generator())
    own = audio_data.log_mel(clean + noise, wide.front_end)
    unheard = audio_data.log_mel(clean, wide.front_end)
    assert (heard[10, 0] - own[10]).abs().mean() < (unheard[10] - own[10]).abs().mean()


def test_without_noise_only_the_first_token_is_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = adapter()
    embed = data.embedder(16)
    noisy = data.known_optimum(embed)
    monkeypatch.setattr(synthetic_audio, "SYNTHETIC_NOISE", 0.0)
    monkeypatch.setattr(Synthetic, "parts", _noiseless(Synthetic.parts))
    exact = data.known_optimum(embed)
    assert noisy is not None
    assert exact is not None
    assert -1 <= exact < -0.95 < noisy < -0.3
    assert adapter(patch=(4, 4)).known_optimum(embed) is None


def _noiseless(parts: Any) -> Any:
    return lambda self, row, rate: (parts(self, row, rate)[0], 0 * parts(self, row, rate)[1])


def test_knowing_the_clip_without_its_noise_does_not_beat_the_optimum() -> None:
    torch.manual_seed(0)
    data = adapter()
    embed, source = data.embedder(16), synthetic()
    optimum = data.known_optimum(embed)
    losses = []
    for row in range(audio.OPTIMUM_CLIPS):
        clean, noise = source.parts(row, 8000)
        whole = len(clean) // 160 * 160
        own, told = (
            embed(audio_data.log_mel(x[:whole], data.front_end).reshape(-1, 32)) for x in (clean + noise, clean)
        )
        losses.append(negative_cosine(told[1:], own[1:]))
    assert optimum is not None
    assert optimum < float(torch.cat(losses).mean().detach())


def test_the_length_of_a_mean_is_not_flattered_by_few_draws() -> None:
    torch.manual_seed(0)
    units = F.normalize(torch.randn(4000, 4, 3) + torch.tensor([1.0, 0, 0]), dim=-1)
    truth = units.flatten(0, 1).mean(0).square().sum()
    square = unbiased_length(units.transpose(0, 1).reshape(1, -1, 3)).square()
    torch.testing.assert_close(square[0], truth, rtol=1e-3, atol=1e-3)
    biased = units.mean(1).square().sum(-1).mean()
    corrected = ((4 * units.mean(1).square().sum(-1) - 1) / 3).mean()
    assert abs(corrected - truth) < 0.02 < biased - truth


# ---- through the commands


def test_clips_without_labels_are_pretrained_and_have_nothing_to_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = tmp_path / "clips", tmp_path / "run"
    for i in range(24):
        write(root / f"{i}.wav", tone(0.1 + i / 200, 200 + 40 * i))
    words = [
        "pretrain",
        "tests.modalities.test_audio:ragged",
        f"data.root={root}",
        f"out={run}",
        "train.length.steps=2",
    ]
    assert main([*words, "data.held_out=0.25"]) == 0
    assert "judged on 6 held-out samples" in capsys.readouterr().out
    assert main(["probe", str(run)]) == 2
    assert "Audio gives no label to probe for" in capsys.readouterr().err
    assert main(["finetune", str(run), f"out={tmp_path / 'tuned'}"]) == 2
    assert "Audio gives no class to train on" in capsys.readouterr().err


def test_a_clip_that_can_not_be_read_is_named_on_the_card_and_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_classes(tmp_path / "clips")
    bad = write(root / "train" / "low" / "3.wav", 0 * tone(0.2))
    run = tmp_path / "run"
    words = [
        "pretrain",
        "tests.modalities.test_audio:ragged",
        f"data.root={root}",
        f"out={run}",
        "train.length.steps=2",
    ]
    assert main([*words, "train.max_unreadable=0.5"]) == 0
    line = f"{bad}: is silent: all of its samples are equal"
    assert f"1 training sample could not be read and was skipped.\n  {line}\n" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["unreadable_messages"] == [line]


def ragged() -> PretrainConfig:
    """The tiny recipe on files of unequal length; `data.root` is to be given."""
    data = adapter(source="folder", root="nowhere", seconds=0.3, in_memory=True)
    return recipe().model_copy(update={"data": data})


@pytest.mark.slow
def test_clips_of_unequal_length_are_pretrained_probed_and_finetuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_classes(tmp_path / "clips", clips=30)
    (root / "train" / "low" / "3.wav").write_text("no sound")
    run = tmp_path / "run"
    allow = "train.max_unreadable=0.1"
    assert main(["pretrain", "tests.modalities.test_audio:ragged", f"data.root={root}", f"out={run}", allow]) == 0
    assert "Next frame identified" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["unreadable_samples"] == 1
    assert main(["probe", str(run), "poolings=mean,last,attentive"]) == 0
    tuned = tmp_path / "tuned"
    assert main(["finetune", str(run), f"out={tuned}", "train.length.steps=4"]) == 0
    assert json.loads((tuned / "summary.json").read_text())["classes"] == ["high", "low"]


def test_a_trained_network_keeps_its_statistics_on_other_data(tmp_path: Path) -> None:
    """The buffers come with the weights, not from the data that is read now."""
    first, second = write_classes(tmp_path / "a"), write_classes(tmp_path / "b")
    for file in second.rglob("*.wav"):
        write(file, 0.01 * tone(0.2))
    here, there = (adapter(source="folder", root=str(root)).embedder(8) for root in (first, second))
    assert not torch.equal(here.mean, there.mean)  # type: ignore[arg-type]
    there.load_state_dict(here.state_dict())
    assert torch.equal(here.mean, there.mean)  # type: ignore[arg-type]


def test_the_demo_needs_no_download_and_takes_changes() -> None:
    config = override(demo(), {"data.patch": (8, 8), "data.patch_order": "hilbert"})
    assert isinstance(config.data, Audio)
    assert config.data.dataset("test")[0]["mel"].shape == (80, 32)
    assert config.data.classes() == ("tone", "rising", "falling", "pulsed")


# ---- mean and std that are given


def test_given_mean_and_std_are_of_the_logarithm_of_power_and_no_weights() -> None:
    """A token of constant mel power becomes (ln power - mean) / std, whatever the data hold."""
    data = adapter(mean=-6.84, std=5.38)
    embed = data.embedder(3)
    assert isinstance(embed, StandardisedLinear)
    assert set(embed.state_dict()) == {"weight", "bias"}
    power = 0.02
    value = float(audio_data.log_power(torch.tensor([[power]])))
    tokens = torch.full((1, 1, data.token_dim()), value)
    expected = F.linear(torch.full((1, 1, data.token_dim()), (math.log(power) + 6.84) / 5.38), embed.weight, embed.bias)
    torch.testing.assert_close(embed(tokens), expected, rtol=1e-3, atol=1e-4)
    stored = data.stored_embedder(embed.state_dict())
    assert stored is not None
    stored.load_state_dict(embed.state_dict())
    assert torch.equal(stored(tokens), embed(tokens))
    with pytest.raises(ValidationError, match=r"data\.mean and data\.std are given both, or neither"):
        adapter(mean=-6.84)
