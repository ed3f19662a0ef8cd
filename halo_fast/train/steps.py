"""One optimiser step."""

import math

import torch
from torch import Tensor

from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, draws, generator, make_batch
from halo_fast.train.job import Job, compares
from halo_fast.train.parallel import any_process, dealt, divide_gradients, full
from halo_fast.train.schedules import Passed, batched, margin_first

__all__ = ["learning_rate", "run_batch", "take_step"]


def take_step(job: Job, step: int) -> tuple[list[tuple[Batch, Passed]], Tensor]:
    """One optimiser step: this process's batches with what their passes left, and the gradient's norm."""
    config, accelerator = job.config, job.accelerator
    device, limit = accelerator.device, config.reference_draws or None
    world, rank = accelerator.num_processes, accelerator.process_index
    size = config.train_batch_size * config.gradient_accumulation_steps * world
    places = draws(step, size, len(job.pairs), config.seed, limit)
    passes = []
    for number, dealt_places in enumerate(dealt(places, config.train_batch_size, rank, world)):
        batch = make_batch(job.family, job.pairs, dealt_places, config.seed, device, limit=limit, errors=job.errors)
        passes.append((batch, run_batch(job, batch, (step, number, 0 if job.sharded else rank))))
    pairs = torch.stack([passed.out.num_pairs for _, passed in passes]).sum()
    divide_gradients(list(job.parameters.values()), pairs, job.sharded)
    norm = full(torch.nn.utils.clip_grad_norm_(job.parameters.values(), config.max_grad_norm))
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.auto_beta is not None:
        job.auto_beta.update(torch.cat([passed.out.video_logits for _, passed in passes]))
    return passes, norm


def run_batch(job: Job, batch: Batch, counter: tuple[int, ...] = ()) -> Passed:
    """Forward and backward of one batch by the plan's schedule; gradients are added up."""
    family, model, accelerator = job.family, job.model, job.accelerator

    def policy(part: Batch) -> Tensor:
        with accelerator.autocast(), job.plan.activations():
            return family.predict(model, part.noisy, part.t, part.conditions)

    def reference(part: Batch) -> Tensor:
        with accelerator.autocast(), job.reference():
            return family.predict(model, part.noisy, part.t, part.conditions)

    objective = job.steered()
    in_loop = reference if job.errors is None and compares(objective) else None
    arguments = policy, in_loop, batch, objective, family.layout, accelerator.backward
    if job.plan.schedule == "batched":
        return batched(*arguments)
    return margin_first(
        *arguments,
        skip_below=job.config.skip_below,
        lottery=lambda count: torch.rand(count, generator=generator(job.config.seed, "lottery", *counter)),
        # Sharded models run the same passes on every process.
        agree=(lambda kept: any_process(kept, accelerator.device)) if job.sharded else (lambda kept: kept),
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant, linear or cosine to 0 at the end."""
    if step < config.lr_warmup_steps or config.lr_scheduler == "constant":
        return config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    part = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return config.learning_rate * (1 - part if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * part)) / 2)
