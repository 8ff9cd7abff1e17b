"""Every layout in which users hold images gives the same samples, and says what is wrong with it in one line."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from torch import Tensor

from modalities.data import image_shards, image_sources
from modalities.data.hub import load_hub
from modalities.data.image_shards import Shards
from modalities.data.image_sources import Rows, open_source
from modalities.data.images import open_images
from modalities.image import Images
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.runtime.data import DrawSampler, TrainingBatches
from tests.pictures import encoded, open_folder, picture, pixels, sample, write_parquet, write_shard, write_tree
from tests.tiny import CPU

NAMES = ("ant", "cat")
STORED = {  # (content, label) of each image, in the order of class folders
    "train": [
        (encoded(picture(0, 9, 12), "jpeg"), 0),
        (encoded(picture(1).convert("L")), 0),
        (encoded(picture(2, 16, 9).quantize(16)), 1),
        (encoded(picture(3), "webp", lossless=True), 1),
    ],
    "validation": [(encoded(picture(4)), 0), (encoded(picture(5), "jpeg"), 1)],
}
KINDS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


def table(split: str) -> datasets.Dataset:
    images = [{"bytes": content, "path": None} for content, _ in STORED[split]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    return datasets.Dataset.from_dict({"image": images, "label": [k for _, k in STORED[split]]}, features)


def shard_samples(split: str) -> list[dict[str, Any]]:
    return [
        sample(f"{NAMES[label]}_{row}", content, label, KINDS[content[:2]])
        for row, (content, label) in enumerate(STORED[split])
    ]


def as_folders(root: Path) -> None:
    for split, images in STORED.items():
        for row, (content, label) in enumerate(images):
            write_tree(root, {f"{split}/{NAMES[label]}/{row}.{KINDS[content[:2]]}": content})


def as_parquet(root: Path) -> None:
    root.mkdir()
    for split in STORED:
        table(split).to_parquet(root / f"{split}-00000-of-00001.parquet")


def as_saved_dict(root: Path) -> None:
    datasets.DatasetDict({split: table(split) for split in STORED}).save_to_disk(root)


def as_saved_apart(root: Path) -> None:
    for split in STORED:
        table(split).save_to_disk(root / split)


def as_saved_shuffled(root: Path) -> None:
    """Rows stored in another order than they are numbered in."""
    for split in STORED:
        rows = range(len(STORED[split]))
        table(split).select([*reversed(rows)]).select([*reversed(rows)]).save_to_disk(root / split)


def as_shards(root: Path) -> None:
    for split in STORED:
        rows = shard_samples(split)
        write_shard(root / f"imagenet-{split}-000000.tar", rows[:1])
        write_shard(root / f"imagenet-{split}-000001.tar", rows[1:])
    (root / "classnames.txt").write_text("ant\ncat\n")


def as_shard_folders(root: Path) -> None:
    for split in STORED:
        write_shard(root / split / "0.tar", shard_samples(split))
    (root / "classnames.txt").write_text("ant\ncat\n")


LAYOUTS = [as_parquet, as_saved_dict, as_saved_apart, as_saved_shuffled, as_shards, as_shard_folders]


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def samples(root: Path, split: str, **changes: Any) -> list[dict[str, Tensor]]:
    images = open_folder(root, split, **changes)
    return [images[row] for row in range(len(images))]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_gives_the_same_samples(tmp_path: Path, write: Callable[[Path], None]) -> None:
    as_folders(tmp_path / "tree")
    write(tmp_path / "data")
    for split in ("train", "test"):
        found, expected = samples(tmp_path / "data", split), samples(tmp_path / "tree", split)
        assert [int(each["label"]) for each in found] == [int(each["label"]) for each in expected]
        assert all(torch.equal(one["image"], other["image"]) for one, other in zip(found, expected, strict=True))
        assert open_source("folder", split, root=str(tmp_path / "data")).classes == NAMES


def test_large_parquet_is_mapped_from_an_arrow_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_parquet(tmp_path / "data")
    small: Any = open_source("folder", "train", root=str(tmp_path / "data"))
    assert not small.table.cache_files
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(image_sources, "IN_MEMORY", 0)
    image_sources._open_folder.cache_clear()
    large: Any = open_source("folder", "train", root=str(tmp_path / "data"))
    assert all(Path(file["filename"]).is_relative_to(tmp_path / "cache") for file in large.table.cache_files)
    assert [large.read(row) for row in range(4)] == [small.read(row) for row in range(4)]
    assert large.labels.tolist() == small.labels.tolist()
    assert large.name(3) == small.name(3) == f"{tmp_path}/data/train-00000-of-00001.parquet:3"


@pytest.mark.parametrize("write", [as_saved_dict, as_shards])
def test_a_source_on_the_disk_is_cheap_to_send_to_a_worker(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "data")
    source = open_source("folder", "train", root=str(tmp_path / "data"))
    packed = pickle.dumps(source)
    assert b"\xff\xd8\xff" not in packed, "no image travels"
    again = pickle.loads(packed)
    assert again.read(2) == source.read(2)
    assert again.name(2) == source.name(2)


def test_classes_are_names_or_none(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"size": (8, 8), "patch": (4, 4), "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert Images(source="digits", **settings).classes() == tuple("0123456789")
    assert Images(source="noise", **settings).classes() == tuple("0123456789")
    as_folders(tmp_path / "tree")
    assert Images(source="folder", root=str(tmp_path / "tree"), **settings).classes() == NAMES


# ---- tables


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "labels"), ("img", "fine_label")])
def test_columns_go_by_several_names(tmp_path: Path, image: str, label: str) -> None:
    for split in STORED:
        stored = table(split).rename_columns({"image": image, "label": label})
        stored.add_column("coarse_label", [7] * len(stored)).save_to_disk(tmp_path / split)
    assert [int(each["label"]) for each in samples(tmp_path, "train")] == [0, 0, 1, 1]


def test_a_saved_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    for split in STORED:
        table(split).rename_column("label", "target").save_to_disk(tmp_path / split)
    with pytest.raises(UserError, match=r"^[^\n]*/train: needs a column image .*it has image: struct.*target: int64$"):
        open_folder(tmp_path)


def test_a_damaged_saved_folder_is_named(tmp_path: Path) -> None:
    as_saved_dict(tmp_path / "data")
    (tmp_path / "data/validation/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"^[^\n]*data/validation: save_to_disk did not write this[^\n]*$"):
        open_folder(tmp_path / "data")


def test_a_saved_row_may_name_a_file_and_is_decoded_on_access_alone(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.png": encoded(picture(7))})
    rows = [
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"bytes": b"junk", "path": None},
        {"bytes": None, "path": None},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    stored = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"image": pa.array(rows, kind), "label": [0] * 3})))
    for split in ("train", "val"):
        stored.save_to_disk(tmp_path / split)
    images = open_folder(tmp_path)
    assert torch.equal(images[0]["image"], pixels(picture(7)))
    for row, cause in ((1, "not an image"), (2, "holds no image bytes")):
        with pytest.raises(UnreadableSample, match=rf"{tmp_path}/train:{row}: .*{cause}"):
            images[row]


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", [encoded(picture(0))] * 3, [0, None, 1])
    with pytest.raises(UserError, match=r"train-0\.parquet:1: the row has no label"):
        open_folder(tmp_path)


def test_class_names_that_differ_between_splits_are_listed(tmp_path: Path) -> None:
    as_saved_apart(tmp_path)
    other = table("validation").cast_column("label", datasets.ClassLabel(names=["ant", "dog"]))
    other.save_to_disk(tmp_path / "val")
    with pytest.raises(UserError, match=r"data.root=.*same classes; .*: train/cat, val/dog$"):
        open_folder(tmp_path)


def test_class_names_in_another_order_are_refused(tmp_path: Path) -> None:
    as_saved_apart(tmp_path)
    table("validation").cast_column("label", datasets.ClassLabel(names=["cat", "ant"])).save_to_disk(tmp_path / "val")
    with pytest.raises(UserError, match=r"same classes in the same order; fix the names of val$"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("label", "names", "words"), [(2, NAMES, r"2 is outside 0\.\.1"), (-1, None, "-1 is negative")]
)
def test_a_label_that_is_no_class_is_named_with_its_row(
    tmp_path: Path, label: int, names: tuple[str, ...] | None, words: str
) -> None:
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names))
    schema = datasets.Features({"image": datasets.Image(), "label": kind}).arrow_schema
    rows = [{"bytes": b"", "path": None}] * 3
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": rows, "label": [0, 1, label]}, schema), tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match=rf"train-0\.parquet:2: the label {words}"):
        open_folder(tmp_path)


# ---- the hub


def test_a_hub_name_is_read_through_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {**{split: table(split) for split in STORED}, "test": table("validation").select([])}
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **settings: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"some/insects": stored}[name])
    found: Any = open_images("hub", "test", root="some/insects", size=(8, 8), channels=3)
    assert [int(found[row]["label"]) for row in range(2)] == [0, 1]
    assert torch.equal(found[0]["image"], pixels(picture(4)))
    assert isinstance(found.source, Rows)
    assert found.source.name(1) == "some/insects/validation:1"
    with pytest.raises(UserError, match=r"source=hub data\.root=no/such: can't be had from the hub \(.*\); check"):
        open_images("hub", "train", root="no/such", size=(8, 8), channels=3)
    del stored["validation"], stored["test"]
    image_sources._open_hub.cache_clear()
    with pytest.raises(UserError, match=r"data\.root=some/insects: needs a split train and .*; it has train$"):
        open_images("hub", "train", root="some/insects", size=(8, 8), channels=3)


def test_a_missing_file_is_named_once(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{split}/a/{k}.png": encoded(picture(k)) for split in ("train", "val") for k in range(2)})
    samples = open_folder(tmp_path)
    file = tmp_path / "train/a/1.png"
    file.unlink()
    with pytest.raises(UnreadableSample) as raised:
        samples[1]
    assert str(raised.value) == f"{file}: No such file or directory"


def test_without_network_the_cache_is_read_or_the_mend_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is not let loose on a hub that does not answer: it tries for half a minute and prints every trial."""
    asked: list[tuple[bool, bool]] = []

    def unreachable(self: HfApi, name: str, *, timeout: float) -> None:
        assert timeout < 10
        raise OSError("name or service\nnot known")

    def cached(name: str) -> Any:
        asked.append((huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return {"in/cache": {"train": table("train")}}[name]

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", cached)
    before = (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert list(load_hub("in/cache")) == ["train"]
    with pytest.raises(UserError, match=r"can't be had from the hub \(name or service not known\); check the name"):
        load_hub("not/there")
    assert asked == [(True, True)] * 2
    assert before == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_a_folder_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"that is a folder here; read it with data\.source=folder"):
        open_source("hub", "train", root=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.root=OWNER/NAME"):
        open_source("hub", "train")


# ---- shards


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train-000000.tar", "train-000001.tar", "val-000000.tar"], 2, 1),
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-0000.tar", "imagenet1k-test-0.tar"], 1, 1),
        (["train0.tar", "TEST_0.tar", "TEST_1.tar"], 1, 2),
        (["train/0.tar", "train/1.tar", "val/0.tar", "trainval-0.tar"], 2, 1),
        (["trainval-0.tar", "val-0.tar"], 0, 1),
        (["pretrained-0.tar", "evaluation.tar", "._train-0.tar"], 0, 0),
    ],
)
def test_a_split_is_found_by_its_name_in_that_of_the_shard(
    tmp_path: Path, names: list[str], train: int, test: int
) -> None:
    write_tree(tmp_path, dict.fromkeys(names, b""))
    for split, count in (("train", train), ("test", test)):
        assert len(image_shards.shard_files(tmp_path, image_sources.SPLITS[split])) == count


def test_a_shard_is_listed_without_its_images(tmp_path: Path) -> None:
    members = [
        {"__key__": "deep.er/a", "jpg": b"junk", "cls": b" 3\n"},
        {"__key__": "b", "PNG": b"", "json": b'{"label": 1, "width": 8}'},
        {"__key__": "c", "jpeg": b"xyz", "seg.png": b"a mask", "json": b'{"caption": "c"}', "cls": b"2"},
        {"__key__": "d", "txt": b"no image, no sample"},
    ]
    write_shard(tmp_path / "train-0.tar", members)
    write_shard(tmp_path / "val-0.tar", members[:1])
    source: Any = open_source("folder", "train", root=str(tmp_path))
    assert isinstance(source, Shards)
    assert source.labels.tolist() == [3, 1, 2]
    assert [source.read(row) for row in range(3)] == [b"junk", b"", b"xyz"]
    assert source.name(0) == f"{tmp_path}/train-0.tar:deep.er/a"
    with pytest.raises(UnreadableSample, match=r"train-0\.tar:deep\.er/a: not an image"):
        open_folder(tmp_path)[0]


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ({"png": b"x"}, "the image b has no label"),
        ({"png": b"x", "cls": b"cat"}, r"b\.cls holds no label: an integer is wanted, not b'cat'"),
        ({"png": b"x", "json": b"{"}, r"b\.json holds no label"),
        ({"png": b"x", "json": b'{"label": "cat"}'}, r"b\.json holds no label"),
        ({"png": b"x", "json": b"[1]"}, "the image b has no label"),
        ({"png": b"x", "jpg": b"x", "cls": b"1"}, "two images with the key b"),
    ],
)
def test_a_sample_that_is_not_one_image_with_one_label_is_named(
    tmp_path: Path, member: dict[str, bytes], words: str
) -> None:
    write_shard(tmp_path / "train-0.tar", [sample("a", b"x", 0), {"__key__": "b", **member}])
    write_shard(tmp_path / "val-0.tar", [sample("a", b"x", 0)])
    with pytest.raises(UserError, match=rf"train-0\.tar: {words}[^\n]*$"):
        open_folder(tmp_path)


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}-0.tar", [{"__key__": "a", "cls": b"1"}])
    with pytest.raises(UserError, match=r"train-0\.tar: no image in this shard"):
        open_folder(tmp_path)


