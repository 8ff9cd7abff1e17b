"""The held-out samples of a pre-training run, what a network makes of them, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import NamedTuple, cast

import torch
from torch.utils.data import Dataset

from nepa_core.basics import Batch
from nepa_core.ema import Ema, applied
from nepa_core.model import NEPA, Prediction
from nepa_core.objective import pair_count
from nepa_core.pretrainer import HEADS, objective_loss
from nepa_core.runtime.data import fold_seed, give_back_memory, plain_batches
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import FitResult
from nepa_core.runtime.meter import Meter
from nepa_core.runtime.run import Run
from nepa_core.verdict.baselines import fit_baselines
from nepa_core.verdict.crossing import Crossed, gather_crossing, judge_crossing, whole
from nepa_core.verdict.diagnostics import health, learning
from nepa_core.verdict.drawing import RIVALS, Drawn, apart, draw
from nepa_core.verdict.gathered import Gathered, gather, gather_targets
from nepa_core.verdict.judge import COLLAPSE_SHARE, Judged, Verdict, judge, start_of
from nepa_core.verdict.strata import pooled
from recipes.configs import PretrainConfig
from recipes.report.summaries import PairCredits, PretrainSummary
from recipes.statistics.credits import pack_credits
from recipes.statistics.held_out import pack_clusters
from recipes.training.starting import build_pretrainer, first_samples
from recipes.training.train import cost

RANK = "effective_rank_embedding"


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
    dataset = config.data.plain().samples_of("test")
    drawn, kept, unreadable = draw(dataset, limit, config.verdict.draw), list[int](), set[str]()
    batches = plain_batches(
        dataset,
        batch=eval_batch(config),
        device=device,
        indices=drawn.indices.tolist(),
        unreadable=unreadable,
        kept=kept,
        max_unreadable=config.train.max_unreadable,
        tokenize=config.data.plain().tokenize,
    )
    return HeldOut(drawn, batches, kept, unreadable)


def eval_batch(config: PretrainConfig) -> int:
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
        count = float(pair_count(out.predictions, out.mask, shift=config.objective.shift))
        sums[0] += count * float(objective_loss(config.objective, out))
        sums[1] += count

    def batches() -> Iterator[Batch]:
        for batch in samples.batches:
            torch.manual_seed(fold_seed(config.train.seed, "held out"))  # SIGReg draws directions, flow matching noise
            yield batch

    gathered = gather(model, config.data.plain(), batches(), causal=config.objective.causal, watch=add)
    return samples.of(gathered), sums[0] / max(sums[1], 1.0)


class Judgement(NamedTuple):
    """What is said of a trained model.

    Attributes:
        judged: on all held-out samples. objective: the value of its own objective there. unreadable: left out.
        strata: kind of samples -> the same of them alone, where the adapter has such.
    """

    judged: Judged
    objective: float
    unreadable: set[str]
    strata: dict[str, Judged]


def verdict_of(config: PretrainConfig, model: NEPA, device: torch.device, *, show: bool = False) -> Judgement:
    """Judge a trained model on held-out data, each kind of samples by itself (`Modality.strata`)."""
    if len(strata := config.data.strata()) < 2:
        return _verdict_of(config, model, device, show=show)
    found = {
        name: _verdict_of(config.model_copy(update={"data": data}), model, device, show=show)
        for name, data in strata.items()
    }
    asked = {name: each.judged.verdict.asked for name, each in found.items()}
    return Judgement(
        pooled({name: each.judged for name, each in found.items()}),
        sum(asked[name] * each.objective for name, each in found.items()) / sum(asked.values()),
        set[str]().union(*(each.unreadable for each in found.values())),
        {name: each.judged for name, each in found.items()},
    )


def crossings_of(
    config: PretrainConfig, model: NEPA, device: torch.device, *, show: bool = False
) -> dict[str, Crossed]:
    """Which parts of a sample a trained model predicts from which, see `Modality.crossings`; of causal ones alone."""
    found = {}
    for name, crossing in config.data.crossings().items() if config.objective.causal else ():
        own = config.model_copy(update={"data": crossing.data.plain()})
        crossing, most = crossing._replace(data=own.data), min(config.verdict.test_samples, room_for(own))
        made = []
        for each in (build_pretrainer(config).to(device), model):
            samples = held_out(own, device, most)
            made.append(samples.of(whole(gather_crossing(each, crossing, samples.batches))))
        train = own.data.samples_of("train")
        count = min(config.verdict.fit_samples or len(cast(Sized, train)), len(cast(Sized, train)))
        parts = gather_crossing(model, crossing, _training(own, train, device), predicts=False)
        found[name] = judge_crossing(parts, made[1], made[0], total=count, device=device)
    return found


def _verdict_of(config: PretrainConfig, model: NEPA, device: torch.device, *, show: bool = False) -> Judgement:
    most = min(config.verdict.test_samples, room_for(config))
    untrained = build_pretrainer(config).to(device)
    before = start_of(gather_held_out(config, untrained, held_out(config, device, most))[0])
    del untrained  # or it would stay beside the baselines
    samples = held_out(config, device, most)
    trained, objective = gather_held_out(config, model, samples)
    give_back_memory()
    train = config.data.plain().samples_of("train")
    every = len(cast(Sized, train))
    judged = judge(
        fit_baselines(
            training_parts(config, model, train, device, show=show),
            trained,
            total=min(config.verdict.fit_samples or every, every),
            device=device,
            symbols=config.data.symbols,
        ),
        trained,
        before,
        training_samples=every,
        rivals_overlap=not apart(config.data.plain().samples_of("test")),
    )
    return Judgement(judged, objective, samples.unreadable, {})


VERDICT_BYTES = 2**28
"""Most that the held-out samples of a verdict may take: raw tokens, embeddings and predictions, in float32."""


def room_for(config: PretrainConfig) -> int:
    """How many held-out samples fit into `VERDICT_BYTES`, by the first training sample; 64 at least."""
    tokens = config.data.plain().read(first_samples(config, 1, torch.device("cpu")))
    count, size = tokens.values.shape[1:]
    return max(RIVALS, VERDICT_BYTES // (4 * count * (size + 4 * config.model.dim)))


def training_parts(
    config: PretrainConfig, model: NEPA, dataset: Dataset[Batch], device: torch.device, *, show: bool
) -> Iterator[Gathered]:
    """What a model makes of training samples without augmentation, a random choice in random order, batch by batch."""
    batch, limit = eval_batch(config), config.verdict.fit_samples
    count = min(limit or len(cast(Sized, dataset)), len(cast(Sized, dataset)))
    batches = _training(config, dataset, device)
    with Meter(-(-count // batch), enabled=show, noun="linear control, batch") as meter:
        for done, part in enumerate(gather_targets(model, config.data.plain(), batches), 1):
            yield part
            meter.advance(done)


def _training(config: PretrainConfig, dataset: Dataset[Batch], device: torch.device) -> Iterator[Batch]:
    """Those samples in random order, as many as the verdict fits on."""
    return plain_batches(
        dataset,
        batch=eval_batch(config),
        device=device,
        workers=config.train.workers,
        limit=config.verdict.fit_samples,
        seed=0,
        tokenize=config.data.plain().tokenize,
        of="training",
    )


def packed(judged: Judged) -> PairCredits:
    """Which samples had their tokens identified, for intervals over several seeds."""
    return {
        "model": pack_credits(judged.credits["model"]),
        "linear": pack_credits(judged.credits["linear"]),
        "clusters": None if judged.clusters is None else pack_clusters(judged.clusters, chained=judged.chained),
    }


def best_possible(config: PretrainConfig, model: NEPA) -> float | None:
    """The loss that no predictor can beat where the adapter knows it; it counts BOS, and holds for causal attention.

    And for the embeddings themselves, not for what a projector makes of them.
    """
    applies = config.model.bos and config.objective.causal and config.objective.space not in ("projected", "raw")
    return config.data.known_optimum(model.embed) if applies else None


def summarise(
    verdict: Verdict, objective: float, config: PretrainConfig, model: NEPA, result: FitResult
) -> PretrainSummary:
    """summary.json: the verdict, the cost, and what it was made with."""
    return {
        **cast(PretrainSummary, verdict.model_dump()),
        "objective": objective,
        "causal": config.objective.causal,
        "weights": "raw" if config.train.ema is None else "ema",
        "space": config.objective.space,
        **cost(result, model),
        "parameters": sum(x.numel() for name, x in model.named_parameters() if not name.startswith(HEADS)),
    }
