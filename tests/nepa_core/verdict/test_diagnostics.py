import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from nepa_core import NEPA, Modality, PredictorConfig, Tokens
from nepa_core.basics import Batch
from nepa_core.objective import masked_mean, negative_cosine
from nepa_core.verdict import baselines
from nepa_core.verdict.baselines import Fitted, fit_baselines
from nepa_core.verdict.diagnostics import effective_rank, health, identification, shared_direction, spread
from nepa_core.verdict.gathered import Gathered, gather
from nepa_core.verdict.judge import Judged, Verdict, start_of
from nepa_core.verdict.judge import judge as judge_fitted
from nepa_core.verdict.strata import pooled
from tests.tiny import SHAPE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fitted(train: Gathered, test: Gathered) -> Fitted:
    """The baselines, fitted on samples at hand."""
    return fit_baselines([train], test, total=len(train.values))


def baseline_predictions(train: Gathered, test: Gathered) -> dict[str, Tensor]:
    return fitted(train, test).predictions


def linear_autoregression(train: Gathered, test: Gathered) -> Tensor:
    return fitted(train, test).predictions["linear"]


def judged(train: Gathered, test: Gathered, untrained: Gathered) -> Judged:
    return judge_fitted(fitted(train, test), test, start_of(untrained))


def judge(train: Gathered, test: Gathered, untrained: Gathered) -> Verdict:
    return judged(train, test, untrained).verdict


# ------------------------------------------------------------------------------------------------- collapse


def _orthonormal(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim)).Q


