"""Clips sampled from a model, each from the noise of its own seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halo_fast.families.base import Family

__all__ = ["GenerateConfig", "clip_seed", "sample_clips"]


@dataclass
class GenerateConfig:
    """Candidates of the base model.

    Args:
        num_prompts: prompts taken from the top of the prompt list.
        num_videos_per_prompt: candidates of each prompt.
        batch_size: clips sampled at once.
        num_inference_steps: denoising steps of a clip.
        guidance_scale: classifier-free guidance; 1 switches it off.
        num_frames: frames of a clip.
        height: pixels.
        width: pixels.
        fps: frames a second of the mp4 files.
    """

    num_prompts: int = 192
    num_videos_per_prompt: int = 2
    batch_size: int = 32
    num_inference_steps: int = 16
    guidance_scale: float = 1.0
    num_frames: int = 9
    height: int = 32
    width: int = 32
    fps: int = 8


def sample_clips(
    family: Family, prompts: Sequence[str], seeds: Sequence[int], settings: GenerateConfig
) -> tuple[Tensor, Tensor]:
    """One clip for each prompt and seed, in one batch through the pipeline.

    Every clip starts from noise of its own generator, and prompts are encoded one at a time, so that a clip depends on
    its batch at most through the rounding of batched kernels.

    Returns:
        latents float32 [N, *latent_shape] in model space and videos uint8 [N, F, H, W, 3], both on the CPU.
    """
    shape = family.latent_shape(settings.num_frames, settings.height, settings.width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    encoded = {prompt: family.encode_prompts([prompt])[0] for prompt in dict.fromkeys(prompts)}
    latents = family.sample(
        [encoded[prompt] for prompt in prompts],
        noise,
        video_size=(settings.num_frames, settings.height, settings.width),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    return latents.cpu(), family.decode(latents).cpu()


def clip_seed(seed: int, prompt_index: int, candidate: int) -> int:
    """Seed of one clip, from 0 to 2**32 - 1 (all that a CPU generator uses), spread evenly by a hash."""
    digest = hashlib.sha256(f"clip {seed} {prompt_index} {candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
