"""Scripts of declared protocols: what is found is kept at once, and a stop or an error is one line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.declared import asked_of, keep, made_with, measured_and_kept, parser_of, read_kept, some_of
from nepa_core.basics import UserError


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "second: stopped; the same command goes on from there"),
        (UserError("data.root=x is not there"), 2, "python -m benchmarks.x: second: data.root=x is not there"),
    ],
)
def test_what_was_found_before_a_stop_or_an_error_is_kept(
    error: BaseException, status: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(name: str) -> int:
        if name == "second":
            raise error
        return len(name)

    with pytest.raises(SystemExit) as ended:
        measured_and_kept(parser_of("x", None), ["first", "second", "third"], measure, tmp_path / "kept.json")
    assert ended.value.code == status
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert read_kept(tmp_path / "kept.json") == {"first": 5}


def test_a_name_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert some_of(parser_of("x", None), "tasks", "b,a", ["a", "b"]) == ["b", "a"]
    with pytest.raises(SystemExit):
        some_of(parser_of("x", None), "tasks", "a,c", ["a", "b"])
    assert "--tasks=c: there is no such task; name some of a, b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--workers=0"], "argument --workers: a whole number from 1 is wanted"),
        (["run", "--workers=-1"], "argument --workers: a whole number from 1 is wanted"),
        (["table", "--out=x"], "--out is for run, and does nothing for table; leave it out"),
        (["run", "--classic=x"], "--classic is for table, and does nothing for run; leave it out"),
    ],
)
def test_an_option_that_can_do_nothing_is_refused_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of("x", None)
    parser.add_argument("--classic")
    with pytest.raises(SystemExit) as ended:
        asked_of("x", parser, words, kept=Path("nowhere.json"), table=("classic",))
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"python -m benchmarks.x: {said}\n"


@pytest.mark.parametrize("text", ['{"digits": [1, 2', "[]"])
def test_a_damaged_file_of_figures_is_named_before_anything_is_measured(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(text)
    for what in ("run", "table"):
        with pytest.raises(SystemExit) as ended:
            asked_of("x", parser_of("x", None), [what], kept=kept)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"python -m benchmarks.x: {kept} can't be read (")
    assert kept.read_text() == text


def test_processes_that_keep_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: keep(file, {str(name): name}), range(40)))
    assert read_kept(file) == {str(name): name for name in range(40)}


@pytest.mark.parametrize(
    "words",
    [["--data", "/home/me/my data", "--out=/tmp/x"], ["--data=/home/me/my data", "--out", "/tmp/x"]],
)
def test_what_is_kept_names_no_folder_of_the_machine(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["growth.py", "run", *words, "--workers", "1"])
    assert made_with()["command"].replace("=", " ") == "growth.py run --data DIR --out DIR --workers 1"
