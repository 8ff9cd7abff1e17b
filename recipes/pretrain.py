"""nepa pretrain: next-embedding pre-training, and the verdict that ends it.

RECIPE is module:function, built in (`nepa recipes`) or your own; a RUN is one to go on with. The run goes to
runs/NAME-OF-THE-RECIPE or out=: config.json, metrics.jsonl, checkpoints/, summary.json with the figures of the
verdict, and report/ with its plots. Stopped by Ctrl-C, SIGTERM or a crash, it goes on where it was by the same
command; a finished run is only shown again, and `nepa pretrain RUN out=OTHER` trains its settings anew.

The verdict compares the prediction on held-out data with a linear autoregression, with copying, with mean embeddings
and with the network before training, and judges collapse by the rank of the embeddings. `nepa probe RUN` is the next
question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from pydantic import BaseModel, Field, SerializeAsAny, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from nepa_core.baselines import fit_baselines
from nepa_core.basics import FROZEN, MOST_SEED, Batch, UserError
from nepa_core.diagnostics import health, learning
from nepa_core.drawing import RIVALS, Drawn, apart, draw
from nepa_core.ema import Ema, applied
from nepa_core.gathered import Gathered, gather, gather_targets
from nepa_core.modality import Modality, Tokens
from nepa_core.model import NEPA, Prediction, draw_coord_scale
from nepa_core.objective import pair_count
from nepa_core.predictor import PredictorConfig
from nepa_core.pretrainer import ACROSS_PROCESSES, ACROSS_SAMPLES, HEADS, ObjectiveConfig, Pretrainer, objective_loss
from nepa_core.runtime.config import override
from nepa_core.runtime.data import fold_seed, plain_batches, replace_broken
from nepa_core.runtime.distributed import World, gather_samples, world
from nepa_core.runtime.fit import FitResult, StepFunction, StepOutput, TrainConfig, samples_at_once
from nepa_core.runtime.optim import OptimConfig
from nepa_core.runtime.run import Meter, Run
from nepa_core.verdict import COLLAPSE_SHARE, Judged, Verdict, judge, start_of
from recipes import card
from recipes.advice import advice
from recipes.credits import pack_credits
from recipes.held_out import pack_clusters
from recipes.targets import default_out, read_target
from recipes.training import at_work, cost, opened, rendered, train
from recipes.weights import newest

RANK = "effective_rank_embedding"


UNKNOWN_TARGET = (
    "an order that differs between samples or batches needs model.predict_position=add (or rotate): without it the "
    "network can't know which patch comes next, so the best prediction is close to the mean embedding; "
    "objective.unknown_target=true trains it all the same"
)


class VerdictConfig(BaseModel):
    """How many samples the verdict reads.

    Attributes:
        fit_samples: training samples that the baselines are fitted on; None for the whole split.
        test_samples: held-out samples that are judged; fewer where they would take more than `VERDICT_BYTES`.
        health_samples: held-out samples behind each line of rank, spread and loss while training.
        draw: seed of the draw of held-out samples, whatever the run's own seed is.
    """

    model_config = FROZEN

    fit_samples: int | None = Field(default=None, gt=0)
    test_samples: int = Field(gt=1)
    health_samples: int = Field(gt=1)
    draw: int = Field(default=0, ge=0, lt=MOST_SEED)


class PretrainConfig(BaseModel):
    """A whole pre-training run: what a recipe function returns and `config.json` holds."""

    model_config = FROZEN

    task: ClassVar[str] = "pretrain"

    recipe: str = ""
    data: SerializeAsAny[Modality]
    model: PredictorConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    verdict: VerdictConfig

    @model_validator(mode="after")
    def _mask_token(self) -> Self:
        hides = self.objective.input_mask > 0
        if hides and not self.model.mask_token:
            raise ValueError(f"objective.input_mask={self.objective.input_mask} needs model.mask_token=true")
        if self.model.mask_token and not hides:
            raise ValueError("model.mask_token=true needs an objective.input_mask above 0, which alone trains it")
        return self

    @model_validator(mode="after")
    def _target_is_known(self) -> Self:
        known = self.model.predict_position != "off" or not self.objective.shift
        if self.data.draws_order() and not known and not self.objective.unknown_target:
            raise ValueError(UNKNOWN_TARGET)
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        batch, most = self.train.batch, self.train.micro_batch or self.train.batch
        if (lonely := without_another(self.objective, min(most, batch), batch)) is not None:  # however many processes
            raise ValueError(f"objective.terms.{lonely} compares samples: train.batch and train.micro_batch above 1")
        if wrong := [block for block in self.objective.layers if not 0 < block <= self.model.depth]:
            raise ValueError(f"objective.layers={wrong[0]} is no block: they are 1 to model.depth={self.model.depth}")
        return self


class Options(BaseModel):
    """Options of `nepa pretrain`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="run folder; default runs/NAME-OF-THE-RECIPE")


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = read_target(PretrainConfig, target, changes)
    run = Run(Path(options.out or default_out(target, "pretrain")))
    before = run.summary() is not None
    with world() as ranks, at_work(run, ranks, trains=True):
        summary = pretrain(config, run, ranks)
        if ranks.is_main:
            print(rendered(lambda: card.render(summary, config.data, run), run, before=before))


