"""Several processes as one: pairs are dealt out whole, gradients and weights of the mean are added up once a step.

Gradients travel after the last backward pass of a step, with the number of pairs behind them; the division comes after
the sum. torch's wrapper for replicas, which accelerate would put around the model, divides by processes instead, and
counts on every process running the same backward passes. Here nothing hooks into the backward pass, so checkpointing,
compiled blocks and processes that skip pairs do not disturb it. FSDP2 shards model and adapter, and adds up the
gradients itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halo_fast.loss.functional import GranDPOOutput, patch_error
from halo_fast.train.adapters import repeated_blocks

__all__ = ["any_process", "compact", "dealt", "divide_gradients", "full", "merged", "same_everywhere", "shard"]

_MESSAGE = 2**24  # numbers in one message


def full(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def dealt(places: Sequence[Any], size: int, rank: int, world: int) -> list[Sequence[Any]]:
    """This process's batches out of a step's places: batches of `size` are dealt in turn."""
    return [places[start : start + size] for start in range(rank * size, len(places), world * size)]


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model over all processes in place with FSDP2, block by block; `accelerate launch --use_fsdp` asks.

    accelerate's own preparation knows no CPU, and would wrap the optimizer too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    # All is sharded again after a pass: weights may be moved before the next one, which has to see it.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, should they differ."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.no_grad()
def divide_gradients(parameters: Sequence[Tensor], pairs: Tensor, sharded: bool) -> None:
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
            for message in _messages([*gradients, pairs[None]]):
                together = torch.cat([part.flatten().to(gradients[0]) for part in message])
                dist.all_reduce(together)
                for part, total in zip(message, together.split([part.numel() for part in message]), strict=True):
                    part.copy_(total.view_as(part))
    scale = factor / pairs.clamp(min=1)
    for gradient in gradients:
        gradient.mul_(scale)


def _messages(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups that are sent as one: a LoRA's gradients fit into one or two, a whole model's do not."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(one.numel() for one in groups[-1]) + tensor.numel() > _MESSAGE:
            groups.append([])
        groups[-1].append(tensor)
    return groups


def any_process(flags: Tensor, device: torch.device) -> Tensor:
    """Element-wise "or" over all processes of a bool tensor; waits for the device."""
    if not dist.is_initialized():
        return flags
    counts = flags.to(device, torch.int32)
    dist.all_reduce(counts)
    return (counts > 0).cpu()


def compact(out: GranDPOOutput, layout: str) -> GranDPOOutput:
    """The output without its latents: tables of numbers alone, to be kept until the log is read."""
    error = out._error
    if error is None:
        error = patch_error(out._prediction, out._target, out.patch_logits.shape[1:])
    shape = torch.empty(out._prediction.shape, device="meta")
    return replace(out, loss=out.loss.detach(), _error=error, _prediction=shape, _target=shape)


def merged(outputs: Sequence[GranDPOOutput]) -> GranDPOOutput:
    """One output out of the compact ones of a step's batches, of all processes; its loss is the mean over all pairs."""
    count = torch.stack([out.num_pairs for out in outputs])
    loss = torch.stack([out.loss for out in outputs])
    sums = _gathered(torch.stack([(loss * count).sum(), count.sum()])[None]).sum(0)
    joined: dict[str, Any] = {}
    for name in ("patch_logits", "video_logits", "active", "_kappa"):
        joined[name] = _strung([getattr(out, name) for out in outputs])
    for name in ("log_ratio", "_patch_rewards", "_video_rewards", "_error"):
        # a pair's two samples side by side while pairs are strung together
        values = [getattr(out, name) for out in outputs]
        pairs = _strung([None if value is None else value.unflatten(0, (2, -1)).transpose(0, 1) for value in values])
        joined[name] = None if pairs is None else pairs.transpose(0, 1).flatten(0, 1)
    return replace(outputs[0], loss=sums[0] / sums[1].clamp(min=1), **joined)


def _strung(values: Sequence[Tensor | None]) -> Tensor | None:
    """Tables of all batches and processes one after another; None if there are none."""
    there = [value for value in values if value is not None]
    return _gathered(torch.cat(there)) if there else None


def _gathered(value: Tensor) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)
