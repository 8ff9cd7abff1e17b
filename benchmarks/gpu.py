"""All that is measured on a GPU, by one command: `python -m benchmarks.gpu [--data DIR] [--out DIR]`.

Stages run in order of value, each under 8 minutes: tests marked cuda; steps of ViT-B/14 and ViT-L/14 in all forms,
beside the authors' form and a bare Transformer; the input pipeline; CIFAR-10 with three seeds; the paper's ablations on
it; whatever folders of images DIR holds. Every row is kept as soon as it is known, in OUT/STAGE-KEY.json, where KEY is
of what the figures depend on: source, device, versions, arguments. The same command goes on: what is done is not run
again; what failed or found no time is. OUT/gpu.md has the rows for docs/results. OUT/work holds runs and logs.

--dry-run runs all stages at toy size on the CPU, on data that it makes, in minutes, so that the first minute on a GPU
is not lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.markdown import cell, page
from benchmarks.rows import FINAL, SOURCE, Kept, Machine, Stage, StageFile
from benchmarks.running import Clock, clock, commit, ground, key_of, left_to_do, machine_here, read_stage, run_rows
from benchmarks.stages import LIMIT, REAL, TOY, stages
from benchmarks.worker import write

NAMES = ("tests", "base", "large", "pipeline", "cifar10", "ablations", "folders")


class Asked(NamedTuple):
    """The command line."""

    stages: tuple[str, ...]
    data: Path | None
    out: Path
    minutes: float
    dry_run: bool


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(NAMES), help=f"some of {','.join(NAMES)}; default all")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and folders of images; default none")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="default build/gpu, or build/gpu-dry-run")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all stages together; default 60")
    parser.add_argument("--dry-run", action="store_true", help="all stages at toy size on the CPU")
    return parser


def asked(words: Sequence[str]) -> Asked:
    """Read the command line.

    Raises:
        SystemExit: status 2, with a line that names what does not fit.
    """
    parser = make_parser()
    found = parser.parse_args(words)
    chosen = tuple(name.strip() for name in found.stages.split(",") if name.strip())
    if unknown := [name for name in chosen if name not in NAMES]:
        parser.error(f"--stages={unknown[0]}: there is no such stage; name some of {', '.join(NAMES)}")
    if not chosen:
        parser.error(f"--stages= names no stage; name some of {', '.join(NAMES)}")
    if found.data is not None and not found.data.is_dir():
        parser.error(f"--data={found.data}: there is no such folder")
    if not found.minutes > 0:
        parser.error(f"--minutes={found.minutes:g}: give more than 0")
    out = found.out
    if found.dry_run and out == parser.get_default("out"):
        out = out.with_name(f"{out.name}-dry-run")
    data = None if found.data is None else found.data.resolve()
    return Asked(chosen, data, out.resolve(), found.minutes, found.dry_run)


def run_stage(
    stage: Stage, file: Path, machine: Machine, command: str, left: Clock, environment: Mapping[str, str]
) -> None:
    """Measure what a stage still lacks, and write its JSON after every row."""
    kept = {row["name"]: row for row in read_stage(file, key_of(stage, machine))}
    rows = left_to_do(stage, list(kept.values()))
    print(f"{stage.name}: {stage.title}, {len(stage.rows) - len(rows)} of {len(stage.rows)} rows are known", flush=True)

    def keep(row: Kept) -> None:
        before = kept.get(row["name"])
        if before is None or before["status"] not in FINAL:
            kept[row["name"]] = row
        content: StageFile = {
            "stage": stage.name,
            "title": stage.title,
            "key": key_of(stage, machine),
            "command": command,
            "commit": commit(),
            "machine": machine,
            "rows": [kept[each.name] for each in stage.rows if each.name in kept],
        }
        write(file, content)
        print(f"  {line(row)}", flush=True)

    time_left = clock(min(LIMIT, left()))
    log = file.parent / "work" / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        run_rows(rows, time_left, stream, environment, keep)


def environment_of(stage: str, found: Asked) -> dict[str, str]:
    """A dry run sees no GPU, and tries the compiler, which takes half a minute on a CPU, in one stage alone."""
    if not found.dry_run:
        return dict(os.environ)
    off = {} if stage == "base" else {"TORCHDYNAMO_DISABLE": "1"}
    return dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | off


def toy_data(root: Path) -> Path | None:
    """Little data sets for a dry run; None where the packages that draw them are missing."""
    try:
        from benchmarks.photos import make_folders
    except ImportError:
        return None
    make_folders(root)
    return root


def line(row: Kept) -> str:
    """A row on the screen."""
    figures = "; ".join(f"{name} {cell(values)}" for name, values in list(row.get("figures", {}).items())[:3])
    found = figures if row["status"] == "done" else f"{row['status']}: {row.get('error', '')}"
    return f"{row['name']} ({row['seconds']:.0f} s): {found}"


def write_page(found: Asked, files: Sequence[Path]) -> None:
    """gpu.md from the stages that have a file."""
    known: list[StageFile] = [json.loads(file.read_text()) for file in files if file.exists()]
    names = {str(found.out): "OUT"} | ({} if found.data is None else {str(found.data): "DIR"})
    (found.out / "gpu.md").write_text(page(known, names, dry_run=found.dry_run))


def main(words: Sequence[str]) -> int:
    """Exit status: 0, or 130 where Ctrl-C or SIGTERM ended it; what is done stays."""
    found = asked(words)
    left = clock(60 * found.minutes)
    machine = machine_here(environment_of("tests", found))
    work = found.out / "work" / ground(SOURCE, machine)  # or runs of other code would be taken for its own
    if found.dry_run and found.data is None:
        found = found._replace(data=toy_data(work / "data"))
    size = TOY if found.dry_run else REAL
    every = stages(size, data=found.data, work=work, seconds=60 * found.minutes)
    files = {name: found.out / f"{name}-{key_of(stage, machine)}.json" for name, stage in every.items()}
    command = shlex.join(["python", "-m", "benchmarks.gpu", *words])
    found.out.mkdir(parents=True, exist_ok=True)
    print(f"{machine['device']}, {machine['versions']}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in (name for name in NAMES if name in found.stages):
            run_stage(every[name], files[name], machine, command, left, environment_of(name, found))
            write_page(found, list(files.values()))
    except KeyboardInterrupt:
        write_page(found, list(files.values()))
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"Figures: {found.out / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
