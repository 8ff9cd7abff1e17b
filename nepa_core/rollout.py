"""Roll-out: make the tokens of a sequence one after another, each from the prediction made of those before it.

A draw turns the prediction and the place of the next token into its content; that is embedded and read in turn. Any
conditional sampler will do, such as `flow.FlowHead.sample`.

Shapes: B samples, N tokens, T places (N + 1 with BOS), P numbers in a raw token, D width, A coordinate axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nepa_core.basics import UserError
from nepa_core.model import NEPA
from nepa_core.predictor import Cache
from nepa_core.tokens import Tokens

Draw = Callable[[Tensor, Tensor, int], Tensor]
"""(prediction [B, D], coordinates of the next token [B, A], its number in the order) -> its values [B, P]."""

Placed = Callable[[Tokens], Tensor | None]
"""`Modality.placed`."""


def check_generates(*, causal: bool, shift: bool) -> None:
    """Whether a network that was trained so can be rolled out.

    Raises:
        UserError: it saw later tokens, or it predicts the token that it reads.
    """
    if not causal:
        raise UserError(
            "trained with objective.causal=false, it predicts from later tokens, too: train with causal=true"
        )
    if not shift:
        raise UserError(
            "trained with objective.shift=false, it predicts the token that it reads: train with shift=true"
        )


@torch.no_grad()
def rollout(
    model: NEPA,
    draw: Draw,
    tokens: Tokens,
    keep: int | Tensor,
    *,
    causal: bool = True,
    cache: bool = True,
    placed: Placed = lambda tokens: None,
) -> Tokens:
    """Keep what is given of each sequence and make the rest.

    A token that is given behind one to be made is read in its turn: those before it are made without it. Padding is no
    token: it stays as it is, and a token after it is made from the tokens before it.

    Args:
        model: in evaluation mode.
        tokens: in the order of prediction. The values of tokens to be made are not read.
        keep: how many leading tokens are given, for all samples or for each (int [B]); or which ones, bool [B, N].
        causal: of the pass; that of pre-training.
        cache: read every token once, and keep its keys and values; False reads all of them again for every token, for
            the same result but for rounding.
        placed: `Modality.placed`. Where it says where tokens lie by what they hold, every token is read anew at the
            places that those made so far say, and a draw must not look at the coordinates that it is given.

    Returns:
        The same with values in place of those to be made; given ones are kept bit for bit.

    Raises:
        UserError: without the causal mask; more tokens are kept than there are; or there is nothing to begin with,
            neither BOS nor a token.
    """
    check_generates(causal=causal, shift=True)
    given, behind = _given(tokens, keep), _padding_behind(tokens)
    read = tokens
    if behind is not None:
        order = behind if tokens.order is None else tokens.order.expand_as(behind).gather(1, behind)
        read = replace(replace(tokens, order=None).reordered(behind), order=order)
        given = given.gather(1, behind)
    bos, count = int(model.bos is not None), given.shape[1]
    missing = (~given).any(0).nonzero().flatten().tolist()
    if missing[:1] == [0] and not bos:
        raise UserError("model.bos=false leaves nothing to predict the first token from: keep one or more")
    values = torch.where(given[..., None], read.values, 0.0)
    coords = read.coords.to(values.device).expand(*given.shape, -1)
    moves = placed(replace(read, values=values)) is not None
    embeddings, mask = model.embedded(replace(read, values=values))
    added = model.positional(read, mask)
    kept = Cache(count + bos)
    for token in missing:
        kept = kept if cache and not moves else Cache(count + bos)
        new = slice(kept.read, token + bos)
        x = embeddings[:, new]
        for vectors in added:
            x = x + vectors[..., new, :].to(x.dtype)
        output = model.predictor(x, coords if moves else read.coords, causal=causal, mask=mask, cache=kept)[:, -1]
        made = draw(model.predicted(output), coords[:, token], token).to(values.dtype)
        values[:, token] = torch.where(given[:, token, None], values[:, token], made)
        if moves and (now := placed(replace(read, values=values))) is not None:
            coords = torch.where(given[..., None], coords, now.to(coords.device))
        embeddings[:, token + bos] = model.embedded_values(values[:, token, None])[:, 0]
    return replace(tokens, values=values if behind is None else replace(read, order=behind).canonical(values))


def _given(tokens: Tokens, keep: int | Tensor) -> Tensor:
    """What is not to be made, bool [B, N]: padding too."""
    count, device = tokens.values.shape[1], tokens.values.device
    keep = torch.as_tensor(keep, device=device)
    if keep.dtype != torch.bool:
        if wrong := keep[(keep < 0) | (keep > count)].tolist():
            raise UserError(f"keep={wrong[0]} is not within the {count} tokens of a sequence: give 0 to {count}")
        keep = torch.arange(count, device=device) < keep[..., None]
    return keep | ~tokens.real


def _padding_behind(tokens: Tokens) -> Tensor | None:
    """The order [B, N] that has padding behind the tokens, or None where it is there: what follows it has no source."""
    mask = tokens.mask
    if mask is None or not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return None
    return torch.argsort(~mask, dim=1, stable=True)
