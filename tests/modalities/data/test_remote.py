"""Data at an address: fetched once, whole or not at all, and only where the user has named the address."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from modalities.data import documents, remote
from modalities.data.event_tables import Named, read_events
from modalities.data.remote import at_hand, cache_folder
from modalities.data.scenes import open_pairs
from modalities.timeseries import TimeSeries
from nepa_core.basics import UserError
from nepa_core.runtime import trust
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.run import Run
from recipes import cli
from recipes.config_files import read_config_file
from recipes.configs import PretrainConfig
from recipes.timeseries import demo
from recipes.vision import digits
from tests.pictures import encoded, open_folder, picture, sample, write_shard, write_tree

FORK = multiprocessing.get_context("fork")


def shards(folder: Path, count: int = 2) -> Path:
    for split in ("train", "val"):
        for part in range(count):
            rows = [sample(f"{part}{i}", encoded(picture(10 * part + i)), i % 2) for i in range(3)]
            write_shard(folder / f"{split}-{part:03d}.tar", rows)
    (folder / "classnames.txt").write_text("cat\ndog\n")
    return folder


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An empty cache, and memory:// as one more kind of address, empty, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setitem(remote.PACKAGES, "memory", ())
    before, system = trust.given(), fsspec.filesystem("memory")
    forget()
    yield system
    trust.take(before)
    forget()
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def forget() -> None:
    """As another process would begin."""
    remote._fetched.cache_clear()


def put(system: MemoryFileSystem, folder: Path, at: str = "/data") -> str:
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{at}/{file.relative_to(folder)}", file.read_bytes())
    return f"memory:/{at}"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was."""
    count, real = Counter[str](), MemoryFileSystem.get_file

    def get_file(self: Any, url: str, *given: Any, **more: Any) -> None:
        count[Path(url).name] += 1
        real(self, url, *given, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return count


def cached() -> list[str]:
    """Names of all files in the cache but for its own notes."""
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.name != "complete.json")


SHARDS = ["classnames.txt", "train-000.tar", "train-001.tar", "val-000.tar", "val-001.tar"]


def test_shards_at_an_address_are_those_of_the_folder_and_are_fetched_once(
    tmp_path: Path, store: MemoryFileSystem, fetched: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "local")
    (folder / "notes.md").touch()
    address = put(store, folder)
    for split in ("train", "test"):
        here, there = open_folder(folder, split), open_folder(address, split)  # type: ignore[arg-type]
        assert len(there) == 6
        assert all(torch.equal(here[row]["image"], there[row]["image"]) for row in range(6))
        assert here.fingerprint() == there.fingerprint()
    forget()
    open_folder(address, "test")  # type: ignore[arg-type]
    assert fetched == dict.fromkeys(SHARDS, 1)
    assert cached() == SHARDS
    assert re.search(r"fetching 5 of 5 files, [1-9]\d*\.\d kB, into ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("memory://data/{train,val}-{000..001}.tar", SHARDS[1:]),
        ("memory://data/*-000.tar", ["train-000.tar", "val-000.tar"]),
        ("memory://data/{train-00*,val-001}.tar", ["train-000.tar", "train-001.tar", "val-001.tar"]),
    ],
)
def test_braces_and_stars_name_files(tmp_path: Path, store: MemoryFileSystem, pattern: str, names: list[str]) -> None:
    put(store, shards(tmp_path / "local"))
    assert sorted(path.name for path in Path(at_hand(pattern)).iterdir()) == names


@pytest.mark.parametrize("last", [57, 58, 59, 60])
def test_the_folder_of_an_address_is_no_option_of_a_command(store: MemoryFileSystem, last: int) -> None:
    address = f"memory://data/{{{80 * 'a'},{last * 'b'}}}"
    for name in (80 * "a", last * "b"):
        store.pipe_file(f"/data/{name}", b"x")
    assert Path(at_hand(address)).parent.name[0] in "ab"


def test_what_to_do_about_a_damaged_file_of_the_cache_is_said(
    tmp_path: Path, store: MemoryFileSystem, fetched: Counter[str]
) -> None:
    address = put(store, shards(tmp_path / "local"), at="/damaged")
    file = Path(at_hand(address)) / "train-000.tar"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(UserError) as error:
        open_folder(address, "train")  # type: ignore[arg-type]
    assert str(error.value).endswith(f"; delete {file}, and the same command fetches it again")
    file.unlink()
    forget()
    assert len(open_folder(address, "train")) == 6  # type: ignore[arg-type]
    assert fetched["train-000.tar"] == 2


def test_parquet_in_data_is_found_as_in_a_folder(tmp_path: Path, store: MemoryFileSystem) -> None:
    store.pipe_file("/set/data/train-0.parquet", b"x")
    store.pipe_file("/set/data/.hidden.parquet", b"x")
    store.pipe_file("/set/a/b/c.parquet", b"x")
    folder = Path(at_hand("memory://set"))
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.*")] == ["data/train-0.parquet"]
    with pytest.raises(UserError, match=r"data/train-0\.parquet: not a readable .*; delete /.*, and the same command"):
        open_pairs("memory://set", "train")


