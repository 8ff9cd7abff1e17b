"""UPerNet and the dense head: shapes, gradients, and maps that do not depend on the order of the tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nepa_core.model import NEPA
from nepa_core.pooling import canonical_tokens
from recipes.configs import SegmentConfig
from recipes.networks.heads import DenseHead
from recipes.networks.upernet import UPerNet, UPerNetConfig
from recipes.training.segmentation import Segmenter, build_segmenter
from tests import tiny_scenes

CONFIG = UPerNetConfig(levels=(0, 1, 2, 3), channels=6, dropout=0.0, auxiliary_channels=5, auxiliary_weight=0.4)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 1)])
def test_logits_have_four_times_the_resolution_of_the_tokens(grid: tuple[int, int]) -> None:
    head = UPerNet(CONFIG, dim=8, classes=3).eval()
    maps = [torch.randn(2, 8, *grid) for _ in range(4)]
    assert head(maps).shape == (2, 3, 4 * grid[0], 4 * grid[1])
    assert head.auxiliary_logits(maps).shape == (2, 3, *grid)


def test_every_level_and_every_parameter_takes_part() -> None:
    head = UPerNet(CONFIG, dim=8, classes=3)
    maps = [torch.randn(2, 8, 6, 6, requires_grad=True) for _ in range(4)]
    (head(maps).square().sum() + head.auxiliary_logits(maps).square().sum()).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in maps)
    silent = [name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == []


def test_the_auxiliary_head_reads_the_third_level_alone() -> None:
    head = UPerNet(CONFIG, dim=8, classes=3).eval()
    maps = [torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(4)]
    head.auxiliary_logits(maps).sum().backward()
    assert [x.grad is not None for x in maps] == [False, False, True, False]


def test_the_dense_head_maps_every_token_by_itself_and_starts_at_zero() -> None:
    head = DenseHead(8, 3)
    x = torch.randn(2, 5, 8)
    assert torch.equal(head(x), torch.zeros(2, 5, 3))
    torch.nn.init.normal_(head.linear.weight)
    changed = head(x.index_fill(1, torch.tensor([3]), 0.0)) != head(x)
    assert changed.any(2).tolist() == [[False, False, False, True, False]] * 2


def segmenter(kind: str) -> tuple[Segmenter, SegmentConfig]:
    """A network whose logits are far from zero, in evaluation mode, and its config."""
    config = tiny_scenes.recipe().model_copy(update={"head": kind})
    model, _ = build_segmenter(config)
    for name, value in model.head.named_parameters():
        if name.endswith("weight") and (name.startswith("linear") or value.shape[0] == 3):  # what gives the logits
            torch.nn.init.normal_(value)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as after training
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval(), config


@pytest.mark.parametrize("kind", ["upernet", "linear"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_permuted_order_gives_the_map_of_raster(kind: str, padded: bool) -> None:
    """Under bidirectional attention an order changes nothing once it is undone; causally it must matter."""
    model, config = segmenter(kind)
    batch = {"image": torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)}
    if padded:
        batch["real"] = torch.tensor([[16, 24], [9, 17]])
    raster = config.data.read(batch)
    shuffled = config.data.model_copy(update={"patch_order": "random", "order_seed": 5}).read(batch)
    assert shuffled.order is not None

    def logits(tokens, causal):
        return model(tokens, (4, 6), causal=causal, auxiliary=True)

    for expected, found in zip(logits(raster, False), logits(shuffled, False), strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(shuffled, True).logits, logits(raster, True).logits, atol=1e-3)
    wrong = replace(shuffled, order=None)  # as if the order were never undone
    assert not torch.allclose(logits(wrong, False).logits, logits(raster, False).logits, atol=1e-3)


def test_padding_reaches_no_feature_of_the_image() -> None:
    config = tiny_scenes.recipe()
    model, _ = build_segmenter(config)
    real = torch.tensor([[8, 24]])
    image = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8)
    other = image.clone()
    other[:, :, 8:] = 99
    backbone: NEPA = model.backbone.eval()
    seen = []
    for each in (image, other):
        tokens = config.data.read({"image": each, "real": real})
        out = backbone(tokens, causal=False)
        seen.append(canonical_tokens(out.predictions, tokens, bos=True))
    assert torch.equal(seen[0], seen[1])
    assert (seen[0][0].view(4, 6, -1)[2:] == 0).all()
    assert (seen[0][0].view(4, 6, -1)[:2] != 0).any()
