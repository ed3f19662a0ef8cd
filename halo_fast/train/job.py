"""A training made ready to run: model, what is trained, reference errors and plan, with every proof of the start."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import Family, family_of
from halo_fast.loss.functional import GranDPO
from halo_fast.loss.objectives import AutoBeta
from halo_fast.settings import check_numbers
from halo_fast.train.adapters import Switch, check_start, ready, repeated_blocks, switched, trainable
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, check_pairs, make_batch
from halo_fast.train.parallel import same_everywhere, shard
from halo_fast.train.planner import Plan, make_plan
from halo_fast.train.references import check_reference_errors, reference_errors
from halo_fast.train.trackers import check_trackers

__all__ = ["Job", "Progress", "compares", "prepared"]

Progress = Callable[[Iterable[int], int, str], Iterable[int]]


@dataclass
class Job:
    """A training that is ready to run: what every step uses.

    Args:
        model: the policy; inside `with reference()`, the reference.
        parameters: what is trained, by name.
        errors: the reference's, [pairs, draws, 2, f, h, w]; None where it runs in the loop or nothing is compared.
    """

    family: Family
    model: nn.Module
    reference: Switch
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    accelerator: Any
    config: TrainConfig
    objective: GranDPO
    pairs: Sequence[Pair]
    errors: Tensor | None
    plan: Plan
    auto_beta: AutoBeta | None
    sharded: bool

    def steered(self) -> GranDPO:
        """The objective with the betas that are in use."""
        if self.auto_beta is None:
            return self.objective
        ratio = self.auto_beta.beta / self.objective.video_beta
        patch_beta = None if self.objective.patch_beta is None else self.objective.patch_beta * ratio
        return replace(self.objective, video_beta=self.auto_beta.beta, patch_beta=patch_beta)


@contextmanager
def prepared(
    pipeline: Any,
    pairs: Sequence[Pair],
    config: TrainConfig,
    *,
    folder: Path | None,
    references: Path | None,
    progress: Progress,
) -> Iterator[Job]:
    """Model, what is trained, reference errors and plan, with every proof of the start; all is undone at the end."""
    from accelerate import Accelerator

    family = family_of(pipeline)
    check_pairs(family, pairs)
    objective = _checked(config)
    check_trackers(config.report_to)
    _check_launch(config, family.transformer)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=config.report_to or None,
            # tensorboard asks for a place at once, though a dry run writes nothing there
            project_dir=folder or Path(),
        )
    except ValueError as error:
        raise UserError(f"train.mixed_precision: {config.mixed_precision} cannot be had here: {error}") from error
    device, draws_limit = accelerator.device, config.reference_draws or None
    if not accelerator.is_main_process:
        progress = _silent
    with ExitStack() as stack:
        model: nn.Module = stack.enter_context(ready(family.transformer, config, device))

        def predict(batch: Batch) -> Tensor:
            # A context each: until it ends, autocast keeps copies of weights, which the checks move.
            with accelerator.autocast(), torch.no_grad():
                return family.predict(model, batch.noisy, batch.t, batch.conditions)

        errors = None
        if draws_limit and compares(objective):
            errors = reference_errors(
                family, model, pairs, config.seed, draws_limit, device=device,
                batch_size=config.train_batch_size, autocast=accelerator.autocast,
                precision=f"{config.mixed_precision} {next(model.parameters()).dtype}", folder=references,
                progress=progress, share=(accelerator.process_index, accelerator.num_processes),
                wait=accelerator.wait_for_everyone,
            )  # fmt: skip
        first = make_batch(family, pairs, [(0, 0)], config.seed, device, limit=draws_limit, errors=errors)
        base = predict(first)
        check_reference_errors(first, base, family.layout)
        parameters: dict[str, Tensor] = dict(stack.enter_context(trainable(family, config)))
        same_everywhere(parameters.values())
        sharded = accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        plan = make_plan(family, model, parameters, first, objective, config, accelerator, sharded=sharded)
        if sharded:
            shard(model, device)
            parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        reference = stack.enter_context(switched(model, parameters, config))
        precision = torch.bfloat16 if config.mixed_precision == "bf16" else base.dtype
        # Compiled blocks are other graphs with and without an adapter, so each of them rounds in its own way.
        rounding = (1000 if config.compile else 32) * torch.finfo(precision).eps
        check_start(predict, reference, parameters, family.layout, first, base, objective, rounding)
        job = Job(
            family, model, reference, parameters, _optimizer(parameters, config), accelerator, config, objective, pairs,
            errors=errors,
            plan=plan,
            auto_beta=_auto_beta(config, device),
            sharded=sharded,
        )  # fmt: skip
        yield job


def _silent(iterable: Iterable[int], total: int, label: str) -> Iterable[int]:
    return iterable


def compares(objective: GranDPO) -> bool:
    return bool(objective.video_weight or objective.patch_weight or objective.anchor_weight)


def _checked(config: TrainConfig) -> GranDPO:
    """The objective of settings that have a meaning; those made in Python have passed no parser."""
    for place, settings in (("train", config), ("train.objective", config.objective)):
        for name, hint in get_type_hints(type(settings)).items():
            parts = (hint, *get_args(hint))
            choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
            value = getattr(settings, name)
            if choices and value not in choices and not (value is None and type(None) in parts):
                raise UserError(f"{place}.{name}: expected one of {', '.join(choices)}, got {value!r}")
    if not config.learning_rate > 0:
        raise UserError(f"train.learning_rate: expected more than 0, got {config.learning_rate}")
    if not config.max_grad_norm > 0:
        raise UserError(f"train.max_grad_norm: expected more than 0, got {config.max_grad_norm}; .inf clips nothing")
    counts = {name for name, hint in get_type_hints(TrainConfig).items() if int in (hint, *get_args(hint))}
    try:
        check_numbers({name: value for name, value in asdict(config).items() if name in counts}, "train.")
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        objective = GranDPO(**asdict(config.objective))
    except ValueError as error:
        raise UserError(f"train.objective: {error}") from error
    _auto_beta(config, torch.device("cpu"))
    _check_combinations(config)
    return objective


def _auto_beta(config: TrainConfig, device: torch.device) -> AutoBeta | None:
    if config.auto_beta is None:
        return None
    try:
        return AutoBeta(config.objective.video_beta, config.auto_beta, device=device)
    except ValueError as error:
        raise UserError(f"train.auto_beta: {error}") from error


# What `accelerate launch` was told, as it hands it on: (values that are followed, what to set instead).
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


def _check_launch(config: TrainConfig, model: nn.Module) -> None:
    """Hold that nothing which `accelerate launch` was told would be ignored."""
    launched: dict[str, tuple[tuple[str, ...], str]] = _LAUNCHED | {
        "ACCELERATE_MIXED_PRECISION": (("no", config.mixed_precision), "train.mixed_precision"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            ("1", str(config.gradient_accumulation_steps)), "train.gradient_accumulation_steps",
        ),
    }  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        launched |= _SHARDED
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


def _check_combinations(config: TrainConfig) -> None:
    objective = config.objective
    if objective.anchor_weight and config.reference_draws:
        raise UserError(
            "train.objective.anchor_weight: needs the reference in the loop; set train.reference_draws to null"
        )
    if objective.anchor_weight and config.schedule == "margin_first":
        raise UserError("train.objective.anchor_weight: needs both samples in one batch; set train.schedule to batched")
    if config.skip_below and config.schedule != "margin_first":
        raise UserError("train.skip_below: works with train.schedule margin_first alone; set that or leave it at 0")
    if config.auto_beta and not objective.video_weight:
        raise UserError("train.auto_beta: steers by the videos' logits, got train.objective.video_weight 0; set null")


def _optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0, fused=True)
