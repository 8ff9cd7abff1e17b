"""Which kind of data helps which? Each part of a mix alone against all together in one predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import torch
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt

from nepa_core.basics import FROZEN, UserError
from nepa_core.model import NEPA
from nepa_core.runtime.config import listed, override
from nepa_core.runtime.distributed import world
from nepa_core.runtime.run import Run
from recipes.comparison import engine
from recipes.comparison.downstream import HORIZON, check, forecast_layers, is_forecast, probed_layers, raw_figure
from recipes.comparison.engine import Job, Measure, Variant
from recipes.configs import PretrainConfig
from recipes.report.provenance import provenance
from recipes.report.summaries import RunMeasures, TransferRow, TransferSummary
from recipes.report.tables import credits_of, gain_spreads, groups, spreads
from recipes.report.transfer import report
from recipes.statistics.protocol import Look
from recipes.statistics.significance import LEAST_SEEDS, Difference, covers, differences, unseen
from recipes.training.starting import build_model

RANDOM = "random weights"
SAME_COST, OWN_STEPS = "together, same cost", "together, own steps"


class TransferOptions(BaseModel):
    """Options of `nepa transfer`."""

    model_config = FROZEN

    seeds: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field(
        default=(0, 1, 2), min_length=1, description="such as 0,1,2,3,4; default 0,1,2"
    )
    horizon: PositiveInt = Field(
        default=HORIZON, description=f"steps to forecast a series without targets for; default {HORIZON}"
    )
    out: str | None = Field(default=None, description="folder of all runs and the report; default runs/NAME-transfer")
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core, or one a GPU")


class Reading(BaseModel):
    """What the figures of a run depend on beside it: the steps that series are forecast for."""

    model_config = FROZEN

    horizon: int


def transfer(config: PretrainConfig, options: TransferOptions, out: Path) -> TransferSummary:
    """Run and measure everything that is not yet, and write summary.json and report/ into `out`.

    Raises:
        UserError: the recipe has no parts that are mixed, its length is not in steps, or a part can't be judged.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    variants, parts = arms(config), tuple(config.data.strata())
    for part, own in apart(config).items():
        try:
            check(own, options.horizon)
        except UserError as error:
            raise UserError(f"part {part} has nothing to be judged by: {error}") from error
    reading = Reading(horizon=options.horizon)

    def controls(seeds: Sequence[int]) -> list[Job]:
        return [control(config, seed, reading, out) for seed in seeds]

    rows, look = engine.compare(
        list(variants.values()),
        options.seeds,
        Measure("transfer", measure, reading),
        out,
        workers=options.workers or engine.default_workers(),
        also=controls,
    )
    random = [cast(TransferRow, job.values()) for job in controls(look.seeds)]
    summary = summarise(rows, random, parts, look) | {"recipe": config.recipe, "made_with": provenance()}
    summary["steps"] = {name: variant.config.train.length.steps or 0 for name, variant in variants.items()}
    summary["runs"] = {
        name: [str(engine.run_folder(variant, seed, out)) for seed in look.seeds] for name, variant in variants.items()
    }
    with engine.reporting(out):
        report(summary).write(out / "report")
        Run(out).write_summary(summary)
    return summary


def arms(config: PretrainConfig) -> dict[str, Variant]:
    """Each part alone, and all together: as many steps in all as each alone, or as many of each part's own.

    A step of all together holds a part's share of samples, so that a part of share w has its own S steps after S / w.
    Where shares differ, each part is given a run of its own for that.

    Raises:
        UserError: the recipe mixes no parts, or its length is not in steps.
    """
    parts = config.data.strata()
    if len(parts) < 2:
        several = bool(config.data.part_names())
        fix = "set data.mode=mixed, without part=" if several else "recipes.together:digits_and_series is such a recipe"
        raise UserError(f"nepa transfer compares parts that are mixed in one predictor, and here are none: {fix}")
    if (steps := config.train.length.steps) is None:
        raise UserError("nepa transfer compares equal steps: give train.length.steps=N")
    found = {alone(part): each for part, each in apart(config).items()} | {SAME_COST: config}
    shares = config.data.shares()
    for part in parts:
        changes = {"train.length.steps": round(steps / shares[part])}
        found[own_steps(part, shares)] = override(config, changes)
    return {name: Variant(name, each) for name, each in found.items()}


def alone(part: str) -> str:
    return f"{part} alone"


def own_steps(part: str, shares: Mapping[str, float]) -> str:
    """The run in which a part has the steps that it has alone."""
    equal = max(shares.values()) - min(shares.values()) < 1e-9
    return OWN_STEPS if equal else f"{OWN_STEPS} of {part}"


def apart(config: PretrainConfig) -> dict[str, PretrainConfig]:
    """Part -> the same network and setting with its samples alone; of a run on one part that one."""
    return {part: config.model_copy(update={"data": data}) for part, data in config.data.strata().items()}