def test_effective_rank_counts_directions() -> None:
    one = torch.randn(8)
    assert effective_rank(torch.outer(torch.randn(50), one)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(_orthonormal(8)) == pytest.approx(8, rel=1e-5)
    assert effective_rank(_orthonormal(8)[:3].repeat(5, 1)) == pytest.approx(3, rel=1e-5)
    singular = torch.tensor([4.0, 2.0, 2.0]).double() / 8
    rows = _orthonormal(8)[[0] * 16 + [1] * 4 + [2] * 4]  # singular values 4, 2, 2
    assert effective_rank(rows) == pytest.approx(math.exp(-(singular * singular.log()).sum()), rel=1e-5)


def test_effective_rank_ignores_lengths_and_counts_a_shared_direction_as_loss() -> None:
    rows = torch.randn(200, 16)
    assert effective_rank(rows * torch.rand(200, 1) * 100) == pytest.approx(effective_rank(rows), rel=1e-4)
    assert effective_rank(rows) > 14
    assert effective_rank(rows + 100 * torch.ones(16)) < 2


def test_shared_direction_is_the_best_constant_cosine() -> None:
    rows = torch.randn(200, 16)
    assert shared_direction(torch.outer(torch.rand(50) + 0.1, rows[0])) == pytest.approx(1, abs=1e-5)
    assert shared_direction(torch.cat([rows, -rows])) == pytest.approx(0, abs=1e-6)
    leaning = rows + torch.ones(16)
    best = F.normalize(leaning, dim=-1).mean(0)
    reached = F.cosine_similarity(leaning, best.expand(200, -1), dim=-1).mean()
    assert shared_direction(leaning) == pytest.approx(reached.item(), abs=1e-5)


def test_spread_is_one_when_isotropic_and_zero_when_collapsed() -> None:
    assert spread(torch.randn(4000, 16) * 7) == pytest.approx(1, abs=0.02)
    assert spread(torch.outer(torch.rand(50) + 0.1, torch.randn(16))) == pytest.approx(0, abs=1e-5)


# --------------------------------------------------------------------------------- sequences made by hand


def _gathered(
    values: Tensor,
    embeddings: Tensor,
    predictions: Tensor | None = None,
    *,
    bos: bool = False,
    mask: Tensor | None = None,
) -> Gathered:
    """Embeddings [S, N, D] as a model gives them, with a BOS in front where asked for."""
    if bos:
        embeddings = torch.cat([torch.ones(len(embeddings), 1, embeddings.shape[-1]), embeddings], dim=1)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    return Gathered(values, embeddings, torch.randn_like(embeddings) if predictions is None else predictions, mask)


def _noisy(samples: int, *, bos: bool, masked: bool) -> Gathered:
    """A noisy autoregressive source of 4 tokens of 3 numbers, embedded by a fixed linear map."""
    step, embed = torch.tensor([[0.8, 0.4, 0], [-0.3, 0.7, 0.2], [0, 0.1, 0.9]]), torch.arange(15.0).view(3, 5).cos()
    tokens = [torch.randn(samples, 3)]
    for _ in range(3):
        tokens.append(tokens[-1] @ step + 0.7 * torch.randn(samples, 3))
    values = torch.stack(tokens, dim=1) + torch.arange(4.0)[:, None]
    mask = torch.rand(samples, 4) < 0.8 if masked else None
    return _gathered(values, values @ embed + 1, bos=bos, mask=mask)


@pytest.mark.parametrize("bos", [True, False])
def test_health_looks_at_real_tokens_only(bos: bool) -> None:
    values, embeddings, predictions = torch.randn(30, 6, 4), torch.randn(30, 6, 8), torch.randn(30, 6 + bos, 8)
    mask = torch.arange(6) < torch.randint(2, 7, (30, 1))
    found = health(_gathered(values, embeddings, predictions, bos=bos, mask=mask))
    counted = mask if bos else mask[:, 1:]
    rows = {"embedding": embeddings[mask], "prediction": predictions[:, :-1][counted]}
    assert found == {
        f"{measure.__name__}_{of}": pytest.approx(measure(x))
        for measure in (effective_rank, spread, shared_direction)
        for of, x in rows.items()
    }
    whole = health(_gathered(values, embeddings, predictions, bos=bos))
    assert whole["effective_rank_embedding"] == pytest.approx(effective_rank(embeddings.flatten(0, 1)))
    assert whole["spread_prediction"] == pytest.approx(spread(predictions[:, :-1].flatten(0, 1)))


# ------------------------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bos", [True, False])
def test_copy_and_means_are_what_they_say(bos: bool, masked: bool) -> None:
    train, test = _noisy(50, bos=bos, masked=masked), _noisy(9, bos=bos, masked=masked)
    found = baseline_predictions(train, test)
    assert set(found) == {"copy", "mean", "position_mean", "linear"}
    assert all(x.shape == test.targets.shape for x in found.values())
    assert torch.equal(found["copy"], test.embeddings[:, :-1])
    unit = F.normalize(train.embeddings[:, 1:], dim=-1)
    for place in range(unit.shape[1]):
        real = torch.ones(50, dtype=torch.bool) if train.mask is None else train.mask[:, [place, place + 1]].all(1)
        expected = unit[real, place].mean(0).expand(9, -1)
        torch.testing.assert_close(found["position_mean"][:, place], expected)
    every = unit.flatten(0, 1) if train.mask is None else unit[train.mask[:, 1:] & train.mask[:, :-1]]
    torch.testing.assert_close(found["mean"], every.mean(0).expand(test.targets.shape))


def _ridge_by_place(train: Gathered, test: Gathered) -> tuple[Tensor, float]:
    """scikit-learn's ridge for every place, refitted on all samples with the strength that the first tenth prefers."""

    def real(part: Gathered) -> Tensor:
        return torch.ones(part.embeddings.shape[:2], dtype=torch.bool) if part.mask is None else part.mask

    held = len(train.values) // 10
    tokens = real(train)[:held, train.bos :]
    centre = torch.stack([train.values[:held][tokens[:, i], i].sum(0) for i in range(tokens.shape[1])])
    centre = centre / tokens.sum(0).clamp(min=1)[:, None]
    x, x_test = ((part.values - centre) * real(part)[:, part.bos :, None] for part in (train, test))
    counted = real(train)[:, 1:] & real(train)[:, :-1]
    unit = F.normalize(train.targets, dim=-1)
    size = x[:held].square().mean().item()

    def predicted(strength: float, fit: slice, of: Tensor) -> Tensor:
        out = []
        for place in range(unit.shape[1]):
            rows, seen = counted[fit, place], place + 1 - train.bos
            target = unit[fit][rows, place].double()
            ridge = Ridge(alpha=int(rows.sum()) * strength * size, solver="cholesky")
            if seen:
                ridge.fit(x[fit][rows, :seen].flatten(1).double(), target)
                out.append(torch.from_numpy(ridge.predict(of[:, :seen].flatten(1).double())))
            else:
                out.append(target.mean(0).expand(len(of), -1))
        return torch.stack(out, dim=1).float()

    def quality(strength: float) -> float:
        found = predicted(strength, slice(held, None), x[:held])
        return -float(masked_mean(negative_cosine(found, unit[:held]), counted[:held]))

    best = max(baselines.STRENGTHS, key=quality)
    return predicted(best, slice(None), x_test), best


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bos", [True, False])
def test_linear_autoregression_is_ridge_with_the_strength_that_serves_held_out_samples_best(
    bos: bool, masked: bool
) -> None:
    train, test = _noisy(40, bos=bos, masked=masked), _noisy(20, bos=bos, masked=masked)
    expected, strength = _ridge_by_place(train, test)
    assert 1e-4 < strength < 10  # or the choice would not be tested
    torch.testing.assert_close(linear_autoregression(train, test), expected, rtol=0, atol=1e-5)


def _rotations(samples: int, dim: int, step: Tensor, *, bos: bool) -> Gathered:
    """Unit vectors turned by one rotation a step: the next token is a noiseless linear map of this one."""
    tokens = [F.normalize(torch.randn(samples, dim), dim=-1)]
    for _ in range(3):
        tokens.append(tokens[-1] @ step)
    values = torch.stack(tokens, dim=1)
    return _gathered(values, values, bos=bos)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bos", [True, False])
def test_linear_autoregression_recovers_a_noiseless_linear_source(bos: bool, masked: bool) -> None:
    step = _orthonormal(5)
    train, test = _rotations(300, 5, step, bos=bos), _rotations(40, 5, step, bos=bos)
    if masked:  # the last token of some samples is padding
        mask = torch.ones(300, 4 + bos, dtype=torch.bool)
        mask[::3, -1] = False
        train = train._replace(
            mask=mask,
            values=torch.where(mask[:, bos:, None], train.values, 100.0),
            embeddings=torch.where(mask[..., None], train.embeddings, torch.randn_like(train.embeddings)),
        )
    loss = negative_cosine(linear_autoregression(train, test), test.targets).mean(0)
    assert (loss[int(bos) :] < -0.999).all()
    if bos:  # nothing stands before the first token
        assert loss[0] > -0.5


def test_linear_autoregression_stands_many_features_and_few_rows_at_the_last_places() -> None:
    """Smooth values, so that features repeat each other, and one sample in ten that reaches the end."""
    steps = torch.linspace(0, 1, 8 * 100).view(8, 100)
    values = torch.stack([torch.sin(steps * f) for f in torch.linspace(1, 4, 200)])
    mask = torch.ones(200, 8, dtype=torch.bool)
    mask[torch.arange(200) % 10 > 0, 3:] = False
    values = values * mask[..., None]
    train = Gathered(1000 * values, F.normalize(torch.randn(200, 8, 5), dim=-1), torch.zeros(200, 8, 5), mask)
    assert linear_autoregression(train, train).isfinite().all()


def test_many_features_are_reduced_to_the_leading_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of 6 numbers that fill a plane, 2 of 6 dimensions, strongly, and the rest not at all."""
    step, plane = _orthonormal(2), _orthonormal(6)[:2]
    train, test = (
        part._replace(values=part.values @ plane)
        for part in (_rotations(300, 2, step, bos=False), _rotations(40, 2, step, bos=False))
    )
    losses = {}
    for kept in (6, 2, 1):
        monkeypatch.setattr(baselines, "_FEATURES", 4 * kept)
        losses[kept] = negative_cosine(linear_autoregression(train, test), test.targets)[:, 0].mean().item()
    assert losses[6] < -0.999
    assert losses[2] < -0.999
    assert losses[1] > -0.95


# ------------------------------------------------------------------------------------------- identification


def test_perfect_predictions_identify_every_token() -> None:
    targets = torch.randn(130, 5, 16)
    found = identification(targets * 3, targets)
    assert found.shape == (130,)
    assert (found[:128] == 1).all()
    assert found[128:].isnan().all()  # no whole group of 64
    assert not identification(-targets, targets)[:128].any()


@pytest.mark.parametrize("copies", [1, 4, 64])
def test_constant_predictions_reach_chance_however_often_candidates_repeat(copies: int) -> None:
    targets = torch.randn(64 // copies, 5, 16).repeat(copies, 1, 1)[torch.randperm(64)]
    found = identification(torch.randn(16).expand(64, 5, 16), targets)
    assert found.mean().item() == pytest.approx(1 / 64, rel=1e-5)


def test_repeated_candidates_share_the_credit() -> None:
    targets = torch.randn(32, 5, 16).repeat(2, 1, 1)
    assert (identification(targets, targets) == 0.5).all()


def test_few_samples_are_one_group() -> None:
    targets = torch.randn(10, 5, 16)
    assert (identification(targets, targets) == 1).all()
    assert identification(torch.ones(10, 5, 16), targets).mean().item() == pytest.approx(1 / 10, rel=1e-5)


def test_candidates_come_from_the_same_group_and_place() -> None:
    targets = torch.randn(128, 2, 16)
    targets[64:] = targets[:64]  # a copy in the other group
    targets[:, 1] = targets[:, 0].roll(1, dims=0)  # a copy at the other place
    assert (identification(targets, targets) == 1).all()


def test_uncounted_pairs_are_neither_asked_nor_offered() -> None:
    targets = torch.randn(64, 4, 16)
    predictions = targets.clone()
    counted = torch.rand(64, 4) < 0.5
    counted[0], counted[1], counted[63] = True, torch.tensor([True, False, False, True]), False
    predictions[1, 0] *= -1  # one of the two that count is wrong
    predictions[~counted] = torch.randn(int((~counted).sum()), 16)  # wrong, but not asked
    trap = (~counted).nonzero()[0]
    targets[trap[0], trap[1]] = targets[0, trap[1]]  # a copy of a right answer, but not offered
    found = identification(predictions, targets, counted)
    assert torch.equal(found.isnan(), ~counted.any(1))  # a sample with nothing to ask is left out
    assert 0 < found.isnan().sum() < 64
    assert found[1] == 0.5
    assert (found[0] == 1) & (found[2:].nan_to_num(1.0) == 1).all()


def test_rivals_are_those_of_the_group_and_small_groups_are_left_out() -> None:
    targets = torch.randn(30, 2, 16)
    targets[::3] = targets[:1]  # copies: they share the credit where they are rivals
    group = torch.arange(30) % 3
    together = identification(targets, targets, group=group)
    assert together[::3].allclose(torch.tensor(0.1))
    assert (together[group > 0] == 1).all()
    apart = torch.arange(30) // 3  # one copy in each group
    assert (identification(targets, targets, group=apart) == 1).all()
    apart[-3:] = torch.tensor([10, 10, 11])
    assert identification(targets, targets, group=apart)[-3:].isnan().all()


def test_predictions_that_are_not_numbers_identify_nothing() -> None:
    targets = torch.randn(64, 3, 16)
    assert not identification(torch.full_like(targets, math.nan), targets).any()


# -------------------------------------------------------------------------------------------------- verdict


def _next(embeddings: Tensor) -> Tensor:
    """Perfect predictions; the last has no target."""
    return embeddings.roll(-1, dims=1)


def _independent(samples: int, embed: Tensor) -> Gathered:
    """Tokens that say nothing of each other, which only an oracle predicts."""
    values = torch.randn(samples, 5, 6)
    return _gathered(values, values @ embed)


def test_the_verdict_on_a_healthy_model() -> None:
    embed = torch.randn(6, 12)
    train, test = _independent(200, embed), _independent(128, embed)
    test = test._replace(predictions=_next(test.embeddings))
    untrained = test._replace(predictions=torch.randn_like(test.embeddings))
    verdict = judge(train, test, untrained)
    assert (verdict.samples, verdict.fitted_samples, verdict.retrieval_candidates) == (128, 200, 64)
    assert verdict.loss == pytest.approx(-1, abs=1e-5)
    assert verdict.retrieval_top1 == 1
    assert verdict.chance == 1 / 64
    for name in ("copy", "mean", "position_mean", "linear"):
        assert getattr(verdict, f"baseline_{name}") > -0.5
        assert getattr(verdict, f"retrieval_top1_{name}") < 0.1
    for name in ("linear", "copy", "untrained"):
        margin = verdict.retrieval_top1 - getattr(verdict, f"retrieval_top1_{name}")
        assert getattr(verdict, f"margin_{name}") == pytest.approx(margin)
        assert 0 < getattr(verdict, f"margin_{name}_ci95") < 0.05
    assert verdict.beats_linear
    assert verdict.beats_untrained
    assert verdict.copy_wins == 0
    assert not verdict.collapsed
    assert verdict.effective_rank_embedding == verdict.effective_rank_embedding_start > 4
    assert set(verdict.loss_per_position) == {"model", "copy", "mean", "position_mean", "linear"}
    assert verdict.loss_per_position["model"] == pytest.approx([-1] * 4, abs=1e-5)


def test_the_verdict_on_a_collapsed_model() -> None:
    """All embeddings nearly the same: the loss is perfect, and nothing was learned."""
    healthy, constant = torch.randn(6, 12), torch.randn(12)
    untrained = _independent(128, healthy)
    parts = []
    for part in (_independent(200, healthy), untrained):
        embeddings = constant + 1e-2 * part.embeddings
        parts.append(part._replace(embeddings=embeddings, predictions=constant.expand_as(embeddings)))
    train, test = parts
    verdict = judge(train, test, untrained)
    assert verdict.collapsed
    assert verdict.loss < -0.99
    assert verdict.effective_rank_embedding < 2
    assert verdict.effective_rank_embedding_start > 4
    assert verdict.shared_direction_embedding > 0.99 > 0.5 > verdict.shared_direction_embedding_start
    assert verdict.retrieval_top1 == pytest.approx(1 / 64, rel=1e-3)
    assert not verdict.beats_linear
    assert not verdict.beats_untrained


@pytest.mark.parametrize(("lost", "collapsed"), [(2, False), (4, True)])
def test_collapse_is_the_loss_of_half_the_rank(lost: int, collapsed: bool) -> None:
    untrained = _independent(128, torch.eye(6))
    keep = torch.ones(6)
    keep[:lost] = 0
    test = untrained._replace(embeddings=untrained.embeddings * keep)
    assert judge(_independent(200, torch.diag(keep)), test, untrained).collapsed == collapsed


def test_the_verdict_counts_real_pairs_only() -> None:
    embed = torch.randn(6, 12)
    train, test = _independent(200, embed), _independent(64, embed)
    mask = torch.ones(64, 5, dtype=torch.bool)
    mask[::2, 3:] = False
    right = _next(test.embeddings)
    test = test._replace(mask=mask, predictions=right)
    wrong_at_padding = torch.where((mask & F.pad(mask, (0, 1), value=True)[:, 1:])[..., None], right, -right)
    verdict = judge(train, test._replace(predictions=wrong_at_padding), test)
    assert verdict.loss == pytest.approx(-1, abs=1e-5)
    assert verdict.copy_wins == 0
    assert verdict.retrieval_top1 == 1
    assert verdict.margin_untrained == 0
    assert not verdict.beats_untrained
    assert verdict.loss_per_position["model"] == pytest.approx([-1] * 4, abs=1e-5)


def test_a_place_that_is_padding_in_every_sample_has_no_loss() -> None:
    embed = torch.randn(6, 12)
    train, test = _independent(200, embed), _independent(64, embed)
    test = test._replace(mask=(torch.arange(5) < 4).expand(64, 5), predictions=_next(test.embeddings))
    long, short = judged(train, test._replace(mask=None), test), judged(train, test, test)
    for losses in short.verdict.loss_per_position.values():
        assert [loss is None for loss in losses] == [False, False, False, True]
    assert json.loads(short.verdict.model_dump_json())["loss_per_position"]["model"][3] is None
    together = pooled({"long": long, "short": short}).verdict.loss_per_position["copy"]
    both = [each.verdict.loss_per_position["copy"] for each in (long, short)]
    assert together[0] == pytest.approx((both[0][0] + both[1][0]) / 2)
    assert together[3] == pytest.approx(both[0][3]), "of the kind alone that has tokens there"
    assert pooled({"a": short, "b": short}).verdict.loss_per_position["copy"][3] is None


def test_tokens_after_bos_alone_are_not_asked_for() -> None:
    """Every sample's prediction from BOS is the same: chance, whatever was learned."""
    values = torch.randn(64, 5, 6)
    embeddings = values @ torch.randn(6, 12)
    test = _gathered(values, embeddings, bos=True, mask=torch.arange(5) < torch.randint(2, 6, (64, 1)))
    predictions = _next(test.embeddings)
    predictions[:, 0] = 1.0
    test = test._replace(predictions=predictions)
    whole = test._replace(mask=None)
    assert judge(whole, whole, whole).retrieval_top1 == 1
    assert judge(test, test, test).retrieval_top1 == 1


def test_copy_wins_counts_the_places_where_the_current_token_is_nearer() -> None:
    test = _independent(64, torch.randn(6, 12))
    embeddings = test.embeddings.clone()
    embeddings[:, 1] = embeddings[:, 0]  # one pair of four repeats
    test = test._replace(embeddings=embeddings, predictions=_next(embeddings) + 0.1)
    assert judge(test, test, test).copy_wins == pytest.approx(0.25)


# --------------------------------------------------------------------------------------------------- gather


class Reversed(Modality):
    """Four tokens of three numbers, read from the last to the first."""

    def dataset(self, split: str) -> Any:
        return []  # batches are given to `gather` by hand

    def tokenize(self, batch: Batch) -> Tokens:
        return Tokens(batch["x"], torch.arange(4.0)[:, None], batch.get("real"))

    def order(self, tokens: Tokens) -> Tensor:
        return torch.arange(4).flip(0)


def _model(**changes: Any) -> NEPA:
    model = NEPA(PredictorConfig(**(SHAPE | {"dim": 8, "mlp_dim": 16} | changes)), nn.Linear(3, 8))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_gather_runs_in_evaluation_mode_and_restores_the_mode(training: bool) -> None:
    model = _model(drop_path=0.9).train(training)
    batches = [{"x": torch.randn(5, 4, 3)} for _ in range(3)]
    first, again = (gather(model, Reversed(), batches, causal=True) for _ in range(2))
    assert torch.equal(first.predictions, again.predictions)
    assert not first.predictions.requires_grad
    assert model.training is training
    assert model.predictor.training is training


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gather_joins_batches_in_the_order_of_prediction(masked: bool, causal: bool) -> None:
    model = _model().eval()
    batches = [{"x": torch.randn(5, 4, 3)} for _ in range(3)]
    if masked:
        batches = [batch | {"real": torch.rand(5, 4) < 0.7} for batch in batches]
    found = gather(model, Reversed(), iter(batches), causal=causal, limit=8)
    whole = {key: torch.cat([batch[key] for batch in batches])[:8] for key in batches[0]}
    out = model(Reversed().read(whole), causal=causal)
    assert found.bos == 1
    assert torch.equal(found.values, whole["x"].flip(1))
    torch.testing.assert_close(found.embeddings, out.embeddings)
    torch.testing.assert_close(found.predictions, out.predictions, rtol=0, atol=1e-5)
    assert (found.mask is None) == (not masked)
    if masked:
        assert torch.equal(found.mask, out.mask)
        assert torch.equal(found.counted, out.mask[:, 1:] & out.mask[:, :-1])


def test_gather_joins_batches_with_and_without_a_mask() -> None:
    real = torch.tensor([[1, 1, 1, 0]] * 5, dtype=torch.bool)
    batches = [{"x": torch.randn(5, 4, 3)}, {"x": torch.randn(5, 4, 3), "real": real}]
    found = gather(_model(), Reversed(), batches, causal=True)
    assert found.mask is not None
    assert torch.equal(found.mask, F.pad(torch.cat([torch.ones_like(real), real]).flip(1), (1, 0), value=True))


def test_gather_reads_no_batch_beyond_the_limit() -> None:
    batches = iter([{"x": torch.randn(5, 4, 3)} for _ in range(4)])
    assert len(gather(_model(), Reversed(), batches, causal=True, limit=10).values) == 10
    assert len(list(batches)) == 2


# ----------------------------------------------------------------------------- orders of each sample


def _shuffled(samples: int, bos: bool, targets: Tensor, noise: float) -> Gathered:
    """Tokens whose values and embeddings depend on their canonical index and a number of the sample, in random orders.

    The sample's number moves every embedding along the first axis.
    """
    count, dim = targets.shape
    order = torch.rand(samples, count).argsort(1)
    own = torch.randn(samples, 1, 1)
    embeddings = targets[order] + noise * own * torch.eye(1, dim)
    values = torch.cat((own.expand(-1, count, 1), torch.randn(samples, count, 1)), dim=-1)
    embeddings = torch.cat((torch.zeros(samples, int(bos), dim), embeddings), dim=1)
    return Gathered(values, embeddings, torch.randn_like(embeddings), None, order)


@pytest.mark.parametrize("bos", [True, False])
def test_where_the_model_is_told_the_targets_position_so_are_the_baselines(bos: bool) -> None:
    targets = 3 * torch.randn(5, 16)
    train, test = (_shuffled(400, bos, targets, noise=0.0) for _ in range(2))
    found = baseline_predictions(train, test)
    loss = {name: float(negative_cosine(x, test.targets).mean()) for name, x in found.items()}
    assert loss["position_mean"] == pytest.approx(-1, abs=1e-4)
    assert loss["mean"] > -0.7
    told, blind = judge(train, test, test), judge(*(x._replace(order=None) for x in (train, test, test)))
    assert blind.baseline_position_mean > -0.7
    assert told.retrieval_top1_position_mean < 1.5 * told.chance
    assert blind.retrieval_top1_position_mean < 0.2


def test_the_regression_of_what_was_seen_knows_the_targets_position_and_the_tokens_before_it() -> None:
    targets = 3 * torch.randn(5, 16)
    train, test = (_shuffled(600, True, targets, noise=6.0) for _ in range(2))
    found = baseline_predictions(train, test)
    loss = {name: negative_cosine(x, test.targets).mean(0) for name, x in found.items()}
    torch.testing.assert_close(loss["linear"][0], loss["position_mean"][0], atol=0.02, rtol=0)
    assert (loss["linear"][1:] < loss["position_mean"][1:] - 0.03).all()


def test_one_order_for_all_is_judged_the_same_told_or_not() -> None:
    order = torch.randperm(6)
    mask = torch.ones(300, 7, dtype=torch.bool)
    mask[::3, 5:] = False
    parts = [Gathered(torch.randn(300, 6, 2), *torch.randn(2, 300, 7, 8), mask) for _ in range(3)]
    told = judge(*(part._replace(order=order.expand(300, -1)) for part in parts))
    blind = judge(*parts)
    for name in ("baseline_position_mean", "retrieval_top1", "retrieval_top1_untrained"):
        assert getattr(told, name) == pytest.approx(getattr(blind, name), abs=1e-6), name


def test_gather_keeps_the_orders_of_samples_only_where_the_model_is_told() -> None:
    class Turned(Reversed):
        def order(self, tokens: Tokens) -> Tensor:
            return tokens.values[..., 0].argsort(1)

    batch = {"x": torch.randn(5, 4, 3)}
    for how, known in (("off", False), ("add", True), ("rotate", True)):
        gathered = gather(_model(predict_position=how), Turned(), [batch, batch], causal=True)
        assert (gathered.order is not None) == known
        if gathered.order is not None:
            assert torch.equal(gathered.order, batch["x"][..., 0].argsort(1).repeat(2, 1))
