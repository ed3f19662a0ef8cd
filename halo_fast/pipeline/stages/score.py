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
            videos = [read_clip(folder / clip.video) for clip in batch]
            rows: dict[int, ScoreRow] = {}
            for shape in dict.fromkeys(video.shape for video in videos):
                places = [place for place, video in enumerate(videos) if video.shape == shape]
                alike = torch.stack([videos[place] for place in places])
                rewards = model(alike, [batch[place].prompt for place in places], config.grid)
                video_scores, patch_scores = model.by_dimension(rewards)
                for index, place in enumerate(places):
                    rows[place] = ScoreRow(
                        batch[place].clip_id,
                        {name: values[index].item() for name, values in video_scores.items()},
                        {name: values[index].tolist() for name, values in patch_scores.items()},
                        motion_amount(alike[index]),
                        hash_bytes(alike[index].numpy().tobytes()),
                    )
            return [rows[place] for place in range(len(batch))]

        batches = [clips[start : start + size] for start in range(0, len(clips), size)]
        rows = shared_rows(stage.folder, "clips", batches, score_batch, ScoreRow)
        if not processes.is_first():
            return
        write_rows(stage.folder / "scores.parquet", rows)
        stage.finish({"clips": len(clips)})
