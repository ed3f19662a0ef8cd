"""Candidates of the base model: k clips of every prompt with recorded seeds, as mp4 and as latents."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.config import Config, GenerateConfig
from halo_fast.data.clips import write_clip
from halo_fast.families import Family, load, source
from halo_fast.runs import Run, UserError, progress, write_parquet, write_safetensors

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


def sample_clips(
    family: Family, prompts: Sequence[str], seeds: Sequence[int], settings: GenerateConfig
) -> tuple[Tensor, Tensor]:
    """One clip for each prompt and seed, in one batch through the pipeline.

    Every clip starts from noise of its own generator, and prompts are encoded one at a time, so that a clip depends on
    its batch at most through the rounding of batched kernels.

    Returns:
        latents float32 [N, *latent_shape] in model space and videos uint8 [N, F, H, W, 3], both on the CPU.
    """
    shape = family.latent_shape(settings.num_frames, settings.height, settings.width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    encoded = {prompt: family.encode_prompts([prompt])[0] for prompt in dict.fromkeys(prompts)}
    latents = family.sample(
        [encoded[prompt] for prompt in prompts],
        noise,
        video_size=(settings.num_frames, settings.height, settings.width),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    return latents.cpu(), family.decode(latents).cpu()


def clip_seed(seed: int, prompt_index: int, candidate: int) -> int:
    """Seed of one clip, from 0 to 2**32 - 1 (all that a CPU generator uses), spread evenly by a hash."""
    digest = hashlib.sha256(f"clip {seed} {prompt_index} {candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def prompt_source(prompts: str) -> Path | str:
    """What identifies a list of prompts as a stage's input: the file, or the name of a list of the demo."""
    return prompts if prompts.startswith("demo:") else Path(prompts)


def read_prompts(prompts: str, count: int, seed: int = 0, setting: str = "prompts") -> list[str]:
    """The first `count` prompts of a text file (fewer if it is shorter), or of "demo:train" and "demo:heldout".

    Mistakes are reported under the name `setting`.

    Raises:
        UserError: a missing or unreadable file, an empty line, no prompts.
    """
    if prompts.startswith("demo:"):
        from halo_fast.demo import world

        if prompts not in ("demo:train", "demo:heldout"):
            raise UserError(f'{setting}: expected "demo:train", "demo:heldout" or a text file, got {prompts!r}')
        try:
            return world.prompts("train" if prompts == "demo:train" else "heldout", count, seed)
        except ValueError as error:
            raise UserError(f"{setting}: {error}; lower num_prompts") from error
    try:
        lines = Path(prompts).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{setting}: expected a text file with one prompt a line, got {prompts!r} ({reason})"
        ) from error
    if lines == [""]:
        raise UserError(f"{setting}: {prompts} holds no prompts; write one a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{setting}: {prompts} line {number} is empty; write a prompt there or remove the line")
    return [line.strip() for line in lines[:count]]
