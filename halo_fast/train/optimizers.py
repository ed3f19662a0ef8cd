"""The optimizers of training: what they keep of each weight, how that comes back, and how many bytes it takes."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.train.parallel import placed_like

__all__ = ["Optimizer", "check_optimizer", "kept_state", "make_optimizer", "moment_bytes", "restore_state"]

Optimizer = Literal["adamw", "adamw_8bit"]

# bitsandbytes: smaller weights have float32 moments, and larger ones a float32 scale for so many 8-bit ones
_SMALLEST, _BLOCK = 4096, 256
# What is kept of a weight, by names of the packages. A small weight of AdamW8bit has no scales; tables are constants.
_KEPT = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "adamw_8bit": ("step", "state1", "state2", "absmax1", "absmax2"),
}


def check_optimizer(kind: Optimizer, setting: str = "train.optimizer") -> None:
    """Raise unless the optimizer's package is installed.

    Args:
        kind: of the optimizer.
        setting: for the error.

    Raises:
        UserError: with the command that installs it.
    """
    if kind == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise UserError(f"{setting}: adamw_8bit needs bitsandbytes, which is not installed; pip install bitsandbytes")


def make_optimizer(
    parameters: Iterable[Tensor],
    kind: Optimizer,
    learning_rate: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """An optimizer.

    Args:
        parameters: what is trained, float32.
        kind: of the optimizer; its package is installed.
        learning_rate: before a schedule sets it.
        weight_decay: decoupled.
        eps: added to the root of the second moment.
        fused: whether AdamW takes a step in one kernel; None for torch's default.
    """
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=eps, fused=fused)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        list(parameters), lr=learning_rate, weight_decay=weight_decay, eps=eps, min_8bit_size=_SMALLEST
    )
    return optimizer


def kept_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kind: Optimizer) -> dict[str, Tensor]:
    """What a checkpoint keeps of a weight for the optimizer; nothing of one that never had a gradient.

    Args:
        optimizer: from `make_optimizer`, after a step.
        parameter: the weight.
        kind: of the optimizer.
    """
    state = optimizer.state.get(parameter, {})
    found = {key: state[key] for key in _KEPT[kind] if key in state}
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in found.items()}


def restore_state(optimizer: Any, parameter: Tensor, kept: Mapping[str, Tensor], name: str, kind: Optimizer) -> None:
    """Give the optimizer what a checkpoint kept of a weight; tensors go where and as the weight is.

    Args:
        optimizer: from `make_optimizer`.
        parameter: the weight.
        kept: tensors of the checkpoint, under "KEY.NAME".
        name: of the weight.
        kind: of the optimizer.
    """
    found: dict[str, Any] = {key: kept[f"{key}.{name}"] for key in _KEPT[kind] if f"{key}.{name}" in kept}
    if not found:
        return
    # the count of steps is a number, never sharded
    state = {
        key: value.to(parameter.device) if key == "step" else placed_like(value, parameter)
        for key, value in found.items()
    }
    if kind == "adamw_8bit":
        state["step"] = int(found["step"])
        if "absmax1" in state:
            if not optimizer.name2qmap:
                optimizer.fill_qmap()
            for table, values in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                state[table] = optimizer.name2qmap[values].to(parameter.device)
    optimizer.state[parameter] = state


def moment_bytes(parameters: Iterable[Tensor], kind: Optimizer) -> int:
    """Bytes of both moments of what is trained.

    Args:
        parameters: what is trained.
        kind: of the optimizer.
    """
    total = 0
    for value in parameters:
        count = value.numel()
        if kind == "adamw" or count < _SMALLEST:
            total += 2 * count * value.element_size()
        else:
            total += 2 * (count + 4 * -(-count // _BLOCK))
    return total
