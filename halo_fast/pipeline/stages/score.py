"""The stage that scores every candidate with the trained reward model."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from halo_fast import processes
from halo_fast.data.clips import motion_amount, read_clip
from halo_fast.data.tables import ClipRow, ScoreRow, shared_rows, write_rows
from halo_fast.files import hash_bytes
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards import RewardModel

__all__ = ["score"]


@torch.no_grad()
def score(config: Config, run: Run) -> None:
    """Score all clips of the run, video and patches in one pass; a stage. Writes score/scores.parquet.

    Args:
        config: score holds the batch size.
        run: the run directory.

    Raises:
        UserError: a clip that is missing or unreadable.
    """
    model_folder = run.require("reward/model.safetensors").parent
    clips_of_run = run_clips(run)
    folder, clips, size = clips_of_run.folder, clips_of_run.rows, config.score.batch_size
    settings = asdict(config.score) | {"grid": config.grid}
    with run.stage("score", settings, {"model": model_folder, **clips_of_run.inputs}) as stage:
        if stage.done:
            return
        model = RewardModel.load(model_folder)

        def score_batch(batch: Sequence[ClipRow]) -> list[ScoreRow]:
            videos = torch.stack([read_clip(folder / clip.video) for clip in batch])
            video, patches = model.by_dimension(model(videos, [clip.prompt for clip in batch], config.grid))
            return [
                ScoreRow(
                    clip.clip_id,
                    {name: values[index].item() for name, values in video.items()},
                    {name: values[index].tolist() for name, values in patches.items()},
                    motion_amount(videos[index]),
                    hash_bytes(videos[index].numpy().tobytes()),
                )
                for index, clip in enumerate(batch)
            ]

        batches = [clips[start : start + size] for start in range(0, len(clips), size)]
        rows = shared_rows(stage.folder, "clips", batches, score_batch, ScoreRow)
        if not processes.is_first():
            return
        write_rows(stage.folder / "scores.parquet", rows)
        stage.finish({"clips": len(clips)})
