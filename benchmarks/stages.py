"""The stages, in order of value: which rows there are, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import SOURCE, Row, Stage

LIMIT = 470.0
"""Seconds of a stage at most, its start included: under 8 minutes."""


class Size(NamedTuple):
    """What is measured, and at which size.

    Attributes:
        network: changes to ViT-B and ViT-L. batches: of a step, in order of value.
        timed, fitted, fed: `steps` and `repeats` of a bare step, of the fit loop, and of it where images are read.
        loading: batch of the last. photos: training images that are made. workers: numbers of processes that load.
        cifar10, folders: keys of the networks that train on those data. probe: options of `nepa probe`.
        seeds: of CIFAR-10. trained: share of a folder's time that goes into training. together: ablations at once.
        tests: files and folders of the tests marked cuda.
    """

    network: tuple[str, ...]
    batches: tuple[int, ...]
    timed: tuple[str, ...]
    fitted: tuple[str, ...]
    fed: tuple[str, ...]
    loading: int
    photos: int
    workers: tuple[int, ...]
    cifar10: tuple[str, ...]
    folders: tuple[str, ...]
    probe: tuple[str, ...]
    seeds: tuple[int, ...]
    trained: str
    together: int
    tests: tuple[str, ...]


REAL = Size(
    network=(),
    batches=(256, 512, 128),
    timed=("steps=4", "repeats=7"),
    fitted=("steps=40", "repeats=3"),
    fed=("steps=100", "repeats=1"),
    loading=256,
    photos=2048,
    workers=(16, 8, 4),
    cifar10=(
        "model.dim=256", "model.mlp_dim=1024", "model.depth=6", "train.batch=512", "train.length.epochs=50",
        "train.evaluate=1000", "train.checkpoint=500", "train.log=100",
    ),
    folders=(
        "model.dim=384", "model.mlp_dim=1536", "model.depth=12", "model.heads=6", "train.batch=256",
        "train.workers=16", "train.compile=true", "data.in_memory=false", "data.augment=crop_flip", "train.log=100",
        "train.evaluate=1000", "train.checkpoint=500", "train.ema=0.999",
    ),
    probe=("train_samples=20000", "poolings=mean,last"),
    seeds=(0, 1, 2),
    trained="0.6",
    together=4,
    tests=("tests",),
)  # fmt: skip

_TINY = ("model.dim=16", "model.heads=2", "model.mlp_dim=32", "model.depth=2")
_SHORT = (
    "train.batch=4", "train.workers=0", "train.evaluate=4", "train.checkpoint=4",
    "verdict.fit_samples=32", "verdict.test_samples=32", "verdict.health_samples=16",
)  # fmt: skip

TOY = Size(
    network=(*_TINY, "data.size=[28,28]"),
    batches=(4,),
    timed=("steps=2", "repeats=2"),
    fitted=("steps=2", "repeats=1"),
    fed=("steps=2", "repeats=1"),
    loading=4,
    photos=32,
    workers=(1,),
    cifar10=(*_TINY, *_SHORT, "train.length.steps=4"),
    folders=(*_TINY, *_SHORT),
    probe=("train_samples=32", "test_samples=16", "poolings=mean"),
    seeds=(0,),
    trained="0.001",
    together=1,
    tests=("tests/nepa_core/kernels",),
)


class Form(NamedTuple):
    """A network whose step is timed: its name in `benchmarks.measures.FORMS`, and keys of the recipe."""

    name: str
    network: str
    changes: tuple[str, ...]
    seconds: float = 45.0


FORMS = (
    Form("ours, SDPA, compiled", "ours", ("model.attention=sdpa", "train.compile=true"), 100.0),
    Form("the authors' form", "authors", ("train.compile=false",)),
    Form("ours, SDPA", "ours", ("model.attention=sdpa", "train.compile=false")),
    Form("ours, xformers, compiled", "ours", ("model.attention=xformers", "train.compile=true"), 100.0),
    Form("ours, xformers", "ours", ("model.attention=xformers", "train.compile=false")),
    Form("ours, eager attention", "ours", ("model.attention=eager", "train.compile=false")),
    Form("the authors' form, compiled", "authors", ("train.compile=true",), 100.0),
    Form("bare Transformer", "bare", ("train.compile=false",)),
)
"""In order of value. All have our optimiser, average and objective."""

NOISE = ("data.source=noise", "data.augment=none")
BASE, LARGE = "recipes.vision:base_in1k", "recipes.vision:large_in1k"


def batch(count: int) -> tuple[str, str]:
    """The keys of so many samples at once, and no accumulation."""
    return f"train.batch={count}", f"train.micro_batch={count}"


def steps(recipe: str, size: Size) -> Iterator[Row]:
    """Every form at the first batch size, and then at the others."""
    for count in size.batches:
        for form in FORMS:
            words = ("step", form.network, recipe, *NOISE, *size.network, *batch(count), *form.changes, *size.timed)
            yield Row(f"{form.name}, batch {count}", words, form.seconds)


def loops(recipe: str, size: Size) -> Iterator[Row]:
    """The fit loop on noise, and beside a bare loop."""
    for name, compiled in (("compiled", "train.compile=true"), ("not compiled", "train.compile=false")):
        count = size.batches[0]
        words = (recipe, *NOISE, *size.network, *batch(count), "train.workers=8", compiled, *size.fitted)
        yield Row(f"fit loop, {name}, batch {count}", ("fit", *words), 90.0)
        yield Row(f"fit loop over a bare loop, {name}, batch {count}", ("loop", *words), 150.0)


def network_stage(name: str, title: str, recipe: str, size: Size) -> Stage:
    """Steps of one network, the fit loop behind those of the first batch size."""
    rows, count = list(steps(recipe, size)), len(FORMS)
    return Stage(name, title, (*rows[:count], *loops(recipe, size), *rows[count:]))


def pipeline(size: Size, work: Path) -> Stage:
    """Loading alone, and a ViT-B that is fed by it."""
    photos, shards, array = work / "photos", work / "shards", work / "array"

    def stored(root: Path, *more: str) -> tuple[str, ...]:
        return ("data.source=folder", f"data.root={root}", "data.augment=crop_flip", *more)

    files = {"JPEG 500 x 375": stored(photos), "the same, resized to 256": stored(shards)}
    fed = {
        "array of 256 x 256": stored(array),
        "the same, augmented on the device": stored(array, "data.augment_on=device"),
        "JPEG 500 x 375, decoded on the GPU": stored(photos, "data.decode_on=gpu"),
    }
    common, resize = (*size.network, *batch(size.loading)), ("nepa", "resize", BASE, f"data.root={photos}")
    rows = [
        Row("pictures made", ("photos", str(photos), str(size.photos)), 120.0),
        Row("resized", (*resize, f"out={shards}"), 60.0),
        Row("written as an array", (*resize, f"out={array}", "format=array"), 60.0),
    ]
    for loaders in size.workers:
        few = loaders in (size.workers[0], size.workers[-1])
        for name, source in ({"noise": NOISE} | files | (fed if few else {})).items():
            words = (BASE, *source, *common, f"train.workers={loaders}", *size.fed)
            rows.append(Row(f"{name}, {loaders} workers, ViT-B trains", ("fit", *words, "train.compile=true"), 100.0))
            rows.append(Row(f"{name}, {loaders} workers, loading alone", ("load", *words), 60.0))
    for name, source in files.items():
        words = (BASE, *source, *size.network, "repeats=3")
        rows.append(Row(f"{name}, one core", ("decode", *words), 60.0))
    return Stage("pipeline", "Input pipeline", tuple(rows))


CIFAR10 = "recipes.vision:cifar10"


def cifar10(size: Size, data: Path | None, work: Path) -> Stage:
    """The verdict and the probe with every seed."""
    title, root = "CIFAR-10", None if data is None else find_cifar10(data)
    if root is None:
        return Stage("cifar10", title, (no_data("CIFAR-10", "cifar10, cifar-10 or cifar-10-batches-py", data),))
    rows = []
    for seed in size.seeds:
        out = f"out={work / 'cifar10' / f'seed{seed}'}"
        words = ("nepa", "pretrain", CIFAR10, f"data.root={root}", *size.cifar10, f"train.seed={seed}", out)
        rows.append(Row(f"pre-trained, seed {seed}", words, LIMIT, (seed,)))
        probe = ("nepa", "probe", out.removeprefix("out="), out, *size.probe)
        rows.append(Row(f"probe, seed {seed}", probe, 120.0, (seed,)))
    return Stage("cifar10", title, tuple(rows))


def ablations(size: Size, data: Path | None, work: Path) -> Stage:
    """The paper's ablations; the task itself goes on where it was stopped."""
    title, root = "CIFAR-10, the paper's ablations", None if data is None else find_cifar10(data)
    if root is None:
        return Stage("ablations", title, (no_data("CIFAR-10", "cifar10, cifar-10 or cifar-10-batches-py", data),))
    words = (
        *("nepa", "ablate", CIFAR10, f"data.root={root}", *size.cifar10, f"out={work / 'ablations'}"),
        *(f"seeds={','.join(map(str, size.seeds))}", f"workers={size.together}"),
    )
    return Stage("ablations", title, (Row("all arms", words, LIMIT, size.seeds),))


