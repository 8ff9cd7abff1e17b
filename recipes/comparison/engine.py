"""The comparison engine: variants of a recipe x seeds, each pre-trained, measured and kept.

A pair of variant and seed is an ordinary run in `OUT/runs/`, whose folder ends in the hash of its config; what was
measured of it lies beside its summary, in a file named by the hash of the measure's options. So a pair is found again
whatever the other variants are, and nothing finished is run twice. (The hash is of the config, and of files that a
variant says it names: after a change to the code of an adapter, an order or a term, name another `out=`.)

Who works on a pair holds its lock, which the kernel frees when the process ends, however it ends, and other machines
take for free where it is not renewed (`nepa_core.runtime.leases`). So the list may be shared by the processes of one
command, by several commands in one folder, or by several machines on a shared file system; and a pair whose process was
killed, or whose machine is lost, is taken up by another, at the run's last checkpoint.

What is compared is declared before the first run and counted look by look: see `recipes.statistics.protocol`.

`ablate`, `orders` and `objectives` are presets of it: they give variants and a measure, and make a report of what
comes back.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from pydantic import BaseModel

from nepa_core.basics import MOST_SEED, UserError, cores
from nepa_core.model import NEPA
from nepa_core.runtime import trust
from nepa_core.runtime.checkpoint import disk_errors, read_json, write_whole
from nepa_core.runtime.config import import_path
from nepa_core.runtime.distributed import world
from nepa_core.runtime.fit import Interrupted, plan
from nepa_core.runtime.leases import LostLock
from nepa_core.runtime.locks import locked, nothing_left, take_back
from nepa_core.runtime.meter import say_progress
from nepa_core.runtime.run import FREE_KEYS, Run, is_run
from recipes.configs import PretrainConfig
from recipes.report.summaries import PretrainSummary
from recipes.resolve import read_target
from recipes.statistics import protocol
from recipes.statistics.protocol import Declared, Look
from recipes.training.pretraining import load_pretrained, pretrain
from recipes.training.starting import build_pretrainer, try_batch

_POLL = 0.5  # seconds between looks at what other processes have finished
_SAY = 10.0  # least seconds between two lines of progress

# What a comparison makes first of all: the folder of a run, or the lock of random weights.
_BEGUN = ("runs/*-" + 12 * "[0-9a-f]", "random/*seed*")


class Variant(NamedTuple):
    """One setting under comparison.

    Attributes:
        name: what it is called.
        config: the whole of it.
        content: tells apart what the config names but does not hold, such as a file; "" where there is nothing such.
    """

    name: str
    config: PretrainConfig
    content: str = ""


Kept = TypeVar("Kept", bound=Mapping[str, Any])
"""The class that lists the keys of what is measured of a run."""


class Measure(NamedTuple, Generic[Kept]):
    """What is measured of a finished run.

    Attributes:
        name: the results are kept in NAME-HASH.json in the run's folder.
        function: (config, network with its averaged weights, run, options) -> plain values. A function of a module,
            so that it can be sent to other processes.
        options: all that the values depend on beside the run.
    """

    name: str
    function: Callable[[PretrainConfig, NEPA, Run, Any], Kept]
    options: BaseModel


class Job(NamedTuple):
    """Something to compute once.

    Attributes:
        name: what a failure is said to be of.
        result: the JSON file that the values are kept in; its presence says that the job is done.
        lock: a file, held by who works on the job. Jobs with one lock are never worked on at once.
        work: gives the values; can be sent to other processes.
    """

    name: str
    result: Path
    lock: Path
    work: Callable[[], Mapping[str, Any]]

    @property
    def done(self) -> bool:
        return self.result.exists()

    def values(self) -> dict[str, Any]:
        """What was kept.

        Raises:
            UserError: the file is damaged.
        """
        values = Run(self.result.parent).summary(self.result.name)
        assert values is not None
        return values


class Compared(NamedTuple, Generic[Kept]):
    """What came out of a comparison.

    Attributes:
        rows: variant -> what was measured, a dictionary for each seed of the look.
        look: which look at the folder it was, and of what seeds.
    """

    rows: dict[str, list[Kept]]
    look: Look


def compare(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    measure: Measure[Kept],
    out: Path,
    *,
    workers: int,
    also: Callable[[Sequence[int]], Sequence[Job]] | None = None,
    ready: Callable[[Look], None] | None = None,
) -> Compared[Kept]:
    """Pre-train and measure every variant with every seed, in `workers` processes.

    With the same seed all variants start from the same random numbers and see the samples in the same order.

    Args:
        seeds: that are declared now; those of earlier looks that all variants have are added
            (`recipes.statistics.protocol`).
        also: seeds -> jobs that belong to no pair, shared out first.
        ready: called once these are finished, before any pair is begun.

    Raises:
        UserError: before anything is written: two variants have one name, a seed is negative, the folder holds
            something else, or a variant does not fit the samples; later, that a pair failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept, and runs under way have a checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a comparison is started once, not by torchrun: workers= shares it among the GPUs of a machine")
    names = [variant.name for variant in variants]
    if twice := sorted(
        {name for name in names if names.count(name) > 1} | {str(s) for s in seeds if seeds.count(s) > 1}
    ):
        what = "seeds=: " if all(names.count(name) == 1 for name in names) else ""
        raise UserError(f"{what}{twice[0]} is given twice; name every variant and every seed once")
    if min(seeds) < 0:
        raise UserError(f"seeds={min(seeds)}: a seed is a whole number from 0")
    if max(seeds) >= MOST_SEED:
        raise UserError(f"seeds={max(seeds)}: a seed is less than {MOST_SEED}")
    recipe = variants[0].config.recipe
    check_folder(out, measure.name, recipe)
    keys = {variant.name: config_digest(variant.config, variant.content) for variant in variants}
    first = {keys[name]: name for name in reversed(names)}
    if same := [name for name in names if first[keys[name]] != name]:
        raise UserError(f"{same[0]} is the same setting as {first[keys[same[0]]]}; leave one of them out")
    for variant in variants:
        if not all(pair(variant, seed, measure, out).done for seed in seeds):
            try_variant(variant)
    made, claim = [place for place in (out, *out.parents) if not place.exists()], None
    try:
        look, claim = declare(variants, seeds, measure, out, recipe)
        jobs = {(variant.name, seed): pair(variant, seed, measure, out) for seed in look.seeds for variant in variants}
        further = list(also(look.seeds)) if also else []
        if ready is not None:
            share(further, workers=workers)
            ready(look)
            further = []
        share([*further, *jobs.values()], workers=workers)
    except UserError:
        if out in made:
            withdraw(out, claim)
            for place in made:
                _remove_empty(place)
        raise
    kept = {name: [jobs[name, seed].values() for seed in look.seeds] for name in names}
    return Compared(cast(dict[str, list[Kept]], kept), look)


