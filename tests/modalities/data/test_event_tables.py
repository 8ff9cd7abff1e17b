"""Tables of events: what is read, sorted, counted and refused."""

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
    assert "1 events stand behind later ones of their entity; they are sorted by time" in capsys.readouterr().err


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
    assert "1 infinite numbers in column 'x' are read as missing" in said
    assert "1 events have the time of the one before" in said


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
