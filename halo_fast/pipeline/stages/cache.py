"""The stage that keeps what training reads instead of running autoencoder and text encoder."""

import os
import shutil
from pathlib import Path
from typing import Any

from halo_fast.data.clips import read_clip
from halo_fast.families import Family, load, source
from halo_fast.families.fingerprint import fingerprint
from halo_fast.files import hash_file, hash_text, progress, read_table, replacing, write_parquet, write_safetensors
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["build_cache"]


def build_cache(config: Config, run: Run) -> None:
    """Latents of every paired clip and conditions of every paired prompt, as files named by content, and their index.

    Latents that generation left behind are taken as they are; a clip without is encoded from its mp4.

    Raises:
        UserError: a clip that cannot be read, named.
    """
    import pyarrow

    clips_folder, pairs_file = run.require("generate"), run.require("pairs/pairs.parquet")
    name = config.pretrained_model_name_or_path
    inputs = {"clips": clips_folder, "pairs": pairs_file, "pretrained_model_name_or_path": source(name)}
    with run.stage("cache", config.cache, inputs) as stage:
        if stage.done:
            return
        pairs = read_table(pairs_file).to_pylist()
        paired = {pair[side] for pair in pairs for side in ("clip_a", "clip_b")}
        clips = read_table(clips_folder / "clips.parquet").to_pylist()
        clips = [clip for clip in clips if clip["clip_id"] in paired]
        prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
        family = load(name)
        vae, text = fingerprint([family.vae]), fingerprint(family.text_parts)
        rows = []
        for clip in progress(clips, len(clips), "cache: latents"):
            file = _cache_latents(family, vae, clips_folder, clip, stage.folder)
            rows.append({"kind": "latents", "id": clip["clip_id"], "file": file, "content_hash": Path(file).stem})
        for prompt in progress(prompts, len(prompts), "cache: text"):
            key = hash_text(f"prompt {prompt} text {text}")
            file = f"text/{key}.safetensors"
            if not (stage.folder / file).exists():
                write_safetensors(stage.folder / file, family.encode_prompts([prompt])[0])
            rows.append({"kind": "text", "id": prompt, "file": file, "content_hash": key})
        write_parquet(stage.folder / "index.parquet", pyarrow.Table.from_pylist(rows))
        stage.finish({"clips": len(clips), "prompts": len(prompts)})


def _cache_latents(family: Family, vae: str, clips_folder: Path, clip: dict[str, Any], folder: Path) -> str:
    video = clips_folder / clip["video"]
    latents = clips_folder / clip["latents"] if clip["latents"] else None
    key = hash_text(f"latents {hash_file(latents)}" if latents else f"clip {hash_file(video)} vae {vae}")
    file = folder / "latents" / f"{key}.safetensors"
    if not file.exists():
        if latents is None:
            write_safetensors(file, {"latents": family.encode(read_clip(video)[None])[0].cpu()})
        else:
            with replacing(file) as temporary:
                _link(latents, temporary)
    return file.relative_to(folder).as_posix()


def _link(source_file: Path, target: Path) -> None:
    try:
        os.link(source_file, target)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source_file, target)
