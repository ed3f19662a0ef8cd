"""What is trained, and the switch from policy to reference within one model, which is proven at the start."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families import Family
from halo_fast.loss.functional import GranDPO, gran_dpo
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch
from halo_fast.train.memory import checkpointing

__all__ = [
    "ADAPTER",
    "Predict",
    "Switch",
    "adapters_off",
    "check_start",
    "compile_blocks",
    "ready",
    "repeated_blocks",
    "switched",
    "trainable",
    "uncompiled",
]

ADAPTER = "halo"
COMPILER = "inductor"

Switch = Callable[[], AbstractContextManager[None]]
Predict = Callable[[Batch], Tensor]


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
def trainable(family: Family, config: TrainConfig) -> Iterator[dict[str, nn.Parameter]]:
    """What is trained, float32, by name: a fresh LoRA on the transformer, taken off again at the end whatever happens.

    At rank 0 the weights themselves: all, or those of `config.target_modules`.

    Raises:
        UserError: a model that has adapters already, targets that are no layers of it, or weights to train that are not
            float32.
    """
    from diffusers.utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = family.transformer
    if getattr(model, "peft_config", None):
        raise UserError("model: expected one without adapters, got one that has some; fuse or unload them first")
    targets = config.target_modules or (list(family.lora_targets) if config.rank else [])
    layers = [f".{name}" for name, _ in model.named_modules()]
    for target in targets:
        # peft is silent about a name without a layer where another one has some.
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise UserError(
                f"train.target_modules: no layer of {type(model).__name__} has a name ending with {target!r}"
            )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        if config.rank:
            lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=targets)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                try:
                    inject_adapter_in_model(lora, model, ADAPTER)
                except ValueError as error:
                    raise UserError(f"train.target_modules: {error}") from error
        else:
            for name, value in model.named_parameters():
                layer = "." + name.rpartition(".")[0]
                value.requires_grad_(not targets or layer.endswith(tuple(f".{target}" for target in targets)))
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


@contextmanager
def switched(model: nn.Module, parameters: Mapping[str, Tensor], config: TrainConfig) -> Iterator[Switch]:
    """The context in which the model is its own reference: the adapter off, or its first weights in their old place.

    At rank 0 those wait in the CPU's memory, each process's shards by themselves, and change places with the trained
    weights one after another, so the device never holds two sets; at the end they are back for good.
    """
    if config.rank:
        yield partial(adapters_off, model)
        return
    values = [getattr(value, "_local_tensor", value).detach() for value in parameters.values()]
    first = [torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value) for value in values]

    def exchange() -> None:
        for value, other in zip(values, first, strict=True):
            mine = value.clone()
            value.copy_(other)
            other.copy_(mine)

    @contextmanager
    def exchanged() -> Iterator[None]:
        exchange()
        try:
            yield
        finally:
            exchange()

    try:
        yield exchanged
    finally:
        for value, other in zip(values, first, strict=True):
            value.copy_(other)


@contextmanager
def ready(model: Any, config: TrainConfig, device: torch.device) -> Iterator[Any]:
    """The model on the device, in eval mode, with checkpointing, compilation and attention as set; undone at the end.

    Its weights are frozen: what the base predicts must come from the kernels that the reference will use, and torch
    chooses some by requires_grad, even without a graph.

    Raises:
        UserError: a setting that this model or machine cannot follow.
    """
    home = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.to(device).eval().requires_grad_(False)
        if config.attention_backend:
            _set_attention(model, config.attention_backend)
        if config.gradient_checkpointing != "none":
            _need(model, "enable_gradient_checkpointing", "gradient_checkpointing", "none")
            model.enable_gradient_checkpointing(checkpointing(config.gradient_checkpointing))
        if config.compile:
            compile_blocks(model)
        with _many_graphs() if config.compile else nullcontext():
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
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.to(home)


def _many_graphs() -> AbstractContextManager[Any]:
    """Room for all states of a block: adapter on and off, with and without gradients, batches of several sizes.

    torch keeps 8 graphs of a function, and runs further states uncompiled with no more than a line in the log.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=64)


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
    names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
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


_ADVICE = "this model cannot serve as its own reference; use it uncompiled and unquantised"


@torch.no_grad()
def check_start(
    predict: Predict,
    switch: Switch,
    parameters: Mapping[str, Tensor],
    layout: str,
    batch: Batch,
    base: Tensor,
    objective: GranDPO,
    rounding: float,
) -> None:
    """Hold that policy and reference are the base, that moved weights change the policy alone, and a loss of log 2.

    Equal means to the bit, or but for rounding: torch may choose other kernels by memory layout, flags or graph, which
    add up in another order. A difference may be at most `rounding` times the prediction's norm, and at most 1% of what
    moving the weights does, which holds where `rounding` is coarse.

    Args:
        predict: of a batch, by the model as it is.
        switch: the context of the reference.
        parameters: what is trained, as training finds it: a fresh adapter, or the base's own weights.
        batch: one pair.
        base: its prediction before anything was done to the model.
        objective: whose preference terms start at log 2 per unit weight.
        rounding: what it may do, as a share of the prediction's norm.

    Raises:
        UserError: what does not hold.
    """
    if not base.isfinite().all():
        raise UserError("train: the base model's prediction on the first pair is not finite; check latents and dtype")
    start = predict(batch)
    # A fresh adapter adds nothing, so a switch without effect would go unnoticed: the weights are moved for the check.
    fresh = [parameter.clone() for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.add_(0.01)
    moved = predict(batch)
    with switch():
        off = predict(batch)
    for parameter, value in zip(parameters.values(), fresh, strict=True):
        parameter.copy_(value)
    if torch.equal(moved, base):
        raise UserError(f"model: with its weights moved, expected another output than the base's; {_ADVICE}")
    base_norm, effect = base.float().norm(), (moved - base).float().norm()
    allowed = torch.minimum(0.01 * effect, rounding * base_norm)
    for state, output in (("switched to the reference", off), ("before the first step", start)):
        if not torch.equal(output, base) and not (output - base).float().norm() <= allowed:
            raise UserError(f"model: {state}, expected the base, got {(output - base).abs().max()} off; {_ADVICE}")
    _check_first_loss(start, layout, batch, base, objective)


def _check_first_loss(start: Tensor, layout: str, batch: Batch, base: Tensor, objective: GranDPO) -> None:
    preference = replace(objective, sft_weight=0.0, patch_sft_weight=0.0, anchor_weight=0.0)
    loss = gran_dpo(
        start, batch.target, base, batch.patch_rewards, batch.video_rewards, objective=preference, layout=layout
    ).loss.item()
    # Comparisons with NaN, which is "not labelled", are False: a tie.
    margin = batch.video_rewards.diff().abs() > objective.video_delta
    margins = batch.patch_rewards.diff(dim=0).abs() > objective.patch_delta
    weight = objective.video_weight * bool(margin.any()) + objective.patch_weight * bool(margins.any())
    tolerance = 1e-6 if torch.equal(start, base) else 1e-2
    if not math.isclose(loss, weight * math.log(2), rel_tol=tolerance, abs_tol=1e-12):
        raise UserError(f"model: expected a first loss of {weight:g} x log 2, got {loss}; {_ADVICE}")
