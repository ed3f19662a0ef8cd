"""Reward models against scores of patches, beside what sees less of them and what the labeller says a second time."""

import logging
import math
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.agreement.baselines import (
    folds_by_name,
    local_ssim,
    patch_statistics,
    predict_ridge,
    prompt_features,
)
from halo_fast.agreement.figures import patch_figures
from halo_fast.agreement.people import cross_validate, rater_mean
from halo_fast.agreement.tables import Table
from halo_fast.data.importers import PatchScores, Ratings, load_frames
from halo_fast.files import progress, scratch_tensor
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig

__all__ = [
    "PATCH_FOLDS",
    "clip_format",
    "clip_in_parts",
    "labelled_clips",
    "patch_labels_table",
    "patch_model_config",
    "patch_reward_config",
]

logger = logging.getLogger(__name__)

PATCH_FOLDS = 8
"""Folds by prompt."""

_FRAMES, _SIDE = 16, 256
_ALIGNED = 0.5  # SSIM from which two clips show the same scene at the same time


def patch_labels_table(
    ratings: Ratings, seed: int = 0, model: RewardModel | None = None, resamples: int = 300
) -> Table:
    """Patch scores against the labels of a labeller's complete passes, with eight folds by prompt.

    Rows: the reward model, trained on the other folds; `model` as it is, if there is one; what each cell, generator,
    both or the prompt alone predict; a ridge on statistics of pixels; SSIM to another clip of the prompt, where two
    clips are aligned; the labeller's second pass against the first, the ceiling.

    Args:
        ratings: clips with `patches`.
        seed: of folds, training and bootstrap.
        model: a trained reward model with patch scores.
        resamples: draws of the bootstrap over prompts.

    Raises:
        UserError: a clip that cannot be read.
    """
    if ratings.patches is None:
        raise ValueError("ratings: expected patches, got None")
    patches, prompts = ratings.patches, ratings.prompts
    config = patch_model_config()
    data = labelled_clips(patches, prompts, config)
    count, grid = len(data), tuple(patches.scores.shape[2:])
    complete = [one for one in patches.scores.swapaxes(0, 1) if not np.isnan(one).any()] or [rater_mean(patches.scores)]
    truth = np.mean(complete, axis=0).reshape(count, -1)
    folds = folds_by_name(prompts, PATCH_FOLDS, seed)
    learned = rater_mean(patches.scores).reshape(count, -1)
    rows = {"kernel model": cross_validate(config, data, patch_reward_config(), folds, seed, "folds")[1]}
    if model is not None:
        rows["the model given"] = _score(model, patches, prompts)
    rows |= _baselines(ratings, learned, folds, grid)
    table = {
        name: patch_figures(scores.reshape(count, -1), truth, prompts, folds, resamples=resamples, seed=seed)
        for name, scores in rows.items()
    }
    table |= _aligned_row(data, truth, folds, grid, resamples, seed)
    if len(complete) > 1:
        first, second = (one.reshape(count, -1) for one in complete[:2])
        table["test-retest (ceiling)"] = patch_figures(second, first, prompts, folds, resamples=resamples, seed=seed)
    return table


def patch_model_config() -> RewardModelConfig:
    """Of the reward model that is cross-validated: every frame and 16 x 16 pixels are a position of the latent."""
    return RewardModelConfig(("visual_quality",), spatial_factor=16, temporal_factor=1, causal=False, backbone="kernel")


def patch_reward_config() -> RewardConfig:
    """Of its training."""
    return RewardConfig(video_steps=0, patch_steps=0, held_out_share=0, backbone="kernel")


def labelled_clips(patches: PatchScores, prompts: Sequence[str], config: RewardModelConfig) -> LabelledClips:
    """The clips at one size with the mean score of each patch; the video's score is the mean of its patches.

    Args:
        patches: of N clips.
        prompts: of each.
        config: of the model that reads them.
    """
    grid = patches.scores.shape[2:]
    form = clip_format(config, grid)
    sides = (len(prompts), sum(form.parts), form.height, form.width, 3)
    with tempfile.TemporaryDirectory() as folder:
        # without a name in the folder, the file lasts as long as the tensor
        videos = scratch_tensor(Path(folder), sides, torch.uint8)
    for index, clip in enumerate(progress(patches.clips, len(prompts), "reading clips")):
        videos[index] = clip_in_parts(load_frames(clip), form)
    scores = torch.from_numpy(rater_mean(patches.scores)).float()[:, None]
    return LabelledClips(videos, list(prompts), scores.flatten(2).nanmean(dim=2), scores, ("visual_quality",))


class ClipFormat(NamedTuple):
    """Frames of each part of a clip, and its height and width in pixels."""

    parts: tuple[int, ...]
    height: int
    width: int


