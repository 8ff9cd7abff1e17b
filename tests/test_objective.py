import pytest
import torch
from torch import Tensor, nn

from nepa_core import NEPA, PredictorConfig, Tokens, next_embedding_loss
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
