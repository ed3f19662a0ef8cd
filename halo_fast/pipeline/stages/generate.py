"""Candidates of the base model: k clips of every prompt with recorded seeds, as mp4 and as latents."""

from dataclasses import asdict
from typing import Any

from halo_fast.data.clips import write_clip
from halo_fast.data.prompts import prompt_source, read_prompts
from halo_fast.errors import UserError
from halo_fast.families import load, source
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import progress, write_parquet, write_safetensors
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["clip_seed", "generate", "prompt_source", "read_prompts", "sample_clips"]


def generate(config: Config, run: Run) -> None:
    """Sample `num_videos_per_prompt` clips of each prompt; a stage.

    A killed run is continued at the first unfinished batch; batches are always formed alike, because floating-point
    results on some devices depend on the shape of the batch.

    Raises:
        UserError: prompts, model, clip size or grid that do not fit.
    """
    import pyarrow

    settings = config.generate
    prompts = read_prompts(config.prompts, settings.num_prompts, config.seed)
    model = config.pretrained_model_name_or_path
    inputs = {"prompts": prompt_source(config.prompts), "pretrained_model_name_or_path": source(model)}
    with run.stage("generate", asdict(settings) | {"seed": config.seed}, inputs) as stage:
        if stage.done:
            return
        family = load(model)
        latent_size = family.latent_size(family.latent_shape(settings.num_frames, settings.height, settings.width))
        if any(patches > length for patches, length in zip(config.grid, latent_size, strict=True)):
            raise UserError(
                f"grid: at most {latent_size} patches along frames, height and width of this model's latents, "
                f"got {tuple(config.grid)}; use fewer patches or larger clips"
            )
        clips: list[dict[str, Any]] = [
            {
                "clip_id": (clip_id := f"p{index:04d}_s{candidate}"),
                "prompt_id": index,
                "prompt": prompt,
                "candidate": candidate,
                "seed": clip_seed(config.seed, index, candidate),
                "video": f"videos/{clip_id}.mp4",
                "latents": f"latents/{clip_id}.safetensors",
            }
            for index, prompt in enumerate(prompts)
            for candidate in range(settings.num_videos_per_prompt)
        ]
        batches = [clips[start : start + settings.batch_size] for start in range(0, len(clips), settings.batch_size)]
        for batch in progress(batches, len(batches), "generate"):
            if all((stage.folder / clip[kind]).exists() for clip in batch for kind in ("video", "latents")):
                continue
            latents, videos = sample_clips(
                family, [clip["prompt"] for clip in batch], [clip["seed"] for clip in batch], settings
            )
            for clip, latent, video in zip(batch, latents, videos, strict=True):
                write_safetensors(stage.folder / clip["latents"], {"latents": latent})
                write_clip(stage.folder / clip["video"], video, settings.fps)
        write_parquet(stage.folder / "clips.parquet", pyarrow.Table.from_pylist(clips))
        stage.finish({"prompts": len(prompts), "clips": len(clips)})
