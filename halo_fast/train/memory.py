"""Memory of activations: what a forward pass keeps for the backward pass, measured, and three ways to keep less."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halo_fast.families.quantization import plain_tensors

__all__ = ["checkpointing", "count_recomputed", "is_attention", "kept_bytes", "offloaded"]


@cache
def is_attention(operator: Any) -> bool:
    """Whether an operator, as torch dispatches it, is the forward of an attention, of whatever package.

    Recognised by its signature: it begins with query, key and value, gives a tensor and changes nothing. So SDPA's own
    kernels, flash_attn, xformers and diffusers' wrappers all count, whichever of them is imported and when.
    """
    schema = getattr(operator, "_schema", None)
    if schema is None or schema.is_mutable or not any(str(value.type) == "Tensor" for value in schema.returns):
        return False
    names = tuple(argument.name for argument in schema.arguments[:3])
    return names in (("query", "key", "value"), ("q", "k", "v"))


def _selection() -> Callable[[Any, Sequence[Any]], bool]:
    """Which outputs selective checkpointing keeps: those that took much work for their size.

    They are attention's and those of layers wider in than out, such as the second of a feed-forward network: a fifth of
    a block's activations for most of its work.
    """
    products = {torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.mm.default: (0, 1)}

    def keeps(operator: Any, args: Sequence[Any]) -> bool:
        if operator in products:
            left, right = (args[place] for place in products[operator])
            return bool(left.shape[1] > right.shape[1])
        return is_attention(operator)

    return keeps


def _checkpointed(module: nn.Module, *args: Any, context: Any = None) -> Any:
    extra = {} if context is None else {"context_fn": context}
    return checkpoint(module.__call__, *args, use_reentrant=False, **extra)


def checkpointing(mode: str) -> Callable[..., Any]:
    """The function that runs a block with its activations recomputed: all ("full") or the cheap ones ("selective")."""
    if mode == "full":
        return _checkpointed
    keeps = _selection()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keeps(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(_checkpointed, context=partial(create_selective_checkpoint_contexts, policy))


@contextmanager
def offloaded(model: nn.Module, home: str = "cpu") -> Iterator[None]:
    """Activations saved inside the block wait in the CPU's memory until the backward pass; weights do not move.

    Args:
        model: whose weights do not move.
        home: the device on which they wait.
    """
    weights = _storages(model)

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if _address(tensor) in weights:
            return tensor.device, tensor
        waiting = torch.empty(tensor.shape, dtype=tensor.dtype, device=home, pin_memory=tensor.is_cuda)
        return tensor.device, waiting.copy_(tensor, non_blocking=tensor.is_cuda)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=tensor.is_pinned()) if tensor.device != device else tensor

    with saved_tensors_hooks(pack, unpack):
        yield


def kept_bytes(forward: Callable[[], object], model: nn.Module, selective: bool) -> tuple[int, int]:
    """Bytes of activations that a forward pass keeps for its backward pass, in all and of the largest tensor.

    Each storage counts once, and weights do not. Nothing is kept while measuring, so this takes no more memory than a
    pass without a graph.

    Args:
        forward: the pass; its backward pass cannot follow.
        model: whose weights do not count.
        selective: whether selective checkpointing is on, which keeps outputs beside autograd.
    """
    weights = _storages(model)
    known: dict[int, StorageWeakRef] = {}
    total = largest = 0

    def count(tensor: Tensor) -> None:
        nonlocal total, largest
        address = _address(tensor)
        # An address is given out again once its storage is gone.
        if address in weights or (address in known and not known[address].expired()):
            return
        known[address] = StorageWeakRef(tensor.untyped_storage())
        total += tensor.untyped_storage().nbytes()
        largest = max(largest, tensor.untyped_storage().nbytes())

    def count_output(output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor):
                count(value)

    def forbid(nothing: None) -> Tensor:
        raise RuntimeError("activations were only measured, their backward pass cannot run")

    with _Calls(_selection() if selective else lambda *_: False, count_output), saved_tensors_hooks(count, forbid):
        forward()
    return total, largest


def count_recomputed(forward: Callable[[], Tensor]) -> tuple[int, int, int]:
    """Count what the backward pass recomputes; gradients are added to the trainable weights.

    Returns:
        Linear layers and attention operators that the backward pass runs again, and attention operators of the forward
        pass.
    """
    linears = 0

    def called(module: nn.Module, *_: Any) -> None:
        nonlocal linears
        linears += isinstance(module, nn.Linear)

    with _Calls(lambda operator, _: is_attention(operator)) as calls:
        output = forward()
        before = calls.count
        hook = register_module_forward_hook(called)
        try:
            output.float().square().mean().backward()
        finally:
            hook.remove()
        return linears, calls.count - before, before


class _Calls(TorchDispatchMode):
    """Counts the operators inside the block that are `wanted`, and calls `visit` with their outputs."""

    def __init__(
        self, wanted: Callable[[Any, Sequence[Any]], bool], visit: Callable[[Any], None] = lambda output: None
    ) -> None:
        super().__init__()
        self.count = 0
        self._wanted = wanted
        self._visit = visit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._wanted(func, args):
            self.count += 1
            self._visit(output)
        return output


def _storages(model: nn.Module) -> set[int]:
    # of a sharded weight, this process's part
    values = [getattr(value, "_local_tensor", value) for value in (*model.parameters(), *model.buffers())]
    return {_address(value) for value in (*values, *plain_tensors(model))}


def _address(tensor: Tensor) -> int:
    # of the storage itself, for tensors without values have no data
    return tensor.untyped_storage()._cdata