def test_what_changed_is_fetched_into_a_new_folder(
    tmp_path: Path, store: MemoryFileSystem, fetched: Counter[str]
) -> None:
    address = put(store, shards(tmp_path / "local"))
    before = at_hand(address)
    forget()
    assert at_hand(address) == before
    store.pipe_file("/data/val-001.tar", (tmp_path / "local" / "val-000.tar").read_bytes())
    forget()
    after = at_hand(address)
    assert after != before
    assert Path(before, "val-001.tar").read_bytes() != Path(after, "val-001.tar").read_bytes()


def test_processes_share_what_there_is_to_fetch(tmp_path: Path, store: MemoryFileSystem) -> None:
    address, real = put(store, shards(tmp_path / "local", 6)), MemoryFileSystem.get_file

    def get_file(self: Any, url: str, *given: Any, **more: Any) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write(f"{url}\n")
        real(self, url, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", get_file)
        team = [FORK.Process(target=at_hand, args=(address,)) for _ in range(4)]
        for process in team:
            process.start()
        for process in team:
            process.join(60)
            assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 13
    assert len(cached()) == 13


def test_a_record_is_written_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, real = tmp_path / "complete.json", os.replace

    def replace(draft: Path, file: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        remote._record(record, "theirs")  # the other process, just before
        real(draft, file)

    monkeypatch.setattr(os, "replace", replace)
    remote._record(record, "ours")
    assert record.read_text() == "ours"
    assert [each.name for each in tmp_path.iterdir()] == ["complete.json"]


def test_a_folder_on_a_server_that_is_not_there_can_not_be_had() -> None:
    pytest.importorskip("aiohttp")
    said = fails("http://127.0.0.1:9/data")
    assert "can't be had" in said
    assert "no shard" not in said


def fails(address: str) -> str:
    forget()
    with pytest.raises(UserError) as caught:
        at_hand(address)
    return str(caught.value)


def test_a_file_is_whole_or_not_there(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    address, real = put(store, shards(tmp_path / "local")), MemoryFileSystem.get_file

    def cut(self: Any, url: str, to: str, **more: Any) -> None:
        real(self, url, to, **more)
        if url.endswith("val-001.tar"):
            os.truncate(to, 100)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", cut)
        assert "val-001.tar can't be fetched (100 bytes came, of 20,480)" in fails(address)
        assert set(cached()) <= set(SHARDS) - {"val-001.tar"}
    kept = set(cached())
    fetched.clear()
    forget()
    at_hand(address)
    assert set(fetched) == set(SHARDS) - kept
    assert cached() == SHARDS


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    address = put(store, shards(tmp_path / "local"))

    def full(self: Any, url: str, to: str, **more: Any) -> None:
        Path(to).touch()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    line = fails(address)
    assert line.startswith(f"data.root={address}: {cache_folder()} can't be written: {os.strerror(number)}")
    assert line.endswith("free some space, or name another folder in XDG_CACHE_HOME")
    assert cached() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    assert re.search(r": [1-9]\d*\.\d kB are to be fetched, and .* has room for 0\.0 kB; ", fails(address))


def test_a_cache_that_can_not_be_made_is_one_line(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "can't be written: Not a directory" in fails(put(store, shards(tmp_path / "local")))


def test_names_that_lead_out_of_the_cache_are_refused(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: {"type": "file", "size": 1} for name in ("/data/../../train-0.tar", "/data/ok.tar")}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: found)
    store.pipe_file("/data/ok.tar", b"x")
    at_hand("memory://data")
    assert cached() == ["ok.tar"]
    monkeypatch.setattr(MemoryFileSystem, "glob", lambda *_, **__: found)
    assert "not the name of a file of data" in fails("memory://data/*.tar")


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("gs://bucket/x", "data.root=gs://bucket/x: an address begins with s3://, hf://, http:// or https://; copy it"),
        ("simplecache::http://x/y", "an address begins with"),
        ("https://me:secret@host/x", "data.root=https://...: no password in an address"),
        ("memory://nowhere", "data.root=memory://nowhere: can't be had ("),
        ("memory://empty", "data.root=memory://empty: no shard (.tar, .parquet) in this folder"),
        ("memory://{a", "data.root=memory://{a: its braces don't match"),
        ("memory://empty/*.tar", "data.root=memory://empty/*.tar: no file is called so"),
        ("http://127.0.0.1:9/train-{0..1}.tar", "data.root=http://127.0.0.1:9/train-{0..1}.tar: can't be had ("),
    ],
)
def test_what_can_not_be_had_is_one_line(store: MemoryFileSystem, address: str, line: str) -> None:
    if address.startswith("http:"):
        pytest.importorskip("aiohttp")
    store.pipe_file("/empty/readme.md", b"x")
    if "::" in address:  # no address, and no folder
        with pytest.raises(UserError, match="no such folder"):
            open_folder(address)  # type: ignore[arg-type]
        return
    said = fails(address)
    assert said.startswith(line)
    assert "secret" not in said
    assert cached() == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("s3fs", "aiohttp") else object())
    assert fails("s3://b/x") == "data.root=s3://b/x needs s3fs, not installed here: pip install s3fs"
    assert fails("https://b/x").endswith("pip install nepa[remote], or pip install aiohttp")


