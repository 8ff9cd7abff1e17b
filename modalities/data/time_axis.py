"""The time stamps of a table: that they rise, where time is missing between two rows, and which columns only count.

Shapes: T rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modalities.data.csv_files import NULLS
from modalities.data.growing import Array, Growing, is_whole, rises, steps, usual_step
from nepa_core.basics import UserError

_SECOND = 1_000_000  # stamps are kept in microseconds
_HOUR, _DAY = 3600 * _SECOND, 86_400 * _SECOND
_WEEKEND = 5 * _DAY  # the longest time between two rows of a series of working days that counts as a holiday
_UNUSUAL = 1.5  # times the usual step: more is a gap, less a long month or a late reading
_MANY = 1000  # rows that tell cheaply that a column holds no dates
_FEW = 8  # rows that must count alike before a column is taken for a counter
_CHANGE_MONTHS = (3, 4, 9, 10, 11)  # in which a country or another sets its clocks

_ISO, _ISO_ZONED = "ISO 8601", "ISO 8601 with a zone"
_GERMAN = ("%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y")
_FORMATS = (_ISO, _ISO_ZONED, *_GERMAN, "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d")
"""Time stamps in text that can be read in one way alone: a slash behind a day may be a month's."""
_ODD_FORMS = (*_FORMATS[2:], *_FORMATS[:2])  # ISO last: of what is none, every cell is tried by itself
_NUMBERS, _NUMBER = "numbers", r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"

INDEX = re.compile(r"|unnamed: ?\d+(\.\d+)?|(unnamed: ?\d+)?(_level_\d+)?|__index_level_\d+__", re.IGNORECASE)
"""Names of the column that pandas writes for its index."""
COUNTERS = re.compile(
    r"(index|idx|id|rec(ord)?|row|no|nr|number|#|step|obs)([ _.]*(id|index|no|nr|num|number))?\.?", re.I
)
"""Names of columns that count rows, where their numbers rise."""
_CLOCKS = re.compile(r"(^|[^a-z])(time|date|datetime|timestamp|epoch|unix|utc|ts|sec|seconds|ms|millis)([^a-z]|$)|"
                     r"time$|timestamp|^(unix|epoch)|^t$", re.IGNORECASE)  # fmt: skip
_EPOCHS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_EPOCH_RANGE = (10**8, 5 * 10**9)  # seconds since 1970, of 1973 to 2128


AN_INDEX = "an index"
DATES = "dates as numbers"


class Stamps(NamedTuple):
    """Time stamps [T] that were read, as numbers to compare, and how to say one and a difference of two.

    Attributes:
        values: [T] int64 (microseconds, or numbers as they are) or float64.
        dated: they are microseconds since 1970, without a zone unless `zoned`.
    """

    values: Array
    dated: bool = False
    zoned: bool = False

    def show(self, row: int) -> str:
        """One of them, as a message says it."""
        value = self.values[row]
        if not self.dated:
            return str(value)
        text = str(np.datetime64(int(value), "us")).replace("T", " ").removesuffix(".000000")
        return text.removesuffix(" 00:00:00")

    def length(self, difference: float) -> str:
        """A difference of two, as a message says it."""
        if not self.dated:
            return f"{difference:g}" if isinstance(difference, float) else str(difference)
        days, rest = divmod(round(difference / _SECOND), 86_400)
        clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
        shown = f"{days} day{'' if days == 1 else 's'}"
        return clock if not days else shown if not rest else f"{shown}, {clock}"


class NoStamp(NamedTuple):
    """The place in a block of a cell that is no time stamp; `missing`: there is none in it."""

    place: int
    missing: bool


