"""The stage that trains the reward model."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from halo_fast.data.clips import latent_factors, read_clip
from halo_fast.data.tables import ClipRow, LabelRow, read_rows
from halo_fast.errors import UserError
from halo_fast.files import write_csv
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards import LabelledClips, RewardModelConfig, train_reward_model
from halo_fast.rewards.examples import add_examples

__all__ = ["read_labels", "train_reward"]


def train_reward(config: Config, run: Run) -> None:
    """Train the reward model on annotate/labels.parquet; a stage. Writes model.safetensors, config.json, history.csv.

    Args:
        config: reward holds the settings.
        run: the run directory.

    Raises:
        UserError: no annotated clips, or one that cannot be read.
    """
    labels = run.require("annotate/labels.parquet")
    clips = run.require("generate/clips.parquet").parent
    reward = config.reward
    settings = asdict(reward) | {"seed": config.seed}
    with run.stage("reward", settings, {"labels": labels, "clips": clips}) as stage:
        if stage.done:
            return
        model_config, data = read_labels(labels, clips)
        try:
            if reward.examples:
                data = add_examples(data, reward.examples, reward.num_examples, config.seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        model_config = replace(
            model_config, pretrained=reward.pretrained, backbone=reward.backbone, lora_rank=reward.lora_rank
        )
        checkpoint = stage.folder / "checkpoint.safetensors"
        outputs = [stage.folder / name for name in ("model.safetensors", "config.json", "history.csv")]
        if checkpoint.exists() or not all(path.exists() for path in outputs):
            model, history = train_reward_model(model_config, data, reward, config.seed, checkpoint)
            model.save(stage.folder)
            write_csv(stage.folder / "history.csv", history)
            checkpoint.unlink(missing_ok=True)
        stage.finish({"clips": len(data), "steps": reward.video_steps + reward.patch_steps})


def read_labels(labels: Path, clips: Path) -> tuple[RewardModelConfig, LabelledClips]:
    """The annotated clips in memory (F * H * W * 3 bytes each), and the model's config that fits them.

    Args:
        labels: a labels.parquet; rows whose status is not "ok" are left out.
        clips: folder of the stage generate.

    Raises:
        UserError: no usable label, a clip that is missing or unreadable, clips of several sizes.
    """
    rows = [row for row in read_rows(labels, LabelRow) if row.status == "ok"]
    if not rows:
        raise UserError(f"{labels}: no clip has a label; annotate more clips or use another teacher")
    known = {clip.clip_id: clip for clip in read_rows(clips / "clips.parquet", ClipRow)}
    strays = [row.clip_id for row in rows if row.clip_id not in known]
    if strays:
        raise UserError(f"{labels}: clip {strays[0]} is not in {clips}; run `halo annotate --force`")
    found = [known[row.clip_id] for row in rows]
    videos = [read_clip(clips / clip.video) for clip in found]
    sizes = {tuple(video.shape) for video in videos}
    if len(sizes) > 1:
        raise UserError(f"{clips}: expected clips of one size, got {sorted(sizes)}; make them alike")
    # a dimension without any score would be made up by the model
    video_dimensions = tuple(name for name in rows[0].video if not np.isnan([row.video[name] for row in rows]).all())
    patch_dimensions = tuple(
        name for name in rows[0].patches if not np.isnan([row.patches[name] for row in rows]).all()
    )
    if not patch_dimensions:
        raise UserError(f"{labels}: no patch has a score; have patches scored too")
    patch_scores = torch.tensor([[row.patches[name] for name in patch_dimensions] for row in rows])
    data = LabelledClips(
        torch.stack(videos),
        [clip.prompt for clip in found],
        torch.tensor([[row.video[name] for name in video_dimensions] for row in rows]),
        patch_scores.reshape(len(rows), len(patch_dimensions), *rows[0].grid),
        video_dimensions,
        patch_dimensions,
    )
    return RewardModelConfig(video_dimensions, patch_dimensions, *(latent_factors(clips, found[0]) or ())), data