def clip_format(config: RewardModelConfig, grid: Sequence[int]) -> ClipFormat:
    """The format in which patches of a model's latent are those of the grid: about 16 frames of about 256 pixels."""
    step, alone, padding = config.temporal_factor, int(config.causal), config.padding
    latents = max(grid[0] * (1 + padding), ((_FRAMES - alone) // step + alone + padding) // grid[0] * grid[0])
    side = math.lcm(8, config.spatial_factor * math.lcm(grid[1], grid[2]))
    side *= max(1, round(_SIDE / side))
    edges = config.patches(grid, ((latents - padding - alone) * step + alone, side, side)).pixel_edges(0)
    return ClipFormat(tuple(np.diff(edges).tolist()), side, side)


def clip_in_parts(clip: Tensor, form: ClipFormat) -> Tensor:
    """A clip uint8 [F, H, W, 3] resized, with evenly spread frames of each of its equally long parts.

    Part k of n covers the frames floor(k F/n) to floor((k+1) F/n); the proportions are not kept.

    Args:
        clip: of at least one frame a part.
        form: frames of each part, and the size.
    """
    count = len(form.parts)
    edges = [part * len(clip) // count for part in range(count + 1)]
    chosen = [
        start + (2 * number + 1) * (end - start) // (2 * frames)
        for start, end, frames in zip(edges, edges[1:], form.parts, strict=False)
        for number in range(frames)
    ]
    pictures = clip[chosen].movedim(-1, 1).float()
    pictures = F.interpolate(pictures, [form.height, form.width], mode="bicubic", antialias=True)
    return pictures.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous()


@torch.no_grad()
def _score(model: RewardModel, patches: PatchScores, prompts: Sequence[str]) -> NDArray[np.float64]:
    """Mean patch score [N, f, h, w] over the model's patch dimensions; one clip at a time is in memory."""
    grid = patches.scores.shape[2:]
    form = clip_format(model.config, grid)
    found = [
        model(clip_in_parts(load_frames(clip), form)[None], [prompt], grid).patches[0].mean(dim=0)
        for clip, prompt in progress(zip(patches.clips, prompts, strict=True), len(prompts), "scoring clips")
    ]
    return torch.stack(found).double().numpy()


def _baselines(
    ratings: Ratings, labels: NDArray[np.float64], folds: NDArray[np.int64], grid: tuple[int, ...]
) -> dict[str, NDArray[np.float64]]:
    """What the labels [N, P] of other folds say of a patch by its place, generator, prompt and pixels."""
    everything = np.zeros(len(labels), dtype=int)
    generators = np.unique(ratings.generators or [""] * len(labels), return_inverse=True)[1]
    known = {"place only": _other_means(labels, everything, folds)}
    if ratings.generators is not None:
        by_place = _other_means(labels, generators, folds)
        known["generator only"] = np.broadcast_to(by_place.mean(axis=1, keepdims=True), by_place.shape)
        known["generator and place"] = by_place
    prompt = predict_ridge(prompt_features(ratings.prompts), np.nanmean(labels, axis=1), folds)
    known["prompt only"] = np.broadcast_to(prompt[:, None], labels.shape)
    clips = ratings.patches.clips if ratings.patches else ()
    pixels = np.concatenate([patch_statistics(load_frames(clip)[None], (grid[0], grid[1], grid[2])) for clip in clips])
    flat = predict_ridge(pixels.reshape(labels.size, -1), labels.ravel(), np.repeat(folds, labels.shape[1]))
    return known | {"frame statistics": flat.reshape(labels.shape)}


def _other_means(
    labels: NDArray[np.float64], groups: NDArray[np.int64], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each clip the mean labels [N, P] of its group's clips in other folds; of all clips there if it has none."""
    means = []
    for fold, group in zip(folds, groups, strict=True):
        others = folds != fold
        alike = others & (groups == group)
        means.append(np.nanmean(labels[alike if alike.any() else others], axis=0))
    return np.stack(means)


def _quarter(video: Tensor) -> Tensor:
    """A clip uint8 [F, H, W, 3] at a quarter of its size, float."""
    return F.avg_pool3d(video.movedim(-1, 0).float(), (1, 4, 4)).movedim(0, -1)


def _aligned_row(
    data: LabelledClips,
    truth: NDArray[np.float64],
    folds: NDArray[np.int64],
    grid: tuple[int, ...],
    resamples: int,
    seed: int,
) -> Table:
    """Local SSIM to the clip of its prompt that is most like it, where two show one scene; no row where none do."""
    partner, likeness = np.zeros(len(data), dtype=int), np.full(len(data), -1.0)
    for prompt in dict.fromkeys(data.prompts):
        group = [clip for clip, own in enumerate(data.prompts) if own == prompt]
        small = {clip: _quarter(data.videos[clip]) for clip in group}
        for pair in combinations(group, 2):
            alike = local_ssim(small[pair[0]], small[pair[1]], (1, 1, 1)).item()
            for clip, other in (pair, pair[::-1]):
                if alike > likeness[clip]:
                    partner[clip], likeness[clip] = other, alike
    aligned = np.flatnonzero(likeness >= _ALIGNED)
    logger.info(
        "local SSIM: %d of %d clips are aligned with another of their prompt; SSIM, at a quarter of the size, is up to "
        "%.2f, and aligned from %g on", len(aligned), len(data), likeness.max(), _ALIGNED,
    )  # fmt: skip
    if not len(aligned):
        return {}
    prompts = [data.prompts[clip] for clip in aligned]
    scores = np.stack([local_ssim(data.videos[clip], data.videos[partner[clip]], grid).ravel() for clip in aligned])
    figures = patch_figures(scores, truth[aligned], prompts, folds[aligned], resamples=resamples, seed=seed)
    return {f"local SSIM ({len(aligned)} aligned clips)": figures}
