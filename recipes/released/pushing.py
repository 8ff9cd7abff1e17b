"""A run as a folder for the Hugging Face hub: its weights, its config, and a card that says what was learned.

The own layout is a run folder with nothing in it that only training needs, so every task reads it as it reads a run.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field

from nepa_core.basics import FROZEN, UserError
from nepa_core.modality import Modality
from nepa_core.runtime import trust
from nepa_core.runtime.checkpoint import disk_errors, save_checkpoint, write_whole
from nepa_core.runtime.config import import_path, imports_of, keys
from nepa_core.runtime.run import RECORD, Run
from nepa_core.runtime.weights import newest, prediction_head_in
from recipes.released.exporting import ExportOptions, export_released
from recipes.report.provenance import settings_of
from recipes.report.summaries import MadeWith, ProbeSummary

CARD = "README.md"
RECORDS = ("summary.json", "probe.json", RECORD)
"""Figures that go along."""
REPLACED = ["checkpoints/*", "*.safetensors", "*.json"]
"""What an earlier push left, and this one does not hold, goes."""


class PushOptions(BaseModel):
    """Options of `nepa push`."""

    model_config = FROZEN

    to: str | None = Field(
        default=None, description="OWNER/NAME on the Hugging Face hub, the second word; must be given"
    )
    layout: Literal["own", "released"] = Field(
        default="own", description="a run folder, of any task and adapter, or the released layout, of images alone"
    )
    license: str | None = Field(
        default=None,
        description="as the hub spells it, such as apache-2.0; default: none is stated, and the card says so",
    )
    private: bool = Field(default=False, description="a repository made by this command is private")
    dry_run: bool = Field(default=False, description="only write the folder, to look at it; no network is asked")
    out: str | None = Field(default=None, description="that folder, new or empty; default RUN/push")


def name_on_hub(to: str | None) -> str:
    """OWNER/NAME.

    Raises:
        UserError: it is not given, or is none.
    """
    if to is None or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", to):
        raise UserError(f"nepa push RUN OWNER/NAME: {to or 'a name on the hub'} is {'not one' if to else 'missing'}")
    return to


def write_folder(run: Run, config: Any, to: str, options: PushOptions, said: Mapping[str, str], out: Path) -> None:
    """Write weights, config, figures and card: the folder whole, or not at all.

    Args:
        config: of the run. said: what its tasks said of it, text by heading.

    Raises:
        UserError: something stands there already, the run has no weights, or its network has no place in the layout.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder; name another one")
    if options.layout == "released":
        export_released(run, out, ExportOptions(out=str(out)))
        write_whole(out / CARD, card(run, config, to, options, said))
        return
    checkpoint = newest(run)
    tensors = {name: group for name, group in checkpoint.tensors.items() if name in ("model", "ema")}
    if head := prediction_head_in(checkpoint):
        tensors["model_heads"] = head  # of the heads the one that predictions need
    building = out.with_name(f".writing_{out.name}")
    with disk_errors(out):
        shutil.rmtree(building, ignore_errors=True)
        try:
            save_checkpoint(building / "checkpoints", checkpoint._replace(tensors=tensors), keep=1)
            for name in ("config.json", *RECORDS):
                if (run.path / name).exists():
                    shutil.copyfile(run.path / name, building / name)
            write_whole(building / CARD, card(run, config, to, options, said))
            if out.exists():
                out.rmdir()
            building.rename(out)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def upload(to: str, options: PushOptions, folder: Path) -> str:
    """Hand the folder to the hub; the address that it has there.

    Raises:
        UserError: the hub can't be reached or does not take it.
    """
    import huggingface_hub  # half a second to import

    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(to, private=options.private or None, exist_ok=True)
        pushed = hub.upload_folder(repo_id=to, folder_path=folder, delete_patterns=REPLACED, commit_message="nepa push")
    except Exception as error:  # the clients of the hub raise a dozen kinds: no network, no token, no such owner
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{to} can't be pushed: {cause[:200]}; look at the network and at `hf auth whoami`, or write the folder by "
            "dry_run=true and upload it elsewhere by `hf upload`"
        ) from error
    return str(pushed)


def push(run: Run, config: Any, options: PushOptions, said: Mapping[str, str]) -> str:
    """Write the folder and, but for a dry run, upload it.

    Returns:
        What to tell the user.
    """
    to = name_on_hub(options.to)
    if options.dry_run:
        out = Path(options.out or run.path / "push")
        write_folder(run, config, to, options, said, out)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return f"{out}: {size / 1e6:.1f} MB, as it would go to {to}. Nothing was sent. Read {out / CARD} first."
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        write_folder(run, config, to, options, said, folder)
        return f"{run.path} is on the hub, {upload(to, options, folder)}: nepa_core.load({to!r}), init={to}"


# -------------------------------------------------------------------------------------------------------- the card


