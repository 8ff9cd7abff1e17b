"""Where the weights of a network lie while several processes train it: whole on each, or in shards.

`Whole` is one process, or torch's DistributedDataParallel. `Sharded` is torch's `fully_shard` (FSDP2; Zhao et al. 2023,
arXiv 2304.11277): every process keeps a slice of every weight, of its average and of the optimiser's two means, and
gathers the weights of one block at a time. With "hsdp" the slices are spread over the processes of a machine and every
machine holds a copy, so that only gradients cross between machines.

The optimiser, the average and the norm work on this process's slices as plain tensors: the fused kernels are the same.
What judges a network gets it whole: `Sharded` trains a copy and fills the network that it was given when it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nepa_core.basics import UserError
from nepa_core.ema import Ema
from nepa_core.runtime.distributed import World

Strategy = Literal["ddp", "fsdp", "hsdp"]


class Whole:
    """The network as it is: every process holds all of it.

    Attributes:
        ema: the average that follows it, or None.
    """

    def __init__(self, model: nn.Module, ema: Ema | None, world: World) -> None:
        self.ema = ema
        self._model, self._world = model, world
        self._shared = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser and the average work on: the parameters by their names."""
        return self._model.named_parameters()

    def begin(self) -> nn.Module:
        """The network as a step calls it. What was restored is final from here on."""
        self._shared = self._world.wrap(self._model)
        return self._shared

    def micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: ranks exchange gradients with the last micro-batch of a step."""
        if not last and isinstance(self._shared, DistributedDataParallel):
            return cast(AbstractContextManager[None], self._shared.no_sync())
        return nullcontext()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together, the same on every rank."""
        return norm_here(gradients)

    def collect(self) -> None:
        """Bring the gradients to what `named_parameters` gives."""

    def state(self) -> dict[str, Tensor]:
        """The tensors of the network by name; in slices those that `gathered` brings together."""
        return self._model.state_dict()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor that is shaped as the parameter of this name."""
        return whole

    def gathered(self, name: str, part: Tensor) -> Tensor:
        """The way back of `part`, and a tensor of another name as it is; called on every rank."""
        return part

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the network and the average that were given hold their values; entered on every rank."""
        return nullcontext()

    def end(self) -> None:
        """The network and the average that were given hold their values from here on; called on every rank."""


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


def norm_here(gradients: list[Tensor]) -> Tensor:
    """The norm of all these tensors together."""
    return nn.utils.get_total_norm(gradients, foreach=True)


def held(model: nn.Module, ema: Ema | None, world: World, strategy: Strategy) -> Whole:
    """How the processes hold a network; one alone holds it whole, whatever the strategy.

    Raises:
        UserError: the network or the machines don't fit the strategy.
    """
    if world.size == 1 or strategy == "ddp":
        return Whole(model, ema, world)
    return Sharded(model, ema, world, _mesh(world, across_machines=strategy == "hsdp"))


def _mesh(world: World, *, across_machines: bool) -> DeviceMesh:
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
