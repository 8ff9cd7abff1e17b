"""Cross-modal identification: of parts that do and don't depend on each other, on a network that is given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nepa_core.modality import Crossing
from nepa_core.model import NEPA, Prediction
from nepa_core.tokens import Tokens
from nepa_core.verdict.crossing import Crossed, gather_crossing, judge_crossing, whole
from nepa_core.verdict.drawing import RIVALS, Drawn
from nepa_core.verdict.gathered import Gathered
from tests.tiny import CPU, Waves
from tests.tiny_parts import paired, together


class _Reads(Waves):
    """Batches that are tokens already."""

    def read(self, batch: dict[str, Tokens]) -> Tokens:  # type: ignore[override]
        return batch["tokens"]


def _tokens(samples: int, seed: int) -> Tokens:
    """Two tokens of part 0, of which the second says what the only one of part 1 is."""
    values = torch.randn(samples, 3, 4, generator=torch.Generator().manual_seed(seed))
    values[:, 2] = values[:, 1].roll(1, dims=1)
    return Tokens(values, torch.arange(3.0)[:, None], part=torch.tensor([0, 0, 1]))


class _Knows(torch.nn.Module):
    """Embeds tokens as they are, and predicts the one that follows from the law, or nothing of use."""

    def __init__(self, *, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def forward(self, tokens: Tokens, *, causal: bool) -> Prediction:
        made = tokens.values.roll(1, dims=2) if self.knows else torch.ones_like(tokens.values)
        return Prediction(tokens.values, made, None)

    def embedded(self, tokens: Tokens) -> tuple[torch.Tensor, None]:
        return tokens.values, None


def _judged(*, knows: bool) -> Crossed:
    crossing = Crossing(_Reads(), 0, 1)

    def gathered(model: _Knows, seed: int, *, predicts: bool) -> Iterator[Gathered]:
        batches = [{"tokens": _tokens(64, seed + step)} for step in range(4)]
        return gather_crossing(model, crossing, batches, predicts=predicts)  # type: ignore[arg-type]

    rows = torch.arange(256)
    made, untrained = (
        whole(gathered(_Knows(knows=each), 0, predicts=True))._replace(drawn=Drawn(rows, rows // RIVALS, rows))
        for each in (knows, False)
    )
    training = gathered(_Knows(knows=knows), 100, predicts=False)
    return judge_crossing(training, made, untrained, total=256, device=CPU)


@pytest.mark.parametrize("knows", [True, False])
def test_what_is_known_of_the_other_part_is_told_from_what_is_not(knows: bool) -> None:
    found = _judged(knows=knows)
    assert found.retrieval_top1_linear > 0.9, "the law is linear"
    assert found.retrieval_top1_shuffled < 0.1
    assert (found.samples, found.clusters, found.retrieval_candidates) == (256, 256, RIVALS)
    assert found.predicts is knows
    assert (found.retrieval_top1 > 0.9) is knows
    assert found.linear.below is not knows


def test_the_prediction_is_made_of_the_one_part_alone() -> None:
    config = paired()
    data = together("paired").plain()
    torch.manual_seed(0)
    model = NEPA(config.model, data.embedder(config.model.dim)).eval()
    (crossing, *_) = [each for name, each in data.crossings().items() if name == "slow from fast"]
    samples = data.dataset("test")
    batch = samples.__getitems__(list(range(8)))  # type: ignore[attr-defined]
    changed = batch | {"slow.values": batch["slow.values"] + 1}
    one, other = (whole(gather_crossing(model, crossing, [each])) for each in (batch, changed))
    assert torch.equal(one.predictions, other.predictions)
    assert torch.equal(one.values, other.values)
    assert not torch.equal(one.embeddings, other.embeddings)
