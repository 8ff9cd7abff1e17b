import pytest
import torch
from torch import nn

from nepa_core import Ema


def _steps(model: nn.Module, ema: Ema, count: int, size: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """Change the parameters and update, `count` times; what the parameters were after each step."""
    history = []
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(size * torch.randn_like(parameter))
        ema.update()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


def test_the_average_follows_its_closed_form() -> None:
    """It starts from the parameters after the first step, as in the released scripts; those before have no part."""
    torch.manual_seed(0)
    model, decay = nn.Linear(3, 4), 0.8
    ema = Ema(model, decay)
    before = {name: average.clone() for name, average in ema.averages.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "what is measured untrained"
    first, *history = _steps(model, ema, 6)
    assert ema.averages.keys() == first.keys() == {"weight", "bias"}
    for name, average in ema.averages.items():
        expected = decay**5 * first[name]
        for k, values in enumerate(history, start=1):
            expected = expected + (1 - decay) * decay ** (5 - k) * values[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        assert not average.requires_grad


def test_the_average_is_float32_where_parameters_are_bfloat16() -> None:
    """A step of 1/1000 of the way is below bfloat16's resolution: an average in it would stand still."""
    model = nn.Linear(8, 8).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, 0.999)
    ema.update()
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update()
    assert ema.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["weight"], torch.full((8, 8), 2 - 0.999**100), rtol=1e-4, atol=0)
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16


def test_the_first_average_is_the_weights_after_the_first_step_and_stored_ones_go_on() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    whole = Ema(model, 0.9)
    (first,) = _steps(model, whole, 1)
    assert all(torch.equal(whole.averages[name], value) for name, value in first.items())
    resumed = Ema(model, 0.9)
    resumed.restore({name: value.clone() for name, value in whole.averages.items()})
    with torch.no_grad():
        model.weight.add_(1.0)
    whole.update()
    resumed.update()
    assert torch.equal(resumed.averages["weight"], whole.averages["weight"])
    assert not torch.equal(resumed.averages["weight"], model.weight), "it is no first step"


@pytest.mark.parametrize("fails", [False, True])
def test_applied_lends_the_averages_and_gives_the_own_values_back(fails: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    ema = Ema(model, 0.5)
    _steps(model, ema, 3)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    weight = model.weight
    x = torch.randn(2, 3)
    expected = x @ ema.averages["weight"].T + ema.averages["bias"]
    try:
        with ema.applied():
            torch.testing.assert_close(model(x), expected)
            assert model.weight is weight  # the optimiser holds these objects
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    averages = {name: average.clone() for name, average in ema.averages.items()}
    with torch.no_grad():
        model.weight.add_(1.0)
    assert all(torch.equal(average, averages[name]) for name, average in ema.averages.items())
