"""Every task that fits a kind of data runs on it: a line of `KINDS` each, on the embedded demo made small.

A kind of data that lies in files says how to make some: `nepa embed files=` is then tried, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from recipes.cli import main
from tests.movies import ramp, write_video
from tests.tiny_scenes import write_scenes

pytestmark = pytest.mark.slow


class Kind(NamedTuple):
    """What is tried of a kind of data.

    Attributes:
        recipe: its demo.
        keys: that make it small.
        orders: names, where tokens lie on a grid; none: there is no grid.
        labelled: samples have classes or numbers to predict.
        picture: `generate` makes a signal, which `inspect` draws.
        part: of several kinds of data, the one that tasks read; the run is of all.
        file: makes a file of its own for `embed files=`, in a folder; gives its name.
        data: makes data in a folder, where none is embedded; gives `data.root`.
    """

    recipe: str
    keys: tuple[str, ...] = ()
    orders: str = ""
    labelled: bool = True
    picture: bool = True
    part: str | None = None
    file: Callable[[Path], Path] | None = None
    data: Callable[[Path], Path] | None = None


def a_text(folder: Path) -> Path:
    (folder / "own.txt").write_text("def f(x):\n    return x + 1\n" * 4)
    return folder / "own.txt"


def a_table(folder: Path) -> Path:
    (folder / "own.csv").write_text("time,kind,level\n" + "\n".join(f"{i},{'abcde'[i % 5]},{i % 3}" for i in range(9)))
    return folder / "own.csv"


def a_video(folder: Path) -> Path:
    return write_video(folder / "own.mp4", ramp(9))


def a_volume(folder: Path) -> Path:
    import numpy as np

    np.save(folder / "own.npy", np.random.default_rng(0).normal(size=(9, 9, 9)))
    return folder / "own.npy"


def vectors(folder: Path) -> Path:
    import numpy as np

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        values = random.normal(size=(48, 6, 4)).cumsum(1)
        np.save(folder / f"{split}.npy", values.astype(np.float32))
        np.save(folder / f"{split}.lengths.npy", 3 + np.arange(48) % 4)
        np.save(folder / f"{split}.label.npy", np.arange(48) % 2)
    return folder


def scenes(folder: Path) -> Path:
    return write_scenes(folder, train=48, test=48)


KINDS = {
    "image": Kind("recipes.vision:digits_2x2", orders="raster,hilbert"),
    "audio": Kind("recipes.audio:demo", ("data.patch=[8,8]",), orders="time,raster"),
    "series": Kind("recipes.timeseries:demo", orders="raster,reverse", labelled=False),
    "text": Kind(
        "recipes.text:demo",
        ("data.letters=etaoin", "data.patch=4", "data.window=96"),
        orders="raster,reverse",
        file=a_text,
    ),
    "features": Kind("recipes.presets:features", data=vectors, picture=False),
    "scenes": Kind(
        "recipes.vision:camvid",
        (
            *("data.crop=[16,16]", "data.patch=[8,8]", "data.short_side=24", "data.class_count=3"),
            *("data.names=null", "data.first_label=1", "data.ignored_labels=[0]"),
        ),
        labelled=False,  # every pixel is: `nepa segment` is their fine-tuning, with tests of its own
        data=scenes,
    ),
    "events": Kind("recipes.events:demo", file=a_table),
    "pairs": Kind("recipes.together:digits_and_tones"),
    "mix": Kind("recipes.together:digits_and_series", part="image"),
    "video": Kind("recipes.video:moving_digits", orders="raster,hilbert", file=a_video),
    "volume": Kind("recipes.volumes:shapes", ("data.patch=[8,8,8]",), orders="raster,morton", file=a_volume),
}

_SMALL = (
    *("data.limit=64", "model.dim=16", "model.depth=2", "model.heads=2", "model.mlp_dim=32", "train.batch=8"),
    *("train.length.steps=3", "train.evaluate=3", "train.checkpoint=3"),
    *("verdict.fit_samples=32", "verdict.test_samples=32", "verdict.health_samples=16"),
)
_COMPARE = ("seeds=0", "workers=1", "labels=2", "finetune_steps=2")


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    """A kind of data, and a run of its demo."""
    kind, run = KINDS[request.param], tmp_path_factory.mktemp(request.param) / "run"
    if kind.data is not None:
        kind = kind._replace(keys=(*kind.keys, f"data.root={kind.data(tmp_path_factory.mktemp('data'))}"))
    assert main(["pretrain", kind.recipe, *kind.keys, *_SMALL, f"out={run}"]) == 0
    return kind, run


def small(kind: Kind) -> list[str]:
    return [kind.recipe, *kind.keys, *_SMALL, *part_of(kind)]


def part_of(kind: Kind) -> list[str]:
    return [] if kind.part is None else [f"part={kind.part}"]


def words_of(task: str, kind: Kind, run: Path) -> list[str] | None:
    """The command that tries a task; None where the kind of data is not for it."""
    folder = run.parent
    match task:
        case "check":
            return ["check", kind.recipe, *kind.keys, *part_of(kind)]
        case "probe" if kind.labelled:
            return [
                "probe",
                str(run),
                *part_of(kind),
                "train_samples=40",
                "test_samples=40",
                "poolings=mean",
                "layers=1",
            ]
        case "finetune" if kind.labelled:
            return [
                "finetune",
                str(run),
                *part_of(kind),
                f"out={folder / 'tuned'}",
                "train.length.steps=2",
                "train.batch=8",
            ]
        case "evaluate" if kind.labelled:
            return ["evaluate", str(folder / "tuned")]
        case "inspect":
            return ["inspect", str(run), *part_of(kind), "samples=2", "worst=1"]
        case "embed":
            return ["embed", str(run), *part_of(kind), f"out={folder / 'x.parquet'}", "surprise=true", "calibrate=16"]
        case "files" if kind.file is not None:
            return [
                "embed",
                str(run),
                *part_of(kind),
                f"files={kind.file(folder)}",
                f"out={folder / 'own.parquet'}",
                "calibrate=0",
            ]
        case "generate":
            made = ("samples=8", "draws=2", "decoder_steps=3", "train_samples=32")
            return ["generate", str(run), *part_of(kind), *made]
        case "orders" if kind.orders:
            where = f"out={folder / 'orders'}"
            return ["orders", *small(kind), f"orders={kind.orders}", *_COMPARE, "cross=false", where]
        case "objectives" if kind.labelled:
            few = ("objectives=cosine", "learning_rates=1e-3", "finetune_causal=false")
            return ["objectives", *small(kind), *few, *_COMPARE, f"out={folder / 'objectives'}"]
        case "bench":
            return ["bench", *small(kind), "steps=2", "repeats=1"]
    return None


TASKS = (
    "check",
    "probe",
    "finetune",
    "evaluate",
    "inspect",
    "embed",
    "files",
    "generate",
    "orders",
    "objectives",
    "bench",
)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_on_a_kind_of_data(
    task: str, trained: tuple[Kind, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, run = trained
    words = words_of(task, kind, run)
    if words is None:
        pytest.skip(f"{kind.recipe} is not for {task}")
    assert main(words) == 0, capsys.readouterr().err[-600:]
    if task == "generate" and kind.picture:
        assert json.loads((run / "generate.json").read_text())["verdict"]
        assert (run / "generate" / "completions.png").is_file()
    if task == "inspect":
        assert (run / "inspect" / "maps.png").is_file()
