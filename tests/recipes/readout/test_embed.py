"""Features of many samples as a table: what it holds, where it goes on, and what surprise flags."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

import nepa_core
from modalities.audio import Audio
from nepa_core.basics import UserError
from nepa_core.objective import next_embedding_loss
from nepa_core.pooling import Row
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.run import Run
from recipes.cli import main
from recipes.presets import small
from recipes.readout import embedding
from recipes.readout.features import Source, kept_features, network_reader
from recipes.training.pretraining import load_pretrained, pretrain
from tests import tiny
from tests.conftest import ROOT, largest_file
from tests.nepa_core.runtime.test_distributed import torchrun
from tests.pictures import encoded, picture, write_tree
from tests.sounds import write_classes
from tests.tiny import CPU, Waves

ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ragged sequences, and one on images."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(tiny.ragged(), Run(folder / "run"), ALONE, show=False)
    for split in ("train", "val"):
        write_tree(
            folder / "pictures",
            {f"{split}/{kind}/{i}.png": encoded(picture(i, 12, 9)) for kind in "ab" for i in range(5)},
        )
    words = ["data.source=folder", f"data.root={folder / 'pictures'}", "data.crop_ratio=0.8", "data.in_memory=false"]
    assert main(["pretrain", "recipes.vision:digits", *words, *QUICK, f"out={folder / 'images'}"]) == 0
    return folder


QUICK = ["train.length.steps=1", "train.batch=2", "verdict.test_samples=4", "verdict.health_samples=4"]


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run on sequences."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def embed(run: Path, *words: str) -> int:
    return main(["embed", str(run), *words])


def column(file: Path, name: str) -> Any:
    values = pq.read_table(file)[name].to_pylist()
    return np.array(values)


def stored(folder: Path) -> dict[str, bytes]:
    """All files but those that say when and by which command."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".json"}


# ----------------------------------------------------------------------------------------------------- the table


