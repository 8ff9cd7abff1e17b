"""Events: tokens, windows, splits, what is measured on training events, and the law of the process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from modalities.data.event_process import KINDS, sequences
from modalities.events import Events
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.contract import check_modality
from nepa_core.tokens import Tokens


def table(path: Path, *, entities: int = 30, each: int = 9, kinds: str = "abc", more: str = "") -> Path:
    """Events 10 s apart on average, with a number that is missing now and then, and a label of the entity."""
    draw = np.random.default_rng(0)
    rows = ["entity,time,kind,x,label"]
    for entity in range(entities):
        for time in draw.exponential(10, each).cumsum().round(3):
            number = "" if draw.random() < 0.2 else f"{draw.normal(5, 2):.3f}"
            rows.append(f"e{entity},{time},{draw.choice(list(kinds))},{number},{'uv'[entity % 2]}")
    path.write_text("\n".join(rows) + "\n" + more)
    return path


def adapter(path: Path, **changes: object) -> Events:
    return Events.model_validate({"source": "file", "root": str(path), "events": 4} | changes)


def read(data: Events, split: str = "test") -> Tokens:
    windows = data.dataset(split)
    return data.read(default_collate([windows[i] for i in range(len(windows))]))


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    check_modality(adapter(table(tmp_path / "x.csv")))


def test_a_token_is_kind_gap_and_number_or_that_it_is_missing(tmp_path: Path) -> None:
    data = adapter(table(tmp_path / "x.csv"))
    tokens = read(data, "train")
    assert tokens.values.shape[1:] == (4, 3 + 1 + 2)
    real = tokens.values[tokens.real]
    assert (real[:, :3].sum(1) == 1).all()
    assert abs(float(real[:, 3].median())) < 0.3  # the usual gap is 0
    assert 0.6 < float(real[:, 5].mean()) < 0.95
    known = real[real[:, 5] == 1, 4]
    assert (abs(float(known.mean())) < 0.05, abs(float(known.std()) - 1) < 0.05) == (True, True)
    assert (real[real[:, 5] == 0, 4] == 0).all()
    assert data.classes() == ("u", "v")


def test_coordinates_are_times_and_what_tokens_say_of_them(tmp_path: Path) -> None:
    data = adapter(table(tmp_path / "x.csv"), unit=20.0)
    tokens = read(data)
    windows = data.dataset("test")
    times = windows.time[windows.first[0] : windows.first[0] + 4] - windows.time[windows.first[0]]
    torch.testing.assert_close(tokens.coords[0, :, 0].double(), times / 20, rtol=0, atol=1e-5)
    real = tokens.real[..., None]
    torch.testing.assert_close(data.placed(tokens) * real, tokens.coords * real, rtol=1e-4, atol=1e-3)


def test_windows_by_count_and_by_time(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv")
    assert adapter(path).dataset("train").count.unique().tolist() == [4]  # of 9, two windows and an event alone
    windows = adapter(path, events=9, span=25.0).dataset("train")
    lasts = [
        float(windows.time[int(f) : int(f + c)].diff().sum()) for f, c in zip(windows.first, windows.count, strict=True)
    ]
    assert max(lasts) < 25.0
    spans = windows.spans()
    assert (spans.end - spans.first == windows.count).all()
    assert len(spans.cluster.unique()) == len(spans.track.unique()) > 20


def test_entities_or_the_end_of_time_are_held_out(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv")
    train, test = (adapter(path).dataset(split) for split in ("train", "test"))
    assert not set(train.entity.tolist()) & set(test.entity.tolist())
    train, test = (adapter(path, divide="time").dataset(split) for split in ("train", "test"))
    assert float(train.time.max()) < float(test.time.min())


def test_what_is_odd_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "e0,900,new,1,u\ne1,901,new,1,v\nlone,5,a,1,u\n"
    path = table(tmp_path / "x.csv", more=more)
    data = adapter(path, divide="time", held_out=0.02)
    tokens = read(data)
    said = capsys.readouterr().err
    assert "2 events of kinds that training has not, read as none: new (2)" in said
    assert (tokens.values[..., :3].sum(-1) == 0).any()
    adapter(path, events=9).dataset("train")
    adapter(path, events=9).dataset("test")
    assert "left out, with a single event: 1 entity (lone)" in capsys.readouterr().err


def test_one_entity_is_divided_by_time_alone(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", entities=1, each=100)
    with pytest.raises(UserError, match=r"one entity.*data.divide=time"):
        adapter(path).dataset("train")
    windows = adapter(path, divide="time").dataset("train")
    assert windows.spans().chained
    assert len(windows) == 20
    with pytest.raises(UserError, match="no entity has two events in a window"):
        adapter(path, divide="time", span=1e-6).dataset("train")


def test_other_data_are_read_by_the_measures_of_the_run(tmp_path: Path) -> None:
    """The same kind has the same number, although the other table lacks a kind and has longer gaps."""
    trained, other = adapter(table(tmp_path / "x.csv")), adapter(table(tmp_path / "y.csv", kinds="bc", each=5))
    alone, by = read(other), read(other.as_trained_on(trained))
    assert (alone.values.shape[-1], by.values.shape[-1]) == (5, 6)
    torch.testing.assert_close(by.values[..., 1:3], alone.values[..., :2])
    assert trained.as_trained_on(trained) is trained
    assert other.as_trained_on(trained).as_trained_on(trained).measured_on == str(tmp_path / "x.csv")


def test_files_by_name_are_the_first_windows_of_the_first_entities(tmp_path: Path) -> None:
    data = adapter(table(tmp_path / "x.csv"))
    (tmp_path / "one.csv").write_text("time,kind,x\n0,a,1\n10,c,\n")
    (tmp_path / "short.csv").write_text("time,kind,x\n0,a,1\n")
    files = data.files([str(tmp_path / name) for name in ("one.csv", "short.csv", "x.csv")])
    assert len(files) == 3
    tokens = data.read(default_collate([files[0], files[2]]))
    assert tokens.real.sum(1).tolist() == [2, 4]
    assert tokens.values[0, :2, :3].argmax(1).tolist() == [0, 2]
    with pytest.raises(UnreadableSample, match="fewer than two events"):
        files[1]


def test_decoded_curves_are_kind_time_and_number(tmp_path: Path) -> None:
    data = adapter(table(tmp_path / "x.csv"))
    windows, tokens = data.dataset("test"), read(data)
    kind, curves = data.decode(tokens)[:2]
    rows = slice(int(windows.first[0]), int(windows.first[0]) + 4)
    assert kind == "curves"
    torch.testing.assert_close(curves[0, :, 0], windows.kind[rows].float())
    torch.testing.assert_close(
        curves[0, :, 1].double(), windows.time[rows] - windows.time[rows.start], rtol=1e-3, atol=1e-2
    )
    assert torch.equal(curves[0, :, 2].isnan(), windows.numbers[rows, 0].isnan())


def test_readings_name_the_kind_the_gap_and_the_number(tmp_path: Path) -> None:
    data = adapter(table(tmp_path / "x.csv"))
    values = torch.tensor([[[0.2, 0.5, 0.3, -0.1, 0.4, 0.8], [1.0, 0, 0, 2.0, 0.0, 0.0]]])
    found = data.readings(values)
    assert found["kind"].tolist() == [[1, 0]]
    torch.testing.assert_close(found["log gap"], torch.tensor([[-0.1, 2.0]]))
    torch.testing.assert_close(found["x"], torch.tensor([[0.5, torch.nan]]), equal_nan=True)


# ------------------------------------------------------------------------------------------------ the process


@pytest.fixture(scope="module")
def process() -> tuple[Events, Tokens]:
    data = Events(source="process", events=32)
    return data, read(data, "train")


def test_the_process_is_the_same_in_every_run_and_each_kind_as_frequent_either_way() -> None:
    found = sequences("train")
    assert found.kinds[0, :6].tolist() == sequences.__wrapped__("train").kinds[0, :6].tolist()
    shares = [
        found.kinds[found.labels == label].flatten().bincount() / (found.labels == label).sum() / 32 for label in (0, 1)
    ]
    assert torch.stack(shares).sub(1 / KINDS).abs().max() < 0.01


def test_the_law_has_the_moments_of_what_comes(process: tuple[Events, Tokens]) -> None:
    """Residuals have mean 0 at every place, and what the covariance says, given the past."""
    data, tokens = process
    law = data.known_law(tokens)
    assert law is not None
    off = ((tokens.values - law.mean) * tokens.real[..., None]).double()
    count = tokens.real.sum()
    assert off.sum((0, 1)).div(count).abs().max() < 0.01
    said = (law.covariance * tokens.real[..., None, None]).sum((0, 1)) / count
    torch.testing.assert_close((off.mT @ off).sum(0) / count, said, rtol=0, atol=0.02)
    assert law.covariance[tokens.real].diagonal(dim1=-2, dim2=-1).min() > 0


def test_the_law_draws_what_it_says(process: tuple[Events, Tokens]) -> None:
    data, tokens = process
    law = data.known_law(tokens.rows(torch.arange(40)))
    assert law is not None
    drawn = law.draw(2000, torch.Generator().manual_seed(0)).double()
    assert (drawn.mean(0) - law.mean).abs().max() < 0.12
    torch.testing.assert_close(drawn.var(0), law.covariance.diagonal(dim1=-2, dim2=-1), rtol=0.3, atol=0.05)


def test_the_law_looks_at_no_later_event(process: tuple[Events, Tokens]) -> None:
    data, tokens = process
    some = tokens.rows(torch.arange(8))
    changed = some.values.clone()
    changed[:, 10:] = changed.flip(0)[:, 10:]
    one, other = (data.known_law(replace(some, values=values)) for values in (some.values, changed))
    assert one is not None
    assert other is not None
    assert torch.equal(one.mean[:, :11], other.mean[:, :11])
    assert not torch.equal(one.mean[:, 11:], other.mean[:, 11:])
