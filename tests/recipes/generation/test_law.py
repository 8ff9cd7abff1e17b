"""The law of the synthetic series, which is known, is what a flow head samples that is shown all that matters."""

import pytest
import torch
from torch import Tensor

from nepa_core.tokens import Tokens
from nepa_core.verdict.intervals import over_samples
from recipes.generation.decoders import DecoderConfig, Pairs, fit_flow, new_flow
from recipes.generation.reading import Kept, read_samples
from recipes.timeseries import demo
from tests.tiny import CPU

DRAWS = 32


def shown(part: Tokens) -> Tensor:
    """The last value of every token but the last one, beside constants that keep its scale through the norm."""
    last = part.values[:, :-1, -4:]
    return torch.cat((last, torch.tensor([5.0, -5.0]).expand(*last.shape[:2], 2)), -1)


@pytest.mark.slow
def test_the_law_of_a_vector_autoregression_is_recovered() -> None:
    """The mean within its interval; every covariance to a sixth, in deviations, and the variances to 7 %."""
    data = demo().data
    train, test = (read_samples(data, split, 4000, 64, Kept(0), bos=True, seed=0) for split in ("train", "test"))
    found = [
        (shown(part).flatten(0, 1), part.coords[1:].repeat(len(part.values), 1), part.values[:, 1:].flatten(0, 1))
        for part in train.parts
    ]
    condition, coords, values = map(torch.cat, zip(*found, strict=True))
    pairs, config = Pairs(condition, coords, values, condition), DecoderConfig(steps=2000, batch=512)
    head = fit_flow(new_flow(pairs, config), pairs, config, CPU)
    shifts, covariances, draw = list[Tensor](), list[Tensor](), torch.Generator().manual_seed(0)
    for part in test.parts[:8]:
        law = data.known_law(part)
        assert law is not None
        places = part.coords[1:].expand(len(part.values), -1, -1)
        drawn = head.restored(head.sample(shown(part), places, steps=8, draws=DRAWS, generator=draw)).double()
        spread = law.covariance[1].diagonal().sqrt()
        apart = (drawn - law.mean[:, 1:]) / spread
        shifts.append(apart.mean((0, 2, 3)))
        covariances.append(torch.einsum("kbni,kbnj->ij", apart, apart) / apart[..., 0].numel())
    clusters = test.clusters[: sum(map(len, shifts))]
    mean = over_samples(torch.cat(shifts), clusters, chained=True)
    assert mean.half is not None
    assert abs(mean.mean) < mean.half
    off = torch.stack(covariances).mean(0) - law.covariance[1] / spread.outer(spread)
    assert off.abs().max() < 1 / 6
    assert abs(float(off.diagonal().mean())) < 0.07
