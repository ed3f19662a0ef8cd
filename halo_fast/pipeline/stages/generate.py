"""The stage that samples candidates of the base model: clips of every prompt with recorded seeds."""

import logging
from collections.abc import Sequence
from dataclasses import asdict

from halo_fast.data.clips import write_clip
from halo_fast.data.prompts import prompt_source, read_prompts, shared_prompts
from halo_fast.data.tables import ClipRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.families import Family, load, source
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import progress, write_safetensors
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run, Stage

__all__ = ["generate", "warn_of_leakage"]

logger = logging.getLogger(__name__)


def generate(config: Config, run: Run) -> None:
    """Sample `num_videos_per_prompt` clips of each prompt.

    Writes generate/clips.parquet, videos/CLIP.mp4 and latents/CLIP.safetensors. A killed run is continued at the first
    unfinished batch. Batches are formed alike in every run, because on some devices rounding depends on their shape.

    Raises:
        UserError: prompts, model, clip size or grid that do not fit.
    """
    settings = config.generate
    prompts = _prompts(config, run)
    warn_of_leakage(prompts, config)
    model = config.pretrained_model_name_or_path
    own = prompt_source(config.prompts) if config.prompts else run.require("import")
    inputs = {"prompts": own, "pretrained_model_name_or_path": source(model)}
    with run.stage(
        "generate", asdict(settings) | {"seed": config.seed, "precision": config.precision}, inputs
    ) as stage:
        if stage.done:
            return
        family = load(model, precision=config.precision)
        _check_grid(family, config)
        _warn_of_cut_prompts(family, prompts)
        clips = _clip_rows(prompts, settings.num_videos_per_prompt, config.seed)
        batches = [clips[start : start + settings.batch_size] for start in range(0, len(clips), settings.batch_size)]
        for batch in progress(batches, len(batches), "generate"):
            _generate_batch(family, batch, config, stage)
        write_rows(stage.folder / "clips.parquet", clips, ClipRow)
        stage.finish({"prompts": len(prompts), "clips": len(clips)})


def _prompts(config: Config, run: Run) -> list[str]:
    """The prompts of config.prompts; beside an import, if that is not set, those of the imported clips."""
    if config.prompts or not config.imports.sources:
        return read_prompts(config.prompts, config.generate.num_prompts, config.seed)
    rows = read_rows(run.require("import/clips.parquet"), ClipRow)
    return list(dict.fromkeys(row.prompt for row in rows))[: config.generate.num_prompts]


def warn_of_leakage(prompts: Sequence[str], config: Config) -> None:
    """Say how many evaluation prompts are also trained on, before anything is generated."""
    if not config.evaluation_prompts:
        return
    evaluation = read_prompts(
        config.evaluation_prompts, config.evaluate.num_prompts, config.seed, setting="evaluation_prompts"
    )
    shared = shared_prompts(prompts, evaluation)
    if shared:
        logger.warning(
            "evaluation_prompts: %d of %d are among the prompts that are trained on, such as %r; they are not held out",
            len(shared),
            len(evaluation),
            shared[0],
        )


def _warn_of_cut_prompts(family: Family, prompts: Sequence[str]) -> None:
    """List the prompts of which the text encoder reads only the beginning, before anything is generated."""
    cut = set(family.cut_prompts(prompts))
    for index, prompt in enumerate(prompts):
        if prompt in cut:
            logger.warning("prompts: number %d is longer than the text encoder reads: %r ...", index + 1, prompt[:60])
    if cut:
        logger.warning(
            "prompts: %d of %d are cut by the text encoder, but teacher and reward model judge the whole; shorten them",
            sum(prompt in cut for prompt in prompts),
            len(prompts),
        )


def _check_grid(family: Family, config: Config) -> None:
    settings = config.generate
    latent_size = family.latent_size(family.latent_shape(settings.num_frames, settings.height, settings.width))
    if any(patches > length for patches, length in zip(config.grid, latent_size, strict=True)):
        raise UserError(
            f"grid: at most {latent_size} patches along frames, height and width of this model's latents, "
            f"got {tuple(config.grid)}; use fewer patches or larger clips"
        )


def _clip_rows(prompts: Sequence[str], candidates: int, seed: int) -> list[ClipRow]:
    """A row for each candidate of each prompt, with its seed and its files."""
    return [
        ClipRow(
            clip_id=(clip_id := f"p{index:04d}_s{candidate}"),
            prompt_id=index,
            prompt=prompt,
            candidate=candidate,
            seed=clip_seed(seed, index, candidate),
            video=f"videos/{clip_id}.mp4",
            latents=f"latents/{clip_id}.safetensors",
        )
        for index, prompt in enumerate(prompts)
        for candidate in range(candidates)
    ]


def _generate_batch(family: Family, clips: Sequence[ClipRow], config: Config, stage: Stage) -> None:
    """Sample and write the clips of a batch, unless all of them exist."""
    if all((stage.folder / str(file)).exists() for clip in clips for file in (clip.video, clip.latents)):
        return
    latents, videos = sample_clips(
        family, [clip.prompt for clip in clips], [int(clip.seed or 0) for clip in clips], config.generate
    )
    layout = None if family.layout == "BCFHW" else {"layout": family.layout}
    for clip, latent, video in zip(clips, latents, videos, strict=True):
        write_safetensors(stage.folder / str(clip.latents), {"latents": latent}, layout)
        write_clip(stage.folder / clip.video, video, config.generate.fps, config.generate.crf)
