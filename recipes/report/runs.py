"""Runs beside each other: a table of those in a folder, and the curves of some on one page.

Only JSON is read: no lock is taken, and no code that a config names is imported. What is damaged is named, and the rest
is shown.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from modalities.data.listing import printable
from nepa_core.basics import UserError
from nepa_core.predictor import PredictorConfig
from nepa_core.pretrainer import ObjectiveConfig
from nepa_core.runtime.checkpoint import read_json
from nepa_core.runtime.config import shown
from nepa_core.runtime.fit import TrainConfig
from nepa_core.runtime.optim import OptimConfig
from nepa_core.runtime.run import RECORD, refuse_holder
from recipes.report.page import Figure, Part, Report, Table, Words
from recipes.report.plots import line_plot
from recipes.report.provenance import flat, provenance
from recipes.report.tables import text_table


class Column(NamedTuple):
    """A figure: its head, its format, its keys in summary.json (the first that is there) and in metrics.jsonl."""

    head: str
    form: str
    keys: tuple[str, ...]
    line: str = ""


COLUMNS = (
    Column("identified", ".1%", ("retrieval_top1",), "retrieval_top1"),
    Column("linear", ".1%", ("retrieval_top1_linear",)),
    Column("loss", ".3f", ("loss",), "held_out_objective"),
    Column("accuracy", ".1%", ("accuracy_ema", "accuracy"), "accuracy"),
    Column("mAP", ".1%", ("map_ema", "map"), "map"),
    Column("R2", ".3f", ("r2_ema", "r2"), "r2"),
    Column("mIoU", ".1%", ("mIoU_ema", "mIoU"), "mIoU"),
)
PROBED = (
    Column("probe", ".1%", ("accuracy",)),
    Column("probe mAP", ".1%", ("map",)),
    Column("probe R2", ".3f", ("r2",)),
)
"""Of the best row of probe.json."""

CURVES = {
    "loss": "training objective",
    "held_out_objective": "held-out objective",
    "retrieval_top1": "identified",
    "effective_rank_embedding": "effective rank, embedding",
    "effective_rank_prediction": "effective rank, prediction",
    "probe_accuracy": "small probe, accuracy",
    "probe_map": "small probe, mAP",
    "probe_r2": "small probe, R2",
    "accuracy": "held-out accuracy",
    "map": "held-out mAP",
    "r2": "held-out R2",
    "mIoU": "held-out mIoU",
    "lr": "learning rate",
}
"""Keys of metrics.jsonl, and what the page calls them."""

UNFINISHED = "* not finished: measured on the few samples that are watched while training."


class RunFiles(NamedTuple):
    """What the files of a run say.

    Attributes:
        settings: dotted key -> value. lines: of metrics.jsonl. summary, probe: those files, {} where there is none.
        imported: whether `nepa import` wrote it. changed: when it was last written to, in seconds since 1970.
        damage: a line on each file that can't be read.
    """

    name: str
    task: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    probe: dict[str, Any]
    imported: bool
    changed: float
    damage: list[str]


def runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder, or it alone where it is one.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    try:
        inside = sorted(each for each in folder.iterdir() if _is_run(each))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name the folder that holds your runs, or a run") from error
    if _is_run(folder):
        return [folder]
    if not inside:
        raise UserError(f"{folder} holds no run; name the folder that holds your runs, or a run")
    return inside


def _is_run(folder: Path) -> bool:
    """Whether a folder has a config of ours, be it damaged, and is none in the released layout."""
    if not (folder / "config.json").is_file() or (folder / "model.safetensors").is_file():
        return False
    damage: list[str] = []
    ours = {"task", "adapter"} & _dictionary(folder / "config.json", damage).keys()
    return bool(ours or damage or (folder / "metrics.jsonl").is_file())


def read_run(folder: Path) -> RunFiles:
    """What the files of a run say, as far as they can be read.

    Raises:
        UserError: it is no run folder.
    """
    if not _is_run(folder):
        refuse_holder(str(folder))
        raise UserError(f"{folder} is not a run folder")
    damage: list[str] = []
    saved, summary, probe = (_dictionary(folder / f"{name}.json", damage) for name in ("config", "summary", "probe"))
    files = [folder / name for name in ("config.json", "metrics.jsonl", "summary.json")]
    if summary and not files[1].is_file() and (folder / "timing.jsonl").is_file():  # which what was pushed lacks, too
        damage.append(f"{files[1]} is missing")
    _check_figures(summary, COLUMNS, files[2], damage)
    if probe:
        best = probe.get("best")
        _check_figures(best if isinstance(best, dict) else {}, PROBED, folder / "probe.json", damage, some=True)
    return RunFiles(
        printable(str(folder)),
        printable(str(saved.get("task", "pretrain"))),
        _settings(saved),
        _lines(folder / "metrics.jsonl", damage, finished=bool(summary)),
        summary,
        probe,
        (folder / RECORD).is_file(),
        max(file.stat().st_mtime for file in files if file.is_file()),
        damage,
    )


def _dictionary(file: Path, damage: list[str]) -> dict[str, Any]:
    try:
        found = read_json(file)
        if isinstance(found, dict):
            return found
        damage.append(f"{file} is no dictionary")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        damage.append(f"{file} can't be read: {error}")
    return {}


def _check_figures(
    found: dict[str, Any], columns: Sequence[Column], file: Path, damage: list[str], *, some: bool = False
) -> None:
    """Note what stands where a figure should, or, where there should be some, that there is none."""
    given = {key: found[key] for column in columns for key in column.keys if found.get(key) is not None}
    wrong = [f"{key} is {shown(value, 40)}" for key, value in given.items() if _number(value) is None]
    if wrong or (some and not given):
        damage.append(f"{file} is damaged: {', '.join(wrong) or 'it has no figure of its best row'}")


def _lines(file: Path, damage: list[str], *, finished: bool) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl: the last one of a run that is not finished may be half written."""
    try:
        rows = file.read_bytes().splitlines() if file.is_file() else []
    except OSError as error:
        damage.append(f"{file} can't be read: {error.strerror}")
        return []
    found = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
            if _number(line.get("step")) is None:
                raise ValueError("no step")
            found.append(line)
        except (ValueError, AttributeError, RecursionError):
            if finished or number < len(rows):
                damage.append(f"{file}, line {number}, is damaged")
    return found