def card(run: Run, config: Any, to: str, options: PushOptions, said: Mapping[str, str]) -> str:
    """README.md: a head in YAML for the hub, then what was learned, what is not known, and what it was made with."""
    summary = run.summary() or {}
    probe: ProbeSummary | None = run.summary_of(ProbeSummary, "probe.json")
    head: dict[str, Any] = {"library_name": "nepa", "pipeline_tag": "feature-extraction", "tags": tags(config.data)}
    if options.license is not None:
        head["license"] = options.license
    if results := measured(config.data, summary, probe):
        head["model-index"] = [{"name": to.partition("/")[2], "results": results}]
    shape, causal = config.model, getattr(config, "causal", True)
    causal = config.objective.causal if hasattr(config, "objective") else causal
    kind = type(config).task
    texts = [
        f"A {'causal' if causal else 'bidirectional'} network of next-embedding prediction: {shape.depth} blocks of "
        f"width {shape.dim}, {shape.heads} heads; adapter `{import_path(type(config.data))}`; made by `nepa {kind}`.",
        *(f"## {title}\n\n{fenced(text)}" for title, text in said.items()),
        f"## What is not known\n\n{bullets(unknown(config, summary, probe))}",
        f"## Use\n\n{use(config, to, options)}",
        f"## Data, recipe and settings\n\n{fenced(settings_of(run))}",
        f"## Made with\n\n{bullets(made_with(summary, probe))}",
        "## Licence\n\n" + (options.license or "None is stated: ask the author before you use these weights."),
    ]
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {to.partition('/')[2]}\n\n" + "\n\n".join(texts) + "\n"
    )


def tags(data: Modality) -> list[str]:
    return ["nepa", "next-embedding-prediction", type(data).__name__.lower()]


def measured(data: Modality, summary: Mapping[str, Any], probe: ProbeSummary | None) -> list[dict[str, Any]]:
    """The figures as the hub lists them."""
    name = str(getattr(data, "root", None) or getattr(data, "source", None) or type(data).__name__)
    dataset = {"name": Path(name).name, "type": re.sub(r"[^\w.-]+", "-", Path(name).name.lower())}
    found: list[tuple[str, str, float]] = []
    if "retrieval_top1" in summary:
        found.append(("accuracy", "next token identified", summary["retrieval_top1"]))
    if "accuracy" in summary:
        found.append(("accuracy", "accuracy after fine-tuning", summary["accuracy"]))
    if "map" in summary:
        found.append(("mean_average_precision", "mAP after fine-tuning", summary["map"]))
    if probe is not None:
        best = probe["best"]
        kinds = {
            "accuracy": best.get("accuracy"),
            "mean_average_precision": best.get("map"),
            "r_squared": best.get("r2"),
        }
        found += [(kind, f"probe of {best['name']}", each) for kind, each in kinds.items() if each is not None]
    return [
        {
            "task": {"type": "feature-extraction"},
            "dataset": dict(dataset),  # one object twice would be an alias in YAML
            "metrics": [{"type": kind, "name": name, "value": round(value, 4)}],
        }
        for kind, name, value in found
    ]


def unknown(config: Any, summary: Mapping[str, Any], probe: ProbeSummary | None) -> Iterator[str]:
    """What a reader might take for granted."""
    if not summary:
        yield "Whether anything was learned: this run has not ended, or was imported, and has no verdict of its own."
    if probe is None:
        yield "What the features are worth for labels: no probe was run (`nepa probe`)."
    yield f"How much depends on the seed: this is one run, train.seed={config.train.seed}."
    yield "How it does on other data than the held-out samples above."


def made_with(summary: Mapping[str, Any], probe: ProbeSummary | None) -> Iterator[str]:
    """Command, commit and device of each figure above, and what training took."""
    sources: dict[str, Mapping[str, Any]] = {"Training": summary, "Probe": probe or {}}
    for title, figures in sources.items():
        if (made := figures.get("made_with")) is not None:
            yield f"{title}: {origin(made)}"
    if "seconds" in summary:
        steps, seconds, parameters = (summary[key] for key in ("steps", "seconds", "parameters"))
        yield f"{steps:,} steps in {seconds:,.0f} s, {parameters:,} parameters trained."


def origin(made: MadeWith) -> str:
    """A line on where a figure is from."""
    many = f", {made['processes']} processes" if made["processes"] > 1 else ""
    commit = made["commit"] or "unknown"
    return f"`{made['command']}`, commit {commit}, on {made['device']}{many}, torch {made['torch']}."


def use(config: Any, to: str, options: PushOptions) -> str:
    """How to load it, and what it needs."""
    needed = foreign(config)
    trusting = ", trust=True" if needed else ""
    code = [
        "import nepa_core",
        "",
        f'net = nepa_core.load("{to}"{trusting})',
        "features = net.encode(batch)  # a batch of its adapter, or a list of samples",
    ]
    lines = [fenced("\n".join(code), "python")]
    if needed:
        lines.append(
            f"It needs {', '.join(f'`{name}`' for name in needed)}, which is not in this repository: ask the author "
            "for it, look at it, and put it where you run this. Code that someone else names is run only with "
            "`trust=True` (on the command line `trust=true`)."
        )
    start = "`nepa finetune RECIPE init=" + to + "`"
    lines.append(f"{start} starts from it; `nepa_core.load(..., data=adapter)` reads other data of the same form.")
    if options.layout == "own":
        lines.append(
            f"`hf download {to} --local-dir DIR` gives a run folder, for `nepa probe DIR`, `nepa embed DIR` ..."
        )
    return "\n\n".join(lines)


def foreign(config: Any) -> list[str]:
    """The code and the files of orders that the config names, and this program does not bring."""
    code = [path for path in imports_of(config) if not trust.is_ours(path.partition(":")[0])]
    files = [str(value) for value in keys(config.data).values() if str(value).endswith((".npy", ".txt"))]
    return [*dict.fromkeys(code), *files]


def fenced(text: str, language: str = "text") -> str:
    body = text.strip("\n")  # the first row of a table begins with spaces
    return f"```{language}\n{body}\n```"


def bullets(lines: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