def folders(size: Size, data: Path | None, work: Path, seconds: float) -> Stage:
    """A ViT-S on every folder of images that is there, for a like share of the time, and its probe."""
    title, found = "Image folders", [] if data is None else find_folders(data)
    if not found:
        return Stage("folders", title, (no_data("image folders", "NAME/train/CLASS/* and NAME/val/CLASS/*", data),))
    share = min(seconds, LIMIT) / len(found)
    rows = []
    for root in found:
        out = f"out={work / 'folders' / root.name}"
        words = (CIFAR10, f"data.root={root}", *pixels(root), *size.folders, out)
        rows.append(Row(f"{root.name}, ViT-S pre-trained", ("train", size.trained, *words), share))
        probe = ("nepa", "probe", out.removeprefix("out="), out, *size.probe)
        rows.append(Row(f"{root.name}, probe", probe, share))
    return Stage("folders", title, tuple(rows))


def no_data(name: str, layout: str, data: Path | None) -> Row:
    """The row of a stage whose data are not there."""
    where = "--data is not given" if data is None else "the folder of --data holds none"
    return Row(name, ("absent", f"no data: {where}; looked for {layout}"), 60.0)


CIFAR10_NAMES = ("cifar10", "cifar-10", "cifar-10-batches-py")
_HELD_OUT = ("val", "validation", "test")
_IMAGES = {".jpg", ".jpeg", ".png"}