def declare(
    variants: Sequence[Variant], seeds: Sequence[int], measure: Measure[Any], out: Path, recipe: str
) -> tuple[Look, protocol.Claim]:
    """Write what is compared into the folder, also where it was declared before; see `recipes.statistics.protocol`.

    Raises:
        UserError: the file of the protocol is damaged, or can't be written.
    """
    digests = {variant.name: config_digest(seeded(variant.config, 0), variant.content) for variant in variants}
    of = digest([measure.name, measure.options.model_dump(mode="json")])
    now = Declared(date=protocol.today(), variants=digests, seeds=tuple(seeds), measure=of)
    with locked(out / ".protocol.lock", patient=True):
        before = protocol.read(out)
        folders = sorted(path.parent for path in out.glob("runs/*/config.json"))
        known = {run_folder(v, seed, out).name: (v.name, seed) for v in variants for seed in _seeds_in(folders, seeds)}
        finished = {path.parent.name for path in out.glob("runs/*/summary.json")}
        found = protocol.found_runs(folders, known, digests) if before is None and finished else None
        if found is not None and not (out / "summary.json").exists() and found.within(now):
            found = None  # stopped before its first report: this goes on with it
        kept, number = protocol.declare(
            before, now, task=measure.name, recipe=recipe, found=found, measured=bool(finished)
        )
        claim = protocol.write(kept, out)
    declared = sorted({seed for look in kept.looks[:number] for seed in look.seeds})
    has = {v.name: {seed for seed in declared if run_folder(v, seed, out).name in finished} for v in variants}
    return protocol.look_at(kept, number, has), claim


