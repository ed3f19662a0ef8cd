"""Labelled clips of the demo's world that no model made: they are damaged on purpose, so the labels are exact.

They stand for a set of clips that people scored before there was a teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halo_fast.demo import defects, load_pipeline, world
from halo_fast.demo.calibrate import round_trip

__all__ = ["examples"]

_SOUND = 0.1  # share of the clips without damage
_FIRST_SEED = 31  # apart from the seeds of other clips of this world


@torch.no_grad()
def examples(count: int, seed: int) -> tuple[Tensor, list[str], Tensor]:
    """Clips of the train split, most of them damaged in most patches at graded strength, through the autoencoder.

    Args:
        count: of clips.
        seed: of every random choice.

    Returns:
        uint8 [N, 9, 32, 32, 3], prompts, and quality [N, 3, 4, 4] in the demo teacher's terms: 5 - 4 severity.
    """
    generator = torch.Generator().manual_seed(_FIRST_SEED + seed)
    clips = world.draw("train", count, generator)
    planted = defects.plant(clips, "graded", generator)
    sound = torch.rand(count, 1, 1, 1, generator=generator) < _SOUND
    video = torch.where(sound[..., None], clips.video, planted.video)
    vae = load_pipeline("graded").vae
    video = torch.cat([world.to_uint8(round_trip(vae, part).clamp(0, 1)) for part in video.split(64)])
    return video, clips.prompts, 5 - 4 * planted.severity.masked_fill(sound, 0)
