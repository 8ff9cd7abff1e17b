"""n-gram counts as a control: a known chain is identified, ties are shared, longer contexts are found."""

import pytest
import torch
from torch import Tensor

from nepa_core.verdict.baselines import fit_baselines
from nepa_core.verdict.counts import Counted, Counts
from nepa_core.verdict.drawing import Drawn
from nepa_core.verdict.gathered import Gathered

KINDS = 12


def gathered(symbols: Tensor, *, mask: Tensor | None = None, order: Tensor | None = None) -> Gathered:
    """One-hot tokens, without BOS; groups of 16."""
    values = torch.nn.functional.one_hot(symbols, KINDS).float()
    rows = torch.arange(len(symbols))
    drawn = Drawn(rows, rows // 16, rows)
    return Gathered(values, values, values, mask, order, None, drawn)


def symbols_of(values: Tensor) -> Tensor:
    return values.argmax(-1)


def counted(train: Gathered, test: Gathered) -> Counted:
    counts = Counts()
    held, rest = train.rows(slice(64)), train.rows(slice(64, None))
    for part in (held, rest):
        counts.add(part, symbols_of(part.values))
    return counts.judged(test, symbols_of(test.values), held, symbols_of(held.values))


def chain(samples: int, seed: int, back: int = 1) -> Tensor:
    """Each symbol is a fixed function of the one `back` places before it."""
    found = torch.randint(KINDS, (samples, 8), generator=torch.Generator().manual_seed(seed))
    for place in range(back, 8):
        found[:, place] = (found[:, place - back] * 5 + 3) % KINDS
    return found


def test_a_chain_that_is_known_is_identified_up_to_ties() -> None:
    """Nothing but equal candidates is left in doubt, and these share the credit."""
    found = counted(gathered(chain(512, 0)), gathered(chain(64, 1)))
    torch.testing.assert_close(found.credits, found.most)
    assert 0.3 < float(found.most.mean()) < 0.9
    assert found.same == pytest.approx(15 / KINDS, abs=0.3)
    assert found.fitted == 512 * 8


def test_the_length_is_chosen_on_what_is_held_back() -> None:
    found = counted(gathered(chain(512, 0, back=3)), gathered(chain(64, 1, back=3)))
    assert found.tokens == 4
    assert float(found.credits.mean()) > 0.5 * float(found.most.mean())


def test_noise_is_chance_and_shared_among_what_is_unknown() -> None:
    """A symbol that training lacks is as likely as any other such: no first candidate wins by its place."""
    train = torch.randint(KINDS // 2, (512, 8), generator=torch.Generator().manual_seed(0))
    test = KINDS // 2 + torch.randint(KINDS // 2, (64, 8), generator=torch.Generator().manual_seed(1))
    found = counted(gathered(train), gathered(test))
    assert float(found.credits.mean()) == pytest.approx(1 / 16, abs=1e-6)


def test_padding_is_neither_counted_nor_asked_and_breaks_no_context() -> None:
    symbols, lengths = chain(512, 0), torch.randint(3, 9, (512, 1), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(8) < lengths
    torn = torch.where(mask, symbols, 0)
    found = counted(gathered(torn, mask=mask), gathered(torn[:64], mask=mask[:64]))
    assert found.fitted == int(mask.sum())
    torch.testing.assert_close(found.credits, found.most)


def test_candidates_lie_at_one_position_where_each_sample_has_an_order() -> None:
    """The position alone would tell symbols apart that always stand there: counts identify none of them by it."""
    symbols = torch.arange(8).expand(512, 8) % KINDS
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(512)])
    part = gathered(symbols.gather(1, order), order=order)
    found = counted(part, part.rows(slice(64)))
    assert found.same > 10  # all others that are asked at this position hold the same symbol
    torch.testing.assert_close(found.credits, found.most)


def test_baselines_count_symbols_where_an_adapter_has_any() -> None:
    train, test = gathered(chain(300, 0)), gathered(chain(32, 1))
    plain = fit_baselines([train], test, total=300)
    found = fit_baselines([train.rows(slice(100)), train.rows(slice(100, None))], test, total=300, symbols=symbols_of)
    assert plain.counts is None
    assert found.counts is not None
    torch.testing.assert_close(found.counts.credits, found.counts.most)