def test_a_shard_cut_anywhere_is_named(tmp_path: Path) -> None:
    """Between two members as well, where `tarfile` alone would see a complete archive of fewer samples."""
    file = tmp_path / "train-0.tar"
    write_shard(file, [sample(str(row), bytes(700), row) for row in range(3)])
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        assert len(tar.getmembers()) == 6
        end = tar.offset
    for length in (0, 1, 512, 600, *range(1024, end + 1, 512), end + 100):
        file.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"^[^\n]*train-0\.tar: a damaged or cut tar shard \([^\n]*\); copy it again$"
        ):
            image_shards.index_shard(file)
    file.write_bytes(whole[: end + 512])
    assert len(image_shards.index_shard(file).keys) == 3


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    file = tmp_path / "train-0.tar"
    write_shard(file, [sample(str(row), bytes(100), row) for row in range(3)])
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        header = tar.getmember("1.png").offset_data - 512
    content[header + 2] ^= 0xFF  # in the name
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-0\.tar: a damaged or cut tar shard"):
        image_shards.index_shard(file)


def test_a_shard_that_shrinks_while_it_is_used_is_an_unreadable_sample(tmp_path: Path) -> None:
    as_shards(tmp_path)
    images = open_folder(tmp_path)
    shard = tmp_path / "imagenet-train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UnreadableSample, match="the shard has become shorter"):
        images[3]