def without_another(objective: ObjectiveConfig, own: int, all_own: int) -> str | None:
    """The first term that compares samples and has but one, or None.

    Args:
        own: samples of one forward pass of one process. all_own: of those of all processes together.
    """
    seen = {name: all_own if name in ACROSS_PROCESSES else own for name in ACROSS_SAMPLES if name in objective.terms}
    return next((name for name, samples in seen.items() if samples < 2), None)


def check_samples(config: PretrainConfig, ranks: int) -> None:
    """Whether every term that compares samples gets two of them, with this many processes.

    One alone gives a loss and a gradient of 0, or of nothing that means anything.

    Raises:
        UserError: it does not, or the batch does not fit the processes or the micro-batch.
    """
    own, train = samples_at_once(config.train, ranks=ranks), config.train
    if (lonely := without_another(config.objective, own, own * ranks)) is None:
        return
    mends = [f"train.batch={2 * ranks} or more"] if train.batch < 2 * ranks else []
    if train.micro_batch == 1:
        mends.append("train.micro_batch=2 or more")
    where = f" on {ranks} processes" if ranks > 1 else ""
    held = "" if train.micro_batch is None else f" with train.micro_batch={train.micro_batch}"
    raise UserError(
        f"objective.terms.{lonely} compares the samples of one forward pass of a process, and "
        f"train.batch={train.batch}{held}{where} leaves it one: set {' and '.join(mends)}"
    )


def has_own_order(config: PretrainConfig) -> bool:
    """Whether the order is a function of the user's."""
    return ":" in getattr(config.data, "patch_order", "")


