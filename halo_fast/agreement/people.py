"""Reward models against people's labels: ratings of clips, marks in pictures, preferences between two clips."""

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from halo_fast import processes
from halo_fast.agreement.baselines import (
    folds_by_name,
    frame_statistics,
    group_means,
    patch_statistics,
    predict_ridge,
    prompt_features,
)
from halo_fast.agreement.figures import (
    Figure,
    centred,
    pair_agreement,
    patch_agreement,
    rater_ceiling,
    video_agreement,
)
from halo_fast.agreement.tables import Table
from halo_fast.data.importers import Preference, Ratings, load_frames, pool_marks
from halo_fast.errors import UserError
from halo_fast.files import progress
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.training import frozen_features

__all__ = ["cross_validate", "marks_table", "preferences_table", "rater_mean", "ratings_tables"]

logger = logging.getLogger(__name__)

_RATING_FOLDS, _MARK_FOLDS = 5, 8
_SIDE, _FRAMES = 32, 9  # of rated clips in training: eighty clips cannot teach fine structure
_MARK_GRID, _MARK_FACTOR = (14, 14), 16
_RATE = 8.0  # frames a second at which clips are sampled, where the model does not say it
_TESTED = 16  # clips of a fold that are scored at once
_ANY = "a picture"  # the prompt where none is known
_MARKED = 0.5  # from half of a map's range a pixel counts as marked: smooth heat maps are nowhere quite 0
_NEAREST = {"motion_quality": ("temporal_consistency", "dynamic_degree")}  # the rubric splits what VideoAlign calls MQ


def ratings_tables(ratings: Ratings, seed: int = 0, resamples: int = 1000) -> dict[str, Table]:
    """For each dimension the cross-validated compact model, the baselines and the agreement of the raters.

    Rows: the model; prompt only (ridge on the prompt's embedding); frame statistics (ridge); generator only (its mean
    label, in sample); raters, one against the mean of the others: the ceiling. Folds never share a prompt. A dimension
    that nobody scored has no table, which is logged.

    Args:
        ratings: clips with scores of one or more raters.
        seed: of folds, training and bootstrap.
        resamples: draws of the bootstrap over prompts.
    """
    names = [name for name, scores in ratings.scores.items() if not np.isnan(scores).all()]
    if len(names) < len(ratings.scores):
        empty = ", ".join(sorted(set(ratings.scores) - set(names)))
        logger.warning("%s: nobody scored %s, which is left out", ratings.source, empty)
    if not names:
        return {}
    videos, statistics = zip(*map(_small, progress(ratings.clips, len(ratings), "reading clips")), strict=True)
    labels = np.stack([rater_mean(ratings.scores[name]) for name in names], axis=1)
    folds = folds_by_name(ratings.prompts, _RATING_FOLDS, seed)
    predictions = {
        "compact model": _predict_ratings(torch.stack(videos), ratings.prompts, labels, names, folds, seed),
        "prompt only": predict_ridge(prompt_features(ratings.prompts), labels, folds),
        "frame statistics": predict_ridge(np.stack(statistics), labels, folds),
    }
    if ratings.generators is not None:
        predictions["generator only"] = group_means(labels, ratings.generators)
    tables = {}
    for column, name in enumerate(names):
        table: Table = {
            row: video_agreement(
                scores[:, column], labels[:, column], ratings.prompts, ratings.generators, resamples, seed
            )
            for row, scores in predictions.items()
        }
        if ratings.scores[name].shape[1] > 1:
            table["raters (ceiling)"] = _ceiling(ratings, name, resamples, seed)
        tables[f"{ratings.source}: {name}, folds by prompt"] = table
    return tables


def _small(clip: Tensor | Path) -> tuple[Tensor, NDArray[np.float64]]:
    """A clip at the size of training, and its statistics; nothing keeps it at its full size."""
    frames = load_frames(clip, _RATE)
    return _resize(frames, _SIDE, _FRAMES), frame_statistics(frames)


def _ceiling(ratings: Ratings, name: str, resamples: int, seed: int) -> dict[str, Figure]:
    """How far the raters of a dimension agree, and what is left of that without prompts and generators."""
    raters = ratings.scores[name]
    figures = {"spearman": rater_ceiling(raters, ratings.prompts, resamples, seed)}
    if ratings.generators is not None and not np.isnan(raters).any():
        left = np.stack([centred(r, ratings.prompts, ratings.generators).round(9) for r in raters.T], axis=1)
        figures["spearman_centred"] = rater_ceiling(left, ratings.prompts, resamples, seed)
    return figures


