"""Before the first step: the network with the weights of its seed, and a first batch."""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

import torch

from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA, evaluating
from nepa_core.pretrainer import OF_TOKENS, Pretrainer, objective_loss
from nepa_core.runtime.data import fold_seed, plain_batches
from nepa_core.runtime.fit import samples_at_once
from nepa_core.tokens import Tokens
from recipes.configs import UNKNOWN_TARGET, PretrainConfig, without_another


def check_samples(config: PretrainConfig, ranks: int) -> None:
    """Whether every term that compares samples gets two of them, with this many processes.

    One alone gives a loss and a gradient of 0, or of nothing that means anything.

    Raises:
        UserError: it does not, or the batch does not fit the processes or the micro-batch.
    """
    own, train = samples_at_once(config.train, ranks=ranks), config.train
    if (lonely := without_another(config.objective, own, own * ranks)) is None:
        return
    fixes = [f"train.batch={2 * ranks} or more"] if train.batch < 2 * ranks else []
    if train.micro_batch == 1:
        fixes.append("train.micro_batch=2 or more")
    where = f" on {ranks} processes" if ranks > 1 else ""
    held = "" if train.micro_batch is None else f" with train.micro_batch={train.micro_batch}"
    raise UserError(
        f"objective.terms.{lonely} compares the samples of one forward pass of a process, and "
        f"train.batch={train.batch}{held}{where} leaves it one: set {' and '.join(fixes)}"
    )


def has_own_order(config: PretrainConfig) -> bool:
    """Whether the order is a function of the user's."""
    return ":" in getattr(config.data, "patch_order", "")


def try_order(config: PretrainConfig) -> None:
    """Read a few training samples as they will be read, before hours of training.

    Raises:
        UserError: the order does not fit the tokens, or is a function of the user's that gives samples or batches
            different ones where the network is not told which token comes next. Neither is known before it is called.
    """
    told = config.model.predict_position != "off" or not config.objective.shift or config.objective.unknown_target
    data = config.data.at(0.0)
    batch = first_samples(config, 8, torch.device("cpu"))
    reads = []
    for seed, part in enumerate([batch, batch, {key: value[:1] for key, value in batch.items()}]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reads.append(data.read(part))
    if not told and has_own_order(config) and not have_one_order(reads):
        raise UserError(UNKNOWN_TARGET)


def have_one_order(reads: list[Tokens]) -> bool:
    """Whether all samples of all batches are read in the same order.

    Samples with padding elsewhere than that of the first are left out: a shared order, too, is read differently there.
    """
    reads = [each for each in reads if each.values.shape[1] == reads[0].values.shape[1]]
    orders = [
        (torch.arange(each.values.shape[1]) if each.order is None else each.order).expand(each.real.shape)
        for each in reads
    ]
    mask, order = torch.cat([each.real for each in reads]), torch.cat(orders)
    return bool((order == order[0]).all(1)[(mask == mask[0]).all(1)].all())


def try_batch(config: PretrainConfig, model: NEPA) -> None:
    """Take the loss of a few training samples, before anything is written; leaves model and random numbers as they are.

    Args:
        model: of `build_pretrainer`.

    Raises:
        UserError: samples, order (see `try_order`) and objective don't fit together.
    """
    if has_own_order(config):
        try_order(config)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), evaluating(model):
        batch = first_samples(config, min(config.train.micro_batch or config.train.batch, 8), device)
        out = model(config.data.at(0.0).read(batch), causal=config.objective.causal)
        loss = objective_loss(config.objective, out)
    if not loss.isfinite():
        raise UserError(
            f"the loss of a first batch is {loss.item()}: lower model.layer_scale, and look at the range of the samples"
        )


def first_samples(config: PretrainConfig, count: int, device: torch.device) -> Batch:
    """The first training samples, but for those that can't be read."""
    torn: set[str] = set()
    dataset, most = config.data.samples_of("train"), 128 * count
    try:
        return next(
            plain_batches(
                dataset, batch=count, device=device, limit=most, unreadable=torn, tokenize=config.data.tokenize
            )
        )
    except UserError as error:
        if not torn:
            raise
        total = len(cast(Sized, dataset))
        tried = f"first {most:,}" if most < total else f"{total:,}"
        raise UserError(f"none of the {tried} training samples can be read; one of them: {min(torn)}") from error


def check_held_out(data: Modality) -> None:
    """Whether two samples are held out, for each is told from others.

    Raises:
        UserError: fewer are; the line names what says how many, as far as the adapter has such keys.
    """
    count = len(cast(Sized, data.plain().samples_of("test")))
    if count > 1:
        return
    share, root = getattr(data, "held_out", None), getattr(data, "root", None)
    fixes = [f"raise data.held_out={share}"] if isinstance(share, float) else []
    fixes.append("put more samples into the held-out split" + (f" of data.root={root}" if root else ""))
    raise UserError(
        f"the held-out split has fewer than two samples ({count}), and each is told from others: {' or '.join(fixes)}"
    )


def build_model(config: PretrainConfig, *, predicts: bool = False) -> NEPA:
    """The network with the weights that the run's seed gives, as read-outs see it.

    Args:
        predicts: with the prediction head of the objective, where it has one, for all that needs predictions.
    """
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    head = config.objective.head if predicts else "none"
    return NEPA(config.model, config.data.embedder(config.model.dim), head)


def build_pretrainer(config: PretrainConfig) -> NEPA:
    """What is trained: the network of `build_model`, with the heads that its objective needs, if any."""
    if not config.objective.has_heads:
        return build_model(config, predicts=True)
    tokens = _some_tokens(config) if config.objective.heads & OF_TOKENS else None
    torch.manual_seed(fold_seed(config.train.seed, "weights"))
    return Pretrainer(config.model, config.data.embedder(config.model.dim), config.objective, tokens)


def _some_tokens(config: PretrainConfig) -> Tokens:
    """Those of 256 training samples without augmentation, a fixed draw."""
    data = config.data.plain()
    batches = plain_batches(
        data.samples_of("train"), batch=256, device=torch.device("cpu"), limit=256, seed=0, tokenize=data.tokenize
    )
    return data.tokenize(next(batches))
