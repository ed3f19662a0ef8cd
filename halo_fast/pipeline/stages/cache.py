"""The stage that keeps what training reads instead of running autoencoder and text encoder."""

from pathlib import Path

from halo_fast import processes
from halo_fast.data.cache import images_cache, latents_cache, prompts_cache
from halo_fast.data.imports import keeps_formats
from halo_fast.data.tables import CacheRow, PairRow, read_rows, shared_rows, write_rows
from halo_fast.families import load, source
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.pictures import check_pictures
from halo_fast.pipeline.run import Run

__all__ = ["build_cache"]

_BATCH = 16  # clips or prompts that a process takes at once


def build_cache(config: Config, run: Run) -> None:
    """Keep latents of every paired clip and conditions of every paired prompt, in image-to-video of first frames too.

    Reads the clips of generate and import, and pairs/pairs.parquet. Writes cache/index.parquet and the files that it
    lists.

    Raises:
        UserError: a clip that cannot be read, or, in image-to-video, a pair whose clips begin with different frames.
    """
    found, pairs_file = run_clips(run), run.require("pairs/pairs.parquet")
    model = config.pretrained_model_name_or_path
    inputs = found.inputs | {"pairs": pairs_file}
    sources: dict[str, Path | str] = {**inputs, "pretrained_model_name_or_path": source(model)}
    with run.stage("cache", {"precision": config.precision}, sources) as stage:
        if stage.done:
            return
        pairs = read_rows(pairs_file, PairRow)
        paired = {clip for pair in pairs for clip in (pair.clip_a, pair.clip_b)}
        clips = [clip for clip in found.rows if clip.clip_id in paired]
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
        family = load(model, precision=config.precision, weights="encoders")
        folder = stage.folder
        groups = [clips[start : start + _BATCH] for start in range(0, len(clips), _BATCH)]
        rows = shared_rows(folder, "latents", groups, latents_cache(family, found.folder, folder), CacheRow)
        texts = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
        rows += shared_rows(folder, "text", texts, prompts_cache(family, folder), CacheRow)
        check_pictures(family, config)
        if family.image_conditions:
            videos = {clip.clip_id: found.folder / clip.video for clip in clips}
            parts = [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]
            own = bool(config.imports.sources) and keeps_formats(config.imports)
            keep = images_cache(family, videos, folder, None if own else config.generate.num_frames)
            rows += shared_rows(folder, "image", parts, keep, CacheRow)
        if not processes.is_first():
            return
        write_rows(stage.folder / "index.parquet", rows, CacheRow)
        stage.finish({"clips": len(clips), "prompts": len(prompts)})
