"""What a run goes on with: its checkpoint, where the rate stands in its schedule, and what has changed since.

A checkpoint keeps the settings that it was trained with. Where the length or the schedule differs from them, the run
goes on from a checkpoint up to which both have the same rates ("wsd", "constant"), or, once it was finished, in a
second cycle of warm-up and schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from pydantic import BaseModel

from nepa_core.basics import UserError
from nepa_core.runtime.checkpoint import Checkpoint, load_latest
from nepa_core.runtime.config import keys, read_saved
from nepa_core.runtime.optim import Duration, OptimConfig
from nepa_core.runtime.run import Run


class Cycle(NamedTuple):
    """One course of the rate through its schedule: from step `start`, with `warmup` steps, to step `total`."""

    start: int
    warmup: int
    total: int

    def steady(self, optim: OptimConfig) -> int:
        """The step up to which its rates are those of any longer cycle, see `OptimConfig.steady`."""
        return self.start + optim.steady(self.warmup, self.total - self.start)


class Settings(NamedTuple):
    """The parts of a config that may change between two sittings."""

    optim: OptimConfig
    train: BaseModel

    def stored(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"optim": self.optim.model_dump(mode="json"), "train": self.train.model_dump(mode="json")}

    def like(self, stored: dict[str, Any]) -> Settings:
        """The way back of `stored`."""
        return Settings(OptimConfig.model_validate(stored["optim"]), type(self.train).model_validate(stored["train"]))

    def keys(self) -> dict[str, Any]:
        return keys(self.optim, "optim.") | keys(self.train, "train.")


SCHEDULE = ("optim.schedule", "optim.decay_share", "train.length.steps", "train.length.epochs")
"""Keys that move the rates of steps to come."""


class Change(TypedDict):
    """Settings that a run took anew: from a step on, key -> [what it was, what it is]."""

    step: int
    changed: dict[str, list[Any]]


class TakenUp(NamedTuple):
    """From where a run goes on.

    Attributes:
        checkpoint: the one to go on from. cycle: of the steps from there on.
        changes: every change of settings so far.
        said: lines for the screen.
    """

    checkpoint: Checkpoint
    cycle: Cycle
    changes: Sequence[Change]
    said: Sequence[str]


def take_up(run: Run, checkpoint: Checkpoint, settings: Settings, plan: Cycle, *, per_epoch: int) -> TakenUp:
    """Find out how a run goes on from its newest checkpoint, by the settings that it has now.

    Args:
        plan: the cycle of a run with these settings from its beginning.

    Raises:
        UserError: the steps that are done don't allow the new length or schedule.
    """
    found = _of_same_rates(run, checkpoint, settings, plan, per_epoch=per_epoch)
    old, new, state = _before(run, found.checkpoint, settings)[0].keys(), settings.keys(), found.checkpoint.state
    changed = {key: [old[key], new[key]] for key in new if old[key] != new[key]}
    changes: list[Change] = state.get("changes", [])
    if changed:
        changes = [*changes, {"step": found.checkpoint.step, "changed": changed}]
    return found._replace(changes=changes, said=[*found.said, f"going on after step {found.checkpoint.step}"])


def _before(run: Run, checkpoint: Checkpoint, settings: Settings) -> tuple[Settings, bool]:
    """The settings that a checkpoint was trained with, and whether it has kept them, as those of before do not."""
    kept = checkpoint.state.get("settings")
    return settings.like(kept or read_saved(run.path / "config.json")), kept is not None


def _of_same_rates(run: Run, checkpoint: Checkpoint, settings: Settings, plan: Cycle, *, per_epoch: int) -> TakenUp:
    before, kept = _before(run, checkpoint, settings)
    old, new = before.keys(), settings.keys()
    step = checkpoint.step
    was_finished = not kept and run.earlier_summary(step).exists()
    if all(old[key] == new[key] for key in SCHEDULE) and not was_finished:
        cycle = Cycle(*checkpoint.state["cycle"])._replace(total=plan.total) if kept else plan
        return TakenUp(checkpoint, cycle, [], [])
    if kept:
        was = Cycle(*checkpoint.state["cycle"])
    else:
        length = Duration(steps=old["train.length.steps"], epochs=old["train.length.epochs"])
        was = plan._replace(total=step if was_finished else length.in_steps(steps_per_epoch=per_epoch, total=0))
    if plan.total <= step:
        raise UserError(f"{run.path} has done {step} steps, and train.length comes to {plan.total}; lengthen it")
    longer = was._replace(total=plan.total)
    same = min(was.steady(before.optim), longer.steady(settings.optim))
    if same > was.start:
        return _in_its_stable_phase(run, checkpoint, was.steady(before.optim), same, was.total, longer)
    if step < was.total:
        raise UserError(
            f"{run.path} has done {step} of {was.total} steps, whose rates depend on its length and schedule "
            f"(optim.schedule={before.optim.schedule}): finish it first, and a second cycle can begin there"
        )
    cycle = Cycle(step, settings.optim.warmup.in_steps(steps_per_epoch=per_epoch, total=plan.total - step), plan.total)
    said = (
        f"{run.path} was finished at step {step}, where its rate had come to its end (optim.schedule="
        f"{before.optim.schedule}): a second cycle begins at step {step}, {cycle.warmup} steps of warm-up and "
        f"{settings.optim.schedule} to step {plan.total}"
    )
    return TakenUp(checkpoint, cycle, [], [said])


def _in_its_stable_phase(
    run: Run, checkpoint: Checkpoint, steady: int, same: int, total: int, longer: Cycle
) -> TakenUp:
    """From a checkpoint up to which the rates are the same, whatever was trained after it.

    Args:
        steady, total: of the cycle that the run was in.
        same: the last step up to which the rates of both are.
    """
    if checkpoint.step <= same:
        return TakenUp(checkpoint, longer, [], [])
    older, notes = load_latest(run.checkpoints, same)
    if older is None:
        raise UserError(
            f"{run.checkpoints} holds no undamaged checkpoint up to step {same}, the end of the stable phase, from "
            f"which it could go on; {'lengthen it further' if same < steady else 'name another folder with out=DIR'}"
        )
    said = (
        f"{run.path} goes back from step {checkpoint.step} to step {older.step}, where its rate was stable: its decay "
        f"ends at step {longer.total} instead of {total}"
    )
    return TakenUp(older, longer, [], [*notes, said])
