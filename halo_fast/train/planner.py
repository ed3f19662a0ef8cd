"""The schedule of a training, its predicted memory, and proof that checkpointing is on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families import Denoiser
from halo_fast.families.base import repeated_blocks
from halo_fast.families.quantization import stored_bytes
from halo_fast.loss.objectives import Objective
from halo_fast.train.block_offload import waiting_bytes
from halo_fast.train.config import TrainConfig
from halo_fast.train.devices import USABLE, size_text
from halo_fast.train.draws import Batch
from halo_fast.train.memory import count_recomputed, kept_bytes, offloaded
from halo_fast.train.model import without_compile
from halo_fast.train.optimizers import moment_bytes
from halo_fast.train.parallel import any_process

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """How steps are taken.

    Args:
        schedule: "batched" or "margin_first".
        activations: the context of a forward pass with a graph.
        peaks: predicted bytes of weights, gradients, optimizer and activations, of either schedule.
        text: lines for the user.
    """

    schedule: str
    activations: Callable[[], AbstractContextManager[Any]]
    peaks: Mapping[str, int]
    text: str

    @property
    def peak(self) -> int:
        """Predicted bytes of the plan's own schedule."""
        return self.peaks[self.schedule]

    def scheduled(self, schedule: str) -> "Plan":
        """The plan with another schedule."""
        return replace(self, schedule=schedule)


@dataclass(frozen=True)
class _Activations:
    """Bytes that one sample's forward pass keeps for its backward pass.

    Args:
        kept: in all, with the checkpointing of the settings.
        whole: in all, without checkpointing.
        largest: of the largest tensor, without checkpointing.
        text: what checkpointing recomputes, for the user.
    """

    kept: int
    whole: int
    largest: int
    text: str


def make_plan(
    family: Denoiser,
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Batch,
    objective: Objective,
    config: TrainConfig,
    accelerator: Any,
    *,
    sharded: bool = False,
) -> Plan:
    """Measure one sample's activations and choose; `config.schedule` other than "auto" is taken as it is.

    Batched if its activations fit into the free memory of every process, else margin-first.

    Args:
        family: of the model.
        model: with what is trained on it.
        parameters: what is trained.
        batch: any pair; its first sample is run.
        objective: the loss; one with an anchor is always batched.
        config: the settings.
        accelerator: accelerate's.
        sharded: whether weights and what is trained will be sharded over the processes.

    Raises:
        UserError: activation checkpointing that recomputes nothing, or cannot keep attention's outputs.
    """
    sample = batch.select(slice(0, 1))

    def forward() -> Tensor:
        with accelerator.autocast():
            return family.predict(model, sample.noisy, sample.t, sample.conditions)

    activations = _measure(forward, model, parameters, config)
    parts = accelerator.num_processes if sharded else 1
    weights = stored_bytes(model) // parts
    travelling = ", those of blocks one block at a time" if config.offload_blocks else ""
    if config.offload_blocks:
        waiting, block = waiting_bytes(model, lambda value: value.numel() * value.element_size())
        weights -= waiting - block
    gradients = sum(value.numel() * value.element_size() for value in parameters.values())
    training = (gradients + moment_bytes(parameters.values(), config.optimizer)) // parts
    need = _needed_bytes(activations, len(repeated_blocks(model)), training, config)
    free = _free_memory(accelerator.device)
    schedule = config.schedule
    if schedule == "auto":
        tight = any_process(torch.tensor([need["batched"] > USABLE * free]), accelerator.device)
        # The anchor's gradient is no function of patch errors.
        schedule = "margin_first" if bool(tight) and not objective.anchor_weight else "batched"
    precision = config.mixed_precision if config.mixed_precision != "no" else sample.noisy.dtype
    trained = sum(value.numel() for value in parameters.values())
    lines = [
        f"plan: {schedule}, {trained:,} weights trained, {accelerator.num_processes} x {_settings(config)}, "
        f"precision {precision}",
        f"activations: {size_text(activations.kept)} a sample, {config.gradient_checkpointing} checkpointing"
        f"{activations.text}" + (", kept in the CPU's memory" if config.offload_activations else ""),
        f"memory: weights {size_text(weights)}{travelling}, gradients and moments {size_text(training)}, activations "
        f"{size_text(need[schedule] - training)}; predicted peak {size_text(weights + need[schedule])}, "
        f"free now {size_text(free)}",
    ]
    if need[schedule] > USABLE * free:
        lines.append(f"memory: this may not fit; {_advice(config, schedule)}")
    context = (lambda: offloaded(model)) if config.offload_activations else nullcontext
    return Plan(schedule, context, {name: weights + size for name, size in need.items()}, "\n".join(lines))


def _settings(config: TrainConfig) -> str:
    reference = f"errors of {config.reference_draws} draws" if config.reference_draws else "in the loop, where used"
    return (
        f"{config.gradient_accumulation_steps} x {config.train_batch_size} pairs a step (processes x accumulation x "
        f"batch), reference: {reference}, compile {'on' if config.compile else 'off'}"
    )


def _measure(
    forward: Callable[[], Tensor], model: nn.Module, parameters: Mapping[str, Tensor], config: TrainConfig
) -> _Activations:
    """Measure a sample's activations, with and without checkpointing, on uncompiled blocks."""
    mode = config.gradient_checkpointing
    with without_compile(model):
        kept, largest = kept_bytes(forward, model, selective=mode == "selective")
        if mode == "none":
            return _Activations(kept, kept, largest, "")
        text = _prove_checkpointing(forward, parameters, mode)
        with _without_checkpointing(model):
            whole, largest = kept_bytes(forward, model, selective=False)
    return _Activations(kept, whole, largest, text)


def _needed_bytes(activations: _Activations, blocks: int, training: int, config: TrainConfig) -> dict[str, int]:
    """Bytes of gradients, moments and activations by schedule."""
    moving = config.gradient_checkpointing != "none" or config.offload_activations
    # A block's activations exist in full while it is recomputed, or while they travel.
    block = activations.whole // max(1, blocks) if moving else 0
    held = 0 if config.offload_activations else activations.kept
    samples = {"batched": 2 * config.train_batch_size, "margin_first": 1}
    # At the largest activation the backward pass has the gradients of what went in and of what came out.
    each = held + block + 2 * activations.largest
    return {name: training + count * each for name, count in samples.items()}


def _prove_checkpointing(forward: Callable[[], Tensor], parameters: Mapping[str, Tensor], mode: str) -> str:
    """What the backward pass recomputes, for the user; UserError if that is not what the mode says."""
    linears, attentions, all_attentions = count_recomputed(forward)
    for parameter in parameters.values():
        parameter.grad = None
    if not linears:
        raise UserError(
            f"train.gradient_checkpointing: expected {mode} to recompute layers in the backward pass, but this model "
            "recomputes nothing; set none"
        )
    if mode == "selective" and (attentions or not all_attentions):
        raise UserError(
            f"train.gradient_checkpointing: selective keeps no attention output here ({all_attentions} attention "
            f"operators known, {attentions} recomputed); set full"
        )
    return f" ({attentions} of {all_attentions} attentions recomputed)"


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    return psutil.virtual_memory().available


def _advice(config: TrainConfig, schedule: str) -> str:
    if schedule == "batched":
        return "set train.schedule: margin_first or a smaller train_batch_size"
    if config.gradient_checkpointing == "none":
        return "set train.gradient_checkpointing: selective"
    return "set train.gradient_checkpointing: full, offload_activations, or fewer frames"