def measure(config: PretrainConfig, model: NEPA, run: Run, reading: Reading) -> TransferRow:
    """The probe of every part that a run was trained on."""
    return {"parts": {part: read(own, model, reading) for part, own in apart(config).items()}}


def read(config: PretrainConfig, model: NEPA, reading: Reading) -> RunMeasures:
    """The probe of the best layer, or of a series without targets the skill of its forecast."""
    return forecast_layers(config, model, reading.horizon) if is_forecast(config) else probed_layers(config, model)


def control(config: PretrainConfig, seed: int, reading: Reading, out: Path) -> Job:
    """The job that measures random weights with one seed."""
    config = engine.seeded(config, seed)
    key = engine.digest([engine.config_digest(config), reading.model_dump(mode="json")])
    folder, name = out / "random", f"seed{seed}-{key}"
    work = partial(untrained, config, reading)
    return Job(f"{RANDOM}, seed {seed}", folder / f"{name}.json", folder / f".{name}.lock", work)


def untrained(config: PretrainConfig, reading: Reading) -> TransferRow:
    """What `measure` gives, of random weights; and the raw tokens of every part."""
    with world() as ranks:
        model = build_model(config).to(ranks.device).eval()
        own = apart(config)
        raw = {part: raw_figure(each, torch.device(ranks.device), reading.horizon) for part, each in own.items()}
        return {"parts": {part: read(each, model, reading) for part, each in own.items()}, "raw_tokens": raw}


# ----------------------------------------------------------------------------------------------- summary


def summarise(
    rows: Mapping[str, Sequence[TransferRow]], random: Sequence[TransferRow], parts: Sequence[str], look: Look
) -> TransferSummary:
    """summary.json, but for what needs the runs' configs and folders."""
    found: dict[str, list[Difference]] = {}
    summary: TransferSummary = {
        "task": "transfer",
        "seeds": list(look.seeds),
        "look": look._asdict(),
        "parts": list(parts),
        "metrics": {},
        "probes": {},
        "gains": {},
        "random": {},
        "raw": random[0]["raw_tokens"],
        "differences": {},
    }
    for part in parts:
        own = {
            name: [row["parts"][part] for row in seeds]
            for name, seeds in rows.items()
            if part in seeds[0]["parts"] and not (name.startswith(f"{OWN_STEPS} of ") and not name.endswith(f" {part}"))
        }
        base, control_rows = alone(part), [row["parts"][part] for row in random]
        beside = {name: each for name, each in own.items() if name != base}
        summary["metrics"][part] = own[base][0]["metric"]
        summary["probes"][part] = spreads(own, "probe")
        summary["random"][part] = spreads({RANDOM: control_rows}, "probe")[RANDOM]
        gains = gain_spreads(beside, dict.fromkeys(beside, own[base]), "probe", "probe")
        summary["gains"][part] = {name.removesuffix(f" of {part}"): each for name, each in gains.items()}
        found[part] = differences(
            groups(own, "probe"),
            [(name, base) for name in beside],
            correction=look.rivals(),
            credits=credits_of(own, "probe"),
        )
        summary["differences"][part] = [each._asdict() for each in found[part]]
    summary["verdict"] = [*sentences(found, parts, look), *look.notes]
    return summary


def sentences(found: Mapping[str, Sequence[Difference]], parts: Sequence[str], look: Look) -> list[str]:
    """The answer in short; which part is helped by the others, at equal steps of its own and at equal cost."""
    if len(look.seeds) < LEAST_SEEDS:
        given = "one seed" if len(look.seeds) == 1 else f"{len(look.seeds)} seeds"
        return [f"With {given} nothing can be told from noise: give three or more."]
    said, short = [], []
    for part, tests in found.items():
        others = [each for each in parts if each != part]
        helper, seen = others[0] if len(others) == 1 else "the others", []
        for kind, words in ((OWN_STEPS, "At equal steps of its own"), (SAME_COST, "At equal total cost")):
            each = next(each for each in tests if kind in each.better or kind in each.worse)
            points = f"{100 * each.mean * (1 if kind in each.better else -1):+.1f} ± {100 * each.half:.1f} points"
            if not each.real:
                said.append(f"{words}, no effect of {helper} on {part} is seen ({points}): {unseen([each])}.")
                continue
            verb = "helps" if kind in each.better else "hurts"
            seen.append(f"{verb} {words[0].lower()}{words[1:]}")
            said.append(f"{words}, {helper} {verb} {part} ({points}).")
        short.append(f"{helper} {' and '.join(seen) or 'without an effect that is seen'}, for {part}")
    return [
        f"Which helps which? {'; '.join(short)}.",
        *said,
        covers([each for tests in found.values() for each in tests], look.told()),
    ]
