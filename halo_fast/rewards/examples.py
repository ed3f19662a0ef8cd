"""Further labelled clips that train a reward model beside those that a teacher labelled, by registered name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.files import scratch_tensor
from halo_fast.registry import create
from halo_fast.rewards.clips import LabelledClips

__all__ = ["add_examples"]

_DIMENSION = "visual_quality"  # the video score that follows from the patches


def add_examples(data: LabelledClips, name: str, count: int, seed: int, folder: Path | None = None) -> LabelledClips:
    """The clips, joined by examples of which the quality of the patches is known.

    Video scores that are not given are NaN; visual_quality is then the mean of the patches.

    Args:
        data: clips with the single patch dimension "quality".
        name: registered as "reward examples", or dotted: a callable(count, seed) that returns videos uint8
            [N, F, H, W, 3], N prompts, quality [N, f, h, w] from 1 to 5 and, if they are known, video scores [N] by
            the names of their dimensions.
        count: of examples.
        seed: of their random choices.
        folder: on whose disk the frames of all clips lie; None keeps them in memory.

    Raises:
        UserError: no such examples, or scores that do not fit.
        ValueError: clips or patches of another shape than the data's.
    """
    found = create("reward examples", name, "reward.examples", count, seed)
    if not isinstance(found, tuple | list) or len(found) not in (3, 4) or not torch.is_tensor(found[0]):
        raise UserError(
            f"reward.examples: expected {name!r} to give videos, prompts and quality, and video scores if it knows "
            f"them; got {type(found).__name__}" + (f" of {len(found)}" if isinstance(found, tuple | list) else "")
        )
    videos, prompts, quality, *scores = found
    _check(data, videos, quality[:, None], name)
    video_scores = _video_scores({_DIMENSION: quality.flatten(1).mean(dim=1)}, data.video_dimensions, len(videos))
    for given in scores:
        known = _video_scores(
            _checked(given, data.video_dimensions, len(videos), name), data.video_dimensions, len(videos)
        )
        video_scores = torch.where(known.isnan(), video_scores, known)
    shape = (len(data) + len(videos), *videos.shape[1:])
    return replace(
        data,
        videos=torch.cat((data.videos, videos), out=scratch_tensor(folder, shape, videos.dtype)),
        prompts=data.prompts + list(prompts),
        video_scores=torch.cat((data.video_scores, video_scores)),
        patch_scores=torch.cat((data.patch_scores, quality[:, None])),
    )


def _video_scores(scores: Mapping[str, Tensor], dimensions: Sequence[str], count: int) -> Tensor:
    """Scores [N, D] of all dimensions; NaN where none is given."""
    found = torch.full((count, len(dimensions)), math.nan)
    for column, dimension in enumerate(dimensions):
        if dimension in scores:
            found[:, column] = scores[dimension]
    return found


def _checked(scores: Any, dimensions: Sequence[str], count: int, name: str) -> Mapping[str, Tensor]:
    """The video scores that examples give, checked."""
    expected = f"reward.examples: expected the video scores of {name!r} to be"
    if not isinstance(scores, Mapping) or not all(map(torch.is_tensor, scores.values())):
        raise UserError(f"{expected} a tensor for each dimension, got {type(scores).__name__}")
    for dimension, values in scores.items():
        if dimension not in dimensions:
            raise UserError(f"{expected} of {', '.join(dimensions)}, got {dimension!r}")
        if values.shape != (count,) or bool(((values < 1) | (values > 5)).any()):
            raise UserError(f"{expected} {count} from 1 to 5 or NaN, got {dimension} {list(values.shape)}")
    return scores


def _check(data: LabelledClips, videos: Tensor, patch_scores: Tensor, name: str) -> None:
    for what, own, added in (("clips", data.videos, videos), ("patch scores", data.patch_scores, patch_scores)):
        if own.shape[1:] != added.shape[1:]:
            raise ValueError(
                f"reward.examples: {name!r} gives {what} {list(added.shape[1:])}, the run has {list(own.shape[1:])}; "
                "use examples of the run's shape, or none"
            )
