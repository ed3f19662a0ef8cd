"""Previews while training: base and policy side by side, from the same prompt and noise."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from halo_fast.data.clips import read_clip, write_clip
from halo_fast.errors import UserError
from halo_fast.families import Family
from halo_fast.families.sampling import GenerateConfig, clip_seed, sample_clips
from halo_fast.files import write_bytes
from halo_fast.train.adapters import ReferenceMode
from halo_fast.train.job import Job
from halo_fast.train.observers.base import Observer

__all__ = ["Previews", "write_previews"]


class Previews(Observer):
    """Writes a clip of each validation prompt, before training and every `validation_steps`.

    Args:
        job: the training.
        folder: of the training.
        generate: size and sampling of the clips.

    Raises:
        UserError: validation prompts without a folder, sampling settings or a model that can sample.
    """

    name = "previews"

    def __init__(self, job: Job, folder: Path | None, generate: GenerateConfig | None) -> None:
        self._job = job
        self._place: tuple[Path, Family, GenerateConfig] | None = None
        if not job.config.validation_prompts:
            return
        if folder is None or generate is None:
            raise UserError("train.validation_prompts: previews need a run directory; use `halo train` or set null")
        if not isinstance(job.family, Family):
            raise UserError(
                f"train.validation_prompts: expected a model that samples, got {type(job.family).__name__}; set null"
            )
        if job.family.image_conditions:
            raise UserError(
                f"train.validation_prompts: {type(job.family).__name__} goes on from a picture, and previews have "
                "none; set null"
            )
        self._place = folder, job.family, generate

    def due(self, done: int) -> bool:
        return self._place is not None and done % self._job.config.validation_steps == 0

    def report(self, done: int) -> None:
        if self._place is None or not self.due(done):
            return
        folder, family, generate = self._place
        config = self._job.config
        prompts = config.validation_prompts or []
        write_previews(folder, family, self._job.reference_mode, prompts, generate, config.seed, done)


@torch.no_grad()
def write_previews(
    folder: Path,
    family: Family,
    reference_mode: ReferenceMode,
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
        reference_mode: the context in which it samples with the reference.
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
            with reference_mode():
                write_clip(base, _sample(family, prompt, generate, seed, index), generate.fps, generate.crf)
        policy = _sample(family, prompt, generate, seed, index)
        write_clip(path, torch.cat([read_clip(base), policy], dim=2), generate.fps, generate.crf)
    return written


def _sample(family: Family, prompt: str, generate: GenerateConfig, seed: int, index: int) -> Tensor:
    _, videos = sample_clips(family, [prompt], [clip_seed(seed, index, 0)], generate)
    return videos[0]
