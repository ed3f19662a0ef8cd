"""The optimizers of training: what they keep of each weight, how that comes back, and how many bytes it takes."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.train.config import TrainConfig
from halo_fast.train.parallel import placed_like

__all__ = ["check_optimizer", "kept_state", "make_optimizer", "moment_bytes", "restore_state"]

# bitsandbytes: smaller weights have float32 moments, and larger ones a float32 scale for so many 8-bit ones
_SMALLEST, _BLOCK = 4096, 256
# What is kept of a weight, by names of the packages. A small weight of AdamW8bit has no scales; tables are constants.
_KEPT = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "adamw_8bit": ("step", "state1", "state2", "absmax1", "absmax2"),
}


def check_optimizer(config: TrainConfig) -> None:
    """Raise unless the optimizer's package is installed.

    Raises:
        UserError: with the command that installs it.
    """
    if config.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install bitsandbytes"
        )


def make_optimizer(parameters: Iterable[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings; its learning rate is set before each step.

    Args:
        parameters: what is trained, float32.
        config: names the optimizer.

    Raises:
        UserError: its package is missing.
    """
    check_optimizer(config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        list(parameters), lr=config.learning_rate, weight_decay=0.0, min_8bit_size=_SMALLEST
    )
    return optimizer


def kept_state(optimizer: torch.optim.Optimizer, parameter: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """What a checkpoint keeps of a weight for the optimizer.

    Args:
        optimizer: from `make_optimizer`, after a step.
        parameter: the weight.
        config: names the optimizer.
    """
    state = optimizer.state[parameter]
    found = {key: state[key] for key in _KEPT[config.optimizer] if key in state}
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in found.items()}


def restore_state(
    optimizer: Any, parameter: Tensor, kept: Mapping[str, Tensor], name: str, config: TrainConfig
) -> None:
    """Give the optimizer what a checkpoint kept of a weight; tensors go where and as the weight is.

    Args:
        optimizer: from `make_optimizer`.
        parameter: the weight.
        kept: tensors of the checkpoint, under "KEY.NAME".
        name: of the weight.
        config: names the optimizer.
    """
    found: dict[str, Any] = {key: kept[f"{key}.{name}"] for key in _KEPT[config.optimizer] if f"{key}.{name}" in kept}
    # the count of steps is a number, never sharded
    state = {
        key: value.to(parameter.device) if key == "step" else placed_like(value, parameter)
        for key, value in found.items()
    }
    if config.optimizer == "adamw_8bit":
        state["step"] = int(found["step"])
        if "absmax1" in state:
            if not optimizer.name2qmap:
                optimizer.fill_qmap()
            for table, values in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                state[table] = optimizer.name2qmap[values].to(parameter.device)
    optimizer.state[parameter] = state


def moment_bytes(parameters: Iterable[Tensor], config: TrainConfig) -> int:
    """Bytes of both moments of what is trained.

    Args:
        parameters: what is trained.
        config: names the optimizer.
    """
    total = 0
    for value in parameters:
        count = value.numel()
        if config.optimizer == "adamw" or count < _SMALLEST:
            total += 2 * count * value.element_size()
        else:
            total += 2 * (count + 4 * -(-count // _BLOCK))
    return total
