"""From the released layout to a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.checkpoint import Checkpoint, load_latest, save_checkpoint
from nepa_core.runtime.config import override
from nepa_core.runtime.released import NetworkState, Released, averages, digests, find, listed, read_released
from nepa_core.runtime.run import RECORD, Run, is_run, refuse_holder
from nepa_core.runtime.weights import joined
from recipes import vision
from recipes.configs import FinetuneConfig, PretrainConfig
from recipes.report.provenance import provenance
from recipes.report.summaries import ImportRecord

DECIDED = ("model.", "data.patch", "data.channels", "causal", "objective.causal", "readout")
"""Keys that come with the weights; of the network all do."""


def read_config(target: str, changes: Mapping[str, Any]) -> PretrainConfig | FinetuneConfig:
    """The config of the run that a checkpoint becomes."""
    return run_config(read_released(find(target)), changes)


def import_released(source: str, run: Run, changes: Mapping[str, Any]) -> str:
    """Write the run of a released checkpoint; what was imported before stays as it is, and what was damaged is fixed.

    Without changes a run that was imported before keeps the settings it has.

    Returns:
        What to tell the user.

    Raises:
        UserError: the source is a run, or would hold this one, the checkpoint can't be read (see `read_released`), or
            the folder holds another run.
    """
    if is_run(source):
        raise UserError(f"{source} is a run already; name a folder that `nepa export` wrote, or OWNER/NAME on the hub")
    folder = find(source)
    refuse_holder(str(folder))
    if run.path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"out={run.path} lies in {source}, which is read and stays as it is; name another folder by out=DIR"
        )
    released = read_released(folder)
    config = run_config(released, changes)
    record: ImportRecord = {
        "source": source,
        "sha256": digests(folder),
        "config": released.facts.model_dump(mode="json", exclude_unset=True),
        "preprocessor": released.preprocessor,
        "made_with": provenance(),
    }
    before = run.summary_of(ImportRecord, RECORD)
    if before is None and (run.metrics_path.exists() or run.checkpoints.exists()):
        raise UserError(f"{run.path} holds a run that was trained here; name another folder with out=DIR")
    if before is not None and before["sha256"] != record["sha256"]:
        raise UserError(f"{run.path} holds other weights, from {before['source']}; name another folder with out=DIR")
    kept = config if before is None or changes else run.load_config(type(config))
    run.open(kept)
    if before is None:
        run.write_summary(record, RECORD)
    if load_latest(run.checkpoints)[0] is None:
        save_checkpoint(run.checkpoints, first_checkpoint(released), keep=1)
    return describe(released, folder, run, kept)


def run_config(released: Released, changes: Mapping[str, Any]) -> PretrainConfig | FinetuneConfig:
    """The released recipe around this network, of the base or the large size.

    Raises:
        UserError: a change is to a key that the weights decide, or does not fit.
    """
    if decided := [key for key in changes if key.partition(".")[0] == "model" or key in DECIDED]:
        raise UserError(f"{listed(decided)} can't be set: the checkpoint decides it")
    facts, large = released.facts, released.config.dim > vision.base_in1k().model.dim
    found: dict[str, Any] = {
        "recipe": "",
        "model": released.config,
        **{f"data.{key}": value for key, value in released.settings.items()},
    }
    if released.averaged is None:
        found["train.ema"] = None
    if released.head:
        found |= {"init": None, "freeze_embedder": False, "causal": facts.is_causal, "readout": "mean"}
        tuned = vision.large_in1k_finetune() if large else vision.base_in1k_finetune()
        return override(tuned, found | dict(changes))
    found["objective.causal"] = facts.is_causal
    return override(vision.large_in1k() if large else vision.base_in1k(), found | dict(changes))


def first_checkpoint(released: Released) -> Checkpoint:
    """What the fit loop would store before its first step, so that the run can also be trained on."""
    tensors = {"model": joined(NetworkState(released.model, released.head)), "optimizer": {}, "tally": {}}
    if released.averaged is not None:
        tensors["ema"] = joined(released.averaged)
    state = {"metrics_bytes": 0, "seconds": 0.0, "tokens": 0, "tally_steps": 0, "unreadable": []}
    return Checkpoint(0, tensors, state)


def describe(released: Released, folder: Path, run: Run, config: PretrainConfig | FinetuneConfig) -> str:
    """What the run is, which weights are read, and how held-out images are, in a few lines."""
    facts, network = released.facts, released.config
    shown = facts.image_size if isinstance(facts.image_size, int) else " x ".join(map(str, facts.size))
    count = sum(value.numel() for value in (*released.model.values(), *released.head.values()))
    kind = f"fine-tuned for {len(released.labels)} classes" if released.head else "pre-trained"
    lines = [
        f"{run.path}: {kind}, {'causal' if facts.is_causal else 'bidirectional'}, {network.depth} layers of width "
        f"{network.dim}, {count / 1e6:.1f} million parameters, patch {facts.patch_size}, image {shown}, "
        f"{'with' if released.averaged else 'without'} averaged weights"
    ]
    if (side := averages(folder)) is not None:
        lines.append(f"The averaged weights are those of {side.name}; evaluate, probe, finetune and init= read these.")
    if released.head and (seen := config.data.held_out_as()) is not None:
        lines.append(f"Held-out {seen}.")
    return "\n".join(lines)
