"""nepa runs: which runs there are, how far they are, and what differs between them.

`nepa runs` lists those in runs/, and `nepa runs DIR` those in another folder: task, recipe, steps, the figures of their
summaries and of the best row of their probe, and below the keys whose values differ among the runs of a recipe.
`nepa runs RUN RUN ...` also draws their curves over each other, on one page. Runs are only read, also while they train.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN, UserError
from recipes.report.runs import read_run, report, runs_in, text


class Options(BaseModel):
    """Options of `nepa runs`."""

    model_config = FROZEN

    out: str = Field(default="runs-compared", description="folder of the page on two runs or more")


def main(folders: Sequence[str], options: Options) -> None:
    named: dict[Path, Path] = {}
    for path in map(Path, folders):
        named.setdefault(path.resolve(), path)
    paths = list(named.values())
    if len(paths) < min(len(folders), 2):
        raise UserError(f"{paths[0]} is named {len(folders)} times: name another run beside it, or it once")
    if len(paths) < 2:
        if "out" in options.model_fields_set:
            raise UserError(f"out={options.out} is for the page of two runs or more: name them, or leave out= away")
        print(text([read_run(path) for path in runs_in(paths[0] if paths else Path("runs"))]))
        return
    if (Path(options.out) / "config.json").exists():
        raise UserError(f"out={options.out} is a run; name another folder for the page")
    page, folder = report([read_run(path) for path in paths]), Path(options.out)
    page.write(folder)
    print(page.text(folder))
