"""Several patch orders on one recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveInt

from modalities.orders import file_content
from modalities.orders.measures import OrderMeasures, mean_measures, order_measures
from nepa_core.basics import FROZEN, UserError
from nepa_core.model import NEPA
from nepa_core.runtime.config import listed, override
from nepa_core.runtime.meter import say_progress
from nepa_core.runtime.optim import MOST_STEPS
from nepa_core.runtime.run import Run
from recipes.comparison.downstream import (
    as_control,
    beside_random,
    check,
    is_forecast,
    one_setting,
    read_as,
    untrained,
)
from recipes.comparison.engine import (
    Job,
    Measure,
    Variant,
    compare,
    config_digest,
    default_workers,
    digest,
    pair,
    reporting,
    run_folder,
    run_summaries,
    seeded,
    share,
)
from recipes.comparison.measures import attention_by_layer, every_spread, of_variant, predicted
from recipes.comparison.order_pictures import pictures
from recipes.configs import PretrainConfig
from recipes.options import listed_or_all, once
from recipes.report.orders import report
from recipes.report.provenance import provenance
from recipes.report.summaries import Cross, Foresight, OrderFigures, OrdersSummary, RunMeasures, Runs, finetuned
from recipes.report.tables import credits_of, gain_spreads, groups, margin
from recipes.statistics.held_out import drawn_batches
from recipes.statistics.maps import token_positions
from recipes.statistics.power import outlook, sentence
from recipes.statistics.protocol import Look, alone
from recipes.statistics.significance import (
    LEAST_SEEDS,
    Credits,
    Difference,
    covers,
    differences,
    gains,
    others,
    unseen,
    verdict,
)
from recipes.training.starting import try_order

DEFAULT = (
    *("raster", "column", "snake", "hilbert", "morton", "spiral_in", "diagonal"),
    *("random:1", "random:2", "random:3"),
)
"""Orders that are compared where none are named."""

SEEDED = ("random", "random_per_sample")
"""Those that `data.order_seed` changes; what random_annealed draws depends on the seed of the run alone."""

RANDOM = "random weights"
"""What the same network without pre-training is called in the tests."""

_ATTENTION_SAMPLES = 256
_ORDER_SAMPLES = 16  # whose orders are measured, where each sample has its own


class OrdersOptions(BaseModel):
    """Options of `nepa orders`."""

    model_config = FROZEN

    orders: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default=DEFAULT, min_length=1, description=f"such as raster,my_orders:by_saliency; default {','.join(DEFAULT)}"
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field(
        default=(0, 1, 2), min_length=1, description="such as 0,1,2,3,4; default 0,1,2"
    )
    predict_position: Literal["off", "add", "rotate"] | None = Field(
        default=None, description="of every order: off, add or rotate; default: as in the recipe"
    )
    labels: Annotated[tuple[PositiveInt | None, ...], BeforeValidator(listed_or_all), AfterValidator(once)] = Field(
        default=(50,),
        min_length=1,
        description="training labels a class to fine-tune on, such as 10,50,all; default 50",
    )
    finetune_steps: int = Field(default=150, gt=0, le=MOST_STEPS, description="steps of each fine-tuning; default 150")
    cross: bool = Field(default=True, description="also read the models of the first seed by every other order")
    out: str | None = Field(default=None, description="folder of all runs and the report; default runs/NAME-orders")
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core, or one a GPU")


class MeasureOptions(BaseModel):
    """What the measured values depend on beside the run."""

    model_config = FROZEN

    labels: tuple[int | None, ...]
    finetune_steps: int


def orders(config: PretrainConfig, options: OrdersOptions, out: Path) -> OrdersSummary:
    """Run and measure everything that is not yet, and write summary.json and report/ into `out`.

    Raises:
        UserError: an order is not known or the adapter has none, or the samples have nothing to train on.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    check(config)
    variants = [variant_of(config, name, options.predict_position) for name in options.orders]
    variants = [variant for variant in variants if fits(variant, named=options.orders != DEFAULT)]
    labels = (None,) if is_forecast(config) else options.labels
    options = options.model_copy(update={"orders": tuple(variant.name for variant in variants), "labels": labels})
    workers = options.workers or default_workers()
    how = MeasureOptions(labels=options.labels, finetune_steps=options.finetune_steps)
    measured = Measure("orders", measure, how)

    def controls(seeds: Sequence[int]) -> list[Job]:
        return [
            control(variant, seed, how, out)
            for seed in seeds
            for variant in variants
            if not pair(variant, seed, measured, out).done
        ]

    def ready(look: Look) -> None:
        random = {v.name: [random_row(v, seed, measured, out) for seed in look.seeds] for v in variants}
        if (said := foresight(random, look)) is not None:
            say_progress(said["words"])

    rows, look = compare(variants, options.seeds, measured, out, workers=workers, also=controls, ready=ready)
    summary = summarise(rows, options, look) | {"recipe": config.recipe}
    if options.cross and len(variants) > 1:
        summary["cross"] = read_across(variants, look.seeds[0], out, workers=workers)
    folders = {v.name: [str(run_folder(v, seed, out)) for seed in look.seeds] for v in variants}
    summary["margins"] = {name: margin(each) for name, each in run_summaries(variants, look.seeds, out).items()}
    summary |= {"runs": folders, "made_with": provenance()}
    with reporting(out):
        report(rows, summary, pictures(summary)).write(out / "report")
        Run(out).write_summary(summary)
    return summary


