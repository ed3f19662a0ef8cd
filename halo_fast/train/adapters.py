"""The adapter and its switch: policy and reference are one set of weights, which is proven at the start."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.config import TrainConfig
from halo_fast.families import Family
from halo_fast.functional import GranDPO, gran_dpo
from halo_fast.runs import UserError
from halo_fast.train.draws import Batch
from halo_fast.train.memory import checkpointing

__all__ = [
    "ADAPTER",
    "adapter",
    "adapters_off",
    "check_first_loss",
    "check_switch",
    "compile_blocks",
    "ready",
    "repeated_blocks",
    "uncompiled",
]

ADAPTER = "halo"
COMPILER = "inductor"


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model inside the block; adapters and their requires_grad flags are restored after it in any case."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    disabled = [layer.disable_adapters for layer in layers]
    # peft's switch also sets requires_grad, on adapters that were frozen too.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def adapter(family: Family, config: TrainConfig) -> Iterator[dict[str, nn.Parameter]]:
    """A fresh LoRA on the transformer, its float32 parameters by name; taken off again at the end, whatever happens."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = family.transformer
    if getattr(model, "peft_config", None):
        raise UserError("model: expected one without adapters, got one that has some; fuse or unload them first")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    targets = config.target_modules or list(family.lora_targets)
    lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=targets)
    try:
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            inject_adapter_in_model(lora, model, ADAPTER)
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        recurse_remove_peft_layers(model)
        model.__dict__.pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def ready(model: Any, config: TrainConfig, device: torch.device) -> Iterator[Any]:
    """The model on the device, in eval mode, with checkpointing, compilation and attention as set; undone at the end.

    Raises:
        UserError: a setting that this model or machine cannot follow.
    """
    home = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.to(device).eval()
        if config.attention_backend:
            _set_attention(model, config.attention_backend)
        if config.gradient_checkpointing != "none":
            _need(model, "enable_gradient_checkpointing", "gradient_checkpointing", "none")
            model.enable_gradient_checkpointing(checkpointing(config.gradient_checkpointing))
        if config.compile:
            compile_blocks(model)
        yield model
    finally:
        for block in repeated_blocks(model):
            block._compiled_call_impl = None
        if config.gradient_checkpointing != "none" and hasattr(model, "disable_gradient_checkpointing"):
            model.disable_gradient_checkpointing()
        if config.attention_backend and hasattr(model, "reset_attention_backend"):
            model.reset_attention_backend()
        for module, training in modes:
            module.training = training
        model.to(home)


def _need(model: Any, method: str, setting: str, off: str) -> None:
    if not hasattr(model, method):
        raise UserError(
            f"train.{setting}: expected a diffusers model, {type(model).__name__} has no {method}; set {off}"
        )


def _set_attention(model: Any, backend: str) -> None:
    _need(model, "set_attention_backend", "attention_backend", "null")
    try:
        model.set_attention_backend(backend)
    except (ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"train.attention_backend: {backend} cannot be used here ({reason}); set null for torch's own attention"
        ) from error


def repeated_blocks(model: Any) -> list[nn.Module]:
    """The blocks that make up most of a diffusers model: what is compiled, each for itself."""
    names = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]


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
def uncompiled(model: Any) -> Iterator[None]:
    """The blocks run as plain Python inside the block."""
    compiled = [(block, block._compiled_call_impl) for block in repeated_blocks(model)]
    try:
        for block, _ in compiled:
            block._compiled_call_impl = None
        yield
    finally:
        for block, implementation in compiled:
            block._compiled_call_impl = implementation


_ADVICE = "this model's adapter cannot serve as its own reference; use it uncompiled and unquantised"


def check_switch(
    family: Family, model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, base: Tensor, *, exact: bool
) -> None:
    """Hold that the adapter acts when it is on and leaves the base model when it is off: exactly, or but for rounding.

    Compiled blocks are other graphs with and without an adapter, so they round differently; what a switch without
    effect leaves is a hundred times larger.
    """
    if not base.isfinite().all():
        raise UserError("train: the base model's prediction on the first pair is not finite; check latents and dtype")
    # A fresh adapter adds nothing, so a switch without effect would go unnoticed: the weights are moved for the check.
    fresh = [parameter.clone() for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.add_(0.01)
    on = family.predict(model, batch.noisy, batch.t, batch.conditions)
    with adapters_off(model):
        off = family.predict(model, batch.noisy, batch.t, batch.conditions)
    for parameter, value in zip(parameters.values(), fresh, strict=True):
        parameter.copy_(value)
    if not (torch.equal(off, base) or (not exact and bool((off - base).norm() < 0.01 * (on - base).norm()))):
        raise UserError(
            f"model: with the adapter off, expected the base, got {(off - base).abs().max()} off; {_ADVICE}"
        )
    if torch.equal(on, base):
        raise UserError(f"model: with the adapter on, expected another output than the base's; {_ADVICE}")


def check_first_loss(
    family: Family, model: nn.Module, batch: Batch, base: Tensor, objective: GranDPO, *, exact: bool
) -> None:
    """Hold that a fresh adapter starts at a preference loss of log 2 per unit weight."""
    policy = family.predict(model, batch.noisy, batch.t, batch.conditions)
    preference = replace(objective, sft_weight=0.0, patch_sft_weight=0.0, anchor_weight=0.0)
    loss = gran_dpo(
        policy, batch.target, base, batch.patch_rewards, batch.video_rewards, objective=preference, layout=family.layout
    ).loss.item()
    # Comparisons with NaN, which is "not labelled", are False: a tie.
    margin = batch.video_rewards.diff().abs() > objective.video_delta
    margins = batch.patch_rewards.diff(dim=0).abs() > objective.patch_delta
    weight = objective.video_weight * bool(margin.any()) + objective.patch_weight * bool(margins.any())
    if not math.isclose(loss, weight * math.log(2), rel_tol=1e-6 if exact else 1e-2, abs_tol=1e-12):
        raise UserError(f"model: expected a first loss of {weight:g} x log 2, got {loss}; {_ADVICE}")