def withdraw(out: Path, claim: protocol.Claim | None) -> None:
    """Take back what a command has declared in a folder that it made, where no run of it could be gone on from.

    Nothing goes where another command has declared something there since, or has begun a run.
    """
    with suppress(OSError, UserError), locked(out / ".protocol.lock", patient=True, keep=False):
        for folder in out.glob("runs/*"):  # of a worker that was stopped
            with locked(folder / ".lock", keep=False) as mine:
                if mine:
                    take_back(folder)
            _remove_empty(folder)
        _remove_empty(out / "runs")
        file = out / protocol.NAME
        only = {path.name for path in out.iterdir()} == {".protocol.lock", file.name}
        if only and protocol.claimed(file) == claim:
            file.unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something
        folder.rmdir()


def _seeds_in(folders: Sequence[Path], seeds: Sequence[int]) -> set[int]:
    """These, and those that folders of runs are named by."""
    return {*seeds, *(int(told[1]) for folder in folders if (told := re.search(r"-seed(\d+)-", folder.name)))}


def run_summaries(variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> dict[str, list[PretrainSummary]]:
    """Variant -> the summary of its pre-training for each seed."""
    return {
        v.name: [Run(run_folder(v, seed, out)).summary_of(PretrainSummary) or {} for seed in seeds] for v in variants
    }


def try_variant(variant: Variant) -> None:
    """`recipes.training.starting.try_batch` and the plan of the run, for its first batch may be hours away.

    Raises:
        UserError: the variant does not fit the samples.
    """
    try:
        samples = len(cast(Sized, variant.config.data.samples_of("train")))
        plan(variant.config.train, variant.config.optim, samples=samples, ranks=1)
        try_batch(variant.config, build_pretrainer(variant.config))
    except UserError as error:
        raise UserError(f"{variant.name}: {error}") from error


def check_folder(out: Path, task: str, recipe: str) -> None:
    """Whether a comparison may write into a folder: a new or empty one, or that of the same task and recipe.

    A comparison that was stopped has no summary yet, and is known by its runs.

    Raises:
        UserError: it is no folder, or a run's, or another comparison's, or holds something else.
    """
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"out={out}: {file} is a file; name another folder with out=DIR")
    if is_run(str(out)):
        raise UserError(f"{out} is a run, and its summary and report would be lost; name another folder with out=DIR")
    summary = _stored(out / "summary.json")
    if summary is not None:
        found = written_by(summary)
        if found != (task, recipe):
            held = "no comparison" if found is None else f"`nepa {' '.join(found)}`"
            raise UserError(f"{out / 'summary.json'} is of {held} and would be lost; name another folder with out=DIR")
    elif (declared := protocol.read(out)) is not None:
        if (declared.task, declared.recipe) != (task, recipe):
            held = f"`nepa {declared.task} {declared.recipe}`"
            raise UserError(f"{out} was declared for {held}; name another folder with out=DIR")
    elif any(out.glob("[!.]*")) and not any(any(out.glob(pattern)) for pattern in _BEGUN):
        raise UserError(f"{out} holds files and is no comparison of `nepa {task}`; name another folder with out=DIR")


def _stored(file: Path) -> Any:
    try:
        return read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({error}); delete it, or name another folder with out=DIR") from error