def fits(variant: Variant, *, named: bool) -> bool:
    """Whether samples can be read in this order. One that the user has named must; another is left out with a line.

    Raises:
        UserError: one that was named does not.
    """
    try:
        try_order(variant.config)
    except UserError as error:
        if named:
            raise UserError(f"{variant.name}: {error}") from error
        print(f"left out: {variant.name}: {error}", file=sys.stderr)
        return False
    return True


def ordered(config: PretrainConfig, name: str, predict_position: str | None) -> PretrainConfig:
    """The recipe under an order: a name, NAME:SEED, module:function or a file.

    Raises:
        UserError: there is no such order, it depends on no seed, or the adapter takes none.
    """
    if "patch_order" not in type(config.data).model_fields:
        kind = type(config.data).__name__
        raise UserError(
            f"{kind} takes no data.patch_order, so its orders can't be compared: write `from modalities.orders import "
            f"Ordered`, `class {kind}(Ordered, Modality):`, and in it `def order(self, tokens): return "
            "self.ordered(tokens, GRID)`, where GRID is (tokens,) of a line or (rows, columns) of a grid"
        )
    base, _, seed = name.rpartition(":")
    if base in SEEDED and not seed.isdecimal():
        raise UserError(f"orders={name}: {seed!r} is no seed, which is a whole number from 0, such as {base}:1")
    drawn = {"data.patch_order": base, "data.order_seed": int(seed)} if seed.isdecimal() else {"data.patch_order": name}
    told = {} if predict_position is None else {"model.predict_position": predict_position}
    changed = override(config, drawn | told)
    if seed.isdecimal() and base not in SEEDED:
        raise UserError(
            f"orders={name}: {base} depends on no seed (those that do are {', '.join(SEEDED)}); name {base}"
        )
    return changed


def variant_of(config: PretrainConfig, name: str, predict_position: str | None) -> Variant:
    """`ordered`; an order in a file is told from others by what the file holds, too."""
    changed = ordered(config, name, predict_position)
    return Variant(name, changed, file_content(cast(Any, changed.data).patch_order))


def measure(config: PretrainConfig, model: NEPA, run: Run, options: MeasureOptions) -> RunMeasures:
    """Everything that is compared, of one run."""
    device = next(model.parameters()).device
    care, folder = one_setting(config, options.labels, options.finetune_steps), run.path.parents[1] / "random"
    random = Run(folder).summary(control_name(config.train.seed, run.path.name.rpartition("-")[2], options))
    return {
        **beside_random(config, model, run, care, cast(RunMeasures | None, random)),
        **predicted(run),
        "attention": attention_by_layer(config, model, device, _ATTENTION_SAMPLES),
        "order": measured_order(config, device),
    }


