"""Dimensions that need no downloaded weights, as VBench defines them where it does; they run anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halo_fast.files import progress
from halo_fast.judges.base import JudgeTable, Video, read_video

__all__ = ["consistency", "frame_difference", "frames", "motion_smoothness", "temporal_flickering"]


def frame_difference(video: Tensor) -> float:
    """How much is in motion: the mean absolute difference of neighbouring frames over 255, from 0 to 1.

    Args:
        video: uint8 [F, H, W, 3].

    Returns:
        NaN for a single frame.
    """
    if len(video) < 2:
        return math.nan
    steps = [(later.float() - earlier.float()).abs().mean() for earlier, later in zip(video, video[1:], strict=False)]
    return float(torch.stack(steps).double().mean()) / 255


def temporal_flickering(video: Tensor) -> float:
    """VBench's temporal flickering, (255 - mean absolute difference of neighbouring frames) / 255.

    VBench means it for clips of still scenes: elsewhere it also falls with motion.

    Args:
        video: uint8 [F, H, W, 3].

    Returns:
        1 for a frozen clip; NaN for a single frame.
    """
    return 1 - frame_difference(video)


def motion_smoothness(video: Tensor) -> float:
    """VBench's motion smoothness with the mean of both neighbours in place of its interpolation network.

    Every second frame is left out and put in again; 1 less its mean absolute difference to the true one over 255.

    Args:
        video: uint8 [F, H, W, 3].

    Returns:
        1 for linear changes; NaN for fewer than three frames.
    """
    if len(video) < 3:
        return math.nan
    count = (len(video) - 1) // 2
    errors = [
        ((video[2 * k].float() + video[2 * k + 2].float()) / 2 - video[2 * k + 1].float()).abs().mean()
        for k in range(count)
    ]
    return 1 - float(torch.stack(errors).double().mean()) / 255


def consistency(features: Tensor) -> float:
    """VBench's subject and background consistency of given features of the frames.

    The mean over t > 0 of (max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0))) / 2. VBench takes features of DINO for
    the subject and of CLIP for the background.

    Args:
        features: [F, c], a row for each frame.

    Returns:
        NaN for a single frame.
    """
    if len(features) < 2:
        return math.nan
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    before, first = (unit[1:] * unit[:-1]).sum(-1), (unit[1:] * unit[0]).sum(-1)
    return float(((before.clamp(min=0) + first.clamp(min=0)) / 2).mean())


def frames(
    clips: Sequence[Video], prompts: Sequence[str], fps: float, device: str, *, features: bool = False
) -> JudgeTable:
    """Amounts in the pixels alone: freedom from flicker, smoothness of motion, and the motion that both are lost to.

    A model that freezes its clips gains the first two and loses the third: read them together. They judge no quality.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: not read.
        fps: not read.
        device: of the features.
        features: whether `consistency` is also measured, on features of EfficientNet-Lite0 (the extra "reward").
    """
    rows = []
    for clip in progress(clips, len(clips), "judge frames"):
        video = read_video(clip)
        row = {
            "temporal_flickering": temporal_flickering(video),
            "motion_smoothness": motion_smoothness(video),
            "frame_difference": frame_difference(video),
        }
        rows.append(row | ({"consistency": consistency(_features(video, device))} if features else {}))
    return JudgeTable("frames", rows, amounts=True)


@torch.no_grad()
def _features(video: Tensor, device: str) -> Tensor:
    """A row of EfficientNet-Lite0's last stage for each frame, [F, c]."""
    from halo_fast.rewards.pretrained import frame_stages

    pictures = [list(frame_stages(frame[None, None].to(device), "bilinear"))[-1] for frame in video]
    return torch.cat(pictures).mean((2, 3)).cpu()
