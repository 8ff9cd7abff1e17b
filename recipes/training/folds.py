"""Fine-tuning on every fold of the data: one run a fold, and the mean and spread of their figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Sized
from typing import cast

from nepa_core.basics import UserError, some
from nepa_core.modality import Modality
from nepa_core.runtime.distributed import World
from nepa_core.runtime.fit import Interrupted, plan
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.configs import FinetuneConfig
from recipes.networks.goals import AVERAGED
from recipes.report.folds import FOLD, folder_of, report
from recipes.report.provenance import provenance
from recipes.report.summaries import FinetuneSummary, FoldSpread, FoldsSummary
from recipes.statistics.worth import worth_in
from recipes.training.finetuning import beside_config, beside_control, check_ranked, finetune, trained_classes
from recipes.training.mixing import check_pairs
from recipes.training.train import opened

ALL = "all"


def chosen_folds(data: Modality, asked: Sequence[str]) -> tuple[str, ...]:
    """The folds that are trained on, in the order of the data; "all" is every one.

    Raises:
        UserError: the data have no folds, or not these, or fewer than two are named.
    """
    known = data.folds()
    if not known:
        raise UserError(
            "folds= is for data with folds: a set such as ESC-50, a CSV file with a column fold, or folders called "
            f"fold1, fold2, ...; {type(data).__name__} finds none there"
        )
    if unknown := [fold for fold in asked if fold not in (*known, ALL)]:
        raise UserError(f"folds={unknown[0]}: the folds of the data are {some(list(known))}; folds=all is every one")
    chosen = known if ALL in asked else tuple(fold for fold in known if fold in asked)
    if len(chosen) < 2:
        raise UserError(f"folds={chosen[0]} is one fold alone: hold it out by data.fold={chosen[0]} instead")
    return chosen


def finetune_folds(
    config: FinetuneConfig,
    run: Run,
    ranks: World,
    folds: Sequence[str],
    *,
    setting: str = "",
    control: bool = True,
    beside: Sequence[str] = (),
    pretrained: bool = True,
    show: bool = True,
) -> FoldsSummary:
    """Train and judge a run for each of the `folds`, in RUN/fold-NAME, and write summary.json and report/.

    Each is a whole run of `nepa finetune`: the same command goes on where one stopped, and trains nothing that is
    finished. The summary is over all folds that are finished in the folder, asked for or not.

    Args:
        run: its folder holds the runs, and is none itself. folds: of `chosen_folds`.
        setting, show: as of `finetune`. control: as of `beside_control`. beside, pretrained: as of `beside_config`.

    Returns:
        The summary (empty on the other ranks).

    Raises:
        UserError: the folder holds something else, or one of the runs can't be trained, or one that is finished there
            has other settings: said before the first one trains, as far as it is known then.
    """
    known = config.data.folds()
    runs = {fold: folder_of(run, fold) for fold in known}
    if len({each.path for each in runs.values()}) < len(runs):
        raise UserError(f"the folds {some(list(known))} would lie in one folder; rename some")
    _check_folder(run)
    held = {fold: config.model_copy(update={"data": config.data.holding_out(fold)}) for fold in known}
    found = _checked(held, runs, ranks, folds)
    for fold in folds:
        own, folder = held[fold], runs[fold]
        others = [beside_config(own, name, pretrained=pretrained) for name in beside]
        with at_work(folder, ranks, trains=True):
            said = " ".join(filter(None, (setting, f"fold {fold} held out")))
            try:
                summary = finetune(own, folder, ranks, setting=said, show=show)
                if others or (control and config.init is not None):
                    summary = beside_control(own, folder, ranks, summary, control=control, others=others, show=show)
            except Interrupted as stop:
                raise Interrupted(f"fold {fold} held out: {stop}", stop.status) from stop
        found[fold] = summary
    if not ranks.is_main:
        return {}
    whole = over_folds({fold: found[fold] for fold in known if fold in found})
    before = run.summary_of(FoldsSummary)
    if before is not None and all(before.get(key) == value for key, value in whole.items()):
        whole = before  # with the command that made it
    else:
        whole["made_with"] = provenance()
    report(run, whole).write(run.report)
    run.write_summary(whole)
    return whole


def _checked(
    held: Mapping[str, FinetuneConfig], runs: Mapping[str, Run], ranks: World, folds: Sequence[str]
) -> dict[str, FinetuneSummary]:
    """What is finished in the folder, once all that is there, and all that is still to train, is seen to fit.

    Args:
        held: of every fold of the data, in their order, as are `runs`. folds: those to train.

    Raises:
        UserError: a run there has other settings, a fold's data can't be trained on, or a fold alone has a class.
    """
    there = [fold for fold in held if fold in folds or runs[fold].summary() is not None]
    finished: dict[str, FinetuneSummary] = {}
    for fold in there:
        own = held[fold]
        try:
            summary = opened(own, runs[fold], ranks, FinetuneSummary)
            if summary is None:
                samples = len(cast(Sized, own.data.samples_of("train")))
                plan(own.train, own.optim, samples=samples, ranks=ranks.size)
                check_pairs(own, ranks.size)
                check_ranked(own.data)
        except UserError as error:
            raise UserError(f"fold {fold} held out: {error}") from error
        if summary is not None:
            finished[fold] = summary
    left = [fold for fold in folds if fold not in finished]
    classes = {fold: trained_classes(held[fold].data) for fold in left}
    for name in dict.fromkeys(name for names in classes.values() for name in names):
        if alone := [fold for fold in left if name not in classes[fold]]:
            raise UserError(
                f"folds={alone[0]}: no training sample has the class {name} where fold {alone[0]} is held out; leave "
                "that class out, or divide the samples anew"
            )
    return finished


def _check_folder(run: Run) -> None:
    """The folder of folds is a new one, or holds folds."""
    inside = {path.name for path in run.path.glob("[!.]*")} if run.path.is_dir() else set()
    if "config.json" in inside or (inside and not any(name.startswith(FOLD) for name in inside)):
        what = "holds a run" if "config.json" in inside else "exists and holds no folds"
        raise UserError(f"{run.path} {what}; name another folder for the runs of folds= with out=DIR")


def over_folds(found: Mapping[str, FinetuneSummary]) -> FoldsSummary:
    """The figures of the runs of some folds beside each other, with their mean and spread.

    Args:
        found: fold -> the summary of its run.
    """
    summaries = list(found.values())
    keys = [key for pair in AVERAGED.items() for key in pair]
    known = [key for key in keys if all(key in each for each in summaries)]
    beside = {fold: _margins(summary) for fold, summary in found.items()}
    rivals = dict.fromkeys(name for margins in beside.values() for name in margins)
    lacking = {name: [fold for fold in found if name not in beside[fold]] for name in rivals}
    whole = [name for name in rivals if not lacking[name]]
    return {
        "init": summaries[0]["init"],
        "folds": list(found),
        "samples": [each.get("samples", 0) for each in summaries],
        "unreadable_held_out": sum(each.get("unreadable_held_out", 0) for each in summaries),
        "figures": {key: _spread([each[key] for each in summaries]) for key in known},
        "margins": {name: _spread([beside[fold][name] for fold in found]) for name in whole},
        "lacking": {name: folds for name, folds in lacking.items() if folds},
        **({"metric": worth.metric} if (worth := worth_in(summaries[0])) is not None and whole else {}),
    }


def _margins(summary: FinetuneSummary) -> dict[str, float]:
    """How far a run is ahead of what it stands beside, by name."""
    worth = worth_in(summary)
    return {} if worth is None else {each.name: each.margin for each in worth.beside}


def _spread(values: list[float]) -> FoldSpread:
    return {"values": values, "mean": statistics.fmean(values), "std": statistics.stdev(values)}