def control(variant: Variant, seed: int, options: MeasureOptions, out: Path) -> Job:
    """The job that measures random weights under an order, before any network is trained; `measure` takes it up."""
    config = seeded(variant.config, seed)
    folder, name = out / "random", control_name(seed, config_digest(config, variant.content), options)
    care = one_setting(config, options.labels, options.finetune_steps)
    label = f"{RANDOM} under {variant.name}, seed {seed}"
    return Job(label, folder / name, folder / f".{Path(name).stem}.lock", partial(untrained, config, care))


def control_name(seed: int, key: str, options: MeasureOptions) -> str:
    """The file that random weights are kept in; `key`: that the folder of the run ends in."""
    return f"seed{seed}-{digest([key, options.model_dump(mode='json')])}.json"


def random_row(variant: Variant, seed: int, measured: Measure[RunMeasures], out: Path) -> RunMeasures:
    """What is kept of random weights: in the row of a run that is measured, else in random/."""
    done = pair(variant, seed, measured, out)
    if done.done:
        return cast(RunMeasures, done.values())
    return as_control(cast(RunMeasures, control(variant, seed, cast(MeasureOptions, measured.options), out).values()))


def foresight(rows: Runs, look: Look) -> Foresight | None:
    """What the seeds of a look will show of the orders, from random weights; None of one order."""
    if len(rows) < 2:
        return None
    key = "probe_random"
    found = outlook(groups(rows, key), correction=look.pairs(), credits=credits_of(rows, key))
    return cast(Foresight, {**found._asdict(), "words": sentence(found, noun="orders", of="the probe")})


def measured_order(config: PretrainConfig, device: torch.device) -> OrderMeasures:
    """`order_measures` of the order that drawn held-out samples are read in, padding left out: a mean over samples."""
    data, most = config.data.plain(), _ORDER_SAMPLES
    tokens = data.read(next(drawn_batches(data, most, device, at_once=most)))
    positions = token_positions(tokens, data.describe(tokens).grid)
    if positions.ndim == 2 and tokens.real.all():
        return order_measures(positions)
    each = zip(positions.expand(*tokens.real.shape, -1), tokens.real, strict=True)
    found = [order_measures(where[real]) for where, real in each if real.sum() > 1]  # of one token there is no order
    return mean_measures(found or [order_measures(positions.flatten(0, -2)[:1])])


def read_across(variants: list[Variant], seed: int, out: Path, *, workers: int) -> Cross:
    """Probe accuracy of the model of every order (a row of `accuracy`) when it is read by every order (a column)."""
    jobs = {}
    for trained in variants:
        folder = run_folder(trained, seed, out)
        for read in variants:
            data = read.config.data
            key = [read.name, data.model_dump(mode="json"), *([read.content] if read.content else [])]
            file = f"read-{digest(key)}.json"
            lock = folder / f".{file}.lock"
            name = f"{trained.name} read as {read.name}"
            jobs[trained.name, read.name] = Job(name, folder / file, lock, partial(read_as, folder, data))
    share(list(jobs.values()), workers=workers)
    names = [variant.name for variant in variants]
    return {
        "orders": names,
        "seed": seed,
        "accuracy": [[jobs[row, column].values()["probe"] for column in names] for row in names],
    }


# ----------------------------------------------------------------------------------------------- summary


