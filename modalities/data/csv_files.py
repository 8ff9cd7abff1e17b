"""CSV as it lies on the disk: which separator, which encoding, where its rows begin, and what its columns are called.

Shapes: C columns.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv

from modalities.data.listing import printable
from modalities.data.text_files import EIGHT_BIT, EightBit, encoding_of, how_read
from nepa_core.basics import UserError

_HEAD = 1 << 16  # bytes that separator, decimal point and head are found in
_LONGEST_HEAD = 1 << 24
_SAMPLE = 200  # rows that must agree on a separator
_CELLS = 5000  # rows in whose cells decimal commas are looked for
_ARCHIVES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how workbooks begin, new and old ones
_SEPARATORS = ("\t", ";", "|", ",")  # the first that gives every row as many cells; a comma may be a decimal one

# What pyarrow takes for nothing, and what else programs write.
NULLS = [
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL"),
    *("NaN", "n/a", "nan", "null", "NAN", "+nan", "+NaN", "Nan", "Null", "na", "Na", "N.A.", "n.a.", "<NA>", "<na>"),
    *("None", "none", "NONE", "NaT", "nat", "?", "-", "--", "---", ".", "..", "*", "#VALUE!", "#DIV/0!", "#NUM!"),
    *("#REF!", "missing", "Missing", "MISSING"),
]
_NULLS = frozenset(NULLS)

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity)", re.IGNORECASE)
_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?|[+-]?[1-9]\d{0,2}(\.\d{3})+,\d+")
_STAMP = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T]\d{1,2}:\d{2}.*)?|\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?")


class Csv(NamedTuple):
    """How a CSV file is to be read.

    Attributes:
        path: of the file; ".gz" and the like are unpacked.
        encoding: by Python's name. separator, decimal: one character each.
        skipped: lines above the first row.
        names: [C], of the columns; "c1", "c2", ... where the file has none.
        comments: lines that begin with # stand among the rows. damaged: so do bytes that are no letters in `encoding`.
        notes: what was found out and is worth a line.
    """

    path: str
    encoding: str
    separator: str
    decimal: str
    skipped: int
    names: tuple[str, ...]
    comments: bool
    damaged: bool
    notes: tuple[str, ...]


def find_out(path: str) -> Csv:
    """How a CSV file is to be read, from its first rows.

    Blank lines, lines that begin with # and a first line such as `sep=;` are none of its rows. The first row is a head
    unless all of its cells are numbers, time stamps or empty; numbers that count (0, 1, 2, ...) are a head, too.

    Raises:
        UserError: its first line has no end.
        OSError, pa.ArrowException: it can't be read.
    """
    head, whole = _head(path)
    if head.startswith(_ARCHIVES):
        raise UserError(f"{path}: a workbook (Excel) or zip archive, no text; save the sheet as CSV")
    encoding, damaged, commented = _looked_through(path, encoding_of(head))
    lines = re.findall(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+", head.decode(encoding, errors="replace"))
    if not whole:
        lines.pop()
        if not lines:
            raise UserError(f"{path}: a line of more than {_LONGEST_HEAD:,} bytes; it is no CSV file of a series")
    given = re.fullmatch(r"sep=(.)", lines[0].strip(), re.IGNORECASE) if lines else None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not (given and number == 1)]
    comments = [each for each in numbered if each[1].lstrip().startswith("#")]
    kept = [each for each in numbered if not each[1].lstrip().startswith("#")]
    named = _named_by_comment(comments, kept)  # "# date,a" above numbers, as NumPy writes a head
    if not kept:
        raise UserError(f"{path}: no rows in it; a series needs at least a window")
    separator = given[1] if given else _separator([line for _, line in kept[:_SAMPLE]])
    if not given and _has_spaces([line for _, line in kept[:_SAMPLE]], separator):
        raise UserError(f"{path}: its cells are separated by spaces; write commas, or another of ; tab |, instead")
    rows = csv.reader((line for _, line in kept), delimiter=separator)
    first = [cell.strip() for cell in next(rows, [])]
    read_lines = rows.line_num  # of a head with line breaks in quotes, several
    cells = [cell.strip() for row, _ in zip(rows, range(_CELLS), strict=False) for cell in row]
    notes = []
    if how := how_read(encoding, damaged=damaged):
        notes.append(f"{path}: {how}")
    if _is_head(first):
        names, skipped = first, kept[read_lines - 1][0]
    elif named and len(named_cells := _split(named, separator)) == len(first):
        names, skipped = named_cells, kept[0][0] - 1
    else:
        names, skipped = [f"c{place}" for place in range(1, len(first) + 1)], kept[0][0] - 1
        notes.append(f"{path}: its first row holds numbers and no names, so its columns are called {_range(names)}")
    if kept and skipped < kept[0][0]:
        cells += first
    decimal = "," if _has_decimal_commas(cells, separator) else "."
    if decimal == ",":
        example = next(cell for cell in cells if _COMMA.fullmatch(cell))
        notes.append(f"{path}: commas are read as decimal points ({example} as {example.replace(',', '.')})")
    among = any(number > skipped for number, _ in comments) or (commented and not whole)
    return Csv(path, encoding, separator, decimal, skipped, tuple(map(printable, names)), among, damaged, tuple(notes))


def _head(path: str) -> tuple[bytes, bool]:
    """The first bytes of the file, unpacked, with a line's end among them; and whether that is all."""
    size = _HEAD
    while True:
        with pa.input_stream(path, compression="detect") as stream:
            head = stream.read(size)
            whole = not stream.read(1)
        if whole or b"\n" in head or b"\r" in head or size >= _LONGEST_HEAD:
            return head, whole
        size *= 8


