"""Regions of a clip's latents that are made again: a moving ellipse, or the patches with the least scores."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from halo_fast.patches import PatchGrid

__all__ = ["covered_share", "moving_region", "worst_region"]


def moving_region(size: Sequence[int], share: float, seed: int) -> Tensor:
    """An ellipse that moves on a straight line through some consecutive frames, as bool [F, H, W].

    It stands for the moving masks of LocalDPO (arXiv:2601.04068), whose outlines are irregular.

    Args:
        size: frames, rows and columns of the latents.
        share: of the clip that it covers, up to rounding; at least one position in one frame.
        seed: of place, form, motion and frames.
    """
    frames, rows, columns = size
    rng = np.random.default_rng(seed)
    lasting = max(round(frames * rng.uniform(max(share, 0.5), 1)), 1)
    first = int(rng.integers(frames - lasting + 1))
    count = min(max(round(share * frames * rows * columns / lasting), 1), rows * columns)
    # half axes in units of the frame's sides; the nearest positions are taken, so the share is exact at its borders
    stretch = math.exp(rng.uniform(-0.5, 0.5))
    start, end = rng.uniform(0.15, 0.85, (2, 2))
    places = np.stack(np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij"))
    region = torch.zeros(frames, rows, columns, dtype=torch.bool)
    for index in range(lasting):
        centre = start + (end - start) * (index / max(lasting - 1, 1))
        offset = places - centre[:, None, None]
        distance = (offset[0] * stretch) ** 2 + (offset[1] / stretch) ** 2
        nearest = np.argsort(distance, axis=None, kind="stable")[:count]
        region[first + index].view(-1)[torch.from_numpy(nearest)] = True
    return region


def worst_region(scores: Tensor, size: Sequence[int], share: float) -> Tensor:
    """The latent positions, bool [F, H, W], of the patches with the least scores.

    Args:
        scores: of the patches, [f, h, w].
        size: frames, rows and columns of the latents.
        share: of the patches, rounded; at least one.
    """
    count = max(round(share * scores.numel()), 1)
    worst = torch.zeros(scores.numel())
    worst[scores.flatten().argsort(stable=True)[:count]] = 1
    return _on_latents(scores.shape, size).spread(worst.view(scores.shape)) > 0


def covered_share(region: Tensor, grid: Sequence[int]) -> Tensor:
    """The share of each patch, float [f, h, w], that a region bool [F, H, W] covers."""
    return _on_latents(grid, region.shape).pool(region.float())


def _on_latents(grid: Sequence[int], size: Sequence[int]) -> PatchGrid:
    """Patches of latents, whose positions take the place of pixels."""
    return PatchGrid((grid[0], grid[1], grid[2]), size[0], size[1], size[2], 1, 1, False)
