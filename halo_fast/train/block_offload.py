"""Weights of a frozen base that wait in the CPU's memory and are on the device one block at a time.

The base never changes, so its weights travel to the device only, and their copies there are dropped. Weights of linear
layers inside the repeated blocks do. All else stays on the device, and so does what is trained.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.base import repeated_blocks
from halo_fast.train.config import TrainConfig

__all__ = ["check_offload", "offloaded_blocks", "waiting_bytes", "waiting_weights"]


_SETTING, _TAKES = "train.offload_blocks: true", "moves weights that are not quantised, or by bnb_nf4"
_CURE = "choose another quantization, or set false"


def waiting_weights(model: nn.Module) -> dict[nn.Module, list[Tensor]]:
    """The weights that wait, by the block that brings them: of frozen linear layers inside the outermost blocks.

    Autograd keeps such a weight as a view, which goes on holding the copy on the device. Other operations keep the
    parameter itself, and would find what lies in it later.

    Args:
        model: frozen, with or without what is trained on it.
    """
    blocks = repeated_blocks(model)
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return {
        block: [
            layer.weight for layer in block.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad
        ]
        for block in blocks
        if block not in inner
    }


def check_offload(config: TrainConfig, quantization: str | None = None) -> None:
    """Raise if settings exclude that blocks are offloaded.

    Args:
        config: the settings.
        quantization: of the base, where it is known.

    Raises:
        UserError: naming the setting that excludes it.
    """
    if not config.offload_blocks:
        return
    if not config.rank:
        raise UserError(f"{_SETTING} leaves weights as they are, and train.rank 0 trains them; set a rank, or false")
    if config.gradient_checkpointing == "none":
        raise UserError(
            f"{_SETTING} saves nothing while the graph keeps every block's weights; set "
            "train.gradient_checkpointing to full or selective"
        )
    if config.compile:
        raise UserError(f"{_SETTING} exchanges weights under compiled blocks; set train.compile to false")
    if quantization not in (None, "bnb_nf4"):
        raise UserError(f"{_SETTING} {_TAKES}, got {quantization}; {_CURE}")


def _check_weights(model: nn.Module, weights: Iterable[Tensor]) -> None:
    """Raise unless there are weights to move, each of them in one piece."""
    found = [type(value).__name__ for value in weights]
    if not found:
        raise UserError(f"{_SETTING} finds no blocks with linear layers in {type(model).__name__}; set false")
    for name in found:
        if name not in ("Parameter", "Params4bit"):
            raise UserError(f"{_SETTING} {_TAKES}, got {name}; {_CURE}")


def waiting_bytes(model: nn.Module, size: Callable[[Tensor], int]) -> tuple[int, int]:
    """Bytes of all weights that wait, and of those of the largest block.

    Args:
        model: frozen, with or without what is trained on it.
        size: bytes of a weight.
    """
    blocks = [sum(size(value) for value in weights) for weights in waiting_weights(model).values()]
    return sum(blocks), max(blocks, default=0)


@contextmanager
def offloaded_blocks(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model onto the device without its blocks' weights; a block has them there from its call to another's.

    A block that is recomputed in the backward pass is called again, and its gradients follow before another block is.
    So the weights are there when they are used, whether or not the recomputation ends early.

    Args:
        model: frozen; what is trained may be added inside the block.
        device: where it computes; the weights travel on a CPU too.

    Raises:
        UserError: a network without blocks, or weights that are quantised in a way that does not travel.
    """
    weights = waiting_weights(model)
    _check_weights(model, [value for values in weights.values() for value in values])
    homes = {value: value.data for values in weights.values() for value in values}
    waiting = {value: _waiting(data, device) for value, data in homes.items()}
    present: list[nn.Module] = []

    def release() -> None:
        for block in present:
            for value in weights[block]:
                value.data = waiting[value]
        present.clear()

    def bring(block: nn.Module, args: Any) -> None:
        # a block that is there already gets them again: selective checkpointing wants the same operations each time
        release()
        for value in weights[block]:
            value.data = waiting[value].to(device, non_blocking=True, copy=True)
        present.append(block)

    _move_rest(model, set(homes), device)
    scales = [value.quant_state for value in homes if hasattr(value, "quant_state")]
    for state in scales:  # of 4-bit weights, an eighth of their bytes
        state.to(device)
    hooks = [block.register_forward_pre_hook(bring) for block in weights]
    try:
        for value in homes:
            value.data = waiting[value]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for value, data in homes.items():
            value.data = data
            if hasattr(value, "quant_state"):
                value.quant_state.to(data.device)


def _waiting(data: Tensor, device: torch.device) -> Tensor:
    """A weight in the CPU's memory, from which it travels fast."""
    data = data.cpu()
    return data.pin_memory() if device.type == "cuda" else data


def _move_rest(model: nn.Module, left: set[Tensor], device: torch.device) -> None:
    """Move everything but some parameters to a device."""
    places = [(part, name, value) for part in model.modules() for name, value in part._parameters.items()]
    kept = [(part, name, value) for part, name, value in places if value in left]
    for part, name, _ in kept:
        part._parameters[name] = None
    try:
        model.to(device)
    finally:
        for part, name, value in kept:
            part._parameters[name] = value
