"""Baselines fitted on a stream: the same as on everything at once, and a curve over the number of samples."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nepa_core.objective import masked_mean, negative_cosine
from nepa_core.verdict import baselines
from nepa_core.verdict.baselines import fit_baselines
from nepa_core.verdict.diagnostics import identified
from nepa_core.verdict.gathered import Gathered


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _source(samples: int, *, tokens: int = 5, masked: bool = False) -> Gathered:
    """Tokens of 6 numbers, each a noisy linear map of the one before; the embedding is linear."""
    step, embed = torch.linalg.qr(torch.arange(36.0).view(6, 6).sin())[0], torch.arange(48.0).view(6, 8).cos()
    parts = [torch.randn(samples, 6)]
    for _ in range(tokens - 1):
        parts.append(parts[-1] @ step + 0.8 * torch.randn(samples, 6))
    values = torch.stack(parts, 1)
    mask = None
    if masked:
        mask = torch.arange(tokens) < torch.randint(2, tokens + 1, (samples, 1))
        values = values * mask[..., None]
    embeddings = values @ embed
    return Gathered(values, embeddings, torch.zeros_like(embeddings), mask)


def _cut(part: Gathered, sizes: list[int]) -> list[Gathered]:
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [part.rows(slice(a, b)) for a, b in pairwise(ends)]


@pytest.mark.parametrize("masked", [False, True])
def test_a_stream_gives_what_all_samples_at_once_give(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    train, test = _source(300, masked=masked), _source(30, masked=masked)
    once = fit_baselines([train], test, total=300)
    monkeypatch.setattr(baselines, "_CHUNK", 16)
    stream = fit_baselines(_cut(train, [7, 90, 3, 110, 90]), test, total=300)
    assert stream.samples == once.samples == 300
    assert [samples for samples, _ in stream.curve] == [samples for samples, _ in once.curve] == [75, 150]
    for name, expected in once.predictions.items():
        torch.testing.assert_close(stream.predictions[name], expected, rtol=0, atol=2e-5)
    for (_, a), (_, b) in zip(once.curve, stream.curve, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert (a.nan_to_num() - b.nan_to_num()).abs().mean() < 0.01  # a tie may fall the other way


def test_shorter_and_longer_batches_join_one_stream() -> None:
    test = _source(20, tokens=5, masked=True)
    found = fit_baselines([_source(40, tokens=3, masked=True), _source(60, tokens=8, masked=True)], test, total=100)
    assert found.samples == 100
    assert all(x.shape == test.targets.shape and x.isfinite().all() for x in found.predictions.values())


def test_samples_with_gaps_among_whole_ones_are_left_out_of_the_shared_matrix() -> None:
    """The matrix of all places is that of whole samples; what a gap would add to it is wrong."""
    train, test = _source(400), _source(50)
    clean = fit_baselines([train], test, total=400).predictions["linear"]
    torn = _source(50)
    torn = torn._replace(values=torn.values * 1e4, mask=torch.arange(5).expand(50, 5) < 3)
    found = fit_baselines([train, torn], test, total=450).predictions["linear"]
    assert negative_cosine(found, test.targets).mean() == pytest.approx(
        float(negative_cosine(clean, test.targets).mean()),
        abs=0.02,  # the other choice of first samples; the gaps would cost 0.5
    )


def test_all_samples_are_used_once_the_strength_is_chosen() -> None:
    """The first tenth, on which it is chosen, joins the others: without it there is nothing to learn here."""
    train, test = _source(200), _source(50)
    first, rest = train.rows(slice(20)), train.rows(slice(20, None))
    noise = rest._replace(embeddings=torch.randn_like(rest.embeddings))
    with_it = fit_baselines([first, noise], test, total=200).predictions["position_mean"]
    unit = F.normalize(torch.cat([first.targets, noise.targets]), dim=-1)
    torch.testing.assert_close(with_it[0], unit.mean(0), rtol=0, atol=1e-5)


def test_the_curve_rises_where_the_control_is_starved() -> None:
    """60 features a place and few samples: more of them make it better; of a tiny source the curve is flat."""

    def shares(part: Gathered, test: Gathered) -> list[float]:
        found = fit_baselines([part], test, total=len(part.values))
        every = [*(x for _, x in found.curve), identified(found.predictions["linear"], test)]
        return [float(x.nanmean()) for x in every]

    starved = shares(_source(128, tokens=24), _source(640, tokens=24))
    fed = shares(_source(8000, tokens=3), _source(640, tokens=3))
    assert starved[0] < starved[1] - 0.01
    assert starved[1] < starved[2] - 0.01
    assert abs(fed[1] - fed[2]) < 0.01


def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a chunk and the first samples are alive at any time."""
    import weakref

    monkeypatch.setattr(baselines, "_CHUNK", 32)
    monkeypatch.setattr(baselines, "_HELD", 32)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def parts():
        nonlocal most
        for _ in range(40):
            part = _source(32)
            alive.append(weakref.ref(part.values))
            most = max(most, sum(ref() is not None for ref in alive))
            yield part
            del part

    found = fit_baselines(parts(), _source(8), total=1280)
    assert found.samples == 1280
    assert most <= 4


@pytest.mark.parametrize("kind", ["whole", "masked", "ordered"])
def test_long_sequences_are_read_near_each_target(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """16 of 24 tokens; the neighbours say nearly all that there is to know here."""

    def source(samples: int) -> Gathered:
        part = _source(samples, tokens=24, masked=kind == "masked")
        if kind != "ordered":
            return part
        order, rows = torch.rand(samples, 24).argsort(1), torch.arange(samples)[:, None]
        return part._replace(values=part.values[rows, order], embeddings=part.embeddings[rows, order], order=order)

    def loss(found: baselines.Fitted) -> float:
        return float(masked_mean(negative_cosine(found.predictions["linear"], test.targets), test.counted))

    train, test = source(1000), source(100)
    whole = fit_baselines([train], test, total=1000)
    for limit in ("_FEATURES", "_SEEN_FEATURES"):
        monkeypatch.setattr(baselines, limit, 23)
    monkeypatch.setattr(baselines, "_BYTES", 4 * (24 if kind == "ordered" else 23) * 96**2)
    near = fit_baselines([train], test, total=1000)
    assert (whole.features, near.features) == (144, 96)
    assert loss(near) == pytest.approx(loss(whole), abs=0.02)
    assert loss(near) < float(masked_mean(negative_cosine(near.predictions["copy"], test.targets), test.counted)) - 0.1


def test_tokens_wider_than_a_matrix_may_be_are_reduced_to_what_varies() -> None:
    """Three numbers behind 5,000, and the next token's are those of the one before, turned."""
    spread, turn = torch.randn(3, 5000), torch.linalg.qr(torch.randn(3, 3))[0]

    def source(samples: int) -> Gathered:
        z = [torch.randn(samples, 3)]
        for _ in range(3):
            z.append(z[-1] @ turn)
        hidden = torch.stack(z, 1)
        return Gathered(hidden @ spread + 0.1 * torch.randn(samples, 4, 5000), hidden, torch.zeros_like(hidden), None)

    train, test = source(200), source(20)
    found = fit_baselines([train], test, total=200)
    assert found.features < found.of
    assert negative_cosine(found.predictions["linear"][:, 1:], test.targets[:, 1:]).mean() < -0.95