def _predict_ratings(
    videos: Tensor,
    prompts: Sequence[str],
    labels: NDArray[np.float64],
    names: Sequence[str],
    folds: NDArray[np.int64],
    seed: int,
) -> NDArray[np.float64]:
    """Video scores [N, D] of compact models that never saw the clip's prompt."""
    patches = torch.full((len(videos), 1, 1, 1, 1), torch.nan)
    data = LabelledClips(videos, list(prompts), torch.from_numpy(labels).float(), patches, tuple(names))
    config = RewardConfig(video_steps=60, patch_steps=0)
    return cross_validate(RewardModelConfig(tuple(names)), data, config, folds, seed, "folds")[0]


def cross_validate(
    model_config: RewardModelConfig,
    data: LabelledClips,
    config: RewardConfig,
    folds: NDArray[np.int64],
    seed: int,
    label: str,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of every clip by a reward model that was trained on the other folds.

    Args:
        model_config: of the models.
        data: N labelled clips.
        config: of the trainings.
        folds: [N].
        seed: of the trainings.
        label: of the progress line.

    Returns:
        video scores [N, D] and patch scores [N, Q, f, h, w].
    """
    grid = tuple(data.patch_scores.shape[2:])
    video, patches = np.empty(data.video_scores.shape), np.empty(data.patch_scores.shape)
    with tempfile.TemporaryDirectory() as place:
        folder, all_rows = Path(place), torch.arange(len(data))
        reader = RewardModel(model_config).to(processes.device())
        frozen = frozen_features(reader, data.videos, all_rows, folder)  # once for all folds
        for fold in progress(np.unique(folds), len(np.unique(folds)), label):
            train, test = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (folds != fold, folds == fold))
            model, _ = train_reward_model(model_config, data, config, seed, frozen=frozen, folder=folder, rows=train)
            for rows in test.split(_TESTED):
                tested = data.select(rows)
                with torch.no_grad():
                    features = None if frozen is None else frozen[rows].float()
                    rewards = model(tested.videos, tested.prompts, grid, features)
                video[rows], patches[rows] = rewards.video.numpy(), rewards.patches.numpy()
    return video, patches


def marks_table(ratings: Ratings, seed: int = 0) -> Table:
    """Patch scores against what people marked, with eight folds by picture, beside place and pixel statistics.

    Maps are cut at 0.5, half of their range; a patch is positive if any of it is marked.

    Args:
        ratings: pictures with `marks`.
        seed: of folds, training and bootstrap.

    Raises:
        UserError: pictures of several sizes.
    """
    stills, statistics = _stills(ratings)
    marked = [(mark >= _MARKED).astype(np.float32) for mark in ratings.marks or []]
    shares = pool_marks(marked, *_MARK_GRID).reshape(len(stills), -1)
    names = [str(index) for index in range(len(stills))]
    folds = folds_by_name(names, _MARK_FOLDS, seed)
    flat = predict_ridge(
        statistics.reshape(-1, statistics.shape[-1]), shares.ravel(), np.repeat(folds, shares.shape[1])
    )
    damage = {
        "frames model": _predict_marks(stills, torch.from_numpy(shares), folds, seed),
        "place only": np.stack([shares[folds != fold].mean(axis=0) for fold in folds]),
        "frame statistics": flat.reshape(shares.shape),
    }
    return {row: patch_agreement(-values, shares, names, 0.0, seed=seed) for row, values in damage.items()}


def _stills(ratings: Ratings) -> tuple[Tensor, NDArray[np.float64]]:
    """Of each picture a still uint8 [N, 1, y, x, 3] with one latent position a patch, and statistics [N, P, 14].

    Raises:
        UserError: pictures of several sizes.
    """
    # the frame network reads 224 pixels a side, so nothing is lost; one picture at a time is in memory
    size = [_MARK_FACTOR * side for side in _MARK_GRID]
    sizes: set[tuple[int, ...]] = set()
    stills, statistics = [], []
    for clip in ratings.clips:
        frame = load_frames(clip)[0]
        sizes.add(tuple(frame.shape[:2]))
        if len(sizes) > 1:
            first, second = sorted(sizes)
            raise UserError(f"{ratings.source}: expected pictures of one size, got {first}, {second}; scale them alike")
        statistics.append(patch_statistics(frame[None, None], (1, *_MARK_GRID)))
        still = F.interpolate(frame.permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True)
        stills.append(still.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.stack(stills).contiguous(), np.concatenate(statistics)


def _predict_marks(videos: Tensor, shares: Tensor, folds: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Damage [N, P] that reward models with the backbone "frames" find in pictures that did not train them."""
    targets = 5 - 4 * shares.view(-1, 1, 1, *_MARK_GRID)
    data = LabelledClips(videos, [_ANY] * len(videos), targets.mean(dim=(2, 3, 4)), targets, ("visual_quality",))
    model_config = RewardModelConfig(("visual_quality",), spatial_factor=_MARK_FACTOR, backbone="frames")
    config = RewardConfig(
        video_steps=0, patch_steps=100, learning_rate=2e-3, held_out_share=0, mirror="both", backbone="frames"
    )
    return -cross_validate(model_config, data, config, folds, seed, "marks")[1].reshape(len(videos), -1)


@torch.no_grad()
def preferences_table(pairs: Sequence[Preference], model: RewardModel, resamples: int = 1000) -> Table:
    """Pair accuracy of a model on people's preferences, with ties and without, beside "less motion".

    A dimension that the model lacks is judged by the one nearest in meaning, else by the mean of all; the row says so.
    Clips are sampled at the rate of those that trained the model, or at 8 frames a second. What the model's latents
    cannot hold is cut off: frames at the end, pixels right and below. How often is logged.

    Args:
        pairs: two clips each, and which one people preferred in each dimension.
        model: scores the clips one by one.
        resamples: draws of the bootstrap over prompts.
    """
    prompts = [pair.prompt for pair in pairs]
    gaps, motion, cut = [], [], 0
    rate = model.config.fps or _RATE
    for pair in progress(pairs, len(pairs), "scoring pairs"):
        sides = [_score(clip, pair.prompt, model, rate) for clip in (pair.first, pair.second)]
        gaps.append(sides[0].reward - sides[1].reward)
        motion.append(sides[0].motion - sides[1].motion)
        cut += sum(side.cut for side in sides)
    if cut:
        logger.info("preferences: %d of %d clips were cut to a size that the model's latents hold", cut, 2 * len(pairs))
    scores, columns = torch.stack(gaps).numpy(), model.config.video_dimensions
    table: Table = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair.preferred):
        labels = np.array([2 * pair.preferred.get(name, math.nan) - 1 for pair in pairs])
        nearest = next((other for other in (name, *_NEAREST.get(name, ())) if other in columns), None)
        score = scores.mean(axis=1) if nearest is None else scores[:, columns.index(nearest)]
        judge = "mean of scores" if nearest is None else "model" if nearest == name else f"model's {nearest}"
        table[f"{name}: {judge}"] = pair_agreement(score, labels, prompts, resamples)
        table[f"{name}: less motion"] = pair_agreement(-np.array(motion), labels, prompts, resamples)
    return table


