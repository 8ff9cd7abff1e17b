"""nepa inspect: what a run attends to, what it expects next, and what its layers tell apart, as pictures.

For every sample: the attention of a query token over the input; the similarity map, the cosine between the embedding
predicted at the query's place and every token of the sample; and the tokens in the colours of the first three
principal components of each layer, taken over all samples shown. Below stands how far and how wide each layer
looks. RUN/inspect/ gets the PNGs and one page that holds them. The adapter's `describe` says how its samples
are drawn. Keys that begin with data. may be changed, such as data.root=DIR.

worst=8 adds the samples and the tokens that are predicted worst, sought among 2,000 held-out samples: their names and
losses, and where in each the loss lies.

The similarity map and the ranks of the next token are of networks that predict it: they are left out for one that
has been trained on labels, and where attention is bidirectional.

Of a segmentation run the page also has the classes that it gives to the whole images, beside the truth where there is
one. Those of images=[a.jpg] are written as masks/a.png, too: palette images numbered as the annotations are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SerializeAsAny

from nepa_core.basics import FROZEN, UserError
from nepa_core.modality import Modality
from nepa_core.runtime.config import keys, load_adapter, nearest, override, read_saved
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run, is_run, refuse_holder, task_of
from nepa_core.runtime.weights import read_weights
from recipes.configs import SegmentConfig
from recipes.readout.inspecting import InspectOptions as Options
from recipes.readout.inspecting import inspect, load_network, segmented, why_silent, worst_predicted, write_masks
from recipes.report.inspect import report
from recipes.resolve import read_target

FREE = ("data.",)
"""Keys of a run that may be changed here."""


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    data = read_config(target, changes).data
    with world() as ranks, at_work(Run(Path(target)), ranks, trains=False):
        if not ranks.is_main:
            return
        weights = read_weights(target)
        data = data.as_trained_on(weights.data).plain()
        causal = weights.causal if options.causal is None else options.causal
        silent = why_silent(target, weights, data.token_name, causal=causal)
        if options.worst and silent:
            raise UserError(f"worst={options.worst}: {silent.partition(': ')[2]} Leave it out")
        model = load_network(weights, data, ranks.device)
        readings = inspect(model, data, options, causal=causal)
        of_pixels = read_target(SegmentConfig, target, changes) if task_of(target) == SegmentConfig.task else None
        pictures = segmented(of_pixels, weights, options, ranks.device) if of_pixels else []
        folder = Path(target) / "inspect"
        for stale in (
            "order.png",
            "classes.png",
            "worst_samples.png",
            "worst_tokens.png",
        ):  # of an earlier call, which may have had them
            (folder / stale).unlink(missing_ok=True)
        found = report(
            Path(target),
            readings,
            data,
            layer=options.layer,
            head=options.head,
            causal=causal,
            silent=silent,
            pictures=pictures,
            classes=of_pixels.data.class_names() if of_pixels else (),
            failures=worst_predicted(model, data, options) if options.worst else None,
        )
        found.write(folder)
        if of_pixels and options.images:
            write_masks(folder / "masks", pictures, of_pixels)
        print(found.text(folder))


class InspectConfig(BaseModel):
    """What of a run's config may be changed here: its data, for others whose tokens are of the same form."""

    model_config = FROZEN

    data: SerializeAsAny[Modality]


def read_config(target: str, changes: Mapping[str, Any]) -> InspectConfig:
    """The adapter of a run of any task, with changes to data.* applied.

    Raises:
        UserError: it is no run, a key is unknown, or a value does not fit.
    """
    if not is_run(target):
        refuse_holder(target)
        raise UserError(f"{target} is not a run folder; name one, such as `nepa pretrain` or `nepa import` makes")
    file = Path(target) / "config.json"
    if (data := load_adapter(read_saved(file), file)) is None:
        raise UserError(f"{file} names no adapter; it is of a task that trains nothing")
    config = InspectConfig(data=data)
    for key in changes:
        if not key.startswith(FREE):
            raise UserError(f"unknown key {key}{nearest(key, [*Options.model_fields, *keys(config)])}")
    return override(config, changes)
