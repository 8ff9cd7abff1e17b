import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nepa_core import NEPA, PredictorConfig, Tokens, next_embedding_loss, terms
from nepa_core.objective import negative_cosine, pair_count, pair_up


def _sequences(samples: int = 3, places: int = 6, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Predictions and embeddings, [B, T, D]."""
    torch.manual_seed(0)
    return torch.randn(samples, places, dim).requires_grad_(), torch.randn(samples, places, dim).requires_grad_()


def _by_hand(predictions: Tensor, embeddings: Tensor, mask: Tensor | None = None, shift: int = 1) -> float:
    total, count = 0.0, 0
    for b in range(len(predictions)):
        for t in range(predictions.shape[1] - shift):
            if mask is None or (mask[b, t] and mask[b, t + shift]):
                p, z = predictions[b, t].detach().double(), embeddings[b, t + shift].detach().double()
                total -= float(p @ z / (p @ p).sqrt() / (z @ z).sqrt())
                count += 1
    return total / count


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_is_the_mean_negative_cosine(shift: bool, mask: Tensor | None) -> None:
    predictions, embeddings = _sequences()
    loss = next_embedding_loss(predictions, embeddings, mask, shift=shift)
    assert loss.item() == pytest.approx(_by_hand(predictions, embeddings, mask, int(shift)), abs=1e-6)


def test_the_loss_runs_from_minus_one_to_one() -> None:
    _, embeddings = _sequences()
    perfect = 3.0 * embeddings.roll(-1, dims=1)
    assert next_embedding_loss(perfect, embeddings).item() == pytest.approx(-1, abs=1e-6)
    assert next_embedding_loss(-perfect, embeddings).item() == pytest.approx(1, abs=1e-6)
    assert next_embedding_loss(embeddings, embeddings, shift=False).item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("shift", [True, False])
def test_targets_get_a_gradient_only_without_stop_gradient(shift: bool) -> None:
    for stop_gradient in (True, False):
        predictions, embeddings = _sequences()
        loss = next_embedding_loss(predictions, embeddings, shift=shift, stop_gradient=stop_gradient)
        assert loss.grad_fn is not None
        loss.backward()
        assert predictions.grad is not None
        assert predictions.grad.any()
        reached = embeddings.grad is not None and bool(embeddings.grad.any())
        assert reached != stop_gradient


def _network(bos: bool) -> NEPA:
    torch.manual_seed(0)
    config = PredictorConfig(
        dim=16,
        depth=2,
        heads=2,
        mlp_dim=32,
        activation="gelu",
        gated=False,
        layer_scale=1.0,
        qk_norm="plain",
        rope_theta=100.0,
        rope_rescale=1.0,
        bos=bos,
        norm_eps=1e-6,
    )
    network = NEPA(config, nn.Linear(4, 16))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("bos", [True, False])
def test_a_token_is_the_target_of_the_place_before_it_and_hidden_from_it(bos: bool) -> None:
    network, coords = _network(bos), torch.arange(5.0)[:, None]
    values = torch.randn(2, 5, 4)
    before = network(Tokens(values, coords), causal=True)
    prediction, target, _ = pair_up(before.predictions, before.embeddings, None, shift=True)
    assert prediction.shape[1] == (5 if bos else 4)
    for token in range(0 if bos else 1, 5):
        changed = values.clone()
        changed[:, token] = torch.randn(2, 4)
        after = network(Tokens(changed, coords), causal=True)
        new_prediction, new_target, _ = pair_up(after.predictions, after.embeddings, None, shift=True)
        place = token if bos else token - 1
        other = torch.arange(target.shape[1]) != place
        assert (new_target[:, place] - target[:, place]).abs().max() > 0.1
        assert torch.equal(new_target[:, other], target[:, other])
        torch.testing.assert_close(new_prediction[:, : place + 1], prediction[:, : place + 1], rtol=0, atol=1e-6)


def test_bos_predicts_the_first_token() -> None:
    network, values = _network(bos=True), torch.randn(2, 5, 4)
    out = network(Tokens(values, torch.arange(5.0)[:, None]), causal=True)
    _, target, _ = pair_up(out.predictions, out.embeddings, out.mask, shift=True)
    assert torch.equal(target, network.embed(values))


@pytest.mark.parametrize("shift", [True, False])
def test_pairs_with_padding_on_either_side_do_not_count(shift: bool) -> None:
    predictions, embeddings = _sequences()
    _, target, counted = pair_up(predictions, embeddings, MASK, shift=shift)
    assert counted is not None
    assert counted.shape == target.shape[:2]
    assert pair_count(predictions, MASK, shift=shift) == counted.sum()
    assert pair_count(predictions, shift=shift) == counted.numel()
    loss = next_embedding_loss(predictions, embeddings, MASK, shift=shift)
    padded = ~MASK[..., None]
    garbage = [torch.where(padded, 1e3 * torch.randn_like(x), x) for x in (predictions, embeddings)]
    assert next_embedding_loss(*garbage, MASK, shift=shift).item() == pytest.approx(loss.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, predictions)
    assert not gradient[~MASK].any()


def test_a_batch_of_lengths_is_the_mean_over_all_pairs_of_the_sequences_alone() -> None:
    predictions, embeddings = _sequences()
    lengths = (6, 4, 2)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    pairs, total = 0, 0.0
    for row, length in enumerate(lengths):
        alone = next_embedding_loss(predictions[row : row + 1, :length], embeddings[row : row + 1, :length])
        pairs += length - 1
        total += (length - 1) * alone.item()
    assert next_embedding_loss(predictions, embeddings, mask).item() == pytest.approx(total / pairs, abs=1e-6)


def test_a_batch_of_padding_gives_zero_and_no_gradient() -> None:
    predictions, embeddings = _sequences()
    loss = next_embedding_loss(predictions, embeddings, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0
    assert predictions.grad is not None
    assert not predictions.grad.any()


def test_the_loss_is_float32_under_bfloat16_autocast() -> None:
    predictions, embeddings = (x.detach().bfloat16() for x in _sequences(4, 50, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_embedding_loss(predictions, embeddings)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_by_hand(predictions, embeddings), abs=1e-6)


@pytest.mark.parametrize("zero", ["prediction", "target", "both"])
def test_a_zero_vector_gives_a_finite_loss_and_gradient(zero: str) -> None:
    predictions, embeddings = _sequences()
    with torch.no_grad():
        if zero != "target":
            predictions[0, 1] = 0
        if zero != "prediction":
            embeddings[0, 2] = 0
    loss = next_embedding_loss(predictions, embeddings, stop_gradient=False)
    loss.backward()
    assert negative_cosine(predictions, embeddings.roll(-1, dims=1))[0, 1] == 0
    assert loss.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (predictions, embeddings))


# Each term against a reference written out in float64, one pair at a time.

Terms = dict[str, Callable[..., Tensor]]
TERMS: Terms = {
    "cosine": terms.cosine,
    "mse": terms.mse,
    "mse_normalised": terms.mse_normalised,
    "soft_cross_entropy": terms.soft_cross_entropy,
    "standardised": terms.standardised,
    "infonce_sample": partial(terms.infonce_sample, temperature=0.3),
    "infonce_position": partial(terms.infonce_position, temperature=0.3, gather=lambda x: x),
    "barlow": partial(terms.barlow, redundancy=0.1),
    "sigreg_tokens": partial(terms.sigreg, over="tokens", slices=7),
    "sigreg_batch": partial(terms.sigreg, over="batch", slices=7),
}
SHAPES_TARGETS = {"sigreg_tokens", "sigreg_batch"}


def _cos(a: Tensor, b: Tensor) -> Tensor:
    if not a.any() or not b.any():  # such as the one sample of a place, standardised
        return (a * b).sum()
    return a @ b / (a @ a).sqrt() / (b @ b).sqrt()


def _standard(rows: list[Tensor], x: Tensor) -> Tensor:
    """x less the mean of the rows, over their deviation."""
    stacked = torch.stack(rows)
    return (x - stacked.mean(0)) / (stacked.var(0, unbiased=False) + 1e-6).sqrt()


def _reference(name: str, p: Tensor, z: Tensor, counted: Tensor) -> Tensor:
    """The term `name` of TERMS, on [B, Q, D] float64."""
    samples, places, dim = p.shape
    pairs = [(b, t) for b in range(samples) for t in range(places) if counted[b, t]]
    at = {t: [z[b, t] for b in range(samples) if counted[b, t]] for t in range(places)}
    of = {b: [z[b, t] for t in range(places) if counted[b, t]] for b in range(samples)}

    def one(b: int, t: int) -> Tensor:
        own, target = p[b, t], z[b, t]
        match name:
            case "cosine":
                return -_cos(own, target)
            case "mse":
                return ((own - target) ** 2).sum() / dim
            case "mse_normalised":
                scaled = (target - target.mean()) / (target.var(unbiased=False) + 1e-6).sqrt()
                return ((own - scaled) ** 2).sum() / dim
            case "soft_cross_entropy":
                label, guess = target.exp() / target.exp().sum(), own.exp() / own.exp().sum()
                return -(label * guess.log()).sum()
            case "standardised":
                return -_cos(own, _standard(at[t], target))
            case _:
                offered = of[b] if name == "infonce_sample" else at[t]
                total = sum(((_cos(own, other) / 0.3).exp() for other in offered), torch.zeros(()).double())
                return -((_cos(own, target) / 0.3).exp() / total).log()

    def distance(rows: list[Tensor], direction: Tensor) -> Tensor:
        """The integral of SIGReg, -3 to 3, along one direction."""
        knots = [3 * k / 16 for k in range(-16, 17)]
        heights = []
        for t in knots:
            waves = torch.stack([torch.exp(1j * t * (row @ direction)) for row in rows])
            heights.append((waves.mean() - math.exp(-(t**2) / 2)).abs() ** 2 * math.exp(-(t**2) / 2))
        return torch.trapezoid(torch.stack(heights), torch.tensor(knots, dtype=torch.float64))

    if name == "barlow":
        own = torch.stack([_standard([p[pair] for pair in pairs], p[pair]) for pair in pairs])
        other = torch.stack([_standard([z[pair] for pair in pairs], z[pair]) for pair in pairs])
        c = own.T @ other / len(pairs)
        cells = [(1 if i == j else 0.1) * (float(i == j) - c[i, j]) ** 2 for i in range(dim) for j in range(dim)]
        return torch.stack(cells).sum() / dim
    if name in SHAPES_TARGETS:
        torch.manual_seed(3)
        directions = torch.randn(dim, 7).double()
        groups = [rows for rows in (of if name == "sigreg_tokens" else at).values() if rows]
        values = [distance(rows, d / (d @ d).sqrt()) for rows in groups for d in directions.T]
        return torch.stack(values).mean()
    return torch.stack([one(*pair) for pair in pairs]).mean()


def _value(name: str, prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    torch.manual_seed(3)
    return TERMS[name](prediction, target, counted)


@pytest.mark.parametrize("counted", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_and_its_gradients_are_those_of_the_formula(name: str, counted: Tensor | None) -> None:
    p, z = _sequences()
    loss = _value(name, p, z, counted)
    p64, z64 = (x.detach().double().requires_grad_() for x in (p, z))
    expected = _reference(name, p64, z64, torch.ones_like(MASK) if counted is None else counted)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    asked = [(z, z64)] if name in SHAPES_TARGETS else [(p, p64), (z, z64)]
    for found, wanted in asked:
        torch.testing.assert_close(
            torch.autograd.grad(loss, found, retain_graph=True)[0],
            torch.autograd.grad(expected, wanted, retain_graph=True)[0].float(),
            rtol=2e-3,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", TERMS)
def test_what_does_not_count_changes_no_term_and_gets_no_gradient(name: str) -> None:
    p, z = (x.detach() for x in _sequences())
    garbage = [torch.where(MASK[..., None], x, 1e3 * torch.randn_like(x)).requires_grad_() for x in (p, z)]
    loss = _value(name, *garbage, MASK)
    assert loss.item() == pytest.approx(_value(name, p, z, MASK).item(), rel=1e-5)
    for gradient in torch.autograd.grad(loss, garbage, allow_unused=True):
        assert gradient is None or not gradient[~MASK].any()


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_nothing_is_zero_and_finite(name: str) -> None:
    p, z = _sequences()
    loss = _value(name, p, z, torch.zeros_like(MASK))
    gradients = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert all(x is None or (x == 0).all() for x in gradients)
    assert name == "barlow" or loss.item() == 0  # nothing correlates with nothing: 1


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_float32_under_bfloat16_autocast(name: str) -> None:
    p, z = (x.detach().bfloat16() for x in _sequences(6, 20, 16))
    with torch.autocast("cpu", torch.bfloat16):
        inside = _value(name, p, z, None)
    assert inside.dtype == torch.float32
    assert inside.item() == _value(name, p.float(), z.float(), None).item()


def test_sigreg_knows_a_standard_normal_from_a_point_and_has_no_factor_of_the_number_of_tokens() -> None:
    torch.manual_seed(0)
    normal, point = torch.randn(4, 500, 8), torch.zeros(4, 500, 8)
    measure = partial(terms.sigreg, counted=None, over="tokens", slices=16)
    assert measure(normal, normal).item() < 0.01
    assert measure(point, point).item() > 0.1
    assert measure(point, point[:, :50]).item() == pytest.approx(measure(point, point).item(), rel=1e-4)
