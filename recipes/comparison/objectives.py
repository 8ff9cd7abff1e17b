"""Several objectives on one recipe: does pre-training pay?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt

from nepa_core.basics import FROZEN
from nepa_core.model import NEPA
from nepa_core.runtime.config import listed
from nepa_core.runtime.distributed import world
from nepa_core.runtime.optim import MOST_STEPS
from nepa_core.runtime.run import Run
from recipes.comparison.downstream import HORIZON, Care, CareBefore, check, downstream, finetunings, raw_figure
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
)
from recipes.comparison.measures import every_spread, of_variant, predicted, rank_over_training
from recipes.configs import PretrainConfig
from recipes.objective_names import HEADED, NAMED, OWN, named
from recipes.options import listed_or_all, once
from recipes.presets import PAPER_OBJECTIVE
from recipes.report import card
from recipes.report.objectives import RANDOM, report, title_of
from recipes.report.provenance import provenance
from recipes.report.summaries import (
    Choices,
    ChosenSetting,
    ObjectiveFigures,
    ObjectivesSummary,
    PretrainSummary,
    RunMeasures,
    Runs,
)
from recipes.report.tables import credits_of, gain_spreads, groups, margin, spreads
from recipes.statistics.protocol import Look, alone
from recipes.statistics.significance import LEAST_SEEDS, Difference, against, covers, differences, least
from recipes.training.starting import build_model

DEFAULT = ("cosine", "mse_normalised", "infonce_sample", "infonce_position", "sigreg")
"""Objectives that are compared where none are named."""

REFERENCE = "cosine"
"""The paper's, which the others are tested against."""

CARE = "tuned random weights"
"""What random weights are called where they were fine-tuned at a learning rate of their own."""


Steps = Annotated[int, Field(gt=0, le=MOST_STEPS)]


class ObjectivesOptions(BaseModel):
    """Options of `nepa objectives`."""

    model_config = FROZEN

    objectives: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default=DEFAULT,
        min_length=1,
        description=f"some of {', '.join(NAMED)}, any of these with {HEADED} behind it (a head on the predictions), "
        f"module:function (a loss of yours), and {OWN}: what objective.terms=, objective.stop_gradient=, "
        f"objective.head= and the recipe itself say; default {','.join(DEFAULT)}",
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field(
        default=(0, 1, 2), min_length=1, description="such as 0,1,2,3,4; default 0,1,2"
    )
    labels: Annotated[tuple[PositiveInt | None, ...], BeforeValidator(listed_or_all), AfterValidator(once)] = Field(
        default=(10, 50, None), min_length=1, description="training labels a class to fine-tune on; default 10,50,all"
    )
    learning_rates: Annotated[tuple[PositiveFloat, ...], BeforeValidator(listed), AfterValidator(once)] = Field(
        default=(3e-4, 1e-3, 3e-3),
        min_length=1,
        description="to choose from for each fine-tuning; default 3e-4,1e-3,3e-3",
    )
    finetune_steps: Annotated[tuple[Steps, ...], BeforeValidator(listed), AfterValidator(once)] = Field(
        default=(100, 300), min_length=1, description="to choose from, at the best learning rate; default 100,300"
    )
    finetune_causal: Annotated[tuple[bool, ...], BeforeValidator(listed), AfterValidator(once)] = Field(
        default=(False, True),
        min_length=1,
        description="attention to choose from, both ways or causal; default false,true",
    )
    horizon: PositiveInt = Field(
        default=HORIZON, description=f"steps to forecast a series without targets for; default {HORIZON}"
    )
    out: str | None = Field(default=None, description="folder of all runs and the report; default runs/NAME-objectives")
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core, or one a GPU")

    @property
    def care(self) -> Care:
        return Care(**self.model_dump(include=set(Care.model_fields)))


class Measured(NamedTuple):
    """All that was measured of a comparison.

    Attributes:
        variants: the objectives. rows: name -> what was measured, one a seed; random: the same of random weights.
        look: at the folder, with its seeds. care: by which settings of fine-tunings were chosen.
    """

    variants: list[Variant]
    rows: Runs
    random: list[RunMeasures]
    look: Look
    care: CareBefore


