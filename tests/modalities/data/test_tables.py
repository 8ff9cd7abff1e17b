"""Tables and labelled series as programs write them: read right, or refused in one line that names the row."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from modalities.data.listing import shared_content
from modalities.data.series import Table, read_labelled, read_table
from modalities.timeseries import Labelled, TimeSeries, Windows
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.runtime.config import validated

ROWS = 60
START = dt.datetime(2020, 1, 1)
HOURS = [(START + dt.timedelta(hours=i)).isoformat(" ") for i in range(ROWS)]
VALUES = [round(math.sin(i / 3), 4) + 2 for i in range(ROWS)]


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


def table(head: str, row: str, values: list[Any] | None = None, **columns: list[Any]) -> str:
    """A CSV of a head and of rows, in which {i} is the number, {t} the hour and {y} the value."""
    given = {"t": HOURS, "y": VALUES if values is None else values, **columns}
    rows = (row.format(i=i, **{name: each[i] for name, each in given.items()}) for i in range(ROWS))
    return lines(*([head] if head else []), *rows)


def read(folder: Path, text: str | bytes, **options: Any) -> Table:
    path = folder / "x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(str(path), **options)


def adapter(root: Path, **settings: Any) -> TimeSeries:
    given: dict[str, Any] = {"source": "file", "window": 8, "patch": 2, "channels": "mixing", "parts": (40, 0, 20)}
    return validated(TimeSeries, {"root": str(root), **given, **settings}, "data.")


# --------------------------------------------------------------------------------------------- columns that count


@pytest.mark.parametrize(
    ("head", "row", "said"),
    [
        (",t,y", "{i},{t},{y}", "'' (an index)"),
        ("Unnamed: 0.1,Unnamed: 0,t,y", "{i},{i},{t},{y}", "'Unnamed: 0.1' (an index), 'Unnamed: 0' (an index)"),
        (",y", "{i},{y}", "'' (an index)"),
        ("t,y,__index_level_0__", "{t},{y},{k}", "'__index_level_0__' (an index)"),
        ("No,t,y", "{n},{t},{y}", "'No' (counts the rows)"),
        ("zeile,y", "{n},{y}", "'zeile' (counts the rows)"),
        ("stamp,y", "{s},{y}", "'stamp' (seconds since 1970)"),
        ("when,t,y", "{ms},{t},{y}", "'when' (milliseconds since 1970)"),
        ("ns,y", "{ms}000000,{y}", "'ns' (nanoseconds since 1970)"),
        ("unix_time,y", "{s}.0,{y}", "'unix_time' (seconds since 1970)"),
        ("Time (s),y", "{tenth},{y}", "'Time (s)' (a clock)"),
    ],
)
def test_a_column_that_only_counts_is_no_channel_and_said(tmp_path: Path, head: str, row: str, said: str) -> None:
    numbers = range(ROWS)
    counted = {
        "n": [i + 1 for i in numbers],
        "k": [i * 7 % ROWS for i in numbers],  # the index of rows that were shuffled
        "s": [1577836800 + 3600 * i for i in numbers],
        "ms": [1000 * (1577836800 + 3600 * i) for i in numbers],
        "tenth": [f"{i / 10:.1f}" for i in numbers],
    }
    found = read(tmp_path, table(head, row, **counted))
    assert found.columns == ("y",)
    np.testing.assert_array_equal(found.values[:, 0], VALUES)
    assert any(f"not read as channels: {said};" in note for note in found.notes)
    name = head.split(",")[0]
    if name and name != "t":
        assert name in read(tmp_path, table(head, row, **counted), columns=(name, "y")).columns


def test_a_column_of_whole_numbers_that_rises_by_chance_at_first_is_a_channel(tmp_path: Path) -> None:
    count = [i if i < 50 else 2 * i for i in range(ROWS)]
    found = read(tmp_path, table("t,count,y", "{t},{count},{y}", count=count))
    assert found.columns == ("count", "y")
    assert found.values[:, 0].tolist() == count
    assert found.values[:, 1].tolist() == VALUES
    assert found.values.flags.owndata
    assert read(tmp_path, lines("a", *map(str, range(9)))).columns == ("a",), "where there is no other column"


# --------------------------------------------------------------------------------------------- head and encoding


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("row", "names"), [("{t},{y},{y}", ("c2", "c3")), ("{y},{y}", ("c1", "c2")), ("{y}", ("c1",)), ("{i},{y}", ("c2",))]
)
def test_a_file_without_a_head_keeps_its_first_row(
    tmp_path: Path, row: str, names: tuple[str, ...], mark: bytes
) -> None:
    found = read(tmp_path, mark + table("", row).encode())
    assert found.columns == names
    assert found.values[:, 0].tolist() == VALUES
    assert any("holds numbers and no names" in note for note in found.notes)


@pytest.mark.parametrize("head", ["0,1", "# a,b", "\n# made up\n\na,b\n", "a,b", '"a","b"'])
def test_a_head_is_found_below_comments_and_where_it_counts(tmp_path: Path, head: str) -> None:
    found = read(tmp_path, table(head, "{y},{y}"))
    assert found.columns == (("0", "1") if head == "0,1" else ("a", "b"))
    assert found.values.tolist() == [[y, y] for y in VALUES]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    text = table("t,Wärme °C", "{t},{y}").replace("\n", end)
    found = read(tmp_path, text.encode(encoding))
    assert found.columns == ("Wärme °C",)
    assert found.values[:, 0].tolist() == VALUES


def test_a_head_that_is_no_utf8_is_read_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, table("t,SWDR (W/m²)", "{t},{y}").encode("latin-1"))
    assert found.columns == ("SWDR (W/m²)",)
    assert found.notes[0].endswith("no UTF-8; its text is read as Windows-1252")


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(table("t,y", "{t},{y}").encode()))
    assert read_table(str(tmp_path / "x.csv.gz")).values[:, 0].tolist() == VALUES


# ------------------------------------------------------------------------------------------- separators and numbers


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
@pytest.mark.parametrize("decimal", [".", ","])
def test_separators_and_decimal_commas(tmp_path: Path, separator: str, decimal: str) -> None:
    texts = [str(y).replace(".", decimal) for y in VALUES]
    cell = '"{y}"' if separator == decimal else "{y}"
    found = read(tmp_path, table(f"t{separator}a{separator}b", separator.join(["{t}", cell, cell]), texts))
    assert found.columns == ("a", "b")
    assert found.values.tolist() == [[y, y] for y in VALUES]
    assert (decimal == ",") == any("commas are read as decimal points" in note for note in found.notes)


@pytest.mark.parametrize("text", ["1,234", "1,234.5", "12,345,678"])
def test_thousands_are_refused_and_not_read_as_fractions(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=rf"row 2 of column 'y' is '{text}', .*write thousands without separators"):
        read(tmp_path, table("t,y", '{t},"{y}"', [text] * ROWS))


@pytest.mark.parametrize(
    "empty", ["", "NaN", "nan", "NA", "N/A", "null", "None", "?", "-", "<NA>", "#N/A", "NAN", " NaN"]
)
def test_spellings_of_nothing_are_missing_values(tmp_path: Path, empty: str) -> None:
    values = [empty if i in (0, 7) else y for i, y in enumerate(VALUES)]
    found = read(tmp_path, table("t,y", "{t},{y}", values)).values[:, 0]
    assert np.flatnonzero(np.isnan(found)).tolist() == [0, 7]


def test_a_number_that_stands_for_nothing_is_said(tmp_path: Path) -> None:
    found = read(tmp_path, table("t,y", "{t},{y}", [-9999.0 if i in (3, 5) else y for i, y in enumerate(VALUES)]))
    assert "column 'y' holds -9999 2 times, which often stands for a missing value" in found.notes[0]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("above", ["t,y\n", "# one\n\n# two\nt,y\n\n"])
@pytest.mark.parametrize("comment", ["", "# between\n\n"])
@pytest.mark.parametrize("spoil", ["oops", "1.5,2"])
def test_the_row_of_a_bad_cell_is_its_line_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: bool, above: str, comment: str, spoil: str
) -> None:
    if far:  # not in the first block, from which the types are known
        monkeypatch.setattr("modalities.data.series.BLOCK", 512)
    rows = [f"{t},{y}" for t, y in zip(HOURS, VALUES, strict=True)]
    rows[20] = comment + rows[20]
    place = 50 if far else 30
    rows[place] = f"{HOURS[place]},{spoil}"
    text = above + lines(*rows)
    line = 1 + text.splitlines().index(f"{HOURS[place]},{spoil}")
    with pytest.raises(UserError, match=rf"x\.csv: row {line}( of column 'y' is 'oops'|: Expected 2 columns, got 3)"):
        read(tmp_path, text)


# ------------------------------------------------------------------------------------------------------ time


def test_windows_do_not_reach_over_a_gap_in_time_and_say_how_many_are_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamps = [(START + dt.timedelta(hours=i + (168 if i >= 20 else 0))).isoformat(" ") for i in range(ROWS)]
    (tmp_path / "x.csv").write_text("# made up\n" + table("t,y", "{k},{y}", k=stamps))
    data = adapter(tmp_path / "x.csv")
    windows = data.dataset("train")
    assert isinstance(windows, Windows)
    assert windows.kept is not None
    assert windows.kept.tolist() == [start for start in range(33) if not start < 20 < start + 8]
    assert windows.left_out == 7
    futures = data.forecasts("train", 3)
    assert futures.left_out == 10, "nor does what is forecast"
    said = capsys.readouterr().err
    assert (
        "x.csv: a gap in time before row 23: from 2020-01-01 19:00:00 to 2020-01-08 20:00:00, 7 days, 1:00:00" in said
    )
    assert "x.csv: 7 of 33 train windows are left out" in said
    assert len(adapter(tmp_path / "x.csv", gaps="bridge").dataset("train")) == 33  # type: ignore[arg-type]
    with pytest.raises(UserError, match="time is missing within every window of the train part"):
        adapter(tmp_path / "x.csv", window=22, parts=(40, 0, 20)).dataset("train")


@pytest.mark.parametrize(
    ("step", "breaks"),
    [
        (lambda i: f"{1900 + i // 12}-{i % 12 + 1:02}-01", ()),
        (lambda i: f"{1900 + (i + (i > 30)) // 12}-{(i + (i > 30)) % 12 + 1:02}-01", (31,)),
        (lambda i: str(dt.date(2020, 1, 6) + dt.timedelta(days=i // 5 * 7 + i % 5)), ()),  # working days
        (lambda i: str(dt.date(2020, 1, 6) + dt.timedelta(days=i // 5 * 7 + i % 5 + 14 * (i > 30))), (31,)),
        (lambda i: str(i if i < 20 else i + 100), (20,)),  # an index after rows were dropped
        (lambda i: str(1577836800000 + 60000 * (i if i < 20 else i + 1)), (20,)),
        (lambda i: f"{1 + i // 24:02}.01.2020 {i % 24:02}:00", ()),
        (lambda i: f"2020/01/{1 + (i + (i > 9)) // 24:02} {(i + (i > 9)) % 24:02}:00", (10,)),
    ],
)
def test_gaps_in_time_are_those_of_its_calendar(tmp_path: Path, step: Any, breaks: tuple[int, ...]) -> None:
    found = read(tmp_path, table("index,y", "{k},{y}", k=[step(i) for i in range(ROWS)]))
    assert (found.columns, found.breaks) == (("y",), breaks)
    assert (found.gap is None) == (not breaks)


@pytest.mark.parametrize("minutes", [60, 30, 15])
def test_the_hour_that_clocks_go_through_twice_is_named(tmp_path: Path, minutes: int) -> None:
    change = dt.datetime(2020, 10, 25, 3)
    stamps = [dt.datetime(2020, 10, 25) + dt.timedelta(minutes=minutes * i) for i in range(ROWS)]
    local = [each if each < change else each - dt.timedelta(hours=1) for each in stamps]
    with pytest.raises(UserError, match=rf"row {2 + 180 // minutes} .*when daylight saving ends; write .*in UTC"):
        read(tmp_path, table("date,y", "{k},{y}", k=local))
    zoned = [f"{each}+02:00" if each < change else f"{each - dt.timedelta(hours=1)}+01:00" for each in stamps]
    assert read(tmp_path, table("date,y", "{k},{y}", k=zoned)).breaks == ()


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([*range(30), *range(29, 59)], "row 32 .* repeats the time stamp of the row above; remove the rows that stand"),
        (range(59, -1, -1), "row 3 .* is earlier than the row above; the last row comes first"),
        ([*range(30)] * 2, "row 32 .*several series seem to stand below each other"),
        ([0, 2, 1, *range(3, 60)], "row 4 .* is earlier than the row above; sort the rows"),
    ],
)
def test_time_stamps_that_do_not_rise_say_what_to_do(tmp_path: Path, order: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, table("date,y", "{k},{y}", k=[HOURS[i] for i in order]))


def test_parquet_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for index in (pa.array(range(ROWS)), pa.array([START + dt.timedelta(hours=i) for i in range(ROWS)])):
        pa.parquet.write_table(pa.table({"y": VALUES, "__index_level_0__": index}), path)
        assert read_table(str(path)).columns == ("y",)


def test_what_is_no_regular_file_or_empty_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "blank.csv").write_text("\n\n")
    for name, said in (("pipe", "a pipe, a device"), ("empty", "it is empty"), ("blank", "no rows in it")):
        with pytest.raises(UserError, match=rf"{name}\.csv: .*{said}"):
            read_table(str(tmp_path / f"{name}.csv"))


# ------------------------------------------------------------------------------------------------- labelled series


def labelled(folder: Path, train: str | bytes, test: str | bytes | None = None, kind: str = "tsv") -> TimeSeries:
    for split, text in (("TRAIN", train), ("TEST", train if test is None else test)):
        (folder / f"Made_{split}.{kind}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return adapter(folder, source="labelled", window=8, patch=2)


@pytest.mark.parametrize("kind", ["tsv", "ts"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_labelled_series_of_any_encoding_have_the_classes_that_they_name(
    tmp_path: Path, kind: str, encoding: str
) -> None:
    rows = ["süß\t1\t2\t3\t4", "sauer\t4\t3\t2\t1"] if kind == "tsv" else ["@data", "1,2,3,4:süß", "4,3,2,1:sauer"]
    data = labelled(tmp_path, lines(*rows).encode(encoding), lines(*rows), kind)
    assert data.classes() == ("sauer", "süß")
    assert read_labelled(str(tmp_path), "train").values[0, :, 0].tolist() == [1, 2, 3, 4]


def test_a_head_and_hidden_copies_are_no_series_and_spellings_of_a_number_one_class(tmp_path: Path) -> None:
    data = labelled(
        tmp_path, lines("label\t0\t1\t2\t3", "1.0\t1\t2\t3\t4", "2.0000000e+00\t4\t3\t2\t1", "1\t5\t6\t7\t8")
    )
    (tmp_path / "._Made_TRAIN.tsv").write_bytes(b"\0\5\26")
    assert data.classes() == ("1", "2")
    assert len(data.dataset("train")) == 3  # type: ignore[arg-type]


def test_series_without_two_whole_tokens_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, torn = "a\t" + "\t".join("12345678"), "b\t1\t?\t3\t?\t5\t?\t7\t8"
    data = labelled(tmp_path, lines(whole, torn, torn.replace("?", "2")))
    samples = data.dataset("test")
    assert isinstance(samples, Labelled)
    assert len(samples) == 3
    assert "Made_TEST.tsv: 1 of 3 series have fewer than two tokens" in capsys.readouterr().err
    with pytest.raises(UnreadableSample, match=r"Made_TEST\.tsv, row 2 has 1 token without a missing value"):
        samples.__getitems__([0, 1])
    assert samples.__getitems__([0, 2])["label"].tolist() == [0, 1]


def test_series_that_stand_in_both_files_are_found_and_the_list_has_a_fingerprint(tmp_path: Path) -> None:
    rows = ["a\t1\t2\t3\t4", "b\t2\t2\t3\t4", "a\t3\t2\t3\t4\t5\t6\t7\t8"]
    data = labelled(tmp_path, lines(*rows), lines("b\t7\t7\t7\t7", rows[1].replace("b", "a"), rows[0]))
    train, test = data.dataset("train"), data.dataset("test")
    assert isinstance(train, Labelled)
    assert isinstance(test, Labelled)
    found = shared_content(train.contents(), test.contents())
    assert found.count == 2
    assert "Made_TEST.tsv, row 2" in found.names[0][0]
    before = train.fingerprint()
    (tmp_path / "more").mkdir()
    more = labelled(tmp_path / "more", lines(*rows, "a\t1\t2\t3\t5")).dataset("train")
    assert isinstance(more, Labelled)
    assert more.fingerprint() != before
    assert torch.equal(more.values[:3].isnan(), train.values.isnan())


# ------------------------------------------------------------------------------ dates as numbers and in several columns


DAYS = [START.date() + dt.timedelta(days=i) for i in range(ROWS)]  # of 2020, so that the 29th of February is one


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("date,y", "{d:%Y%m%d},{y}"),
        ("day_of_trade,y", "{d:%Y%m%d},{y}"),
        ("date,y", "{d:%Y%m%d}12,{y}"),
        ("stamp,y", "{d:%Y%m%d}1230,{y}"),
        ("stamp,y", "{d:%Y%m%d}123059,{y}"),
        ("Year,Month,Day,y", "{d.year},{d.month},{d.day},{y}"),
        ("y,yr,mo,day,hour", "{y},{d.year},{d.month},{d.day},7"),
    ],
)
def test_dates_as_numbers_or_in_parts_are_the_clock_and_no_channels(tmp_path: Path, head: str, row: str) -> None:
    """Between the 31st and the 1st lies a day, and not 70; a week that is missing is a gap."""
    rows = [row.format(d=day, y=y) for day, y in zip(DAYS, VALUES, strict=True)]
    whole = read(tmp_path, lines(head, *rows))
    assert (whole.columns, whole.breaks, whole.gap) == (("y",), (), None)
    np.testing.assert_array_equal(whole.values[:, 0], VALUES)
    gap = read(tmp_path, lines(head, *rows[:20], *rows[27:]))
    assert gap.breaks == (20,)
    assert "from 2020-01-20" in str(gap.gap)
    assert "8 days where 1 day is usual" in str(gap.gap)


def test_numbers_that_are_no_dates_stay_what_they_are(tmp_path: Path) -> None:
    wrong = [20200101 + i for i in range(ROWS)]  # the 32nd of January
    assert read(tmp_path, table("a,y", "{a},{y}", a=[n if n % 7 else n + 1000 for n in wrong])).columns == ("a", "y")
    parts = table("year,month,y", "{a},{b},{y}", a=[2000] * ROWS, b=[i % 14 for i in range(ROWS)])
    assert read(tmp_path, parts).columns == ("year", "month", "y")
    named = read(tmp_path, table("year,month,y", "{a},{b},{y}", a=[2000] * ROWS, b=[1] * ROWS), columns=["month", "y"])
    assert named.columns == ("month", "y")
    with pytest.raises(UserError, match=r"repeats the time stamp .* by 'year, month'"):
        read(tmp_path, table("year,month,y", "{a},{b},{y}", a=[2000] * ROWS, b=[1] * ROWS))


# --------------------------------------------------------------------------------- what other programs write, once more


def test_an_index_that_does_not_rise_is_said(tmp_path: Path) -> None:
    order = [(7 * i) % ROWS for i in range(ROWS)]
    notes = read(tmp_path, table(",y", "{k},{y}", k=order)).notes
    assert any("the index '' does not rise from row to row, so the rows may be out of order" in note for note in notes)
    assert not any("out of order" in note for note in read(tmp_path, table(",y", "{i},{y}")).notes)


def test_decimal_commas_far_below_whole_numbers_are_found(tmp_path: Path) -> None:
    cells = [str(i) for i in range(1000)] + ["3,5"]
    found = read(tmp_path, lines("a;b", *(f"{cell};{cell}" for cell in cells)), columns=["a", "b"])
    assert found.values[-1].tolist() == [3.5, 3.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + bytes(range(200)), "a workbook (Excel) or zip archive, no text; save the sheet as CSV"),
        (b"1.0 2.0\n3.0 4.0\n5.0 6.0\n", "its cells are separated by spaces; write commas"),
        (b"a  b\n3.0  4.0\n5.0  6.0\n", "its cells are separated by spaces; write commas"),
        (b"a,b\n1,2\n3,4,5\n", "row 3: Expected 2 columns, got 3; give every row as many cells as the first"),
        (
            lines("date,y", *(f"{i}.5,1" for i in range(60_000)), "yesterday,1").encode(),
            "row 60002 of column 'date' is 'yesterday', which is no number",
        ),
        (lines("date,y", "1,1", "nan,1", "2,1", "yesterday,1").encode(), "'yesterday' in row 5, neither a number nor"),
        (lines("date,y", *(f"{t},1" for t in HOURS), "Total,60").encode(), "'Total' in row 62, neither a number nor"),
    ],
)
def test_what_is_no_table_of_numbers_says_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert said in str(error.value)


def test_parquet_is_known_by_its_first_bytes_and_may_hold_decimals(tmp_path: Path) -> None:
    exact = pa.array([decimal.Decimal(f"{y:.2f}") for y in VALUES])
    for name in ("x.PARQUET", "x.pq", "x.data"):
        pa.parquet.write_table(pa.table({"a": VALUES, "b": exact}), tmp_path / name)
        found = read_table(str(tmp_path / name))
        assert found.columns == ("a", "b")
        np.testing.assert_allclose(found.values[:, 1], [round(y, 2) for y in VALUES])


def test_columns_that_never_change_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat.csv").write_text(table("t,y,b,c", "{t},{y},5,{c}", c=[1] * 40 + [2] * 20))
    assert len(adapter(tmp_path / "flat.csv").dataset("train"))  # type: ignore[arg-type]
    assert (
        "constant in the training rows, so that there is nothing to learn from: column 'b', 'c'"
        in capsys.readouterr().err
    )


def test_other_values_of_the_same_table_are_other_data(tmp_path: Path) -> None:
    prints = []
    for number, last in enumerate((2.5, 2.5, 2.6)):
        (tmp_path / f"{number}.csv").write_text(table("t,y", "{t},{y}", values=[*VALUES[:-1], last]))
        windows = adapter(tmp_path / f"{number}.csv").dataset("train")
        prints.append(windows.fingerprint())  # type: ignore[attr-defined]
    assert prints[0] == prints[1] != prints[2]


def test_labelled_series_in_another_order_are_other_data(tmp_path: Path) -> None:
    rows = ["1\t1\t2\t3\t4\n", "2\t4\t3\t2\t1\n"]
    prints = []
    for number, order in enumerate((rows, rows, rows[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for split in ("TRAIN", "TEST"):
            (folder / f"X_{split}.tsv").write_text("".join(order))
        data = adapter(folder, source="labelled", window=4, patch=2).dataset("train")
        prints.append(data.fingerprint())  # type: ignore[attr-defined]
    assert prints[0] == prints[1] != prints[2]


def test_a_row_number_in_the_place_of_the_label_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"X_{split}.tsv").write_text("".join(f"{i}\t{i % 2}\t1\t2\t3\n" for i in range(6)))
    adapter(tmp_path, source="labelled", window=4, patch=2).dataset("train")
    assert "each of its 6 series has a class of its own; is its first column a row number?" in capsys.readouterr().err