# --------------------------------------------------------------------------------------------------------- tables


def test_tables_of_events_documents_and_series(store: MemoryFileSystem) -> None:
    store.pipe_file("/t/events.csv", b"entity,time,kind\na,1,x\na,2,y\nb,1,x\n")
    found = read_events("memory://t/events.csv", Named("entity", "time", "kind", None, None))
    assert len(found.time) == 3
    store.pipe_file("/t/texts.csv", b"text,label\n" + b"".join(b"some words %d,%d\n" % (i, i % 2) for i in range(20)))
    split = documents.read_documents("memory://t/texts.csv")
    assert len(split["train"]) + len(split["test"]) == 20
    rows = "".join(f"2020-01-01 {hour // 60:02d}:{hour % 60:02d}:00,{hour}\n" for hour in range(1400))
    store.pipe_file("/t/series.csv", f"date,v\n{rows}".encode())
    data = demo().data.model_copy(update={"source": "file", "root": "memory://t/series.csv", "parts": (0.7, 0.1, 0.2)})
    assert isinstance(data, TimeSeries)
    assert len(data.samples_of("train")) > 0  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- trust


def run_of(address: str, folder: Path) -> Run:
    config = override(digits(), {"data.source": "folder", "data.root": address})
    Run(folder).open(config)
    return Run(folder)


def test_an_address_in_a_run_that_was_made_elsewhere_is_not_fetched_unasked(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = put(store, shards(tmp_path / "local"))
    run = run_of(address, tmp_path / "run")
    open_folder(load_config(PretrainConfig, run.path / "config.json").data.root)  # type: ignore[attr-defined]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    config = load_config(PretrainConfig, run.path / "config.json")
    line = fails(address)
    assert line.startswith(f"{address}: a file names this address that was not made here by you")
    with pytest.raises(UserError, match="nothing is fetched from there unasked"):
        Run(tmp_path / "again").open(config)  # or the copy would be a run of this user's
    assert not (tmp_path / "again").exists()
    forget()
    with trust.everything():
        at_hand(address)
    assert fails(address) == line
    forget()
    with cli._target(["RUN", f"data.root={address}"]):
        at_hand(address)


def test_an_address_in_a_config_file_is_asked_about(tmp_path: Path, store: MemoryFileSystem) -> None:
    address = put(store, shards(tmp_path / "local"))
    (tmp_path / "my.yaml").write_text(f"recipe: recipes.vision:digits\ndata.root: {address}\n")
    assert read_config_file(tmp_path / "my.yaml").values["data.root"] == address
    assert "nothing is fetched from there unasked" in fails(address)


# ------------------------------------------------------------------------------------------------- over the network


class Server(SimpleHTTPRequestHandler):
    """A folder on loopback; of a file called as `cut` says only the half comes."""

    cut = ""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(5000) if self.cut and self.path.endswith(self.cut) else source.read())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A server of the folder `local`; calling it shuts it down."""
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(shards(tmp_path / "local"))))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def address() -> str:
        return f"http://127.0.0.1:{server.server_port}"

    yield address
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_web_server_s_listing_and_its_files(served: Callable[[], str], tmp_path: Path) -> None:
    write_tree(tmp_path / "local", {"notes.md": b"x"})
    folder = Path(at_hand(served()))
    assert sorted(path.name for path in folder.iterdir()) == SHARDS
    assert len(open_folder(folder)) == 6
    again = Path(at_hand(f"{served()}/{{train,val}}-{{000..001}}.tar"))
    assert sorted(path.name for path in again.iterdir()) == SHARDS[1:]


def test_a_connection_that_breaks_leaves_nothing_of_the_file(
    served: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "cut", "val-000.tar")
    line = fails(served())
    assert line.startswith(f"data.root={served()}: val-000.tar can't be fetched (")
    assert line.endswith("give the same command again: what is whole stays")
    assert set(cached()) <= set(SHARDS) - {"val-000.tar"}
    monkeypatch.setattr(Server, "cut", "")
    forget()
    at_hand(served())
    assert cached() == SHARDS


def test_without_a_network_the_copy_is_read_and_said(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = put(store, shards(tmp_path / "local"))
    before = at_hand(address)

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "info", gone)
    forget()
    assert at_hand(address) == before
    said = capsys.readouterr().err
    assert f"data.root={address} can't be had (no route to host): its copy in {cache_folder()}" in said
    Path(before, "val-000.tar").unlink()
    assert f"data.root={address}: can't be had (no route to host); check the address" in fails(address)