class _Side(NamedTuple):
    """A clip's scores [D], its mean change from frame to frame, and whether a part of it was cut off."""

    reward: Tensor
    motion: float
    cut: bool


def _score(clip: Path | bytes, prompt: str, model: RewardModel, rate: float) -> _Side:
    """Score one clip; nothing keeps its frames."""
    whole = load_frames(clip, rate)
    part = _cut(whole, model.config)
    reward = model(part[None], [prompt], (1, 1, 1)).video[0]
    return _Side(reward, float(frame_statistics(part)[-1]), part.shape != whole.shape)


def rater_mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the raters of scores [N, R, ...], NaN left out; NaN where nobody scored."""
    known = ~np.isnan(scores)
    return np.where(known, scores, 0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)


def _resize(clip: Tensor, side: int, frames: int) -> Tensor:
    """A clip uint8 [F, H, W, 3] as `frames` frames of side x side pixels."""
    clip = clip[torch.linspace(0, len(clip) - 1, frames).round().long()]
    small = F.interpolate(clip.permute(0, 3, 1, 2).float(), [side, side], mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _cut(clip: Tensor, config: RewardModelConfig) -> Tensor:
    """The largest part of a clip uint8 [F, H, W, 3], from its beginning, that the model's latents hold.

    Raises:
        UserError: the clip is too small for one latent position.
    """
    step, alone, side = config.temporal_factor, int(config.causal), math.lcm(8, config.spatial_factor)
    frames = (len(clip) - alone) // step * step + alone
    height, width = (length - length % side for length in clip.shape[1:3])
    if min(frames, height, width) < 1:
        raise UserError(
            f"a clip of {len(clip)} x {clip.shape[1]} x {clip.shape[2]}: expected at least "
            f"{alone or step} x {side} x {side} for this model; leave its row out"
        )
    return clip[:frames, :height, :width].contiguous()
