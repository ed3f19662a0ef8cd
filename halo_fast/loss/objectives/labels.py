"""Rewards for the presets whose labels are made from something else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halo_fast.loss.inputs import check_number, describe
from halo_fast.loss.objectives.base import per_patch
from halo_fast.loss.reference import halves, signed_weights

__all__ = ["local_dpo_rewards", "video_dpo_rewards"]


def video_dpo_rewards(video_rewards: Tensor, scores: Tensor, alpha: float = 1.0, bin_width: float = 0.01) -> Tensor:
    """Rewards [2B] for the "video_dpo" preset, whose gap is VideoDPO's pair weight (p_max / sqrt(p_a p_b))^alpha.

    p is the frequency of a reward in a histogram, so pairs of rare scores weigh more. A reward outside the histogram
    takes the rarest bin's frequency. Not differentiable.

    Args:
        video_rewards: [2B], float, any scale.
        scores: [S], float, rewards of all candidates, which make the histogram.
        alpha: exponent of the weight.
        bin_width: of the histogram, in the unit of the rewards.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: VideoDPO, arXiv 2412.14167.
    """
    for name, values in (("video_rewards", video_rewards), ("scores", scores)):
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1:
            raise ValueError(f"{name} must be a 1-d float tensor; got {describe(values)}")
    if video_rewards.numel() % 2:
        raise ValueError(f"video_rewards must be [2B], all a and then their partners b; got {describe(video_rewards)}")
    if not scores.numel() or not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite and at least one; got {describe(scores)}: drop what is not finite")
    check_number("bin_width", bin_width, above=0.0)
    low = scores.min()
    bins = ((scores - low) / bin_width).floor().long()
    counts = torch.bincount(bins)
    rarest = counts[counts > 0].min()
    place = ((video_rewards.nan_to_num(nan=0.0) - low) / bin_width).floor().long()
    inside = (place >= 0) & (place < counts.numel())
    found = torch.where(inside, counts[place.clamp(0, counts.numel() - 1)], 0)
    frequency = torch.where(found > 0, found, rarest).to(video_rewards.dtype)
    a, b = halves(frequency)
    r_a, r_b = halves(video_rewards)
    signed = torch.where((r_a - r_b).abs() > 0, (r_a - r_b).sign(), 0.0) * (counts.max() / (a * b).sqrt()) ** alpha
    return torch.cat([signed, torch.zeros_like(signed)])


def local_dpo_rewards(mask: Tensor, video_rewards: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Patch rewards [2B, F, H, W] for the "local_dpo" preset from the soft masks [B, F, H, W] of corrupted positions.

    The gap of a pair is y M |Omega| / sum M, signed by the video's winner. The sum is taken per sample, and an empty
    mask gives a tie.

    Args:
        mask: [B, F, H, W], one for each pair.
        video_rewards: [2B]; they say which sample wins.
        strength: y, how strong the corruption is, a number or [B].

    Raises:
        ValueError: naming the argument.

    Source: LocalDPO, arXiv 2601.04068.
    """
    if mask.ndim != 4 or tuple(video_rewards.shape) != (2 * mask.shape[0],):
        raise ValueError(
            f"mask must be [B, F, H, W] and video_rewards [2B]: one mask for a pair; got {describe(mask)} and "
            f"{describe(video_rewards)}"
        )
    total = mask.flatten(1).sum(1)
    size = math.prod(mask.shape[1:])
    scale = strength * size / torch.where(total > 0, total, 1.0)
    weight = per_patch(scale * signed_weights(video_rewards, 0.0, 0.0)) * mask
    return torch.cat([weight, torch.zeros_like(weight)])
