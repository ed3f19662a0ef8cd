"""Clips sampled from a model, each from the noise of its own seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from halo_fast.errors import UserError, check_finite
from halo_fast.families.base import Family

__all__ = ["GenerateConfig", "clip_seed", "sample_clips"]


@dataclass
class GenerateConfig:
    """Candidates of the base model.

    Args:
        num_prompts: prompts taken from the top of the list; null for all.
        num_videos_per_prompt: candidates of each prompt.
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
    batch_size: Annotated[int, Ge(1)] = 1
    num_inference_steps: Annotated[int, Ge(1)] = 50
    guidance_scale: Annotated[float, Ge(0)] = 5.0
    num_frames: Annotated[int, Ge(1)] = 81
    height: Annotated[int, Ge(1)] = 480
    width: Annotated[int, Ge(1)] = 832
    fps: Annotated[int, Ge(1)] = 16
    crf: Annotated[int, Ge(0), Le(51)] | None = 12


def sample_clips(
    family: Family, prompts: Sequence[str], seeds: Sequence[int], settings: GenerateConfig
) -> tuple[Tensor, Tensor]:
    """One clip for each prompt and seed, in one batch through the pipeline.

    Every clip starts from noise of its own generator, and prompts are encoded one at a time. So a clip depends on its
    batch at most through the rounding of batched kernels.

    Args:
        family: the model.
        prompts: of the clips.
        seeds: of the clips.
        settings: size, steps and guidance; the rest is not read.

    Returns:
        latents float32 [N, *latent_shape] in model space and videos uint8 [N, F, H, W, 3], both on the CPU.

    Raises:
        UserError: a size that the model cannot make, a model that only trains, or a clip that is not finite.
    """
    if not isinstance(family, Family):
        raise UserError(
            f"model: expected a Family, which samples, got {type(family).__name__}, which only trains; "
            "leave out previews and fresh pairs, or subclass halo_fast.families.Family"
        )
    shape = family.latent_shape(settings.num_frames, settings.height, settings.width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    encoded = {prompt: family.encode_prompts([prompt])[0] for prompt in dict.fromkeys(prompts)}
    family.set_conditions(settings.guidance_scale, settings.fps)
    latents = family.sample(
        [encoded[prompt] for prompt in prompts],
        noise,
        video_size=(settings.num_frames, settings.height, settings.width),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    clips = [f"clip of seed {seed} for {prompt!r}" for seed, prompt in zip(seeds, prompts, strict=True)]
    check_finite(latents, clips, "latents sampled by the model", "load it in another precision")
    # one by one, so that an error names the clip
    videos = [_decode(family, latent, clip) for latent, clip in zip(latents.split(1), clips, strict=True)]
    return latents.cpu(), torch.cat(videos)


def _decode(family: Family, latents: Tensor, clip: str) -> Tensor:
    try:
        return family.decode(latents).cpu()
    except UserError as error:
        raise UserError(f"{clip}: {error}") from error


def clip_seed(seed: int, prompt_index: int, candidate: int) -> int:
    """Seed of one clip, from 0 to 2**32 - 1 (all that a CPU generator uses), spread evenly by a hash."""
    digest = hashlib.sha256(f"clip {seed} {prompt_index} {candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
