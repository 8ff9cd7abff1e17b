"""The head on the prediction side: its formula, where it is applied, its names; and raw tokens as targets."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

import nepa_core
from nepa_core import NEPA, ObjectiveConfig, Pretrainer, Tokens, UserError
from nepa_core.flow import in_deviations
from nepa_core.model import HeadKind, layers_above, prediction_head
from nepa_core.predictor import Trace
from nepa_core.pretrainer import Heads, objective_loss
from nepa_core.runtime.config import override
from nepa_core.runtime.optim import parameter_groups
from nepa_core.verdict.gathered import gather, gather_targets, joined
from recipes.configs import PretrainConfig
from recipes.objective_names import NAMED, check_given, named
from recipes.presets import PAPER_OBJECTIVE
from recipes.report.objectives import formula_table, own_objective
from recipes.report.summaries import ObjectivesSummary
from recipes.training.judging import held_out
from recipes.training.starting import build_model, build_pretrainer
from tests import tiny
from tests.tiny import CPU

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
HEADED = {"objective.head": "simsiam"}


# ------------------------------------------------------------------------------------------------ the formula


def by_hand(kind: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """g of one vector [D] float64."""

    def linear(at: int, x: Tensor) -> Tensor:
        return weights[f"{at}.weight"] @ x + weights[f"{at}.bias"]

    def norm(at: int, x: Tensor) -> Tensor:
        apart = x - x.mean()
        return apart / ((apart**2).mean() + 1e-5).sqrt() * weights[f"{at}.weight"] + weights[f"{at}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    if kind == "mlp":
        return linear(2, gelu(linear(0, x)))
    return linear(6, gelu(norm(4, linear(3, gelu(norm(1, linear(0, x)))))))


@pytest.mark.parametrize("kind", ["mlp", "simsiam"])
def test_a_head_and_its_gradients_are_those_of_the_formula(kind: HeadKind) -> None:
    torch.manual_seed(0)
    head = prediction_head(kind, 5)
    assert head is not None
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    x, out = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    weights = {key: value.detach().double().requires_grad_() for key, value in head.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    made, expected = head(x), torch.stack([by_hand(kind, weights, row) for row in x64])
    torch.testing.assert_close(made, expected.float())
    found = torch.autograd.grad(made, [x, *head.parameters()], out)
    wanted = torch.autograd.grad(expected, [x64, *weights.values()], out.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


def test_heads_have_the_parameters_that_the_paper_states() -> None:
    """1.8 and 1.2 million at width 768."""
    counts = {}
    for kind in ("simsiam", "mlp"):
        head = prediction_head(cast(HeadKind, kind), 768)
        assert head is not None
        counts[kind] = round(sum(value.numel() for value in head.parameters()) / 1e6, 1)
    assert counts == {"simsiam": 1.8, "mlp": 1.2}
    assert prediction_head("none", 768) is None


# ------------------------------------------------------------------------------------------- where it is applied


def network(config: PretrainConfig) -> tuple[NEPA, Tokens]:
    """With weights that all matter, and eight held-out samples."""
    model = build_pretrainer(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model, config.data.read(next(held_out(config, CPU, 8).batches))


@pytest.mark.parametrize("name", ["cosine", "infonce_sample", "horizons", "projected_mse", "cosine_flow", "raw_token"])
def test_every_prediction_is_behind_the_head_and_no_target_is(name: str) -> None:
    """The same numbers as those of a network without it whose predictor gives what the head makes."""
    config = named(f"{name}_head", tiny.ragged())
    model, tokens = network(config)
    assert model.prediction_head is not None
    trace = Trace()
    torch.manual_seed(1)
    out = model(tokens, causal=True, trace=trace)
    torch.testing.assert_close(out.predictions, model.prediction_head(trace.hidden[-1]))
    assert torch.equal(out.embeddings, model.embedded(tokens)[0])
    if isinstance(model, Pretrainer):
        torch.manual_seed(1)
        alone = out._replace(heads=model.heads(out._replace(heads=None), trace.hidden, tokens))
        assert objective_loss(config.objective, out) == objective_loss(config.objective, alone)
    loss = objective_loss(config.objective, out)
    reached = torch.autograd.grad(loss, [*model.prediction_head.parameters()], allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in reached)


def test_the_network_before_it_has_the_weights_and_hidden_states_of_the_same_seed_without() -> None:
    plain, headed = (build_pretrainer(override(tiny.recipe(), changes)) for changes in ({}, HEADED))
    own = headed.state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    assert {name.partition(".")[0] for name in own.keys() - plain.state_dict().keys()} == {"prediction_head"}
    tokens = tiny.recipe().data.read(next(held_out(tiny.recipe(), CPU, 8).batches))
    traces = Trace(), Trace()
    for model, trace in zip((plain, headed), traces, strict=True):
        model(tokens, causal=True, trace=trace)
    assert all(torch.equal(a, b) for a, b in zip(traces[0].hidden, traces[1].hidden, strict=True))
    assert build_model(override(tiny.recipe(), HEADED)).state_dict().keys() == plain.state_dict().keys()


def test_predictions_keep_the_width_of_the_residual_stream_under_autocast() -> None:
    model, tokens = network(override(tiny.recipe(), HEADED))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens, causal=True).predictions.dtype == torch.float32


def test_the_verdict_sees_predictions_behind_the_head() -> None:
    config = override(tiny.ragged(), HEADED)
    model, tokens = network(config)
    found = gather(model, config.data, held_out(config, CPU, 8).batches, causal=True)
    out = model(tokens, causal=True)
    torch.testing.assert_close(found.predictions, out.predictions)
    torch.testing.assert_close(found.embeddings, out.embeddings)


def test_its_matrices_decay_its_vectors_do_not_and_it_is_above_all_layers() -> None:
    model = build_pretrainer(override(tiny.recipe(), HEADED))
    names = {value: name for name, value in model.named_parameters()}
    decays = {
        names[value]: group["weight_decay"] > 0  # type: ignore[operator]
        for group in parameter_groups(model, 0.05, lambda name: layers_above(name, 2, head_counts=False))
        for value in cast(list[Tensor], group["params"])
        if names[value].startswith("prediction_head.")
    }
    assert decays == {
        f"prediction_head.{at}.{kind}": kind == "weight" and at in (0, 3, 6)
        for at in (0, 1, 3, 4, 6)
        for kind in ("weight", "bias")
    }
    assert {layers_above(name, 2, head_counts=False) for name in decays} == {0}


# ---------------------------------------------------------------------------------------------- raw tokens


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_raw_tokens_are_predicted_as_the_formula_says(mask: Tensor | None, bos: bool) -> None:
    """Against float64, a pair at a time; padding is any large number, and real ones lie far from 0, each its way."""
    torch.manual_seed(0)
    config = ObjectiveConfig.model_validate(PAPER_OBJECTIVE.model_dump() | {"terms": {"raw_token": 1.5}})
    values = torch.tensor([9.0, -2.0, 0.0, 30.0]) + torch.randn(3, 6, 4) * torch.tensor([1.0, 0.1, 5.0, 2.0])
    real = values.double().flatten(0, 1) if mask is None else values[mask].double()
    mean, std = real.mean(0), real.std(0, correction=0)
    values = values if mask is None else torch.where(mask[..., None], values, 1e30)
    tokens = Tokens(values, torch.zeros(6, 1), mask)
    heads = Heads(config, 5, tokens)
    assert heads.raw is not None
    places = 6 + bos
    p, z = torch.randn(3, places, 5, requires_grad=True), torch.randn(3, places, 5)
    seen = mask if mask is None or not bos else torch.cat((torch.ones(3, 1, dtype=torch.bool), mask), dim=1)
    bare = nepa_core.Prediction(z, p, seen)
    loss = objective_loss(config, bare._replace(heads=heads(bare, [], tokens)))
    weight, bias = (x.detach().double().requires_grad_() for x in (heads.raw.linear.weight, heads.raw.linear.bias))
    p64, losses = p.detach().double().requires_grad_(), []
    for b in range(3):
        for t in range(places - 1):
            if seen is None or (seen[b, t] and seen[b, t + 1]):
                made, y = weight @ p64[b, t] + bias, (values[b, t + 1 - bos].double() - mean) / std
                losses.append(-(made @ y) / (made @ made).sqrt() / (y @ y).sqrt())
    expected = 1.5 * torch.stack(losses).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, [p, heads.raw.linear.weight, heads.raw.linear.bias])
    wanted = torch.autograd.grad(expected, [p64, weight, bias])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=2e-5)  # the mean is taken off in float32


@pytest.mark.parametrize(("terms", "raw"), [({"raw_token": 1.0}, True), ({"raw_token": 1.0, "cosine": 1.0}, False)])
def test_raw_tokens_alone_are_judged_among_raw_tokens(terms: dict[str, float], raw: bool) -> None:
    config = override(tiny.ragged(), {"objective.terms": terms})
    model, _ = network(config)
    found = gather(model, config.data, held_out(config, CPU, 8).batches, causal=True)
    assert (found.embeddings.shape[-1] == config.data.size) == raw
    assert (found.encoded is not None) == raw
    if raw:
        assert isinstance(model, Pretrainer)
        assert model.heads.raw is not None
        wanted = in_deviations(found.values, model.heads.raw.mean, model.heads.raw.std)
        torch.testing.assert_close(found.embeddings[:, 1:][found.real[:, 1:]], wanted[found.real[:, 1:]])
    fitted_on = joined(list(gather_targets(model, config.data, held_out(config, CPU, 8).batches)))
    assert torch.equal(fitted_on.embeddings, found.embeddings)


# -------------------------------------------------------------------------------------------------- its name


def test_every_named_objective_has_one_with_the_head() -> None:
    for name in NAMED:
        plain, headed = named(name, tiny.recipe()), named(f"{name}_head", tiny.recipe())
        assert (plain.objective.head, headed.objective.head) == ("none", "simsiam")
        assert headed.objective.model_copy(update={"head": "none"}) == plain.objective
    assert named("cosine", override(tiny.recipe(), HEADED)).objective.head == "none"
    with pytest.raises(UserError, match=r"there is no objective cosine_hed.*did you mean cosine_head"):
        named("cosine_hed", tiny.recipe())
    with pytest.raises(UserError, match=r"^objective\.head is overridden by every objective of objectives=cosine"):
        check_given(["objective.head"], ["cosine"])


def test_a_comparison_says_which_objectives_have_it() -> None:
    shared = {"terms": {"cosine": 1.0}, "stop_gradient": True}
    found = {"recipe": {**shared, "head": "mlp"}, "cosine": {**shared, "head": "none"}, "mse": shared}
    summary = cast(ObjectivesSummary, {"ranking": list(found), "objectives": found})
    assert own_objective(summary) == ["recipe: 1 cosine, with stop-gradient, predictions behind the head mlp."]
    assert [line[3] for line in formula_table(summary)[1:]] == [
        "p and z; p is behind the head mlp",
        "p and z",
        "p and z",
    ]


def test_no_other_kind_is_known() -> None:
    with pytest.raises(UserError, match=r"objective\.head=byol"):
        override(tiny.recipe(), {"objective.head": "byol"})
