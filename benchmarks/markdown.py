"""Tables for docs/results: of the stages of benchmarks.gpu, and between marks in a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.rows import Kept, StageFile

_WIDE = 7  # figures of a stage up to which each has a column


def page(files: Iterable[StageFile], names: Mapping[str, str], *, dry_run: bool = False) -> str:
    """All stages as one page.

    Args:
        names: folder -> what stands for it, as no machine's paths belong into a page. dry_run: it was one.
    """
    head = (
        "# A dry run on a CPU, at toy size: no figure here says anything of a GPU" if dry_run else "# Measured on a GPU"
    )
    text = "\n\n".join([head, *map(section, files)])
    for folder, name in names.items():
        text = text.replace(folder, name)
    return f"{text}\n"


def section(file: StageFile) -> str:
    """A stage: its table, what was not finished or failed, and command, commit, device, versions, seeds."""
    machine = file["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value != "none")
    measured = [row for row in file["rows"] if row.get("figures")]
    seeds = sorted({seed for row in file["rows"] for seed in row["seeds"]})
    many = "seed" if len(seeds) == 1 else "seeds"
    parts = [
        f"## {file['title']}",
        f"`{file['command']}`, commit `{file['commit']}`, {machine['device']}, {machine['cores']} cores, {versions}, "
        f"{many} {', '.join(map(str, seeds))}. Median, and lowest to highest of the turns or seeds.",
    ]
    if measured:
        parts.append(table(measured))
    if rest := [row for row in file["rows"] if row["status"] != "done"]:
        parts.append("\n".join(f"- {row['name']}: **{row['status']}**{_why(row)}" for row in rest))
    return "\n\n".join(parts)


def table(rows: Sequence[Kept]) -> str:
    """A line a row and a column a figure, or a line a figure where there are many."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("figures", {})))
    if len(names) > _WIDE:
        lines = [[row["name"], name, cell(values)] for row in rows for name, values in row.get("figures", {}).items()]
        return _lines(["row", "figure", "value"], lines)
    lines = [[row["name"], *(cell(row.get("figures", {}).get(name, [])) for name in names)] for row in rows]
    return _lines(["row", *names], lines)


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table_lines([head, *rows]))


def table_lines(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table, its head first."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return [rows[0], f"|{'---|' * len(lines[0])}", *rows[1:]]


def marked_anew(page: str, found: Mapping[str, str]) -> str:
    """The page with each block, by its name, between its marks.

    Raises:
        ValueError: a block has no marks there, or more than one pair.
    """
    for name, block in found.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if (page.count(start), page.count(end)) != (1, 1) or page.index(start) > page.index(end):
            raise ValueError(f"the page needs {start.strip()} once, alone on its line, and {end} once after it")
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{block}\n\n{end}{rest.partition(end)[2]}"
    return page


def cell(values: Sequence[float]) -> str:
    """ "2,512 (2,490 to 2,530)", or one value alone."""
    if not values:
        return ""
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    """Four digits that count, no fewer than all before the point."""
    if value == int(value):
        return f"{int(value):,}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"


def _why(row: Kept) -> str:
    return f": {row['error'].replace('|', '/')}" if row.get("error") else ""
