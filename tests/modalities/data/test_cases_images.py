"""Images, scenes and their listings as they lie on real disks: every kind is right, or one line that says why not."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from modalities.data import image_sources, listing
from modalities.data.image_decode import SUFFIXES, decode
from modalities.data.image_shards import index_shard
from modalities.data.image_sources import open_source
from modalities.data.images import open_files, open_images
from modalities.data.scene_masks import read_mask
from modalities.image import Images
from modalities.scenes import Scenes
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.runtime.run import Run
from recipes.report.plots import picture_table
from recipes.report.segment import Picture, render, report
from recipes.statistics.segment_metrics import score_text, scores
from recipes.training.train import say_leaks
from tests.pictures import encoded, open_folder, picture, pixels, sample, write_parquet, write_shard, write_tree
from tests.tiny_scenes import scenes as tiny_scenes
from tests.tiny_scenes import write_scenes

PNG = encoded(picture(0))


@pytest.fixture(autouse=True)
def _said_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_said", set())


def two(root: Path, **files: bytes) -> Path:
    """Two classes of three images in two splits, and more files."""
    tree = {f"{split}/{name}/{k}.png": PNG for split in ("train", "val") for name in ("cat", "dog") for k in range(3)}
    write_tree(root, tree | files)
    return root


def rows(root: Path, split: str = "train") -> list[int]:
    found: list[int] = open_source("folder", split, root=str(root)).labels.tolist()
    return found


# ------------------------------------------------------------------------------------------------------ class folders


@pytest.mark.parametrize(
    "clutter",
    ["cat/.ipynb_checkpoints/0-checkpoint.png", "cat/@eaDir/0.png", "cat/__MACOSX/._0.png", "cat/._0.png",
     "cat/Thumbs.db", ".cat/0.png", "__MACOSX/0.png", "@eaDir/0.png", "loose.png", "cat/notes.txt"],
)  # fmt: skip
def test_clutter_is_no_sample_no_class_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clutter: str
) -> None:
    two(tmp_path, **{f"train/{clutter}": PNG})
    assert rows(tmp_path) == [0, 0, 0, 1, 1, 1]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/train: passed over 1 file or folder: 1 ")
    assert said.count("\n") == 1
    assert rows(tmp_path, "test") == [0, 0, 0, 1, 1, 1]
    assert capsys.readouterr().err == ""  # nothing to say of that one


def test_every_kind_of_image_is_read_whatever_the_case_of_its_suffix(tmp_path: Path) -> None:
    kinds = {"jpg": "jpeg", "JFIF": "jpeg", "jpe": "jpeg", "gif": "gif", "BMP": "bmp", "tif": "tiff", "avif": "avif",
             "WebP": "webp", "jp2": "jpeg2000", "pgm": "ppm", "png": "png"}  # fmt: skip
    assert {f".{kind.lower()}" for kind in kinds} <= set(SUFFIXES)
    image = picture(1, 2, 2).resize((32, 32), Image.Resampling.BICUBIC)
    for suffix, kind in kinds.items():
        shown = image.convert("L") if suffix == "pgm" else image
        write_tree(tmp_path, {f"{split}/a/x.{suffix}": encoded(shown, kind) for split in ("train", "val")})
    found = open_folder(tmp_path, size=(32, 32), channels=1)
    grey = pixels(image.convert("L")).float()[0]
    assert len(found) == len(kinds)
    for row in range(len(kinds)):
        assert (found[row]["image"][0] - grey).abs().mean() < 8, found.name(row)


def test_of_an_animation_the_first_picture_is_read() -> None:
    frames = [picture(k).quantize(16, dither=Image.Dither.NONE) for k in range(2)]
    stored = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert torch.equal(decode(stored, 3), pixels(frames[0]))


def test_a_class_that_vanishes_with_its_suffix_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two(tmp_path, **{f"{split}/elk/{k}.heic": b"" for split in ("train", "val") for k in range(4)})
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.classes == ("cat", "dog", "elk")
    said = capsys.readouterr().err
    assert "4 with the suffix .heic (such as " in said
    assert "classes without an image that can be read: elk (4 passed over)" in said


def test_classes_one_folder_too_deep_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, {f"{s}/images/{name}/0.png": PNG for s in ("train", "val") for name in ("cat", "dog")})
    assert rows(tmp_path) == [0, 0]
    assert "all images of images lie in the subfolders cat, dog" in capsys.readouterr().err


def test_links_to_a_parent_do_not_multiply_samples(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "train/cat/up").symlink_to("..", target_is_directory=True)
    (tmp_path / "train/cat/root").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "train/cat/dogs").symlink_to("../dog", target_is_directory=True)
    (tmp_path / "train/dog/gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "train/dog/pipe.png")
    assert rows(tmp_path) == [0, 0, 0, 1, 1, 1]


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    two(tmp_path)
    for split in ("train", "val"):
        os.mkdir(os.fsencode(tmp_path / split) + b"/caf\xe9")
        with open(os.fsencode(tmp_path / split) + b"/caf\xe9/\xff\n.png", "wb") as file:
            file.write(PNG)
    images = open_folder(tmp_path)
    assert images.source.classes == (r"caf\xe9", "cat", "dog")
    assert images.name(0) == rf"{tmp_path}/train/caf\xe9/\xff\n.png"
    assert torch.equal(images[0]["image"], pixels(picture(0)))
    assert images.fingerprint().startswith("7 samples, ")
    own = open_files([os.fsdecode(os.fsencode(tmp_path / "train") + b"/caf\xe9/\xff\n.png")], size=(8, 8), channels=3)
    assert torch.equal(own[0]["image"], pixels(picture(0)))


def test_class_folders_come_before_archives_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two(tmp_path)
    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"ILSVRC2012_img_{name}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("n01440764.tar"))
    assert rows(tmp_path) == [0, 0, 0, 1, 1, 1]
    assert "the class folders are read; tar files lie there, too, and are passed over" in capsys.readouterr().err


def test_folders_without_images_do_not_hide_the_shards_beside_them(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{split}/notes/x.txt": b"" for split in ("train", "val")})
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}-0.tar", [sample("a", PNG, 1)])
    assert rows(tmp_path) == [1]


def test_what_is_called_otherwise_is_listed_in_the_refusal(tmp_path: Path) -> None:
    write_tree(tmp_path, {"Training/cat/0.png": PNG, "valid/cat/0.png": PNG, "train-0.tar.gz": b""})
    with pytest.raises(UserError, match=r"the folder holds Training, train-0\.tar\.gz, valid$"):
        open_folder(tmp_path)


# -------------------------------------------------------------------------------------------------------------- shards


def tar_of(file: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def both(root: Path, *members: tuple[str, bytes]) -> Any:
    for split in ("train", "val"):
        tar_of(root / f"{split}-0.tar", *members)
    return open_source("folder", "train", root=str(root))


def test_dots_and_kinds_in_the_names_of_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = both(
        tmp_path,
        ("./a/b.c/img_v1.5.PNG", PNG), ("./a/b.c/img_v1.5.cls", b"1"),
        ("x.bmp", PNG), ("x.cls", b"2"), ("y.gif", PNG), ("y.json", b'{"label": 3}'),
        ("z.rgb.png", PNG), ("z.cls", b"4"),  # the only image of z
        ("w.png", PNG), ("w.seg.png", b"mask"), ("w.cls", b"5"),
        ("n.heic", b"?"), ("n.cls", b"6"), ("._x.png", b"fork"), ("__MACOSX/q.png", b"fork"), ("t.txt", b"words"),
    )  # fmt: skip
    assert source.labels.tolist() == [1, 2, 3, 4, 5]
    assert source.name(0) == f"{tmp_path}/train-0.tar:a/b.c/img_v1.5"
    assert all(source.read(row) == PNG for row in range(5))
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/train-0.tar: passed over 6 files or folders: 2 hidden")
    for reason in ("1 with the suffix .heic", "1 with the suffix .txt", "1 labels without an image (such as n)"):
        assert reason in said
    assert "1 of another kind than the image of their sample (such as w.seg)" in said


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((("a.left.png", PNG), ("a.right.png", PNG), ("a.cls", b"0")), "two images with the key a, a.left and a.right"),
        ((("a.v1.png", PNG),), "the image a.v1 has no label"),
        ((("n01440764.tar", b"x"),), r"no image in this shard .*1 with the suffix \.tar \(such as n01440764\.tar\)"),
    ],
)
def test_members_that_make_no_sample_are_named(
    tmp_path: Path, members: tuple[tuple[str, bytes], ...], words: str
) -> None:
    with pytest.raises(UserError, match=rf"train-0\.tar: {words}"):
        both(tmp_path, *members)


def sparse_tar(file: Path, name: str, size: int) -> None:
    """An old GNU sparse member that claims `size` bytes and stores none."""
    info = tarfile.TarInfo(name)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[156:157] = tarfile.GNUTYPE_SPARSE
    octal = f"{size:011o}".encode() + b"\0"
    head[386:398], head[398:410] = octal, b"00000000000\0"  # one hole up to the end
    head[483:495] = octal
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}".encode() + b"\0 "
    tail = [tarfile.TarInfo("a.cls"), tarfile.TarInfo("b.png"), tarfile.TarInfo("b.cls")]
    tail[0].size, tail[1].size, tail[2].size = 1, len(PNG), 1
    parts = [
        each.tobuf() + body.ljust(-(-len(body) // 512) * 512, b"\0")
        for each, body in zip(tail, (b"0", PNG, b"1"), strict=True)
    ]
    file.write_bytes(bytes(head) + b"".join(parts) + bytes(10240))


def test_a_sparse_member_is_unreadable_and_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        sparse_tar(tmp_path / f"{split}-0.tar", "a.png", 4_600_000_000)
    images = open_folder(tmp_path)
    with pytest.raises(UnreadableSample, match=r"train-0\.tar:a: a sparse member of a tar"):
        images[0]
    assert torch.equal(images[1]["image"], pixels(picture(0)))


def test_a_label_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    tar_of(tmp_path / "train-0.tar", ("a.png", PNG))
    content = bytearray((tmp_path / "train-0.tar").read_bytes()[: 512 + -(-len(PNG) // 512) * 512])
    sparse_tar(tmp_path / "x.tar", "a.cls", 4_600_000_000)
    (tmp_path / "train-0.tar").write_bytes(bytes(content) + (tmp_path / "x.tar").read_bytes()[:512] + bytes(10240))
    with pytest.raises(UserError, match=r"a\.cls holds no label: 4,600,000,000 bytes, or a sparse member"):
        index_shard(tmp_path / "train-0.tar")


def test_a_member_larger_than_the_limit_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = both(tmp_path, ("a.png", PNG), ("a.cls", b"0"))
    monkeypatch.setattr(listing, "LARGEST_FILE", 100)
    monkeypatch.setattr("modalities.data.listing.check_size.__defaults__", (100,))
    with pytest.raises(ValueError, match=f"{len(PNG)} bytes, more than the 100"):
        source.read(0)


def test_compressed_shards_are_refused_not_left_out(tmp_path: Path) -> None:
    both(tmp_path, ("a.png", PNG), ("a.cls", b"0"))
    image_sources._open_folder.cache_clear()
    (tmp_path / "train-1.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-1\.tar\.gz: a compressed shard .* decompress it"):
        open_folder(tmp_path)


def test_class_names_in_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9\r\nant\r\n\r\n")
    assert both(tmp_path, ("a.png", PNG), ("a.cls", b"1")).classes == (r"caf\xe9", "ant")


def test_keys_that_are_not_utf8(tmp_path: Path) -> None:
    source = both(tmp_path, ("caf\udce9.png", PNG), ("caf\udce9.cls", b"0"))
    assert source.name(0).endswith(r"train-0.tar:caf\xe9")


# -------------------------------------------------------------------------------------------------------------- tables


def image_column(kind: pa.DataType) -> pa.Array:
    """Two images as structs of this type."""
    fields = [kind.field(place) for place in range(kind.num_fields)]
    return pa.StructArray.from_arrays([_two_values(field) for field in fields], [field.name for field in fields])


def _two_values(field: pa.Field) -> pa.Array:
    if pa.types.is_dictionary(field.type):
        return pa.array(["x"] * 2).dictionary_encode()
    return pa.array([PNG if field.name == "bytes" else None] * 2, field.type)


STRUCTS = {
    "usual": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "null path": pa.struct([("bytes", pa.binary()), ("path", pa.null())]),
    "other order": pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
    "large": pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    "dictionary": pa.struct([("bytes", pa.binary()), ("path", pa.dictionary(pa.int32(), pa.string()))]),
    "no path": pa.struct([("bytes", pa.binary())]),
}
LABELS = [pa.int64(), pa.int32(), pa.int8(), pa.uint64(), pa.dictionary(pa.int32(), pa.int64())]


@pytest.mark.parametrize("mapped", [False, True])
def test_shards_that_differ_harmlessly_are_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    if mapped:
        monkeypatch.setattr(image_sources, "IN_MEMORY", 0)
    tables = [pa.table({"image": image_column(kind), "label": [0, 1]}) for kind in STRUCTS.values()]
    for label in LABELS:
        values = (
            pa.array([0, 1], pa.int64()).dictionary_encode()
            if pa.types.is_dictionary(label)
            else pa.array([0, 1], label)
        )
        tables.append(pa.table({"other": [["x"], None], "label": values, "image": image_column(STRUCTS["usual"])}))
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"train-{number:02}.parquet")
    pq.write_table(tables[0], tmp_path / "test-0.parquet")
    source: Any = open_source("folder", "train", root=str(tmp_path))
    assert source.labels.tolist() == [0, 1] * len(tables)
    assert all(source.read(row) == PNG for row in range(2 * len(tables)))
    assert source.sizes().tolist() == [len(PNG)] * 2 * len(tables)
    assert source.name(5) == f"{tmp_path}/train-02.parquet:1"


IMAGES = image_column(STRUCTS["usual"])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"img": IMAGES, "label": [0, 1]}, "images and labels are in the columns img and label"),
        ({"image": IMAGES, "label": ["cat", "dog"]}, "needs a column image"),
        ({"image": IMAGES, "label": pa.array([0, 2**64 - 1], pa.uint64())}, "a label is no class number"),
        (
            {"image": pa.StructArray.from_arrays([pa.array([1, 2])], ["bytes"]), "label": [0, 1]},
            "the images are stored as struct",
        ),
    ],
)
def test_shards_that_differ_in_what_they_mean_are_one_line(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    usual = pa.table({"image": image_column(STRUCTS["usual"]), "label": [0, 1]})
    pq.write_table(usual, tmp_path / "train-0.parquet")
    pq.write_table(pa.table(columns), tmp_path / "train-1.parquet")
    pq.write_table(usual, tmp_path / "test-0.parquet")
    with pytest.raises(UserError, match=f"train-1.parquet: {words}") as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_class_names_survive_shards_without_them_and_other_integers(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "a<b\n"])})
    named = pa.table({"image": image_column(STRUCTS["usual"]), "label": pa.array([0, 1], pa.int32())})
    named = named.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(pa.table({"image": image_column(STRUCTS["usual"]), "label": [0, 1]}), tmp_path / "train-0.parquet")
    for name in ("train-1", "test-0"):
        pq.write_table(named, tmp_path / f"{name}.parquet")
    assert open_source("folder", "train", root=str(tmp_path)).classes == ("ant", r"a<b\n")


def test_sizes_of_a_shuffled_table_are_in_the_order_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    files = [encoded(picture(k, 8, 8 + k)) for k in range(4)]
    table = pa.table({"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1, 2, 3]})
    stored = datasets.Dataset(datasets.table.InMemoryTable(table)).select([3, 0, 2])
    monkeypatch.setattr(image_sources, "load_hub", lambda name: {"train": stored, "test": stored})
    source: Any = open_source("hub", "train", root="a/shuffled")
    assert source.labels.tolist() == [3, 0, 2]
    assert source.sizes().tolist() == [len(files[row]) for row in (3, 0, 2)]


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b", "\udce9/x"])
def test_odd_hub_names_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(UserError, match="can't be had from the hub"):
        open_source("hub", "train", root=name)


def test_scenes_in_parquet_shards_of_several_schemas(tmp_path: Path) -> None:
    grey = encoded(Image.new("L", (8, 8), 1))
    for number, kind in enumerate(STRUCTS.values()):
        column = image_column(kind)
        masks = pa.StructArray.from_arrays([pa.array([grey] * 2, pa.binary())], ["bytes"])
        pq.write_table(pa.table({"image": column, "annotation": masks}), tmp_path / f"train-{number}.parquet")
    found = tiny_scenes(tmp_path, ignored_labels=(0, 255)).whole("train")
    assert len(found) == 2 * len(STRUCTS)
    assert all((found[row]["target"] == 0).all() for row in range(len(found)))


# --------------------------------------------------------------------------------------------------- bombs, orientation


def png_of(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    stored = bytearray(encoded(picture(0), "jpeg"))
    place = stored.index(b"\xff\xc0")
    stored[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(stored)


BOMBS = {
    "jpeg": jpeg_of(30_000, 30_000),
    "jpeg below twice the limit": jpeg_of(10_000, 10_000),
    "png": png_of(30_000, 30_000),
    "gif": (lambda stored: stored[:6] + struct.pack("<HH", 30_000, 30_000) + stored[10:])(encoded(picture(0), "gif")),
    "ppm": b"P6 30000 30000 255\n",
    "bmp": (lambda stored: stored[:18] + struct.pack("<ii", 30_000, 30_000) + stored[26:])(encoded(picture(0), "bmp")),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_header(
    kind: str, channels: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr("modalities.data.image_decode.decode_as_stored", never)
    monkeypatch.setattr(Image.Image, "load", never)
    with pytest.raises(
        ValueError, match=r"pixels,? (more )?than data\.max_pixels=89478485|more pixels than data\.max_"
    ):
        decode(BOMBS[kind], channels)


def test_the_limit_is_a_setting_and_what_exceeds_it_is_counted_as_unreadable(tmp_path: Path) -> None:
    large = encoded(picture(0, 40, 30), "jpeg")
    two(tmp_path, **{"train/cat/a.jpg": large})
    for settings in ({}, {"in_memory": True}):
        images = open_folder(tmp_path, max_pixels=1199, **settings)
        where = next(row for row in range(len(images)) if images.name(row).endswith("a.jpg"))
        with pytest.raises(UnreadableSample, match=r"a\.jpg: 40 x 30 pixels, more than data\.max_pixels=1199 allows$"):
            images[where]
        assert open_folder(tmp_path, max_pixels=1200, **settings)[where]["image"].shape == (3, 8, 8)


def test_a_raised_limit_is_pils_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="max_pixels"):
        decode(encoded(picture(0, 40, 30)), 3, 50)
    assert decode(encoded(picture(0, 40, 30)), 3, 1200).shape == (3, 30, 40)


@pytest.mark.parametrize(
    "stored",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"/* XPM */\nstatic char *x[] = {\n",
        b"SIMPLE  =",
        b"II\x2a",
    ],
)
def test_other_formats_of_pils_are_not_even_tried(stored: bytes) -> None:
    with pytest.raises((ValueError, OSError)):
        decode(stored, 3)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"%s/></rdf:RDF></x:xmpmeta>'
)


def with_blocks(stored: bytes, *blocks: bytes) -> bytes:
    """A JPEG with these APP1 blocks, in this order, in front of all others."""
    return stored[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(each) + 2) + each for each in blocks) + stored[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("blocks", ["xmp first", "exif first", "xmp alone"])
def test_xmp_before_exif_turns_a_jpeg_as_pil_turns_it(orientation: int, blocks: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    tag = b' tiff:Orientation="%d"' % orientation if blocks == "xmp alone" else b""
    parts = [b"http://ns.adobe.com/xap/1.0/\0" + XMP % tag]
    if blocks != "xmp alone":
        parts.insert(0 if blocks == "exif first" else 1, exif.tobytes())
    image = picture(3, 3, 3).resize((40, 24), Image.Resampling.BICUBIC)
    stored = with_blocks(encoded(image, "jpeg", quality=95), *parts)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert (upright.width < upright.height) == (orientation > 4)
    assert torch.equal(decode(stored, 3), pixels(upright))
    assert torch.equal(decode(stored, 1)[0], torch.from_numpy(np.array(upright.convert("L"))))


# ------------------------------------------------------------------------------------------- classes without names


def adapter(root: Path) -> Images:
    half = (0.5,) * 3
    return Images(source="folder", root=str(root), size=(8, 8), patch=(4, 4), channels=3, mean=half, std=half)


@pytest.mark.parametrize("labels", [(0, 5_000_000), (0, 2**40), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_a_gap_in_the_numbers_of_classes_is_one_line(tmp_path: Path, layout: str, labels: tuple[int, ...]) -> None:
    """And not as many classes as the largest number says."""
    for split in ("train", "val"):
        if layout == "tar":
            write_shard(tmp_path / f"{split}-0.tar", [sample(str(k), PNG, label) for k, label in enumerate(labels)])
        else:
            write_parquet(tmp_path / f"{split}-0.parquet", [PNG] * len(labels), list(labels))
    words = rf"{len(labels)} classes occur in training, numbered from {labels[0]} to {labels[-1]}, and none is \d;"
    with pytest.raises(UserError, match=words):
        adapter(tmp_path).classes()


def test_classes_that_have_numbers_alone_are_those_of_training(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [PNG] * 3, [0, 2, 1])
    write_parquet(tmp_path / "test-0.parquet", [PNG] * 2, [1, 0])
    assert adapter(tmp_path).classes() == ("0", "1", "2")
    write_parquet(tmp_path / "more" / "train-0.parquet", [PNG] * 2, [0, 1])
    write_parquet(tmp_path / "more" / "test-0.parquet", [PNG] * 3, [0, 1, 2])
    with pytest.raises(UserError, match=r"test-0\.parquet:2: no training image has its class 2"):
        adapter(tmp_path / "more").classes()
    write_parquet(tmp_path / "none" / "train-0.parquet", [PNG], [0])
    write_parquet(tmp_path / "none" / "test-0.parquet", [PNG], [0])
    for split, said in (("test", "held-out"), ("train", "training")):
        file = tmp_path / "none" / f"{split}-0.parquet"
        pq.write_table(pq.read_table(file).slice(0, 0), file)
        with pytest.raises(UserError, match=f"the {said} split holds no image"):
            adapter(tmp_path / "none").dataset(split)


def test_labels_of_members_are_whole_numbers_and_one_for_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG)]
    for name, label, words in (
        ("large", ("b.cls", str(2**70).encode()), r"b\.cls holds no label"),
        ("fraction", ("b.json", b'{"label": 0.7}'), r"b\.json holds no label"),
        ("two", ("a.cls", b"1"), "two labels with the key a, 0 and 1; keep one"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=words):
            both(tmp_path / name, *members, label)
    assert both(tmp_path, *members, ("b.json", b'{"label": 1.0}'), ("a.json", b'{"label": 7}')).labels.tolist() == [
        0,
        1,
    ]
    said = "1 json files with another label than the cls of their sample (such as a)"
    assert said in capsys.readouterr().err


def test_the_suffix_of_a_shard_may_be_in_large_letters(tmp_path: Path) -> None:
    for name in ("TRAIN.TAR", "val.Tar"):
        tar_of(tmp_path / name, ("a.png", PNG), ("a.cls", b"0"))
    assert rows(tmp_path) == rows(tmp_path, "test") == [0]


def test_ilsvrcs_own_archives_alone_say_to_unpack_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it holds tars, as ILSVRC's own does: unpack these into class folders"):
        both(tmp_path, ("n01440764.tar", b"0" * 10))


def test_of_several_held_out_splits_the_first_is_read_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = two(tmp_path / "images", **{"test/cat/9.png": PNG, "test/dog/9.png": PNG})
    assert rows(images, "test") == [0, 0, 0, 1, 1, 1]
    assert capsys.readouterr().err == f"{images}: val is held out, and test left aside\n"
    for name, labels in (("train", [0, 1]), ("test", [0, 1]), ("validation", [1, 0])):
        write_parquet(tmp_path / "parquet" / f"{name}-0.parquet", [PNG, PNG], labels)
    assert rows(tmp_path / "parquet", "test") == [1, 0]
    assert capsys.readouterr().err == f"{tmp_path}/parquet: validation is held out, and test left aside\n"
    root = scene_folder(tmp_path / "scenes", encoded(Image.fromarray(SQUARE)))
    write_tree(root, {"images/test/0.jpg": PNG})
    scenes(root).whole("test")
    assert capsys.readouterr().err == f"{root}: val is held out, and test left aside\n"


@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_other_labels_are_other_data_where_names_do_not_say_them(tmp_path: Path, layout: str) -> None:
    def written(name: str, labels: list[int]) -> str:
        for split in ("train", "val"):
            if layout == "tar":
                members = [sample(str(k), PNG, label) for k, label in enumerate(labels)]
                write_shard(tmp_path / name / f"{split}-0.tar", members)
            else:
                write_parquet(tmp_path / name / f"{split}-0.parquet", [PNG] * len(labels), list(labels))
        found: str = open_folder(tmp_path / name).fingerprint()
        return found

    assert written("one", [0, 1]) == written("again", [0, 1]) != written("other", [1, 0])


# --------------------------------------------------------------------------------------------------------------- masks

SQUARE = np.arange(48, dtype=np.uint8).reshape(6, 8) % 2


def scene_folder(root: Path, mask: bytes, image: bytes | None = None, *, suffix: str = "png", count: int = 1) -> Path:
    """Both splits with the same pairs."""
    for split in ("train", "val"):
        for number in range(count):
            write_tree(root, {
                f"images/{split}/{number}.jpg": image or encoded(Image.new("RGB", (8, 6)), "jpeg"),
                f"annotations/{split}/{number}.{suffix}": mask,
            })  # fmt: skip
    return root


def scenes(root: Path, count: int = 2, **changes: Any) -> Scenes:
    settings: dict[str, Any] = {"class_count": count, "first_label": 0, "ignored_labels": ()}
    return tiny_scenes(root, **(settings | changes))


def stored_as(mode: str, kind: str = "png") -> bytes:
    labels = SQUARE.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8))
    if mode == "1":
        image = Image.fromarray(labels * 255).convert("1")
    elif mode == "P":
        image = Image.fromarray(labels, mode="P")
        image.putpalette([200, 10, 10, 200, 10, 10] * 128)  # colours that tell nothing
    else:
        image = Image.fromarray(labels)
    assert image.mode == mode
    return encoded(image, kind)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "png"), ("L", "png"), ("P", "png"), ("I;16", "png"), ("1", "tiff"), ("L", "tiff"), ("P", "tiff"),
     ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff"), ("P", "gif"), ("L", "bmp"), ("P", "bmp"), ("L", "ppm")],
)  # fmt: skip
def test_every_mode_of_a_mask_is_read_exactly(mode: str, kind: str) -> None:
    labels, turn = read_mask(stored_as(mode, kind), "mask", 10**6)
    assert turn == 1
    assert labels.dtype.kind in "iu"
    assert np.array_equal(labels, SQUARE)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_grey_png_of_few_bits_holds_what_was_stored(bits: int) -> None:
    """PIL spreads 2 and 4 bits over 0 to 255: class 1 would be 85 or 17."""
    labels = np.arange(48).reshape(6, 8) % 2**bits
    lines = b"".join(
        b"\0" + np.packbits(np.unpackbits(line.astype(np.uint8)[:, None], axis=1)[:, -bits:].ravel()).tobytes()
        for line in labels
    )
    empty = png_of(8, 6)
    header = bytearray(empty[:33])
    header[24:26] = bytes([bits, 0])
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    body = zlib.compress(lines)
    data = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    found = read_mask(bytes(header) + data + empty[-12:], "mask", 10**6).labels
    assert np.array_equal(found, labels)


def fractions() -> bytes:
    return encoded(Image.fromarray(SQUARE.astype(np.float32) / 2), "tiff")


@pytest.mark.parametrize(
    ("mask", "cure"),
    [
        (
            np.dstack([SQUARE * 128, SQUARE * 64, SQUARE]),
            r"2, such as \(0, 0, 0\), \(128, 64, 1\)\) name the classes: save",
        ),
        (
            np.dstack([SQUARE * 128, SQUARE * 0, SQUARE, SQUARE + 9]),
            r"in a PNG of one channel \(mode L\), `Image\.fromar",
        ),
        (np.dstack([SQUARE] * 3), r"all grey: save the first channel alone, `Image\.open\(FILE\)\.getchannel\(0\)"),
        (np.dstack([SQUARE, SQUARE + 5]), "all grey: save the first channel alone"),
    ],
)
def test_a_mask_in_colour_is_refused_with_the_way_to_convert_it(tmp_path: Path, mask: np.ndarray, cure: str) -> None:
    root = scene_folder(tmp_path, encoded(Image.fromarray(mask)))
    with pytest.raises(UserError, match=rf"annotations/train/0\.png: [^\n]*which has several channels; [^\n]*{cure}"):
        scenes(root).whole("train")[0]


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_integers_are_no_class_numbers() -> None:
    mask = encoded(Image.fromarray(SQUARE.astype(np.float32) * 1e20), "tiff")
    with pytest.raises(UserError, match=r"holds 1\.0\d*e\+20, no class number"):
        read_mask(mask, "mask", 10**6)


def test_a_tiff_mask_is_turned_by_its_tag_once_and_counts_as_tagged(tmp_path: Path) -> None:
    """PIL turns a TIFF when it loads it, and takes the tag away."""
    labels = np.zeros((24, 40), np.uint8)
    labels[:8, :24] = 1
    image, mask = tagged(6, "jpeg", np.dstack([labels * 255] * 3)), tagged(6, "tiff", labels)
    found = scenes(scene_folder(tmp_path / "both", mask, image, suffix="tif")).whole("train")[0]
    assert torch.equal(found["image"][0] > 128, found["target"] == 1)
    untagged = encoded(Image.fromarray(np.dstack([labels * 255] * 3)), "jpeg")
    turned = tagged(3, "tiff", labels)  # of the same shape as the image
    with pytest.raises(UserError, match="the EXIF tag of the annotation turns it and its image has none"):
        scenes(scene_folder(tmp_path / "one", turned, untagged, suffix="tif")).whole("train")[0]


def test_annotations_that_hold_no_class_at_all_are_refused(tmp_path: Path) -> None:
    for name, mask, settings in (
        ("zero", SQUARE * 0, {"first_label": 1, "ignored_labels": (0,)}),
        ("void", SQUARE * 0 + 255, {"ignored_labels": (255,)}),
    ):
        root = scene_folder(tmp_path / name, encoded(Image.fromarray(mask)))
        with pytest.raises(UserError, match=r"none of the 1 annotations holds a class, only what data\.ignored_labels"):
            scenes(root, **settings).whole("train")


def test_of_a_pair_the_damaged_file_is_named(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 2, (6, 8), dtype=np.uint8)))
    root = scene_folder(tmp_path / "mask", whole[:60])
    words = rf"images/train/0\.jpg: its annotation {root}/annotations/train/0\.png: image file is truncated"
    with pytest.raises(UnreadableSample, match=words):
        scenes(root).whole("train")[0]
    root = scene_folder(tmp_path / "image", whole, b"no image")
    with pytest.raises(UnreadableSample, match=r"images/train/0\.jpg: not an image"):
        scenes(root).whole("train")[0]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (encoded(Image.fromarray(SQUARE), "jpeg"), "a JPEG file may have changed class numbers; save .* as PNG"),
        (encoded(Image.fromarray(SQUARE), "jpeg2000"), "a JPEG2000 file may have changed"),
        (encoded(Image.fromarray(np.dstack([SQUARE] * 3)), "webp"), "a WEBP file may have changed"),
        (encoded(Image.fromarray(SQUARE), "tiff", compression="jpeg"), "a TIFF file may have changed"),
        (encoded(Image.fromarray(np.dstack([SQUARE * 255] * 3))), "mode RGB, which has several channels"),
        (encoded(Image.fromarray(np.dstack([SQUARE] * 4))), "mode RGBA, which has several channels"),
        (encoded(Image.fromarray(np.dstack([SQUARE] * 2))), "mode LA, which has several channels"),
        (encoded(Image.fromarray(np.dstack([SQUARE] * 4), mode="CMYK"), "tiff"), "mode CMYK, which has several"),
        (fractions(), r"holds 0\.5, no class number"),
        (encoded(Image.fromarray(np.full((6, 8), np.inf, np.float32)), "tiff"), "holds infinity"),
        (encoded(Image.fromarray(np.full((6, 8), np.nan, np.float32)), "tiff"), "holds nan"),
        (b"P5 8 6 20\n" + SQUARE.tobytes(), "on a scale of 0 to 20"),
        (b"P4 8 6\n" + bytes(6), "stored inverted"),
        (encoded(Image.fromarray(SQUARE), "tiff", save_all=True, append_images=[Image.fromarray(SQUARE)]), "2 pages"),
    ],
)  # fmt: skip
def test_a_mask_that_holds_no_class_numbers_is_one_line(tmp_path: Path, mask: bytes, words: str) -> None:
    root = scene_folder(tmp_path, mask, suffix="tif")
    with pytest.raises(UserError, match=rf"annotations/train/0\.tif: [^\n]*{words}[^\n]*$"):
        scenes(root).whole("train")[0]


def test_a_jpeg_among_the_annotations_is_refused_when_they_are_listed(tmp_path: Path) -> None:
    root = scene_folder(tmp_path, encoded(Image.fromarray(SQUARE), "jpeg"), suffix="JPG")
    with pytest.raises(UserError, match=r"annotations/train/0\.JPG: a format that changes class numbers; save .*PNG"):
        scenes(root).whole("train")


def tagged(turn: int, kind: str, array: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x112] = turn
    return encoded(
        Image.fromarray(array), kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "jpeg" else {})
    )


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_image_and_mask_are_each_turned_by_their_own_tag(tmp_path: Path, turn: int, kind: str) -> None:
    labels = np.zeros((24, 40), np.uint8)
    labels[:8, :24] = 1
    image = np.dstack([labels * 255] * 3)
    found = scenes(scene_folder(tmp_path, tagged(turn, "png", labels), tagged(turn, kind, image))).whole("train")[0]
    assert found["target"].shape == ((40, 24) if turn > 4 else (24, 40))
    assert torch.equal(found["image"][0] > 128, found["target"] == 1)


def test_a_tag_on_one_of_a_pair_is_refused(tmp_path: Path) -> None:
    square = np.zeros((16, 16), np.uint8)
    square[:4] = 1
    colour = np.dstack([square * 255] * 3)
    plain, turned = (encoded(Image.fromarray(square)), tagged(6, "png", square))
    for name, mask, image, words in (
        ("image", plain, tagged(6, "jpeg", colour), "the EXIF tag of the image turns it and its annotation"),
        (
            "mask",
            turned,
            encoded(Image.fromarray(colour), "jpeg"),
            "the EXIF tag of the annotation turns it and its im",
        ),
    ):
        with pytest.raises(UserError, match=words):
            scenes(scene_folder(tmp_path / name, mask, image)).whole("train")[0]
    upright = scene_folder(tmp_path / "upright", plain, tagged(1, "jpeg", colour))  # a tag that turns nothing
    assert scenes(upright).whole("train")[0]["target"].shape == (16, 16)


def test_a_mask_of_0_and_255_with_two_classes_is_refused(tmp_path: Path) -> None:
    root = scene_folder(tmp_path, encoded(Image.fromarray(SQUARE * 255)), count=40)
    words = (
        r"of the 2 declared classes, what is stored as 1 never occurs in 40 annotations, while 255, .* covers 50\.00% "
        r"of their pixels: .*data\.ignored_labels"
    )
    with pytest.raises(UserError, match=words):
        scenes(root).whole("train")
    with pytest.raises(UserError, match="never occurs"):
        scenes(root).dataset("test")


def test_255_that_is_declared_is_left_out_and_a_single_class_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = scene_folder(tmp_path, encoded(Image.fromarray(SQUARE * 255)))
    found = scenes(root, ignored_labels=(255,)).whole("train")[0]["target"]
    assert found.unique().tolist() == [0, 255]
    assert "with one class there is nothing to tell apart" in capsys.readouterr().err


def test_a_void_of_255_beside_all_classes_is_the_usual_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = SQUARE.copy()
    labels[0, 0] = 255
    assert scenes(scene_folder(tmp_path, encoded(Image.fromarray(labels)))).whole("train")[0]["target"][0, 0] == 255
    assert capsys.readouterr().err == ""


def test_rare_classes_are_looked_for_before_anything_is_refused(tmp_path: Path) -> None:
    """Class 1 stands in one annotation of 100, and 255 borders every object."""
    labels = np.zeros((6, 8), np.uint8)
    labels[0, 0] = 255
    root = scene_folder(tmp_path, encoded(Image.fromarray(labels)), count=100)
    labels[3, 3] = 1
    (root / "annotations/train/77.png").write_bytes(encoded(Image.fromarray(labels)))
    assert len(scenes(root).whole("train")) == 100
    with pytest.raises(UserError, match="never occurs"):
        scenes(root).whole("test")


def test_two_files_of_one_stem_are_named_on_either_side(tmp_path: Path) -> None:
    for kind, name in (("images", "0.png"), ("annotations", "0.tif")):
        root = scene_folder(tmp_path / kind, encoded(Image.fromarray(SQUARE)))
        write_tree(root, {f"{kind}/train/{name}": PNG})
        with pytest.raises(UserError, match=rf"{kind}/train/0\.\w+ and 0\.\w+ differ in their suffix alone"):
            scenes(root).whole("train")


def test_scenes_are_listed_by_the_same_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scene_folder(tmp_path, encoded(Image.fromarray(SQUARE)))
    write_tree(root, {
        "images/train/.ipynb_checkpoints/1.jpg": PNG, "images/train/2.heic": b"", "images/train/@eaDir/3.jpg": PNG,
        "annotations/train/9.png": encoded(Image.fromarray(SQUARE)), "annotations/train/notes.json": b"{}",
    })  # fmt: skip
    (root / "images/train/up").symlink_to("..", target_is_directory=True)
    with open(os.fsencode(root / "images/train") + b"/\xe9.JPEG", "wb") as file:
        file.write(encoded(Image.new("RGB", (8, 6)), "jpeg"))
    with open(os.fsencode(root / "annotations/train") + b"/\xe9.PNG", "wb") as file:
        file.write(encoded(Image.fromarray(SQUARE)))
    found = scenes(root).whole("train")
    assert len(found) == 2
    assert found.name(1) == rf"{root}/images/train/\xe9.JPEG"
    assert torch.equal(found[1]["target"], torch.from_numpy(SQUARE))
    said = capsys.readouterr().err
    assert f"{root}/images/train: passed over 4 files or folders: 2 hidden" in said
    assert "annotations have no image (such as 9) and are left out" in said


def test_a_bomb_among_images_or_annotations_is_unreadable(tmp_path: Path) -> None:
    mask = encoded(Image.fromarray(SQUARE))
    for name, files in (("mask", (png_of(30_000, 30_000), None)), ("image", (mask, BOMBS["jpeg"]))):
        with pytest.raises(UnreadableSample, match=r"images/train/0\.jpg: .*max_pixels"):
            scenes(scene_folder(tmp_path / name, *files)).whole("train")[0]


def test_no_score_is_printed_where_the_truth_has_one_class(tmp_path: Path) -> None:
    alone = scores(torch.tensor([[9, 0], [0, 0]]))
    assert (alone.miou, alone.present) == (1.0, 1)
    assert scores(torch.tensor([[9, 1], [0, 3]])).present == 2
    assert score_text(1.0, 1) == "-"
    assert score_text(1.0, 2) == "100.00%"
    summary = {
        "mIoU": 1.0, "mAcc": 1.0, "aAcc": 1.0, "images": 2, "steps": 1, "init": None, "new_weights": [],
        "classes": [{"name": "a", "iou": 1.0}, {"name": "b", "iou": None}], "classes_in_truth": 1,
    }  # fmt: skip
    said = render(summary, Run(tmp_path))
    assert "100.00%" not in said
    assert "Of 2 classes one alone occurs in the held-out annotations" in said
    assert "100.00%" in render(summary | {"classes_in_truth": 2}, Run(tmp_path))


# ------------------------------------------------------------------------------------- leaks, fingerprints, pages


def test_an_image_in_both_splits_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, {f"train/a/{k}.png": encoded(picture(k)) for k in range(6)})
    write_tree(tmp_path, {f"val/a/{k}.png": encoded(picture(k)) for k in range(4, 9)})
    for settings in ({}, {"in_memory": True}, {"augment": "crop", "in_memory": True}):
        train, test = (open_folder(tmp_path, split, **settings) for split in ("train", "test"))
        shared = listing.shared_content(train.contents(), test.contents())
        assert (shared.count, shared.held_out) == (2, 5)
        assert shared.names[0] == (f"{tmp_path}/val/a/4.png", f"{tmp_path}/train/a/4.png")

    class Data:
        def samples_of(self, split: str) -> Any:
            return open_folder(tmp_path, split)

        def plain(self) -> Data:
            return self

        def strata(self) -> dict[str, Any]:
            return {}

    say_leaks(Data())  # type: ignore[arg-type]
    say_leaks(Data())  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.count("leak: 2 of 5 held-out samples are training samples, too, byte for byte, such as ") == 1


def test_noise_and_adapters_without_contents_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert open_images("noise", "train", size=(8, 8), channels=3).contents() is None

    class Bare:
        def samples_of(self, split: str) -> Any:
            assert split == "train"
            return object()

        def strata(self) -> dict[str, Any]:
            return {}

    say_leaks(Bare())  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("layout", ["folders", "shards", "parquet", "digits", "scenes"])
def test_a_data_set_says_what_it_is_wherever_it_lies(tmp_path: Path, layout: str) -> None:
    def made(root: Path, images: int) -> str:
        files = [encoded(picture(k)) for k in range(images)]
        if layout == "digits":
            return str(open_images("digits", "train", size=(8, 8), channels=1, limit=images).fingerprint())
        if layout == "scenes":
            write_scenes(root, train=images)
            found = tiny_scenes(root)
            assert found.whole("train").fingerprint() == found.dataset("train").fingerprint()  # type: ignore[attr-defined]
            return found.whole("train").fingerprint()
        for split in ("train", "test"):
            if layout == "folders":
                write_tree(root, {f"{split}/a/{k}.png": file for k, file in enumerate(files)})
            elif layout == "shards":
                write_shard(root / f"{split}-0.tar", [sample(str(k), file, 0) for k, file in enumerate(files)])
            else:
                table = pa.table({"image": [{"bytes": file} for file in files], "label": [0] * images})
                root.mkdir(exist_ok=True)
                pq.write_table(table, root / f"{split}-0.parquet")
        return str(open_folder(root).fingerprint())

    one, same, more = made(tmp_path / "one", 4), made(tmp_path / "two", 4), made(tmp_path / "three", 5)
    assert one == same != more
    assert one.startswith("4 samples, ")
    assert more.startswith("5 samples, ")


HOSTILE = [
    "<script>document.title='x'</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{$",
    "a\x1b[31m\nb\udce9&amp;",
]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def tags_of(page: Path) -> list[tuple[str, list[str]]]:
    parser = Tags()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.found


def test_names_from_data_stand_escaped_on_the_page_of_a_segmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / HOSTILE[0].replace("/", "_"))
    image, labels = torch.zeros(3, 6, 8, dtype=torch.uint8), torch.arange(48).view(6, 8) % len(HOSTILE)
    summary = {
        "mIoU": 0.5, "mAcc": 0.5, "aAcc": 0.5, "images": 2, "steps": 1, "init": HOSTILE[1], "new_weights": HOSTILE,
        "classes": [{"name": name, "iou": 0.5} for name in HOSTILE], "classes_in_truth": 4,
        "evaluation": {"images": 2}, "made_with": {"command": HOSTILE[1]}, "unreadable_held_out": 1,
        "unreadable_held_out_messages": [HOSTILE[0]],
    }  # fmt: skip
    monkeypatch.setattr(Run, "metrics", lambda self: [{"step": 1, "mIoU": 0.5}, {"step": 1, "loss": 1.0}])
    write_tree(run.path, {"config.json": json.dumps({"data": {"root": HOSTILE[0], "names": HOSTILE}}).encode()})
    report(run, summary, [Picture(image, labels, labels, name) for name in map(listing.printable, HOSTILE)]).write(
        run.report
    )
    found = tags_of(run.report / "index.html")
    allowed = ["html", "head", "meta", "title", "style", "body", "h1", "pre", "table", "tr", "th", "td", "figure"]
    assert {tag for tag, _ in found} <= {*allowed, "img", "figcaption", "footer", "div", "details", "summary"}
    assert [names for tag, names in found if tag == "img"] == [["alt", "src"]] * 3


def test_dollars_in_names_are_no_formulas() -> None:
    shown = picture_table([("$\\frac{$", [np.zeros((4, 4, 3))] * 2)], heads=["x"], legend={"$\\frac{$": (0, 0, 0)})
    assert shown.startswith(b"\x89PNG")


def test_hostile_class_and_file_names_come_through_every_layer(tmp_path: Path) -> None:
    names = [name.replace("/", "_") for name in HOSTILE]
    for split in ("train", "val"):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / f"{name}.png").write_bytes(PNG)
    images = open_folder(tmp_path)
    assert sorted(images.source.classes) == sorted(listing.printable(name) for name in names)
    for row in range(4):
        assert images[row]["image"].shape == (3, 8, 8)
        assert images.name(row).isprintable()


@pytest.mark.browser
def test_no_script_of_a_name_runs_in_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browse: Callable[..., str]
) -> None:
    test_names_from_data_stand_escaped_on_the_page_of_a_segmentation(tmp_path, monkeypatch)
    page = next(tmp_path.glob("*/report/index.html"))
    assert "<title>x</title>" not in browse(page, layout=False)


def test_listing_asks_the_disk_about_folders_and_not_about_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps 200,000 files within seconds, also on the disk of a network."""
    for name in range(5):
        (tmp_path / str(name)).mkdir()
        for k in range(100):
            os.mknod(tmp_path / str(name) / f"{k}.png")
    asked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **settings: (asked.append(str(path)), stat(path, **settings))[1])
    found = listing.list_groups(tmp_path, [tmp_path / str(name) for name in range(5)], SUFFIXES)
    assert sum(len(group.paths) for group in found) == 500
    assert not any(path.endswith(".png") for path in asked)
