"""A reward model of this library as a judge: one that training did not optimise, trained on other labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halo_fast.files import progress
from halo_fast.judges.base import JudgeTable, Video, read_video
from halo_fast.patches import LatentFactors
from halo_fast.rewards import RewardModel
from halo_fast.rewards.model import model_folder

__all__ = ["reward_model"]


@torch.no_grad()
def reward_model(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    model: str,
    grid: tuple[int, int, int],
    factors: LatentFactors | None = None,
) -> JudgeTable:
    """Video scores, and the mean of the patch scores, of a reward model's folder.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of each clip.
        fps: not read.
        device: of the computation.
        model: folder that `halo reward` or RewardModel.save wrote, or the name of a shipped one, "fetv".
        grid: patches (f, h, w) whose scores are averaged.
        factors: how latents lie on the clips; None for those that the model was trained on.

    Raises:
        UserError: no reward model there.
    """
    judge = RewardModel.load(model_folder(model), device, factors)
    rows = []
    for clip, prompt in progress(zip(clips, prompts, strict=True), len(clips), "judge reward_model"):
        video, patches = judge.by_dimension(judge(read_video(clip)[None], [prompt], grid))
        row = {name: float(score) for name, score in video.items()}
        rows.append(row | {f"patch_{name}": float(scores.mean()) for name, scores in patches.items()})
    return JudgeTable("reward_model", rows)
