"""Clips sampled from a model, each from the noise of its own seed or from a guide that is noised again."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval, Le
from torch import Tensor

from halo_fast.errors import UserError, check_finite
from halo_fast.families.base import Denoiser, Family
from halo_fast.families.steering import sample_part, sampling_times, steerable

__all__ = [
    "GenerateConfig",
    "Strategy",
    "clip_noise",
    "clip_seed",
    "draws_noise",
    "sample_clips",
    "sample_trunks",
    "sample_variations",
    "sampling_steps",
]

Strategy = Literal["independent", "branched", "guided", "repair", "corrupt"]


@dataclass
class GenerateConfig:
    """Candidates of the base model.

    Args:
        num_prompts: prompts taken from the top of the list; null for all.
        num_videos_per_prompt: candidates of each prompt.
        strategy: how the candidates of a prompt differ. "independent": each from noise of its own. "branched": they
            share the early steps. "guided": the first is noised and denoised again. "repair": of the first, only the
            patches that `reward_model` scores worst. "corrupt": of the first, only a moving region.
        strength: share of the steps that a candidate takes by itself, where strategy is not independent.
        share: share of the clip that repair and corrupt make again.
        batch_size: clips sampled at once.
        num_inference_steps: denoising steps of a clip.
        guidance_scale: classifier-free guidance; 1 switches it off.
        num_frames: frames of a clip.
        height: pixels.
        width: pixels.
        fps: frames a second of the mp4 files, and of the clip where the model takes that as an input.
        crf: quality of the mp4 files, x264's constant rate factor from 0 to 51, higher for smaller files; null for
            lossless files, which not every player shows. Latents are kept beside the files, as they were made.
    """

    num_prompts: Annotated[int, Ge(1)] | None = None
    num_videos_per_prompt: Annotated[int, Ge(1)] = 2
    strategy: Strategy = "independent"
    strength: Annotated[float, Interval(gt=0, le=1)] = 0.6
    share: Annotated[float, Interval(gt=0, le=1)] = 0.25
    batch_size: Annotated[int, Ge(1)] = 1
    num_inference_steps: Annotated[int, Ge(1)] = 50
    guidance_scale: Annotated[float, Ge(0)] = 5.0
    num_frames: Annotated[int, Ge(1)] = 81
    height: Annotated[int, Ge(1)] = 480
    width: Annotated[int, Ge(1)] = 832
    fps: Annotated[int, Ge(1)] = 16
    crf: Annotated[int, Ge(0), Le(51)] | None = 12


def sample_clips(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerateConfig,
    images: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One clip for each prompt and seed, in one batch through the pipeline.

    Every clip starts from noise of its own generator, and prompts are encoded one at a time. So a clip depends on its
    batch at most through the rounding of batched kernels.

    Args:
        family: the model.
        prompts: of the clips.
        seeds: of the clips.
        settings: size, steps and guidance; the rest is not read.
        images: in image-to-video, the first frame of each prompt's clips, uint8 [H, W, 3] in their size.

    Returns:
        latents float32 [N, *latent_shape] in model space and videos uint8 [N, F, H, W, 3], both on the CPU.

    Raises:
        UserError: a size that the model cannot make, a model that only trains, a prompt without the image that the
            model needs, or a clip that is not finite.
    """
    if not isinstance(family, Family):
        raise UserError(
            f"model: expected a Family, which samples, got {type(family).__name__}, which only trains; "
            "leave out previews and fresh pairs, or subclass halo_fast.families.Family"
        )
    conditions, noise = _conditions(family, prompts, settings, images or {}), _noise(family, seeds, settings)
    latents = family.sample(conditions, noise, **_arguments(settings))
    return _finished(family, latents, prompts, seeds)


def sample_trunks(family: Family, prompts: Sequence[str], seeds: Sequence[int], settings: GenerateConfig) -> Tensor:
    """The steps that branches share: clips are sampled until `strength` of the steps is left.

    Args:
        family: the model.
        prompts: of the clips.
        seeds: of their noise.
        settings: size, steps, guidance and strength; the rest is not read.

    Returns:
        the clean latents x_0 that the network expects there, float32 [N, *latent_shape] on the CPU: guides of
        `sample_variations`.

    Raises:
        UserError: as `sample_clips`, or a sampler that cannot be entered between steps.
    """
    steerable_family = steerable(family)
    conditions, noise = _conditions(family, prompts, settings), _noise(family, seeds, settings)
    stop = first_step(settings)
    if not stop:
        return torch.zeros_like(noise)  # nothing is shared, and nothing of a guide is left in pure noise
    _, estimate = sample_part(steerable_family, conditions, noise, _arguments(settings), stop=stop)
    check_finite(estimate, _names(prompts, seeds), "latents sampled by the model", "load it in another precision")
    return estimate.float().cpu()