class StampReader:
    """Time stamps of a column, block by block: numbers, dates, times, or text that tells them."""

    def __init__(self) -> None:
        self._read = Growing()
        self._form: str | None = None
        self._dated = self._zoned = False

    def add(self, block: pa.Array) -> NoStamp | None:
        """Read one more block; None, or the first cell of it that is something else, or else is missing."""
        block = block.dictionary_decode() if pa.types.is_dictionary(block.type) else block
        empty = _is_empty(block)
        if (odd := self._add(block.filter(pc.invert(empty)))) is not None:
            return NoStamp(int(np.flatnonzero(~empty.to_numpy(zero_copy_only=False))[odd]), missing=False)
        missing = empty.index(pa.scalar(True)).as_py()
        return None if missing < 0 else NoStamp(missing, missing=True)

    def _add(self, block: pa.Array) -> int | None:
        kind = block.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return self._add_text(pc.utf8_trim_whitespace(block))
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            self._zoned = pa.types.is_timestamp(kind) and kind.tz is not None
            self._add_times(pc.cast(block, pa.timestamp("us", kind.tz if self._zoned else None), safe=False))
        elif pa.types.is_time(kind):
            self._add_times(pc.cast(block, pa.time64("us"), safe=False))
        elif pa.types.is_floating(kind) or pa.types.is_integer(kind):
            numbers = block.to_numpy(zero_copy_only=False)
            self._read.add(numbers.astype(np.int64 if numbers.dtype.kind in "iu" else np.float64, copy=False))
        else:
            return 0
        return None

    def _add_times(self, times: pa.Array) -> None:
        self._dated = True
        self._read.add(pc.cast(times, pa.int64()).to_numpy(zero_copy_only=False))

    def _add_text(self, texts: pa.Array) -> int | None:
        begun = self._form is not None
        if self._form is None and len(texts):
            self._form = next((form for form in _FORMATS if not _parsed(texts[:1], form).null_count), None)
        if self._form is None:
            return _odd_one(texts) if len(texts) else None
        times = _parsed(texts, self._form)
        if times.null_count:
            return _first(times.is_null()) if begun else _odd_one(texts)
        self._zoned = self._form == _ISO_ZONED
        self._add_times(times)
        return None

    def stamps(self) -> Stamps:
        """All that were read."""
        values = self._read.whole()
        dates = None if self._dated else compact_dates(values)
        return Stamps(values, self._dated, self._zoned) if dates is None else Stamps(dates, dated=True)


def _parsed(texts: pa.Array, form: str) -> pa.Array:
    """Times as microseconds; null where a text has another form."""
    if form not in (_ISO, _ISO_ZONED):
        return pc.strptime(texts, form, "us", error_is_null=True)
    kind = pa.timestamp("us", "UTC" if form == _ISO_ZONED else None)
    try:
        return pc.cast(texts, kind)
    except pa.ArrowInvalid:  # of which cell it does not say, so they are halved down to one
        if len(texts) == 1:
            return pa.nulls(1, kind)
        half = len(texts) // 2
        return pa.concat_arrays([_parsed(texts[:half], form), _parsed(texts[half:], form)])


def _first(mask: pa.Array) -> int:
    return int(mask.index(pa.scalar(True)).as_py())


def _is_empty(block: pa.Array) -> pa.Array:
    """Which cells hold nothing, or text that stands for nothing."""
    if not (pa.types.is_string(block.type) or pa.types.is_large_string(block.type)):
        return block.is_null(nan_is_null=True)
    nothing = pa.array(NULLS, block.type)
    return pc.fill_null(pc.is_in(pc.utf8_trim_whitespace(block), nothing), True)


def _odd_one(texts: pa.Array) -> int:
    """Of cells that are not all time stamps of one form, the one to blame.

    The first that is neither a number nor a time stamp; where all are, the first of another form than most have.
    """
    rows: dict[str, list[int]] = {form: [] for form in (_NUMBERS, *_ODD_FORMS)}
    for start in range(0, len(texts), _MANY):  # for a long column of words the first ones do
        part = texts[start : start + _MANY]
        left = np.arange(len(part))
        for form, found in rows.items():
            here = part.take(pa.array(left))
            fits = pc.match_substring_regex(here, _NUMBER) if form == _NUMBERS else _parsed(here, form).is_valid()
            mask = fits.to_numpy(zero_copy_only=False)
            found += (start + left[mask]).tolist()
            left = left[~mask]
        if len(left):
            return start + int(left[0])
    most = max(rows, key=lambda form: len(rows[form]))
    return min((found[0] for form, found in rows.items() if form != most and found), default=0)


