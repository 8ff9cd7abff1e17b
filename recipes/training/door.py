"""Pre-training in one call, for the command and for Python: from a recipe to a run and its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.config import override
from nepa_core.runtime.distributed import world
from nepa_core.runtime.load import Network, load
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run, is_run
from recipes.configs import PretrainConfig
from recipes.report import card
from recipes.report.provenance import rendered
from recipes.report.summaries import PretrainSummary
from recipes.resolve import default_out, read_target
from recipes.training import pretraining


@dataclass(frozen=True, repr=False)
class Pretrained:
    """A finished run of pre-training; shown as its verdict.

    Attributes:
        path: its folder.
        summary: the figures of summary.json. verdict: the card, as text. Both are empty on the other ranks.
    """

    path: Path
    summary: PretrainSummary
    verdict: str

    def load(self) -> Network:
        """The trained network and its data, see `nepa_core.load`."""
        return load(self.path)

    def __repr__(self) -> str:
        return self.verdict or f"a run in {self.path}"


def pretrain(
    config: PretrainConfig | str,
    out: str | Path | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> Pretrained:
    """Pre-train and judge; what was interrupted goes on from its checkpoint, and a finished run is only shown.

    Where `config` is the folder of the run itself, it goes on with changes of keys in `nepa_core.runtime.run.MIDWAY`.

    Args:
        config: a config, a recipe such as "recipes.vision:digits", or the folder of a run to go on with.
        out: the folder of the run; by default runs/NAME-OF-THE-RECIPE.
        changes: keys of the config, such as {"train.length.steps": 200}.
        verbose: show progress.

    Raises:
        UserError: the config, its data or the folder can't be used.
        nepa_core.runtime.fit.Interrupted: Ctrl-C, or an interrupted cell of a notebook; a checkpoint has been written.
    """
    if isinstance(config, PretrainConfig):
        target, config, midway = config.recipe, override(config, changes or {}), False
    else:
        target, config = config, read_target(PretrainConfig, config, changes or {})
        midway = is_run(target) and Path(out or target) == Path(target)
    if not (out or target):
        raise UserError("a config that is made in Python has no name to call its folder by: give out=DIR")
    run = Run(Path(out or default_out(target, "pretrain")))
    before = run.summary() is not None
    with world() as ranks, at_work(run, ranks, trains=True, goes_on=midway and bool(changes)):
        summary = pretraining.pretrain(config, run, ranks, midway=midway, show=verbose)
        text = rendered(lambda: card.report(run, summary, config.data), run, before=before) if ranks.is_main else ""
        found = run.summary_of(PretrainSummary) if ranks.is_main else None  # as any other reader finds it
    return Pretrained(run.path, found or {}, text)
