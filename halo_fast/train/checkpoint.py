"""Checkpoints: one file with all that a training needs to go on as if it had never stopped."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.errors import UserError, first_line
from halo_fast.files import hash_tensors, read_checkpoint, write_checkpoint
from halo_fast.train.config import CHANGEABLE, TrainConfig, deciding_settings
from halo_fast.train.job import Job
from halo_fast.train.observers.base import Observer
from halo_fast.train.optimizers import kept_state, restore_state
from halo_fast.train.parallel import gather_shards, placed_like

__all__ = ["prune_checkpoints", "resume", "save_checkpoint"]

_FOLDER, _NAME = "checkpoints", "step_{:06d}.safetensors"


def save_checkpoint(folder: Path, step: int, job: Job, observers: Sequence[Observer]) -> None:
    """Write checkpoints/step_NNNNNN.safetensors and remove old ones; every process must call.

    Args:
        folder: of the training.
        step: optimiser steps done.
        job: whose weights, moments, schedule and beta are kept.
        observers: whose state is kept.
    """

    def on_cpu(value: Tensor) -> Tensor:
        # One tensor at a time is gathered on the device, and only the main process keeps it.
        gathered = gather_shards(value.detach()).contiguous()
        return gathered.cpu() if job.is_main else gathered.new_empty(0)

    tensors: dict[str, Tensor] = {}
    for name, parameter in job.parameters.items():
        tensors[f"weights.{name}"] = on_cpu(parameter)
        for key, value in kept_state(job.optimizer, parameter, job.config.optimizer).items():
            tensors[f"{key}.{name}"] = on_cpu(value)
    if job.auto_beta is not None:
        tensors["auto_beta"] = job.auto_beta.beta.detach().cpu()
    values: dict[str, Any] = {}
    for observer in observers:
        for key, value in observer.state().items():
            place = tensors if isinstance(value, Tensor) else values
            place[f"observers.{observer.name}.{key}"] = value
    if job.is_main:
        state = {"step": step, "schedule": job.plan.schedule, "settings": _settings(job), "observers": values}
        write_checkpoint(folder / _FOLDER / _NAME.format(step), tensors, state)
        prune_checkpoints(folder, job.config)
    job.accelerator.wait_for_everyone()


def prune_checkpoints(folder: Path, config: TrainConfig) -> None:
    """Remove all but the newest `checkpoints_total_limit` checkpoints, temporary files, and old ones off schedule.

    So a finished training leaves the same files however often it was stopped.
    """
    complete = _checkpoints(folder)
    regular = [path for path in complete if int(path.stem.removeprefix("step_")) % config.checkpointing_steps == 0]
    kept = regular[-config.checkpoints_total_limit :] if config.checkpoints_total_limit else regular
    for path in folder.glob(f"{_FOLDER}/*"):
        if path not in kept and path != (complete[-1] if complete else None):
            path.unlink()


def resume(folder: Path | None, job: Job, observers: Sequence[Observer]) -> int:
    """Load the last checkpoint into job and observers, if there is one.

    Returns:
        Optimiser steps done.

    Raises:
        UserError: a checkpoint of other settings, with the first that differs; one that cannot be read; an objective
            that no checkpoint can hold.
    """
    if folder is None:
        return 0
    now = _settings(job)  # which the first checkpoint must hold, so that it is tried before the first step
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    path = checkpoints[-1]
    tensors, state = read_checkpoint(path)
    before = state["settings"]
    for name in [*now, *before]:
        if name not in CHANGEABLE and before.get(name) != now.get(name):
            raise UserError(
                f"{path}: made with {name} {before.get(name)}, now it is {now.get(name)}; use another folder"
            )
    # A schedule chosen by free memory might be another one today, and would round differently.
    job.plan = job.plan.scheduled(state["schedule"])
    with torch.no_grad():
        for name, parameter in job.parameters.items():
            parameter.copy_(placed_like(tensors[f"weights.{name}"], parameter))
            restore_state(job.optimizer, parameter, tensors, name, job.config.optimizer)
    if job.auto_beta is not None:
        job.auto_beta.load_state_dict({"beta": tensors["auto_beta"]})
    found = tensors | state["observers"]
    for observer in observers:
        prefix = f"observers.{observer.name}."
        own = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        observer.restore(folder, state["step"], own)
    return int(state["step"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_FOLDER}/step_*.safetensors"))


def _settings(job: Job) -> dict[str, Any]:
    """Everything that a step depends on, as JSON gives it back."""
    # Reading all pairs would take as long as an epoch; other data differ at the ends.
    ends = {f"{name} pair": _digest(job.pairs[index]) for name, index in (("first", 0), ("last", len(job.pairs) - 1))}
    more: dict[str, Any] = {"pairs": len(job.pairs), "processes": job.accelerator.num_processes}
    more |= {} if job.one_bucket else {"pairs of each size": sorted(Counter(job.buckets.of).values())}
    # first, because the reference of a training without a start is no setting
    start = {"start": job.start} if job.start else {}
    own = deciding_settings(job.config, bool(job.start))
    try:
        settings: dict[str, Any] = json.loads(json.dumps(start | own | more | ends))
    except TypeError as error:
        raise UserError(
            f"train.objective: expected numbers and words, which a checkpoint can hold, got {job.config.objective!r} "
            f"({first_line(error)})"
        ) from error
    return settings


def _digest(pair: Pair) -> str:
    """A short hash of everything in a pair."""
    rewards = {"patch_rewards": pair.patch_rewards, "video_rewards": pair.video_rewards}
    return hash_tensors({"latents": pair.latents, **rewards, **dict(sorted(pair.conditions.items()))})[:16]
