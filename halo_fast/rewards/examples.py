"""Further labelled clips that train a reward model beside those that a teacher labelled, by registered name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.files import scratch_tensor
from halo_fast.registry import create
from halo_fast.rewards.clips import LabelledClips

__all__ = ["add_examples"]

_DIMENSION = "visual_quality"  # the video score that follows from the patches


def add_examples(data: LabelledClips, name: str, count: int, seed: int, folder: Path | None = None) -> LabelledClips:
    """The clips, joined by examples of which only the quality of the patches is known.

    visual_quality of an example is the mean of its patches; its other video scores are NaN.

    Args:
        data: clips with the single patch dimension "quality".
        name: registered as "reward examples", or dotted: a callable(count, seed) that returns videos uint8
            [N, F, H, W, 3], N prompts and quality [N, f, h, w] from 1 to 5.
        count: of examples.
        seed: of their random choices.
        folder: on whose disk the frames of all clips lie; None keeps them in memory.

    Raises:
        UserError: no such examples.
        ValueError: clips or patches of another shape than the data's.
    """
    found = create("reward examples", name, "reward.examples", count, seed)
    if not isinstance(found, tuple | list) or len(found) != 3 or not torch.is_tensor(found[0]):
        raise UserError(
            f"reward.examples: expected {name!r} to give videos, prompts and quality, got {type(found).__name__}"
        )
    videos, prompts, quality = found
    _check(data, videos, quality[:, None], name)
    video_scores = torch.full((len(videos), len(data.video_dimensions)), math.nan)
    if _DIMENSION in data.video_dimensions:
        video_scores[:, data.video_dimensions.index(_DIMENSION)] = quality.flatten(1).mean(dim=1)
    shape = (len(data) + len(videos), *videos.shape[1:])
    return replace(
        data,
        videos=torch.cat((data.videos, videos), out=scratch_tensor(folder, shape, videos.dtype)),
        prompts=data.prompts + list(prompts),
        video_scores=torch.cat((data.video_scores, video_scores)),
        patch_scores=torch.cat((data.patch_scores, quality[:, None])),
    )


def _check(data: LabelledClips, videos: Tensor, patch_scores: Tensor, name: str) -> None:
    for what, own, added in (("clips", data.videos, videos), ("patch scores", data.patch_scores, patch_scores)):
        if own.shape[1:] != added.shape[1:]:
            raise ValueError(
                f"reward.examples: {name!r} gives {what} {list(added.shape[1:])}, the run has {list(own.shape[1:])}; "
                "use examples of the run's shape, or none"
            )
