"""Figures of one row that other commands give: `nepa` tasks and the tests marked cuda, each in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Figures = dict[str, list[float]]

STOPPED = {130, 143}
"""Exit status of a task that Ctrl-C or SIGTERM has stopped: the same command goes on."""


class NotFinished(Exception):
    """A command was stopped before its end, and goes on when it is called again."""


class Failed(Exception):
    """A command failed; the message is its last line. `figures` are those that are known all the same."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures


def tests(*words: str) -> Figures:
    """How many of the tests marked cuda in these files and folders pass.

    Raises:
        Failed: some don't, or pytest can't run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ("-m", "cuda", "-q", "--continue-on-collection-errors", f"--junitxml={report}")
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *words], capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)
        if not report.exists():
            raise Failed(last_line(done.stderr or done.stdout))
        found = counted(ElementTree.parse(report).getroot())
    if found["failed"][0]:
        raise Failed(f"{found['failed'][0]:.0f} tests failed", found)
    return found


def counted(report: ElementTree.Element) -> Figures:
    """Passed, failed and skipped tests of a JUnit report; what failed is a figure of its name."""
    found: Figures = {"passed": [0], "failed": [0], "skipped": [0]}
    for case in report.iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind][0] += 1
        if kind == "failed":
            found[f"failed: {case.get('classname', '').split('.')[-1]} {case.get('name')}"] = [1]
    return found


def nepa(*words: str) -> Figures:
    """Run `nepa TASK ... out=FOLDER` and read what it left there.

    Raises:
        NotFinished: it was stopped. Failed: it failed; the message is the line that it said.
    """
    code, said = run_nepa(*words)
    if code in STOPPED:
        raise NotFinished(said)
    if code:
        raise Failed(said)
    task, out = words[0], next(Path(word.removeprefix("out=")) for word in words if word.startswith("out="))
    file, read = LEFT.get(task, ("summary.json", lambda summary: {}))
    return read(json.loads((out / file).read_text())) if (out / file).exists() else {}


def run_nepa(*words: str) -> tuple[int, str]:
    """Exit status of a task, and the last line that it said; what it printed goes to our own output."""
    process = subprocess.Popen([sys.executable, "-m", "recipes", *words], stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate()
    except BaseException:
        process.terminate()  # it stops with a checkpoint
        process.wait()
        raise
    print(said, file=sys.stderr, flush=True)
    return process.returncode, last_line(said)


def last_line(text: str) -> str:
    """The last line that is not empty, without the name of the program."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1].removeprefix("nepa: ") if lines else "no line was said"


def of_pretraining(summary: Mapping[str, Any]) -> Figures:
    """The verdict: identified, in %, beside what costs nothing; and what training took."""
    shares = {
        "identified, %": "retrieval_top1",
        "linear control, %": "retrieval_top1_linear",
        "untrained, %": "retrieval_top1_untrained",
        "over linear, points": "margin_linear",
        "half of its 95 % interval": "margin_linear_ci95",
    }
    plain = {"loss": "loss", "effective rank": "effective_rank_embedding", "steps": "steps", "seconds": "seconds"}
    return dict(_taken(summary, shares, 100)) | dict(_taken(summary, plain, 1))


def of_probe(summary: Mapping[str, Any]) -> Figures:
    """The accuracy of the row that held-back samples choose, in %, beside random weights and raw tokens."""
    rows = {
        "probe, %": summary["best"],
        "random weights, %": summary["random_init"]["best"],
        "raw tokens, %": summary["raw_tokens"],
    }
    return {name: [100 * row["accuracy"]] for name, row in rows.items() if "accuracy" in row}


def of_ablations(summary: Mapping[str, Any]) -> Figures:
    """Of every arm the probe of the best layer in %, and the effective rank: a value a seed."""
    found: Figures = {}
    for name, arm in summary["arms"].items():
        found[f"{name}: probe, %"] = [100 * value for value in arm["probe_best"]["values"]]
        found[f"{name}: rank"] = list(arm["effective_rank_embedding"]["values"])
    return found | {"random weights: probe, %": [100 * value for value in summary["random_init"]["values"]]}


def _taken(summary: Mapping[str, Any], names: Mapping[str, str], factor: float) -> Iterator[tuple[str, list[float]]]:
    for name, key in names.items():
        if summary.get(key) is not None:
            yield name, [factor * summary[key]]


LEFT: dict[str, tuple[str, Callable[[Mapping[str, Any]], Figures]]] = {
    "pretrain": ("summary.json", of_pretraining),
    "probe": ("probe.json", of_probe),
    "ablate": ("summary.json", of_ablations),
}
"""Task -> the file of figures that it leaves in its folder, and what is read from it."""


def train_for(share: str, *words: str, seconds: float) -> Figures:
    """Pre-train for about a share of some seconds; how many steps that is, is measured once and then kept.

    Args:
        words: of `nepa pretrain`, with out= and without a length.
    """
    from benchmarks import measures  # here, as it needs all packages

    out = next(Path(word.removeprefix("out=")) for word in words if word.startswith("out="))
    kept = out.with_name(f"{out.name}.steps")
    if not kept.exists():
        recipe = [word for word in words if not word.startswith("out=")]
        rate = measures.fit(*recipe, "steps=30", "repeats=1")["images/s"][0]
        _, config = measures.read(recipe)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(max(int(float(share) * seconds * rate / config.train.batch), 20)))
    return nepa("pretrain", *words, f"train.length.steps={kept.read_text()}")


class NoData(Exception):
    """The data of a row are not there."""


def absent(what: str) -> Figures:
    """Of a row whose data are not there.

    Raises:
        NoData: always; it says what was looked for.
    """
    raise NoData(what)