def _named_by_comment(comments: Sequence[tuple[int, str]], kept: Sequence[tuple[int, str]]) -> str | None:
    above = [line for number, line in comments if not kept or number < kept[0][0]]
    return above[-1].strip().lstrip("#").strip() if above else None


def _split(line: str, separator: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _separator(lines: Sequence[str]) -> str:
    """The character that gives every row as many cells as the first, two at least; else the best for the first row."""
    counts = {each: [len(row) for row in csv.reader(lines, delimiter=each)] for each in _SEPARATORS}
    for each, found in counts.items():
        if found and found[0] > 1 and len(set(found)) == 1:
            return each
    return max(reversed(_SEPARATORS), key=lambda each: counts[each][0] if counts[each] else 0)


def _has_spaces(lines: Sequence[str], separator: str) -> bool:
    """Whether rows without a separator hold several numbers each, the same in all of them, with spaces between."""
    if len(lines) < 2 or any(separator in line for line in lines):
        return False
    rows = [line.split() for line in lines]
    numbers = all(cell in _NULLS or _NUMBER.fullmatch(cell) for row in rows[1:] for cell in row)
    return numbers and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1


def _is_head(cells: Sequence[str]) -> bool:
    if any(_STAMP.fullmatch(cell) for cell in cells):
        return False
    if not all(cell in _NULLS or _NUMBER.fullmatch(cell) or _COMMA.fullmatch(cell) for cell in cells):
        return True
    # pandas numbers columns that have no names, and leaves the cell above its index empty
    counted = [cell for place, cell in enumerate(cells) if cell or place]
    return counted == [str(place) for place in range(len(counted))] and (len(counted) > 1 or counted == ["0"])


def _has_decimal_commas(cells: Sequence[str], separator: str) -> bool:
    """Whether commas stand before fractions. Where all may be thousands (1,234), a separator that is none decides."""
    commas = [cell for cell in cells if _COMMA.fullmatch(cell)]
    if not commas or any("." in cell and _NUMBER.fullmatch(cell) for cell in cells):
        return False
    return separator != "," or not all(_GROUPS.fullmatch(cell) for cell in commas)


def _looked_through(path: str, begun: str) -> tuple[str, bool, bool]:
    """The encoding of the whole file, whether it is damaged, and whether a line but the first begins with #.

    Args:
        begun: the encoding of its head.
    """
    eight_bit, commented, tail = EightBit(), False, b""
    mark = "\n#".encode("utf-16-le" if begun.startswith("utf-16") else "utf-8")
    with pa.input_stream(path, compression="detect") as stream:
        while block := stream.read(1 << 18):
            commented = commented or mark in tail + block[:8] or mark in block
            tail = block[-8:]
            if not begun.startswith(("utf-16", "utf-32")):
                eight_bit.add(block)
    eight_bit.end()
    return eight_bit.encoding if begun in EIGHT_BIT else begun, eight_bit.damaged, commented


# ------------------------------------------------------------------------------------------------------- reading


def read_blocks(form: Csv, block: int, kinds: dict[int, pa.DataType] | None = None) -> Iterator[pa.RecordBatch]:
    """The columns at these places (all, their types found out from the first block, where None), block by block.

    Columns of a batch are called by their places, "0", "1", ...

    Args:
        block: bytes parsed at a time.

    Raises:
        OSError, pa.ArrowException: a cell does not fit its type, or a row has more cells than the head, or fewer.
    """
    convert: dict[str, Any] = {"null_values": NULLS, "decimal_point": form.decimal}
    if kinds is not None:
        convert |= {"column_types": {str(place): kind for place, kind in kinds.items()}}
        convert["include_columns"] = [str(place) for place in kinds]
    by_line = form.comments or form.damaged  # as UTF-8, slowly; pyarrow transcodes what is whole
    with pa.input_stream(form.path, compression="detect") as stream:
        lines = pa.PythonFile(_WithoutComments(stream, form), mode="r") if by_line else stream
        reader = pyarrow.csv.open_csv(
            lines,
            pyarrow.csv.ReadOptions(
                block_size=block,
                use_threads=False,
                skip_rows=0 if by_line else form.skipped,
                column_names=[str(place) for place in range(len(form.names))],
                encoding="utf8" if by_line or form.encoding.startswith("utf-8") else form.encoding,
            ),
            pyarrow.csv.ParseOptions(delimiter=form.separator),
            pyarrow.csv.ConvertOptions(**convert),
        )
        with closing(reader):
            if kinds is None:
                yield pa.RecordBatch.from_pylist([], schema=reader.schema)
            yield from reader


class _WithoutComments(io.RawIOBase):
    """The rows of a file as UTF-8, without the head and without comments."""

    def __init__(self, stream: Any, form: Csv) -> None:
        self.lines = (line for _, line in _kept_lines(stream, form))
        self.left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        parts, size = [self.left], len(self.left)
        while size < len(buffer) and (line := next(self.lines, None)) is not None:
            parts.append(line.encode("utf-8", "replace"))
            size += len(parts[-1])
        found = b"".join(parts)
        count = min(len(found), len(buffer))
        buffer[:count], self.left = found[:count], found[count:]
        return count


def _kept_lines(stream: Any, form: Csv) -> Iterator[tuple[int, str]]:
    """(number in the file, line with its end) of what lies below the head and is neither blank nor a comment."""
    text = io.TextIOWrapper(stream, form.encoding, errors="replace", newline="")
    for number, line in enumerate(text, 1):
        if number > form.skipped and line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def read_rows(form: Csv) -> Iterator[tuple[int, list[str]]]:
    """(line of the file that it begins in, cells) of every row: slow, for messages."""
    with pa.input_stream(form.path, compression="detect") as stream:
        begun: list[int] = []

        def lines() -> Iterator[str]:
            for number, line in _kept_lines(stream, form):
                begun.append(number)
                yield line

        for cells in csv.reader(lines(), delimiter=form.separator):
            yield begun[0], cells
            begun.clear()


def line_of(form: Csv, row: int, rows: int | None = None) -> int:
    """The line of the file, 1 for its first, that row number `row` (0 is the first below the head) begins in.

    Args:
        rows: how many rows there are, where that is known: then most files need not be read again.
    """
    if (
        rows is not None
        and not (form.comments or form.damaged)
        and form.encoding in ("utf-8", "utf-8-sig", "cp1252", "latin-1")
    ):
        ends = 0
        with pa.input_stream(form.path, compression="detect") as stream:
            while block := stream.read(1 << 18):
                ends += block.count(b"\n")
                last = block[-1:]
        if ends + (last != b"\n") == form.skipped + rows:
            return form.skipped + row + 1
    for number, (line, _) in enumerate(read_rows(form)):
        if number == row:
            return line
    return form.skipped + row + 1


def bad_row(form: Csv, places: Sequence[int]) -> str | None:
    """What is wrong with the first row that does not fit: its number of cells, or one that should be a number.

    Args:
        places: of the columns that hold numbers.
    """
    for line, cells in read_rows(form):
        if len(cells) != len(form.names):
            wanted = len(form.names)
            return f"row {line}: Expected {wanted} columns, got {len(cells)}; give every row as many cells as the first"
        for place in places:
            if not reads_as_number(cells[place], form.decimal):
                return not_a_number(f"row {line}", form.names[place], cells[place])
    return None


def reads_as_number(text: str, decimal: str = ".") -> bool:
    """A number, or a spelling of nothing, which is a missing value."""
    text = text.strip()
    if text in _NULLS:
        return True
    if decimal == ",":
        return "." not in text and bool(_NUMBER.fullmatch(text.replace(",", ".")))
    return bool(_NUMBER.fullmatch(text))


def not_a_number(row: str, name: str, cell: str) -> str:
    """The words for a cell that is none."""
    cell = cell if len(cell) <= 80 else f"{cell[:77]}..."
    guess = ""
    if _GROUPS.fullmatch(cell.strip()):
        guess = " (write thousands without separators)"
    elif _COMMA.fullmatch(cell.strip()):
        guess = " (its comma may be a decimal point, and no cell before has one)"
    elif _STAMP.fullmatch(cell.strip()):
        guess = " but a time (write date and time into one column, or name the one with time stamps by data.time)"
    elif "." in cell and _NUMBER.fullmatch(cell.strip()):
        guess = " where cells have decimal commas"
    return f"{row} of column {name!r} is {cell!r}, which is no number{guess}; fix it, or name other data.columns"
