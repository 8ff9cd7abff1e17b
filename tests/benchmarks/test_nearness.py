"""benchmarks.nearness: the lag-one autocorrelation of tokens, and of a recipe's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.nearness import main, nearness
from nepa_core.tokens import Tokens


def _tokens(values: torch.Tensor, mask: torch.Tensor | None = None) -> Tokens:
    return Tokens(values, torch.arange(values.shape[1])[:, None].float(), mask)


def test_it_is_the_coefficient_of_an_autoregression() -> None:
    draw = torch.Generator().manual_seed(0)
    steps = [torch.randn(64, 3, generator=draw)]
    for _ in range(499):
        steps.append(0.8 * steps[-1] + 0.6 * torch.randn(64, 3, generator=draw))
    values = 5 + torch.stack(steps, 1)  # the mean is taken off
    assert nearness([_tokens(values[:30]), _tokens(values[30:])]) == pytest.approx(0.8, abs=0.01)
    shuffled = values[:, torch.randperm(500, generator=draw)]
    assert abs(nearness([_tokens(shuffled)])) < 0.05


def test_tokens_that_are_not_real_count_for_nothing() -> None:
    values = torch.tensor([[[1.0], [1.0], [1e6], [-1.0], [-1.0]]])
    mask = torch.tensor([[True, True, False, True, True]])
    assert nearness([_tokens(values, mask)]) == 1.0


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes.timeseries:demo"]) == 0
    assert -1 <= float(capsys.readouterr().out) <= 1
    with pytest.raises(SystemExit) as stopped:
        main(["recipes.timeseries:demo", "data.no_such=1"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m benchmarks.nearness: ")
    assert "data.no_such" in said
    assert said.count("\n") == 1
