"""A training made ready to run: model, what is trained, reference errors and plan, with every proof of the start."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.config import TrainConfig
from halo_fast.data import Pair
from halo_fast.families import Family, family_of
from halo_fast.functional import GranDPO
from halo_fast.objectives import AutoBeta
from halo_fast.runs import UserError
from halo_fast.train.adapters import Switch, check_first_loss, check_switch, ready, switched, trainable
from halo_fast.train.draws import Batch, check_pairs, make_batch
from halo_fast.train.parallel import same_everywhere, shard
from halo_fast.train.planner import Plan, make_plan
from halo_fast.train.references import check_reference_errors, reference_errors

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
    objective = GranDPO(**asdict(config.objective))
    _check_settings(config)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.report_to or None,
        project_dir=folder,
    )
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
        check_switch(predict, reference, parameters, first, base, exact=not config.compile)
        check_first_loss(predict, family.layout, first, base, objective, exact=not config.compile)
        job = Job(
            family, model, reference, parameters, _optimizer(parameters, config), accelerator, config, objective, pairs,
            errors=errors,
            plan=plan,
            auto_beta=None
            if config.auto_beta is None
            else AutoBeta(config.objective.video_beta, config.auto_beta, device=device),
            sharded=sharded,
        )  # fmt: skip
        yield job


def _silent(iterable: Iterable[int], total: int, label: str) -> Iterable[int]:
    return iterable


def compares(objective: GranDPO) -> bool:
    return bool(objective.video_weight or objective.patch_weight or objective.anchor_weight)


def _check_settings(config: TrainConfig) -> None:
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
