"""A part of a sampler's way: from a later step on, up to an earlier one, or with latents changed between the steps.

Pipelines of diffusers go through a whole schedule from pure noise. For the length of one call their scheduler's methods
are stood in for. So every family takes part, and each step is still the pipeline's own.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.families.base import Family
from halo_fast.families.pipeline import PipelineFamily, replaced

__all__ = ["Between", "sample_part", "sampling_times", "steerable"]

Between = Callable[[Tensor, int], Tensor]
"""Latents after a step and the number of the next one -> the latents that go on."""


def steerable(family: Family) -> PipelineFamily:
    """The family, if its sampler can be entered between steps.

    Raises:
        UserError: no diffusers pipeline, or a scheduler whose latents are scaled or that takes a step twice.
    """
    if not isinstance(family, PipelineFamily):
        raise UserError(
            f"generate.strategy: {type(family).__name__} samples by itself, so its sampler can't be entered between "
            "steps; set it to independent, or subclass halo_fast.families.pipeline.PipelineFamily"
        )
    if not family.enterable:
        reason = "goes on from a picture" if family.image_conditions else "makes sound beside the video"
        raise UserError(
            f"generate.strategy: the sampler of {type(family).__name__} {reason}, so it can't be entered between "
            "steps; set it to independent"
        )
    scheduler = family.pipeline.scheduler
    # such as EulerDiscrete, whose latents grow with the noise, and Heun
    if float(getattr(scheduler, "init_noise_sigma", 1)) != 1 or getattr(scheduler, "order", 1) != 1:
        raise UserError(
            f"generate.strategy: {type(scheduler).__name__} scales its latents or calls the network twice a step; "
            "give the model another scheduler, such as DDIM, UniPC or FlowMatchEuler, or set it to independent"
        )
    return family


class _Scheduled(Exception):
    """Leaves a pipeline once its schedule is known."""


def sampling_times(
    family: PipelineFamily, conditions: dict[str, Tensor], shape: Sequence[int], arguments: dict[str, Any]
) -> Tensor:
    """Noise levels t in [0, 1] before each step of the sampler and after the last, [steps + 1] on the CPU.

    The schedule depends on the clip's size in some pipelines, so the pipeline itself is asked.

    Args:
        family: the model.
        conditions: of any prompt.
        shape: of one clip's latents.
        arguments: of `Family.sample`.
    """
    scheduler = family.pipeline.scheduler
    original = scheduler.set_timesteps

    @wraps(original)
    def set_timesteps(*given: Any, **named: Any) -> None:
        original(*given, **named)
        raise _Scheduled

    with replaced(scheduler, set_timesteps=set_timesteps), suppress(_Scheduled):
        family.sample([conditions], torch.zeros(1, *shape), **arguments)
    return family.sampler_times()


def sample_part(
    family: PipelineFamily,
    conditions: Sequence[dict[str, Tensor]],
    latents: Tensor,
    arguments: dict[str, Any],
    *,
    start: int = 0,
    stop: int | None = None,
    between: Between | None = None,
) -> tuple[Tensor, Tensor]:
    """Go through the sampler's steps from `start` up to `stop`.

    Args:
        family: the model.
        conditions: of each clip.
        latents: of each clip before step `start`, [N, *latent_shape] in model space.
        arguments: of `Family.sample`.
        start: number of the first step, from 0.
        stop: number of the step before which it ends; None for the end.
        between: changes the latents after each step.

    Returns:
        the latents then, and the clean latents x_0 for which the network took them in the last step.
    """
    scheduler = family.pipeline.scheduler
    set_timesteps, step, begin = (
        scheduler.set_timesteps, scheduler.step, getattr(scheduler, "set_begin_index", lambda index: None),
    )  # fmt: skip
    shape, index, estimate = latents.shape, start, latents
    whole: dict[str, Any] = {}
    levels: dict[str, Any] = {}

    @wraps(set_timesteps)
    def set_some_timesteps(*given: Any, **named: Any) -> None:
        set_timesteps(*given, **named)
        whole["timesteps"] = scheduler.timesteps
        scheduler.timesteps = scheduler.timesteps[start:stop]
        if hasattr(scheduler, "sigmas"):
            # some pipelines count these from the first step that they take
            whole["sigmas"], levels["sigmas"] = scheduler.sigmas, scheduler.sigmas[start:]
        scheduler.__dict__.update(levels)
        begin(start)
        if getattr(scheduler, "_step_index", start) is None:
            scheduler._step_index = start  # HeliosScheduler would count from the first step all the same

    @wraps(step)
    def take_step(*given: Any, **named: Any) -> Any:
        nonlocal index, estimate
        # the pipeline has read its part; solvers of higher order look at the whole
        scheduler.__dict__.update(whole)
        bound = inspect.signature(step).bind(*given, **named).arguments
        before, output = (_from_step(family, bound[name], shape) for name in ("sample", "model_output"))
        t = family.sampler_times()[index].to(before)
        estimate = family.clean(before.float(), output.float(), t.expand(shape[0]))
        result, index = step(*given, **named), index + 1
        scheduler.__dict__.update(levels)
        if between is None:
            return result
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        changed = _to_step(family, between(_from_step(family, after, shape), index), after)
        if isinstance(result, tuple):
            return changed, *result[1:]
        result.prev_sample = changed
        return result

    with replaced(
        scheduler, set_timesteps=set_some_timesteps, step=take_step,
        set_begin_index=lambda begin_index=0: begin(start + begin_index),
    ):  # fmt: skip
        after = family.sample(conditions, latents, **arguments)
    scheduler.__dict__.update(whole)
    return after, estimate


def _from_step(family: PipelineFamily, value: Tensor, shape: Sequence[int]) -> Tensor:
    """What the scheduler sees in the form of latents of this shape, [N, *latent_shape]."""
    if value.ndim == 4:  # a scheduler of pictures takes frame by frame
        return value.unflatten(0, (shape[0], -1)).transpose(1, 2)
    return family.unpack(value, family.latent_size(shape))


def _to_step(family: PipelineFamily, latents: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_from_step`, in the form and precision of `like`."""
    value = latents.transpose(1, 2).flatten(0, 1) if like.ndim == 4 else family.pack(latents)
    return value.to(like)
