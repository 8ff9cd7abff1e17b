"""Series: reading, windows, splits, masks, and the source whose optimum is known."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch import Tensor, nn

from modalities.data.series import read_labelled, read_table
from modalities.timeseries import TimeSeries, Windows, _autoregression, _series, _transition, standardised
from nepa_core.basics import UserError
from nepa_core.contract import check_modality
from nepa_core.runtime.config import override, parse_assignments, validated
from nepa_core.tokens import Tokens
from recipes.networks.goals import find_goal
from recipes.report import card
from recipes.timeseries import demo
from recipes.training.judging import best_possible
from recipes.training.starting import build_model

ROWS = 120


def write_csv(folder: Path, values: np.ndarray, *, time: bool = True) -> str:
    """Hourly rows of columns a, b, ...; NaN as an empty cell."""
    stamps = np.datetime64("2020-01-01T00:00:00") + np.arange(len(values)) * np.timedelta64(1, "h")
    names = "abcdefg"[: values.shape[1]]
    lines = [",".join((["date"] if time else []) + list(names))]
    for stamp, row in zip(stamps, values, strict=True):
        cells = ["" if math.isnan(value) else repr(float(value)) for value in row]
        lines.append(",".join(([str(stamp).replace("T", " ")] if time else []) + cells))
    path = folder / "series.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def walk(rows: int = ROWS, columns: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns)).cumsum(0)


def adapter(root: str, **settings: Any) -> TimeSeries:
    given: dict[str, Any] = {"window": 12, "patch": 3, "channels": "mixing", "parts": (60, 20, 40)}
    return validated(TimeSeries, {"source": "file", "root": root, **given, **settings}, "data.")


def test_csv_and_parquet_read_alike_and_the_time_column_is_found(tmp_path: Path) -> None:
    values = walk()
    values[3, 1] = math.nan
    csv = write_csv(tmp_path, values)
    parquet = str(tmp_path / "series.parquet")
    pa.parquet.write_table(pa.csv.read_csv(csv), parquet)
    for path in (csv, parquet):
        table = read_table(path)
        assert table.columns == ("a", "b")
        np.testing.assert_array_equal(table.values, values)
    assert read_table(csv, columns=("b",)).columns == ("b",)
    assert read_table(write_csv(tmp_path, values, time=False)).columns == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date\n2020-01-01\n", "no numeric column"),
        ("date,a,b\n2020-01-01,x,y\n2020-01-02,z,1\n", "no numeric column among a, b"),
        ("date,a,b\n2020-01-01,x,1\n", "row 2 of column 'a' is 'x', which is no number"),
        ("date,a\n", "no rows below its head"),
        ("date,a\n2020-01-01,1\n2020-01-02,x\n", "row 3 of column 'a' is 'x', which is no number"),
        ("date,a\n2020-01-01,1\n2020-01-02,inf\n", "row 3 of column 'a' is infinite"),
        ("date,a\n2020-01-01,1\n2020-01-02,1e39\n", "is infinite, or beyond the 3.4e38 that float32 holds"),
        ("date,a\n2020-01-02,1\n2020-01-01,2\n", "row 3 (2020-01-01) is earlier than the row above"),
        ("date,a\n2020-01-02,1\n2020-01-02,2\n", "row 3 (2020-01-02) repeats the time stamp"),
        ("date,a\n2020-01-02,1\n,2\n", "row 3 has no time stamp in column 'date'"),
        ("when,a\nfoo,1\nbar,2\n", "column 'when' holds text such as 'foo'"),
        ("date,a\n2020-01-02,1,2\n", "Expected 2 columns, got 3"),
        ("date,a,b,a\n2020-01-02,1,2,3\n", "2 columns are called 'a'; rename them"),
        ("timestamp,a\n1600003600,1\n1600000000,2\n", "row 3 (1600000000) is earlier than the row above"),
        ("DS,station,a\n2,x,1\n3,x,2\n", "row 2 of column 'station' is 'x', which is no number"),
        ("date,date,a\n2020-01-02,2020-01-02,3\n", "2 columns are called 'date'; rename them"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line_with_file_and_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_table(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_series_is_not_held_twice_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("a,b,c\n" + "0.125,0.25,0.5\n" * 200_000)
    read_table(write_csv(tmp_path, walk()))  # what is imported at the first call is not counted
    tracemalloc.start()
    values = read_table(str(path)).values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.shape == (200_000, 3)
    assert (values == (0.125, 0.25, 0.5)).all()
    assert peak < 1.4 * values.nbytes


@pytest.mark.parametrize(
    ("head", "first"),
    [
        ("", lambda row: str(row)),
        ("epoch", lambda row: str(1_400_000_000 + 60 * row)),
        ("t", lambda row: f"{row / 2:.1f}"),
        ("date", lambda row: str(np.datetime64("2015-01-01T00:00") + row).replace("T", " ")),
        pytest.param(
            "date",
            lambda row: datetime.fromordinal(735_000 + row // 1440).strftime(
                f"%d.%m.%Y {row // 60 % 24:02}:{row % 60:02}"
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["index", "epoch", "clock", "ISO", "German"],
)
def test_what_is_worked_out_of_a_column_weighs_less_than_the_column(
    tmp_path: Path, head: str, first: Callable[[int], str]
) -> None:
    rows = 400_000
    (tmp_path / "long.csv").write_text(f"{head},a\n" + "".join(f"{first(row)},{row % 7}\n" for row in range(rows)))
    (tmp_path / "short.csv").write_text(f"{head},a\n" + "".join(f"{first(row)},{row % 7}\n" for row in range(99)))
    read_table(str(tmp_path / "short.csv"))
    tracemalloc.start()
    table = read_table(str(tmp_path / "long.csv"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (table.columns, table.values.shape) == (("a",), (rows, 1))
    assert peak < 3.7 * table.values.nbytes, "the values, the column, its time stamps, and less than a column more"


@pytest.mark.parametrize("form", ["%d.%m.%Y %H:%M", "%Y-%m-%d %H:%M", "%Y/%m/%d %H:%M"])
@pytest.mark.parametrize("bad", [3, 30_000])
def test_the_cell_that_is_no_time_stamp_is_named_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, bad: int
) -> None:
    """And not a sound one before it, of the form of all others."""
    monkeypatch.setattr("modalities.data.series.BLOCK", 1 << 14)
    times = [
        datetime.fromordinal(735_000 + row // 1440).replace(hour=row // 60 % 24, minute=row % 60)
        for row in range(40_000)
    ]
    texts = [time.strftime(form) for time in times]
    texts[bad] = "soon"
    pa.parquet.write_table(
        pa.table({"date": texts, "x": np.arange(40_000) % 7.0}), tmp_path / "x.parquet", row_group_size=9000
    )
    with pytest.raises(UserError, match=f"column 'date' holds 'soon' in row {bad + 1}, neither"):
        read_table(str(tmp_path / "x.parquet"))
    (tmp_path / "x.csv").write_text("date,x\n" + "".join(f"{text},{row % 7}\n" for row, text in enumerate(texts)))
    with pytest.raises(UserError, match=f"'soon' in row {bad + 2}, neither|Row #{bad + 2}: .*invalid value 'soon'"):
        read_table(str(tmp_path / "x.csv"))


def test_time_stamps_in_text_are_read_from_parquet(tmp_path: Path) -> None:
    hours = [str(np.datetime64("2020-02-28T20:00") + np.timedelta64(hour, "h")) for hour in (0, 1, 2, 30, 31)]
    for texts in (hours, [f" {hour.replace('T', ' ')}:00" for hour in hours], [f"{hour}+02:00" for hour in hours]):
        for column in (pa.array(texts), pa.array(texts).dictionary_encode()):
            pa.parquet.write_table(pa.table({"when": column, "x": [1.0, 2, 3, 4, 5]}), tmp_path / "x.parquet")
            table = read_table(str(tmp_path / "x.parquet"))
            assert (table.columns, table.breaks) == (("x",), (3,))
    pa.parquet.write_table(pa.table({"when": [*hours[:2], "soon"], "x": [1.0, 2, 3]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="column 'when' holds 'soon' in row 3, neither a number nor"):
        read_table(str(tmp_path / "x.parquet"), time="when")


def test_numbers_are_time_stamps_by_their_name_and_a_channel_where_they_are_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "unix.csv"
    path.write_text("Time,x\n1600000000,1\n1600003600,2\n")
    assert read_table(str(path)).columns == ("x",)
    assert read_table(str(path), columns=("Time", "x")).columns == ("Time", "x")
    path.write_text("date,time,x\n2020-01-01,23,1\n2020-01-02,0,2\n")
    assert read_table(str(path)).columns == ("time", "x"), "dates tell the time, the hour is a channel"
    pa.parquet.write_table(pa.table({"time": [1.0, math.nan], "x": [1.0, 2.0]}), tmp_path / "unix.parquet")
    with pytest.raises(UserError, match="row 2 has no time stamp in column 'time'"):
        read_table(str(tmp_path / "unix.parquet"))


def test_columns_of_one_name_do_no_harm_where_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    path.write_text("date,a,b,a\n2020-01-02,1,2,3\n")
    assert read_table(str(path), columns=("b",)).values.tolist() == [[2]]


def test_time_stamps_are_compared_over_the_borders_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalities.data.series.BLOCK", 64)
    path = tmp_path / "long.csv"
    path.write_text("t,a\n" + "".join(f"{i},{i}.5\n" for i in [*range(1, 50), 49]))
    assert len(read_table(str(path), columns=("a",)).values) == 50, "without time stamps there is nothing to compare"
    with pytest.raises(UserError, match="row 51 \\(49\\) repeats the time stamp"):
        read_table(str(path), time="t")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ("a", "z")}, "no column 'z' (data.columns); it has date, a, b"),
        ({"time": "z"}, "no column 'z' (data.time)"),
        ({"window": 30, "patch": 3}, "data.window=30 is longer than the 20 rows of the test part"),
        ({"patch": 24}, "data.patch=24 is longer than data.window=12"),
        ({"patch": 5}, "data.patch=5 does not divide data.window=12; 10 and 15 fit"),
        ({"patch": 12}, "holds one token"),
        ({"parts": (100, 20, 40)}, "has 120 rows, data.parts=(100, 20, 40) want 160"),
        ({"parts": (0.8, 0.2, 0.2)}, "sum to more than 1"),
        ({"root": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"columns": []}, "data.columns=[]: name at least one"),
        ({"columns": ["a", "a"]}, "'a' stands twice in data.columns"),
        ({"columns": ["a", "b"], "time": "b"}, "'b' stands twice in data.columns (and data.time)"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    root = write_csv(tmp_path, walk())
    with pytest.raises(UserError) as caught:
        adapter(**{"root": root, "parts": (80, 20, 20), **settings}).dataset("test")
    assert message in str(caught.value)


@pytest.mark.parametrize("word", ["[a,b]", "a,b", '["a","b"]'])
def test_columns_are_named_with_and_without_brackets_and_quotes(tmp_path: Path, word: str) -> None:
    root = write_csv(tmp_path, walk(columns=3))
    given = parse_assignments([f"data.columns={word}"])
    assert adapter(root, columns=given["data.columns"]).channel_count() == 2
    assert adapter(root, columns="b").channel_count() == 1


def test_splits_do_not_reach_over_borders_and_statistics_are_those_of_training(tmp_path: Path) -> None:
    values = np.arange(ROWS, dtype=float)[:, None].repeat(2, 1)
    data = adapter(write_csv(tmp_path, values))
    mean, std = values[:60].mean(), values[:60].std()
    for split, (start, end) in {"train": (0, 60), "validation": (60, 80), "test": (80, 120)}.items():
        windows = data.dataset(split)
        assert isinstance(windows, Windows)
        rows = torch.cat([windows[i]["series"] for i in range(len(windows))]) * std + mean
        assert (round(float(rows.min())), round(float(rows.max())) + 1) == (start, end)
        assert len(windows) == end - start - 12 + 1
    for split, (start, end) in {"train": (12, 60), "validation": (60, 80), "test": (80, 120)}.items():
        futures = data.forecasts(split, 5)
        rows = torch.cat([futures[i]["future"] for i in range(len(futures))]) * std + mean
        assert (round(float(rows.min())), round(float(rows.max())) + 1) == (start, end)
        assert len(futures) == end - start - 5 + 1, "every window is scored"
        sample = futures[0]
        assert float(sample["future"][0, 0] - sample["series"][-1, 0]) == pytest.approx(1 / std, rel=1e-3)


@pytest.mark.parametrize("kind", ["csv", "parquet", "labelled"])
def test_neither_a_tiny_unit_nor_a_large_offset_costs_the_signal(tmp_path: Path, kind: str) -> None:
    wave = np.sin(np.arange(float(ROWS)))
    columns = np.stack([wave, 1e-12 * wave, 1e9 + 10 * wave, 1e8 + np.sign(wave)], 1)
    if kind == "labelled":
        for split in ("TRAIN", "TEST"):
            rows = (
                ":".join(",".join(map(repr, part.tolist())) for part in each.T) for each in columns.reshape(4, 30, 4)
            )
            (tmp_path / f"Made_{split}.ts").write_text("@data\n" + "\n".join(f"{row}:up" for row in rows) + "\n")
        samples = adapter(str(tmp_path), source="labelled", window=30).dataset("train")
        values = torch.cat([samples[i]["series"] for i in range(4)])
    else:
        root = write_csv(tmp_path, columns)
        if kind == "parquet":
            pa.parquet.write_table(pa.csv.read_csv(root), tmp_path / "series.parquet")
            root = str(tmp_path / "series.parquet")
        series = _series(adapter(root, parts=(ROWS - 40, 20, 20)))
        values = series.values[: ROWS - 40]
    assert values.dtype == torch.float32
    assert torch.allclose(values.mean(0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(values.std(0, correction=0), torch.ones(4), atol=1e-6)
    for place in (1, 2):
        assert torch.allclose(values[:, place], values[:, 0], atol=1e-6)
    assert len(values[:, 3].round(decimals=3).unique()) <= 3, "1e8 - 1, 1e8 and 1e8 + 1"


def test_standardising_takes_the_place_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalities.timeseries._ROWS", 7)
    for rows in (30, 31):
        values, mean, std = 5 + walk(rows, 3), np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
        wanted = ((values - mean) / std).astype(np.float32)
        found = standardised(values, mean, std)
        np.testing.assert_array_equal(found, wanted)
        assert np.shares_memory(found, values), "a series is not held twice"
        assert values.nbytes <= wanted.nbytes + 12, "half of the memory is given back"


@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e4])
def test_windows_are_flat_by_their_own_rounding_alone(tmp_path: Path, unit: float) -> None:
    """However little a window varies beside the series, its own units are its own."""
    data = adapter(write_csv(tmp_path, walk()), normalise="window")
    wave = unit * torch.sin(torch.arange(12.0))[None, :, None]
    flat, zero = torch.full_like(wave, 0.3), torch.zeros_like(wave)
    batch = {"series": torch.cat((wave, flat, zero))}
    mean, std = data.scale(batch)
    assert float(std[0]) == pytest.approx(float(wave.std(correction=0)), rel=1e-3)
    assert 0 < float(std[1]) < 1e-6
    tokens = data.tokenize(batch).values
    assert tokens.isfinite().all()
    assert float(tokens[0].std(correction=0)) == pytest.approx(1, rel=1e-3)
    assert float(tokens[1:].abs().max()) < 0.1
    assert torch.allclose(tokens.view(3, 12, 1) * std + mean, batch["series"], atol=1e-6 * unit)


def test_shares_and_rows_give_the_same_borders(tmp_path: Path) -> None:
    root = write_csv(tmp_path, walk())
    assert _series(adapter(root, parts=(0.5, 1 / 6, 1 / 3))).borders == _series(adapter(root)).borders


def test_independent_channels_are_samples_and_mixing_puts_them_in_one_token(tmp_path: Path) -> None:
    root = write_csv(tmp_path, walk())
    mixing, alone = adapter(root), adapter(root, channels="independent")
    together, single = mixing.dataset("train"), alone.dataset("train")
    assert isinstance(together, Windows)
    assert isinstance(single, Windows)
    assert len(single) == 2 * len(together)
    assert torch.equal(together[7]["series"][:, 1:], single[15]["series"])
    assert mixing.tokenize(together.__getitems__([0])).values.shape == (1, 4, 6)
    assert alone.tokenize(single.__getitems__([0])).values.shape == (1, 4, 3)


def test_a_token_with_a_missing_value_is_masked_and_windows_of_nothing_left_out(tmp_path: Path) -> None:
    values = walk()
    values[4, 0] = math.nan
    values[20:45, 0] = math.nan
    root = write_csv(tmp_path, values)
    data = adapter(root)
    windows = data.dataset("train")
    assert isinstance(windows, Windows)
    assert data.tokenize(windows.__getitems__([0])).mask.tolist() == [[True, False, True, True]]  # type: ignore[union-attr]
    assert windows.kept is not None
    assert not any(15 <= start <= 38 for start in windows.kept.tolist())
    alone = adapter(root, channels="independent").dataset("train")
    assert isinstance(alone, Windows)
    assert alone.kept is not None
    assert int((alone.kept % 2 == 1).sum()) == 49, "a gap in one channel costs the other nothing"
    futures = data.forecasts("train", 4)
    assert all(futures[i]["future"].isfinite().all() for i in range(len(futures)))


def test_window_normalisation_is_undone_by_its_scale(tmp_path: Path) -> None:
    data = adapter(write_csv(tmp_path, walk()), normalise="window")
    batch = data.forecasts("train", 4).__getitems__([0, 5])
    mean, std = data.scale(batch)
    values = data.tokenize(batch).values.view(2, 12, 2)
    assert torch.allclose(values.mean(1), torch.zeros(2, 2), atol=1e-4)
    assert torch.allclose(values * std + mean, batch["series"], atol=1e-4)


@pytest.mark.parametrize("patch_order", ["raster", "reverse", "random_per_sample"])
def test_curves_come_back_from_their_tokens(tmp_path: Path, patch_order: str) -> None:
    """In units of the series, or of each window where these are normalised; with gaps where tokens are masked."""
    values = walk()
    values[30] = math.nan
    data = adapter(write_csv(tmp_path, values), patch_order=patch_order)
    batch = data.dataset("train").__getitems__([20, 0])  # type: ignore[attr-defined]
    kind, curves, _ = data.decode(data.read(batch))
    mask = data.tokenize(batch).mask
    assert (kind, mask is not None and not mask.all()) == ("curves", True)
    real = mask.repeat_interleave(data.patch, 1)
    assert torch.equal(curves[real], batch["series"][real])
    assert curves[~real].isnan().all()
    own = data.model_copy(update={"normalise": "window"})
    mean, std = own.scale(batch)
    back = own.decode(own.read(batch)).data * std + mean
    torch.testing.assert_close(back[real], batch["series"][real])


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_order": "reverse"},
        {"channels": "independent", "patch_order": "random_per_sample"},
        {"normalise": "window"},
    ],
    ids=str,
)
@pytest.mark.parametrize("gaps", [False, True])
def test_the_contract_holds(tmp_path: Path, settings: dict[str, Any], gaps: bool) -> None:
    values = walk()
    if gaps:
        values[np.random.default_rng(1).random(values.shape) < 0.05] = math.nan
    check_modality(adapter(write_csv(tmp_path, values), **settings))


def write_labelled(folder: Path, kind: str) -> str:
    """Two classes, two dimensions in .ts; the second series is shorter and has a gap."""
    for split in ("TRAIN", "TEST"):
        if kind == "tsv":
            text = "2.0\t" + "\t".join("123456789") + "\n-1\t1\t2\tNaN\t4\t5\t6\t7\t8\tNaN\n"
        else:
            text = "# made up\n@problemName x\n@data\n1,2,3,4,5,6,7,8,9:9,8,7,6,5,4,3,2,1:up\n"
            text += "1,2,?,4,5,6,7,8:1,2,3,4,5,6,7,8:down\n"
        (folder / f"Made_{split}.{kind}").write_text(text)
    return str(folder)


@pytest.mark.parametrize(("kind", "classes"), [("tsv", ("-1", "2")), ("ts", ("down", "up"))])
def test_labelled_series_have_classes_and_masks(tmp_path: Path, kind: str, classes: tuple[str, ...]) -> None:
    data = adapter(write_labelled(tmp_path, kind), source="labelled", window=10, patch=2)
    batch = data.dataset("test").__getitems__([0, 1])  # type: ignore[attr-defined]
    assert data.classes() == classes
    assert batch["label"].tolist() == [1, 0]
    mask = data.tokenize(batch).mask
    assert mask is not None
    assert mask.tolist() == [[True, True, True, True, False], [True, False, True, True, False]]
    check_modality(data)


@pytest.mark.parametrize("kind", ["ts", "tsv"])
def test_numbers_that_are_no_classes_are_regressed_on(tmp_path: Path, kind: str) -> None:
    head = "@targetLabel true\n@data\n" if kind == "ts" else ""
    for split, numbers in (("TRAIN", (1, 0.5, 2)), ("TEST", (0.25, 3, 1))):
        rows = [f"1,2,3,4:{y}" if kind == "ts" else f"{y}\t1\t2\t3\t4" for y in numbers]
        (tmp_path / f"Made_{split}.{kind}").write_text(head + "\n".join(rows) + "\n")
    data = adapter(str(tmp_path), source="labelled", window=4, patch=2)
    assert data.classes() is None
    assert find_goal(data).outputs == 1
    labels = data.dataset("test").__getitems__([0, 1, 2])["label"]  # type: ignore[attr-defined]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [0.25, 3, 1]
    check_modality(data)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("1\t2\t3\n2\t3\t4\n", "1\t2\t3\n7\t2\t3\n", "no series of the train file has the class 7"),
        ("1\t2\t3\n0.5\t3\t4\n", "1\t2\t3\n", "of one file are classes, those of the other numbers"),
    ],
)
def test_files_whose_labels_do_not_fit_together_are_refused_at_opening(
    tmp_path: Path, train: str, test: str, message: str
) -> None:
    (tmp_path / "Made_TRAIN.tsv").write_text(train)
    (tmp_path / "Made_TEST.tsv").write_text(test)
    data = adapter(str(tmp_path), source="labelled", window=2, patch=1)
    for opened in (data.classes, lambda: data.dataset("train")):
        with pytest.raises(UserError, match=message):
            opened()


def test_a_class_where_a_number_is_to_be_predicted_is_named_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "Made_TRAIN.ts").write_text("@targetLabel true\n@data\n1,2:0.5\n1,2:up\n")
    with pytest.raises(UserError, match="row 4 is labelled 'up', which is no finite number"):
        read_labelled(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t2\tx\n", "row 1: could not convert string to float"),
        ("1\t2\tinf\n", "infinite"),
        ("1\t2\t1e39\n", "row 1 holds a value that is infinite, or beyond the 3.4e38 that float32 holds"),
        ("1\t2\t3\n\t2\t3\n", "row 2 has no label beside its values"),
        ("", "no series in it"),
    ],
)
def test_what_is_wrong_with_labelled_series_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "Made_TRAIN.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_labelled(str(tmp_path), "train")
    with pytest.raises(UserError, match="holds 0 files"):
        read_labelled(str(tmp_path), "test")


@pytest.mark.parametrize("row", ["1,2,3", "1,2,3:4,5,6", "1,2,3:"])
def test_a_ts_row_without_a_label_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "Made_TRAIN.ts").write_text(f"@data\n{row}\n")
    with pytest.raises(UserError, match="row 2 has no label beside its values"):
        read_labelled(str(tmp_path), "train")


def test_a_channel_without_a_value_is_named(tmp_path: Path) -> None:
    values = walk()
    values[:60, 1] = math.nan
    with pytest.raises(UserError, match="column 'b' has no value in the training rows"):
        adapter(write_csv(tmp_path, values)).dataset("train")
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"Made_{split}.ts").write_text("@data\n1,2,3,4:?,?,?,?:up\n1,2,3,4:?,?,?,?:down\n")
    with pytest.raises(UserError, match="dimension 2 has no value in the training rows"):
        adapter(str(tmp_path), source="labelled", window=4, patch=2).dataset("train")


def test_a_labelled_series_longer_than_the_window_says_what_fits(tmp_path: Path) -> None:
    data = adapter(write_labelled(tmp_path, "tsv"), source="labelled", window=8, patch=2)
    with pytest.raises(UserError, match=r"9 steps; set data.window=10 or more"):
        data.dataset("train")


# ------------------------------------------------------------------------------------------ the known optimum


def _achieved(data: TimeSeries, embed: nn.Module, direction: Callable[[Tensor], Tensor]) -> float:
    """Held-out loss of predicting `direction` (last value [S, C] z-scored -> [S, D]) for every token but the first."""
    windows = data.dataset("test")
    assert isinstance(windows, Windows)
    batch = windows.__getitems__(list(range(0, len(windows), 4)))
    tokens = data.tokenize(batch).values
    targets = embed(tokens)[:, 1:]
    last = batch["series"].unflatten(1, (-1, data.patch))[:, :-1, -1]  # type: ignore[no-untyped-call]
    guesses = direction(last.flatten(0, 1)).view_as(targets)
    return -float(torch.cosine_similarity(guesses, targets, dim=-1).mean())


@torch.no_grad()
def test_the_true_conditional_mean_direction_reaches_the_optimum_and_nothing_else_does() -> None:
    data = demo().data
    assert isinstance(data, TimeSeries)
    data = data.model_copy(update={"stride": 64})
    torch.manual_seed(0)
    embed, series = data.embedder(16), _series(data)
    draw = torch.Generator().manual_seed(5)

    def mean_direction(last: Tensor) -> Tensor:
        start = (last * series.std + series.mean).repeat_interleave(200, 0)
        futures = _autoregression(data.patch, len(start), draw, start=start)
        tokens = ((futures - series.mean) / series.std).flatten(1)
        return nn.functional.normalize(embed(tokens), dim=-1).view(len(last), 200, -1).mean(1)

    def of_mean_token(last: Tensor) -> Tensor:
        state, steps = last * series.std + series.mean, []
        for _ in range(data.patch):
            state = state @ _transition().T
            steps.append(state)
        mean: Tensor = embed(((torch.stack(steps, 1) - series.mean) / series.std).flatten(1))
        return mean

    optimum = data.known_optimum(embed)
    assert optimum is not None
    best = _achieved(data, embed, mean_direction)
    first = 1 / 16  # of the tokens has no past, and is as likely one way as the other
    assert (1 - first) * best == pytest.approx(optimum, abs=0.01)
    assert _achieved(data, embed, of_mean_token) > best - 0.005
    assert _achieved(data, embed, lambda last: embed(last.repeat(1, data.patch))) > best + 0.05


def test_the_optimum_is_known_only_where_it_is() -> None:
    recipe = demo()
    embed = recipe.data.embedder(8)
    for change in ({"data.patch_order": "reverse"}, {"data.channels": "independent"}, {"data.normalise": "window"}):
        data = override(recipe, change).data
        assert data.known_optimum(embed) is None
        assert data.known_law(data.read(data.dataset("test").__getitems__([0]))) is None
    assert best_possible(recipe, build_model(recipe)) is not None
    unmasked = override(recipe, {"objective.causal": False})
    assert best_possible(unmasked, build_model(unmasked)) is None


def test_the_known_law_is_that_of_what_is_drawn() -> None:
    """Whitened by it, tokens of the series are standard normal and new: nothing is left of those before them."""
    data = demo().data
    assert isinstance(data, TimeSeries)
    windows = data.dataset("test")
    assert isinstance(windows, Windows)
    tokens = data.read(windows.__getitems__(list(range(0, len(windows), 16))))
    law = data.known_law(tokens)
    assert law is not None
    assert law.mean.shape == tokens.values.shape
    assert law.covariance.shape == (16, 16, 16)
    left = (tokens.values - law.mean).double()[..., None]
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(law.covariance), left, upper=False)[..., 0]
    for some in (white[:, 1:].flatten(0, 1), white[:, 0]):
        rows = len(some)
        assert (some.mean(0).abs() < 4.5 / rows**0.5).all()
        assert ((some.T @ some / rows - torch.eye(16)).abs() < 6.5 / rows**0.5).all()
    lagged = white[:, 1:-1].flatten(0, 1).T @ white[:, 2:].flatten(0, 1) / (14 * len(white))
    assert (lagged.abs() < 5 / (14 * len(white)) ** 0.5).all()


@pytest.mark.slow  # that of what is drawn stands for it
def test_the_known_law_is_that_of_simulated_futures() -> None:
    data = override(demo(), {"data.patch": 2}).data
    series = _series(data)
    values = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    law = data.known_law(Tokens(values, torch.zeros(3, 1)))
    assert law is not None
    draw = torch.Generator().manual_seed(1)
    last = (values[0, 1, 4:] * series.std + series.mean).expand(100_000, -1)
    futures = {
        0: _autoregression(2, 100_000, draw, burn_in=400),
        2: _autoregression(2, 100_000, draw, start=last),
    }
    for place, each in futures.items():
        found = ((each - series.mean) / series.std).flatten(1)
        torch.testing.assert_close(law.mean[0, place], found.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(law.covariance[place], found.T.cov().double(), rtol=0, atol=0.02)
    drawn = law.draw(100_000, draw)
    assert drawn.shape == (100_000, 1, 3, 8)
    torch.testing.assert_close(drawn.mean(0), law.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn[:, 0, 0].T.cov().double(), law.covariance[0], rtol=0, atol=0.02)


def test_the_card_names_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    from nepa_core.verdict.baselines import fit_baselines
    from nepa_core.verdict.gathered import Gathered
    from nepa_core.verdict.judge import judge, start_of

    torch.manual_seed(0)
    seen = Gathered(torch.randn(20, 4, 3), torch.randn(20, 5, 6), torch.randn(20, 5, 6), None)
    verdict = judge(fit_baselines([seen], seen, total=20), seen, start_of(seen)).verdict
    summary = {**verdict.model_dump(), "objective": verdict.loss, "causal": True, "unreadable_samples": 0}
    assert not any("best possible" in text for text in card.remarks(summary, "patch"))
    texts = card.remarks(summary | {"optimum": -0.875}, "patch")
    assert any(text.startswith("The best possible loss here is -0.875; NEPA reached ") for text in texts)
