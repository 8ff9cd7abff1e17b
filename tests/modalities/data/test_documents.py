"""Documents from every layout, and what is wrong with them in one line."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modalities.data.documents import Document, read_documents, read_files
from modalities.data.vocabulary import open_vocabulary
from nepa_core.basics import UserError


def put(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


def texts(found: tuple[Document, ...]) -> list[str]:
    return sorted(each.text for each in found)


ROWS = [(f'text {i}, of "row"\n{i}', "ab"[i % 2], "train" if i < 6 else "test") for i in range(10)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_say_text_label_and_split(tmp_path: Path, suffix: str) -> None:
    table = pa.table({name: [row[i] for row in ROWS] for i, name in enumerate(("Text", "label", "split"))})
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "jsonl":
        put(path, "\n".join(map(json.dumps, table.to_pylist())))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("Text", "label", "split"), *ROWS])
    found = read_documents(str(path))
    assert texts(found["train"]) == sorted(row[0] for row in ROWS[:6])
    assert {(each.text, each.label) for each in found["test"]} == {row[:2] for row in ROWS[6:]}


def test_without_a_split_a_share_of_every_class_is_held_out(tmp_path: Path) -> None:
    for i in range(20):
        put(tmp_path / "texts" / "ab"[i % 2] / f"{i}.txt", f"text {i}")
    found = read_documents(str(tmp_path / "texts"), 0.2)
    assert sorted(each.label for each in found["test"]) == ["a", "a", "b", "b"]
    assert len(found["train"]) == 16
    (tmp_path / "texts").rename(tmp_path / "moved")
    assert texts(read_documents(str(tmp_path / "moved"), 0.2)["test"]) == texts(found["test"])


def test_one_long_text_is_cut_at_a_line(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(100)]
    found = read_documents(put(tmp_path / "book.txt", "\n".join(lines)), 0.1)
    train, test = found["train"][0].text, found["test"][0].text
    assert (train + test).split("\n") == lines
    assert train.endswith("\n")
    assert 0.05 < len(test) / 700 < 0.15


def test_fasta_records_in_capitals(tmp_path: Path) -> None:
    put(tmp_path / "train.fasta", ">a first\nacgt\nAC\n\n>b\nGG")
    put(tmp_path / "test.fa", ">c\nTTTT\n")
    found = read_documents(str(tmp_path))
    assert texts(found["train"]) == ["ACGTAC", "GG"]
    assert texts(found["test"]) == ["TTTT"]
    assert found["train"][0].name.endswith("train.fasta, a")


def test_text_in_another_encoding_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("größer".encode("utf-16"))
    assert [each.text for each in read_files([str(tmp_path / "x.txt")]) if isinstance(each, Document)] == ["größer"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.fasta", "ACGT\n>a\nAC", "line 1: no header above it"),
        ("x.fasta", ">a\nAC", "one document"),
        ("x.csv", "txet,label\na,b\n", "no column is called text"),
        ("x.csv", "text,label,split\na,b,dev\n", "row 2: the split 'dev' is none of"),
        ("x.csv", "text,label\na,b\nc,\nd,b\n", "1 row has no label"),
        ("x.csv", "text,split\na,train\nc,train\n", "no text in the held-out split"),
        ("x.csv", "text,label,split\na,x,train\nc,y,test\n", "classes of held-out ones: y"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', "line 2: no JSON object"),
        ("x.jsonl", '{"text": \n', "line 1: no JSON"),
        ("x.txt", "", "it is empty"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_documents(put(tmp_path / name, text))
    assert "\n" not in str(error.value)


def test_a_named_column_that_is_missing_names_the_nearest(tmp_path: Path) -> None:
    path = put(tmp_path / "x.csv", "text,author,label\na,b,c\nd,b,c\n")
    with pytest.raises(UserError, match=r"no column 'auhtor' \(data.text\).*author"):
        read_documents(path, text="auhtor")
    assert texts(read_documents(path, 0.5, text="text", label="author")["train"] + read_documents(path, 0.5)["test"])


def test_an_empty_folder_and_a_symbol_that_stands_twice(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no file \(.txt"):
        read_documents(str(tmp_path / "none"))
    with pytest.raises(UserError, match="'a' stands twice"):
        open_vocabulary("aba", None)
    with pytest.raises(UserError, match="no such file"):
        open_vocabulary(None, str(tmp_path / "words.txt"))


def test_files_that_are_no_utf8_are_counted_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes("ein Café, größer".encode("utf-8" if number == 3 else "latin-1"))
    found = read_documents(str(tmp_path))
    assert {each.text for split in found.values() for each in split} == {"ein Café, größer"}
    said = capsys.readouterr().err
    assert said.count("Windows-1252") == 1
    assert "0.txt, the first of 3 such files: no UTF-8; its text is read as Windows-1252" in said


def test_a_long_text_is_one_encoding_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_bytes(b"plain line\n" * 10_000 + "Café".encode("latin-1"))
    assert read_documents(str(tmp_path / "x.txt"))["test"][0].text.endswith("Café")
    assert "x.txt: no UTF-8" in capsys.readouterr().err
