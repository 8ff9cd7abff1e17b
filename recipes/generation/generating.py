"""What `nepa generate` does: decoders on a frozen run, what they draw, and how good that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from torch import Tensor

from nepa_core.basics import FROZEN, UserError
from nepa_core.contract import check_tokens_do_not_overlap
from nepa_core.flow import FlowConfig
from nepa_core.model import NEPA
from nepa_core.rollout import check_generates
from nepa_core.runtime.config import import_path, listed
from nepa_core.runtime.data import fold_seed
from nepa_core.runtime.fit import fingerprint_of
from nepa_core.runtime.load import Network
from nepa_core.runtime.meter import say_progress
from nepa_core.tokens import Tokens
from recipes.configs import PretrainConfig
from recipes.generation.decoders import DecoderConfig, Decoders, kept_decoders
from recipes.generation.frechet import check_weights, frechet
from recipes.generation.judging import (
    BEST,
    OWN,
    Scores,
    copied,
    law_recovered,
    one_draw,
    own_error,
    readings,
    score,
    signal_to_noise,
    table,
    told_apart,
    verdict,
)
from recipes.generation.linear_gaussian import fit_linear_gaussian
from recipes.generation.reading import Kept, Samples, check_region, read_samples, signals, untold
from recipes.generation.rivals import Always, Copy, Decoded, Known, Linear, Rival
from recipes.report.summaries import GenerateSummary
from recipes.statistics.generated import Levels, levels, nearest
from recipes.statistics.worth import RANDOM
from recipes.training.starting import build_model

ALWAYS = "always the mean"
LINEAR, COPYING = "linear-Gaussian autoregression", "copying"
_COVARIANCES = 2**30  # most bytes of the linear one


def _share_or_count(value: Any) -> Any:
    share = isinstance(value, float) and 0 <= value < 1
    if not share and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError("give a share below 1, or a whole number of tokens")
    return value


class GenerateOptions(BaseModel):
    """Options of `nepa generate`."""

    model_config = FROZEN

    out: str | None = Field(default=None, description="folder of card, page and generate.json; default the run")
    keep: Annotated[int | float, BeforeValidator(_share_or_count)] = Field(
        default=0.5, description="what of a sample is given: a share below 1 of its first tokens, or so many"
    )
    region: Annotated[tuple[int, ...] | None, BeforeValidator(listed)] = Field(
        default=None,
        description="what is made instead, [y0,x0,y1,x1] of the tokens' grid, [x0,x1], or six; needs drawn orders",
    )
    split: Literal["train", "test"] = Field(default="test", description="the split whose samples are completed")
    samples: int = Field(default=500, gt=1, le=10**9, description="how many of them, drawn from the whole split")
    draws: int = Field(
        default=16, gt=1, le=10_000, description="samples of every token, and completions of every sample"
    )
    steps: int = Field(default=8, gt=0, le=10_000, description="of the ODE solver, from noise to token")
    temperature: float = Field(default=1.0, ge=0, le=100, description="factor on the noise; below 1 samples vary less")
    seed: int = Field(default=0, ge=0, le=2**62, description="of decoders and draws")
    train_samples: int = Field(
        default=5000, gt=1, le=10**9, description="most training samples that decoders are fitted on"
    )
    decoder_steps: int = Field(
        default=2000, gt=0, le=10**9, description="training steps of the flow head, of 256 tokens"
    )
    fid: str | None = Field(default=None, description="file of torch-fidelity's Inception weights: adds the FID")
    width: int = Field(default=128, ge=8, le=2**16, multiple_of=2, description="of the flow head")

    @model_validator(mode="after")
    def _agree(self) -> GenerateOptions:
        if self.region is not None and "keep" in self.model_fields_set:
            raise ValueError("keep= and region= are two ways to say what is given: leave one out")
        if self.region is not None and len(self.region) not in (2, 4, 6):
            raise ValueError(
                f"region={list(self.region)}: give [y0,x0,y1,x1], or [x0,x1] of tokens in one row, or "
                "[s0,y0,x0,s1,y1,x1] of slices"
            )
        return self

    @property
    def kept(self) -> Kept:
        return Kept(self.keep, self.region)


class Generated(NamedTuple):
    """What was made and what it was made from, beside the figures.

    Attributes:
        held_out: the samples, arranged. train: training samples. decoded: the network with its decoders.
        completed: a completion of every sample, of the parts of `held_out`. drawn: the same of its first token or of
            nothing. Both are brought to the data's own levels.
        scores: of the network. nearest: [S] the training sample nearest to each of `completed`.
    """

    summary: GenerateSummary
    held_out: Samples
    train: Samples
    decoded: Decoded
    levels: Levels | None
    completed: list[Tokens]
    drawn: list[Tokens]
    scores: Scores
    nearest: Tensor


def check_network(net: Network, options: GenerateOptions) -> None:
    """Whether anything can be generated, before a folder is made.

    Raises:
        UserError: the network does not predict from earlier tokens alone; tokens overlap; or a region is asked of a
            network that knows one order.
    """
    try:
        check_generates(causal=net.causal, shift=net.shift)
    except UserError as error:
        raise UserError(f"{net.source}: {error}") from error
    if options.region is not None:
        check_region(net.data, net.model)
    if options.fid is not None:
        check_weights(options.fid)
    try:
        check_tokens_do_not_overlap(net.data)
    except AssertionError as error:
        raise UserError(f"{type(net.data).__name__}: {error}") from error


def generate(net: Network, config: PretrainConfig, options: GenerateOptions, folder: Path, *, show: bool) -> Generated:
    """Fit the decoders, or find them in `folder`; complete samples, draw others, and judge both.

    Args:
        config: of the run, for the same network untrained. show: progress on the screen.

    Raises:
        UserError: of `check_network`; no sample can be read; or keep= leaves nothing to make.
    """
    check_network(net, options)
    start, bos, batch = time.monotonic(), net.model.config.bos, net.reading.batch
    held_out = read_samples(net.data, options.split, options.samples, batch, options.kept, bos=bos, seed=options.seed)
    train = read_samples(net.data, "train", options.train_samples, batch, Kept(0), bos=bos, seed=options.seed)
    if options.fid is not None and (kind := net.data.decode(held_out.parts[0]).kind) != "picture":
        raise UserError(f"fid= compares pictures, and samples of {type(net.data).__name__} are {kind}: leave it out")
    untrained = build_model(config, predicts=True).to(next(net.model.parameters()).device).eval()
    decoders = _decoders(net, untrained, held_out, train, options, folder, show=show)
    decoded, rivals, notes = _rivals(net, untrained, decoders, held_out, train, options)
    flow = decoders[OWN].flow

    def standardise(values: Tensor) -> Tensor:
        return flow.standardised(values.to(flow.mean.device)).cpu()

    scores = {}
    for name, rival in rivals.items():
        if show:
            say_progress(f"judging {name}")
        scores[name] = score(rival, held_out, options.draws, standardise, bos=bos)
    made = _make(decoded, held_out, train, standardise, bos=bos)
    summary: GenerateSummary = {
        "keep": options.keep,
        "region": None if options.region is None else list(options.region),
        "split": options.split,
        "samples": len(held_out.numbers),
        "clusters": len(held_out.clusters.unique()),
        "of": held_out.whole,
        "draws": options.draws,
        "steps": options.steps,
        "temperature": options.temperature,
        "seed": options.seed,
        "train_samples": len(train.numbers),
        "decoder_steps": options.decoder_steps,
        "width": options.width,
        "first": int(not bos),
        "completion": table(scores, "completion", held_out),
        "next_token": table(scores, "following", held_out),
        "mean_error": table(scores, "error", held_out),
        "own_error": own_error(decoded, held_out, bos=bos),
        **_told_apart(made, held_out, options.seed),
        "notes": notes,
    }
    if options.fid is not None:
        of = (
            torch.cat([net.data.decode(part).data for part in parts])
            for parts in (held_out.parts, made.drawn, train.parts)
        )
        real, new, trained_on = of
        summary["fid"] = frechet(real, new, trained_on, options.fid)._asdict()
    if (psnr := signal_to_noise(net.data, decoded, held_out)) is not None:
        summary["psnr"] = psnr
    if found_readings := readings(net.data, rivals | {ALWAYS: Always(flow.mean.cpu())}, held_out, bos=bos):
        summary["readings"] = found_readings
    summary |= {"verdict": verdict(summary["completion"]), "verdict_next": verdict(summary["next_token"])}
    if isinstance(best := rivals.get(BEST), Known):
        summary["law"] = law_recovered(decoded, best, held_out, options.draws)
    summary["seconds"] = round(time.monotonic() - start, 1)
    closest = nearest(made.completed_signals, made.training, made.true).to
    return Generated(summary, held_out, train, decoded, made.levels, made.completed, made.drawn, scores[OWN], closest)


def _decoders(
    net: Network,
    untrained: NEPA,
    held_out: Samples,
    train: Samples,
    options: GenerateOptions,
    folder: Path,
    *,
    show: bool,
) -> dict[str, Decoders]:
    """Those of the network and of random weights, from `folder` where they were fitted before."""
    return kept_decoders(
        folder,
        {OWN: net.model, RANDOM: untrained},
        train.parts,
        DecoderConfig(steps=options.decoder_steps, seed=options.seed, flow=FlowConfig(width=options.width)),
        {
            "adapter": import_path(type(net.data)),
            "data": net.data.model_dump(mode="json"),
            "samples": [fingerprint_of(net.data.samples_of("train")), len(train.numbers)],
        },
        causal=net.causal,
        show=show,
        told=net.data.placed(held_out.parts[0]) is None,
    )


class _Made(NamedTuple):
    """What the network made, beside what is real.

    Attributes:
        levels: of the data, or None. drawn, completed: see `Generated`.
        true, training, drawn_signals, completed_signals: [S, numbers] each, samples as standardised vectors.
    """

    levels: Levels | None
    drawn: list[Tokens]
    completed: list[Tokens]
    true: Tensor
    training: Tensor
    drawn_signals: Tensor
    completed_signals: Tensor


def _make(
    decoded: Decoded, held_out: Samples, train: Samples, standardise: Callable[[Tensor], Tensor], *, bos: bool
) -> _Made:
    """Draw every held-out sample once from its first token or from nothing, and complete it once."""
    longest = max(held_out.longest, train.longest)
    found = levels(signals(train.parts, longest))
    drawn, completed = (
        list(one_draw(decoded, held_out, found, longest, all_of=all_of, bos=bos)) for all_of in (True, False)
    )
    as_vectors = (
        signals((replace(part, values=standardise(part.values)) for part in parts), longest)
        for parts in (held_out.parts, train.parts, drawn, completed)
    )
    return _Made(found, drawn, completed, *as_vectors)


def _told_apart(made: _Made, held_out: Samples, seed: int) -> GenerateSummary:
    """How well a classifier tells what was made from what is real, and what of it is copied."""
    counts = None if made.levels is None else made.levels.counts
    return {
        "quantised": 0 if counts is None else int((counts > 0).sum()),
        "numbers": made.true.shape[1],
        "from_nothing": told_apart(made.true, made.drawn_signals, held_out, seed)
        | copied(made.drawn_signals, made.training, made.true),
        "completed": told_apart(made.true, made.completed_signals, held_out, seed),
        "training": told_apart(made.true, made.training, None, seed),
    }


def _rivals(
    net: Network,
    untrained: NEPA,
    decoders: dict[str, Decoders],
    held_out: Samples,
    train: Samples,
    options: GenerateOptions,
) -> tuple[Decoded, dict[str, Rival], list[str]]:
    """The network, all that generate by name, and what was left out."""
    device = next(net.model.parameters()).device

    def drawing(name: str, on: str | torch.device = "cpu") -> torch.Generator:
        return torch.Generator(on).manual_seed(fold_seed(options.seed, name))

    own, random = (
        Decoded(
            model,
            decoders[name],
            options.steps,
            options.temperature,
            drawing(name, device),
            net.causal,
            net.data.placed,
        )
        for name, model in ((OWN, net.model), (RANDOM, untrained))
    )
    rivals: dict[str, Rival] = {OWN: own, RANDOM: random}
    notes: list[str] = []
    longest, size = max(held_out.longest, train.longest), train.parts[0].values.shape[-1]
    if 8 * longest * size**2 <= _COVARIANCES:
        parts = (untold(part, net.model) for part in train.parts)
        fitted = fit_linear_gaussian(parts, total=len(train.numbers), length=longest)
        rivals[LINEAR] = Linear(fitted, net.model, drawing(LINEAR))
    else:
        notes.append(f"The linear-Gaussian autoregression is left out: its {longest} covariances of {size} x {size}.")
    rivals[COPYING] = Copy(decoders[OWN].flow.mean.cpu())
    if net.data.known_law(held_out.parts[0]) is not None:
        rivals[BEST] = Known(net.data, drawing(BEST))
    return own, rivals, notes
