"""accelerate: the training's own Accelerator, and options of `accelerate launch`, each followed or refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from halo_fast.errors import UserError, first_line
from halo_fast.families.base import repeated_blocks
from halo_fast.families.quantization import is_quantized
from halo_fast.train.config import TrainConfig

__all__ = ["check_launch", "own_accelerator", "uses_fsdp"]


def uses_fsdp() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


# What `accelerate launch` passes on: (values that training follows, what to set instead).
_LAUNCHED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "train.compile"),
    "ACCELERATE_USE_DEEPSPEED": (("false",), "--use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_MEGATRON_LM": (("false",), "--use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "--multi_gpu or --use_fsdp --fsdp_version 2"),
}
# Settings of FSDP1, and how accelerate itself loads and stores, are left out: none of that takes place.
_SHARDED: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "--fsdp_version 2"),
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard", "1"), "--fsdp_reshard_after_forward true"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "--fsdp_offload_params false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "train.gradient_checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "train.offload_activations"),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "TRANSFORMER_BASED_WRAP: blocks are sharded one by one"),
    "FSDP_IGNORED_MODULES": ((), "nothing: every block is sharded"),
}


def check_launch(config: TrainConfig, model: nn.Module) -> None:
    """Raise if an option of `accelerate launch` would be ignored.

    Args:
        config: the settings, which such options must agree with.
        model: whose blocks FSDP2 shards.

    Raises:
        UserError: naming the option and what to set instead.
    """
    launched: dict[str, tuple[tuple[str, ...], str]] = _LAUNCHED | {
        "ACCELERATE_MIXED_PRECISION": (("no", config.mixed_precision), "train.mixed_precision"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            ("1",), "train.gradient_accumulation_steps",
        ),
    }  # fmt: skip
    if uses_fsdp():
        launched |= _SHARDED
        if config.offload_blocks:
            raise UserError(
                "accelerate launch: FSDP2 shards the blocks that train.offload_blocks moves; leave out --use_fsdp, or "
                "set it to false"
            )
        if config.optimizer != "adamw":
            raise UserError(
                f"accelerate launch: FSDP2 does not shard what {config.optimizer} keeps; leave out --use_fsdp, or set "
                "train.optimizer to adamw"
            )
        if any(is_quantized(layer) for layer in model.modules()):
            raise UserError(
                "accelerate launch: FSDP2 does not shard a quantised base; leave out --use_fsdp, or set quantization "
                "to null"
            )
        blocks = {type(block).__name__ for block in repeated_blocks(model)}
        wrapped = {name.strip() for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")} - {""}
        if wrapped and wrapped != blocks:
            raise UserError(
                f"accelerate launch: FSDP_TRANSFORMER_CLS_TO_WRAP is {', '.join(sorted(wrapped))}, but what is sharded "
                f"are the model's blocks, {', '.join(sorted(blocks))}; leave it out"
            )
    for name, (followed, instead) in launched.items():
        value = os.environ.get(name, "")
        if value and value.lower() not in followed:
            raise UserError(f"accelerate launch: {name} is {value}, which training does not follow; set {instead}")


@contextmanager
def own_accelerator(config: TrainConfig, folder: Path | None) -> Iterator[Any]:
    """accelerate's Accelerator for one training; accelerate's global state is as before after the block.

    accelerate keeps one state for the whole process and refuses a second precision. So the training gets a fresh one,
    and an Accelerator of the caller finds its own again.

    Args:
        config: gives precision and trackers.
        folder: where trackers write; None for nowhere.

    Raises:
        UserError: the precision is not available.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # A process group outlives the training, and so does what accelerate knows of it.
    owners = [AcceleratorState, GradientState, *([] if dist.is_initialized() else [PartialState])]
    shared: list[dict[str, Any]] = [owner._shared_state for owner in owners]
    before, environment = [dict(state) for state in shared], dict(os.environ)
    try:
        for state in shared:
            state.clear()
        try:
            accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),
                mixed_precision=config.mixed_precision,
                log_with=config.report_to or None,
                # tensorboard wants a folder at once, though a dry run writes nothing there
                project_dir=folder or Path(),
            )
        except ValueError as error:
            raise UserError(
                f"train.mixed_precision: {config.mixed_precision} is not available here ({first_line(error)}); set no"
            ) from error
        yield accelerator
    finally:
        grouped = dist.is_initialized()
        for owner, state, values in zip(owners, shared, before, strict=True):
            if owner is PartialState and grouped:
                continue
            state.clear()
            state.update(values)
        for name in set(os.environ) - set(environment):
            if name.startswith("ACCELERATE_"):
                del os.environ[name]