def compact_dates(values: Array) -> Array | None:
    """Microseconds since 1970 [T] of whole numbers that are all dates of 1900 to 2100, such as 20200131; else None.

    YYYYMMDD, and hours (2020013123), minutes and seconds behind it.
    """
    if not len(values) or not (values.min() >= 19_000_101 and values.max() <= 21_001_231_235_959):
        return None
    if not is_whole(values) or (len(values) > _MANY and compact_dates(values[:_MANY]) is None):
        return None
    numbers = values.astype(np.int64)
    clocks = (len(str(numbers.max())) - 8) // 2  # pairs of digits behind the day
    parts: list[Array] = []
    for _ in range(clocks):
        numbers, last = np.divmod(numbers, 100)
        parts.append(last)
    years, months, days = numbers // 10_000, numbers // 100 % 100, numbers % 100
    return calendar_stamps(years, months, days, *reversed(parts))


def calendar_stamps(
    years: Array,
    months: Array,
    days: Array | int = 1,
    hours: Array | int = 0,
    minutes: Array | int = 0,
    seconds: Array | int = 0,
) -> Array | None:
    """Microseconds since 1970 [T] of whole numbers [T] each; None where one of them is no date of 1900 to 2100."""
    every = [np.asarray(each) for each in (years, months, days, hours, minutes, seconds)]
    ends = ((1900, 2100), (1, 12), (1, 31), (0, 23), (0, 59), (0, 59))
    if not all(is_whole(each) for each in every) or not all(
        ((each >= low) & (each <= high)).all() for each, (low, high) in zip(every, ends, strict=True)
    ):
        return None
    whole = [each.astype(np.int64) for each in every]
    month = (whole[0] - 1970) * 12 + whole[1] - 1
    day = month.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + whole[2] - 1
    if (day.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) != month).any():  # the 31st of June
        return None
    stamps: Array = day * _DAY + (whole[3] * 3600 + whole[4] * 60 + whole[5]) * _SECOND
    return stamps


def check_rising(path: str, name: str, stamps: Stamps, row: Callable[[int], str]) -> None:
    """See that time stamps rise from row to row.

    Args:
        row: place of a row -> how a message calls it.

    Raises:
        UserError: one is that of the row above, or earlier: what it is, and what to do.
    """
    values = stamps.values
    falls = np.flatnonzero(values[1:] <= values[:-1])
    if not len(falls):
        return
    place = int(falls[0])
    same = values[place + 1] == values[place]
    what = "repeats the time stamp of" if same else "is earlier than"
    where = f"{path}: {row(place + 1)} ({stamps.show(place + 1)}) {what} the row above"
    if _is_clock_change(stamps, place):
        raise UserError(
            f"{where}: the hour that clocks go through twice when daylight saving ends; write the time stamps in "
            "UTC, or remove the second of the two hours"
        )
    backwards = len(falls) + 1 == len(values) and bool((values[1:] < values[:-1]).all())
    if same:
        cure = f"remove the rows that stand twice ({len(falls):,} do{'es' if len(falls) == 1 else ''}), or sort them"
    elif backwards:
        cure = "the last row comes first: turn the rows round, sorted"
    elif values[place + 1] == values[0]:
        cure = "several series seem to stand below each other: give each a file; else sort the rows"
    else:
        cure = "sort the rows"
    raise UserError(f"{where}; {cure} by {name!r}, or name other columns by data.time and data.columns")


def _is_clock_change(stamps: Stamps, place: int) -> bool:
    """Whether row place + 1 goes an hour back behind row `place` as a clock of local time does in autumn."""
    values = stamps.values
    if not stamps.dated or stamps.zoned or len(values) < 3:
        return False
    step = usual_step(values[max(place - 1000, 0) : place + 1000])
    back = values[place] + step - values[place + 1]
    moment = np.datetime64(int(values[place + 1]), "us")
    month = int(moment.astype("datetime64[M]").astype(int)) % 12 + 1
    night = (moment - moment.astype("datetime64[D]")) <= np.timedelta64(3, "h")
    return bool(0 < step <= _HOUR and back == _HOUR and month in _CHANGE_MONTHS and night)


class Gaps(NamedTuple):
    """Where time is missing.

    Attributes:
        breaks: places of the rows that come later behind the one above than is usual.
        note: one line, without the file, or None where there is none.
    """

    breaks: tuple[int, ...] = ()
    note: str | None = None


