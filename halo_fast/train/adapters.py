"""What is trained, and how one model serves as policy and as reference."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError, first_line
from halo_fast.families import Denoiser
from halo_fast.families.quantization import is_quantized
from halo_fast.train.config import TrainConfig
from halo_fast.train.model_checks import check_layer_names
from halo_fast.train.parallel import placed_like

__all__ = [
    "ADAPTER",
    "ReferenceMode",
    "adapters_off",
    "check_adapted",
    "reference_switch",
    "started_at",
    "trained_parameters",
]

ADAPTER = "halo"

ReferenceMode = Callable[[], AbstractContextManager[None]]


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
def trained_parameters(family: Denoiser, config: TrainConfig) -> Iterator[dict[str, nn.Parameter]]:
    """What is trained, float32, by name; the model is as before after the block.

    A fresh LoRA on the transformer. At rank 0 the weights themselves: all, or those of `config.target_modules`.

    Raises:
        UserError: a model that has adapters already, targets that are no layers of it, or weights to train that are not
            float32.
    """
    from diffusers.utils import recurse_remove_peft_layers

    model: Any = family.transformer
    if getattr(model, "peft_config", None):
        raise UserError("model: expected one without adapters, got one that has some; fuse or unload them first")
    targets = config.target_modules or (list(family.lora_targets) if config.rank else [])
    _check_targets(model, targets)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        if config.rank:
            _inject_lora(model, targets, config)
            check_layer_names(model, _adapted_layers(model))
        else:
            _require_gradients(model, targets)
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for parameter in parameters.values():
            if not config.rank and parameter.dtype != torch.float32:
                raise UserError(
                    f"train.rank: 0 trains the weights themselves, expected float32, got {parameter.dtype}; load the "
                    "model in float32, and set train.mixed_precision to bf16 to compute in that"
                )
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        recurse_remove_peft_layers(model)
        model.__dict__.pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise if a target matches no layer; peft itself ignores such a target if another one matches."""
    layers = [f".{name}" for name, _ in model.named_modules()]
    for target in targets:
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise UserError(
                f"train.target_modules: no layer of {type(model).__name__} has a name ending with {target!r}"
            )


def _adapted_layers(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _inject_lora(model: nn.Module, targets: list[str], config: TrainConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            inject_adapter_in_model(lora, model, ADAPTER)
        except ValueError as error:
            raise UserError(f"train.target_modules: {_without_lora(model, targets) or first_line(error)}") from error


def _without_lora(model: nn.Module, targets: list[str]) -> str:
    """Which target is a layer that takes no LoRA, in one line: peft's message holds the whole layer."""
    known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, module in model.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in targets)) and not isinstance(module, known):
            inner = next((f"{name}.{part}" for part, layer in module.named_modules() if isinstance(layer, known)), None)
            advice = f"{inner} inside it can be named" if inner else "leave it out"
            return f"LoRA on {name} is not supported, a {type(module).__name__}; expected a linear layer, {advice}"
    return ""


@torch.no_grad()
def check_adapted(forward: Callable[[], Tensor], model: nn.Module, config: TrainConfig) -> None:
    """Raise unless the network runs with what was added to it, as it did before.

    Raises:
        UserError: naming the layers; some networks call layers in a way that peft's do not take.
    """
    try:
        forward()
    except TypeError as error:
        raise UserError(
            f"train.target_modules: {type(model).__name__} cannot run with LoRA on {config.target_modules} "
            f"({first_line(error)}); leave out the layers that it calls by keyword"
        ) from error


def _require_gradients(model: nn.Module, targets: list[str]) -> None:
    for name, value in model.named_parameters():
        layer = "." + name.rpartition(".")[0]
        if is_quantized(model.get_submodule(layer[1:])):
            raise UserError(
                f"train.rank: 0 trains the weights themselves, and {layer[1:]} is quantised; set a rank for a LoRA"
            )
        value.requires_grad_(not targets or layer.endswith(tuple(f".{target}" for target in targets)))


@contextmanager
def reference_switch(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    config: TrainConfig,
    start: Mapping[str, Tensor] | None = None,
) -> Iterator[ReferenceMode]:
    """Gives the context in which the model is the reference; outside of it, the model is the policy at its start.

    The reference is the model without its adapter. At rank 0, and where the reference is the policy's start, it is the
    parameters' first values instead. These wait in the CPU's memory, each process's shards by themselves. They are
    exchanged with the trained values one tensor after another, so the device never holds two sets. After the block the
    parameters are what they were before.

    Args:
        model: the policy.
        parameters: what is trained, whole or sharded.
        config: rank, and which of both the reference is.
        start: the values that the policy starts with; None leaves it as it is.
    """
    with ExitStack() as stack:
        if start is not None and config.reference == "start":
            stack.enter_context(started_at(parameters, start))
            yield stack.enter_context(_exchanged(parameters))
            return
        switch = partial(adapters_off, model) if config.rank else stack.enter_context(_exchanged(parameters))
        if start is not None:
            stack.enter_context(started_at(parameters, start))
        yield switch


@contextmanager
def started_at(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, parameters have other values.

    Args:
        parameters: whole or sharded.
        start: their values inside, by the same names.
    """
    with _put_back(parameters):
        for name, parameter in parameters.items():
            parameter.detach().copy_(placed_like(start[name], parameter))
        yield


@contextmanager
def _exchanged(parameters: Mapping[str, Tensor]) -> Iterator[ReferenceMode]:
    """Gives the context in which parameters have the values that they have now."""
    with _put_back(parameters) as kept:

        def exchange() -> None:
            for value, other in kept:
                trained = value.clone()
                value.copy_(other)
                other.copy_(trained)

        @contextmanager
        def reference_mode() -> Iterator[None]:
            exchange()
            try:
                yield
            finally:
                exchange()

        yield reference_mode


@contextmanager
def _put_back(parameters: Mapping[str, Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gives this process's part of each parameter and a copy in the CPU's memory, which is put back after the block."""
    values = [getattr(value, "_local_tensor", value).detach() for value in parameters.values()]
    kept = [(value, torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value)) for value in values]
    try:
        yield kept
    finally:
        for value, other in kept:
            value.copy_(other)
