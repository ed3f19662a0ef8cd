"""The stage that trains the reward model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halo_fast.data.clips import latent_factors, read_clip
from halo_fast.data.tables import ClipRow
from halo_fast.errors import UserError
from halo_fast.files import write_csv
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards.model import RewardModelConfig
from halo_fast.rewards.training import LabelledClips, fit

__all__ = ["read_labels", "train_reward"]


_EXAMPLES = 768

_EXAMPLE_SEED = 31


def train_reward(config: Config, run: Run) -> None:
    """Train the reward model on annotate/labels.parquet; a stage. Writes model.safetensors, config.json, history.csv.

    Raises:
        UserError: no annotated clips, or one that cannot be read.
    """
    labels = run.require("annotate/labels.parquet")
    clips = run.require("generate/clips.parquet").parent
    settings = asdict(config.reward) | {"seed": config.seed}
    # in the demo's world nothing falls, so a clip upside down is as true as any
    demo = config.prompts.startswith("demo:")
    reward = replace(config.reward, mirror=config.reward.mirror or ("both" if demo else "horizontal"))
    count = reward.examples
    if count is None:
        count = _EXAMPLES if config.annotate.teacher == "demo" else 0
    with run.stage("reward", settings, {"labels": labels, "clips": clips}) as stage:
        if stage.done:
            return
        model_config, data = read_labels(labels, clips)
        if count:
            data = _with_examples(data, count, config.seed)
        model_config = replace(
            model_config,
            pretrained=reward.pretrained,
            backbone=reward.backbone,
            lora_rank=reward.lora_rank,
        )
        checkpoint = stage.folder / "checkpoint.safetensors"
        outputs = [stage.folder / name for name in ("model.safetensors", "config.json", "history.csv")]
        if checkpoint.exists() or not all(path.exists() for path in outputs):
            model, history = fit(model_config, data, reward, config.seed, checkpoint)
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
    import pyarrow.parquet

    rows = [row for row in pyarrow.parquet.read_table(labels).to_pylist() if row["status"] == "ok"]
    if not rows:
        raise UserError(f"{labels}: no clip has a label; annotate more clips or use another teacher")
    known = {clip["clip_id"]: clip for clip in pyarrow.parquet.read_table(clips / "clips.parquet").to_pylist()}
    strays = [row["clip_id"] for row in rows if row["clip_id"] not in known]
    if strays:
        raise UserError(f"{labels}: clip {strays[0]} is not in {clips}; run `halo annotate --force`")
    found = [known[row["clip_id"]] for row in rows]
    videos = [read_clip(clips / clip["video"]) for clip in found]
    sizes = {tuple(video.shape) for video in videos}
    if len(sizes) > 1:
        raise UserError(f"{clips}: expected clips of one size, got {sorted(sizes)}; make them alike")
    # what nobody scored is not learned, and a model that scored it all the same would make numbers up
    scored = [name for name in rows[0] if name.startswith(("video_", "patch_")) and _labelled(rows, name)]
    video_dimensions = tuple(name.removeprefix("video_") for name in scored if name.startswith("video_"))
    patch_dimensions = tuple(name.removeprefix("patch_") for name in scored if name.startswith("patch_"))
    if not patch_dimensions:
        raise UserError(f"{labels}: no patch has a score; have patches scored too")
    patch_scores = [[row[f"patch_{name}"] for name in patch_dimensions] for row in rows]
    data = LabelledClips(
        torch.stack(videos),
        [clip["prompt"] for clip in found],
        torch.tensor([[row[f"video_{name}"] for name in video_dimensions] for row in rows]),
        torch.tensor(patch_scores).reshape(len(rows), len(patch_dimensions), *rows[0]["grid"]),
        video_dimensions,
        patch_dimensions,
    )
    factors = latent_factors(clips, ClipRow(**found[0])) or ()
    return RewardModelConfig(video_dimensions, patch_dimensions, *factors), data


def _with_examples(data: LabelledClips, count: int, seed: int) -> LabelledClips:
    """The demo teacher's labels, joined by examples of its world, of which no other video score than visual_quality is
    known."""
    from halo_fast.demo.examples import examples

    videos, prompts, quality = examples(count, _EXAMPLE_SEED + seed)
    video_scores = torch.full((count, len(data.video_dimensions)), math.nan)
    video_scores[:, data.video_dimensions.index("visual_quality")] = quality.flatten(1).mean(dim=1)
    return replace(
        data,
        videos=torch.cat((data.videos, videos)),
        prompts=data.prompts + prompts,
        video_scores=torch.cat((data.video_scores, video_scores)),
        patch_scores=torch.cat((data.patch_scores, quality[:, None])),
    )


def _labelled(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return not np.isnan(np.array([row[name] for row in rows], dtype=float)).all()
