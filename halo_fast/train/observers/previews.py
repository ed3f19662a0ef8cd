"""Previews while training: base and policy side by side, from the same prompt and noise."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from halo_fast.data.clips import read_clip, write_clip
from halo_fast.families import Family
from halo_fast.families.sampling import GenerateConfig, clip_seed, sample_clips
from halo_fast.files import write_bytes
from halo_fast.train.adapters import Switch

__all__ = ["write_previews"]


@torch.no_grad()
def write_previews(
    folder: Path,
    family: Family,
    reference: Switch,
    prompts: Sequence[str],
    generate: GenerateConfig,
    seed: int,
    step: int,
) -> list[Path]:
    """Write previews/step_NNNNNN/<k>.mp4 for each prompt, base on the left and policy on the right; their paths.

    Both start from the same noise, which is the same at every step, so a clip changes by the training alone. The base's
    clips are sampled once and kept as previews/base/<k>.mp4. Clips are made and decoded one at a time, so a preview
    needs no more memory than one clip does; what exists is not made again.

    Args:
        folder: of the training.
        family: its pipeline samples with the policy.
        reference: inside it, with the reference.
        prompts: config.validation_prompts, also written to previews/prompts.txt.
        generate: size, frames a second, steps and guidance of the clips.
        seed: of the noise.
        step: optimiser steps done.
    """
    previews = folder / "previews"
    write_bytes(previews / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts).encode())
    written = []
    for index, prompt in enumerate(prompts):
        path, base = previews / f"step_{step:06d}" / f"{index}.mp4", previews / "base" / f"{index}.mp4"
        written.append(path)
        if path.exists():
            continue
        if not base.exists():
            with reference():
                write_clip(base, _sample(family, prompt, generate, seed, index), generate.fps)
        policy = _sample(family, prompt, generate, seed, index)
        write_clip(path, torch.cat([read_clip(base), policy], dim=2), generate.fps)
    return written


def _sample(family: Family, prompt: str, generate: GenerateConfig, seed: int, index: int) -> Tensor:
    _, videos = sample_clips(family, [prompt], [clip_seed(seed, index, 0)], generate)
    return videos[0]