def summarise(rows: Runs, options: OrdersOptions, look: Look | None = None) -> OrdersSummary:
    """summary.json, but for what needs the runs' folders.

    Args:
        look: that the rows are of; default: the first at a folder of its own.
    """
    look = look or alone(len(rows), options.seeds)
    found = every_spread(rows)
    gain = gain_spreads(rows, rows, "probe", "probe_random")
    apart = differences(groups(rows, "probe"), correction=look.pairs(), credits=credits_of(rows, "probe"))
    paired = _gains(rows, "probe", look)
    first = next(iter(rows.values()))[0]
    words: dict[str, Any] = {"noun": "orders", "seeds": len(look.seeds)}
    more = _more(rows, "probe", look)
    sentences = [
        verdict(apart, of=f"probe {first['metric']}", **words),
        verdict(more, of="what pre-training adds to the probe of random weights", brief=True, **words),
        pretraining(paired, list(rows)),
    ]
    tests = [*apart, *more, *paired]
    for labels in options.labels:
        name = finetuned(labels)
        of = "fine-tuning on all labels" if labels is None else f"fine-tuning on {labels} labels a class"
        tuned = differences(groups(rows, name), correction=look.pairs(), credits=credits_of(rows, name))
        scratch = _gains(rows, name, look)
        sentences.append(verdict(tuned, of=of, brief=True, **words))
        sentences.append(pretraining(scratch, list(rows), of=of))
        tests += [*tuned, *scratch]
    sentences += [covers(tests, look.told())] if len(look.seeds) >= LEAST_SEEDS else []
    return {
        "task": "orders",
        "seeds": list(look.seeds),
        "look": look._asdict(),
        "metric": first["metric"],
        "labels": ["all" if labels is None else labels for labels in options.labels],
        "finetune_steps": options.finetune_steps,
        "verdict": [*dict.fromkeys(sentences), *look.notes],  # of too few seeds every test says the same
        "ranking": sorted(rows, key=lambda name: -found["probe"][name]["mean"]),
        "raw_tokens": first["raw_tokens"],
        "orders": {
            name: {
                **cast(OrderFigures, of_variant(found, name)),
                "probe_gain": gain[name],
                "order": each[0]["order"],
                "attention": each[0]["attention"],
                "layers": each[0]["layers"],
                "loss_per_position": each[0]["loss_per_position"],
                "probe_rows": [row["probe_row"] for row in each],
            }
            for name, each in rows.items()
        },
        "differences": [each._asdict() for each in apart],
        "against_random": [each._asdict() for each in paired],
        "foresight": foresight(rows, look),
    }


def _gains(rows: Runs, key: str, look: Look) -> list[Difference]:
    """Every order against random weights under the same order."""
    own, control = credits_of(rows, key), credits_of(rows, f"{key}_random")
    known = None if own is None or control is None else (own, control)
    values, scratch = groups(rows, key), groups(rows, f"{key}_random")
    return gains(values, scratch, called=RANDOM, correction=look.controls(), credits=known)


def _more(rows: Runs, key: str, look: Look) -> list[Difference]:
    """What one order gains over random weights against what another does."""
    own, control = credits_of(rows, key), credits_of(rows, f"{key}_random")
    values, scratch = groups(rows, key), groups(rows, f"{key}_random")
    gain = {name: [a - b for a, b in zip(values[name], scratch[name], strict=True)] for name in rows}
    known = None
    if own is not None and control is not None:
        apart = {name: own.of[name] - control.of[name] for name in rows}
        known = Credits(apart, own.clusters, own.chained)
    return differences(gain, correction=look.pairs(), credits=known)


def pretraining(paired: list[Difference], names: list[str], of: str = "the probe") -> str:
    """The plain sentence on whether pre-training helps there at all."""
    if not paired:
        return f"Whether pre-training helps {of} can't be told from so few seeds."
    better = [each.better for each in paired if each.real and each.better in names]
    worse = [each.worse for each in paired if each.real and each.worse in names]
    said = [f"Pre-training does better than random weights in {of} under {', '.join(better)}."] if better else []
    said += [f"Pre-training does worse than random weights in {of} under {', '.join(worse)}."] if worse else []
    if not said:
        under = "Under no order does pre-training" if len(names) > 1 else f"Under {names[0]} pre-training does not"
        return f"{under} change {of} against random weights by more than the noise; {unseen(paired)}."
    return " ".join([*said, others(paired)])
