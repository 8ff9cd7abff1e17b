"""One process or many: everything that knows of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    """This process among all: its rank, their number, its device, and how many share its machine."""

    rank: int
    size: int
    device: torch.device
    per_machine: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; the value itself stays what it is."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether any rank says True; every rank gets the same answer. Waits for the device."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def union(self, names: set[str]) -> list[str]:
        """The names that any rank has, sorted, on every rank."""
        every = [names]
        if self.size > 1:
            every = [set()] * self.size
            dist.all_gather_object(every, names)
        return sorted(set().union(*every))

    def in_order(self, mine: Sequence[Tensor]) -> list[Tensor]:
        """One tensor a batch of `plain_batches`, of all ranks, in the order of one process; on the CPU of every rank.

        Args:
            mine: of every `size`-th batch, from this rank's on.
        """
        own = [part.cpu() for part in mine]
        every = [own]
        if self.size > 1:
            every = [[]] * self.size
            dist.all_gather_object(every, own)
        return [part for turn in zip_longest(*every) for part in turn if part is not None]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the fit loop calls it: gradients are averaged over ranks."""
        return model if self.size == 1 else DistributedDataParallel(model)


def gather_samples(x: Tensor) -> Tensor:
    """Samples of all ranks, this one's first: [B, Q, ...] -> [ranks * B, longest Q, ...], padded with zeros.

    B is the same on every rank. Every rank's gradients flow back to the rank that a sample is from. Without other
    processes: x itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, int(longest) - x.shape[1]))
    every: Tensor = _AllGather.apply(x.contiguous())  # type: ignore[no-untyped-call]
    return every.roll(-dist.get_rank() * len(x), dims=0)


class _AllGather(torch.autograd.Function):
    """[B, ...] -> [ranks * B, ...] in the order of ranks; backward sums what all ranks have for this one's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that `torchrun` started, or be the only one.

    CUDA where there is one (a device a local rank), else the CPU; NCCL or gloo to match.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    finally:
        dist.destroy_process_group()