def written_by(summary: Any) -> tuple[str, str] | None:
    """Task and recipe of a comparison's summary.json; those of before there was `task` are told by what they list."""
    if not isinstance(summary, dict) or "recipe" not in summary:
        return None
    lists = {"arms": "ablate", "orders": "orders", "objectives": "objectives"}
    told = (task for key, task in lists.items() if isinstance(summary.get(key), dict) and "seeds" in summary)
    task = summary["task"] if "task" in summary else next(told, None)
    return None if task is None else (str(task), str(summary["recipe"]))


def read_recipe(task: str, target: str, changes: dict[str, Any]) -> PretrainConfig:
    """The recipe that a comparison starts from, with changes.

    Raises:
        UserError: it is a run folder, or there is no such recipe.
    """
    if is_run(target):
        raise UserError(f"nepa {task} starts from a recipe such as recipes.vision:digits, and {target} is a run folder")
    return read_target(PretrainConfig, target, changes)


def pair(variant: Variant, seed: int, measure: Measure[Any], out: Path) -> Job:
    """The job of one variant and seed: train unless that was done, then measure."""
    config = seeded(variant.config, seed)
    folder = run_folder(variant, seed, out)
    result = folder / f"{measure.name}-{digest(measure.options.model_dump(mode='json'))}.json"
    return Job(f"{variant.name}, seed {seed}", result, folder / ".lock", partial(run_pair, config, folder, measure))


def run_pair(config: PretrainConfig, folder: Path, measure: Measure[Kept]) -> Kept:
    """Pre-train, or go on with or open what an earlier sitting did; then measure."""
    run = Run(folder)
    with world() as ranks:
        pretrain(config, run, ranks, show=False)
        return measure.function(*load_pretrained(run, ranks.device), run, measure.options)


def seeded(config: PretrainConfig, seed: int) -> PretrainConfig:
    """The config with this seed."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def run_folder(variant: Variant, seed: int, out: Path) -> Path:
    """Where the run of this config lies, under whatever name it was first made; else where it is to lie."""
    key = config_digest(seeded(variant.config, seed), variant.content)
    found = sorted((out / "runs").glob(f"*-{key}"))
    return found[0] if found else out / "runs" / f"{shell_friendly(variant.name)}-seed{seed}-{key}"


def shell_friendly(name: str) -> str:
    """A name without characters that a shell or a file system would take for something else."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "variant"


def config_digest(config: PretrainConfig, content: str = "") -> str:
    """12 hexadecimal digits that tell a config from others, but for keys that don't touch what is computed.

    Runs of before keep theirs: the schedule goes by its earlier name, and later keys count where they are in use.

    Args:
        content: of `Variant`.

    Raises:
        UserError: it begins with the weights of another run, which the digest would not tell apart.
    """
    if config.init is not None:
        raise UserError(f"init={config.init}: comparisons pre-train from random weights; leave init out")
    values = config.model_dump(mode="json", serialize_as_any=True)
    # the probe reads, and trains nothing of the network
    for key in (*FREE_KEYS, "train.probe", *(() if config.optim.schedule == "wsd" else ("optim.decay_share",))):
        group, _, name = key.partition(".")
        values[group].pop(name, None)
    del values["init"]
    values["optim"]["decay"] = values["optim"].pop("schedule")
    if content:
        values["content"] = content
    return digest({"adapter": import_path(type(config.data)), **values})


def digest(values: Any) -> str:
    """12 hexadecimal digits of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------- sharing


def share(jobs: Sequence[Job], *, workers: int) -> None:
    """Finish all jobs in `workers` processes, together with other commands that have the same jobs.

    Worker i uses GPU i modulo their number. Progress goes to the error stream. A first failure stops all.

    Raises:
        UserError: a job failed by something the user can fix, or a worker was killed.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    count = min(workers, sum(not job.done for job in jobs))
    with _terminable():
        team: list[tuple[BaseProcess, Connection]] = []
        try:
            for number in range(count):
                team.append(_hired(number, count, jobs))
            _supervise(jobs, team)
        finally:
            for process, _ in team:
                process.terminate()  # one that trains writes a checkpoint first
            for process, _ in team:
                process.join()


