"""The model as training runs it: on its device, with checkpointing, compiled blocks and attention as set."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from halo_fast.errors import UserError, first_line
from halo_fast.families.base import repeated_blocks
from halo_fast.families.quantization import keep_gradients
from halo_fast.train.block_offload import offloaded_blocks
from halo_fast.train.config import TrainConfig
from halo_fast.train.memory import checkpointing

__all__ = ["compile_blocks", "prepared_model", "without_compile"]

COMPILER = "inductor"


@contextmanager
def prepared_model(model: Any, config: TrainConfig, device: torch.device) -> Iterator[Any]:
    """The model on the device, frozen and in eval mode, as the settings say; all is undone after the block.

    It is frozen because torch chooses some kernels by requires_grad, even without a graph. What the base predicts must
    come from the kernels that the reference will use.

    Raises:
        UserError: a setting that this model or machine cannot follow.
    """
    home = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    moved = ExitStack()
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        model.eval().requires_grad_(False)
        keep_gradients(model)
        if config.offload_blocks:
            moved.enter_context(offloaded_blocks(model, device))
        else:
            model.to(device)
        if config.attention_backend:
            moved.enter_context(_attention(model, config.attention_backend))
        if config.gradient_checkpointing != "none":
            _require_method(model, "enable_gradient_checkpointing", "gradient_checkpointing", "none")
            if not getattr(model, "_supports_gradient_checkpointing", True):
                raise UserError(
                    f"train.gradient_checkpointing: {type(model).__name__} does not support it, got "
                    f"{config.gradient_checkpointing}; set none"
                )
            model.enable_gradient_checkpointing(checkpointing(config.gradient_checkpointing))
        if config.compile:
            compile_blocks(model)
        with _many_graphs() if config.compile else nullcontext():
            yield model
    finally:
        moved.close()
        for block in repeated_blocks(model):
            block._compiled_call_impl = None
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        if getattr(model, "is_gradient_checkpointing", False):
            model.disable_gradient_checkpointing()
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.to(home)


def _many_graphs() -> AbstractContextManager[Any]:
    """Allow a graph for each state of a block: adapter on and off, with and without gradients, several batch sizes.

    By default torch keeps 8 graphs of a function and runs further states uncompiled.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=64)


def _require_method(model: Any, method: str, setting: str, off: str) -> None:
    if not hasattr(model, method):
        raise UserError(
            f"train.{setting}: expected a diffusers model, {type(model).__name__} has no {method}; set {off}"
        )


@contextmanager
def _attention(model: Any, backend: str) -> Iterator[None]:
    """Let the network attend by a backend inside the block.

    diffusers makes it the backend of all networks that have none of their own; that is put back too.
    """
    _require_method(model, "set_attention_backend", "attention_backend", "null")
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    processors: list[Any] = [getattr(module, "processor", None) for module in model.modules()]
    before = [(one, one._attention_backend) for one in processors if hasattr(one, "_attention_backend")]
    active = Registry.get_active_backend()[0]
    try:
        try:
            model.set_attention_backend(backend)
        except (ValueError, ImportError, RuntimeError) as error:
            raise UserError(
                f"train.attention_backend: {backend} cannot be used here ({first_line(error)}); set null for torch's "
                "own attention"
            ) from error
        yield
    finally:
        for processor, own in before:
            processor._attention_backend = own
        Registry.set_active_backend(active)


def compile_blocks(model: Any) -> None:
    """Compile the repeated blocks in place; one graph serves all of them, for each state of the adapter.

    Raises:
        UserError: no blocks are known.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise UserError(f"train.compile: {type(model).__name__} names no repeated blocks to compile; set false")
    for block in blocks:
        block.compile(backend=COMPILER)


@contextmanager
def without_compile(model: Any) -> Iterator[None]:
    """The repeated blocks run as plain Python inside the block."""
    compiled = [(block, block._compiled_call_impl) for block in repeated_blocks(model)]
    try:
        for block, _ in compiled:
            block._compiled_call_impl = None
        yield
    finally:
        for block, implementation in compiled:
            block._compiled_call_impl = implementation
