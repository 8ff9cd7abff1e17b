"""1-NN and ROCKET of the package aeon, for docs/results/series-sets.md, in an environment of their own.

`PYTHON -m benchmarks.classic_series --data DIR --out FILE`, where PYTHON is that of an environment with aeon 1.6.0; no
torch is needed. DIR has a folder for each set with its NAME_TRAIN.ts and NAME_TEST.ts. FILE holds what is finished, so
the same command goes on where it was stopped.

Shapes: S series, C channels, T steps.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from benchmarks.parser import Parser

SETS = (
    "ArrowHead",
    "GunPoint",
    "ItalyPowerDemand",
    "OSULeaf",
    "BasicMotions",
    "JapaneseVowels",
    "ACSF1",
    "PickupGestureWiimoteZ",
)
SEEDS = (0, 1, 2)
KERNELS = 10_000


class ClassicFile(TypedDict):
    """FILE.

    Attributes:
        versions: package -> version. sets: set -> baseline of `BASELINES` -> accuracy, one for each seed or one alone.
        seconds: the same, for how long each took.
    """

    versions: dict[str, str]
    sets: dict[str, dict[str, list[float]]]
    seconds: dict[str, dict[str, float]]


class Split(NamedTuple):
    """Series [C, T] each, T their own, and their classes [S]."""

    series: list[np.ndarray]
    classes: np.ndarray


def read(folder: Path) -> tuple[Split, Split]:
    """The training and the test series of a set, the mean and deviation of every channel's training values taken off.

    Raises:
        OSError: a file can't be read. ValueError: a value is missing.
    """
    from aeon.datasets import load_from_ts_file

    train, test = (
        Split(list(series), np.asarray(classes))
        for series, classes in (
            load_from_ts_file(str(folder / f"{folder.name}_{split}.ts")) for split in ("TRAIN", "TEST")
        )
    )
    values = np.concatenate(train.series, axis=1)  # [C, all steps]
    mean, std = values.mean(1, keepdims=True), values.std(1, keepdims=True)
    found = tuple(Split([(each - mean) / std for each in split.series], split.classes) for split in (train, test))
    if not all(np.isfinite(each).all() for split in found for each in split.series):
        raise ValueError(f"{folder}: a value is missing, or a channel is constant; the baselines read whole series")
    return found[0], found[1]


def filled(series: Sequence[np.ndarray], length: int) -> np.ndarray:
    """[S, C, `length`], zeros after the end of a shorter one."""
    found = np.zeros((len(series), len(series[0]), length))
    for place, each in enumerate(series):
        found[place, :, : each.shape[1]] = each
    return found


def both_filled(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
    """Training and test series up to the longest of both."""
    longest = max(each.shape[1] for split in (train, test) for each in split.series)
    return filled(train.series, longest), filled(test.series, longest)


def nearest(distances: np.ndarray, train: Split, test: Split) -> list[float]:
    """The accuracy of the class of the nearest training series; distances are [test S, training S]."""
    return [float((train.classes[distances.argmin(1)] == test.classes).mean())]


def euclidean(train: Split, test: Split) -> list[float]:
    """Of series filled to one length."""
    known, asked = (each.reshape(len(each), -1) for each in both_filled(train, test))
    squared = np.stack([((known - each) ** 2).sum(1) for each in asked])
    return nearest(squared, train, test)


def dtw(train: Split, test: Split) -> list[float]:
    """Of series of their own lengths."""
    from aeon.distances import pairwise_distance

    return nearest(pairwise_distance(test.series, train.series, method="dtw"), train, test)


def rocket(train: Split, test: Split) -> list[float]:
    """One for each of `SEEDS`."""
    from aeon.classification.convolution_based import RocketClassifier

    known, asked = both_filled(train, test)
    found = []
    for seed in SEEDS:
        classifier = RocketClassifier(n_kernels=KERNELS, random_state=seed, n_jobs=1).fit(known, train.classes)
        found.append(float((classifier.predict(asked) == test.classes).mean()))
    return found


BASELINES: dict[str, Callable[[Split, Split], list[float]]] = {"euclidean": euclidean, "rocket": rocket, "dtw": dtw}
"""The longest last."""


def measure(data: Path, file: Path, minutes: float) -> None:
    """Every baseline on every set, as far as that is not done; none is begun once `minutes` are over.

    Raises:
        OSError: see `read`. ValueError: that, or what is kept is of other versions.
    """
    kept, now = read_kept(file), versions()
    if kept["sets"] and kept["versions"] != now:
        raise ValueError(f"{file} has figures of {_told(kept['versions'])}, and these are {_told(now)}; name another")
    begun = time.monotonic()
    for baseline, function in BASELINES.items():
        for name in SETS:
            if baseline in kept["sets"].get(name, {}):
                continue
            if time.monotonic() - begun > 60 * minutes:
                print(f"{minutes:g} minutes are over: the same command goes on with {baseline} on {name}")
                return
            splits, start = read(data / name), time.process_time()
            kept["sets"].setdefault(name, {})[baseline] = function(*splits)
            kept["seconds"].setdefault(name, {})[baseline] = round(time.process_time() - start, 1)
            _replace(file, json.dumps(kept | {"versions": now}, indent=1) + "\n")
            print(f"{name}, {baseline}: done", flush=True)


def read_kept(file: Path) -> ClassicFile:
    """What was measured so far.

    Raises:
        ValueError: the file is not one that was written here.
    """
    if not file.exists():
        return {"versions": {}, "sets": {}, "seconds": {}}
    try:
        kept: ClassicFile = json.loads(file.read_text())
        for name, found in kept["sets"].items():
            for baseline, values in found.items():
                if name not in SETS or baseline not in BASELINES or not all(0 <= value <= 1 for value in values):
                    raise ValueError(f"{baseline} of {name} is {values}")
        return {"versions": kept["versions"], "sets": kept["sets"], "seconds": kept["seconds"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of benchmarks.classic_series ({error!r}); name another") from error


def versions() -> dict[str, str]:
    """Of Python and the packages that the figures depend on."""
    packages = ("aeon", "numba", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _told(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _replace(file: Path, text: str) -> None:
    """The file as it was, or whole as it is to be, whenever this is stopped; nothing here imports torch."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def main(words: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m benchmarks.classic_series",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of all sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the accuracies")
    parser.add_argument("--minutes", type=float, default=60, help="after which no baseline is begun; default 60")
    asked: Any = parser.parse_args(words)
    if not asked.minutes > 0:  # NaN too
        parser.error(f"--minutes={asked.minutes:g} is no time to begin one in; a number above 0 is wanted")
    if not asked.data.is_dir():
        parser.error(f"--data={asked.data} is no folder; name the one that holds a folder for each set")
    if not asked.out.parent.is_dir():
        parser.error(f"--out={asked.out}: {asked.out.parent} is no folder; make it")
    try:
        measure(asked.data, asked.out, asked.minutes)
    except ImportError as error:
        parser.error(f"{error}; run this by the Python of an environment that has aeon 1.6.0")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from there\n")


if __name__ == "__main__":
    main(sys.argv[1:])