def try_order(config: PretrainConfig) -> None:
    """Read a few training samples as they will be read, before hours of training.

    Raises:
        UserError: the order does not fit the tokens, or is a function of the user's that gives samples or batches
            different ones where the network is not told which token comes next. Neither is known before it is called.
    """
    told = config.model.predict_position != "off" or not config.objective.shift or config.objective.unknown_target
    data = config.data.at(0.0)
    batch = _first_samples(config, 8, torch.device("cpu"))
    reads = []
    for seed, part in enumerate([batch, batch, {key: value[:1] for key, value in batch.items()}]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reads.append(data.read(part))
    if not told and has_own_order(config) and not have_one_order(reads):
        raise UserError(UNKNOWN_TARGET)


def have_one_order(reads: list[Tokens]) -> bool:
    """Whether all samples of all batches are read in the same order.

    Samples with padding elsewhere than that of the first are left out: a shared order, too, is read differently there.
    """
    reads = [each for each in reads if each.values.shape[1] == reads[0].values.shape[1]]
    shapes = [each.values.shape[:2] for each in reads]
    masks = [torch.ones(shape) if each.mask is None else each.mask for each, shape in zip(reads, shapes, strict=True)]
    orders = [
        (torch.arange(shape[1]) if each.order is None else each.order).expand(shape)
        for each, shape in zip(reads, shapes, strict=True)
    ]
    mask, order = torch.cat(masks), torch.cat(orders)
    return bool((order == order[0]).all(1)[(mask == mask[0]).all(1)].all())


def try_batch(config: PretrainConfig, model: NEPA) -> None:
    """Take the loss of a few training samples, before anything is written; leaves model and random numbers as they are.

    Args:
        model: of `build_pretrainer`.

    Raises:
        UserError: samples, order (see `try_order`) and objective don't fit together.
    """
    if has_own_order(config):
        try_order(config)
    device, training = next(model.parameters()).device, model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        batch = _first_samples(config, min(config.train.micro_batch or config.train.batch, 8), device)
        out = model.eval()(config.data.at(0.0).read(batch), causal=config.objective.causal)
        loss = objective_loss(config.objective, out)
    model.train(training)
    if not loss.isfinite():
        raise UserError(
            f"the loss of a first batch is {loss.item()}: lower model.layer_scale, and look at the range of the samples"
        )


def _first_samples(config: PretrainConfig, count: int, device: torch.device) -> Batch:
    """The first training samples, but for those that can't be read."""
    torn: set[str] = set()
    dataset, most = config.data.dataset("train"), 128 * count
    try:
        return next(
            plain_batches(
                dataset, batch=count, device=device, limit=most, unreadable=torn, tokenize=config.data.tokenize
            )
        )
    except UserError as error:
        if not torn:
            raise
        raise UserError(f"none of the first {most} training samples can be read: {min(torn)}") from error


def build_model(config: PretrainConfig) -> NEPA:
    """The network with the weights that the run's seed gives: the untrained reference of every verdict."""
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    return NEPA(config.model, config.data.embedder(config.model.dim))


def build_pretrainer(config: PretrainConfig) -> NEPA:
    """What is trained: the network of `build_model`, with the heads that its objective needs, if any."""
    if not config.objective.has_heads:
        return build_model(config)
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    return Pretrainer(config.model, config.data.embedder(config.model.dim), config.objective)


def pretrain(config: PretrainConfig, run: Run, ranks: World, *, show: bool = True) -> dict[str, Any]:
    """Train, judge, write summary.json and report/; a finished run is not trained again.

    Args:
        show: progress on the screen.

    Returns:
        The summary (empty on the other ranks).
    """
    if (finished := opened(config, run, ranks)) is not None:
        return finished
    check_samples(config, ranks.size)
    if len(cast(Sized, config.data.plain().dataset("test"))) < 2:
        raise UserError("the held-out split has fewer than two samples, and each is told from others: hold out more")
    model = build_pretrainer(config).to(ranks.device)
    try_batch(config, model)

    def health(ema: Ema | None) -> dict[str, Any]:
        figures = held_out_health(config, model, ranks, ema)
        return figures | rank_warning(run, figures) if ranks.is_main else {}

    result, ema = train(
        model,
        model.predictor,
        config,
        run,
        ranks,
        step_function=make_step(config),
        step_at=partial(make_step, config) if config.data.draws_order() else None,
        evaluate=health,
        show=show,
    )
    if not ranks.is_main:
        return {}
    with applied(ema):
        judged, objective, unreadable = verdict_of(config, model, ranks.device, show=show)
        optimum = best_possible(config, model)
    summary = summarise(judged.verdict, objective, config, model, result)
    summary |= {"unreadable_held_out": len(unreadable), "unreadable_held_out_messages": sorted(unreadable)}
    summary |= {"credits": packed(judged), "advice": advice(judged.verdict, config, run.metrics())}
    if optimum is not None:
        summary["optimum"] = optimum
    card.write_report(run, summary, config.data)
    run.write_summary(summary)  # last: its presence says that the run is finished
    return summary


def load_pretrained(
    run: Run, device: torch.device, changes: Mapping[str, Any] | None = None
) -> tuple[PretrainConfig, NEPA]:
    """The config of a run and its network in evaluation mode, with the averaged weights where there are any.

    Args:
        changes: to the config, such as where the data lies now.

    Raises:
        UserError: the folder holds no run, or a run without an undamaged checkpoint, or a change does not fit.
    """
    config = override(run.load_config(PretrainConfig), changes or {})
    checkpoint = newest(run)
    model = build_model(config)
    averaged = checkpoint.tensors.get("ema", {})  # parameters only: an embedder's buffers come with the model
    model.load_state_dict(checkpoint.tensors["model"] | averaged)
    return config, model.to(device).eval()


def make_step(config: PretrainConfig, progress: float = 0.0) -> StepFunction:
    """The step function of pre-training: batch -> loss of the configured objective.

    Args:
        progress: share of the run that is done, see `Modality.at`.
    """
    objective, rescale, data = config.objective, config.model.rope_rescale, config.data.at(progress)

    def step(model: nn.Module, batch: Batch) -> StepOutput:
        tokens, _, broken = replace_broken(data.read(batch), batch)
        out = model(
            tokens,
            causal=objective.causal,
            hidden=draw_hidden(tokens, objective.input_mask),
            coord_scale=draw_coord_scale(rescale),
        )
        loss = objective_loss(objective, out, gather=gather_samples)
        count = pair_count(out.predictions, out.mask, shift=objective.shift)
        return StepOutput(loss, count, tokens.real_count(), broken)

    return step


def draw_hidden(tokens: Tokens, share: float) -> Tensor | None:
    """Which inputs the mask token replaces, [B, N] bool, each independently with this probability; None for none."""
    if share == 0:
        return None
    return torch.rand(tokens.values.shape[:2], device=tokens.values.device) < share


class HeldOut(NamedTuple):
    """The held-out samples that are judged, the same whatever the run's seed.

    Attributes:
        batches: of them. kept: the places in `drawn` of those that were given so far. unreadable: what was left out.
    """

    drawn: Drawn
    batches: Iterator[Batch]
    kept: list[int]
    unreadable: set[str]

    def of(self, gathered: Gathered) -> Gathered:
        """What was gathered of them, with which samples these are."""
        return gathered._replace(drawn=self.drawn.at(torch.tensor(self.kept)))


def held_out(config: PretrainConfig, device: torch.device, limit: int) -> HeldOut:
    """At most `limit` held-out samples, drawn over the whole split by `verdict.draw`."""
    dataset = config.data.plain().dataset("test")
    drawn, kept, unreadable = draw(dataset, limit, config.verdict.draw), list[int](), set[str]()
    batches = plain_batches(
        dataset,
        batch=_eval_batch(config),
        device=device,
        indices=drawn.indices.tolist(),
        unreadable=unreadable,
        kept=kept,
        max_unreadable=config.train.max_unreadable,
        tokenize=config.data.plain().tokenize,
    )
    return HeldOut(drawn, batches, kept, unreadable)


def _eval_batch(config: PretrainConfig) -> int:
    return min(max(config.train.micro_batch or config.train.batch, 2), 256)  # one sample has nothing to compare with


def held_out_health(config: PretrainConfig, model: NEPA, ranks: World, ema: Ema | None) -> dict[str, float]:
    """The held-out objective, rank, spread, shared direction, copy gap and identification: a line of metrics.jsonl.

    Of the averaged weights, where there are any. A few hundred samples: the main process takes them all.
    """
    if not ranks.is_main:
        return {}
    samples = config.verdict.health_samples
    with applied(ema):
        gathered, objective = gather_held_out(config, model, held_out(config, ranks.device, samples))
    return {"held_out_objective": objective, **health(gathered), **learning(gathered)}


def rank_warning(run: Run, figures: Mapping[str, float]) -> dict[str, str]:
    """A line of warning where the rank of the embeddings has just fallen below `COLLAPSE_SHARE` of its start."""
    ranks = [line[RANK] for line in run.metrics() if RANK in line]
    if not ranks or not figures[RANK] < COLLAPSE_SHARE * ranks[0] <= ranks[-1]:
        return {}
    return {
        "warning": f"the effective rank of the embeddings fell to {figures[RANK]:.1f}, below {COLLAPSE_SHARE:.0%} of "
        f"the {ranks[0]:.1f} before training: lower optim.lr or start with a larger model.layer_scale"
    }


def gather_held_out(config: PretrainConfig, model: NEPA, samples: HeldOut) -> tuple[Gathered, float]:
    """What a model makes of held-out samples, and the value of the run's own objective there.

    That is the mean over the batches, without gradient and without hidden inputs: terms that compare samples compare
    those of a batch, which is a micro-batch of at least 2 and at most 256 samples.

    Raises:
        UserError: what the model gives is not finite.
    """
    sums = [0.0, 0.0]

    def add(out: Prediction) -> None:
        torch.manual_seed(fold_seed(config.train.seed, "held out"))  # SIGReg draws directions
        count = float(pair_count(out.predictions, out.mask, shift=config.objective.shift))
        sums[0] += count * float(objective_loss(config.objective, out))
        sums[1] += count

    gathered = gather(model, config.data.plain(), samples.batches, causal=config.objective.causal, watch=add)
    return samples.of(gathered), sums[0] / max(sums[1], 1.0)


def verdict_of(
    config: PretrainConfig, model: NEPA, device: torch.device, *, show: bool = False
) -> tuple[Judged, float, set[str]]:
    """Judge a trained model on held-out data; also the value of its own objective there, and the samples left out."""
    most = min(config.verdict.test_samples, room_for(config))
    untrained = build_pretrainer(config).to(device)
    before = start_of(gather_held_out(config, untrained, held_out(config, device, most))[0])
    samples = held_out(config, device, most)
    trained, objective = gather_held_out(config, model, samples)
    train = config.data.plain().dataset("train")
    every = len(cast(Sized, train))
    judged = judge(
        fit_baselines(
            training_parts(config, model, train, device, show=show),
            trained,
            total=min(config.verdict.fit_samples or every, every),
            device=device,
        ),
        trained,
        before,
        training_samples=every,
        rivals_overlap=not apart(config.data.plain().dataset("test")),
    )
    return judged, objective, samples.unreadable


VERDICT_BYTES = 2**28
"""Most that the held-out samples of a verdict may take: raw tokens, embeddings and predictions, in float32."""


def room_for(config: PretrainConfig) -> int:
    """How many held-out samples fit into `VERDICT_BYTES`, by the first training sample; 64 at least."""
    tokens = config.data.plain().read(_first_samples(config, 1, torch.device("cpu")))
    count, size = tokens.values.shape[1:]
    return max(RIVALS, VERDICT_BYTES // (4 * count * (size + 4 * config.model.dim)))


def training_parts(
    config: PretrainConfig, model: NEPA, dataset: Dataset[Batch], device: torch.device, *, show: bool
) -> Iterator[Gathered]:
    """What a model makes of training samples without augmentation, a random choice in random order, batch by batch."""
    batch, limit = _eval_batch(config), config.verdict.fit_samples
    count = min(limit or len(cast(Sized, dataset)), len(cast(Sized, dataset)))
    batches = plain_batches(
        dataset,
        batch=batch,
        device=device,
        workers=config.train.workers,
        limit=limit,
        seed=0,
        tokenize=config.data.plain().tokenize,
    )
    with Meter(-(-count // batch), enabled=show, noun="linear control, batch") as meter:
        for done, part in enumerate(gather_targets(model, config.data.plain(), batches), 1):
            yield part
            meter.advance(done)


def packed(judged: Judged) -> dict[str, Any]:
    """Which samples had their tokens identified, for intervals over several seeds."""
    found: dict[str, Any] = {name: pack_credits(credit) for name, credit in judged.credits.items()}
    clusters = None if judged.clusters is None else pack_clusters(judged.clusters, chained=judged.chained)
    return found | {"clusters": clusters}


def best_possible(config: PretrainConfig, model: NEPA) -> float | None:
    """The loss that no predictor can beat where the adapter knows it; it counts BOS, and holds for causal attention.

    And for the embeddings themselves, not for what a projector makes of them.
    """
    applies = config.model.bos and config.objective.causal and config.objective.space != "projected"
    return config.data.known_optimum(model.embed) if applies else None


def summarise(
    verdict: Verdict, objective: float, config: PretrainConfig, model: NEPA, result: FitResult
) -> dict[str, Any]:
    """summary.json: the verdict, the cost, and what it was made with."""
    return {
        **verdict.model_dump(),
        "objective": objective,
        "causal": config.objective.causal,
        "weights": "raw" if config.train.ema is None else "ema",
        "space": config.objective.space,
        **cost(result, model),
        "parameters": sum(x.numel() for name, x in model.named_parameters() if not name.startswith(HEADS)),
    }
