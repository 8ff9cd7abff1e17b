"""Credits of held-out samples survive a JSON file: exact for right and wrong, to float16 otherwise."""

import pytest
import torch

from recipes.statistics.credits import pack_credits, unpack_credits


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 1000])
def test_right_and_wrong_come_back_exactly_at_a_bit_a_sample(samples: int) -> None:
    credits = torch.randint(0, 2, (samples,), generator=torch.Generator().manual_seed(samples)).float()
    packed = pack_credits(credits)
    assert torch.equal(unpack_credits(packed), credits)
    assert unpack_credits(packed).dtype == torch.float32
    assert len(packed) <= 16 + 4 * ((samples + 7) // 8 + 2) // 3
    assert pack_credits(credits.bool()) == packed


def test_other_credits_come_back_to_float16_and_past_its_range_are_cut() -> None:
    credits = torch.tensor([1.0, 0.25, -3.1416, 1e6])
    read = unpack_credits(pack_credits(credits))
    torch.testing.assert_close(read[:3], credits[:3], rtol=1e-3, atol=0.0)
    assert float(read[3]) == 65504.0


@pytest.mark.parametrize("credits", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([float("nan")])])
def test_what_cannot_be_packed_is_an_error(credits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="credits must be"):
        pack_credits(credits)


@pytest.mark.parametrize(
    "packed", ["", "bits:9:AA==", "half:2:AAA=", "bits:x:AA==", "words:1:AA==", "bits:0:", "half:1:*"]
)
def test_what_was_not_packed_is_an_error(packed: str) -> None:
    with pytest.raises(ValueError, match="not packed credits"):
        unpack_credits(packed)
