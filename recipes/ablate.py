"""nepa ablate: the paper's ablations on your data, as one table and one plot.

Arms: the recipe as it is; shift off; causal mask off; stop-gradient off; 40 % and 60 % of the inputs masked (the
paper's Table of ablations). Every arm is pre-trained and probed with every seed at the same budget. What is finished
is kept and never run again: the same command goes on where it was stopped, and several may share a folder. What is
compared is declared in protocol.json before the first run; more seeds later are a further look, which the tests are
corrected for (see `recipes.protocol`).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from nepa_core.basics import FROZEN
from nepa_core.model import NEPA
from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.config import listed, override
from nepa_core.runtime.run import Run
from recipes import compare
from recipes.compare_report import (
    TESTED,
    Column,
    Rows,
    credits_of,
    difference_table,
    groups,
    html_table,
    interval_plot,
    margin,
    margin_cell,
    margin_note,
    spread_table,
    spreads,
    text_table,
)
from recipes.goals import find_goal
from recipes.measures import rank_over_training, read_out
from recipes.pretrain import PretrainConfig
from recipes.protocol import Look
from recipes.report import Figure, compose, line_plot
from recipes.significance import LEAST_SEEDS, Difference, covers, differences, spread, verdict
from recipes.targets import default_out
from recipes.training import provenance

ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "shift off": {"objective.shift": False},
    "causal mask off": {"objective.causal": False},
    "stop-gradient off": {"objective.stop_gradient": False},
    "input mask 40 %": {"objective.input_mask": 0.4, "model.mask_token": True},
    "input mask 60 %": {"objective.input_mask": 0.6, "model.mask_token": True},
}
"""Arm -> the keys it changes."""

COLUMNS = (
    Column("objective", "objective"),
    Column("loss", "next-token loss"),
    Column("retrieval_top1", "identified"),
    Column("effective_rank_embedding", "rank", ".1f"),
    Column("probe_best", "probe, best layer"),
    Column("probe_final", "probe, final norm"),
)


class Options(BaseModel):
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


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    config = compare.read_recipe("ablate", target, changes)
    out = Path(options.out or default_out(target, "ablate"))
    print(render(ablate(config, options, out)))
    print(f"Report: {out / 'report' / 'index.html'}")


def ablate(config: PretrainConfig, options: Options, out: Path) -> dict[str, Any]:
    """Run all arms and write summary.json and report/ into `out`.

    Returns:
        `arms`: name -> measure -> `spread` over seeds, plus "collapsed" (number of seeds); `seeds`; `look`: of
        `recipes.protocol`; `verdict`: which arms differ from the base; `differences`: the paired tests behind it;
        `margins`: of identification over the linear baseline, see `compare_report.margin`; `random_init` and
        `raw_tokens`: probe accuracies without pre-training.

    Raises:
        UserError: the samples have no target to read out, or the data can't be read.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    find_goal(config.data)  # says what is wrong before minutes of training, not after
    arms = [compare.Variant(name, override(config, changes)) for name, changes in ARMS.items()]
    measured = compare.Measure("ablate", measure, Nothing())
    workers = options.workers or compare.default_workers()
    rows, look = compare.compare(arms, options.seeds, measured, out, workers=workers)
    result = summarise(rows, look) | {"recipe": config.recipe, "made_with": provenance()}
    result["margins"] = {name: margin(each) for name, each in compare.run_summaries(arms, look.seeds, out).items()}
    with compare.reporting(out):
        write_report(out / "report", f"Ablations: {config.recipe}", result)
        Run(out).write_summary(result)
    return result


def measure(config: PretrainConfig, model: NEPA, run: Run, _: Nothing) -> dict[str, Any]:
    """The run's own figures and the probe of every layer."""
    summary, read = run.summary(), read_out(config, model)
    assert summary is not None
    return {
        **{name: summary[name] for name in ("objective", "loss", "retrieval_top1", "effective_rank_embedding")},
        **{name: summary[name] for name in ("effective_rank_embedding_start", "collapsed")},
        "probe_best": read["probe"],
        "probe_final": read["probe_final"],
        "probe_random": read["probe_random"],
        "probe_raw": read["raw_tokens"],
        "rank_over_training": rank_over_training(run),
        **{kind: _renamed(read[kind]) for kind in ("credits", "clusters")},
    }


