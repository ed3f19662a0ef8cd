"""Several processes as one: each takes whole pairs, and gradients are averaged over all processes' pairs once a step.

Replicas sum their gradients after the last backward pass of a step, in one or two messages that also carry the number
of pairs. docs/training.md says what torch's DistributedDataParallel costs instead. FSDP2 shards model and adapter, and
averages the gradients itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halo_fast.families.base import repeated_blocks
from halo_fast.processes import sum_tensors

__all__ = [
    "any_process",
    "average_gradients",
    "batches_of_process",
    "broadcast_first",
    "gather_rows",
    "gather_shards",
    "placed_like",
    "shard",
]


def gather_shards(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def batches_of_process(batches: Sequence[Any], rank: int, world: int) -> Sequence[Any]:
    """The batches of one process in a step.

    Args:
        batches: the step's, over all processes, to which they go in turn.
        rank: this process's number.
        world: number of processes.
    """
    return batches[rank::world]


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model over all processes in place with FSDP2, block by block, for `accelerate launch --use_fsdp`.

    accelerate's own preparation would wrap the optimizer too, and does not run on a CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    # All is sharded again after a pass: weights may change before the next one, which must use the new ones.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def broadcast_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], pairs: Tensor, sharded: bool) -> None:
    """Turn sums over this process's pairs into the mean over all processes' pairs; waits for no device.

    Args:
        parameters: their gradients are replaced; one without a gradient gets 0.
        pairs: 0-d, how many pairs the sums are over.
        sharded: whether FSDP has averaged the gradients over the processes already.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pairs = pairs.detach().float().clone()
    factor = 1
    if dist.is_initialized():
        if sharded:
            dist.all_reduce(pairs)
            factor = dist.get_world_size()
        else:
            sum_tensors([*gradients, pairs[None]])
    scale = factor / pairs.clamp(min=1)
    for gradient in gradients:
        gradient.mul_(scale)


def any_process(flags: Tensor, device: torch.device) -> Tensor:
    """Element-wise "or" over all processes of a bool tensor; waits for the device."""
    if not dist.is_initialized():
        return flags
    counts = flags.to(device, torch.int32)
    dist.all_reduce(counts)
    return (counts > 0).cpu()


def gather_rows(value: Tensor) -> Tensor:
    """The rows of all processes, one process after another; all must have equally many."""
    if not dist.is_initialized():
        return value
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The value where and as the parameter is, sharded or whole."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)
