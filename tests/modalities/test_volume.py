"""Volumes become cubes and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.data import default_collate

from modalities.orders import ORDERS
from modalities.volume import SHOWN, Volume
from nepa_core.contract import check_modality
from tests.movies import write_volumes


def adapter(**changes: Any) -> Volume:
    return Volume(**({"source": "shapes", "size": (16, 16, 16), "patch": (4, 8, 8)} | changes))


def test_a_cube_holds_its_voxels_standardised_by_the_volume_or_by_the_data_set() -> None:
    volume = 100 + 5 * torch.randn(2, 1, 16, 16, 16)
    tokens = adapter().tokenize({"volume": volume})
    assert tokens.values.shape == (2, 4 * 2 * 2, adapter().token_dim())
    each = (volume - volume.mean((1, 2, 3, 4), keepdim=True)) / volume.std((1, 2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(tokens.values[:, 3], each[:, 0, :4, 8:, 8:].flatten(1))
    assert tokens.coords[3].tolist() == [-0.75, 0.5, 0.5]
    by_set = adapter(mean=(90.0,), std=(10.0,)).tokenize({"volume": volume})
    torch.testing.assert_close(by_set.values[:, 0], ((volume - 90) / 10)[:, 0, :4, :8, :8].flatten(1))


@pytest.mark.parametrize("order", [name for name in ORDERS if not name.startswith("spiral")])
def test_slices_come_back_whatever_the_order(order: str) -> None:
    data = adapter(patch_order=order)
    tokens = data.read(default_collate([data.dataset("test")[place] for place in range(3)]))
    low, high = SHOWN
    raw = data.tokenize(default_collate([data.dataset("test")[place] for place in range(3)]))
    sketch, signal = data.describe(tokens), data.decode(tokens)
    assert sketch.grid == (4, 2, 2)
    assert sketch.canvas.shape == (3, 16, 64)
    first = ((raw.values[:, 0].view(3, 4, 8, 8)[:, 2] - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(sketch.canvas[:, :8, :8], first)
    assert (signal.kind, signal.data.shape) == ("picture", (3, 1, 32, 128))  # 16 slices


def test_the_adapter_keeps_the_contract(tmp_path: Path) -> None:
    check_modality(adapter(patch_order="morton"))
    write_volumes(tmp_path, each=6, side=10)
    check_modality(adapter(source="folder", root=str(tmp_path), fit="crop", size=(12, 8, 8), patch=(4, 4, 4)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": (5, 8, 8)}, r"the nearest sizes that it divides: \[15, 16, 16\] and \[20, 16, 16\]"),
        ({"source": "folder"}, "data.source=folder needs data.root=DIR"),
        ({"mean": (0.0,)}, "data.mean and data.std are given both, or neither"),
        ({"mean": (0.0, 1.0), "std": (1.0, 1.0)}, "data.mean has 2 numbers for data.channels=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        adapter(**changes)
