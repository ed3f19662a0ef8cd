"""The stage that trains the reward model."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from halo_fast import processes
from halo_fast.data.clips import read_clip
from halo_fast.data.labels import has_scores, join_labels
from halo_fast.errors import UserError
from halo_fast.files import scratch_tensor, write_csv, write_json
from halo_fast.pipeline.clips import RunClips, run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards import LabelledClips, RewardModelConfig, train_reward_model
from halo_fast.rewards.clips import heldout_prompts
from halo_fast.rewards.examples import add_examples
from halo_fast.rewards.model import chosen_precision, model_folder, read_config, write_factors

__all__ = ["HELDOUT_FILE", "read_labels", "train_reward"]

HELDOUT_FILE = "heldout.json"  # the run's prompts whose labels calibrate the model and do not train it


def train_reward(config: Config, run: Run) -> None:
    """Train the reward model on imported labels and those of annotate, on all processes; a stage.

    In a later round these are the labels of all rounds so far. Writes model.safetensors, config.json, history.csv and
    heldout.json. With config.reward_model these are that model's.

    Args:
        config: reward holds the settings.
        run: the run directory.

    Raises:
        UserError: no annotated clips, or one that cannot be read.
    """
    if config.reward_model:
        _take_trained(model_folder(config.reward_model), run)
        return
    clips = run_clips(run, earlier=True)
    labels = {name: table for one in run.rounds for name, table in _tables(one).items()}
    reward = config.reward
    settings = asdict(reward) | {"seed": config.seed}
    with run.stage("reward", settings, labels | clips.inputs) as stage:
        if stage.done:
            return
        model_config, data = read_labels(list(labels.values()), clips, reward.patch_steps > 0, stage.folder)
        own = data.prompts
        try:
            if reward.examples:
                data = add_examples(data, reward.examples, reward.num_examples, config.seed, stage.folder)
        except ValueError as error:
            raise UserError(str(error)) from error
        if processes.is_first():
            heldout = heldout_prompts(data.prompts, reward.held_out_share, config.seed)
            write_json(stage.folder / HELDOUT_FILE, {"prompts": sorted(heldout & set(own))})
        model_config = replace(
            model_config, pretrained=reward.pretrained, backbone=reward.backbone, lora_rank=reward.lora_rank,
            quantization=reward.quantization, precision=processes.by_first(lambda: chosen_precision(reward)),
            fps=config.generate.fps,
        )  # fmt: skip
        checkpoint = stage.folder / "checkpoint.safetensors"
        outputs = [stage.folder / name for name in ("model.safetensors", "config.json", "history.csv")]
        if processes.by_first(lambda: checkpoint.exists() or not all(path.exists() for path in outputs)):
            model, history = train_reward_model(model_config, data, reward, config.seed, checkpoint)
            if not processes.is_first():
                return
            model.save(stage.folder)
            write_csv(stage.folder / "history.csv", history)
            checkpoint.unlink(missing_ok=True)
        if processes.is_first():
            stage.finish({"clips": len(data), "steps": reward.video_steps + reward.patch_steps})


def _take_trained(folder: Path, run: Run) -> None:
    """Copy a trained model into the run, whose patches are from then on those of the run's latents."""
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"reward_model: no reward model in {folder}; give a folder that `halo reward` wrote")
    if folder.resolve() == (run.path / "reward").resolve():
        raise UserError(f"reward_model: {folder} is this run's own, which is taken anyway; leave it out")
    known, factors = read_config(folder / "config.json").factors, run_clips(run).factors()
    others = factors if factors != known else None
    with run.stage("reward", {"factors": others} if others else {}, {"reward_model": folder}) as stage:
        if stage.done or not processes.is_first():
            return
        records = shutil.ignore_patterns("manifest.json", "pending.json", ".*")
        shutil.copytree(folder, stage.folder, ignore=records, dirs_exist_ok=True)
        if others:
            write_factors(stage.folder / "config.json", others)
        stage.finish({"taken": 1})


def _tables(run: Run) -> dict[str, Path]:
    """The tables of labels that a round has: people's that were imported, and the teacher's."""
    config, tables = run.config, {}
    imported = processes.by_first((run.path / "import" / "labels.parquet").exists)
    if config.imports.sources and imported:
        tables["imported labels"] = run.require("import/labels.parquet")
    if config.annotate.teacher or not tables:
        name = "labels" if run.number == 1 else f"labels of {run.path.name}"
        tables[name] = run.require("annotate/labels.parquet")
    return tables


def read_labels(
    tables: Sequence[Path], clips: RunClips, patches: bool = True, folder: Path | None = None
) -> tuple[RewardModelConfig, LabelledClips]:
    """The labelled clips, F * H * W * 3 bytes each, and the model's config that fits them.

    Args:
        tables: labels.parquet of one or several; rows whose status is not "ok" are left out. Of a clip in several the
            scores of the first count, and those of the next where it has none.
        clips: of the run.
        patches: whether a label of a patch is needed; without any the model scores whole videos only.
        folder: on whose disk the clips' frames lie; None keeps them in memory.

    Raises:
        UserError: no usable label, a clip that is missing or unreadable, clips of several sizes.
    """
    place = tables[-1]
    rows = join_labels(tables)
    if not rows:
        raise UserError(f"{place}: no clip has a label; annotate more clips or use another teacher")
    known = {clip.clip_id: clip for clip in clips.rows}
    strays = [row.clip_id for row in rows if row.clip_id not in known]
    if strays:
        raise UserError(f"{place}: clip {strays[0]} is not in {clips.folder}; run `halo annotate --force`")
    found = [known[row.clip_id] for row in rows]
    videos = _read_videos([clips.folder / clip.video for clip in found], clips.folder, folder)
    # a dimension without any score would be made up by the model
    video_dimensions = _scored([row.video for row in rows])
    patch_dimensions = _scored([row.patches for row in rows])
    if patches and not patch_dimensions:
        raise UserError(
            f"{place}: no patch has a score; have patches scored too, or set reward.patch_steps to 0 for a reward of "
            "whole videos"
        )
    missing = [math.nan] * math.prod(rows[0].grid)
    patch_scores = torch.tensor(
        [[row.patches.get(name, missing) for name in patch_dimensions] for row in rows], dtype=torch.float32
    )
    data = LabelledClips(
        videos,
        [clip.prompt for clip in found],
        torch.tensor([[row.video.get(name, math.nan) for name in video_dimensions] for row in rows]),
        patch_scores.reshape(len(rows), len(patch_dimensions), *rows[0].grid),
        video_dimensions,
        patch_dimensions,
    )
    factors = clips.factors()
    return RewardModelConfig(video_dimensions, patch_dimensions, **(factors._asdict() if factors else {})), data


def _read_videos(files: Sequence[Path], place: Path, folder: Path | None) -> torch.Tensor:
    """The frames of clips of one size, uint8 [N, F, H, W, 3]; one clip after another is decoded."""
    first = read_clip(files[0])
    videos = scratch_tensor(folder, (len(files), *first.shape), torch.uint8)
    for index, file in enumerate(processes.shown(files, "reward: reading clips")):
        video = read_clip(file)
        if video.shape != first.shape:
            sizes = [" x ".join(map(str, one.shape[:3])) for one in (video, first)]
            raise UserError(
                f"{place}: reward training takes clips of one size, got {sizes[0]} of {file.name} and {sizes[1]} of "
                f"{files[0].name}; make them alike (imports.size crop, imports.frames trim), or set reward_model"
            )
        videos[index] = video
    return videos


def _scored(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The dimensions in which any clip has a score."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(name for name in names if any(name in row and has_scores(row[name]) for row in rows))
