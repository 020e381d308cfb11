"""Several processes, one GPU each, under `torchrun` or `accelerate launch`.

The routers are small: every process holds them, and their gradients are summed by one all-reduce.
The frozen model may be sharded (FSDP2), since it is the part that does not fit.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and the progress bar."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Collect a small value of every process, tensors on the CPU, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def sum_gradients(self, module: nn.Module) -> None:
        """Sum the gradients of a module's parameters over all processes."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in module.parameters()]
        known = [gradient for gradient in gradients if gradient is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in known]))
        for gradient, part in zip(
            known, flat.split([gradient.numel() for gradient in known]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def peak_gib(self) -> float:
        """Most device memory taken so far, GiB; 0 on the CPU."""
        if self.device.type != "cuda":
            return 0.0
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            distributed.barrier()


def start_world(device: str) -> World:
    """Join the processes that `torchrun` started, or stand alone.

    Args:
        device: `auto`, `cpu` or `cuda`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = torch.device(device)
    if device == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(local)
    if size > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return World(rank, size, local)


def shard_model(model: Any, world: World) -> None:
    """Shard a frozen model over the processes, layer by layer."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