def test_many_shards_are_listed_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_shards, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(image_shards, "cores", lambda: 2)
    for shard in range(5):
        write_shard(tmp_path / f"train-{shard}.tar", [sample("a", b"x", shard), sample("b", b"yz", shard)])
    write_shard(tmp_path / "val-0.tar", [sample("a", b"x", 0)])
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert source.name(7).endswith("train-3.tar:b")
    (tmp_path / "train-4.tar").write_bytes(b"")
    image_sources._open_folder.cache_clear()
    with pytest.raises(UserError, match=r"train-4\.tar: a damaged or cut tar shard"):
        open_source("folder", "train", root=str(tmp_path))


def test_ranks_and_workers_share_the_shards_without_repeats_or_losses(tmp_path: Path) -> None:
    content = encoded(picture(0))
    sizes = [5, 1, 7, 3]
    for shard, size in enumerate(sizes):
        first = sum(sizes[:shard])
        rows = [sample(str(row), content, row) for row in range(first, first + size)]
        write_shard(tmp_path / f"train-{shard}.tar", rows)
    write_shard(tmp_path / "val-0.tar", [sample("a", content, 0)])
    dataset = open_folder(tmp_path)
    seen: list[int] = []
    for rank in range(2):
        draws = DrawSampler(16, batch=8, accumulate=2, rank=rank, ranks=2, seed=0, start=0, stop=2)  # one epoch
        batches = TrainingBatches(dataset, draws, workers=2, max_unreadable=0.0, device=CPU)
        seen += [int(label) for batch in batches for label in batch["label"]]
    assert sorted(seen) == list(range(16))