_GROUPS: dict[str, type[BaseModel]] = {
    "optim": OptimConfig,
    "train": TrainConfig,
    "model": PredictorConfig,
    "objective": ObjectiveConfig,
}


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, with the default of what a run of before has not written, and by the names of today."""
    found = {"optim.schedule" if key == "optim.decay" else key: v for key, v in flat(saved)}
    for group, kind in _GROUPS.items():
        if isinstance(saved.get(group), dict):
            for name, field in kind.model_fields.items():
                plain = not field.is_required() and (
                    field.default is None or isinstance(field.default, str | int | float)
                )
                if plain and not isinstance(saved[group].get(name), dict):
                    found.setdefault(f"{group}.{name}", field.default)
    return found


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None


# ---------------------------------------------------------------------------------------------------- the table


def table(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Head and a row a run; columns that no run has a figure for are left out."""
    figures = [[_figure(run, column) for column in COLUMNS] + [_probed(run, each) for each in PROBED] for run in runs]
    kept = [place for place in range(len(figures[0])) if any(row[place] for row in figures)]
    heads = [column.head for column in (*COLUMNS, *PROBED)]
    lines = [["run", "task", "recipe", "steps", *(heads[place] for place in kept), "last written"]]
    for run, row in zip(runs, figures, strict=True):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        recipe = printable(str(run.settings.get("recipe") or "-"))
        lines.append([run.name, run.task, recipe, _done(run), *(row[place] for place in kept), when])
    return lines


def _figure(run: RunFiles, column: Column) -> str:
    known = [value for key in column.keys if (value := _number(run.summary.get(key))) is not None]
    if known:
        return _spelt(known[0], column)
    measured = [value for line in run.lines if (value := _number(line.get(column.line))) is not None]
    return f"{_spelt(measured[-1], column)}*" if measured and not run.summary else ""


def _probed(run: RunFiles, column: Column) -> str:
    best = run.probe.get("best")
    value = _number(best.get(column.keys[0])) if isinstance(best, dict) else None
    return "" if value is None else _spelt(value, column)


def _spelt(value: float, column: Column) -> str:
    return f"{value:{column.form}}" if math.isfinite(value) else str(value).replace("nan", "NaN")