def find_gaps(stamps: Stamps, row: Callable[[int], str]) -> Gaps:
    """Rows that come more than one and a half times the usual (the median) step behind the row above.

    Of daily rows that leave out two days of every week the same way, up to five days are a weekend with a holiday.
    """
    values = stamps.values
    if len(values) < 3:
        return Gaps()
    usual = usual_step(values)
    largest = _UNUSUAL * usual
    if stamps.dated and usual == _DAY and len(np.unique(values // _DAY % 7)) <= 5 and len(values) > 10:
        largest = _WEEKEND
    late = np.flatnonzero(np.concatenate([each > largest for each in steps(values)]))
    if not len(late):
        return Gaps()
    lengths = values[late + 1] - values[late]
    worst = int(late[lengths.argmax()])
    count = f"{len(late):,} gaps in time, the longest" if len(late) > 1 else "a gap in time"
    text = (
        f"{count} before {row(worst + 1)}: from {stamps.show(worst)} to {stamps.show(worst + 1)}, "
        f"{stamps.length(lengths.max().item())} where {stamps.length(usual)} is usual"
    )
    return Gaps(tuple((late + 1).tolist()), text)


# ---------------------------------------------------------------------------------------- columns that only count


def may_count(name: str, values: Array) -> bool:
    """Whether a column may be an index, a row number or a clock, by its name and its first values [t]."""
    return counts(name, values, few=0) is not None


def counts(name: str, values: Array, few: int = _FEW) -> str | None:
    """What a column counts, in words, or None where it is a channel.

    Whole numbers that rise or fall by the same step in every row, or rise under the name of a counter or a clock, or
    are seconds since 1970 (or thousandths, ...) and rise mostly by one step, or are dates (20200131) and rise; and
    other numbers that rise under the name of a clock. Under the names that pandas gives its index, whole numbers of
    any kind.

    Args:
        values: [T], all of them.
        few: rows that must agree where only the numbers speak for it.
    """
    name = name.strip()
    whole = is_whole(values)
    if INDEX.fullmatch(name) and whole:
        return AN_INDEX
    evenly = values.dtype.kind in "iu" and len(values) >= few and _is_even(values)
    if not rises(values):
        return "counts the rows" if evenly and len(values) >= 2 and values[0] != values[1] else None
    if len(values) >= few and compact_dates(values) is not None:
        return DATES
    if whole and (epoch := _epoch(values)):
        return f"{epoch} since 1970"
    if _CLOCKS.search(name):
        return "a clock"
    if not whole:
        return None
    return "counts the rows" if evenly or COUNTERS.fullmatch(name) else None


def _is_even(values: Array) -> bool:
    """Whether every row differs from the one above it by the same."""
    return all(bool((each == values[1] - values[0]).all()) for each in steps(values))


def _epoch(values: Array) -> str | None:
    """In what unit whole numbers that rise mostly by one step are times since 1970; None where they are none."""
    usual = usual_step(values)
    if len(values) < 2 or 2 * sum(int((each == usual).sum()) for each in steps(values)) < len(values):
        return None
    low, high = _EPOCH_RANGE
    return next((name for name, unit in _EPOCHS.items() if values[0] >= low * unit and values[-1] <= high * unit), None)


def clock_stamps(what: str, values: Array) -> Stamps:
    """The numbers [T] of a column that counts `what` as time stamps."""
    if what == DATES and (dates := compact_dates(values)) is not None:
        return Stamps(dates, dated=True)
    unit = _EPOCHS.get(what.removesuffix(" since 1970"))
    if unit is None:
        return Stamps(values)
    whole = values.astype(np.int64, copy=False)
    return Stamps(whole * (_SECOND // unit) if unit <= _SECOND else whole // (unit // _SECOND), dated=True)


def as_clock(found: dict[str, tuple[str, Array]]) -> str | None:
    """Which of the columns that count (name -> what it counts, its values [T]) tells the time best; None: none does.

    It must rise, and an index or a row number may jump once, and at one place in a hundred: more, and rows were picked
    from a larger table.
    """
    order = (DATES, "a clock", "since 1970", "counts the rows", AN_INDEX)
    rising = {name: each for name, each in found.items() if rises(each[1])}
    for kind in order:
        for name, (what, values) in rising.items():
            usual = usual_step(values)
            jumps = sum(int((each > _UNUSUAL * usual).sum()) for each in steps(values))
            if what.endswith(kind) and (kind in order[:3] or jumps <= 1 + len(values) // 100):
                return name
    return None
