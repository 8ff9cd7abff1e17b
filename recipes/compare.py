"""The comparison engine: several configs ("arms"), each with several seeds, at equal budgets.

Every arm x seed is an ordinary run folder with its own probe. What is finished is kept and not run again, so an
interrupted comparison goes on where it was. `ablate` is its first user.
"""

from __future__ import annotations

import html
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student_t

from nepa_core.runtime.checkpoint import disk_errors
from nepa_core.runtime.distributed import world
from nepa_core.runtime.run import Run
from recipes import probe
from recipes.pretrain import PretrainConfig, load_pretrained, pretrain
from recipes.report import Figure, bar_plot, line_plot, page

COLUMNS = {
    "objective": "objective",
    "loss": "next-token loss",
    "retrieval_top1": "identified",
    "effective_rank_embedding": "rank",
    "probe_best": "probe, best layer",
    "probe_final": "probe, final norm",
}
"""Measure -> column head."""


PROBE = probe.Options(poolings=("mean", "last"), classifiers=("linear",))
"""The same rows for every arm: BOS can be read in some of them only."""


class Arm(NamedTuple):
    """One setting under comparison; `name` is also its folder."""

    name: str
    config: PretrainConfig


def compare(arms: Sequence[Arm], seeds: Sequence[int], out: Path, *, workers: int) -> dict[str, Any]:
    """Run every arm with every seed, in `workers` processes of one thread each.

    Returns:
        `arms`: name -> measure -> {"values" per seed, "mean", "std", "ci95"}, plus "collapsed" (number of seeds);
        `seeds`; `random_init` and `raw_tokens`: probe accuracies without pre-training.
    """
    jobs = [(arm, seed, out / arm.name.replace(" ", "_") / f"seed_{seed}") for seed in seeds for arm in arms]
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_single_thread) as pool:
        futures = {pool.submit(run_one, arm.config, seed, folder): (arm.name, seed) for arm, seed, folder in jobs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                name, seed = futures[future]
                rows[name, seed] = future.result()
                print(f"{count}/{len(jobs)}  {name}, seed {seed}", file=sys.stderr)
        except BaseException:  # Ctrl-C reaches the workers too, which stop after a checkpoint; start no further one
            pool.shutdown(cancel_futures=True)
            raise
    first = rows[arms[0].name, seeds[0]]
    return {
        "seeds": list(seeds),
        "arms": {
            arm.name: {measure: spread([rows[arm.name, seed][measure] for seed in seeds]) for measure in COLUMNS}
            | {"collapsed": sum(rows[arm.name, seed]["collapsed"] for seed in seeds)}
            | {"rank_over_training": rows[arm.name, seeds[0]]["rank_over_training"]}
            for arm in arms
        },
        "effective_rank_embedding_start": first["effective_rank_embedding_start"],
        "random_init": spread([rows[arms[0].name, seed]["probe_random"] for seed in seeds]),
        "raw_tokens": first["probe_raw"],
    }


def run_one(config: PretrainConfig, seed: int, folder: Path) -> dict[str, Any]:
    """Pre-train and probe one arm with one seed, or read what an earlier sitting measured."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    run = Run(folder)
    with world() as ranks:
        summary = pretrain(config, run, ranks, show=False)
        probed = run.summary("probe.json")
        if probed is None:
            config, model = load_pretrained(run, ranks.device)
            probed = probe.probe(config, model, PROBE)
            run.write_summary(probed, "probe.json")
    health = [line for line in run.metrics() if "effective_rank_embedding" in line]
    metric = probe.metric_of(probed["best"])
    return {
        **{name: summary[name] for name in ("objective", "loss", "retrieval_top1", "effective_rank_embedding")},
        **{name: summary[name] for name in ("effective_rank_embedding_start", "collapsed")},
        "probe_best": probed["best"][metric],
        "probe_final": next(row[metric] for row in probed["layers"] if row["name"] == "final norm, mean"),
        "probe_random": probed["random_init"]["best"][metric],
        "probe_raw": probed["raw_tokens"][metric],
        "rank_over_training": [[line["step"], line["effective_rank_embedding"]] for line in health],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values over seeds with mean, standard deviation and the half-width of the 95 % t-interval of the mean."""
    count = len(values)
    std = statistics.stdev(values) if count > 1 else 0.0
    ci95 = float(student_t.ppf(0.975, count - 1)) * std / math.sqrt(count) if count > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "std": std, "ci95": ci95}


def default_workers() -> int:
    """One process a core, or one where there is a GPU to share."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def table(result: dict[str, Any]) -> list[list[str]]:
    """Head and one row an arm, mean ± standard deviation over seeds."""
    rows = [["", *COLUMNS.values(), "collapsed"]]
    for name, measures in result["arms"].items():
        cells = [f"{measures[m]['mean']:.3f} ± {measures[m]['std']:.3f}" for m in COLUMNS if m in measures]
        rows.append([name, *cells, f"{measures['collapsed']} of {len(result['seeds'])}"])
    return rows


def render(result: dict[str, Any]) -> str:
    """The table as text."""
    rows = table(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, "", _foot(result)])


def _foot(result: dict[str, Any]) -> str:
    random = result["random_init"]
    return (
        f"Mean ± standard deviation over {len(result['seeds'])} seeds, held-out data. Rank is the effective rank of "
        f"the embeddings, {result['effective_rank_embedding_start']:.1f} before training. Linear probe without "
        f"pre-training: random weights {random['mean']:.3f} ± {random['std']:.3f}, raw tokens "
        f"{result['raw_tokens']:.3f}."
    )


def write_report(folder: Path, title: str, result: dict[str, Any]) -> None:
    """PNGs and a page: the table, probe accuracy by arm, rank over training by arm."""
    arms = result["arms"]
    figures = [
        Figure(
            "probe.png",
            "Linear probe of the best layer, chosen on held-back training samples; a dot a seed.",
            bar_plot(
                {name: measures["probe_best"]["values"] for name, measures in arms.items()},
                y="accuracy",
                reference={"random weights": result["random_init"]["mean"], "raw tokens": result["raw_tokens"]},
            ),
        ),
        Figure(
            "rank.png",
            f"Effective rank of the embeddings over training (seed {result['seeds'][0]}).",
            line_plot(
                {name: tuple(zip(*measures["rank_over_training"], strict=True)) for name, measures in arms.items()},
                x="step",
                y="effective rank",
                from_zero=True,
            ),
        ),
    ]
    head, *rows = table(result)
    body = "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"
    body += "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    body += f"</table><p>{html.escape(_foot(result))}</p>"
    made = ", ".join(f"{name} {value}" for name, value in result.get("made_with", {}).items())
    with disk_errors(folder):
        page(folder, title=title, body=body, figures=figures, foot=made)


def _single_thread() -> None:
    torch.set_num_threads(1)  # two busy single-threaded processes beat one with two threads on small models
