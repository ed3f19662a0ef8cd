"""Checks of the network that is trained: that it is the plain module, and that training can follow its weights."""

from typing import Any

import torch
from torch import nn

from halo_fast.errors import UserError
from halo_fast.families.base import unwrapped

__all__ = ["check_layer_names", "check_network"]

# Names that wrappers inside a network give to what they hold: compiled regions, FSDP1, torch's checkpoint wrapper.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def check_network(model: nn.Module) -> None:
    """Raise unless the network is plain and its weights can be trained on.

    Raises:
        UserError: a wrapper or a hook in it, float16 weights, or weights made in inference mode; the message names the
            layer and the cure.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("train: expected to run outside torch.inference_mode, which allows no gradients; leave it")
    if unwrapped(model) is not model:
        raise UserError(f"model: expected the network itself, got {type(model).__name__}; pass what it wraps")
    for name, module in model.named_modules():
        place = f"layer {name} of {type(model).__name__}" if name else type(model).__name__
        if name.rpartition(".")[2] in _WRAPPED or unwrapped(module) is not module:
            raise UserError(
                f"model: {place} is wrapped, so a LoRA would get names that no pipeline knows; "
                "pass the model unwrapped (train.compile compiles its blocks)"
            )
        if "_hf_hook" in vars(module):
            raise UserError(
                f"model: {place} has a hook of accelerate, which moves weights; call pipeline.remove_all_hooks() or "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        if "_original_forward" in vars(module):
            raise UserError(
                f"model: {place} was prepared by accelerate; pass "
                "accelerator.unwrap_model(model, keep_fp32_wrapper=False), training sets up precision itself"
            )
    _check_weights(model)


def _check_weights(model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_inference():
            raise UserError(
                f"model: {name} was made inside torch.inference_mode, which allows no gradients; load the model outside"
            )
        if value.dtype == torch.float16:
            raise UserError(
                f"model: {name} is float16, in which small gradients vanish without loss scaling; load the model with "
                "torch_dtype torch.bfloat16 or torch.float32"
            )


def check_layer_names(model: Any, names: list[str]) -> None:
    """Raise unless layers exist in a model that diffusers makes from this one's configuration.

    So a trained LoRA loads wherever the class does. Models of other libraries are not checked.

    Args:
        model: the network.
        names: of its layers.

    Raises:
        UserError: naming the layer.
    """
    from accelerate import init_empty_weights
    from diffusers import ModelMixin

    if not isinstance(model, ModelMixin):
        return
    with init_empty_weights():
        known = {name for name, _ in type(model).from_config(model.config).named_modules()}
    for name in names:
        if name not in known:
            raise UserError(
                f"train.target_modules: {name} is no layer of a plain {type(model).__name__}, so no pipeline could "
                "load its LoRA; undo what changed the model, or leave this layer out"
            )
