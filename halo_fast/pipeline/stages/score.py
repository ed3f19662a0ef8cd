"""The stage that scores every candidate with the trained reward model."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from halo_fast.data.clips import read_clip
from halo_fast.files import progress, read_table, write_parquet
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards.model import RewardModel, Rewards

__all__ = ["score", "score_columns"]


def score(config: Config, run: Run) -> None:
    """Score all clips of generate, video and patches in one pass; a stage. Writes score/scores.parquet.

    Raises:
        UserError: a clip that is missing or unreadable.
    """
    import pyarrow

    model_folder = run.require("reward/model.safetensors").parent
    folder = run.require("generate/clips.parquet").parent
    settings = asdict(config.score) | {"grid": config.grid}
    with run.stage("score", settings, {"model": model_folder, "clips": folder}) as stage:
        if stage.done:
            return
        model = RewardModel.load(model_folder)
        clips = read_table(folder / "clips.parquet").to_pylist()
        size = config.score.batch_size
        batches = [clips[start : start + size] for start in range(0, len(clips), size)]
        columns: dict[str, list[Any]] = {"clip_id": [clip["clip_id"] for clip in clips]}
        for batch in progress(batches, len(batches), "score"):
            videos = torch.stack([read_clip(folder / clip["video"]) for clip in batch])
            rewards = model(videos, [clip["prompt"] for clip in batch], config.grid)
            for name, values in score_columns(model, rewards).items():
                columns.setdefault(name, []).extend(values.tolist())
        write_parquet(stage.folder / "scores.parquet", pyarrow.table(columns))
        stage.finish({"clips": len(clips)})


def score_columns(model: RewardModel, rewards: Rewards) -> dict[str, Tensor]:
    """The columns of scores.parquet: video_<dimension> [N] and patch_<dimension> [N, P], patches f-major."""
    video = {f"video_{name}": rewards.video[:, i] for i, name in enumerate(model.config.video_dimensions)}
    patches = {
        f"patch_{name}": rewards.patches[:, i].flatten(1) for i, name in enumerate(model.config.patch_dimensions)
    }
    return video | patches
