"""Local defects as generated video has them, each confined to one space-time patch of the latent grid (3, 4, 4).

Severity is what can be seen: the root mean square change of the patch's pixels over 0.3, at most 1. So a defect that
hides nothing (a part vanishing where nothing was) has severity 0, whatever its strength.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.demo.world import NUM_FRAMES, SIZE, Clips

__all__ = ["DEFECTIVE", "Planted", "full_strength", "patch_mean", "plant", "to_pixels"]


GRID = (3, 4, 4)
CELL = SIZE // GRID[1]
FRAME_GROUPS = ((0, 1), (1, 5), (5, 9))  # a causal latent: the first frame alone, then groups of four
KINDS = ("flicker", "vanish", "smear", "colour", "tear", "frozen")
VISIBLE_CHANGE = 0.3

Regime = Literal["graded", "patchy"]


@dataclass(frozen=True)
class Planted:
    """Defective clips: video [N, 9, 3, 32, 32], severity [N, 3, 4, 4] in [0, 1], kind [N, 3, 4, 4] (-1: none)."""

    video: Tensor
    severity: Tensor
    kind: Tensor


def patch_mean(values: Tensor) -> Tensor:
    """Mean over each patch: [N, 9, 3, 32, 32] -> [N, 3, 4, 4]."""
    cells = values.mean(dim=2).unflatten(-1, (GRID[2], CELL)).unflatten(-3, (GRID[1], CELL)).mean(dim=(-3, -1))
    return torch.stack([cells[:, start:stop].mean(dim=1) for start, stop in FRAME_GROUPS], dim=1)


def to_pixels(patches: Tensor) -> Tensor:
    """Spread patch values over the pixels they cover: [N, 3, 4, 4] -> [N, 9, 1, 32, 32]."""
    lengths = torch.tensor([stop - start for start, stop in FRAME_GROUPS])
    frames = patches.repeat_interleave(lengths, dim=1)
    return frames.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)[:, :, None]


def full_strength(clips: Clips) -> Tensor:
    """Every kind of defect at full strength, everywhere: [K, N, 9, 3, 32, 32] in the order of KINDS."""
    video = clips.video
    bright = (torch.arange(NUM_FRAMES) % 2 == 0)[None, :, None, None, None]
    flicker = torch.where(bright, video + 0.42, video * 0.2)
    blurred = video.flatten(0, 1)
    for _ in range(2):
        blurred = F.avg_pool2d(F.pad(blurred, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    smear = blurred.unflatten(0, video.shape[:2])
    # a foreign hue where there is colour, and a cast over grey
    cast = torch.tensor([0.42, 0.0, 0.30])[None, None, :, None, None]
    colour = video[:, :, [1, 2, 0]] * 0.7 + cast
    tear = video.roll((7, 5), dims=(-1, -2))
    # stuck at what stood there when the previous group of frames began
    held = torch.tensor([8, 0, 0, 0, 0, 1, 1, 1, 1])
    return torch.stack((flicker, clips.background, smear, colour, tear, video[:, held])).clamp(0, 1)


def plant(clips: Clips, regime: Regime, generator: torch.Generator) -> Planted:
    """Plant defects: "graded" in 80% of patches at a strength uniform in [0, 1], "patchy" in 40% at full strength.

    The kind is drawn at random among those that show in the patch, so that the share of visibly defective patches is
    known whatever the clip shows there.
    """
    count = len(clips.attributes)
    share = {"graded": 0.8, "patchy": 0.4}[regime]
    candidates = full_strength(clips)
    change = torch.stack([patch_mean((candidate - clips.video) ** 2).sqrt() for candidate in candidates])
    lottery = torch.rand(change.shape, generator=generator)
    shows = change >= VISIBLE_CHANGE / 2
    kind = torch.where(shows, lottery, lottery - 1).argmax(dim=0)  # [N, 3, 4, 4]
    defective = torch.rand(count, *GRID, generator=generator) < share
    strength = torch.rand(count, *GRID, generator=generator) if regime == "graded" else torch.ones(count, *GRID)
    strength = strength * defective
    chosen = to_pixels(kind)[None].expand(1, -1, -1, 3, -1, -1)
    video = torch.lerp(clips.video, candidates.gather(0, chosen)[0], to_pixels(strength))
    severity = (patch_mean((video - clips.video) ** 2).sqrt() / VISIBLE_CHANGE).clamp(max=1)
    return Planted(video, severity, torch.where(defective, kind, -1))
