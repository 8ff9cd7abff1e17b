"""Point clouds of five shapes: a token is 16 neighbouring points. From this folder: nepa pretrain my_points:base"""

from functools import cache

import torch

from modalities.orders import Ordered, PatchOrder
from nepa_core import Modality, Tokens
from recipes.presets import small

SHAPES = ("sphere", "cylinder", "cone", "torus", "box")


def cloud(shape, draw):  # 256 to 512 noisy points on a turned shape, padded to 512
    count = torch.randint(256, 513, (), generator=draw)
    a, b, h = torch.rand(3, 512, generator=draw) * torch.tensor([[6.283], [6.283], [2.0]])
    radius = ((1 - (h - 1) ** 2).sqrt(), torch.ones(512), 1 - h / 2, 0.7 + 0.3 * b.cos(), torch.ones(512))[shape]
    points = torch.stack((radius * a.cos(), radius * a.sin(), 0.3 * b.sin() if shape == 3 else h - 1), 1)
    points = points / points.abs().amax(1, keepdim=True) if shape == 4 else points
    points = points @ torch.linalg.qr(torch.randn(3, 3, generator=draw)).Q + torch.randn(512, 3, generator=draw) / 50
    return {"points": points, "count": count, "label": torch.tensor(shape)}


@cache
def clouds(split, samples):
    draw = torch.Generator().manual_seed(len(split))
    return [cloud(i % 5, draw) for i in range(samples)]


class Points(Ordered, Modality):
    token_name = "group"
    samples: int = 2000
    patch_order: PatchOrder = "morton"

    def dataset(self, split):
        return clouds(split, self.samples)

    def tokenize(self, batch):
        points, count = batch["points"], batch["count"][:, None]
        real, row = torch.arange(512, device=points.device) < count, torch.arange(points.shape[0], device=points.device)
        far, centres = torch.where(real, torch.inf, -1.0), []
        for _ in range(32):  # each centre is the point farthest from those before it
            centres.append(points[row, far.argmax(1)])
            far = far.minimum((points - centres[-1][:, None]).square().sum(-1))
        coords = torch.stack(centres, 1)
        distance = (coords[:, :, None] - points[:, None]).square().sum(-1).masked_fill(~real[:, None], torch.inf)
        groups = points[row[:, None, None], distance.topk(16, largest=False).indices] - coords[:, :, None]
        return Tokens(4 * groups.flatten(2), coords, torch.arange(32, device=points.device) < count // 16)

    def order(self, tokens):  # of 16 x 16 x 16 cells of space
        return self.ordered(tokens, (16, 16, 16), ((tokens.coords.clamp(-2, 2) + 2) * 3.99).long())

    def classes(self):
        return SHAPES


def base():
    return small(Points())