def _done(run: RunFiles) -> str:
    """ "800, finished", "400/800" or "epoch 3.2/20"."""
    last = run.lines[-1] if run.lines else {}
    step = _number(last.get("step")) or 0.0
    if run.summary:
        return f"{_number(run.summary.get('steps')) or step:.0f}, finished"
    if run.imported and not run.lines:
        return "imported"
    steps, epochs = (_number(run.settings.get(f"train.length.{unit}")) for unit in ("steps", "epochs"))
    if steps is None and epochs is not None:
        trained = [epoch for line in run.lines if (epoch := _number(line.get("epoch"))) is not None]
        return f"epoch {(trained or [0.0])[-1]:.1f}/{epochs:g}"
    return f"{step:.0f}/{'?' if steps is None else f'{steps:.0f}'}"


def differing(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Key -> its value in each run, of the keys whose values differ; null where a run has none."""
    names = dict.fromkeys(key for run in runs for key in run.settings if key not in ("task", "recipe"))
    found = {key: [shown(run.settings.get(key)) for run in runs] for key in names}
    return {printable(key): list(map(printable, row)) for key, row in found.items() if len(set(row)) > 1}


def text(runs: Sequence[RunFiles]) -> str:
    """The table, what differs among the runs of each recipe, and what is damaged."""
    lines = [text_table(rows := table(runs))]
    if any(cell.endswith("*") for row in rows[1:] for cell in row):
        lines.append(UNFINISHED)
    groups: dict[tuple[str, str], list[RunFiles]] = {}
    for run, row in zip(runs, rows[1:], strict=True):
        groups.setdefault((run.task, row[2]), []).append(run)
    for (task, recipe), members in groups.items():
        if differences := differing(members):
            lines += ["", f"What differs among the runs of {task} {recipe}:"]
            lines += [f"  {key}: {_spoken(members, row)}" for key, row in differences.items()]
        lines += [f"  {line}" for line in _midway(members)]
    if damage := [line for run in runs for line in run.damage]:
        lines += ["", *map(printable, damage)]
    return "\n".join(lines)


def _spoken(runs: Sequence[RunFiles], values: Sequence[str]) -> str:
    """ "0.001; 0.003 in runs/b": the most frequent value, and where there is another one."""
    usual = max(values, key=values.count)
    others = {value: [run.name for run, own in zip(runs, values, strict=True) if own == value] for value in values}
    return "; ".join([usual, *(f"{each} in {', '.join(names)}" for each, names in others.items() if each != usual)])


def _midway(runs: Sequence[RunFiles]) -> list[str]:
    """ "runs/b was trained with optim.lr=0.001 up to step 800": a config says what a setting is in the end."""
    found = []
    for run in runs:
        changes = run.summary.get("changes")
        for each in changes if isinstance(changes, list) else []:
            with suppress(AttributeError, KeyError, TypeError, ValueError):  # a summary that is damaged
                before = ", ".join(f"{key}={shown(old)}" for key, (old, _) in each["changed"].items())
                found.append(printable(f"{run.name} was trained with {before} up to step {each['step']}"))
    return found


# ------------------------------------------------------------------------------------------------------ the page


def report(runs: Sequence[RunFiles]) -> Report:
    """The table, what differs, and a plot for each curve that one of the runs has."""
    return Report("Runs beside each other", text(runs), provenance(), lambda: _parts(runs))


def _parts(runs: Sequence[RunFiles]) -> Iterator[Part]:
    yield Table(rows := table(runs))
    if any(cell.endswith("*") for row in rows[1:] for cell in row):
        yield Words([UNFINISHED])
    for key, title in CURVES.items():
        if curves := {run.name: curve for run in runs if (curve := _curve(run, key))[0]}:
            yield Figure(f"{key}.png", f"{title[0].upper()}{title[1:]}.", line_plot(curves, x="step", y=title))
    if differences := differing(runs):
        yield Words(["What differs between their settings:"])
        yield Table([["key", *(run.name for run in runs)], *([key, *row] for key, row in differences.items())])
    yield Words(_midway(runs))
    yield Words([line for run in runs for line in run.damage])


def _curve(run: RunFiles, key: str) -> tuple[list[float], list[float]]:
    pairs = [(_number(line["step"]), _number(line.get(key))) for line in run.lines]
    known = [(step, value) for step, value in pairs if step is not None and value is not None]
    return [step for step, _ in known], [value for _, value in known]