def sample_variations(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guides: Tensor,
    settings: GenerateConfig,
    regions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clips that begin as guides: each is noised by its seed and goes through the last `strength` of the steps.

    Outside of its region a clip is held: after each step it is its guide at that step's noise, in the end the guide
    itself. Noising and denoising is SDEdit's (Meng et al., arXiv:2108.01073); without regions the clips are the
    candidates of DenseDPO (Wu et al., arXiv:2506.03517), holding is RePaint's (Lugmayr et al., arXiv:2201.09865).

    Args:
        family: the model.
        prompts: of the clips.
        seeds: of their noise.
        guides: latents [N, *latent_shape] in model space.
        settings: size, steps, guidance and strength; the rest is not read.
        regions: what is made again, bool [N, F, H, W] in latent positions; None for all.

    Returns:
        latents and videos as `sample_clips`.

    Raises:
        UserError: as `sample_clips`, or a sampler that cannot be entered between steps.
    """
    steerable_family = steerable(family)
    conditions, noise = _conditions(family, prompts, settings), _noise(family, seeds, settings)
    arguments, start = _arguments(settings), first_step(settings)
    times = sampling_times(steerable_family, conditions[0], noise.shape[1:], arguments)
    inside = None if regions is None else regions.unsqueeze(1 if family.layout == "BCFHW" else 2)

    def noised(index: int, like: Tensor) -> Tensor:
        if index == len(times) - 1:
            return guides.to(like)
        return family.add_noise(guides, noise, times[index].expand(len(noise))).to(like)

    def hold(latents: Tensor, index: int) -> Tensor:
        return latents if inside is None else torch.where(inside.to(latents.device), latents, noised(index, latents))

    latents, _ = sample_part(steerable_family, conditions, noised(start, noise), arguments, start=start, between=hold)
    return _finished(family, latents, prompts, seeds)


def first_step(settings: GenerateConfig) -> int:
    """Number of the step at which candidates part; at least one step is left."""
    return settings.num_inference_steps - max(math.floor(settings.strength * settings.num_inference_steps + 1e-9), 1)


def sampling_steps(settings: GenerateConfig) -> int:
    """Denoising steps of all candidates of a prompt, by their strategy (docs/data.md, "Candidates")."""
    steps = settings.num_inference_steps
    own = steps if settings.strategy == "independent" else steps - first_step(settings)
    return steps + (settings.num_videos_per_prompt - 1) * own


def _conditions(
    family: Family, prompts: Sequence[str], settings: GenerateConfig, images: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """Conditions of each prompt and its image, which are encoded one at a time."""
    if not isinstance(family, Family):
        raise UserError(
            f"model: expected a Family, which samples, got {type(family).__name__}, which only trains; "
            "leave out previews and fresh pairs, or subclass halo_fast.families.Family"
        )
    encoded = {prompt: family.encode_prompts([prompt])[0] for prompt in dict.fromkeys(prompts)}
    if family.image_conditions:
        for prompt, conditions in encoded.items():
            image = _first_frame(family, prompt, images or {}, settings)
            conditions |= family.encode_images(image[None], settings.num_frames)[0]
    family.set_conditions(settings.guidance_scale, settings.fps)
    return [encoded[prompt] for prompt in prompts]


def _first_frame(family: Family, prompt: str, images: Mapping[str, Tensor], settings: GenerateConfig) -> Tensor:
    if prompt not in images:
        raise UserError(
            f"prompts: {type(family).__name__} makes clips that go on from a picture, got none for {prompt!r}; give a "
            "table with the columns 'prompt' and 'image', from Python `images`"
        )
    expected = settings.height, settings.width, 3
    if tuple(images[prompt].shape) != expected:
        raise UserError(
            f"images: expected {list(expected)}, the size of the clips, got {list(images[prompt].shape)} for "
            f"{prompt!r}; scale it, as halo_fast.data.fitting.fit_picture does"
        )
    return images[prompt]


def _noise(family: Family, seeds: Sequence[int], settings: GenerateConfig) -> Tensor:
    shape = family.latent_shape(settings.num_frames, settings.height, settings.width)
    return torch.stack([clip_noise(shape, seed) for seed in seeds])


def _arguments(settings: GenerateConfig) -> dict[str, Any]:
    """The keyword arguments of `Family.sample`."""
    return {
        "video_size": (settings.num_frames, settings.height, settings.width),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
    }


def _names(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    return [f"clip of seed {seed} for {prompt!r}" for seed, prompt in zip(seeds, prompts, strict=True)]


def _finished(family: Family, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Latents and videos on the CPU, checked."""
    clips = _names(prompts, seeds)
    check_finite(latents, clips, "latents sampled by the model", "load it in another precision")
    # one by one, so that an error names the clip
    videos = [_decode(family, latent, clip) for latent, clip in zip(latents.split(1), clips, strict=True)]
    return latents.cpu(), torch.cat(videos)


def _decode(family: Family, latents: Tensor, clip: str) -> Tensor:
    try:
        return family.decode(latents).cpu()
    except UserError as error:
        raise UserError(f"{clip}: {error}") from error


def clip_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The noise that a clip is sampled from, float32 on the CPU, of unit variance.

    Args:
        shape: of the clip's latents.
        seed: of the clip.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# schedulers of diffusers that draw no noise, but for these values of their settings
_DETERMINISTIC: dict[str, dict[str, tuple[object, ...]]] = {
    "CogVideoXDDIMScheduler": {}, "DDIMScheduler": {}, "HeliosScheduler": {}, "UniPCMultistepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": (True,)},
    "DPMSolverMultistepScheduler": {"algorithm_type": ("sde-dpmsolver", "sde-dpmsolver++")},
}  # fmt: skip


def draws_noise(family: Denoiser) -> str:
    """Why a clip may not follow from its first noise alone, in words; empty if it does.

    Args:
        family: the model, with its scheduler.
    """
    scheduler = getattr(family.pipeline, "scheduler", None)
    if scheduler is None:
        return f"{type(family).__name__} samples by itself"
    name = type(scheduler).__name__
    drawing = _DETERMINISTIC.get(name, {})
    if name in _DETERMINISTIC and not any(scheduler.config.get(one) in values for one, values in drawing.items()):
        return ""
    return f"{name} may draw noise at every step"


def clip_seed(seed: int, prompt_index: int, candidate: int) -> int:
    """Seed of one clip, from 0 to 2**32 - 1 (all that a CPU generator uses), spread evenly by a hash."""
    digest = hashlib.sha256(f"clip {seed} {prompt_index} {candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
