"""Who hears of a run while it goes on: hooks of the user's, and the logging libraries that people use already.

A listener is a function of an event and what belongs to it: "log" and a line of metrics.jsonl as a dictionary,
"checkpoint" and the path of its folder, "end" and the path of the run's folder, where summary.json then lies, or "stop"
and that path where training was interrupted or failed.
It is called by the main process alone. What it gets is its own to change: nothing of a run depends on it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nepa_core.runtime.checkpoint import read_json, write_whole

Listener = Callable[[str, Any], object]

KEPT = "logger.json"
"""The file in a run that has the name under which each library keeps it, for the next sitting."""
PROJECT = "nepa"
OVER = {"end": "FINISHED", "stop": "KILLED"}
"""Events after which a sitting logs no more, and what MLflow calls it."""


def shielded(name: str, listener: Listener) -> Listener:
    """A listener whose errors are said, the same kind once, and end nothing."""
    told = set[str]()

    def listen(event: str, what: Any) -> None:
        try:
            listener(event, what)
        except (Exception, SystemExit) as error:
            line = f"{name} failed on {event!r}, and the run goes on: {type(error).__name__}: {error}"
            if (kind := f"{event} {type(error).__name__}") not in told:
                print(" ".join(line.split()), file=sys.stderr)
            told.add(kind)

    return listen


def logger(library: str, folder: Path, settings: Mapping[str, Any]) -> Listener:
    """A listener that hands figures, pictures and the card of a run to a library; a run that goes on keeps its name.

    The library is begun at the first event, and not again where that fails.

    Args:
        library: of `LOGGERS`. folder: of the run. settings: keys of its config and their values.
    """
    begun: list[Listener] = []

    def listen(event: str, what: Any) -> None:
        if not begun:
            begun.append(lambda event, what: None)
            begun[0] = LOGGERS[library](folder, {key: str(value) for key, value in settings.items()})
        begun[0](event, what)

    return listen


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, but for its step."""
    return {key: x for key, x in line.items() if isinstance(x, int | float) and key != "step"}


def pictures(folder: Path) -> list[Path]:
    """Those of a run's report."""
    return sorted((folder / "report").glob("*.png"))


def card(folder: Path) -> str:
    """What a run's task said at its end."""
    file = folder / "report" / "card.txt"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def kept(folder: Path, library: str, make: Callable[[], str] = lambda: uuid.uuid4().hex[:12]) -> str:
    """The name of a run in a library: that of the sitting before, or a new one."""
    file = folder / KEPT
    names = read_json(file) if file.exists() else {}
    if library not in names:
        names[library] = make()
        write_whole(file, json.dumps(names, indent=2) + "\n")
    return str(names[library])


def tensorboard(folder: Path, settings: Mapping[str, str]) -> Listener:
    """Event files in RUN/tensorboard; a sitting that goes on takes the place of what was logged beyond its start."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    writers: list[Any] = []

    def listen(event: str, what: Any) -> None:
        if event == "log":
            if not writers:
                writers.append(SummaryWriter(folder / "tensorboard", purge_step=what["step"]))
                writers[0].add_text("config", "\n".join(f"    {key}={x}" for key, x in settings.items()))
            for name, figure in figures(what).items():
                writers[0].add_scalar(name, figure, what["step"])
        elif writers:
            if event == "end":
                for picture in pictures(folder):
                    with Image.open(picture) as image:
                        writers[0].add_image(picture.stem, np.asarray(image.convert("RGB")), dataformats="HWC")
                writers[0].add_text("card", f"```\n{card(folder)}\n```")
            writers[0].flush()

    return listen


def wandb(folder: Path, settings: Mapping[str, str]) -> Listener:
    """A run of Weights & Biases, in the project WANDB_PROJECT, or "nepa"; WANDB_MODE=offline sends nothing."""
    library: Any = importlib.import_module("wandb")
    options = {"id": kept(folder, "wandb"), "name": folder.name, "config": dict(settings), "dir": folder}
    project = None if "WANDB_PROJECT" in os.environ else PROJECT
    run = library.init(project=project, resume="allow", reinit="create_new", **options)

    def listen(event: str, what: Any) -> None:
        if event == "log":
            run.log(figures(what), step=what["step"])
        if event == "end":
            run.log({picture.stem: library.Image(str(picture)) for picture in pictures(folder)})
            run.summary["card"] = card(folder)
        if event in OVER:
            run.finish()

    return listen


def mlflow(folder: Path, settings: Mapping[str, str]) -> Listener:
    """A run of MLflow at MLFLOW_TRACKING_URI, in the experiment that MLFLOW_EXPERIMENT_NAME names, or "nepa"."""
    library: Any = importlib.import_module("mlflow")
    client = library.MlflowClient()

    def begin() -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(name)
        run = client.create_run(found.experiment_id if found else client.create_experiment(name), run_name=folder.name)
        for key, value in settings.items():
            client.log_param(run.info.run_id, key, value[:500])
        return str(run.info.run_id)

    name = kept(folder, "mlflow", begin)

    def listen(event: str, what: Any) -> None:
        if event == "log":
            for key, figure in figures(what).items():
                client.log_metric(name, key, figure, step=what["step"])
        if event == "end":
            for picture in pictures(folder):
                client.log_artifact(name, str(picture), "report")
            client.log_text(name, card(folder), "report/card.txt")
        if event in OVER:
            client.set_terminated(name, OVER[event])

    return listen


def trackio(folder: Path, settings: Mapping[str, str]) -> Listener:
    """A run of Trackio in the project "nepa", on this machine."""
    library: Any = importlib.import_module("trackio")
    name = f"{folder.name}-{kept(folder, 'trackio')}"
    run = library.init(project=PROJECT, name=name, config=dict(settings), resume="allow", embed=False)

    def listen(event: str, what: Any) -> None:
        if event == "log":
            run.log(figures(what), step=what["step"])
        if event == "end":
            run.log({picture.stem: library.Image(str(picture)) for picture in pictures(folder)})
            run.log({"card": library.Markdown(f"```\n{card(folder)}\n```")})
        if event in OVER:
            run.finish()

    return listen


LOGGERS: dict[str, Callable[[Path, Mapping[str, str]], Listener]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}
"""Library -> what makes its listener; each is an extra of this package by that name."""
