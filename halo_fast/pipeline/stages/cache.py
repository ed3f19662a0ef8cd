"""The stage that keeps what training reads instead of running autoencoder and text encoder."""

from halo_fast.data.cache import cache_latents, cache_prompts
from halo_fast.data.tables import CacheRow, ClipRow, PairRow, read_rows, write_rows
from halo_fast.families import load, source
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["build_cache"]


def build_cache(config: Config, run: Run) -> None:
    """Keep latents of every paired clip and conditions of every paired prompt.

    Reads generate/ and pairs/pairs.parquet, writes cache/index.parquet and the files that it lists.

    Raises:
        UserError: a clip that cannot be read.
    """
    clips_folder, pairs_file = run.require("generate"), run.require("pairs/pairs.parquet")
    model = config.pretrained_model_name_or_path
    inputs = {"clips": clips_folder, "pairs": pairs_file, "pretrained_model_name_or_path": source(model)}
    with run.stage("cache", {"precision": config.precision}, inputs) as stage:
        if stage.done:
            return
        pairs = read_rows(pairs_file, PairRow)
        paired = {clip for pair in pairs for clip in (pair.clip_a, pair.clip_b)}
        clips = [clip for clip in read_rows(clips_folder / "clips.parquet", ClipRow) if clip.clip_id in paired]
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
        family = load(model, precision=config.precision)
        rows = cache_latents(family, clips, clips_folder, stage.folder) + cache_prompts(family, prompts, stage.folder)
        write_rows(stage.folder / "index.parquet", rows, CacheRow)
        stage.finish({"clips": len(clips), "prompts": len(prompts)})
