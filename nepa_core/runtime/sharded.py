"""A network in slices: torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277).

Every process keeps a slice of every weight, of its average and of the optimiser's two means, and gathers the weights of
one block at a time. With "hsdp" the slices are spread over the processes of a machine and every machine holds a copy:
only gradients cross between machines.

The optimiser, the average and the norm work on this process's slices as plain tensors: the fused kernels are the same.
What judges a network gets it whole: `Sharded` trains a copy, and fills the network that it was given when that is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nepa_core.basics import UserError
from nepa_core.ema import Ema
from nepa_core.runtime.distributed import World
from nepa_core.runtime.whole import Whole, norm_here


class Sharded(Whole):
    """A copy of the network in slices; the network and the average that were given are empty while it trains.

    Every list of modules that is called "blocks" is gathered and freed block by block, the rest at once. Gradients are
    summed into slices with every micro-batch, as whole ones would take four bytes a parameter; between machines
    ("hsdp") only with the last.

    Args:
        ema: of `model`; the attribute is an average of the slices.

    Raises:
        UserError: the network has a parameter without axes.
    """

    def __init__(self, model: nn.Module, ema: Ema | None, world: World, mesh: DeviceMesh) -> None:
        super().__init__(model, ema, world)
        if scalars := [name for name, value in model.named_parameters() if value.ndim == 0]:
            raise UserError(f"{scalars[0]} is a single number and can't be sharded: make it [1], or train.strategy=ddp")
        for value in model.parameters():
            _from_main(value.data)  # as DDP does: slices of different networks would fit together unseen
        self._module, self._mesh = _sharded(model, mesh), mesh
        self._distributed = dict(self._module.named_parameters())
        self._slices = {
            name: nn.Parameter(_local(value.detach()), requires_grad=value.requires_grad)
            for name, value in self._distributed.items()
        }
        self._whole_ema, self._empty = ema, False
        self.ema = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The slices of this process; they share the memory of those that the network gathers from."""
        return iter(self._slices.items())

    @torch.no_grad()
    def begin(self) -> nn.Module:
        for name, value in self._model.named_parameters():
            self._slices[name].copy_(self.part(name, value))
        if self._whole_ema is not None:
            self.ema = Ema(self, self._whole_ema.decay)
            if self._whole_ema.follows:
                self.ema.restore({name: self.part(name, value) for name, value in self._whole_ema.averages.items()})
        self._release()
        return self._module

    @contextmanager
    def micro_batch(self, *, first: bool, last: bool) -> Iterator[None]:
        if first:  # as DDP does; those of rank 0 are in a checkpoint
            for value in self._module.buffers():
                _from_main(value)
        cast(FSDPModule, self._module).set_requires_all_reduce(last)
        yield

    def norm(self, gradients: list[Tensor]) -> Tensor:
        square = norm_here(gradients).double().square()
        dist.all_reduce(square, group=self._mesh.get_group(self._mesh.ndim - 1))
        return square.sqrt().float()

    def collect(self) -> None:
        for name, value in self._distributed.items():
            self._slices[name].grad, value.grad = None if value.grad is None else _local(value.grad), None

    def state(self) -> dict[str, Tensor]:
        return super().state() | self._slices

    def part(self, name: str, whole: Tensor) -> Tensor:
        if whole.ndim == 0:  # AdamW's count of steps
            return whole
        like = cast(DTensor, self._distributed[name])
        whole = whole.to(like.device)
        spread = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return spread.to_local().clone()  # a view would keep the whole alive

    def gathered(self, name: str, part: Tensor) -> Tensor:
        if part.ndim == 0 or name not in self._distributed:
            return part
        like = cast(DTensor, self._distributed[name])
        spread = DTensor.from_local(
            part.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return spread.full_tensor()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As `Whole.whole`: every process then holds all of it for a while."""
        was_empty = self._empty
        self.end()
        try:
            yield
        finally:
            if was_empty:
                self._release()

    def end(self) -> None:
        if not self._empty:
            return
        for name, value in self._model.named_parameters():
            value.data = self.gathered(name, self._slices[name])
        if self._whole_ema is not None and self.ema is not None:
            for name, average in self.ema.averages.items():
                self._whole_ema.averages[name] = self.gathered(name, average)
        self._empty = False

    def _release(self) -> None:
        for value in self._model.parameters():
            value.data = value.data.new_empty(0)
        if self._whole_ema is not None:
            for name, average in self._whole_ema.averages.items():
                self._whole_ema.averages[name] = average.new_empty(0)
        self._empty = True


def mesh_of(world: World, *, across_machines: bool) -> DeviceMesh:
    """[ranks], or of "hsdp" on several machines [machines, ranks of one]: the last axis is the one of the slices."""
    shape: tuple[int, ...] = (world.size,)
    if across_machines and world.per_machine < world.size:
        counts = world.union({str(world.per_machine)})
        if len(counts) > 1:
            raise UserError(
                f"train.strategy=hsdp needs as many processes on each machine, and they have {' and '.join(counts)}: "
                "start torchrun with one --nproc-per-node on all, or take fsdp"
            )
        shape = (world.size // world.per_machine, world.per_machine)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("machine", "slice")[-len(shape) :])


def _sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of a network in slices, in torch's documented order: recompute, compile, shard the blocks, shard the rest.

    Buffers are the network's own: a step that changes them changes both.
    """
    # The copy's parameters begin in the memory of the network's; `fully_shard` takes its slice of each.
    own: dict[int, Tensor] = {id(value): value for value in model.buffers()}
    own |= {id(value): nn.Parameter(value.data, value.requires_grad) for value in model.parameters()}
    made = copy.deepcopy(model, own)
    for original, module in zip(model.modules(), made.modules(), strict=True):
        if original._compiled_call_impl is not None:  # a copy loses it; compiled without the hooks of `fully_shard`
            module.forward = torch.compile(module.forward)
    for module in list(made.modules()):
        blocks = getattr(module, "blocks", None)
        for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else ():
            fully_shard(block, mesh=mesh)
    return cast(nn.Module, fully_shard(made, mesh=mesh))


def _local(value: Tensor) -> Tensor:
    return cast(DTensor, value).to_local()


def _from_main(value: Tensor) -> None:
    """Fill a tensor with what rank 0 has."""
    sent = value.contiguous()
    dist.broadcast(sent, 0)
    if sent is not value:
        value.copy_(sent)
