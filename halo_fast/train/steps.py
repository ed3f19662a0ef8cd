"""One optimiser step."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from halo_fast.loss.figures import PairFigures
from halo_fast.loss.objectives import PairObjective
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, weights_at
from halo_fast.train.job import Job
from halo_fast.train.parallel import average_gradients, gather_shards
from halo_fast.train.schedules import batched, margin_first, uses_reference

__all__ = ["learning_rate", "run_batch", "take_step"]


def take_step(job: Job, step: int) -> tuple[list[PairFigures], Tensor]:
    """One optimiser step.

    Args:
        job: what is trained; its weights, optimiser and beta move.
        step: from 0; decides pairs, noise, times and learning rate.

    Returns:
        The statistics of each of this process's batches, and the 0-d gradient norm before clipping.
    """
    config = job.config
    figures = [run_batch(job, batch) for batch in job.batches(step)]
    at_reference = step == 0 and not job.begins_apart
    if at_reference and isinstance(job.objective, PairObjective) and uses_reference(job.objective):
        figures = [_at_the_start(one) for one in figures]
    pairs = torch.stack([one.num_pairs for one in figures]).sum()
    average_gradients(list(job.parameters.values()), pairs, job.sharded)
    norm = gather_shards(torch.nn.utils.clip_grad_norm_(job.parameters.values(), config.max_grad_norm))
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.auto_beta is not None:
        logits = torch.cat([one.video_logits for one in figures])
        job.auto_beta.update(logits, torch.cat([one.video_weights() for one in figures]))
    return figures, norm


def _at_the_start(figures: PairFigures) -> PairFigures:
    """Figures of the first step: the policy is the reference, and what is left of the logits is rounding."""
    return replace(
        figures,
        video_logits=torch.zeros_like(figures.video_logits),
        patch_logits=torch.zeros_like(figures.patch_logits),
    )


def run_batch(job: Job, batch: Batch) -> PairFigures:
    """Forward and backward of one batch by the plan's schedule; gradients are added up."""
    family, model, accelerator = job.family, job.model, job.accelerator

    def policy(part: Batch) -> Tensor:
        with accelerator.autocast(), job.plan.activations():
            return family.predict(model, part.noisy, part.t, part.conditions)

    def reference(part: Batch) -> Tensor:
        with accelerator.autocast(), job.reference_mode():
            return family.predict(model, part.noisy, part.t, part.conditions)

    if job.config.time_weights:
        batch = replace(batch, pair_weight=weights_at(batch.t[: len(batch.t) // 2], job.config.time_weights))
    objective = job.current_objective()
    in_loop = reference if job.reference_errors is None and uses_reference(objective) else None
    schedule = batched if job.plan.schedule == "batched" else margin_first
    return schedule(policy, in_loop, batch, objective, family.layout, accelerator.backward)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant, linear or cosine to 0 at the end.

    A function of the step alone, so a checkpoint keeps nothing of it.
    """
    if step < config.lr_warmup_steps or config.lr_scheduler == "constant":
        return config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    part = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return config.learning_rate * (1 - part if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * part)) / 2)