def find_cifar10(data: Path) -> Path | None:
    """The folder to give as data.root; torchvision's copy is named by the folder that holds it."""
    found = next((data / name for name in CIFAR10_NAMES if (data / name).is_dir()), None)
    return data if found is not None and found.name == CIFAR10_NAMES[-1] else found


def find_folders(data: Path) -> list[Path]:
    """Folders of images by class, training and held-out, in the order of their names: DATA itself, or those in it."""
    inside = sorted(each for each in data.iterdir() if each.is_dir() and each.name not in CIFAR10_NAMES)
    return [
        each for each in (data, *inside) if _by_class(each / "train") and any(_by_class(each / x) for x in _HELD_OUT)
    ]


def _by_class(split: Path) -> bool:
    return split.is_dir() and any(_first_image(each) for each in sorted(split.iterdir())[:3] if each.is_dir())


def _first_image(folder: Path) -> Path | None:
    return next((file for file in folder.rglob("*") if file.suffix.lower() in _IMAGES), None)


def pixels(root: Path) -> tuple[str, str]:
    """Size and patch for a folder: those of Tiny ImageNet where the first file is small, else those of ImageNet."""
    first = next(file for each in sorted((root / "train").iterdir()) if each.is_dir() and (file := _first_image(each)))
    small = first.stat().st_size < SMALL_FILE
    return ("data.size=[64,64]", "data.patch=[8,8]") if small else ("data.size=[224,224]", "data.patch=[14,14]")


SMALL_FILE = 6000
"""Bytes: a JPEG of 64 x 64 pixels has about 2,000, one of 160 x 160 about 8,000 or more."""


def stages(size: Size, *, data: Path | None, work: Path, seconds: float) -> dict[str, Stage]:
    """All of them by name, the most valuable first.

    Args:
        data: folder of data sets. work: folder of runs and pictures. seconds: of all stages together.
    """
    tests = Row("tests marked cuda", ("tests", *size.tests), LIMIT)
    found: Sequence[Stage] = (
        Stage("tests", "Tests marked cuda", (tests,), (*SOURCE, "tests")),
        network_stage("base", "ViT-B/14 pre-training", BASE, size),
        network_stage("large", "ViT-L/14 pre-training", LARGE, size),
        pipeline(size, work),
        cifar10(size, data, work),
        ablations(size, data, work),
        folders(size, data, work, seconds),
    )
    return {stage.name: stage for stage in found}