def work_through(jobs: Sequence[Job]) -> None:
    """Finish every job in this process, but for those another one holds: wait for them, or do them if it dies."""
    left = list(jobs)
    while left:
        held = [job for job in left if not attempt(job)]
        if len(held) == len(left):
            time.sleep(_POLL)
        left = held


def attempt(job: Job) -> bool:
    """Do a job unless it was done; False if another process holds it."""
    if job.done:
        return True
    folder = job.lock.parent
    try:
        with locked(job.lock, keep=False) as mine:
            if mine and not job.done:
                with nothing_left(folder):
                    values = job.work()
                with disk_errors(job.result):
                    write_whole(job.result, json.dumps(values, indent=1) + "\n")
            return mine
    except LostLock:  # this process was stopped for long: another goes on with the job
        return False
    except UserError as error:
        _remove_empty(folder)
        raise UserError(f"{job.name}: {error}") from error


@contextmanager
def reporting(out: Path) -> Iterator[None]:
    """Within the block no other command writes the report of this folder."""
    with locked(out / ".report.lock", patient=True, trains=False):
        yield


def default_workers() -> int:
    """One process a GPU, or a core where there is none."""
    return torch.cuda.device_count() or cores()


def _hired(number: int, count: int, jobs: Sequence[Job]) -> tuple[BaseProcess, Connection]:
    """Start a worker; it says None over the connection when all is done, or the exception that stopped it."""
    context = multiprocessing.get_context("spawn")
    hear, say = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(number, count, jobs, say, trust.given()), name=f"worker {number}")
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # inherited: Ctrl-C is for this process, which tells the others
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    say.close()
    return process, hear


def _worker(number: int, count: int, jobs: Sequence[Job], say: Connection, trusted: trust.Trust) -> None:
    trust.take(trusted)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gpus = torch.cuda.device_count()
    # Two busy single-threaded processes beat one with two threads on small models, and sums come out the same.
    torch.set_num_threads(max(cores() // count, 1) if gpus else 1)
    if gpus:
        os.environ["LOCAL_RANK"] = str(number % gpus)
    outcome: Exception | None = None
    try:
        work_through(jobs)
    except (UserError, Interrupted) as error:
        outcome = error
    except Exception as error:
        traceback.print_exc()
        outcome = RuntimeError(f"a worker failed, see above: {error!r}")
    with suppress(BrokenPipeError):  # a parent that was killed hears nothing
        say.send(outcome)


def _end_with_parent() -> None:
    """A parent that was killed can't tell; what trains then stops after a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _supervise(jobs: Sequence[Job], team: Sequence[tuple[BaseProcess, Connection]]) -> None:
    """Wait until all workers are done, saying now and then how far they are."""
    working = {hear: process for process, hear in team}
    done = before = sum(job.done for job in jobs)
    began = said = time.monotonic()
    if before and working:
        say_progress(f"{before} of {len(jobs)} were finished before")
    while working:
        for hear in wait(list(working), timeout=_POLL):
            assert isinstance(hear, Connection)
            _heard(hear, working.pop(hear))
        now, count = time.monotonic(), sum(job.done for job in jobs)
        if count > done and (now - said > _SAY or count == len(jobs)):
            left = (len(jobs) - count) * (now - began) / (count - before)
            say_progress(f"{count} of {len(jobs)} finished, about {_duration(left)} left")
            done, said = count, now


def _heard(hear: Connection, process: BaseProcess) -> None:
    try:
        error = hear.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"{process.name} was killed (exit status {process.exitcode}), perhaps for want of memory; what is finished "
            "is kept: give the same command again, with fewer workers="
        ) from None
    if isinstance(error, Interrupted):
        raise KeyboardInterrupt
    if error is not None:
        raise error


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM is what Ctrl-C is."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
