"""The ablations of the paper on one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from nepa_core.basics import FROZEN
from nepa_core.model import NEPA
from nepa_core.runtime.config import listed, override
from nepa_core.runtime.run import Run
from recipes.comparison import engine
from recipes.comparison.downstream import beside_random, one_setting
from recipes.comparison.measures import rank_over_training
from recipes.configs import PretrainConfig
from recipes.networks.goals import find_goal
from recipes.report.ablate import report
from recipes.report.provenance import provenance
from recipes.report.summaries import AblateRow, AblateSummary, Arm, PretrainSummary
from recipes.report.tables import credits_of, groups, margin, spreads
from recipes.statistics.protocol import Look
from recipes.statistics.significance import LEAST_SEEDS, covers, differences, spread, verdict

ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "shift off": {"objective.shift": False},
    "causal mask off": {"objective.causal": False},
    "stop-gradient off": {"objective.stop_gradient": False},
    "input mask 40 %": {"objective.input_mask": 0.4, "model.mask_token": True},
    "input mask 60 %": {"objective.input_mask": 0.6, "model.mask_token": True},
}
"""Arm -> the keys it changes."""


class AblateOptions(BaseModel):
    """Options of `nepa ablate`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="folder of all runs and the report; default runs/NAME-ablate")
    seeds: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field(
        default=(0, 1), min_length=1, description="such as 0,1,2; default 0,1"
    )
    workers: int | None = Field(default=None, gt=0, description="processes at once; default one a core, or one a GPU")


class Nothing(BaseModel):
    """The measure has no options."""

    model_config = FROZEN


def ablate(config: PretrainConfig, options: AblateOptions, out: Path) -> AblateSummary:
    """Run all arms and write summary.json and report/ into `out`.

    Raises:
        UserError: the samples have no target to read out, or the data can't be read.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    find_goal(config.data)  # says what is wrong before minutes of training, not after
    arms = [engine.Variant(name, override(config, changes)) for name, changes in ARMS.items()]
    measured = engine.Measure("ablate", measure, Nothing())
    workers = options.workers or engine.default_workers()
    rows, look = engine.compare(arms, options.seeds, measured, out, workers=workers)
    result = summarise(rows, look) | {"recipe": config.recipe, "made_with": provenance()}
    result["margins"] = {name: margin(each) for name, each in engine.run_summaries(arms, look.seeds, out).items()}
    with engine.reporting(out):
        report(result).write(out / "report")
        Run(out).write_summary(result)
    return result


def measure(config: PretrainConfig, model: NEPA, run: Run, _: Nothing) -> AblateRow:
    """The run's own figures and the probe of every layer."""
    summary, read = run.summary_of(PretrainSummary), beside_random(config, model, run, one_setting(config, (), 1))
    assert summary is not None
    return {
        "objective": summary["objective"],
        "loss": summary["loss"],
        "retrieval_top1": summary["retrieval_top1"],
        "effective_rank_embedding": summary["effective_rank_embedding"],
        "effective_rank_embedding_start": summary["effective_rank_embedding_start"],
        "collapsed": summary["collapsed"],
        "probe_best": read["probe"],
        "probe_final": read["probe_final"],
        "probe_random": read["probe_random"],
        "probe_raw": read["raw_tokens"],
        "rank_over_training": rank_over_training(run),
        "credits": _renamed(read["credits"]),
        "clusters": _renamed(read["clusters"]),
    }


def _renamed(of_measures: dict[str, str]) -> dict[str, str]:
    return {{"probe": "probe_best"}.get(key, key): value for key, value in of_measures.items()}


def summarise(rows: Mapping[str, Sequence[AblateRow]], look: Look) -> AblateSummary:
    """summary.json, see `ablate`."""
    base, seeds = rows["base"], look.seeds
    apart = differences(
        groups(rows, "probe_best"),
        [(name, "base") for name in rows if name != "base"],
        correction=look.rivals(),
        credits=credits_of(rows, "probe_best"),
    )
    told = [verdict(apart, of="the probe of the best layer", noun="an arm and the base", seeds=len(seeds))]
    told += [covers(apart, look.told())] if len(seeds) >= LEAST_SEEDS else []

    def arm(name: str) -> Arm:
        each = rows[name]
        return {
            "objective": spreads(rows, "objective")[name],
            "loss": spreads(rows, "loss")[name],
            "retrieval_top1": spreads(rows, "retrieval_top1")[name],
            "effective_rank_embedding": spreads(rows, "effective_rank_embedding")[name],
            "probe_best": spreads(rows, "probe_best")[name],
            "probe_final": spreads(rows, "probe_final")[name],
            "collapsed": sum(row["collapsed"] for row in each),
            "rank_over_training": each[0]["rank_over_training"],
        }

    return {
        "task": "ablate",
        "seeds": list(seeds),
        "look": look._asdict(),
        "verdict": " ".join([*told, *look.notes]),
        "differences": [each._asdict() for each in apart],
        "arms": {name: arm(name) for name in rows},
        "effective_rank_embedding_start": base[0]["effective_rank_embedding_start"],
        "random_init": spread(groups(rows, "probe_random")["base"]),
        "raw_tokens": base[0]["probe_raw"],
    }
