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

__all__ = ["ADAPTER", "adapter", "adapters_off", "check_first_loss", "check_switch", "prepared", "ready"]

ADAPTER = "halo"


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
    """The model on the device, in eval mode and with activation checkpointing if asked for; all put back at the end."""
    home = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.to(device).eval()
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        yield model
    finally:
        if config.gradient_checkpointing:
            model.disable_gradient_checkpointing()
        for module, training in modes:
            module.training = training
        model.to(home)


@contextmanager
def prepared(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, Any]]:
    """Model and optimizer as accelerate runs them; the model's own forward is put back at the end."""
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)


_ADVICE = "this model's adapter cannot serve as its own reference; use it uncompiled and unquantised"


def check_switch(
    family: Family, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, base: Tensor
) -> None:
    """Hold that the adapter acts when it is on and leaves exactly the base model when it is off."""
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
    if not torch.equal(off, base):
        raise UserError(
            f"model: with the adapter off, expected the base, got {(off - base).abs().max()} off; {_ADVICE}"
        )
    if torch.equal(on, base):
        raise UserError(f"model: with the adapter on, expected another output than the base's; {_ADVICE}")


def check_first_loss(family: Family, model: nn.Module, batch: Batch, base: Tensor, objective: GranDPO) -> None:
    """Hold that a fresh adapter starts at a preference loss of log 2 per unit weight."""
    policy = family.predict(model, batch.noisy, batch.t, batch.conditions)
    preference = replace(objective, sft_weight=0.0, patch_sft_weight=0.0)
    loss = gran_dpo(
        policy, batch.target, base, batch.patch_rewards, batch.video_rewards, objective=preference, layout=family.layout
    ).loss.item()
    # Comparisons with NaN, which is "not labelled", are False: a tie.
    margin = batch.video_rewards.diff().abs() > objective.video_delta
    margins = batch.patch_rewards.diff(dim=0).abs() > objective.patch_delta
    weight = objective.video_weight * bool(margin.any()) + objective.patch_weight * bool(margins.any())
    if not math.isclose(loss, weight * math.log(2), rel_tol=1e-6, abs_tol=1e-12):
        raise UserError(f"model: expected a first loss of {weight:g} x log 2, got {loss}; {_ADVICE}")