def test_a_table_holds_what_encode_gives_and_the_probe_reads(run: Path, tmp_path: Path) -> None:
    assert embed(run, "layer=embedding,1,final", "pooling=last") == 0
    file = run / "embed" / "test.parquet"
    net = nepa_core.load(run)
    held_out = net.data.dataset("test")
    encoded = net.encode(held_out, layer=["embedding", 1, "final"], pooling="last")
    config, model = load_pretrained(Run(run), CPU)
    reader = network_reader(config, model, [Row(layer, "last") for layer in (0, 1, 3)], causal=True)
    kept = kept_features(Source(config, "test", 48), [reader], tmp_path / "store", ALONE).features[0]
    for name, found, probed in zip(("embedding", "layer_1", "final"), encoded, reader.names, strict=True):
        np.testing.assert_allclose(column(file, name), found.numpy(), atol=1e-6)
        np.testing.assert_allclose(column(file, name), kept[probed], atol=1e-6)
    assert column(file, "name").tolist() == [f"sample {i}" for i in range(48)]
    assert column(file, "sample").tolist() == list(range(48))
    assert column(file, "label").tolist() == kept["labels"].tolist()
    record = json.loads((run / "embed" / "test.parquet.json").read_text())
    assert (record["rows"], record["samples"], record["columns"]["final"]) == (48, 48, "float32 [16]")
    assert record["made_with"]["command"]


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_every_format_holds_the_same_rows(
    run: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["pooling=none", "split=train", "surprise=tokens", "calibrate=20"]
    monkeypatch.chdir(tmp_path)  # pyarrow takes a relative path with a colon for an address
    assert embed(run, *words, "out=odd:name/x.parquet") == 0
    assert embed(run, *words, f"out={tmp_path / 'o'}", f"format={suffix}") == 0
    folder, table = tmp_path / "o", pq.read_table(tmp_path / "odd:name" / "x.parquet")
    assert (folder / f"train.{suffix}.name.txt").read_text().splitlines() == table["name"].to_pylist()
    numbers = [name for name in table.column_names if name != "name"]
    names = ["sample", "token", "label", "surprise", "surprise_quantile", "surprise_token", "final"]
    assert numbers == names
    if suffix == "npy":
        found = {name: np.load(folder / f"train.{name}.npy") for name in names[:-1]}
        found["final"] = np.load(folder / "train.npy", mmap_mode="r")
    else:
        found = load_file(folder / "train.safetensors")
    for name in numbers:
        np.testing.assert_array_equal(found[name], np.array(table[name].to_pylist(), found[name].dtype))
    assert {name: each.dtype for name, each in found.items()}["final"] == np.float32


def test_without_pooling_a_row_is_a_real_token(run: Path) -> None:
    assert embed(run, "pooling=none", "layer=1") == 0
    file, net = run / "embed" / "test.parquet", nepa_core.load(run)
    features, mask = net.encode(net.data.dataset("test"), layer=1, pooling=None)
    sample, token = mask.nonzero(as_tuple=True)
    assert column(file, "sample").tolist() == sample.tolist()
    assert column(file, "token").tolist() == token.tolist()
    np.testing.assert_allclose(column(file, "layer_1"), features[mask].numpy(), atol=1e-6)


def test_data_without_labels_have_no_such_column(run: Path) -> None:
    assert embed(run, "data.labelled=false") == 0
    assert pq.read_schema(run / "embed" / "test.parquet").names == ["name", "sample", "final"]


def test_best_is_the_row_that_the_probe_chose(run: Path) -> None:
    rows = [{"name": "layer 1, last", "validation": 0.9}, {"name": "layer 2, mean", "validation": 0.5}]
    (run / "probe.json").write_text(json.dumps({"causal": True, "layers": rows}))
    assert embed(run, "layer=best") == 0
    net = nepa_core.load(run)
    expected = net.encode(net.data.dataset("test"), layer=1, pooling="last")
    np.testing.assert_allclose(column(run / "embed" / "test.parquet", "best"), expected.numpy(), atol=1e-6)


def test_an_adapter_that_reads_no_files_searches_no_folder(
    run: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "list_files", lambda *_: pytest.fail("the folder was searched"))
    assert "Waves has no files(paths)" in fails("embed", str(run), "files=.")


def test_samples_that_can_t_be_read_are_left_out_and_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Single ones, and all of a part."""
    monkeypatch.setattr(embedding, "PART_SAMPLES", 8)
    gone = [3, *range(16, 24), 47]
    assert embed(run, f"data.unreadable={json.dumps(gone)}".replace(" ", "")) == 0
    assert column(run / "embed" / "test.parquet", "sample").tolist() == [i for i in range(48) if i not in gone]
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("10 samples were left out as unreadable: sample 16: torn; all are named in ")
    record = json.loads((run / "embed" / "test.parquet.json").read_text())
    assert record["samples"] == 38
    assert record["unreadable_messages"] == sorted(f"sample {i}: torn" for i in gone)


# --------------------------------------------------------------------------------------------------- going on


def test_what_was_killed_goes_on_and_ends_byte_for_byte(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "PART_SAMPLES", 8)
    words = ["pooling=none", "surprise=tokens", "calibrate=20", "data.unreadable=[3,30]"]
    assert embed(run, *words, f"out={tmp_path / 'whole' / 'x.parquet'}") == 0
    write, sizes = embedding.write_part, []

    def killed(file: Path, tables: Any, note: Any) -> None:
        sizes.append(note["samples"])
        if len(sizes) == 4:
            raise KeyboardInterrupt
        write(file, tables, note)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "write_part", killed)
        assert embed(run, *words, f"out={out / 'x.parquet'}") == 130
    assert max(sizes) <= 8, "no more is held than a part"
    assert not (out / "x.parquet").exists()
    done = sorted((out / ".writing_x.parquet").glob("*.parquet"))
    assert len(done) == 3
    before = [path.stat().st_mtime_ns for path in done]
    done[1].write_bytes(done[1].read_bytes()[:100])
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "join", lambda *_: [path.stat().st_mtime_ns for path in done] and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(run, *words, f"out={out / 'x.parquet'}")
    again = [path.stat().st_mtime_ns for path in done]
    assert [a == b for a, b in zip(before, again, strict=True)] == [True, False, True], "what is whole is kept"
    assert embed(run, *words, f"out={out / 'x.parquet'}") == 0
    assert stored(out) == stored(tmp_path / "whole")
    records = [json.loads((tmp_path / name / "x.parquet.json").read_text()) for name in ("killed", "whole")]
    assert records[0] | {"made_with": None} == records[1] | {"made_with": None}
    assert {path.name for path in out.iterdir()} == {"x.parquet", "x.parquet.json"}
    capsys.readouterr()
    before = [(out / "x.parquet").stat().st_mtime_ns]
    assert embed(run, *words, f"out={out / 'x.parquet'}") == 0
    assert capsys.readouterr().out.startswith("This table is finished")
    assert before == [(out / "x.parquet").stat().st_mtime_ns]


def test_npy_of_several_layers_is_guarded_as_one_file_is(
    run: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["layer=1,embedding", "pooling=none", "surprise=tokens", "out=o", "format=npy"]
    assert embed(run, *words) == 0
    before = stored(Path("o"))
    assert {"test.layer_1.npy", "test.embedding.npy", "test.npy.name.txt"} < set(before)
    assert "test.npy" not in before
    said = fails("embed", str(run), "layer=1,2", "out=o", "format=npy")
    assert said.startswith('o/test.npy was made with other settings (layer [1,"embedding"] -> [1,2], pooling none -> ')
    assert said.endswith("or remove the files that o/test.npy.json lists")
    assert stored(Path("o")) == before
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_compute", lambda *_, **__: 1 / 0)
        assert embed(run, *words) == 0
    assert capsys.readouterr().out.startswith("This table is finished")
    Path("o/test.embedding.npy").unlink()
    assert embed(run, *words) == 0
    assert stored(Path("o")) == before
    for path in Path("o").glob("*.npy*"):
        if path.suffix != ".json":
            path.unlink()
    assert embed(run, "layer=1,2", "out=o", "format=npy") == 0
    assert set(stored(Path("o"))) == {f"test.{name}.npy" for name in ("sample", "label", "layer_1", "layer_2")} | {
        "test.npy.name.txt"
    }


@pytest.mark.parametrize("name", ["u.label.npy", "u.layer_1.npy", "u.npy.name.txt", "u.npy.json"])
def test_files_of_others_are_not_overwritten(run: Path, fails: Callable[..., str], name: str) -> None:
    Path(name).write_text("mine")
    assert fails("embed", str(run), "layer=1,2", "out=u.npy").startswith(f"{name} is there and not of `nepa embed`: ")
    assert [path.name for path in Path().iterdir() if path.is_file()] == [name]
    assert Path(name).read_text() == "mine"
    assert not list(Path().glob(".writing*"))


def test_tables_of_one_stem_and_of_a_column_s_name_stay_apart(run: Path, fails: Callable[..., str]) -> None:
    assert embed(run, "out=x.npy") == 0
    assert embed(run, "data.samples=30", "out=x.safetensors") == 0
    more, fewer = (Path(f"x.{kind}.name.txt").read_text().splitlines() for kind in ("npy", "safetensors"))
    assert (len(more), len(fewer)) == (len(np.load("x.npy")), len(load_file("x.safetensors")["final"]))
    assert len(more) > len(fewer)
    assert "x.label.npy is there and not of" in fails("embed", str(run), "out=x.label.npy")


def test_a_table_that_was_killed_while_its_files_were_moved_is_its_own(
    run: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "x.sample.npy":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert embed(run, "out=o/x.npy") == 130
    assert Path("o/x.npy.name.txt").exists()
    assert embed(run, "out=o/x.npy") == 0
    assert len(np.load("o/x.label.npy")) == 48


@pytest.mark.slow
def test_a_table_that_is_killed_without_goodbye_goes_on(run: Path, tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        words = ["embed", str(run), "data.samples=6000", "pooling=none", f"out={out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "recipes", *words], cwd=ROOT, env=environment)

    whole, killed = start(tmp_path / "whole.npy"), start(tmp_path / "o" / "whole.npy")
    deadline = time.monotonic() + 600
    while len(list((tmp_path / "o").glob(".writing_*/*.parquet"))) < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "o" / "whole.npy").exists()
    assert start(tmp_path / "o" / "whole.npy").wait(120) == 0
    assert whole.wait(120) == 0
    found = stored(tmp_path / "o")
    assert {"whole.npy", "whole.sample.npy", "whole.token.npy", "whole.npy.name.txt"} < set(found)
    assert {name: (tmp_path / name).read_bytes() for name in found} == found


@pytest.mark.distributed
def test_two_processes_write_the_table_of_one(run: Path, tmp_path: Path) -> None:
    """Over uneven parts, an unreadable sample, and a part in which nothing can be read."""
    words = ["embed", str(run), "data.samples=2200", "surprise=true", "layer=1,final", "calibrate=100"]
    words += [f"data.unreadable={json.dumps([3, *range(1024, 2048)])}".replace(" ", "")]
    assert main([*words, f"out={tmp_path / 'one' / 'x.npy'}"]) == 0
    done = torchrun("recipes", *words, f"out={tmp_path / 'two' / 'x.npy'}")
    assert done.returncode == 0, done.stderr
    assert len(np.load(tmp_path / "one" / "x.layer_1.npy")) == 2200 - 1025
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert done.stdout.count("rows of 1,175 samples") == 1


# ---------------------------------------------------------------------------------------------------- files


def test_files_and_folders_of_images_are_read_as_the_splits_are(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = made / "pictures" / "val", tmp_path / "x.parquet"
    write_tree(tmp_path, {"torn.png": b"torn", "notes.txt": b"x"})
    assert embed(made / "images", f"files={folder},{tmp_path}", f"out={out}", "surprise=true", "calibrate=8") == 0
    said = capsys.readouterr()
    assert f"1 sample was left out as unreadable: {tmp_path / 'torn.png'}: " in said.out
    assert "1 with the suffix .txt" in said.err
    assert pq.read_schema(out).names == ["name", "sample", "surprise", "surprise_quantile", "final"]
    assert column(out, "name").tolist() == sorted(map(str, folder.rglob("*.png")))
    assert embed(made / "images", f"out={tmp_path / 'split.parquet'}") == 0
    np.testing.assert_allclose(column(out, "final"), column(tmp_path / "split.parquet", "final"), atol=1e-6)


def test_sound_files_are_read_by_name(tmp_path: Path) -> None:
    sounds = write_classes(tmp_path / "sounds")
    data = Audio(source="folder", root=str(sounds), seconds=0.5, sample_rate=8000, bands=16, frames=2)
    config = override(tiny.recipe(), {"data": data, "train.length.steps": 1, "train.batch": 4})
    tiny.training(config, tmp_path / "run", evaluate=lambda _: {})
    (tmp_path / "torn.wav").write_bytes(b"torn")
    words = [f"files={sounds / 'val'},{tmp_path / 'torn.wav'}", f"out={tmp_path / 'files.parquet'}"]
    assert embed(tmp_path / "run", *words) == 0
    assert embed(tmp_path / "run", f"out={tmp_path / 'split.parquet'}") == 0
    files, split = tmp_path / "files.parquet", tmp_path / "split.parquet"
    assert column(files, "name").tolist() == column(split, "name").tolist() == sorted(map(str, sounds.rglob("val/*/*")))
    np.testing.assert_allclose(column(files, "final"), column(split, "final"), atol=1e-6)


# ------------------------------------------------------------------------------------------------- surprise


def test_surprise_is_the_loss_of_each_sample_and_token(made: Path) -> None:
    net = nepa_core.load(made / "run")
    samples = [net.data.dataset("test")[i] for i in range(48)]
    tokens = net.surprise(samples, per_token=True)
    found, out = net.surprise(samples), net.predict(samples)
    assert out.mask is not None
    for i in range(48):
        loss = next_embedding_loss(out.predictions[i : i + 1], out.embeddings[i : i + 1], out.mask[i : i + 1])
        assert float(found[i]) == pytest.approx(float(loss), abs=1e-6)
    lengths = torch.stack([sample["length"] for sample in samples])
    assert torch.equal(~tokens.isnan(), torch.arange(6) < lengths[:, None]), "BOS predicts the first token"
    assert torch.equal(found, tokens.nanmean(1))


def test_tokens_that_nothing_predicts_surprise_nobody(tmp_path: Path) -> None:
    """Without BOS the first one; in canonical order, whatever the order of prediction."""
    config = override(tiny.recipe(), {"model.bos": False, "data": Backwards(), "train.length.steps": 1})
    pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    net = nepa_core.load(tmp_path / "run")
    samples = [net.data.dataset("test")[i] for i in range(8)]
    found, out = net.surprise(samples, per_token=True), net.predict(samples)
    assert found[:, 5].isnan().all()
    for place in range(5):
        loss = next_embedding_loss(out.predictions[:, place : place + 2], out.embeddings[:, place : place + 2])
        assert float(found[:, 4 - place].mean()) == pytest.approx(float(loss), abs=1e-6)


class Backwards(Waves):
    def order(self, tokens: Any) -> Any:
        return torch.arange(tokens.values.shape[1]).flip(0)


class Corrupted(Waves):
    """Every second held-out sample has two of its tokens exchanged: all its numbers are as usual, their order is not.

    Attributes:
        corrupted: do so.
    """

    samples: int = 400
    corrupted: bool = False

    def dataset(self, split: str) -> Any:
        samples: Any = super().dataset(split)
        if split == "train" or not self.corrupted:
            return samples
        return [
            {k: v[[0, 4, 2, 3, 1, 5]] if k == "values" and i % 2 else v for k, v in samples[i].items()}
            for i in range(len(samples))
        ]


@pytest.mark.slow
def test_surprise_flags_corrupted_samples_and_places(tmp_path: Path) -> None:
    config = override(small(Corrupted()), {"train.length.steps": 300, "train.batch": 32, "train.evaluate": 300})
    config = override(config, {"model.dim": 32, "model.depth": 2, "model.heads": 2, "optim.lr": 2e-3})
    pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    words = ["data.corrupted=true", "surprise=true", "calibrate=400"]
    assert embed(tmp_path / "run", *words) == 0
    file = tmp_path / "run" / "embed" / "test.parquet"
    surprise, quantile = column(file, "surprise"), column(file, "surprise_quantile")
    odd = np.arange(400) % 2
    assert roc_auc_score(odd, surprise) > 0.9
    net = nepa_core.load(tmp_path / "run")
    usual = net.surprise(net.data.dataset("train")).numpy()
    np.testing.assert_allclose(quantile, [(usual < each - 1e-7).mean() for each in surprise], atol=0.004)
    assert 0.4 < np.median(quantile[odd == 0]) < 0.7, "those that are as usual lie among the training samples"
    assert (quantile[odd == 1] > 0.95).mean() > 0.5
    assert embed(tmp_path / "run", "surprise=true", "usual=test", f"out={tmp_path / 'even.parquet'}") == 0
    even = column(tmp_path / "even.parquet", "surprise_quantile")
    np.testing.assert_allclose(np.sort(even), np.arange(400) / 400, atol=0.004)
    assert embed(tmp_path / "run", *words[:1], "surprise=tokens", "pooling=none", f"out={tmp_path / 't.parquet'}") == 0
    token, of_token = column(tmp_path / "t.parquet", "token"), column(tmp_path / "t.parquet", "surprise_token")
    row = column(tmp_path / "t.parquet", "sample") % 2 == 1
    rise = [of_token[row & (token == i)].mean() - of_token[~row & (token == i)].mean() for i in range(6)]
    assert abs(rise[0]) < 0.1, "before the exchange nothing is odd"
    assert min(rise[2:]) > 0.3


class Short(Waves):
    """Every fourth sample of both splits is one token, and without BOS nothing predicts it.

    Attributes:
        of_one: the others, too.
    """

    ragged: bool = True
    of_one: bool = False

    def dataset(self, split: str) -> Any:
        samples: Any = super().dataset(split)
        one = torch.tensor(1)
        return [samples[i] | ({"length": one} if self.of_one or i % 4 == 0 else {}) for i in range(len(samples))]


def test_what_nothing_predicts_has_no_quantile_and_counts_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    config = override(tiny.recipe(), {"model.bos": False, "data": Short(), "train.length.steps": 1})
    pretrain(config, Run(tmp_path / "run"), ALONE, show=False)
    out, net = tmp_path / "x.parquet", nepa_core.load(tmp_path / "run")
    assert embed(tmp_path / "run", "surprise=true", f"out={out}") == 0
    surprise, quantile = column(out, "surprise"), column(out, "surprise_quantile")
    silent = np.isnan(surprise)
    assert silent[::4].all()
    assert not silent.all()
    assert np.array_equal(np.isnan(quantile), silent)
    usual = net.surprise(net.data.dataset("train")).numpy()
    known = usual[~np.isnan(usual)]
    assert len(known) < 48
    np.testing.assert_allclose(
        quantile[~silent], [(known < each - 1e-7).mean() for each in surprise[~silent]], atol=1.5 / len(known)
    )
    record = json.loads(Path(f"{out}.json").read_text())["surprise"]
    assert record["samples"] == len(known)
    assert (record["rows_above_0.99"], record["rows_not_predicted"]) == ((quantile > 0.99).sum(), silent.sum())
    assert f"{silent.sum()} more rows have none (NaN): nothing in them is predicted." in capsys.readouterr().out
    said = fails("embed", str(tmp_path / "run"), "surprise=true", "data.of_one=true", "out=y.npy")
    assert said == (
        "surprise_quantile compares with usual=train, where nothing is predicted; calibrate=0 leaves it out"
    )


def test_networks_that_see_what_they_predict_are_not_surprised(run: Path, fails: Callable[..., str]) -> None:
    net = nepa_core.load(run)
    samples = [net.data.dataset("test")[0]]
    with pytest.raises(UserError, match="attends to the tokens that it predicts"):
        dataclasses.replace(net, causal=False).surprise(samples)
    saved = json.loads((run / "config.json").read_text())
    saved["objective"]["shift"] = False
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="was trained to give back what it sees"):
        nepa_core.load(run).surprise(samples)
    assert fails("embed", str(run), "surprise=true").endswith("so nothing surprises it: take a causal run")
    assert main(["finetune", str(run), "train.length.steps=1", "control=false", f"out={run.parent / 'tuned'}"]) == 0
    assert "was trained on labels" in fails("embed", str(run.parent / "tuned"), "surprise=true")
    assert embed(run.parent / "tuned") == 0


# ------------------------------------------------------------------------------------------------ bad input

BAD = {
    "a layer": (["layer=9"], 'layer=9: the network has layers 0 (the "embedding") to 2'),
    "a name of a layer": (["layer=foo"], "layer='foo': the network has layers"),
    "a layer twice": (["layer=1,1"], "layer=1,1 names one twice"),
    "a pooling": (["pooling=max"], "pooling=max: "),
    "a split": (["split=val"], "split=val: "),
    "a format": (["format=csv"], "format=csv: "),
    "a suffix": (["out=x.csv"], "out=x.csv: no table ends in .csv; give .parquet, .npy, .safetensors"),
    "two formats": (["out=x.npy", "format=parquet"], "out=x.npy and format=parquet differ"),
    "no pooling": (["surprise=tokens"], "add pooling=none"),
    "a file": (["files=nowhere.png"], "files=nowhere.png: there is no such file"),
    "an adapter": (["files=."], "Waves has no files(paths)"),
    "a key of training": (["optim.lr=1"], "optim.lr can't be set for nepa embed"),
    "a mistyped key": (["data.sample=1"], "data.samples"),
    "other tokens": (["data.size=5"], "embed.weight [16, 4] instead of [16, 5]"),
    "none readable": ([f"data.unreadable=[{','.join(map(str, range(48)))}]"], "no sample can be read: sample 0: torn"),
    "nothing to compare with": (["files=pictures", "surprise=true"], "; calibrate=0 leaves it out"),
    "a file that is there": (["out=mine.npy"], "mine.npy is there and not of `nepa embed`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(
    made: Path, fails: Callable[..., str], case: str, tmp_path: Path
) -> None:
    words, said = BAD[case]
    shutil.copytree(made / ("images" if "files=pictures" in words else "run"), "run")
    shutil.copytree(made / "pictures", "pictures")
    if "files=pictures" in words:
        words = [*words, "data.root=pictures/train/a"]
    Path("mine.npy").touch()
    before = set(Path().rglob("*"))
    assert said in fails("embed", "run", *words)
    assert set(Path().rglob("*")) == before


def test_other_settings_and_a_full_disk_are_said_in_one_line(
    run: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(run) == 0
    said = fails("embed", str(run), "layer=1")
    assert 'test.parquet was made with other settings (layer ["final"] -> [1]' in said
    assert said.endswith("name another file with out=, or remove it")
    monkeypatch.setattr(embedding, "PART_SAMPLES", 8)
    with largest_file(3600):  # parts fit, the whole does not
        assert "ulimit -f" in fails("embed", str(run), "out=o/x.safetensors")
    assert len(list(Path("o").glob(".writing_*/*.parquet"))) == 6
    assert "was made with other settings (layer" in fails("embed", str(run), "out=o/x.safetensors", "layer=1")
    assert embed(run, "out=o/x.safetensors") == 0
    assert load_file("o/x.safetensors")["final"].shape == (48, 16)