def objectives(config: PretrainConfig, options: ObjectivesOptions, out: Path) -> ObjectivesSummary:
    """Run and measure everything that is not yet, and write summary.json and report/ into `out`.

    Raises:
        UserError: an objective is not known or does not fit the recipe, or the samples have nothing to be judged by.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    variants, rows, random, look, care = measured(config, options, out)
    summary = summarise(rows, random, options, look) | {"recipe": config.recipe, "made_with": provenance()}
    summary["choices"] = chosen_from(care)
    summary["labels"] = ["all" if each is None else each for each in finetunings(config, options.care)]
    for variant in variants:
        objective = variant.config.objective
        summary["objectives"][variant.name] |= {
            "terms": dict(objective.terms),
            "stop_gradient": objective.stop_gradient,
            "head": objective.head,
        }
    summary["runs"] = {v.name: [str(run_folder(v, seed, out)) for seed in look.seeds] for v in variants}
    summary["margins"] = {name: margin(each) for name, each in run_summaries(variants, look.seeds, out).items()}
    with reporting(out):
        report(rows, random, summary).write(out / "report")
        Run(out).write_summary(summary)
    return summary


def measured(config: PretrainConfig, options: ObjectivesOptions, out: Path) -> Measured:
    """Run and measure everything that is not yet.

    Raises:
        UserError, KeyboardInterrupt: see `objectives`.
    """
    variants = [Variant(name, named(name, config)) for name in options.objectives]
    check(config, options.horizon)
    care = care_of(variants, config, options, out)

    def controls(seeds: Sequence[int]) -> list[Job]:
        return [control(config, seed, care, out) for seed in seeds]

    workers = options.workers or default_workers()
    how = Measure("objectives", measure, care)
    rows, look = compare(variants, options.seeds, how, out, workers=workers, also=controls)
    random = [cast(RunMeasures, job.values()) for job in controls(look.seeds)]
    return Measured(variants, rows, random, look, care)


def care_of(variants: Sequence[Variant], config: PretrainConfig, options: ObjectivesOptions, out: Path) -> CareBefore:
    """By which rule settings are chosen: the present one, unless all that is asked for was kept by the former.

    Figures of two rules are never compared with each other.
    """
    before = CareBefore.of(options.care)
    former = Measure("objectives", measure, before)
    kept = [pair(variant, seed, former, out) for variant in variants for seed in options.seeds]
    kept += [control(config, seed, before, out) for seed in options.seeds]
    return before if all(job.done for job in kept) else options.care


def measure(config: PretrainConfig, model: NEPA, run: Run, care: Care) -> RunMeasures:
    """Everything that is compared, of one run."""
    summary = run.summary_of(PretrainSummary)
    assert summary is not None
    return {
        **downstream(config, model, run.path, care),
        **predicted(run),
        "verdict": card.judgement(card.verdict_in(summary)).partition(".")[0],
        "rank_over_training": rank_over_training(run),
    }


def control(config: PretrainConfig, seed: int, care: CareBefore, out: Path) -> Job:
    """The job that measures random weights with one seed: whatever the objective, they are the same."""
    neutral = PAPER_OBJECTIVE.model_copy(update={"causal": config.objective.causal})
    config = seeded(config.model_copy(update={"objective": neutral}), seed)
    key = digest([config_digest(config), care.model_dump(mode="json")])
    folder, name = out / "random", f"seed{seed}-{key}"
    work = partial(untrained, config, cast(Care, care))  # results of the rule before are only looked up
    return Job(f"{RANDOM}, seed {seed}", folder / f"{name}.json", folder / f".{name}.lock", work)


def untrained(config: PretrainConfig, care: Care) -> RunMeasures:
    """What `measure` gives of read-outs and fine-tuning, of random weights; and `raw_tokens`, the probe of these."""
    with world() as ranks:
        model = build_model(config).to(ranks.device).eval()
        return {**downstream(config, model, None, care), "raw_tokens": raw_figure(config, ranks.device, care.horizon)}


# ----------------------------------------------------------------------------------------------- summary


def chosen_from(care: Care | CareBefore) -> Choices:
    """The choices as the summary holds them."""
    return cast(Choices, care.model_dump(mode="json", exclude={"labels"}))


def summarise(
    rows: Runs, random: Sequence[RunMeasures], options: ObjectivesOptions, look: Look | None = None
) -> ObjectivesSummary:
    """summary.json, but for what needs the runs' configs and folders.

    Args:
        look: that the rows are of; default: the first at a folder of its own.
    """
    look = look or alone(len(rows), options.seeds)
    measures = ["probe", "probe_final", *random[0]["settings"]]
    first = next(iter(rows.values()))[0]
    found = every_spread(rows)
    control = {RANDOM: random}
    at_random = {key: spreads(control, key)[RANDOM] for key in measures}
    gains = {key: gain_spreads(rows, dict.fromkeys(rows, random), key, key) for key in measures}
    pays = {
        key: differences(
            groups(rows, key) | groups(control, key),
            [(name, RANDOM) for name in rows],
            correction=look.controls(),
            credits=credits_of({**rows, **control}, key),
        )
        for key in measures
    }
    rivals = [(name, REFERENCE) for name in rows if name != REFERENCE and REFERENCE in rows]
    better = {
        key: differences(groups(rows, key), rivals, correction=look.rivals(), credits=credits_of(rows, key))
        for key in measures
        if rivals
    }
    return {
        "task": "objectives",
        "seeds": list(look.seeds),
        "look": look._asdict(),
        "metric": first["metric"],
        "measures": measures,
        "choices": chosen_from(options.care),
        "label_counts": random[0].get("label_counts", {}),
        "verdict": [*sentences(pays, better, look), *look.notes],
        "ranking": sorted(rows, key=lambda name: -found["probe"][name]["mean"]),
        "raw_tokens": random[0]["raw_tokens"],
        "random": {
            **cast(ObjectiveFigures, at_random),
            "settings": _chosen(random),
            "probe_rows": [row["probe_row"] for row in random],
        },
        "objectives": {
            name: {
                **cast(ObjectiveFigures, of_variant(found, name)),
                "gain": {key: gains[key][name] for key in measures},
                "verdicts": [row["verdict"] for row in seeds],
                "settings": _chosen(seeds),
                "probe_rows": [row["probe_row"] for row in seeds],
            }
            for name, seeds in rows.items()
        },
        "against_random": {key: [each._asdict() for each in tests] for key, tests in pays.items()},
        "against_cosine": {key: [each._asdict() for each in tests] for key, tests in better.items()},
    }


def _chosen(seeds: Sequence[RunMeasures]) -> dict[str, list[ChosenSetting]]:
    """The setting of every fine-tuning, one for each seed."""
    return {key: [row["settings"][key] for row in seeds] for key in seeds[0]["settings"]}


def sentences(
    pays: Mapping[str, Sequence[Difference]], better: Mapping[str, Sequence[Difference]], look: Look
) -> list[str]:
    """The answer in short; for every measure whether pre-training pays; where an objective differs from the cosine."""
    if len(look.seeds) < LEAST_SEEDS:
        given = "one seed" if len(look.seeds) == 1 else f"{len(look.seeds)} seeds"
        return [f"With {given} nothing can be told from noise: give three or more."]
    told, said = list(pays), [headline(pays)]
    said += [against(pays[key], RANDOM, title_of(key), called=CARE if "finetuned" in key else RANDOM) for key in told]
    closing = covers([each for family in (pays, better) for tests in family.values() for each in tests], look.told())
    if not better:
        return [*said, closing]
    real = [key for key in told if any(each.real for each in better[key])]
    said += [against(better[key], REFERENCE, title_of(key), called="the cosine") for key in real]
    if len(real) < len(told):
        rest = "; ".join(f"{title_of(key)} ({least(better[key])})" for key in told if key not in real)
        said.append(
            f"No objective differs from the cosine by more than the noise in {rest}; in brackets: smaller differences "
            "can't be seen with these seeds."
        )
    return [*said, closing]


def headline(pays: Mapping[str, Sequence[Difference]]) -> str:
    """Does pre-training pay? Yes or no of the probe, and then of every fine-tuning: they need not agree."""

    def answer(found: Sequence[Difference]) -> str:
        better = [each.better for each in found if each.real and each.worse == RANDOM]
        worse = [each.worse for each in found if each.real and each.better == RANDOM]
        if better:
            return f"yes ({', '.join(better)})"
        return f"no, worse ({', '.join(worse)})" if worse else "not beyond the noise"

    told = "; in ".join(f"{title_of(key)} {answer(found)}" for key, found in pays.items() if key != "probe_final")
    return f"Better than random weights? In {told}."
