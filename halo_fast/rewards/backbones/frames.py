"""The backbone "frames": every stage of the pretrained frame network and a small head, for a few dozen pictures.

No pixel trunk and no prompt: patch scores come from what frames show, place by place, against the whole clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_fast.rewards.backbones.compact import frame_network

if TYPE_CHECKING:
    from halo_fast.rewards.model import RewardModelConfig

__all__ = ["FrameStages"]

_FRAMES_SEEN, _SIDE = 5, 224
_SPREAD, _PLAIN = (16, 24, 40), (80, 112, 192, 320)  # channels of the stages finer than a patch, and of the others
_CHANNELS = 3 * sum(_SPREAD) + sum(_PLAIN)
_WIDTH, _DROP = 64, 0.3
_CLAMP = 6.0  # standardised features beyond this are outliers of a few training pictures


class Stages(NamedTuple):
    """Standardised features [N, 944, f', y, x] of clips of a size (frames, height, width)."""

    looks: Tensor
    size: tuple[int, int, int]


class FrameStages(nn.Module):
    """Scores from the features of all stages of EfficientNet-Lite0 (Tan and Le, 2019), at the latent's resolution.

    Stages finer than that give mean, maximum and deviation within each position, so that a mark smaller than it is not
    averaged away. The head sees a patch, its neighbours, and the mean and spread of the clip.
    """

    negatives = 1
    centre: Tensor
    scale: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        video, patch = len(config.video_dimensions), len(config.patch_dimensions)
        self.local, self.whole = nn.Linear(_CHANNELS, _WIDTH), nn.Linear(2 * _CHANNELS, _WIDTH)
        self.neighbours = nn.Conv3d(_WIDTH, _WIDTH, 3, padding=1)
        self.patch_head, self.video_head = nn.Linear(_WIDTH, patch), nn.Linear(_WIDTH, video)
        self.drop = nn.Dropout(_DROP)
        nn.init.zeros_(self.neighbours.weight)
        self.register_buffer("centre", torch.zeros(_CHANNELS, 1, 1, 1))
        self.register_buffer("scale", torch.ones(_CHANNELS, 1, 1, 1))

    @torch.no_grad()
    def look(self, videos: Tensor) -> Tensor:
        """Frozen features of up to five frames enlarged to 224: [N, 944, f', H/s, W/s], s the latent's factor."""
        network, (count, frames, height, width) = frame_network().to(videos.device), videos.shape[:4]
        chosen = torch.linspace(0, frames - 1, min(frames, _FRAMES_SEEN)).round().long()
        side = self.config.spatial_factor
        grid, enlarged = (height // side, width // side), _SIDE / min(height, width)
        x = videos[:, chosen].flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        size = [round(length * enlarged / 32) * 32 for length in (height, width)]
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        x = network._swish(network._bn0(network._conv_stem((x - 0.498) / 0.502)))
        stages: list[Tensor] = []
        for block in network._blocks:
            before, x = x, block(x)
            if x.shape[1] != before.shape[1]:
                stages.append(before)
        parts = [_pooled(stage, grid, stage.shape[1] in _SPREAD) for stage in [*stages[1:], x]]
        return torch.cat(parts, dim=1).unflatten(0, (count, -1)).transpose(1, 2)

    def prepare(self, looks: Tensor, prompts: Sequence[str], weight: Tensor) -> None:
        """Fit the mean and deviation of every feature; nothing is told of the clips one by one."""
        seen = looks.float()
        self.centre.copy_(seen.mean(dim=(0, 2, 3, 4)).view(-1, 1, 1, 1))
        self.scale.copy_(1 / (seen.std(dim=(0, 2, 3, 4)).view(-1, 1, 1, 1) + 1e-3))

    def encode(self, videos: Tensor, looks: Tensor, shown: Tensor | None = None) -> Stages:
        """The clips' looks, standardised."""
        size = (videos.shape[1], videos.shape[2], videos.shape[3])
        return Stages(((looks - self.centre) * self.scale).clamp(-_CLAMP, _CLAMP), size)

    def logits(self, features: Stages, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[N, D] logits of the video scores and [N, Q, f, h, w] of the patch scores."""
        patches = self.config.patches(grid, features.size)
        whole = self._whole(features)
        hidden = F.gelu(self.local(self.drop(patches.pool(features.looks).movedim(1, -1))) + whole[:, None, None, None])
        hidden = hidden + F.gelu(self.neighbours(hidden.movedim(-1, 1))).movedim(1, -1)
        return self.video_head(F.gelu(whole)), self.patch_head(self.drop(hidden)).movedim(-1, 1)

    def against(self, features: Stages, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D]; no prompt is read, so they are the same for all."""
        return self.video_head(F.gelu(self._whole(features)))[:, None].expand(-1, others.shape[1], -1)

    def _whole(self, features: Stages) -> Tensor:
        places = features.looks.flatten(2)
        return self.whole(self.drop(torch.cat((places.mean(dim=2), places.std(dim=2, correction=0)), dim=1)))


def _pooled(stage: Tensor, grid: tuple[int, int], spread: bool) -> Tensor:
    if not spread:
        return F.interpolate(stage, grid, mode="bilinear")
    mean = F.adaptive_avg_pool2d(stage, grid)
    deviation = (F.adaptive_avg_pool2d(stage**2, grid) - mean**2).clamp(min=0).sqrt()
    return torch.cat((mean, F.adaptive_max_pool2d(stage, grid), deviation), dim=1)
