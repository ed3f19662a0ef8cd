"""The backbone "frames": every stage of the pretrained frame network and a small head, for a few dozen pictures.

It has no trunk on pixels and reads no prompt: patch scores compare the features of a patch with the whole clip's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_fast.rewards.base import RewardModelConfig
from halo_fast.rewards.pretrained import STAGE_CHANNELS, frame_stages

__all__ = ["FrameFeatures", "FrameStages", "pool_spread"]

_SPREAD = 3  # stages that are finer than a patch; the others are interpolated
_CHANNELS = 3 * sum(STAGE_CHANNELS[:_SPREAD]) + sum(STAGE_CHANNELS[_SPREAD:])
_WIDTH, _DROP = 64, 0.3
_CLAMP = 6.0  # standardised features beyond this are outliers of a few training pictures


class FrameFeatures(NamedTuple):
    """Frozen features of clips.

    Args:
        frozen: [N, C, f', y, x]; C is 944 here and 2364 in the backbone kernel.
        size: frames, height, width of the clips.
    """

    frozen: Tensor
    size: tuple[int, int, int]


class FrameStages(nn.Module):
    """Scores from the features of all stages of EfficientNet-Lite0 (arXiv:1905.11946), at the latent's resolution.

    Stages finer than that give mean, maximum and deviation within each position, so that a mark smaller than it is not
    averaged away. The head sees a patch, its neighbours, and the mean and spread of the clip.
    """

    features_by_frame = True
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
    def frozen_features(self, videos: Tensor) -> Tensor:
        """Features of up to five frames enlarged to 224: [N, 944, f', H/s, W/s], s the latent's factor."""
        height, width = videos.shape[2:4]
        factor = self.config.features_factor or self.config.spatial_factor
        grid = height // factor, width // factor
        parts = [
            pool_spread(stage, grid) if index < _SPREAD else F.interpolate(stage, grid, mode="bilinear")
            for index, stage in enumerate(frame_stages(videos, "bicubic"))
        ]
        return torch.cat(parts, dim=1).unflatten(0, (len(videos), -1)).transpose(1, 2)

    def fit_closed_form(self, frozen: Tensor, prompts: Sequence[str], weight: Tensor) -> None:
        """Fit the mean and deviation of every feature [N, 944, f', y, x]; there is nothing to say of single clips."""
        # clip by clip: the features of all clips may be larger than memory
        count, axes = frozen[:, 0].numel(), (0, 2, 3, 4)
        mean = torch.stack([clip.double().sum(dim=axes) for clip in frozen.split(1)]).sum(dim=0) / count
        away = [(clip.double() - mean.view(-1, 1, 1, 1)).square().sum(dim=axes) for clip in frozen.split(1)]
        deviation = (torch.stack(away).sum(dim=0) / (count - 1)).sqrt()
        self.centre.copy_(mean.view(-1, 1, 1, 1))
        self.scale.copy_(1 / (deviation.view(-1, 1, 1, 1) + 1e-3))

    def encode(self, videos: Tensor, frozen: Tensor, word_evidence: Tensor | None = None) -> FrameFeatures:
        """The frozen features [N, 944, f', y, x], standardised."""
        size = (videos.shape[1], videos.shape[2], videos.shape[3])
        return FrameFeatures(((frozen - self.centre) * self.scale).clamp(-_CLAMP, _CLAMP), size)

    def logits(self, features: FrameFeatures, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of the video scores [N, D] and of the patch scores [N, Q, f, h, w]."""
        patches = self.config.patches(grid, features.size)
        whole = self._whole(features)
        local = self.local(self.drop(patches.pool_complete(features.frozen).movedim(1, -1)))
        hidden = F.gelu(local + whole[:, None, None, None])
        hidden = hidden + F.gelu(self.neighbours(hidden.movedim(-1, 1))).movedim(1, -1)
        return self.video_head(F.gelu(whole)), self.patch_head(self.drop(hidden)).movedim(-1, 1)

    def video_logits_for(self, features: FrameFeatures, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D]; no prompt is read, so they are the same for all."""
        return self.video_head(F.gelu(self._whole(features)))[:, None].expand(-1, others.shape[1], -1)

    def _whole(self, features: FrameFeatures) -> Tensor:
        places = features.frozen.flatten(2)
        return self.whole(self.drop(torch.cat((places.mean(dim=2), places.std(dim=2, correction=0)), dim=1)))


def pool_spread(stage: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean, maximum and deviation of [N, c, y, x] within each cell of the grid (h, w): [N, 3c, h, w]."""
    mean = F.adaptive_avg_pool2d(stage, grid)
    deviation = (F.adaptive_avg_pool2d(stage**2, grid) - mean**2).clamp(min=0).sqrt()
    return torch.cat((mean, F.adaptive_max_pool2d(stage, grid), deviation), dim=1)
