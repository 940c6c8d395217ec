"""Several processes that train one model: who they are, how they average gradients, and how they share the weights.

The other place that knows torch.distributed is a codebook, which adds up its own statistics.
"""

from __future__ import annotations

import atexit
import copy
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.figures import Figures

Mode = Literal["auto", "none", "ddp", "fsdp"]
Loss = Callable[[nn.Module, Any], tuple[Tensor, Figures]]
T = TypeVar("T")

# Longer than torch's own: the others wait while the first process evaluates.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process of a run: `rank` of `world`, on `device`. All processes call the methods, in one order."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs and pictures."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def of_first(self, value: T) -> T:
        """The first process's value."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        held: list[Any] = [None] * self.world
        dist.all_gather_object(held, value)
        return held

    def wait(self) -> None:
        """Return once all processes are here."""
        if self.world > 1:
            dist.barrier()


def join(model: nn.Module, device: str | None) -> Processes:
    """This process's place among those that torchrun started (or a process group that is there), and its device.

    `device` None is the model's own; of a model on the CPU it is this process's GPU, where there is one. The process
    group that is made here lasts until Python ends.
    """
    chosen = torch.device(device) if device is not None else next(model.parameters()).device
    if torch.cuda.is_available() and (chosen.type == "cpu" if device is None else str(chosen) == "cuda"):
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        # Not at the end of one training: a second group would meet the first one's keys in torchrun's store.
        atexit.register(_leave)
    return present(chosen)


def present(device: torch.device) -> Processes:
    """This process's place in the process group that is there, or alone."""
    if not dist.is_initialized():
        return Processes(0, 1, device)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    if dist.is_initialized():
        # What a sharded model leaves lies in cycles of references. Its tensors must go while Python can see to it:
        # gloo's threads abort the process if they are the last to let go of one when Python ends.
        gc.collect()
        dist.destroy_process_group()


def mode_of(wanted: Mode, world: int) -> Mode:
    """How to share the work: alone "none"; among several "auto" is "ddp", and "none" a ValueError."""
    if world == 1:
        return "none"
    if wanted == "none":
        raise ValueError(f"parallel 'none' in one of {world} processes, expected auto, ddp or fsdp")
    return "ddp" if wanted == "auto" else wanted


class _WithLoss(nn.Module):
    """A model and its loss as one module, so that what hooks into `forward` sees all that a step uses of the model."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        # Behind a function: a loss that is a module itself would become part of what is trained.
        self._loss: Loss = lambda network, batch: loss(network, batch)

    def forward(self, batch: Any) -> tuple[Tensor, Figures]:
        return self._loss(self.model, batch)


@dataclass(frozen=True)
class Sharding:
    """How "fsdp" exchanges weights: see `LoopConfig`."""

    reshard: bool = True
    gathered: torch.dtype = torch.float32
    reduced: torch.dtype = torch.float32

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> FSDPModule:
        """Shard the parameters of a module that are not sharded yet."""
        # What a module is given stays as it is: autocast decides what it computes in, as without sharding.
        precision = MixedPrecisionPolicy(
            param_dtype=None if self.gathered == torch.float32 else self.gathered,
            reduce_dtype=self.reduced,
            cast_forward_inputs=False,
        )
        return fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=self.reshard)


class Trained:
    """A model in training. `model` is what the optimizer sees: the caller's, or with "fsdp" a sharded copy.

    Calling it gives the loss of a batch; `step(last)` says whether gradients are averaged after that backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        processes: Processes,
        mode: Mode,
        *,
        blocks: tuple[str, ...],
        recompute: bool,
        compiled: bool,
        unused_parameters: bool,
        sharding: Sharding,
    ) -> None:
        self.sharded = mode == "fsdp"
        # The caller gets the whole model back in the end, and torch has no way to undo the sharding.
        self.model = copy.deepcopy(model) if self.sharded else model.to(processes.device)
        self._caller = model
        self._recomputed = _named(self.model, blocks) if recompute else []
        if recompute and not self._recomputed:
            raise ValueError(f"blocks {', '.join(blocks)}: the model has none, expected classes to recompute")
        _same_weights(self.model, processes)
        inner = _WithLoss(self.model, loss)
        for block in self._recomputed:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if self.sharded:
            mesh = init_device_mesh(processes.device.type, (processes.world,))
            for block in reversed(_named(self.model, blocks)):  # inner ones first
                sharding.shard(block, mesh)
            # Processes whose batches use other modalities must still exchange the same gradients.
            sharding.shard(inner, mesh).set_reduce_scatter_unused_params(unused_parameters)
        self._plain: dict[str, Any] | None = None
        if compiled and type(self.model).compile is not nn.Module.compile:
            # A model that knows which part of it is a graph, whatever the batch.
            self._plain = dict(vars(self.model))
            self.model.compile()
        elif compiled:
            inner.compile()
        self._inner = inner
        self._outer: nn.Module = inner
        if mode == "ddp":
            # Buffers stay as they are: codebooks add up their statistics themselves, and copying the first process's
            # over the others' before each step would be a second rule for them.
            self._outer = DistributedDataParallel(
                inner,
                forward_sync_buffers=False,
                init_sync=False,
                find_unused_parameters=unused_parameters,
                gradient_as_bucket_view=True,
            )

    def __call__(self, batch: Any) -> tuple[Tensor, Figures]:
        """The loss of a batch on the device, a scalar, and the loss function's own figures."""
        value, metrics = self._outer(batch)
        return value, metrics

    @contextmanager
    def step(self, last: bool) -> Iterator[None]:
        """Around one forward and backward pass; only the last of an optimizer step averages over the processes."""
        if isinstance(self._outer, FSDPModule):
            self._outer.set_requires_gradient_sync(last)
            self._outer.set_is_last_backward(last)
        if isinstance(self._outer, DistributedDataParallel) and not last:
            with self._outer.no_sync():
                yield
        else:
            yield

    @contextmanager
    def readable(self) -> Iterator[None]:
        """The weights outside of the blocks put together, so that any method of the model can be called."""
        if not isinstance(self._inner, FSDPModule):
            yield
            return
        self._inner.unshard()
        try:
            yield
        finally:
            self._inner.reshard()

    @torch.no_grad()
    def give_back(self) -> None:
        """Put whole weights into the caller's model, on this process's device, and undo what was added to it."""
        for block in self._recomputed:
            del block.forward
        if self._plain is not None:
            held = vars(self.model)
            for name in held.keys() - self._plain.keys():
                del held[name]
            held.update({name: value for name, value in self._plain.items() if name != "training"})
        if self.sharded:
            whole = self.model.state_dict()
            for name, value in self._caller.state_dict().items():
                value.copy_(full(whole[name]))
            ours = {name: module for name, module in self.model.named_modules()}
            for name, module in self._caller.named_modules():
                module.train(ours[name].training)


def full(value: Tensor) -> Tensor:
    """The whole of a tensor whose parts processes hold; all of them call it."""
    return cast(Tensor, value.full_tensor()) if isinstance(value, DTensor) else value


def _named(model: nn.Module, classes: tuple[str, ...]) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in classes]


@torch.no_grad()
def _same_weights(model: nn.Module, processes: Processes) -> None:
    """The first process's parameters and buffers everywhere."""
    if processes.world > 1:
        for value in model.state_dict().values():
            sent = value.detach().to(processes.device).contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)
