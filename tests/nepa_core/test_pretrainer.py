"""The mixture of terms, its heads, and every named objective on real digits for a few steps."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_core import NEPA, ObjectiveConfig, Prediction, Pretrainer, Tokens, UserError, next_embedding_loss
from nepa_core.model import HeadOutputs
from nepa_core.objective import pair_up
from nepa_core.predictor import Trace
from nepa_core.pretrainer import Heads, objective_loss
from nepa_core.runtime.config import load_config, override, parse_assignments
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import read_weights
from nepa_core.terms import TERMS
from nepa_core.verdict.baselines import fit_baselines
from nepa_core.verdict.diagnostics import health, identification, learning
from nepa_core.verdict.gathered import gather, gather_targets, joined
from nepa_core.verdict.judge import judge, start_of
from recipes import vision
from recipes.configs import PretrainConfig
from recipes.objective_names import NAMED, named
from recipes.presets import PAPER_OBJECTIVE
from recipes.training.judging import held_out, held_out_health, rank_warning
from recipes.training.pretraining import load_pretrained, make_step, pretrain
from recipes.training.starting import build_model, build_pretrainer, check_samples
from tests import tiny
from tests.tiny import CPU

ALONE = World(0, 1, CPU)
SIGREG = ("sigreg", "sigreg_batch")


def objective(**changes: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(PAPER_OBJECTIVE.model_dump() | changes)


def network(config: PretrainConfig) -> tuple[NEPA, Prediction]:
    """The network of a recipe with weights that all matter, and what it makes of eight held-out samples."""
    model = build_pretrainer(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    tokens = config.data.read(next(held_out(config, CPU, 8).batches))
    return model, model(tokens, causal=True)


def loss_of(config: PretrainConfig, out: Prediction) -> Tensor:
    torch.manual_seed(1)
    return objective_loss(config.objective, out)


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        ([], {"cosine": 1.0}),
        (["objective.terms.mse=0.5"], {"cosine": 1.0, "mse": 0.5}),
        (["objective.terms.mse=0.5", "objective.terms.cosine=0"], {"mse": 0.5}),
        (['objective.terms={"infonce_position":1}'], {"infonce_position": 1.0}),
        (['objective.terms={"barlow":1}', "objective.terms.cosine=2"], {"barlow": 1.0, "cosine": 2.0}),
    ],
)
def test_terms_are_set_one_by_one_or_all_at_once(words: list[str], terms: dict[str, float]) -> None:
    assert override(tiny.recipe(), parse_assignments(words)).objective.terms == terms


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective.terms.cosin": 1}, "there is no term cosin; did you mean cosine?"),
        ({"objective.terms": 3}, "objective.terms=3: input should be a valid dictionary"),
        ({"objective.terms.mse": "much"}, "objective.terms.mse=much: input should be a valid number"),
        ({"objective.terms.mse": -1}, "the weight of mse must be a number from 0"),
        ({"objective.terms": {}}, "objective.terms needs one that trains the prediction: cosine,"),
        ({"objective.terms": {"sigreg_batch": 1}, "objective.stop_gradient": False}, "objective.terms needs one that"),
        ({"objective.terms.sigreg_tokens": 1}, "objective.terms.sigreg_tokens shapes the targets: it needs objective."),
        ({"objective.terms.horizons": 1, "objective.shift": False}, "objective.terms.horizons looks ahead: it needs"),
        (
            {"objective.terms.flow": 1, "objective.shift": False},
            "objective.terms.flow looks ahead: it needs objective.",
        ),
        ({"objective.terms": {"flow": 1}}, "objective.terms needs one that"),
        ({"objective.terms.intermediate": 1}, "objective.terms.intermediate needs objective.layers, such as [2]"),
        ({"objective.layers": [3]}, "objective.layers=3 is no block: they are 1 to model.depth=2"),
        ({"objective.projector": [0, 8]}, "objective.projector=[0,8]: both widths must be above 0"),
        ({"objective.terms.barlow": 1, "train.micro_batch": 1}, "objective.terms.barlow compares samples: "),
        (
            {"objective.terms.infonce_position": 1, "train.batch": 1},
            "objective.terms.infonce_position compares",
        ),
        ({"objective.terms.mse.x": 1}, "unknown key objective.terms.mse.x"),
    ],
)
def test_an_objective_that_does_not_fit_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        override(tiny.recipe(), changes)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


LONELY = "compares the samples of one forward pass of a process, and train.batch="


@pytest.mark.parametrize(
    ("term", "batch", "micro_batch", "ranks", "said"),
    [
        ("standardised", 2, None, 2, f"{LONELY}2 on 2 processes leaves it one: set train.batch=4 or more"),
        ("barlow", 4, None, 4, f"{LONELY}4 on 4 processes leaves it one: set train.batch=8 or more"),
        ("sigreg_batch", 2, 1, 2, "leaves it one: set train.batch=4 or more and train.micro_batch=2 or more"),
        ("infonce_position", 4, 1, 1, f"{LONELY}4 with train.micro_batch=1 leaves it one: set train.micro_batch=2 or"),
        ("infonce_position", 2, None, 2, None),
        ("infonce_position", 4, 1, 2, None),
        ("standardised", 4, None, 2, None),
        ("barlow", 8, 2, 2, None),
        ("cosine", 2, 1, 2, None),
    ],
)
def test_terms_that_compare_samples_ask_for_two_in_a_forward_pass(
    term: str, batch: int, micro_batch: int | None, ranks: int, said: str | None
) -> None:
    config = override(
        tiny.recipe(),
        {
            "objective.terms": {"cosine": 1.0, term: 1.0},
            "objective.stop_gradient": term != "sigreg_batch",
            "train.batch": batch,
        },
    )
    # Past the check of the config itself, which does not know the processes.
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})
    if said is None:
        check_samples(config, ranks)
        return
    with pytest.raises(UserError) as raised:
        check_samples(config, ranks)
    assert str(raised.value).startswith(f"objective.terms.{term} {LONELY}{batch}")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_whose_samples_have_no_other_beside_them_is_not_begun(tmp_path: Path) -> None:
    config = override(tiny.recipe(), {"objective.terms": {"infonce_position": 1.0}, "train.micro_batch": 1})
    with pytest.raises(UserError, match=LONELY):
        pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    assert not (tmp_path / "run").exists()


def test_held_out_samples_have_others_beside_them_whatever_the_micro_batch() -> None:
    config = override(tiny.recipe(), {"objective.terms": {"infonce_position": 1.0}, "train.micro_batch": 1})
    assert held_out_health(config, build_pretrainer(config), ALONE, None)["held_out_objective"] > 0.1


def test_a_run_of_before_there_were_terms_is_one_of_the_cosine(tmp_path: Path) -> None:
    Run(tmp_path).open(tiny.recipe())
    saved = json.loads((tmp_path / "config.json").read_text())
    keys = ("causal", "shift", "stop_gradient", "input_mask")
    saved["objective"] = {key: saved["objective"][key] for key in keys}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert load_config(PretrainConfig, tmp_path / "config.json") == tiny.recipe()


# ---------------------------------------------------------------------------------------------- the loss


def test_the_default_is_the_papers_loss_to_the_last_bit_and_has_no_heads() -> None:
    model, out = network(tiny.ragged())
    assert type(model) is NEPA
    paper = next_embedding_loss(out.predictions, out.embeddings, out.mask)
    assert torch.equal(objective_loss(PAPER_OBJECTIVE, out), paper)


def test_a_mixture_is_the_weighted_sum_of_its_terms() -> None:
    _, out = network(tiny.ragged())
    parts = [objective_loss(objective(terms={name: 1.0}), out) for name in ("cosine", "mse", "barlow")]
    mixed = objective_loss(objective(terms={"cosine": 0.5, "mse": 2.0, "barlow": 3.0}), out)
    assert mixed.item() == pytest.approx(sum(w * x.item() for w, x in zip((0.5, 2, 3), parts, strict=True)), rel=1e-6)


def test_every_term_is_in_a_named_objective() -> None:
    assert {name for changes in NAMED.values() for name in changes["objective.terms"]} == set(TERMS)


@pytest.mark.parametrize("name", [*NAMED, "cosine_head", "infonce_sample_head"])
def test_targets_get_a_gradient_only_without_stop_gradient_and_all_else_takes_part(name: str) -> None:
    config = named(name, tiny.ragged())
    assert config.objective.stop_gradient == (name not in SIGREG)
    model, made = network(config)
    out = made._replace(
        embeddings=made.embeddings.detach().requires_grad_(), predictions=made.predictions.detach().requires_grad_()
    )
    heads = model.heads if isinstance(model, Pretrainer) else None
    if heads is not None:
        tokens = config.data.read(next(held_out(config, CPU, 8).batches))
        out = out._replace(heads=heads(out, [out.predictions] * 3, tokens))
    loss_of(config, out).backward()
    reached = out.embeddings.grad is not None and bool(out.embeddings.grad.any())
    assert reached != config.objective.stop_gradient
    assert out.predictions.grad is not None
    assert out.predictions.grad.any()
    assert heads is None or all(p.grad is not None and p.grad.any() for p in heads.parameters())


@pytest.mark.parametrize("name", [*NAMED, "cosine_head", "infonce_sample_head"])
def test_no_prediction_sees_beyond_its_place(name: str) -> None:
    """The loss of the first places stays while later tokens change, and changes with the last target among them."""
    config = named(name, tiny.recipe())
    model, _ = network(config)
    tokens = config.data.read(next(held_out(config, CPU, 8).batches))

    def first(values: Tensor) -> float:
        torch.manual_seed(2)  # flow matching draws noise
        out = model(replace(tokens, values=values), causal=True)
        heads = out.heads
        if heads is not None:
            projected = None if heads.projected is None else (heads.projected[0][:, :6], heads.projected[1][:, :6])
            heads = HeadOutputs(projected, *(tuple(x[:, :6] for x in made) for made in heads[1:]))
        return loss_of(config, Prediction(out.embeddings[:, :6], out.predictions[:, :6], None, heads)).item()

    values = tokens.values
    assert values.shape[1] == 6  # BOS is in front: token 4 is the last target among six places
    later, target = values.clone(), values.clone()
    torch.manual_seed(3)
    later[:, 5:] = torch.randn_like(later[:, 5:])
    target[:, 4:] = torch.randn_like(target[:, 4:])
    assert first(later) == pytest.approx(first(values), abs=1e-5)
    assert first(target) != pytest.approx(first(values), abs=1e-4)


# What the heads make, against references written out in float64, one pair at a time.

HEADED: dict[str, dict[str, Any]] = {
    "projected_cosine": {"terms": {"projected_cosine": 1.5}, "projector": (7, 4)},
    "projected_mse": {"terms": {"projected_mse": 1.5}, "projector": (7, 4)},
    "horizons": {"terms": {"horizons": 1.5}, "horizons": 3},
    "intermediate": {"terms": {"cosine": 0.5, "intermediate": 1.5}, "layers": (3, 1)},
}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
Weights = dict[str, Tensor]


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def _projected(weights: Weights, x: Tensor) -> Tensor:
    """Linear, LayerNorm, ReLU, Linear, of one vector."""
    x = _linear(weights, "projector.0", x)
    x = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
    x = x * weights["projector.1.weight"] + weights["projector.1.bias"]
    return _linear(weights, "projector.3", x.clamp(min=0))


def _headed(
    name: str, weights: Weights, p: Tensor, z: Tensor, blocks: list[Tensor], mask: Tensor, stop: bool
) -> Tensor:
    """The mixture `name` of HEADED, on [B, T, D] float64; `blocks` are the outputs of the blocks 1, 2, ..."""

    def mean(made: list[list[Tensor]], ahead: int, compare: str = "cosine") -> Tensor:
        values = []
        for b in range(mask.shape[0]):
            for t in range(mask.shape[1] - ahead):
                if mask[b, t] and mask[b, t + ahead]:
                    own, target = made[b][t], z[b, t + ahead]
                    target = _projected(weights, target) if name.startswith("projected") else target
                    target = target.detach() if stop else target
                    cosine = (own * target).sum() / ((own**2).sum() * (target**2).sum()).sqrt()
                    values.append(-cosine if compare == "cosine" else ((own - target) ** 2).sum() / len(target))
        return torch.stack(values).mean()

    def mapped(head: str, x: Tensor) -> list[list[Tensor]]:
        return [[_linear(weights, head, place) for place in row] for row in x]

    if name.startswith("projected"):
        made = [[_projected(weights, place) for place in row] for row in p]
        return 1.5 * mean(made, 1, name.removeprefix("projected_"))
    if name == "horizons":
        losses = [mean(mapped(f"horizons.{k - 1}", p), k) for k in (1, 2, 3)]
        return 1.5 * (losses[0] + losses[1] + losses[2]) / 3
    of_third, of_first = mean(mapped("layers.0", blocks[2]), 1), mean(mapped("layers.1", blocks[0]), 1)
    return 0.5 * mean([list(row) for row in p], 1) + 1.5 * (of_third + of_first) / 2


@pytest.mark.parametrize("stop_gradient", [True, False], ids=["stopped", "flowing"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("name", HEADED)
def test_a_term_behind_heads_and_its_gradients_are_those_of_the_formula(
    name: str, mask: Tensor | None, stop_gradient: bool
) -> None:
    torch.manual_seed(0)
    config = objective(stop_gradient=stop_gradient, **HEADED[name])
    heads = Heads(config, 5)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    p, z, *hidden = (torch.randn(3, 6, 5).requires_grad_() for _ in range(6))  # the input and three blocks
    bare, raw = Prediction(z, p, mask), Tokens(torch.zeros(3, 6, 1), torch.zeros(6, 1), mask)
    loss = objective_loss(config, bare._replace(heads=heads(bare, hidden, raw)))

    weights = {key: value.detach().double().requires_grad_() for key, value in heads.named_parameters()}
    p64, z64, *hidden64 = (x.detach().double().requires_grad_() for x in (p, z, *hidden))
    counted = torch.ones_like(MASK) if mask is None else mask
    expected = _headed(name, weights, p64, z64, hidden64[1:], counted, stop_gradient)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    ours, theirs = [p, z, *hidden, *heads.parameters()], [p64, z64, *hidden64, *weights.values()]
    found = torch.autograd.grad(loss, ours, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, theirs, allow_unused=True, materialize_grads=True)
    for ours_is, theirs_is in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_is, theirs_is.float(), rtol=1e-4, atol=1e-6)
    assert bool(found[1].any()) != stop_gradient
    assert mask is None or not any(x[~mask].any() for x in found[: 2 + len(hidden)])


@pytest.mark.parametrize("stop_gradient", [True, False], ids=["stopped", "flowing"])
@pytest.mark.parametrize("name", HEADED)
def test_what_a_head_predicts_is_hidden_from_it(name: str, stop_gradient: bool) -> None:
    """The loss of a single pair reaches the tokens before its place, and its target where nothing stops it."""
    terms = {"objective.terms": HEADED[name]["terms"], "objective.stop_gradient": stop_gradient}
    config = override(tiny.recipe(), terms | {"objective.horizons": 3, "objective.layers": [1, 2]})
    model, _ = network(config)
    tokens = config.data.read(next(held_out(config, CPU, 8).batches))
    values = tokens.values.clone().requires_grad_()
    out = model(replace(tokens, values=values), causal=True)
    for ahead in (1, 2, 3) if name == "horizons" else (1,):
        for place in range(7 - ahead):  # place t sees the tokens before t: BOS is in front
            mask = torch.zeros(8, 7, dtype=torch.bool)
            mask[:, [place, place + ahead]] = True
            loss = objective_loss(config.objective, out._replace(mask=mask))
            (gradient,) = torch.autograd.grad(loss, values, retain_graph=True, materialize_grads=True)
            target = {place + ahead - 1}
            reached = set(gradient.abs().amax((0, 2)).nonzero().flatten().tolist())
            assert reached == set(range(place)) | (set() if stop_gradient else target)


@pytest.mark.parametrize("recipe", [tiny.recipe, tiny.ragged])
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])
def test_the_flow_term_compares_the_velocities_of_the_next_tokens(
    recipe: Callable[[], PretrainConfig], bos: bool
) -> None:
    config = override(recipe(), {"objective.terms.flow": 0.5, "model.bos": bos, "objective.terms.cosine": 2.0})
    model, _ = network(config)
    assert isinstance(model, Pretrainer)
    head = model.heads.flow
    assert head is not None
    tokens = config.data.read(next(held_out(config, CPU, 8).batches))
    torch.manual_seed(2)
    out = model(tokens, causal=True)
    loss = objective_loss(config.objective, out)
    following = tokens.values if bos else tokens.values[:, 1:]
    coords = tokens.coords if bos else tokens.coords[1:]
    torch.manual_seed(2)
    velocity, wanted = head.pairs((following - head.mean) / head.std, out.predictions[:, :-1], coords)
    apart = (velocity - wanted).square().mean(-1)
    counted = torch.ones_like(apart, dtype=torch.bool) if out.mask is None else out.mask[:, 1:] & out.mask[:, :-1]
    paper = next_embedding_loss(out.predictions, out.embeddings, out.mask)
    assert loss.item() == pytest.approx((2 * paper + apart[counted].mean() / 2).item(), rel=1e-5)
    (reached,) = torch.autograd.grad(apart[counted].mean(), model.predictor.blocks[0].mlp.up.weight)
    assert reached.any()


def test_the_flow_head_has_the_mean_and_spread_of_training_tokens_whatever_the_seed() -> None:
    config = override(tiny.ragged(), {"objective.terms.flow": 1.0, "data.jitter": 9.0})
    heads = [build_pretrainer(override(config, {"train.seed": seed})).heads for seed in (0, 1)]
    whole = config.data.plain().tokenize(
        next(plain_batches(config.data.plain().dataset("train"), batch=48, device=CPU))
    )
    for head in heads:
        assert isinstance(head, Heads)
        assert head.flow is not None
        torch.testing.assert_close(head.flow.mean, whole.values[whole.real].mean(0))
        torch.testing.assert_close(head.flow.std, whole.values[whole.real].std(0, correction=0))
    with pytest.raises(ValueError, match=r"^the head flow needs training tokens: give some to the Pretrainer"):
        Pretrainer(config.model, config.data.embedder(16), config.objective)


def test_horizons_alone_are_judged_by_the_first() -> None:
    model, out = network(override(tiny.ragged(), {"objective.terms": {"horizons": 1.0}, "objective.horizons": 3}))
    assert isinstance(model, Pretrainer)
    assert out.heads is not None
    assert torch.equal(model.judged(out)[0], out.heads.horizons[0])


def test_horizons_beyond_the_sequence_are_one_line() -> None:
    config = override(tiny.recipe(), {"objective.terms.horizons": 1.0, "objective.horizons": 7})
    _, out = network(config)
    with pytest.raises(UserError, match=r"objective\.horizons=7 reaches beyond sequences of 7 places"):
        loss_of(config, out)


def test_an_intermediate_block_is_read_at_its_output() -> None:
    config = override(tiny.recipe(), {"objective.terms.intermediate": 1.0, "objective.layers": [1, 2]})
    model, out = network(config)
    assert isinstance(model, Pretrainer)
    assert out.heads is not None
    trace = Trace()
    model(config.data.read(next(held_out(config, CPU, 8).batches)), causal=True, trace=trace)
    for block, (head, made) in enumerate(zip(model.heads.layers, out.heads.layers, strict=True), 1):
        assert torch.allclose(head(trace.hidden[block]), made, atol=1e-6)
    losses = [next_embedding_loss(made, out.embeddings).item() for made in out.heads.layers]
    expected = next_embedding_loss(out.predictions, out.embeddings).item() + sum(losses) / 2
    assert loss_of(config, out).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("term", "changes"),
    [
        ("projected_cosine", {}),
        ("projected_mse", {}),
        ("sigreg_tokens", {"stop_gradient": False}),
        ("sigreg_batch", {"stop_gradient": False}),
        ("horizons", {}),
        ("intermediate", {"layers": [1]}),
        ("flow", {}),
    ],
)
def test_a_term_without_its_head_is_an_error_of_the_caller(term: str, changes: dict[str, Any]) -> None:
    _, bare = network(tiny.recipe())
    projecting = term not in ("horizons", "intermediate")
    _, other = network(named("horizons" if projecting else "sigreg", tiny.recipe()))
    config = objective(terms={"cosine": 1.0, term: 1.0}, **changes)
    for out in (bare, other):
        with pytest.raises(ValueError, match=rf"^the term {term} needs a head: let a Pretrainer"):
            objective_loss(config, out)


# ----------------------------------------------------------------------------------------------- the runs


@pytest.mark.parametrize("name", NAMED)
def test_every_named_objective_trains_on_digits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.report.page.Report.write", lambda *_: None)  # its plots take longer than the training
    changes = {
        **{"train.length.steps": 3, "train.evaluate": 3, "train.log": 1, "train.checkpoint": 3, "data.limit": 128},
        **{"verdict.fit_samples": 64, "verdict.test_samples": 64, "verdict.health_samples": 64, "model.depth": 2},
    }
    config = named(name, override(vision.digits(), changes))
    untrained = build_pretrainer(config).state_dict()
    summary = pretrain(config, Run(tmp_path), ALONE, show=False)
    assert math.isfinite(summary["objective"])
    assert 0 <= summary["retrieval_top1"] <= 1
    assert -1 <= summary["loss"] <= 1
    assert load_config(PretrainConfig, tmp_path / "config.json") == config
    checkpoint = tmp_path / "checkpoints/step_00000003"
    assert (checkpoint / "model_heads.safetensors").exists() == config.objective.has_heads
    _, model = load_pretrained(Run(tmp_path), CPU)  # strict: the heads are not among what it is given
    assert type(model) is NEPA
    assert summary["parameters"] == sum(value.numel() for value in model.parameters())
    assert read_weights(str(tmp_path)).model.keys() == model.state_dict().keys()
    first = build_model(config).state_dict()
    assert all(torch.equal(untrained[key], value) for key, value in first.items())  # heads don't change the start


def test_a_run_with_heads_goes_on_bit_for_bit(tmp_path: Path) -> None:
    terms = {"projected_mse": 1.0, "sigreg_tokens": 20.0, "horizons": 1.0, "flow": 1.0, "raw_token": 1.0}
    changes = {"objective.terms": terms, "objective.stop_gradient": False, "objective.head": "mlp"}
    config = override(tiny.random(), changes)
    whole, again = Run(tmp_path / "whole"), Run(tmp_path / "again")
    pretrain(config, whole, ALONE, show=False)
    shutil.copytree(whole.path, again.path)
    shutil.rmtree(again.checkpoints / "step_00000012")
    (again.path / "summary.json").unlink()
    pretrain(config, again, ALONE, show=False)
    names = [path.name for path in (whole.checkpoints / "step_00000012").glob("*.safetensors")]
    assert {"model_heads.safetensors", "ema_heads.safetensors"} <= set(names)
    for name in names:
        ours, theirs = ((run.checkpoints / "step_00000012" / name).read_bytes() for run in (whole, again))
        assert ours == theirs, name
    assert whole.metrics() == again.metrics()


@pytest.mark.parametrize("name", ["infonce_position", "barlow", "sigreg"])
def test_a_step_weighs_the_pairs_of_its_micro_batch(name: str) -> None:
    config = named(name, tiny.ragged())
    model, out = network(config)
    step = make_step(config)(model, next(held_out(config, CPU, 8).batches))
    assert out.mask is not None
    assert step.weight == (out.mask[:, 1:] & out.mask[:, :-1]).sum()
    assert step.loss.isfinite()


# ----------------------------------------------------------------------------------- what is judged, and where


def test_a_projected_objective_is_judged_behind_the_projector_and_its_rank_before_it() -> None:
    config = named("sigreg", tiny.ragged())
    model, out = network(config)
    assert out.heads is not None
    assert out.heads.projected is not None
    found = gather(model, config.data, held_out(config, CPU, 8).batches, causal=True)
    assert found.mask is not None
    assert found.encoded is not None
    projected = out.heads.projected
    assert torch.allclose(found.predictions, projected[0], atol=1e-5)
    assert torch.allclose(found.embeddings, projected[1], atol=1e-5)
    bare = found._replace(embeddings=found.encoded, encoded=None)
    assert health(found)["effective_rank_embedding"] == health(bare)["effective_rank_embedding"]
    same = gather(network(tiny.ragged())[0], tiny.ragged().data, held_out(config, CPU, 8).batches, causal=True)
    assert same.encoded is None


def test_what_is_measured_while_training_is_what_the_verdict_says() -> None:
    config = tiny.ragged()
    model, _ = network(config)
    train, test = (gather(model, config.data, held_out(config, CPU, 32).batches, causal=True) for _ in range(2))
    figures, verdict = learning(test), judge(fit_baselines([train], test, total=32), test, start_of(test)).verdict
    assert figures["retrieval_top1"] == pytest.approx(verdict.retrieval_top1, abs=1e-6)
    assert figures["copy_gap"] == pytest.approx(verdict.baseline_copy - verdict.loss, abs=1e-6)
    own, target, counted = pair_up(test.predictions, test.embeddings, test.mask, shift=True)
    assert counted is not None
    assert figures["retrieval_top1"] == identification(own[:, 1:], target[:, 1:], counted[:, 1:]).nanmean()


def test_a_falling_rank_is_warned_of_once_each_time_it_falls(tmp_path: Path) -> None:
    run, warned = Run(tmp_path), []
    for step, rank in enumerate([10.0, 6.0, 4.9, 3.0, 5.0, 4.0]):
        figures = {"effective_rank_embedding": rank}
        warned.append("warning" in rank_warning(run, figures))
        run.log({"step": step, **figures})
        run.log({"step": step, "loss": 0.0})
    assert warned == [False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["cosine", "sigreg", "projected_cosine"])
def test_the_targets_of_baselines_are_those_that_predictions_are_judged_by(name: str) -> None:
    """Without running the predictor over the training split."""
    config = named(name, tiny.ragged())
    model, _ = network(config)
    whole = gather(model, config.data, held_out(config, CPU, 32).batches, causal=True)
    alone = joined(list(gather_targets(model, config.data, held_out(config, CPU, 32).batches)))
    assert torch.equal(alone.embeddings, whole.embeddings)
    assert torch.equal(alone.values, whole.values)
    assert alone.mask is not None
    assert whole.mask is not None
    assert torch.equal(alone.mask, whole.mask)
