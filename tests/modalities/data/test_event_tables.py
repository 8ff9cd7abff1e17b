"""Tables of events: what is read, sorted, counted and refused."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modalities.data.event_tables import EventTable, Named, read_events
from nepa_core.basics import UserError


def put(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


GOOD = (
    "user,when,event,amount,note\nb,2024-01-01 10:00,buy,1.5,x\na,2024-01-01 09:00,see,,y\nb,2024-01-01 09:30,see,2,z\n"
)


def check_good(found: EventTable) -> None:
    assert found.names == ("a", "b")
    assert found.entity.tolist() == [0, 1, 1]
    assert found.time.tolist() == [0.0, 1800.0, 3600.0]
    assert found.kind.tolist() == ["see", "see", "buy"]
    assert found.columns == ("amount",)
    np.testing.assert_equal(found.numbers[:, 0], [np.nan, 2.0, 1.5])


def test_rows_are_sorted_by_entity_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_good(read_events(put(tmp_path / "x.csv", GOOD), Named()))
    assert "1 event stands behind later ones of the same entity; all are sorted by time" in capsys.readouterr().err


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    columns = list(zip(*(line.split(",") for line in GOOD.splitlines()[1:]), strict=True))
    table = pa.table(
        {
            "user": columns[0],
            "when": pa.array([datetime.fromisoformat(each) for each in columns[1]], pa.timestamp("ms")),
            "event": pa.array(columns[2]).dictionary_encode(),
            "amount": pa.array([float(each) if each else None for each in columns[3]]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    check_good(read_events(str(tmp_path / "x.parquet"), Named()))


def test_numbers_are_times_and_one_entity_is_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_events(
        put(tmp_path / "x.csv", "t0,code,x\n5,7,inf\n5,8,1\n2.5,7,nan\n"), Named(time="t0", kind="code")
    )
    assert found.names == ("all",)
    assert found.time.tolist() == [2.5, 5.0, 5.0]
    assert found.kind.tolist() == ["7", "7", "8"]
    np.testing.assert_equal(found.numbers[:, 0], [np.nan, np.nan, 1.0])
    said = capsys.readouterr().err
    assert "1 infinite number in column 'x', read as missing" in said
    assert "1 event has the time of the one before" in said


@pytest.mark.parametrize(
    ("text", "named", "words"),
    [
        ("", Named(), "it is empty"),
        ("entity,time,kind\n", Named(), "no rows below its head"),
        ("entity,moment,kind\na,1,b\n", Named(), "no column is called time, date or the like"),
        ("entity,time,kind\na,1,b\n", Named(entity="entiti"), r"no column 'entiti' \(data.entity\).*entity"),
        ("entity,time,kind\na,1,b\n", Named(values=("x",)), r"no column 'x' \(data.values\)"),
        ("entity,time,kind\na,1,b\na,,b\n", Named(), "row 3 has no time in column 'time'"),
        ("entity,time,kind\na,2024-01-01,b\na,soon,b\n", Named(), "row 3 of column 'time' is 'soon'"),
        ("entity,time,kind,x\na,1,b,2\na,2,b,many\n", Named(values=("x",)), "'many', which is no number"),
        ("id,time,kind,label\na,1,b,c\na,2,b,d\n", Named(), "entity a has the label 'd' here and 'c' above"),
        ("id,time,time\na,1,2\n", Named(time="time"), "2 columns are called 'time'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, named: Named, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_events(put(tmp_path / "x.csv", text), named)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- what is said


def latin(path: Path, rows: int = 3, kind: str = "café") -> str:
    """Rows beyond the head of the file too, so that it begins as UTF-8."""
    lines = [f"a,{row},{'see' if row < rows - 1 else kind}" for row in range(rows)]
    path.write_bytes("\n".join(["user,when,event", *lines, ""]).encode("cp1252"))
    return str(path)


@pytest.mark.parametrize("rows", [3, 20_000])
@pytest.mark.parametrize(
    ("kind", "how"), [("café", "Windows-1252"), ("b\x81", "Latin-1")], ids=["Windows-1252", "Latin-1"]
)
def test_what_is_no_utf8_is_read_as_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, kind: str, how: str
) -> None:
    path = tmp_path / "x.csv"
    latin(path, rows)
    path.write_bytes(path.read_bytes().replace("café".encode("cp1252"), ("é" + kind).encode("latin-1")))
    assert read_events(str(path), Named()).kind[-1] == "é" + kind
    assert f"x.csv: no UTF-8; its text is read as {how}" in capsys.readouterr().err


def test_a_damaged_letter_does_not_turn_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("user,when,event\na,1,größer\na,2,caf".encode() + b"\xe9\n")
    assert read_events(str(path), Named()).kind.tolist() == ["größer", "caf\ufffd"]
    assert "x.csv: bytes in it are no letters in its encoding, and are read as U+FFFD" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1000, 100_000])
@pytest.mark.parametrize("time", [str, lambda row: f"2024-01-01 {row // 3600:02}:{row // 60 % 60:02}:{row % 60:02}"])
def test_the_cell_that_is_no_time_is_named(tmp_path: Path, rows: int, time: Callable[[int], str]) -> None:
    times = ["nan" if row in (3, 5, 7) else time(row % 80_000) for row in range(rows)]
    times[rows - 100] = "yesterday"
    path = put(tmp_path / "x.csv", "when,what\n" + "".join(f"{each},a\n" for each in times))
    with pytest.raises(UserError, match=f"row {rows - 98} of column 'when' is 'yesterday', neither a number nor"):
        read_events(path, Named(kind="what"))
    times[rows - 100] = "2"
    if time is str:
        path = put(tmp_path / "y.csv", "when,what\n" + "".join(f"{each},a\n" for each in times))
        with pytest.raises(UserError, match="row 5 has no time in column 'when'; fill it in"):
            read_events(path, Named(kind="what"))


def test_one_number_among_time_stamps_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "x.csv", "when,what\n5,a\n2024-01-01,a\n2024-01-02,b\n2024-01-03,b\n")
    with pytest.raises(UserError, match="row 2 of column 'when' is '5', neither"):
        read_events(path, Named(kind="what"))


def test_empty_names_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_events(put(tmp_path / "x.csv", "user,when,event\na,1,see\na,2,\n,3,see\n,4,\n"), Named())
    assert found.kind.tolist() == ["see", "", "see", ""]
    said = capsys.readouterr().err
    assert "x.csv: 2 empty cells in column 'event', read as one more name, which is empty" in said
    assert "x.csv: 2 empty cells in column 'user'" in said


def test_a_column_that_is_not_there_lists_the_others_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'what' \(data.kind\); it has user, when, amount$"):
        read_events(put(tmp_path / "x.csv", "user,when,amount\na,1,2\n"), Named(kind="what"))