def _renamed(of_measures: dict[str, str]) -> dict[str, str]:
    return {{"probe": "probe_best"}.get(key, key): value for key, value in of_measures.items()}


def summarise(rows: Rows, look: Look) -> dict[str, Any]:
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
    found = {column.key: spreads(rows, column.key) for column in COLUMNS}
    return {
        "task": "ablate",
        "seeds": list(seeds),
        "look": look._asdict(),
        "verdict": " ".join([*told, *look.notes]),
        "differences": [each._asdict() for each in apart],
        "arms": {
            name: {key: by_arm[name] for key, by_arm in found.items()}
            | {"collapsed": sum(row["collapsed"] for row in each)}
            | {"rank_over_training": each[0]["rank_over_training"]}
            for name, each in rows.items()
        },
        "effective_rank_embedding_start": base[0]["effective_rank_embedding_start"],
        "random_init": spread(groups(rows, "probe_random")["base"]),
        "raw_tokens": base[0]["probe_raw"],
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """Head and one row an arm, mean ± standard deviation over seeds."""
    rows: Rows = {
        name: [{c.key: arm[c.key]["values"][i] for c in COLUMNS} for i in range(len(result["seeds"]))]
        for name, arm in result["arms"].items()
    }
    head, *lines = spread_table(rows, COLUMNS, half="std")
    collapsed = [f"{arm['collapsed']} of {len(result['seeds'])}" for arm in result["arms"].values()]
    return [[*head, "collapsed"], *([*line, cell] for line, cell in zip(lines, collapsed, strict=True))]


def render(result: dict[str, Any]) -> str:
    """The table as text."""
    return f"{text_table(table(result))}\n\n{_foot(result)}\n\n{_margins(result)}\n\n{result['verdict']}"


def _margins(result: dict[str, Any]) -> str:
    """Identification beyond the linear baseline, arm by arm."""
    told = "; ".join(f"{name} {margin_cell(each)}" for name, each in result["margins"].items())
    return f"{margin_note(result['margins'])} {told}."


def _foot(result: dict[str, Any]) -> str:
    random = result["random_init"]
    return (
        f"Mean ± standard deviation over {len(result['seeds'])} seeds, held-out data. Rank is the effective rank of "
        f"the embeddings, {result['effective_rank_embedding_start']:.1f} before training. Linear probe without "
        f"pre-training: random weights {random['mean']:.3f} ± {random['std']:.3f}, raw tokens "
        f"{result['raw_tokens']:.3f}."
    )


def write_report(folder: Path, title: str, result: dict[str, Any]) -> None:
    """PNGs and a page: the answer, probe accuracy by arm, the table, rank over training by arm."""
    arms = result["arms"]
    parts: list[str | Figure] = [
        f'<div id="answer"><p><strong>{html.escape(result["verdict"])}</strong></p></div>',
        Figure(
            "probe.png",
            "Linear probe of the best layer, chosen on held-back training samples, from the best arm down: mean ± "
            "standard deviation, a dot a seed.",
            interval_plot(
                {name: measures["probe_best"] for name, measures in arms.items()},
                x="probe accuracy",
                reference={"random weights": result["random_init"]["mean"], "raw tokens": result["raw_tokens"]},
                half="std",
            ),
        ),
        f"{html_table(table(result))}<p>{html.escape(_foot(result))}</p><p>{html.escape(_margins(result))}</p>",
        *_tests(result),
        Figure(
            "rank.png",
            f"Effective rank of the embeddings over training (seed {result['seeds'][0]}).",
            line_plot(
                {name: _columns(measures["rank_over_training"]) for name, measures in arms.items()},
                x="step",
                y="effective rank",
                from_zero=True,
            ),
        ),
    ]
    made = ", ".join(f"{name} {value}" for name, value in result["made_with"].items())
    with disk_errors(folder):
        compose(folder, title=title, parts=parts, foot=made)


def _tests(result: dict[str, Any]) -> list[str]:
    """The paired tests of every arm against the base; none of fewer than three seeds."""
    found = [Difference(**each) for each in result["differences"]]
    return [f"<p>{html.escape(TESTED)}</p>{html_table(difference_table(found))}"] if found else []


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [rank for _, rank in points]
